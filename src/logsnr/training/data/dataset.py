"""Datasets: images by index, with a held-out part; how large they are makes no difference to who reads them.

    Tensor     images in memory
    Rows       images that stay where they are: rows of a store, which are read when they are asked for

Both are `Images`.  What a training has to know of all images at once (the spread, the largest value, which they are)
is computed from those in memory, and comes from a survey (survey.py) of those that are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.files import fingerprint
from logsnr.pixels import Pixels
from logsnr.training.data.latents import Latent, Spread
from logsnr.training.data.survey import BYTES, Survey

Index = Any
"""A slice, int64 or bool `[B]`, or a number."""


class Images(Protocol):
    """Images of one shape by index; a tensor `[N, C, H, W]` is one."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index, /) -> Tensor: ...


class Store(Protocol):
    """Images in files, by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, (C, H, W)."""

    @property
    def identity(self) -> str:
        """What changes when the files do."""

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """The images of these rows, `[B, C, H, W]`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Rows of a store, in an order.

    Args:
        store: where they are.
        order: int64 `[N]`, the row of each.
        divide: whole number by which values are divided (low-bit data).
    """

    store: Store
    order: np.ndarray[Any, Any]
    divide: int = 1

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.order), *self.store.shape))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Index, /) -> Tensor:
        at = self.order[index.cpu().numpy() if isinstance(index, Tensor) else index]
        images = self.store.read(np.atleast_1d(at))
        images = images if self.divide == 1 else images // self.divide
        return images if at.ndim else images[0]

    def pick(self, index: Tensor) -> Rows:
        """Some of them, unread."""
        return replace(self, order=self.order[index.numpy()])

    def divided(self, by: int) -> Rows:
        """The same, their values divided."""
        return replace(self, divide=self.divide * by)


def pick(images: Images, index: Tensor) -> Images:
    """Some of the images: read if they are in memory, else named."""
    return images.pick(index) if isinstance(images, Rows) else images[index].contiguous()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Stored images, on the CPU or not in memory at all.

    Args:
        train_images: uint8 `[N, C, H, W]`, values below `grey_levels`; of latents what is stored, float32.
        train_labels: int64 `[N]` in 0 ... classes - 1, None without labels.
        test_images: the held-out part.
        test_labels: its labels.
        grey_levels: per channel.
        classes: number of classes, 0 without labels.
        class_names: of the classes, where they have any.
        source: what it was read from.
        said: what was read, converted and left out, in a phrase each.
        survey: what is known of all training images, where they are not in memory.
        latent: how latents are stored; None for images.
    """

    train_images: Images
    train_labels: Tensor | None
    test_images: Images
    test_labels: Tensor | None
    grey_levels: int
    classes: int
    class_names: tuple[str, ...] = ()
    source: str = "data"
    said: tuple[str, ...] = ()
    survey: Survey | None = None
    latent: Latent | None = None

    def describe(self) -> str:
        """What was read: images, sizes, classes, what was converted and left out."""
        train, test = len(self.train_images), len(self.test_images)
        c, h, w = self.shape
        kind = {1: "in grey", 3: "in colour"}.get(c, f"with {c} channels")
        if self.latent is not None:
            kind = f"with {c} channels, latents of {self.latent.vae}"
        levels = "" if self.grey_levels == 256 else f", {self.grey_levels} grey levels"
        held = f" ({test:,} held out)" if test else ""
        facts = [f"{train + test:,} images{held}, {h} x {w} {kind}{levels}", *self._classes(), *self.said]
        return f"{Path(self.source).name or self.source}: {'; '.join(facts)}"

    def _classes(self) -> Iterator[str]:
        if self.train_labels is None:
            return
        labels = [self.train_labels] if self.test_labels is None else [self.train_labels, self.test_labels]
        counts = torch.bincount(torch.cat(labels), minlength=self.classes).tolist()
        each = [f"{name} {n:,}" for name, n in zip(self.class_names or range(self.classes), counts, strict=True)]
        listed = ", ".join(each if len(each) <= 12 else [*each[:3], "...", each[-1]])
        yield f"{self.classes:,} class{'es' if self.classes > 1 else ''}: {listed}"
        if empty := counts.count(0):
            yield f"{empty:,} of the classes have no images"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, or of its latents."""
        stored = tuple(self.train_images.shape[1:])
        c, h, w = stored if self.latent is None else self.latent.shape(stored)
        return c, h, w

    @property
    def sigma_data(self) -> float:
        """Standard deviation of all training values about their common mean, in the units of x; exact, by histogram.

        Raises:
            LogsnrError: if it is 0.
        """
        if self.latent is not None:
            return self._spread(self.latent)
        if isinstance(self.train_images, Tensor):
            counts = torch.bincount(self.train_images.flatten(), minlength=self.grey_levels)
        else:
            assert self.survey is not None
            counts = torch.tensor(self.survey.counts[: self.grey_levels])
        counts = counts.to(torch.float64)
        cells = Pixels(self.grey_levels).centres.to(torch.float64)
        mean = (counts * cells).sum() / counts.sum()
        spread = float(((counts * (cells - mean) ** 2).sum() / counts.sum()).sqrt())
        if spread == 0:
            raise LogsnrError("all training images have one and the same grey value: there is nothing to learn")
        return spread

    def _spread(self, latent: Latent) -> float:
        """The same of latents, over their posteriors."""
        if self.survey is not None:
            return self.survey.spread
        spread = Spread(latent)
        size = max(BYTES // (4 * self.train_images.shape[1:].numel()), 1)
        for first in range(0, len(self.train_images), size):
            spread.add(self.train_images[first : first + size])
        if not spread.deviation:
            raise LogsnrError("all latents are one and the same number: there is nothing to learn")
        return spread.deviation

    def fingerprint(self, *, labels: bool) -> str:
        """Which training images these are and, where they matter, labels: the same in memory and out of it."""
        if not isinstance(self.train_images, Tensor):
            assert self.survey is not None
            return self.survey.labelled if labels and self.survey.labelled else self.survey.images
        seen = {"images": self.train_images}
        if labels and self.train_labels is not None:
            seen["labels"] = self.train_labels
        return fingerprint(seen)
