"""Level by level: the loss, beside what a straight line can do, and the calibration of the model's own numbers.

Two yardsticks need no second model.  An ideal denoiser is the least-squares estimate, so its error is orthogonal to
its answer, E||eps_hat||^2 = E||eps||^2 - E||eps_hat - eps||^2; and it is never worse than the best linear one,

    x0 = m + alpha C (alpha^2 C + s^2)^-1 (z - alpha m),    m, C the mean and covariance of the data,

here fitted to samples that are not those it is judged on: whatever the fit, an ideal denoiser does better on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, noisy
from logsnr.evaluation.passport.card import Level, Start
from logsnr.evaluation.passport.meter import Meter, Samples
from logsnr.noise import alpha_s

MOST_DIRECTIONS = 1024
"""Principal directions of the linear denoiser; the rest of the space shares one variance."""
MOST_FITTED = 2048
"""Samples that the linear denoiser is fitted to."""
SHRINK = 8
"""Weight, in samples, of the training part's own variances where they are measured again on fresh samples."""


@dataclass(frozen=True)
class Linear:
    """The best linear denoiser of a mean and a covariance in principal directions.

    Attributes:
        mean: `[D]`.
        axes: orthonormal `[D, R]`.
        variances: along them `[R]`.
        rest: variance of every other direction.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor
    rest: float

    def x0(self, y: Tensor, sigma: float) -> Tensor:
        """E[x | y = x + sigma eps] of a Gaussian with these moments, for y `[B, D]`."""
        centred = y - self.mean
        gain = self.variances / (self.variances + sigma * sigma)
        other = self.rest / (self.rest + sigma * sigma)
        inside = centred @ self.axes
        return self.mean + other * centred + (inside * (gain - other)) @ self.axes.T


def fit_linear(x: Tensor) -> Linear:
    """Moments of samples `[M, *shape]`: directions from four fifths, the variances along them from the others too.

    Variances along principal directions are too large on the samples that chose the directions, and on few fresh ones
    they are noisy: each is the mean over the fresh ones and `SHRINK` samples' worth of the first estimate.
    """
    flat = x[:MOST_FITTED].flatten(1).float()
    m, d = flat.shape
    mean = flat.mean(0)
    cut = max(m - max(m // 5, 1), 1)
    chosen, fresh = flat[:cut] - mean, flat[cut:] - mean
    _, values, directions = torch.linalg.svd(chosen, full_matrices=False)
    rank = min(cut - 1, d, MOST_DIRECTIONS)
    axes = directions[:rank].T
    first = values[:rank].square() / cut
    along = fresh @ axes
    variances = (along.square().sum(0) + SHRINK * first) / (len(fresh) + SHRINK)
    rest = 0.0
    if rank < d:
        left = fresh.square().sum() - along.square().sum()
        rest = float(left.clamp(min=0)) / max(len(fresh), 1) / (d - rank)
    return Linear(mean, axes, variances, rest)


def level_grid(low: float, high: float, n: int, trained: tuple[float, float]) -> list[tuple[float, bool]]:
    """n geometric levels from high to low, and one beyond each end where the model says it was not trained."""
    step = (high / low) ** (1 / (n - 1))
    inside = [(high * (low / high) ** (i / (n - 1)), True) for i in range(n)]
    above = [(high * step, False)] if high >= trained[1] else []
    below = [(low / step, False)] if low <= trained[0] and low > 0 else []
    return [*above, *inside, *below]


@torch.no_grad()
def measure_level(
    meter: Meter,
    denoiser: Denoiser,
    samples: Samples,
    sigma: float,
    trained: bool,
    linear: Linear,
    mean: Tensor,
    chunk: int,
) -> Level:
    """One level's numbers, of the metered model or another guise of it."""
    dim, sigma_data = denoiser.dim, denoiser.sigma_data
    columns: list[Tensor] = []
    shift, count = torch.zeros(dim, dtype=torch.float64), 0
    lost, spread = 0, 0.0
    beta = sigma_data**2 / (sigma_data**2 + sigma**2)
    for part in samples.chunks(chunk):
        z = noisy(part.x, part.eps, sigma)
        estimate = meter.ask(denoiser, z, sigma, part.cond)
        x, drawn, x0, eps = (t.flatten(1).double().cpu() for t in (part.x, part.eps, estimate.x0, estimate.eps))
        y = x + sigma * drawn
        finite = x0.isfinite().all(1) & eps.isfinite().all(1)
        lost += int((~finite).sum())
        # Of the two equal forms of the error, the one that cancels less.
        error = eps - drawn if sigma < sigma_data else (x0 - x) / sigma
        other = (linear.x0(y.float(), sigma).double() - x) / sigma
        rows = torch.stack([t.square().sum(1) for t in (error, other, eps, drawn)]) / dim
        columns.append(rows[:, finite])
        # beta x + (1 - beta) m has the mean of x and follows x0: the difference of means is seen through less noise.
        apart = (x0 - beta * x - (1 - beta) * mean)[finite]
        shift += apart.sum(0)
        spread += float(apart.square().sum())
        count += int(finite.sum())
    error, other, norm, drawn = torch.cat(columns, 1)
    if count < 2:
        nan = math.nan
        return Level(
            sigma=sigma, trained=trained, loss=nan, stderr=nan, linear=nan, ratio=nan, ratio_stderr=nan,
            eps_norm=nan, eps_norm_ideal=nan, bias=nan, non_finite=lost,
        )  # fmt: skip
    ratio = float(error.mean() / other.mean())
    squared = float((shift / count).square().sum())
    noise = (spread - count * squared) / (count - 1) / count
    return Level(
        sigma=sigma,
        trained=trained,
        loss=float(error.mean()),
        stderr=float(error.std() / math.sqrt(count)),
        linear=float(other.mean()),
        ratio=ratio,
        ratio_stderr=float((error - ratio * other).std() / other.mean()) / math.sqrt(count),
        eps_norm=float(norm.mean()),
        eps_norm_ideal=float((drawn - error).mean()),
        bias=math.sqrt(max(squared - noise, 0) / dim) / sigma_data,
        non_finite=lost,
    )


def start_kl(linear: Linear, count: int, sigma: float) -> tuple[float, float]:
    """How far pure noise is from the states of the data at a noise level, in nats; and ||m||^2.

    With Gaussian moments: the states z = alpha x + s eps have mean alpha m and variances v = 1 + alpha^2 (lambda - 1);
    KL(N(alpha m, v) || N(0, 1)) = 1/2 sum (v - 1 - ln v) + 1/2 alpha^2 ||m||^2.
    """
    alpha, _ = alpha_s(sigma)
    variances, times = _spectrum(linear)
    # ||m||^2 of `count` samples is too large by the trace over count.
    mean = max(float(linear.mean.double().square().sum()) - float((variances * times).sum()) / max(count, 1), 0.0)
    extra = alpha * alpha * (variances - 1)
    return 0.5 * float(((extra - extra.log1p()) * times).sum()) + 0.5 * alpha * alpha * mean, mean


def least_start(linear: Linear, count: int, kl: float) -> float:
    """The smallest sigma from which on pure noise is within `kl` nats of the states, to a thousandth."""
    low, high = 1e-3, 1e6
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if start_kl(linear, count, middle)[0] <= kl else (middle, high)
    return high


def _spectrum(linear: Linear) -> tuple[Tensor, Tensor]:
    """All variances of the linear denoiser, and how many directions have each."""
    d, rank = linear.axes.shape
    variances = torch.cat([linear.variances.double(), torch.tensor([linear.rest], dtype=torch.float64)])
    times = torch.cat([torch.ones(rank, dtype=torch.float64), torch.tensor([d - rank], dtype=torch.float64)])
    return variances, times


def start_from_noise(linear: Linear, count: int, sigma: float, drawn: Tensor | None) -> Start:
    """How far pure noise is from the states of the data at the largest noise level.

    Args:
        linear: moments of the data.
        count: samples they come from.
        sigma: the largest noise level.
        drawn: samples from pure noise `[K, D]`, None where there are none.
    """
    kl, mean = start_kl(linear, count, sigma)
    variances, _ = _spectrum(linear)
    shift = error = math.nan
    length = float(linear.mean.double().norm())
    if drawn is not None and len(drawn) > 1 and length > 0:
        along = linear.mean.double() / length
        inside = linear.axes.double().T @ along
        variance = float((inside.square() * linear.variances.double()).sum())
        variance += linear.rest * max(1 - float(inside.square().sum()), 0.0)
        if variance > 0:
            projected = (drawn.double() @ along - length) / math.sqrt(variance)
            shift = float(projected.mean())
            error = math.sqrt(float(projected.var()) / len(drawn) + 1 / max(count, 1))
    return Start(
        sigma=sigma,
        mean_leak=math.sqrt(mean) / sigma,
        variance_leak=float(variances.max()) / sigma**2,
        kl=kl,
        mean_shift=shift,
        mean_shift_stderr=error,
    )
