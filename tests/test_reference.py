"""References: Heun is EDM's, churn keeps the marginal, the adaptive integrator is as exact as it is told, both ways."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.exact import Gaussian, GaussianMixture, PointCloud
from logsnr.noise import alpha_s
from logsnr.predictions import Eps, V
from logsnr.sampling import Churn, Step, grids, heun, sample, solve, solvers
from logsnr.sampling.counted import Counted

F64 = torch.float64
GRID = grids.log_linear(9, 30.0, 0.02)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def mixture() -> GaussianMixture:
    covs = torch.stack([0.05 * torch.eye(2), 0.2 * torch.eye(2), torch.tensor([[0.3, 0.1], [0.1, 0.1]])]).double()
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=F64), 1.5 * randn(3, 2, seed=9), covs)


def gaussian(variances: tuple[float, ...] = (4.0, 0.25, 1e-4)) -> Gaussian:
    d = len(variances)
    return Gaussian(torch.linspace(-1, 1, d, dtype=F64), torch.diag(torch.tensor(variances, dtype=F64)))


def exact_trajectory(model: Gaussian, z: Tensor, sigma: float, target: float) -> Tensor:
    """In y = z/alpha, each direction of a Gaussian moves by sqrt((variance + sigma'^2)/(variance + sigma^2))."""
    (alpha, s), (alpha_, s_) = alpha_s(sigma), alpha_s(target)
    mean, variance = model.means[0], model.variances[0]
    deviation = (z - alpha * mean) @ model.axes[0]
    moved = deviation * ((alpha_**2 * variance + s_**2) / (alpha**2 * variance + s**2)).sqrt()
    return alpha_ * mean + moved @ model.axes[0].T


# Heun


def euler_pairs(x: Tensor, high: list[float], model: Denoiser) -> Tensor:
    """Algorithms 1 and 2 of 2206.00364 as printed, from sigma^ = high, without the churn itself."""
    for sigma, target in zip(high, GRID[1:], strict=True):
        d = (x - model(x / math.hypot(1, sigma), sigma).x0) / sigma
        step = x + (target - sigma) * d
        if target > 0:
            d_ = (step - model(step / math.hypot(1, target), target).x0) / target
            step = x + (target - sigma) * (d + d_) / 2
        x = step
    return x


def test_heun_is_edm_algorithm_1_and_counts_2n_minus_1() -> None:
    model, noise = Counted(mixture()), randn(16, 2)
    expected = euler_pairs(noise * math.hypot(1, GRID[0]), list(GRID[:-1]), mixture())
    steps: list[Step] = []
    actual = heun(model, GRID, noise=noise, callback=steps.append)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert model.evaluations == 2 * 9 - 1
    assert tuple(step.sigma for step in steps) == GRID
    assert torch.equal(heun(model, GRID, noise=noise, churn=Churn(s_churn=0.0)), actual)
    model.evaluations = 0
    heun(model, GRID[:-1], n=2, generator=generator())
    assert model.evaluations == 16


def test_heun_is_second_order() -> None:
    model, noise = mixture(), randn(64, 2)
    exact = solve(model, 30.0, 0.02, noise, rtol=1e-12, atol=1e-12).z
    for grid in (grids.log_linear, grids.karras):
        errors = [
            float((heun(model, grid(n, 30.0, 0.02, last="min"), noise=noise) - exact).square().mean().sqrt())
            for n in (160, 320)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


def test_churn_is_edm_algorithm_2() -> None:
    churn = Churn(s_churn=3.0, s_min=0.1, s_max=10.0, s_noise=1.003)
    model, noise = Counted(mixture()), randn(16, 2)
    high = [s * (1 + min(3.0 / 9, math.sqrt(2) - 1)) if 0.1 <= s <= 10.0 else s for s in GRID[:-1]]
    assert 0 < sum(h > s for h, s in zip(high, GRID, strict=False)) < 9
    draws, x = generator(4), noise * math.hypot(1, GRID[0])
    for i, (sigma, target) in enumerate(pairwise(GRID)):
        if high[i] > sigma:
            w = torch.randn(16, 2, generator=draws, dtype=F64)
            x = x + 1.003 * math.sqrt(high[i] ** 2 - sigma**2) * w
        d = (x - mixture()(x / math.hypot(1, high[i]), high[i]).x0) / high[i]
        step = x + (target - high[i]) * d
        if target > 0:
            d_ = (step - mixture()(step / math.hypot(1, target), target).x0) / target
            step = x + (target - high[i]) * (d + d_) / 2
        x = step
    steps: list[Step] = []
    actual = heun(model, GRID, noise=noise, churn=churn, generator=generator(4), callback=steps.append)
    torch.testing.assert_close(actual, x, rtol=1e-10, atol=1e-10)
    assert model.evaluations == 2 * 9 - 1
    assert [step.sigma for step in steps] == pytest.approx([*high, 0.0])
    assert [step.index for step in steps] == list(range(10))


def test_churn_is_capped_and_keeps_the_marginal() -> None:
    """With S_noise 1, what goes up by noise and comes down by the trajectory has the data's distribution."""
    assert Churn(s_churn=80.0).raised(2.0, 10) == 2.0 * math.sqrt(2)
    assert Churn(s_churn=2.0).raised(2.0, 10) == pytest.approx(2.4)
    assert Churn(s_churn=2.0, s_min=3.0).raised(2.0, 10) == 2.0
    model, grid = Gaussian([0.5], [[0.49]]).double(), grids.karras(60, 40.0, 0.01)
    start = model.sample(20_000, generator=generator(1), sigma=40.0)
    out = heun(model, grid, noise=start, churn=Churn(s_churn=20.0), generator=generator(2)).flatten()
    assert abs(float(out.mean()) - 0.5) < 4 * 0.7 / math.sqrt(20_000)
    assert float(out.std()) == pytest.approx(0.7, rel=4 / math.sqrt(2 * 20_000) + 2e-3)  # 2e-3: the grid's own error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"s_churn": -1.0}, "s_churn = -1.0: must be in"),
        ({"s_churn": math.inf}, "s_churn = inf"),
        ({"s_churn": 1.0, "s_min": 2.0, "s_max": 1.0}, "s_min = 2.0, s_max = 1.0"),
        ({"s_churn": 1.0, "s_noise": -0.1}, "s_noise = -0.1"),
    ],
)
def test_bad_churn_is_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Churn(**values)


def test_heun_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="choose a finite sigma_max"):
        heun(mixture(), (math.inf, 1.0, 0.0), noise=randn(1, 2))
    with pytest.raises(ValueError, match="churn draws noise: give generator="):
        heun(mixture(), GRID, noise=randn(1, 2), churn=Churn(s_churn=1.0))


# the adaptive integrator


@pytest.mark.parametrize("rtol", [1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize(
    ("sigma", "target"), [(80.0, 0.01), (0.01, 80.0), (math.inf, 0.0), (0.0, math.inf), (math.inf, 1.0), (2.0, 0.0)]
)
def test_solve_follows_the_exact_trajectory_of_a_gaussian(sigma: float, target: float, rtol: float) -> None:
    model = gaussian()
    z = model.sample(32, generator=generator(), sigma=sigma) if sigma < math.inf else randn(32, 3)
    model_counted = Counted(model)
    solution = solve(model_counted, sigma, target, z, rtol=rtol, atol=rtol)
    expected = exact_trajectory(model, z, sigma, target)
    # Upwards, the trajectory itself spreads the narrowest direction by its growth, errors included.
    narrow = float(model.variances.min())
    spread = [math.sqrt((narrow + level**2) / (1 + level**2)) if level < math.inf else 1.0 for level in (sigma, target)]
    assert float((solution.z - expected).abs().max()) < 100 * rtol * max(1.0, spread[1] / spread[0])
    # first same as last: one evaluation, then six per step, taken or not
    assert solution.evaluations == model_counted.evaluations == 1 + 6 * (solution.steps + solution.rejected)


def test_solve_goes_there_and_back() -> None:
    model = mixture()
    x = model.sample(32, generator=generator())
    up = solve(model, 0.0, 80.0, x, rtol=1e-10, atol=1e-10)
    down = solve(model, 80.0, 0.0, up.z, rtol=1e-10, atol=1e-10)
    assert float((down.z - x).abs().max()) < 1e-6
    nowhere = solve(model, 1.0, 1.0, x)
    assert torch.equal(nowhere.z, x)
    assert nowhere.evaluations == 0


def test_solve_is_the_limit_of_plans() -> None:
    model, noise = mixture(), randn(32, 2)
    exact = solve(model, 30.0, 0.02, noise, rtol=1e-11, atol=1e-11).z
    errors = [
        float((sample(model, solvers.ge(grids.log_linear(n, 30.0, 0.02, last="min"), 1.5), noise=noise) - exact).norm())
        for n in (20, 80, 320)
    ]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]
    again = solve(model, 30.0, 0.02, noise, rtol=1e-8, atol=1e-8).z
    assert float((again - exact).abs().max()) < 1e-6


def test_a_hard_sample_does_not_hide_in_an_easy_batch() -> None:
    """Steps are for the worst sample: its end point does not depend on its company."""
    model = PointCloud(torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64))
    hard = torch.tensor([[1e-3, 0.3]], dtype=F64)
    alone = solve(model, 10.0, 0.05, hard, rtol=1e-9, atol=1e-9).z
    easy = torch.full((500, 2), 0.8, dtype=F64)
    together = solve(model, 10.0, 0.05, torch.cat([easy, hard]), rtol=1e-9, atol=1e-9).z[-1:]
    assert float((alone - together).abs().max()) < 1e-6


def test_solve_keeps_the_dtype_and_asks_for_a_fitting_tolerance() -> None:
    z = torch.randn(4, 3, generator=generator())
    assert solve(gaussian(), 10.0, 0.1, z, rtol=1e-5, atol=1e-5).z.dtype == torch.float32
    with pytest.raises(ValueError, match=r"rtol = 1e-08.*torch.float32 needs 1.2e-06 <= rtol.*float64 state"):
        solve(gaussian(), 10.0, 0.1, z, rtol=1e-8)
    with pytest.raises(ValueError, match="atol = -1"):
        solve(gaussian(), 10.0, 0.1, z, rtol=1e-5, atol=-1.0)


def test_solve_refuses_what_it_cannot_do() -> None:
    z = randn(2, 3)
    with pytest.raises(ValueError, match=r"sigma_to = -1.0: noise levels must be in \[0, inf\]"):
        solve(gaussian(), 1.0, -1.0, z)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        solve(NetworkDenoiser(nn.Linear(3, 3), Eps(), shape=(3,)), math.inf, 1.0, z)
    with pytest.raises(RuntimeError, match="50 evaluations reached sigma ="):
        solve(gaussian(), 80.0, 0.01, z, rtol=1e-10, atol=1e-10, max_evaluations=50)
    with pytest.raises(ValueError, match=r"z has shape \(2, 2\)"):
        solve(gaussian(), 1.0, 0.5, z[:, :2])


def test_solve_names_where_a_network_breaks() -> None:
    class Breaks(nn.Module):
        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return torch.sin(z) / (label[:, None] < 0)  # sigma < 1

    model = NetworkDenoiser(Breaks(), V(), shape=(3,))
    with pytest.raises(RuntimeError, match="not finite near sigma = "):
        solve(model, 10.0, 0.1, randn(2, 3))


def test_a_denoiser_that_moves_the_state_has_no_trajectory() -> None:
    class Moves(Denoiser):
        shape, sigma_data, trained_range = (3,), 1.0, (0.0, math.inf)

        def forward(self, z: Tensor, sigma: float | Tensor, **cond: object) -> Estimate:
            return Estimate(z, z, state=z)

    for run in (lambda: solve(Moves(), 1.0, 0.5, randn(1, 3)), lambda: heun(Moves(), GRID, noise=randn(1, 3))):
        with pytest.raises(ValueError, match=r"moves the state \(CFG\+\+\)"):
            run()
