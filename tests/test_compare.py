"""Comparisons: diffusers' schedulers end where our plans of the same method do, and every evaluation is counted."""

import dataclasses
import json
import math
import re
import statistics

import pytest
import torch

import logsnr as ls
from logsnr import guidance
from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation import FeatureSpace, frechet_distance
from logsnr.evaluation.compare import (
    Comparison,
    compare,
    markdown,
    measure,
    ours,
    own,
    peers,
    plans,
    table,
    uncalibrated,
    write,
)
from logsnr.evaluation.compare.entries import OWN, check_words, kept, largest, read_plans
from logsnr.evaluation.compare.plot import plot
from logsnr.evaluation.compare.render import read, write_rows
from logsnr.evaluation.compare.schedulers import SCHEDULERS
from logsnr.evaluation.metrics import Estimated
from logsnr.exact import GaussianMixture
from logsnr.noise import alpha_s
from logsnr.predictions import EDM, V
from logsnr.sampling import grids, sample, solve, solvers
from logsnr.sampling.batches import take
from logsnr.sampling.counted import rmse
from logsnr.sampling.default import default_plan
from logsnr.sampling.names import find_solver
from logsnr.sampling.table import table_of
from logsnr.sampling.universal import universal_plan
from logsnr.theory import grid_between
from logsnr.timesteps import TimestepTable

pytest.importorskip("diffusers")
BUDGETS = (1, 2, 5, 8, 14)


class Calls(Denoiser):
    """An exact mixture that counts how many states it is asked about."""

    finite_at_inf = True

    def __init__(self, trained_range=(0.01, 50.0)):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        factors = torch.randn(4, 3, 3, generator=g) * 0.3
        covs = factors @ factors.mT + 0.05 * torch.eye(3)
        self.inner = GaussianMixture(torch.full((4,), 0.25), torch.randn(4, 3, generator=g), covs)
        self.shape, self.sigma_data, self.trained_range = self.inner.shape, self.inner.sigma_data, trained_range
        self.asked = 0

    def forward(self, z, sigma, *, shift=None):
        self.asked += len(z)
        return self.inner(z, sigma)


SPACE = FeatureSpace(name="x", of=lambda v: v, reference=torch.eye(3))
POINT = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


class Point(Denoiser):
    """Knows the one point there is."""

    shape, sigma_data, trained_range = (3,), 1.0, (1e-3, 50.0)

    def forward(self, z, sigma):
        alpha, s = alpha_s(sigma)
        return Estimate(POINT.expand_as(z), (z - alpha * POINT) / s)


@pytest.fixture(scope="module")
def model():
    return Calls()


@pytest.fixture(scope="module")
def entries(model):
    """Everything at several budgets: schedulers are slow to make."""
    return [*ours(model, BUDGETS), *peers(model, BUDGETS)]


@pytest.fixture(scope="module")
def noise():
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compared(model):
    x = model.inner.sample(400, generator=torch.Generator().manual_seed(2))
    space = FeatureSpace(name="x", of=lambda v: v, reference=x)
    plan = solvers.ddim(grids.log_linear(4, 20.0, 0.02))
    noisy = solvers.ddpm(grids.log_linear(4, 20.0, 0.02))
    return compare(
        model, [4, 7], found={"mine": plan, "noisy": noisy}, n=64, features=space,
        teacher_steps=60, about={"model": "mixture"},
    )  # fmt: skip


def run(entry, model, noise, cond=None):
    return entry.run(model, noise.clone(), cond or {}, torch.Generator().manual_seed(0))


def one(entries, solver, grid):
    (found,) = [entry for entry in entries if (entry.solver, entry.grid) == (solver, grid)]
    return found


# Peers


@pytest.mark.parametrize("budget", [5, 8])
@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        ("DDIM, trailing", "DDIM, timesteps"),
        ("Euler, trailing", "DDIM, timesteps"),
        ("Euler, karras", "DDIM, karras"),
        ("Euler, lu_lambdas", "DDIM, log-linear"),
        ("FlowMatchEuler, flow", "DDIM, flow"),
        ("Heun, trailing", "Heun, timesteps"),
        ("Heun, karras", "Heun, karras"),
        ("Heun, lu_lambdas", "Heun, log-linear"),
        ("DPM++(2M), trailing", "DPM++(2M), timesteps"),
        ("DPM++(2M), karras", "DPM++(2M), karras"),
        ("DPM++(2M), lu_lambdas", "DPM++(2M), log-linear"),
        ("UniPC-2, trailing", "UniPC-2, timesteps"),
        ("UniPC-2, karras", "UniPC-2, karras"),
        ("UniPC-3, lu_lambdas", "UniPC-3 ramp, log-linear"),
    ],
)
def test_their_scheduler_ends_where_our_plan_of_the_same_method_and_levels_does(
    model, noise, entries, theirs, same, budget
):
    def ends(origin, name):
        here = [entry for entry in entries if (entry.origin, entry.budget) == (origin, budget)]
        return run(one(here, *name.split(", ")), model, noise)

    x = ends("logsnr", same)
    assert rmse(ends("diffusers", theirs), x) <= 1e-4 * float(x.square().mean().sqrt())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["DPM++(2M)", "UniPC-2", "UniPC-3"])
def test_even_times_of_a_flow_are_a_grid_of_ours(model, noise, entries, name, shift):
    """n + 1 even times, shifted (sigma to shift sigma), of which the last gives way to 0."""
    entry = one(
        [e for e in entries if (e.origin, e.budget) == ("diffusers", 8)], name, f"flow{' shift 3' * (shift > 1)}"
    )
    low, high = model.sampling_range
    levels = grids.flow_range(8, high, low, last="min", shift=shift)
    ours = find_solver({"UniPC-3": "UniPC-3 ramp"}.get(name, name))[1]
    x = sample(model, ours([*levels[:-1], 0.0]), noise=noise)
    assert rmse(run(entry, model, noise), x) <= 1e-4 * float(x.square().mean().sqrt())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_their_timesteps_are_those_of_our_grids(model, noise, entries, spacing):
    entry = one([e for e in entries if (e.origin, e.budget) == ("diffusers", 5)], "Euler", spacing)
    levels = grids.timesteps(5, table_of(model), spacing)
    x = sample(model, solvers.ddim(levels), noise=noise)
    assert rmse(run(entry, model, noise), x) <= 3e-4 * float(x.square().mean().sqrt())


def test_on_a_models_own_table_it_is_the_scheduler_of_its_pipeline(noise):
    """Stable Diffusion's levels: DDIM at its trailing timesteps, in diffusers' float32 arithmetic."""
    import diffusers

    class Network(torch.nn.Module):
        def forward(self, z, t):
            return torch.tanh(0.5 * z + 0.1 * torch.sin(t / 100)[:, None])

    sd = TimestepTable.stable_diffusion()
    model = NetworkDenoiser(Network(), V(label="stable-diffusion"), shape=(3,), trained_range=sd.sigma_range)
    assert torch.equal(table_of(model).alphas_cumprod, sd.alphas_cumprod)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(5)
    x = noise.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(model.network(x, t.float().expand(len(x))), t, x).prev_sample
    assert rmse(run(one(peers(model, [5]), "DDIM", "trailing"), model, noise), x) <= 1e-5 * float(x.std())


@pytest.mark.parametrize(
    ("solver", "grid", "whole"),
    [
        ("PNDM", "trailing", False),
        ("DDIM", "trailing", True),
        ("DPM-Solver(2M)", "trailing", False),
        ("DPM-Solver(3M)", "karras", False),
        ("DPM-Solver(3S)", "linspace", False),
    ],
)
def test_a_run_of_theirs_ends_at_the_smallest_level_or_at_the_data_as_its_options_say(solver, grid, whole):
    """The point c is reached along a straight line: z = alpha c + s eps, with one eps at every level, the last too."""
    model = Point()
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    entry = one(peers(model, [8], solvers=[solver], grids=[grid]), solver, grid)
    low, high = model.sampling_range
    last = 0.0 if whole else low
    eps = (noise * math.hypot(1, high) - POINT) / high
    expected = (POINT + last * eps) / math.hypot(1, last)
    torch.testing.assert_close(run(entry, model, noise), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("solver", "ratio"), [("DPM-Solver(2M)", 0.35), ("DPM-Solver(3S)", 0.25)])
def test_dpm_solver_in_noise_converges_to_the_exact_trajectory_at_the_smallest_level(model, noise, solver, ratio):
    """Twice the evaluations: less than a third of the error of order 2, a quarter of that of order 3."""
    low, high = model.sampling_range
    z = noise[:16].double()
    exact = solve(model, high, low, z, rtol=1e-7, atol=1e-7).z
    entries = peers(model, [12, 24, 48], solvers=[solver], grids=["lu"])
    first, second, third = (rmse(run(entry, model, z), exact) for entry in entries)
    assert second < ratio * first
    assert third < ratio * second


def test_their_levels_span_the_models_range_to_the_last_digit():
    """Betas in float32 would lose three digits of the smallest level."""

    class Listening(Calls):
        def forward(self, z, sigma):
            levels.append(sigma)
            return super().forward(z, sigma)

    model = Listening((0.002, 50.0))
    for entry in peers(model, [5], grids=["karras", "lu_lambdas"]):
        levels: list[float] = []
        run(entry, model, torch.zeros(1, 3))
        assert (levels[-1], levels[0]) == pytest.approx(model.sampling_range, rel=1e-5), entry.name


def test_an_entry_runs_alike_alone_and_after_others(model, noise, entries):
    """Schedulers are shared by budgets and keep state: every run sets them anew."""
    theirs = [entry for entry in entries if entry.origin == "diffusers" and entry.budget == 14]
    first = [run(entry, model, noise[:4]) for entry in theirs]
    for entry, x in reversed(list(zip(theirs, first, strict=True))):
        assert torch.equal(run(entry, model, noise[:4]), x), entry.name


# Counting


def spent(entry, denoiser, counter, noise, cond=None):
    counter.asked = 0
    run(entry, denoiser, noise, cond)
    return counter.asked / len(noise)


@pytest.mark.parametrize("budget", [1, 5, *(pytest.param(n, marks=pytest.mark.heavy) for n in (2, 8, 14))])
def test_counted_evaluations_are_those_made_and_fit(model, noise, entries, budget):
    here = [entry for entry in entries if entry.budget == budget]
    for entry in here:
        assert spent(entry, model, model, noise[:2]) == entry.evaluations <= budget, entry.name
    # Heun's n steps take 2n - 1, PNDM's n + 1 (of one step 1), after Runge-Kutta n + 9; all others n
    odd, even = budget - 1 + budget % 2, budget - budget % 2
    for entry in here:
        # no last step to 0 saves Heun nothing: 2n
        fewer = {"Heun": even if "min" in entry.grid else odd, "PNDM": 1 if budget < 3 else budget}
        assert entry.evaluations == fewer.get(entry.solver, budget), entry.name
    absent = {"PNDM (Runge-Kutta start)"} if budget < 13 else set()
    assert set(SCHEDULERS) - {entry.solver for entry in here if entry.origin == "diffusers"} == absent


def test_guidance_is_counted_where_it_acts(model, noise):
    """Within (.5, 5] an answer costs two: the steps that fit depend on where the grid's levels lie."""
    guided = guidance.cfg(model, 2.0, {"shift": 0.0}, interval=(0.5, 5.0))
    cond = {"shift": torch.ones(2)}
    both = [*ours(guided, [7]), *peers(guided, [7])]
    for entry in both:
        assert spent(entry, guided, model, noise[:2], cond) == entry.evaluations <= 7, entry.name
    everywhere = guidance.cfg(model, 2.0, {"shift": 0.0})
    assert {e.evaluations for e in ours(everywhere, [7], solvers=["ddim"])} == {6}
    assert one(ours(everywhere, [7]), "Heun", "karras").evaluations == 6  # two steps: three answers


def test_largest_takes_the_most_steps_that_fit(model):
    made = []

    def make(n):
        made.append(n)
        plan = solvers.ddim(grids.log_linear(n, 20.0, 0.02))
        return None if n == 6 else next(e for e in plans(model, {"p": plan}))

    entry = largest(6, make)
    assert entry.evaluations == 5
    assert made == [6, 5]
    assert largest(0, make) is None


# What is measured


def test_rows_hold_the_definitions(model, compared):
    """RMSE, its error by the delta method, FD and KID of a row from the entry run by hand."""
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    row = next(r for r in compared.rows if r.name == "GE(2), karras" and r.budget == 7)
    low, high = model.sampling_range
    x = ls.sample(model, solvers.ge(grids.karras(7, high, low), 2.0), noise=noise)
    end = ls.sample(model, solvers.unipc(grids.log_linear(60, high, low), 3), noise=noise)
    squares = (x - end).double().square().mean(1)
    assert row.rmse.value == pytest.approx(float(squares.mean().sqrt()), rel=1e-5)
    assert row.rmse.stderr == pytest.approx(float(squares.std() / 8 / (2 * squares.mean().sqrt())), rel=1e-5)
    reference = model.inner.sample(400, generator=torch.Generator().manual_seed(2))
    assert row.frechet.value == pytest.approx(frechet_distance(x, reference), rel=1e-5)
    assert (row.evaluations, compared.teacher.evaluations) == (7, 60)


def test_the_teacher_is_the_exact_trajectory_within_its_uncertainty(model, compared):
    low, high = model.sampling_range
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).double()
    end = ls.sample(model, solvers.unipc(grids.log_linear(60, high, low), 3), noise=noise)
    # to the smallest level exactly, then the plain denoise
    z = solve(model, high, low, noise, rtol=1e-7, atol=1e-7).z
    exact = model(z, low).x0
    assert rmse(end, exact) < compared.teacher.uncertainty < 0.01


def test_errors_fall_with_evaluations_towards_the_teacher(model):
    """Twice the evaluations: less than .7 of DDIM's error (order 1), and of second-order methods' less than .5."""
    result = measure(
        model,
        ours(model, [10, 20, 40], solvers=["ddim", "dpm++(2m)", "ge(1.5)"], grids=["log-linear"])
        + peers(model, [10, 20, 40], solvers=["euler", "unipc-2"], grids=["lu"]),
        n=64,
        teacher_steps=160,
    )
    errors = {}
    for row in result.rows:
        errors.setdefault((row.solver, row.grid), []).append(row.rmse.value)
    for (solver, grid), (first, second, third) in errors.items():
        bound = 0.7 if solver in ("DDIM", "Euler") else 0.5
        assert second < bound * first, (solver, grid)
        assert third < bound * second, (solver, grid)


def test_measuring_does_not_depend_on_batches_or_on_what_else_takes_part(model, compared):
    again = measure(model, [*peers(model, [7], grids=["karras"])][::-1], n=64, chunk=23, teacher_steps=60)
    for row in again.rows:
        before = next(r for r in compared.rows if (r.name, r.budget) == (row.name, 7))
        assert row.rmse.value == pytest.approx(before.rmse.value, rel=1e-4), row.name


def test_conditions_follow_their_samples_into_batches(noise):
    """A model shifted by its condition: each sample ends as it does alone."""

    class Shifted(Calls):
        def forward(self, z, sigma, *, shift):
            alpha, _ = ls.noise.alpha_s(sigma)
            inner = self.inner(z - alpha * shift[:, None], sigma)
            return ls.Estimate(inner.x0 + shift[:, None], inner.eps)

    model, cond = Shifted(), {"shift": torch.tensor([0.0, 3.0, -1.0])}
    seen = []

    def of(x):
        seen.append(x)
        return x

    space = FeatureSpace(name="x", of=of, reference=noise)
    entry = peers(model, [5], solvers=["unipc-2"], grids=["karras"])[0]
    measure(model, [entry], n=7, chunk=2, cond=cond, teacher_steps=16, features=space)
    x = torch.cat(seen[-4:])
    start = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    full = {"shift": cond["shift"][torch.arange(7) % 3]}
    for i in (0, 1, 5):
        alone = run(entry, model, start[i : i + 1], take(full, slice(i, i + 1)))
        assert torch.allclose(x[i : i + 1], alone, atol=1e-5)


def test_a_sampler_that_breaks_is_said_to_and_the_rest_goes_on(model):
    entry = ours(model, [4], solvers=["ddim"], grids=["karras"])[0]
    broken = dataclasses.replace(entry, solver="broken", run=lambda *_: torch.full((8, 3), math.nan))
    result = measure(model, [broken, entry], n=8, teacher_steps=16)
    assert [(r.finite, r.rmse is None) for r in result.at(4)] == [(True, False), (False, True)]
    assert "| broken, karras | 0 of 4 | not finite |" in markdown(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_teacher_that_breaks_is_an_error():
    class Broken(Calls):
        def forward(self, z, sigma):
            inner = self.inner(z, sigma)
            return inner if sigma > 1 else ls.Estimate(inner.x0 * math.nan, inner.eps * math.nan)

    with pytest.raises(LogsnrError, match=r"teacher's trajectory has values that are not finite.*float32"):
        measure(Broken(), ours(Broken(), [4], solvers=["ddim"]), n=4, teacher_steps=16)


# Plans, tables and names


def test_plans_take_part_at_the_evaluations_they_count(model, compared):
    mine, noisy = (next(r for r in compared.rows if r.solver == name) for name in ("mine", "noisy"))
    assert mine.evaluations == mine.budget == 4
    assert mine.plan_hash == solvers.ddim(grids.log_linear(4, 20.0, 0.02)).hash
    assert noisy.rmse is None
    assert noisy.frechet is not None
    guided = guidance.cfg(model, 2.0, {"shift": 0.0})
    assert [e.budget for e in plans(guided, {"p": solvers.ddim(grids.log_linear(4, 20.0, 0.02))})] == [8]


def test_plans_of_another_range_are_refused(model):
    with pytest.raises(LogsnrError, match=r"visits sigma 80 .* trained on 50 \.\.\. 0\.01: give a plan made for it"):
        plans(model, {"far": solvers.ddim([80.0, 1.0, 0.0])})


def test_plans_that_coincide_take_part_once(model):
    """Of one step every deterministic solver is the plain denoise from the largest level."""
    high = model.sampling_range[1]
    entries = [e for e in ours(model, [1], grids=["log", "karras", "flow"]) if e.plan is not None]
    assert [e.name for e in entries] == ["DDIM, log-linear", "DDIM, log-linear, min"]
    assert [e.plan.sigmas for e in entries] == [(high, 0.0), (high, model.sampling_range[0])]


ETA = [(0.05, 0.6), (1.0, 0.3), (5.0, 0.1), (40.0, 0.01)]


def test_with_a_measured_eta_the_admissible_grid_takes_part_like_any_other(model, noise):
    """Its levels are the theory's for the curve; every solver runs on it, at evaluations that are counted and fit."""
    low, high = model.sampling_range
    before, entries = ours(model, [5, 8]), ours(model, [5, 8], eta=ETA)
    added = [entry for entry in entries if entry.grid == "admissible"]
    assert [e.name for e in entries if e.grid != "admissible"] == [e.name for e in before]
    assert {(e.solver, e.budget) for e in added} == {(e.solver, e.budget) for e in before if e.grid == "karras"}
    for entry in added:
        assert spent(entry, model, model, noise[:2]) == entry.evaluations <= entry.budget, entry.name
        if entry.plan is not None:
            levels, _ = grid_between(ETA, entry.evaluations - 1, sigma_max=high, sigma_min=low)
            assert entry.plan.sigmas == (*levels, 0.0), entry.name
    (heun,) = [e for e in added if (e.solver, e.budget) == ("Heun", 5)]
    by_hand = ls.sampling.heun(model, grids.admissible(3, ETA, high, low), noise=noise)
    assert torch.equal(run(heun, model, noise), by_hand)
    guided = guidance.cfg(model, 2.0, {"shift": 0.0}, interval=(0.5, 5.0))
    for entry in ours(guided, [7], grids=["admissible"], eta=ETA):
        assert spent(entry, guided, model, noise[:2], {"shift": torch.ones(2)}) == entry.evaluations <= 7, entry.name


def test_without_an_eta_it_is_absent_unless_it_is_asked_for(model):
    for nothing in (None, (), []):
        assert "admissible" not in {entry.grid for entry in ours(model, [5], eta=nothing)}
        with pytest.raises(LogsnrError, match=r"grid 'Adm' needs .*logsnr passport MODEL --data"):
            ours(model, [5], grids=["karras", "Adm"], eta=nothing)
    two = ours(model, [2], grids=["log", "admissible"], eta=ETA)  # of two evaluations it is the same grid
    assert {entry.grid for entry in two if entry.plan is not None} == {"log-linear", "log-linear, min"}
    constant = ours(model, [5], solvers=["ddim"], grids=["admissible"], eta=0.2)[0]
    assert constant.plan.sigmas == pytest.approx(grids.log_linear(5, *model.sampling_range[::-1]), rel=1e-6)


def test_compare_hands_the_eta_on(model):
    result = compare(model, [4], eta=ETA, with_peers=False, n=8, teacher_steps=16)
    row = next(r for r in result.rows if r.name == "GE(2), admissible")
    low, high = model.sampling_range
    assert row.plan_hash == solvers.ge(grids.admissible(4, ETA, high, low), 2.0).hash


def test_universal_plans_take_part_once_each(model):
    """Each at the budget that holds it; beyond the largest plan there is none."""
    low, high = model.sampling_range

    def stored(n):
        try:
            return universal_plan(n, low, high, sigma_data=model.sigma_data).hash
        except LogsnrError:
            return None

    sizes = [n for n in range(1, 60) if stored(n)]
    expected = dict.fromkeys(stored(n) for n in (sizes[0], sizes[1], sizes[-1]))
    guided = guidance.cfg(model, 2.0, {"shift": 0.0})
    for denoiser, budgets in (
        (model, [sizes[0], sizes[1], 200, 300]),
        (guided, [2 * sizes[0], 2 * sizes[1] + 1, 400]),
    ):
        found = uncalibrated(denoiser, budgets)
        entries = [entry for entry in found if entry.solver == "universal"]
        assert [entry.plan.hash for entry in entries] == list(expected)
        others = [entry for entry in found if entry.solver == "default"]
        assert [e.plan for e in others] == [
            default_plan(budget // int(denoiser.cost(1.0)), low, high, sigma_data=model.sigma_data)
            for budget in budgets
        ]
        assert [e.evaluations for e in entries[:2]] == [n * denoiser.cost(1.0) for n in sizes[:2]]


def test_read_plans(tmp_path):
    plan = solvers.ddim([4.0, 1.0, 0.0])
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a.json", tmp_path / "b" / "a.json"):
        plan.save(path)
    found = read_plans([tmp_path / "a.json", tmp_path / "b" / "a.json"])
    assert list(found) == ["a", "b/a"]
    assert all(p.hash == plan.hash for p in found.values())
    several = {"2": plan.to_dict(), "1": solvers.ddim([4.0, 0.0]).to_dict()}
    (tmp_path / "set.json").write_text(json.dumps(several))
    assert {name: p.nfe for name, p in read_plans([tmp_path / "set.json"]).items()} == {"set, 2": 2, "set, 1": 1}
    with pytest.raises(LogsnrError, match="cannot be read"):
        read_plans([tmp_path / "missing.json"])


def test_table_of_a_model_without_one_is_vp_between_the_ends_of_its_range(model):
    """-ln abar = b0 t + (b1 - b0) t^2/2 has constant second differences at even t."""
    low, high = model.sampling_range
    table = table_of(guidance.cfg(model, 2.0, {}))
    assert table.sigma_range == pytest.approx((low, high), rel=1e-9)
    second = (-table.alphas_cumprod.log()).diff().diff()
    assert float((second / second.mean() - 1).abs().max()) < 1e-4
    edm = NetworkDenoiser(torch.nn.Identity(), EDM(sigma_data=1.0), shape=(3,), trained_range=(0.002, 200.0))
    assert table_of(edm).sigma_range == pytest.approx((0.004, 160.0), rel=1e-9)


def test_a_models_table_is_cut_to_what_it_was_trained_on():
    narrow = NetworkDenoiser(torch.nn.Identity(), V(label="ddpm"), shape=(3,), trained_range=(0.05, 20.0))
    low, high = table_of(guidance.cfg(narrow, 2.0, {})).sigma_range
    whole = TimestepTable.ddpm().sigmas.tolist()
    assert low in whole
    assert high in whole
    assert 0.0495 <= low < 0.0505
    assert 19.8 < high <= 20.2


def test_words_choose_solvers_and_grids(model):
    names = {(e.solver, e.grid) for e in ours(model, [5], solvers=["DPM", "heun"], grids=["kar"])}
    four = ("DPM++(2M)", "DPM++(3M)", "DPM++(3M) ramp", "Heun")
    assert names == {(s, grid) for s in four for grid in ("karras", "karras, min")}
    assert {e.grid for e in ours(model, [5], grids=["karrasmin"])} == {"karras, min"}
    assert kept(["DPM++(2M)", "PNDM (Runge-Kutta start)", "GE(1.5)"], ["dpmpp2m", "ge"]) == ["DPM++(2M)", "GE(1.5)"]
    for word in ("dpmm++", "+"):
        with pytest.raises(LogsnrError, match=r"solver '.*' is not one of DDIM, DPM\+\+\(2M\)"):
            check_words("solver", [word], ["DDIM", "DPM++(2M)"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "n = 1: must be at least 2"),
        ({"n": 2, "features": SPACE}, "n = 2: must be at least 3"),
        ({"chunk": 0}, "chunk = 0: must be at least 1"),
        ({"teacher_steps": 20}, "teacher_steps = 20: must be at least 24, twice the 12"),
    ],
)
def test_measure_refuses(model, change, message):
    with pytest.raises(LogsnrError, match=re.escape(message)):
        measure(model, ours(model, [12], solvers=["ddim"]), **change)


def test_nothing_to_compare_is_an_error(model):
    with pytest.raises(LogsnrError, match="nothing to compare"):
        measure(model, [])


# Rendering


def test_markdown_holds_every_row_best_first(compared):
    page = markdown(compared)
    for budget in (4, 7):
        rows = compared.at(budget)
        section = page.split(f"### {budget} evaluations: {len(rows)} samplers")[1].split("###")[0]
        names = [line.split(" | ")[0][2:] for line in section.splitlines() if line.startswith("| ")]
        assert names[2:-1] == [row.name for row in rows]
        errors = [row.error for row in rows]
        assert errors == sorted(errors)
    assert "FD and KID (features: x) to 400 images" in page


def test_best_of_a_family_is_its_least_error(compared):
    for budget in compared.budgets:
        for (family, origin), row in compared.best(budget).items():
            others = [r.error for r in compared.at(budget) if (r.family, r.origin) == (family, origin)]
            assert row.error == min(others)


def test_the_terminal_shows_each_solver_once_and_all_when_asked(compared):
    few, many = table(compared), table(compared, everything=True)
    solvers_of = {(r.budget, r.origin, r.solver) for r in compared.rows}
    assert few.row_count == len(solvers_of) + 1
    assert many.row_count == len(compared.rows) + 1


def test_a_comparison_goes_on_where_it_was_stopped(model, tmp_path):
    """Rows that are known are not measured again, and the whole is that of one go but for the clock."""

    def timeless(comparison):
        return [
            dataclasses.replace(
                row, cells=tuple(dataclasses.replace(cell, seconds_per_image=0.0) for cell in row.cells)
            )
            for row in comparison.rows
        ]

    entries = ours(model, [4], solvers=["ge", "ddpm"], grids=["karras", "flow"], noisy=True)
    options = {"n": 8, "teacher_steps": 16, "about": {"model": "mixture"}}
    whole, partly = measure(model, entries, **options), []
    measure(model, entries, **options, so_far=partly.append)
    assert [len(one.rows) for one in partly] == list(range(1, len(entries) + 1))
    write_rows(partly[2], tmp_path)
    before, asked = read(tmp_path), []
    assert before.about["interrupted"] == f"after 3 of {len(entries)} runs"
    on = measure(model, entries, **options, before=before, keep=lambda entry, x: asked.append(entry))
    assert asked == [None, *entries[3:]]
    assert timeless(on) == timeless(whole)
    assert on.about == whole.about
    for changes, words in (({"seed": 1}, "seeds 1"), ({"n": 9}, "images 9"), ({"about": {"model": "b"}}, "model b")):
        with pytest.raises(LogsnrError, match=words):
            measure(model, entries, **{**options, **changes}, before=before)
    other = dataclasses.replace(
        before,
        teacher=dataclasses.replace(
            before.teacher, cells=(dataclasses.replace(before.teacher.cells[0], rmse=Estimated(value=1.0, stderr=0.0)),)
        ),
    )
    with pytest.raises(LogsnrError, match="the model is another"):
        measure(model, entries, **options, before=other)
    with pytest.raises(LogsnrError, match="holds no comparison"):
        read(tmp_path / "nowhere")


def test_plans_that_came_with_a_model_take_part():
    """At the largest that fits a budget, as the model runs them."""
    denoiser = ls.load("zoo:digits")
    entries = own(denoiser, [4, 5, 7])
    assert [(e.solver, e.budget, e.evaluations) for e in entries] == [(OWN, 4, 4), (OWN, 5, 5), (OWN, 7, 6)]
    assert [e.plan for e in entries] == [denoiser.plans[n] for n in (4, 5, 6)]
    guided = ls.guidance.cfg(denoiser, 2.0, {"class_labels": torch.tensor([10])})
    assert [(e.budget, e.evaluations) for e in own(guided, [5, 9])] == [(9, 8)]


def test_solvers_that_draw_noise_take_part_where_distributions_do():
    """Of an exact Gaussian: DDPM in many steps has its moments; it has no RMSE."""
    denoiser = ls.exact.Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.25, 0.04])))
    noisy = [e for e in ours(denoiser, [200], solvers=["DDPM", "Heun"], grids=["karras"], noisy=True) if e.noisy]
    assert {e.solver for e in noisy} == {"DDPM", "Heun, churned"}
    assert not any(e.noisy for e in ours(denoiser, [60]))
    for row in measure(denoiser, noisy, n=4, teacher_steps=400, features=None).rows:
        assert row.rmse is None
    for entry in noisy:
        g = torch.Generator().manual_seed(1)
        x = entry.run(denoiser, torch.randn(5_000, 3, generator=torch.Generator().manual_seed(0)), {}, g)
        assert torch.allclose(x.std(0), torch.tensor([1.0, 0.5, 0.2]), rtol=0.1)


def test_files_hold_what_was_measured(compared, tmp_path):
    files = write(compared, tmp_path / "new" / "folder")
    assert [f.suffix for f in files] == [".json", ".md", ".svg", ".png", ".html"]
    page = files[4].read_text(encoding="utf-8")
    assert all(f"{row.rmse.value:.4f} ± {row.rmse.stderr:.4f}" in page for row in compared.rows if row.rmse)
    assert page.count("<svg ") == page.count('<svg role="img" aria-label=') == 1
    stored = json.loads(files[0].read_text())
    assert Comparison.from_dict(stored) == compared
    for wrong in ({**stored, "version": 3}, {**stored, "rows": [{}]}, {"version": 1}):
        with pytest.raises(LogsnrError, match=r"comparison version 3|are no comparison"):
            Comparison.from_dict(wrong)
    assert files[2].read_bytes() == plot(compared, "svg")
    assert files[3].read_bytes().startswith(b"\x89PNG")
    # lines are named at their ends: plans, and then families, those of least error first
    texts = [re.findall(r">([^<]+)</text>", plot(compared, "svg", lines=n).decode()) for n in (99, 2)]
    every, few = ([text for text in found if text[0].isalpha() and "(" not in text] for found in texts)
    assert {"DPM++ in diffusers", "plan mine", "GE"} <= set(every)
    leaders = [compared.best(budget) for budget in compared.budgets]
    errors = {
        f"{family} in diffusers" if origin == "diffusers" else family: [
            best[family, origin].error for best in leaders if (family, origin) in best
        ]
        for best in leaders
        for family, origin in best
        if origin != "plan"
    }
    assert {"plan mine", min(errors, key=lambda name: statistics.geometric_mean(errors[name]))} <= set(few)
    assert len(set(few)) < len(set(every))
