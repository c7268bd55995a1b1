"""What every weighting can do: be shifted, tested for monotony, enveloped, and read as a mixture of augmentations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.schedules.base import uniforms

SCAN = (-60.0, 60.0)
"""Log-SNRs among which envelopes look for local maxima; where infinite ranges are cut to look at a weighting."""


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

    def emphasis(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        """Share of each level in the loss of a denoiser that knows the data's standard deviation alone.

        w sigmoid(lambda + 2 ln sigma_data), with integral 1 over the increasing `logsnr [n]`.
        """
        log = self.log(logsnr) + torch.nn.functional.logsigmoid(logsnr + 2 * math.log(sigma_data))
        value = (log - log.max()).exp()
        return value / torch.trapezoid(value, logsnr)

    def check(self, lo: float, hi: float, *, points: int = 2001) -> None:
        """Refuse what is no weighting on [lo, hi], as seen at many points.

        Raises:
            LogsnrError: if w is negative, not a number or infinite somewhere, or zero everywhere.
        """
        x = _spaced(
            lo if lo > -math.inf else min(SCAN[0], hi - 1), hi if hi < math.inf else max(SCAN[1], lo + 1), points
        )
        log_w = self.log(x)
        bad = log_w.isnan() | (log_w == math.inf)
        if bool(bad.any()):
            what = "infinite" if bool((log_w[bad][0] == math.inf).all()) else "negative or not a number"
            raise LogsnrError(
                f"{self!r} is {what} at log-SNR {float(x[bad][0]):.2f}: w must be finite and at least 0 on all of "
                f"[{lo:g}, {hi:g}]; mend it, or truncate the objective's schedule to where it is"
            )
        if not bool((log_w > -math.inf).any()):
            raise LogsnrError(
                f"{self!r} is zero everywhere on [{lo:g}, {hi:g}]: there is nothing to learn; give another range or "
                "weighting"
            )

    def shift(self, s: float) -> Weighting:
        """w(lambda - s): the same weighting for data whose noise counts for s more log-SNR (2 ln(64/resolution))."""
        return Shifted(self, float(s))

    def is_monotone(self, lo: float = -20.0, hi: float = 20.0, *, points: int = 20001) -> bool:
        """Whether w never increases with log-SNR on [lo, hi], as seen at many points.

        Rises of ln w up to 1e-12 (relative, for large ln w) between neighbours are rounding.

        Raises:
            LogsnrError: if w is negative or not a number somewhere.
        """
        log_w = self.log(_spaced(lo, hi, points))
        if bool(log_w.isnan().any()):
            self.check(lo, hi, points=points)
        rise = log_w.diff().nan_to_num(0.0)  # -inf next to -inf: no weight, no rise
        slack = 1e-12 * (1 + log_w[1:].abs().nan_to_num(0.0, posinf=0.0))
        return bool((rise <= slack).all())

    def envelope(self) -> Weighting:
        """The least weighting above w that never increases: mono(w)(lambda) = max of w over [lambda, inf).

        The maximum of a continuous w over [lambda, inf) lies at lambda or at a local maximum to its right, so it is
        enough to find those once: exact, idempotent, and w itself where w already never increases.

        Raises:
            ValueError: if w still rises at the end of the scan, log-SNR 60, or is negative or not a number.
        """
        self.check(*SCAN)
        return Envelope(self, *_peaks(self.log))

    def augmentation(self, lo: float, hi: float) -> Augmentation:
        """The mixture p_w over noise levels whose ELBO L_w on [lo, hi] is (Theorem 1), signed if w is not monotone.

        Raises:
            ValueError: if the range is empty or infinite, w(lo) is zero or infinite, or w is negative or not a number.
        """
        return Augmentation(weighting=self, lo=float(lo), hi=float(hi))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The mixture of noise levels that a weighting is: p_w = density(lambda) dlambda + atom at `hi`, total mass 1.

    With L(lambda; x) = KL(q(z_lambda..1|x) || p(z_lambda..1)), the negative ELBO of data with noise of level lambda
    added, up to the entropy of that noise, and L(lo; x) the constant KL at the noisy end,

        L_w(x)/w(lo) = int density L dlambda + atom L(hi) - L(lo)                       (2303.00848, sec. 3.2)

    for every weighting.  If w never increases, p_w is a distribution and L_w an ELBO of data drawn from it (Theorem 1);
    otherwise p_w = p+ - p- is signed: levels at which w rises count *against* their ELBO.

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
        self.weighting.check(self.lo, self.hi)

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

    @property
    def positive(self) -> float:
        """Mass of p+, the atom included: by how much w falls, and what is left of it, over w(lo)."""
        return float(self._steps()[1].clamp(min=0).sum())

    @property
    def negative(self) -> float:
        """Mass of p-: by how much w rises, over w(lo); positive - negative = 1, and 0 for a distribution."""
        return float(-self._steps()[1].clamp(max=0).sum())

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n noise levels from |p_w| / (positive + negative), each with its sign: `[n]` and `[n]`, float64.

        For any f,  int density f dlambda + atom f(hi) = (positive + negative) E[sign f(lambda)].  For a distribution
        all signs are 1, and these are the levels of the added noise.

        Args:
            n: draws, stratified.
            generator: source of randomness; the draws live on its device.
        """
        logsnr, steps = (v.to(generator.device) for v in self._steps())
        cdf = steps.abs().cumsum(0)
        u = uniforms(n, generator=generator) * cdf[-1]
        i = torch.searchsorted(cdf, u, right=True).clamp(max=len(steps) - 1)
        # w is taken as linear between neighbours; the last step is the atom.
        share = (cdf[i] - u) / steps[i].abs()
        left, right = logsnr[i], logsnr[(i + 1).clamp(max=len(logsnr) - 1)]
        return right + (left - right) * share, steps[i].sign()

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Log-SNRs `[k]` and the mass of p_w in each of its k - 1 cells and in the atom `[k]`."""
        logsnr = _spaced(self.lo, self.hi, 100001)
        share = (self.weighting.log(logsnr) - self.weighting.log(self.lo)).exp()
        return logsnr, torch.cat([-share.diff(), share[-1:]])


def _spaced(lo: float, hi: float, points: int) -> Tensor:
    return torch.linspace(lo, hi, points, dtype=torch.float64)


def _peaks(log: Callable[[Tensor], Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Places and values of the local maxima of `log` within SCAN, from a dense scan and golden-section search."""
    x = _spaced(*SCAN, 24001)
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

    def __repr__(self) -> str:
        return f"{self.base!r}.envelope()"

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

    def __repr__(self) -> str:
        return f"{self.base!r}.shift({self.s:g})"

    def _log(self, logsnr: Tensor) -> Tensor:
        return self.base.log(logsnr - self.s)
