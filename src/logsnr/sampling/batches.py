"""Batches: samples in chunks, each with its conditions.

A condition holds one entry per sample (a tensor `[N, ...]`, or a mapping of such), or belongs to all of them (anything
else: a number, a string, a tensor without axes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate, Lazy
from logsnr.errors import LogsnrError

Cond = Mapping[str, Any]
"""Conditions by the keyword that the denoiser takes them by."""


def take(cond: Cond | None, part: slice | Tensor) -> dict[str, Any]:
    """The conditions of some samples: a slice, a mask or indices."""
    return {name: _take(value, part) for name, value in (cond or {}).items()}


def _take(value: Any, part: slice | Tensor) -> Any:
    if isinstance(value, Mapping):
        return take(value, part)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[part.to(value.device) if isinstance(part, Tensor) else part]


def chunks(n: int, chunk: int, cond: Cond | None = None) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Slices of at most `chunk` of n samples, in order, each with its conditions."""
    for first in range(0, n, chunk):
        part = slice(first, min(first + chunk, n))
        yield part, take(cond, part)


def lengths(cond: Cond | None) -> dict[str, int]:
    """Number of entries of every condition that has one per sample, by name."""
    found: dict[str, int] = {}
    for name, value in (cond or {}).items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": n for inner, n in lengths(value).items()}
        elif isinstance(value, Tensor) and value.ndim:
            found[name] = len(value)
    return found


def in_turn(cond: Cond | None, index: Tensor) -> dict[str, Any]:
    """The conditions of samples `index [N]`: the entries given, over and over.

    Raises:
        LogsnrError: if two conditions have different numbers of entries, or none.
    """
    rows = lengths(cond)
    if not rows:
        return dict(cond or {})
    if len(set(rows.values())) > 1 or min(rows.values()) < 1:
        raise LogsnrError(
            f"conditions have different numbers of rows ({', '.join(f'{k}: {v}' for k, v in rows.items())}): give "
            "every tensor one row per sample, at least 1; they are used in turn"
        )
    return take(cond, index % next(iter(rows.values())))


def ask(denoiser: Denoiser, z: Tensor, sigma: float, cond: Cond, chunk: int | None = None) -> Estimate:
    """The denoiser's answer, from calls of at most `chunk` samples each."""
    if chunk is None or chunk >= len(z):
        whole: Estimate = denoiser(z, sigma, **cond)
        return whole
    parts: list[Estimate] = [denoiser(z[part], sigma, **given) for part, given in chunks(len(z), chunk, cond)]

    def joined(name: str) -> Lazy:
        return lambda: torch.cat([getattr(part, name) for part in parts])

    moves = parts[0].state is not None
    return Estimate(joined("x0"), joined("eps"), joined("velocity"), joined("state") if moves else None)
