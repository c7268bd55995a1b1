"""Memory-mapped images: arrays in .npy and uncompressed .npz files, of which only the rows that are asked for are read.

Pages of a mapping are the file's own: the system gives them back when memory is short, and all processes of a machine
share them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.reading import Region


class Mapped:
    """Rows of arrays in files, one array after the other.

    Args:
        regions: the arrays, of rows of one shape and dtype.
        layout: "NHW", "NHWC" or "NCHW".
        folder: that keeps surveys of them, too.
        identity: what changes when the files do; None to ask the files.
    """

    def __init__(
        self, regions: list[Region], layout: str, *, folder: Path | None = None, identity: str | None = None
    ) -> None:
        self.regions, self.layout, self.folder, self._identity = regions, layout, folder, identity
        row = regions[0].shape[1:]
        self._shape: tuple[int, ...] = (1, *row) if layout == "NHW" else row if layout == "NCHW" else (row[2], *row[:2])
        self._starts = np.cumsum([0, *(region.shape[0] for region in regions)])
        self._arrays: list[np.ndarray[Any, Any] | None] = [None] * len(regions)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, (C, H, W)."""
        return self._shape

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": [None] * len(self.regions)}  # another process maps for itself

    @property
    def identity(self) -> str:
        """sha256 of names, sizes, times of change, and places, where nothing else was said."""
        if self._identity is not None:
            return self._identity
        digest = hashlib.sha256(self.layout.encode())
        for region in self.regions:
            facts = region.path.stat()
            place = (str(region.path.resolve()), facts.st_size, facts.st_mtime_ns, region.offset, region.shape)
            digest.update(repr((*place, region.dtype.str)).encode())
        return digest.hexdigest()

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """The images of these rows, `[B, C, H, W]`."""
        if len(self.regions) == 1:
            found = self._array(0)[rows]
        else:
            found = np.empty((len(rows), *self.regions[0].shape[1:]), self.regions[0].dtype)
            at = np.searchsorted(self._starts, rows, "right") - 1
            for part in np.unique(at):
                here = at == part
                found[here] = self._array(part)[rows[here] - self._starts[part]]
        images = torch.from_numpy(found)
        if self.layout == "NHW":
            return images[:, None]
        return images if self.layout == "NCHW" else images.permute(0, 3, 1, 2).contiguous()

    def _array(self, part: int) -> np.ndarray[Any, Any]:
        array = self._arrays[part]
        if array is None:
            array = self._arrays[part] = self.regions[part].opened()
        return array
