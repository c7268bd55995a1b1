"""Adaptive: a schedule that spends its draws where the loss is.

The variance of the loss w/p ||eps_hat - eps||^2 over noise levels is smallest for

    p(lambda) ~ w(lambda) m(lambda),        m = E||eps_hat - eps||^2                     (2303.00848, sec. 3.2, app. F)

(in high dimension, where the error concentrates), and then the loss has the same mean at every level.  m is tracked
per bin of log-SNR and p is constant on each, mixed with a little uniform so that no level is ever lost.  p knows past
batches only, so the estimate of L_w stays unbiased whatever m says.  The state holds the *unweighted* error: m is a
property of the network, and another weighting can use it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from logsnr.density import Schedule
from logsnr.weighting import Weighting


class Adaptive(Schedule):
    """Piecewise-constant p ~ w m on equal bins, m an average of past errors.

    Before the first batch m = dim sigmoid(lambda + 2 ln sigma_data), the error of the best denoiser that knows only
    the data's standard deviation, which is roughly where a network starts; it counts as one visit to each bin.  Early
    visits are averaged, later ones forget at `decay` per draw, and a bin that is never visited keeps what it has.

    Args:
        initial: (lo, hi), or a schedule with finite range whose density p replaces the closed form, as m = p/w.
        weighting: w of the objective that this schedule serves.
        bins: number of bins.
        decay: memory per draw: a bin with k draws in a batch moves by 1 - decay^k towards their mean.
        floor: share of the draws that are uniform.
        sigma_data: standard deviation of the data.
        dim: dimensions of a sample.

    Raises:
        ValueError: for an empty or infinite range, or a parameter out of range.
    """

    def __init__(
        self,
        initial: tuple[float, float] | Schedule,
        weighting: Weighting,
        *,
        bins: int = 100,
        decay: float = 0.999,
        floor: float = 0.01,
        sigma_data: float = 1.0,
        dim: int = 1,
    ) -> None:
        lo, hi = initial.range if isinstance(initial, Schedule) else initial
        if not -math.inf < lo < hi < math.inf:
            raise ValueError(f"range ({lo}, {hi}) must be finite and increase; truncate the initial schedule first")
        if bins < 1 or not 0 <= decay < 1 or not 0 < floor <= 1 or not sigma_data > 0 or dim < 1:
            raise ValueError(
                f"bins = {bins}, decay = {decay}, floor = {floor}, sigma_data = {sigma_data}, dim = {dim}: need "
                "bins >= 1, decay in [0, 1), floor in (0, 1], sigma_data > 0 and dim >= 1"
            )
        self.weighting, self.bins, self.decay, self.floor = weighting, bins, decay, floor
        self._range, self._width = (float(lo), float(hi)), (float(hi) - float(lo)) / bins
        self._edges = torch.linspace(lo, hi, bins + 1, dtype=torch.float64)
        self._centers = 0.5 * (self._edges[1:] + self._edges[:-1])
        self._error = dim * torch.sigmoid(self._centers + 2 * math.log(sigma_data))
        if isinstance(initial, Schedule):
            shape = (initial.log_density(self._centers) - weighting.log(self._centers)).exp()
            self._error = shape * (self._error.sum() / shape.sum())
        self._visits = torch.ones(bins, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"Adaptive({self._range}, {self.weighting!r}, bins={self.bins}, decay={self.decay}, floor={self.floor})"

    @property
    def range(self) -> tuple[float, float]:
        return self._range

    def probabilities(self) -> Tensor:
        """Share of the draws in each bin, `[bins]`, at least floor/bins."""
        weight = self.weighting.log(self._centers.to(self._error.device)).exp() * self._error
        total = weight.sum()
        share = torch.where(total > 0, weight / total, torch.full_like(weight, 1 / self.bins))
        return (1 - self.floor) * share + self.floor / self.bins

    def update(self, logsnr: Tensor, eps_error: Tensor) -> None:
        """Move each visited bin towards the mean of its errors; non-finite errors are left out.

        Everything stays on the device of `logsnr` (a schedule's draws: the generator's).  Under torch.distributed the
        sums and counts of all ranks are added first, so that every rank holds the same p; call it on every rank.

        `eps_error` is neither weighted nor averaged over dimensions.
        """
        x = logsnr.detach().to(torch.float64)
        e = eps_error.detach().to(x.device).to(torch.float64)
        valid = e.isfinite()
        bin_of = self._bin(x)
        sums = torch.zeros(2, self.bins, dtype=torch.float64, device=x.device)
        sums[0].index_add_(0, bin_of, torch.where(valid, e, 0.0))
        sums[1].index_add_(0, bin_of, valid.to(torch.float64))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, count = sums
        visits = self._visits.to(x.device)
        gain = torch.maximum(1 - self.decay**count, count / (visits + count))
        error = self._error.to(x.device)
        self._error = error + gain * (total / count.clamp(min=1) - error)
        self._visits = visits + count

    def state_dict(self) -> dict[str, Tensor]:
        return {"error": self._error.clone(), "visits": self._visits.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state exactly.

        Raises:
            ValueError: for another number of bins.
        """
        for name in ("error", "visits"):
            if tuple(state[name].shape) != (self.bins,):
                raise ValueError(f"state {name!r} has {tuple(state[name].shape)} bins, this schedule {self.bins}")
        self._error, self._visits = (state[name].to(torch.float64).clone() for name in ("error", "visits"))

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
