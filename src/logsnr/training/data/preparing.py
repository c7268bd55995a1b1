"""Preparing: images of any source, resized once, into shards that a training maps (prepared.py).

    source -> so many images at a time -> shard, whole or not there -> the list of shards -> ... -> what is known of all

The list is written after every shard: the same command goes on after it.  Memory holds one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError, one_line
from logsnr.files import fingerprint
from logsnr.interrupts import Interrupted, put_off
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.terminal import progress_bar
from logsnr.training.data.arrays import has_compressed_images
from logsnr.training.data.dataset import Dataset, Images, Rows
from logsnr.training.data.index import Index, find_index
from logsnr.training.data.latents import Encoder
from logsnr.training.data.manifest import Manifest
from logsnr.training.data.prepared import PARTS, read_prepared
from logsnr.training.data.sources import DATASETS, find_source
from logsnr.training.data.split import Found, split
from logsnr.training.data.statistics import gather, save_statistics
from logsnr.training.folders import Seen, decoded, left_out, pictures
from logsnr.training.images import Picture
from logsnr.training.sections import DataConfig
from logsnr.writing import check_folder, npz, only_writer, replace_file

SHARD = 2**26
"""Bytes of the images in a shard."""
SEEN = 2**16
"""Images that mean and spectrum are of, at most: variances are then known to half a percent."""
OPTIONS = ("size", "crop", "channels", "background", "broken", "layout", "grey_levels")
"""Of a recipe's section on data: those that decide what the images are."""

Show = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a call of `prepare` did.

    Attributes:
        out: the folder.
        made: images that this call wrote.
        data: the set, split as the recipe says.
    """

    out: Path
    made: int
    data: Dataset

    def __str__(self) -> str:
        there = "" if self.made else "nothing to do: "
        return f"{there}{self.data.describe()}; standard deviation {self.data.sigma_data:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        data = self.data
        return {
            "out": str(self.out),
            "images": len(data.train_images) + len(data.test_images),
            "made": self.made,
            "held_out": len(data.test_images),
            "shape": list(data.shape),
            "grey_levels": data.grey_levels,
            "classes": data.classes,
            "sigma_data": data.sigma_data,
            "fingerprint": data.fingerprint(labels=False),
        }


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a source, to be read from its first image to its last.

    Attributes:
        n: how many there are to read.
        identity: which they are.
        shape: (C, H, W).
        read: start, stop, what was seen -> images, and labels.
    """

    n: int
    identity: str
    shape: tuple[int, ...]
    read: Callable[[int, int, Seen], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A source, to be written."""

    parts: dict[str, Part]
    class_names: tuple[str, ...]
    grey_levels: int
    labelled: bool
    said: tuple[str, ...] = ()
    encoder: Encoder | None = None

    def encoded(self, encoder: Encoder) -> Walk:
        """The same source, its images encoded as they are read."""

        def part(images: Part) -> Part:
            def read(start: int, stop: int, seen: Seen) -> tuple[Tensor, Tensor | None]:
                read, labels = images.read(start, stop, seen)
                return encoder(read, start), labels

            return replace(images, shape=encoder.shape(images.shape), read=read)

        return replace(self, parts={name: part(one) for name, one in self.parts.items()}, encoder=encoder)


def prepare(
    config: DataConfig,
    out: str | Path,
    *,
    encoder: Encoder | None = None,
    overwrite: bool = False,
    progress: bool = False,
    shard: int = SHARD,
) -> Prepared:
    """Write the images of a source as a prepared set, or go on where an earlier call was cut off.

    Args:
        config: the source and how it is read; its split is the one that sigma_data and spectrum are of.
        out: the folder.
        encoder: to write latents in place of images.
        overwrite: begin anew where a set lies there: another one, or this one complete.
        progress: show a bar on a terminal.
        shard: bytes of the images in a shard.

    Raises:
        LogsnrError: if the source cannot be read or lies in the folder, the folder holds another set, or the disk
            refuses.
        Interrupted: after Ctrl-C or SIGTERM, with the shard finished.
    """
    folder = check_folder(out)
    path = expanded(config.source)
    if find_source(config.source).recognised and path.exists() and path.resolve().is_relative_to(folder.resolve()):
        raise LogsnrError(f"data.source = {config.source!r} lies in {folder}, which is written: give another folder")
    with only_writer(folder, "this set"), progress_bar(progress, "encoding" if encoder else "preparing") as show:
        walk = _walk(config)
        walk = walk if encoder is None else walk.encoded(encoder)
        first = walk.parts["train"]
        each = max(shard // (int(np.prod(first.shape)) * (4 if encoder else 1)), 1)
        manifest = Manifest.claim(folder, _job(walk, config, each), overwrite=overwrite)
        made = 0 if manifest.complete else _shards(folder, manifest, walk, each, show)
        try:
            data = _known(folder, manifest, config, walk, show)
        except OSError as error:
            raise _refused(folder, error) from error
    return Prepared(out=folder, made=made, data=data)


def _job(walk: Walk, config: DataConfig, each: int) -> dict[str, Any]:
    """What decides the bytes of every shard."""
    return {
        "source": Path(config.source).name,
        "identity": {name: part.identity for name, part in walk.parts.items()},
        "options": config.model_dump(mode="json", include=set(OPTIONS)),
        "shape": list(walk.parts["train"].shape),
        "grey_levels": walk.grey_levels,
        "labels": walk.labelled,
        "class_names": list(walk.class_names),
        "each": each,
        **({} if walk.encoder is None else {"latents": walk.encoder.facts()}),
    }


def _walk(config: DataConfig) -> Walk:
    """The source, unread where it is large."""
    source, path = find_source(config.source), expanded(config.source)
    if source is DATASETS["folder"]:
        return _files(path, config)
    packed = source is DATASETS["arrays"] and has_compressed_images(path)
    found = source.load(config.model_copy(update={"in_memory": packed}), None)
    if isinstance(found, Dataset):
        found = Found(
            images=found.train_images, labels=found.train_labels, test_images=found.test_images,
            test_labels=found.test_labels, class_names=found.class_names, source=found.source, said=found.said,
            grey_levels=found.grey_levels,
        )  # fmt: skip
    if found.latent is not None:
        raise LogsnrError(f"data.source = {config.source!r} is encoded already: give the images")
    parts = {"train": _stored(found.images, found.labels)}
    if found.test_images is not None and len(found.test_images):
        parts["test"] = _stored(found.test_images, found.test_labels)
    return Walk(
        parts=parts, class_names=found.class_names, grey_levels=found.grey_levels or config.grey_levels,
        labelled=found.labels is not None, said=found.said,
    )  # fmt: skip


def _stored(images: Images, labels: Tensor | None) -> Part:
    """Images that are stored as they are wanted."""
    tensors = {} if labels is None else {"labels": labels}
    if isinstance(images, Rows):
        which = images.store.identity + fingerprint({"order": torch.from_numpy(images.order), **tensors})
    else:
        which = fingerprint({"images": images[:], **tensors})

    def read(start: int, stop: int, seen: Seen) -> tuple[Tensor, Tensor | None]:
        return images[start:stop], None if labels is None else labels[start:stop]

    return Part(n=len(images), identity=which, shape=tuple(images.shape[1:]), read=read)


def _files(path: Path, config: DataConfig) -> Walk:
    """A folder of image files."""
    if config.layout is not None:
        raise LogsnrError(f"data.layout applies to .npz and .npy files: remove it to read {config.source}")
    index = find_index(path)
    size = config.size
    like = _first(path, index, config) if size is None else ("size", (config.channels or 3, size, size))

    def read(start: int, stop: int, seen: Seen) -> tuple[Tensor, Tensor | None]:
        files = [index.path(i) for i in range(start, stop)]
        images, broken = decoded(files, config, seen, lambda i, n: None, like)
        kept = [i for i, error in zip(range(start, stop), broken, strict=True) if error is None]
        seen.broken += [str(file.relative_to(path)) for file, error in zip(files, broken, strict=True) if error]
        return images, None if index.labels is None else index.labels[kept]

    part = Part(n=len(index), identity=_stamped(index), shape=like[1], read=read)
    return Walk(
        parts={"train": part}, class_names=index.classes, grey_levels=config.grey_levels,
        labelled=index.labels is not None, said=tuple(left_out(path, [], [], list(index.classes), index.skipped)),
    )  # fmt: skip


def _first(path: Path, index: Index, config: DataConfig) -> tuple[str, tuple[int, ...]]:
    """Name and (C, H, W) of the first file that can be read."""
    for i in range(len(index)):
        (picture,) = pictures([index.path(i)], config)
        if isinstance(picture, Picture):
            return index.path(i).name, picture.pixels.shape
    raise LogsnrError(f"none of the {len(index)} images of {path} can be read: {picture}")


def _stamped(index: Index) -> str:
    """sha256 of the names, sizes and times of change of files."""
    digest = hashlib.sha256(index.identity.encode())
    for i in range(len(index)):
        facts = index.path(i).stat()
        digest.update(f" {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _shards(folder: Path, manifest: Manifest, walk: Walk, each: int, show: Show | None) -> int:
    """Write the shards that are not there yet."""
    total, made, done = sum(part.n for part in walk.parts.values()), 0, 0
    with put_off() as asked:
        for name in (name for name in PARTS if name in walk.parts):
            part = walk.parts[name]
            for number, start in enumerate(range(0, part.n, each)):
                stop, file = min(start + each, part.n), f"{name}-{number:05d}.npz"
                if not manifest.has(folder, file):
                    if asked.signum is not None:
                        raise Interrupted(
                            f"interrupted after {done:,} of {total:,} images, which are kept in {folder}: the same "
                            "command goes on", signum=asked.signum,
                        )  # fmt: skip
                    seen = Seen()
                    images, labels = part.read(start, stop, seen)
                    made += len(images)
                    _write(folder, manifest, walk, file, name, images, labels, seen)
                done += stop - start
                if show is not None:
                    show(done / total, f"{done:,} of {total:,}")
    return made


def _write(
    folder: Path,
    manifest: Manifest,
    walk: Walk,
    file: str,
    part: str,
    images: Tensor,
    labels: Tensor | None,
    seen: Seen,
) -> None:
    if walk.encoder is None and len(images) and (largest := int(images.max())) >= walk.grey_levels:
        raise LogsnrError(
            f"the source has pixel value {largest} with {walk.grey_levels} grey levels: values must be in 0 ... "
            f"{walk.grey_levels - 1}; give the --grey-levels that it is stored with"
        )
    arrays = {"images" if walk.encoder is None else "latents": images.contiguous().numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
        if walk.class_names:
            arrays["class_names"] = np.array(walk.class_names)
    data = npz(arrays)
    try:
        replace_file(folder / file, data)
        manifest.add(
            folder,
            {"file": file, "part": part, "n": len(images), "bytes": len(data),
             "sha256": hashlib.sha256(data).hexdigest(), "seen": seen.to_dict()},
        )  # fmt: skip
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> LogsnrError:
    return LogsnrError(
        f"cannot write into {folder}: {error.strerror or one_line(error)}; what is there is whole: free some space; "
        "the same command goes on"
    )


def _known(folder: Path, manifest: Manifest, config: DataConfig, walk: Walk, show: Show | None) -> Dataset:
    """The set as it is trained on, once what is known of it is written, and the list as complete."""
    wanted = DataConfig(
        source=str(folder), holdout=config.holdout, split_seed=config.split_seed, grey_levels=walk.grey_levels
    )
    if manifest.complete:
        return split(read_prepared(wanted), wanted)
    seen = Seen.merged(shard["seen"] for shard in manifest.shards)
    if not sum(shard["n"] for shard in manifest.shards if shard["part"] == "train"):
        raise LogsnrError(f"{config.source} has no image that can be read: nothing is prepared")
    said = [*(seen.told() if seen.modes else []), *seen.told_broken(), *walk.said]
    manifest.finish(said)
    manifest.save(folder, complete=False)
    found = read_prepared(wanted, complete=False)
    data = split(replace(found, survey=partial(found.survey, place=folder)), wanted)
    rows = data.train_images
    assert isinstance(rows, Rows)
    save_statistics(folder, *gather(_encoded(rows, data, show), data.shape))
    manifest.save(folder, complete=True)
    return data


def _noise(generator: torch.Generator, n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(n, *shape, generator=generator)


def _encoded(rows: Rows, data: Dataset, show: Show | None) -> Iterator[Tensor]:
    """Samples x, some at a time, in the order in which they lie on the disk: `SEEN` of them, evenly spread."""
    order, size = np.sort(rows.order), max(2**22 // int(np.prod(rows.shape[1:])), 1)
    order = order[np.linspace(0, len(order) - 1, min(SEEN, len(order))).astype(np.int64)]
    for first in range(0, len(order), size):
        stored = rows.store.read(order[first : first + size])
        if data.latent is None:
            yield Pixels(data.grey_levels).encode(stored)
        else:
            yield data.latent.x(stored, partial(_noise, torch.Generator().manual_seed(first), len(stored)))
        if show is not None:
            show(first / len(order), f"statistics, {first:,} of {len(order):,}")
