"""Data of the commands: what a model was trained on, or another source, and its held-out images."""

from __future__ import annotations

import torch
from torch import Tensor

from logsnr.cli.application import note
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.loading import Loaded
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import reading
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.training.data import Dataset, is_generated, is_prepared

LARGEST_COVARIANCE = 3072
"""Dimensions of the largest Gaussian control (32 x 32 in colour): its eigenvectors take some ten seconds and 75 MB."""


def image_shape(denoiser: Loaded) -> tuple[int, ...]:
    """(channels, height, width) of what a model makes."""
    if isinstance(denoiser, NetworkDenoiser):
        return tuple(denoiser.shape)
    with torch.no_grad():
        return tuple(denoiser.decode(torch.zeros(1, *denoiser.shape)).shape[1:])


def data_config(denoiser: Loaded, source: str | None) -> DataConfig | None:
    """The data that a model was trained on, or another source, a folder read in the model's shape; None for neither."""
    trained_on = (denoiser.card.get("training") or {}).get("data")
    with reading("the model's card, training.data,", "give --data"):
        config = DataConfig.model_validate(trained_on or {})
    if source is None:
        return config if trained_on else None
    plain = config.model_copy(update={"source": source, "size": None, "channels": None, "layout": None})
    if not expanded(source).is_dir() or is_generated(source) or is_prepared(source):
        return plain.model_copy(update={"background": "white", "broken": "stop"})
    channels, *sides = image_shape(denoiser)
    size = sides[0] if len(sides) == 2 and sides[0] == sides[1] else config.size
    return plain.model_copy(update={"size": size, "channels": channels if channels in (1, 3) else None})


def say(data: Dataset, source: str | None, quiet: bool) -> None:
    """Tell what was read where it was asked for by name: what a model was trained on, its training has told."""
    if source is not None and not quiet:
        note(data.describe())


def data_of(denoiser: NetworkDenoiser, source: str | None, *, quiet: bool = True) -> Dataset:
    """The data that a model was trained on, or another source of the same codec.

    Raises:
        LogsnrError: if neither is known, or the codecs differ.
    """
    config = data_config(denoiser, source)
    if config is None:
        raise LogsnrError("this model does not say what it was trained on: give --data")
    try:
        data = load_data(config, progress=not quiet)
    except LogsnrError as error:
        if source is None and not expanded(config.source).exists():
            raise LogsnrError(f"{error}; or say with --data where the model's data lie") from error
        raise
    if denoiser.pixels is not None and denoiser.pixels.grey_levels != data.grey_levels:
        raise LogsnrError(f"{config.source} has {data.grey_levels} grey levels, the model's codec is {denoiser.pixels}")
    say(data, source, quiet)
    return data


def held_out_images(
    denoiser: NetworkDenoiser, source: str | None, limit: int | None, *, quiet: bool = True
) -> tuple[Tensor, Pixels, dict[str, Tensor] | None, Tensor | None]:
    """Held-out images, their codec, their labels where the model is conditional, and training images for the
    Gaussian control of a likelihood: 10,000 at most, none where their covariance would be too large."""

    data = data_of(denoiser, source, quiet=quiet)
    pixels = denoiser.pixels or Pixels(data.grey_levels)
    images, labels = data.test_images[:limit], data.test_labels
    cond = None
    if denoiser.card.get("classes"):
        if labels is None:
            raise LogsnrError("the data has no labels, which this class-conditional model needs")
        cond = {"class_labels": labels[:limit]}
    train = data.train_images[:: -(-len(data.train_images) // 10_000) or 1]
    return images, pixels, cond, train if 2 <= len(train) and train[0].numel() <= LARGEST_COVARIANCE else None
