"""Weightings: how much each noise level counts.

An objective is a weighted integral over log-SNR lambda, and w is all that tells one from another:

    L_w = 1/2 int w(lambda) E||eps_hat - eps||^2 dlambda                                  (2303.00848, sec. 3.1)

w = 1 is the ELBO.  If w never increases with lambda, L_w is the ELBO of data with added noise, the noise level drawn
from the mixture  p_w = -w'(lambda)/w(lo) dlambda  +  w(hi)/w(lo) at hi  (Theorem 1); otherwise p_w is signed and
L_w bounds no likelihood.

| weighting         | w(lambda)                                        | never increases |
|-------------------|--------------------------------------------------|-----------------|
| ELBO              | 1                                                | yes             |
| EpsCosine         | sech(lambda/2)                                   | no              |
| EDM               | N(lambda; 2.4, 2.4^2) (e^-lambda + sd^2)         | no              |
| EDMMonotonic      | max of EDM over [lambda, inf)                    | yes             |
| V, Flow           | e^(-lambda/2)                                    | yes             |
| InDI              | e^-lambda sech^2(lambda/4)                       | yes             |
| P2                | sech(lambda/2)/(k + e^lambda)^gamma              | no              |
| MinSNR            | sech(lambda/2) min(1, gamma e^-lambda)           | no              |
| SoftMinSNR        | sech(lambda/2) sigmoid(ln gamma - lambda)        | no              |
| Sigmoid           | sigmoid(bias - lambda)                           | yes             |
| LogitNormalFlow   | N(lambda; -2 m, (2 s)^2) (1 + e^(-lambda/2))^2   | no              |

A constant factor means nothing.  Weightings live in the log domain (e^-lambda leaves half precision at |lambda| 11)
and answer in the dtype they are asked in; ask in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.density import Schedule, log_normal, log_sech, require_positive
from logsnr.noise import alpha_s_from_logsnr
from logsnr.prediction import Prediction

SCAN = (-60.0, 60.0)
"""Log-SNRs among which envelopes look for local maxima."""


class Weighting(ABC):
    """A positive function w of log-SNR, known through its logarithm."""

    @abstractmethod
    def _log(self, logsnr: Tensor) -> Tensor:
        """ln w, elementwise."""

    def log(self, logsnr: float | Tensor) -> Tensor:
        """ln w(lambda), elementwise; a float is taken as float64."""
        return self._log(logsnr if isinstance(logsnr, Tensor) else torch.tensor(logsnr, dtype=torch.float64))

    def __call__(self, logsnr: float | Tensor) -> Tensor:
        """w(lambda)."""
        return self.log(logsnr).exp()

    def shift(self, s: float) -> Weighting:
        """w(lambda - s): the same weighting for data whose noise counts for s more log-SNR (2 ln(64/resolution))."""
        return Shifted(self, float(s))

    def is_monotone(self, lo: float = -20.0, hi: float = 20.0, *, points: int = 20001) -> bool:
        """Whether w never increases with log-SNR on [lo, hi], as seen on a dense grid.

        Rises of ln w up to 1e-12 (relative, for large ln w) between neighbours are rounding.
        """
        log_w = self.log(_grid(lo, hi, points))
        rise = log_w.diff().nan_to_num(0.0)  # -inf next to -inf: no weight, no rise
        slack = 1e-12 * (1 + log_w[1:].abs().nan_to_num(0.0, posinf=0.0))
        return bool((rise <= slack).all())

    def envelope(self) -> Weighting:
        """The least weighting above w that never increases: mono(w)(lambda) = max of w over [lambda, inf).

        The maximum of a continuous w over [lambda, inf) lies at lambda or at a local maximum to its right, so it is
        enough to find those once: exact, idempotent, and w itself where w already never increases.

        Raises:
            ValueError: if w still rises at the end of the scan, log-SNR 60.
        """
        return Envelope(self, *_peaks(self.log))

    def augmentation(self, lo: float, hi: float) -> Augmentation:
        """The mixture p_w over noise levels whose ELBO L_w on [lo, hi] is (Theorem 1), signed if w is not monotone.

        Raises:
            ValueError: if the range is empty or infinite, or w(lo) is zero or infinite.
        """
        return Augmentation(weighting=self, lo=float(lo), hi=float(hi))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a weighting adds noise to its data: p_w = density(lambda) dlambda + atom at `hi`, total mass 1.

    Attributes:
        weighting: w.
        lo: smallest log-SNR of the objective.
        hi: largest log-SNR, where the atom sits: data with the least noise.
    """

    weighting: Weighting
    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not -math.inf < self.lo < self.hi < math.inf:
            raise ValueError(f"augmentation({self.lo}, {self.hi}): the ends must be finite and increase")
        if not math.isfinite(float(self.weighting.log(self.lo))):
            raise ValueError(f"{self.weighting!r} has no finite, positive w at lo = {self.lo}: move lo to where it has")

    def density(self, logsnr: float | Tensor) -> Tensor:
        """-w'(lambda)/w(lo), by differentiation of ln w; 0 outside [lo, hi].  Negative where w rises."""
        with torch.enable_grad():
            x = torch.as_tensor(logsnr, dtype=torch.float64).detach().clone().requires_grad_()
            log_w = self.weighting.log(x)
            slope = torch.zeros_like(x)
            if log_w.requires_grad:
                (slope,) = torch.autograd.grad(log_w.sum(), x)
        out = -slope * (log_w.detach() - self.weighting.log(self.lo)).exp()
        x = x.detach()
        return torch.where((x >= self.lo) & (x <= self.hi), out, 0.0)

    @property
    def atom(self) -> float:
        """w(hi)/w(lo): the share of data at the least noise."""
        return math.exp(float(self.weighting.log(self.hi)) - float(self.weighting.log(self.lo)))

    @property
    def is_distribution(self) -> bool:
        """Whether p_w is nonnegative, so that L_w is an ELBO of augmented data."""
        return self.weighting.is_monotone(self.lo, self.hi)


def _grid(lo: float, hi: float, points: int) -> Tensor:
    return torch.linspace(lo, hi, points, dtype=torch.float64)


def _peaks(log: Callable[[Tensor], Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Places and values of the local maxima of `log` within SCAN, from a dense scan and golden-section search."""
    x = _grid(*SCAN, 24001)
    y = log(x)
    if not float(y[-1]) <= float(y[-2]) + 1e-12 * (1 + abs(float(y[-2]))):
        raise ValueError(f"w still rises at log-SNR {SCAN[1]:g}: it has no finite envelope")
    left, middle, right = y[:-2], y[1:-1], y[2:]
    # The right end of a plateau counts; its left end adds nothing.
    peak = ((middle >= left) & (middle > right)).nonzero()[:, 0]
    a, b = x[peak], x[peak + 2]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        c, d = b - golden * (b - a), a + golden * (b - a)
        up = log(c) >= log(d)
        a, b = torch.where(up, a, c), torch.where(up, d, b)
    at = 0.5 * (a + b)
    # Where rounding flattens the top, the scanned point may be the higher one.
    better = log(at) >= middle[peak]
    at = torch.where(better, at, x[peak + 1])
    return tuple(at.tolist()), tuple(log(at).tolist())


@dataclass(frozen=True)
class Envelope(Weighting):
    """max of `base` over [lambda, inf) (made by `Weighting.envelope`)."""

    base: Weighting
    places: tuple[float, ...]
    values: tuple[float, ...]

    def _log(self, logsnr: Tensor) -> Tensor:
        out = self.base.log(logsnr)
        for place, value in zip(self.places, self.values, strict=True):
            out = torch.where((logsnr <= place) & (out < value), value, out)
        return out

    def envelope(self) -> Weighting:
        return self


@dataclass(frozen=True)
class Shifted(Weighting):
    """w(lambda - s) (made by `Weighting.shift`)."""

    base: Weighting
    s: float

    def _log(self, logsnr: Tensor) -> Tensor:
        return self.base.log(logsnr - self.s)


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
class MinSNR(Weighting):
    """min(SNR, gamma) on the MSE of x, cosine schedule (2303.09556)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_positive(self, gamma=self.gamma)

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * logsnr) + (math.log(self.gamma) - logsnr).clamp(max=0)


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """MinSNR with a smooth corner, cosine schedule (k-diffusion's "soft-min-snr"); gamma = 1/sigma_data^2."""

    gamma: float = 4.0

    def __post_init__(self) -> None:
        require_positive(self, gamma=self.gamma)

    def _log(self, logsnr: Tensor) -> Tensor:
        return log_sech(0.5 * logsnr) + F.logsigmoid(math.log(self.gamma) - logsnr)


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

    def _log(self, logsnr: Tensor) -> Tensor:
        out = self.fn(logsnr)
        return out if self.in_log else out.log()


@dataclass(frozen=True)
class Implied(Weighting):
    """p(lambda)/b_F^2 (made by `implied_by`)."""

    schedule: Schedule
    prediction: Prediction

    def _log(self, logsnr: Tensor) -> Tensor:
        alpha, s = alpha_s_from_logsnr(logsnr.to(torch.float64))
        b_F = self.prediction.eps_row(alpha, s)[1]
        return (self.schedule.log_density(logsnr) - 2 * b_F.abs().log()).to(logsnr.dtype)


def implied_by(schedule: Schedule, prediction: Prediction) -> Weighting:
    """What plain MSE on a prediction's target, under t ~ U of a schedule, really weights.

    The error of eps is b_F times that of F, so  E_t ||F_hat - F*||^2 = int p/b_F^2 E||eps_hat - eps||^2 dlambda:
    the weighting is p/b_F^2, zero outside the schedule's range.
    """
    return Implied(schedule, prediction)


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "elbo": ELBO,
    "eps-cosine": EpsCosine,
    "edm": EDM,
    "v": V,
    "flow": Flow,
    "indi": InDI,
    "p2": P2,
    "min-snr": MinSNR,
    "soft-min-snr": SoftMinSNR,
    "sigmoid": Sigmoid,
    "edm-monotonic": EDMMonotonic,
    "logit-normal-flow": LogitNormalFlow,
}
"""Weightings by name: what recipes and the command line say."""
