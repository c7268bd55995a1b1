"""Feature spaces for the data that a model was trained on, made when they are asked for.

classifier        last hidden layer of a small classifier, trained on the labelled data in seconds to a minute
efficientnet      EfficientNet-Lite0's, of ImageNet: 1,280 numbers, for pictures
pixels            the stored pixels, in [-1, 1]
module:function   anybody's: uint8 images [N, C, H, W] -> features [N, F]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.evaluation.features import EfficientNet, FeatureSpace, train_classifier
from logsnr.pixels import Pixels
from logsnr.training import Dataset

REFERENCE = 10_000
"""Images of the data that samples are compared with, at most."""
_LESSONS, _PASSES = 12_000, 30_000
"""Images that the classifier sees, and how often it sees one in all, at most."""
_BATCH = 512


def feature_space(
    name: str, decode: Callable[[Tensor], Tensor], data: Dataset, *, source: str, seed: int, label: int | None = None
) -> FeatureSpace:
    """A feature space by name, with the training images (of one class, if asked for) as its reference.

    Args:
        name: "classifier", "efficientnet", "pixels" or "module:function".
        decode: samples -> stored images, uint8, of the data's grey levels.
        data: images and labels.
        source: what the data are called.
        seed: of the classifier, and of which images are taken where there are too many.
        label: keep this class of the reference.

    Raises:
        LogsnrError: if the name is none, a package or the labels that it needs are not there, or the function fails.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.train_images, data.train_labels
    if name in SPACES:
        of = SPACES[name](data, generator)
        told = {"classifier": f"classifier of {source}", "efficientnet": EfficientNet.NAME}.get(name, name)
    elif ":" in name:
        of, told = _function(name), name
    else:
        raise unknown("features", name, [*SPACES, "none"], ", or module:function")
    if label is not None:
        if labels is None or not bool((labels == label).any()):
            raise LogsnrError(f"{source} has no images of class {label} to compare with: use --features none")
        images = images[labels == label]
    images = images[torch.randperm(len(images), generator=generator)[:REFERENCE]]

    with torch.no_grad():
        reference = torch.cat([_checked(of(part), part, told) for part in torch.split(images, _BATCH)])
    return FeatureSpace(name=told, of=lambda x: of(decode(x)), reference=reference)


def _classifier(data: Dataset, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    if data.train_labels is None or data.test_labels is None:
        raise LogsnrError("these data have no labels to train a classifier on: use --features pixels, or none")
    few = torch.randperm(len(data.train_images), generator=generator)[:_LESSONS]
    model = train_classifier(
        data.train_images[few],
        data.train_labels[few],
        (data.test_images[:_LESSONS], data.test_labels[:_LESSONS]),
        grey_levels=data.grey_levels,
        generator=generator,
        epochs=max(1, min(12, _PASSES // len(few))),
        batch=min(64, len(few)),
    )
    return lambda stored: model.to(stored.device).features(stored)


def _efficientnet(data: Dataset, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    model = EfficientNet(Pixels(data.grey_levels))
    return lambda stored: model.to(stored.device)(stored)


def _pixels(data: Dataset, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    codec = Pixels(data.grey_levels)
    return lambda stored: codec.encode(stored).flatten(1)


SPACES: dict[str, Callable[[Dataset, torch.Generator], Callable[[Tensor], Tensor]]] = {
    "classifier": _classifier,
    "efficientnet": _efficientnet,
    "pixels": _pixels,
}
"""Feature spaces by name: each makes its function, stored images -> features `[N, F]`, of the data and a generator."""


def _function(name: str) -> Callable[[Tensor], Tensor]:
    """`module:function`, found in the working directory too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LogsnrError(f"features {name!r} cannot be imported ({one_line(error)}): give module:function") from error
    if not callable(function):
        raise LogsnrError(
            f"features {name!r} is no function: give one from uint8 images [N, C, H, W] to features [N, F]"
        )
    return lambda images: torch.as_tensor(function(images))


def _checked(features: Tensor, images: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) != len(images):
        raise LogsnrError(
            f"features {name!r} of {len(images)} images have shape {tuple(features.shape)}: it must be [N, F]"
        )
    return features
