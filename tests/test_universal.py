"""Universal plans: a plan per unit of data, within any range, and better than stock solvers on models it never saw."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import logsnr
from logsnr import exact
from logsnr.calibration.descent import mean_square
from logsnr.calibration.rollout import Batch
from logsnr.calibration.teacher import teacher_ends, teacher_grid
from logsnr.calibration.universal import fit_universal, member, relative_start
from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import LogsnrError
from logsnr.sampling import Plan, grids, sample, solvers, universal_plan
from logsnr.sampling.universal import scaled, universal_sizes

F64 = torch.float64


def mixture(scale: float = 1.0, seed: int = 3, d: int = 6, k: int = 4) -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means, factors = torch.randn(k, d, generator=g, dtype=F64), torch.randn(k, d, d, generator=g, dtype=F64)
    covs = (factors @ factors.mT) * 0.15 / d + 0.02 * torch.eye(d, dtype=F64)
    return exact.GaussianMixture(torch.ones(k, dtype=F64) / k, scale * means, scale**2 * covs)


def noises(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("n", universal_sizes())
def test_a_plan_belongs_to_no_unit(n: int) -> None:
    """Data in other units, the same y = z/alpha in those units: samples in those units."""
    unit = 7.0
    one = universal_plan(n, 1e-3, 1e3, sigma_data=0.8)
    other = universal_plan(n, 1e-3 * unit, 1e3 * unit, sigma_data=0.8 * unit)
    assert other.sigmas == pytest.approx([unit * s for s in one.sigmas], rel=1e-12)
    noise = noises(9)
    again = noise * unit * math.hypot(1, one.sigmas[0]) / math.hypot(1, other.sigmas[0])
    x = sample(mixture(), one, noise=noise)
    assert torch.allclose(sample(mixture(unit), other, noise=again), unit * x, atol=1e-9 * unit)


@pytest.mark.parametrize("n", universal_sizes())
@pytest.mark.parametrize(("low", "high"), [(0.03, 14.6), (0.002, 80.0), (0.2, 3.0), (1e-4, 1e4), (0.01, 0.02)])
def test_levels_start_at_the_largest_fit_the_range_and_keep_their_order(n: int, low: float, high: float) -> None:
    plan = universal_plan(n, low, high)
    assert plan.nfe == n
    assert plan.sigmas[-1] == 0
    assert plan.sigmas[0] == high
    assert low * (1 - 1e-9) <= plan.sigmas[-2]
    assert all(a > b for a, b in pairwise(plan.sigmas))
    # the same plan where nothing is in its way
    free = universal_plan(n, 1e-6, 1e6 if high >= 40 else 39.999).sigmas[1:-1]
    own = plan.sigmas[1:-1]
    if low < free[-1] and free[0] < high / 1.25:
        assert own == free
    # drawn together geometrically: log levels keep their proportions
    inside = [math.log(s / own[-1]) / math.log(own[0] / own[-1]) for s in own]
    assert inside == pytest.approx([math.log(s / free[-1]) / math.log(free[0] / free[-1]) for s in free], abs=1e-9)


class Ending(Denoiser):
    """A model whose levels end early, as Stable Diffusion's."""

    def __init__(self, inner: Denoiser, high: float) -> None:
        super().__init__()
        self.inner, self.shape, self.sigma_data = inner, inner.shape, inner.sigma_data
        self.trained_range = inner.sampling_range[0], high

    def forward(self, z: torch.Tensor, sigma: float | torch.Tensor, **cond: object) -> Estimate:
        estimate: Estimate = self.inner(z, sigma)
        return estimate


@pytest.mark.parametrize("n", universal_sizes())
@pytest.mark.parametrize("span", ["wide", "narrow"])
def test_beats_stock_solvers_on_models_it_never_saw(n: int, span: str) -> None:
    """Geometric mean over three mixtures of the RMSE, over that of the best of three solvers on two grids."""
    ratios = []
    for seed in (101, 102, 103):
        inner = mixture(seed=seed)
        model = inner if span == "wide" else Ending(inner, 14.6 * inner.sigma_data)
        low, high = model.sampling_range
        noise = noises(192, seed=seed)
        batch = Batch(noise=noise, cond={}, end=noise.new_empty(192, 0))
        batch = teacher_ends(model, batch, teacher_grid(96, low, high), 192, None)
        plan = universal_plan(n, low, high, sigma_data=model.sigma_data)
        own = mean_square(model, plan, batch, 192, None)
        stock = [
            mean_square(model, solver(grid(n, high, low)), batch, 192, None)
            for solver in (solvers.ge, solvers.dpmpp, solvers.unipc)
            for grid in (grids.log_linear, grids.karras)
        ]
        ratios.append(math.log(own / min(stock)) / 2)
    assert math.exp(sum(ratios) / 3) < 0.8


def test_the_fit_is_where_the_mean_of_log_errors_is_flat() -> None:
    """Two models, three steps, chosen by the noise that is fitted: the slopes of mean_m log mse_m fall to a tenth."""
    members = [member(mixture(scale, seed), batch=24, teacher=32) for scale, seed in ((1.0, 3), (0.5, 4))]
    members = [replace(m, select=m.fit) for m in members]
    first = relative_start([8.0, 1.5, 0.3], 1.6, 1)
    found = fit_universal(members, [first], low=0.01, high=50.0, strength=0.0)

    def objective(plan: Plan) -> float:
        return sum(math.log(m.error(plan, m.fit)) for m in members) / 2

    def slopes(plan: Plan) -> list[float]:
        out = []
        for i in (1, 2):  # the first is each model's largest
            up, down = list(plan.sigmas), list(plan.sigmas)
            up[i], down[i] = up[i] * math.exp(1e-3), down[i] * math.exp(-1e-3)
            out.append((objective(Plan(tuple(up), plan.rows)) - objective(Plan(tuple(down), plan.rows))) / 2e-3)
        return out

    assert objective(found.plan) < objective(first)
    assert max(map(abs, slopes(found.plan))) < 0.1 * max(map(abs, slopes(first)))
    assert found.error <= math.exp(sum(math.log(m.error(first, m.select)) for m in members) / 4)
    with pytest.raises(LogsnrError, match="0 models and 1 starting plans"):
        fit_universal([], [first], low=0.01, high=50.0)


def test_members_measure_in_their_own_units() -> None:
    one = member(mixture(3.0), batch=8, teacher=32)
    plan = universal_plan(5, 1e-3, 1e3)
    own = scaled(plan, one.denoiser.sigma_data, *one.denoiser.sampling_range)
    x = sample(one.denoiser, own, noise=one.select.noise)
    assert one.error(plan, one.select) == pytest.approx(float((x - one.select.end).square().mean()), rel=1e-6)


def test_plans_are_named_keep_their_numbers_and_are_public(tmp_path) -> None:
    plan = logsnr.universal_plan(6, 0.002, 80.0, sigma_data=0.5)
    assert plan.meta["solver"] == "universal"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").hash == plan.hash
    assert all(a > b for a, b in pairwise(plan.sigmas))
    assert {4, 5, 6, 8, 10} <= set(universal_sizes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nfe": 3}, r"nfe = 3: there are universal plans of 4, 5, .* for others use"),
        ({"nfe": True}, "nfe = True"),
        ({"nfe": 5, "low": 0.0}, r"range of levels \(0.0, 14.6\)"),
        ({"nfe": 5, "low": 20.0}, "needs 0 < low < high < inf"),
        ({"nfe": 5, "sigma_data": 0.0}, r"sigma_data = 0.0: must be in \(0, inf\)"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict, message: str) -> None:
    given = {"low": 0.03, "high": 14.6, **arguments}
    with pytest.raises(LogsnrError, match=message) as caught:
        universal_plan(given.pop("nfe"), given.pop("low"), given.pop("high"), **given)
    assert "\n" not in str(caught.value)


def test_auto_is_not_a_gamma_for_a_grid() -> None:
    with pytest.raises(ValueError, match="gamma = 'auto': a grid of your own takes numbers"):
        solvers.ge((3.0, 1.0, 0.0), "auto")
