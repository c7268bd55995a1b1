"""Optimizers: AdamW, any other class of torch.optim, and the learning rate of a step.

rate(n) = lr min(1, (n + 1)/warmup) f(n)

constant        f = 1
linear          f = 1 - n/steps
cosine          f = (1 + cos(pi n/steps))/2
inverse-sqrt    f = min(1, sqrt(after/(n + 1)))          after the warm-up, or as many steps as `after` says
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.training.sections import OptimizerConfig

PREFIX = "torch.optim:"
OWN = ("lr", "params", "maximize", "differentiable")
"""Arguments that a recipe does not set here."""

RATES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda n, steps, after: 1.0,
    "linear": lambda n, steps, after: 1 - n / steps if steps else 1.0,
    "cosine": lambda n, steps, after: (1 + math.cos(math.pi * n / steps)) / 2 if steps else 1.0,
    "inverse-sqrt": lambda n, steps, after: math.sqrt(after / max(n + 1, after)),
}
"""f of a step n, of so many, and of where a decay begins."""


def learning_rate(config: OptimizerConfig, step: int, steps: int | None) -> float:
    """The learning rate of step n, counted from 0, of so many."""
    after = config.after or max(config.warmup, 1)
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1)) * RATES[config.decay](step, steps or 0, after)


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], *, fused: bool) -> Optimizer:
    """The optimizer of a recipe, for groups of parameters.

    Raises:
        LogsnrError: if its name is none, or a setting is not one of its own or not what it may be.
    """
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused
        )
    kind = optimizer_class(config.name)
    known = [name for name in inspect.signature(kind).parameters if name not in OWN]
    for name in config.settings:
        if name not in known:
            raise unknown(f"setting of optimizer {config.name}", name, known)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.settings.items()}
    try:
        made: Optimizer = kind(groups, lr=config.lr, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LogsnrError(f"optimizer {config.name} with {settings or 'no settings'}: {one_line(error)}") from error
    return made


def optimizer_class(name: str) -> Any:
    """The class of torch.optim that a name like "torch.optim:Adam" means.

    Raises:
        LogsnrError: if there is none, or it needs more than a gradient (LBFGS, SparseAdam).
    """
    known = {
        f"{PREFIX}{key}": kind
        for key, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind not in (Optimizer, *_OTHER)
    }
    if name not in known:
        raise unknown("optimizer.name", name, ["adamw", *sorted(known)])
    return known[name]


_OTHER = (torch.optim.LBFGS, torch.optim.SparseAdam)
