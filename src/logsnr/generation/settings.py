"""Settings: what decides every image of a set, kept in its folder; no second set is ever mixed into it.

Image i is made by the draws of (seed, i) (sampling/streams.py) and its class, in the chunk i // chunk, whole whatever
is wanted of it, and lies in the shard i // shard: neither the number of images nor who computes them changes one bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, shown, unknown
from logsnr.pixels import Pixels
from logsnr.reading import check_format, read_json, reading
from logsnr.sampling.streams import drawn_classes

NAME = "generated.json"
"""The file of a set's settings, which makes a folder one."""
VERSION = 1
RULES = ("balanced", "drawn")
"""How classes are dealt: image i has class i mod classes, or one from its own stream."""
FREE = ("n", "model", "sampler", "class_names")
"""Settings that two sets of the same images may differ in."""
_FIX = "give the folder of logsnr generate, or begin anew (--overwrite)"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides every image of a set.

    Args:
        model: what the model is called; for people.
        sampler: what the plan is called; for people.
        told: conditions beside the class, e.g. a prompt, by the option that gave them; of many prompts their sha256.
        prompts: how many there are, where there are many: image i has prompt i mod prompts; 0 without.
        seed: of every draw.
        deal: how classes are dealt: one of `RULES`, one class for all, None for a model without.
        classes: of the model.
        class_names: where they have any.
        plan: its hash.
        start: of a Gaussian start, its fingerprint.
        guidance: scale of guidance, 1 for none.
        dtype: of the network's weights.
        denoiser: what the denoiser says of itself, guidance too.
        weights: the fingerprint of its numbers.
        chunk: images per call of the network.
        shard: images per shard, a whole number of chunks.
        format: of the shards.
        shape: of an image, (channels, height, width).
        grey_levels: of its pixels.
        n: how many images.
    """

    model: str
    sampler: str
    told: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 0
    seed: int
    deal: str | int | None
    classes: int
    class_names: tuple[str, ...] = ()
    plan: str
    start: str | None
    guidance: float
    dtype: str
    denoiser: str
    weights: str
    chunk: int
    shard: int
    format: str
    shape: tuple[int, ...]
    grey_levels: int
    n: int

    def __post_init__(self) -> None:
        if isinstance(self.deal, str) and self.deal not in RULES:
            raise unknown("classes", self.deal, RULES, ", or a class for all")
        for name in ("n", "chunk", "shard"):
            if getattr(self, name) < 1:
                raise LogsnrError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.shard % self.chunk:
            raise LogsnrError(
                f"a shard of {self.shard} images is no whole number of chunks of {self.chunk}: give a shard of "
                f"{self.chunk * math.ceil(self.shard / self.chunk)}"
            )

    @property
    def shards(self) -> int:
        """The number of shards; the last one may be shorter."""
        return math.ceil(self.n / self.shard)

    @property
    def pixels(self) -> Pixels:
        """The codec of the images."""
        return Pixels(self.grey_levels)

    def images(self, number: int) -> range:
        """The images of a shard."""
        return range(number * self.shard, min((number + 1) * self.shard, self.n))

    def condition(self, indices: Sequence[int]) -> Tensor | None:
        """What class-conditional models are told of these images: int64 `[N]`."""
        if self.deal is None:
            return None
        if isinstance(self.deal, int):
            return torch.full((len(indices),), self.deal)
        if self.deal == "drawn":
            return drawn_classes(self.seed, indices, self.classes)
        return torch.tensor(indices) % self.classes

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The classes of these images: int64 `[N]`; None if they have none, as under the null condition."""
        null = isinstance(self.deal, int) and not 0 <= self.deal < self.classes
        return None if null else self.condition(indices)

    def prompt_indices(self, indices: Sequence[int]) -> Tensor | None:
        """Which prompt these images have: int64 `[N]`; None where there are not many."""
        return torch.tensor(indices) % self.prompts if self.prompts else None

    def save(self) -> bytes:
        """The bytes of the file."""
        facts = {"version": VERSION, "made_by": "logsnr generate", **dataclasses.asdict(self)}
        return (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """The settings of the set in a folder.

        Raises:
            LogsnrError: if there is none, or the file is damaged.
        """
        values = read_json(folder / NAME, _FIX, "the settings of a generated set")
        check_format(values.pop("version", None), VERSION, str(folder / NAME), _FIX)
        with reading(folder / NAME, _FIX, "the settings of a generated set"):
            values.pop("made_by")
            for name in ("shape", "class_names"):
                values[name] = tuple(values[name])
            found = cls(**values)
            if not all(isinstance(v, int) for v in (found.n, found.chunk, found.shard, *found.shape)):
                raise ValueError("a number is none")
            return found

    def check_same(self, other: Settings, folder: Path) -> None:
        """Refuse to add images of other settings to the set in a folder.

        Raises:
            LogsnrError: naming the first setting that differs.
        """
        mine, there = (dataclasses.asdict(settings) for settings in (self, other))
        names = {**mine["told"], **there["told"]}
        told = [(name, there["told"].get(name), mine["told"].get(name)) for name in names]
        rest = [(name, there[name], mine[name]) for name in mine if name not in ("told", "prompts", *FREE)]
        for name, old, new in (*told, *rest):
            if old != new:
                called = "classes" if name == "deal" else name
                raise LogsnrError(
                    f"{folder} holds images made with {called} {_short(old)}, not {_short(new)}: ask for the same, "
                    "give another folder, or begin anew (overwrite=True, --overwrite)"
                )
        if self.n < other.n:
            raise LogsnrError(
                f"{folder} holds, or is to hold, {other.n:,} images, more than {self.n:,}: they are the first of them; "
                "ask for as many, or give another folder"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else shown(value) if len(text) > 80 else text


def default_sizes(shape: Sequence[int], chunk: int | None, shard: int | None) -> tuple[int, int]:
    """(chunk, shard) where they are not given: small images 250 and 1,000, large ones fewer (2 and 84 of 512 x 512).

    Of a shard that is given, the largest part that small images may be computed in.
    """
    values = math.prod(shape)
    if chunk is None:
        chunk = next((c for c in (250, 125, 50, 25, 10, 5, 2) if c * values <= 2**21), 1)
        if shard is not None and shard > 0:  # else refused later
            chunk = next(c for c in range(min(chunk, shard), 0, -1) if shard % c == 0)
    if shard is None:
        shard = chunk * max(1, min(1000, 2**26 // values) // max(chunk, 1))
    return chunk, shard
