"""Latents: what is stored of images that were encoded, as a network wants it.

    moments      [n, 2 C, H, W]      mean, and behind it standard deviation:  x = mean + deviation eps, drawn each time
    draws        [n, C, H, W]        x itself, drawn once

Noise of a draw comes from the seed and the number of the image, so that a set that was cut off goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logsnr.training.data.vae import VAE


@dataclass(frozen=True, kw_only=True)
class Latent:
    """How latents are stored.

    Attributes:
        moments: whether there are means and deviations.
        vae: the name of what they are of.
    """

    moments: bool
    vae: str

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """(C, H, W) of x."""
        channels, *sides = stored
        return (channels // 2 if self.moments else channels, *sides)

    def x(self, stored: Tensor, noise: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Samples of what is stored `[B, ...]`.

        Args:
            stored: float32.
            noise: shape of one -> standard normal `[B, C, H, W]`; asked where there are deviations.
        """
        if not self.moments:
            return stored
        mean, deviation = stored.chunk(2, 1)
        return torch.addcmul(mean, deviation, noise(tuple(mean.shape[1:])).to(mean))


@dataclass
class Spread:
    """Sums over stored latents, for the standard deviation of x about the common mean."""

    latent: Latent
    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, stored: Tensor) -> None:
        """Count some."""
        mean, *deviation = stored.double().chunk(2, 1) if self.latent.moments else (stored.double(),)
        self.n += mean.numel()
        self.total += float(mean.sum())
        self.squares += float(mean.square().sum()) + sum(float(d.square().sum()) for d in deviation)

    @property
    def deviation(self) -> float:
        """sqrt(E[x^2] - E[x]^2)."""
        return float(max(self.squares / self.n - (self.total / self.n) ** 2, 0.0) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Images to what is stored.

    Args:
        vae: what encodes.
        draws: whether x is drawn once, in place of its moments.
        seed: of the draws.
        chunk: images per call.
    """

    vae: VAE
    draws: bool = False
    seed: int = 0
    chunk: int = 16

    @property
    def latent(self) -> Latent:
        """How it stores."""
        return Latent(moments=self.vae.stochastic and not self.draws, vae=self.vae.name)

    def facts(self) -> dict[str, Any]:
        """What decides the latents, for the list of a set."""
        seed = {"seed": self.seed} if self.draws and self.vae.stochastic else {}
        scaled = {"scaling_factor": self.vae.scale, "shift_factor": self.vae.shift}
        return {
            "vae": self.vae.name, "identity": self.vae.identity, "moments": self.latent.moments, **scaled, **seed,
        }  # fmt: skip

    def shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is stored of an image (C, H, W)."""
        channels, *sides = self.vae.shape(image)
        return (2 * channels if self.latent.moments else channels, *sides)

    def __call__(self, images: Tensor, first: int) -> Tensor:
        """What is stored of images, of which the first is number `first` of its part; float32."""
        out = []
        for start in range(0, len(images), self.chunk):
            mean, deviation = self.vae.moments(images[start : start + self.chunk])
            if self.latent.moments:
                out.append(torch.cat([mean, deviation], 1))
                continue
            if self.vae.stochastic:
                for i in range(len(mean)):
                    own = torch.Generator().manual_seed(self.seed * 2**32 + first + start + i)
                    mean[i] += deviation[i] * torch.randn(mean.shape[1:], generator=own)
            out.append(mean)
        return torch.cat(out) if out else torch.empty(0)
