"""The error model, measured: how good a projection a denoiser is at every noise level (2306.04848, sec. 3).

    y = z / alpha,    eta = ||x0(y, sigma) - proj_K(y)|| / dist_K(y),    ratio = sqrt(n) sigma / dist_K(y)

eta is the relative error of the denoiser as a projection on a reference set K; nu = max(ratio, 1/ratio) is how far the
noise level is from the distance it stands for.  Output, projection and distance belong to the same state y: pairing
the output with the state after the step, as the paper's released script does, inflates both.  `theory` turns eta(sigma)
and nu into bounds and schedules.

Without a reference there is `consistency`.  A projection answers the same at every point of the segment from y to
proj_K(y), so x0 is asked again part of the way along its own direction, at the noise level that goes with it.  The
change bounds eta from below; it sees no error that both answers share, such as a posterior mean far from every point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate, noisy
from logsnr.devices import on
from logsnr.noise import alpha_s
from logsnr.projection import ReferenceSet
from logsnr.sampling import Plan, Step, sample
from logsnr.sampling.batches import Cond, chunks

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one ratio is distributed over samples.

    Attributes:
        mean: its mean.
        quantiles: its values at the levels of the curve.
        lowest: its smallest value.
    """

    mean: float
    quantiles: tuple[float, ...]
    lowest: float


@dataclass(frozen=True, kw_only=True)
class LevelError:
    """What was measured at one noise level.

    Attributes:
        sigma: the noise level.
        count: states with finite answers, which the distributions are over.
        non_finite: states where the denoiser's answer had nan or inf.
        on_reference: states that lie on the reference itself, where eta is undefined; not counted.
        eta: relative error of x0 as a projection.
        ratio: sqrt(n) sigma / dist.
        nu: max(ratio, 1 / ratio).
        eps_norm: ||eps_hat|| / sqrt(n), which is 1 / ratio for an exact projection.
    """

    sigma: float
    count: int
    non_finite: int
    on_reference: int
    eta: Spread
    ratio: Spread
    nu: Spread
    eps_norm: Spread


@dataclass(frozen=True, kw_only=True)
class ErrorCurve:
    """eta and nu against the noise level, from noisy to clean.

    Attributes:
        levels: one entry per noise level.
        quantiles: levels of the quantiles in every `Spread`.
    """

    levels: tuple[LevelError, ...]
    quantiles: tuple[float, ...]

    def eta(self, quantile: float = 0.99) -> list[tuple[float, float]]:
        """(sigma, eta) pairs of one quantile, as `theory.admissible_schedule` takes them; empty levels left out.

        Raises:
            ValueError: if that quantile was not measured.
        """
        i = self._at(quantile)
        return [(level.sigma, level.eta.quantiles[i]) for level in self.levels if level.count]

    def nu(self, quantile: float = 0.99) -> float:
        """The largest nu of one quantile over the levels.

        Raises:
            ValueError: if that quantile was not measured.
        """
        i = self._at(quantile)
        return max((level.nu.quantiles[i] for level in self.levels if level.count), default=math.nan)

    def _at(self, quantile: float) -> int:
        if quantile not in self.quantiles:
            raise ValueError(
                f"quantile {quantile} was not measured: choose one of {', '.join(map(str, self.quantiles))}"
            )
        return self.quantiles.index(quantile)


@torch.no_grad()
def relative_error(
    denoiser: Denoiser,
    reference: ReferenceSet,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    generator: torch.Generator,
    chunk: int = 256,
    cond: Cond | None = None,
    quantiles: Sequence[float] = QUANTILES,
    progress: Callable[[int], None] | None = None,
) -> ErrorCurve:
    """eta and nu on forward-noised samples z = alpha x + s eps, one draw of eps per sample, the same at every level.

    Args:
        denoiser: the model.
        reference: the set K, of samples shaped like the denoiser's.
        x: clean samples `[N, *shape]`, better not those of K.
        sigmas: noise levels in (0, inf).
        generator: source of eps.
        chunk: states at a time.
        cond: conditions, one entry per sample.
        quantiles: levels in [0, 1] to report.
        progress: called with the number of levels done, after each.

    Raises:
        ValueError: if x or the reference is of another shape or empty, or a sigma or quantile is out of range.
    """
    _check(denoiser, reference, x, sigmas, quantiles)
    x, cond = on(x, denoiser.device), on(cond or {}, denoiser.device)
    eps = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    levels = []
    for sigma in sorted(sigmas, reverse=True):
        collected = _Collected(reference)
        for part, given in chunks(len(x), chunk, cond):
            z = noisy(x[part], eps[part], sigma)
            collected.add(z, sigma, denoiser(z, sigma, **given))
        levels.append(collected.level(sigma, quantiles))
        if progress is not None:
            progress(len(levels))
    return ErrorCurve(levels=tuple(levels), quantiles=tuple(quantiles))


@torch.no_grad()
def trajectory_error(
    denoiser: Denoiser,
    reference: ReferenceSet,
    plan: Plan,
    *,
    noise: Tensor,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    cond: Cond | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> ErrorCurve:
    """eta and nu at the states that a plan visits, each with the answer that the plan got there.

    Args:
        denoiser: the model.
        reference: the set K, of samples shaped like the denoiser's.
        plan: what to run; its first sigma must be finite.
        noise: starting states `[N, *shape]`.
        chunk: trajectories at a time.
        generator: source of noise, if the plan draws any.
        cond: conditions, one entry per sample.
        quantiles: levels in [0, 1] to report.

    Raises:
        ValueError: if noise or the reference is of another shape or empty, or the plan starts at sigma inf.
    """
    sigmas = plan.sigmas[:-1]
    _check(denoiser, reference, noise, sigmas, quantiles)
    collected = [_Collected(reference) for _ in sigmas]

    def record(step: Step) -> None:
        if step.estimate is not None:
            collected[step.index].add(step.z, step.sigma, step.estimate)

    sample(denoiser, plan, noise=noise, generator=generator, cond=cond, chunk=chunk, callback=record, check=False)
    levels = tuple(c.level(sigma, quantiles) for c, sigma in zip(collected, sigmas, strict=True))
    return ErrorCurve(levels=levels, quantiles=tuple(quantiles))


@dataclass(frozen=True, kw_only=True)
class LevelConsistency:
    """What a denoiser says of itself at one noise level.

    Attributes:
        sigma: the noise level.
        count: states with finite answers.
        non_finite: states where an answer had nan or inf.
        change: ||x0(y', fraction sigma) - x0(y, sigma)|| / ||y - x0(y, sigma)||, y' the DDIM step from y.
        eta_floor: change / (1 + fraction): no (eta, nu)-approximate projection on any set that both states project
            to alike has a smaller eta.
        eps_norm: ||eps_hat|| / sqrt(n).
    """

    sigma: float
    count: int
    non_finite: int
    change: Spread
    eta_floor: Spread
    eps_norm: Spread


@torch.no_grad()
def consistency(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    generator: torch.Generator,
    fraction: float = 0.5,
    chunk: int = 256,
    cond: Cond | None = None,
    quantiles: Sequence[float] = QUANTILES,
) -> tuple[LevelConsistency, ...]:
    """Whether x0 stays put along its own direction: denoise, step to `fraction` sigma, denoise again.

    With dist the distance of y, both answers within eta of one projection p: the second state is within
    fraction dist (1 + eta (1 - fraction)/fraction) of p, so ||change|| <= eta dist (1 + fraction + eta (1 - fraction)),
    and ||y - x0|| >= (1 - eta) dist; to first order in eta the relative change is at most eta (1 + fraction).

    Args:
        denoiser: the model.
        x: clean samples `[N, *shape]`.
        sigmas: noise levels in (0, inf).
        generator: source of eps.
        fraction: of sigma, in (0, 1), where to ask again.
        chunk: states at a time.
        cond: conditions, one entry per sample.
        quantiles: levels in [0, 1] to report.

    Raises:
        ValueError: if x is of another shape or empty, or a value is out of range.
    """
    _check(denoiser, None, x, sigmas, quantiles)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction = {fraction}: must be in (0, 1); a half asks again at half the noise level")
    x, cond = on(x, denoiser.device), on(cond or {}, denoiser.device)
    eps = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    out = []
    for sigma in sorted(sigmas, reverse=True):
        low = fraction * sigma
        (_, s), (alpha_, s_) = alpha_s(sigma), alpha_s(low)
        changes, norms, lost = [], [], 0
        for part, given in chunks(len(x), chunk, cond):
            z = noisy(x[part], eps[part], sigma)
            first: Estimate = denoiser(z, sigma, **given)
            x0 = first.x0
            again: Estimate = denoiser((s_ / s) * z + (alpha_ * (1 - fraction)) * x0, low, **given)
            norm = first.eps.flatten(1).double().norm(dim=1)
            change = (again.x0 - x0).flatten(1).double().norm(dim=1) / (sigma * norm)
            good = change.isfinite() & norm.isfinite()
            lost += int((~good).sum())
            changes.append(change[good])
            norms.append(norm[good] / math.sqrt(denoiser.dim))
        change, norm = torch.cat(changes), torch.cat(norms)
        out.append(
            LevelConsistency(
                sigma=sigma,
                count=len(change),
                non_finite=lost,
                change=_spread(change, quantiles),
                eta_floor=_spread(change / (1 + fraction), quantiles),
                eps_norm=_spread(norm, quantiles),
            )
        )
    return tuple(out)


class _Collected:
    """The ratios of one noise level, chunk after chunk."""

    def __init__(self, reference: ReferenceSet) -> None:
        self.reference = reference
        self.rows: list[Tensor] = []
        self.non_finite = 0
        self.on_reference = 0

    def add(self, z: Tensor, sigma: float, estimate: Estimate) -> None:
        alpha, _ = alpha_s(sigma)
        n = math.prod(self.reference.shape)
        # In float64 all the way: at low noise, dist is small against y.
        y = (z.double() / alpha).reshape(len(z), *self.reference.shape)
        nearest = self.reference.project(y).flatten(1)
        distance = (y.flatten(1) - nearest).norm(dim=1)
        x0, eps = estimate.x0.flatten(1).double(), estimate.eps.flatten(1).double()
        finite = (x0.isfinite() & eps.isfinite()).all(1) & distance.isfinite()
        apart = distance > 0
        self.non_finite += int((~finite).sum())
        self.on_reference += int((finite & ~apart).sum())
        keep = finite & apart
        eta = (x0 - nearest).norm(dim=1) / distance
        rows = torch.stack([eta, sigma * math.sqrt(n) / distance, eps.norm(dim=1) / math.sqrt(n)])
        self.rows.append(rows[:, keep])

    def level(self, sigma: float, quantiles: Sequence[float]) -> LevelError:
        eta, ratio, norm = torch.cat(self.rows, 1)
        return LevelError(
            sigma=sigma,
            count=len(eta),
            non_finite=self.non_finite,
            on_reference=self.on_reference,
            eta=_spread(eta, quantiles),
            ratio=_spread(ratio, quantiles),
            nu=_spread(torch.maximum(ratio, 1 / ratio), quantiles),
            eps_norm=_spread(norm, quantiles),
        )


def _spread(values: Tensor, quantiles: Sequence[float]) -> Spread:
    if not len(values):
        return Spread(mean=math.nan, quantiles=(math.nan,) * len(quantiles), lowest=math.nan)
    ordered = values.sort().values
    # Linear interpolation; torch.quantile refuses more than 2^24 values.
    at = [q * (len(ordered) - 1) for q in quantiles]
    found = tuple(float(ordered[int(t)].lerp(ordered[min(int(t) + 1, len(ordered) - 1)], t % 1)) for t in at)
    return Spread(mean=float(values.mean()), quantiles=found, lowest=float(ordered[0]))


def _check(
    denoiser: Denoiser, reference: ReferenceSet | None, x: Tensor, sigmas: Sequence[float], quantiles: Sequence[float]
) -> None:
    shape = tuple(denoiser.shape)
    if tuple(x.shape[1:]) != shape or not len(x) or x.ndim != len(shape) + 1:
        raise ValueError(f"samples of shape {tuple(x.shape)}: give [N, {', '.join(map(str, shape))}] with N >= 1")
    if reference is not None and math.prod(reference.shape) != math.prod(shape):
        raise ValueError(
            f"a reference of samples {reference.shape} for a denoiser of samples {shape}: encode the reference as the "
            "denoiser's data are, in its units and shape"
        )
    if not sigmas:
        raise ValueError("no sigmas: give at least one noise level")
    for sigma in sigmas:
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma = {sigma}: a relative error needs it in (0, inf); use denoiser.sampling_range")
    for q in quantiles:
        if not 0 <= q <= 1:
            raise ValueError(f"quantile {q}: must be in [0, 1]")
