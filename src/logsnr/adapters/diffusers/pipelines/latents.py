"""The codec between images in [-1, 1] and what a pipeline's network denoises.

    latents = ((mean of the VAE's posterior) - shift) scale            (- mean)/std per channel where the VAE has them
    image   = VAE(latents/scale + shift)

A pixel model denoises the images themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.pixels import Pixels


class Latents:
    """The VAE of a pipeline with its scaling; `vae` None for a pixel model.

    Args:
        vae: an `AutoencoderKL`, or another with `encode(x).latent_dist` (or `.latents`: TAESD) and `decode(z)`.
        channels: channels of the images.
    """

    def __init__(self, vae: Any, channels: int = 3) -> None:
        self.vae = vae
        self.channels = channels

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of images, float32.

        Args:
            images: `[B, C, H, W]` in [-1, 1], or stored grey levels, uint8.
            generator: draws from the VAE's posterior; None takes its mean.

        Raises:
            ValueError: if the images are neither, or have other channels.
        """
        if images.dtype == torch.uint8:
            images = Pixels(256).encode(images)
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)}, {images.dtype}: give [B, {self.channels}, H, W] in [-1, 1], "
                "or uint8 grey levels"
            )
        if self.vae is None:
            return images.to(torch.promote_types(images.dtype, torch.float32))
        with _in_float32(self.vae) as vae:
            answer = vae.encode(images.to(vae.device, vae.dtype))
            posterior = getattr(answer, "latent_dist", None)
            if posterior is None:
                latents = answer.latents
            else:
                latents = posterior.mode() if generator is None else posterior.sample(generator)
        return self._scaled(latents.to(torch.float32))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, C, H, W]`, about [-1, 1] (not clamped), float32, of latents."""
        if self.vae is None:
            return latents
        with _in_float32(self.vae) as vae:
            out: Tensor = vae.decode(self._unscaled(latents).to(vae.device, vae.dtype), return_dict=False)[0]
        return out.to(torch.float32)

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, std, scale = self._numbers(latents)
        return (latents - mean) / std * scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, std, scale = self._numbers(latents)
        return latents * std / scale + mean

    def _numbers(self, like: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
        config = self.vae.config
        means, stds = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if means is None or stds is None:
            return getattr(config, "shift_factor", None) or 0.0, 1.0, config.scaling_factor
        mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in (means, stds))
        return mean, std, config.scaling_factor


@contextmanager
def _in_float32(vae: Any) -> Iterator[Any]:
    """The VAE, for that long in float32 if it overflows in float16 (SDXL's does)."""
    dtype = vae.dtype
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield vae
        return
    try:
        yield nn.Module.to(vae, torch.float32)  # diffusers' own warns of casts
    finally:
        nn.Module.to(vae, dtype)
