"""Shards: the state of a run that is spread over processes; each writes its part, by torch.distributed.checkpoint.

state/state-{step}/shard-{r}-....safetensors     the parts, with their offsets in the header of each file
state/state.json                                 names them, with size and SHA-256; until then, the ones before

The parts are copied into host memory when they are asked for, and written by a thread while the training goes on; so is
the commit, on the first process, once all parts are on disk.  Nothing is ever pickled into a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from logsnr.errors import LogsnrError, one_line
from logsnr.files import verify, weight_entries
from logsnr.training.parallel import shared_failure

FOLDER = re.compile(r"state-\d{8,}")


class Shards:
    """Writes the parts of a state, one checkpoint at a time; made, and asked, by every process.

    Args:
        rank: number of this process.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.group = dist.new_group(backend="gloo")  # of its own: the training's goes on meanwhile
        self._future: Any = None
        self._folder = Path()

    def save(
        self, tensors: dict[str, Tensor], state: Path, step: int, commit: Callable[[dict[str, Any]], None]
    ) -> None:
        """Begin to write tensors below `state`; then, on the first process, `commit` with the entry for its card.

        Raises:
            LogsnrError: if the checkpoint before could not be written.
        """
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.wait()
        self._folder = folder = state / f"state-{step:08d}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what a kill left of one of this step

        def finish() -> None:
            files = sorted(folder.glob("*.safetensors"))
            commit({"folder": folder.name, "files": [json.loads(_note(path).read_text()) for path in files]})
            for path in files:
                _note(path).unlink(missing_ok=True)
            remove_shards(state, folder.name)

        writer = _writer(folder, self.rank, finish)
        dist.barrier(self.group)
        self._future = async_save(tensors, storage_writer=writer, process_group=self.group)

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            LogsnrError: if it could not be written; the one before is intact.
        """
        future, self._future = self._future, None
        if future is None:
            return
        try:
            getattr(future, "upload_completion", future).result()
        except BaseException as error:  # DCP's own derives from no Exception
            failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
            why = next((f for f in failures if isinstance(f, (LogsnrError, OSError))), None)
            if isinstance(why, LogsnrError):
                raise why from error
            told = (isinstance(why, OSError) and why.strerror) or one_line(why or (failures or [error])[0])
            raise LogsnrError(
                f"cannot write {self._folder}: {told}; the checkpoint before it is intact: free some space or choose "
                "another folder, then resume"
            ) from error

    def close(self) -> None:
        """Let the thread end, whatever becomes of what it writes."""
        with suppress(LogsnrError):
            self.wait()


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _writer(folder: Path, rank: int, finish: Callable[[], None]) -> Any:
    """DCP's writer of safetensors, which also takes the hash of each file, and ends with a commit."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            written = super().write_data(plan, planner)
            written.wait()
            for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors"):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                entry = {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}
                _note(path).write_text(json.dumps(entry))
            return written

        def finish(self, metadata: Any, results: Any) -> None:
            finish()

    return Writer(str(folder), save_distributed=True)


def remove_shards(state: Path, kept: str | None = None) -> None:
    """Remove the folders of other checkpoints."""
    for folder in state.glob("state-*"):
        if folder.is_dir() and FOLDER.fullmatch(folder.name) and folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


def verified(card: dict[str, Any], state: Path, rank: int, world: int) -> Path:
    """The folder of a card's shards, once every file in it is the one that was written; on every process.

    Raises:
        LogsnrError: if one is missing, truncated or altered, or a file is there that the card does not name.
    """
    folder, entries = state / str(card["weights"]["folder"]), weight_entries(card)
    error = None
    try:
        for entry in entries[rank::world]:
            verify(folder, entry)
        if more := {path.name for path in folder.glob("*.safetensors")} - {entry["file"] for entry in entries}:
            raise LogsnrError(f"{folder} holds {sorted(more)[0]}, which its card does not name: remove it")
    except LogsnrError as failure:
        error = failure
    shared_failure(error, f"a shard in {folder} is missing or damaged: go back to another checkpoint")
    return folder


def shapes(folder: Path) -> dict[str, Tensor]:
    """What the shards hold, by name, without their values."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: torch.empty(entry.size, device="meta", dtype=entry.properties.dtype) for name, entry in found.items()}


def read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, by name; every process asks for its own."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is one process
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
