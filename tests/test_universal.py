"""Universal plans: a plan per unit of data, within any range, and better than stock solvers on models it never saw."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

import logsnr
from logsnr import exact
from logsnr.calibration import universal as fitting
from logsnr.calibration.rollout import Noises, mean_square
from logsnr.calibration.teacher import taught
from logsnr.calibration.universal import Member, fit_between, fit_universal, member, nodes, spaced
from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import LogsnrError
from logsnr.sampling import Plan, grids, sample, solvers, universal_plan
from logsnr.sampling.teacher import teacher_plan
from logsnr.sampling.universal import LARGE, scaled, universal_sizes

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


def test_size_and_range_choose_the_set() -> None:
    """Large plans only for wide ranges, from LARGE dimensions on."""
    large, wide = (universal_plan(6, 0.01, 160.0, sigma_data=2.0, dim=dim) for dim in (LARGE, LARGE - 1))
    assert large.meta["range"] == "large"
    assert wide.meta["range"] == "wide"
    assert wide == universal_plan(6, 0.01, 160.0, sigma_data=2.0)
    assert large.sigmas[1] > 1.5 * wide.sigmas[1]
    narrow = [universal_plan(6, 0.01, 79.0, sigma_data=2.0, dim=dim) for dim in (LARGE, None)]
    assert narrow[0] == narrow[1]
    assert narrow[0].meta["range"] == "narrow"


def test_the_second_level_stays_a_quarter_below_the_largest() -> None:
    """Where a plan's own would not: at high / 1.25, or half-way down a range that is shorter still."""
    relative = Plan((10.0, 5.0, 1.0, 0.0), ((1.0,), (1.0,), (1.0,)), "eps")
    assert scaled(relative, 1.0, 0.1, 4.0).sigmas == pytest.approx((4.0, 3.2, 1.0, 0.0), rel=1e-12)
    assert scaled(relative, 1.0, 0.1, 6.25).sigmas == pytest.approx((6.25, 5.0, 1.0, 0.0), rel=1e-12)
    assert scaled(relative, 1.0, 1.0, 1.21).sigmas == pytest.approx((1.21, 1.1, 1.0, 0.0), rel=1e-12)


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


@cache
def unseen(seed: int, d: int, span: str) -> tuple[Denoiser, Noises]:
    """A model that no plan was fitted to, and where the teacher ends on its noises."""
    inner = mixture(seed=seed, d=d)
    model = inner if span == "wide" else Ending(inner, 14.6 * inner.sigma_data)
    plan = teacher_plan(96, *model.sampling_range)
    return model, taught(model, plan, noises(192, d, seed), None, chunk=192)


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=[pytest.mark.heavy] * (n not in (4, 5, 6, 8, 10))) for n in universal_sizes()]
)
@pytest.mark.parametrize("span", ["wide", "narrow"])
def test_beats_stock_solvers_on_models_it_never_saw(n: int, span: str) -> None:
    """Geometric mean over four mixtures of the RMSE, over that of the best of three solvers on two grids."""
    ratios = []
    for seed, d in ((101, 6), (102, 6), (103, 64), (104, 64)):
        model, batch = unseen(seed, d, span)
        low, high = model.sampling_range
        plan = universal_plan(n, low, high, sigma_data=model.sigma_data)
        own = mean_square(model, plan, batch, 192, None)
        stock = [
            mean_square(model, solver(grid(n, high, low)), batch, 192, None)
            for solver in (solvers.ge, solvers.dpmpp, solvers.unipc)
            for grid in (grids.log_linear, grids.karras)
        ]
        ratios.append(math.log(own / min(stock)) / 2)
    assert math.exp(sum(ratios) / 4) < 0.6


def family(*models: Denoiser, **about: float) -> list[Member]:
    return [member(model, noises(24, seed=i), nodes(20.0), **about) for i, model in enumerate(models)]


def test_no_move_of_the_levels_improves_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, five evaluations: levels are even in theta, u = 3 tan^2 theta, to the width of the lattice; another
    second or last level, rows fitted anew, has a larger geometric mean of errors, in which one model counts twice."""
    monkeypatch.setattr(fitting, "TAIL", math.inf)
    members = [
        replace(one, weight=w) for one, w in zip(family(mixture(1.0, 3), mixture(0.5, 4)), (2.0, 1.0), strict=True)
    ]
    lattice = nodes(20.0)
    found = fit_universal(members, 5, high=20.0)

    def geometric(errors: list[float]) -> float:
        return math.exp((2 * math.log(errors[0]) + math.log(errors[1])) / 3)

    at = [lattice.index(u) for u in found.plan.sigmas[1:-1]]
    assert found.plan.sigmas[0] == 20.0
    angles = [math.atan(math.sqrt(u / 3)) for u in found.plan.sigmas[1:-1]]
    assert angles == pytest.approx(torch.linspace(angles[0], angles[-1], 4).tolist(), abs=0.0126)
    ends = [
        mean_square(m.denoiser, m.own(found.plan), m.noises, 24, None) ** 0.5 for m in members
    ]  # the rollouts are those of `sample`
    assert found.errors == pytest.approx(ends, rel=1e-9)
    assert found.error == pytest.approx(geometric(ends), rel=1e-9)
    for a, b in ((4, 0), (-4, 0), (0, 4), (0, -4)):
        levels = spaced(at[0] + a, at[-1] + b, 4, lattice)
        assert levels is not None
        _, errors = fit_between(members, (20.0, *levels, 0.0), [])
        assert geometric(errors) >= found.error
        assert found.tried[levels[0], levels[-1]] == pytest.approx(errors)


def test_a_share_draws_the_rows_towards_a_model() -> None:
    """Least squares: with a share of the whole, the rows are those of one model alone."""
    members = family(mixture(1.0, 3), mixture(0.5, 4))
    levels = (20.0, 8.0, 2.0, 0.5, 0.0)
    lattice = nodes(20.0)
    levels = (20.0, *(min(lattice, key=lambda u, v=v: abs(u - v)) for v in levels[1:-1]), 0.0)
    alone, _ = fit_between(members[:1], levels, [])
    nearly = [members[0], replace(members[1], share=1e-9)]
    for one, other in zip(alone.rows, fit_between(nearly, levels, [])[0].rows, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    halves = fit_between([replace(m, share=0.5) for m in members], levels, [])[0].rows
    for one, other in zip(fit_between(members, levels, [])[0].rows, halves, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_a_fit_knows_no_units() -> None:
    """Data in other units, the same noise: the same plan, up to y = sqrt(1 + sigma^2) noise at the first level."""
    plans = [fit_universal(family(mixture(unit)), 4, high=20.0).plan for unit in (1.0, 7.0)]
    assert plans[0].sigmas == plans[1].sigmas
    for one, other in zip(plans[0].rows, plans[1].rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_a_member_teaches_at_its_own_levels() -> None:
    """A Gaussian's trajectories are known: y shrinks as sqrt(v + sigma^2), at the model's first level and the
    lattice's; a sample of the data, at the end."""
    model = exact.GaussianMixture(
        [1.0], torch.zeros(1, 2, dtype=F64), torch.diag(torch.tensor([4.0, 0.25])).double()[None]
    )
    lattice = nodes(20.0)
    one = member(model, noises(5, d=2), lattice)
    assert lattice[0] == pytest.approx(16.0)
    assert all(a / b == pytest.approx(math.exp(0.05)) for a, b in pairwise(lattice))
    assert lattice[-1] * math.exp(-0.05) < 0.03 <= lattice[-1]
    plan = Plan((20.0, lattice[20], lattice[45], 0.0), ((1.0,), (1.0,), (1.0,)))
    lesson = one.lesson(plan)
    unit, high = model.sigma_data, model.sampling_range[1]
    assert lesson.prior.sigmas == (high, unit * lattice[20], unit * lattice[45], 0.0)
    variances = torch.tensor([4.0, 0.25], dtype=F64)
    y = one.noises.noise * math.hypot(1.0, high)
    for z, sigma in zip(lesson.targets, lesson.prior.sigmas[1:], strict=True):
        exactly = y * ((variances + sigma**2) / (variances + high**2)).sqrt() / math.hypot(1.0, sigma)
        assert torch.allclose(z, exactly, rtol=5e-4, atol=0)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(LogsnrError, match="no models to fit a plan over"):
        fit_universal([], 5, high=20.0)
    members = family(mixture())
    for n in (2, 32):
        with pytest.raises(LogsnrError, match=f"n = {n}: this lattice has room for 3 to 31 evaluations"):
            fit_universal(members, n, high=20.0)
    with pytest.raises(LogsnrError, match=r"n = 31: no levels between 1 and 0.9 on this lattice; give start="):
        fit_universal(members, 31, high=20.0, start=(1.0, 0.9))
    with pytest.raises(
        LogsnrError, match=r"relative levels 0.0\d+ to 64 at sigma_data .*: most of them leave the model's"
    ):
        member(Ending(mixture(), 0.3), noises(4), nodes(80.0))


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
        ({"nfe": 2}, r"nfe 2 is not one of 3, 4, .*, 12, of .*for others use solvers.unipc .*: did you mean '3'\?"),
        ({"nfe": True}, "nfe True"),
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
