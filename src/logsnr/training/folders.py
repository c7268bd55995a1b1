"""Folders: images of a folder, in the order of their names; its sub-folders are classes.

Hidden files and folders, and what other programs put beside images (`HIDDEN`), are no data.  Every other file that is
not read is counted by its suffix, so that nothing is left out in silence.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
    parents = [file.relative_to(path).parts[:-1] for file in files]
    names = sorted({parts[0] for parts in parents if parts})
    loose = next((file for file, parts in zip(files, parents, strict=True) if not parts), None)
    if names and loose is not None:
        raise LogsnrError(
            f"{path} holds the class folder {names[0]!r} and, beside it, the image {loose.name!r}: "
            "put every image into a class folder, or none"
        )
    images, broken, seen = _decoded(files, config, tell or (lambda done, total: None))
    kept = [parts for parts, error in zip(parents, broken, strict=True) if error is None]
    if not kept:
        raise LogsnrError(f"none of the {len(files)} images of {path} can be read: {broken[0]}")
    names = sorted({parts[0] for parts in kept if parts})
    number = {name: i for i, name in enumerate(names)}
    return Folder(
        images=images,
        labels=torch.tensor([number[parts[0]] for parts in kept]) if names else None,
        classes=tuple(names),
        said=(*seen, *_left_out(path, files, broken, names, skipped)),
    )


def image_files(path: Path) -> tuple[list[Path], Counter[str]]:
    """The image files below a folder, in the order of their names, and how many others there are by suffix.

    Raises:
        LogsnrError: if there are none, or a folder cannot be read.
    """
    skipped: Counter[str] = Counter()
    try:
        files = sorted(_files(path, (), skipped))
    except OSError as error:
        where = error.filename or path
        raise LogsnrError(f"{where} cannot be read ({error.strerror}): check its permissions") from error
    if not files:
        left = f"; it holds {_counted(skipped)}" if skipped else ""
        raise LogsnrError(f"{path} holds no images ({', '.join(suffixes())}){left}: check the path")
    return files, skipped


def _files(folder: Path, above: tuple[str, ...], skipped: Counter[str]) -> Iterator[Path]:
    """Image files below a folder, links followed; whatever else lies there is counted."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            path, suffix = Path(entry.path), os.path.splitext(entry.name)[1].lower()
            if _hidden(entry.name):
                skipped["hidden"] += 1
            elif entry.is_dir():
                if os.path.realpath(path) not in above:  # a link to a folder above has no end
                    yield from _files(path, above, skipped)
            elif suffix in suffixes() and entry.is_file():
                yield path
            else:
                skipped[suffix or "without suffix"] += 1


def _decoded(files: list[Path], config: DataConfig, tell: Tell) -> tuple[Tensor, list[Exception | None], list[str]]:
    """Pixels of the files that can be read `[n, C, H, W]`, the error of each file or None, and what was read."""

    def read(file: Path) -> Picture | BrokenImageError:
        try:
            return read_image(file, channels=config.channels or 3, size=config.size, background=config.background)
        except BrokenImageError as error:
            if config.broken == "stop":
                raise
            return error

    images, first, broken = np.empty((0, 0, 0, 0), np.uint8), files[0], list[Exception | None]()
    modes, said, sizes = Counter[str](), Counter[str](), set[tuple[int, int]]()
    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        for start in range(0, len(files), _WINDOW):
            window = files[start : start + _WINDOW]
            for file, picture in zip(window, pool.map(read, window), strict=True):
                broken.append(picture if isinstance(picture, Exception) else None)
                if isinstance(picture, Exception):
                    continue
                n = modes.total()
                if n == 0:
                    images, first = np.empty((len(files), *picture.pixels.shape), np.uint8), file
                elif picture.pixels.shape != images.shape[1:]:
                    _, height, width = images.shape[1:]
                    raise LogsnrError(
                        f"{file} is {picture.size[0]} x {picture.size[1]}, {first.name} is {width} x {height}: set "
                        "data.size to crop and resize all images to one size"
                    )
                images[n] = picture.pixels
                modes[picture.mode] += 1
                sizes.add(picture.size)
                said.update(picture.said)
            tell(len(broken), len(files))
    n = modes.total()
    return torch.from_numpy(images[:n]), broken, [f"{_spanned(sizes)}, {_counted(modes)}", *_each(said, n)]


def _left_out(
    path: Path, files: list[Path], broken: list[Exception | None], names: list[str], skipped: Counter[str]
) -> Iterator[str]:
    bad = [str(file.relative_to(path)) for file, error in zip(files, broken, strict=True) if error is not None]
    if bad:
        more = ", ..." if len(bad) > 3 else ""
        yield f"left out as broken: {len(bad)} ({', '.join(bad[:3])}{more})"
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
