"""Pictures: what the model does to samples, for a person to look at."""

from __future__ import annotations

import torch
from torch import Tensor

from logsnr.denoiser import Estimate, noisy
from logsnr.evaluation.passport.card import Pictures
from logsnr.evaluation.passport.meter import Meter, Samples
from logsnr.noise import alpha_s
from logsnr.pixels import Pixels
from logsnr.sampling import Step, grids, sample, solvers
from logsnr.sampling.batches import Cond, take

PICTURES = 8
LEVELS = 8
STEPS = 8
ROWS = 4
BETWEEN = (0.1, 20.0)
"""Noise levels of the pictures over sigma_data: below nothing is to be seen, above nothing is left."""


@torch.no_grad()
def take_pictures(denoiser: Meter, samples: Samples, noise: Tensor, cond: Cond) -> Pictures | None:
    """Denoised samples at eight noise levels, and x0 along sampling trajectories; None for what is no image."""
    if show(denoiser, samples.x[:1]) is None:
        return None
    low, high = denoiser.sampling_range
    bottom, top = max(low, BETWEEN[0] * denoiser.sigma_data), min(high, BETWEEN[1] * denoiser.sigma_data)
    if bottom >= top:
        bottom, top = low, high
    rows, sigmas = [], tuple(top * (bottom / top) ** (i / (LEVELS - 1)) for i in range(LEVELS))
    for sigma in sigmas:
        z = noisy(samples.x, samples.eps, sigma)
        estimate: Estimate = denoiser(z, sigma, **samples.cond)
        alpha, _ = alpha_s(sigma)
        # A noisy picture is shown as z scaled to the data's spread: y itself would leave the box.
        spread = denoiser.sigma_data / (alpha**2 * denoiser.sigma_data**2 + 1 - alpha**2) ** 0.5
        rows += [_shown(denoiser, z * spread), _shown(denoiser, estimate.x0)]
    plan = solvers.ge(grids.log_linear(STEPS, high, low), gamma=2.0)
    seen: list[Tensor] = []

    def keep(step: Step) -> None:
        if step.index < STEPS:
            assert step.estimate is not None
            seen.append(step.estimate.x0)

    count = min(ROWS, len(noise))
    given = take(cond, slice(count))
    end = sample(denoiser, plan, noise=noise[:count], cond=given, callback=keep, check=False)
    frames = [_shown(denoiser, x) for x in (*seen, end)]
    return Pictures(
        sigmas=sigmas,
        denoised=torch.cat(rows),
        columns=len(samples),
        trajectory=torch.stack(frames, 1).flatten(0, 1),
        steps=plan.sigmas,
    )


def _shown(denoiser: Meter, x: Tensor) -> Tensor:
    images = show(denoiser, x)
    assert images is not None
    return images


def show(denoiser: Meter, x: Tensor) -> Tensor | None:
    """Images uint8 `[N, 1 or 3, H, W]`, 0 ... 255, of samples; None if they are no images."""
    model, safe = denoiser.denoiser, x.nan_to_num(0.0, 1e4, -1e4)
    pixels = model.pixels or Pixels()
    try:
        images = model.decode(safe)
    except ValueError:  # no codec: x itself may be an image in the box
        images = pixels.decode(safe)
    return pixels.display(images).cpu() if images.ndim == 4 and images.shape[1] in (1, 3) else None
