"""The batch posterior: a regression target with less chance in it ("stable target field", 2302.00670).

A state z = alpha x_i + s eps could have come from other samples of the batch too.  Among them

    w_j ~ N(z; alpha x_j, s^2)        x_bar = sum_j w_j x_j        eps_bar = (z - alpha x_bar)/s

and z = alpha x_bar + s eps_bar is the same state, so (x_bar, eps_bar) takes the place of (x_i, eps) in any loss.
x_bar is the exact posterior mean where the batch is all data there are.  Otherwise it is a self-normalised estimate of
it: biased by O(1/B), towards x_i, most at levels where few of the batch explain z; unbiased as B grows.
Where noise is weak w is 1 for i and nothing changes; where it is strong x_bar is the mean of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batch_posterior(x: Tensor, eps: Tensor, sigma: Tensor, cond: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """(x_bar, eps_bar) of the states that x and eps form at `sigma`, both `[B, *shape]`, among x themselves.

    Args:
        x: data `[B, *shape]`, float32 or better.
        eps: noise `[B, *shape]`.
        sigma: levels `[B]`, above 0.
        cond: conditions, each with one entry per sample: only samples of equal conditions count, which are draws of the
            data under that condition, null ones too.
    """
    data, noise, level = x.flatten(1), eps.flatten(1), sigma.to(x)[:, None]
    squares = torch.cdist(data, data, compute_mode="donot_use_mm_for_euclid_dist").square()
    inner = (noise * data).sum(1, keepdim=True) - noise @ data.mT
    logits = -(inner / level + squares / (2 * level.square())).fill_diagonal_(
        0.0
    )  # of z given x_j, over that given x_i
    for value in (cond or {}).values():
        rows = value.flatten(1) if value.ndim > 1 else value[:, None]
        logits = logits.masked_fill((rows[:, None] != rows[None]).any(2), -torch.inf)
    weights = logits.softmax(1).fill_diagonal_(0.0)
    # x - x_bar over the others alone: where their weights vanish it is 0, not a rounding error over sigma.
    away = weights.sum(1, keepdim=True) * data - weights @ data
    return (data - away).view_as(x), (noise + away / level).view_as(eps)
