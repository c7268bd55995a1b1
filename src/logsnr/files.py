"""Weights on disk: a JSON card and one safetensors file, replaced together or not at all.

The card names its weight file and the file's SHA-256; the weight file's name carries the step and the hash, so a new
one never overwrites the old.  Weights are written first, the card last, each in one atomic step (writing.py): after a
kill or a full disk at any point, the card on disk still names a complete weight file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from logsnr.errors import LogsnrError, one_line
from logsnr.reading import check_format, read_json, read_tensors
from logsnr.writing import remove_temporaries, replace_file

FORMAT = 1
"""Version of the cards written here; a reader refuses any other."""

CARD = "card"
"""Name of a denoiser's card, the file that makes a folder a run."""

MODEL = "model"
"""Beginning of its weight file's name."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A card and its tensors, to be written.

    Args:
        folder: where; made if needed.
        name: of the card, without ".json".
        stem: beginning of the weight file's name.
        card: what the card says, beside format, step and weights.
        tensors: the weights.
        entry: what the card says of weights that are written already, in place of `tensors`.
    """

    folder: Path
    name: str
    stem: str
    card: dict[str, Any]
    tensors: dict[str, Tensor]
    entry: dict[str, Any] | None = None


def write_pairs(pairs: Sequence[Pair], *, step: int) -> None:
    """Write `{stem}-{step}-{hash}.safetensors` of all pairs, then their cards, the last pair's last; then remove older
    weight files.

    Until its card is replaced a pair is the one written before, whole.  A kill between two cards leaves pairs of
    different steps, each intact: the step in the cards tells.

    Raises:
        LogsnrError: if the disk refuses (full, read-only); what was written before stays intact and loadable.
    """
    entries: list[dict[str, Any]] = []
    for pair in pairs:
        if pair.entry is not None:
            entries.append(pair.entry)
            continue
        weights = tensors_to_bytes({key: value.detach().cpu().contiguous() for key, value in pair.tensors.items()})
        digest = hashlib.sha256(weights).hexdigest()
        file = f"{pair.stem}-{step:08d}-{digest[:8]}.safetensors"
        entries.append({"file": file, "sha256": digest, "bytes": len(weights)})
        _write(pair.folder / file, weights)
    for pair, entry in zip(pairs, entries, strict=True):
        card = {"format": FORMAT, **pair.card, "step": step, "weights": entry}
        _write(pair.folder / f"{pair.name}.json", (json.dumps(card, indent=2, allow_nan=False) + "\n").encode())
    for pair, entry in zip(pairs, entries, strict=True):
        for stale in weight_files(pair.folder, pair.stem):
            if stale.name != entry.get("file"):
                with suppress(OSError):
                    stale.unlink(missing_ok=True)
        remove_temporaries(pair.folder, rf"(?:{pair.name}\.json|{weight_name(pair.stem)})")


def weight_name(stem: str) -> str:
    """The expression that a weight file's name matches: one that somebody named otherwise is no business of ours."""
    return rf"{stem}-\d{{8,}}-[0-9a-f]{{8}}\.safetensors"


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weight files that `write_pairs` left in a folder."""
    return [path for path in folder.glob(f"{stem}-*.safetensors") if re.fullmatch(weight_name(stem), path.name)]


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise LogsnrError(
            f"cannot write {path}: {error.strerror or one_line(error)}; the checkpoint before it is intact: "
            "free some space or choose another folder, then resume"
        ) from error


def read_pair(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors that `write_pairs` wrote, verified against the card's format and checksum.

    Raises:
        LogsnrError: if either file is missing, unreadable, of another format version, truncated or altered.
    """
    card = read_card(folder, name)
    entry = card["weights"]
    if "file" not in entry:
        raise LogsnrError(f"{folder / name}.json names shards, which are no single file: resume the run")
    path = folder / str(entry["file"])
    try:
        size = path.stat().st_size
        # Its size is compared first: a link may lead to what never ends.
        weights = path.read_bytes() if size == entry["bytes"] and path.is_file() else b""
    except OSError as error:
        raise _unreadable(f"{folder / name}.json", path, error) from error
    _check(path, len(weights), size, hashlib.sha256(weights).hexdigest, entry)
    return card, read_tensors(weights, path, "restore the file or train again")


def verify(folder: Path, entry: Mapping[str, Any]) -> None:
    """Make sure that a file is the one that an entry of a card names, without taking it into memory.

    Raises:
        LogsnrError: if it is missing, truncated or altered.
    """
    path = folder / str(entry["file"])
    try:
        size = path.stat().st_size
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            right = size == entry["bytes"] and path.is_file()
            _check(path, size if right else 0, size, lambda: hashlib.file_digest(file, "sha256").hexdigest(), entry)
    except OSError as error:
        raise _unreadable(f"the card of {folder}", path, error) from error


def _unreadable(card: str, path: Path, error: OSError) -> LogsnrError:
    return LogsnrError(
        f"{card} names {path.name}, which cannot be read ({error.strerror}): restore the file or train again"
    )


def _check(path: Path, read: int, size: int, digest: Callable[[], str], entry: Mapping[str, Any]) -> None:
    if read != entry["bytes"]:
        raise LogsnrError(
            f"{path} has {size} bytes, its card says {entry['bytes']}: the file is truncated or incomplete; "
            "copy it again or go back to another checkpoint"
        )
    if (found := digest()) != entry["sha256"]:
        raise LogsnrError(
            f"{path} has SHA-256 {found[:12]}..., its card says {str(entry['sha256'])[:12]}...: the file was altered "
            "(a flipped bit, or another run's weights); copy it again or go back to another checkpoint"
        )


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
    for entry in weight_entries(card):
        if not isinstance(entry, dict) or not {"file", "sha256", "bytes"} <= entry.keys():
            raise LogsnrError(f"{path} names no weight file (file, sha256, bytes): restore the card or train again")
        for file in (entry["file"], card["weights"].get("folder", "shards")):
            if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
                raise LogsnrError(f"{path} names the weight file {file!r}: it must lie in the card's own folder")
    return card


def weight_entries(card: Mapping[str, Any]) -> list[Any]:
    """The entries of a card's weight files: one, or those of its shards."""
    weights = card.get("weights")
    files = weights.get("files") if isinstance(weights, dict) else None
    return files if isinstance(files, list) and files else [weights]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, by name: which weights, or whatever else, something was made for."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
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


def check_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """Look for what no weight may be.

    Raises:
        LogsnrError: naming the first tensor that holds NaN or infinity.
    """
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floating:
        return
    # One answer is read from the device, of all tensors.
    device = next(iter(floating.values())).device
    if bool(torch.stack([value.isfinite().all().to(device) for value in floating.values()]).all()):
        return
    name, value = next((name, value) for name, value in floating.items() if not bool(value.isfinite().all()))
    bad = int((~value.isfinite()).sum())
    raise LogsnrError(f"{name} holds {bad} NaN or infinite values of {value.numel()} ({value.dtype}): {consequence}")


def _mismatches(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterable[str]:
    for key, value in expected.items():
        if key not in found:
            yield f"{key} is missing"
        elif found[key].shape != value.shape:
            yield f"{key} has shape {tuple(found[key].shape)} instead of {tuple(value.shape)}"
    for key in found:
        if key not in expected:
            yield f"{key} is not in the network"
