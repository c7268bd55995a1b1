"""Feeds: the images of one step after the other, where they are not in memory, read ahead by processes of their own.

    order(step) -> rows -> a process reads them -> the step

The rows of a step are a function of (seed, step), computed here, so that a feed can begin at any step and has no state
that a checkpoint would have to keep.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from logsnr.errors import LogsnrError
from logsnr.training.data.dataset import Rows

AHEAD = 4
"""Steps that each process may be ahead."""
GRACE = 20
"""Seconds that they go on after a SIGTERM, which a cluster sends to all: the training saves itself meanwhile."""


class Feed:
    """Images by step.

    Args:
        rows: where they come from.
        order: step -> int64 `[B]`, on the CPU.
        workers: processes that read ahead; 0 to read when asked.
        pin: whether batches lie in memory that a GPU copies from by itself.
    """

    def __init__(self, rows: Rows, order: Callable[[int], Tensor], *, workers: int, pin: bool) -> None:
        self.rows, self.order, self.workers, self.pin = rows, order, workers, pin
        self._next = -1
        self._batches: Iterator[Any] = iter(())

    def __call__(self, step: int) -> Tensor:
        """The images of a step, `[B, C, H, W]`, on the CPU.

        Raises:
            LogsnrError: if one cannot be read.
        """
        if not self.workers:
            return self.rows[self.order(step)]
        if step != self._next:
            self._batches = iter(self._loader(step))
        self._next = step + 1
        batch = next(self._batches)
        if isinstance(batch, str):
            raise LogsnrError(batch)
        assert isinstance(batch, Tensor)
        return batch

    def close(self) -> None:
        """Let the processes end."""
        self._batches, self._next = iter(()), -1

    def _loader(self, step: int) -> DataLoader[Any]:
        return DataLoader(
            _Reader(self.rows),
            sampler=_Steps(self.order, step),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            pin_memory=self.pin,
            worker_init_fn=_patient,
        )


class _Steps:
    """The rows of every step from one on; as an array, which goes to another process by value."""

    def __init__(self, order: Callable[[int], Tensor], first: int) -> None:
        self.order, self.first = order, first

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        step = self.first
        while True:
            yield self.order(step).numpy()
            step += 1


class _Reader(Dataset[Any]):
    """Reads a batch; a mistake in the data comes back as its line, without the process's own traceback."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: np.ndarray[Any, Any]) -> Tensor | str:
        try:
            return self.rows[index]
        except LogsnrError as error:
            return str(error)


def _patient(worker: int) -> None:
    """Leave Ctrl-C, and SIGTERM for a while, to the process that trains: it asks its readers to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE))
