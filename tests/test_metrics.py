"""Metrics of samples that stream by: closed forms, definitions written out, and errors that cover."""

import math

import pytest
import torch

from logsnr.errors import LogsnrError
from logsnr.evaluation import FeatureSpace
from logsnr.evaluation.metrics import (
    Moments,
    Normal,
    frechet_distance,
    kernel,
    kernel_distance,
    kernel_estimate,
    neighbourhoods,
    neighbours,
    student,
    summarise,
)
from logsnr.evaluation.metrics.classes import SPLITS, Scores
from logsnr.evaluation.metrics.measures import METRICS, Gathered, Measuring, Reference, measured, wanted


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, f, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, f, generator=generator(seed), dtype=torch.float64)


def exactly(mean, covariance, n=2):
    """Moments that are a Gaussian's own, as of infinitely many rows."""
    out = Moments(len(mean))
    out.n, out.mean, out.scatter = n, mean, covariance * (n - 1)
    return out


def correlated(f, seed):
    a = normal(3 * f, f, seed)
    return a.T @ a / len(a)


@pytest.mark.parametrize("cuts", [(50,), (1, 49), (7, 0, 20, 23)])
def test_moments_are_those_of_all_rows_however_they_come(cuts):
    x = normal(50, 4, 0, mean=1e6)
    streamed, joined = Moments(4), Moments(4)
    for part in torch.split(x, cuts):
        streamed.add(part)
        joined = joined + Moments.of(part)
    for found in (streamed, joined):
        assert found.n == 50
        assert torch.allclose(found.mean, x.mean(0), rtol=1e-14)
        assert torch.allclose(found.covariance, torch.cov(x.T), atol=1e-8)


def test_fd_of_gaussians_has_its_closed_forms():
    """Commuting covariances: |m - m'|^2 + sum (s - s')^2.  In general tr (A B)^{1/2} by the eigenvalues of A B."""
    s, t, m = (torch.rand(6, generator=generator(i), dtype=torch.float64) + 0.2 for i in range(3))
    reference = Normal(torch.zeros(6, dtype=torch.float64), torch.diag(t**2))
    exact = float(m.square().sum() + (s - t).square().sum())
    assert reference.frechet(exactly(m, torch.diag(s**2))).value == pytest.approx(exact, rel=1e-10)
    a, b = correlated(6, 3), correlated(6, 4)
    exact = float(a.trace() + b.trace() - 2 * torch.linalg.eigvals(a @ b).real.sqrt().sum())
    assert Normal(m, b).frechet(exactly(m, a)).value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n", [5, 60])
def test_fd_of_samples_is_its_definition_whether_they_are_fewer_than_features_or_not(n):
    """tr (C_P^{1/2} C_Q C_P^{1/2})^{1/2} is the sum of the roots of the eigenvalues of C_P C_Q."""
    x, y = normal(n, 8, 0, mean=0.3), normal(90, 8, 1, std=1.2)
    p, q = torch.cov(x.T), torch.cov(y.T)
    cross = torch.linalg.eigvals(p @ q).real.clamp(min=0).sqrt().sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + p.trace() + q.trace() - 2 * cross)
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-6)
    found = Reference.of(y).normal.frechet(Moments.of(x))
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert math.isnan(found.stderr)


def test_the_error_of_fd_is_that_of_leaving_out_each_sample():
    """The infinitesimal jackknife against the jackknife, which takes a decomposition per sample."""
    x, y = normal(400, 3, 0, mean=0.5), normal(90, 3, 1, std=1.3)
    m = Moments.of(y)
    reference = Normal(m.mean, m.covariance)
    without = [reference.frechet(Moments.of(torch.cat([x[:i], x[i + 1 :]]))).value for i in range(400)]
    jackknife = math.sqrt(399 / 400 * float((torch.tensor(without) - sum(without) / 400).square().sum()))
    assert reference.frechet(Moments.of(x), x).stderr == pytest.approx(jackknife, rel=0.02)


def test_the_error_of_fd_is_finite_where_samples_span_less_than_the_space():
    x = normal(40, 2, 0) @ normal(2, 5, 1)
    found = Normal(torch.zeros(5, dtype=torch.float64), correlated(5, 2)).frechet(Moments.of(x), x)
    assert 0 < found.stderr < found.value


def test_a_difference_of_fds_of_the_same_noise_has_an_error_of_its_own():
    """200 draws of two sets of 150 samples, one a small step from the other: covered, and far below either's error."""
    y = normal(300, 4, 10**6)
    reference, gaps, loose = Reference.of(y).normal, [], []
    for i in range(200):
        x, step = normal(150, 4, i, mean=0.3), 0.1 * normal(150, 4, 10**5 + i)
        a, b = (reference.influenced(Moments.of(rows), rows) for rows in (x, 1.05 * x + step))
        gaps.append(b.beyond(a))
        loose.append(math.hypot(a.estimated.stderr, b.estimated.stderr))
    errors = [gap.stderr for gap in gaps]
    assert 0.9 <= covered([gap.value for gap in gaps], errors) <= 0.99
    assert sum(errors) < 0.3 * sum(loose)
    assert a.beyond(a).stderr == a.beyond(a).value == 0


def test_errors_within_classes_count_their_means():
    """Of two rows a class the spread within is half as free; of one row a class there is none to be had."""
    reference = Normal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    x = normal(400, 3, 0, mean=0.5)
    plain, pairs, alone = (
        reference.frechet(Moments.of(x), x, strata).stderr
        for strata in (None, torch.arange(400) // 2 * 7, torch.arange(400))
    )
    assert pairs == pytest.approx(plain, rel=0.15)
    assert alone == plain


def covered(values, errors, truth=None):
    values, errors = (torch.as_tensor(column, dtype=torch.float64) for column in (values, errors))
    centre = values.mean() if truth is None else truth
    return float(((values - centre).abs() < 2 * errors).double().mean())


def test_two_errors_cover_and_the_bias_of_fd_goes():
    """200 draws of 200 samples: of their own mean; of the truth for the limit of infinitely many samples."""
    spread = torch.arange(1, 9, dtype=torch.float64) ** -0.5
    y = normal(150, 8, 10**6) * spread
    m = Moments.of(y)
    reference = Normal(m.mean, m.covariance)
    shift = 0.3 * spread
    truth = reference.frechet(exactly(shift, torch.diag((0.9 * spread) ** 2))).value
    found = {name: [] for name in ("fd", "fd-inf", "kid")}
    for i in range(200):
        x = normal(200, 8, i) * spread * 0.9 + shift
        found["fd"].append(reference.frechet(Moments.of(x), x))
        quarters = [Moments.of(part) for part in torch.split(x, 50)]
        found["fd-inf"].append(reference.extrapolated(quarters, found["fd"][-1]))
        found["kid"].append(kernel_estimate(x, y))
    values = {name: [e.value for e in each] for name, each in found.items()}
    for name, each in found.items():
        share = covered(values[name], [e.stderr for e in each], truth if name == "fd-inf" else None)
        assert 0.9 <= share <= 0.98, name
    bias = [sum(values[name]) / 200 - truth for name in ("fd", "fd-inf")]
    assert bias[0] > 0.02
    assert abs(bias[1]) < bias[0] / 5


def test_the_limit_needs_samples():
    reference = Normal(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    x = normal(63, 8, 0)
    quarters = [Moments.of(part) for part in torch.tensor_split(x, 4)]
    with pytest.raises(ValueError, match="63 samples of 8 features: the limit takes 64 or more"):
        reference.extrapolated(quarters, reference.frechet(Moments.of(x)))


def double_loop(a, b):
    """KID by its definition, over pairs of two different rows."""

    def k(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return math.fsum(pairs) / len(pairs)

    a, b = a.tolist(), b.tolist()
    return within(a) + within(b) - 2 * math.fsum(k(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kid_is_its_definition_whatever_the_block(monkeypatch):
    x, y = normal(17, 3, 0, mean=0.2), normal(23, 3, 1)
    expected = double_loop(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(kernel, "_BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert Reference.of(y).kernel(x).value == pytest.approx(expected, rel=1e-5)  # rows are kept in float32
    assert kernel_distance(x[:2], y) == pytest.approx(double_loop(x[:2], y), rel=1e-9)
    assert math.isnan(kernel_estimate(x[:2], y).stderr)


def test_kid_of_normals_is_unbiased():
    """In one dimension E k has the moments' closed form: KID(N(m, 1), N(0, 1)) = 3 m^2 + 3 m^4 + (m^3 + 3 m)^2."""
    for m in (0.0, 0.4):
        values = torch.tensor(
            [kernel_distance(normal(30, 1, 2 * i, mean=m), normal(40, 1, 2 * i + 1)) for i in range(400)]
        )
        exact = 3 * m**2 + 3 * m**4 + (m**3 + 3 * m) ** 2
        assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("shapes", [((1, 2), (5, 2)), ((5, 2), (5, 3)), ((5,), (5, 2))])
def test_distances_refuse(shapes):
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="at least 2 rows"):
            distance(*(torch.zeros(*s) for s in shapes))


def test_a_feature_space_measures_what_the_metrics_do_in_any_chunk():
    reference, x = normal(50, 4, 0), normal(31, 4, 1, mean=0.2)
    space = FeatureSpace(name="halves", of=lambda v: v / 2, reference=reference / 2)
    fd, kid = space.distances(x, chunk=7)
    assert fd.value == pytest.approx(frechet_distance(x / 2, reference / 2), rel=1e-9)
    assert kid.value == pytest.approx(kernel_distance(x / 2, reference / 2), rel=1e-4)
    moments = Moments.of(reference / 2)
    alone = Reference(mean=moments.mean, covariance=moments.covariance)
    again = FeatureSpace(name="halves", of=lambda v: v / 2, reference=alone).distances(x)
    assert again[0].value == pytest.approx(fd.value, rel=1e-9)
    assert again[1] is None


def test_intervals_over_few_seeds_are_students():
    """The 97.5 % quantiles of every table; of means of three normal draws the interval covers 95 %."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 10: 2.22814, 30: 2.04227, 1000: 1.96234}
    assert {d: student(d) for d in table} == pytest.approx(table, rel=1e-5)
    assert student(4, 0.99) == pytest.approx(4.60409, rel=1e-5)
    draws = normal(2000, 3, 0).tolist()
    found = [summarise(row) for row in draws]
    assert sum(not one.decided for one in found) / 2000 == pytest.approx(0.95, abs=0.015)
    one = summarise([2.0, 4.0])
    assert (one.mean, one.stderr, one.half) == pytest.approx((3.0, 1.0, 12.7062), rel=1e-5)
    alone = summarise([2.0])
    assert alone.mean == 2.0
    assert math.isnan(alone.half)
    assert not alone.decided
    for wrong in (lambda: summarise([]), lambda: student(0), lambda: student(3, 1.0)):
        with pytest.raises(ValueError, match="give"):
            wrong()


def test_the_error_of_kid_is_right_where_the_distributions_are_equal():
    """A degenerate U-statistic, whose bootstrapped error is up to 1.7 times too large."""
    y = normal(300, 3, 10**6)
    found = [kernel_estimate(normal(100, 3, i), y) for i in range(100)]
    spread = torch.tensor([e.value for e in found]).std()
    assert float(torch.tensor([e.stderr for e in found]).mean() / spread) == pytest.approx(1, abs=0.2)


def balls(centres, k):
    """(centre, radius) of every point, by sorting."""
    distances = [sorted(math.dist(a, b) for b in centres) for a in centres]
    return list(zip(centres, (d[k] for d in distances), strict=True))


@pytest.mark.parametrize("width", [2, 80])
def test_neighbours_are_their_definitions(monkeypatch, width):
    monkeypatch.setattr(neighbours, "_BLOCK", 9)
    x, y = normal(31, width, 0, mean=0.5, std=0.7), normal(40, width, 1)
    a, b, k = x.tolist(), y.tolist(), 3
    of_data, of_samples = balls(b, k), balls(a, k)

    def share(points, inside):
        return sum(map(bool, inside)) / len(points)

    around = [sum(math.dist(p, c) <= r for c, r in of_data) for p in a]
    expected = {
        "precision": share(a, around),
        "recall": share(b, [any(math.dist(p, c) <= r for c, r in of_samples) for p in b]),
        "density": sum(around) / (k * len(a)),
        "coverage": share(b, [any(math.dist(p, c) <= r for p in a) for c, r in of_data]),
    }
    found = neighbourhoods(x, y, k)
    assert {name: one.value for name, one in found.items()} == pytest.approx(expected, abs=1e-12)


def test_errors_of_neighbours_cover():
    """40 draws against one set of data."""
    spread = torch.arange(1, 9) ** -0.5
    y = normal(400, 8, 10**6).float() * spread
    found = [neighbourhoods(normal(400, 8, i).float() * spread * 0.9 + 0.1, y) for i in range(40)]
    for name in ("precision", "recall", "density", "coverage"):
        each = [one[name] for one in found]
        values, errors = (torch.tensor([getattr(e, part) for e in each]) for part in ("value", "stderr"))
        assert covered(values, errors) >= 0.88, name
        assert 0.8 < float(errors.mean() / values.std()) < 1.4, name


def test_the_inception_score_has_its_closed_forms():
    """One class each of C: C.  One for all, or no idea: 1.  Half sure of two: exp of their KL."""
    part = torch.arange(200) % SPLITS
    for probabilities, expected in (
        (torch.eye(4)[torch.arange(200) // SPLITS % 4], 4.0),
        (torch.eye(4)[torch.zeros(200, dtype=torch.long)], 1.0),
        (torch.full((200, 4), 0.25), 1.0),
        (torch.tensor([[0.8, 0.2], [0.2, 0.8]])[torch.arange(200) // SPLITS % 2], 2 * 0.8**0.8 * 0.2**0.2),
    ):
        scores = Scores()
        for rows, which in zip(torch.split(probabilities, 30), torch.split(part, 30), strict=True):
            scores.add(rows, which)
        assert scores.score.value == pytest.approx(expected, rel=1e-6)
        assert scores.score.stderr == pytest.approx(0, abs=1e-6)


def test_what_is_gathered_says_nothing_about_the_order():
    """Sorted by class or not, every quarter has both classes, and all of it is taken."""
    x = torch.cat([normal(500, 2, 0), normal(500, 2, 1, mean=9.0)])
    gathered = Gathered(1000, keep=100)
    for part in torch.split(x, 64):
        gathered.add(part)
    assert torch.allclose(gathered.moments.covariance, torch.cov(x.T), rtol=1e-9)
    assert [quarter.n for quarter in gathered.quarters] == [250] * 4
    means = torch.stack([quarter.mean for quarter in gathered.quarters])
    assert float((means - means.mean(0)).abs().max()) < 1.5
    assert gathered.kept.shape == (100, 2)
    assert 30 < int((gathered.kept[:, 0] > 4.5).sum()) < 70
    rows = {tuple(row) for row in x.float().tolist()}
    assert {tuple(row) for row in gathered.kept.tolist()} <= rows
    with pytest.raises(ValueError, match="more than the 1000 samples"):
        gathered.add(x[:1])
    with pytest.raises(LogsnrError, match="0 of 5 samples"):
        _ = Gathered(5).quarters
    with pytest.raises(LogsnrError, match="NaN or infinite"):
        Gathered(5).add(torch.full((5, 2), torch.nan))


def test_classes_dealt_in_turn_are_no_draws_of_classes():
    """Six far classes in turn: of 50 sets the error covers, the limit is the truth; as independent draws, neither."""
    means, strata = 5 * torch.eye(6, dtype=torch.float64), torch.arange(288) % 6
    covariance = torch.eye(6, dtype=torch.float64) + 25 * (torch.eye(6) / 6 - 1 / 36)  # within, and between
    m = exactly(means.mean(0), 1.1 * covariance)
    reference = Normal(m.mean, m.covariance)
    truth = reference.frechet(exactly(means.mean(0), covariance)).value
    values = {True: [], False: []}
    for i in range(50):
        x = normal(288, 6, 10 + i) + means[strata]
        for dealt in (True, False):
            gathered = Gathered(288, strata=strata if dealt else None)
            gathered.add(x)
            found = Measuring(gathered, Reference(mean=m.mean, covariance=m.covariance))
            values[dealt].append((found.frechet.value, found.frechet.stderr, found.limit().value))
    fd, errors, limits = (torch.tensor(column) for column in zip(*values[True], strict=True))
    assert 0.9 <= covered(fd, errors) <= 0.99
    assert abs(float(limits.mean()) - truth) < 3 * float(limits.std()) / 7
    _, loose, off = (torch.tensor(column) for column in zip(*values[False], strict=True))
    assert float(loose.mean()) > 1.25 * float(errors.mean())
    assert float(off.mean()) < truth - 3 * float(off.std()) / 7


def test_every_metric_by_name_is_its_function():
    x, y = normal(300, 3, 0, mean=0.2), normal(200, 3, 1)
    gathered, m = Gathered(300), Moments.of(y)
    gathered.add(x, torch.softmax(x, 1))
    found = measured(
        Measuring(gathered, Reference(mean=m.mean, covariance=m.covariance, rows=y.float())), METRICS, asked=True
    )
    assert list(found) == ["fd", "fd-inf", "kid", "is", "precision", "recall", "density", "coverage"]
    assert found["fd"].value == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert found["fd-inf"].value < found["fd"].value
    assert found["kid"].value == pytest.approx(kernel_distance(x.float(), y.float()), rel=1e-5)
    assert found["density"].value == pytest.approx(neighbourhoods(x.float(), y.float())["density"].value, rel=1e-9)
    assert all(one.stderr > 0 for one in found.values())


def test_metrics_that_cannot_be_had():
    m = Moments.of(normal(150, 30, 1))
    gathered = Gathered(20)
    gathered.add(normal(20, 30, 0))
    measuring = Measuring(gathered, Reference(mean=m.mean, covariance=m.covariance))
    assert wanted((), rows=False, classes=False) == ("fd", "fd-inf")
    assert wanted((), rows=True, classes=True) == tuple(METRICS)
    assert list(measured(measuring, ("fd", "fd-inf"), asked=False)) == ["fd"]
    with pytest.raises(LogsnrError, match=r"metric .fdd. is not one of .* did you mean .fd."):
        wanted(("fdd",), rows=True, classes=True)
    for name, said in (
        ("fd-inf", "fd-inf: 20 samples of 30 features"),
        ("kid", "hold moments and no features"),
        ("is", "no classifier"),
    ):
        with pytest.raises(LogsnrError, match=said):
            measured(measuring, (name,), asked=True)


def test_distances_are_torchmetrics():
    """Its FID and KID on features of one's own, where it is installed: 1e-10."""
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(torch.nn.Module):
        num_features = 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double().flatten(1)[:, :8]

    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 8, generator=g, dtype=torch.float64)
    b = 1.3 * torch.randn(500, 8, generator=g, dtype=torch.float64) + 0.2
    theirs = {
        frechet_distance: FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(8, 1, 1)),
        kernel_distance: KernelInceptionDistance(feature=Features(), normalize=True, subsets=1, subset_size=500),
    }
    for ours, metric in theirs.items():
        metric.set_dtype(torch.float64)
        metric.update(b.reshape(-1, 8, 1, 1), real=True)
        metric.update(a.reshape(-1, 8, 1, 1), real=False)
        found = metric.compute()
        assert ours(a, b) == pytest.approx(float(found[0] if isinstance(found, tuple) else found), rel=1e-10)
