"""Timestep tables: the discrete noise levels that checkpoints were trained on, made continuous.

A table of T cumulative products abar_t (DDPM's `alphas_cumprod`) is T noise levels
sigma_t = sqrt((1 - abar_t) / abar_t).  Between grid points log sigma is linear in t; a zero-terminal-SNR table,
whose last sigma is inf, ends with a segment that is linear in 1/sigma instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from logsnr.noise import Level


class TimestepTable:
    """A discrete table of noise levels with continuous interpolation, exact on the grid both ways.

    Calling it is `timestep`, so a table serves as the label of a `Prediction`.

    Args:
        alphas_cumprod: T >= 2 values in (0, 1), strictly decreasing; the last may be 0 (zero terminal SNR).

    Raises:
        ValueError: if the values leave that range or are not strictly decreasing.
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float], *, name: str = "table") -> None:
        abar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if abar.ndim != 1 or len(abar) < 2:
            raise ValueError(f"alphas_cumprod has shape {tuple(abar.shape)}: give one axis of at least 2 values")
        if not bool((abar[1:] < abar[:-1]).all()) or not 0 <= float(abar[-1]) or not float(abar[0]) < 1:
            raise ValueError(
                f"alphas_cumprod runs from {float(abar[0]):.4g} to {float(abar[-1]):.4g}: values must lie in (0, 1) "
                "(0 allowed at the end) and decrease strictly; sort them from clean to noisy"
            )
        self.alphas_cumprod = abar
        self.name = name

    @classmethod
    def from_betas(cls, betas: Tensor, *, name: str = "table") -> TimestepTable:
        """The table of 1 - beta_t, multiplied up in float32: bit for bit the numbers checkpoints were trained on."""
        return cls(torch.cumprod(1 - betas.to(torch.float32), 0), name=name)

    @classmethod
    def ddpm(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> TimestepTable:
        """DDPM's linear betas (2006.11239, sec. 4); sigma from .0100 to 157.4."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float32), name="ddpm")

    @classmethod
    def stable_diffusion(cls) -> TimestepTable:
        """Stable Diffusion's scaled-linear betas, sqrt-linear from .00085 to .012; sigma from .0292 to 14.61."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
        return cls.from_betas(betas, name="stable-diffusion")

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> TimestepTable:
        """iDDPM's `cosine_betas`."""
        return cls.from_betas(cosine_betas(steps, max_beta), name="cosine")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def __repr__(self) -> str:
        return f"TimestepTable({self.name!r}, {len(self)} levels, sigma {self.sigmas[0]:.4g} ... {self.sigmas[-1]:.4g})"

    @cached_property
    def sigmas(self) -> Tensor:
        """The T noise levels, increasing, float64."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest noise level."""
        return float(self.sigmas[0]), float(self.sigmas[-1])

    def sigma(self, t: Level) -> Level:
        """Noise level at timestep t in [0, T - 1], clamped to that range; t need not be an integer."""
        x = _as_float64(t).clamp(0, len(self) - 1)
        i = x.floor().clamp(max=len(self) - 2).long()
        lower, upper = self._ends(i)
        frac = x - i
        inner = (lower.log().lerp(upper.log(), frac)).exp()
        # Grid points come back as they stand in the table; the segment up to sigma inf is linear in 1/sigma.
        inner = torch.where(upper.isinf(), lower / (1 - frac), inner)
        out = torch.where(frac == 0, lower, torch.where(frac == 1, upper, inner))
        return _like(out, t)

    def timestep(self, sigma: Level) -> Level:
        """Timestep in [0, T - 1] of a noise level: the inverse of `sigma`, clamped at the ends.

        A float32 sigma lies within one ulp of its grid point, some 1e-5 of a timestep; results within 1e-4 of an
        integer are that integer, so grid points round-trip exactly in either precision.
        """
        x = _as_float64(sigma).clamp(*self.sigma_range)
        grid = self.sigmas.to(x.device)
        i = torch.searchsorted(grid, x, right=True).sub(1).clamp(0, len(self) - 2)
        lower, upper = self._ends(i)
        log_ratio = (x / lower).log() / (upper / lower).log()
        frac = torch.where(upper.isinf(), 1 - lower / x, log_ratio)
        t = i + torch.where(x.isinf(), torch.ones_like(x), frac)
        nearest = t.round()
        return _like(torch.where((t - nearest).abs() < 1e-4, nearest, t), sigma)

    __call__ = timestep

    def _ends(self, i: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.sigmas.to(i.device)
        return grid[i], grid[i + 1]


def cosine_betas(steps: int, max_beta: float = 0.999) -> Tensor:
    """iDDPM's betas `[steps]`, float32 (2102.09672, eq. 17, offset .008, capped at `max_beta`)."""

    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - abar((i + 1) / steps) / abar(i / steps), max_beta) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def to_zero_terminal(abar: Tensor) -> Tensor:
    """Products of betas, shifted and scaled in their root to end at 0 (2305.08891, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _as_float64(value: float | Tensor) -> Tensor:
    return value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _like(out: Tensor, value: Level) -> Level:
    if isinstance(value, Tensor):
        return out.to(value.dtype if value.is_floating_point() else torch.float32)
    return float(out)
