"""The probe: between which noise levels a network's answers are of use, from a few hundred evaluations, without data.

x are a dozen samples of the model itself, y = x + sigma eps, and a network knows something of x where its x0 beats
what needs no network:

    high    E|x0 - x|^2 <= V + sigma_data^2    V, the error of their mean, is the most that an ideal denoiser errs;
                                               beyond that it may err as much as data vary
    low     |eps_hat - eps|^2 <= 1.1 |eps|^2   x0 is as near to x as y itself is; median over the samples

An eps network that is off by .03 at sigma 158 is off by 5 in x0 there: beyond `high` a run goes astray in its first
step.  A network that predicts x0 to within .04 makes noise of what it is given below sigma .03: below `low` it should
not be asked.  Both errors are taken to grow towards the ends of the range, so that bisection finds where.

The samples are drawn by DDPM, whose fresh noise mends what a poor first level did, in few steps from the largest level
whose answers to a dozen noises vary no more than data do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, noisy
from logsnr.errors import LogsnrError
from logsnr.sampling.batches import Cond, ask, chunks, in_turn
from logsnr.sampling.counted import Counted
from logsnr.sampling.grids import flow_range
from logsnr.sampling.loop import Step, sample
from logsnr.sampling.plan import Plan
from logsnr.sampling.solvers import ddpm
from logsnr.sampling.start import conditions_of, start

SAMPLES = 12
STEPS = 12
"""Of DDPM, for each of the samples."""
HIGH_LIMIT = 1.0
"""Of (E|x0 - x|^2 - V) / sigma_data^2: an ideal denoiser's is at most 0."""
LOW_LIMIT = 1.1
"""Of |eps_hat - eps|^2 / |eps|^2: an ideal denoiser's is below 1 on average, hardly so where the noise is faint."""
NEAR = 1.35
"""Ratio of levels at which bisection ends."""

End = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class ProbedLevel:
    """What was measured at one level.

    Attributes:
        sigma: the noise level.
        end: which end of the range it was asked for.
        error: (E|x0 - x|^2 - V) / sigma_data^2 for the high end, |eps_hat - eps|^2 / |eps|^2 for the low one.
        good: whether it is within its limit.
    """

    sigma: float
    end: End
    error: float
    good: bool


@dataclass(frozen=True, kw_only=True, repr=False)
class Probe:
    """Between which levels a network is of use.

    Attributes:
        low: smallest noise level to ask it at.
        high: largest.
        inside: (smallest, largest) level that was allowed.
        evidence: what was measured, from noisy to clean.
        evaluations: network evaluations of single samples that it took.
        seed: of the draws.
    """

    low: float
    high: float
    inside: tuple[float, float]
    evidence: tuple[ProbedLevel, ...]
    evaluations: int
    seed: int

    def __repr__(self) -> str:
        least, most = self.inside
        found = "all" if self.sigma_range == self.inside else f"sigma {self.low:.3g} ... {self.high:.3g}"
        return f"Probe({found} of sigma {least:.3g} ... {most:.3g}, {self.evaluations} evaluations, seed {self.seed})"

    @property
    def sigma_range(self) -> tuple[float, float]:
        """(low, high), as `calibrate`, grids and `examine` take it."""
        return self.low, self.high


@torch.no_grad()
def probe(
    denoiser: Denoiser,
    *,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    seed: int = 0,
    sigma_range: tuple[float, float] | None = None,
    chunk: int | None = None,
) -> Probe:
    """Find where a network's answers stop being of use, at both ends of its range: 200 to 400 evaluations, no data.

    Args:
        denoiser: the model.
        cond: conditions by keyword; rows of tensors are used in turn.
        generator: source of the seed; or
        seed: the seed itself.
        sigma_range: (smallest, largest) level to look between; None for the denoiser's `sampling_range`.
        chunk: samples per call of the denoiser; None for all twelve.

    Raises:
        LogsnrError: if the range leaves what the denoiser was trained on, conditions do not fit, its samples are not
            finite, or no level is good.
    """
    low, high = denoiser.sampling_range if sigma_range is None else sigma_range
    if not (0 < low < high < math.inf and denoiser.covers(low, high)):
        raise LogsnrError(
            f"sigma_range = ({low:.6g}, {high:.6g}): needs 0 < smallest < largest within "
            "[{:.6g}, {:.6g}], where the denoiser was trained".format(*denoiser.trained_range)
        )
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    counted, unit, evidence = Counted(denoiser), denoiser.sigma_data, list[ProbedLevel]()
    given = conditions_of(denoiser, in_turn(cond, torch.arange(SAMPLES)), SAMPLES)
    source = torch.Generator().manual_seed(seed)
    first, eps = (start(denoiser, None, SAMPLES, source) for _ in range(2))
    pivot = unit if low < unit < high else math.sqrt(low * high)

    def steady(sigma: float) -> bool:
        x0 = ask(counted, noisy(torch.zeros_like(first), first, sigma), sigma, given, chunk).x0
        return float(x0.double().var(0).mean()) <= unit**2

    begin = _last_good(steady, high, pivot)
    grid = flow_range(STEPS, begin, low, shift=unit)
    x = _drawn(counted, ddpm(grid), first, source, given, chunk)
    if not bool(x.isfinite().all()):
        raise LogsnrError(f"the model's samples from sigma {begin:.4g} are not finite: run it in float32, or check it")
    variance = x.double().var(0).mean()

    def good(sigma: float, end: End) -> bool:
        estimate = ask(counted, noisy(x, eps, sigma), sigma, given, chunk)
        if end == "high":
            error, limit = (_squares(estimate.x0 - x).mean() - variance) / unit**2, HIGH_LIMIT
        else:
            error, limit = (_squares(estimate.eps - eps) / _squares(eps)).median(), LOW_LIMIT
        evidence.append(ProbedLevel(sigma=sigma, end=end, error=float(error), good=float(error) <= limit))
        return evidence[-1].good

    top = _last_good(lambda sigma: good(sigma, "high"), high, pivot)
    bottom = _last_good(lambda sigma: good(sigma, "low"), low, pivot)
    sound = (top > pivot or good(pivot, "high")) and (bottom < pivot or good(pivot, "low"))
    if not (sound and bottom < top):
        raise LogsnrError(
            f"no level of sigma {low:.4g} ... {high:.4g} is good on both sides of {pivot:.3g}: the network knows "
            "nothing of what it draws; is it trained, and is sigma_data the data's standard deviation?"
        )
    return Probe(
        low=bottom,
        high=top,
        inside=(low, high),
        evidence=tuple(sorted(evidence, key=lambda level: -level.sigma)),
        evaluations=counted.passes,
        seed=seed,
    )


def _drawn(
    denoiser: Denoiser, plan: Plan, noise: Tensor, source: torch.Generator, cond: Cond, chunk: int | None
) -> Tensor:
    """Samples: the x0 of the last level before one where x0 moves further than the noise of the level before it was.

    E|x0' - x0|^2 <= E|x - x0|^2 <= D sigma^2 for an ideal denoiser's answers x0 at sigma and then x0' below it: what
    moves further is made up, and no sample to measure by.
    """
    drawn = []
    for part, given in chunks(len(noise), chunk or len(noise), cond):
        kept: list[tuple[Tensor, float]] = []

        def see(step: Step, kept: list[tuple[Tensor, float]] = kept) -> None:
            if step.estimate is None or (kept and kept[-1][1] == 0):
                return
            x0 = step.estimate.x0
            moved = bool(kept) and float(_squares(x0 - kept[-1][0]).median()) > kept[-1][1] ** 2
            kept[:] = [(kept[-1][0], 0.0) if moved else (x0, step.sigma)]

        sample(denoiser, plan, noise=noise[part], generator=source, cond=given, callback=see, check=False)
        drawn.append(kept[-1][0])
    return torch.cat(drawn)


def _last_good(good: Callable[[float], bool], edge: float, inner: float) -> float:
    """The good level nearest to the edge, by bisection in ln sigma from an inner one that is taken to be good."""
    if good(edge):
        return edge
    while max(edge / inner, inner / edge) > NEAR:
        middle = math.sqrt(edge * inner)
        edge, inner = (edge, middle) if good(middle) else (middle, inner)
    return inner


def _squares(t: Tensor) -> Tensor:
    """Mean squares of each sample `[B]`."""
    return t.double().flatten(1).square().mean(1)
