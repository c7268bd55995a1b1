"""Likelihood: the variational bound of stored images, in bits per dimension, with its standard error.

    -log P(v)  <=  KL(q(z_1|x) || N(0, I))  +  E[-log P(v | z_0)]  +  1/2 int_{lo}^{hi} E||eps_hat - eps||^2 dlambda
                   prior                       reconstruction         diffusion

with x the cell centres of the grey levels v (pixels.py), z_0 and z_1 the states at the clean end hi and the noisy end
lo of the log-SNR range, and P(v | z_0) a factorised softmax over all levels with the Gaussian logits of z_0 | x
(2107.00630, VDM; the weighted ELBO of 2303.00848 with w = 1).  A bound means nothing without its range: a result
carries it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.noise import alpha_s, logsnr_from_sigma, sigma_from_logsnr
from logsnr.pixels import Pixels

REPLICATES = 8
"""Independent repetitions of the whole estimate; their spread is the standard error."""


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
        evaluations: network evaluations spent.
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

    def __str__(self) -> str:
        lo, hi = self.logsnr_range
        return (
            f"{self.bits_per_dim:.4f} +- {self.stderr:.4f} bits/dim on log-SNR [{lo:.2f}, {hi:.2f}] "
            f"(diffusion {self.diffusion:.4f}, reconstruction {self.reconstruction:.4f}, prior {self.prior:.4f})"
        )


def default_logsnr_range(levels: int) -> tuple[float, float]:
    """VDM's [-5, 13.3] for 256 grey levels, its clean end at the same noise per cell for other level counts."""
    return -5.0, 13.3 - 2 * math.log(256 / levels)


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    images: Tensor,
    *,
    levels: int = 256,
    logsnr_range: tuple[float, float] | None = None,
    cond: dict[str, Tensor] | None = None,
    generator: torch.Generator,
    evaluations_per_image: int = 32,
    batch: int = 512,
) -> Likelihood:
    """Estimate the variational bound of stored images under a denoiser.

    The diffusion term is an integral over log-SNR: every image is evaluated at one noise level in each of
    `evaluations_per_image` equal strata, in independent positions (stratified, unbiased).  The strata are dealt to 8
    replicates so that each replicate is an unbiased estimate by itself; the spread of the replicates is the standard
    error.

    Args:
        denoiser: the model; its units of x are those of `Pixels(levels)`.
        images: grey levels uint8 `[N, *shape]`.
        levels: number of grey levels (17 for scikit-learn's digits).
        logsnr_range: (lo, hi) noise levels of the bound; `default_logsnr_range(levels)` if None.
        cond: conditions with one entry per image.
        generator: source of every draw; its device does the drawing.
        evaluations_per_image: network evaluations per image, a multiple of 8.
        batch: images per network call.

    Raises:
        ValueError: if the images are not uint8 below `levels` or not of the denoiser's shape, if the range is not an
            increasing pair, or if `evaluations_per_image` is not a positive multiple of 8.
    """
    _check(denoiser, images, evaluations_per_image)
    lo, hi = logsnr_range or default_logsnr_range(levels)
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"logsnr_range = ({lo}, {hi}): give finite log-SNRs with lo < hi")
    sigma_lo, sigma_hi = denoiser.trained_range
    if sigma_from_logsnr(hi) < 0.8 * sigma_lo or sigma_from_logsnr(lo) > 1.25 * sigma_hi:
        warnings.warn(
            f"the bound's log-SNR range [{lo:.2f}, {hi:.2f}] reaches beyond the denoiser's trained range "
            f"[{logsnr_from_sigma(sigma_hi):.2f}, {logsnr_from_sigma(sigma_lo):.2f}]; the bound holds, but is loose",
            stacklevel=2,
        )
    x = Pixels(levels).encode(images)
    n, dim, per_replicate = len(x), x[0].numel(), evaluations_per_image // REPLICATES
    diffusion = torch.zeros(REPLICATES, n, dtype=torch.float64)
    reconstruction = torch.zeros(REPLICATES, n, dtype=torch.float64)
    curve = torch.zeros(2, 20, dtype=torch.float64)
    for replicate in range(REPLICATES):
        # Stratified over levels *and* images: image i takes strata offset_i + k n of a grid of n * per_replicate.
        offsets = torch.randperm(n, generator=generator, device=generator.device)
        for k in range(per_replicate):
            jitter = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
            u = (offsets + k * n + jitter) / (n * per_replicate)
            logsnr = lo + (hi - lo) * u.to(x.device)
            error = _errors(denoiser, x, logsnr, cond, generator, batch).cpu()
            diffusion[replicate] += 0.5 * (hi - lo) * error / per_replicate
            bins = ((logsnr - lo) / (hi - lo) * 20).long().clamp(max=19).cpu()
            curve[0].index_add_(0, bins, error / dim)
            curve[1].index_add_(0, bins, torch.ones_like(error))
        reconstruction[replicate] = reconstruction_nats(x, levels, hi, generator=generator).cpu()
    prior = prior_nats(x, lo).cpu()
    unit = 1 / (dim * math.log(2))
    bound = (diffusion + reconstruction + prior) * unit
    per_image = bound.mean(0)
    centres = lo + (hi - lo) * (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    return Likelihood(
        bits_per_dim=float(per_image.mean()),
        stderr=float(bound.mean(1).std() / REPLICATES**0.5),
        data_stderr=float(per_image.std() / n**0.5) if n > 1 else math.inf,
        diffusion=float(diffusion.mean() * unit),
        reconstruction=float(reconstruction.mean() * unit),
        prior=float(prior.mean() * unit),
        per_image=per_image,
        logsnr_range=(lo, hi),
        loss_curve=(centres, curve[0] / curve[1].clamp(min=1)),
        evaluations=evaluations_per_image * n,
    )


def prior_nats(x: Tensor, logsnr_min: float) -> Tensor:
    """KL(q(z_1|x) || N(0, I)) = 1/2 sum(alpha^2 x^2 + s^2 - ln s^2 - 1), in nats `[N]`, float64."""
    alpha, s = alpha_s(sigma_from_logsnr(logsnr_min))
    return 0.5 * ((alpha * x.double()).square() + s * s - 2 * math.log(s) - 1).flatten(1).sum(1)


def reconstruction_nats(x: Tensor, levels: int, logsnr_max: float, *, generator: torch.Generator) -> Tensor:
    """One draw of -log P(v | z_0) in nats `[N]`, float64, for cell centres x `[N, *shape]`.

    P(v | z_0) is a softmax over the levels k of -(z_0/alpha_0 - x_k)^2 / (2 sigma_0^2), independently per dimension.
    """
    sigma = sigma_from_logsnr(logsnr_max)
    centres = Pixels(levels).encode(torch.arange(levels, dtype=torch.uint8)).to(x.device).double()
    out = torch.empty(len(x), dtype=torch.float64, device=x.device)
    chunk = max(1, 2**22 // (x[0].numel() * levels))  # at most 32 MiB of logits at a time
    for i in range(0, len(x), chunk):
        part = x[i : i + chunk].double()
        eps = torch.randn(part.shape, generator=generator, device=generator.device, dtype=torch.float64)
        y = part + sigma * eps.to(x.device)
        logits = -0.5 * ((y[..., None] - centres) / sigma).square()
        # The true level's own logit is -eps^2/2: no rounding back to an index is needed.
        own = -0.5 * eps.to(x.device).square()
        out[i : i + chunk] = (logits.logsumexp(-1) - own).flatten(1).sum(1)
    return out


def _errors(
    denoiser: Denoiser,
    x: Tensor,
    logsnr: Tensor,
    cond: dict[str, Tensor] | None,
    generator: torch.Generator,
    batch: int,
) -> Tensor:
    out = []
    for i in range(0, len(x), batch):
        part = slice(i, i + batch)
        eps = torch.randn(x[part].shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
        sigma = sigma_from_logsnr(logsnr[part]).to(x.dtype)
        conditions: dict[str, Any] = {name: value[part] for name, value in (cond or {}).items()}
        out.append(denoiser.eps_error(x[part], eps, sigma, **conditions).double())
    return torch.cat(out)


def _check(denoiser: Denoiser, images: Tensor, evaluations_per_image: int) -> None:
    if tuple(images.shape[1:]) != denoiser.shape or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: the denoiser needs at least one image of shape {denoiser.shape}"
        )
    if evaluations_per_image < REPLICATES or evaluations_per_image % REPLICATES:
        raise ValueError(
            f"evaluations_per_image = {evaluations_per_image}: give a positive multiple of {REPLICATES}, "
            "the number of replicates behind the standard error"
        )
