"""Folders: images of a folder, in the order of their names; its sub-folders are classes.

Hidden files and folders, and what other programs put beside images (`HIDDEN`), are no data.  Every other file that is
not read is counted by its suffix, so that nothing is left out in silence.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.training.images import BrokenImageError, Picture, read_image, suffixes
from logsnr.training.sections import DataConfig

HIDDEN = ("__MACOSX", "@eaDir")
"""Folders of copies and thumbnails, beside all names that begin with a dot."""
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
"""Names that sub-folders have where they are parts of a set, not classes."""
_WINDOW = 256
"""Files handed to the decoding threads at a time."""

Tell = Callable[[int, int], None]
"""Called with the number of files read, and of all."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder holds.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`, None without sub-folders.
        classes: names of the sub-folders.
        said: what was read, converted and left out, in a phrase each.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    said: tuple[str, ...]


def read_folder(path: Path, config: DataConfig, tell: Tell | None = None) -> Folder:
    """Read every image below a folder.

    Raises:
        LogsnrError: if there are none, one cannot be read (`data.broken` may leave it out), sizes differ without
            `data.size`, or images lie both beside class folders and in them.
    """
    files, skipped = image_files(path)
    parents = class_folders(path, files)
    seen = Seen()
    images, broken = decoded(files, config, seen, tell or (lambda done, total: None))
    kept = [parts for parts, error in zip(parents, broken, strict=True) if error is None]
    if not kept:
        raise LogsnrError(f"none of the {len(files)} images of {path} can be read: {broken[0]}")
    names = sorted({parts[0] for parts in kept if parts})
    number = {name: i for i, name in enumerate(names)}
    return Folder(
        images=images,
        labels=torch.tensor([number[parts[0]] for parts in kept]) if names else None,
        classes=tuple(names),
        said=(*seen.told(), *left_out(path, files, broken, names, skipped)),
    )


def class_folders(path: Path, files: list[Path]) -> list[tuple[str, ...]]:
    """The folders above each file, the class first.

    Raises:
        LogsnrError: if images lie both beside class folders and in them.
    """
    parents = [file.relative_to(path).parts[:-1] for file in files]
    named = next((parts[0] for parts in parents if parts), None)
    loose = next((file for file, parts in zip(files, parents, strict=True) if not parts), None)
    if named is not None and loose is not None:
        raise LogsnrError(
            f"{path} holds the class folder {min(parts[0] for parts in parents if parts)!r} and, beside it, the image "
            f"{loose.name!r}: put every image into a class folder, or none"
        )
    return parents


def image_files(path: Path, folders: list[Path] | None = None) -> tuple[list[Path], Counter[str]]:
    """The image files below a folder, in the order of their names, and how many others there are by suffix.

    Args:
        path: the folder.
        folders: to which every folder is added that was looked into.

    Raises:
        LogsnrError: if there are none, or a folder cannot be read.
    """
    skipped: Counter[str] = Counter()
    try:
        files = sorted(_files(path, (), skipped, [] if folders is None else folders))
    except OSError as error:
        where = error.filename or path
        raise LogsnrError(f"{where} cannot be read ({error.strerror}): check its permissions") from error
    if not files:
        left = f"; it holds {_counted(skipped)}" if skipped else ""
        raise LogsnrError(f"{path} holds no images ({', '.join(suffixes())}){left}: check the path")
    return files, skipped


def _files(folder: Path, above: tuple[str, ...], skipped: Counter[str], folders: list[Path]) -> Iterator[Path]:
    """Image files below a folder, links followed; whatever else lies there is counted."""
    above = (*above, os.path.realpath(folder))
    folders.append(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            path, suffix = Path(entry.path), os.path.splitext(entry.name)[1].lower()
            if _hidden(entry.name):
                skipped["hidden"] += 1
            elif entry.is_dir():
                if os.path.realpath(path) not in above:  # a link to a folder above has no end
                    yield from _files(path, above, skipped, folders)
            elif suffix in suffixes() and entry.is_file():
                yield path
            else:
                skipped[suffix or "without suffix"] += 1


@dataclass
class Seen:
    """What was seen of pictures that were read."""

    modes: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def add(self, picture: Picture) -> None:
        """Count one."""
        self.modes[picture.mode] += 1
        self.said.update(picture.said)
        self.sizes.add(picture.size)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: of the sizes the smallest and the largest."""
        sizes = [] if not self.sizes else [pick(self.sizes, key=math.prod) for pick in (min, max)]
        return {"modes": self.modes, "said": self.said, "sizes": sizes, "broken": self.broken}

    @classmethod
    def merged(cls, parts: Iterable[dict[str, Any]]) -> Seen:
        """What several saw."""
        seen = cls()
        for part in parts:
            seen.modes.update(part["modes"])
            seen.said.update(part["said"])
            seen.sizes |= {(w, h) for w, h in part["sizes"]}
            seen.broken += part["broken"]
        return seen

    def told_broken(self) -> Iterator[str]:
        """What was left out."""
        if self.broken:
            more = ", ..." if len(self.broken) > 3 else ""
            yield f"left out as broken: {len(self.broken)} ({', '.join(self.broken[:3])}{more})"

    def told(self) -> list[str]:
        """In a phrase each."""
        return [f"{_spanned(self.sizes)}, {_counted(self.modes)}", *_each(self.said, self.modes.total())]


def pictures(files: list[Path], config: DataConfig) -> Iterator[Picture | BrokenImageError]:
    """The picture in each file, decoded on all cores; its error where the recipe says that such are left out."""

    def read(file: Path) -> Picture | BrokenImageError:
        try:
            return read_image(
                file, channels=config.channels or 3, size=config.size, background=config.background, crop=config.crop
            )
        except BrokenImageError as error:
            if config.broken == "stop":
                raise
            return error

    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        for start in range(0, len(files), _WINDOW):
            yield from pool.map(read, files[start : start + _WINDOW])


def decoded(
    files: list[Path], config: DataConfig, seen: Seen, tell: Tell, like: tuple[str, tuple[int, ...]] | None = None
) -> tuple[Tensor, list[Exception | None]]:
    """Pixels of the files that can be read `[n, C, H, W]`, and the error of each file or None.

    Args:
        files: of pictures.
        config: how they are read.
        seen: to which they are added.
        tell: called with the number of files read, and of all.
        like: the name and (C, H, W) of another, which they must have; None for those of the first.
    """
    images, broken, n = np.empty((0, *(like[1] if like else (0, 0, 0))), np.uint8), list[Exception | None](), 0
    for file, picture in zip(files, pictures(files, config), strict=True):
        broken.append(picture if isinstance(picture, Exception) else None)
        if not isinstance(picture, Exception):
            like = like or (file.name, picture.pixels.shape)
            if n == 0:
                images = np.empty((len(files), *like[1]), np.uint8)
            if picture.pixels.shape != like[1]:
                raise unlike(file, picture, like)
            images[n] = picture.pixels
            n += 1
            seen.add(picture)
        if len(broken) % _WINDOW == 0 or len(broken) == len(files):
            tell(len(broken), len(files))
    return torch.from_numpy(images[:n]), broken


def unlike(file: Path, picture: Picture, like: tuple[str, tuple[int, ...]]) -> LogsnrError:
    """The error of a picture of another size."""
    _, height, width = like[1]
    return LogsnrError(
        f"{file} is {picture.size[0]} x {picture.size[1]}, {like[0]} is {width} x {height}: set "
        "data.size to crop and resize all images to one size"
    )


def left_out(
    path: Path, files: list[Path], broken: list[Exception | None], names: list[str], skipped: Counter[str]
) -> Iterator[str]:
    """What of a folder was not read, in a phrase each."""
    bad = [str(file.relative_to(path)) for file, error in zip(files, broken, strict=True) if error is not None]
    yield from Seen(broken=bad).told_broken()
    if skipped:
        yield f"not read: {_counted(skipped)}"
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if names and (empty := [name for name in folders if name not in names]):
        yield f"no class, as without images: {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
    if len(names) > 1 and {name.lower() for name in names} <= PARTS:
        yield f"the parts {' and '.join(names)} are read as classes: to train on one, give its folder"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _spanned(sizes: set[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    (w, h), (wide, high) = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    return f"{w} x {h} pixels" if len(sizes) == 1 else f"{w} x {h} to {wide} x {high} pixels"


def _each(said: Counter[str], n: int) -> Iterator[str]:
    for what, count in said.most_common():
        yield f"{'all' if count == n else f'{count:,}'} {what}"


def _counted(things: Counter[str]) -> str:
    counts = [f"{count:,} {name}" for name, count in things.most_common(6)]
    return ", ".join([*counts, "..."] if len(things) > 6 else counts)
