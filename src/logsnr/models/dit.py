"""The DiT: a transformer over square patches of an image or a latent (2212.09748).

tokens = patches W + positions -> blocks, each told the noise level and the class (blocks.py) -> tokens W' -> patches

Differs from diffusers' `DiTTransformer2DModel`, to which it is equal weight by weight, in what goes around it: labels
of noise levels need be no timesteps, classes are left out where there are none and dropped by whoever trains, from a
generator of theirs, images need not be square, and the condition is embedded once, not in each block.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, silu

from logsnr.errors import LogsnrError
from logsnr.models.base import Network, NetworkConfig, Positive
from logsnr.models.blocks import Block, Condition, LabelFrequency, positions, silent, xavier


class DiTConfig(NetworkConfig):
    """A transformer over patches; DiT-XL/2 has width 1152, depth 28, heads 16, patch 2.

    Args:
        width: of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: heads of attention in each.
        patch: side of the square of pixels that a token stands for; divides height and width.
        mlp_ratio: hidden width of a block's MLP, over `width`.
        dropout: dropout probability inside the MLPs; the paper has none.
        label_frequency: highest frequency of the sinusoids that embed the label, from 1 up; None for those from 1 down
            to 1e-4 that labels of the size 0 ... 1000 ("flow", "ddpm") want; about 4 for EDM's.
    """

    kind: Literal["dit"] = "dit"
    width: Positive = 384
    depth: Annotated[int, Field(ge=1, le=256)] = 12
    heads: Annotated[int, Field(ge=1, le=256)] = 6
    patch: Annotated[int, Field(ge=1, le=256)] = 2
    mlp_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_frequency: LabelFrequency | None = None

    @model_validator(mode="after")
    def _divides(self) -> DiTConfig:
        for by, why in ((4, "positions take sine and cosine of row and column"), (self.heads, "heads share it")):
            if self.width % by:
                raise ValueError(f"width {self.width} is no multiple of {by}: {why}")
        return self

    def shrunk(self) -> DiTConfig:
        """Two blocks of width 32."""
        return self.model_copy(update={"width": 32, "depth": 2, "heads": 2})

    def least_weights(self, shape: tuple[int, ...]) -> int:
        """Those of the blocks' matrices, and of the classes."""
        return self.depth * int(10 + 2 * self.mlp_ratio) * self.width**2 + self.classes * self.width


class DiT(Network):
    """The network of a `DiTConfig`, called as `network(x [B, C, H, W], label [B], class_labels=None [B])`.

    Its last layer is zero at the start: F = 0.  Without `class_labels` a conditional network answers for the null
    class.

    Raises:
        LogsnrError: if height or width is no multiple of the patch.
    """

    places: Tensor
    class_table, class_bias = "condition.classes.weight", "condition.level.2.bias"

    def __init__(self, config: DiTConfig, shape: tuple[int, ...]) -> None:
        super().__init__(config, shape)
        self.config: DiTConfig = config
        channels, *sides = shape
        if any(side % config.patch for side in sides):
            raise LogsnrError(
                f"images of {sides[0]} x {sides[1]} in patches of {config.patch}: both sides must be multiples of it; "
                "take another patch (network.patch) or resize the images"
            )
        self.rows, self.columns = (side // config.patch for side in sides)
        self.embed = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.register_buffer("places", positions(config.width, self.rows, self.columns), persistent=False)
        self.condition = Condition(config.width, config.classes, config.label_frequency)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, told=config.width, ratio=config.mlp_ratio, dropout=config.dropout)
            for _ in range(config.depth)
        )
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(config.width, channels * config.patch**2)
        xavier(self.embed)
        silent(self.modulation)
        silent(self.out)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        c = self.condition(label, self.classes_or_null(x, class_labels))
        tokens = self.embed(x).flatten(2).mT
        tokens = tokens + self.places.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(silu(c))[:, None].chunk(2, -1)
        patches = self.out(self.norm(tokens) * (1 + scale) + shift)
        return pixel_shuffle(patches.mT.unflatten(2, (self.rows, self.columns)), self.config.patch)
