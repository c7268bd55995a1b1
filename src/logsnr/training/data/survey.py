"""Surveys: what has to be known of images that are not in memory, from one walk through them.

    counts [256]     how often each stored value occurs: the largest, and the standard deviation to the last digit
    images           the sha256 that `files.fingerprint` gives of the same images in memory
    labelled         and of them with their labels

A survey is kept in the cache folder under the identity of the files, so that the walk is taken once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.paths import cache_folder
from logsnr.reading import mapping, read_json
from logsnr.writing import replace_file

if TYPE_CHECKING:
    from logsnr.training.data.dataset import Rows

VERSION = 1
BYTES = 2**24
"""Of the images that are looked at in one go."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a walk through images found.

    Attributes:
        counts: how often each value 0 ... 255 occurs.
        images: sha256 of the images.
        labelled: sha256 of images and labels; "" without labels.
        spread: of latents: the standard deviation of x, which has no counts.
    """

    counts: tuple[int, ...]
    images: str
    labelled: str = ""
    spread: float = 0.0

    @property
    def largest(self) -> int:
        """The largest value."""
        return max(value for value, count in enumerate(self.counts) if count)


def survey(
    rows: Rows,
    labels: Tensor | None,
    tell: Callable[[int, int], None] | None = None,
    *,
    walk: Callable[..., Survey] | None = None,
    place: Path | None = None,
) -> Survey:
    """The survey of images, and of their labels; one that is kept is not made again.

    Args:
        rows: uint8.
        labels: int64 `[N]`, None for none.
        tell: called with the number of images seen, and of all.
        walk: rows, labels, tell -> survey; by default a walk through all of them.
        place: folder where it is kept; the cache folder if None.
    """
    name = f"survey-{_key(rows, labels)[:32]}.json"
    kept = (place or cache_folder() / "data") / name
    beside = [folder / name] if (folder := getattr(rows.store, "folder", None)) is not None else []
    for path in (kept, *beside):
        with suppress(LogsnrError, TypeError, KeyError):
            found = mapping(read_json(path, "", "a survey")["survey"], str(path), "")
            return Survey(**{**found, "counts": tuple(int(n) for n in found["counts"])})
    made = (walk or _walked)(rows, labels, tell)
    with suppress(OSError):  # what can be made again is kept where there is place
        replace_file(kept, json.dumps({"format": VERSION, "survey": dataclasses.asdict(made)}).encode())
    return made


def _key(rows: Rows, labels: Tensor | None) -> str:
    digest = hashlib.sha256(f"{VERSION} {rows.store.identity} {rows.divide}".encode())
    digest.update(rows.order.data)
    if labels is not None:
        digest.update(labels.numpy().data)
    return digest.hexdigest()


def _walked(rows: Rows, labels: Tensor | None, tell: Callable[[int, int], None] | None) -> Survey:
    counts = torch.zeros(256, dtype=torch.int64)
    digest = hashlib.sha256(f"images {torch.uint8} {tuple(rows.shape)}\n".encode())
    size = max(BYTES // max(rows.shape[1:].numel(), 1), 1)
    for first in range(0, len(rows), size):
        part = rows[first : first + size].contiguous()
        counts += torch.bincount(part.flatten(), minlength=256)
        digest.update(part.numpy().data)
        if tell is not None:
            tell(min(first + size, len(rows)), len(rows))
    images, labelled = digest.hexdigest(), ""
    if labels is not None:
        digest.update(f"labels {labels.dtype} {tuple(labels.shape)}\n".encode())
        digest.update(labels.contiguous().numpy().data)
        labelled = digest.hexdigest()
    return Survey(counts=tuple(counts.tolist()), images=images, labelled=labelled)
