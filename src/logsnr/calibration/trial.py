"""A trial: one calibration on its way, with what it measures by and the best plan so far.

Three noises, drawn from one seed by purpose and never mixed: *fit* (levels and coefficients), *select* (basis,
history, strength of the prior, when to stop, and whether to beat the built-in solvers at all), *report* (drawn after
the plan's hash is on record, used once).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.calibration.ledger import Ledger, fingerprint
from logsnr.calibration.rollout import TAIL, Begin, Metric, Noises, squares, tempered
from logsnr.calibration.settings import Settings
from logsnr.calibration.teacher import Cache, remember, taught
from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.sampling.batches import Cond, in_turn
from logsnr.sampling.counted import Counted
from logsnr.sampling.gaussian import GaussianStart
from logsnr.sampling.plan import Plan
from logsnr.sampling.start import start as first_noise
from logsnr.sampling.teacher import teacher_on, teacher_plan

PURPOSES = ("fit", "select", "report")


Memo = dict[str, Any]
"""What the teacher did, by what it depends on: shared by trials of plans of several lengths."""


@dataclass(frozen=True)
class Progress:
    """What a callback sees.

    Attributes:
        stage: "teacher", "alternatives", "rows", "walk", "descent", "report" or "done".
        spent: share of the budget that is used, in [0, 1].
        error: smallest RMSE on the selection noise so far (inf before the first), outliers tempered.
        evaluations: samples times network evaluations so far, the teacher's too.
    """

    stage: str
    spent: float
    error: float
    evaluations: int = 0


@dataclass(frozen=True)
class Found:
    """A plan, its tempered mean square on the selection noise, and how it was found."""

    plan: Plan
    error: float
    how: dict[str, Any]


class Trial:
    """One calibration.

    Attributes:
        ledger: what was measured, and what may be.
        start: the Gaussian start, if any.
        teacher: the denoiser, counting what the teacher asks it.
        noises: those drawn so far, by purpose, with the teacher's ends.
        leaders: the best built-in solvers, by name.
        scale: of tempering: the same for all that is compared.
        best: the best plan so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: Settings,
        resume: Path | None,
        *,
        cond: Cond | None,
        metric: Metric | None,
        chunk: int,
        teacher_chunk: int,
        progress: Callable[[Progress], None] | None,
        start: GaussianStart | None = None,
        memo: Memo | None = None,
    ) -> None:
        self.settings, self.cond, self.metric, self.chunk = settings, cond, metric, chunk
        self.teacher_chunk, self.memo = teacher_chunk, {} if memo is None else memo
        self.progress, self.start = progress, start
        about = {"model": fingerprint(denoiser), **settings.to_dict()}
        self.ledger = Ledger(Counted(denoiser), about, resume, settings.budget)
        self.teacher = Counted(denoiser)
        self.noises: dict[str, Noises] = {}
        self.leaders: dict[str, Plan] = {}
        self.scale = math.inf
        self.best: Found | None = None

    @property
    def begin(self) -> Begin | None:
        """Where plans begin that begin below the teacher's first level."""
        start, high = self.start, self.settings.sigma_range[1]
        return None if start is None else lambda noise, sigma, cond: start(noise, sigma, cond, sigma_from=high)

    def tell(self, stage: str) -> None:
        """Report progress."""
        if self.progress is not None:
            error = math.inf if self.best is None else math.sqrt(self.best.error)
            asked = self.ledger.passes + self.teacher.passes
            self.progress(Progress(stage, min(self.ledger.answers / self.settings.answers, 1.0), error, asked))

    @property
    def teachers_plan(self) -> Plan:
        """The teacher's, with the first level that was asked for in the place of the nearest of its own."""
        plan, first = teacher_plan(self.settings.teacher, *self.settings.sigma_range), self.settings.first
        if first is None or first in plan.sigmas:
            return plan
        nearest = min(plan.sigmas[1:-1], key=lambda s: abs(math.log(s / first)))
        return teacher_on(tuple(first if s == nearest else s for s in plan.sigmas))

    def remember(self) -> Cache:
        """Let the teacher run on the noises of the search; its trajectories of those of fit."""
        cache: Cache
        self.noises["fit"], cache = self._taught("fit", remember)
        self.teach("select")
        return cache

    def teach(self, purpose: str) -> None:
        """Let the teacher run on the noise of a purpose."""
        self.noises[purpose] = self._taught(purpose, taught)

    def _taught(self, purpose: str, teach: Callable[..., Any]) -> Any:
        """What the teacher makes of the noise of a purpose: remembered, or made now."""
        plan, settings = self.teachers_plan, self.settings
        sizes = (settings.n, settings.seed, settings.cond, settings.gaussian, self.teacher_chunk)
        # by the objects, which the entry keeps alive: weights do not say how a denoiser is guided
        about = self.teacher.denoiser, self.metric
        key = f"{purpose} {plan.hash} {sizes} {[id(each) for each in about]}"
        if key not in self.memo:
            found = teach(
                self.teacher,
                plan,
                *draw(self, purpose),
                chunk=self.teacher_chunk,
                metric=self.metric,
                begin=self.begin,
            )
            self.memo[key] = about, found
        return self.memo[key][1]

    def squares(self, plan: Plan, purpose: str, few: int | None = None) -> Tensor:
        """Mean square of every sample under a plan, on one of the noises, or on the first few of them."""
        noises = self.noises[purpose] if few is None else self.noises[purpose].first(few)
        return as_tensor(
            self.ledger.recall(
                f"{purpose} {len(noises)} {plan.hash}",
                plan.nfe * len(noises),
                lambda: squares(self.ledger.meter, plan, noises, self.chunk, self.metric).tolist(),
            )
        )

    def rmse(self, plan: Plan, purpose: str) -> float:
        """RMSE of a plan on one of the noises."""
        return math.sqrt(float(self.squares(plan, purpose).mean()))

    def tempered(self, q: Tensor) -> float:
        """Their mean, outliers tempered alike for all plans."""
        return tempered(q, self.scale)

    def rank(self, plans: dict[str, Plan]) -> None:
        """Plans measured on a few of the selection noises; the leaders among them on all."""
        tries = self.settings.tries
        few = max(len(self.noises["select"]) // tries.few, 1)
        found = {name: self.squares(plan, "select", few) for name, plan in plans.items()}
        ranked = sorted(found, key=lambda name: float(found[name].log().mean()))
        self.leaders = {name: plans[name] for name in ranked[: tries.leaders]}
        # one scale for all that is compared: that of the best of them
        self.scale = min(TAIL * float(self.squares(plan, "select").mean()) for plan in self.leaders.values())
        for name, plan in self.leaders.items():
            self.offer(plan, {"from": "alternative", "name": name})

    def offer(self, plan: Plan, how: dict[str, Any]) -> float:
        """Measure a plan on the selection noise; keep it if it is the best.  Its error is tempered."""
        error = self.tempered(self.squares(plan, "select"))
        if self.best is None or error < self.best.error:
            self.best = Found(plan, error, how)
        return error

    def prefer(self, plan: Plan, how: dict[str, Any], dearer: float) -> None:
        """Keep a plan for what else it has, if its RMSE is at most `dearer` times the best one's."""
        assert self.best is not None
        error = self.tempered(self.squares(plan, "select"))
        if error <= dearer**2 * self.best.error:
            self.best = Found(plan, error, how)

    def both(self, plan: Plan, fit: float, how: dict[str, Any]) -> float:
        """The error on the fitting noise (given) and on the selection noise together; the plan is offered."""
        a, b = self.settings.n, self.settings.fewer
        return (a * fit + b * self.offer(plan, how)) / (a + b)


def draw(trial: Trial, purpose: str) -> tuple[Tensor, Cond]:
    """The noise of a purpose, with its conditions; no two purposes share a draw."""
    settings = trial.settings
    word = hashlib.sha256(f"logsnr calibration {settings.seed} {purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(word[:8], "big") >> 1)
    size = settings.n if purpose == "fit" else settings.fewer
    noise = first_noise(trial.teacher, None, size, generator)
    first = PURPOSES.index(purpose) * settings.n
    return noise, on(in_turn(trial.cond, torch.arange(first, first + size)), noise.device)


def as_tensor(values: list[Any]) -> Tensor:
    """Numbers of the ledger (an earlier one spelt out what is not finite)."""
    return torch.tensor([math.inf if v == "inf" else v for v in values], dtype=torch.float64)
