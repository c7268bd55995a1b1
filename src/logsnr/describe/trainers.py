"""Trainers: how musubi-tuner and SimpleTuner draw flow times.

    logit t = shift + scale n        lambda = -2 logit t ~ N(-2 ln shift, (2 scale)^2)     sigmoid, shift, *_shift
    logsnr                           lambda ~ N(mean, std^2)
    qinglong_*                       mixtures of a shift by the image's size, logsnr, and N(5.36, 1): nearly clean

Shifts by size are e^mu, mu linear in the number of tokens.  musubi-tuner's --min_timestep and --max_timestep squeeze
all of [0, 1] onto their range, t = a + (b - a) t', unless --preserve_distribution_shape draws again until t is in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.describe.flow import drawn_by_scheme, uniform
from logsnr.describe.training import Log
from logsnr.errors import LogsnrError
from logsnr.schedules.base import log_normal

Flags = Mapping[str, Any]
Drawn = tuple[Log, str, tuple[float, float]]

BY_SIZE = {
    "flux_shift": (256, 0.5, 4096, 1.15),
    "flux2_shift": (256, 0.5, 4096, 1.15),
    "qwen_shift": (256, 0.5, 8192, 0.9),
    "krea2_shift": (256, 0.5, 6400, 1.15),
}
"""(tokens, mu, tokens, mu): two points of the line."""
QINGLONG = {"qinglong_flux": ("flux_shift", 0.79, 0.11, 0.1), "qinglong_qwen": ("qwen_shift", 0.95, 0.0, 0.05)}
"""The shift, and the shares of shift, logsnr and clean."""
CLEAN = (5.36, 1.0)
"""Mean and standard deviation of log-SNR of qinglong's last share."""
WIDE = 60.0


def shift_of_size(sampling: str, resolution: str) -> float:
    """mu, the log of the shift, for images of a size in pixels."""
    x1, y1, x2, y2 = BY_SIZE[sampling]
    return y1 + (tokens(resolution) - x1) * (y2 - y1) / (x2 - x1)


def tokens(resolution: str) -> int:
    """Tokens of an image, "1024" or "1024,768" pixels, at 16 pixels a side."""
    width, height = sides(resolution)
    return (width // 16) * (height // 16)


def sides(resolution: str) -> tuple[int, int]:
    """Width and height of "1024" or "1024,768" pixels."""
    parts = [part.strip() for part in resolution.split(",")]
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) >= 16 for part in parts):
        raise LogsnrError(f"--resolution {resolution}: give a side or width,height in pixels, e.g. 1024 or 1024,768")
    return int(parts[0]), int(parts[-1])


def of_musubi(full: Flags) -> Drawn:
    """musubi-tuner's flow times."""
    density, words = _of_sampling(full)
    if "min_timestep" not in full and "max_timestep" not in full:
        return density, words, (-math.inf, math.inf)
    a, b = full.get("min_timestep", 0) / 1000, full.get("max_timestep", 1000) / 1000
    if not 0 <= a < b <= 1:
        raise LogsnrError(f"timesteps {1000 * a:g} ... {1000 * b:g}: give 0 <= min_timestep < max_timestep <= 1000")
    span = (_logsnr(b), _logsnr(a))
    words += f", timesteps {1000 * a:g} to {1000 * b:g}"
    if full.get("preserve_distribution_shape"):
        mass = _log_mass(density, span)
        return lambda x: torch.where((x >= span[0]) & (x <= span[1]), density(x) - mass, -math.inf), words, span
    return lambda x: _squeezed(density, x, a, b), f"{words}, squeezed", span


def of_simple_tuner(full: Flags) -> Drawn:
    """SimpleTuner's flow times: sigmoid, uniform or Beta, shifted."""
    move, shift = 0.0, float(full["flow_schedule_shift"])
    if shift > 0:
        move = math.log(shift)
    elif full.get("flow_schedule_auto_shift"):
        move = shift_of_size("flux_shift", full.get("resolution", "1024"))
    scale = full.get("flow_sigmoid_scale", 1.0)
    density: Log = lambda x: log_normal(x, 0.0, 2 * scale)  # noqa: E731
    words = f"flow times sigmoid({scale:g} n)"
    if full.get("flow_use_uniform_schedule"):
        density, words = uniform, "uniform flow times"
    elif full.get("flow_use_beta_schedule"):
        alpha, beta = full.get("flow_beta_schedule_alpha", 2.0), full.get("flow_beta_schedule_beta", 2.0)
        norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta) + math.log(2)
        density = lambda x: alpha * F.logsigmoid(-0.5 * x) + beta * F.logsigmoid(0.5 * x) - norm  # noqa: E731
        words = f"flow times Beta({alpha:g}, {beta:g})"
    words += f", shift {math.exp(move):.4g}" if move else ""
    return lambda x: density(x + 2 * move), words, (-math.inf, math.inf)


def _of_sampling(full: Flags) -> tuple[Log, str]:
    sampling, scale = full["timestep_sampling"], full.get("sigmoid_scale", 1.0)
    mean, std = full.get("logit_mean", 0.0), full.get("logit_std", 1.0)
    size = full.get("resolution", "1024")
    if sampling == "sigma":
        return drawn_by_scheme(full, shift=full.get("discrete_flow_shift", 1.0))[:2]
    if sampling == "uniform":
        return uniform, "uniform flow times"
    if sampling == "logsnr":
        return lambda x: log_normal(x, mean, std), f"log-SNR ~ N({mean:g}, {std:g}^2)"
    if sampling == "ideogram4_shift":
        width, height = sides(size)
        centre = -math.log(width * height / 512**2)
        return lambda x: log_normal(x, centre, 3.0), f"log-SNR ~ N({centre:.3g}, 3^2)"
    if sampling in QINGLONG:
        shift, *shares = QINGLONG[sampling]
        move = shift_of_size(shift, size)
        parts = [(-2 * move, 2 * scale), (mean, std), CLEAN]
        words = f"{shares[0]:.0%} flow times sigmoid({scale:g} n), shift {math.exp(move):.4g}"
        words += f", {shares[1]:.0%} log-SNR ~ N({mean:g}, {std:g}^2)" if shares[1] else ""
        words += f", {shares[2]:.0%} N({CLEAN[0]:g}, {CLEAN[1]:g})"
        used = [(share, part) for share, part in zip(shares, parts, strict=True) if share]
        return (
            lambda x: torch.logsumexp(torch.stack([log_normal(x, *p) + math.log(share) for share, p in used]), 0)
        ), words
    move = 0.0
    if sampling == "shift":
        move = math.log(full.get("discrete_flow_shift", 1.0))
    elif sampling in BY_SIZE:
        move = shift_of_size(sampling, size)
    words = f"flow times sigmoid({scale:g} n)" + (f", shift {math.exp(move):.4g}" if move else "")
    return lambda x: log_normal(x, -2 * move, 2 * scale), words


def _squeezed(density: Log, x: Tensor, a: float, b: float) -> Tensor:
    """ln p of log-SNR for t = a + (b - a) t', t' of a density: p(lambda) = p'(lambda') |dlambda'/dlambda|."""
    t = torch.sigmoid(-0.5 * x)
    inner = ((t - a) / (b - a)).clamp(1e-300, 1 - 1e-16)
    outer = torch.log(t) + F.logsigmoid(0.5 * x)
    rest = ((b - t) / (b - a)).clamp(min=1e-300) if b < 1 else torch.sigmoid(0.5 * x) / (1 - a)
    before = 2 * (rest.log() - inner.log())
    out = density(before) + outer - inner.log() - rest.log() - math.log(b - a)
    return torch.where((t >= a) & (t <= b), out, -math.inf)


def _log_mass(density: Log, span: tuple[float, float]) -> float:
    """ln of the mass within a range."""
    x = torch.linspace(max(span[0], -WIDE), min(span[1], WIDE), 40_001, dtype=torch.float64)
    mass = float(torch.trapezoid(density(x).exp(), x))
    if not mass > 0:
        raise LogsnrError(
            f"--preserve_distribution_shape: no time within log-SNR [{span[0]:.4g}, {span[1]:.4g}], the range of "
            "--min_timestep and --max_timestep, is ever drawn: give a wider range"
        )
    return math.log(mass)


def _logsnr(t: float) -> float:
    return math.inf if t == 0 else -math.inf if t == 1 else 2 * math.log((1 - t) / t)
