"""Guidance: denoisers made of denoisers.

    x0 = x0_weak + w (x0_strong - x0_weak),    eps = eps_weak + w (eps_strong - eps_weak)

`w` is `scale` in diffusers' convention: 1 is no guidance, 0 the weak model alone, 7.5 the habit of Stable Diffusion
(papers that write (1 + w) strong - w weak mean scale - 1).  The weights sum to 1, so a guided estimate still satisfies
z = alpha x0 + s eps, and any plan, Heun and `solve` take it as they take any other; its score is
(1 - w) score_weak + w score_strong.

    cfg            weak = the same model without the condition      (2207.12598; 2404.07724; 2305.08891)
    autoguidance   weak = a worse version of the model              (2406.02507)
    cfgpp          x0 guided, eps that of the weak model            (2406.08070)

Evaluations are counted on the network: `denoiser.cost(sigma)` is 2 where guidance acts, 1 elsewhere, whether the two
run as one call of double batch or as two; `sampling.evaluations(denoiser, plan)` adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Around, Denoiser, Estimate
from logsnr.noise import alpha_s, per_sample

Interval = tuple[float, float]
SCALE = "guidance_scale"
"""The condition that holds each sample's own scale."""


def cfg(
    denoiser: Denoiser,
    scale: float | None,
    null: Mapping[str, Any],
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance: `uncond + scale (cond - uncond)`.

    Conditional and unconditional run in one call of double batch where their conditions are tensors of equal shape
    (a number or one row in `null` is repeated), else in two calls.

    Args:
        denoiser: the conditional model.
        scale: 1 for no guidance (one evaluation: the conditional model bit for bit), 0 for the unconditional model;
            None for each sample's own, which is then the condition `guidance_scale` `[B]`.
        null: the null condition, by keyword: replaces those of `sample(..., cond=)`; others are kept.
        interval: (low, high): guide for low < sigma <= high only, the conditional model alone elsewhere.
        rescale: in [0, 1]: how far x0 is brought back to the conditional x0's standard deviation, per sample
            (2305.08891, eq. 15-16, on x0 whatever the network predicts; eps follows from z).

    Raises:
        ValueError: if a number leaves its range.
    """
    return Guided(_Pair(denoiser, null), scale, interval, rescale)


def autoguidance(denoiser: Denoiser, bad: Denoiser, scale: float, interval: Interval | None = None) -> Denoiser:
    """Autoguidance: `bad + scale (denoiser - bad)`, both under the same condition.

    Args:
        denoiser: the model.
        bad: a smaller or less trained version of it, on the same data.
        scale: 1 for no guidance.
        interval: as in `cfg`.

    Raises:
        ValueError: if the two do not fit each other, or a number leaves its range.
    """
    if bad.shape != denoiser.shape:
        raise ValueError(f"bad denoises samples of shape {tuple(bad.shape)}, the model {tuple(denoiser.shape)}")
    return Guided(_Two(denoiser, bad), scale, interval, 0.0)


def cfgpp(denoiser: Denoiser, scale: float, null: Mapping[str, Any], interval: Interval | None = None) -> Denoiser:
    """CFG++: the guided x0 = x0_uncond + scale (x0_cond - x0_uncond), renoised with the unconditional eps.

    The estimate's x0 and eps do not belong to z but to `alpha x0 + s eps`, and a sampler continues from there: a DDIM
    step is z' = alpha' x0_guided + s' eps_uncond, gradient estimation extrapolates the unconditional eps
    (y' = x0_guided + sigma' eps + (gamma - 1)(sigma' - sigma)(eps - eps_previous), as ComfyUI does).  A DDIM step is
    that of `cfg` with scale sigma/(sigma - sigma') times as large: scales belong in [0, 1], and 0 is the unconditional
    model.  It has no trajectory: `heun`, `solve` and inversion refuse it.

    Args:
        denoiser: the conditional model.
        scale: weight of the condition, the paper's lambda in [0, 1].
        null: as in `cfg`.
        interval: as in `cfg`; elsewhere the conditional model, plainly.

    Raises:
        ValueError: if a number leaves its range.
    """
    return Renoised(_Pair(denoiser, null), scale, interval, 0.0)


class _Both(Around):
    """A strong and a weak estimate of one state; the strong one is the denoiser inside."""

    def weak_cost(self, sigma: float) -> int:
        return self.denoiser.cost(sigma)

    def weak(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        """The weak model's estimate alone."""
        raise NotImplementedError

    def both(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> tuple[Estimate, Estimate]:
        """(strong, weak)."""
        return self(z, sigma, **cond), self.weak(z, sigma, **cond)


class _Two(_Both):
    """Two models under one condition."""

    def __init__(self, denoiser: Denoiser, bad: Denoiser) -> None:
        super().__init__(denoiser)
        self.bad = bad
        (a, b), (c, d) = denoiser.trained_range, bad.trained_range
        self.trained_range = (max(a, c), min(b, d))
        if not self.trained_range[0] < self.trained_range[1]:
            raise ValueError(
                f"bad was trained on sigma in [{c}, {d}], the model on [{a}, {b}]: the two ranges must overlap"
            )

    @property
    def finite_at_inf(self) -> bool:
        return self.denoiser.finite_at_inf and self.bad.finite_at_inf

    def weak_cost(self, sigma: float) -> int:
        return self.bad.cost(sigma)

    def weak(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        estimate: Estimate = self.bad(z, sigma, **cond)
        return estimate


class _Pair(_Both):
    """One model with and without its condition, in one call where the conditions can be joined."""

    def __init__(self, denoiser: Denoiser, null: Mapping[str, Any]) -> None:
        super().__init__(denoiser)
        self.null = dict(null)

    def weak(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        estimate: Estimate = self.denoiser(z, sigma, **self._without(len(z), cond))
        return estimate

    def both(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> tuple[Estimate, Estimate]:
        without = self._without(len(z), cond)
        try:
            joined = _joined(cond, without, len(z))
        except _UnequalError:
            return self(z, sigma, **cond), self.denoiser(z, sigma, **without)
        levels = sigma.repeat(2) if isinstance(sigma, Tensor) and sigma.numel() > 1 else sigma
        whole: Estimate = self.denoiser(torch.cat([z, z]), levels, **joined)
        return _part(whole, 0), _part(whole, 1)

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        super().check_cond({**self.null, **cond})

    def _without(self, n: int, cond: Mapping[str, Any]) -> dict[str, Any]:
        return {**cond, **{key: _fitted(value, cond.get(key), n) for key, value in self.null.items()}}


class Guided(Around):
    """weak + scale (strong - weak), within an interval of sigma."""

    denoiser: _Both

    def __init__(self, pair: _Both, scale: float | None, interval: Interval | None, rescale: float) -> None:
        super().__init__(pair)
        low, high = (0.0, math.inf) if interval is None else interval
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"scale = {scale}: must be finite; 1 is no guidance")
        if not 0 <= low < high:
            raise ValueError(
                f"interval = {interval}: give (low, high) with 0 <= low < high; guidance acts in (low, high]"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale = {rescale}: must be in [0, 1]; 0 is off, 2305.08891 uses .7")
        self.scale, self.rescale = None if scale is None else float(scale), float(rescale)
        self.interval = None if interval is None else (float(low), float(high))

    def _facts(self) -> list[str]:
        inside = "" if self.interval is None else " for sigma in ({:.4g}, {:.4g}]".format(*self.interval)
        scale = "of each sample" if self.scale is None else f"{self.scale:g}"
        return [repr(self.denoiser.denoiser), f"scale {scale}{inside}"]

    def check_cond(self, cond: Mapping[str, Any]) -> None:
        inner = {key: value for key, value in cond.items() if key != SCALE or self.scale is not None}
        if self.scale is None and not isinstance(cond.get(SCALE), Tensor):
            raise ValueError(f"guidance by each sample's own scale: give the condition {SCALE}=, a tensor [B]")
        super().check_cond(inner)

    def _acts(self, sigma: float) -> bool:
        return self.interval is None or self.interval[0] < sigma <= self.interval[1]

    def cost(self, sigma: float) -> int:
        if not self._acts(sigma) or self.scale == 1:
            return self.denoiser.cost(sigma)
        alone = self.scale == 0 and not self.rescale
        return self.denoiser.weak_cost(sigma) + (0 if alone else self.denoiser.cost(sigma))

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        weight: float | Tensor = cond.pop(SCALE).to(z) if self.scale is None else self.scale
        if not isinstance(sigma, Tensor):
            weight = weight if self._acts(sigma) else 1.0
        elif self.interval is not None:
            inside = (sigma > self.interval[0]) & (sigma <= self.interval[1])
            weight = torch.where(inside.to(z.device), z.new_ones(()) * weight, z.new_ones(()))
        weight = per_sample(weight, z)
        if not isinstance(weight, Tensor) and weight == 1:
            alone: Estimate = self.denoiser(z, sigma, **cond)
            return alone
        if not isinstance(weight, Tensor) and weight == 0 and not self.rescale:
            return self.denoiser.weak(z, sigma, **cond)
        strong, weak = self.denoiser.both(z, sigma, **cond)
        guided = Estimate(
            lambda: _towards(weak.x0, strong.x0, weight),
            lambda: _towards(weak.eps, strong.eps, weight),
            lambda: _towards(weak.velocity, strong.velocity, weight),
        )
        return guided if not self.rescale else self._rescaled(guided, strong, z, sigma)

    def _rescaled(self, guided: Estimate, strong: Estimate, z: Tensor, sigma: float | Tensor) -> Estimate:
        alpha, s = (per_sample(v.to(z) if isinstance(v, Tensor) else v, z) for v in alpha_s(sigma))

        def x0() -> Tensor:
            ratio = _spread(strong.x0) / _spread(guided.x0)
            return guided.x0 * (1 + self.rescale * (ratio - 1))

        out: Estimate = Estimate(x0, lambda: guided.eps + (alpha / s) * (guided.x0 - out.x0))
        return out


class Renoised(Guided):
    """CFG++: the guided x0 with the weak eps; continues from alpha x0 + s eps."""

    def cost(self, sigma: float) -> int:
        if self._acts(sigma) and self.scale == 1:
            return self.denoiser.cost(sigma) + self.denoiser.weak_cost(sigma)
        return super().cost(sigma)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        if isinstance(sigma, Tensor):
            raise ValueError("cfgpp needs one sigma for the batch, as samplers give it: pass a float")
        if not self._acts(sigma):
            alone: Estimate = self.denoiser(z, sigma, **cond)
            return alone
        if self.scale == 0:
            return self.denoiser.weak(z, sigma, **cond)
        strong, weak = self.denoiser.both(z, sigma, **cond)
        scale, (alpha, _) = self.scale, alpha_s(sigma)
        assert scale is not None  # cfgpp takes a number
        out: Estimate = Estimate(
            lambda: _towards(weak.x0, strong.x0, scale),
            lambda: weak.eps,
            state=lambda: torch.add(z, out.x0 - weak.x0, alpha=alpha),
        )
        return out


def _towards(weak: Tensor, strong: Tensor, weight: float | Tensor) -> Tensor:
    """weak + weight (strong - weak)."""
    if isinstance(weight, Tensor):
        return weak + weight * (strong - weak)
    return torch.add(weak, strong - weak, alpha=weight)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each sample over its dimensions, `[B, 1, ...]`."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.ndim - 1))


def _part(whole: Estimate, index: int) -> Estimate:
    """One half of an estimate of double batch, still formed only when asked for."""

    def half(name: str) -> Callable[[], Tensor]:
        return lambda: getattr(whole, name).chunk(2)[index]

    state = whole.state
    return Estimate(half("x0"), half("eps"), half("velocity"), None if state is None else half("state"))


class _UnequalError(Exception):
    """Conditions that cannot be joined in one batch."""


def _fitted(null: Any, cond: Any, n: int) -> Any:
    """A null condition in the shape of the condition it replaces: numbers and single rows are repeated."""
    if isinstance(null, Mapping):
        inner = cond if isinstance(cond, Mapping) else {}
        return {**inner, **{key: _fitted(value, inner.get(key), n) for key, value in null.items()}}
    if isinstance(cond, Tensor) and isinstance(null, int | float) and not isinstance(null, bool):
        return torch.full_like(cond, null)
    if isinstance(null, Tensor) and isinstance(cond, Tensor):
        null = null.to(cond.device)
        if null.shape != cond.shape and null.ndim in (cond.ndim, cond.ndim - 1):
            row = null if null.ndim == cond.ndim else null.unsqueeze(0)
            if len(row) == 1:
                return row.expand(n, *row.shape[1:])
    return null


def _joined(cond: Mapping[str, Any], null: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Both conditions as one of double batch.

    Raises:
        _UnequalError: if some entry has no such form.
    """
    if cond.keys() != null.keys():
        raise _UnequalError
    out: dict[str, Any] = {}
    for key, a in cond.items():
        b = null[key]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.ndim == 0 or a.shape != b.shape or len(a) != n or a.dtype != b.dtype:
                raise _UnequalError
            out[key] = torch.cat([a, b])
        elif isinstance(a, Mapping) and isinstance(b, Mapping):
            out[key] = _joined(a, b, n)
        elif a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b):
            out[key] = a
        else:
            raise _UnequalError
    return out
