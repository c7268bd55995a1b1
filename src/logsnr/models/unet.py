"""The U-Net: a thin wrapper over diffusers' `UNet2DModel` that starts as F = 0 and answers with a tensor.

The timestep embedding of `UNet2DModel` resolves labels of the size 0 ... 1000: pair it with the label "flow" (1000 t),
or give `label_frequency`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from logsnr.errors import LogsnrError, require
from logsnr.models.config import NetworkConfig


class UNet(nn.Module):
    """The network of a `NetworkConfig`, called as `network(x [B, C, H, W], label [B], class_labels=None [B])`.

    Its last convolution is zero at the start: F = 0, so a denoiser begins as the best guess of its prediction's row.
    Without `class_labels` a conditional network answers for the null class.

    Raises:
        LogsnrError: if `shape` is not (channels, height, width) or the levels do not halve it evenly, or diffusers is
            not installed.
    """

    def __init__(self, config: NetworkConfig, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.shape = _checked(shape, config)
        diffusers = require("diffusers", extra="train", purpose="a network of kind 'unet'")
        flags = config.attention_levels
        channels = self.shape[0] * config.patch**2
        self.unet: Any = diffusers.UNet2DModel(
            sample_size=tuple(side // config.patch for side in self.shape[1:]),
            in_channels=channels * (1 + 2 * len(config.fourier)),
            out_channels=channels,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if on else "DownBlock2D" for on in flags),
            up_block_types=tuple("AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(flags)),
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
        if self.config.classes and class_labels is None:
            class_labels = torch.full((len(x),), self.config.classes, device=x.device)
        elif class_labels is not None and not self.config.classes:
            raise LogsnrError("class_labels given to a network without classes: leave them out, or train with classes")
        patches = pixel_unshuffle(self._features(x), self.config.patch)
        out: Tensor = self.unet(patches, label, class_labels, return_dict=False)[0]
        return pixel_shuffle(out, self.config.patch)

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


def build_network(config: NetworkConfig, shape: tuple[int, ...]) -> UNet:
    """The network of `config` for samples of `shape`, initialised from torch's global generator.

    Raises:
        LogsnrError: as `UNet`.
    """
    return UNet(config, shape)


def _checked(shape: tuple[int, ...], config: NetworkConfig) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise LogsnrError(f"shape {tuple(shape)} for a U-Net: give (channels, height, width)")
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
