"""Pictures: what the averaged model draws from the same noise, step after step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.images import grid_columns, png, tile
from logsnr.models import Network
from logsnr.sampling.loop import sample
from logsnr.training.config import Recipe
from logsnr.training.data.vae import VAE
from logsnr.training.draws import derived_seed
from logsnr.writing import replace_file


def in_turn(n: int, classes: int) -> Tensor:
    """Classes of n samples: in turn, or evenly spread where there are more classes than samples."""
    return torch.arange(n) % classes if n >= classes else torch.arange(n) * classes // n


def save_picture(denoiser: NetworkDenoiser, recipe: Recipe, path: Path | None) -> None:
    """Draw `recipe.samples` and write them as a PNG; conditional models draw the classes in turn, or spread.

    Processes that each hold a part of the weights all draw; those that are to write nothing are given no path.
    Latents are decoded by the VAE of the recipe; without one nothing is drawn.

    Raises:
        OSError: if the disk refuses.
    """
    if denoiser.pixels is None and recipe.data.vae is None:
        return
    options = recipe.samples
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "samples"))
    noise = torch.randn(options.count, *denoiser.shape, generator=generator).to(device)
    assert isinstance(denoiser.network, Network)
    classes = denoiser.network.classes
    cond = {"class_labels": in_turn(options.count, classes).to(device)} if classes else None
    x = sample(denoiser, options.plan(*denoiser.sampling_range, denoiser.sigma_data), noise=noise, cond=cond)
    if path is None:
        return
    if denoiser.pixels is None:
        assert recipe.data.vae is not None
        shown = VAE(recipe.data.vae, device).decode(x).cpu()
    else:
        shown = denoiser.pixels.display(denoiser.decode(x).cpu())
    shown = shown[:, :3] if shown.shape[1] == 4 else shown
    picture = tile(shown, columns=grid_columns(options.count, classes), scale=max(1, 64 // shown.shape[3]))
    replace_file(path, png(picture))
