"""Inversion and interpolation: from data to the noise it comes from and back, and between two noises.

    invert       x -> z at sigma_max along the trajectory (`solve`, upwards);  reconstruct is its inverse
    ddim_invert  the noise from which a DDIM plan on the same grid arrives at x: each step read backwards is
                 y = y' - (sigma' - sigma) e(y, sigma), implicit in y and solved by fixed-point refinement
    interpolate  noises between two noises that are as normal as they are

The state at the smallest level is taken to be z = alpha x (y = x there), in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import unknown
from logsnr.noise import alpha_s
from logsnr.sampling.plan import check_sigmas
from logsnr.sampling.reference import consistent, solve
from logsnr.sampling.start import check_range, check_start, conditions_of, start

Between = Literal["slerp", "linear"]


def invert(
    denoiser: Denoiser,
    x: Tensor,
    *,
    sigma_range: tuple[float, float] | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """The noise z at the largest sigma whose trajectory ends at x `[B, *shape]`.

    Args:
        denoiser: the model.
        x: clean samples `[B, *shape]`; float64 for tolerances below 1e-5.
        sigma_range: (smallest, largest) sigma; None for the denoiser's `sampling_range`.
        rtol: relative tolerance per step of `solve`.
        atol: absolute tolerance per step.
        cond: conditions of x, passed on to the denoiser by keyword.

    Raises:
        ValueError: if the range does not increase, or as `solve`.
    """
    low, high = _range(denoiser, sigma_range)
    z = start(denoiser, x, name="x") * alpha_s(low)[0]
    return solve(denoiser, low, high, z, rtol=rtol, atol=atol, cond=cond).z


def reconstruct(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    sigma_range: tuple[float, float] | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """The sample x where the trajectory of a noise ends: the inverse of `invert`, with the same arguments.

    Raises:
        ValueError: as `invert`.
    """
    low, high = _range(denoiser, sigma_range)
    return solve(denoiser, high, low, noise, rtol=rtol, atol=atol, cond=cond).z / alpha_s(low)[0]


@torch.no_grad()
def ddim_invert(
    denoiser: Denoiser,
    x: Tensor,
    grid: Sequence[float],
    *,
    refine: int = 0,
    cond: Mapping[str, Any] | None = None,
) -> Tensor:
    """The noise z at `grid[0]` from which `solvers.ddim(grid)` arrives at x `[B, *shape]`.

    `refine = 0` is the usual DDIM inversion, one evaluation per step: the noise estimated at the lower level stands in
    for that at the upper one (from sigma 0, that of x scaled as a state of the upper level).  Every refinement is one
    evaluation more per step, at the upper level, and a fixed-point iteration towards the exact inverse.

    Args:
        denoiser: the model.
        x: states at `grid[-1]` `[B, *shape]`: clean samples where that is 0.
        grid: n + 1 decreasing sigmas, as for the plan.
        refine: fixed-point iterations per step.
        cond: conditions of x, passed on to the denoiser by keyword.

    Raises:
        ValueError: if the grid does not decrease, starts at inf with a model undefined there, x does not fit, refine is
            negative, or the denoiser moves the state (CFG++).
    """
    sigmas = check_sigmas(grid)
    if refine < 0:
        raise ValueError(f"refine = {refine}: must be at least 0")
    check_start(denoiser, sigmas[0])
    check_range(denoiser, [sigma for sigma in sigmas if sigma > 0])
    z = start(denoiser, x, name="x")
    conditions = conditions_of(denoiser, cond, len(z))

    def eps(state: Tensor, sigma: float) -> Tensor:
        return consistent(denoiser(state, sigma, **conditions)).eps.to(state)

    for low, high in pairwise(sigmas[::-1]):
        (alpha, _), (alpha_, s_) = alpha_s(low), alpha_s(high)
        kept, gain = z * (alpha_ / alpha), s_ - alpha_ * low  # alpha' (sigma' - sigma), also at sigma' = inf
        z = kept.add(eps(z, low) if low > 0 else eps(kept, high), alpha=gain)
        for _ in range(refine):
            z = kept.add(eps(z, high), alpha=gain)
    return z


def interpolate(a: Tensor, b: Tensor, t: float | Tensor, mode: Between = "slerp") -> Tensor:
    """Noises between `a` (t = 0) and `b` (t = 1), each a batch `[B, *shape]`.

    `"slerp"` goes along the great circle: [sin((1-t) w) a + sin(t w) b] / sin w with w the angle between the two, so
    equal norms are kept.  `"linear"` is the chord brought back to unit variance, [(1-t) a + t b] / sqrt((1-t)^2 + t^2):
    exactly normal for independent normal a and b.  In high dimension the two run through the same noises.

    Args:
        a: noises `[B, *shape]`.
        b: noises of the same shape.
        t: one number in [0, 1], or a tensor `[T]` of them.
        mode: `"slerp"` or `"linear"`.

    Returns:
        `[B, *shape]`, or `[T, B, *shape]` for a tensor t.

    Raises:
        ValueError: if shapes differ, t leaves [0, 1], or the mode is unknown.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"noises of shape {tuple(a.shape)} and {tuple(b.shape)}: give two batches [B, *shape]")
    if mode not in get_args(Between):
        raise unknown("mode", mode, get_args(Between))
    times = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    if times.ndim > 1 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"t = {t}: give one number in [0, 1], or a tensor [T] of them")
    times = times.reshape(*times.shape, *[1] * a.ndim)
    if mode == "linear":
        wa, wb = 1 - times, times
        norm = torch.hypot(wa, wb)
        return (wa / norm) * a + (wb / norm) * b
    w = _angle(a, b)
    # Parallel noises have no great circle: there the chord is the arc.
    straight = w.sin() < 1e-6
    sine = torch.where(straight, torch.ones_like(w), w.sin())
    wa = torch.where(straight, 1 - times, ((1 - times) * w).sin() / sine)
    wb = torch.where(straight, times, (times * w).sin() / sine)
    return wa * a + wb * b


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between the samples of two batches `[B, 1, ...]`, accurate at small angles too (Kahan's form)."""
    u, v = (n / n.norm(dim=1, keepdim=True).clamp(min=torch.finfo(n.dtype).tiny) for n in (a.flatten(1), b.flatten(1)))
    w = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    return w.reshape(-1, *[1] * (a.ndim - 1))


def _range(denoiser: Denoiser, sigma_range: tuple[float, float] | None) -> tuple[float, float]:
    low, high = denoiser.sampling_range if sigma_range is None else sigma_range
    if not 0 <= low < high <= math.inf:
        raise ValueError(f"sigma_range = ({low}, {high}): give (smallest, largest) with 0 <= smallest < largest")
    return low, high
