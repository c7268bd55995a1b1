"""Projection: nearest points and softmax means to the last digit, gradients of distances, closed-form sets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logsnr.exact import PointCloud
from logsnr.projection import Flat, Points, Product, Sphere
from logsnr.projection import points as points_module
from logsnr.projection.screen import Screen
from logsnr.sampling import grids, sample, solvers

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cloud(m: int = 3000, d: int = 96, seed: int = 1) -> Tensor:
    """Points on a curved 6-dimensional sheet with near-duplicates, float32, large enough to be screened."""
    latent, a, b = randn(m, 6, seed=seed), randn(6, d, seed=seed + 1), randn(6, d, seed=seed + 2)
    x = torch.tanh(latent @ a) + 0.3 * torch.sin(latent @ b) + 5
    x[m // 2 : m // 2 + 50] = x[:50] + 0.003 * randn(50, d, seed=seed + 3)
    return x.float()


def direct(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax mean, squared distances and log-sum from differences in float64."""
    d2 = torch.stack([(y.double() - p).square().sum(1) for p in x.double()], 1)
    return (-d2 / (2 * sigma**2)).softmax(1) @ x.double(), d2, (-d2 / (2 * sigma**2)).logsumexp(1)


LEVELS = [1e-3, 0.02, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 30.0]


@pytest.mark.parametrize("sigma", LEVELS)
def test_screened_search_is_the_direct_one_to_1e_5_in_eps(sigma: float) -> None:
    x = cloud()
    k = Points(x)
    y = (x[:60].double() + sigma * randn(60, 96, seed=9)).float()
    assert x.numel() > points_module.SMALL
    mean, d2, log_sum = direct(x, y, sigma)
    # The search itself, before its answer is rounded to float32.
    found, index, squared, extra = k._by_screening(y.double(), torch.full((60, 1), sigma, dtype=F64), False)
    error = (found - mean).norm(dim=1) / (y.double() - mean).norm(dim=1)
    assert float(error.max()) < 1e-5
    assert torch.equal(index, d2.argmin(1))
    torch.testing.assert_close(squared, d2.amin(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(extra - squared / (2 * sigma**2), log_sum, rtol=1e-6, atol=1e-5)
    rounded = k.softmin(y, sigma)
    assert rounded.mean.dtype == torch.float32
    torch.testing.assert_close(rounded.mean, found.float())


@pytest.mark.parametrize("sigma", LEVELS)
def test_screened_search_in_float64(sigma: float) -> None:
    x = cloud().double() + 1e-9 * randn(3000, 96, seed=4)
    y = x[:40] + sigma * randn(40, 96, seed=9)
    mean, d2, log_sum = direct(x, y, sigma)
    found = Points(x).softmin(y, sigma)
    assert float(((found.mean - mean).norm(dim=1) / (y - mean).norm(dim=1)).max()) < 1e-10
    assert torch.equal(found.index, d2.argmin(1))
    torch.testing.assert_close(found.log_sum - found.squared / (2 * sigma**2), log_sum, rtol=1e-10, atol=1e-9)


def test_both_ways_of_measuring_agree_and_sigma_may_differ_per_state(monkeypatch: pytest.MonkeyPatch) -> None:
    x, levels = cloud(), torch.tensor(LEVELS, dtype=F64)
    y = x[: len(LEVELS)].double() + levels[:, None] * randn(len(LEVELS), 96, seed=9)
    screened = Points(x).softmin(y, levels)
    for i, sigma in enumerate(LEVELS):
        one = Points(x).softmin(y[i : i + 1], sigma)
        torch.testing.assert_close(screened.mean[i : i + 1], one.mean, rtol=1e-11, atol=1e-11)
    monkeypatch.setattr(points_module, "SMALL", 10**9)
    plain = Points(x).softmin(y, levels)
    torch.testing.assert_close(screened.mean, plain.mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(screened.log_sum, plain.log_sum, rtol=1e-9, atol=1e-9)
    assert torch.equal(screened.index, plain.index)


def exact_scores(x: Tensor, offset: Tensor, centre: Tensor) -> Tensor:
    """||p||^2 - 2 o.p in float64."""
    p = x.double() - centre
    return p.square().sum(1) - 2 * offset @ p.T


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_screening_errs_within_its_bound_and_its_noise(half: bool, scale: float) -> None:
    x, y = cloud(2000, 500), 5 + scale * randn(50, 500, seed=3)
    screen = Screen.of(x, F64, half=half)
    probe = screen.probe(y, torch.full((50, 1), 2.0, dtype=F64))
    error = screen.score(probe).double() - exact_scores(x, probe.offset, screen.centre)
    assert bool((error.abs() <= screen.slack(probe) / 2).all())
    # In log-weights, per unit of ||t||: the estimate is above the truth, and not far above.
    tails = screen.risks[:, 1].double().mean().sqrt()
    ratio = (error / 8).square().mean().sqrt() / (screen.noise(probe) * tails).square().mean().sqrt()
    assert (0.5 if half else 0.05) < float(ratio) < (1 if half else 0.5)


def test_axes_leave_little_and_the_parts_are_the_whole() -> None:
    x = cloud(2000, 300)
    screen = Screen.of(x, F64, half=True)
    torch.testing.assert_close(screen.axes.T @ screen.axes, torch.eye(18, dtype=F64), rtol=0, atol=1e-12)
    rest = screen.risks[:, 1].double().mean()
    beyond = torch.linalg.eigvalsh((x.double() - screen.centre).T.cov(correction=0))[:-18].sum()
    assert beyond * (1 - 1e-6) <= rest < 1.1 * beyond
    whole = screen.head.double() @ screen.axes.T + screen.tail.double() + screen.centre
    assert float((whole - x).norm(dim=1).max()) < 2**-8 * float(screen.reach)
    share = randn(5, 2000, seed=3).softmax(1).float()
    error = (screen.sum(share) - share.double() @ x.double()).norm(dim=1)
    assert float(error.max()) < 2**-8 * float(rest.sqrt()) / 20  # 2000 roundings average out


@pytest.mark.parametrize("sigma", [0.05, 2.0, 3.0, 5.0, 8.0, 60.0])
def test_bfloat16_screens_answer_to_1e_5_in_eps(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = cloud(3000, 512)
    k, scored = Points(x), Points._exact_scores
    k._screen = Screen.of(x, F64, half=True)
    again: list[int] = []
    monkeypatch.setattr(k, "_exact_scores", lambda offset: again.append(len(offset)) or scored(k, offset))
    y = (x[:40].double() + sigma * randn(40, 512, seed=9)).float()
    mean, index, squared, extra = k._by_screening(y.double(), torch.full((40, 1), sigma, dtype=F64), False)
    d2 = torch.cdist(y.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    exact = softmin(d2, sigma) @ x.double()
    assert float(((mean - exact).norm(dim=1) / (y.double() - exact).norm(dim=1)).max()) < 1e-5
    assert torch.equal(index, d2.argmin(1))
    torch.testing.assert_close(squared, d2.amin(1), rtol=1e-12, atol=0)
    log_sum = (-d2 / (2 * sigma**2)).logsumexp(1) + squared / (2 * sigma**2)
    torch.testing.assert_close(extra, log_sum, rtol=1e-4, atol=1e-3)
    assert sum(again) <= 10  # most states need no float64 product


def test_scores_decide_only_where_their_rounding_stays_out_of_sight() -> None:
    x, sigma = cloud(4000, 512), 4.0
    screen = Screen.of(x, F64, half=True)
    y = x[:40].double() + sigma * randn(40, 512, seed=9)
    probe = screen.probe(y, torch.full((40, 1), sigma, dtype=F64))
    score, exact = screen.score(probe), exact_scores(x, probe.offset, screen.centre)
    moved = (softmin(score.double(), sigma) - softmin(exact, sigma)) @ x.double()
    each, common = screen.doubt(probe)
    weight = softmin(exact, sigma)
    bound = ((weight.square() @ screen.risks.double()) * each).sum(1) + common.squeeze(1)
    ratio = moved.norm(dim=1) / bound.sqrt()
    assert 0.1 < float(ratio.mean()) < 1
    assert float(ratio.max()) < 2


def softmin(score: Tensor, sigma: float) -> Tensor:
    return (-score / (2 * sigma**2)).softmax(1)


def test_near_duplicates_in_float32() -> None:
    # The fact sheet's case: true weights .646/.354 at sigma .05, which ||y||^2 - 2 y.p + ||p||^2 in float32 misses.
    x = cloud(3000, 768)
    x[1] = x[0] + 0.002 * randn(768, seed=5).float()
    y = (x[:1].double() + 0.05 * randn(100, 768, seed=6)).float()
    mean, d2, _ = direct(x, y, 0.05)
    weight = (-d2[:, :2] / (2 * 0.05**2)).softmax(1)
    assert float(weight.amin(1).max()) > 0.3
    found = Points(x)._by_screening(y.double(), torch.full((100, 1), 0.05, dtype=F64), False)[0]
    assert float(((found - mean).norm(dim=1) / (y.double() - mean).norm(dim=1)).max()) < 1e-9


def test_many_equal_points_and_data_far_from_the_origin() -> None:
    x = cloud(2500, 64)
    x[:1200] = x[0]
    x += 1000
    y = (x[:30].double() + 0.01 * randn(30, 64, seed=2)).float()
    mean, d2, log_sum = direct(x, y, 0.01)
    found = Points(x).softmin(y, 0.01)
    torch.testing.assert_close(found.squared, d2.amin(1).float())
    torch.testing.assert_close(found.mean, mean.float())
    torch.testing.assert_close(found.log_sum, (log_sum + d2.amin(1) / 2e-4).float())
    assert torch.equal(x[found.index], x[d2.argmin(1)])


def test_states_that_are_not_finite_get_nan_and_leave_the_others_alone() -> None:
    x = cloud()
    y = x[:4].clone() + 0.1
    y[1, 3], y[2, 0] = math.nan, math.inf
    found, alone = Points(x).softmin(y, 0.3), Points(x).softmin(y[[0, 3]], 0.3)
    assert found.mean.isfinite().all(1).tolist() == [True, False, False, True]
    torch.testing.assert_close(found.mean[[0, 3]], alone.mean)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 4.0])
def test_half_the_gradient_of_the_smoothed_distance_is_sigma_eps(sigma: float) -> None:
    x = randn(11, 2, 3)
    y = randn(6, 2, 3, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(Points(x).smoothed_squared_distance(y, sigma).sum(), y)
    estimate = PointCloud(x)(y.detach() / math.hypot(1, sigma), sigma)
    torch.testing.assert_close(0.5 * gradient, sigma * estimate.eps, rtol=1e-8, atol=1e-8)


def test_gradients_go_through_large_sets_too() -> None:
    x, sigma = cloud(), 0.4
    y = (x[:3].double() + sigma * randn(3, 96, seed=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(Points(x).smoothed_squared_distance(y, sigma).sum(), y)
    mean = Points(x).softmin(y.detach(), sigma).mean
    torch.testing.assert_close(0.5 * gradient, y.detach() - mean, rtol=1e-8, atol=1e-8)


def test_smoothed_distance_tends_to_the_distance_from_below() -> None:
    k, y = Points(cloud()), randn(20, 96, seed=3) + 5
    for sigma in (1.0, 0.1, 1e-3):
        smoothed, squared = k.smoothed_squared_distance(y, sigma), k.distance(y).square()
        assert bool((smoothed <= squared * (1 + 1e-12)).all())
        assert bool((smoothed >= squared - 2 * sigma**2 * math.log(len(k))).all())


def sets() -> dict[str, Flat | Sphere | Product | Points]:
    return {
        "flat": Flat(randn(6, 2), randn(6, seed=1)),
        "sphere": Sphere(randn(6, seed=2), 1.3),
        "product": Product([Sphere(randn(3, seed=3), 0.7), Points(randn(20, 2, seed=4)), Flat(randn(1, 0))]),
        "points": Points(randn(40, 6, seed=5)),
    }


@pytest.mark.parametrize("name", sets())
def test_a_projection_is_nearest_idempotent_and_the_gradient_of_half_the_squared_distance(name: str) -> None:
    k = sets()[name]
    y = 2 * randn(30, 6, seed=7)
    p = k.project(y)
    torch.testing.assert_close(k.project(p), p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((y - p).norm(dim=1), k.distance(y))
    for seed in range(20):  # no other point of the set is nearer
        other = k.project(p + 0.5 * randn(30, 6, seed=seed))
        assert bool(((y - other).norm(dim=1) >= k.distance(y) * (1 - 1e-12)).all())
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * k.distance(y).square().sum(), y)
    torch.testing.assert_close(gradient, (y - p).detach(), rtol=1e-9, atol=1e-9)


def test_products_add_and_flats_are_their_own_smoothing() -> None:
    parts = [Points(randn(9, 2, seed=1)), Flat(randn(3, 1, seed=2))]
    y = randn(5, 5, seed=3)
    total = parts[0].smoothed_squared_distance(y[:, :2], 0.4) + parts[1].distance(y[:, 2:]).square()
    torch.testing.assert_close(Product(parts).smoothed_squared_distance(y, 0.4), total)
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    a, b = randn(3, 2, seed=4), randn(4, 3, seed=5)
    whole = Points(torch.cat([a[grid[:, 0]], b[grid[:, 1]]], 1))
    factored = Product([Points(a), Points(b)])
    torch.testing.assert_close(factored.project(y), whole.project(y))
    torch.testing.assert_close(factored.smoothed_squared_distance(y, 0.8), whole.smoothed_squared_distance(y, 0.8))


def test_the_centre_of_a_sphere_goes_somewhere_on_it() -> None:
    k = Sphere(torch.tensor([1.0, 2.0], dtype=F64), 3.0)
    assert k.project(k.centre[None]).tolist() == [[4.0, 2.0]]


# Check H of the fact sheet: GE on the last step against a plain denoise, two points.
@pytest.mark.parametrize(("n", "extrapolated"), [(5, 0.23101), (10, 0.01142), (20, 0.00026)])
def test_terminal_convention_on_two_points(n: int, extrapolated: float) -> None:
    model = PointCloud(torch.tensor([[-1.0], [1.0]], dtype=F64))
    noise = torch.linspace(-40, 40, 4001, dtype=F64).unsqueeze(1) / math.hypot(1, 20)
    grid = grids.log_linear(n, 20.0, 0.05)
    for final, expected in (("ge", extrapolated), ("denoise", 0.00025)):
        x = sample(model, solvers.ge(grid, 2.0, final=final), noise=noise)
        assert float((x.abs() - 1).abs().mean()) == pytest.approx(expected, abs=6e-6)


# Check I: swissroll, 256 starts on a circle of radius 10; mean distance to the set for gamma 1, 1.5, 2, 2.5.
SWISSROLL = {
    5: (0.02703, 0.01291, 0.02612, 0.04920),
    10: (0.01158, 0.00543, 0.00510, 0.01565),
    20: (0.00745, 0.00533, 0.00445, 0.00415),
}


def swissroll() -> tuple[Tensor, Tensor]:
    """The 100 points, and 256 states on the circle of radius 10."""
    t = math.pi / 2 + 5 * math.pi * torch.linspace(0, 1, 100, dtype=F64)
    angle = 2 * math.pi * torch.arange(256, dtype=F64) / 256
    points = torch.stack([t * t.cos(), t * t.sin()], 1) / (5 * math.pi)
    return points, 10 * torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("n", SWISSROLL)
def test_swissroll(n: int) -> None:
    points, y = swissroll()
    grid = grids.log_linear(n, 10.0, 0.005, last="min")
    for gamma, expected in zip((1.0, 1.5, 2.0, 2.5), SWISSROLL[n], strict=True):
        z = sample(PointCloud(points), solvers.ge(grid, gamma), noise=y / math.hypot(1, 10))
        mean = float(Points(points).distance(z * math.hypot(1, 0.005)).mean())
        assert mean == pytest.approx(expected, abs=6e-6)


def test_swissroll_against_the_ode_limit() -> None:
    points, y = swissroll()
    model, noise = PointCloud(points), y / math.hypot(1, 10)
    limit = sample(model, solvers.ge(grids.log_linear(600, 10.0, 0.005, last="min"), 1.5), noise=noise)
    grid = grids.log_linear(20, 10.0, 0.005, last="min")
    for gamma, expected in ((1.0, 0.0835), (1.5, 0.0332), (2.0, 0.0604), (2.5, 0.0931)):
        x = sample(model, solvers.ge(grid, gamma), noise=noise)
        assert float((x - limit).square().sum(1).mean().sqrt()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Points(torch.zeros(0, 3)), r"give \[M, \*shape\] with M >= 1"),
        (lambda: Points(torch.zeros(3, 3, dtype=torch.uint8)), "dtype torch.uint8: give floats"),
        (lambda: Points(torch.zeros(3, 3), chunk=0), "chunk = 0"),
        (lambda: Points(torch.zeros(3, 3)).softmin(torch.zeros(2, 4), 1.0), r"give \[B, 3\]"),
        (lambda: Points(torch.zeros(3, 3)).softmin(torch.zeros(2, 3), -1.0), r"sigma = -1.0: .* \[0, inf\)"),
        (lambda: Points(torch.zeros(3, 3)).softmin(torch.zeros(2, 3), math.inf), r"sigma = inf"),
        (lambda: Points(torch.zeros(3, 3)).softmin(torch.zeros(2, 3), torch.tensor([1.0, math.nan])), "sigma = nan"),
        (lambda: Points(torch.zeros(3, 3)).softmin(torch.zeros(2, 3), torch.ones(3)), "one value or one per state"),
        (lambda: Flat(torch.zeros(3)), r"give \[D, d\]"),
        (lambda: Flat(torch.ones(3, 2)), "rank 1"),
        (lambda: Flat(torch.ones(3, 1), torch.zeros(2)), "does not fit basis"),
        (lambda: Sphere(torch.zeros(3), 0.0), "radius = 0.0"),
        (lambda: Sphere(torch.zeros(3, 1), 1.0), r"give \[D\]"),
        (lambda: Product([]), "at least one set"),
        (lambda: Product([Sphere(torch.zeros(2), 1.0)]).smoothed_squared_distance(torch.ones(1, 2), 1.0), "a Sphere"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
