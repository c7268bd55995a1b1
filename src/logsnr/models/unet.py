"""The U-Net: a thin wrapper over diffusers' `UNet2DModel` that starts as F = 0 and answers with a tensor.

The timestep embedding of `UNet2DModel` resolves labels of the size 0 ... 1000: pair it with the label "flow" (1000 t),
or give `label_frequency`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from logsnr.errors import LogsnrError, require
from logsnr.models.base import Network, NetworkConfig, Positive


class UNetConfig(NetworkConfig):
    """A U-Net over images.

    Args:
        channels: width of each level, finest first; each further level halves the resolution.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention: self-attention at each level: one flag for all, or one per level.
        mid_attention: self-attention in the middle block.
        head_dim: channels per attention head; divides every width that attends.
        dropout: dropout probability inside residual blocks.
        norm_groups: groups of GroupNorm; divides every width.
        resample: between levels, a "conv" of stride 2 or behind a copied pixel, or a "residual" block that halves or
            doubles, as in ADM and DDPM++ (a stock UNet2DModel either way).
        label_width: width of the embedded label; 4 times the finest level's by default.
        scale_shift: the noise level scales and shifts features (ADM's adaptive group norm) instead of only shifting.
        patch: side of the square of pixels that the network sees as one, folded into channels (space to depth, as in
            vision transformers): 2 makes every layer four times cheaper per channel.
        fourier: exponents n of VDM's input features sin(2^n pi x), cos(2^n pi x) (2107.00630, sec. 5.1), which let
            the network see fine detail at high log-SNR; 2^n around the number of grey levels / 4 and half of that.
        label_frequency: highest frequency of the sinusoids that embed the label, from 1 up; None for those from 1 down
            to 1e-4 that labels of the size 0 ... 1000 ("flow", "ddpm") want.  EDM's labels ln(sigma)/4 differ by 1 or 2
            over a whole model: with None they all but look alike, 4 tells them apart.
    """

    kind: Literal["unet"] = "unet"
    channels: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=10)] = (64, 128)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    attention: bool | tuple[bool, ...] = False
    mid_attention: bool = True
    head_dim: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    norm_groups: Positive = 16
    resample: Literal["conv", "residual"] = "conv"
    label_width: Positive | None = None
    scale_shift: bool = True
    patch: Positive = 1
    fourier: Annotated[tuple[Annotated[int, Field(ge=0, le=12)], ...], Field(max_length=13)] = ()
    label_frequency: Annotated[float, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _widths_divide(self) -> UNetConfig:
        if isinstance(self.attention, tuple) and len(self.attention) != len(self.channels):
            raise ValueError(
                f"attention has {len(self.attention)} flags for {len(self.channels)} levels of channels: "
                "give true, false, or one flag per level"
            )
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"channels {width} with norm_groups {self.norm_groups}: "
                    f"every width must be a multiple of {self.norm_groups}"
                )
        attending = {c for c, on in zip(self.channels, self.attention_levels, strict=True) if on}
        attending |= {self.channels[-1]} if self.mid_attention else set()
        for width in sorted(attending):
            if width % self.head_dim:
                raise ValueError(
                    f"channels {width} with head_dim {self.head_dim}: widths that attend must be a multiple of "
                    f"{self.head_dim}; change head_dim or switch attention off"
                )
        return self

    def shrunk(self) -> UNetConfig:
        """All its levels, 8 wide."""
        small = {"channels": (8,) * len(self.channels), "norm_groups": 4, "head_dim": 8, "label_width": None}
        return self.model_copy(update={**small, "layers_per_block": 1})

    def least_weights(self, shape: tuple[int, ...]) -> int:
        """Those of the first convolution, of one convolution in each residual block, and of the classes."""
        first, blocks = self.channels[0], 2 * self.layers_per_block + 1
        seen = shape[0] * self.patch**2 * (1 + 2 * len(self.fourier))
        return 9 * first * seen + sum(9 * blocks * c * c for c in self.channels) + 4 * first * self.classes

    @property
    def attention_levels(self) -> tuple[bool, ...]:
        """One attention flag per level."""
        return (self.attention,) * len(self.channels) if isinstance(self.attention, bool) else self.attention


class UNet(Network):
    """The network of a `UNetConfig`, called as `network(x [B, C, H, W], label [B], class_labels=None [B])`.

    Its last convolution is zero at the start: F = 0, so a denoiser begins as the best guess of its prediction's row.
    Without `class_labels` a conditional network answers for the null class.

    Raises:
        LogsnrError: if the levels do not halve (channels, height, width) evenly, or diffusers is not installed.
    """

    class_table, class_bias = "unet.class_embedding.weight", "unet.time_embedding.linear_2.bias"

    def __init__(self, config: UNetConfig, shape: tuple[int, ...]) -> None:
        super().__init__(config, _checked(shape, config))
        self.config: UNetConfig = config
        diffusers = require("diffusers", extra="train", purpose="a network of kind 'unet'")
        flags = config.attention_levels
        channels = self.shape[0] * config.patch**2
        kind = {"conv": "{}Block2D", "residual": "Resnet{}sampleBlock2D"}[config.resample]
        resample = {"conv": "conv", "residual": "resnet"}[config.resample]
        self.unet: Any = diffusers.UNet2DModel(
            sample_size=tuple(side // config.patch for side in self.shape[1:]),
            in_channels=channels * (1 + 2 * len(config.fourier)),
            out_channels=channels,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if on else kind.format("Down") for on in flags),
            up_block_types=tuple("AttnUpBlock2D" if on else kind.format("Up") for on in reversed(flags)),
            downsample_type=resample,
            upsample_type=resample,
            time_embedding_dim=config.label_width,
            layers_per_block=config.layers_per_block,
            add_attention=config.mid_attention,
            attention_head_dim=config.head_dim,
            dropout=config.dropout,
            norm_num_groups=config.norm_groups,
            resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
            num_class_embeds=config.classes + 1 if config.classes else None,
            freq_shift=_freq_shift(config.channels[0] // 2, config.label_frequency),
        )
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        class_labels = self.classes_or_null(x, class_labels)
        patches = pixel_unshuffle(self._features(x), self.config.patch)
        out: Tensor = self.unet(patches, label, class_labels, return_dict=False)[0]
        return pixel_shuffle(out, self.config.patch)

    @property
    def stock(self) -> nn.Module | None:
        """The `UNet2DModel` itself, unless something is formed around it."""
        return None if self.obstacles else self.unet

    @property
    def obstacles(self) -> list[tuple[str, str]]:
        """What is formed around it."""
        found = []
        if self.config.fourier:
            why = "its network takes Fourier features of the image, which UNet2DModel does not form"
            found.append((why, "network.fourier: []"))
        if self.config.patch > 1:
            why = "its network folds patches of the image into channels, which UNet2DModel does not"
            found.append((why, "network.patch: 1"))
        return found

    def _features(self, x: Tensor) -> Tensor:
        waves = [x]
        for n in self.config.fourier:
            phase = x * (2**n * math.pi)
            waves += [phase.sin(), phase.cos()]
        return torch.cat(waves, 1) if len(waves) > 1 else x


def _freq_shift(count: int, highest: float | None) -> int:
    """diffusers' `freq_shift`: frequency i of `count` is 10000^(i/(shift - count)), which rises from 1 to `highest`."""
    if highest is None or count < 2:
        return 0
    return count + max(1, round((count - 1) * math.log(1e4) / math.log(highest)))


def _checked(shape: tuple[int, ...], config: UNetConfig) -> tuple[int, int, int]:
    channels, height, width = shape
    levels = len(config.channels)
    factor = config.patch * 2 ** (levels - 1)
    if height % factor or width % factor:
        patches = f" and patches of {config.patch}" if config.patch > 1 else ""
        raise LogsnrError(
            f"images of {height} x {width} with {levels} levels of channels{patches}: each level halves the image, so "
            f"both sides must be multiples of {factor}; use fewer levels or resize the images"
        )
    return channels, height, width
