"""Stored images that stream by: a source is walked once for what it holds, and again for its features.

a folder of .npz shards          one shard in memory at a time (`logsnr generate` writes such)
a folder of pictures             a chunk at a time, decoded as `data.source` does (docs/data.md)
what else `data.source` takes    digits, .npz, .npy: in memory; the training part alone of what has a held-out one
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.generation import Shards
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.training.data import array_images, is_generated
from logsnr.training.folders import image_files
from logsnr.training.images import read_image

CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Images of one shape, to be read as often as needed.

    Attributes:
        source: what they are called.
        n: how many.
        shape: (channels, height, width).
        pixels: their codec.
        digest: sha256 of all of them, in order.
        prepared: how they were cropped and resized; "" for not at all.
        parts: a walk through them, uint8 `[B, *shape]`.
        strata: int64 `[n]`, the class of each, where classes were dealt in turn.
    """

    source: str
    n: int
    shape: tuple[int, ...]
    pixels: Pixels
    digest: str
    prepared: str
    parts: Callable[[], Iterator[Tensor]]
    strata: Tensor | None = None

    def chunks(self, chunk: int = CHUNK) -> Iterator[Tensor]:
        """All images, so many at a time."""
        left = self.n
        for part in self.parts():
            yield from torch.split(part[:left], chunk)
            left -= len(part)
            if left <= 0:
                return


def stored(
    source: str,
    *,
    grey_levels: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> Stored:
    """The images of a source.

    Args:
        source: a folder of arrays or pictures, or what `data.source` takes.
        grey_levels: of the pixels, where the source does not say; 256 if nobody does.
        size: crop pictures to the central square and resize them to this side.
        channels: of pictures, 1 or 3 (the default).
        limit: the first images alone.

    Raises:
        LogsnrError: if there are none, one cannot be read, or they differ in size.
    """
    folder = expanded(source)
    if not folder.is_dir():
        _no_size(source, size)
        if folder.suffix in (".npz", ".npy"):
            images, levels = array_images(folder), grey_levels or 256
        else:
            data = load_data(DataConfig(source=source, holdout=0.0))
            images, levels = data.train_images[:], data.grey_levels
        return _walked(source, "", levels, limit, lambda: iter([images]))
    if is_generated(source):
        return _generated(source, limit, size)
    shards = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    levels = grey_levels or 256
    if not shards:
        files, _ = image_files(folder)
        pictures = _Pictures(files[:limit], size, channels or 3, Pixels(levels))
        return _walked(source, f"central square at {size} x {size} (Lanczos)" if size else "", levels, limit, pictures)
    _no_size(source, size)

    def arrays() -> Iterator[Tensor]:
        for path in shards:
            yield array_images(path)

    return _walked(source, "", levels, limit, arrays)


def _generated(source: str, limit: int | None, size: int | None) -> Stored:
    """A set of `logsnr generate`: with grey levels of its own, pictures of it too; where its classes are dealt in turn,
    they are strata."""
    _no_size(source, size)
    shards = Shards(source)
    settings, levels = shards.settings, shards.settings.grey_levels

    def parts() -> Iterator[Tensor]:
        for images, _ in shards:
            yield _unstretched(images, levels) if shards.pixels.grey_levels > levels else images

    found = _walked(source, "", levels, limit, parts)
    dealt = settings.labels(range(found.n)) if settings.deal == "balanced" else None
    return replace(found, strata=dealt)


def _no_size(source: str, size: int | None) -> None:
    if size is not None:
        raise LogsnrError(f"{source} holds images of one size, which are not resized: leave the size out")


def _unstretched(images: Tensor, grey_levels: int) -> Tensor:
    """Pictures of 0 ... 255 as stored images of fewer grey levels."""
    return (images.float() * (grey_levels - 1) / 255).round().to(torch.uint8)


class _Pictures:
    """Pictures in files, a chunk at a time; where fewer than 256 grey levels are meant, the nearest of them."""

    def __init__(self, files: list[Path], size: int | None, channels: int, pixels: Pixels) -> None:
        self.files, self.size, self.channels, self.pixels = files, size, channels, pixels

    def __call__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.files), CHUNK):
            read = [self._read(file) for file in self.files[first : first + CHUNK]]
            for file, image in zip(self.files[first:], read, strict=False):
                if image.shape != read[0].shape:
                    sizes = [" x ".join(map(str, one.shape[:0:-1])) for one in (image, read[0])]
                    raise LogsnrError(
                        f"{file} is {sizes[0]}, others are {sizes[1]}: give --size to crop and resize all"
                    )
            yield torch.stack(read)

    def _read(self, file: Path) -> Tensor:
        image = torch.from_numpy(read_image(file, channels=self.channels, size=self.size).pixels.copy())
        return image if self.pixels.grey_levels == 256 else _unstretched(image, self.pixels.grey_levels)


def _walked(
    source: str, prepared: str, grey_levels: int, limit: int | None, parts: Callable[[], Iterator[Tensor]]
) -> Stored:
    """The source after a walk through it, which counts and hashes."""
    digest, n, shape = hashlib.sha256(), 0, tuple[int, ...]()
    for part in parts():
        part = part[: None if limit is None else limit - n]
        shape = shape or tuple(part.shape[1:])
        if tuple(part.shape[1:]) != shape:
            raise LogsnrError(
                f"{source} holds images of {shape} and of {tuple(part.shape[1:])}: give images of one shape"
            )
        if (largest := int(part.max())) >= grey_levels:
            raise LogsnrError(
                f"{source} has pixel value {largest}: with {grey_levels} grey levels the largest is {grey_levels - 1}"
            )
        digest.update(part.contiguous().numpy().data)
        n += len(part)
        if limit is not None and n >= limit:
            break
    digest.update(repr((n, shape, grey_levels)).encode())
    return Stored(
        source=source,
        n=n,
        shape=shape,
        pixels=Pixels(grey_levels),
        digest=digest.hexdigest(),
        prepared=prepared,
        parts=parts,
    )
