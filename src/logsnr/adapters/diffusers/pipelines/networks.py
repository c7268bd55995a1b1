"""How the network of each diffusers family is called, and what it answers.

    family         called as                                             answers F of the state z/(1 or alpha + s)
    UNet           unet(x, t, [class_labels])                            C channels, or 2C: F and a variance, dropped
    TextUNet       unet(x, t, encoder_hidden_states, [added ...])        C channels (SD; SDXL with its added conditions)
    DiT            transformer(x, timestep=t, class_labels)              C or 2C channels
    SD3            transformer(x, timestep=t, text, pooled text)         C channels
    Flux           transformer(2 x 2 patches as tokens, t/1000, ...)     tokens, put back in their places

Every condition is a flat keyword with one row per sample, so that guidance can join two of them in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Network(nn.Module):
    """A diffusers model, called as `network(x [B, C, H, W], label [B], **conditions)`."""

    def __init__(self, model: Any, channels: int) -> None:
        super().__init__()
        self.model = model
        self.channels = channels

    def _mean(self, out: Tensor) -> Tensor:
        """F without a learned variance, the second half of its channels."""
        return out if out.shape[1] == self.channels else out[:, : self.channels]


class UNet(_Network):
    """An unconditional or class-conditional `UNet2DModel`."""

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self._mean(self.model(x, label, class_labels=class_labels, return_dict=False)[0])


class TextUNet(_Network):
    """A `UNet2DConditionModel`: Stable Diffusion, and SDXL with pooled text and time ids."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        added = None if time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        out = self.model(
            x,
            label,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return self._mean(out[0])


class DiT(_Network):
    """A `DiTTransformer2DModel`."""

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor) -> Tensor:
        return self._mean(self.model(x, timestep=label, class_labels=class_labels, return_dict=False)[0])


class SD3(_Network):
    """An `SD3Transformer2DModel`."""

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        out: Tensor = self.model(
            hidden_states=x,
            timestep=label,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            return_dict=False,
        )[0]
        return out


class Flux(_Network):
    """A `FluxTransformer2DModel` over latents in their own shape, height and width even."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        height, width = x.shape[-2:]
        out: Tensor = self.model(
            hidden_states=pack(x),
            timestep=label / 1000,
            guidance=guidance,
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=x.new_zeros(encoder_hidden_states.shape[1], 3),
            img_ids=_places(height // 2, width // 2, x),
            return_dict=False,
        )[0]
        return unpack(out, height, width)


def pack(x: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens `[B, H W/4, 4 C]`, one for each 2 x 2 patch: what Flux pipelines hold."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents `[B, C, height, width]` of tokens: the inverse of `pack`."""
    batch, _, size = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, size // 4, height, width)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of every token `[rows columns, 3]`."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(like.dtype)
