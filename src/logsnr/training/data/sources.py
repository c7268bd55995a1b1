"""Sources: every kind of data that `data.source` can name.

    "digits"            scikit-learn's 1,797 real 8 x 8 digits, 17 grey levels; 297 held out
    images.npz / .npy   uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4 (arrays.py)
    hf:NAME, x.parquet  tables of Hugging Face datasets (table.py)
    a prepared set      the folder of `logsnr data prepare` (prepared.py), or of `logsnr encode`: latents, not images
    a generated set     the folder of `logsnr generate`
    a folder            image files, directly or in one sub-folder per class, in alphabetical order (folders.py)

Each finds images and labels; what of them is held out is the split's (split.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError, nearest, require
from logsnr.generation import Shards
from logsnr.generation.settings import NAME as SETTINGS
from logsnr.paths import expanded
from logsnr.terminal import progress_bar
from logsnr.training.data.arrays import LOADED, read_array_file
from logsnr.training.data.dataset import Dataset, Rows
from logsnr.training.data.index import LOOK, Files, find_index, look
from logsnr.training.data.prepared import is_encoded, is_prepared, read_prepared
from logsnr.training.data.split import Found, split
from logsnr.training.data.survey import survey
from logsnr.training.data.table import is_table, read_table
from logsnr.training.folders import Tell, left_out, read_folder
from logsnr.training.processes import first_process
from logsnr.training.sections import DataConfig

DECODED = 10_000
"""Image files of a folder that are decoded before a training begins, where a recipe does not say."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of data that `data.source` can name.

    Args:
        load: config, and whom to tell how far it is -> what the source holds, or a dataset that is split already.
        told: what messages call it.
        recognised: whether a source is of this kind; None for one that goes by its name in `DATASETS`.
    """

    load: Callable[[DataConfig, Tell | None], Found | Dataset]
    told: str
    recognised: Callable[[str], bool] | None = None


def load_data(config: DataConfig, *, progress: bool = False, latents: bool = False) -> Dataset:
    """Read, check and split the images of `config`.

    Args:
        config: the recipe's section.
        progress: show a bar on a terminal.
        latents: whether latents will do.

    Raises:
        LogsnrError: if the source is missing, damaged, empty, or holds anything but uint8 images of one size.
    """
    source = find_source(config.source)
    if source is DATASETS["latents"] and not latents:
        raise LogsnrError(f"{config.source} holds latents, which only a training reads: give images")
    if config.vae is not None and source is not DATASETS["latents"]:
        raise LogsnrError(f"data.vae = {config.vae!r} decodes latents, and {config.source} holds images: leave it out")
    with progress_bar(progress and first_process(), "reading images") as show:
        tell = None if show is None else lambda done, n: show(done / n, f"{done:,} of {n:,}")
        found = source.load(config, tell)
        return _as_expected(found if isinstance(found, Dataset) else split(found, config, tell), config)


def _as_expected(data: Dataset, config: DataConfig) -> Dataset:
    """The data, if they are what the recipe says."""
    if config.shape is not None and data.shape != config.shape:
        raise LogsnrError(
            f"data.shape = {list(config.shape)}, and {config.source!r} has images of {list(data.shape)}: this recipe "
            "is for other data; change data.shape, or resize the images"
        )
    if config.classes is not None and data.train_labels is not None and data.classes != config.classes:
        raise LogsnrError(
            f"data.classes = {config.classes}, and {config.source!r} has labels of {data.classes} classes: change "
            "data.classes, or the labels"
        )
    return data


def find_source(text: str) -> Source:
    """The kind of a source.

    Raises:
        LogsnrError: if it is of none.
    """
    for name, source in DATASETS.items():
        if text == name if source.recognised is None else source.recognised(text):
            return source
    near = nearest(text, [name for name, source in DATASETS.items() if source.recognised is None])
    what = "is of no kind that is read" if expanded(text).exists() else "does not exist"
    hint = f"did you mean {near!r}? " if near else ""
    raise LogsnrError(f"data.source = {text!r} {what}: {hint}give {told_sources()}")


def told_sources() -> str:
    """Every kind of source, in words."""
    *others, last = (source.told for source in DATASETS.values())
    return f"{', '.join(others)}, or {last}"


def _is_array(source: str) -> bool:
    return Path(source).suffix in (".npz", ".npy") and not _is_folder(source)


def _is_folder(source: str) -> bool:
    return expanded(source).is_dir()


def is_generated(source: str) -> bool:
    """Whether it is the folder of `logsnr generate`."""
    return (expanded(source) / SETTINGS).is_file()


def _no_folder(config: DataConfig) -> None:
    """Refuse options of a folder for what is none."""
    if config.size is not None or config.channels is not None:
        raise LogsnrError(
            f"data.size and data.channels apply to folders of images: remove them to read {config.source}"
        )
    if config.background != "white" or config.broken != "stop":
        raise LogsnrError(
            f"data.background and data.broken apply to folders of images: remove them to read {config.source}"
        )


def _digits(config: DataConfig, tell: Tell | None) -> Dataset:
    _no_folder(config)
    if config.layout is not None:
        raise LogsnrError("data.layout applies to .npz and .npy files: remove it to read digits")
    datasets = require("sklearn.datasets", extra="train", purpose="data.source = 'digits'")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.split_seed))
    images, labels = images[order], labels[order]
    return Dataset(
        train_images=images[297:].contiguous(),
        train_labels=labels[297:].contiguous(),
        test_images=images[:297].contiguous(),
        test_labels=labels[:297].contiguous(),
        grey_levels=17,
        classes=10,
        class_names=tuple("0123456789"),
        source="digits",
    )


def _array_file(config: DataConfig, tell: Tell | None) -> Found:
    _no_folder(config)
    return read_array_file(config)


def _folder(config: DataConfig, tell: Tell | None) -> Found:
    if config.layout is not None:
        raise LogsnrError(f"data.layout applies to .npz and .npy files: remove it to read {config.source}")
    path = expanded(config.source)
    if config.in_memory is not True and (files := _on_demand(path, config)) is not None:
        return files
    read = read_folder(path, config, tell)
    return Found(
        images=read.images, labels=read.labels, class_names=read.classes, source=str(path), said=read.said,
        eight_bit=True,
    )  # fmt: skip


def _on_demand(path: Path, config: DataConfig) -> Found | None:
    """The folder, its files decoded as they are needed; None for one that goes into memory."""
    index = find_index(path)
    least = (config.size or 1) ** 2 * (config.channels or 3) * len(index)
    few = config.in_memory is None and len(index) <= DECODED
    if few and config.size is not None and least <= LOADED:
        return None
    if config.in_memory is None and config.broken == "skip":
        return None
    files = Files(index, config, keep=config.in_memory is None and least <= LOADED and config.size is not None)
    if few and math.prod(files.shape) * len(index) <= LOADED:
        return None
    told = f"standard deviation from {min(LOOK, len(index)):,} of them"
    return Found(
        images=Rows(store=files, order=np.arange(len(index))),
        labels=index.labels,
        class_names=index.classes,
        source=str(path),
        said=("decoded as needed", told, *left_out(path, [], [], list(index.classes), index.skipped)),
        survey=partial(survey, walk=look),
        eight_bit=True,
    )


def _generated(config: DataConfig, tell: Tell | None) -> Found:
    """A set of `logsnr generate`, with grey levels, labels and names of its own."""
    _no_folder(config)
    path, found = expanded(config.source), Shards(config.source)
    images, labels = torch.empty(len(found), *found.settings.shape, dtype=torch.uint8), list[Tensor | None]()
    first = 0
    for part, classes in found:
        images[first : first + len(part)] = part
        first += len(part)
        labels.append(classes)
        if tell is not None:
            tell(first, len(found))
    known = [part for part in labels if part is not None]
    return Found(
        images=images, labels=torch.cat(known) if known else None, source=str(path),
        class_names=found.settings.class_names if known else (),
        said=(f"generated by {found.settings.model or 'a model'}",), grey_levels=found.pixels.grey_levels,
    )  # fmt: skip


def _table(config: DataConfig, tell: Tell | None) -> Found:
    if config.layout is not None:
        raise LogsnrError(f"data.layout applies to .npz and .npy files: remove it to read {config.source}")
    images, labels, test, test_labels, names = read_table(config)
    size = images.shape[1:].numel() * (len(images) + (0 if test is None else len(test)))
    loaded = config.in_memory if config.in_memory is not None else size <= LOADED
    if loaded:
        images, test = images[:], None if test is None else test[:]
    return Found(
        images=images,
        labels=labels,
        test_images=test,
        test_labels=test_labels,
        class_names=names,
        source=config.source,
        said=() if loaded else ("decoded as needed", f"standard deviation from {min(LOOK, len(images)):,} of them"),
        survey=partial(survey, walk=look),
        eight_bit=True,
    )


def _prepared(config: DataConfig, tell: Tell | None) -> Found:
    _no_folder(config)
    return read_prepared(config)


def _latents(config: DataConfig, tell: Tell | None) -> Found:
    _no_folder(config)
    if config.flip:
        raise LogsnrError("data.flip mirrors images, and latents of a mirrored image are others: set data.flip: false")
    if config.grey_levels != 256:
        raise LogsnrError(f"data.grey_levels = {config.grey_levels}: latents have none, leave it out")
    return read_prepared(config)


DATASETS: dict[str, Source] = {
    "digits": Source(load=_digits, told="'digits'"),
    "arrays": Source(load=_array_file, told="an .npz or .npy file", recognised=_is_array),
    "table": Source(load=_table, told="hf:NAME or a Parquet file of Hugging Face datasets", recognised=is_table),
    "latents": Source(load=_latents, told="a folder of logsnr encode", recognised=is_encoded),
    "prepared": Source(load=_prepared, told="a folder of logsnr data prepare", recognised=is_prepared),
    "generated": Source(load=_generated, told="the folder of logsnr generate", recognised=is_generated),
    "folder": Source(load=_folder, told="a folder of images", recognised=_is_folder),
}
"""Kinds of data, each with what reads it; the first that recognises a source takes it."""
