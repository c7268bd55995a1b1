"""Flow times that trainers draw, and that a described density is theirs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from logsnr.describe import resolve
from logsnr.describe.training import Trained

Times = Callable[[Tensor], Tensor]


def flags(text: str) -> Trained:
    return resolve(text.split())


def shifted(t: Tensor, shift: float) -> Tensor:
    return (t * shift) / (1 + (shift - 1) * t)


def assert_drawn(text: str, normal: dict[str, Times], uniform: dict[str, Times]) -> None:
    """p(lambda) = p(n) |dn/dlambda|, by differentiating t(n) of a normal n, or of a uniform one."""
    if text in normal:
        n = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
        t, log_p = normal[text](n), -0.5 * n.detach() ** 2 - 0.5 * math.log(2 * math.pi)
    else:
        n = torch.linspace(0.01, 0.99, 61, dtype=torch.float64, requires_grad=True)
        t, log_p = uniform[text](n), torch.zeros(61, dtype=torch.float64)
    logsnr = 2 * ((1 - t) / t).log()
    (slope,) = torch.autograd.grad(logsnr.sum(), n)
    found = flags(text).log_density(logsnr.detach())
    torch.testing.assert_close(found, log_p - slope.abs().log(), rtol=1e-9, atol=1e-9)
