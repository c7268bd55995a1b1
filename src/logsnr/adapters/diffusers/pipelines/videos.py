"""Networks of videos: states with frames, called as those of images are (networks.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logsnr.adapters.diffusers.pipelines.networks import Network

FRAME_RATE = 25
"""Frames a second, as LTX's pipeline has them by default."""


class LTX(Network):
    """An `LTXVideoTransformer3DModel`, at the pipeline's default frame rate."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        pipe = self.pipeline
        patches = (pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        frames, height, width = x.shape[-3:]
        side = pipe.vae_spatial_compression_ratio
        out: Tensor = self.model(
            hidden_states=pipe._pack_latents(x, *patches),
            timestep=label,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(pipe.vae_temporal_compression_ratio / FRAME_RATE, side, side),
            return_dict=False,
        )[0]
        unpacked: Tensor = pipe._unpack_latents(out, frames, height, width, *patches)
        return unpacked


class Wan(Network):
    """A `WanTransformer3DModel`, or two: Wan 2.2 has one from a timestep on upwards and another below."""

    def __init__(self, model: Any, channels: int, pipeline: Any = None) -> None:
        super().__init__(model, channels, pipeline)
        ratio = pipeline.config.boundary_ratio
        self.below = None if ratio is None else pipeline.transformer_2
        self.boundary = 0.0 if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        if self.below is None:
            return self._expert(self.model, x, label, encoder_hidden_states)
        high = label >= self.boundary
        out = torch.empty_like(x)
        for expert, rows in ((self.model, high), (self.below, ~high)):
            if bool(rows.any()):
                out[rows] = self._expert(expert, x[rows], label[rows], encoder_hidden_states[rows])
        return out

    def _expert(self, model: Any, x: Tensor, label: Tensor, texts: Tensor) -> Tensor:
        if self.pipeline.config.expand_timesteps:  # one per token
            frames, height, width = (n // p for n, p in zip(x.shape[-3:], model.config.patch_size, strict=True))
            label = label[:, None].expand(-1, frames * height * width)
        out: Tensor = model(hidden_states=x, timestep=label, encoder_hidden_states=texts, return_dict=False)[0]
        return out


class HunyuanVideo(Network):
    """A `HunyuanVideoTransformer3DModel`."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        encoder_attention_mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.model(
            hidden_states=x,
            timestep=label,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            pooled_projections=pooled_projections,
            guidance=None if guidance is None else (1000 * guidance).to(x.dtype),
            return_dict=False,
        )[0]
        return out


class CogVideoX(Network):
    """A `CogVideoXTransformer3DModel`: frames before channels, positions by the pipeline's own rotation."""

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        rotation = None
        if self.model.config.use_rotary_positional_embeddings:
            height, width = (n * self.pipeline.vae_scale_factor_spatial for n in x.shape[-2:])
            rotation = self.pipeline._prepare_rotary_positional_embeddings(height, width, x.shape[1], x.device)
        out: Tensor = self.model(
            hidden_states=x,
            timestep=label,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=rotation,
            return_dict=False,
        )[0]
        return out
