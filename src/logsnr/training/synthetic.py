"""Drawn images, and a recipe cut down to them: twenty steps of a training's own code, without its data or its hours."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from logsnr.errors import LogsnrError
from logsnr.training.config import Recipe
from logsnr.training.data.dataset import Dataset
from logsnr.training.sections import DataConfig

STEPS, BATCH, IMAGES = 20, 2, 16


def expected(config: DataConfig) -> tuple[tuple[int, int, int] | None, int | None]:
    """Shape of one image and number of classes, as far as a recipe says without its data."""
    if config.source == "digits":
        return (1, 8, 8), 10
    if config.shape is not None:
        return config.shape, config.classes
    if config.size is not None:
        return (config.channels or 3, config.size, config.size), config.classes
    return None, config.classes


def synthetic(config: DataConfig, *, seed: int = 0) -> Dataset:
    """Soft blobs of the shape that a recipe expects, labelled at random.

    Raises:
        LogsnrError: if it does not say what it expects.
    """
    shape, classes = expected(config)
    if shape is None:
        raise LogsnrError(
            f"nothing says what images of {config.source!r} are: give data.shape, e.g. data.shape=[3,32,32]"
        )
    generator = torch.Generator().manual_seed(seed)
    levels = 17 if config.source == "digits" else config.grey_levels
    coarse = torch.rand(IMAGES, shape[0], 4, 4, generator=generator)
    soft = interpolate(coarse, size=shape[1:], mode="bilinear")
    images = (soft * levels).long().clamp(max=levels - 1).to(torch.uint8)
    labels = torch.randint(classes, (IMAGES,), generator=generator) if classes else None
    return Dataset(
        train_images=images,
        train_labels=labels,
        test_images=images[:8],
        test_labels=None if labels is None else labels[:8],
        grey_levels=levels,
        classes=classes or 0,
        source=config.source,
        said=("drawn for a smoke test",),
    )


def cut_down(recipe: Recipe) -> Recipe:
    """The same training with a small network, for `STEPS` steps of `BATCH` images, with one picture of them."""
    samples = {"every": STEPS if recipe.samples.every else 0, "count": 2, "steps": min(recipe.samples.steps, 5)}
    return recipe.model_copy(
        update={
            "network": recipe.network.shrunk(),
            "samples": recipe.samples.model_copy(update=samples),
            "batch": min(recipe.batch, BATCH),
            "accumulate": 1,
            "steps": STEPS,
            "max_seconds": None,
            "checkpoint_every": STEPS // 2,
            "log_every": STEPS // 2,
            "log_with": None,
            "init_from": None,
        }
    )
