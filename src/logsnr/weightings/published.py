"""The weightings of the literature, one class each."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.schedules.base import log_normal, log_sech, require_positive
from logsnr.weightings.base import Weighting


@dataclass(frozen=True)
class ELBO(Weighting):
    """w = 1: maximum likelihood (VDM, 2107.00630)."""

    def _log(self, logsnr: Tensor) -> Tensor:
        return torch.zeros_like(logsnr)


@dataclass(frozen=True)
class EpsCosine(Weighting):
    """Plain MSE of eps on the cosine schedule, as in iDDPM (2102.09672)."""

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * logsnr)


@dataclass(frozen=True)
class EDM(Weighting):
    """Plain MSE of EDM's F under its training noise (2206.00364; 2303.00848, app. D.1).

    It peaks at log-SNR -3.30778 with w = .27102716.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_positive(self, p_std=self.p_std, sigma_data=self.sigma_data)

    def _log(self, logsnr: Tensor) -> Tensor:
        data = torch.full_like(logsnr, 2 * math.log(self.sigma_data))
        return log_normal(logsnr, -2 * self.p_mean, 2 * self.p_std) + torch.logaddexp(-logsnr, data)


@dataclass(frozen=True)
class EDMMonotonic(EDM):
    """EDM's weighting held at its peak for noisier levels: `EDM(...).envelope()` (2303.00848, sec. 5)."""

    @cached_property
    def _envelope(self) -> Weighting:
        return EDM(self.p_mean, self.p_std, self.sigma_data).envelope()

    def _log(self, logsnr: Tensor) -> Tensor:
        return self._envelope.log(logsnr)

    def envelope(self) -> Weighting:
        return self


@dataclass(frozen=True)
class V(Weighting):
    """Plain MSE of v on the cosine schedule, constant 1/pi (2202.00512; 2303.00848, app. D.2).

    On a *shifted* cosine schedule plain v-MSE is something else: `implied_by(Cosine(shift), predictions.V())`.
    """

    def _log(self, logsnr: Tensor) -> Tensor:
        return -0.5 * logsnr


@dataclass(frozen=True)
class Flow(V):
    """Plain MSE of the flow velocity under uniform flow time, constant 1/2: the same weighting as V (app. D.3)."""


@dataclass(frozen=True)
class InDI(Weighting):
    """Plain MSE of x under uniform flow time, constant 1/8 (2303.11435; 2303.00848, app. D.4)."""

    def _log(self, logsnr: Tensor) -> Tensor:
        return -logsnr + 2 * log_sech(0.25 * logsnr)


@dataclass(frozen=True)
class P2(Weighting):
    """Perception-prioritised weighting of eps-MSE on the cosine schedule (2204.00227)."""

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, k=self.k)

    def _log(self, logsnr: Tensor) -> Tensor:
        k = torch.full_like(logsnr, math.log(self.k))
        return log_sech(0.5 * logsnr) - self.gamma * torch.logaddexp(k, logsnr)


@dataclass(frozen=True)
class XCosine(Weighting):
    """Plain MSE of x on the cosine schedule: e^-lambda sech(lambda/2), constant 1/(2 pi)."""

    def _log(self, logsnr: Tensor) -> Tensor:
        return -logsnr + log_sech(0.5 * logsnr)


@dataclass(frozen=True)
class VShiftedCosine(Weighting):
    """Plain MSE of v on a shifted cosine schedule: sech((lambda - s)/2) (1 + e^-lambda) (2301.11093).

    Not e^(-lambda/2), nor that shifted: its two ends stand in the ratio (resolution/64)^2 to it.  It never increases
    for s <= 2 ln 3.

    Args:
        s: 2 ln(64 / resolution), the shift of `schedules.Cosine(shift)`.
    """

    s: float = 0.0

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * (logsnr - self.s)) + F.softplus(-logsnr)


@dataclass(frozen=True)
class CosMapFlow(Weighting):
    """Plain MSE of the flow velocity under SD3's cosmap times: sech(lambda/2) (1 + e^(-lambda/2))^2 (2403.03206)."""

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * logsnr) + 2 * F.softplus(-0.5 * logsnr)


@dataclass(frozen=True)
class _OnEps(Weighting):
    """A factor on the squared error of eps, times the weighting that plain MSE of eps has: the density of the draws."""

    base: Weighting = field(default_factory=EpsCosine, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.base, Weighting):
            raise ValueError(f"{type(self).__name__}: base = {self.base!r} must be a weighting, e.g. EDM()")

    def _log(self, logsnr: Tensor) -> Tensor:
        return self.base.log(logsnr) + self._log_factor(logsnr)

    @abstractmethod
    def _log_factor(self, logsnr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class MinSNR(_OnEps):
    """min(SNR, gamma) on the MSE of x, on eps errors min(1, gamma e^-lambda) (2303.09556).

    Args:
        gamma: where it is cut.
        base: what it multiplies: the cosine schedule's eps-MSE; `EDM()` for Min-SNR on EDM,
            `implied_by(schedule, Eps())` for another schedule.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, gamma=self.gamma)

    def _log_factor(self, logsnr: Tensor) -> Tensor:
        return (math.log(self.gamma) - logsnr).clamp(max=0)


@dataclass(frozen=True)
class SoftMinSNR(_OnEps):
    """MinSNR with a smooth corner, sigmoid(ln gamma - lambda) (k-diffusion's "soft-min-snr").

    It is the sigmoid weighting of 2303.00848 times the density of the draws, which k-diffusion does not divide out.

    Args:
        gamma: 1/sigma_data^2.
        base: what it multiplies: the cosine schedule's eps-MSE, or `implied_by(schedule, Eps())`.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, gamma=self.gamma)

    def _log_factor(self, logsnr: Tensor) -> Tensor:
        return F.logsigmoid(math.log(self.gamma) - logsnr)


@dataclass(frozen=True)
class Debiased(_OnEps):
    """SNR^(-1/2) on the MSE of eps: debiased estimation, as kohya's eps branch has it (2310.08442).

    Args:
        limit: SNR is cut there, as the scripts do.
        base: what it multiplies: the cosine schedule's eps-MSE, or `implied_by(schedule, Eps())`.
    """

    limit: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, limit=self.limit)

    def _log_factor(self, logsnr: Tensor) -> Tensor:
        return -0.5 * logsnr.clamp(max=math.log(self.limit))


@dataclass(frozen=True)
class Sigmoid(Weighting):
    """sigmoid(bias - lambda), best at bias 2 of 1 ... 5 on ImageNet 64 (2303.00848, table 2)."""

    bias: float = 2.0

    def _log(self, logsnr: Tensor) -> Tensor:
        return F.logsigmoid(self.bias - logsnr)


@dataclass(frozen=True)
class LogitNormalFlow(Weighting):
    """Plain MSE of the flow velocity under logit-normal flow time: SD3's rf/lognorm(m, s) (2403.03206)."""

    m: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, s=self.s)

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_normal(logsnr, -2 * self.m, 2 * self.s) + 2 * F.softplus(-0.5 * logsnr)


@dataclass(frozen=True)
class Custom(Weighting):
    """Any positive function of log-SNR; made of torch operations, so that `augmentation` can differentiate it.

    Args:
        fn: lambda -> w, or lambda -> ln w with `in_log`.
        in_log: whether `fn` answers with ln w.
    """

    fn: Callable[[Tensor], Tensor]
    in_log: bool = False

    def __repr__(self) -> str:
        return f"Custom({getattr(self.fn, '__name__', type(self.fn).__name__)}{', in_log=True' if self.in_log else ''})"

    def _log(self, logsnr: Tensor) -> Tensor:
        out = self.fn(logsnr)
        return out if self.in_log else out.log()
