"""The table of a model: the discrete levels that timestep grids and diffusers' schedulers count on.

A model whose label is a table of timesteps brings its own, cut to the levels it was trained on.  Any other gets the
levels of a VP process with linear betas, b0 + (b1 - b0) t (2011.13456; diffusers' default betas discretise it),
between the ends of its sampling range.  2520 of them: schedulers that step by T // n then land on levels for every n
up to 10, and 12, 14, 15, 18, 20, 21, 24, 28, 30.
"""

from __future__ import annotations

import math

import torch

from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.noise import covers
from logsnr.predictions import LABELS
from logsnr.schedules import VPLinear
from logsnr.timesteps import TimestepTable

LEVELS = 2520
VP = VPLinear(0.1, 20.0)


def table_of(denoiser: Denoiser, sigma_range: tuple[float, float] | None = None) -> TimestepTable:
    """The model's own table within (smallest, largest), or a fine one between them; the top is always finite.

    Without a range it is the model's sampling range.
    """
    low, high = sigma_range or denoiser.sampling_range
    for module in denoiser.modules():  # a guided denoiser holds the one that it guides
        if isinstance(module, NetworkDenoiser):
            label = module.prediction.label
            known = LABELS[label] if isinstance(label, str) else label
            if isinstance(known, TimestepTable):
                inside = [s < math.inf and covers((low, high), s, s) for s in known.sigmas.tolist()]
                if sum(inside) >= 2:
                    return TimestepTable(known.alphas_cumprod[inside], name=known.name)
    return _vp(low, high)


def _vp(low: float, high: float) -> TimestepTable:
    """abar = exp(-B), B = b0 t + (b1 - b0) t^2/2 = ln(1 + sigma^2), at even t between two noise levels."""
    first, last = VP.beta_time(torch.tensor([low, high], dtype=torch.float64).square().log1p()).tolist()
    t = torch.linspace(first, last, LEVELS, dtype=torch.float64)
    return TimestepTable((-VP.beta_integral(t)).exp(), name="linear betas")
