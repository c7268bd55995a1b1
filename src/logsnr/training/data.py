"""Images to train on: stored grey levels in memory, with a held-out part.

    "digits"            scikit-learn's 1,797 real 8 x 8 digits, 17 grey levels; 297 held out
    images.npz / .npy   uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4
    a folder            image files, directly or in one sub-folder per class (classes in alphabetical order)

An .npz holds its images under one of `IMAGE_KEYS` and, optionally, integer labels under one of `LABEL_KEYS`, and a
held-out part under `test_images` / `x_test` and `test_labels` / `y_test`.  Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from logsnr.errors import LogsnrError, nearest, one_line, require
from logsnr.pixels import Pixels
from logsnr.reading import read_arrays
from logsnr.training.config import DataConfig

IMAGE_KEYS = ("images", "train_images", "x_train", "x", "arr_0")
LABEL_KEYS = ("labels", "train_labels", "y_train", "y", "arr_1")
TEST_IMAGE_KEYS = ("test_images", "x_test")
TEST_LABEL_KEYS = ("test_labels", "y_test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


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
    """

    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    grey_levels: int
    classes: int

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
        counts = torch.bincount(self.train_images.flatten().long(), minlength=self.grey_levels).to(torch.float64)
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
        load: config -> Dataset.
        told: what messages call it.
        recognised: whether a source is of this kind; None for one that goes by its name in `DATASETS`.
    """

    load: Callable[[DataConfig], Dataset]
    told: str
    recognised: Callable[[str], bool] | None = None


def load_data(config: DataConfig) -> Dataset:
    """Read, check and split the images of `config`.

    Raises:
        LogsnrError: if the source is missing, damaged, empty, or holds anything but uint8 images of one size.
    """
    text = config.source
    for name, source in DATASETS.items():
        if text == name if source.recognised is None else source.recognised(text):
            return source.load(config)
    near = nearest(text, [name for name, source in DATASETS.items() if source.recognised is None])
    what = "is of no kind that is read" if Path(text).expanduser().exists() else "does not exist"
    hint = f"did you mean {near!r}? " if near else ""
    raise LogsnrError(f"data.source = {text!r} {what}: {hint}give {told_sources()}")


def told_sources() -> str:
    """Every kind of source, in words."""
    *others, last = (source.told for source in DATASETS.values())
    return f"{', '.join(others)}, or {last}"


def _is_array(source: str) -> bool:
    return Path(source).suffix in (".npz", ".npy") and not _is_folder(source)


def _is_folder(source: str) -> bool:
    return Path(source).expanduser().is_dir()


def _digits(config: DataConfig) -> Dataset:
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
    )


def _array_file(config: DataConfig) -> Dataset:
    path = Path(config.source).expanduser()
    if config.size is not None or config.channels is not None:
        raise LogsnrError(f"data.size and data.channels apply to folders of images: remove them to read {path}")
    arrays = _arrays(path)
    stored, test = _pick(arrays, IMAGE_KEYS), _pick(arrays, TEST_IMAGE_KEYS)
    if stored is None:
        raise LogsnrError(f"{path} has no images: its keys are {_names(arrays)}; use one of {', '.join(IMAGE_KEYS)}")
    images = _images(stored, str(path))
    labels = _labels(_pick(arrays, LABEL_KEYS), len(stored), str(path))
    if test is None:
        return _split(images, labels, None, None, config, str(path))
    where = f"the held-out part of {path}"
    test_labels = _labels(_pick(arrays, TEST_LABEL_KEYS), len(test), where)
    return _split(images, labels, _images(test, where), test_labels, config, str(path))


def _split(
    images: Tensor,
    labels: Tensor | None,
    test_images: Tensor | None,
    test_labels: Tensor | None,
    config: DataConfig,
    source: str,
) -> Dataset:
    """Check grey levels and, where the source has no held-out part, take one with a fixed seed."""
    largest = int(images.max())
    if largest >= config.grey_levels:
        raise LogsnrError(
            f"{source} has pixel value {largest} with data.grey_levels = {config.grey_levels}: values must be in "
            f"0 ... {config.grey_levels - 1}; raise data.grey_levels"
        )
    classes = 0 if labels is None else int(labels.max()) + 1
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
    )


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.exists():
        raise LogsnrError(f"data.source = {str(path)!r} does not exist: check the path")
    return read_arrays(path, "it is truncated or not a NumPy file; copy or save it again")


def _images(array: np.ndarray[Any, Any], source: str) -> Tensor:
    """uint8 [N, C, H, W] of NHW, NHWC or NCHW images."""
    if np.issubdtype(array.dtype, np.floating):
        bad = int((~np.isfinite(array)).sum())
        also = f", {bad} of them NaN or infinite" if bad else ""
        raise LogsnrError(
            f"{source} has {array.dtype} images with {array.size} values{also}: give stored grey levels as uint8 in "
            "0 ... 255 (for floats in [0, 1]: (255 * images).round().astype('uint8'))"
        )
    if array.dtype != np.uint8:
        raise LogsnrError(
            f"{source} has {array.dtype} images: give stored grey levels as uint8 in 0 ... 255 (astype('uint8'))"
        )
    wanted = "give [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4"
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise LogsnrError(f"{source} has images of shape {array.shape}: {wanted}")
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] in (1, 3, 4):
        return images
    if images.shape[3] in (1, 3, 4):
        return images.permute(0, 3, 1, 2)
    raise LogsnrError(f"{source} has images of shape {array.shape}: {wanted}")


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


def _folder(config: DataConfig) -> Dataset:
    """Images of a folder, in the order of their names; sub-folders are classes."""
    path = Path(config.source).expanduser()
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise LogsnrError(f"{path} holds no images ({', '.join(SUFFIXES)}): check the path")
    parents = [file.relative_to(path).parts[:-1] for file in files]
    names = sorted({parts[0] for parts in parents if parts})
    loose = next((file for file, parts in zip(files, parents, strict=True) if not parts), None)
    if names and loose is not None:
        raise LogsnrError(
            f"{path} holds the class folder {names[0]!r} and, beside it, the image {loose.name!r}: "
            "put every image into a class folder, or none"
        )
    images = [_read_image(file, config) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise LogsnrError(
                f"{file} is {_size(image)}, {files[0].name} is {_size(images[0])}: set data.size to crop and resize "
                "all images to one size"
            )
    labels = torch.tensor([names.index(parts[0]) for parts in parents]) if names else None
    stored = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return _split(stored, labels, None, None, config, str(path))


def _read_image(file: Path, config: DataConfig) -> np.ndarray[Any, Any]:
    """uint8 [H, W, C] of one file: centre crop to a square and resize where `size` is set."""
    mode = {1: "L", 3: "RGB", None: "RGB"}[config.channels]
    try:
        with Image.open(file) as opened:
            image = opened.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LogsnrError(f"{file} cannot be read as an image ({one_line(error)}): repair or remove it") from error
    if config.size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((config.size, config.size), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image, dtype=np.uint8))


def _size(image: np.ndarray[Any, Any]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _pick(arrays: dict[str, np.ndarray[Any, Any]], keys: tuple[str, ...]) -> np.ndarray[Any, Any] | None:
    return next((arrays[key] for key in keys if key in arrays), None)


def _names(arrays: dict[str, np.ndarray[Any, Any]]) -> str:
    return ", ".join(arrays) or "none"


DATASETS: dict[str, Source] = {
    "digits": Source(load=_digits, told="'digits'"),
    "arrays": Source(load=_array_file, told="an .npz or .npy file", recognised=_is_array),
    "folder": Source(load=_folder, told="a folder of images", recognised=_is_folder),
}
"""Kinds of data, each with what reads it; the first that recognises a source takes it."""
