"""Reference samplers: what plans are measured against.

Heun's method is no plan, since a step's second evaluation is not at a state of the grid:

    y* = y + (sigma' - sigma) e(y, sigma),    y' = y + (sigma' - sigma) (e(y, sigma) + e(y*, sigma')) / 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.noise import alpha_s
from logsnr.sampling.plan import check_sigmas
from logsnr.sampling.sample import Callback, Step, start


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    grid: Sequence[float],
    *,
    noise: Tensor | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    cond: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's deterministic second-order sampler (2206.00364, alg. 1), in y = z/alpha.

    A grid of n steps costs 2n evaluations, or 2n - 1 when it ends at sigma 0, whose step is the plain denoise.

    Args:
        denoiser: the model.
        grid: n + 1 decreasing, finite sigmas.
        noise: starting state z `[B, *shape]` at `grid[0]`; or
        batch: how many to draw.
        generator: source of the draws of `batch`.
        cond: conditions, passed on to the denoiser by keyword.
        callback: called with every state of the grid, n + 1 times, with the estimate of the step's first evaluation.

    Returns:
        The canonical state z at the last sigma `[B, *shape]`: the sample x itself when that is 0.

    Raises:
        ValueError: if the grid starts at inf or does not decrease, or the start does not fit.
    """
    sigmas = check_sigmas(grid)
    if math.isinf(sigmas[0]):
        raise ValueError("the grid starts at sigma = inf, where y = z/alpha is undefined: choose a finite sigma_max")
    z = start(denoiser, noise, batch, generator)
    conditions = {} if cond is None else dict(cond)
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        first: Estimate = denoiser(z, sigma, **conditions)
        if callback is not None:
            callback(Step(i, sigma, z, first))
        if target == 0:
            z = first.x0.to(z)
            continue
        (alpha, _), (alpha_, _) = alpha_s(sigma), alpha_s(target)
        kept, gain = z * (alpha_ / alpha), alpha_ * (target - sigma)
        second: Estimate = denoiser(kept.add(first.eps, alpha=gain), target, **conditions)
        z = kept.add_(first.eps, alpha=gain / 2).add_(second.eps, alpha=gain / 2)
    if callback is not None:
        callback(Step(len(sigmas) - 1, sigmas[-1], z, None))
    return z
