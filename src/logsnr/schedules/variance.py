"""Spread: what a density of noise levels leaves of the variance, measured on the draws themselves.

Over draws lambda ~ p the loss l = w/(2p) m has mean L_w and, relative to L_w^2, the variance

    Var l = Var E[l | lambda]  +  E Var[l | lambda]                                 between noise levels + within

The first part is the density's fault, the second the data's and the noise's.  For the gradient, s^2 = E||grad l||^2,

    excess = s^2 / s*^2 >= 1,        s*^2 = (E_{lambda ~ p} sqrt(E[||grad l||^2 | lambda]))^2

and s*^2 is the least that any density over levels can reach, at p* ~ p sqrt(E[||grad l||^2 | lambda]).  Both come from
sums per bin over a window of steps: no density, no weighting, no running average enters, so they judge a fixed schedule
as well as an adaptive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a window of draws says of its density.

    Attributes:
        between: variance of the loss between noise levels, over the mean loss squared.  From a finite window it is
            the analysis of variance's unbiased estimate, so it may come out slightly negative.
        within: variance of the loss within noise levels, likewise.
        gradient_excess: the gradient's second moment over the least that a density can reach; None if not given.
            With few draws per bin it errs to the high side.
    """

    between: float
    within: float
    gradient_excess: float | None = None


class SpreadMeter:
    """Sums of losses and gradient norms per bin of log-SNR; stays on the device until `read`.

    Args:
        range: (lo, hi) of the bins.
        bins: their number.
        device: where the sums live.

    Attributes:
        sums: `[4, bins]`, float64: draws, losses, squared losses, squared gradient norms.
    """

    def __init__(self, range: tuple[float, float], bins: int = 100, *, device: torch.device | None = None) -> None:
        self.range, self.bins = range, bins
        self.sums = torch.zeros(4, bins, dtype=torch.float64, device=device)

    def add(self, logsnr: Tensor, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logsnr: `[B]`, the levels.
            loss: `[B]`, the losses as they enter the mean, w/p included.
            gradient: `[B]`, squared norms of the gradients of those losses, in any unit.
        """
        lo, hi = self.range
        values = torch.zeros(4, len(loss), dtype=torch.float64, device=self.sums.device)
        l = loss.detach().to(values)
        values[0], values[1], values[2] = 1, l, l**2
        if gradient is not None:
            values[3] = gradient.detach().to(values)
        x = logsnr.detach().to(values)
        bin_of = ((x - lo) * (self.bins / (hi - lo))).floor().long().clamp(0, self.bins - 1)
        self.sums.index_add_(1, bin_of, values)

    def read(self, world: int = 1) -> Spread | None:
        """The spread since the sums were zero; None before any bin has two draws.

        Args:
            world: processes whose mean the sums are.
        """
        count, loss, square, norm = (world * self.sums).cpu().unbind()
        used = count > 0
        count, loss, square, norm = count[used], loss[used], square[used], norm[used]
        n, repeated = count.sum(), count > 1
        if not repeated.any():
            return None
        mean, of_bin = loss.sum() / n, loss / count
        variance = (square - count * of_bin**2).clamp(min=0) / (count - 1).clamp(min=1)
        # A bin with one draw borrows the others' variance.
        pooled = (count * variance)[repeated].sum() / count[repeated].sum()
        variance = torch.where(repeated, variance, pooled)
        within = float((count * variance).sum() / n)
        # Means of bins scatter even where levels agree: their squares hold sum s_b^2 (1 - n_b/n) too much.
        scatter = count * (of_bin - mean) ** 2 - variance * (1 - count / n)
        between = float(scatter.sum() / n)
        least = float((count * (norm / count).sqrt()).sum()) ** 2
        excess = float(n * norm.sum()) / least if least > 0 else None
        unit = float(mean) ** 2 or 1.0
        return Spread(between=between / unit, within=within / unit, gradient_excess=excess)
