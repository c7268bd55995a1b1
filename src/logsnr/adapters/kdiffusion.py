"""k-diffusion's conventions, both ways: our sampler for its models, its samplers for our models.

    ve      x = z / alpha = x0 + sigma eps                 sigmas are noise-to-signal ratios
    flow    x = z/(alpha + s) = (1 - t) x0 + t eps         sigmas are times t = sigma/(1 + sigma)

There `model(x, sigma * s_in, **extra_args)` answers with the denoised image, and a sampler is a function
`(model, x, sigmas, extra_args, callback, disable)`.  Gradient estimation extrapolates (x - denoised)/sigma: the noise
on the VE path, the velocity on the flow path; they are different algorithms (plan.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import unknown
from logsnr.noise import Level, alpha_s, flow_time, path_scale, per_sample, sigma_from_flow_time
from logsnr.sampling import Plan, Step, sample, solvers

KPath = Literal["ve", "flow"]
Model = Callable[..., Tensor]


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Tensor | Sequence[float] | None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    gamma: float | Sequence[float] = 2.0,
    plan: Plan | None = None,
    path: KPath = "ve",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gradient estimation (2306.04848), or any plan, as a k-diffusion sampler.

    A step to sigma 0 is a plain denoise.  One evaluation per step.

    Args:
        model: `model(x, sigma * s_in, **extra_args)` -> denoised.
        x: the starting state `[B, *shape]` on its path, at `sigmas[0]`: noise * sigmas[0] for "ve".
        sigmas: n + 1 strictly decreasing levels; None for those of the plan.
        extra_args: passed on to the model.
        callback: called after every evaluation with a dict of x, i, sigma, sigma_hat, denoised.
        disable: whether to hide the progress bar (shown if tqdm is installed); None hides it off a terminal.
        gamma: as in `logsnr.solvers.ge`.
        plan: what to do instead, at its own levels.
        path: what x and sigmas mean.
        generator: source of noise of a plan that draws any.

    Returns:
        The state at the last level; the image itself if that is 0.

    Raises:
        ValueError: if sigmas do not decrease, are not those of the plan, or leave the path; or as `logsnr.sample`.
    """
    _check_path(path)
    if sigmas is None:
        if plan is None:
            raise ValueError("sigmas is None: give the n + 1 levels, or a plan, which has its own")
        levels = _levels(plan, path)
    else:
        levels = sigmas.detach().cpu().double().tolist() if isinstance(sigmas, Tensor) else [float(v) for v in sigmas]
    grid = [_sigma(level, path) for level in levels]
    if plan is None:
        plan = solvers.ge(grid, gamma, basis="eps" if path == "ve" else "velocity")
    elif not _same(levels, own := _levels(plan, path)):
        raise ValueError(
            f"{len(levels)} sigmas from {levels[0]:.6g} to {levels[-1]:.6g} are not the plan's {len(own)} from "
            f"{own[0]:.6g} to {own[-1]:.6g}: a plan has its own levels; pass sigmas=None"
        )
    if path == "ve" and math.isinf(plan.sigmas[0]):
        raise ValueError("sigmas[0] = inf: the path 've' has no state there; start below, or use path='flow'")
    wrapped = _Wrapped(model, x, dict(zip(plan.sigmas, levels, strict=True)), extra_args or {}, path)
    bar = _bar(plan.nfe, disable)

    def report(step: Step) -> None:
        if step.estimate is None:
            return
        if callback is not None:
            sigma = torch.as_tensor(levels[step.index], dtype=x.dtype, device=x.device)
            state = (step.z * _scale(step.sigma, path)).to(x.dtype)
            denoised = step.estimate.x0.to(x.dtype)
            callback({"x": state, "i": step.index, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if bar is not None:
            bar.update()

    try:
        noise = x.to(torch.promote_types(x.dtype, torch.float32)) / _scale(plan.sigmas[0], path)
        z = sample(wrapped, plan, noise=noise, generator=generator, callback=report)
    finally:
        if bar is not None:
            bar.close()
    return (z * _scale(plan.sigmas[-1], path)).to(x.dtype)


class KDiffusionModel:
    """A logsnr denoiser under k-diffusion's calling convention: `model(x, sigma [B], **conditions)` -> denoised.

    Attributes:
        sigma_min, sigma_max: the ends of the denoiser's sampling range, as levels of the path.
    """

    def __init__(self, denoiser: Denoiser, path: KPath = "ve") -> None:
        _check_path(path)
        self.denoiser = denoiser
        self.path = path
        low, high = denoiser.sampling_range
        self.sigma_min, self.sigma_max = (flow_time(v) if path == "flow" else v for v in (low, high))

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=dtype, device=x.device)
        ratio = sigma_from_flow_time(level) if self.path == "flow" else level
        state = x.to(dtype)
        estimate: Estimate = self.denoiser(state / per_sample(_scale(ratio, self.path), state), ratio, **cond)
        return estimate.x0.to(x.dtype)


def as_kdiffusion(denoiser: Denoiser, path: KPath = "ve") -> KDiffusionModel:
    """The model that k-diffusion's samplers take.

    Args:
        denoiser: any denoiser; its conditions are the samplers' `extra_args`.
        path: what the samplers' x and sigmas will mean.

    Raises:
        ValueError: if the path is unknown.
    """
    return KDiffusionModel(denoiser, path)


class _Wrapped(Denoiser):
    """A k-diffusion model as a denoiser, for the states of one run."""

    def __init__(self, model: Model, x: Tensor, levels: dict[float, float], extra: Mapping[str, Any], path: KPath):
        super().__init__()
        self.shape = tuple(x.shape[1:])
        self.sigma_data = 1.0
        self.trained_range = (0.0, math.inf)
        self._call: Model = partial(model, **extra)  # a module in it is not ours to register
        self._levels = levels
        self._dtype = x.dtype
        self._path = path

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        assert not isinstance(sigma, Tensor)
        alpha, s = alpha_s(sigma)
        state = (z * _scale(sigma, self._path)).to(self._dtype)
        x0 = self._call(state, state.new_full((len(z),), self._levels[sigma])).to(z.dtype)
        return Estimate(x0, lambda: (z - alpha * x0) / s, lambda: (z - (alpha + s) * x0) / s)


def _scale(sigma: Level, path: KPath) -> Level:
    """k with `state = k z`."""
    return path_scale(path, *alpha_s(sigma))


def _sigma(level: float, path: KPath) -> float:
    if path == "flow" and not 0 <= level <= 1:
        raise ValueError(f"sigmas hold {level:g}: on the path 'flow' they are times in [0, 1]; use path='ve'")
    return sigma_from_flow_time(level) if path == "flow" else level


def _levels(plan: Plan, path: KPath) -> list[float]:
    """A plan's noise levels, as a path counts them."""
    return [flow_time(sigma) if path == "flow" else sigma for sigma in plan.sigmas]


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Equal to the rounding of float32."""
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(a, b, strict=True))


def _check_path(path: str) -> None:
    if path not in get_args(KPath):
        raise unknown("path", path, get_args(KPath))


def _bar(total: int, disable: bool | None) -> Any:
    """A progress bar, if tqdm is installed."""
    if disable or find_spec("tqdm") is None:
        return None
    return import_module("tqdm.auto").tqdm(total=total, disable=disable)
