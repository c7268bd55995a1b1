"""Tables: images of Hugging Face `datasets`, a row each, decoded as files are.

    hf:NAME, hf:NAME:CONFIG     a data set of the hub, by its own loader; what is there of it is not asked for again
    hf:FOLDER                   one that `save_to_disk` left
    x.parquet, hf:x.parquet     a Parquet file, or several (hf:folder/*.parquet)

The split `train` is trained on; `test`, else `validation`, is held out where there is one.  The image column is the one
of images, labels are the one of class labels.  Rows are read by number, so that the order of images is the recipe's: a
stream (`streaming=True`) has no order by number, and is prepared first.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError, one_line, require
from logsnr.paths import expanded
from logsnr.training.data.dataset import Images, Rows
from logsnr.training.images import read_image
from logsnr.training.sections import DataConfig

PREFIX = "hf:"
TRAIN, HELD = "train", ("test", "validation")


class Table:
    """Rows of a table as a store.

    Args:
        rows: the table, a `datasets.Dataset` with images as they are stored.
        column: of the images.
        config: how they are read.
        which: the table's own fingerprint.
        source: what messages call it.
    """

    def __init__(self, rows: Any, column: str, config: DataConfig, which: str, source: str) -> None:
        self.rows, self.column, self.config, self.which, self.source = rows, column, config, which, source
        self.shape: tuple[int, ...] = tuple(self._picture(0).shape)

    @property
    def identity(self) -> str:
        """The table's own fingerprint, and how its images are read."""
        how = self.config.model_dump(include={"size", "crop", "channels", "background"})
        return hashlib.sha256((self.which + self.column + json.dumps(how)).encode()).hexdigest()

    def read(self, rows: np.ndarray[Any, Any]) -> Tensor:
        """The images of these rows, `[B, C, H, W]`."""
        images = np.empty((len(rows), *self.shape), np.uint8)
        for i, row in enumerate(rows):
            pixels = self._picture(int(row))
            if pixels.shape != self.shape:
                raise LogsnrError(
                    f"row {row} of {self.source} is {pixels.shape[2]} x {pixels.shape[1]}, row 0 {self.shape[2]} x "
                    f"{self.shape[1]}: set data.size to crop and resize all images to one size"
                )
            images[i] = pixels
        return torch.from_numpy(images)

    def _picture(self, row: int) -> np.ndarray[Any, Any]:
        stored = self.rows[row][self.column]
        if not isinstance(stored, dict) or not (stored.get("bytes") or stored.get("path")):
            raise LogsnrError(f"row {row} of {self.source} has no image: leave it out with datasets' filter")
        data = stored["bytes"] and io.BytesIO(stored["bytes"])
        name = Path(str(stored.get("path") or f"row {row} of {self.source}"))
        config = self.config
        return read_image(
            name, channels=config.channels or 3, size=config.size, background=config.background, crop=config.crop,
            data=data or None,
        ).pixels  # fmt: skip


def is_table(source: str) -> bool:
    """Whether a source is one of `datasets`."""
    return source.startswith(PREFIX) or (source.endswith(".parquet") and expanded(source).is_file())


def read_table(config: DataConfig) -> tuple[Images, Tensor | None, Images | None, Tensor | None, tuple[str, ...]]:
    """Images, labels, held-out images, their labels and names of classes of a source of `datasets`.

    Raises:
        LogsnrError: if `datasets` is missing or cannot read it, or there is no column of images.
    """
    library = require("datasets", extra="data", purpose=f"data.source = {config.source!r}")
    if config.broken == "skip":
        raise LogsnrError("data.broken: skip is of folders: leave rows out with datasets' filter, and save_to_disk")
    parts = _loaded(library, config.source)
    train = parts.get(TRAIN) if TRAIN in parts else next(iter(parts.values())) if len(parts) == 1 else None
    if train is None:
        raise LogsnrError(f"{config.source} has the splits {', '.join(parts)}: one must be called {TRAIN}")
    column = next((name for name, kind in train.features.items() if isinstance(kind, library.Image)), None)
    if column is None:
        told = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in train.features.items())
        raise LogsnrError(f"{config.source} has no column of images: it has {told}; cast one to datasets.Image()")
    kind = library.ClassLabel
    label = next((name for name, found in train.features.items() if isinstance(found, kind)), None)
    names = tuple(train.features[label].names or ()) if label is not None else ()
    held = next((parts[name] for name in HELD if name in parts and parts[name] is not train), None)

    def part(table: Any) -> tuple[Images, Tensor | None]:
        plain = table.cast_column(column, library.Image(decode=False))
        labels = None if label is None else torch.tensor(plain.with_format(None)[label][:], dtype=torch.int64)
        if labels is not None and len(labels) and int(labels.min()) < 0:
            raise LogsnrError(f"{config.source} has label {int(labels.min())}: leave such rows out")
        # A cast may get another fingerprint each time.
        store = Table(plain, column, config, str(table._fingerprint), config.source)
        return Rows(store=store, order=np.arange(len(plain))), labels

    images, labels = part(train)
    test, test_labels = (None, None) if held is None or not len(held) else part(held)
    return images, labels, test, test_labels, names


def _loaded(library: Any, source: str) -> dict[str, Any]:
    """The tables of a source by split."""
    name = source.removeprefix(PREFIX)
    path = expanded(name)
    try:
        if name.endswith(".parquet"):
            found = library.load_dataset("parquet", data_files=str(path))
        elif path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = library.load_from_disk(str(path))
        else:
            name, _, config = name.partition(":")
            found = library.load_dataset(name, config or None)
    except LogsnrError:
        raise
    except Exception as error:  # whatever the library, the hub or a file is at fault with
        raise LogsnrError(
            f"data.source = {source!r} cannot be read by datasets ({type(error).__name__}: {one_line(error)}): check "
            "the name, or load it there and save_to_disk"
        ) from error
    return dict(found) if isinstance(found, dict) else {TRAIN: found}
