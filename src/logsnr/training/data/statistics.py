"""Statistics of a prepared set: mean and covariance of x, one walk through any number of images.

    c = DCT-II of every axis but the first (gaussian.py),      sum c,  sum c_i c_j^T over channels, at every frequency

From these the channels' rotation and the variance of every cosine follow, as `gaussian.fit` finds them in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from logsnr.gaussian import Cosines, Covariance, from_tensors, of_moments
from logsnr.reading import open_tensors, reading
from logsnr.training.data.prepared import FIX
from logsnr.writing import replace_file

NAME = "statistics.safetensors"


class Moments:
    """Sums over samples x `[B, C, *space]`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, *space = shape
        self.shape, self.n = shape, 0
        self.basis = Cosines(torch.eye(channels, dtype=torch.float64), tuple(space))
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, *space, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count some."""
        c = self.basis.coordinates(x.flatten(1).double()).reshape(len(x), *self.shape)
        self.n += len(x)
        self.total += c.sum(0)
        for i in range(self.shape[0]):
            self.products[i] += (c[:, i : i + 1] * c).sum(0)

    def finish(self) -> tuple[Tensor, Covariance]:
        """The mean `[C, *space]`, and the covariance in cosines."""
        mean = self.total / self.n
        products = self.products - self.n * mean.unsqueeze(0) * mean.unsqueeze(1)
        centre = self.basis.combined(mean.reshape(1, -1)).reshape(self.shape)
        return centre, of_moments(products, self.n - 1)


def gather(parts: Iterable[Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Covariance]:
    """Mean and covariance of samples that come in parts."""
    moments = Moments(shape)
    for part in parts:
        moments.add(part)
    return moments.finish()


def save_statistics(folder: Path, mean: Tensor, covariance: Covariance) -> None:
    """Write them beside a prepared set."""
    tensors = {name: value.contiguous() for name, value in {"mean": mean, **covariance.tensors()}.items()}
    replace_file(folder / NAME, save(tensors, {"kind": covariance.kind}))


def read_statistics(folder: Path) -> tuple[Tensor, Covariance]:
    """Mean `[C, *space]` and covariance of the training part of a prepared set, in the units of x.

    Raises:
        LogsnrError: if they are missing or damaged.
    """
    with reading(folder / NAME, FIX, "the statistics of a prepared set"):
        _, tensors = open_tensors(folder / NAME)
        mean = tensors.pop("mean")
        return mean, from_tensors("cosine", tuple(mean.shape), tensors, "")
