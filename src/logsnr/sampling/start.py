"""The start of a run: its first state, its conditions, and what is refused before the network is asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.errors import LogsnrError
from logsnr.sampling.batches import Cond, lengths
from logsnr.sampling.plan import Plan

if TYPE_CHECKING:
    from logsnr.sampling.gaussian import GaussianStart

GENERATOR = "give generator=torch.Generator().manual_seed(0)"
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""The source of every draw: one for all samples, or one for each (`sampling.streams`)."""


def start(
    denoiser: Denoiser,
    noise: Tensor | None,
    n: int | None = None,
    generator: Generators | None = None,
    name: str = "noise",
) -> Tensor:
    """The starting state `[B, *shape]` on the denoiser's device: the noise given, in at least float32, or `n` draws.

    Raises:
        ValueError: if not exactly one of noise and n is given, noise does not fit, or a generator is missing, or there
            is not one for each.
    """
    shape = tuple(denoiser.shape)
    if (noise is None) == (n is None):
        raise ValueError("give either noise, the starting state, or n, how many to draw; not both, not neither")
    if noise is not None:
        if not noise.is_floating_point():
            raise ValueError(f"{name} has dtype {noise.dtype}: give a floating-point tensor")
        if tuple(noise.shape[1:]) != shape or noise.ndim != len(shape) + 1:
            raise ValueError(f"{name} has shape {tuple(noise.shape)}: give [B, {', '.join(map(str, shape))}]")
        check_generators(generator, len(noise))
        return noise.to(denoiser.device, torch.promote_types(noise.dtype, torch.float32))
    assert n is not None
    if n < 1:
        raise ValueError(f"n = {n}: must be at least 1")
    if generator is None:
        raise ValueError(f"n = {n} draws noise: {GENERATOR}")
    check_generators(generator, n)
    model = next((t for t in (*denoiser.parameters(), *denoiser.buffers()) if t.is_floating_point()), None)
    dtype = torch.float32 if model is None else torch.promote_types(model.dtype, torch.float32)
    return randn(torch.empty(n, *shape, dtype=dtype, device=denoiser.device), generator)


def check_generators(generator: Generators | None, n: int) -> None:
    """Refuse a sequence that has not one generator per sample.

    Raises:
        ValueError: naming both numbers.
    """
    if generator is not None and not isinstance(generator, torch.Generator) and len(generator) != n:
        raise ValueError(f"{len(generator)} generators for {n} samples: give one for all, or one per sample")


def randn(like: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal noise drawn on the generator's device, moved to that of `like`; of each sample from its own."""
    if generator is None or isinstance(generator, torch.Generator):
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    rows = [torch.randn(like.shape[1:], generator=own, device=own.device, dtype=like.dtype) for own in generator]
    return torch.stack(rows).to(like.device)


def conditions_of(denoiser: Denoiser, cond: Cond | None, n: int) -> dict[str, Any]:
    """The conditions of n samples, on the denoiser's device.

    Raises:
        ValueError: if one has not one entry per sample, or the denoiser does not take it (`Denoiser.check_cond`).
    """
    given = dict(cond or {})
    if not torch.compiler.is_compiling():
        for name, length in lengths(given).items():
            if length != n:
                raise ValueError(
                    f"condition {name} has {length} entries for {n} samples: give one entry per sample"
                    + (f", e.g. {name}.expand({n}, ...)" if length == 1 else "")
                )
        denoiser.check_cond(given)
        device = denoiser.device
        given = {name: on(value, device) for name, value in given.items()}
    return given


def brought(denoiser: Denoiser, plan: Plan, z: Tensor, cond: Cond, gaussian: GaussianStart | None) -> Tensor:
    """The state at the plan's first level: the noise itself, or where the Gaussian start brings it.

    Raises:
        LogsnrError: if the plan needs a start and has none or another one, begins above the model's largest level, or
            the start is none of this model.
    """
    needs: Mapping[str, Any] | None = plan.meta.get("start")
    first = plan.sigmas[0]
    if gaussian is None and needs and "tail" not in plan.meta:
        gaussian = denoiser.start
    if gaussian is None:
        if needs and "tail" not in plan.meta:
            raise LogsnrError(
                f"this plan begins at sigma {first:.4g} where a Gaussian start leads, not at noise: give start=, the "
                "GaussianStart that it was calibrated with (GaussianStart.load reads its file)"
            )
        return z
    gaussian.check(denoiser)
    if needs and needs["fingerprint"] != (own := gaussian.fingerprint):
        raise LogsnrError(
            f"this plan was calibrated with another start ({needs['fingerprint'][:12]}..., this one is {own[:12]}...): "
            "give that one, or calibrate with this"
        )
    top = float(needs["sigma_from"]) if needs else denoiser.sampling_range[1]
    if first > 1.01 * top:
        raise LogsnrError(
            f"the plan begins at sigma {first:.6g}, above the model's largest level, {top:.6g}, from which the start "
            "leads down: give a plan that begins below, or leave start out"
        )
    return gaussian(z, min(first, top), cond, sigma_from=top)


def check_start(denoiser: Denoiser, sigma: float) -> None:
    """Refuse a start at sigma inf for a model that knows nothing there.

    Raises:
        ValueError: if sigma is inf and the model is undefined at inf.
    """
    if sigma == math.inf and not denoiser.finite_at_inf:  # not isinf: compilers trace the comparison
        raise ValueError(
            "the plan starts at sigma = inf (zero terminal SNR), where this model is undefined: an eps or score "
            "network says nothing of x in pure noise; choose a grid with a finite sigma_max, or a v, x0, flow or "
            "EDM network"
        )


def check_range(denoiser: Denoiser, sigmas: Sequence[float]) -> None:
    """Warn (UserWarning) of evaluations outside the denoiser's `trained_range`; the caller goes on.

    One percent either way is rounding, and sigma inf counts as 100 (`Denoiser.covers`).
    """
    lo, hi = denoiser.trained_range
    low, high = min(sigmas), max(sigmas)
    if not denoiser.covers(low, high):
        outside = low if denoiser.covers(max(low, lo), high) else high
        warnings.warn(
            f"sigma = {outside:.6g} is outside the range [{lo:.6g}, {hi:.6g}] that this denoiser was trained on: its "
            "answers there are extrapolation; choose a grid within denoiser.sampling_range",
            UserWarning,
            stacklevel=4,
        )
