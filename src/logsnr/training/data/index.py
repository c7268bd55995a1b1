"""Indices: the image files of a folder, listed once, and read when they are asked for.

The names lie one after the other in one array, so that an index of a million files takes some 60 MB, which processes
that read ahead share.  It is kept in the cache folder and holds until the time of change of any folder in it is
another: a file was added, removed or renamed.  What it does not see is a file that was written over in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from logsnr.errors import LogsnrError
from logsnr.paths import cache_folder
from logsnr.reading import parse_json, read_arrays
from logsnr.training.data.dataset import Rows
from logsnr.training.data.survey import Survey
from logsnr.training.folders import Seen, Tell, class_folders, image_files, pictures, unlike
from logsnr.training.images import Picture
from logsnr.training.sections import DataConfig
from logsnr.writing import npz, replace_file

VERSION = 1
LOOK = 2048
"""Images that are decoded to estimate the spread of all."""
_AT_ONCE = 128
_FRESH = 2.0
"""Seconds after which a folder's time of change tells of the next change too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Image files below a folder, in the order of their names.

    Attributes:
        root: the folder.
        names: uint8, all paths relative to it.
        ends: int64 `[N]`, where each name ends.
        labels: int64 `[N]`, the class folder of each; None without class folders.
        classes: names of the class folders.
        skipped: other files, by suffix.
    """

    root: Path
    names: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    labels: Tensor | None
    classes: tuple[str, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, i: int) -> Path:
        """The i-th file."""
        name = self.names[0 if i == 0 else self.ends[i - 1] : self.ends[i]].tobytes()
        return self.root / os.fsdecode(name)

    @property
    def identity(self) -> str:
        """sha256 of the names."""
        return hashlib.sha256(self.names.tobytes() + self.ends.tobytes()).hexdigest()


def find_index(path: Path) -> Index:
    """The index of a folder: the one that is kept, or a new one.

    Raises:
        LogsnrError: if there are no images, a folder cannot be read, or images lie beside class folders.
    """
    where = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    kept = cache_folder() / "data" / f"index-{where}.npz"
    with suppress(LogsnrError, OSError, KeyError, TypeError, ValueError):
        return _kept(path, kept)
    folders: list[Path] = []
    files, skipped = image_files(path, folders)
    parents = class_folders(path, files)
    classes = tuple(sorted({parts[0] for parts in parents if parts}))
    number = {name: i for i, name in enumerate(classes)}
    names = [os.fsencode(file.relative_to(path)) for file in files]
    index = Index(
        root=path,
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names]),
        labels=torch.tensor([number[parts[0]] for parts in parents]) if classes else None,
        classes=classes,
        skipped=skipped,
    )
    times = {os.path.relpath(folder, path): os.stat(folder).st_mtime_ns for folder in folders}
    if max(times.values()) / 1e9 < time.time() - _FRESH:
        about = {"format": VERSION, "folders": times, "classes": classes, "skipped": skipped}
        arrays = {"names": index.names, "ends": index.ends, "about": np.array(json.dumps(about))}
        if index.labels is not None:
            arrays["labels"] = index.labels.numpy()
        with suppress(OSError):
            replace_file(kept, npz(arrays))
    return index


def _kept(path: Path, kept: Path) -> Index:
    """The index that is kept, if it still holds."""
    arrays = read_arrays(kept, "")
    about = parse_json(str(arrays["about"]))
    if about["format"] != VERSION:
        raise ValueError
    for folder, changed in about["folders"].items():
        if os.stat(path / folder).st_mtime_ns != changed:
            raise ValueError
    labels = arrays.get("labels")
    return Index(
        root=path, names=arrays["names"], ends=arrays["ends"], classes=tuple(about["classes"]),
        labels=None if labels is None else torch.from_numpy(labels), skipped=Counter(about["skipped"]),
    )  # fmt: skip


class Files:
    """Image files as a store: decoded when they are asked for.

    Args:
        index: the files.
        config: how they are read.
        keep: whether what was decoded once stays in memory, shared with the processes that read ahead for this one.

    Raises:
        LogsnrError: if the first cannot be read, or the recipe wants broken ones left out: which they are is not known
            before all were read.
    """

    def __init__(self, index: Index, config: DataConfig, *, keep: bool = False) -> None:
        if config.broken == "skip":
            raise LogsnrError(
                "data.broken: skip leaves out what cannot be read, which is known once all images were: prepare them "
                "(logsnr data prepare), or take them into memory (data.in_memory: true)"
            )
        self.index, self.config = index, config
        (first,) = pictures([index.path(0)], config)
        assert isinstance(first, Picture)
        self.shape: tuple[int, ...] = first.pixels.shape
        self._kept: tuple[Tensor, Tensor] | None = None
        if keep:
            with suppress(RuntimeError):  # where the system has too little shared memory, nothing is kept
                self._kept = (
                    _shared(torch.empty(len(index), *self.shape, dtype=torch.uint8)),
                    _shared(torch.zeros(len(index), dtype=torch.bool)),
                )

    @property
    def identity(self) -> str:
        """sha256 of the names, and of how they are read."""
        how = self.config.model_dump(include={"size", "crop", "channels", "background"})
        return hashlib.sha256((self.index.identity + json.dumps(how)).encode()).hexdigest()

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """The images of these rows, `[B, C, H, W]`."""
        if self._kept is None:
            return self.seen(rows, Seen())
        images, there = self._kept
        at = torch.from_numpy(rows)
        fresh = np.unique(rows[~there[at].numpy()])
        if len(fresh):
            images[fresh] = self.seen(fresh, Seen())
            there[fresh] = True
        return images[at]

    def seen(self, rows: np.ndarray[Any, Any], seen: Seen, tell: Tell | None = None) -> Tensor:
        """The same, and what they were counted."""
        files = [self.index.path(int(row)) for row in rows]
        images = np.empty((len(files), *self.shape), np.uint8)
        # A process that reads ahead is one of several: it decodes by itself.
        read = (one for file in files for one in pictures([file], self.config)) if get_worker_info() else None
        for i, picture in enumerate(read or pictures(files, self.config)):
            assert isinstance(picture, Picture)
            if picture.pixels.shape != self.shape:
                raise unlike(files[i], picture, (self.index.path(0).name, self.shape))
            images[i] = picture.pixels
            seen.add(picture)
            if tell is not None:
                tell(i + 1, len(files))
        return torch.from_numpy(images)


def _shared(tensor: Tensor) -> Tensor:
    """The tensor in memory that other processes share."""
    return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def look(rows: Rows, labels: Tensor | None, tell: Tell | None = None) -> Survey:
    """What some of the files tell of all: the survey has the counts of `LOOK` of them, and names for fingerprints."""
    chosen = np.linspace(0, len(rows) - 1, min(LOOK, len(rows))).astype(np.int64)
    counts = torch.zeros(256, dtype=torch.int64)
    for first in range(0, len(chosen), _AT_ONCE):
        images = rows.store.read(rows.order[chosen[first : first + _AT_ONCE]]) // rows.divide
        counts += torch.bincount(images.flatten(), minlength=256)
        if tell is not None:
            tell(min(first + _AT_ONCE, len(chosen)), len(chosen))
    digest = hashlib.sha256(f"files {rows.store.identity} {rows.divide}".encode() + rows.order.tobytes())
    names = digest.hexdigest()
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    return Survey(
        counts=tuple(counts.tolist()), images=names, labelled=digest.hexdigest() if labels is not None else ""
    )
