"""The search of a calibration: from a few starts to a plan, counted and remembered step by step.

    teacher      fine trajectories from the same noise; those of fit are remembered level by level   (teacher.py)
    schedule     levels to try: evenly spread ones, and those of least summed local error on the cache (schedule.py)
    rows         each step's coefficients by ridge least squares along the student's own rollout       (rows.py)
    walk         levels one at a time along the teacher's grid, rows fitted anew                       (walk.py)
    descent      all numbers at once against the end-point error, damped Gauss-Newton                  (descent.py)

The best built-in solver is one more place to descend from.  Errors are compared as descent.py tempers them, reported
plain.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from logsnr.calibration.baselines import aligned, alternatives, searched, tuned_ends
from logsnr.calibration.descent import TAIL, Normal, Space, descend, normal_equations, residuals, squares, tempered
from logsnr.calibration.ledger import Ledger, Meter
from logsnr.calibration.levels import MIN_STEP, tried_levels
from logsnr.calibration.rollout import Batch, spread_cond
from logsnr.calibration.rows import Lesson, fit_rows, lengthened, prior_rows, targets_at
from logsnr.calibration.teacher import Cache, Metric, remember, teacher_ends, teacher_grid
from logsnr.calibration.walk import Nodes, walk
from logsnr.sampling.loop import start
from logsnr.sampling.names import find_grid, find_solver
from logsnr.sampling.plan import Basis, Grid, Plan

LONGEST = 2
"""Past estimates that "auto" uses on all levels; one less and one more on the best of them."""
RIDGE = 1e-3
"""Strength of the least-squares prior, relative to the error of the prior's own row."""
STRENGTHS = (1.0, 30.0)
"""Of the descent's prior, in units of one sample: the usual one, and one for when fitting noises are too few."""
STRIDES = (1.6, 0.8, 0.4, 0.2)
"""Of the walk, in log sigma."""
FINALISTS = 4
"""Of the levels to start from, measured on the selection noise too."""
WALK = 70
"""Rollouts of a walk, at most."""
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


class SpentError(Exception):
    """The budget is used up."""


class Search:
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
            raise SpentError

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
        if self.settings["method"] == "search":
            self.refine(self.starts(cache), cache)
        else:
            self.baseline(cache)

    def rank(self) -> None:
        """The built-in solvers on a few of the selection noises; the leaders among them on all."""
        few = max(len(self.sets["select"]) // FEW, 1)
        found = {name: self.squares(plan, "select", few) for name, plan in self.alternatives.items()}
        ranked = sorted(found, key=lambda name: float(found[name].log().mean()))
        self.leaders = {name: self.alternatives[name] for name in ranked[:LEADERS]}
        # one scale for all that is compared: that of the best of them
        self.scale = min(TAIL * float(self.squares(plan, "select").mean()) for plan in self.leaders.values())
        for name, plan in self.leaders.items():
            error = self.offer(plan, {"from": "alternative", "name": name})
            self.stock = min(self.stock, (error, name))

    def baseline(self, cache: Cache) -> None:
        """A published way to choose levels, in place of the search; the built-in solvers only stand beside it."""
        method = self.settings["method"]
        if method == "ends":
            for name in self.leaders:
                solver, grid = name.split(", ", 1)
                found = {"from": "ends", "name": f"{name}, tuned ends"}
                error = partial(self.offer, found=found)
                tuned_ends(find_solver(solver)[1], find_grid(grid)[1], self.n, self.low, self.high, error)
        else:
            self.best = None
            sigma_data = self.meter.sigma_data
            plan = searched(cache, self.n, sigma_data) if method == "gits" else aligned(cache, self.n)
            self.offer(plan, {"from": method, "name": "iPNDM-4, GITS" if method == "gits" else "DPM++(2M), AYS"})

    def starts(self, cache: Cache) -> list[Plan]:
        """Where to walk and descend from, best first: fitted rows on many levels, and the best built-in solver that
        fits the search's space.  Levels are ranked on the fitting noise, which costs nothing; the first of them, and
        other bases and histories on the best, on the selection noise as well."""
        bases: tuple[Basis, ...] = ("eps", "x0", "velocity")
        if self.settings["basis"] != "auto":
            bases = (self.settings["basis"],)
        wanted = self.settings["history"]
        history = min(LONGEST if wanted == "auto" else wanted, self.n - 1)
        others = {1, min(LONGEST + 1, self.n - 1)} - {history, self.n} if wanted == "auto" else set()

        def rows(levels: Grid, history: int, basis: Basis) -> tuple[Plan, float]:
            self.tell("rows")
            return self.rows(prior_rows(levels, history, basis), cache)

        tried = tried_levels(cache, self.n, self.meter.sigma_data, min(1, history))
        found = sorted((rows(levels, history, bases[0]) for levels in tried), key=lambda entry: entry[1])
        found = [(plan, self.both(plan, fit, {"from": "rows"})) for plan, fit in found[:FINALISTS]]
        best, *rest = sorted(found, key=lambda entry: entry[1])
        variants = [rows(best[0].sigmas, history, basis) for basis in bases[1:]]
        variants += [rows(best[0].sigmas, other, bases[0]) for other in sorted(others)]
        best = min(
            [best, *((plan, self.both(plan, fit, {"from": "rows"})) for plan, fit in variants)],
            key=lambda entry: entry[1],
        )
        longest = self.n if wanted == "auto" else wanted + 1
        fits = (plan for plan in self.leaders.values() if plan.basis in bases and max(map(len, plan.rows)) <= longest)
        if (plan := next(fits, None)) is not None:
            plan = lengthened(plan, history)
            rest.append((plan, self.both(plan, tempered(self.squares(plan, "fit"), self.scale), {"from": "built-in"})))
        return [best[0], *(plan for plan, _ in sorted(rest, key=lambda entry: entry[1]))]

    def rows(self, prior: Plan, cache: Cache) -> tuple[Plan, float]:
        """The prior's levels with fitted rows, and the error of the fitting noise, tempered."""
        batch = self.sets["fit"].first(cache.states.shape[1])
        targets = targets_at(prior.sigmas[1:], cache.sigmas, cache.states)
        name = f"rows {RIDGE} {prior.hash}"
        if name not in self.ledger.counted:
            self.afford(self.n * len(batch))

        def fit() -> list[Any]:
            lesson = Lesson(denoiser=self.meter, prior=prior, batch=batch, targets=targets)
            (plan,), (end,) = fit_rows([lesson], RIDGE, self.chunk)
            q = residuals(end, batch, self.metric).square().mean(1).cpu().nan_to_num(nan=math.inf, posinf=math.inf)
            return [[list(row) for row in plan.rows], [_json(v) for v in q.tolist()]]

        rows, q = self.ledger.recall(name, fit)
        error = tempered(torch.tensor([float(v) for v in q], dtype=torch.float64), self.scale)
        return replace(prior, rows=tuple(tuple(row) for row in rows)), error

    def walk(self, first: Plan, cache: Cache) -> Plan:
        """From a plan's levels to the best that single moves reach.

        A move must be better on the fitting noise, and then on that and the selection noise together: a few samples
        that end in another mode than the teacher's decide too much on either alone.
        """
        history, known = max(map(len, first.rows)) - 1, cache.sigmas
        start = tuple(min(range(len(known)), key=lambda i: abs(known[i] - s)) for s in first.sigmas[:-1])
        best, left = (math.inf, math.inf, first), WALK

        def better(nodes: Nodes) -> bool:
            nonlocal best, left
            if not left:
                return False
            left -= 1
            self.tell("walk")
            prior = prior_rows((*(known[i] for i in nodes), 0.0), history, first.basis)
            plan, fit = self.rows(prior, cache)
            if fit >= best[0]:
                return False
            both = self.both(plan, fit, {"from": "walk"})
            if both >= best[1]:
                return False
            best = fit, both, plan
            return True

        width = math.log(known[0] / known[1])
        strides = [max(round(step / width), 1) for step in STRIDES]
        better(start)
        walk(start, len(known) - 2, math.ceil(MIN_STEP / width - 1e-9), strides, better)
        return best[2]

    def both(self, plan: Plan, fit: float, found: dict[str, Any]) -> float:
        """The error on the fitting noise (given) and on the selection noise together; the plan is kept if the best."""
        a, b = self.batch, len(self.sets["select"])
        return (a * fit + b * self.offer(plan, found)) / (a + b)

    def refine(self, starts: list[Plan], cache: Cache) -> None:
        """From the best start on: walk and descend, descend without the walk, then with a strong prior."""
        for plan in starts:
            on_grid = plan.sigmas[-1] == 0 and set(plan.sigmas) <= set(cache.sigmas)
            walked = self.walk(plan, cache) if on_grid else plan
            self.descent(walked, STRENGTHS[0])
            if walked != plan:
                self.descent(plan, STRENGTHS[0])
            self.descent(walked, STRENGTHS[1])

    def descent(self, first: Plan, strength: float) -> None:
        """Descend, and offer every plan on the way, until three in a row are worse on the selection noise."""
        space = Space(template=first, low=self.low, high=self.high)
        note = {"from": "descent", "history": max(map(len, first.rows)) - 1, "strength": strength}
        best, worse = self.offer(first, {"from": "start"}), 0

        def errors(plan: Plan) -> torch.Tensor:
            return self.squares(plan, "fit")

        def equations(p: torch.Tensor, scale: float) -> Normal:
            self.afford(space.cost() * self.batch)
            values = self.ledger.recall(
                f"normal {space.plan(p).hash}",
                lambda: normal_equations(
                    self.meter, space, p, self.sets["fit"], self.chunk, self.metric, scale
                ).to_json(),
            )
            return Normal.from_json(values)

        def accept(plan: Plan) -> bool:
            nonlocal best, worse
            self.tell("descent")
            error = self.offer(plan, note)
            worse = 0 if error < best else worse + 1
            best = min(best, error)
            return worse < 3

        descend(space, first, self.batch, strength, equations, errors, accept)

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
            "solver": found.get("name", "calibrated"),
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
