"""The codec between images, or videos, in [-1, 1] and what a pipeline's network denoises.

    latents = ((mean of the VAE's posterior) - shift) scale            (- mean)/std per channel where the VAE has them
    image   = VAE(latents/scale + shift)

    image           images and latents `[B, C, H, W]`
    frame           the same, for a VAE of videos: of one frame each (Qwen-Image)
    patched         latents of 2 x 2 patches `[B, 4 C, H/2, W/2]`, mean and std those of a batch norm (Flux.2)
    video           `[B, C, F, H, W]`, the latents' frames fewer
    frames-first    the same with latents `[B, F, C, H, W]` (CogVideoX)

A pixel model denoises the images themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logsnr.pixels import Pixels

Codec = Literal["image", "frame", "patched", "video", "frames-first"]


class Latents:
    """The VAE of a pipeline with its scaling; `vae` None for a pixel model.

    Args:
        vae: an `AutoencoderKL`, or another with `encode(x).latent_dist` (or `.latents`: TAESD) and `decode(z)`.
        channels: channels of the images.
        codec: what it makes latents of.
        padding: leading frames of the latents that fill a patch and are no part of the video (CogVideoX 1.5).
    """

    def __init__(self, vae: Any, channels: int = 3, codec: Codec = "image", padding: int = 0) -> None:
        self.vae = vae
        self.channels = channels
        self.codec = codec
        self.padding = padding

    @property
    def _video(self) -> bool:
        return self.codec in ("video", "frames-first")

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of images, float32.

        Args:
            images: `[B, C, H, W]` (videos `[B, C, F, H, W]`) in [-1, 1], or stored grey levels, uint8.
            generator: draws from the VAE's posterior; None takes its mean.

        Raises:
            ValueError: if the images are neither, or have other channels.
        """
        if images.dtype == torch.uint8:
            images = Pixels(256).encode(images)
        if not images.is_floating_point() or images.ndim != 4 + self._video or images.shape[1] != self.channels:
            kind, shape = ("videos", "F, H, W") if self._video else ("images", "H, W")
            raise ValueError(
                f"{kind} of shape {tuple(images.shape)}, {images.dtype}: give [B, {self.channels}, {shape}] in "
                "[-1, 1], or uint8 grey levels"
            )
        if self.vae is None:
            return images.to(torch.promote_types(images.dtype, torch.float32))
        if self.codec == "frame":
            images = images.unsqueeze(2)
        with _in_float32(self.vae) as vae:
            answer = vae.encode(images.to(vae.device, vae.dtype))
            posterior = getattr(answer, "latent_dist", None)
            if posterior is None:
                latents = answer.latents if hasattr(answer, "latents") else answer.latent
            else:
                latents = posterior.mode() if generator is None else posterior.sample(generator)
        if self.codec == "patched":
            latents = F.pixel_unshuffle(latents, 2)
        latents = self._scaled(latents.to(torch.float32))
        if self.codec == "frame":
            return latents.squeeze(2)
        if self.padding:
            latents = torch.cat([latents[:, :, :1].expand(-1, -1, self.padding, -1, -1), latents], 2)
        return latents.transpose(1, 2) if self.codec == "frames-first" else latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, C, H, W]` (videos `[B, C, F, H, W]`), about [-1, 1] (not clamped), float32, of latents."""
        if self.vae is None:
            return latents
        if self.codec == "frame":
            latents = latents.unsqueeze(2)
        if self.codec == "frames-first":
            latents = latents.transpose(1, 2)
        if self.padding:
            latents = latents[:, :, self.padding :]
        latents = self._unscaled(latents)
        if self.codec == "patched":
            latents = F.pixel_shuffle(latents, 2)
        with _in_float32(self.vae) as vae:
            # LTX's decoder may be told a time; its pipeline's default is 0.
            told = (latents.new_zeros(len(latents)),) if vae.config.get("timestep_conditioning") else ()
            out: Tensor = vae.decode(latents.to(vae.device, vae.dtype), *told, return_dict=False)[0]
        return (out.squeeze(2) if self.codec == "frame" else out).to(torch.float32)

    def _scaled(self, latents: Tensor) -> Tensor:
        mean, std, scale = self._numbers(latents)
        return (latents - mean) / std * scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, std, scale = self._numbers(latents)
        return latents * std / scale + mean

    def _numbers(self, like: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
        vae, config = self.vae, self.vae.config
        scale = config.get("scaling_factor") or 1.0
        if self.codec == "patched":
            means, stds = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).sqrt()
        else:
            # LTX's VAE has them as buffers.
            buffers = dict(vae.named_buffers(recurse=False))
            means, stds = (config.get(name) or buffers.get(name) for name in ("latents_mean", "latents_std"))
        if means is None or stds is None:
            return config.get("shift_factor") or 0.0, 1.0, scale
        mean, std = (torch.as_tensor(v).to(like).reshape(1, -1, *[1] * (like.ndim - 2)) for v in (means, stds))
        return mean, std, scale


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
