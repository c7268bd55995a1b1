"""Statistics of data in a feature space, in one .npz file: what samples are measured against, made once.

    mu [F], sigma [F, F]     mean and unbiased covariance, float64, as in EDM's and ADM's reference files
    n                        images behind them
    features [M, F]          some rows, for KID and neighbours, in random order
    network.*                a classifier's weights, which nobody could have otherwise
    about                    JSON: format, the space (name, what it sees, hash of its weights), the images (shape, grey
                             levels, how they were resized, hash of all of them)

A file without `about` is EDM's or ADM's: it names no space, so whoever reads it must, and only the widths are compared.
Nothing in either is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.evaluation.features import Material, Space, find_space
from logsnr.evaluation.features.space import hashed
from logsnr.evaluation.metrics import Gathered, Reference
from logsnr.evaluation.stored import CHUNK, Stored
from logsnr.paths import cache_folder, expanded
from logsnr.pixels import Pixels
from logsnr.reading import check_format, mapping, parse_json, read_arrays, reading
from logsnr.writing import npz, replace_file

FORMAT = 1
_FIX = "give a file of logsnr stats, or a reference file of EDM or ADM (mu, sigma)"
_NETWORK = "network."


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A reference for metrics.

    Attributes:
        mean: `[F]`.
        covariance: `[F, F]`, unbiased.
        n: images behind them; None where a file does not say.
        rows: features of some, `[M, F]`; None for none.
        features: the name that makes the space, e.g. "torchscript:inception.pt"; "" where a file names none.
        space: its identity; empty where a file names none.
        images: shape, grey levels, how they were prepared, source and digest.
        tensors: weights of the space's own network.
        source: what reports call them.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None = None
    rows: Tensor | None = None
    features: str = ""
    space: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = "statistics"

    @classmethod
    def of(cls, gathered: Gathered, space: Space, images: Stored, features: str) -> Statistics:
        """The statistics of images whose features were gathered."""
        moments = gathered.moments
        facts = {
            "shape": list(images.shape),
            "grey_levels": images.pixels.grey_levels,
            "prepared": images.prepared,
            "source": Path(images.source).name,
            "digest": images.digest,
        }
        return cls(
            mean=moments.mean, covariance=moments.covariance, n=moments.n, rows=gathered.kept, features=features,
            space=space.identity, images=facts, tensors=space.tensors,
        )  # fmt: skip

    @cached_property
    def reference(self) -> Reference:
        """What metrics measure samples against."""
        return Reference(mean=self.mean, covariance=self.covariance, rows=self.rows, n=self.n)

    def find_space(self, features: str | None, pixels: Pixels) -> Space:
        """The space asked for, or the one that they name, of images with this codec.

        Raises:
            LogsnrError: if they name none and none is asked for, or as `features.find_space`.
        """
        name = features or self.features
        if not name:
            raise LogsnrError(
                f"{self.source} names no feature space: give the --features that it was made in, e.g. --features "
                "torchscript:inception-2015-12-05.pt for EDM's"
            )
        source = str(self.space.get("name", "")).removeprefix("classifier of ")
        carried = self.tensors if name == "classifier" else {}
        try:
            return find_space(name, Material(pixels=pixels, source=source, carried=carried))
        except LogsnrError as error:
            if features is None:
                raise LogsnrError(f"{error}; or say with --features where the space of {self.source} is") from error
            raise

    @property
    def key(self) -> tuple[str, str]:
        """What they are of: the digest of the images, and the hash of the space."""
        return str(self.images.get("digest", "")), hashed(self.space)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, in one step."""
        about = {
            "format": FORMAT,
            "features": self.features,
            "space": {**self.space, "hash": hashed(self.space)},
            "images": dict(self.images),
        }
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy(), "about": json.dumps(about)}
        if self.n is not None:
            arrays["n"] = np.int64(self.n)
        if self.rows is not None:
            arrays["features"] = self.rows.numpy()
        arrays |= {f"{_NETWORK}{name}": value.cpu().numpy() for name, value in self.tensors.items()}
        replace_file(path, npz(arrays))
        return expanded(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file of `save`, or a reference file of EDM or ADM.

        Raises:
            LogsnrError: if it is missing, damaged, or none.
        """
        path = expanded(path)
        with reading(path, _FIX, "statistics"):
            arrays = read_arrays(path, _FIX, lambda name: name in _NAMES or name.startswith(_NETWORK))
            if not {"mu", "sigma"} <= arrays.keys():
                raise LogsnrError(f"{path} holds no mu and sigma: {_FIX}")
            mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or len(mean) < 1:
                shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
                raise LogsnrError(f"{path} holds {shapes}, no [F] and [F, F]: {_FIX}")
            if not bool(mean.isfinite().all() and covariance.isfinite().all()):
                raise LogsnrError(f"{path} holds numbers that are NaN or infinite: make it again")
            about = _about(arrays, path)
            rows = arrays.get("features")
            if rows is not None and (rows.ndim != 2 or rows.shape[1] != len(mean) or not np.isfinite(rows).all()):
                raise LogsnrError(f"{path} holds features {rows.shape} that do not fit mu {tuple(mean.shape)}: {_FIX}")
            return cls(
                mean=mean,
                covariance=covariance,
                n=int(arrays["n"]) if "n" in arrays else None,
                rows=None if rows is None else torch.from_numpy(rows.astype(np.float32)),
                features=str(about.get("features", "")),
                space={key: str(about["space"][key]) for key in ("name", "sees", "weights")} if about else {},
                images=dict(about.get("images", {})),
                tensors={
                    name.removeprefix(_NETWORK): torch.from_numpy(value.copy())
                    for name, value in arrays.items()
                    if name.startswith(_NETWORK)
                },
                source=path.name,
            )

    @classmethod
    def find(cls, path: Path, key: tuple[str, str]) -> Statistics | None:
        """The statistics at a path, if they are of these images in this space."""
        if not path.is_file():
            return None
        with suppress(LogsnrError):
            found = cls.load(path)
            return found if found.key == key else None
        return None

    def check(self, space: Space, shape: tuple[int, ...], pixels: Pixels, prepared: str = "") -> None:
        """Refuse samples in a space, of images of a shape (prepared somehow), that cannot be compared with these.

        Raises:
            LogsnrError: if their space, size, grey levels or resizing differ, naming both.
        """
        if self.space and hashed(self.space) != space.hash:
            mine, theirs = (_told_space(identity) for identity in (self.space, space.identity))
            raise LogsnrError(
                f"{self.source} is in the space {mine}, the samples in {theirs}: take the same --features"
            )
        for key, name, found in (
            ("shape", "images of", list(shape)),
            ("grey_levels", "grey levels", pixels.grey_levels),
            ("prepared", "images prepared as", prepared),
        ):
            if key in self.images and self.images[key] != found and not (key == "prepared" and not prepared):
                raise LogsnrError(
                    f"{self.source} is of {name} {self.images[key] or 'they are'}, the samples are of {name} {found}: "
                    "make statistics of images like the samples (logsnr stats), or samples like the images"
                )

    def check_width(self, width: int, space: Space) -> None:
        """Refuse features of another number.

        Raises:
            LogsnrError: naming both.
        """
        if width != len(self.mean):
            raise LogsnrError(
                f"{self.source} is of {len(self.mean)} features, {space.name} has {width}: give the --features that it "
                "was made in"
            )


@torch.no_grad()
def gather(
    images: Stored,
    space: Space,
    *,
    classes: bool = False,
    chunk: int = CHUNK,
    device: torch.device | None = None,
    tell: Callable[[int], None] | None = None,
    first: Callable[[int, Space], None] | None = None,
) -> Gathered:
    """Walk through images and gather their features.

    Args:
        images: what is walked through.
        space: of the features.
        classes: whether class probabilities are gathered too.
        chunk: images per call.
        device: where the features are computed.
        tell: called with how many are done.
        first: called with the number of features, once it is known.
    """
    gathered = Gathered(images.n, strata=images.strata)
    for part in images.chunks(chunk):
        part = part if device is None else part.to(device)
        features = space(part)
        if gathered.seen == 0 and first is not None:
            first(features.shape[1], space)
        gathered.add(features, space.probabilities(part) if classes and space.probabilities is not None else None)
        if tell is not None:
            tell(gathered.seen)
    return gathered


def cached(images: Stored, space: Space) -> Path:
    """Where statistics lie that nobody gave a place: named by what they are of."""
    return cache_folder() / "statistics" / f"{Path(images.source).stem}-{images.digest[:16]}-{space.hash}.npz"


def told_features(name: str) -> str:
    """The name of a space as a file keeps it: of a file or folder, its last part alone."""
    kind, _, argument = name.partition(":")
    return f"{kind}:{Path(argument).name}" if argument and expanded(argument).exists() else name


_NAMES = ("mu", "sigma", "n", "features", "about")


def _about(arrays: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if "about" not in arrays:
        return {}
    about = mapping(parse_json(str(arrays["about"][()])), str(path), _FIX)
    check_format(about.get("format"), FORMAT, str(path), "make it again with logsnr stats")
    return about


def _told_space(identity: Mapping[str, str]) -> str:
    return f"{identity['name']} ({identity['sees']}; {hashed(identity)})"
