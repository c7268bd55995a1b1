"""One pipeline with its own scheduler and with ours, and the reason of what differs.

    first order      its own scheduler, of first order (DDIM, Euler, FlowMatchEuler, UniPC of order 1)
    gamma 1          ours from that one's config: DDIM, for flows Euler
    unasked          ours as `from_config` makes it
    reasons          what has to be made equal for gamma 1 to give the same: levels and labels, the start, both

A difference is the largest of two results, over the root mean square of the second.  How much of one a sampler can make
is another matter for every network, so results are equal within a small part of what "unasked" moves them by.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from logsnr.adapters import GradientEstimationScheduler

EQUAL, PART = 1e-3, 0.005
"""The largest difference of equal results, and as a part of what another sampler moves them by; most are below 1e-5."""


@dataclass(frozen=True)
class Case:
    """A pipeline and a call of it; `run` answers what it makes."""

    pipe: Any
    call: dict[str, Any]

    def run(self, scheduler: Any) -> torch.Tensor:
        """The result with a scheduler, seeded."""
        self.pipe.scheduler = scheduler
        self.pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(1)
        call = {key: value() if callable(value) else value for key, value in self.call.items()}
        return tensor(self.pipe(generator=torch.Generator().manual_seed(0), **call))


@dataclass(frozen=True)
class Verdict:
    """What came out; `error` where it did not run."""

    difference: float | None = None
    equal: bool = False
    reason: str = ""
    error: str = ""

    @property
    def runs(self) -> bool:
        """Whether the pipeline ran with ours, at gamma 1 and unasked."""
        return not self.error

    @property
    def accounted(self) -> bool:
        """Whether it is equal, or the difference has a reason."""
        return self.runs and (self.equal or bool(self.reason))


def tensor(out: Any) -> torch.Tensor:
    """The numbers in a pipeline's output."""
    if isinstance(out, torch.Tensor):
        return out.detach().double()
    if isinstance(out, np.ndarray):
        return torch.from_numpy(out).double()
    if hasattr(out, "mode") and hasattr(out, "size"):
        return torch.from_numpy(np.asarray(out).copy()).double()
    if hasattr(out, "to_tuple"):
        return tensor(out.to_tuple())
    parts = [tensor(part).flatten() for part in out if part is not None and not isinstance(part, (bool, str))]
    return torch.cat(parts)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, over the root mean square of the second."""
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.square().mean().sqrt())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def ours_as(stock: Any, *, levels: bool, start: bool, **options: Any) -> Any:
    """Our scheduler, made to visit a stock scheduler's levels with its labels, or to start where it starts."""
    scheduler = GradientEstimationScheduler.from_config(stock.config, **options)
    flow = scheduler.model.flow
    plain = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None, "gamma": 1.0}
    if levels and flow:
        flags = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
        scheduler = GradientEstimationScheduler.from_config(stock.config, **plain, **flags)
    if start:
        peak = float(stock.sigmas[0])
        scheduler.init_noise_sigma = float(stock.init_noise_sigma) / math.sqrt(1 + peak * peak)
    if levels:
        own = scheduler.set_timesteps
        sigmas = [sigma for sigma in stock.sigmas.tolist() if sigma > 0]  # a step from 0 to 0 does nothing
        labels = stock.timesteps.tolist()[: len(sigmas)]

        def set_timesteps(*args: Any, device: Any = None, **more: Any) -> None:
            if flow:
                own(sigmas=[min(s, 1.0) for s in sigmas], timesteps=labels, device=device)
            else:
                own(timesteps=labels, device=device)

        scheduler.set_timesteps = set_timesteps
        set_timesteps.__signature__ = inspect.signature(own)  # pipelines look at it
    return scheduler


def in_double(stock: Any) -> Any:
    """The same with its table in double precision: UnCLIP divides what is left of 1."""
    exact = copy.deepcopy(stock)
    exact.betas = stock.betas.double()
    exact.alphas = 1 - exact.betas
    exact.alphas_cumprod = exact.alphas.cumprod(0)
    return exact


def judge(make: Callable[[], Case]) -> Verdict:
    """The verdict on a pipeline; what its own scheduler raises is raised."""
    with quiet():
        case = make()
        stock = case.pipe.scheduler
        expected = case.run(stock)
        try:
            found = case.run(GradientEstimationScheduler.from_config(stock.config, gamma=1.0))
            unasked = case.run(GradientEstimationScheduler.from_config(stock.config))
            if not bool(unasked.isfinite().all()):
                return Verdict(error="not finite")
        except Exception as error:
            return Verdict(error=" ".join(f"{type(error).__name__}: {error}".split()))
        difference = apart(found, expected)
        bound = min(EQUAL, PART * apart(unasked, expected))
        if difference <= bound:
            return Verdict(difference, equal=True)
        for levels, start, reason in REASONS:
            with contextlib.suppress(Exception):
                same = case.run(ours_as(stock, levels=levels, start=start, gamma=1.0))
                if apart(same, expected) <= bound:
                    return Verdict(difference, reason=reason)
        with contextlib.suppress(Exception):
            noisy = GradientEstimationScheduler.from_config(stock.config, gamma=1.0, mu=0.5)
            if apart(case.run(noisy), case.run(in_double(stock))) <= bound:
                return Verdict(difference, reason="noise, equal with mu=0.5")
        return Verdict(difference)


REASONS = (
    (True, False, "levels and labels"),
    (False, True, "start"),
    (True, True, "levels, labels and start"),
)
"""What is made equal, in turn, and the name of that reason."""
