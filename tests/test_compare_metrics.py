"""KID and the bootstrap behind FD and KID, as theorems."""

import math

import pytest
import torch

from logsnr.evaluation import FeatureSpace, frechet_distance, kernel_distance
from logsnr.evaluation.metrics import Reference, bootstrap_counts, distances


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, f, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, f, generator=generator(seed), dtype=torch.float64)


def k(x, y):
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def double_loop(a, b, weights=None):
    """KID by its definition, over pairs of two different samples; weights repeat samples of a."""
    a, b = a.tolist(), b.tolist()
    w = [1.0] * len(a) if weights is None else weights.tolist()
    pairs = [(w[i] * w[j], k(a[i], a[j])) for i in range(len(a)) for j in range(len(a)) if i != j]
    within = math.fsum(c * v for c, v in pairs) / math.fsum(c for c, _ in pairs)
    other = [k(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
    cross = [w[i] * k(a[i], y) for i in range(len(a)) for y in b]
    return within + math.fsum(other) / len(other) - 2 * math.fsum(cross) / (math.fsum(w) * len(b))


def test_kid_is_its_definition_whatever_the_block(monkeypatch):
    a, b = normal(17, 3, 0), normal(23, 3, 1, mean=0.3)
    expected = double_loop(a, b)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "_BLOCK", 5)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kid_of_normals_is_unbiased():
    """In one dimension E k has the moments' closed form: KID(N(m, 1), N(0, 1)) = 3 m^2 + 3 m^4 + (m^3 + 3 m)^2."""
    for m in (0.0, 0.4):
        values = torch.tensor(
            [kernel_distance(normal(30, 1, 2 * i, mean=m), normal(40, 1, 2 * i + 1)) for i in range(400)]
        )
        exact = 3 * m**2 + 3 * m**4 + (m**3 + 3 * m) ** 2
        assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / math.sqrt(len(values))


def test_a_replicate_is_the_statistic_of_the_repeated_samples():
    """Two replicates a and b have standard deviation |a - b|/sqrt(2)."""
    a, b = normal(12, 2, 0), normal(15, 2, 1, mean=0.5)
    counts = bootstrap_counts(12, 2, generator=generator(3))
    assert counts.sum(1).tolist() == [12, 12]
    reference = Reference(b)
    kids = [double_loop(a, b, w) for w in counts]
    assert reference.kernel(a, counts).stderr == pytest.approx(abs(kids[0] - kids[1]) / math.sqrt(2), rel=1e-9)
    fds = [frechet_distance(a.repeat_interleave(w.long(), 0), b) for w in counts]
    assert reference.frechet(a, counts).stderr == pytest.approx(abs(fds[0] - fds[1]) / math.sqrt(2), rel=1e-9)


def test_a_replicate_of_one_sample_alone_has_no_kid_and_spoils_none():
    reference, x = Reference(normal(15, 2, 1)), normal(4, 2, 0)
    counts = torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 0]])
    assert reference.kernel(x, counts).stderr == reference.kernel(x, counts[1:]).stderr > 0


@pytest.mark.parametrize("n", [4, 30])
def test_fd_is_its_definition_whether_samples_are_fewer_than_features_or_not(n):
    """tr (C_P^{1/2} C_Q C_P^{1/2})^{1/2} is the sum of the roots of the eigenvalues of C_P C_Q."""
    a, b = normal(n, 6, 0, mean=0.3), normal(40, 6, 1, std=1.3)
    p, q = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(p @ q).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + p.trace() + q.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-6)
    counts = bootstrap_counts(n, 2, generator=generator(3))
    fds = [frechet_distance(a.repeat_interleave(w.long(), 0), b) for w in counts]
    assert Reference(b).frechet(a, counts).stderr == pytest.approx(abs(fds[0] - fds[1]) / math.sqrt(2), rel=1e-6)


def test_bootstrap_error_is_the_spread_over_repetitions():
    """200 samples against one reference, 300 times: their standard deviation is known to 4 percent."""
    reference = Reference(normal(500, 3, 10**6, mean=0.5, std=1.3))
    counts = bootstrap_counts(200, 200, generator=generator(1))
    sets = [normal(200, 3, i) for i in range(300)]
    for distance in (reference.frechet, reference.kernel):
        spread = torch.tensor([distance(x).value for x in sets], dtype=torch.float64).std()
        told = torch.tensor([distance(x, counts).stderr for x in sets[:8]]).mean()
        assert float(told / spread) == pytest.approx(1, abs=0.15)


def test_kid_of_equal_distributions_is_zero_within_its_error_which_is_not_too_small():
    """A degenerate U-statistic: the naive bootstrap's error is up to sqrt(3) too large."""
    reference = Reference(normal(4000, 3, 10**6))
    counts = bootstrap_counts(100, 200, generator=generator(1))
    sets = [normal(100, 3, i) for i in range(200)]
    values = torch.tensor([reference.kernel(x).value for x in sets], dtype=torch.float64)
    told = torch.tensor([reference.kernel(x, counts).stderr for x in sets[:12]]).mean()
    assert 0.9 < float(told / values.std()) < 1.9
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(len(values)) + 0.02


def test_feature_space_measures_what_the_metrics_do_in_any_batch():
    reference, x = normal(50, 4, 0), normal(31, 4, 1, mean=0.2)
    space = FeatureSpace(name="halves", of=lambda v: v / 2, reference=reference / 2)
    fd, kid = space.distances(x, chunk=7)
    assert fd.value == pytest.approx(frechet_distance(x / 2, reference / 2), rel=1e-9)
    assert kid.value == pytest.approx(kernel_distance(x / 2, reference / 2), rel=1e-9)
    assert math.isnan(fd.stderr)


@pytest.mark.parametrize("shapes", [((1, 2), (5, 2)), ((5, 2), (5, 3)), ((5,), (5, 2))])
def test_kid_refuses(shapes):
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(*(torch.zeros(*s) for s in shapes))


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match="at least 2 of each"):
        bootstrap_counts(1, 10, generator=generator())
