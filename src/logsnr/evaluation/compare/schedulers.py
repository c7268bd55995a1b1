"""Peers: diffusers' own schedulers on our denoiser, from the same noise, at counted evaluations.

A scheduler knows a model by its table of levels (sampling/table.py) and by what the network predicts; it holds a state
and asks the network at a level.  Here every one of them talks to the denoiser itself:

    state       z for DDIM, PNDM, DEIS, DPM-Solver, UniPC; y = z/alpha for Euler, Heun, LMS; z/(alpha + s) for flows
    start       z = noise at the first level, in that state's scale
    level       the scheduler's own sigma, in full precision, not its timestep cut to an integer
    prediction  v = alpha eps - s x0, finite at both ends; eps for PNDM, which is defined on it; eps - x0 for flows

Options are diffusers' defaults, without clipping; PNDM is also run as Stable Diffusion does (skip_prk_steps), and
DPM-Solver, which counts in noise and can end at the smallest level only, beside DPM-Solver++, which counts in x.  Grids
are all the spacings that a scheduler offers: timesteps "leading", "linspace" and "trailing" (2305.08891), the sigmas of
Karras, even log-SNR ("lu_lambdas" of DPM-Solver, which the others call exponential), a beta distribution's quantiles,
and even times of a flow, without a shift and with that of Stable Diffusion 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
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
TIMESTEPS = ("leading", "linspace", "trailing")
SIGMAS = (*TIMESTEPS, "karras", "lu_lambdas", "beta")
OWN_TIMESTEPS = ("linspace", "karras", "lu_lambdas", "beta")
"""Of a scheduler that has one spacing of timesteps, and no word for it."""
FLOW_GRIDS = ("flow", "flow shift 3")
ALL = (*SIGMAS, *FLOW_GRIDS)


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
    grids: tuple[str, ...] = SIGMAS
    predicts: str = "v_prediction"


_PNDM: dict[str, Any] = {"kind": "PNDMScheduler", "family": "PNDM", "grids": TIMESTEPS, "predicts": "epsilon"}
_DEIS: dict[str, Any] = {"kind": "DEISMultistepScheduler", "family": "DEIS", "grids": ALL}
_DPM: dict[str, Any] = {"kind": "DPMSolverMultistepScheduler", "family": "DPM++", "grids": ALL}
_NOISE: dict[str, Any] = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
_DPM_OF_NOISE: dict[str, Any] = {"kind": "DPMSolverMultistepScheduler", "family": "DPM-Solver"}
_UNIPC: dict[str, Any] = {"kind": "UniPCMultistepScheduler", "family": "UniPC", "grids": ALL}
_THIRD = {"solver_order": 3}
SCHEDULERS: dict[str, Scheduler] = {
    "DDIM": Scheduler(kind="DDIMScheduler", family="DDIM", options={"clip_sample": False}, grids=TIMESTEPS),
    "Euler": Scheduler(kind="EulerDiscreteScheduler", family="DDIM", state="ve"),
    "Heun": Scheduler(kind="HeunDiscreteScheduler", family="Heun", state="ve"),
    "PNDM": Scheduler(**_PNDM, options={"skip_prk_steps": True}),
    "PNDM (Runge-Kutta start)": Scheduler(**_PNDM),
    "LMS": Scheduler(kind="LMSDiscreteScheduler", family="Adams-Bashforth", state="ve"),
    "DEIS-2": Scheduler(**_DEIS),
    "DEIS-3": Scheduler(**_DEIS, options=_THIRD),
    "DPM++(2M)": Scheduler(**_DPM),
    "DPM++(3M)": Scheduler(**_DPM, options=_THIRD),
    "DPM-Solver(2M)": Scheduler(**_DPM_OF_NOISE, options=_NOISE),
    "DPM-Solver(3M)": Scheduler(**_DPM_OF_NOISE, options={**_NOISE, **_THIRD}),
    "DPM-Solver(3S)": Scheduler(
        kind="DPMSolverSinglestepScheduler",
        family="DPM-Solver",
        grids=OWN_TIMESTEPS,
        options={**_NOISE, **_THIRD, "lower_order_final": True},
    ),
    "UniPC-2": Scheduler(**_UNIPC),
    "UniPC-3": Scheduler(**_UNIPC, options=_THIRD),
    "FlowMatchEuler": Scheduler(
        kind="FlowMatchEulerDiscreteScheduler", family="DDIM", state="flow", grids=FLOW_GRIDS, predicts="flow"
    ),
}
_FLAGS = {"karras": "use_karras_sigmas", "lu_lambdas": "use_exponential_sigmas", "beta": "use_beta_sigmas"}


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
    known = [grid for grid in ALL if grid != "beta" or find_spec("scipy")]  # diffusers asks scipy for its quantiles
    runs = [
        _Run(denoiser, table, solver, grid)
        for solver in kept(SCHEDULERS, solvers)
        for grid in kept(known, grids)
        if grid in SCHEDULERS[solver].grids
    ]
    out = []
    for budget in nfe:
        for of in runs:
            entry = largest(budget, partial(of.entry, budget))
            if entry is not None:
                out.append(entry)
    return out


class _Run:
    """A scheduler that knows a model's table, on one of its spacings; its timesteps are set anew by every run."""

    def __init__(self, denoiser: Denoiser, table: TimestepTable, solver: str, grid: str) -> None:
        self.denoiser, self.table, self.solver, self.grid = denoiser, table, solver, grid
        about = SCHEDULERS[solver]
        self.of_flows = about.state == "flow"
        if grid in FLOW_GRIDS:
            about = replace(about, state="flow", predicts="flow")
        self.about, self.shift = about, 3.0 if grid == "flow shift 3" else 1.0
        kind = getattr(require_diffusers("comparing with diffusers' schedulers"), about.kind)
        self.scheduler = kind(shift=self.shift) if self.of_flows else self._made(kind)

    def _made(self, kind: Any) -> Any:
        options = {**self.about.options, "prediction_type": self.about.predicts}
        if self.about.grids == OWN_TIMESTEPS and self.grid == "linspace":
            pass
        elif self.grid in TIMESTEPS:
            options["timestep_spacing"] = self.grid
        elif self.grid in FLOW_GRIDS:
            options |= {"use_flow_sigmas": True, "flow_shift": self.shift, "prediction_type": "flow_prediction"}
        else:
            options[_FLAGS[self.grid]] = True
        abar = self.table.alphas_cumprod
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        with _quiet():
            scheduler = kind(num_train_timesteps=len(self.table), trained_betas=betas.tolist(), **options)
        # products of float32 betas lose the smallest levels' digits
        scheduler.alphas_cumprod = abar
        if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = abar[0]
        return scheduler

    def entry(self, budget: int, n: int) -> Entry | None:
        """n steps as an entry; None where it cannot take so few or so many."""
        levels = self.levels(n)
        if levels is None:
            return None
        return Entry(
            solver=self.solver,
            grid=self.grid,
            family=self.about.family,
            origin="diffusers",
            budget=budget,
            evaluations=sum(map(self.denoiser.cost, levels)),
            run=lambda model, noise, cond, generator: self(n, model, noise, cond),
        )

    def levels(self, n: int) -> tuple[float, ...] | None:
        """Set n steps, and say at which level each evaluation is; None where it cannot take so few or so many."""
        if self.about.state == "flow":
            times = self._times(n)
            return tuple(sigma_from_flow_time(t) for t in times)
        if n > len(self.table):
            return None
        try:
            with _quiet():
                self.scheduler.set_timesteps(n)
        except (IndexError, ValueError):  # PNDM's Runge-Kutta start takes four steps
            return None
        steps = self.scheduler.timesteps.tolist()
        if hasattr(self.scheduler, "sigmas"):
            return tuple(self.scheduler.sigmas[: len(steps)].tolist())
        if not 0 <= min(steps) <= max(steps) < len(self.table):
            return None
        return tuple(self.table.sigma(float(t)) for t in steps)

    def _times(self, n: int) -> list[float]:
        """Set n even times of a flow over the model's range, shifted: FlowMatchEuler's reach the smallest, the others
        stop a step before it, as each does with times of its own."""
        scheduler, shift = self.scheduler, self.shift
        # the shift takes sigma to shift sigma
        last, first = (flow_time(sigma / shift) for sigma in self.denoiser.sampling_range)
        gaps = max(n - 1, 1) if self.of_flows else n
        even = [first + (last - first) * i / gaps for i in range(n)]
        if self.of_flows:
            scheduler.set_timesteps(sigmas=even)
        else:
            with _quiet():
                scheduler.set_timesteps(n)
            ends = last if self.about.family == "DEIS" else 0.0  # at which its logarithms are infinite
            # not all of them can be told their times
            scheduler.sigmas = torch.tensor([shift * t / (1 + (shift - 1) * t) for t in (*even, ends)])
        times: list[float] = scheduler.sigmas[:-1].tolist()
        return times

    @torch.no_grad()
    def __call__(self, n: int, model: Denoiser, noise: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """The pipelines' loop: set the timesteps, then scale, ask, step."""
        levels, about, scheduler = self.levels(n), self.about, self.scheduler
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
    """Without the schedulers' warnings: none concerns a loop that does what they ask for, nor what will be no more."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)
