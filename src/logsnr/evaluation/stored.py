"""Stored images that stream by: a source is walked once for what it holds, and again for its features.

a folder of .npz shards          one shard in memory at a time (`logsnr generate` writes such)
a folder of pictures             a chunk at a time, decoded as `data.source` does (docs/data.md)
what else `data.source` takes    digits, .npz, .npy: in memory; the training part alone of what has a held-out one
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import read_json, reading
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.training.folders import image_files
from logsnr.training.images import read_image

SETTINGS = "generated.json"
"""The file that says how a folder of shards was made."""
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
        source: a folder of shards or pictures, or what `data.source` takes.
        grey_levels: of the pixels, where the source does not say; 256 if nobody does.
        size: crop pictures to the central square and resize them to this side.
        channels: of pictures, 1 or 3 (the default).
        limit: the first images alone.

    Raises:
        LogsnrError: if there are none, one cannot be read, or they differ in size.
    """
    folder = expanded(source)
    if not folder.is_dir():
        data = load_data(DataConfig(source=source, grey_levels=grey_levels or 256, holdout=0.0))
        levels = data.grey_levels
        return _walked(source, "", levels, limit, lambda: iter([data.train_images]))
    shards = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    if not shards:
        files, _ = image_files(folder)
        pictures = _Pictures(files[:limit], size, channels or 3, Pixels(grey_levels or 256))
        prepared = f"central square at {size} x {size} (Lanczos)" if size else ""
        return _walked(source, prepared, grey_levels or 256, limit, pictures)
    if size is not None:
        raise LogsnrError(f"{source} holds arrays, which are not resized: leave the size out")
    levels = _told_levels(folder) or grey_levels or 256

    def arrays() -> Iterator[Tensor]:
        for path in shards:
            yield load_data(DataConfig(source=str(path), grey_levels=levels, holdout=0.0)).train_images

    return _walked(source, "", levels, limit, arrays)


def _told_levels(folder: Path) -> int | None:
    """Grey levels of a folder of shards, where their settings say."""
    path = folder / SETTINGS
    if not path.exists():
        return None
    fix = "restore it, or remove it"
    found = read_json(path, fix).get("grey_levels", 256)
    with reading(path, fix):
        return Pixels(found).grey_levels


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
        top = self.pixels.grey_levels - 1
        return image if top == 255 else (image.float() * top / 255).round().to(torch.uint8)


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
