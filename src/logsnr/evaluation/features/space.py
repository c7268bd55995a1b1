"""A space of features: what a network sees of an image, what it makes of it, and what tells it from every other space.

    stored image v in 0 ... G - 1  ->  255 v/(G - 1), grey in three channels  ->  resized, normalised  ->  F numbers

Two numbers in different spaces are never compared: a space is its name, what it sees, and the hash of its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.errors import LogsnrError
from logsnr.evaluation.metrics import Estimated, Gathered, Measuring, Reference
from logsnr.pixels import Pixels


@dataclass(frozen=True, kw_only=True)
class Space:
    """Features of stored images.

    Attributes:
        name: what reports call it: "FD (features: name)".
        sees: what the network is shown of an image: size, resizing, normalisation.
        of: stored grey levels uint8 `[N, C, H, W]` -> features `[N, F]`.
        weights: hash of the network's weights; "" without any.
        probabilities: stored images -> class probabilities `[N, K]`, where it classifies.
        inception: whether it is the Inception-v3 of FID, as EDM and StyleGAN compute it.
        tensors: weights that files of statistics carry, as nobody could have them otherwise.
    """

    name: str
    sees: str
    of: Callable[[Tensor], Tensor]
    weights: str = ""
    probabilities: Callable[[Tensor], Tensor] | None = None
    inception: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        """Name, what it sees and its weights."""
        return {"name": self.name, "sees": self.sees, "weights": self.weights}

    @property
    def hash(self) -> str:
        """Eight letters that stand for it."""
        return hashed(self.identity)

    @property
    def frechet(self) -> str:
        """What a Frechet distance in it is called."""
        return "FID" if self.inception else f"FD (features: {self.name})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `[N, F]` of stored images.

        Raises:
            LogsnrError: if they are no such matrix.
        """
        out = self.of(images)
        if out.ndim != 2 or len(out) != len(images):
            raise LogsnrError(
                f"features {self.name!r} of {len(images)} images have shape {tuple(out.shape)}: it must be [N, F]"
            )
        return out


def hashed(identity: Mapping[str, str]) -> str:
    """Eight letters that stand for a space; where it has weights, they are what counts, whatever they are called."""
    facts = [identity["sees"], identity["weights"] or identity["name"]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def shown(images: Tensor, pixels: Pixels, name: str) -> Tensor:
    """Stored images in 0 ... 255 and three channels, uint8 `[N, 3, H, W]`.

    Raises:
        LogsnrError: if they are neither grey nor RGB.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise LogsnrError(
            f"{name} of images {tuple(images.shape)}: give grey or RGB images [N, 1 or 3, H, W], or take other "
            "features, e.g. pixels"
        )
    return pixels.display(images).expand(-1, 3, -1, -1)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images in 0 ... 255, uint8, at another size: float32, bicubic, antialiased, whatever it overshoots cut off."""
    x = images.float()
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 255)


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """Features with a reference in them: FD and KID are said to be "(features: name)".

    Attributes:
        name: what the features are of.
        of: samples x `[N, *shape]` -> features `[N, F]`.
        reference: features of the data `[M, F]`, or what was gathered of them.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    reference: Tensor | Reference

    @cached_property
    def data(self) -> Reference:
        """What samples are measured against."""
        return self.reference if isinstance(self.reference, Reference) else Reference.of(self.reference)

    @torch.no_grad()
    def measure(self, x: Tensor, *, strata: Tensor | None = None, chunk: int = 256) -> Measuring:
        """Samples x `[N, *shape]` against the data; `strata` int64 `[N]`: the class of each, dealt in turn."""
        gathered = Gathered(len(x), strata=strata)
        for part in torch.split(x, chunk):
            gathered.add(self.of(part))
        return Measuring(gathered, self.data)

    def distances(self, x: Tensor, *, chunk: int = 256) -> tuple[Estimated, Estimated | None]:
        """(FD, KID) of samples x `[N, *shape]`; no KID to a reference without rows."""
        found = self.measure(x, chunk=chunk)
        return found.frechet, None if self.data.rows is None else found.kernel()
