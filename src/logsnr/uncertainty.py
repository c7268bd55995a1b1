"""Uncertainty: EDM2's learned weighting, a small head u that says how large the loss is at each noise level.

    l'  =  l / e^u(lambda)  +  u(lambda)                                            (2312.02696; Kendall et al. 2018)

For a fixed network the best u is ln E[l | lambda], and there the sum is 1 + ln E[l | lambda].  What reaches the network
is l/e^u: it is trained with the weighting w e^-u.  With l = w/(2 p) E that is, at the optimum,

    w(lambda) e^-u(lambda)  =  2 p(lambda) / E||eps_hat - eps||^2

whatever w was: levels count by how often they are drawn, and by the inverse of what is left of their error.  So it is
another objective, one that moves as the network learns (w ~ 1/E for levels drawn uniformly), where an adaptive
schedule changes p alone and minimises what it did.  It has no ELBO to be; u is thrown away after training.  (On top of
an adaptive p ~ w E it would be w again.)

In a recipe: `objective: {preset: edm2, uncertainty: true}`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from logsnr.weightings import Custom, Weighting


class Uncertainty(nn.Module):
    """u(lambda): one linear layer on random Fourier features of ln(sigma)/4, as in EDM2, but zero at the start.

        head = Uncertainty(generator=generator)                     # its parameters go to the optimizer too
        output = objective(denoiser, x, generator=generator)
        loss = head.weigh(output.loss / objective.scale(denoiser.dim), output.logsnr).mean()

    Args:
        channels: number of features.
        bandwidth: standard deviation of their frequencies, in cycles per unit of ln(sigma)/4.
        generator: source of the frequencies and phases.

    Raises:
        ValueError: if `channels` or `bandwidth` is not positive.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128, *, bandwidth: float = 1.0, generator: torch.Generator) -> None:
        super().__init__()
        if channels < 1 or not 0 < bandwidth < math.inf:
            raise ValueError(f"channels = {channels}, bandwidth = {bandwidth}: both must be positive")
        device = generator.device
        self.register_buffer(
            "frequencies", 2 * math.pi * bandwidth * torch.randn(channels, generator=generator, device=device)
        )
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator, device=device))
        self.linear = nn.Linear(channels, 1, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, logsnr: Tensor) -> Tensor:
        """u at log-SNRs of any shape."""
        c_noise = (-0.125 * logsnr).to(self.frequencies.dtype).to(self.frequencies.device)
        features = (c_noise[..., None] * self.frequencies + self.phases).cos() * math.sqrt(2)
        u: Tensor = self.linear(features)[..., 0]
        return u

    def weigh(self, loss: Tensor, logsnr: Tensor) -> Tensor:
        """l/e^u + u, per sample.

        Args:
            loss: `[B]`, of a `WeightedELBO` or of any loop, divided by a constant that makes it about 1.
            logsnr: `[B]`, the levels at which it was formed.
        """
        u: Tensor = self(logsnr).to(loss.device)
        return loss * (-u).exp() + u

    def weighting(self, base: Weighting) -> Weighting:
        """What the network is trained with now: w e^-u, for plots and `describe`."""

        @torch.no_grad()
        def log_w(logsnr: Tensor) -> Tensor:
            u: Tensor = self(logsnr).to(logsnr)
            return base.log(logsnr) - u

        return Custom(log_w, in_log=True)
