"""Prepared sets: images as a network wants them, in shards that are mapped, with what a training has to know of them.

    prepared.json              the set: its parts, shards, classes, where it came from and how it was made; written last
    train-00000.npz, ...       images uint8 [n, C, H, W], labels int64 [n], class_names; not compressed
                               encoded (`logsnr encode`): latents float32 (latents.py) in place of images
    test-00000.npz, ...        the held-out part, of a source that has one
    survey-*.json              what `survey` knows of the training part
    statistics.safetensors     mean and covariance spectrum of the training part (statistics.py)

Every shard is an .npz as anyone reads it.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.paths import expanded
from logsnr.reading import Region, check_format, find_arrays, read_arrays, read_json, reading
from logsnr.training.data.dataset import Images, Rows
from logsnr.training.data.latents import Latent, Spread
from logsnr.training.data.mapped import Mapped
from logsnr.training.data.split import Found
from logsnr.training.data.survey import BYTES, Survey, survey
from logsnr.training.folders import Tell
from logsnr.training.sections import DataConfig

NAME = "prepared.json"
FORMAT = 1
PARTS = ("train", "test")
FIX = "prepare it again: logsnr data prepare"


def is_prepared(source: str) -> bool:
    """Whether it is the folder of `logsnr data prepare`, or of `logsnr encode`."""
    return (expanded(source) / NAME).is_file()


def is_encoded(source: str) -> bool:
    """Whether it is the folder of `logsnr encode`."""
    return is_prepared(source) and "latents" in read_manifest(expanded(source))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What prepared.json says.

    Raises:
        LogsnrError: if it is missing, damaged, or of another version.
    """
    facts = read_json(folder / NAME, FIX, "the list of a prepared set")
    check_format(facts.get("format"), FORMAT, str(folder / NAME), FIX)
    return facts


def read_prepared(config: DataConfig, *, complete: bool = True) -> Found:
    """The set in a folder: mapped, or in memory if the recipe says so.

    Args:
        config: the recipe's section.
        complete: refuse one that is not.

    Raises:
        LogsnrError: if it is not complete, damaged, or has options of other sources.
    """
    folder = expanded(config.source)
    if config.layout is not None:
        raise LogsnrError(f"data.layout applies to .npz and .npy files: remove it to read {config.source}")
    facts = read_manifest(folder)
    if complete and facts.get("complete") is not True:
        raise LogsnrError(f"{folder} is not complete: run logsnr data prepare again as before, which goes on")
    with reading(folder / NAME, FIX, "the list of a prepared set"):
        levels = int(facts["grey_levels"])
        names = tuple(str(name) for name in facts["class_names"])
        said = tuple(str(phrase) for phrase in facts.get("said", []))
        (images, labels), (test, test_labels) = (_part(folder, facts, part) for part in PARTS)
    if images is None:
        raise LogsnrError(f"{folder} has no images: {FIX}")
    if config.in_memory is True:
        images, test = images[:], None if test is None else test[:]
    encoded = facts.get("latents")
    latent = None if encoded is None else Latent(moments=bool(encoded["moments"]), vae=str(encoded["vae"]))
    return Found(
        images=images,
        labels=labels,
        test_images=test,
        test_labels=test_labels,
        class_names=names,
        source=str(folder),
        said=(f"{'prepared' if latent is None else 'encoded'} from {facts['source']}", *said),
        eight_bit=levels == 256,
        grey_levels=min(levels, config.grey_levels),
        survey=survey if latent is None else partial(survey, walk=partial(walked_latents, latent)),
        latent=latent,
    )


def _part(folder: Path, facts: dict[str, Any], part: str) -> tuple[Images | None, Tensor | None]:
    """Images and labels of the training part, or of the held-out one."""
    regions, labels = list[Region](), list[np.ndarray[Any, Any]]()
    for shard in (shard for shard in facts["shards"] if shard["part"] == part):
        path = folder / str(shard["file"])
        if path.name != shard["file"]:
            raise LogsnrError(f"names the shard {shard['file']!r}, which is not in its folder: {FIX}")
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            there = f"has {path.stat().st_size} bytes, not {shard['bytes']}" if path.is_file() else "is missing"
            raise LogsnrError(f"{path} {there}: copy it again, or {FIX}")
        name, dtype = ("latents", np.float32) if "latents" in facts else ("images", np.uint8)
        region = find_arrays(path, FIX).get(name)
        if region is None or region.shape != (shard["n"], *facts["shape"]) or region.dtype != dtype:
            raise LogsnrError(f"{path} does not hold {shard['n']} {name} of {tuple(facts['shape'])}: {FIX}")
        regions.append(region)
        if facts["labels"]:
            labels.append(read_arrays(path, FIX, lambda name: name == "labels")["labels"])
    if not regions:
        return None, None
    store = Mapped(regions, "NCHW", folder=folder, identity=f"{facts['fingerprint']} {part}")
    found = torch.from_numpy(np.concatenate(labels)) if labels else None
    return Rows(store=store, order=np.arange(len(store))), found


def walked_latents(latent: Latent, rows: Rows, labels: Tensor | None, tell: Tell | None = None) -> Survey:
    """The survey of latents, from a walk through all of them."""
    spread, digest = Spread(latent), hashlib.sha256(f"images {torch.float32} {tuple(rows.shape)}\n".encode())
    size = max(BYTES // (4 * rows.shape[1:].numel()), 1)
    for first in range(0, len(rows), size):
        part = rows[first : first + size].contiguous()
        spread.add(part)
        digest.update(part.numpy().data)
        if tell is not None:
            tell(min(first + size, len(rows)), len(rows))
    if not spread.deviation:
        raise LogsnrError("all latents are one and the same number: there is nothing to learn")
    images, labelled = digest.hexdigest(), ""
    if labels is not None:
        digest.update(f"labels {labels.dtype} {tuple(labels.shape)}\n".encode())
        digest.update(labels.contiguous().numpy().data)
        labelled = digest.hexdigest()
    return Survey(counts=(), images=images, labelled=labelled, spread=spread.deviation)
