"""End points: how far a few-step sample lands from where the exact trajectory of the same noise ends.

A deterministic sampler is a map from noise to samples.  Two samplers, or one at two step counts, are compared from the
*same* noise at *counted* network evaluations:  RMSE = sqrt(mean over samples and dimensions of (x - x_teacher)^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate


class Counted(Denoiser):
    """A denoiser that counts network evaluations per sample, whoever asks: Heun's twice a step, guidance's doubled.

    Attributes:
        evaluations: the count so far; set it to 0 to start again.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape = denoiser.shape
        self.sigma_data = denoiser.sigma_data
        self.trained_range = denoiser.trained_range
        self.evaluations = 0

    @property
    def finite_at_inf(self) -> bool:
        return self.denoiser.finite_at_inf

    def cost(self, sigma: float) -> int:
        return self.denoiser.cost(sigma)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        self.evaluations += self.cost(float(torch.as_tensor(sigma).reshape(-1)[0]))
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
