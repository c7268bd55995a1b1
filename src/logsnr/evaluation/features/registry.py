"""Feature spaces by name, made when they are asked for.

classifier         last hidden layer of a small classifier, trained on the labelled data in seconds to a minute
efficientnet       EfficientNet-Lite0's, of ImageNet: 1,280 numbers, for pictures
torchscript:FILE   any network saved so; the published Inception-v3 is FID's
hf:NAME            a vision network of the Hugging Face hub, or a folder of one: DINOv2, CLIP, ViT
pixels             the stored pixels, in [-1, 1]
module:function    anybody's: uint8 images [N, C, H, W] -> features [N, F]
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, nearest, one_line, unknown
from logsnr.evaluation.features.classifier import Classifier, train_classifier
from logsnr.evaluation.features.efficientnet import SIDE, EfficientNet
from logsnr.evaluation.features.huggingface import huggingface
from logsnr.evaluation.features.space import FeatureSpace, Space
from logsnr.evaluation.features.torchscript import torchscript
from logsnr.evaluation.metrics import Gathered, Reference
from logsnr.files import fingerprint
from logsnr.pixels import Pixels
from logsnr.training import Dataset

_LESSONS, _PASSES = 12_000, 30_000
"""Images that the classifier sees, and how often it sees one in all, at most."""
_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a feature space may be made of.

    Attributes:
        pixels: codec of the images.
        data: labelled images, where there are any.
        source: what they are called.
        generator: of a training.
        carried: weights of a network that came with a file of statistics.
    """

    pixels: Pixels
    data: Dataset | None = None
    source: str = "data"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    carried: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FeatureEntry:
    """A kind of feature space.

    Attributes:
        make: what follows the colon, and the material -> the space.
        argument: what follows the colon, e.g. "FILE"; "" for nothing.
        aliases: further names.
    """

    make: Callable[[str, Material], Space]
    argument: str = ""
    aliases: tuple[str, ...] = ()


def find_space(name: str, material: Material) -> Space:
    """A feature space by name.

    Raises:
        LogsnrError: if the name is none, or what it needs is not there: a package, a file, labels, a function.
    """
    kind, colon, argument = name.partition(":")
    kind = next((key for key, entry in FEATURES.items() if kind in entry.aliases), kind)
    entry = FEATURES.get(kind)
    if entry is None and colon:
        return _function(name)
    if entry is None:
        more = [f"{key}:{one.argument}" for key, one in FEATURES.items() if one.argument]
        raise unknown("features", name, [*FEATURES, "none"], f" ({', '.join(more)}), or module:function")
    if bool(argument) != bool(entry.argument):
        told = f"{kind}:{entry.argument}" if entry.argument else kind
        raise LogsnrError(f"features {name!r}: give {told}")
    return entry.make(argument, material)


def told_spaces() -> str:
    """Every kind of space, as it is typed."""
    return ", ".join(f"{name}:{entry.argument}" if entry.argument else name for name, entry in FEATURES.items())


def feature_space(
    name: str, decode: Callable[[Tensor], Tensor], data: Dataset, *, source: str, seed: int, label: int | None = None
) -> FeatureSpace:
    """A feature space by name, with the training images (of one class, if asked for) as its reference.

    Args:
        name: of `FEATURES`, or "module:function".
        decode: samples -> stored images, uint8, of the data's grey levels.
        data: images and labels.
        source: what the data are called.
        seed: of the classifier.
        label: keep this class of the reference.

    Raises:
        LogsnrError: as `find_space`, or if there are no images of the class.
    """
    generator = torch.Generator().manual_seed(seed)
    material = Material(pixels=Pixels(data.grey_levels), data=data, source=source, generator=generator)
    space = find_space(name, material)
    images, labels = data.train_images, data.train_labels
    if label is not None:
        if labels is None or not bool((labels == label).any()):
            raise LogsnrError(f"{source} has no images of class {label} to compare with: use --features none")
        images = images[labels == label]
    gathered = Gathered(len(images))
    for part in (images[i : i + _BATCH] for i in range(0, len(images), _BATCH)):
        gathered.add(space(part))
    return FeatureSpace(name=space.name, of=lambda x: space(decode(x)), reference=Reference.of(gathered))


def _classifier(_: str, material: Material) -> Space:
    data = material.data
    if material.carried:
        model = _carried(material)
    elif data is None or data.train_labels is None or data.test_labels is None:
        raise LogsnrError("these data have no labels to train a classifier on: use --features pixels, or none")
    else:
        few = torch.randperm(len(data.train_images), generator=material.generator)[:_LESSONS]
        model = train_classifier(
            data.train_images[few],
            data.train_labels[few],
            (data.test_images[:_LESSONS], data.test_labels[:_LESSONS]),
            grey_levels=data.grey_levels,
            generator=material.generator,
            epochs=max(1, min(12, _PASSES // len(few))),
            batch=min(64, len(few)),
        )
    tensors = model.state_dict()
    return Space(
        name=f"classifier of {material.source}",
        sees=f"x in [-1, 1] of {material.pixels.grey_levels} grey levels at its own size",
        weights=fingerprint(tensors),
        of=lambda stored: model.to(stored.device).features(stored),
        probabilities=lambda stored: model.to(stored.device)(stored),
        tensors=tensors,
    )


def _carried(material: Material) -> Classifier:
    """The classifier that a file of statistics brought."""
    found = dict(material.carried)
    try:
        width, classes = found["head.weight"].shape[1], len(found["head.weight"])
        channels = found["body.0.weight"].shape[1]
        if max(width, classes, channels) > 10**5:
            raise ValueError("its layers are too wide")
        model = Classifier(channels, classes, material.pixels, width)
        model.load_state_dict(found)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise LogsnrError(
            f"the classifier of these statistics is damaged ({one_line(error)}): make them again"
        ) from error
    return model.eval().requires_grad_(False)


def _efficientnet(_: str, material: Material) -> Space:
    model = EfficientNet(material.pixels)
    return Space(
        name=EfficientNet.NAME,
        sees=f"(v - 127)/128 at {SIDE} x {SIDE} (bilinear, antialiased)",
        weights=fingerprint(model.state_dict()),
        of=lambda stored: model.to(stored.device)(stored),
    )


def _pixels(_: str, material: Material) -> Space:
    codec = material.pixels
    return Space(
        name="pixels",
        sees=f"x in [-1, 1] of {codec.grey_levels} grey levels at its own size",
        of=lambda stored: codec.encode(stored).flatten(1),
    )


FEATURES: dict[str, FeatureEntry] = {
    "classifier": FeatureEntry(make=_classifier),
    "efficientnet": FeatureEntry(make=_efficientnet, aliases=("efficientnet-lite0",)),
    "torchscript": FeatureEntry(make=lambda file, material: torchscript(file, material.pixels), argument="FILE"),
    "hf": FeatureEntry(make=lambda name, material: huggingface(name, material.pixels), argument="NAME"),
    "pixels": FeatureEntry(make=_pixels),
}
"""Kinds of feature spaces by name."""


def _function(name: str) -> Space:
    """`module:function`, found in the working directory too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        near = nearest(module, FEATURES, cutoff=0.7)
        hint = f", or did you mean {near + ':' + attribute!r}?" if near else ""
        raise LogsnrError(
            f"features {name!r} cannot be imported ({one_line(error)}): give module:function{hint}"
        ) from error
    if not callable(function):
        raise LogsnrError(
            f"features {name!r} is no function: give one from uint8 images [N, C, H, W] to features [N, F]"
        )
    try:
        text = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError):  # of what is written in another language
        text = ""
    return Space(
        name=name, sees="stored images at their own size", weights=text, of=lambda x: torch.as_tensor(function(x))
    )
