"""What a calibration is given: checked before anything is measured, and all that its measurements depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from logsnr.calibration.effort import EFFORTS, MOST_ROLLOUTS, Effort
from logsnr.calibration.levels import MIN_STEP
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.sampling.plan import BASES, Basis
from logsnr.sampling.start import check_start

MOST_STEPS = 20
LATER = {"first": None, "gaussian": None, "effort": "full", "contrast": True, "told": None}
"""Settings that the files of earlier versions do not have, and their values there: written only where they differ."""
CONTRASTED = 16
"""Samples from which a variance is known well enough."""
RANKING = 220
"""Rollouts of single noises that the smallest search may have: about a hundred built-in solvers are ranked first."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Two calibrations of one model and equal settings make the same measurements.

    Attributes:
        nfe: steps of the plan.
        history: past estimates a row may use, or "auto".
        basis: what rows combine, or "auto".
        sigma_range: (smallest, largest) level.
        n: fitting noises.
        seed: of all noises.
        cond: digest of the conditions.
        metric: name of the features in which errors count.
        teacher: evaluations of the teacher.
        rollouts: the budget, in rollouts of the fitting noises.
        method: "search", or the name of a baseline.
        first: the plan's first level, where it is not searched for.
        gaussian: fingerprint of the Gaussian start.
        effort: of the search.
        contrast: whether the last step is to have the teacher's variance.
        told: digest of what else is on record of the model (guidance, prompts).

    Raises:
        LogsnrError: naming the value, what is allowed, and the fix.
    """

    nfe: int
    history: int | Literal["auto"]
    basis: Basis | Literal["auto"]
    sigma_range: tuple[float, float]
    n: int
    seed: int
    cond: str | None
    metric: str | None
    teacher: int
    rollouts: int
    method: str
    first: float | None = None
    gaussian: str | None = None
    effort: str = "full"
    contrast: bool = True
    told: str | None = None

    def __post_init__(self) -> None:
        nfe, history, (low, high) = self.nfe, self.history, self.sigma_range
        if isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= MOST_STEPS:
            raise LogsnrError(f"nfe = {nfe}: must be an integer in [1, {MOST_STEPS}]; with more, use a built-in solver")
        if history != "auto" and (isinstance(history, bool) or history not in range(4)):
            raise LogsnrError(f"history = {history!r}: must be 0, 1, 2, 3 or 'auto'")
        if self.basis not in ("auto", *BASES):
            raise unknown("basis", self.basis, ["auto", *BASES])
        if self.effort not in EFFORTS:
            raise unknown("effort", self.effort, EFFORTS)
        for name, value, least, most in (
            ("n", self.n, 4, 1_000_000),  # with fewer, ranking the built-in solvers takes the smallest budget whole
            ("teacher", self.teacher, max(16, 2 * nfe), 1000),
            ("rollouts", self.rollouts, self.tries.fewest, MOST_ROLLOUTS),
        ):
            if not least <= value <= most:
                raise LogsnrError(f"{name} = {value}: must be in [{least}, {most}]")
        if nfe > 2 and self.n * self.rollouts < RANKING:
            raise LogsnrError(
                f"n = {self.n} with rollouts = {self.rollouts}: ranking the built-in solvers takes them whole; give "
                f"rollouts = {math.ceil(RANKING / self.n)}, or n = {math.ceil(RANKING / self.rollouts)}"
            )
        if not 0 < low < high < math.inf:
            raise LogsnrError(f"sigma_range = ({low}, {high}): needs 0 < smallest < largest < inf")
        if math.log(high / low) < 2 * nfe * MIN_STEP:
            raise LogsnrError(
                f"sigma_range = ({low:.6g}, {high:.6g}) is too narrow for {nfe} steps: needs largest/smallest >= "
                f"{math.exp(2 * nfe * MIN_STEP):.3g}, or fewer steps"
            )

        top = high if self.first is None else self.first
        if not math.exp(2 * nfe * MIN_STEP) * low <= top <= high:
            raise LogsnrError(
                f"first = {top:.6g}: {nfe} steps begin between {math.exp(2 * nfe * MIN_STEP) * low:.6g} and "
                f"{high:.6g} on this range; leave it out to have it chosen"
            )

    def check(self, denoiser: Denoiser) -> None:
        """Whether a model can be calibrated so.

        Raises:
            LogsnrError: if it was not trained on all of the range.
            ValueError: if it moves the state, or cannot start there.
        """
        low, high = self.sigma_range
        inside = denoiser.trained_range
        if not denoiser.covers(low, high):
            raise LogsnrError(
                f"sigma_range = ({low:.6g}, {high:.6g}) leaves [{inside[0]:.6g}, {inside[1]:.6g}], where the denoiser "
                "was trained: narrow it, or leave it out for denoiser.sampling_range"
            )
        check_start(denoiser, high)

    @property
    def tries(self) -> Effort:
        """What the search tries."""
        return EFFORTS[self.effort]

    @property
    def fewer(self) -> int:
        """Noises to select by, and to report on."""
        return max(min(self.n, 64), self.n // 2)

    @property
    def answers(self) -> int:
        """Samples that search and report may have denoised."""
        return self.rollouts * self.nfe * self.n

    @property
    def budget(self) -> int:
        """Those of the search: what contrast and report need is set aside."""
        last = self.n + self.fewer if self.contrasts else 0
        return self.answers - self.nfe * (last + (self.tries.leaders + 1) * self.fewer + self.few)

    @property
    def few(self) -> int:
        """Noises whose states are looked at one by one for the report."""
        return min(self.n, 16) if self.metric is None else 0

    @property
    def contrasts(self) -> bool:
        """Whether the last step is fitted for contrast: of a search in the samples themselves, by enough of them."""
        return self.contrast and self.method == "search" and self.metric is None and self.n >= CONTRASTED

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        teacher = {"solver": "unipc-3", "evaluations": self.teacher, "grid": "log-linear"}
        own = {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}
        return {**own, "sigma_range": list(self.sigma_range), "teacher": teacher}


def digest(cond: Mapping[str, Any] | None) -> str | None:
    """Identity of the conditions."""
    if cond is None:
        return None
    parts = {
        name: [list(v.shape), v.detach().cpu().tolist()] if isinstance(v, torch.Tensor) else repr(v)
        for name, v in cond.items()
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
