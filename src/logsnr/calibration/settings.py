"""What a calibration is given: checked before anything is measured, and all that its measurements depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from logsnr.calibration.ledger import fingerprint
from logsnr.calibration.levels import MIN_STEP
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.sampling.loop import check_start
from logsnr.sampling.plan import BASES, Basis

MOST_STEPS = 20
LEADERS = 6
"""Built-in solvers that are measured on all selection noises, and reported."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Two calibrations of equal settings make the same measurements.

    Attributes:
        model: fingerprint of the denoiser.
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
    """

    model: str
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
        """Those of the search: what the report needs is set aside."""
        return self.answers - (LEADERS + 1) * self.nfe * self.fewer

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        teacher = {"solver": "unipc-3", "evaluations": self.teacher, "grid": "log-linear"}
        return {**asdict(self), "sigma_range": list(self.sigma_range), "teacher": teacher}


def checked(
    denoiser: Denoiser,
    nfe: int,
    *,
    history: int | Literal["auto"],
    basis: Basis | Literal["auto"],
    sigma_range: tuple[float, float] | None,
    n: int,
    seed: int,
    cond: Mapping[str, Any] | None,
    metric: Callable[[Tensor], Tensor] | None,
    teacher: int,
    rollouts: int,
    method: str,
) -> Settings:
    """The settings of a calibration, once everything is in order.

    Raises:
        LogsnrError: naming the value, what is allowed, and the fix.
        ValueError: if the denoiser moves the state.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= MOST_STEPS:
        raise LogsnrError(f"nfe = {nfe}: must be an integer in [1, {MOST_STEPS}]; with more, use a built-in solver")
    if history != "auto" and (isinstance(history, bool) or history not in range(4)):
        raise LogsnrError(f"history = {history!r}: must be 0, 1, 2, 3 or 'auto'")
    if basis not in ("auto", *BASES):
        raise unknown("basis", basis, ["auto", *BASES])
    for name, value, least, most in (
        ("n", n, 4, 1_000_000),  # with fewer, ranking the built-in solvers takes the smallest budget whole
        ("teacher", teacher, max(16, 2 * nfe), 1000),
        ("rollouts", rollouts, 40, 200),
    ):
        if not least <= value <= most:
            raise LogsnrError(f"{name} = {value}: must be in [{least}, {most}]")
    low, high = _checked_range(denoiser, sigma_range, nfe)
    return Settings(
        model=fingerprint(denoiser),
        nfe=nfe,
        history=history,
        basis=basis,
        sigma_range=(low, high),
        n=n,
        seed=seed,
        cond=_digest(cond),
        metric=None if metric is None else getattr(metric, "__qualname__", type(metric).__qualname__),
        teacher=teacher,
        rollouts=rollouts,
        method=method,
    )


def _checked_range(denoiser: Denoiser, sigma_range: tuple[float, float] | None, nfe: int) -> tuple[float, float]:
    """The levels between which plan and teacher run."""
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
