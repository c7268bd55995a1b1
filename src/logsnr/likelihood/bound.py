"""Bound: the variational bound of stored images, in bits per dimension, with its standard error.

    -log P(v)  <=  KL(q(z_1|x) || N(0, I))  +  E[-log P(v | z_0)]  +  1/2 int_{lo}^{hi} E||eps_hat - eps||^2 dlambda
                   prior                       reconstruction         diffusion

with x the cell centres of the grey levels v (pixels.py), z_0 and z_1 the states at the clean end hi and the noisy end
lo of the log-SNR range, and P(v | z_0) a factorised softmax over all grey levels with the Gaussian logits of z_0 | x
(2107.00630, VDM; the weighted ELBO of 2303.00848 with w = 1).  A bound means nothing without its range: a result
carries it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.likelihood.control import Pilot
from logsnr.likelihood.integral import check_budget, integrate, prepare
from logsnr.likelihood.terms import (
    check_levels,
    codec_of,
    default_logsnr_range,
    expected_reconstruction_nats,
    prior_nats,
    warn_if_short,
)
from logsnr.pixels import Pixels


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """A variational bound in bits per dimension; every term is a mean over the images.

    Attributes:
        bits_per_dim: the bound, `prior + reconstruction + diffusion`.
        stderr: its standard error over noise and noise levels, the images held fixed.
        data_stderr: the standard error that the choice of images adds.
        per_image: the bound of each image `[N]`.
        logsnr_range: (lo, hi) of the noise levels; the bound depends on it.
        loss_curve: (log-SNR, E||eps_hat - eps||^2 / D) in 20 equal bins of the range, each `[20]`.
        evaluations: network evaluations spent on the estimate.
        pilot_evaluations: network evaluations that the pilot took besides.
    """

    bits_per_dim: float
    stderr: float
    data_stderr: float
    diffusion: float
    reconstruction: float
    prior: float
    per_image: Tensor
    logsnr_range: tuple[float, float]
    loss_curve: tuple[Tensor, Tensor]
    evaluations: int
    pilot_evaluations: int = 0

    def __str__(self) -> str:
        lo, hi = self.logsnr_range
        return (
            f"{self.bits_per_dim:.4f} +- {self.stderr:.4f} bits/dim on log-SNR [{lo:.2f}, {hi:.2f}] "
            f"(diffusion {self.diffusion:.4f}, reconstruction {self.reconstruction:.4f}, prior {self.prior:.4f})"
        )


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    images: Tensor,
    *,
    pixels: Pixels | None = None,
    logsnr_range: tuple[float, float] | None = None,
    cond: dict[str, Tensor] | None = None,
    generator: torch.Generator,
    evaluations_per_image: int = 32,
    tolerance: float | None = None,
    max_evaluations_per_image: int = 1024,
    train: Tensor | None = None,
    pilot: Pilot | None = None,
    chunk: int = 512,
) -> Likelihood:
    """Estimate the variational bound of stored images under a denoiser.

    The diffusion term is an integral over log-SNR: every image is evaluated at one noise level in each of
    `evaluations_per_image` strata of the levels that a small pilot chose, less what the noise alone explains
    (control.py), in 8 replicates that are unbiased each by itself; the spread of the replicates is the standard error.
    Prior and reconstruction are exact.  With a tolerance the rule to stop reads the same data as the estimate; as mean
    and spread of 8 replicates are all but independent, that costs a bias far below the tolerance.

    Args:
        denoiser: the model; its codec says how many grey levels there are.
        images: grey levels uint8 `[N, *shape]`.
        pixels: the codec of a denoiser without one.
        logsnr_range: (lo, hi) noise levels of the bound; `default_logsnr_range(codec)` if None.
        cond: conditions with one entry per image.
        generator: source of every draw; its device does the drawing.
        evaluations_per_image: network evaluations per image, a multiple of 8.
        tolerance: continue until the standard error is at most this, in bits per dimension.
        max_evaluations_per_image: where a tolerance stops at the latest, with a warning.
        train: training images uint8: their covariance makes the better control (its cost up to 3,072 dimensions: one
            D x D product per image); without, the spectrum of the images themselves does.
        pilot: a pilot measured before, on any images; None measures one here, `Pilot.uniform(lo, hi)` does without.
        chunk: images per network call.

    Raises:
        ValueError: if the images do not fit the codec or the denoiser's shape, if there is no codec, or `pixels` beside
            the denoiser's own and another, if the range is not an increasing pair, if `evaluations_per_image` is not a
            positive multiple of 8, or the denoiser's answer is not finite.
    """
    if tuple(images.shape[1:]) != denoiser.shape or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: the denoiser needs at least one image of shape {denoiser.shape}"
        )
    check_budget(evaluations_per_image, tolerance, max_evaluations_per_image)
    codec = codec_of(denoiser, pixels)
    lo, hi = logsnr_range or default_logsnr_range(codec)
    check_levels(denoiser, lo, hi, stacklevel=4)
    images, cond = on(images, denoiser.device), on(cond or {}, denoiser.device)
    x = codec.encode(images)
    n, dim = len(x), x[0].numel()
    unit = 1 / (dim * math.log(2))
    reconstruction = expected_reconstruction_nats(images, codec, hi).cpu()
    prior = prior_nats(x, lo).cpu()
    warn_if_short(lo, hi, float(prior.mean()) * unit, float(reconstruction.mean()) * unit, codec)
    pilot = prepare(
        denoiser,
        x,
        pilot,
        None if train is None else codec.encode(train),
        logsnr_range=(lo, hi),
        cond=cond,
        generator=generator,
        chunk=chunk,
        evaluations_per_image=evaluations_per_image,
    )
    diffusion = integrate(
        denoiser,
        x,
        pilot,
        torch.ones_like,
        cond=cond,
        generator=generator,
        chunk=chunk,
        evaluations_per_image=evaluations_per_image,
        tolerance=None if tolerance is None else tolerance / unit,
        max_evaluations_per_image=max_evaluations_per_image,
    )
    stderr = diffusion.stderr * unit
    if tolerance is not None and stderr > tolerance:
        warnings.warn(
            f"standard error {stderr:.4g} bits/dim after {diffusion.evaluations_per_image} evaluations per image is "
            f"above tolerance = {tolerance:g}: raise max_evaluations_per_image",
            stacklevel=3,
        )
    per_image = (diffusion.per_image + reconstruction + prior) * unit
    centres, errors = diffusion.curve
    return Likelihood(
        bits_per_dim=float(per_image.mean()),
        stderr=stderr,
        data_stderr=float(per_image.std() / n**0.5) if n > 1 else math.inf,
        diffusion=float(diffusion.per_image.mean() * unit),
        reconstruction=float(reconstruction.mean() * unit),
        prior=float(prior.mean() * unit),
        per_image=per_image,
        logsnr_range=(lo, hi),
        loss_curve=(centres, errors / dim),
        evaluations=diffusion.evaluations_per_image * n,
        pilot_evaluations=pilot.evaluations,
    )
