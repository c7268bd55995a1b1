"""Adaptive: a schedule that spends its draws where they tell most.

Of all densities the one that minimises the second moment of w/p f over draws lambda ~ p is

    p(lambda) ~ w(lambda) q(lambda),        q^2 = E[f^2 | lambda]                                (Cauchy and Schwarz)

and q is tracked per bin of log-SNR, in one of two currencies:

    error      q = E m           m = ||eps_hat - eps||^2: flattens the loss over levels (2303.00848, sec. 3.2, app. F)
    gradient   q = sqrt(E G)     least second moment of the *gradient* that descends, G = ||d(m/2)/dtheta||^2

p is constant on each bin, mixed with a little uniform so that no level is ever lost.  It knows past batches only, so
the estimate of L_w stays unbiased whatever q says.  The state holds what belongs to the network, *unweighted*: another
weighting can use it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from logsnr.errors import unknown
from logsnr.schedules.base import Schedule

Importance = Literal["error", "gradient"]
IMPORTANCES: tuple[Importance, ...] = get_args(Importance)


class Weights(Protocol):
    """A weighting (`logsnr.weightings`), as far as a schedule needs it: that floor lies above this one."""

    def log(self, logsnr: Tensor, /) -> Tensor:
        """ln w(lambda), elementwise."""
        ...

    def check(self, lo: float, hi: float, /) -> None:
        """Refuse what is no weighting on [lo, hi]."""
        ...


REACH = 0.05
"""Width over which true gradient norms speak for their neighbours, as a share of the range."""


class Adaptive(Schedule):
    """Piecewise-constant p ~ w q on equal bins, q an average over past draws.

    Before the first batch q is that of the best denoiser that knows only the data's standard deviation, which is
    roughly where a network starts: m = dim c, and G ~ c^2 in a unit that the first batch sets, with
    c = sigmoid(lambda + 2 ln sigma_data).  The start counts as one visit to each bin.  Early visits are
    averaged, later ones forget at `decay` per draw, and a bin that is never visited keeps what it has.

    Args:
        initial: (lo, hi), or a schedule with finite range whose density p replaces the closed form, as q = p/w.
        weighting: w of the objective that this schedule serves.
        importance: q: "error" or "gradient".
        bins: number of bins.
        decay: memory per draw: a bin with k draws in a batch moves by 1 - decay^k towards their mean.
        floor: share of the draws that are uniform.
        sigma_data: standard deviation of the data.
        dim: dimensions of a sample, the unit of the errors that `update` is given; None where nobody knows: the first
            batch sets it.

    Raises:
        ValueError: for an empty or infinite range, an unknown importance, a parameter out of range, or a weighting that
            is negative, not a number or infinite somewhere on the range, or zero everywhere.
    """

    def __init__(
        self,
        initial: tuple[float, float] | Schedule,
        weighting: Weights,
        *,
        importance: Importance = "error",
        bins: int = 100,
        decay: float = 0.999,
        floor: float = 0.01,
        sigma_data: float = 1.0,
        dim: int | None = 1,
    ) -> None:
        lo, hi = initial.range if isinstance(initial, Schedule) else initial
        if not -math.inf < lo < hi < math.inf:
            raise ValueError(f"range ({lo}, {hi}) must be finite and increase; truncate the initial schedule first")
        if importance not in IMPORTANCES:
            raise unknown("importance", importance, IMPORTANCES)
        if bins < 1 or not 0 <= decay < 1 or not 0 < floor <= 1 or not sigma_data > 0 or (dim or 1) < 1:
            raise ValueError(
                f"bins = {bins}, decay = {decay}, floor = {floor}, sigma_data = {sigma_data}, dim = {dim}: need "
                "bins >= 1, decay in [0, 1), floor in (0, 1], sigma_data > 0 and dim >= 1"
            )
        weighting.check(lo, hi)
        self.weighting, self.importance = weighting, importance
        self.bins, self.decay, self.floor, self.dim = bins, decay, floor, dim
        self._range, self._width = (float(lo), float(hi)), (float(hi) - float(lo)) / bins
        self._edges = torch.linspace(lo, hi, bins + 1, dtype=torch.float64)
        self._centers = 0.5 * (self._edges[1:] + self._edges[:-1])
        start = torch.sigmoid(self._centers + 2 * math.log(sigma_data))
        if isinstance(initial, Schedule):
            shape = (initial.log_density(self._centers) - weighting.log(self._centers)).exp()
            start = shape * (start.sum() / shape.sum())
        self._error = (dim or 1) * start
        self._gradient = start**2
        self._visits = torch.ones(bins, dtype=torch.float64)
        self._gradient_visits = torch.ones(bins, dtype=torch.float64)
        # True and proxy gradient norms of the same samples, each over its bin's G: their ratio mends the proxy.
        self._true, self._proxy = torch.zeros(2, bins, dtype=torch.float64)
        self._share: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"Adaptive({self._range}, {self.weighting!r}, importance={self.importance!r}, bins={self.bins}, "
            f"decay={self.decay}, floor={self.floor})"
        )

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    def probabilities(self) -> Tensor:
        """Share of the draws in each bin, `[bins]`, at least floor/bins."""
        if self._share is None:
            self._share = self._shared_out()
        return self._share

    def _shared_out(self) -> Tensor:
        q = self.tracked()
        weight = self.weighting.log(self._centers.to(q.device)).exp() * q
        total = weight.sum()
        share = torch.where(total > 0, weight / total, torch.full_like(weight, 1 / self.bins))
        return (1 - self.floor) * share + self.floor / self.bins

    def tracked(self, importance: Importance | None = None) -> Tensor:
        """q in each bin `[bins]`, in this schedule's currency or another; the gradient's up to a factor."""
        if (importance or self.importance) == "error":
            return self._error
        return (self._gradient * self._correction()).sqrt()

    def update(self, logsnr: Tensor, eps_error: Tensor, gradient: Tensor | None = None) -> None:
        """Move each visited bin towards the mean of its draws; non-finite values are left out.

        Everything stays on the device of `logsnr` (a schedule's draws: the generator's).  Under torch.distributed the
        sums and counts of all ranks are added first, so that every rank holds the same p; call it on every rank.

        Args:
            logsnr: `[B]`, the levels of the batch.
            eps_error: `[B]`, m: neither weighted nor averaged over dimensions.
            gradient: `[B]`, G of each draw, e.g. ||d(m/2)/d last layer||^2 (`OutputLayer`); in any constant unit.
        """
        x = logsnr.detach().to(torch.float64)
        m = eps_error.detach().to(x.device).to(torch.float64)
        columns = [m] if gradient is None else [m, gradient.detach().to(x.device).to(torch.float64)]
        sums, counts = self._binned(x, torch.stack(columns))
        visits = self._visits.to(x.device)
        start = self._error if self.dim else self._in_unit_of(self._error, sums[0], counts[0], visits)
        self._error = self._moved(start, sums[0], counts[0], visits)
        self._visits, self._share = visits + counts[0], None
        if gradient is None:
            return
        total, count, seen = sums[1], counts[1], self._gradient_visits.to(x.device)
        # The closed form knows the shape of G but not the network's unit, which is in the first batch.
        start = self._in_unit_of(self._gradient, total, count, seen)
        self._gradient = self._moved(start, total, count, seen)
        self._gradient_visits = seen + count

    def correct(self, logsnr: Tensor, true: Tensor, proxy: Tensor) -> None:
        """Mend the proxy G by gradient norms over all parameters of a few samples.

        The tracked G is multiplied by E[true]/E[proxy] around each level (over `REACH` of the range; where no sample
        came near, by the ratio overall).  Call it on every rank.

        Args:
            logsnr: `[k]`, levels of the samples.
            true: `[k]`, ||d(m/2)/dtheta||^2 over all parameters.
            proxy: `[k]`, what `update` is given as `gradient` for the same samples.
        """
        x = logsnr.detach().to(torch.float64)
        scale = self._gradient.to(x.device)[self._bin(x)].clamp(min=torch.finfo(torch.float64).tiny)
        pairs = torch.stack([true.detach().to(x), proxy.detach().to(x)]) / scale
        pairs = torch.where(pairs.isfinite().all(0), pairs, torch.nan)
        sums, counts = self._binned(x, pairs)
        kept = self.decay ** counts[0].sum()
        self._true = kept * self._true.to(x.device) + sums[0]
        self._proxy = kept * self._proxy.to(x.device) + sums[1]
        self._share = None

    def state_dict(self) -> dict[str, Tensor]:
        state = {name: getattr(self, f"_{name}").clone() for name in self._names}
        return {**state, "range": torch.tensor(self._range, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state exactly: all of it, or error and visits alone; of version 0.1's "square" is left out.

        Raises:
            ValueError: for another range or number of bins, or the state of a fixed schedule.
        """
        if missing := {"error", "visits"} - set(state):
            raise ValueError(
                f"the state holds no {' and no '.join(sorted(missing))}: it is of a fixed schedule, this one adapts"
            )
        lo, hi = self._range
        for theirs in [torch.as_tensor(state["range"]).tolist()] if "range" in state else []:
            if not all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(theirs, (lo, hi), strict=True)):
                raise ValueError(
                    f"the state was learned on log-SNR [{theirs[0]:.4g}, {theirs[1]:.4g}], this schedule is of "
                    f"[{lo:.4g}, {hi:.4g}]: its bins lie elsewhere; give the objective that range, or begin anew"
                )
        given = {name: state[name] for name in self._names if name in state or name in ("error", "visits")}
        for name, value in given.items():
            if tuple(value.shape) != (self.bins,):
                raise ValueError(f"state {name!r} has {tuple(value.shape)} bins, this schedule {self.bins}")
            setattr(self, f"_{name}", value.to(torch.float64).clone())
        self._share = None

    @property
    def _names(self) -> tuple[str, ...]:
        return ("error", "gradient", "visits", "gradient_visits", "true", "proxy")

    def _binned(self, logsnr: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the finite `values [n, B]` in each bin and their counts, `[n, bins]` each, over all ranks."""
        valid = values.isfinite()
        sums = torch.zeros(2, len(values), self.bins, dtype=torch.float64, device=logsnr.device)
        bin_of = self._bin(logsnr)
        sums[0].index_add_(1, bin_of, torch.where(valid, values, 0.0))
        sums[1].index_add_(1, bin_of, valid.to(torch.float64))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        return sums[0], sums[1]

    def _moved(self, average: Tensor, total: Tensor, count: Tensor, visits: Tensor) -> Tensor:
        average = average.to(total.device)
        gain = torch.maximum(1 - self.decay**count, count / (visits + count))
        return average + gain * (total / count.clamp(min=1) - average)

    def _in_unit_of(self, start: Tensor, total: Tensor, count: Tensor, visits: Tensor) -> Tensor:
        """What stands before the first batch, scaled to agree with it; later ones change nothing."""
        start = start.to(total.device)
        expected = (count * start).sum()
        return start * torch.where((visits.sum() == self.bins) & (expected > 0), total.sum() / expected, 1.0)

    def _correction(self) -> Tensor:
        """E[true]/E[proxy] of the gradient around each bin, 1 before any true norm came."""
        at = torch.arange(self.bins, dtype=torch.float64, device=self._true.device)
        near = torch.exp(-0.5 * ((at[:, None] - at) / (REACH * self.bins)).square()) + 1e-6
        true, proxy = near @ self._true, near @ self._proxy
        return torch.where((true > 0) & (proxy > 0), true / proxy, 1.0).to(self._gradient.device)

    def _bin(self, logsnr: Tensor) -> Tensor:
        return ((logsnr - self._range[0]) / self._width).floor().long().clamp(0, self.bins - 1)

    def _cumulative(self, like: Tensor) -> Tensor:
        """P(log-SNR <= edge) at the bins + 1 edges."""
        p = self.probabilities().to(like.device)
        return torch.cat([p.new_zeros(1), p.cumsum(0)]) / p.sum()

    def _tails(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        cdf, bin_of = self._cumulative(logsnr), self._bin(logsnr)
        frac = (logsnr - self._edges.to(logsnr.device)[bin_of]) / self._width
        c = cdf[bin_of] + frac.clamp(0, 1) * (cdf[bin_of + 1] - cdf[bin_of])
        return 1 - c, c

    def _quantile(self, t: Tensor, c: Tensor) -> Tensor:
        cdf, edges = self._cumulative(t), self._edges.to(t.device)
        bin_of = torch.searchsorted(cdf, c.contiguous(), right=True).sub(1).clamp(0, self.bins - 1)
        frac = (c - cdf[bin_of]) / (cdf[bin_of + 1] - cdf[bin_of])
        return edges[bin_of] + frac.clamp(0, 1) * (edges[bin_of + 1] - edges[bin_of])

    def _log_density(self, logsnr: Tensor) -> Tensor:
        p = self.probabilities().to(logsnr.device)
        return (p[self._bin(logsnr)] / self._width).log()
