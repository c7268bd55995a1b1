"""Flow: how scripts draw flow times t, as densities of log-SNR lambda = -2 logit t, and what they multiply by.

    t uniform                            sech^2(lambda/4)/8
    logit t ~ N(m, s^2)                  N(lambda; -2 m, (2 s)^2)
    mode sampling, u uniform             t = 1 - u - scale (cos^2(pi u/2) - 1 + u)          (2403.03206, eq. 20)
    t -> shift t/(1 + (shift - 1) t)     any of them moved by -2 ln(shift)

The schemes of `--weighting_scheme` are SD3's, in diffusers' scripts and in kohya's: logit_normal and mode are
densities, sigma_sqrt and cosmap factors on the squared error, t^-2 and 1/(1 - 2 t + 2 t^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.describe.training import Log
from logsnr.errors import LogsnrError
from logsnr.schedules.base import log_normal, log_sech

MODE_SCALE = 1.29
"""Of mode sampling, where a script is not told."""


def uniform(x: Tensor) -> Tensor:
    """ln p of log-SNR for uniform flow times."""
    return 2 * log_sech(0.25 * x) - math.log(8)


def drawn_by_scheme(
    flags: Mapping[str, Any], *, shift: float = 1.0, backwards: bool = True
) -> tuple[Log, str, tuple[float, float]]:
    """ln p of a `--weighting_scheme` with its parameters, in words, and its range.

    Args:
        flags: of the script.
        shift: of the flow times that it draws.
        backwards: whether its quantile u indexes a decreasing table: t = 1 - u, so the mean changes sign.

    Raises:
        LogsnrError: for a mode_scale at which two u have one t.
    """
    scheme, move, density, words = flags["weighting_scheme"], 2 * math.log(shift), uniform, "uniform flow times"
    if scheme == "logit_normal":
        mean, std = flags.get("logit_mean", 0.0), flags.get("logit_std", 1.0)
        density = lambda x: log_normal(x, 2 * mean if backwards else -2 * mean, 2 * std)  # noqa: E731
        words = "logit-normal flow times"
    elif scheme == "mode":
        scale = flags.get("mode_scale", MODE_SCALE)
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise LogsnrError(f"--mode_scale {scale}: give a number in -1 ... 1.75, or noise levels fold over")
        density = lambda x: _mode(x, scale)  # noqa: E731  # The same backwards: t(1 - u) = 1 - t(u).
        words = "flow times by mode sampling"
    words += "" if shift == 1 else f", shift {shift:g}"
    return lambda x: density(x + move), words, (-math.inf, math.inf)


def scheme_factor(scheme: str, x: Tensor) -> Tensor:
    """ln of what a scheme multiplies the squared error by."""
    log_t = log_time(x)
    if scheme == "sigma_sqrt":
        return -2 * log_t
    if scheme == "cosmap":
        return -(1 - 2 * log_t.exp() + 2 * (2 * log_t).exp()).log()
    return torch.zeros_like(x)


def log_time(x: Tensor) -> Tensor:
    """ln t."""
    return F.logsigmoid(-0.5 * x)


def _mode(x: Tensor, scale: float) -> Tensor:
    t = torch.sigmoid(-0.5 * x)
    lo, hi = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = 0.5 * (lo + hi)
        above = 1 - u - scale * ((0.5 * math.pi * u).cos().square() - 1 + u) > t
        lo, hi = torch.where(above, u, lo), torch.where(above, hi, u)
    slope = 1 + scale * (1 - 0.5 * math.pi * (math.pi * 0.5 * (lo + hi)).sin())
    return F.logsigmoid(-0.5 * x) + F.logsigmoid(0.5 * x) - math.log(2) - slope.clamp(min=1e-12).log()
