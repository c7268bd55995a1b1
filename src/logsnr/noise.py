"""The one coordinate: noise level as sigma or log-SNR, and the scalings of a noisy state.

    z = alpha x + s eps,    alpha = 1/sqrt(1 + sigma^2),    s = sigma/sqrt(1 + sigma^2)

`sigma` is the noise-to-signal ratio in [0, inf] and `logsnr = -2 ln sigma`.  `z` is the canonical, bounded
noisy state: z = x at sigma 0, z = eps at sigma inf.  The other conventions of the field are z times a scalar:

    VP    z                    (DDPM, DDIM, Stable Diffusion)
    VE    z / alpha            (NCSN, EDM, k-diffusion): x + sigma eps
    flow  z / (alpha + s)      (rectified flow, SD3, Flux): (1 - t) x + t eps,  t = sigma/(1 + sigma)

Every function takes a Python float (and answers with one: host arithmetic in float64) or a tensor of any shape
(elementwise, on its device and in its dtype), and is exact at both ends, sigma 0 and sigma inf.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Level = TypeVar("Level", float, Tensor, "float | Tensor")
"""A noise level, or a scalar of it: one host float, or a tensor with a value per sample."""

Path = Literal["vp", "ve", "flow"]
PATHS: tuple[Path, ...] = ("vp", "ve", "flow")


def logsnr_from_sigma(sigma: Level) -> Level:
    """-2 ln sigma: log-SNR of a noise-to-signal ratio (inf at 0, -inf at inf)."""
    if isinstance(sigma, Tensor):
        return -2 * sigma.log()
    return math.inf if sigma == 0 else -2 * math.log(sigma)


def sigma_from_logsnr(logsnr: Level) -> Level:
    """exp(-logsnr / 2): noise-to-signal ratio of a log-SNR."""
    if isinstance(logsnr, Tensor):
        return (-0.5 * logsnr).exp()
    return math.exp(-0.5 * logsnr) if logsnr > -1400 else math.inf


def alpha_s(sigma: Level) -> tuple[Level, Level]:
    """Signal and noise amplitudes (alpha, s) with alpha^2 + s^2 = 1; (1, 0) at sigma 0 and (0, 1) at inf."""
    if isinstance(sigma, Tensor):
        one = torch.ones_like(sigma)
        return 1 / torch.hypot(one, sigma), 1 / torch.hypot(one, 1 / sigma)
    if sigma == 0:
        return 1.0, 0.0
    return 1 / math.hypot(1.0, sigma), 1 / math.hypot(1.0, 1 / sigma)


def alpha_s_from_logsnr(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, s) = sqrt(sigmoid(+-logsnr)), formed in the log domain: no overflow at any log-SNR."""
    return (0.5 * F.logsigmoid(logsnr)).exp(), (0.5 * F.logsigmoid(-logsnr)).exp()


def path_scale(path: Path, alpha: Level, s: Level) -> Level:
    """The scalar k with `noisy state of that path = k z`; inf for VE at sigma inf, where VE has no state."""
    if path == "vp":
        return alpha * 0 + 1
    if path == "flow":
        return 1 / (alpha + s)
    if isinstance(alpha, Tensor):
        return 1 / alpha
    return 1 / alpha if alpha > 0 else math.inf


def flow_time(sigma: Level) -> Level:
    """Time t = sigma / (1 + sigma) of the flow path (1 - t) x + t eps, in [0, 1]."""
    if isinstance(sigma, Tensor):
        return 1 / (1 + 1 / sigma)
    return 0.0 if sigma == 0 else 1 / (1 + 1 / sigma)


def sigma_from_flow_time(t: Level) -> Level:
    """sigma = t / (1 - t); inf at t = 1."""
    if isinstance(t, Tensor):
        return t / (1 - t)
    return math.inf if t == 1 else t / (1 - t)


def covers(inside: tuple[float, float], low: float, high: float) -> bool:
    """Whether noise levels from low to high lie inside a range of sigmas; one percent either way is rounding.

    A table that ends at 157.4 fits a nominal 157.
    """
    return low >= 0.99 * inside[0] and high <= 1.01 * inside[1]


def per_sample(value: float | Tensor, z: Tensor) -> float | Tensor:
    """Shape a noise level `[B]` (or a scalar) so that it broadcasts over states `z [B, *shape]`.

    Raises:
        ValueError: if a tensor level has neither one value nor one per sample.
    """
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 or value.numel() == 1:
        return value.reshape(())
    if value.shape != z.shape[:1]:
        raise ValueError(
            f"a noise level of shape {tuple(value.shape)} does not fit a batch of {z.shape[0]}: "
            f"give one value, or one per sample as a tensor of shape ({z.shape[0]},)"
        )
    return value.reshape(-1, *[1] * (z.ndim - 1))
