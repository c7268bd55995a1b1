"""What a calibration is given: checked before anything is measured, and told apart by a digest."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, get_args

import torch

from logsnr.calibration.baselines import Method
from logsnr.calibration.levels import MIN_STEP
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.sampling.loop import check_start
from logsnr.sampling.plan import BASES

MOST_STEPS = 20


def check_arguments(
    denoiser: Denoiser,
    nfe: int,
    history: int | str,
    basis: str,
    sigma_range: tuple[float, float] | None,
    batch: int,
    teacher: int,
    rollouts: int,
    chunk: int | None,
    method: str,
) -> tuple[float, float]:
    """The range of levels, once everything is in order.

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
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    for name, value, least, most in (
        ("batch", batch, 4, 1_000_000),  # with fewer, ranking the built-in solvers takes the smallest budget whole
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


def digest_of(cond: Mapping[str, Any] | None) -> str | None:
    """Identity of the conditions."""
    if cond is None:
        return None
    parts = {
        name: [list(v.shape), v.detach().cpu().tolist()] if isinstance(v, torch.Tensor) else repr(v)
        for name, v in cond.items()
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
