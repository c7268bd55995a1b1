"""Devices, precisions and processes: where a network runs, in how many bits, and beside how many others.

auto              the accelerator of this machine: a GPU of CUDA or ROCm, else Apple's, else the CPU; of several
                  processes that a launcher started here, each has the GPU of its LOCAL_RANK
cpu, cuda, cuda:1, mps, ...      as PyTorch calls them
fp32, bf16, fp16  of the network alone: states, noise, targets and losses stay in at least float32
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, unknown

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by name."""


def find_device(device: str | torch.device | None, *, float64: bool = False) -> torch.device:
    """The device of a name; "auto" is the accelerator of this machine, None the CPU.

    Args:
        device: the name.
        float64: whether what is to be done there needs float64, which Apple's GPUs lack.

    Raises:
        LogsnrError: if it is no device, this machine has it not, or it lacks float64.
    """
    if device is None:
        return torch.device("cpu")
    if device == AUTO:
        if torch.cuda.is_available():
            return _own_gpu()
        return torch.device("mps" if torch.backends.mps.is_available() and not float64 else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LogsnrError(f"device {str(device)!r} is none: give auto, cpu, cuda, cuda:0 or mps") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise LogsnrError(f"device {device}: this machine has {_counted(count)}; give auto, cpu" + _others(count))
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise LogsnrError("device mps: this is no Apple machine with a GPU that PyTorch can use; give auto or cpu")
    if found.type == "mps" and float64:
        raise LogsnrError("device mps has no float64, in which this measures: give auto or cpu")
    return _own_gpu() if found == torch.device("cuda") else found


def _own_gpu() -> torch.device:
    local = os.environ.get("LOCAL_RANK", "")
    index = int(local) % torch.cuda.device_count() if local.isdigit() else torch.cuda.current_device()
    return torch.device("cuda", index)


def _counted(count: int) -> str:
    return "no CUDA device that PyTorch can use" if count == 0 else f"{count} CUDA device{'s' if count > 1 else ''}"


def _others(count: int) -> str:
    return "".join(f" or cuda:{index}" for index in range(min(count, 8)))


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None stays None.

    Raises:
        LogsnrError: if it is none of `DTYPES`.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        if dtype is not None and not dtype.is_floating_point:
            raise LogsnrError(f"dtype {dtype}: give a floating-point type, {', '.join(DTYPES)}")
        return dtype
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return DTYPES[dtype]


def told(device: torch.device) -> str:
    """A device in words, with the name of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def on(value: Any, device: torch.device) -> Any:
    """A tensor, or a mapping of such, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value if value.device == device or value.ndim == 0 else value.to(device)
    if isinstance(value, Mapping):
        return {name: on(inner, device) for name, inner in value.items()}
    return value


def find_process(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """(rank, world): which process this is, of how many; as torchrun and accelerate say where it is not given.

    Raises:
        LogsnrError: if the two do not fit.
    """
    found = []
    for name, given, usual in (("RANK", rank, 0), ("WORLD_SIZE", world, 1)):
        text = os.environ.get(name, "")
        if given is None and text and not text.isdigit():
            raise LogsnrError(f"{name}={text!r}: give a whole number, or unset it")
        found.append(given if given is not None else int(text or usual))
    if not 0 <= found[0] < found[1]:
        raise LogsnrError(f"process {found[0]} of {found[1]} (RANK, WORLD_SIZE): processes are numbered from 0")
    return found[0], found[1]
