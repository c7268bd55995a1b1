"""Counting: every answer that a passport asks for goes through one meter, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.sampling.batches import Cond, chunks, take
from logsnr.sampling.counted import Counted

Tell = Callable[[str, int], None]


class Meter(Counted):
    """A denoiser that counts network evaluations of single samples under the name of the present part.

    Args:
        denoiser: the model.
        declared: the range to sample on, None for the model's own.
    """

    def __init__(self, denoiser: Denoiser, declared: tuple[float, float] | None = None) -> None:
        super().__init__(denoiser)
        self.part = "loss"
        self.counts: dict[str, int] = {}
        self.tell: Tell | None = None  # called with (part, evaluations so far) after every answer
        self._declared = declared or denoiser.sampling_range

    @property
    def sampling_range(self) -> tuple[float, float]:
        return self._declared

    def begin_at(self, sigma: float) -> None:
        """Sample from that level, or the nearest the model was trained on, if its own range ends below."""
        low, high = self._declared
        self._declared = low, max(high, min(sigma, self.denoiser.trained_range[1]))

    @torch.no_grad()
    def ask(self, denoiser: Denoiser, z: Tensor, sigma: float | Tensor, cond: Cond) -> Estimate:
        before = self.passes
        estimate = super().ask(denoiser, z, sigma, cond)
        self.counts[self.part] = self.counts.get(self.part, 0) + self.passes - before
        if self.tell is not None:
            self.tell(self.part, self.passes)
        return estimate


@dataclass(frozen=True)
class Samples:
    """Clean samples on the model's device, with a draw of noise for each and their conditions.

    Attributes:
        x: `[N, *shape]`.
        eps: `[N, *shape]`.
        cond: one entry per sample.
    """

    x: Tensor
    eps: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.x)

    def first(self, n: int) -> Samples:
        """The first n of them."""
        return Samples(self.x[:n], self.eps[:n], take(self.cond, slice(n)))

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        cond = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.cond.items()}
        return Samples(self.x.to(device), self.eps.to(device), cond)

    def chunks(self, size: int) -> list[Samples]:
        """Consecutive parts of at most that size."""
        return [Samples(self.x[part], self.eps[part], cond) for part, cond in chunks(len(self), size, self.cond)]
