"""End points: how far a few-step sample lands from where the exact trajectory of the same noise ends.

A deterministic sampler is a map from noise to samples.  Two samplers, or one at two step counts, are compared from the
*same* noise at *counted* network evaluations:  RMSE = sqrt(mean over samples and dimensions of (x - x_teacher)^2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate


class Counted(Denoiser):
    """A denoiser that counts its evaluations: `calls` per batch, whoever asks (Heun and guidance included)."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape = denoiser.shape
        self.sigma_data = denoiser.sigma_data
        self.trained_range = denoiser.trained_range
        self.calls = 0

    @property
    def finite_at_inf(self) -> bool:
        return self.denoiser.finite_at_inf

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        self.calls += 1
        estimate: Estimate = self.denoiser(z, sigma, **cond)
        return estimate


def rmse(x: Tensor, teacher: Tensor) -> float:
    """Root mean squared difference per dimension, in the units of x.

    Raises:
        ValueError: if the two do not hold the same samples (shapes differ).
    """
    if x.shape != teacher.shape:
        raise ValueError(
            f"samples of shape {tuple(x.shape)} against {tuple(teacher.shape)}: sample both from one noise"
        )
    return float((x.double() - teacher.double()).square().mean().sqrt())
