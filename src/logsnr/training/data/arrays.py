"""Arrays: uint8 images in .npz and .npy files, in memory or mapped.

An .npz holds its images under one of `IMAGE_KEYS` and, optionally, integer labels under one of `LABEL_KEYS`, their
classes' names under one of `NAME_KEYS`, and a held-out part under `test_images` / `x_test` and `test_labels` /
`y_test`.  Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.paths import expanded
from logsnr.reading import Region, find_arrays, read_arrays
from logsnr.training.data.dataset import Images, Rows
from logsnr.training.data.mapped import Mapped
from logsnr.training.data.split import Found
from logsnr.training.sections import DataConfig

IMAGE_KEYS = ("images", "train_images", "x_train", "x", "arr_0")
LABEL_KEYS = ("labels", "train_labels", "y_train", "y", "arr_1")
TEST_IMAGE_KEYS = ("test_images", "x_test")
TEST_LABEL_KEYS = ("test_labels", "y_test")
NAME_KEYS = ("class_names", "label_names")
LOADED = 2**30
"""Bytes of the images that are taken into memory where a recipe does not say."""
_FIX = "it is truncated or not a NumPy file; copy or save it again"


def array_images(path: Path) -> Tensor:
    """The images of an .npz or .npy file as they are stored, uint8 `[N, C, H, W]`, without a held-out part of its own.

    Raises:
        LogsnrError: if it is missing, damaged, or holds no uint8 images.
    """
    arrays = read_arrays(_existing(path), _FIX)
    array = _pick(arrays, IMAGE_KEYS)
    if array is None:
        raise LogsnrError(f"{path} has no images: its keys are {_names(arrays)}; use one of {', '.join(IMAGE_KEYS)}")
    return _images(array, None, str(path))[0]


def read_array_file(config: DataConfig) -> Found:
    """What an .npz or .npy file holds, its images in memory up to `LOADED` or as the recipe says.

    Raises:
        LogsnrError: if it is missing, damaged, or not what it should be.
    """
    path = expanded(config.source)
    regions = find_arrays(_existing(path), _FIX)
    sizes = [region.nbytes for name, region in regions.items() if region and name in (*IMAGE_KEYS, *TEST_IMAGE_KEYS)]
    mapped = not config.in_memory if config.in_memory is not None else sum(sizes) > LOADED
    found: dict[str, np.ndarray[Any, Any] | Region] = {}
    if mapped:
        found |= {name: region for name in (*IMAGE_KEYS, *TEST_IMAGE_KEYS) if (region := regions.get(name))}
        held = [name for name in (*IMAGE_KEYS, *TEST_IMAGE_KEYS) if name in regions and name not in found]
        if held and config.in_memory is False:
            raise LogsnrError(
                f"{path} holds {held[0]} compressed, which cannot be mapped: save it with numpy.savez or as .npy, or "
                "leave data.in_memory out"
            )
    if regions.keys() - found.keys():
        found |= read_arrays(path, _FIX, lambda name: name not in found)
    stored, test = _pick(found, IMAGE_KEYS), _pick(found, TEST_IMAGE_KEYS)
    if stored is None:
        raise LogsnrError(f"{path} has no images: its keys are {_names(found)}; use one of {', '.join(IMAGE_KEYS)}")
    images, order = _taken(stored, config.layout, str(path))
    labels = _labels(_pick(found, LABEL_KEYS), stored.shape[0], str(path))
    names = _class_names(_pick(found, NAME_KEYS), labels, str(path))
    how = f"stored as {order}" + (", read as needed" if isinstance(stored, Region) else "")
    if test is None:
        return Found(images=images, labels=labels, class_names=names, source=str(path), said=(how,))
    where = f"the held-out part of {path}"
    test_labels = _labels(_pick(found, TEST_LABEL_KEYS), test.shape[0], where)
    test_images, _ = _taken(test, config.layout or order, where)
    return Found(
        images=images, labels=labels, test_images=test_images, test_labels=test_labels, class_names=names,
        source=str(path), said=(how,),
    )  # fmt: skip


def has_compressed_images(path: Path) -> bool:
    """Whether images of a file cannot be mapped.

    Raises:
        LogsnrError: if it is missing or damaged.
    """
    regions = find_arrays(_existing(path), _FIX)
    return any(name in regions and regions[name] is None for name in (*IMAGE_KEYS, *TEST_IMAGE_KEYS))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise LogsnrError(f"data.source = {str(path)!r} does not exist: check the path")
    return path


def _taken(array: np.ndarray[Any, Any] | Region, layout: str | None, source: str) -> tuple[Images, str]:
    """The images of an array, and how they are stored."""
    if isinstance(array, np.ndarray):
        return _images(array, layout, source)
    order = _layout(array, layout, source)
    return Rows(store=Mapped([array], order), order=np.arange(array.shape[0])), order


def _images(array: np.ndarray[Any, Any], layout: str | None, source: str) -> tuple[Tensor, str]:
    """uint8 [N, C, H, W] of images, and how they were stored: "NHW", "NHWC" or "NCHW"."""
    order = _layout(array, layout, source)
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images[:, None] if order == "NHW" else images if order == "NCHW" else images.permute(0, 3, 1, 2), order


def _layout(array: np.ndarray[Any, Any] | Region, layout: str | None, source: str) -> str:
    """How images are stored: "NHW", "NHWC" or "NCHW"."""
    if np.issubdtype(array.dtype, np.floating):
        bad = int((~np.isfinite(array)).sum()) if isinstance(array, np.ndarray) else 0
        also = f", {bad} of them NaN or infinite" if bad else ""
        raise LogsnrError(
            f"{source} has {array.dtype} images with {math.prod(array.shape)} values{also}: give stored grey levels as "
            "uint8 in 0 ... 255 (for floats in [0, 1]: (255 * images).round().astype('uint8'))"
        )
    if array.dtype != np.uint8:
        how = "(images // 257).astype('uint8')" if array.dtype == np.uint16 else "astype('uint8') if none is above 255"
        raise LogsnrError(f"{source} has {array.dtype} images: give stored grey levels as uint8 in 0 ... 255 ({how})")
    wanted = "give [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1, 3 or 4"
    shape = array.shape
    if len(shape) not in (3, 4) or 0 in shape:
        raise LogsnrError(f"{source} has images of shape {shape}: {wanted}")
    if len(shape) == 3:
        return "NHW"
    first, last = (shape[axis] in (1, 3, 4) for axis in (1, 3))
    if not first and not last:
        raise LogsnrError(f"{source} has images of shape {shape}: {wanted}")
    order = layout or (_order(shape) if first and last else "NCHW" if first else "NHWC")
    if not (first if order == "NCHW" else last):
        raise LogsnrError(f"{source} has images of shape {shape}, data.layout says {order}: {wanted}")
    return order


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


def _pick(arrays: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((arrays[key] for key in keys if key in arrays), None)


def _names(arrays: Mapping[str, Any]) -> str:
    return ", ".join(arrays) or "none"
