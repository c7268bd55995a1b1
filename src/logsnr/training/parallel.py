"""Layouts: how a network lies over processes, and what its blocks do to save memory and time.

    ddp      every process holds all weights and adds up gradients            (DistributedDataParallel, by accelerate)
    fsdp     process r of N holds 1/N of every weight, gradient, moment and average; the weights of a block are
             gathered when it runs, and let go after it                       (torch's fully_shard)

A block is a member of one of the network's outermost module lists: a level of a U-Net, a layer of a transformer.  It is
what is gathered at one time, what is computed again, and what is compiled; the layer that answers is in none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logsnr.errors import LogsnrError
from logsnr.gradients import output_layer
from logsnr.training.config import Recipe


def blocks(network: nn.Module) -> list[nn.Module]:
    """The network's blocks, in the order in which they are registered."""
    last = output_layer(network)
    found = list(_members(network))
    return [block for block in found if not any(inner is last for inner in block.modules())]


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists inside, and of lists in those."""
    for inner in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(inner, nn.ModuleList):
            yield inner
        else:
            yield from _members(inner)


def lay_out(network: nn.Module, recipe: Recipe, *, sharded: bool, accelerator: Any) -> nn.Module:
    """Prepare a network for training in place, on the accelerator's device; the module to call.

    Args:
        network: bare, on the CPU where it is to be sharded.
        recipe: what its blocks do.
        sharded: whether each process keeps its part alone.
        accelerator: of precision and processes.
    """
    if recipe.recompute or recipe.compile:
        for block in blocks(network):
            if recipe.recompute:
                _recompute(block)
            if recipe.compile:
                block.compile()
    called: nn.Module = accelerator.prepare_model(network, device_placement=False, evaluation_mode=sharded)
    if sharded:
        shard(network, accelerator)
    return called


def shard(network: nn.Module, accelerator: Any) -> None:
    """Leave each process its part of a network's weights, on the accelerator's device.

    Raises:
        LogsnrError: if this version of PyTorch cannot.
    """
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: F401
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise LogsnrError(
            f"parallel: fsdp needs PyTorch 2.9 or newer, this is {torch.__version__}: pip install -U torch, or set "
            "parallel: ddp"
        ) from error
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = again


@contextlib.contextmanager
def no_exchange(called: nn.Module) -> Iterator[None]:
    """Let gradients add up on each process; those of a backward pass outside are exchanged with them.

    Args:
        called: what `lay_out` answered with.
    """
    module: Any = called
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(False)
        yield
        module.set_requires_gradient_sync(True)
    elif hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of it where it is not sharded."""
    part: Any = tensor
    return part.to_local() if hasattr(part, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, every process has to ask."""
    part: Any = tensor
    return part.full_tensor() if hasattr(part, "full_tensor") else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process holds, sharded as another is."""
    pattern: Any = like
    if not hasattr(pattern, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def shared_failure(error: LogsnrError | None, elsewhere: str) -> None:
    """Raise what went wrong on this process, or, where it was on another, what is said of it elsewhere.

    Raises:
        LogsnrError: on every process, if it was given to any.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found: list[bool] = [False] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, error is not None)
        if any(found) and error is None:
            raise LogsnrError(elsewhere)
    if error is not None:
        raise error
