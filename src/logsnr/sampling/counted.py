"""Counted evaluations: what a result has cost, whoever asked.

A deterministic sampler is a map from noise to samples.  Two samplers, or one at two step counts, are compared from the
*same* noise at *counted* network evaluations:  RMSE = sqrt(mean over samples and dimensions of (x - x_teacher)^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Around, Denoiser, Estimate
from logsnr.sampling.batches import Cond


class Counted(Around):
    """A denoiser that counts network evaluations, whoever asks: Heun's twice a step, guidance's doubled.

    Attributes:
        evaluations: network evaluations, whatever the size of the batch: per sample, unless it is asked in chunks.
        answers: samples denoised, summed over calls.
        passes: network evaluations times samples.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.evaluations = self.answers = self.passes = 0

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        return self.ask(self.denoiser, z, sigma, cond)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The model's own: who counts it is no other model."""
        return self.denoiser.state_dict(*args, **options)

    def ask(self, denoiser: Denoiser, z: Tensor, sigma: float | Tensor, cond: Cond) -> Estimate:
        """The answer of the model in another guise, counted like its own."""
        cost = denoiser.cost(float(torch.as_tensor(sigma).reshape(-1)[0]))
        self.evaluations += cost
        self.answers += len(z)
        self.passes += cost * len(z)
        estimate: Estimate = denoiser(z, sigma, **cond)
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
