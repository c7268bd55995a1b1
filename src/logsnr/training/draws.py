"""Draws: the batch of a step, and the seeds of all that a training draws.

Every draw of step n comes from a generator seeded with (seed, n), so a run resumed at n continues bit for bit with no
random state to store.  Images, mirrored or not, labels, noise levels and noise are drawn for the global batch, of which
each of several processes takes its share: any number of processes sees one stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.pixels import Pixels
from logsnr.schedules import Schedule
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset, Rows
from logsnr.training.data.feed import Feed


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, from the master seed: distinct names give independent streams."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """Random batches of the training images, on the device.

    Args:
        recipe: seed, batch, flips, conditions and label dropout.
        data: where images and labels come from.
        generator: source of all draws; on the CPU, or on `device`.
        device: where the batches go.
        rank: number of this process,
        world: of so many.

    Raises:
        LogsnrError: if the recipe wants labels that the data do not have.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        *,
        generator: torch.Generator,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if recipe.conditional and data.train_labels is None:
            raise LogsnrError(
                f"conditional: true, but {recipe.data.source!r} has no labels: add labels (a key 'labels', or "
                "one sub-folder per class) or set conditional: false"
            )
        # A stored image becomes a sample by table lookup: the codec itself reads the largest pixel back, every call.
        self._cells = Pixels(data.grey_levels).centres.to(device, torch.get_default_dtype())
        self._latent = data.latent
        labels = data.train_labels if recipe.conditional else None
        self._labels = None if labels is None else labels.to(device)
        self._null, self._dropout, self._flip = data.classes, recipe.label_dropout, recipe.data.flip
        self._seed, self._n, self._batch = recipe.seed, len(data.train_images), recipe.batch
        self._share = slice(rank * recipe.batch // world, (rank + 1) * recipe.batch // world)
        self._generator, self._device = generator, device
        self._images: Tensor | Feed
        if isinstance(data.train_images, Rows):
            ahead = Ahead(self.seed, self._index, generator.device, self._share)
            self._images = Feed(data.train_images, ahead, workers=recipe.data.workers, pin=device.type == "cuda")
        else:
            self._images = data.train_images[:].to(device)

    def seed(self, step: int) -> int:
        """Of the draws of a step, on all processes."""
        return derived_seed(self._seed, "step", step, 0)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Samples x `[B, C, H, W]` and conditions of a step, with flips and label dropout; B is this process's share.

        The generator then stands where the noise of the step begins.
        """
        self._generator.manual_seed(self.seed(step))
        index = self._index(self._generator)[self._share].to(self._device)
        if isinstance(self._images, Feed):
            images = self._images(step)
            if self._latent is None and (levels := len(self._cells)) < 256 and (largest := int(images.max())) >= levels:
                raise LogsnrError(
                    f"step {step} reads pixel value {largest}, and the {levels} grey levels are 0 ... {levels - 1}: "
                    "some images were looked at, and had none so large; prepare them (logsnr data prepare), or take "
                    "them into memory (data.in_memory: true)"
                )
            images = images.to(self._device, non_blocking=True)
        else:
            images = self._images[index]
        if self._latent is None:
            x = self._cells[images.long()]
        else:
            x = self._latent.x(images.to(self._cells.dtype), self._noise)
        if self._flip:
            x = torch.where(self._chance(0.5)[:, None, None, None], x.flip(3), x)
        cond = None
        if self._labels is not None:
            cond = {"class_labels": self._labels[index].masked_fill(self._chance(self._dropout), self._null)}
        return x, cond

    def noise(self, schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-SNRs `[B]` and noise `[B, C, H, W]` of the step whose samples x were drawn last: this process's share.

        Levels are stratified over the global batch.
        """
        logsnr = schedule.sample(self._batch, generator=self._generator)
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (self._batch, *x.shape[1:])
        eps = torch.randn(shape, generator=self._generator, device=self._generator.device, dtype=dtype)
        # A share is copied, so that the noise of others does not stay.
        eps = eps if len(x) == self._batch else eps[self._share].clone()
        return logsnr[self._share], eps.to(x.device)

    def close(self) -> None:
        """Let processes end that read ahead."""
        if isinstance(self._images, Feed):
            self._images.close()

    def _index(self, generator: torch.Generator) -> Tensor:
        """The images of the global batch, from a generator that stands at the step's beginning."""
        return torch.randint(self._n, (self._batch,), generator=generator, device=generator.device)

    def _noise(self, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(self._batch, *shape, generator=self._generator, device=self._generator.device)
        return drawn[self._share].to(self._device)

    def _chance(self, probability: float) -> Tensor:
        drawn = torch.rand(self._batch, generator=self._generator, device=self._generator.device)
        return (drawn[self._share] < probability).to(self._device)


class Ahead:
    """The images of any step, known before it comes: drawn as the step draws them, by a generator beside its own.

    Args:
        seed: of a step's draws.
        index: the global batch, from a generator.
        device: of that generator.
        share: of the batch.
    """

    def __init__(
        self,
        seed: Callable[[int], int],
        index: Callable[[torch.Generator], Tensor],
        device: torch.device,
        share: slice,
    ) -> None:
        self._seed, self._index, self._share = seed, index, share
        self._generator = torch.Generator(device)
        # On a stream of its own a GPU answers without having done the steps before.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def __call__(self, step: int) -> Tensor:
        """int64 `[B]`, on the CPU."""
        self._generator.manual_seed(self._seed(step))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return self._index(self._generator)[self._share].cpu()
