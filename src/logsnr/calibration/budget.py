"""Budget: how much of a calibration fits into a time, by the measured rate of the model.

    seconds = rate (teacher (n + 2 fewer) + sum over plans of rollouts nfe n),    rate: seconds per answer of one sample

The first of these that fits is taken: the full search; a full one of fewer rollouts; a quick one; a quick one of fewer
noises.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from logsnr.calibration.effort import EFFORTS
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.batches import in_turn

USEFUL = 80
"""Rollouts below which a full search is hardly more than a quick one."""
TYPICAL = 37
"""Rollouts of a quick search and its report."""
FEWER = (96, 64, 48, 32)
"""Noises of a quick search, as many as fit."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What fits.

    Attributes:
        effort: of the searches.
        n: fitting noises.
        rollouts: of each plan; None for the effort's own.
        seconds: expected.
    """

    effort: str
    n: int
    rollouts: int | None
    seconds: float


@torch.no_grad()
def rate(denoiser: Denoiser, sigma: float, cond: Mapping[str, Any] | None, chunk: int) -> float:
    """Seconds per sample of the denoiser's answers, in calls of `chunk` samples; the first call is not counted."""
    z = torch.randn(chunk, *denoiser.shape, generator=torch.Generator().manual_seed(0)).to(denoiser.device)
    given = in_turn(cond, torch.arange(chunk))
    began = 0.0
    for call in range(3):
        if call == 1:
            began = time.perf_counter()
        float(denoiser(z, sigma, **given).x0.flatten()[0])  # waits for it
    return (time.perf_counter() - began) / (2 * chunk)


def fitting(nfes: Sequence[int], minutes: float, per_answer: float, *, n: int = 96, teacher: int = 64) -> Sizes:
    """The most that fits into so many minutes.

    Args:
        nfes: evaluations of the plans to be found.
        minutes: for all of them.
        per_answer: seconds per sample of an answer (`rate`).
        n: fitting noises of a full search.
        teacher: evaluations of the teacher.

    Raises:
        LogsnrError: if not even the smallest quick search fits; it says how long that takes.
    """

    def seconds(noises: int, rollouts: Sequence[int]) -> float:
        own = teacher * (noises + 2 * max(min(noises, 64), noises // 2))
        return per_answer * (own + sum(r * nfe * noises for r, nfe in zip(rollouts, nfes, strict=True)))

    asked = 60 * minutes
    whole = [EFFORTS["full"].rollouts(nfe) for nfe in nfes]
    if (time := seconds(n, whole)) <= asked:
        return Sizes(effort="full", n=n, rollouts=None, seconds=time)
    # the most rollouts of each that leave the sum within the time
    share = next((k for k in range(max(whole), USEFUL - 1, -1) if seconds(n, [k] * len(nfes)) <= asked), None)
    if share is not None:
        return Sizes(effort="full", n=n, rollouts=share, seconds=seconds(n, [share] * len(nfes)))
    for noises in sorted({n, *FEWER}, reverse=True):
        if noises <= n and (time := seconds(noises, [TYPICAL] * len(nfes))) <= asked:
            return Sizes(effort="quick", n=noises, rollouts=None, seconds=time)
    least = seconds(min(n, FEWER[-1]), [TYPICAL] * len(nfes)) / 60
    raise LogsnrError(
        f"{minutes:g} minutes are too few: the smallest calibration of {', '.join(map(str, nfes))} evaluations takes "
        f"about {least:.3g} at {per_answer * 1e3:.3g} ms per answer; give more, or fewer plans"
    )
