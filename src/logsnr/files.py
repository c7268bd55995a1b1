"""Weights on disk: a JSON card and one safetensors file, replaced together or not at all.

The card names its weight file and the file's SHA-256; the weight file's name carries the step and the hash, so a new
one never overwrites the old.  Weights are written first, the card last, each through a temporary file, fsync and
rename: after a crash or a full disk at any point, the card on disk still names a complete weight file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from logsnr.errors import LogsnrError, one_line
from logsnr.reading import check_format, read_json, read_tensors

FORMAT = 1
"""Version of the cards written here; a reader refuses any other."""

CARD = "card"
"""Name of a denoiser's card, the file that makes a folder a run."""


def write_pair(
    folder: Path, name: str, card: dict[str, Any], tensors: dict[str, Tensor], *, step: int, stem: str
) -> Path:
    """Write `{stem}-{step}-{hash}.safetensors`, then `{name}.json` around `card`; then remove older weight files.

    Returns:
        The path of the card.

    Raises:
        LogsnrError: if the disk refuses (full, read-only); the pair written before stays intact and loadable.
    """
    weights = tensors_to_bytes({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(weights).hexdigest()
    file = f"{stem}-{step:08d}-{digest[:8]}.safetensors"
    card = {
        "format": FORMAT,
        **card,
        "step": step,
        "weights": {"file": file, "sha256": digest, "bytes": len(weights)},
    }
    target = folder / f"{name}.json"
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / file, weights)
        replace_file(target, text.encode())
    except OSError as error:
        raise LogsnrError(
            f"cannot write {folder / file}: {error.strerror or one_line(error)}; the checkpoint before it is intact: "
            "free some space or choose another folder, then resume"
        ) from error
    for stale in (*folder.glob(f"{stem}-*.safetensors"), *folder.glob(f".{stem}-*.tmp")):
        if stale.name != file:
            stale.unlink(missing_ok=True)
    return target


def read_pair(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors that `write_pair` wrote, verified against the card's format and checksum.

    Raises:
        LogsnrError: if either file is missing, unreadable, of another format version, truncated or altered.
    """
    card = read_card(folder, name)
    entry = card["weights"]
    path = folder / str(entry["file"])
    try:
        size = path.stat().st_size
        # Its size is compared first: a link may lead to what never ends.
        weights = path.read_bytes() if size == entry["bytes"] and path.is_file() else b""
    except OSError as error:
        raise LogsnrError(
            f"{folder / name}.json names {path.name}, which cannot be read ({error.strerror}): "
            "restore the file or train again"
        ) from error
    if len(weights) != entry["bytes"]:
        raise LogsnrError(
            f"{path} has {size} bytes, its card says {entry['bytes']}: the file is truncated or incomplete; "
            "copy it again or go back to another checkpoint"
        )
    digest = hashlib.sha256(weights).hexdigest()
    if digest != entry["sha256"]:
        raise LogsnrError(
            f"{path} has SHA-256 {digest[:12]}..., its card says {str(entry['sha256'])[:12]}...: the file was altered "
            "(a flipped bit, or another run's weights); copy it again or go back to another checkpoint"
        )
    return card, read_tensors(weights, path, "restore the file or train again")


def read_card(folder: Path, name: str) -> dict[str, Any]:
    """The card alone, with its format version checked.

    Raises:
        LogsnrError: if it is missing, not a card, or of another format version.
    """
    path = folder / f"{name}.json"
    card = read_json(path, f"give the folder of a run, which holds {name}.json, or restore it", "a JSON card")
    if "format" not in card:
        raise LogsnrError(f"{path} is not a card of this library (no format version): give the folder of a run")
    check_format(card["format"], FORMAT, str(path), "restore it or train again")
    entry = card.get("weights")
    if not isinstance(entry, dict) or not {"file", "sha256", "bytes"} <= entry.keys():
        raise LogsnrError(f"{path} names no weight file (file, sha256, bytes): restore the card or train again")
    file = entry["file"]
    if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
        raise LogsnrError(f"{path} names the weight file {entry['file']!r}: it must lie in the card's own folder")
    return card


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one atomic step that survives a power cut.

    Raises:
        OSError: from the file system; what was at `path` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, by name: which weights, or whatever else, something was made for."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], describe: Callable[[str], str], *, limit: int = 3
) -> None:
    """Compare names and shapes before anything is loaded.

    Raises:
        LogsnrError: naming the first mismatching tensors; `describe` turns their list into the error's sentence.
    """
    problems = [*_mismatches(found, expected)]
    if problems:
        more = f" and {len(problems) - limit} more" if len(problems) > limit else ""
        raise LogsnrError(describe("; ".join(problems[:limit]) + more))


def _mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterable[str]:
    for key, value in expected.items():
        if key not in found:
            yield f"{key} is missing"
        elif found[key].shape != value.shape:
            yield f"{key} has shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
    for key in found:
        if key not in expected:
            yield f"{key} is not in the network"
