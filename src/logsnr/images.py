"""Pictures: stored images laid out as one picture, for files and reports."""

from __future__ import annotations

import base64
import io
import math

import torch
from PIL import Image
from torch import Tensor


def tile(images: Tensor, *, columns: int, scale: int = 4, gap: int = 2, background: int = 255) -> Image.Image:
    """Lay images out in rows of `columns`, each pixel enlarged `scale` times.

    Args:
        images: 0 ... 255 uint8 `[N, C, H, W]` with 1 or 3 channels (`Pixels.display` stretches other level counts).
        columns: images per row.
        scale: whole-number enlargement, nearest neighbour.
        gap: pixels between images.
        background: grey of the gaps and of missing images in the last row.

    Raises:
        ValueError: if the images are not uint8, not 1 or 3 channels, or none.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"images of shape {tuple(images.shape)}, {images.dtype}: give at least one uint8 image [N, 1 or 3, H, W]"
        )
    big = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, channels, height, width = big.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    shape = (channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    canvas = torch.full(shape, background, dtype=torch.uint8)
    for i, image in enumerate(big):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, y : y + height, x : x + width] = image
    array = canvas.permute(1, 2, 0).squeeze(2).numpy()
    return Image.fromarray(array)


def grid_columns(count: int, classes: int = 0) -> int:
    """Columns of a sheet of `count` images, about square; with one class to each column where so many fit."""
    side = max(1, round(math.sqrt(count)))
    if not 1 < classes <= 2 * side:
        return side
    return min(count, classes * max(1, round(side / classes)))


def side_by_side(left: Image.Image, right: Image.Image, *, gap: int = 24) -> Image.Image:
    """Two pictures on white, tops aligned, `gap` pixels apart."""
    size = (left.width + gap + right.width, max(left.height, right.height))
    canvas = Image.new(left.mode, size, "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + gap, 0))
    return canvas


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: Image.Image) -> str:
    """The picture as a `data:` address, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()
