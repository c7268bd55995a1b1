"""From a scheduler's config and a `set_timesteps` call to one plan.

    a stored plan of n evaluations                       if the config has plans
    the best plan known for a model that nobody asked    if gamma is "auto" (sampling/default.py), from start to end
    solver(grid of n evaluations)                        otherwise; the grid's name is the config's spacing, or `grid`
    solver(explicit timesteps or sigmas)                 used unchanged

A pipeline that passes its default flow times 1, 1 - 1/n, ..., 1/n (Flux, SD3) has no grid of its own in mind, and gets
ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.adapters.diffusers.config import Noising, limit
from logsnr.adapters.diffusers.scheduler.grid_for import check_spacing, ends, explicit, named, shift_of
from logsnr.noise import covers
from logsnr.sampling import Plan, solvers
from logsnr.sampling.default import GAMMA, MIDDLE, auto_plan, default_rows
from logsnr.sampling.names import SOLVERS, find_solver
from logsnr.sampling.plan import Grid, plans_from
from logsnr.sampling.universal import LARGE
from logsnr.timesteps import TimestepTable

SAMPLER: dict[str, Any] = {
    "gamma": None,
    "solver": "ge",
    "solver_options": None,
    "basis": None,
    "mu": 0.0,
    "grid": None,
    "start": None,
    "end": None,
}
"""Options that make a sampler, and their defaults: with a plan there is nothing left for them to say."""
HIGHEST = 1000.0
"""Where the levels of "auto" are counted from at most, in units of sigma_data; a run starts at the model's largest."""


@dataclass(frozen=True)
class Request:
    """What `set_timesteps` was asked for."""

    steps: int | None
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    mu: float | None
    labels: tuple[float, ...] | None = None  # what the network is told at each of the sigmas


def request(num_inference_steps: int | None, timesteps: Any, sigmas: Any, mu: float | None, *, flow: bool) -> Request:
    """The arguments of `set_timesteps`, checked against each other.

    Raises:
        ValueError: if they contradict each other.
    """
    both = timesteps is not None and sigmas is not None
    if both and not flow:
        raise ValueError("set_timesteps got both timesteps and sigmas: give one of them")
    steps = None if num_inference_steps is None else _count(num_inference_steps)
    levels, times = _floats("sigmas", sigmas), _floats("timesteps", timesteps)
    if levels is None and times is None:
        return Request(steps, None, None, mu)
    if levels is not None and flow and len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    count = len(levels or times or ()) - (levels is not None and not flow)
    if count < 1:
        raise ValueError(
            "the list given has no step: give a timestep, a flow sigma, or two sigmas (the last is where the run ends)"
        )
    if steps not in (None, count):
        raise ValueError(f"num_inference_steps = {steps}, but the list given makes {count} steps: drop one of the two")
    if both:
        assert times is not None
        if len(times) != len(levels or ()):
            raise ValueError(f"{len(times)} timesteps for {len(levels or ())} sigmas: give one label for each level")
        return Request(count, None, levels, mu, times)
    if flow and levels is not None and np.allclose(levels, [1 - i / count for i in range(count)], rtol=0, atol=2e-6):
        levels = None
    return Request(count, times, levels, mu)


def make_plan(config: Mapping[str, Any], model: Noising, asked: Request) -> Plan:
    """The plan of a `set_timesteps` call.

    Raises:
        ValueError: if the call does not fit the config or the model; the message names the fix.
    """
    plans, auto = plans_from(config["plan"]), config["gamma"] == "auto"
    told = asked.timesteps is not None or asked.sigmas is not None
    if told and plans:
        raise ValueError(
            "explicit timesteps or sigmas, but this scheduler has a plan, which has its own: "
            "call set_timesteps(num_inference_steps) alone, or build the scheduler with plan=None"
        )
    if plans:
        plan = stored(plans, asked.steps)
    elif asked.steps is None:
        raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas: give one of them")
    else:
        shift = shift_of(config, asked.mu) if model.flow else 1.0
        if auto and not told:
            plan = automatic(config, model, asked.steps, shift)
        elif told:
            once = config["use_dynamic_shifting"] or asked.labels is not None
            grid = explicit(config, model, asked.timesteps, asked.sigmas, shift if once else 1.0)
            plan = default_rows(grid, "velocity" if model.flow else "eps") if auto else solve(config, model, grid)
        else:
            plan = solve(config, model, named(config, model, asked.steps, shift))
    check_range(plan, model)
    return plan


def stored(plans: Mapping[int, Plan], n: int | None) -> Plan:
    """The plan of n evaluations; the only one if n is None.

    Raises:
        ValueError: if there is none; the message names those there are.
    """
    if n is None and len(plans) == 1:
        return next(iter(plans.values()))
    if n is None or n not in plans:
        have = ", ".join(map(str, sorted(plans)))
        one = f"this scheduler's plan has {have} evaluations: call with num_inference_steps={have}"
        several = f"this scheduler's plans have {have} evaluations: call with one of these numbers"
        raise ValueError(
            f"num_inference_steps = {n}, but {one if len(plans) == 1 else several}, "
            "or build the scheduler with plan=None and a solver"
        )
    return plans[n]


def automatic(config: Mapping[str, Any], model: Noising, n: int, shift: float) -> Plan:
    """The plan of n evaluations that nobody said more about, within the model's range, or from `start` to `end`.

    Its levels are in units of sigma_data: an EDM model's own, the config's, or 1.  A scheduler does not know the size
    of its samples, but a flow's shift tells (2403.03206, sec. 5.3.2): models of more than a few ten thousand numbers
    have one of 3 and more.  The default's middle is at least there.  Levels of a table's model are the nearest of the
    table: pipelines index tables by timesteps, and the network was never asked in between.
    """
    unit = model.sigma_data * max(shift / MIDDLE, 1.0)
    low, high = ends(config, model)
    low, high = max(low, unit / 250), min(high, HIGHEST * unit)
    told = config["start"] is not None  # where to start, whatever the network knows there
    known = told or model.prediction.finite_at_inf
    plan = auto_plan(n, low, high, sigma_data=unit, finite_at_inf=known, dim=LARGE if shift > 2 else None)
    if plan.sigmas[0] == HIGHEST * unit:
        # the first step is that of DDIM: from sigma inf no other is defined
        plan = replace(plan, sigmas=(ends(config, model)[1], *plan.sigmas[1:]), rows=((1.0,), *plan.rows[1:]))
    return plan if model.table is None else on_table(plan, model.table)


def on_table(plan: Plan, table: TimestepTable) -> Plan:
    """The plan on the nearest levels of a table, each visited once; as it is if the table has too few."""
    n, least = plan.nfe, int(plan.sigmas[-1] > 0)
    if n + least > len(table):
        return plan
    steps: list[int] = []
    for sigma in plan.sigmas[:-1]:
        step = round(float(table.timestep(sigma)))
        steps.append(step if not steps else min(step, steps[-1] - 1))
    steps = [max(step, least + n - 1 - i) for i, step in enumerate(steps)]
    return replace(plan, sigmas=(*(float(table.sigma(step)) for step in steps), plan.sigmas[-1]))


def renewed(config: Mapping[str, Any], grid: Grid) -> Plan:
    """FlowMatchEuler's stochastic sampling: every step goes to x0 and from there to its level by new noise.

    Raises:
        ValueError: if a solver is asked for too.
    """
    chosen = [key for key in ("gamma", "mu", "basis", "solver_options") if config[key] not in (None, 0.0, {}, 1.0)]
    if chosen or config["solver"] != "ge":
        raise ValueError(
            f"stochastic_sampling with {', '.join(chosen) or 'solver'}: it draws every state anew and has no memory; "
            "drop one of the two"
        )
    steps = len(grid) - 1
    return Plan(grid, ((1.0,),) * steps, "x0", sigma_down=(0.0,) * steps)


def solve(config: Mapping[str, Any], model: Noising, grid: Grid) -> Plan:
    """The config's solver on a grid.

    Raises:
        ValueError: if the solver or its options do not fit.
    """
    if config["stochastic_sampling"]:
        return renewed(config, grid)
    name, given = check_solver(config)
    options = {**given, **(config["solver_options"] or {})}
    if config["basis"] is not None:
        options["basis"] = config["basis"]
    own: dict[str, Any] = {"mu": config["mu"]} if "mu" in SOLVERS[name].takes else {}
    if "gamma" in SOLVERS[name].takes:
        gamma = options.pop("gamma", 2.0) if "gamma" in given else 2.0
        own["gamma"] = gamma if config["gamma"] is None else GAMMA if config["gamma"] == "auto" else config["gamma"]
        if model.flow:
            options.setdefault("basis", "velocity")
    try:
        plan: Plan = SOLVERS[name].make(grid, **own, **options)
    except TypeError as error:
        raise ValueError(
            f"options {options} do not fit solver {config['solver']!r} ({error}): see logsnr.solvers"
        ) from error
    return plan


def check_solver(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The config's solver in `SOLVERS`, and the options that its name stands for ("ge" is run as "unified", of mu 0).

    One that does not exist is refused, and so are options that only gradient estimation has.

    Raises:
        ValueError: naming the fix.
    """
    gamma, mu = config["gamma"], config["mu"]
    name, make = find_solver(config["solver"])
    name = "unified" if name == "ge" else name
    if not isinstance(config["solver_options"] or {}, Mapping):
        raise ValueError(f"solver_options = {config['solver_options']!r}: give a dict, e.g. {{'order': 3}}")
    chosen = [key for key, default in SAMPLER.items() if config[key] not in (default, None, {})]
    if config["plan"] is not None and chosen:
        raise ValueError(
            f"plan with {', '.join(chosen)}: a plan has levels, rows and noise of its own; drop one of the two "
            f"(plan=None, or {', '.join(f'{key}={SAMPLER[key]!r}' for key in chosen)})"
        )
    if gamma == "auto":
        what = ", ".join(key for key in chosen if key not in ("gamma", "start", "end"))
        if what:
            raise ValueError(f"gamma 'auto' with {what}: its plans fix that; drop it, or give gamma as a number")
    elif gamma is not None and not all(isinstance(g, Real) for g in (gamma if isinstance(gamma, list) else [gamma])):
        raise ValueError(
            f"gamma = {gamma!r}: give a number, a list with one number for each step that uses it, or 'auto'"
        )
    takes = SOLVERS[name].takes
    if (gamma is not None and "gamma" not in takes) or (mu and "mu" not in takes):
        those = " and ".join(repr(other) for other, entry in SOLVERS.items() if "gamma" in entry.takes)
        raise ValueError(
            f"solver {name!r} with gamma = {gamma}, mu = {mu}: only {those} take them; "
            "drop them, or put the solver's own options into solver_options"
        )
    if not (isinstance(mu, Real) and 0 <= float(mu) < 1):
        raise ValueError(f"mu = {mu}: must be in [0, 1); 0 is deterministic, 1/2 is DDPM")
    return name, make.keywords


def with_eta(plan: Plan, eta: float) -> Plan:
    """The plan with the noise of DDIM's eta.

    Raises:
        ValueError: if eta leaves [0, 1] or the plan draws noise of its own.
    """
    if plan.noisy:
        raise ValueError(
            f"eta = {eta} on a plan that draws its own noise: pass eta=0, or build the scheduler with mu=0"
        )
    return replace(plan, sigma_down=solvers.ddim(plan.sigmas, eta).sigma_down)


def check_range(plan: Plan, model: Noising) -> None:
    """Refuse evaluations outside the model's levels; one percent is rounding.

    Raises:
        ValueError: naming the level and the range.
    """
    low, high = model.sigma_range
    for sigma in (plan.sigmas[0], plan.sigmas[-2]):
        if not covers((low, high), sigma, sigma):
            raise ValueError(
                f"sigma = {sigma:.6g} is outside the model's range [{low:.6g}, {high:.6g}]: choose start and end "
                "(or the plan, or the explicit levels) within it"
            )
    if math.isinf(plan.sigmas[0]) and not model.prediction.finite_at_inf:
        raise ValueError(
            f"the first level is sigma = inf, where {model.prediction.name!r} prediction says nothing of the image: "
            "start below, with timesteps, sigmas or start"
        )


def warn_of_another(plan: Plan, config: Mapping[str, Any]) -> None:
    """Warn of a plan that was calibrated on a pipeline whose network learned other levels or outputs."""
    about = plan.meta.get("about")  # free-form: anyone may have written it
    theirs = about.get("scheduler") if isinstance(about, Mapping) else None
    if not isinstance(theirs, Mapping):
        return
    differ = [key for key, value in theirs.items() if config.get(key) not in (None, value)]
    if differ:
        told = ", ".join(f"{key} {theirs[key]!r} (here {config[key]!r})" for key in differ)
        warnings.warn(
            f"the plan of {plan.nfe} evaluations was calibrated on a pipeline with {told}: on another model its rows "
            "may be no better than a built-in solver's",
            stacklevel=3,
        )


def check_config(config: Mapping[str, Any], model: Noising) -> None:
    """Refuse at once what `set_timesteps` would refuse for every number of steps.

    Raises:
        ValueError: naming the fix.
    """
    check_solver(config)
    check_spacing(config, model)
    limit(config)
    plans = plans_from(config["plan"])
    for plan in plans.values():
        check_range(plan, model)
        warn_of_another(plan, config)
    if not plans and not isinstance(config["gamma"], list):  # a list fits one number of steps
        solve(config, model, (8.0, 4.0, 2.0, 1.0, 0.0))


def plans_to_config(source: Any, *, paths: bool = True) -> dict[str, Any] | None:
    """Plans as JSON values for a config: one plan as itself, several keyed by evaluations; `paths` as `plans_from`."""
    plans = plans_from(source, paths=paths)
    if not plans:
        return None
    if len(plans) == 1:
        return next(iter(plans.values())).to_dict()
    return {str(nfe): plans[nfe].to_dict() for nfe in sorted(plans)}


def gamma_to_config(gamma: Any) -> Any:
    """A number, or several, of any kind (arrays, tensors) as JSON values; what is neither stays as it is."""
    if gamma is None or isinstance(gamma, str):
        return gamma
    try:
        return torch.as_tensor(gamma, dtype=torch.float64).tolist()
    except (TypeError, ValueError, RuntimeError):
        return gamma


def _count(steps: Any) -> int:
    try:
        count = index(steps)
    except TypeError:
        count = 0
    if count < 1 or isinstance(steps, bool):
        raise ValueError(f"num_inference_steps = {steps!r}: must be an integer, at least 1")
    return count


def _floats(name: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().tolist()
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {values!r}: give a list of numbers") from None
