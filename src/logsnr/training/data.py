"""Images to train on: stored grey levels in memory, with a held-out part.

    "digits"            scikit-learn's 1,797 real 8 x 8 digits, 17 grey levels; 297 held out
    images.npz / .npy   uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4
    a generated set     the folder of `logsnr generate`
    a folder            image files, directly or in one sub-folder per class, in alphabetical order (folders.py)

An .npz holds its images under one of `IMAGE_KEYS` and, optionally, integer labels under one of `LABEL_KEYS`, their
classes' names under one of `NAME_KEYS`, and a held-out part under `test_images` / `x_test` and `test_labels` /
`y_test`.  Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError, nearest, require
from logsnr.generation import Shards
from logsnr.generation.settings import NAME as SETTINGS
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import read_arrays
from logsnr.terminal import progress_bar
from logsnr.training.folders import Tell, read_folder
from logsnr.training.processes import first_process
from logsnr.training.sections import DataConfig

IMAGE_KEYS = ("images", "train_images", "x_train", "x", "arr_0")
LABEL_KEYS = ("labels", "train_labels", "y_train", "y", "arr_1")
TEST_IMAGE_KEYS = ("test_images", "x_test")
TEST_LABEL_KEYS = ("test_labels", "y_test")
NAME_KEYS = ("class_names", "label_names")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Stored images in memory, all on the CPU.

    Args:
        train_images: uint8 `[N, C, H, W]`, values below `grey_levels`.
        train_labels: int64 `[N]` in 0 ... classes - 1, None without labels.
        test_images: the held-out part.
        test_labels: its labels.
        grey_levels: per channel.
        classes: number of classes, 0 without labels.
        class_names: of the classes, where they have any.
        source: what it was read from.
        said: what was read, converted and left out, in a phrase each.
    """

    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    grey_levels: int
    classes: int
    class_names: tuple[str, ...] = ()
    source: str = "data"
    said: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was read: images, sizes, classes, what was converted and left out."""
        train, test = len(self.train_images), len(self.test_images)
        c, h, w = self.shape
        kind = {1: "in grey", 3: "in colour"}.get(c, f"with {c} channels")
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
        """(channels, height, width) of one image."""
        c, h, w = self.train_images.shape[1:]
        return c, h, w

    @property
    def sigma_data(self) -> float:
        """Standard deviation of all training values about their common mean, in the units of x; exact, by histogram.

        Raises:
            LogsnrError: if it is 0.
        """
        counts = torch.bincount(self.train_images.flatten(), minlength=self.grey_levels).to(torch.float64)
        cells = Pixels(self.grey_levels).centres.to(torch.float64)
        mean = (counts * cells).sum() / counts.sum()
        spread = float(((counts * (cells - mean) ** 2).sum() / counts.sum()).sqrt())
        if spread == 0:
            raise LogsnrError("all training images have one and the same grey value: there is nothing to learn")
        return spread


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of data that `data.source` can name.

    Args:
        load: config, and whom to tell how far it is -> Dataset.
        told: what messages call it.
        recognised: whether a source is of this kind; None for one that goes by its name in `DATASETS`.
    """

    load: Callable[[DataConfig, Tell | None], Dataset]
    told: str
    recognised: Callable[[str], bool] | None = None


def load_data(config: DataConfig, *, progress: bool = False) -> Dataset:
    """Read, check and split the images of `config`.

    Args:
        config: the recipe's section.
        progress: show a bar on a terminal.

    Raises:
        LogsnrError: if the source is missing, damaged, empty, or holds anything but uint8 images of one size.
    """
    text = config.source
    for name, source in DATASETS.items():
        if text == name if source.recognised is None else source.recognised(text):
            with progress_bar(progress and first_process(), "reading images") as show:
                tell = None if show is None else lambda done, n: show(done / n, f"{done:,} of {n:,}")
                return source.load(config, tell)
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


def array_images(path: Path) -> Tensor:
    """The images of an .npz or .npy file as they are stored, uint8 `[N, C, H, W]`, without a held-out part of its own.

    Raises:
        LogsnrError: if it is missing, damaged, or holds no uint8 images.
    """
    arrays = _arrays(path)
    array = _pick(arrays, IMAGE_KEYS)
    if array is None:
        raise LogsnrError(f"{path} has no images: its keys are {_names(arrays)}; use one of {', '.join(IMAGE_KEYS)}")
    return _images(array, None, str(path))[0]


def _array_file(config: DataConfig, tell: Tell | None) -> Dataset:
    path = expanded(config.source)
    _no_folder(config)
    arrays = _arrays(path)
    stored, test = _pick(arrays, IMAGE_KEYS), _pick(arrays, TEST_IMAGE_KEYS)
    if stored is None:
        raise LogsnrError(f"{path} has no images: its keys are {_names(arrays)}; use one of {', '.join(IMAGE_KEYS)}")
    images, order = _images(stored, config.layout, str(path))
    labels = _labels(_pick(arrays, LABEL_KEYS), len(stored), str(path))
    names = _class_names(_pick(arrays, NAME_KEYS), labels, str(path))
    said = (f"stored as {order}",)
    if test is None:
        return _split(images, labels, None, None, config, str(path), names, said)
    where = f"the held-out part of {path}"
    test_labels = _labels(_pick(arrays, TEST_LABEL_KEYS), len(test), where)
    test_images, _ = _images(test, config.layout or order, where)
    return _split(images, labels, test_images, test_labels, config, str(path), names, said)


def _split(
    images: Tensor,
    labels: Tensor | None,
    test_images: Tensor | None,
    test_labels: Tensor | None,
    config: DataConfig,
    source: str,
    class_names: tuple[str, ...],
    said: tuple[str, ...],
) -> Dataset:
    """Check grey levels and, where the source has no held-out part, take one with a fixed seed."""
    largest = int(images.max())
    if largest >= config.grey_levels:
        raise LogsnrError(
            f"{source} has pixel value {largest} with data.grey_levels = {config.grey_levels}: values must be in "
            f"0 ... {config.grey_levels - 1}; raise data.grey_levels"
        )
    known = [part for part in (labels, test_labels) if part is not None]
    classes = 0 if labels is None else max(len(class_names), *(int(part.max()) + 1 for part in known))
    if test_images is None:
        held_out = round(config.holdout * len(images))
        if held_out >= len(images):
            raise LogsnrError(
                f"{source} has {len(images)} images, of which {held_out} are held out: lower data.holdout"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.split_seed))
        test, train = order[:held_out], order[held_out:]
        test_images, images = images[test], images[train]
        if labels is not None:
            test_labels, labels = labels[test], labels[train]
    elif test_images.shape[1:] != images.shape[1:]:
        raise LogsnrError(
            f"{source} trains on images of {tuple(images.shape[1:])} and holds out images of "
            f"{tuple(test_images.shape[1:])}: both parts must have one shape"
        )
    elif int(test_images.max()) >= config.grey_levels:
        raise LogsnrError(
            f"the held-out part of {source} has pixel value {int(test_images.max())} with data.grey_levels = "
            f"{config.grey_levels}: values must be in 0 ... {config.grey_levels - 1}; raise data.grey_levels"
        )
    return Dataset(
        train_images=images.contiguous(),
        train_labels=labels,
        test_images=test_images.contiguous(),
        test_labels=test_labels,
        grey_levels=config.grey_levels,
        classes=classes,
        class_names=class_names,
        source=source,
        said=said,
    )


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.exists():
        raise LogsnrError(f"data.source = {str(path)!r} does not exist: check the path")
    return read_arrays(path, "it is truncated or not a NumPy file; copy or save it again")


def _images(array: np.ndarray[Any, Any], layout: str | None, source: str) -> tuple[Tensor, str]:
    """uint8 [N, C, H, W] of images, and how they were stored: "NHW", "NHWC" or "NCHW"."""
    if np.issubdtype(array.dtype, np.floating):
        bad = int((~np.isfinite(array)).sum())
        also = f", {bad} of them NaN or infinite" if bad else ""
        raise LogsnrError(
            f"{source} has {array.dtype} images with {array.size} values{also}: give stored grey levels as uint8 in "
            "0 ... 255 (for floats in [0, 1]: (255 * images).round().astype('uint8'))"
        )
    if array.dtype != np.uint8:
        how = "(images // 257).astype('uint8')" if array.dtype == np.uint16 else "astype('uint8') if none is above 255"
        raise LogsnrError(f"{source} has {array.dtype} images: give stored grey levels as uint8 in 0 ... 255 ({how})")
    wanted = "give [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise LogsnrError(f"{source} has images of shape {array.shape}: {wanted}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.ndim == 3:
        return images[:, None], "NHW"
    first, last = (array.shape[axis] in (1, 3, 4) for axis in (1, 3))
    if not first and not last:
        raise LogsnrError(f"{source} has images of shape {array.shape}: {wanted}")
    order = layout or (_order(array.shape) if first and last else "NCHW" if first else "NHWC")
    if not (first if order == "NCHW" else last):
        raise LogsnrError(f"{source} has images of shape {array.shape}, data.layout says {order}: {wanted}")
    return images if order == "NCHW" else images.permute(0, 3, 1, 2), order


def _order(shape: tuple[int, ...]) -> str:
    """The order of axes of which two may be channels: the one in which images are square, else NumPy's usual one."""
    _, first, middle, last = shape
    return "NCHW" if middle == last and first != middle else "NHWC"


def _class_names(array: np.ndarray[Any, Any] | None, labels: Tensor | None, source: str) -> tuple[str, ...]:
    if array is None or labels is None:
        return ()
    if array.ndim != 1 or array.dtype.kind not in "US" or len(array) <= int(labels.max()):
        raise LogsnrError(
            f"{source} has class names of shape {array.shape}, {array.dtype}: give one text per class, of labels up to "
            f"{int(labels.max())}"
        )
    return tuple(str(name) for name in array.astype(np.str_))


def _labels(array: np.ndarray[Any, Any] | None, n: int, source: str) -> Tensor | None:
    if array is None:
        return None
    if array.shape != (n,):
        raise LogsnrError(
            f"{source} has {n} images and labels of shape {array.shape}: give one label per image, ({n},)"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise LogsnrError(f"{source} has {array.dtype} labels: give integers 0 ... classes - 1")
    if int(array.min()) < 0:
        raise LogsnrError(f"{source} has label {int(array.min())}: labels must be 0 ... classes - 1")
    return torch.from_numpy(array.astype(np.int64))


def _folder(config: DataConfig, tell: Tell | None) -> Dataset:
    if config.layout is not None:
        raise LogsnrError(f"data.layout applies to .npz and .npy files: remove it to read {config.source}")
    path = expanded(config.source)
    found = read_folder(path, config, tell)
    return _split(found.images, found.labels, None, None, config, str(path), found.classes, found.said)


def _generated(config: DataConfig, tell: Tell | None) -> Dataset:
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
    config = config.model_copy(update={"grey_levels": found.pixels.grey_levels})
    said, names = (f"generated by {found.settings.model or 'a model'}",), found.settings.class_names
    whole = torch.cat(known) if known else None
    return _split(images, whole, None, None, config, str(path), names if known else (), said)


def _pick(arrays: dict[str, np.ndarray[Any, Any]], keys: tuple[str, ...]) -> np.ndarray[Any, Any] | None:
    return next((arrays[key] for key in keys if key in arrays), None)


def _names(arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    return ", ".join(arrays) or "none"


DATASETS: dict[str, Source] = {
    "digits": Source(load=_digits, told="'digits'"),
    "arrays": Source(load=_array_file, told="an .npz or .npy file", recognised=_is_array),
    "generated": Source(load=_generated, told="the folder of logsnr generate", recognised=is_generated),
    "folder": Source(load=_folder, told="a folder of images", recognised=_is_folder),
}
"""Kinds of data, each with what reads it; the first that recognises a source takes it."""
