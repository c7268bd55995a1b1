"""A pretended accelerator: tensors that say they are on "meta" and hold their values in this machine's memory.

    with Pretended() as machine:
        x = torch.randn(3).to("meta")
        x + torch.ones(3)                 # RuntimeError: two devices
        x.tolist(); machine.reads         # 1: values that were read back

What a real accelerator refuses is refused here too: operators that mix devices (tensors without axes excepted), draws
from a generator of another device, NumPy's views.  Values are the CPU's (attention by its formula, not by its
kernel), so whatever runs there has to give what it gives here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
"""The one device besides the CPU that every build of PyTorch knows how to switch to."""
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor)
READS = (aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.nonzero.default)


class Elsewhere(Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.held!r})"

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert meta device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        counted()
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return performed(func, args, kwargs or {})


_MACHINES: list[Pretended] = []


def counted() -> None:
    if _MACHINES:
        _MACHINES[-1].reads += 1


def performed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator, on the values."""
    there = set()  # which tensors with axes are on the device, and which are not
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Elsewhere) or (isinstance(value, Tensor) and (value.ndim or func in COPIES)):
            there.add(isinstance(value, Elsewhere))
    target, inner = kwargs.get("device"), dict(kwargs)
    placed = True in there if target is None else torch.device(target) == DEVICE
    if target is not None and placed:
        inner["device"] = torch.device("cpu")
    if func not in COPIES and len(there) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found meta and cpu")
    if func in READS and True in there:
        counted()
    if placed and kwargs.get("generator") is not None:
        raise RuntimeError("expected a 'meta' device type for generator but found 'cpu'")
    plain_args, plain_kwargs = tree_map(lambda v: v.held if isinstance(v, Elsewhere) else v, (args, inner))
    out = func(*plain_args, **plain_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not placed:
        return out
    wrapped = tree_map(lambda v: Elsewhere(v) if isinstance(v, Tensor) else v, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if True in there else wrapped


class _Moved(torch.autograd.Function):
    """`Tensor.to` of a build without accelerators would refuse; this carries the values over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.came = x.device, x.dtype
        held = (x.held if isinstance(x, Elsewhere) else x).to(dtype, copy=True)
        return Elsewhere(held) if device.type == DEVICE.type else held

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Moved.apply(grads[0], *ctx.came), None, None


def moved(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """`x.to(...)`."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    copy = options.pop("copy", False)
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **options)
    device, dtype = x.device if device is None else device, dtype or x.dtype
    if (device.type, dtype) == (x.device.type, x.dtype):
        return x.clone() if copy else x
    return _Moved.apply(x, device, dtype)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return performed(func, args, kwargs or {})


class Pretended(TorchFunctionMode):
    """The machine with the pretended device, while it is entered.

    Attributes:
        reads: how often a value was read back from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __enter__(self) -> Pretended:
        _MACHINES.append(self)
        self._operators = _Operators()
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._operators.__exit__(*raised)
        _MACHINES.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.Tensor.to:
            return moved(*args, **options)
        if func is torch.Tensor.cpu:
            return moved(args[0], "cpu")
        if func in (torch.tensor, torch.as_tensor) and options.get("device") is not None:
            device = options.pop("device")
            return moved(func(*args, **options), device)
        if func is torch.Tensor.item and isinstance(args[0], Elsewhere):
            counted()
            return args[0].held.item()
        return func(*args, **options)
