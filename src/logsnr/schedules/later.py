"""Densities that later papers draw noise levels from: Laplace in log-SNR, and flow times that are no logit-normal.

| schedule | law                                                | p(lambda)                                      |
|----------|----------------------------------------------------|------------------------------------------------|
| Laplace  | lambda ~ Laplace(mu, b)                            | exp(-|lambda - mu|/b)/(2 b)                    |
| FlowMode | flow time t - s (sin^2(pi t/2) - t), t uniform     | (tau (1 - tau)/2)/(1 + s - s (pi/2) sin(pi t)) |
| FlowBeta | flow time tau ~ Beta(a, b)                         | tau^a (1 - tau)^b/(2 B(a, b))                  |

tau = sigma/(1 + sigma) = sigmoid(-lambda/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.errors import require
from logsnr.schedules.base import Unbounded, require_positive


@dataclass(frozen=True)
class Laplace(Unbounded):
    """Laplace's law of log-SNR, sharp at mu (2407.03297, which draws with b = 1/2 around 0).

    Args:
        mu: its centre.
        b: its scale; the standard deviation is sqrt(2) b.
    """

    mu: float = 0.0
    b: float = 0.5

    def __post_init__(self) -> None:
        require_positive(self, b=self.b)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        x = (logsnr - self.mu) / self.b
        small = 0.5 * torch.exp(-x.abs())
        return torch.where(x > 0, small, 1 - small), torch.where(x > 0, 1 - small, small)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        tail = -self.b * (2 * torch.where(t <= c, t, c)).log()
        return self.mu + torch.where(t <= c, tail, -tail)

    def _log_density(self, logsnr: Tensor) -> Tensor:
        return -(logsnr - self.mu).abs() / self.b - math.log(2 * self.b)


@dataclass(frozen=True)
class FlowMode(Unbounded):
    """SD3's mode sampling, flow time t - s (sin^2(pi t/2) - t) of a uniform t (2403.03206, eq. 20).

    Args:
        s: in [-1, 2/(pi - 2)); above 0 the middle is drawn more often, below 0 the ends. SD3 settles on 1.29.
    """

    s: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.s < 2 / (math.pi - 2):
            raise ValueError(
                f"s = {self.s}: must be in [-1, {2 / (math.pi - 2):.4g}), or two times have one noise level"
            )

    def _flow(self, t: Tensor) -> Tensor:
        return t - self.s * ((0.5 * math.pi * t).sin().square() - t)

    def _slope(self, t: Tensor) -> Tensor:
        return 1 + self.s - self.s * 0.5 * math.pi * (math.pi * t).sin()

    def _half(self, tau: Tensor) -> Tensor:
        """The t of a flow time of at most 1/2, by bisection and Newton."""
        low, high = torch.zeros_like(tau), torch.full_like(tau, 0.5)
        for _ in range(30):
            middle = 0.5 * (low + high)
            below = self._flow(middle) < tau
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        t = 0.5 * (low + high)
        for _ in range(3):
            slope = self._slope(t)
            t = (t - torch.where(slope > 0, (self._flow(t) - tau) / slope, 0.0)).clamp(0, 0.5)
        return t

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        tau, rest = torch.sigmoid(-0.5 * logsnr), torch.sigmoid(0.5 * logsnr)
        clean, noisy = self._half(tau.clamp(max=0.5)), self._half(rest.clamp(max=0.5))
        return torch.where(tau <= rest, clean, 1 - noisy), torch.where(tau <= rest, 1 - clean, noisy)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        return 2 * (self._flow(c).log() - self._flow(t).log())  # the law is its own mirror image

    def _log_density(self, logsnr: Tensor) -> Tensor:
        t, c = self._tails(logsnr)
        inner = F.logsigmoid(0.5 * logsnr) + F.logsigmoid(-0.5 * logsnr) - math.log(2)
        return inner - self._slope(torch.where(t <= c, t, c)).log()


@dataclass(frozen=True)
class FlowBeta(Unbounded):
    """Flow time tau ~ Beta(a, b), tau = 1 noise; Beta(1, 1) is uniform time.

    Args:
        a: above 1 few levels are clean.
        b: above 1 few are noisy.
    """

    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, a=self.a, b=self.b)

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        tau, rest = torch.sigmoid(-0.5 * logsnr), torch.sigmoid(0.5 * logsnr)
        return _beta("betainc", self.a, self.b, tau), _beta("betainc", self.b, self.a, rest)

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        tau = _beta("betaincinv", self.a, self.b, t.detach())
        rest = _beta("betaincinv", self.b, self.a, c.detach())
        logsnr = 2 * (rest.log() - tau.log())
        found, other = self._tails(logsnr)
        # A step of Newton's, since scipy's inverse lacks digits; -1/p is the derivative of the quantile function.
        missing = torch.where(t <= c, found - t.detach(), c.detach() - other)
        return logsnr + (missing - (t - t.detach())) * (-self._log_density(logsnr)).exp()

    def _log_density(self, logsnr: Tensor) -> Tensor:
        area = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        return self.a * F.logsigmoid(-0.5 * logsnr) + self.b * F.logsigmoid(0.5 * logsnr) - area - math.log(2)


def _beta(name: str, a: float, b: float, x: Tensor) -> Tensor:
    """scipy's incomplete beta function or its inverse."""
    function: Any = getattr(require("scipy.special", extra="train", purpose="schedule 'flow-beta'"), name)
    return torch.as_tensor(function(a, b, x.detach().cpu().numpy()), dtype=torch.float64, device=x.device)
