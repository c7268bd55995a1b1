"""Calibration: the best few evaluations of one model, found in minutes, kept as a plan.

    minimise  mean ||x_plan(noise) - x_teacher(noise)||^2     over the sigmas and the rows of n steps

Three noises, drawn from one seed by purpose and never mixed: *fit* (levels and coefficients), *select* (basis,
history, strength of the prior, when to stop, and whether to beat the built-in solvers at all), *report* (drawn after
the plan's hash is on record, used once).  The steps:

    teacher      fine trajectories from the same noise; those of fit are remembered level by level   (teacher.py)
    schedule     levels of least summed local error, by dynamic programming on the cache               (schedule.py)
    rows         each step's coefficients by ridge least squares along the student's own rollout       (rows.py)
    descent      all numbers at once against the end-point error, damped Gauss-Newton                  (descent.py)

The universal plan is one more place to descend from.  Errors are compared as descent.py tempers them, reported plain.
No gradient passes through the network; anything that answers as a Denoiser, guided ones too, can be calibrated.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from logsnr.calibration.alternatives import alternatives
from logsnr.calibration.arguments import check_arguments, digest_of
from logsnr.calibration.descent import TAIL, Normal, Space, descend, normal_equations, squares, tempered
from logsnr.calibration.ledger import Ledger, Meter, fingerprint
from logsnr.calibration.rollout import Batch, spread_cond
from logsnr.calibration.rows import fit_rows, lengthened, prior_rows, targets_at
from logsnr.calibration.schedule import best_levels
from logsnr.calibration.teacher import Cache, Metric, remember, teacher_ends, teacher_grid
from logsnr.denoiser import Denoiser
from logsnr.sampling.plan import Basis, Plan
from logsnr.sampling.sample import start
from logsnr.sampling.universal import universal_plan, universal_sizes

EFFORT = 1400
"""Evaluations of the fitting batch that a search may take, unless told."""
LONGEST = 2
"""Past estimates that "auto" goes on to use, once rows of one are fitted."""
RIDGE = 1e-3
"""Strength of the least-squares prior, relative to the error of the prior's own row."""
DESCENT = (1.0, 30.0)
"""Strengths of the descent's prior that are tried, in units of one sample."""
FEW = 4
"""All built-in solvers are ranked on one selection noise of so many."""
LEADERS = 6
"""Built-in solvers that are measured on all of them, and reported."""


@dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Attributes:
        stage: "teacher", "alternatives", "rows", "descent", "report" or "done".
        spent: share of the budget that is used, in [0, 1].
        error: smallest RMSE on the selection noise so far (inf before the first), outliers tempered as in descent.
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
    batch: int = 96,
    generator: torch.Generator | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    teacher: int = 64,
    rollouts: int | None = None,
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
        batch: number of noises to fit to; half as many to select by and to report on, or all of them up to 64.
        generator: source of the seed; or
        seed: the seed itself.
        cond: conditions by keyword; rows of tensors are used in turn.
        metric: features `[B, F]` of samples `[B, *shape]`, in which errors count; None for the samples themselves.
        teacher: evaluations of the teacher, at least 16 and 2 nfe.
        rollouts: the budget of search and report beside the teacher, 40 to 200 rollouts of `batch` samples; each costs
            `nfe` answers of the denoiser.  None for 1400 / nfe, so that longer plans cost about the same.
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
    if rollouts is None:
        rollouts = min(max(EFFORT // max(nfe, 1), 40), 200)
    low, high = check_arguments(denoiser, nfe, history, basis, sigma_range, batch, teacher, rollouts, chunk)
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
        "cond": digest_of(cond),
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
        self.leaders: dict[str, Plan] = {}
        self.scale = math.inf
        # what the report needs is set aside
        self.fewer = max(min(self.batch, 64), self.batch // 2)
        self.budget = settings["rollouts"] * self.n * self.batch - (LEADERS + 1) * self.n * self.fewer

    # Noise

    def draw(self, purpose: str) -> Batch:
        """The noise of a purpose, with its conditions; no two purposes share a draw."""
        word = hashlib.sha256(f"logsnr calibration {self.settings['seed']} {purpose}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(word[:8], "big") >> 1)
        size = self.batch if purpose == "fit" else self.fewer
        noise = start(self.meter.denoiser, None, size, generator)
        first = ("fit", "select", "report").index(purpose) * self.batch
        return Batch(noise=noise, cond=spread_cond(self.cond, first, size), end=noise.new_empty(size, 0))

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

    def squares(self, plan: Plan, purpose: str, few: int | None = None) -> torch.Tensor:
        """Mean square of every sample under a plan, on one of the noises, or on the first few of them."""
        batch = self.sets[purpose] if few is None else self.sets[purpose].first(few)
        name = f"{purpose} {len(batch)} {plan.hash}"
        if name not in self.ledger.counted:
            self.afford(self.n * len(batch), purpose)
        values = self.ledger.recall(
            name,
            lambda: [_json(v) for v in squares(self.meter, plan, batch, self.chunk, self.metric).tolist()],
        )
        return torch.tensor([float(v) for v in values], dtype=torch.float64)

    def afford(self, answers: int, purpose: str = "fit") -> None:
        """Refuse what the budget does not hold."""
        if purpose != "report" and self.ledger.answers + answers > self.budget:
            raise _SpentError

    def offer(self, plan: Plan, found: dict[str, Any]) -> float:
        """Measure a plan on the selection noise; keep it if it is the best.  Its error is tempered, as in descent."""
        q = self.squares(plan, "select")
        error = tempered(q, self.scale)
        if self.best is None or error < self.best[0]:
            self.best = error, plan, found
        return error

    # The search

    def run(self) -> None:
        self.tell("teacher")
        before = self.meter.passes
        self.sets["fit"], cache = remember(self.meter, self.draw("fit"), self.grid, self.chunk, self.metric)
        self.teacher_passes += self.meter.passes - before
        self.sets["select"] = self.taught("select")
        self.tell("alternatives")
        self.rank()
        self.refine(self.starts(cache))

    def rank(self) -> None:
        """The built-in solvers on a few of the selection noises; the leaders among them on all."""
        few = max(len(self.sets["select"]) // FEW, 2)
        found = {name: self.squares(plan, "select", few) for name, plan in self.alternatives.items()}
        ranked = sorted(found, key=lambda name: float(found[name].log().mean()))
        self.leaders = {name: self.alternatives[name] for name in ranked[:LEADERS]}
        # one scale for all that is compared: that of the best of them
        self.scale = min(TAIL * float(self.squares(plan, "select").mean()) for plan in self.leaders.values())
        for name, plan in self.leaders.items():
            error = self.offer(plan, {"from": "alternative", "name": name})
            self.stock = min(self.stock, (error, name))

    def starts(self, cache: Cache) -> list[tuple[float, Plan]]:
        """Where to descend from, best first: levels from the cache with fitted rows, the universal plan, and the best
        built-in solver that fits the search's space."""
        bases: tuple[Basis, ...] = ("eps", "x0", "velocity")
        if self.settings["basis"] != "auto":
            bases = (self.settings["basis"],)
        wanted = self.settings["history"]
        history = min(1 if wanted == "auto" else wanted, self.n - 1)
        found: list[tuple[float, Plan]] = []
        levels = best_levels(cache, self.n, self.meter.sigma_data, min(1, history))
        for basis in bases:
            self.tell("rows")
            plan = self.rows(prior_rows(levels, history, basis), RIDGE, cache)
            found.append((self.offer(plan, {"from": "rows", "history": history}), plan))
        if "eps" in bases and history and self.n in universal_sizes():
            plan = universal_plan(self.n, self.low, self.high, sigma_data=self.meter.sigma_data)
            plan = lengthened(replace(plan, meta={}), history)
            found.append((self.offer(plan, {"from": "universal"}), plan))
        longest = self.n if wanted == "auto" else wanted + 1
        for plan in self.leaders.values():
            if plan.basis in bases and plan.sigmas[-1] == 0 and max(map(len, plan.rows)) <= longest:
                plan = lengthened(plan, history)
                found.append((self.offer(plan, {"from": "alternative"}), plan))
                break
        return sorted(found, key=lambda entry: entry[0])

    def rows(self, prior: Plan, ridge: float, cache: Cache) -> Plan:
        """The prior's levels with fitted rows."""
        batch = self.sets["fit"].first(cache.states.shape[1])
        targets = targets_at(prior.sigmas[1:], cache.sigmas, cache.states)
        self.afford(self.n * len(batch))
        fitted = self.ledger.recall(
            f"rows {ridge} {prior.hash}",
            lambda: [list(r) for r in fit_rows(self.meter, prior, batch, targets, ridge, self.chunk).rows],
        )
        return replace(prior, rows=tuple(tuple(row) for row in fitted))

    def refine(self, starts: list[tuple[float, Plan]]) -> None:
        """One step from each of the two best starts, on from the better; then with longer rows, while it lasts."""
        tried = [self.descent(plan, DESCENT[0], steps=1) for _, plan in starts[:2]]
        _, leader = min(tried, key=lambda entry: entry[0])
        _, leader = self.descent(leader, DESCENT[0])
        longest = min(self.n - 1, LONGEST)
        if self.settings["history"] == "auto" and max(map(len, leader.rows)) <= longest:
            self.descent(lengthened(leader, longest), DESCENT[0])
        for strength in DESCENT[1:]:
            self.descent(starts[0][1], strength)

    def descent(self, first: Plan, strength: float, steps: int | None = None) -> tuple[float, Plan]:
        """Descend; the best plan on the way by its error on the selection noise."""
        space = Space(template=first, low=self.low, high=self.high)
        note = {"from": "descent", "history": max(map(len, first.rows)) - 1, "strength": strength}
        best = self.offer(first, {"from": "start"}), first
        taken = worse = 0

        def errors(plan: Plan) -> torch.Tensor:
            return self.squares(plan, "fit")

        def equations(p: torch.Tensor, scale: float) -> Normal:
            batch = self.sets["fit"]
            if steps is not None:
                batch = batch.first((len(batch) + 1) // 2)
            self.afford(space.cost() * len(batch))
            values = self.ledger.recall(
                f"normal {len(batch)} {space.plan(p).hash}",
                lambda: normal_equations(self.meter, space, p, batch, self.chunk, self.metric, scale).to_json(),
            )
            return Normal.from_json(values)

        def accept(plan: Plan) -> bool:
            nonlocal best, taken, worse
            self.tell("descent")
            error = self.offer(plan, note)
            worse = 0 if error < best[0] else worse + 1
            best = min(best, (error, plan), key=lambda entry: entry[0])
            taken += 1
            return taken != steps and worse < 3

        descend(space, first, len(self.sets["fit"]), strength, equations, errors, accept)
        return best

    # The report

    def report(self) -> None:
        """Errors on noise that nothing has seen, once the plan's hash is on record."""
        assert self.best is not None
        plan = self.best[1]
        self.ledger.settle(plan.hash)
        self.tell("report")
        self.sets["report"] = self.taught("report")
        others = {name: _json(self.rmse(other, "report")) for name, other in self.leaders.items()}
        self.reported = {"rmse": _json(self.rmse(plan, "report")), "alternatives": others}

    def rmse(self, plan: Plan, purpose: str) -> float:
        """RMSE of a plan on one of the noises."""
        return math.sqrt(float(self.squares(plan, purpose).mean()))

    def finish(self, *, interrupted: bool) -> Plan:
        assert self.best is not None
        _, plan, found = self.best
        meta: dict[str, Any] = {
            "solver": "calibrated" if found["from"] != "alternative" else found["name"],
            "found": found,
            "plan_hash": plan.hash,
            **self.settings,
            "interrupted": interrupted,
            "selection": {
                "rmse": _json(self.rmse(plan, "select")),
                "best_alternative": self.stock[1],
                "best_alternative_rmse": _json(self.rmse(self.alternatives[self.stock[1]], "select")),
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


def _json(value: float) -> float | str:
    """A float that JSON can hold."""
    return value if math.isfinite(value) else str(value)
