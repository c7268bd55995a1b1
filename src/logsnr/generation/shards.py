"""Shards: the files of a set of images. Each comes whole, by a rename, or not at all.

    npz    shard-00003.npz          images uint8 [N, C, H, W] (grey levels), labels int64 [N], class_names, prompts
    png    00003/003000.png, ...    a folder of pictures, grey levels stretched to 0 ... 255; labels in dataset.json

Of many prompts, prompts.json has the texts, and `prompts` of an .npz says which each image has: i mod their number.

An .npz is read as data (training/data), pictures and dataset.json as EDM's and StyleGAN's dataset tools write them.
A shard that is there is looked at before it is left alone: checksums, shapes and labels.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from logsnr.errors import LogsnrError, unknown
from logsnr.generation.settings import NAME, Settings
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import parse_json, read_arrays, reading
from logsnr.writing import create_file, npz, replace_file, replace_folder

LABELS = "dataset.json"
"""The labels of pictures: {"labels": [[path, class], ...]}."""
PROMPTS = "prompts.json"
"""The prompts of a set that has many: a list of texts."""
_AGAIN = "make it again, by the command that made it"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of shard.

    Args:
        name: of shard number k.
        holds: whether images of a shape can be in one.
        write: to a path, by settings and number, images.
        read: from a path, by settings and number, images; whatever is wrong with them is an error.
        grey_levels: of what is read, None for the set's own.
    """

    name: Callable[[int], str]
    holds: Callable[[tuple[int, ...]], bool]
    write: Callable[[Path, Settings, int, Tensor], None]
    read: Callable[[Path, Settings, int], Tensor]
    grey_levels: int | None = None


def _write_npz(path: Path, settings: Settings, number: int, images: Tensor) -> None:
    arrays = {"images": images.numpy()}
    labels, prompts = (of(settings.images(number)) for of in (settings.labels, settings.prompt_indices))
    if prompts is not None:
        arrays["prompts"] = prompts.numpy()
    if labels is not None:
        arrays["labels"] = labels.numpy()
        if settings.class_names:
            arrays["class_names"] = np.array(settings.class_names)
    replace_file(path, npz(arrays))


def _read_npz(path: Path, settings: Settings, number: int) -> Tensor:
    arrays = read_arrays(path, _AGAIN)
    for name, of in (("labels", settings.labels), ("prompts", settings.prompt_indices)):
        told, found = of(settings.images(number)), arrays.get(name)
        if (told is None) != (found is None) or not (told is None or np.array_equal(told.numpy(), arrays[name])):
            raise LogsnrError(f"{path} has other {name} than its set: {_AGAIN}")
    return torch.from_numpy(np.ascontiguousarray(arrays["images"]))


def _picture(index: int) -> str:
    return f"{index:06d}.png"


def _write_png(path: Path, settings: Settings, number: int, images: Tensor) -> None:
    files = {}
    for index, image in zip(settings.images(number), settings.pixels.display(images), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, "PNG")
        files[_picture(index)] = buffer.getvalue()
    replace_folder(path, files)


def _read_png(path: Path, settings: Settings, number: int) -> Tensor:
    channels = settings.shape[0]
    images = torch.empty(len(settings.images(number)), *settings.shape, dtype=torch.uint8)
    for image, index in zip(images, settings.images(number), strict=True):
        with reading(path / _picture(index), _AGAIN, "a picture"):
            file = io.BytesIO((path / _picture(index)).read_bytes())
            Image.open(file).verify()  # checksums, which decoding leaves out
            with Image.open(file) as picture:
                found = torch.from_numpy(np.array(picture)).reshape(*picture.size[::-1], -1).permute(2, 0, 1)
            if len(found) != channels or found.shape != image.shape:
                raise LogsnrError(f"is {tuple(found.shape)}, not {tuple(image.shape)}")
            image.copy_(found)
    return images


FORMATS = {
    "npz": Format(
        name=lambda number: f"shard-{number:05d}.npz",
        holds=lambda shape: True,
        write=_write_npz,
        read=_read_npz,
    ),
    "png": Format(
        name=lambda number: f"{number:05d}",
        holds=lambda shape: len(shape) == 3 and shape[0] in (1, 3, 4),
        write=_write_png,
        read=_read_png,
        grey_levels=256,
    ),
}
"""Kinds of shards by name."""


def find_format(name: str, shape: tuple[int, ...]) -> Format:
    """The kind of that name.

    Raises:
        LogsnrError: if there is none, or it does not hold such images.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    if not FORMATS[name].holds(shape):
        raise LogsnrError(f"format {name} does not hold images of shape {shape}: give format npz")
    return FORMATS[name]


class Shards:
    """The images in a folder of `generate`, shard by shard.

        for images, labels in Shards("shards"): ...                  # uint8 [N, C, H, W], int64 [N] or None

    Args:
        folder: where they lie.

    Attributes:
        settings: what decided them.
        pixels: their codec.

    Raises:
        LogsnrError: if the folder is none of `generate`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        self.settings = Settings.load(self.folder)
        self._format = find_format(self.settings.format, self.settings.shape)
        self.pixels = Pixels(self._format.grey_levels or self.settings.grey_levels)

    def __len__(self) -> int:
        """How many images they are, once they are all there."""
        return self.settings.n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for number in range(self.settings.shards):
            yield self.read(number), self.settings.labels(self.settings.images(number))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of a set that has many: image i has number i mod their number.

        Raises:
            LogsnrError: if their file is missing or damaged.
        """
        if not self.settings.prompts:
            return ()
        path = self.folder / PROMPTS
        with reading(path, _AGAIN, "prompts"):
            found = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
                raise ValueError("it is no list of texts")
            return tuple(found)

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / self._format.name(number)

    @property
    def missing(self) -> list[int]:
        """The shards that are not there."""
        return [number for number in range(self.settings.shards) if not self.path(number).exists()]

    def read(self, number: int) -> Tensor:
        """The images of a shard: uint8 `[N, C, H, W]`.

        Raises:
            LogsnrError: if it is missing or not whole.
        """
        path, settings = self.path(number), self.settings
        if not path.exists():
            raise LogsnrError(
                f"{self.folder} lacks {path.name}, {len(self.missing)} of {settings.shards} shards are missing: run "
                "logsnr generate again as before, which makes these alone"
            )
        images = self._format.read(path, settings, number)
        wanted = (len(settings.images(number)), *settings.shape)
        if tuple(images.shape) != wanted or images.dtype != torch.uint8:
            raise LogsnrError(f"{path} holds {images.dtype} {tuple(images.shape)}, not uint8 {wanted}: {_AGAIN}")
        return images

    def write(self, number: int, images: Tensor) -> None:
        """Put a shard in its place, whole."""
        self._format.write(self.path(number), self.settings, number, images)

    def whole(self, number: int) -> bool:
        """Whether a shard is there, undamaged and with all its images."""
        try:
            return self.path(number).exists() and len(self.read(number)) > 0
        except LogsnrError:
            return False


def claim(folder: Path, settings: Settings, *, overwrite: bool, rank: int, world: int) -> Shards:
    """The set in a folder, begun with these settings or found with the same.

    Args:
        folder: where.
        settings: what is asked for; more images than before is more of the same set.
        overwrite: begin anew, whatever settings are there: of the shards that are there, those of this process are
            removed, and nothing that `generate` did not make.
        rank: number of this process; shards k with k mod world = rank are its own.
        world: of so many.

    Raises:
        LogsnrError: if other settings are there, or shards without any.
    """
    path, new = folder / NAME, settings.save()
    if not path.exists():
        strange = next((found.name for found in sorted(folder.iterdir()) if _number(found) is not None), None)
        if strange:
            raise LogsnrError(
                f"{folder} holds {strange} but no {NAME}, so nothing says what it is: give another folder"
            )
        create_file(path, new)
    elif overwrite:
        for found in folder.iterdir():
            number = _number(found)
            if number is not None and number % world == rank:
                shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
        if rank == 0:
            for name in (LABELS, PROMPTS):
                (folder / name).unlink(missing_ok=True)
        replace_file(path, new)
    there = Settings.load(folder)
    settings.check_same(there, folder)
    if settings.n > there.n:
        replace_file(path, new)
    shards = Shards(folder)
    labels = settings.labels(range(settings.n))
    if settings.format == "png" and labels is not None and (settings.n > there.n or not (folder / LABELS).exists()):
        names = (f"{FORMATS['png'].name(i // settings.shard)}/{_picture(i)}" for i in range(settings.n))
        entries = [list(entry) for entry in zip(names, labels.tolist(), strict=True)]
        replace_file(folder / LABELS, (json.dumps({"labels": entries}) + "\n").encode())
    return shards


def _number(path: Path) -> int | None:
    """The number of a shard by the looks of it; None for what `generate` did not make."""
    found = re.fullmatch(r"shard-(\d{5,})\.npz", path.name)
    if found is None and path.is_dir():
        found = re.fullmatch(r"(\d{5,})", path.name)
        inside = [picture.name for picture in path.iterdir()]
        if not inside or not all(re.fullmatch(r"\d{6,}\.png", name) for name in inside):
            return None
    return int(found[1]) if found else None
