"""Draws: the batch of a step, and the seeds of all that a training draws.

Every draw of step n on rank r comes from a generator seeded with (seed, n, r), so a run resumed at n continues bit for
bit with no random state to store.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.pixels import Pixels
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, from the master seed: distinct names give independent streams."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """Random batches of the training images, on the device.

    Args:
        recipe: flips, conditions and label dropout.
        data: where images and labels come from.
        batch: images per draw.
        generator: source of all draws; on the CPU, or on `device`.
        device: where the batches go.

    Raises:
        LogsnrError: if the recipe wants labels that the data do not have.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, *, batch: int, generator: torch.Generator, device: torch.device
    ) -> None:
        if recipe.conditional and data.train_labels is None:
            raise LogsnrError(
                f"conditional: true, but {recipe.data.source!r} has no labels: add labels (a key 'labels', or "
                "one sub-folder per class) or set conditional: false"
            )
        # A stored image becomes a sample by table lookup: the codec itself reads the largest pixel back, every call.
        self._cells = Pixels(data.grey_levels).centres.to(device)
        self._images = data.train_images.to(device)
        labels = data.train_labels if recipe.conditional else None
        self._labels = None if labels is None else labels.to(device)
        self._null, self._dropout, self._flip = data.classes, recipe.label_dropout, recipe.data.flip
        self._batch, self._generator, self._device = batch, generator, device

    def __call__(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Samples x `[batch, C, H, W]` and conditions, with flips and label dropout."""
        source = self._generator.device
        index = torch.randint(len(self._images), (self._batch,), generator=self._generator, device=source)
        index = index.to(self._device)
        x = self._cells[self._images[index].long()]
        if self._flip:
            x = torch.where(self._chance(0.5)[:, None, None, None], x.flip(3), x)
        if self._labels is None:
            return x, None
        return x, {"class_labels": self._labels[index].masked_fill(self._chance(self._dropout), self._null)}

    def _chance(self, probability: float) -> Tensor:
        drawn = torch.rand(self._batch, generator=self._generator, device=self._generator.device)
        return (drawn < probability).to(self._device)
