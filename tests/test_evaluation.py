"""Distances between sets, the classifier behind them, and the comparison of samplers."""

import dataclasses
import math

import pytest
import torch

from logsnr import exact, grids, solvers
from logsnr.evaluation import Classifier, FeatureSpace, frechet_distance, nearest_distances, train_classifier
from logsnr.evaluation.compare import measure, plans
from logsnr.pixels import Pixels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_moments(n, mean, std):
    """n rows whose sample mean and (unbiased) covariance are exactly `mean` and diag(std^2)."""
    d = len(mean)
    z = torch.randn(n, d, generator=generator(1), dtype=torch.float64)
    z = z - z.mean(0)
    chol = torch.linalg.cholesky(torch.cov(z.T))
    white = torch.linalg.solve_triangular(chol, z.T, upper=False).T
    return white * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_frechet_distance_of_diagonal_gaussians():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 when the covariances commute."""
    a = exact_moments(50, [0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    b = exact_moments(80, [1.0, 1.0, 0.0], [2.0, 2.0, 1.5])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 1, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_correlated_gaussians_matches_the_matrix_formula():
    """In two dimensions tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    a = exact_moments(60, [0.0, 0.0], [1.0, 2.0]) @ torch.tensor([[1.0, 0.4], [0.0, 1.0]], dtype=torch.float64)
    b = exact_moments(60, [0.0, 0.0], [1.5, 0.7]) @ torch.tensor([[0.8, 0.0], [-0.6, 1.0]], dtype=torch.float64)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    product = ca @ cb
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    assert frechet_distance(a, b) == pytest.approx(float(ca.trace() + cb.trace() - 2 * root), rel=1e-9)


@pytest.mark.parametrize("shapes", [((1, 2), (5, 2)), ((5, 2), (5, 3)), ((5,), (5, 2))])
def test_frechet_distance_refuses(shapes):
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(*(torch.zeros(*s) for s in shapes))


def test_nearest_distances():
    references = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    queries = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert torch.allclose(nearest_distances(queries, references), torch.tensor([2 / math.sqrt(2), 0.0]).double())
    with pytest.raises(ValueError, match="at least one reference"):
        nearest_distances(queries, references[:0])


def stripes(n, seed):
    """Two classes of noisy 8x8 images: horizontal and vertical edges."""
    g = generator(seed)
    labels = torch.randint(0, 2, (n,), generator=g)
    base = torch.zeros(2, 1, 8, 8)
    base[0, :, :4] = 12
    base[1, :, :, :4] = 12
    noise = torch.randint(0, 5, (n, 1, 8, 8), generator=g)
    return (base[labels] + noise).to(torch.uint8), labels


def test_classifier_learns_repeats_and_is_calibrated():
    images, labels = stripes(256, 0)
    held_out = stripes(200, 1)
    state = torch.get_rng_state()
    one, two = (
        train_classifier(images, labels, held_out, grey_levels=17, generator=generator(5), epochs=4, batch=32)
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    with torch.no_grad():
        accuracy = (one(held_out[0]).argmax(1) == held_out[1]).double().mean()
        logits = one.head(one.features(held_out[0]))
    assert float(accuracy) > 0.97
    loss = [
        float(torch.nn.functional.cross_entropy(logits / (one.temperature * f), held_out[1])) for f in (0.9, 1, 1.1)
    ]
    assert loss[1] <= min(loss[0], loss[2]) + 1e-9


def test_classifier_refuses_unpaired_labels():
    images, labels = stripes(8, 0)
    with pytest.raises(ValueError, match="8 images with 7 labels"):
        train_classifier(images, labels[:7], (images, labels), grey_levels=17, generator=generator())


def test_shares_and_distances_of_a_classifier():
    classifier = Classifier(1, 3, Pixels(17)).eval()
    images = torch.randint(0, 17, (40, 1, 8, 8), generator=generator(2), dtype=torch.uint8)
    space = FeatureSpace(name="its own", of=classifier.features, reference=classifier.features(images).detach())
    assert space.distances(images)[0].value == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        confidence = classifier(images).max(1).values
    threshold = float(confidence.median())
    share = float((confidence >= threshold).double().mean())
    assert classifier.confident_share(images, threshold) == pytest.approx(share)


def test_measured_samplers_are_counted_ordered_and_kept():
    """On an exact mixture more evaluations land nearer to the teacher, and a noisy sampler has no such error."""
    means = torch.tensor([[-0.6] * 4, [0.5, 0.5, -0.5, -0.5]])
    model = exact.GaussianMixture(torch.tensor([0.4, 0.6]), means, 0.05 * torch.eye(4).expand(2, 4, 4))
    solvers_of = {"DDIM": solvers.ddim, "DDPM": solvers.ddpm}
    entries = [
        entry
        for name, make in solvers_of.items()
        for n in (5, 20)
        for entry in plans(model, {name: make(grids.log_linear(n, 20.0, 0.02))})
    ]
    kept = []

    def run(keep=None):
        space = FeatureSpace(name="x", of=lambda x: x, reference=model.sample(400, generator=generator(5)))
        return measure(model, entries, n=64, seed=4, teacher_steps=60, features=space, keep=keep)

    found = run(lambda entry, x: kept.append((entry, x)))
    assert [(row.name, row.evaluations) for row in found.rows] == [(e.solver, e.plan.nfe) for e in entries]
    few, many, noisy, _ = found.rows
    assert many.rmse.value < few.rmse.value / 2
    assert many.frechet.value < few.frechet.value
    assert noisy.rmse is None
    assert [entry for entry, _ in kept] == [None, *entries]
    end, *samples = (x for _, x in kept)
    assert few.rmse.value == pytest.approx(float((samples[0].double() - end.double()).square().mean().sqrt()))
    run(lambda entry, x: kept.append((entry, x)))
    assert torch.equal(kept[-2][1], samples[2])  # its noise is drawn from the seed


def test_noise_on_the_way_is_not_the_noise_of_the_start():
    """A stochastic step's draw beside the start: uncorrelated, so that the samples are those of the sampler."""
    model, started, drawn = exact.Gaussian(torch.zeros(4), torch.eye(4)), [], []

    def run(denoiser, noise, cond, generator):
        started.append(noise)
        drawn.append(torch.randn(noise.shape, generator=generator))
        return noise

    (entry,) = plans(model, {"DDPM": solvers.ddpm(grids.log_linear(5, 20.0, 0.02))})
    measure(model, [dataclasses.replace(entry, run=run)], n=256)
    correlation = torch.corrcoef(torch.stack([started[0].flatten(), drawn[0].flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / 32
