"""The one loop: run a plan on a denoiser.

In canonical z, with e_bar = sum_j c_j e_{i-j} and primes for the next noise level:

    eps         z' = (alpha'/alpha) z + alpha' (sigma' - sigma) e_bar                       (Euler for y = z/alpha)
    x0          z' = (s'/s) z + alpha' (1 - sigma'/sigma) e_bar
    velocity    z' = (alpha' + s') [z/(alpha + s) + (t' - t) e_bar],  t = sigma/(1 + sigma)
    noise       z' = (alpha'/alpha_down) z_down + alpha' sqrt(sigma'^2 - sigma_down^2) w

A row [1] is the same step in every basis (DDIM) and is taken in the x0 form: exact from sigma inf, without
amplification at high noise, and exactly x0 when it ends at sigma 0.  A plan's factor on the state (`keep`) multiplies z
in the plan's own basis.

Coefficients are host floats formed before the loop, and nothing on the device is read back inside it.  Every step
makes a new state: the caller's noise, and states that the model, a callback or the history still sees, keep their
values.  A plan whose longest row is h makes at most h + 3 tensors of the state's size live.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.noise import alpha_s, flow_time
from logsnr.sampling.batches import ask
from logsnr.sampling.default import plan_for
from logsnr.sampling.plan import Basis, Plan
from logsnr.sampling.progress import step_bar
from logsnr.sampling.start import GENERATOR, Generators, brought, check_range, check_start, conditions_of, randn
from logsnr.sampling.start import start as first_noise

if TYPE_CHECKING:
    from logsnr.sampling.gaussian import GaussianStart


@dataclass(frozen=True)
class Step:
    """What a callback sees: state `z [B, *shape]` number `index` at `sigma`, and the estimate (None at the end)."""

    index: int
    sigma: float
    z: Tensor
    estimate: Estimate | None


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Update:
    """One step as host floats: z' = rescale (keep z + sum_j weights[j] e_{i-j}) + noise w, with e in `basis`."""

    basis: Basis
    keep: float
    weights: tuple[float, ...]
    rescale: float
    noise: float


def updates(plan: Plan) -> list[Update]:
    """The arithmetic of every step of a plan, in float64."""
    out = []
    for i, row in enumerate(plan.rows):
        sigma, target = plan.sigmas[i], plan.sigmas[i + 1]
        down = target if plan.sigma_down is None else plan.sigma_down[i]
        while len(row) > 1 and row[-1] == 0:
            row = row[:-1]
        factor = 1.0 if plan.keep is None else plan.keep[i]
        basis: Basis = "x0" if row == (1.0,) and factor == 1 else plan.basis
        keep, gain = _euler(basis, sigma, down)
        rescale, noise = 1.0, 0.0
        if down < target:
            alpha, _ = alpha_s(target)
            rescale = alpha / alpha_s(down)[0]
            noise = alpha * math.sqrt((target - down) * (target + down))
        out.append(Update(basis, factor * keep, tuple(gain * c for c in row), rescale, noise))
    return out


def _euler(basis: Basis, sigma: float, target: float) -> tuple[float, float]:
    """(keep, gain) with z' = keep z + gain e, the Euler step of a basis."""
    (alpha, s), (alpha_, s_) = alpha_s(sigma), alpha_s(target)
    if basis == "x0":
        return s_ / s, alpha_ * (1 - target / sigma)
    if basis == "eps":
        return alpha_ / alpha, alpha_ * (target - sigma)
    return (alpha_ + s_) / (alpha + s), (alpha_ + s_) * (flow_time(target) - flow_time(sigma))


@dataclass(frozen=True)
class _Move:
    """An `Update` made ready for the loop: what to form of an estimate, and what to add to `keep z`."""

    sigma: float
    keep: float
    store: bool  # whether this or a later step reads this estimate in the plan's basis
    plain: float | None  # weight of this estimate's x0, in a step of the x0 form taken by a plan of another basis
    terms: tuple[tuple[int, float], ...]  # (how many steps ago, weight), none of them 0
    noise: float


HUGE = 1e36
"""Weights beyond it leave float32."""


def _moves(plan: Plan) -> tuple[list[_Move], int]:
    """The loop's program, and how many estimates it keeps.

    Raises:
        ValueError: if a weight is beyond HUGE.
    """
    steps = updates(plan)
    read, last = [False] * len(steps), 1
    out = []
    for i, step in enumerate(steps):
        plain = step.basis != plan.basis
        terms = tuple((j, step.rescale * w) for j, w in enumerate(step.weights) if w != 0)
        if not plain:
            for j, _ in terms:
                read[i - j] = True
                last = max(last, j + 1)
        weight = step.rescale * step.weights[0] if plain else None
        keep = step.rescale * step.keep
        if not all(abs(w) < HUGE for w in (keep, weight or 0.0, *(w for _, w in terms))):
            raise ValueError(
                f"step {i} from sigma = {plan.sigmas[i]:.6g} weighs an estimate by more than {HUGE:g}, which no state "
                "holds: give coefficients and levels of a real sampler"
            )
        out.append((keep, weight, () if plain else terms, step.noise))
    return [
        _Move(plan.sigmas[i], keep, read[i], weight, terms, noise) for i, (keep, weight, terms, noise) in enumerate(out)
    ], last


_remembered_moves = lru_cache(maxsize=64)(_moves)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    plan: Plan | int,
    *,
    noise: Tensor | None = None,
    n: int | None = None,
    chunk: int | None = None,
    generator: Generators | None = None,
    cond: Mapping[str, Any] | None = None,
    start: GaussianStart | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    check: bool | Literal["each"] = True,
) -> Tensor:
    """Sample: `plan.nfe` evaluations from `plan.sigmas[0]` to `plan.sigmas[-1]`.

        x = sample(denoiser, 10, n=8, generator=torch.Generator().manual_seed(0))

    The start is z = noise at the first sigma, as pipelines do; a noisy image at `sigmas[k]` continues with
    `plan.tail(k)`.  The state is float32, or float64 where the noise (or, with `n`, the model) is.

    A plan that asks the denoiser outside its `trained_range` warns (UserWarning, see `check_range`) and goes on.

    Args:
        denoiser: the model.
        plan: what to do; or a number of evaluations, for `plan_for(denoiser, plan)`: the model's own plan of that many
            where it has one, else the best that is known for any.
        noise: starting state z `[B, *shape]`; or
        n: how many to draw.
        chunk: samples per call of the denoiser, None for all at once.  States, noise and callbacks are those of one
            call for all: chunks change the memory that a network takes, and nothing else.
        generator: source of every draw; only needed if there is one.  Draws happen on its device.  Or one per sample,
            for all draws of that sample: then it does not matter beside which others it is drawn.
        cond: conditions, passed on to the denoiser by keyword, each with one entry per sample.
        start: brings the noise from the model's largest level, where it would be a state, to the plan's first in closed
            form (`GaussianStart`); None to begin with the noise itself.
        progress: whether to show a bar, on a terminal or in a notebook.
        callback: called with every state, `plan.nfe + 1` times.
        check: True: every state's sum is kept on the device and read once, after the last step; a sum that is not
            finite is an error that names the first such step.  "each": read after every step, to stop there (one
            synchronisation per step).  False: no check, nothing is ever read.

    Returns:
        The canonical state z at the last sigma `[B, *shape]`: the sample x itself when that is 0.

    Raises:
        ValueError: if not exactly one of noise and n is given, noise or a condition does not fit, a generator is
            missing or not one per sample, the plan starts at sigma inf, where the model is undefined, chunk is below 1,
            or `check` is unknown.
        LogsnrError: if the start is none of this model or plan, or the plan needs one.
        NonFiniteError: if a step left a state that is not finite.
    """
    if check not in (True, False, "each"):
        raise ValueError(f"check {check!r} is not one of True (once, at the end), 'each' (every step), False")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1 sample per call, or None for all at once")
    if not isinstance(plan, Plan):
        plan = plan_for(denoiser, plan)
    check_start(denoiser, plan.sigmas[0])
    check_range(denoiser, plan.sigmas[:-1])
    if plan.noisy and generator is None:
        raise ValueError(f"the plan draws noise: {GENERATOR}")
    z = first_noise(denoiser, noise, n, generator)
    conditions = conditions_of(denoiser, cond, len(z))
    z = brought(denoiser, plan, z, conditions, start)
    if not progress:
        return _run(denoiser, plan, z, conditions, chunk, generator, callback, check)
    with step_bar(plan.nfe) as tell:

        def both(step: Step) -> None:
            tell(step)
            if callback is not None:
                callback(step)

        return _run(denoiser, plan, z, conditions, chunk, generator, both, check)


def _run(
    denoiser: Denoiser,
    plan: Plan,
    z: Tensor,
    conditions: dict[str, Any],
    chunk: int | None,
    generator: Generators | None,
    callback: Callback | None,
    check: bool | Literal["each"],
) -> Tensor:
    moves, longest = _moves(plan) if torch.compiler.is_compiling() else _remembered_moves(plan)
    history: list[Tensor] = []
    sums: list[Tensor] = []
    for i, move in enumerate(moves):
        if len(history) == longest:
            history.pop()  # before the evaluation, so that its memory is free for it
        estimate = ask(denoiser, z, move.sigma, conditions, chunk)
        if callback is not None:
            callback(Step(i, move.sigma, z, estimate))
        history.insert(0, _value(estimate, plan.basis, z) if move.store else z.new_empty(0))
        state = estimate.state
        if state is not None:
            z = state.to(z)
        plain = None if move.plain is None else _value(estimate, "x0", z)
        del estimate, state  # and with it every tensor that only the estimate needed
        z = _moved(z, plain, move, history)
        del plain
        if move.noise:
            z.add_(randn(z, generator), alpha=move.noise)
        if check:
            sums.append(z.sum())
            if check == "each":
                z = _guarded(z, sums, plan, first=i)
                sums.clear()
    if callback is not None:
        callback(Step(plan.nfe, plan.sigmas[-1], z, None))
    return _guarded(z, sums, plan, first=0) if sums else z


def _moved(z: Tensor, plain: Tensor | None, move: _Move, history: Sequence[Tensor]) -> Tensor:
    """keep z + sum_j w_j e_{i-j}, in a new tensor; z is not looked at where keep is 0."""
    terms = [(history[ago], weight) for ago, weight in move.terms]
    if plain is not None and move.plain is not None:
        terms.append((plain, move.plain))
    if move.keep:
        terms.insert(0, (z, move.keep))
    (first, weight), *rest = terms or [(z, 0.0)]
    out = first * weight
    for value, weight in rest:
        out.add_(value, alpha=weight)
    return out


def _value(estimate: Estimate, basis: Basis, like: Tensor) -> Tensor:
    """The estimate in a basis, in the state's dtype."""
    value = estimate.x0 if basis == "x0" else estimate.eps if basis == "eps" else estimate.velocity
    return value if value.dtype == like.dtype and value.device == like.device else value.to(like)


class NonFiniteError(FloatingPointError):
    """A state that is not finite: `step` is the first step that left one, `sigma` where it evaluated the model."""

    def __init__(self, step: int, sigma: float) -> None:
        super().__init__(
            f"step {step} (sigma = {sigma:.6g}) left a state that is not finite: the model's answer there has nan or "
            "inf, or has grown without bound; run it in float32, keep to its trained range, or check its weights "
            "(check='each' stops at the step, check=False lets it pass)"
        )
        self.step = step
        self.sigma = sigma


def _guarded(z: Tensor, sums: Sequence[Tensor], plan: Plan, first: int) -> Tensor:
    """z, if every sum is finite; read once.

    A compiled graph must not read, so there an operator of its own does, which the compiler cannot see into.  Nothing
    simpler serves: `torch._assert_async` would name the step on a CPU alone, and on a GPU end every tensor's life.

    Raises:
        NonFiniteError: naming the first bad step.
    """
    stacked = torch.stack(list(sums))
    levels = list(plan.sigmas[first : first + len(sums)])
    if torch.compiler.is_compiling():
        factor: Tensor = torch.ops.logsnr.one_if_finite(stacked, levels, first)
        return z * factor  # exact, and keeps the operator in the graph
    _refuse_non_finite(stacked, levels, first)
    return z


def _refuse_non_finite(sums: Tensor, sigmas: Sequence[float], first: int) -> None:
    good = int(sums.isfinite().cumprod(0).sum())  # steps before the first bad one
    if good < len(sigmas):
        raise NonFiniteError(first + good, sigmas[good])


@torch.library.custom_op("logsnr::one_if_finite", mutates_args=())
def _one_if_finite(sums: Tensor, sigmas: list[float], first: int) -> Tensor:
    _refuse_non_finite(sums, sigmas, first)
    return sums.new_ones(())


@_one_if_finite.register_fake
def _(sums: Tensor, sigmas: list[float], first: int) -> Tensor:
    return sums.new_empty(())


def evaluations(denoiser: Denoiser, plan: Plan) -> int:
    """Network evaluations per sample of a plan on a denoiser: `plan.nfe`, and twice that where guidance acts."""
    return sum(denoiser.cost(sigma) for sigma in plan.sigmas[:-1])
