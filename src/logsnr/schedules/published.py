"""Schedules: how noise levels are drawn in training, or spaced in sampling.

| schedule           | lambda = f(t)                                          | p(lambda)                       |
|--------------------|--------------------------------------------------------|---------------------------------|
| Cosine, CosMap     | -2 ln tan(pi t/2) + shift                              | sech((lambda - shift)/2)/(2 pi) |
| FlowUniform        | 2 ln((1 - t)/t) - 2 ln a                               | sech^2(lambda/4 + ln(a)/2)/8    |
| EDMTraining        | -2 (p_mean + p_std Phi^-1(t))                          | N(-2 p_mean, (2 p_std)^2)       |
| LogitNormal        | -2 (m + s Phi^-1(t))                                   | N(-2 m, (2 s)^2)                |
| Linear             | lambda_max + (lambda_min - lambda_max) t               | 1/(lambda_max - lambda_min)     |
| EDMSampling        | -2 rho ln(max^(1/rho) + (1-t)(min^(1/rho)-max^(1/rho)))| ~ exp(-lambda/(2 rho))          |
| VPLinear           | -ln(e^B - 1), B = offset + b0 t + (b1 - b0) t^2/2      | sigmoid(-lambda)/beta(t)        |
| InterpolatedCosine | -2 ln tan(pi t/2) + (1 - t) s_high + t s_low           | numeric                         |
| Discrete           | ln sigma linear between the levels of a table          | piecewise constant              |

What a schedule can do (draw, truncate, lay out a grid) is in base.py.  A shift moves the law along lambda; truncating a
shifted schedule to [lo, hi] therefore equals truncating the plain one to [lo - shift, hi - shift].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.schedules.base import (
    Method,
    Schedule,
    Truncated,
    Unbounded,
    float64,
    log_normal,
    log_sech,
    require_positive,
)
from logsnr.timesteps import TimestepTable

__all__ = [
    "CosMap",
    "Cosine",
    "Discrete",
    "EDMSampling",
    "EDMTraining",
    "FlowUniform",
    "InterpolatedCosine",
    "Linear",
    "LogitNormal",
    "Method",
    "Schedule",
    "Truncated",
    "VPLinear",
]


@dataclass(frozen=True)
class Cosine(Unbounded):
    """lambda = -2 ln tan(pi t / 2) + shift, p = sech((lambda - shift)/2) / (2 pi) (2102.09672; 2303.00848).

    Args:
        shift: 2 ln(64 / resolution) is simple diffusion's for images larger than 64 (2301.11093).
    """

    shift: float = 0.0

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        x = 0.5 * (logsnr - self.shift)
        return torch.atan(torch.exp(-x)) * (2 / math.pi), torch.atan(torch.exp(x)) * (2 / math.pi)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        tail = -2 * torch.tan(0.5 * math.pi * torch.where(t <= c, t, c)).log()
        return self.shift + torch.where(t <= c, tail, -tail)

    def _log_density(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * (logsnr - self.shift)) - math.log(2 * math.pi)


@dataclass(frozen=True)
class CosMap(Cosine):
    """SD3's cosmap, flow time 1 - 1/(tan(pi t / 2) + 1): sigma = tan(pi t / 2), the cosine law (2403.03206)."""

    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.shift != 0:
            raise ValueError(f"shift = {self.shift}: cosmap has none; use Cosine(shift)")


@dataclass(frozen=True)
class FlowUniform(Unbounded):
    """Uniform time of the flow path, lambda = 2 ln((1 - t)/t) - 2 ln shift, a logistic law (2209.03003).

    Args:
        shift: a > 0 moves flow time to a t / (1 + (a - 1) t), as SD3 does for larger images (2403.03206, eq. 23).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, shift=self.shift)

    def _standard(self, logsnr: Tensor) -> Tensor:
        return 0.5 * logsnr + math.log(self.shift)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        x = self._standard(logsnr)
        return torch.sigmoid(-x), torch.sigmoid(x)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        return 2 * (c.log() - t.log() - math.log(self.shift))

    def _log_density(self, logsnr: Tensor) -> Tensor:
        return 2 * log_sech(0.5 * self._standard(logsnr)) - math.log(8)


class _Normal(Unbounded):
    """lambda ~ N(-2 mean, (2 std)^2), that is ln sigma ~ N(mean, std^2)."""

    @property
    @abstractmethod
    def _log_sigma(self) -> tuple[float, float]:
        """(mean, std) of ln sigma."""

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._log_sigma
        x = (0.5 * logsnr + mean) / (std * math.sqrt(2))
        return 0.5 * torch.erfc(x), 0.5 * torch.erfc(-x)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        mean, std = self._log_sigma
        tail = torch.special.ndtri(torch.where(t <= c, t, c))
        return -2 * (mean + std * torch.where(t <= c, tail, -tail))

    def _log_density(self, logsnr: Tensor) -> Tensor:
        mean, std = self._log_sigma
        return log_normal(logsnr, -2 * mean, 2 * std)


@dataclass(frozen=True)
class EDMTraining(_Normal):
    """EDM's training noise, ln sigma ~ N(p_mean, p_std^2) (2206.00364, table 1; EDM2: -0.4, 1.0)."""

    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        require_positive(self, p_std=self.p_std)

    @property
    def _log_sigma(self) -> tuple[float, float]:
        return self.p_mean, self.p_std


@dataclass(frozen=True)
class LogitNormal(_Normal):
    """SD3's logit-normal flow time, logit t ~ N(m, s^2), which is ln sigma (2403.03206, sec. 3.1)."""

    m: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, s=self.s)

    @property
    def _log_sigma(self) -> tuple[float, float]:
        return self.m, self.s


@dataclass(frozen=True)
class Linear(Schedule):
    """Uniform in log-SNR: VDM's linear gamma, and NCSN's geometric sigmas (2107.00630)."""

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise ValueError(f"{self!r}: the two ends must be finite and increase")

    @property
    def range(self) -> tuple[float, float]:
        return self.logsnr_min, self.logsnr_max

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        width = self.logsnr_max - self.logsnr_min
        return (self.logsnr_max - logsnr) / width, (logsnr - self.logsnr_min) / width

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        return self.logsnr_min * t + self.logsnr_max * c

    def _log_density(self, logsnr: Tensor) -> Tensor:
        return torch.full_like(logsnr, -math.log(self.logsnr_max - self.logsnr_min))


@dataclass(frozen=True)
class EDMSampling(Schedule):
    """EDM's sampling levels, sigma^(1/rho) linear in t: p ~ exp(-lambda / (2 rho)) (2206.00364, eq. 5)."""

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_positive(self, rho=self.rho, sigma_min=self.sigma_min)
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"{self!r}: sigma_max must be finite and above sigma_min")

    @property
    def range(self) -> tuple[float, float]:
        return -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (lo, hi) = self._roots, self.range
        x = 1 / (2 * self.rho)
        return torch.expm1((hi - logsnr) * x) * (a / (b - a)), -torch.expm1((lo - logsnr) * x) * (b / (b - a))

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        a, b = self._roots
        return -2 * self.rho * (a * c + b * t).log()

    def _log_density(self, logsnr: Tensor) -> Tensor:
        a, b = self._roots
        return -logsnr / (2 * self.rho) - math.log(2 * self.rho * (b - a))


@dataclass(frozen=True)
class VPLinear(Schedule):
    """The VP-SDE with beta(t) = b0 + (b1 - b0) t: lambda = -ln(e^B - 1), B = offset + b0 t + (b1 - b0) t^2/2.

    (2011.13456.)  `VPLinear(0, 20, offset=1e-4)` is the fit of DDPM's betas that VDM and its descendants use.

    Args:
        b0: beta at t = 0.
        b1: beta at t = 1.
        offset: B at t = 0; the cleanest level is -ln(e^offset - 1).
    """

    b0: float = 0.1
    b1: float = 20.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.b0 <= self.b1 < math.inf or self.b1 == 0 or not 0 <= self.offset < math.inf:
            raise ValueError(f"{self!r}: need 0 <= b0 <= b1, 0 < b1 < inf and 0 <= offset < inf")

    @cached_property
    def range(self) -> tuple[float, float]:
        ends = (float(self._quantile(float64(t), float64(1 - t))) for t in (1.0, 0.0))
        return next(ends), next(ends) if self.offset > 0 else math.inf

    def beta_integral(self, t: Tensor) -> Tensor:
        """b0 t + (b1 - b0) t^2/2, which is B less its offset; of any t >= 0."""
        return t * (self.b0 + 0.5 * (self.b1 - self.b0) * t)

    def beta_time(self, integral: Tensor) -> Tensor:
        """The inverse of `beta_integral`, without cancellation."""
        root = (self.b0**2 + 2 * (self.b1 - self.b0) * integral).sqrt()
        return torch.where(integral > 0, 2 * integral / (self.b0 + root), 0.0)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        t = self.beta_time((F.softplus(-logsnr, threshold=1e6) - self.offset).clamp(min=0))
        return t.clamp(0, 1), (1 - t).clamp(0, 1)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        B = self.offset + self.beta_integral(t)
        return -B - (-torch.expm1(-B)).log()

    def _log_density(self, logsnr: Tensor) -> Tensor:
        beta = self.b0 + (self.b1 - self.b0) * self._tails(logsnr)[0]
        return F.logsigmoid(-logsnr) - beta.log()


@dataclass(frozen=True)
class InterpolatedCosine(Unbounded):
    """Simple diffusion's blend of two shifted cosines: `noise_low` rules the noisy end.

        lambda = -2 ln tan(pi t / 2) + (1 - t) s_high + t s_low,    s = 2 ln(noise / image)    (2301.11093)

    Args:
        noise_low: resolution whose noise the noisy end has.
        noise_high: resolution whose noise the clean end has.
        image: resolution of the images.

    Raises:
        ValueError: if a resolution is not positive, or log-SNR would not decrease (noise_low > 23 noise_high).
    """

    noise_low: float
    noise_high: float
    image: float

    def __post_init__(self) -> None:
        require_positive(self, noise_low=self.noise_low, noise_high=self.noise_high, image=self.image)
        if self._tilt >= 2 * math.pi:
            raise ValueError(f"{self!r}: noise_low must be below e^pi noise_high, or log-SNR rises with time")

    @property
    def _tilt(self) -> float:
        return 2 * math.log(self.noise_low / self.noise_high)

    @property
    def _offset(self) -> float:
        return 2 * math.log(self.noise_high / self.image)

    def _cosine(self, logsnr: Tensor) -> Tensor:
        """The plain cosine log-SNR g with the same time: g + tilt t(g) = logsnr - offset, by bisection and Newton."""
        goal = logsnr - self._offset
        lo, hi = goal - max(self._tilt, 0), goal - min(self._tilt, 0)
        cosine = Cosine()
        for _ in range(40):
            mid = 0.5 * (lo + hi)
            below = mid + self._tilt * cosine._tails(mid)[0] < goal
            lo, hi = torch.where(below, mid, lo), torch.where(below, hi, mid)
        g = 0.5 * (lo + hi)
        for _ in range(2):
            slope = 1 - self._tilt * cosine._log_density(g).exp()
            step = (g + self._tilt * cosine._tails(g)[0] - goal) / slope
            g = g - torch.where(step.isfinite(), step, 0.0)
        return g

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return Cosine()._tails(self._cosine(logsnr))

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        return Cosine()._quantile(t, c) + self._offset + self._tilt * t

    def _log_density(self, logsnr: Tensor) -> Tensor:
        log_p = Cosine()._log_density(self._cosine(logsnr))
        return log_p - torch.log1p(-self._tilt * log_p.exp())


@dataclass(frozen=True)
class Discrete(Schedule):
    """A `TimestepTable` as a schedule: timestep t (T - 1), ln sigma linear in between, so p is piecewise constant.

    The last segment of a zero-terminal-SNR table is linear in 1/sigma: p = exp((lambda - lambda_T-2)/2) / (2 (T - 1)).
    """

    table: TimestepTable

    @cached_property
    def _edges(self) -> Tensor:
        """The T log-SNRs of the table, decreasing."""
        return -2 * self.table.sigmas.log()

    @property
    def range(self) -> tuple[float, float]:
        return float(self._edges[-1]), float(self._edges[0])

    def _segment(self, logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(index, upper end, lower end) of the segment that holds each log-SNR."""
        edges = self._edges.to(logsnr.device)
        i = torch.searchsorted(-edges, -logsnr, right=True).sub(1).clamp(0, len(edges) - 2)
        return i, edges[i], edges[i + 1]

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        i, upper, lower = self._segment(logsnr)
        left = torch.where(lower.isinf(), (0.5 * (logsnr - upper)).exp(), (logsnr - lower) / (upper - lower))
        n = len(self.table) - 1
        return (i + (1 - left)) / n, (n - 1 - i + left) / n

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        n = len(self.table) - 1
        i = (t * n).floor().clamp(0, n - 1)
        # Both distances to the ends of the segment, from whichever of t and c is small.
        frac = torch.where(t < c, t * n - i, 1 - (c * n - (n - 1 - i))).clamp(0, 1)
        left = torch.where(t < c, 1 - frac, c * n - (n - 1 - i)).clamp(0, 1)
        edges = self._edges.to(t.device)
        upper, lower = edges[i.long()], edges[i.long() + 1]
        return torch.where(lower.isinf(), upper + 2 * left.log(), upper * left + lower * frac)

    def _log_density(self, logsnr: Tensor) -> Tensor:
        _, upper, lower = self._segment(logsnr)
        inner = torch.where(lower.isinf(), 0.5 * (logsnr - upper) - math.log(2), -(upper - lower).log())
        return inner - math.log(len(self.table) - 1)
