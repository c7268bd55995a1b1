"""The measured error model: constructed errors come back, references of the wrong kind do not, gamma is the optimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.evaluation.error_model import consistency, relative_error, trajectory_error
from logsnr.evaluation.gamma import StepCovariance, error_covariance, w_norm_gamma
from logsnr.exact import PointCloud
from logsnr.noise import alpha_s
from logsnr.projection import Flat, Points, ReferenceSet
from logsnr.sampling import Plan, grids, sample, solvers
from logsnr.theory import distance_bounds, grid_between, is_admissible

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class Erring(Denoiser):
    """x0 = p + eta(sigma) (y - p): a projection with a radial relative error; nan for states listed in `broken`."""

    trained_range = (0.0, math.inf)
    sigma_data = 1.0

    def __init__(self, reference: ReferenceSet, eta: Any, broken: float | None = None) -> None:
        super().__init__()
        self.reference, self.eta, self.broken, self.shape = reference, eta, broken, reference.shape

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma)
        p = self.reference.project(z / alpha)
        x0 = p + self.eta(float(sigma)) * (z / alpha - p)
        if sigma == self.broken:
            x0[1] = math.nan
        return Estimate(x0, (z - alpha * x0) / s)


def eta(sigma: float) -> float:
    return 0.3 * sigma / (1 + sigma)


LEVELS = [0.01, 0.3, 2.0, 40.0]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_constructed_errors_come_back(dtype: torch.dtype) -> None:
    plane = Flat(randn(20, 3))
    x = plane.project(randn(70, 20, seed=1)).to(dtype)
    curve = relative_error(Erring(plane, eta), plane, x, LEVELS, generator=generator(), chunk=32)
    assert [level.sigma for level in curve.levels] == LEVELS[::-1]
    for level in curve.levels:
        accuracy = 1e-9 if dtype == F64 else 1e-4
        assert level.count == 70
        assert level.eta.quantiles == pytest.approx([eta(level.sigma)] * 4, abs=accuracy)
        assert level.eta.lowest == pytest.approx(eta(level.sigma), abs=accuracy)
        # The noise off a plane of 3 in 20 dimensions: dist / sigma is chi_17, and this is E[1/chi_17] sqrt(20).
        mean = math.sqrt(10) * math.exp(math.lgamma(8) - math.lgamma(8.5))
        assert level.ratio.mean == pytest.approx(mean, rel=0.05)
        assert level.nu.quantiles[-1] >= max(level.ratio.quantiles[-1], 1 / level.ratio.lowest) * (1 - 1e-12)
        assert level.eps_norm.mean == pytest.approx((1 - eta(level.sigma)) / level.ratio.mean, rel=0.05)


def test_quantiles_are_those_of_the_states() -> None:
    points, x = randn(30, 4), randn(200, 4, seed=1)
    model, reference = PointCloud(points), Points(points)
    curve = relative_error(model, reference, x, [0.7], generator=generator(), quantiles=(0.0, 0.25, 0.5, 1.0))
    noise = torch.randn(200, 4, generator=generator(), dtype=F64)
    y = x + 0.7 * noise
    p, x0 = reference.project(y), model(y / math.hypot(1, 0.7), 0.7).x0
    expected = ((x0 - p).norm(dim=1) / (y - p).norm(dim=1)).quantile(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64))
    assert curve.levels[0].eta.quantiles == pytest.approx(expected.tolist(), rel=1e-9)
    assert curve.eta(0.5) == [(0.7, pytest.approx(float(expected[2])))]
    assert curve.nu(1.0) == curve.levels[0].nu.quantiles[-1]
    with pytest.raises(ValueError, match=r"quantile 0.3 was not measured"):
        curve.eta(0.3)


def test_output_and_projection_belong_to_the_same_state() -> None:
    """The released script of the paper pairs x0 with the state after the step, which inflates both ratios."""
    points = Points(randn(40, 6))
    model, grid = PointCloud(points.points), grids.log_linear(12, 20.0, 0.05, last="min")
    noise = randn(64, 6, seed=1)
    curve = trajectory_error(model, points, solvers.ddim(grid), noise=noise, chunk=20)
    y = noise * math.hypot(1, grid[0])
    for i, level in enumerate(curve.levels):
        p, x0 = points.project(y), model(y / math.hypot(1, grid[i]), grid[i]).x0
        distance = (y - p).norm(dim=1)
        right = (x0 - p).norm(dim=1) / distance
        assert level.eta.mean == pytest.approx(float(right.mean()), rel=1e-7, abs=1e-12)
        y = x0 + grid[i + 1] / grid[i] * (y - x0)
        after = points.project(y)
        wrong = grid[i] * math.sqrt(6) / (y - after).norm(dim=1)
        assert float(wrong.median()) > level.ratio.quantiles[0]


def test_the_measured_curve_bounds_the_run_it_was_measured_on() -> None:
    """What `theory` concludes of the largest measured eta holds for the distances of that same run."""
    points = Points(randn(40, 64))
    model, grid = PointCloud(points.points), grids.log_linear(30, 20.0, 0.5, last="min")
    noise = randn(64, 64, seed=1)
    curve = trajectory_error(model, points, solvers.ddim(grid), noise=noise)
    worst = [level.eta.quantiles[-1] for level in curve.levels]
    assert 0.2 < max(worst) < 1
    lower, upper = distance_bounds(grid, worst)
    seen: list[Tensor] = []
    sample(
        model,
        solvers.ddim(grid),
        noise=noise,
        callback=lambda step: seen.append(points.distance(step.z * math.hypot(1, step.sigma))),
    )
    for low, high, distance in zip(lower, upper, seen, strict=True):
        assert bool((distance / seen[0] <= high * (1 + 1e-9)).all())
        assert bool((distance / seen[0] >= low * (1 - 1e-9)).all())


def test_non_finite_answers_are_counted_and_reference_points_are_no_ratio() -> None:
    point = Points(randn(1, 3))
    x = point.points.expand(5, 3)
    curve = relative_error(Erring(point, eta, broken=2.0), point, x, [0.3, 2.0], generator=generator())
    assert [(level.sigma, level.count, level.non_finite) for level in curve.levels] == [(2.0, 4, 1), (0.3, 5, 0)]
    everywhere = Erring(point, lambda sigma: math.nan)
    empty = relative_error(everywhere, point, x, [0.3], generator=generator()).levels[0]
    assert (empty.count, empty.non_finite) == (0, 5)
    assert math.isnan(empty.eta.mean)
    lost = consistency(everywhere, x, [0.3], generator=generator())[0]
    assert (lost.count, lost.non_finite) == (0, 5)
    noise = point.points * math.hypot(1, 1.0) ** -1
    on = trajectory_error(Erring(point, eta), point, solvers.ddim([1.0, 0.5]), noise=noise.expand(2, 3))
    assert on.levels[0].on_reference + on.levels[0].count == 2


def test_consistency_is_zero_for_projections_and_a_floor_of_eta() -> None:
    plane = Flat(randn(20, 3))
    x = plane.project(randn(50, 20, seed=1))
    for found in consistency(Erring(plane, lambda sigma: 0.0), x, LEVELS, generator=generator()):
        assert found.change.quantiles[-1] < 1e-9
    for value in (0.05, 0.3):
        for found in consistency(Erring(plane, lambda sigma, v=value: v), x, LEVELS, generator=generator()):
            # Radial: x0 moves by eta (1 - fraction) |y - x0|.
            assert found.change.quantiles == pytest.approx([value / 2] * 4, rel=1e-6)
            assert found.eta_floor.quantiles[-1] <= value


def test_consistency_against_the_true_eta_of_ideal_denoisers() -> None:
    """It follows eta where one or a few points decide, and misses a mean far from every point, as it must."""
    points = Points(randn(200, 8))
    model, x = PointCloud(points.points), randn(300, 8, seed=2)
    levels = [0.05, 0.3, 0.6, 30.0]
    true = {e.sigma: e.eta.mean for e in relative_error(model, points, x, levels, generator=generator()).levels}
    own = {e.sigma: e.change.mean for e in consistency(model, x, levels, generator=generator())}
    assert own[0.6] > own[0.3] > 10 * own[0.05]
    assert true[0.6] > true[0.3] > 10 * true[0.05]
    assert own[30.0] < 0.1 * true[30.0]


def test_w_norm_gamma() -> None:
    assert w_norm_gamma(5, -3, 2) == 2.0
    assert w_norm_gamma(1, 0, 3) == 0.25
    assert w_norm_gamma(0, 0, 0) == 1.0
    with pytest.raises(ValueError, match="positive"):
        w_norm_gamma(1, 2, 1)


class Noisy(Denoiser):
    """eps = g + a(sigma) U + b(sigma) V around one point, with U, V fixed orthogonal fields over the batch."""

    trained_range = (0.0, math.inf)
    sigma_data = 1.0
    shape = (4,)

    def __init__(self, point: Tensor, amplitudes: dict[float, tuple[float, float]], n: int) -> None:
        super().__init__()
        self.point, self.amplitudes = point, amplitudes
        fields = torch.linalg.qr(randn(n * 4, 2, seed=3))[0] * math.sqrt(n * 4)
        self.u, self.v = fields[:, 0].view(n, 4), fields[:, 1].view(n, 4)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma)
        a, b = self.amplitudes[float(sigma)]
        eps = (z / alpha - self.point) / sigma + a * self.u + b * self.v
        return Estimate((z - s * eps) / alpha, eps)


def test_known_covariances_come_back_and_give_gamma() -> None:
    grid = [10.0, 4.0, 1.5, 0.5, 0.1]
    amplitudes = {10.0: (0.5, 0.1), 4.0: (0.3, -0.2), 1.5: (0.1, 0.2), 0.5: (-0.2, 0.05)}
    point, n = randn(4), 64
    model, noise = Noisy(point, amplitudes, n), randn(n, 4, seed=1)
    found = error_covariance(model, Points(point[None]), solvers.ddim(grid), noise=noise, chunk=n)
    ends = error_covariance(model, point.expand(n, 4), solvers.ddim(grid), noise=noise, chunk=n)
    assert [step.sigma for step in found] == grid[1:-1]
    for i, step in enumerate(found, start=1):
        # A DDIM step with error d turns the direction to the point by as much: d' = d sigma_{t+1}/sigma_t.
        stretch = grid[i - 1] / grid[i]
        (a, b), (c, d) = amplitudes[grid[i]], (stretch * v for v in amplitudes[grid[i - 1]])
        assert step.present == pytest.approx(a * a + b * b, rel=1e-9)
        assert step.previous == pytest.approx(c * c + d * d, rel=1e-9)
        assert step.cross == pytest.approx(a * c + b * d, rel=1e-9)
        assert ends[i - 1].gamma == pytest.approx(step.gamma, rel=1e-9)
        best = min((g / 1000 for g in range(-3000, 5000)), key=step.error)
        assert step.gamma == pytest.approx(best, abs=6e-4)
    # Taken greedily, gamma* lands nearer the point than its neighbours do.
    first = found[0].gamma

    def miss(gamma: float) -> float:
        plan = Plan((10.0, 4.0, 0.0), ((1.0,), (gamma, 1 - gamma)))
        return float((sample(model, plan, noise=noise) - point).square().mean())

    assert miss(first) < min(miss(first - 0.02), miss(first + 0.02), miss(1.0), miss(2.0))
    assert miss(first) == pytest.approx(16 * found[0].error(first), rel=1e-9)


def test_gamma_of_exact_projections_is_1_and_of_ideal_denoisers_above() -> None:
    plane = Flat(randn(6, 2))
    grid = grids.log_linear(6, 10.0, 0.1, last="min")
    for step in error_covariance(Erring(plane, lambda sigma: 0.0), plane, solvers.ddim(grid), noise=randn(9, 6)):
        assert step.present < 1e-20
    assert StepCovariance(sigma=1.0, present=0.2, previous=0.2, cross=0.2).gamma == 1.0
    points = Points(randn(200, 8))
    steps = error_covariance(PointCloud(points.points), points, solvers.ddim(grid), noise=randn(200, 8, seed=1))
    assert all(step.gamma > 1 for step in steps[:3])


def test_a_measured_curve_becomes_a_grid() -> None:
    points = Points(randn(200, 8))
    model = PointCloud(points.points)
    plan = solvers.ddim(grids.log_linear(25, 20.0, 0.05, last="min"))
    curve = trajectory_error(model, points, plan, noise=randn(200, 8, seed=1))
    pairs = [(sigma, max(value, 1e-3)) for sigma, value in curve.eta(0.5)]
    grid, nu = grid_between(pairs, 10, sigma_max=20.0, sigma_min=0.05)
    assert len(grid) == 11
    assert nu > 1
    assert grids.from_sigmas([*grid[:-1], 0.0])[-1] == 0
    assert is_admissible([1.0, 0.5], 0.01, 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, k: relative_error(m, k, torch.zeros(0, 3), [1.0], generator=generator()), "N >= 1"),
        (lambda m, k: relative_error(m, k, torch.zeros(2, 4), [1.0], generator=generator()), r"give \[N, 3\]"),
        (lambda m, k: relative_error(m, Points(torch.zeros(2, 4)), torch.zeros(2, 3), [1.0], generator=generator()),
         "a reference of samples"),
        (lambda m, k: relative_error(m, k, torch.zeros(2, 3), [], generator=generator()), "no sigmas"),
        (lambda m, k: relative_error(m, k, torch.zeros(2, 3), [0.0], generator=generator()), "sigma = 0.0"),
        (lambda m, k: relative_error(m, k, torch.zeros(2, 3), [math.inf], generator=generator()), "sigma = inf"),
        (lambda m, k: relative_error(m, k, torch.zeros(2, 3), [1.0], generator=generator(), quantiles=(2,)),
         "quantile 2"),
        (lambda m, k: consistency(m, torch.zeros(2, 3), [1.0], generator=generator(), fraction=1.0), "fraction = 1.0"),
        (lambda m, k: trajectory_error(m, k, solvers.ddim([math.inf, 1.0]), noise=torch.zeros(2, 3)), "sigma = inf"),
        (lambda m, k: error_covariance(m, k, solvers.ddpm([2.0, 1.0, 0.1]), noise=torch.zeros(2, 3)), "draws noise"),
        (lambda m, k: error_covariance(m, torch.zeros(1, 3), solvers.ddim([2.0, 1.0]), noise=torch.zeros(2, 3)),
         "one for each"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message: str) -> None:
    points = randn(5, 3).float()
    with pytest.raises(ValueError, match=message):
        make(PointCloud(points), Points(points))
