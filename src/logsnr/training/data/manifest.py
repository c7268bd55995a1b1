"""Manifests: prepared.json, the list of the shards of a set, how they were made, and whether they are all there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logsnr.errors import LogsnrError, shown
from logsnr.reading import reading
from logsnr.training.data.prepared import FIX, FORMAT, NAME, read_manifest
from logsnr.training.data.statistics import NAME as STATISTICS
from logsnr.training.data.statistics import read_statistics
from logsnr.writing import replace_file


@dataclass
class Manifest:
    """The list of a set in the making.

    Attributes:
        job: what decides the bytes of every shard.
        shards: those that are there.
        complete: whether they are all, and what is known of them is written.
        said: what was read, converted and left out.
    """

    job: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    said: list[str] = field(default_factory=list)

    @classmethod
    def claim(cls, folder: Path, job: dict[str, Any], *, overwrite: bool) -> Manifest:
        """The list in a folder, begun for this job or found of the same.

        Raises:
            LogsnrError: if another set lies there, or the list is damaged.
        """
        job = json.loads(json.dumps(job))
        if (folder / NAME).exists():
            facts: dict[str, Any] = {}
            with suppress(LogsnrError) if overwrite else nullcontext():
                facts = read_manifest(folder)
            differ = [key for key in job if facts.get(key) != job[key]]
            if not differ and not (overwrite and facts.get("complete") is True):
                with reading(folder / NAME, FIX, "the list of a prepared set"):
                    made = cls(job, list(facts["shards"]), facts["complete"] is True, list(facts.get("said", [])))
                    whole = [made.has(folder, shard["file"]) for shard in list(made.shards)]
                made.complete &= all(whole) and _has_statistics(folder)
                return made
            if not overwrite:
                key = differ[0]
                raise LogsnrError(
                    f"{folder} holds a set with other {key} ({shown(facts.get(key))}, not {shown(job[key])}): give "
                    "another folder, or begin anew (overwrite=True, --overwrite)"
                )
            # The list last: with it, what a kill leaves here can be written over.
            for pattern in ("train-*.npz", "test-*.npz", "survey-*.json", STATISTICS, NAME):
                for path in folder.glob(pattern):
                    path.unlink()
        strange = next((path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")), None)
        if strange:
            raise LogsnrError(f"{folder} holds {strange}, and is no prepared set: give another folder")
        made = cls(job)
        made.save(folder, complete=False)
        return made

    def has(self, folder: Path, file: str) -> bool:
        """Whether a shard is there, whole."""
        known = next((shard for shard in self.shards if shard["file"] == file), None)
        path = folder / file
        if known is not None and path.is_file() and path.stat().st_size == known["bytes"]:
            return True
        self.shards = [shard for shard in self.shards if shard["file"] != file]
        return False

    def add(self, folder: Path, shard: dict[str, Any]) -> None:
        """Put a shard on the list."""
        self.shards = sorted([*self.shards, shard], key=lambda one: str(one["file"]))
        self.save(folder, complete=False)

    def finish(self, said: Iterable[str]) -> None:
        """What is told of them."""
        self.said = list(said)

    def save(self, folder: Path, *, complete: bool) -> None:
        """Write the list."""
        self.complete = complete
        digest = hashlib.sha256(json.dumps([(s["file"], s["n"], s["sha256"]) for s in self.shards]).encode())
        facts = {
            "format": FORMAT, "made_by": "logsnr data prepare", "complete": complete, **self.job,
            "fingerprint": digest.hexdigest(), "said": self.said, "shards": self.shards,
        }  # fmt: skip
        replace_file(folder / NAME, (json.dumps(facts, indent=1) + "\n").encode())


def _has_statistics(folder: Path) -> bool:
    """Whether mean and spectrum are there, whole."""
    with suppress(LogsnrError):
        read_statistics(folder)
        return True
    return False
