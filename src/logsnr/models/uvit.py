"""The U-ViT of simple diffusion (2301.11093), which VDM++ trains from 128 pixels up (2303.00848, sec. 5.2).

patches -> residual blocks, halved, ... -> tokens + positions -> transformer -> doubled, residual blocks, ... -> patches
                |___________________________ kept beside _____________________________|

Nearly all weights and products lie in the transformer, over 16 x 16 tokens whatever the size of the image: each level
above it only brings the image there.  Dropout is for coarse maps alone (sec. 3.3 there): the finer ones lose by it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

from logsnr.errors import LogsnrError
from logsnr.models.base import Network, NetworkConfig, Positive
from logsnr.models.blocks import Block, Condition, LabelFrequency, positions, silent


class UViTConfig(NetworkConfig):
    """A U-Net of residual blocks whose middle is a transformer.

    Args:
        channels: width of each convolutional level, finest first; behind each the resolution halves.
        layers_per_block: residual blocks per level on the way down, and as many on the way up.
        width: of the transformer's tokens; a multiple of 4 and of `heads`.
        depth: its blocks.
        heads: heads of attention in each.
        mlp_ratio: hidden width of a block's MLP, over `width`.
        told: width of the condition: noise level and class.
        patch: side of the square of pixels that the finest level sees as one, folded into channels.
        dropout: dropout probability, where the map is at most `dropout_side` wide.
        dropout_side: as above: finer levels have none.
        norm_groups: groups of GroupNorm; divides every one of `channels`.
        label_frequency: highest frequency of the sinusoids that embed the label, from 1 up; None for those from 1 down
            to 1e-4 that labels of the size 0 ... 1000 ("flow", "ddpm") want.
    """

    kind: Literal["uvit"] = "uvit"
    channels: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)] = (64, 128)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    width: Positive = 256
    depth: Annotated[int, Field(ge=1, le=256)] = 6
    heads: Annotated[int, Field(ge=1, le=256)] = 4
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    told: Positive = 256
    patch: Annotated[int, Field(ge=1, le=256)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout_side: Positive = 16
    norm_groups: Positive = 16
    label_frequency: LabelFrequency | None = None

    @model_validator(mode="after")
    def _divides(self) -> UViTConfig:
        for by, why in ((4, "positions take sine and cosine of row and column"), (self.heads, "heads share it")):
            if self.width % by:
                raise ValueError(f"width {self.width} is no multiple of {by}: {why}")
        for width in self.channels:
            if width % self.norm_groups:
                raise ValueError(
                    f"channels {width} with norm_groups {self.norm_groups}: every width must be a multiple of it"
                )
        return self

    def shrunk(self) -> UViTConfig:
        """All its levels, 8 wide, and two blocks of width 32."""
        small = {"channels": (8,) * len(self.channels), "norm_groups": 4, "layers_per_block": 1, "told": 32}
        return self.model_copy(update={**small, "width": 32, "depth": 2, "heads": 2})

    def least_weights(self, shape: tuple[int, ...]) -> int:
        """Those of the transformer's matrices, of the residual blocks' last convolutions, and of the classes."""
        block = int(4 + 2 * self.mlp_ratio) * self.width**2 + 6 * self.told * self.width
        convolved = 18 * self.layers_per_block * sum(c * c for c in self.channels)
        return self.depth * block + convolved + self.classes * self.told


class Residual(nn.Module):
    """Two convolutions over a map `[B, C, H, W]`, the second told the condition by scale and shift, beside a short cut.

    Args:
        entering: channels of the map, that of a skip included.
        width: channels of the answer.
        told: width of the condition.
        groups: of GroupNorm.
        dropout: before the second convolution.
    """

    def __init__(self, entering: int, width: int, *, told: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(groups, entering), nn.SiLU(), nn.Conv2d(entering, width, 3, padding=1))
        self.norm, self.modulation = nn.GroupNorm(groups, width), nn.Linear(told, 2 * width)
        self.leave = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(width, width, 3, padding=1))
        self.cut = nn.Conv2d(entering, width, 1) if entering != width else nn.Identity()
        silent(self.leave[2])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(silu(c))[:, :, None, None].chunk(2, 1)
        out: Tensor = self.cut(x) + self.leave(self.norm(self.enter(x)) * (1 + scale) + shift)
        return out


class UViT(Network):
    """The network of a `UViTConfig`, called as `network(x [B, C, H, W], label [B], class_labels=None [B])`.

    Its last convolution is zero at the start: F = 0.  Without `class_labels` a conditional network answers for the null
    class.

    Raises:
        LogsnrError: if height or width cannot be halved behind each level.
    """

    places: Tensor
    down: Any
    up: Any
    class_table, class_bias = "condition.classes.weight", "condition.level.2.bias"

    def __init__(self, config: UViTConfig, shape: tuple[int, ...]) -> None:
        super().__init__(config, shape)
        self.config: UViTConfig = config
        widths, per, told = config.channels, config.layers_per_block, config.told
        pixels, *sides = shape
        pixels, factor = pixels * config.patch**2, config.patch * 2 ** len(widths)
        if any(side % factor for side in sides):
            raise LogsnrError(
                f"images of {sides[0]} x {sides[1]} in patches of {config.patch}, halved behind each of {len(widths)} "
                f"levels: both sides must be multiples of {factor}; use fewer levels or resize the images"
            )
        self.rows, self.columns = (side // factor for side in sides)

        def residual(entering: int, level: int) -> Residual:
            side = max(sides) // config.patch // 2**level
            dropout = config.dropout if side <= config.dropout_side else 0.0
            return Residual(entering, widths[level], told=told, groups=config.norm_groups, dropout=dropout)

        deeper = [*widths[1:], config.width]
        levels = range(len(widths))
        self.condition = Condition(told, config.classes, config.label_frequency)
        self.embed = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(residual(widths[i], i) for _ in range(per)) for i in levels)
        self.narrow = nn.ModuleList(nn.Conv2d(widths[i], deeper[i], 1) for i in levels)
        self.register_buffer("places", positions(config.width, self.rows, self.columns), persistent=False)
        dropout = config.dropout if max(self.rows, self.columns) <= config.dropout_side else 0.0
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, told=told, ratio=config.mlp_ratio, dropout=dropout)
            for _ in range(config.depth)
        )
        self.widen = nn.ModuleList(nn.Conv2d(deeper[i], widths[i], 1) for i in levels)
        self.up = nn.ModuleList(nn.ModuleList(residual(2 * widths[i], i) for _ in range(per)) for i in levels)
        self.norm = nn.GroupNorm(config.norm_groups, widths[0])
        self.out = nn.Conv2d(widths[0], pixels, 3, padding=1)
        silent(self.out)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c = self.condition(label, self.classes_or_null(x, class_labels))
        h, kept = self.embed(pixel_unshuffle(x, self.config.patch)), []
        for blocks, narrow in zip(self.down, self.narrow, strict=True):
            for block in blocks:
                h = block(h, c)
                kept.append(h)
            h = narrow(avg_pool2d(h, 2))
        tokens = h.flatten(2).mT
        tokens = tokens + self.places.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, c)
        h = tokens.mT.unflatten(2, (self.rows, self.columns))
        for blocks, widen in zip(reversed(self.up), reversed(self.widen), strict=True):
            h = interpolate(widen(h), scale_factor=2.0, mode="nearest")
            for block in blocks:
                h = block(torch.cat([h, kept.pop()], 1), c)
        return pixel_shuffle(self.out(silu(self.norm(h))), self.config.patch)
