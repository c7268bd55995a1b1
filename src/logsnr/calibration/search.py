"""Calibration: the best few evaluations of one model, found in minutes, kept as a plan.

    minimise  mean ||x_plan(noise) - x_teacher(noise)||^2     over the sigmas and the rows of n steps

Three noises, drawn from one seed by purpose and never mixed: *fit* (levels and coefficients), *select* (basis,
history, strength of the prior, when to stop, and whether to beat the built-in solvers at all), *report* (drawn after
the plan's hash is on record, used once).  The steps:

    teacher      fine trajectories from the same noise; those of fit are remembered level by level   (teacher.py)
    schedule     levels of least summed local error, by dynamic programming on the cache               (schedule.py)
    rows         each step's coefficients by ridge least squares along the student's own rollout       (rows.py)
    descent      all numbers at once against the end-point error, damped Gauss-Newton                  (descent.py)

No gradient passes through the network; anything that answers as a Denoiser, guided ones too, can be calibrated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from logsnr.calibration.alternatives import alternatives
from logsnr.calibration.descent import Normal, Space, descend, mean_square, normal_equations
from logsnr.calibration.ledger import Ledger, Meter, fingerprint
from logsnr.calibration.rollout import Batch, spread_cond
from logsnr.calibration.rows import fit_rows, prior_rows, targets_at
from logsnr.calibration.schedule import MIN_STEP, best_levels
from logsnr.calibration.teacher import Cache, Metric, remember, teacher_ends, teacher_grid
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.plan import BASES, Basis, Plan
from logsnr.sampling.sample import check_start, start

MOST_STEPS = 20
HISTORIES = (1, 3)
RIDGE = (1e-3, 1e-1)
"""Strengths of the least-squares prior that are tried, relative to the error of the prior's own row."""
DESCENT = (1.0, 30.0)
"""Strengths of the descent's prior that are tried, in units of one sample."""


@dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Attributes:
        stage: "teacher", "alternatives", "rows", "descent", "report" or "done".
        spent: share of the budget that is used, in [0, 1].
        error: smallest RMSE on the selection noise so far (inf before the first).
    """

    stage: str
    spent: float
    error: float


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    nfe: int,
    *,
    history: int | Literal["auto"] = "auto",
    basis: Basis | Literal["auto"] = "auto",
    sigma_range: tuple[float, float] | None = None,
    batch: int = 128,
    generator: torch.Generator | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    teacher: int = 96,
    rollouts: int = 100,
    chunk: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Plan:
    """The plan of `nfe` evaluations whose end points lie nearest the teacher's, from the same noise.

    Ctrl-C ends the search and returns the best plan so far (`meta["interrupted"]`); before anything is measured, while
    the teacher runs, it is raised on.  With `resume` a later call goes on where it stopped, to the same plan.

    Args:
        denoiser: the model, guided or not.
        nfe: number of steps, 1 to 20; a guided denoiser asks its network more often.
        history: how many past estimates a row may use, 0 to 3, or "auto".
        basis: what rows combine, or "auto".
        sigma_range: (smallest, largest) level of the teacher and bounds of the plan's; None is the denoiser's
            `sampling_range`.
        batch: number of noises to fit to, as many to select by, as many to report on.
        generator: source of the seed; or
        seed: the seed itself.
        cond: conditions by keyword; rows of tensors are used in turn.
        metric: features `[B, F]` of samples `[B, *shape]`, in which errors count; None for the samples themselves.
        teacher: evaluations of the teacher, at least 16 and 2 nfe.
        rollouts: the budget of search and report beside the teacher, 40 to 200 rollouts of `batch` samples; each costs
            `nfe` answers of the denoiser.
        chunk: samples per call of the denoiser; None for what keeps finite differences near 256 MB.
        progress: called as the search goes on.
        resume: a file for measurements: read if it exists, written after each.

    Returns:
        The plan.  `meta` holds its provenance and, under `report`, the RMSE of it and of the built-in alternatives on
        noise that the search has not seen.  Where an alternative wins on the selection noise, it is returned.

    Raises:
        LogsnrError: if an argument leaves its range, the teacher is not finite, conditions do not fit, or the resume
            file is of another calibration.
        ValueError: if the denoiser moves the state (CFG++ has no trajectory).
    """
    low, high = _check(denoiser, nfe, history, basis, sigma_range, batch, teacher, rollouts, chunk)
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    chunk = chunk or max(1, min(batch, 2**25 // (denoiser.dim * (7 * nfe + 4))))
    settings: dict[str, Any] = {
        "model": fingerprint(denoiser),
        "nfe": nfe,
        "history": history,
        "basis": basis,
        "sigma_range": [low, high],
        "batch": batch,
        "seed": seed,
        "cond": _digest(cond),
        "metric": None if metric is None else getattr(metric, "__qualname__", type(metric).__qualname__),
        "teacher": {"solver": "unipc-3", "evaluations": teacher, "grid": "log-linear"},
        "rollouts": rollouts,
    }
    meter = Meter(denoiser)
    ledger = Ledger(meter, settings, None if resume is None else Path(resume))
    search = _Search(meter, ledger, settings, chunk, metric, cond, progress)
    try:
        search.run()
    except KeyboardInterrupt:
        if search.best is None:
            raise
        return search.finish(interrupted=True)
    except _SpentError:
        pass
    try:
        search.report()
    except KeyboardInterrupt:
        return search.finish(interrupted=True)
    return search.finish(interrupted=False)


class _SpentError(Exception):
    """The budget is used up."""


class _Search:
    """The state of one calibration."""

    def __init__(
        self,
        meter: Meter,
        ledger: Ledger,
        settings: dict[str, Any],
        chunk: int,
        metric: Metric | None,
        cond: Mapping[str, Any] | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.meter, self.ledger, self.settings = meter, ledger, settings
        self.chunk, self.metric, self.cond, self.progress = chunk, metric, cond, progress
        self.n: int = settings["nfe"]
        self.batch: int = settings["batch"]
        self.low, self.high = settings["sigma_range"]
        self.grid = teacher_grid(settings["teacher"]["evaluations"], self.low, self.high)
        self.teacher_passes = 0
        self.alternatives = alternatives(self.n, self.low, self.high)
        self.sets: dict[str, Batch] = {}
        self.best: tuple[float, Plan, dict[str, Any]] | None = None
        self.stock: tuple[float, str] = (math.inf, "")
        self.reported: dict[str, Any] | None = None
        # what the report needs is set aside
        self.budget = (settings["rollouts"] - len(self.alternatives) - 1) * self.n * self.batch

    # Noise

    def draw(self, purpose: str) -> Batch:
        """The noise of a purpose, with its conditions; no two purposes share a draw."""
        word = hashlib.sha256(f"logsnr calibration {self.settings['seed']} {purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(word[:8], "big") >> 1)
        noise = start(self.meter.denoiser, None, self.batch, generator)
        first = ("fit", "select", "report").index(purpose) * self.batch
        return Batch(noise=noise, cond=spread_cond(self.cond, first, self.batch), end=noise.new_empty(len(noise), 0))

    def taught(self, purpose: str) -> Batch:
        """That noise with the teacher's ends."""
        before = self.meter.passes
        out = teacher_ends(self.meter, self.draw(purpose), self.grid, self.chunk, self.metric)
        self.teacher_passes += self.meter.passes - before
        return out

    # Measurements

    def tell(self, stage: str) -> None:
        if self.progress is not None:
            error = math.inf if self.best is None else math.sqrt(self.best[0])
            spent = self.ledger.answers / max(self.settings["rollouts"] * self.n * self.batch, 1)
            self.progress(Progress(stage, min(spent, 1.0), error))

    def error(self, plan: Plan, purpose: str) -> float:
        """Mean squared end-point error of a plan on one of the noises."""
        batch = self.sets[purpose]
        self.afford(self.n, purpose)
        value = self.ledger.recall(
            f"{purpose} {plan.hash}", lambda: _json(mean_square(self.meter, plan, batch, self.chunk, self.metric))
        )
        return float(value)

    def afford(self, evaluations: int, purpose: str = "fit") -> None:
        """Refuse what the budget does not hold."""
        if purpose != "report" and self.ledger.answers + evaluations * self.batch > self.budget:
            raise _SpentError

    def offer(self, plan: Plan, found: dict[str, Any]) -> float:
        """Measure a plan on the selection noise; keep it if it is the best."""
        mse = self.error(plan, "select")
        if self.best is None or mse < self.best[0]:
            self.best = mse, plan, found
        return mse

    # The search

    def run(self) -> None:
        self.tell("teacher")
        before = self.meter.passes
        self.sets["fit"], cache = remember(self.meter, self.draw("fit"), self.grid, self.chunk, self.metric)
        self.teacher_passes += self.meter.passes - before
        self.sets["select"] = self.taught("select")
        self.tell("alternatives")
        for name, plan in self.alternatives.items():
            mse = self.offer(plan, {"from": "alternative", "name": name})
            self.stock = min(self.stock, (mse, name))
        starts = self.screen(cache)
        self.refine(starts)

    def screen(self, cache: Cache) -> list[tuple[float, Plan]]:
        """Levels from the cache, rows by least squares, best first.

        Every basis on the levels found without and with a past, under the longest history and the weak ridge; then the
        best of them under every history and ridge.
        """
        wanted = self.settings["history"]
        histories = sorted({min(h, self.n - 1) for h in (HISTORIES if wanted == "auto" else (wanted,))}, reverse=True)
        bases: tuple[Basis, ...] = ("eps", "x0", "velocity")
        if self.settings["basis"] != "auto":
            bases = (self.settings["basis"],)
        found: dict[str, tuple[float, Plan]] = {}
        for past in sorted({0, min(1, histories[0])}):
            levels = best_levels(cache, self.n, self.meter.sigma_data, past)
            for basis in bases:
                self.fit(prior_rows(levels, histories[0], basis), RIDGE[0], cache, found)
        leader = min(found.values(), key=lambda entry: entry[0])[1]
        for history in histories:
            for ridge in RIDGE:
                self.fit(prior_rows(leader.sigmas, history, leader.basis), ridge, cache, found)
        return sorted(found.values(), key=lambda entry: entry[0])

    def fit(self, prior: Plan, ridge: float, cache: Cache, found: dict[str, tuple[float, Plan]]) -> None:
        """Fit a prior's rows and offer the plan."""
        self.tell("rows")
        plan = self.rows(prior, ridge, cache)
        note = {"from": "rows", "history": max(map(len, plan.rows)) - 1, "ridge": ridge}
        found[plan.hash] = self.offer(plan, note), plan

    def rows(self, prior: Plan, ridge: float, cache: Cache) -> Plan:
        """The prior's levels with fitted rows."""
        batch = self.sets["fit"].first(cache.states.shape[1])
        targets = targets_at(prior.sigmas[1:], cache.sigmas, cache.states)
        self.afford(self.n)
        fitted = self.ledger.recall(
            f"rows {ridge} {prior.hash}",
            lambda: [list(r) for r in fit_rows(self.meter, prior, batch, targets, ridge, self.chunk).rows],
        )
        return replace(prior, rows=tuple(tuple(row) for row in fitted))

    def refine(self, starts: list[tuple[float, Plan]]) -> None:
        """Descend from the best start under each strength, then from the best of another basis, while it lasts."""
        leaders = starts[:1]
        leaders += [entry for entry in starts[1:] if entry[1].basis != starts[0][1].basis][:1]
        jobs = [(leader, strength) for leader in leaders for strength in DESCENT]
        for number, ((_, leader), strength) in enumerate(jobs):
            share = (self.budget - self.ledger.answers) / (len(jobs) - number)
            self.descent(leader, strength, self.ledger.answers + (share if number else 1.5 * share))

    def descent(self, leader: Plan, strength: float, limit: float) -> None:
        space = Space(template=leader, low=self.low, high=self.high)
        note = {"from": "descent", "history": max(map(len, leader.rows)) - 1, "strength": strength}
        worse = 0
        lowest = math.inf

        def fit_error(plan: Plan) -> float:
            return self.error(plan, "fit")

        def equations(p: torch.Tensor) -> Normal:
            self.afford(space.cost())
            values = self.ledger.recall(
                f"normal {space.plan(p).hash}",
                lambda: normal_equations(self.meter, space, p, self.sets["fit"], self.chunk, self.metric).to_json(),
            )
            return Normal.from_json(values)

        def accept(plan: Plan) -> bool:
            nonlocal worse, lowest
            self.tell("descent")
            mse = self.offer(plan, note)
            worse = 0 if mse < lowest else worse + 1
            lowest = min(lowest, mse)
            return worse < 3 and self.ledger.answers + space.cost() * self.batch <= limit

        if self.ledger.answers + space.cost() * self.batch <= limit:
            descend(space, leader, len(self.sets["fit"]), strength, equations, fit_error, accept)

    # The report

    def report(self) -> None:
        """Errors on noise that nothing has seen, once the plan's hash is on record."""
        assert self.best is not None
        plan = self.best[1]
        self.ledger.settle(plan.hash)
        self.tell("report")
        self.sets["report"] = self.taught("report")
        own = math.sqrt(self.error(plan, "report"))
        others = {name: math.sqrt(self.error(p, "report")) for name, p in self.alternatives.items()}
        self.reported = {"rmse": _json(own), "alternatives": {name: _json(value) for name, value in others.items()}}

    def finish(self, *, interrupted: bool) -> Plan:
        assert self.best is not None
        mse, plan, found = self.best
        meta: dict[str, Any] = {
            "solver": "calibrated" if found["from"] != "alternative" else found["name"],
            "found": found,
            "plan_hash": plan.hash,
            **self.settings,
            "interrupted": interrupted,
            "selection": {
                "rmse": _json(math.sqrt(mse)),
                "best_alternative": self.stock[1],
                "best_alternative_rmse": _json(math.sqrt(self.stock[0])),
            },
            "report": self.reported,
            "evaluations": {
                "rollouts": self.ledger.answers / (self.n * self.batch),
                "samples_times_network": self.ledger.passes,
                "teacher_samples_times_network": self.teacher_passes,
            },
        }
        self.tell("done")
        return replace(plan, meta=meta)


def _check(
    denoiser: Denoiser,
    nfe: int,
    history: int | str,
    basis: str,
    sigma_range: tuple[float, float] | None,
    batch: int,
    teacher: int,
    rollouts: int,
    chunk: int | None,
) -> tuple[float, float]:
    """The range of levels, once everything is in order."""
    if isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= MOST_STEPS:
        raise LogsnrError(f"nfe = {nfe}: must be an integer in [1, {MOST_STEPS}]; with more, use a built-in solver")
    if history != "auto" and (isinstance(history, bool) or history not in range(4)):
        raise LogsnrError(f"history = {history!r}: must be 0, 1, 2, 3 or 'auto'")
    if basis not in ("auto", *BASES):
        raise LogsnrError(f"basis {basis!r} is not one of auto, {', '.join(BASES)}")
    for name, value, least, most in (
        ("batch", batch, 2, 1_000_000),
        ("teacher", teacher, max(16, 2 * nfe), 1000),
        ("rollouts", rollouts, 40, 200),
        ("chunk", 1 if chunk is None else chunk, 1, 1_000_000),
    ):
        if not least <= value <= most:
            raise LogsnrError(f"{name} = {value}: must be in [{least}, {most}]")
    low, high = denoiser.sampling_range if sigma_range is None else sigma_range
    inside = denoiser.trained_range
    if not 0 < low < high < math.inf:
        raise LogsnrError(f"sigma_range = ({low}, {high}): needs 0 < smallest < largest < inf")
    if low < 0.99 * inside[0] or high > 1.01 * inside[1]:
        raise LogsnrError(
            f"sigma_range = ({low:.6g}, {high:.6g}) leaves [{inside[0]:.6g}, {inside[1]:.6g}], where the denoiser was "
            "trained: narrow it, or leave it out for denoiser.sampling_range"
        )
    if math.log(high / low) < 2 * nfe * MIN_STEP:
        raise LogsnrError(
            f"sigma_range = ({low:.6g}, {high:.6g}) is too narrow for {nfe} steps: needs largest/smallest >= "
            f"{math.exp(2 * nfe * MIN_STEP):.3g}, or fewer steps"
        )
    check_start(denoiser, high)
    return float(low), float(high)


def _digest(cond: Mapping[str, Any] | None) -> str | None:
    """Identity of the conditions."""
    if cond is None:
        return None
    parts = {
        name: [list(v.shape), v.detach().cpu().tolist()] if isinstance(v, torch.Tensor) else repr(v)
        for name, v in cond.items()
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _json(value: float) -> float | str:
    """A float that JSON can hold."""
    return value if math.isfinite(value) else str(value)
