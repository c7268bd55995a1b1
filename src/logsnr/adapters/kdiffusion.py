"""k-diffusion's conventions, both ways: our sampler for its models, its samplers for our models.

    ve      x = z / alpha = x0 + sigma eps                 sigmas are noise-to-signal ratios
    flow    x = z/(alpha + s) = (1 - t) x0 + t eps         sigmas are times t = sigma/(1 + sigma)

There `model(x, sigma * s_in, **extra_args)` answers with the denoised image, and a sampler is a function
`(model, x, sigmas, extra_args, callback, disable)`.  Gradient estimation extrapolates (x - denoised)/sigma: the noise
on the VE path, the velocity on the flow path; they are different algorithms (plan.py).

ComfyUI adds three habits: CFG++ (the sampler renoises with the unconditional estimate, which a function in
`model_options["sampler_post_cfg_function"]` is told), a `denoise_mask` (where it is 0 the model is shown the noisy
`latent_image`, and answers with it), and sigmas that rise (from an image to its noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import unknown
from logsnr.guidance import Renoised
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
    cfg_pp: bool = False,
    invert: bool = False,
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
        cfg_pp: renoise with the unconditional estimate (2406.08070), which the model has to hand to the functions of
            `model_options["sampler_post_cfg_function"]` as "uncond_denoised", as ComfyUI's do.
        invert: go up strictly rising sigmas, from an image (at a small sigma above 0) to its noise, in Euler steps with
            the same gamma; `disable` and `generator` are not used there.

    Returns:
        The state at the last level; the image itself if that is 0.

    Raises:
        ValueError: if sigmas do not decrease (rise, to invert), are not those of the plan, or leave the path; if invert
            comes with a plan or cfg_pp; if the model tells no unconditional estimate; or as `logsnr.sample`.
    """
    _check_path(path)
    if sigmas is None:
        if plan is None:
            raise ValueError("sigmas is None: give the n + 1 levels, or a plan, which has its own")
        levels = _levels(plan, path)
    else:
        levels = sigmas.detach().cpu().double().tolist() if isinstance(sigmas, Tensor) else [float(v) for v in sigmas]
    grid = [_sigma(level, path) for level in levels]
    options = dict(extra_args or {})
    uncond: list[Tensor] = []
    if cfg_pp:
        options["model_options"] = _asking(options.get("model_options"), uncond)
    if invert:
        if plan is not None or cfg_pp:
            raise ValueError("invert=True takes Euler steps of its own: leave plan and cfg_pp out")
        return _risen(partial(model, **options), x, levels, gamma, callback)
    if len(grid) > 1 and grid[0] < grid[-1]:
        raise ValueError(
            f"sigmas rise from {levels[0]:g} to {levels[-1]:g}, a sampler's decrease: invert=True goes up them, from "
            "an image to its noise"
        )
    if plan is None:
        plan = solvers.ge(grid, gamma, basis="eps" if path == "ve" else "velocity")
    elif not _same(levels, own := _levels(plan, path)):
        raise ValueError(
            f"{len(levels)} sigmas from {levels[0]:.6g} to {levels[-1]:.6g} are not the plan's {len(own)} from "
            f"{own[0]:.6g} to {own[-1]:.6g}: a plan has its own levels; pass sigmas=None"
        )
    if path == "ve" and math.isinf(plan.sigmas[0]):
        raise ValueError("sigmas[0] = inf: the path 've' has no state there; start below, or use path='flow'")
    wrapped = _Wrapped(model, x, dict(zip(plan.sigmas, levels, strict=True)), options, path, uncond if cfg_pp else None)
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
        latent_image, noise: what a `denoise_mask` keeps, and the noise that it is shown under.
    """

    def __init__(self, denoiser: Denoiser, path: KPath = "ve") -> None:
        _check_path(path)
        self.denoiser = denoiser
        self.path = path
        low, high = denoiser.sampling_range
        self.sigma_min, self.sigma_max = (flow_time(v) if path == "flow" else v for v in (low, high))
        self.latent_image: Tensor | None = None
        self.noise: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        denoise_mask: Tensor | None = None,
        model_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **cond: Any,
    ) -> Tensor:
        """The denoised x, in its dtype.

        Args:
            x: states on the path `[B, *shape]`.
            sigma: their levels `[B]`, or one.
            denoise_mask: 1 where to denoise, 0 where `latent_image` is kept; broadcasts to x.
            model_options: functions in "sampler_post_cfg_function" are called with a dictionary of "denoised",
                "cond_denoised", "uncond_denoised", "sigma", "input" and "model_options", and answer what to return.
            seed: ignored.
            **cond: conditions of the denoiser.

        Raises:
            ValueError: for a mask without `latent_image` and `noise`, or a CFG++ denoiser under a sampler that does
                not ask for its unconditional estimate, or at several levels.
        """
        if denoise_mask is None:
            return self._denoised(x, sigma, model_options, cond)
        if self.latent_image is None or self.noise is None:
            raise ValueError(
                "denoise_mask without an image to keep: set latent_image and noise of the model, or give them to "
                "as_kdiffusion"
            )
        image, mask = self.latent_image.to(x), denoise_mask.to(x)
        level = per_sample(torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x)), x)
        held = (1 - level) * image if self.path == "flow" else image
        shown = x * mask + (held + level * self.noise.to(x)) * (1 - mask)
        return self._denoised(shown, sigma, model_options, cond) * mask + image * (1 - mask)

    def _denoised(
        self, x: Tensor, sigma: Tensor, model_options: Mapping[str, Any] | None, cond: Mapping[str, Any]
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        level = torch.as_tensor(sigma, dtype=dtype, device=x.device)
        ratio = sigma_from_flow_time(level) if self.path == "flow" else level
        z = x.to(dtype)
        z = z / per_sample(_scale(ratio, self.path), z)
        asked = (model_options or {}).get("sampler_post_cfg_function", ())
        if not isinstance(self.denoiser, Renoised):
            estimate: Estimate = self.denoiser(z, ratio, **cond)
            denoised = uncond = estimate.x0.to(x.dtype)
        else:
            if not asked:
                raise ValueError(
                    "a CFG++ denoiser under a sampler that does not renoise with its unconditional estimate: take a "
                    "sampler for CFG++, or logsnr.sample"
                )
            one = float(ratio.reshape(-1)[0])
            if bool((ratio != one).any()):
                raise ValueError("sigma differs within the batch: CFG++ renoises at one level; call it level by level")
            estimate = self.denoiser(z, one, **cond)
            alpha, s = alpha_s(one)
            denoised, uncond = estimate.x0.to(x.dtype), ((z - s * estimate.eps) / alpha).to(x.dtype)
        for function in asked:
            denoised = function(
                {
                    "denoised": denoised,
                    "cond_denoised": denoised,
                    "uncond_denoised": uncond,
                    "sigma": sigma,
                    "input": x,
                    "model_options": model_options,
                }
            )
        return denoised


def as_kdiffusion(
    denoiser: Denoiser, path: KPath = "ve", *, latent_image: Tensor | None = None, noise: Tensor | None = None
) -> KDiffusionModel:
    """The model that k-diffusion's samplers take.

    Args:
        denoiser: any denoiser; its conditions are the samplers' `extra_args`.  One of `guidance.cfgpp` is for CFG++'s
            samplers.
        path: what the samplers' x and sigmas will mean.
        latent_image: x0 that a `denoise_mask` among the `extra_args` keeps where it is 0.
        noise: the noise that it is shown under there.

    Raises:
        ValueError: if the path is unknown.
    """
    out = KDiffusionModel(denoiser, path)
    out.latent_image, out.noise = latent_image, noise
    return out


class _Wrapped(Denoiser):
    """A k-diffusion model as a denoiser, for the states of one run; for CFG++ with where it says what is unguided."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        levels: dict[float, float],
        extra: Mapping[str, Any],
        path: KPath,
        uncond: list[Tensor] | None = None,
    ):
        super().__init__()
        self._uncond = uncond
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
        if self._uncond is not None:
            weak = _told(self._uncond).to(z.dtype)
            out: Estimate = Estimate(
                x0, lambda: (z - alpha * weak) / s, state=lambda: torch.add(z, x0 - weak, alpha=alpha)
            )
            return out
        return Estimate(x0, lambda: (z - alpha * x0) / s, lambda: (z - (alpha + s) * x0) / s)


def _asking(model_options: Mapping[str, Any] | None, into: list[Tensor]) -> dict[str, Any]:
    """Options of a ComfyUI model with a function that keeps what it answers without guidance."""

    def keep(told: Mapping[str, Any]) -> Tensor:
        into[:] = [told["uncond_denoised"]]
        denoised: Tensor = told["denoised"]
        return denoised

    options = dict(model_options or {})
    options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", ()), keep]
    options["disable_cfg1_optimization"] = True  # or ComfyUI leaves the unconditional half out at scale 1
    return options


def _told(uncond: list[Tensor]) -> Tensor:
    if not uncond:
        raise ValueError(
            "cfg_pp: the model has not called model_options['sampler_post_cfg_function'] with what it denoises without "
            "guidance: give a model of ComfyUI, or as_kdiffusion(cfgpp(...))"
        )
    return uncond.pop()  # so that the next evaluation has to tell its own


def _risen(
    call: Model,
    x: Tensor,
    levels: Sequence[float],
    gamma: float | Sequence[float],
    callback: Callable[[dict[str, Any]], Any] | None,
) -> Tensor:
    """Steps up: x' = x + (sigma' - sigma)(gamma d + (1 - gamma) d_before), d = (x - denoised)/sigma."""
    if len(levels) < 2 or not all(0 < a < b < math.inf for a, b in pairwise(levels)):
        said = f"{levels[0]:g} ... {levels[-1]:g}" if levels else "are empty"
        raise ValueError(
            f"sigmas {said}: to invert give at least 2, finite, that must rise strictly from above 0, e.g. from 1e-4"
        )
    n = len(levels) - 1
    weights = [1.0, *([gamma] * (n - 1) if isinstance(gamma, int | float) else gamma)]
    if len(weights) != n:
        raise ValueError(f"gamma has {len(weights) - 1} values: {n - 1} of the {n} steps use one")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"gamma = {gamma}: give finite numbers")
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    before = torch.zeros_like(state)
    for i, ((sigma, up), weight) in enumerate(zip(pairwise(levels), weights, strict=True)):
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        denoised = call(state.to(x.dtype), level.expand(len(x)))
        d = (state - denoised.to(state.dtype)) / sigma
        if callback is not None:
            callback({"x": state.to(x.dtype), "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
        state = state + (up - sigma) * (weight * d + (1 - weight) * before)
        before = d
    return state.to(x.dtype)


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
