"""Calibration: rows and derivatives with known answers, then plans that beat every stock solver on fresh noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from logsnr import exact, guidance
from logsnr.calibration import Progress, alternatives, calibrate, run, trial
from logsnr.calibration.baselines import searched, tuned_ends
from logsnr.calibration.descent import NUDGE, Space, normal_equations
from logsnr.calibration.effort import EFFORTS
from logsnr.calibration.ledger import Ledger, fingerprint
from logsnr.calibration.levels import MIN_STEP, SPREADS, best_levels, local_errors, tried_levels
from logsnr.calibration.report import through
from logsnr.calibration.rollout import Noises, Rollout, mean_square
from logsnr.calibration.rows import Lesson, fit_rows, prior_rows
from logsnr.calibration.teacher import remember, taught
from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import LogsnrError
from logsnr.noise import alpha_s
from logsnr.sampling import Plan, grids, sample, solve, solvers
from logsnr.sampling.batches import in_turn
from logsnr.sampling.counted import Counted, rmse
from logsnr.sampling.teacher import teacher_on, teacher_plan

F64 = torch.float64
VARIANCES = torch.tensor([0.09, 1.44], dtype=F64)
GAUSSIAN = exact.Gaussian(torch.zeros(2, dtype=F64), torch.diag(VARIANCES))


def mixture(d: int = 6, k: int = 5, seed: int = 0) -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means, factors = torch.randn(k, d, generator=g), torch.randn(k, d, d, generator=g) * 0.35 / math.sqrt(d)
    return exact.GaussianMixture(torch.ones(k) / k, means, factors @ factors.mT + 0.02 * torch.eye(d))


MIXTURE = mixture()


def noises(n: int, d: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of(noise: Tensor, end: Tensor | None = None) -> Noises:
    return Noises(noise=noise, cond={}, end=noise.new_empty(len(noise), 0) if end is None else end)


def rows_of(prior: Plan, noise: Tensor, targets: list[Tensor], strength: float, chunk: int) -> tuple[Plan, Tensor]:
    """`fit_rows` of one lesson of the Gaussian."""
    lesson = Lesson(denoiser=GAUSSIAN, prior=prior, noises=of(noise), targets=targets)
    (plan,), (end,) = fit_rows([lesson], strength, chunk)
    return plan, end


def flow(z: Tensor, sigma: float, target: float) -> Tensor:
    """The exact trajectory of the Gaussian: each direction of y shrinks with its standard deviation."""
    y = z / alpha_s(sigma)[0] * ((VARIANCES + target**2) / (VARIANCES + sigma**2)).sqrt()
    return y * alpha_s(target)[0]


# Rollouts

PLANS = {
    "eps": solvers.ipndm(grids.log_linear(5, 20.0, 0.05), 3),
    "x0": solvers.unipc(grids.karras(5, 20.0, 0.05), 2),
    "velocity": solvers.ge(grids.log_linear(5, 20.0, 0.05), 1.7, basis="velocity"),
}


@pytest.mark.parametrize("basis", PLANS)
def test_a_rollout_is_the_sampler(basis: str) -> None:
    noise = noises(7, 6)
    run = Rollout(MIXTURE, PLANS[basis].basis, of(noise))
    assert torch.allclose(run.run(PLANS[basis]), sample(MIXTURE, PLANS[basis], noise=noise), atol=1e-12)


@pytest.mark.parametrize("basis", PLANS)
def test_a_branch_pays_only_for_what_follows(basis: str) -> None:
    """A changed row i or sigma_{i+1} costs n - 1 - i evaluations and ends where a run from the start ends."""
    plan, noise = PLANS[basis], noises(7, 6)
    meter = Counted(MIXTURE)
    base = Rollout(meter, plan.basis, of(noise))
    base.run(plan)
    for i in range(plan.nfe):
        rows = [list(row) for row in plan.rows]
        rows[i][0] += 0.1
        sigmas = list(plan.sigmas)
        if i < plan.nfe - 1:
            sigmas[i + 1] *= 0.9
        changed = Plan(tuple(sigmas), tuple(map(tuple, rows)), plan.basis)
        meter.evaluations = 0
        x = base.branch(i).run(changed)
        assert meter.evaluations == plan.nfe - 1 - i
        assert torch.allclose(x, sample(MIXTURE, changed, noise=noise), atol=1e-11)


# Rows


def test_one_step_has_the_analytic_optimum() -> None:
    """x = c x0(noise): c = sum_a g_a t_a m_a / sum_a g_a^2 m_a, g the denoiser's gain, t the flow's, m = <noise^2>."""
    sigma, noise = 3.0, noises(50, 2)
    alpha, s = alpha_s(sigma)
    g = alpha * VARIANCES / (alpha**2 * VARIANCES + s**2)
    t = (VARIANCES / (VARIANCES + sigma**2)).sqrt() / alpha
    m = noise.square().mean(0)
    expected = float((g * t * m).sum() / (g * g * m).sum())
    end = flow(noise, sigma, 0.0)
    prior = Plan((sigma, 0.0), ((1.0,),), "x0")
    plan, reached = rows_of(prior, noise, [end], 0.0, 16)
    assert torch.equal(reached, sample(GAUSSIAN, plan, noise=noise))
    assert plan.rows[0][0] == pytest.approx(expected, rel=1e-9)
    # in eps, where y' = y - sigma c eps, with the gain of eps and the same distance to go
    h, left = s / (alpha**2 * VARIANCES + s**2), 1 / alpha - t
    expected = float((h * left * m).sum() / (h * h * m).sum()) / sigma
    plan, _ = rows_of(Plan((sigma, 0.0), ((1.0,),), "eps"), noise, [end], 0.0, 50)
    assert plan.rows[0][0] == pytest.approx(expected, rel=1e-9)


def test_two_steps_are_exact_for_two_variances() -> None:
    """The last row has two coefficients for two variances: [e_1a e_0a] c = x*_a, solved by hand (Cramer)."""
    noise, sigmas = noises(40, 2), (4.0, 0.8, 0.0)
    prior = prior_rows(sigmas, 1, "x0")
    targets = [flow(noise, 4.0, 0.8), flow(noise, 4.0, 0.0)]
    plan, _ = rows_of(prior, noise, targets, 0.0, 40)
    assert float((sample(GAUSSIAN, plan, noise=noise) - targets[1]).abs().max()) < 1e-8
    one = torch.ones(1, 2, dtype=F64)
    first = GAUSSIAN(one, 4.0).x0
    (alpha, s), (alpha_, s_) = alpha_s(4.0), alpha_s(0.8)
    m = noise.square().mean(0)
    gain = (alpha_ - alpha * s_ / s) * first[0]
    rest = flow(one, 4.0, 0.8)[0] - s_ / s
    c = float((gain * rest * m).sum() / (gain * gain * m).sum())
    second = GAUSSIAN(one * s_ / s + c * gain, 0.8).x0
    a, b = second[0], first[0]
    x = flow(one, 4.0, 0.0)[0]
    det = a[0] * b[1] - a[1] * b[0]
    by_hand = (float((x[0] * b[1] - x[1] * b[0]) / det), float((a[0] * x[1] - a[1] * x[0]) / det))
    assert plan.rows == (pytest.approx((c,), rel=1e-9), pytest.approx(by_hand, rel=1e-7))


def test_models_that_share_their_rows_count_alike() -> None:
    """Two Gaussians of one direction, one step: c minimises the sum of both relative errors, whatever their sizes."""
    sigma, noise = 3.0, noises(50, 1)
    variances, units = (2.0, 0.3), (1.0, 40.0)
    lessons, gains, ways = [], [], []
    alpha, s = alpha_s(sigma)
    for v, unit in zip(variances, units, strict=True):
        model = exact.GaussianMixture([1.0], torch.zeros(1, 1, dtype=F64), torch.full((1, 1, 1), v, dtype=F64))
        gains.append(alpha * v / (alpha**2 * v + s**2))
        ways.append(math.sqrt(v / (v + sigma**2)) / alpha)
        end = ways[-1] * noise * unit
        prior = Plan((sigma, 0.0), ((1.0,),), "x0")
        lessons.append(Lesson(denoiser=model, prior=prior, noises=of(unit * noise), targets=[end]))
    # the residual of c: (t - c g) unit noise; relative to that of c = 1
    size = [(t - g) ** 2 for g, t in zip(gains, ways, strict=True)]
    best = sum(g * t / q for g, t, q in zip(gains, ways, size, strict=True))
    best /= sum(g * g / q for g, q in zip(gains, size, strict=True))
    plans, ends = fit_rows(lessons, 0.0, 16)
    assert [plan.rows[0][0] for plan in plans] == pytest.approx([best, best], rel=1e-9)
    for end, g, unit in zip(ends, gains, units, strict=True):
        assert torch.allclose(end, best * g * unit * noise, rtol=1e-9, atol=1e-12 * unit)


def test_strength_pulls_to_the_prior() -> None:
    noise = noises(40, 2)
    prior = prior_rows((4.0, 0.8, 0.0), 1, "eps")
    targets = [flow(noise, 4.0, 0.8), flow(noise, 4.0, 0.0)]
    far = [rows_of(prior, noise, targets, k, 40)[0] for k in (0.0, 1e-2, 1.0, 1e6)]

    def distance(plan: Plan) -> float:
        return math.dist(plan.rows[1], prior.rows[1])

    assert distance(far[0]) > distance(far[2]) > distance(far[3])
    assert distance(far[3]) < 1e-5


# Levels


def small_cache() -> tuple:
    plan = teacher_plan(9, 0.1, 10.0)
    return remember(MIXTURE, plan, noises(20, 6, dtype=torch.float32), None, chunk=8)


def test_local_errors_are_those_of_the_cached_trajectories() -> None:
    batch, cache = small_cache()
    cost = local_errors(cache, MIXTURE.sigma_data, 1)
    y, e = cache.states.double().flatten(1), cache.eps.double().flatten(1)
    for i, j, k in ((1, 3, 5), (0, 4, 9), (2, 2, 6)):
        h = cache.sigmas[k] - cache.sigmas[j]
        miss = y[k] - y[j] - h * e[j]
        if i < j:
            d = h * (e[i] - e[j])
            miss = miss - d * (d @ miss) / (d @ d)
        scale = MIXTURE.sigma_data / math.hypot(MIXTURE.sigma_data, cache.sigmas[k])
        assert float(cost[i, j, k]) == pytest.approx(float(miss.square().mean().sqrt()) * scale, rel=1e-5)
    assert torch.equal(taught(MIXTURE, teacher_on(cache.sigmas), batch.noise, None, chunk=8).end, batch.end)
    assert torch.allclose(cache.states[-1].flatten(1), batch.end.flatten(1))


def test_the_teacher_is_exact() -> None:
    """Against adaptive Runge-Kutta: its 96 evaluations leave a tenth of what a good plan of 10 leaves."""
    lo, hi = MIXTURE.sampling_range
    noise = noises(64, 6)
    truth = solve(MIXTURE, hi, lo, noise, rtol=1e-8, atol=1e-8).z
    truth = MIXTURE(truth, lo).x0
    error = rmse(taught(MIXTURE, teacher_plan(96, lo, hi), noise, None, chunk=64).end, truth)
    assert error < 0.1 * calibrated(10).meta["report"]["rmse"]


@pytest.mark.parametrize("history", [0, 1])
def test_the_path_is_the_best_of_all(history: int) -> None:
    _, cache = small_cache()
    cost = local_errors(cache, MIXTURE.sigma_data, history)
    m = len(cache.eps)

    def total(path: tuple[int, ...]) -> float:
        steps = [cost[path[0], path[0], path[1]]]
        steps += [cost[i, j, k] for i, j, k in zip(path, path[1:], path[2:], strict=False)]
        return float(sum(steps))

    best = min(((0, *inner, m) for inner in combinations(range(1, m), 2)), key=total)
    found = best_levels(cache, 3, MIXTURE.sigma_data, history, slack=0.0)
    assert found == tuple(cache.sigmas[i] for i in best)
    assert searched(cache, 3, MIXTURE.sigma_data).nfe == 3


@pytest.mark.parametrize("n", [1, 2, 4, 10, 20])
def test_tried_levels_are_the_caches_far_apart_and_near_the_grids_they_stand_for(n: int) -> None:
    low, high = MIXTURE.sampling_range
    plan = teacher_plan(64, low, high)
    _, cache = remember(MIXTURE, plan, noises(4, 6, 5, torch.float32), None, chunk=4)
    found = tried_levels(cache, n, MIXTURE.sigma_data, min(1, n - 1), EFFORTS["full"].lasts)
    assert found[0] == best_levels(cache, n, MIXTURE.sigma_data, min(1, n - 1))
    assert len(set(found)) == len(found)
    for levels in found:
        assert len(levels) == n + 1
        assert set(levels) <= set(cache.sigmas)
        assert levels[-1] == 0
        assert all(math.log(a / b) >= MIN_STEP for a, b in pairwise(levels[:-1]))
    spacing = math.log(high / low) / 63
    meant = [spread(n, high, last * MIXTURE.sigma_data) for spread in SPREADS for last in EFFORTS["full"].lasts]
    for levels in found[1:]:
        assert levels[0] == high
        assert any(
            all(abs(math.log(a / b)) <= spacing / 2 + 1e-9 for a, b in zip(levels[:-1], ideal[:-1], strict=True))
            for ideal in meant
        )
    if n == 4:
        assert len(found) == 1 + len(meant)


# Descent


def test_derivatives_of_one_step() -> None:
    """r = c g(sigma) n - x*: J by hand, and as many evaluations as `cost` says."""
    sigma, c, noise = 3.0, 1.3, noises(30, 2)
    end = flow(noise, sigma, 0.0)
    space = Space(template=Plan((sigma, 0.0), ((c,),), "x0"), low=0.01, high=50.0)
    meter = Counted(GAUSSIAN)
    gram, pull = normal_equations(meter, space, space.vector(space.template), of(noise, end), 16, None)
    assert meter.answers == space.cost() * 30

    def gain(sigma: float) -> Tensor:
        alpha, s = alpha_s(sigma)
        return alpha * VARIANCES / (alpha**2 * VARIANCES + s**2)

    r = c * gain(sigma) * noise - end
    by_sigma = c * (gain(sigma * 1.0001) - gain(sigma / 1.0001)) / (2 * math.log(1.0001)) * noise
    columns = [by_sigma.flatten(), (gain(sigma) * noise).flatten()]
    for i in range(2):
        assert float(pull[i]) == pytest.approx(float(columns[i] @ r.flatten()) / 60, rel=2 * NUDGE)
        for j in range(2):
            assert float(gram[i, j]) == pytest.approx(float(columns[i] @ columns[j]) / 60, rel=2 * NUDGE)


def test_space_keeps_levels_apart_and_in_range() -> None:
    template = prior_rows((20.0, 5.0, 1.0, 0.2, 0.0), 3, "eps")
    space = Space(template=template, low=0.1, high=30.0)
    assert space.plan(space.vector(template)).rows == template.rows
    for seed in range(20):
        plan = space.plan(space.vector(template) + 3 * noises(1, 14, seed)[0])
        assert 0.1 <= plan.sigmas[-2]
        assert plan.sigmas[0] <= 30.0
        assert all(math.log(a / b) >= MIN_STEP - 1e-9 for a, b in pairwise(plan.sigmas[:-1]))
        ending = replace(template, sigmas=(*template.sigmas[:-1], 0.1))  # at the smallest level, not at 0
        plan = replace(space, template=ending).plan(space.vector(ending) + 3 * noises(1, 14, seed)[0])
        assert plan.sigmas[-1] == 0.1
        assert all(math.log(a / b) >= MIN_STEP - 1e-9 for a, b in pairwise(plan.sigmas))


# The whole: fresh noise, every solver, both grids

PEERS = {
    "DDIM": solvers.ddim,
    **{f"GE({g})": partial(solvers.ge, gamma=g) for g in (1.5, 2.0)},
    **{f"GE({g}) {b}": partial(solvers.ge, gamma=g, basis=b) for g in (1.5, 2.0) for b in ("x0", "velocity")},
    **{f"AB-{p}": partial(solvers.adams_bashforth, order=p) for p in (2, 3, 4)},
    **{f"iPNDM-{p}": partial(solvers.ipndm, order=p) for p in (3, 4)},
    **{f"DEIS-{p} {t}": partial(solvers.deis, order=p, time=t) for p in (2, 3, 4) for t in ("vp", "log")},
    **{f"DPM++-{p} {f}": partial(solvers.dpmpp, order=p, form=f) for p in (2, 3) for f in ("published", "exact")},
    **{f"UniPC-{p} {v}": partial(solvers.unipc, order=p, variant=v) for p in (1, 2, 3) for v in ("bh1", "bh2")},
}


@cache
def calibrated(n: int) -> Plan:
    return calibrate(MIXTURE, n, n=96, seed=1, rollouts=140)


@cache
def fresh() -> Noises:
    lo, hi = MIXTURE.sampling_range
    return taught(MIXTURE, teacher_plan(200, lo, hi), noises(512, 6, 999, torch.float32), None, chunk=512)


@cache
def ratio(n: int) -> float:
    lo, hi = MIXTURE.sampling_range
    peers = [f(levels(n, hi, lo)) for f in PEERS.values() for levels in (grids.log_linear, grids.karras)]
    best = min(mean_square(MIXTURE, plan, fresh(), 512, None) for plan in peers)
    return math.sqrt(mean_square(MIXTURE, calibrated(n), fresh(), 512, None) / best)


@pytest.mark.parametrize("n", [5, *(pytest.param(n, marks=pytest.mark.heavy) for n in (4, 6, 8, 10))])
def test_beats_every_stock_solver_on_fresh_noise(n: int) -> None:
    assert ratio(n) <= 0.7
    plan = calibrated(n)
    lo, hi = MIXTURE.sampling_range
    assert plan.nfe == n
    assert plan.sigmas[-1] in (0, lo)
    assert lo <= plan.sigmas[-2] < plan.sigmas[0] <= hi
    assert all(a / b > 1.2 for a, b in pairwise(plan.sigmas[:-1]))


@pytest.mark.parametrize("method", ["search", "gits", "ays", "ends"])
@pytest.mark.parametrize("n", [1, 4, 10])
def test_the_smallest_budget_allowed_ends_in_a_reported_plan(n: int, method: str) -> None:
    plan = calibrate(MIXTURE, n, n=6, rollouts=40, teacher=20, method=method)
    assert plan.nfe == n
    assert plan.meta["evaluations"]["rollouts"] <= 40
    assert plan.meta["report"]["rmse"] > 0


SMALL = {"n": 24, "rollouts": 80, "teacher": 32}


@cache
def observed() -> tuple[Plan, list[tuple[str, Any]], list[Progress]]:
    """A small calibration, what it drew and the hash it recorded, in turn, and the progress it told."""
    events: list[tuple[str, Any]] = []
    seen: list[Progress] = []
    draw, settle = trial.draw, Ledger.settle

    def drawing(own: trial.Trial, purpose: str) -> tuple[Tensor, Mapping[str, Any]]:
        events.append((purpose, draw(own, purpose)))
        return events[-1][1]

    def settling(self: Ledger, plan_hash: str) -> None:
        events.append(("hash", plan_hash))
        settle(self, plan_hash)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "draw", drawing)
        patch.setattr(Ledger, "settle", settling)
        return calibrate(MIXTURE, 4, seed=3, progress=seen.append, **SMALL), events, seen


def small() -> Plan:
    return observed()[0]


def test_same_seed_same_plan(tmp_path) -> None:
    again = calibrate(MIXTURE, 4, seed=3, **SMALL)
    assert again == small()
    assert again.meta == small().meta
    assert calibrate(MIXTURE, 4, seed=4, **SMALL) != small()
    drawn = {"method": "gits", **SMALL}
    one, other, third = (calibrate(MIXTURE, 4, generator=torch.Generator().manual_seed(s), **drawn) for s in (7, 7, 8))
    assert (one, one.meta) == (other, other.meta)
    assert one.meta["report"] != third.meta["report"]
    small().save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == small()
    assert loaded.meta == json.loads(json.dumps(small().meta))
    noise = noises(5, 6)
    assert torch.equal(sample(MIXTURE, loaded, noise=noise), sample(MIXTURE, small(), noise=noise))


def test_meta_holds_provenance_and_errors() -> None:
    plan, events, _ = observed()
    meta = plan.meta
    assert meta["model"] == fingerprint(MIXTURE)
    assert meta["plan_hash"] == plan.hash
    assert (meta["seed"], meta["n"], meta["nfe"], meta["interrupted"]) == (3, 24, 4, False)
    lo, hi = MIXTURE.sampling_range
    report = taught(MIXTURE, teacher_plan(32, lo, hi), *dict(events)["report"], chunk=24)
    everyone = alternatives(MIXTURE, 4, lo, hi)
    assert {"DDIM, log-linear", "GE(2), karras", "GE(1.5), karras", "UniPC-2, karras"} <= set(everyone)
    assert len(meta["report"]["alternatives"]) == EFFORTS["full"].leaders
    assert meta["selection"]["best_alternative"] in meta["report"]["alternatives"]
    for name in meta["report"]["alternatives"]:
        x = sample(MIXTURE, everyone[name], noise=report.noise)
        assert meta["report"]["alternatives"][name] == pytest.approx(rmse(x, report.end), rel=1e-4)
    own = rmse(sample(MIXTURE, plan, noise=report.noise), report.end)
    assert meta["report"]["rmse"] == pytest.approx(own, rel=1e-4)
    q = (sample(MIXTURE, plan, noise=report.noise) - report.end).double().square().mean(1)
    assert meta["report"]["stderr"] == pytest.approx(float(q.std()) / (2 * own * math.sqrt(len(q))), rel=1e-3)
    assert meta["report"]["median"] == pytest.approx(math.sqrt(float(q.median())), rel=1e-3)
    assert meta["report"]["strayed"] in [k / len(q) for k in range(len(q) + 1)]


def test_three_noises_are_disjoint_and_the_last_comes_after_the_hash() -> None:
    plan, events, _ = observed()
    assert [name for name, _ in events] == ["fit", "select", "hash", "report"]
    assert events[2][1] == plan.hash
    everything = torch.cat([what[0] for name, what in events if name != "hash"])
    assert len(everything) == len(everything.unique(dim=0)) == 3 * 24


class Counting(Denoiser):
    """Counts samples, without the library's help."""

    def __init__(self, inner: Denoiser, limit: float = math.inf) -> None:
        super().__init__()
        self.inner, self.shape, self.sigma_data = inner, inner.shape, inner.sigma_data
        self.trained_range, self.samples, self.limit = inner.trained_range, 0, limit

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: object) -> Estimate:
        self.samples += len(z)
        if self.samples > self.limit:
            raise KeyboardInterrupt
        return self.inner(z, sigma, **cond)


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("rollouts", [40, 90])
def test_the_budget_holds(n: int, rollouts: int) -> None:
    model = Counting(MIXTURE)
    plan = calibrate(model, n, n=16, rollouts=rollouts, teacher=16, chunk=5)
    teacher = 4 * 16 * 16  # to fit, select and report, and once more through the plan's own levels
    used = plan.meta["evaluations"]
    assert used["teacher_samples_times_network"] == teacher
    assert used["samples_times_network"] == model.samples - teacher <= rollouts * n * 16
    assert used["rollouts"] == pytest.approx((model.samples - teacher) / (n * 16))


@pytest.mark.parametrize("after", [pytest.param(5500, marks=pytest.mark.heavy), 9000])
def test_interruption_keeps_the_best_and_resumes_to_the_same_plan(after: int, tmp_path) -> None:
    teacher = 2 * 24 * 32
    path = tmp_path / "ledger.json"
    cut = calibrate(Counting(MIXTURE, teacher + after - 3000), 4, seed=3, resume=path, **SMALL)
    assert cut.meta["interrupted"]
    assert cut.meta["report"] is None
    assert cut.nfe == 4
    assert sample(MIXTURE, cut, noise=noises(3, 6)).isfinite().all()
    model = Counting(MIXTURE)
    rest = calibrate(model, 4, seed=3, resume=path, **SMALL)
    whole = Counting(MIXTURE)
    assert rest == calibrate(whole, 4, seed=3, **SMALL) == small()
    assert rest.meta["evaluations"] == small().meta["evaluations"]
    assert rest.meta["report"] == small().meta["report"]
    assert model.samples < whole.samples
    earlier = json.loads(path.read_text())  # the same file as version 0.1 wrote it
    earlier["format"], earlier["settings"]["batch"] = 3, earlier["settings"].pop("n")
    path.write_text(json.dumps(earlier))
    again = Counting(MIXTURE)
    assert calibrate(again, 4, seed=3, resume=path, **SMALL) == small()
    assert again.samples == 3 * 24 * 32  # the teacher's
    with pytest.raises(LogsnrError, match=r"another calibration \(different: seed"):
        calibrate(model, 4, seed=5, resume=path, **SMALL)
    path.write_text("{}")
    with pytest.raises(LogsnrError, match="cannot be read as the file of a calibration"):
        calibrate(MIXTURE, 4, seed=3, resume=path, **SMALL)
    with pytest.raises(LogsnrError, match=r"cannot be written to \(it is a file\): give a place"):
        calibrate(Counting(MIXTURE, 0), 4, seed=3, resume=path / "ledger.json", **SMALL)  # before the model is asked
    with pytest.raises(KeyboardInterrupt):  # nothing measured: nothing to return
        calibrate(Counting(MIXTURE, 100), 4, **SMALL)


def test_an_alternative_that_wins_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.METHODS, "search", lambda own, cache: None)
    plan = calibrate(MIXTURE, 4, seed=3, **SMALL)
    assert plan.meta["found"]["from"] == "alternative"
    assert plan.meta["solver"] == plan.meta["selection"]["best_alternative"]
    assert plan == alternatives(MIXTURE, 4, *MIXTURE.sampling_range)[plan.meta["solver"]]
    assert plan.meta["report"]["rmse"] == plan.meta["report"]["alternatives"][plan.meta["solver"]]


class Classes(Denoiser):
    """Two Gaussians, chosen by a label; 2 is their mixture."""

    def __init__(self) -> None:
        super().__init__()
        covs = torch.diag(torch.tensor([0.3, 0.05])).expand(2, 2, 2)
        means = torch.tensor([[1.0, 0.5], [-1.0, 0.0]])
        self.whole = exact.GaussianMixture([0.5, 0.5], means, covs)
        self.parts = torch.nn.ModuleList(exact.Gaussian(m, c) for m, c in zip(means, covs, strict=True))
        self.shape, self.sigma_data, self.trained_range = (2,), 1.0, (0.004, 160.0)

    def forward(self, z: Tensor, sigma: float | Tensor, *, label: Tensor) -> Estimate:
        x0 = torch.stack([self.parts[0](z, sigma).x0, self.parts[1](z, sigma).x0, self.whole(z, sigma).x0])
        x0 = x0[label, torch.arange(len(z))]
        alpha, s = alpha_s(sigma)
        return Estimate(x0, (z - alpha * x0) / s)


def test_conditions_guidance_and_counting() -> None:
    guided = guidance.cfg(Classes(), 2.0, {"label": torch.tensor([2])})
    plan = calibrate(guided, 3, cond={"label": torch.tensor([0, 1])}, **SMALL)
    report = plan.meta["report"]
    assert report["rmse"] < 0.8 * min(report["alternatives"].values())
    assert plan.meta["evaluations"]["samples_times_network"] == 2 * round(plan.meta["evaluations"]["rollouts"] * 3 * 24)
    turns = in_turn({"label": torch.tensor([5, 6, 7]), "size": 8}, torch.arange(4, 8))
    assert turns["label"].tolist() == [6, 7, 5, 6]
    assert turns["size"] == 8
    with pytest.raises(LogsnrError, match=r"label: 2, other: 3.*one row per sample"):
        calibrate(guided, 3, cond={"label": torch.tensor([0, 1]), "other": torch.zeros(3)}, **SMALL)
    moved = guidance.cfgpp(Classes(), 0.5, {"label": torch.tensor([2])})
    with pytest.raises(ValueError, match=r"CFG\+\+"):
        calibrate(moved, 3, cond={"label": torch.tensor([0, 1])}, **SMALL)


def first_coordinate(x: Tensor) -> Tensor:
    return x[:, :1]


def test_errors_count_in_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that sees one coordinate: its error is what is reported, and what is made small."""
    drawn = []
    draw = trial.draw
    monkeypatch.setattr(trial, "draw", lambda own, purpose: drawn.append(draw(own, purpose)) or drawn[-1])
    plan = calibrate(MIXTURE, 4, seed=1, n=96, rollouts=120, metric=first_coordinate)
    lo, hi = MIXTURE.sampling_range
    report = taught(MIXTURE, teacher_plan(64, lo, hi), *drawn[2], chunk=64, metric=first_coordinate)
    x = sample(MIXTURE, plan, noise=report.noise)
    assert plan.meta["report"]["rmse"] == pytest.approx(rmse(x[:, :1], report.end), rel=1e-4)
    assert plan.meta["metric"] == "first_coordinate"
    # on 512 other noises: half the coordinate's error of any built-in, and the whole state given away for it
    seen = replace(fresh(), end=first_coordinate(fresh().end))
    others = alternatives(MIXTURE, 4, lo, hi)
    of_coordinate = partial(mean_square, MIXTURE, noises=seen, chunk=512, metric=first_coordinate)
    assert of_coordinate(plan) < 0.25 * min(of_coordinate(others[name]) for name in plan.meta["report"]["alternatives"])
    whole = partial(mean_square, MIXTURE, noises=fresh(), chunk=512, metric=None)
    assert whole(plan) > whole(calibrated(4))


def test_options_are_kept() -> None:
    plan = calibrate(MIXTURE, 4, history=1, basis="velocity", sigma_range=(0.05, 20.0), **SMALL)
    assert plan.basis == "velocity"
    assert max(map(len, plan.rows)) == 2
    assert 0.05 <= plan.sigmas[-2] < plan.sigmas[0] <= 20.0


def test_tuned_ends_beat_the_nominal_ones() -> None:
    lo, hi = MIXTURE.sampling_range

    def error(plan: Plan) -> float:
        return mean_square(MIXTURE, plan, fresh(), 512, None)

    value, plan = tuned_ends(solvers.ge, grids.log_linear, 5, lo, hi, error)
    assert value == error(plan) <= error(solvers.ge(grids.log_linear(5, hi, lo)))
    with pytest.raises(LogsnrError, match="points = 1"):
        tuned_ends(solvers.ge, grids.log_linear, 5, lo, hi, error, points=1)


@pytest.mark.parametrize("method", ["gits", "ays", "ends"])
def test_baselines_run_on_the_noises_of_the_search(method: str) -> None:
    """The plan is the method's own, whether or not it is the best; its report is on the search's report noise."""
    plan = calibrate(MIXTURE, 4, seed=3, method=method, **SMALL)
    assert plan.meta["report"]["alternatives"] == small().meta["report"]["alternatives"]
    levels = teacher_plan(SMALL["teacher"], *MIXTURE.sampling_range).sigmas
    expected = {"gits": "iPNDM-4, GITS", "ays": "DPM++(2M), AYS", "ends": "tuned ends"}
    assert plan.meta["solver"].endswith(expected[method])
    if method == "gits":
        assert set(plan.sigmas) <= set(levels)
        assert plan == solvers.ipndm(plan.sigmas, 4)
    if method == "ays":
        assert set(plan.sigmas[:-1]) <= set(levels)
        assert plan == solvers.dpmpp(plan.sigmas)
    if method == "ends":
        selection = plan.meta["selection"]
        assert selection["rmse"] < selection["best_alternative_rmse"]


def test_progress_goes_from_the_teacher_to_the_end() -> None:
    _, _, seen = observed()
    assert seen[0].stage == "teacher"
    assert seen[-1].stage == "done"
    assert all(a.spent <= b.spent <= 1 and a.error >= b.error for a, b in pairwise(seen))


class Broken(Counting):
    def forward(self, z: Tensor, sigma: float | Tensor, **cond: object) -> Estimate:
        x0 = torch.full_like(z, math.nan)
        return Estimate(x0, x0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, r"nfe = 0: must be an integer in \[1, 20\]"),
        ({"nfe": 21}, "built-in solver"),
        ({"nfe": 4, "history": 4}, "history = 4: must be 0, 1, 2, 3 or 'auto'"),
        ({"nfe": 4, "basis": "score"}, "basis 'score' is not one of"),
        ({"nfe": 4, "n": 3}, r"n = 3: must be in \[4"),
        ({"nfe": 4, "n": 4, "rollouts": 40}, "n = 4 with rollouts = 40: .* give rollouts = 55, or n = 6"),
        ({"nfe": 4, "method": "lhs"}, "method 'lhs' is not one of search, gits, ays, ends"),
        ({"nfe": 4, "rollouts": 201}, r"rollouts = 201: must be in \[40, 200\]"),
        ({"nfe": 10, "teacher": 18}, r"teacher = 18: must be in \[20"),
        ({"nfe": 4, "sigma_range": (0.0, 10.0)}, "0 < smallest < largest < inf"),
        ({"nfe": 4, "sigma_range": (0.001, 10.0)}, r"leaves \[0.004, 160\]"),
        ({"nfe": 4, "sigma_range": (0.01, 200.0)}, "denoiser was trained"),
        ({"nfe": 10, "sigma_range": (0.1, 2.0)}, "too narrow for 10 steps"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(LogsnrError, match=message) as caught:
        calibrate(Classes(), options.pop("nfe"), **options)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    with pytest.raises(LogsnrError, match="teacher's trajectory has values that are not finite"):
        calibrate(Broken(MIXTURE), 4, **SMALL)


def test_the_fingerprint_is_of_the_weights() -> None:
    one, two, other = mixture(), mixture(), mixture(seed=1)
    assert fingerprint(one) == fingerprint(two) != fingerprint(other)


# What no plan could bring


def shares(denoiser, nfe: int) -> list[float]:
    report = calibrate(denoiser, nfe, n=16, effort="quick").meta["report"]
    assert len(report["outside"]) == nfe
    assert all(0 <= share <= 1 for share in report["outside"])
    return report["outside"]


def test_as_many_estimates_as_dimensions_reach_everything() -> None:
    two = mixture(d=2, k=3)
    assert max(shares(two, 4)[1:]) < 1e-6  # from the second step on
    assert min(shares(mixture(), 4)) > 1e-3  # of six dimensions four reach not all


def test_of_isotropic_data_one_estimate_reaches_everything() -> None:
    """State and estimates all point the same way."""
    assert max(shares(exact.Gaussian(torch.zeros(5), 0.25 * torch.eye(5)), 3)) < 1e-4


def test_a_grid_through_levels_keeps_its_length_and_order() -> None:
    grid = grids.log_linear(64, 80.0, 0.002)
    levels = (80.0, 11.0, 2.2, 0.3, 0.04, 0.0)
    moved = through(grid, levels)
    assert set(levels) <= set(moved)
    assert len(moved) == len(grid)
    assert all(a > b for a, b in pairwise(moved))
