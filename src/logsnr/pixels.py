"""Pixels: the codec between stored images and the box that a denoiser sees, [-1, 1] unless it was trained on another.

A stored value v in {0, ..., G - 1}, G grey levels, is the centre of its cell (VDM, 2107.00630, app. A):

    x = low + (high - low) (v + 1/2) / G,        spacing (high - low) / G
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Codec for integer images of so many grey levels per channel (256 for 8-bit, 17 for scikit-learn's digits).

    Args:
        grey_levels: 2 ... 256.
        box: (low, high) of what the denoiser sees: (0, 1) or (-.5, .5) for networks trained there.

    Raises:
        ValueError: if `grey_levels` is not in 2 ... 256, or `box` is no finite increasing pair.
    """

    grey_levels: int = 256
    box: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.box
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"box = {self.box}: give (low, high), finite and low < high, e.g. (0, 1)")
        if not 2 <= self.grey_levels <= 256:
            raise ValueError(f"grey_levels = {self.grey_levels}: stored images are uint8, give 2 ... 256")

    def __repr__(self) -> str:
        box = "" if self.box == (-1.0, 1.0) else f", box={self.box}"
        return f"Pixels(grey_levels={self.grey_levels}{box})"

    @property
    def spacing(self) -> float:
        """Distance between neighbouring grey levels in the box."""
        return (self.box[1] - self.box[0]) / self.grey_levels

    @property
    def centres(self) -> Tensor:
        """x of every grey level, `[grey_levels]`, float32."""
        return self.encode(torch.arange(self.grey_levels, dtype=torch.uint8))

    def encode(self, images: Tensor) -> Tensor:
        """Cell centres in the box, float32, of uint8 `images` of any shape.

        Raises:
            ValueError: if `images` is not uint8 or holds a value above `grey_levels - 1`.
        """
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images are {images.dtype}: give stored grey levels as uint8 in 0 ... {self.grey_levels - 1}"
            )
        if images.numel() and int(images.max()) >= self.grey_levels:
            raise ValueError(
                f"pixel value {int(images.max())} with grey_levels = {self.grey_levels}: values must be in "
                f"0 ... {self.grey_levels - 1}; raise grey_levels or rescale the images"
            )
        return (images.to(torch.float32) + 0.5) * self.spacing + self.box[0]

    def decode(self, x: Tensor) -> Tensor:
        """Nearest stored grey level, uint8, of real-valued `x` of any shape (clamped to the box)."""
        cell = ((x.to(torch.float32) - self.box[0]) / self.spacing).floor()
        return cell.clamp(0, self.grey_levels - 1).to(torch.uint8)

    def display(self, images: Tensor) -> Tensor:
        """Stored grey levels stretched to 0 ... 255, uint8, for files that people look at."""
        return (images.to(torch.float32) * (255 / (self.grey_levels - 1))).round().to(torch.uint8)
