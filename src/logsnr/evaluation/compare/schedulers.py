"""Peers: diffusers' own schedulers on our denoiser, from the same noise, at counted evaluations.

A scheduler knows a model by its table of levels (sampling/table.py) and by what the network predicts; it holds a state
and asks the network at a level.  Here every one of them talks to the denoiser itself:

    state       z for DDIM, PNDM, DEIS, DPM-Solver, UniPC;  y = z/alpha for Euler, Heun, LMS;  z/(alpha + s) for flows
    start       z = noise at the first level, in that state's scale
    level       the scheduler's own sigma, in full precision, not its timestep cut to an integer
    prediction  v = alpha eps - s x0, finite at both ends; eps for PNDM, which is defined on it; eps - x0 for flows

Options are diffusers' defaults, without clipping; PNDM is also run as Stable Diffusion does (skip_prk_steps).  Grids
are the scheduler's default spacing, "trailing" timesteps (2305.08891), Karras's sigmas, and "lu_lambdas": the even
log-SNR of DPM-Solver, which the others call exponential.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from logsnr.adapters import require_diffusers
from logsnr.denoiser import Denoiser
from logsnr.evaluation.compare.entries import Entry, kept, largest
from logsnr.noise import alpha_s, flow_time, path_scale, sigma_from_flow_time
from logsnr.sampling.reference import consistent
from logsnr.sampling.table import table_of
from logsnr.timesteps import TimestepTable

State = Literal["vp", "ve", "flow"]
TIMESTEP_GRIDS = ("default", "trailing")
GRIDS = (*TIMESTEP_GRIDS, "karras", "lu_lambdas")
FLOW_GRIDS = ("default", "shift 3")


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """One of diffusers' schedulers, as it is run here.

    Attributes:
        kind: name of the class in diffusers.
        family: what it is a kind of.
        state: the path whose state it holds.
        options: for its constructor, beside the table.
        grids: names of the spacings that it knows.
        predicts: what it is told the network predicts.
    """

    kind: str
    family: str
    state: State = "vp"
    options: Mapping[str, Any] = field(default_factory=dict)
    grids: tuple[str, ...] = GRIDS
    predicts: str = "v_prediction"


_PNDM: dict[str, Any] = {"kind": "PNDMScheduler", "family": "PNDM", "grids": TIMESTEP_GRIDS, "predicts": "epsilon"}
SCHEDULERS: dict[str, Scheduler] = {
    "DDIM": Scheduler(kind="DDIMScheduler", family="DDIM", options={"clip_sample": False}, grids=TIMESTEP_GRIDS),
    "Euler": Scheduler(kind="EulerDiscreteScheduler", family="DDIM", state="ve"),
    "Heun": Scheduler(kind="HeunDiscreteScheduler", family="Heun", state="ve"),
    "PNDM": Scheduler(**_PNDM, options={"skip_prk_steps": True}),
    "PNDM (Runge-Kutta start)": Scheduler(**_PNDM),
    "LMS": Scheduler(kind="LMSDiscreteScheduler", family="Adams-Bashforth", state="ve"),
    "DEIS-2": Scheduler(kind="DEISMultistepScheduler", family="DEIS"),
    "DEIS-3": Scheduler(kind="DEISMultistepScheduler", family="DEIS", options={"solver_order": 3}),
    "DPM++(2M)": Scheduler(kind="DPMSolverMultistepScheduler", family="DPM++"),
    "DPM++(3M)": Scheduler(kind="DPMSolverMultistepScheduler", family="DPM++", options={"solver_order": 3}),
    "UniPC-2": Scheduler(kind="UniPCMultistepScheduler", family="UniPC"),
    "UniPC-3": Scheduler(kind="UniPCMultistepScheduler", family="UniPC", options={"solver_order": 3}),
    "FlowMatchEuler": Scheduler(
        kind="FlowMatchEulerDiscreteScheduler", family="DDIM", state="flow", grids=FLOW_GRIDS, predicts="flow"
    ),
}


def peers(
    denoiser: Denoiser, nfe: Iterable[int], *, solvers: Sequence[str] = (), grids: Sequence[str] = ()
) -> list[Entry]:
    """Every scheduler on every grid that it knows, at every budget that holds at least one step of it.

    Args:
        denoiser: the model; its table is the scheduler's.
        nfe: budgets.
        solvers: what names to keep start with (letters and digits count, + is p); none for all.
        grids: the same of grids.

    Raises:
        LogsnrError: if diffusers is missing or too old.
    """
    table = table_of(denoiser)
    schedulers = {
        (solver, grid): _scheduler(SCHEDULERS[solver], table, grid)
        for solver in kept(SCHEDULERS, solvers)
        for grid in kept(SCHEDULERS[solver].grids, grids)
    }
    out = []
    for budget in nfe:
        for (solver, grid), scheduler in schedulers.items():
            entry = largest(budget, partial(_entry, denoiser, table, solver, grid, scheduler, budget))
            if entry is not None:
                out.append(entry)
    return out


def _entry(
    denoiser: Denoiser, table: TimestepTable, solver: str, grid: str, scheduler: Any, budget: int, n: int
) -> Entry | None:
    about = SCHEDULERS[solver]
    prepare = partial(_levels, about, scheduler, table, denoiser.sampling_range, n)
    levels = prepare()
    if levels is None:
        return None
    return Entry(
        solver=solver,
        grid=grid,
        family=about.family,
        origin="diffusers",
        budget=budget,
        evaluations=sum(map(denoiser.cost, levels)),
        run=lambda model, noise, cond, generator: _run(about, scheduler, prepare, model, noise, cond),
    )


def _scheduler(about: Scheduler, table: TimestepTable, grid: str) -> Any:
    """A scheduler that knows the table; its timesteps are set anew by every run."""
    kind = getattr(require_diffusers("comparing with diffusers' schedulers"), about.kind)
    if about.state == "flow":
        return kind(shift=3.0 if grid == "shift 3" else 1.0)
    options = {**about.options, "prediction_type": about.predicts}
    if grid == "trailing":
        options["timestep_spacing"] = "trailing"
    elif grid == "karras":
        options["use_karras_sigmas"] = True
    elif grid == "lu_lambdas":
        known = inspect.signature(kind.__init__).parameters
        options["use_lu_lambdas" if "use_lu_lambdas" in known else "use_exponential_sigmas"] = True
    abar = table.alphas_cumprod
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    with _quiet():
        scheduler = kind(num_train_timesteps=len(table), trained_betas=betas.tolist(), **options)
    # products of float32 betas lose the smallest levels' digits
    scheduler.alphas_cumprod = abar
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = abar[0]
    return scheduler


def _levels(
    about: Scheduler, scheduler: Any, table: TimestepTable, ends: tuple[float, float], n: int
) -> tuple[float, ...] | None:
    """Set n steps, and say at which level each evaluation is; None where it cannot take so few or so many."""
    if about.state == "flow":
        # it shifts the times that it is given: sigma to shift sigma
        last, first = (flow_time(sigma / scheduler.shift) for sigma in ends)
        scheduler.set_timesteps(sigmas=[first + (last - first) * i / max(n - 1, 1) for i in range(n)])
        return tuple(sigma_from_flow_time(t) for t in scheduler.sigmas[:-1].tolist())
    if n > len(table):
        return None
    try:
        with _quiet():
            scheduler.set_timesteps(n)
    except (IndexError, ValueError):  # PNDM's Runge-Kutta start takes four steps
        return None
    steps = scheduler.timesteps.tolist()
    if hasattr(scheduler, "sigmas"):
        return tuple(scheduler.sigmas[: len(steps)].tolist())
    if not 0 <= min(steps) <= max(steps) < len(table):
        return None
    return tuple(table.sigma(float(t)) for t in steps)


@torch.no_grad()
def _run(
    about: Scheduler,
    scheduler: Any,
    prepare: Callable[[], tuple[float, ...] | None],
    model: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Any],
) -> Tensor:
    """The pipelines' loop: set the timesteps, then scale, ask, step."""
    levels = prepare()
    assert levels is not None
    state = noise * path_scale(about.state, *alpha_s(levels[0]))
    with _quiet():
        for t, sigma in zip(scheduler.timesteps, levels, strict=True):
            alpha, s = alpha_s(sigma)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(state, t)  # some count their steps there
            estimate = consistent(model(state / path_scale(about.state, alpha, s), sigma, **cond))
            if about.predicts == "flow":
                output = estimate.velocity
            elif about.predicts == "epsilon":
                output = estimate.eps
            else:
                output = alpha * estimate.eps - s * estimate.x0
            state = scheduler.step(output.to(state), t, state, return_dict=False)[0]
    return state.to(noise)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the schedulers' warnings: none concerns a loop that does what they ask for."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
