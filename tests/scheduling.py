"""What the tests of the scheduler share: a network, a loop, and the same network as a denoiser."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr.denoiser import Estimate
from logsnr.noise import alpha_s

pytest.importorskip("diffusers")

from logsnr.adapters import GradientEstimationScheduler as Scheduler

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
SHAPE = (2, 3, 8, 8)


def state(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(0.8 * x + 0.1 * torch.sin(torch.as_tensor(t, dtype=torch.float32) / 100)).to(x.dtype)


def loop(scheduler: Any, x: Tensor, timesteps: Tensor | None = None, **options: Any) -> Tensor:
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **options)[0]
    return x


def made(kind: str = "epsilon", **options: Any) -> Any:
    return Scheduler(**({} if kind == "flow_prediction" else SD), prediction_type=kind, **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


class ByFormula(ls.Denoiser):
    """The test network as a denoiser, with x0 changed as the scheduler's options say."""

    shape = SHAPE[1:]
    sigma_data = 1.0
    trained_range = (0.0, math.inf)

    def __init__(self, scheduler: Any, limit: Any = None) -> None:
        super().__init__()
        self.model, self.limit = scheduler.model, limit

    def forward(self, z: Tensor, sigma: Any, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma)
        out = network(z * self.model.scale(sigma), torch.tensor(self.model.timestep(sigma), dtype=torch.float32))
        (a, b), (c, d) = self.model.prediction.x0_row(alpha, s), self.model.prediction.eps_row(alpha, s)
        x0, eps = a * z + b * out, c * z + d * out
        if self.limit is None:
            return Estimate(x0, eps)
        x0 = self.limit(x0)
        return Estimate(x0, eps, state=alpha * x0 + s * eps)
