"""Solvers on problems with closed forms: recurrences, orders, golden tables, and what equals what."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from logsnr.exact import Gaussian, PointCloud, Subspace
from logsnr.noise import alpha_s
from logsnr.sampling import Plan, grids, heun, sample, solvers
from logsnr.sampling.loop import updates

F64 = torch.float64
LAM = 2.89


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(model, plan: Plan, y: Tensor) -> list[Tensor]:
    """All states y = z/alpha of a run from y at the first sigma."""
    states: list[Tensor] = []
    sample(
        model,
        plan,
        noise=y * alpha_s(plan.sigmas[0])[0],
        callback=lambda step: states.append(step.z / alpha_s(step.sigma)[0]),
    )
    return states


def gaussian(lam: float) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[lam]], dtype=F64))


def ge_recurrence(grid, gammas, lam: Tensor, y: Tensor) -> Tensor:
    """The sheet's recurrence for N(0, lam), on its own."""
    previous = None
    for (sigma, target), gamma in zip(pairwise(grid), gammas, strict=True):
        eps = sigma / (lam + sigma**2) * y
        y = y + (target - sigma) * (eps if previous is None else gamma * eps + (1 - gamma) * previous)
        previous = eps
    return y


# A: exact projection


@pytest.mark.parametrize("basis", ["eps", "x0", "velocity"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_projection_shrinks_distance_as_sigma(basis: str, seed: int) -> None:
    grid = sorted((4 * randn(9, seed=seed)).exp().tolist(), reverse=True)
    gammas = (1 + 3 * randn(7, seed=seed + 50)).tolist()
    offset, b = randn(6, seed=1), torch.linalg.qr(randn(6, 2, seed=2))[0]
    models = [(Subspace(b, offset), b @ b.T), (PointCloud(offset[None]), torch.zeros(6, 6, dtype=F64))]
    for model, projector in models:
        for plan in (solvers.ge(grid, gammas, "eps"), solvers.ddim(grid), solvers.ge([*grid, 0.0], gammas)):
            if basis != "eps" and model is models[0][0]:
                continue  # x0 is constant only where the projection is; eps is constant on both
            states = run(model, Plan(plan.sigmas, plan.rows, basis), offset + grid[0] * randn(5, 6, seed=3))
            inside = (states[0] - offset) @ projector
            distance = (states[0] - offset - inside).norm(dim=1)
            for state, sigma in zip(states, plan.sigmas, strict=True):
                now = (state - offset) @ projector
                torch.testing.assert_close(now, inside, rtol=1e-9, atol=1e-9 * float(inside.abs().max()) + 1e-12)
                expected = distance * sigma / grid[0]
                actual = (state - offset - now).norm(dim=1)
                torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12 * float(inside.abs().max()) + 1e-12)


def test_tail_is_exact_for_exact_projections() -> None:
    grid = grids.log_linear(8, 30.0, 0.1, last="min")
    model = Subspace(randn(5, 2), randn(5, seed=1))
    states = run(model, solvers.ge(grid, 2.7), 30 * randn(3, 5, seed=2))
    for k in range(8):
        tail = run(model, solvers.ge(grid, 2.7).tail(k), states[k])
        torch.testing.assert_close(tail[-1], states[-1], rtol=1e-9, atol=1e-9)


# D: Gaussians

GAMMAS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.4, 2.8)
GOLDEN = {
    5: (".77258", ".85693", ".93749", "1.01436", "1.08763", "1.19761", "1.29901"),
    10: (".87923", ".93209", ".98252", "1.03077", "1.07705", "1.14751", "1.21411"),
    20: (".93770", ".96699", ".99545", "1.02314", "1.05014", "1.09198", "1.13231"),
}


def endpoint_ratio(plan: Plan, lam: float = LAM) -> float:
    """End point over the exact flow's, from y = 1."""
    exact = math.sqrt((lam + plan.sigmas[-1] ** 2) / (lam + plan.sigmas[0] ** 2))
    return float(run(gaussian(lam), plan, torch.ones(1, 1, dtype=F64))[-1]) / exact


@pytest.mark.parametrize("n", GOLDEN)
def test_golden_table_of_gradient_estimation(n: int) -> None:
    grid = grids.log_linear(n, 10.0, 0.05, last="min")
    for gamma, golden in zip(GAMMAS, GOLDEN[n], strict=True):
        assert f"{endpoint_ratio(solvers.ge(grid, gamma)):.5f}".lstrip("0") == golden


def ab2_gammas(grid) -> list[float]:
    return [1 + (b - c) / (2 * (a - b)) for a, b, c in zip(grid, grid[1:], grid[2:], strict=False)]


def test_observed_orders() -> None:
    def errors(n: int) -> list[float]:
        grid = grids.log_linear(n, 10.0, 0.05, last="min")
        plans = [solvers.ge(grid, g) for g in (1.0, 1.5, 2.0, ab2_gammas(grid))]
        return [abs(endpoint_ratio(plan) - 1) for plan in plans]

    coarse, fine = errors(320), errors(640)
    for error, digits, golden in zip(fine, (3, 2, 3, 2), (2.008e-3, 4.53e-6, 1.995e-3, 2.10e-5), strict=True):
        assert f"{error:.{digits}e}" == f"{golden:.{digits}e}"
    orders = [math.log2(a / b) for a, b in zip(coarse, fine, strict=True)]
    assert [f"{order:.2f}" for order in orders] == ["1.00", "2.00", "0.99", "1.99"]


def test_general_covariance_is_the_recurrence_per_eigenvalue() -> None:
    lam, q = torch.tensor([4.0, 1.0, 0.09, 0.0], dtype=F64), torch.linalg.qr(randn(4, 4))[0]
    mean, y = randn(4, seed=1), 10 * randn(6, 4, seed=2)
    model = Gaussian(mean, q @ torch.diag(lam) @ q.T)
    grid = grids.log_linear(12, 10.0, 0.05, last="min")
    gammas = [1.0, *(1.3 + 0.1 * i for i in range(11))]
    expected = ge_recurrence(grid, gammas, lam, (y - mean) @ q)
    actual = (run(model, solvers.ge(grid, gammas[1:]), y)[-1] - mean) @ q
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_ddim_step_factor() -> None:
    states = run(gaussian(LAM), solvers.ddim((7.0, 2.0, 0.3, 0.0)), torch.ones(1, 1, dtype=F64))
    for (sigma, target), (a, b) in zip(pairwise((7.0, 2.0, 0.3, 0.0)), pairwise(states), strict=True):
        assert float(b / a) == pytest.approx((LAM + sigma * target) / (LAM + sigma**2), rel=1e-14)


def test_ddpm_mean_factor_and_noise_variance() -> None:
    grid = (7.0, 2.0, 0.3, 0.0)
    for step, (sigma, target) in zip(updates(solvers.ddpm(grid)), pairwise(grid), strict=True):
        (alpha, _), (alpha_, _) = alpha_s(sigma), alpha_s(target)
        x0 = LAM / (LAM + sigma**2)  # of y = 1
        mean = step.rescale * (step.keep * alpha + step.weights[0] * x0) / alpha_
        assert mean == pytest.approx((LAM + target**2) / (LAM + sigma**2), rel=1e-13)
        variance = (step.noise / alpha_) ** 2
        assert variance == pytest.approx(target**2 * (sigma**2 - target**2) / sigma**2, rel=1e-13)


@pytest.mark.parametrize(("gamma", "mu"), [(1.0, 0.5), (1.0, 0.2), (1.5, 0.3), (2.0, 0.7)])
def test_noisy_marginals(gamma: float, mu: float) -> None:
    """Sample variance of 100k runs against the recurrence in independent noises, within 4 standard errors."""
    n, lam, grid = 100_000, 2.0, grids.log_linear(6, 10.0, 0.2, last="min")
    plan = solvers.unified(grid, gamma, mu)
    y = torch.zeros(1 + len(plan.rows), dtype=F64)  # coefficients of start and noises
    y[0], previous = math.hypot(1, grid[0]), None
    for i, (sigma, target) in enumerate(pairwise(grid)):
        down = target * (target / sigma) ** (mu / (1 - mu))
        eps = sigma / (lam + sigma**2) * y
        y = y + (down - sigma) * (eps if previous is None else gamma * eps + (1 - gamma) * previous)
        y[i + 1] += math.sqrt(target**2 - down**2)
        previous = eps
    expected = float(y.square().sum()) / (1 + grid[-1] ** 2)
    z = sample(gaussian(lam), plan, n=n, generator=torch.Generator().manual_seed(0))
    assert float(z.var()) == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / n))
    assert abs(float(z.mean())) < 4 * math.sqrt(expected / n)


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_ddim_eta_marginals(eta: float) -> None:
    """DDIM's step factor to sigma_down, and independent noise: within 4 standard errors of 100k samples."""
    n, lam, grid = 100_000, 2.0, grids.log_linear(6, 10.0, 0.2, last="min")
    variance = 1 + grid[0] ** 2
    for sigma, target in pairwise(grid):
        noise = (eta * target) ** 2 * (1 - (target / sigma) ** 2)  # Song's sigma_eta, over alpha
        down = math.sqrt(target**2 - noise)
        variance = ((lam + sigma * down) / (lam + sigma**2)) ** 2 * variance + noise
    expected = variance / (1 + grid[-1] ** 2)
    z = sample(gaussian(lam), solvers.ddim(grid, eta), n=n, generator=torch.Generator().manual_seed(0))
    assert float(z.var()) == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / n))
    assert abs(float(z.mean())) < 4 * math.sqrt(expected / n)


def test_ddim_eta_between_ddim_and_ddpm() -> None:
    grid = (math.inf, 8.0, 2.0, 0.5, 0.0)
    assert solvers.ddim(grid, 0.0) == solvers.ddim(grid)
    assert solvers.ddim(grid).sigma_down is None
    one, ddpm = solvers.ddim(grid, 1.0), solvers.ddpm(grid)
    assert one.sigma_down == pytest.approx(ddpm.sigma_down, rel=1e-15)
    for eta in (0.2, 0.7):
        plan = solvers.ddim(grid, eta)
        assert plan.meta == {"solver": "ddim", "eta": eta}
        assert plan.sigma_down is not None
        assert plan.sigma_down[0] == pytest.approx(8 * math.sqrt(1 - eta**2), rel=1e-15)
        assert plan.sigma_down[-1] == 0
        for step, (sigma, target) in zip(updates(plan)[1:], pairwise(grid[1:]), strict=True):
            (a, s), (a_, s_) = alpha_s(sigma), alpha_s(target)
            assert step.noise == pytest.approx(eta * s_ / s * math.sqrt(1 - (a / a_) ** 2), rel=1e-13)
        # the map from mu: eta^2 (1 - r^2) = 1 - r^(2 mu/(1 - mu))
        r, mu = 0.25, 0.3
        mapped = math.sqrt((1 - r ** (2 * mu / (1 - mu))) / (1 - r * r))
        pair = solvers.ddim((8.0, 2.0), mapped).sigma_down, solvers.unified((8.0, 2.0), 1.0, mu).sigma_down
        assert pair[0] == pytest.approx(pair[1], rel=1e-13)


def test_ddpm_converges_to_the_data() -> None:
    """On a fine grid the ancestral variance is that of the data up to its first-order error."""
    for n, error in ((200, 0.04), (800, 0.01)):
        variance = _ancestral_variance(grids.log_linear(n, 50.0, 0.02), 0.5, 2.0)
        assert abs(variance / 2.0 - 1) < error


# F: equivalences


def test_ge_with_gamma_one_is_ddim_and_two_is_the_paper() -> None:
    grid = grids.log_linear(9, 20.0, 0.03)
    assert updates(solvers.unified(grid, 1.0, 0.5)) == updates(solvers.ddpm(grid))
    model, y = PointCloud(randn(5, 2)), 20 * randn(7, 2, seed=1)
    one = run(model, solvers.ge(grid, 1.0), y)
    for a, b in zip(one, run(model, solvers.ddim(grid), y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    states = run(model, solvers.ge(grid, 2.0), y)
    torch.testing.assert_close(states[1], one[1])  # the first step is DDIM
    previous = None
    for i, (sigma, target) in enumerate(pairwise(grid)):
        eps = model(y * alpha_s(sigma)[0], sigma).eps
        # 2 e - e_prev with the raw previous output, never the extrapolated one; the step to 0 is a plain denoise
        y = y + (target - sigma) * (eps if previous is None or target == 0 else 2 * eps - previous)
        previous = eps
        torch.testing.assert_close(states[i + 1], y, rtol=1e-11, atol=1e-11)


def test_second_step_extrapolates_x0() -> None:
    gamma, grid = 2.3, grids.log_linear(2, 9.0, 0.4, last="min")
    model, y = PointCloud(randn(5, 2)), 9 * randn(7, 2, seed=1)
    states = run(model, solvers.ge(grid, gamma), y)
    first, second = (model(states[i] * alpha_s(grid[i])[0], grid[i]).x0 for i in (0, 1))
    r = grid[2] / grid[1]
    expected = r * states[1] + (1 - r) * (gamma * second + (1 - gamma) * first)
    torch.testing.assert_close(states[2], expected, rtol=1e-12, atol=1e-12)


def test_w_norm_minimiser_is_a_gamma() -> None:
    for a, b, c in ((5.0, -3.0, 2.0), (1.0, 0.0, 1.0), (2.0, -0.9, 0.5)):
        w = torch.tensor([[a, b], [b, c]], dtype=F64)
        assert float(torch.linalg.eigvalsh(w).min()) > 0
        e = torch.zeros((), dtype=F64, requires_grad=True)  # between e_t = 1 and e_{t+1} = 0: the minimiser is gamma
        residual = torch.stack([e - 1, e])
        (slope,) = torch.autograd.grad(residual @ w @ residual, e)
        gamma = -float(slope) / (2 * float(w.sum()))
        assert gamma == pytest.approx((a + b) / (a + 2 * b + c), rel=1e-14)
        assert solvers.ge((2.0, 1.0, 0.5), gamma).rows[1] == (gamma, 1 - gamma)
    assert (5 - 3) / (5 - 6 + 2) == 2


def test_unified_sigma_down() -> None:
    grid = (math.inf, 8.0, 2.0, 0.5, 0.0)
    for mu in (0.1, 0.5, 0.9):
        plan = solvers.unified(grid, 1.5, mu)
        assert plan.sigma_down is not None
        assert plan.sigma_down[0] == 0  # from sigma inf everything is redrawn
        assert plan.sigma_down[-1] == 0
        for down, (sigma, target) in list(zip(plan.sigma_down, pairwise(grid), strict=True))[1:3]:
            assert sigma**mu * down ** (1 - mu) == pytest.approx(target, rel=1e-13)
    assert solvers.unified(grid, 1.5, 0.0) == solvers.ge(grid, 1.5)


def test_final_step_and_gamma_sequences() -> None:
    zero, stop = (4.0, 2.0, 1.0, 0.0), (4.0, 2.0, 1.0, 0.5)
    assert solvers.ge(zero).rows == ((1.0,), (2.0, -1.0), (1.0,))
    assert solvers.ge(zero, final="ge").rows == ((1.0,), (2.0, -1.0), (2.0, -1.0))
    assert solvers.ge(stop).rows == ((1.0,), (2.0, -1.0), (2.0, -1.0))
    assert solvers.ge(stop, [1.5, 3.0]).rows == ((1.0,), (1.5, -0.5), (3.0, -2.0))
    assert solvers.ge(zero, [1.5], basis="x0").basis == "x0"
    assert solvers.ge((4.0, 0.0)).rows == ((1.0,),)
    assert solvers.ge(zero, 1.7).meta == {"solver": "ge", "gamma": 1.7, "final": "denoise"}
    assert solvers.unified(zero, 1.7, 0.25).meta["mu"] == 0.25


# H: terminal convention


@pytest.mark.parametrize(
    ("n", "ge_last", "plain_last"), [(5, ".23101", ".00025"), (10, ".01142", ".00025"), (20, ".00026", ".00025")]
)
def test_terminal_convention(n: int, ge_last: str, plain_last: str) -> None:
    model = PointCloud(torch.tensor([[-1.0], [1.0]], dtype=F64))
    y = torch.linspace(-40, 40, 4001, dtype=F64).unsqueeze(1)
    for final, golden in (("ge", ge_last), ("denoise", plain_last)):
        end = run(model, solvers.ge(grids.log_linear(n, 20.0, 0.05), 2.0, final=final), y)[-1]
        assert f"{float((end.abs() - 1).abs().mean()):.5f}".lstrip("0") == golden


# I: swissroll

SWISSROLL = {
    5: (".02703", ".01291", ".02612", ".04920"),
    10: (".01158", ".00543", ".00510", ".01565"),
    20: (".00745", ".00533", ".00445", ".00415"),
}


def test_swissroll_table() -> None:
    t = math.pi / 2 + torch.linspace(0, 1, 100, dtype=F64) * 5 * math.pi
    points = torch.stack([t * t.cos(), t * t.sin()], 1) / (5 * math.pi)
    angle = 2 * math.pi * torch.arange(256, dtype=F64) / 256
    start, model = 10 * torch.stack([angle.cos(), angle.sin()], 1), PointCloud(points)
    limit = run(model, solvers.ge(grids.log_linear(1000, 10.0, 0.005, last="min"), 1.5), start)[-1]
    rms = []
    for n, row in SWISSROLL.items():
        for gamma, golden in zip((1.0, 1.5, 2.0, 2.5), row, strict=True):
            end = run(model, solvers.ge(grids.log_linear(n, 10.0, 0.005, last="min"), gamma), start)[-1]
            assert f"{float(torch.cdist(end, points).amin(1).mean()):.5f}".lstrip("0") == golden
            if n == 20:
                rms.append(float((end - limit).square().sum(1).mean().sqrt()))
    assert [f"{value:.4f}" for value in rms] == ["0.0835", "0.0332", "0.0604", "0.0931"]


# 2303.00848's check A12: ancestral, DDIM and Heun on a Gaussian of standard deviation .7


def _ancestral_variance(grid, mu: float, lam: float, start: float = 1.0) -> float:
    """Variance of z at the end of `unified(grid, 1, mu)` on N(0, lam), by its own coefficients."""
    variance = start
    for step, sigma in zip(updates(solvers.unified(grid, 1.0, mu)), grid, strict=False):
        alpha, s = alpha_s(sigma)
        x0 = alpha * lam / (alpha * alpha * lam + s * s)
        variance = (step.rescale * (step.keep + step.weights[0] * x0)) ** 2 * variance + step.noise**2
    return variance


@pytest.mark.parametrize(
    ("n", "ancestral", "deterministic"),
    [
        (64, "-3.986e-02", "-1.933e-02"),
        (128, "-2.121e-02", "-9.756e-03"),
        (256, "-1.101e-02", "-4.897e-03"),
        (512, "-5.621e-03", "-2.449e-03"),
    ],
)
def test_variance_errors_on_the_truncated_cosine(n: int, ancestral: str, deterministic: str) -> None:
    t0, t1 = (2 / math.pi * math.atan(math.exp(-0.5 * logsnr)) for logsnr in (10.0, -10.0))
    grid = [math.tan(math.pi / 2 * (t0 + (t1 - t0) * (1 - i / n))) for i in range(n + 1)]
    alpha, s = alpha_s(grid[-1])
    target = alpha**2 * 0.49 + s**2
    assert f"{_ancestral_variance(grid, 0.5, 0.49) - target:.3e}" == ancestral
    assert f"{_ancestral_variance(grid, 0.0, 0.49) - target:.3e}" == deterministic
    factor = float(sample(gaussian(0.49), solvers.ddim(grid), noise=torch.ones(1, 1, dtype=F64)))
    assert f"{factor**2 - target:.3e}" == deterministic


@pytest.mark.parametrize(
    ("n", "golden"), [(32, "1.422e-02"), (64, "3.329e-03"), (128, "8.058e-04"), (256, "1.983e-04")]
)
def test_heun_error_on_the_edm_grid(n: int, golden: str) -> None:
    grid = grids.karras(n - 1, 80.0, 0.002, last="min")  # n levels
    y = float(heun(gaussian(0.49), grid, noise=torch.ones(1, 1, dtype=F64))) * math.hypot(1, 0.002) / math.hypot(1, 80)
    assert f"{y / math.sqrt((0.49 + 0.002**2) / (0.49 + 80**2)) - 1:.3e}" == golden


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.ge((1.0, 0.5), math.nan), "gamma = nan: must be finite"),
        (lambda: solvers.ge((4.0, 2.0, 1.0, 0.0), [2.0, 2.0]), "gamma has 2 values: 1 of the 3 steps"),
        (lambda: solvers.ge((4.0, 2.0, 1.0, 0.5), [2.0]), "gamma has 1 values: 2 of the 3 steps"),
        (lambda: solvers.ge((1.0, 0.0), final="euler"), "final 'euler' is not one of"),
        (lambda: solvers.ge((1.0, 0.0), basis="v"), "basis 'v' is not one of"),
        (lambda: solvers.unified((1.0, 0.0), 1.0, 1.0), r"mu = 1.0: must be in \[0, 1\)"),
        (lambda: solvers.unified((1.0, 0.0), 1.0, -0.1), "mu = -0.1"),
        (lambda: solvers.ddim((1.0, 1.0)), "is not below"),
        (lambda: solvers.ddim((1.0, 0.0), 1.1), r"eta = 1.1: must be in \[0, 1\]"),
        (lambda: solvers.ddim((1.0, 0.0), -0.1), "eta = -0.1"),
        (lambda: solvers.ddpm((1.0,)), "give at least 2"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
