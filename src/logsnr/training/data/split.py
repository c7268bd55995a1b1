"""Splits: a part of the images held out with a fixed seed, and grey levels that are what the recipe says.

Low-bit data: with fewer grey levels G than 8-bit images have, a value v becomes v div (256/G), G = 2, 4, ..., 128.  The
G cells of [-1, 1] are then unions of the 256, and the bound is that of the G-level data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.training.data.dataset import Dataset, Images, Rows, pick
from logsnr.training.data.latents import Latent
from logsnr.training.data.survey import Survey, survey
from logsnr.training.folders import Tell
from logsnr.training.sections import DataConfig


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a source holds.

    Attributes:
        images: all of them, or those to train on where it has a held-out part of its own.
        labels: int64 `[N]`, None without.
        test_images: the held-out part, None without one.
        test_labels: its labels.
        class_names: of the classes, where they have any.
        source: what messages call it.
        said: what was read, converted and left out, in a phrase each.
        survey: images, labels, tell -> survey, of images that are not in memory.
        eight_bit: whether its values are 8-bit whatever they are, as those of image files.
        grey_levels: its own, whatever the recipe says; None if it does not know.
        latent: how latents are stored; None for images.
    """

    images: Images
    labels: Tensor | None = None
    test_images: Images | None = None
    test_labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    source: str
    said: tuple[str, ...] = ()
    survey: Callable[..., Survey] = survey
    eight_bit: bool = False
    grey_levels: int | None = None
    latent: Latent | None = None


def split(found: Found, config: DataConfig, tell: Tell | None = None) -> Dataset:
    """Check grey levels and, where the source has no held-out part, take one with a fixed seed.

    Raises:
        LogsnrError: if values do not fit the grey levels, the parts each other, or nothing is left to train on.
    """
    images, labels, test_images, test_labels = found.images, found.labels, found.test_images, found.test_labels
    source, said = found.source, found.said
    if found.grey_levels is not None:
        config = config.model_copy(update={"grey_levels": found.grey_levels})
    divide = 1
    if found.latent is None:
        divide = _divisor(_largest(images, found, config, tell), config, source, found.eight_bit)
    known = [part for part in (labels, test_labels) if part is not None]
    classes = 0 if labels is None else max(len(found.class_names), *(int(part.max()) + 1 for part in known))
    if test_images is None:
        held_out = round(config.holdout * len(images))
        if held_out >= len(images):
            raise LogsnrError(
                f"{source} has {len(images)} images, of which {held_out} are held out: lower data.holdout"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.split_seed))
        test, train = order[:held_out], order[held_out:]
        test_images, images = pick(images, test), pick(images, train)
        if labels is not None:
            test_labels, labels = labels[test], labels[train]
    elif test_images.shape[1:] != images.shape[1:]:
        raise LogsnrError(
            f"{source} trains on images of {tuple(images.shape[1:])} and holds out images of "
            f"{tuple(test_images.shape[1:])}: both parts must have one shape"
        )
    elif divide == 1 and found.latent is None:
        _divisor(
            _largest(test_images, found, config, tell), config, f"the held-out part of {source}", False, fewer=False
        )
    if divide > 1:
        images, test_images = _divided(images, divide), _divided(test_images, divide)
        said = (*said, f"256 grey levels made {config.grey_levels}")
    return Dataset(
        train_images=images.contiguous() if isinstance(images, Tensor) else images,
        train_labels=labels,
        test_images=test_images.contiguous() if isinstance(test_images, Tensor) else test_images,
        test_labels=test_labels,
        grey_levels=config.grey_levels,
        classes=classes,
        class_names=found.class_names,
        source=source,
        said=said,
        survey=found.survey(images, labels, tell) if isinstance(images, Rows) else None,
        latent=found.latent,
    )


def _largest(images: Images, found: Found, config: DataConfig, tell: Tell | None) -> int:
    """The largest value, or one that is no larger than allowed where all are."""
    if isinstance(images, Rows):
        return found.survey(images, None, tell).largest if config.grey_levels < 256 else 0
    return int(images[:].max())


def _divisor(largest: int, config: DataConfig, source: str, eight_bit: bool, *, fewer: bool = True) -> int:
    """What values are divided by for the recipe's grey levels: 1 where they are so already."""
    levels = config.grey_levels
    if largest < levels:
        return 1
    if fewer and 256 % levels == 0 and (eight_bit or largest > 127):
        return 256 // levels
    more = "; of 8-bit images 2, 4, ... 128 are made" if 256 % levels else ""
    raise LogsnrError(
        f"{source} has pixel value {largest} with data.grey_levels = {levels}: values must be in "
        f"0 ... {levels - 1}; raise data.grey_levels{more}"
    )


def _divided(images: Images, divide: int) -> Images:
    return images.divided(divide) if isinstance(images, Rows) else images[:] // divide
