"""Distances between sets, the classifier behind them, and the comparison of samplers."""

import math

import pytest
import torch

from logsnr import exact, grids, heun, solvers
from logsnr.evaluation import Classifier, Judge, compare_samplers, frechet_distance, nearest_distances, train_classifier
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


def test_judge_shares_and_distances():
    classifier = Classifier(1, 3, Pixels(17)).eval()
    images = torch.randint(0, 17, (40, 1, 8, 8), generator=generator(2), dtype=torch.uint8)
    judge = Judge(classifier=classifier, reference=images)
    assert judge.frechet(images) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        confidence = classifier(images).max(1).values
    threshold = float(confidence.median())
    assert judge.confident_share(images, threshold) == pytest.approx(float((confidence >= threshold).double().mean()))


def test_compare_samplers_counts_and_orders():
    """On an exact mixture more evaluations land nearer to the teacher, and a noisy sampler has no such error."""
    means = torch.tensor([[-0.6] * 4, [0.5, 0.5, -0.5, -0.5]])
    model = exact.GaussianMixture(torch.tensor([0.4, 0.6]), means, 0.05 * torch.eye(4).expand(2, 4, 4))
    noise = torch.randn(64, 4, generator=generator(3))
    teacher = heun(model, grids.karras(60, 20.0, 0.01), noise=noise)
    pixels = Pixels(17)

    class Flat(Classifier):
        def features(self, images):
            return self.pixels.encode(images).flatten(1)

        def forward(self, images):
            return torch.full((len(images), 2), 0.5)

    judge = Judge(classifier=Flat(1, 2, pixels), reference=pixels.decode(teacher))
    samplers = {
        "DDIM": lambda n: solvers.ddim(grids.log_linear(n, 20.0, 0.02)),
        "DDPM": lambda n: solvers.ddpm(grids.log_linear(n, 20.0, 0.02)),
    }
    rows = compare_samplers(model, samplers, (5, 20), noise=noise, teacher=teacher, judge=judge, pixels=pixels, seed=4)
    assert [(q.sampler, q.nfe) for q in rows] == [("DDIM", 5), ("DDIM", 20), ("DDPM", 5), ("DDPM", 20)]
    assert rows[1].rmse < rows[0].rmse / 2
    assert rows[2].rmse is None
    assert rows[1].frechet < rows[0].frechet
    again = compare_samplers(model, samplers, (5,), noise=noise, teacher=teacher, judge=judge, pixels=pixels, seed=4)
    assert torch.equal(again[1].images, rows[2].images)
