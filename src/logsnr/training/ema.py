"""An exponential moving average of weights: theta' <- beta theta' + (1 - beta) theta after every step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from logsnr.training.parallel import own


class EMA:
    """Average of parameters, kept in the tensors it is given.

    With `ramp`, update n (from 0) uses beta = min(decay, (1 + n) / (10 + n)): a short memory at first, so that the
    initial weights are soon forgotten.

    Args:
        average: the tensors that hold the average, already equal to the initial weights; of sharded ones this
            process's part is averaged.
        decay: beta in [0, 1).
        ramp: as above.
    """

    def __init__(self, average: Iterable[Tensor], *, decay: float, ramp: bool = True) -> None:
        self.average = [own(tensor.detach()) for tensor in average]
        self.decay = decay
        self.ramp = ramp

    def beta(self, n: int) -> float:
        """Decay of update n, counted from 0."""
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], n: int) -> None:
        """Move the average towards `parameters`, in one fused operation over all tensors."""
        torch._foreach_lerp_(self.average, [own(p.detach()) for p in parameters], 1 - self.beta(n))
