"""What a training borrows from the process it runs in, and gives back: the terminal, random state, accelerate."""

from __future__ import annotations

import importlib
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from logsnr import terminal
from logsnr.errors import LogsnrError, one_line, require
from logsnr.interrupts import Interrupted
from logsnr.training.config import Recipe


def accelerator_for(recipe: Recipe, tracking: dict[str, Any]) -> Any:
    """accelerate's view of the machine.

    Args:
        recipe: what is trained.
        tracking: what it is told of a tracker (trackers.py).

    Raises:
        LogsnrError: if accelerate is missing or does the sharding itself, or the recipe's precision does not run here.
    """
    accelerate = require("accelerate", extra="train", purpose="training")
    try:
        accelerator = accelerate.Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision, **tracking)
    except ValueError as error:
        raise LogsnrError(
            f"precision = {recipe.precision!r} does not run here ({one_line(error)}): use 'no'"
        ) from error
    if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise LogsnrError(
            f"accelerate is set up for {kind}: launch without that (torchrun), and set parallel: fsdp in the recipe"
        )
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would quietly train in float32.
        raise LogsnrError("precision = 'fp16' needs a GPU: use 'bf16' or 'no' on a CPU")
    return accelerator


@contextmanager
def own_accelerator() -> Iterator[None]:
    """Leave no accelerate singleton and no process group behind that the caller did not have.

    The singleton would pin precision and device.  A group that is left to the end of the interpreter is torn down
    while its threads still run, which now and then aborts a process after all its work is done.  To destroy it is
    not enough: DistributedDataParallel imports torch.distributed.nn.functional, whose defaults (group=group.WORLD)
    hold whatever group exists at that moment for ever.  Imported before there is one, they hold None: the current one.
    """
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed.nn.functional")
    try:
        from accelerate.state import AcceleratorState, PartialState
    except ModuleNotFoundError:
        yield  # `accelerator_for` says what is missing.
        return
    fresh: Any = not PartialState._shared_state
    grouped, orderly = _grouped(), False
    try:
        yield
        orderly = True
    except Interrupted:
        orderly = True
        raise
    finally:
        if _grouped() and not grouped:
            if orderly:
                _last_exchange()  # who leaves first takes the connections with it
            torch.distributed.destroy_process_group()
        if fresh:
            AcceleratorState._reset_state(reset_partial_state=not _grouped())


def _last_exchange(patience: float = 5.0) -> None:
    """Wait for all, until nobody's thread holds what was exchanged.

    Gloo's thread needs the interpreter's lock to drop a tensor; the group's destructor waits for that thread and may
    hold the lock.  A tensor that nothing but the exchange holds is gone once the thread has dropped it.
    """
    device = "cpu" if torch.distributed.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
    last = torch.zeros(1, device=device)
    held = weakref.ref(last)
    torch.distributed.all_reduce(last)
    del last
    end = time.monotonic() + patience
    while held() is not None and time.monotonic() < end:
        time.sleep(0.001)


def _grouped() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def own_random_state() -> Iterator[None]:
    """Put torch's global random state back at the end: initialisation and dropout draw from it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def note(text: str) -> None:
    """Say on stderr, once for all processes, what nobody asked for and somebody should know."""
    if first_process():
        terminal.note(text)


def first_process() -> bool:
    """Whether this is the only process or, before accelerate has counted them, the first that was launched."""
    return os.environ.get("RANK", "0") == "0"
