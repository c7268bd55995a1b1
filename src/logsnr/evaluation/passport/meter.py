"""Counting: every answer that a passport asks for goes through one meter, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate

Cond = Mapping[str, Any]
Tell = Callable[[str, int], None]


class Meter(Denoiser):
    """A denoiser that counts network evaluations of single samples under the name of the present part.

    Args:
        denoiser: the model.
        declared: the range to sample on, None for the model's own.
    """

    def __init__(self, denoiser: Denoiser, declared: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape = tuple(denoiser.shape)
        self.sigma_data = denoiser.sigma_data
        self.trained_range = denoiser.trained_range
        self.part = "loss"
        self.counts: dict[str, int] = {}
        self.tell: Tell | None = None  # called with (part, evaluations so far) after every answer
        self._declared = declared or denoiser.sampling_range
        first = next((t for t in (*denoiser.parameters(), *denoiser.buffers()) if t.is_floating_point()), None)
        self.device = torch.device("cpu") if first is None else first.device

    @property
    def finite_at_inf(self) -> bool:
        return self.denoiser.finite_at_inf

    @property
    def sampling_range(self) -> tuple[float, float]:
        return self._declared

    @property
    def spent(self) -> int:
        """All evaluations so far."""
        return sum(self.counts.values())

    def cost(self, sigma: float) -> int:
        return self.denoiser.cost(sigma)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        return self.ask(self.denoiser, z, sigma, cond)

    @torch.no_grad()
    def ask(self, denoiser: Denoiser, z: Tensor, sigma: float | Tensor, cond: Cond) -> Estimate:
        """The answer of the model in another guise, counted like its own."""
        level = float(torch.as_tensor(sigma).reshape(-1)[0])
        self.counts[self.part] = self.counts.get(self.part, 0) + len(z) * denoiser.cost(level)
        estimate: Estimate = denoiser(z, sigma, **cond)
        if self.tell is not None:
            self.tell(self.part, self.spent)
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
        return Samples(self.x[:n], self.eps[:n], {k: v[:n] for k, v in self.cond.items()})

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        cond = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.cond.items()}
        return Samples(self.x.to(device), self.eps.to(device), cond)

    def chunks(self, size: int) -> list[Samples]:
        """Consecutive parts of at most that size."""
        return [
            Samples(self.x[i : i + size], self.eps[i : i + size], {k: v[i : i + size] for k, v in self.cond.items()})
            for i in range(0, len(self), size)
        ]


def rows_of(cond: Cond | None, index: Tensor) -> dict[str, Any]:
    """The conditions of samples `index`, taken in turn where there are fewer."""
    return {} if cond is None else {k: v[index.to(v.device) % len(v)] for k, v in cond.items()}
