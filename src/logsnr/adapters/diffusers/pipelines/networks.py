"""How the network of each diffusers family is called, and what it answers.

    in front of it     the state z/(1 or alpha + s), with a height and a width; videos with frames as well
    behind it          F of that state, in the same shape

    label   what it is told of the noise level: the scheduler's timestep t, or t/1000, or 1 - t/1000
    tokens  2 x 2 patches in a row (Flux, Chroma, Qwen-Image; Flux.2 packs in its latents), or one per place (LTX)
    sign    Z-Image and Lumina 2 answer x - eps, which schedulers are given with the other sign

Every condition is a flat keyword with one row per sample, so that guidance can join two of them in one call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.adapters.diffusers.pipelines.tokens import pack, places, unpack


class Network(nn.Module):
    """A diffusers model, called as `network(x [B, *shape], label [B], **conditions)`.

    Args:
        model: the diffusers model.
        channels: of F.
        pipeline: what the model was found in: sizes and positions are its own.
    """

    def __init__(self, model: Any, channels: int, pipeline: Any = None) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        self.pipeline = pipeline

    def _mean(self, out: Tensor) -> Tensor:
        """F without a learned variance, the second half of its channels."""
        return out if out.shape[1] == self.channels else out[:, : self.channels]


class UNet(Network):
    """An unconditional or class-conditional `UNet2DModel`."""

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self._mean(self.model(x, label, class_labels=class_labels, return_dict=False)[0])


class TextUNet(Network):
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


class DiT(Network):
    """A `DiTTransformer2DModel`."""

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor) -> Tensor:
        return self._mean(self.model(x, timestep=label, class_labels=class_labels, return_dict=False)[0])


class SD3(Network):
    """An `SD3Transformer2DModel`."""

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        return self._mean(
            self.model(
                hidden_states=x,
                timestep=label,
                encoder_hidden_states=encoder_hidden_states,
                pooled_projections=pooled_projections,
                return_dict=False,
            )[0]
        )


class PixArt(Network):
    """A `PixArtTransformer2DModel`; the 1024-pixel alpha is told its size as well."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        size: Tensor | None = None
        ratio: Tensor | None = None
        if self.model.use_additional_conditions:
            height, width = (n * self.pipeline.vae_scale_factor for n in x.shape[-2:])
            size = x.new_tensor([[height, width]]).expand(len(x), 2)
            ratio = x.new_full((len(x), 1), height / width)
        return self._mean(
            self.model(
                x,
                timestep=label,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                added_cond_kwargs={"resolution": size, "aspect_ratio": ratio},
                return_dict=False,
            )[0]
        )


class Sana(Network):
    """A `SanaTransformer2DModel`."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        return self._mean(
            self.model(
                x,
                timestep=label * self.model.config.timestep_scale,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
        )


class AuraFlow(Network):
    """An `AuraFlowTransformer2DModel`."""

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out: Tensor = self.model(
            x, timestep=label / 1000, encoder_hidden_states=encoder_hidden_states, return_dict=False
        )[0]
        return out


class CogView4(Network):
    """A `CogView4Transformer2DModel`, which is told the time before its shift, and sizes.

    The shift mu of an image's size moves t to t' = mu t/(1 + (mu - 1) t) (or e^mu for mu): back from t'.
    """

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = x.new_tensor([[height, width]]).expand(len(x), 2) * self.pipeline.vae_scale_factor
        config = self.pipeline.scheduler.config
        shift = 1.0
        if config.get("use_dynamic_shifting"):
            tokens = height * width // self.model.config.patch_size**2
            root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
            mu = root * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        moved = label / 1000
        out: Tensor = self.model(
            hidden_states=x,
            timestep=1000 * moved / (shift - (shift - 1) * moved),
            encoder_hidden_states=encoder_hidden_states,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
        return out


class Lumina2(Network):
    """A `Lumina2Transformer2DModel`: time runs from noise to data, and the answer is x - eps."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        out: Tensor = self.model(
            hidden_states=x,
            timestep=1 - label / 1000,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
        return -out


class ZImage(Network):
    """A `ZImageTransformer2DModel`: lists of images and of texts; time from noise to data, the answer x - eps."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        lengths = encoder_attention_mask.sum(1).tolist()
        texts = [states[:n] for states, n in zip(encoder_hidden_states, lengths, strict=True)]
        out = self.model([*x.unsqueeze(2)], 1 - label / 1000, texts, return_dict=False)[0]
        return -torch.stack([*out]).squeeze(2)


class Packed(Network):
    """A model over 2 x 2 patches in a row, of latents with an even height and width, that is told t/1000."""

    def _asked(self, x: Tensor, label: Tensor, **told: Any) -> Tensor:
        out: Tensor = self.model(hidden_states=pack(x), timestep=label / 1000, return_dict=False, **told)[0]
        return unpack(out, *x.shape[-2:])

    def _placed(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, **told: Any) -> Tensor:
        """The same, told the places of words and patches as Flux has them."""
        height, width = x.shape[-2:]
        text, image = x.new_zeros(encoder_hidden_states.shape[1], 3), places(height // 2, width // 2, x)
        return self._asked(x, label, encoder_hidden_states=encoder_hidden_states, txt_ids=text, img_ids=image, **told)


class Flux(Packed):
    """A `FluxTransformer2DModel`."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        return self._placed(x, label, encoder_hidden_states, pooled_projections=pooled_projections, guidance=guidance)


class Chroma(Packed):
    """A `ChromaTransformer2DModel`: Flux's, with a mask over the text."""

    def forward(self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        image = attention_mask.new_ones(len(x), height * width // 4)
        return self._placed(x, label, encoder_hidden_states, attention_mask=torch.cat([attention_mask, image], 1))


class QwenImage(Packed):
    """A `QwenImageTransformer2DModel`."""

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        height, width = x.shape[-2:]
        return self._asked(
            x,
            label,
            guidance=guidance,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        )


class Flux2(Network):
    """A `Flux2Transformer2DModel` over patched latents, one token per place."""

    def forward(
        self, x: Tensor, label: Tensor, encoder_hidden_states: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        height, width = x.shape[-2:]
        words = encoder_hidden_states.shape[1]
        image, text = x.new_zeros(height * width, 4), x.new_zeros(words, 4)
        image[:, :3] = places(height, width, x)
        text[:, 3] = torch.arange(words)
        out: Tensor = self.model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=label / 1000,
            guidance=guidance,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=text.expand(len(x), -1, -1),
            img_ids=image.expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return out.transpose(1, 2).reshape(x.shape)
