"""From a scheduler's config and a `set_timesteps` call to one plan.

    a stored plan of n evaluations                       if the config has plans
    the universal plan of n evaluations                  if gamma is "auto" and there is one; else gamma 2
    solver(grid of n evaluations)                        otherwise; the grid's name is the config's spacing, or `grid`
    solver(explicit timesteps or sigmas)                 used unchanged

Grids of flow models are spaced in flow time t, then shifted: t -> shift t/(1 + (shift - 1) t), which multiplies sigma
by `shift` (e^mu under dynamic shifting), once.  A pipeline that passes its default t = 1, 1 - 1/n, ..., 1/n (Flux, SD3)
has no grid of its own in mind, and gets ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from logsnr.adapters.noising import Noising
from logsnr.adapters.plans import load_plans, stored
from logsnr.errors import nearest, require
from logsnr.noise import sigma_from_flow_time
from logsnr.prediction import EDM
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.plan import Grid
from logsnr.sampling.universal import universal_plan, universal_sizes

AYS: dict[str, grids.AYSModel] = {"ays-sd15": "sd15", "ays-sdxl": "sdxl", "ays-svd": "svd"}
SPACINGS: dict[str, grids.Spacing] = {"trailing": "trailing", "leading": "leading", "linspace": "linspace"}
GRIDS = (*SPACINGS, "karras", "log-linear", "beta", "ge-paper", *AYS)
FLOW_GRIDS = ("flow", "karras", "log-linear", "beta")


@dataclass(frozen=True)
class Request:
    """What `set_timesteps` was asked for."""

    steps: int | None
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    mu: float | None


def request(num_inference_steps: int | None, timesteps: Any, sigmas: Any, mu: float | None, *, flow: bool) -> Request:
    """The arguments of `set_timesteps`, checked against each other.

    Raises:
        ValueError: if they contradict each other.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("set_timesteps got both timesteps and sigmas: give one of them")
    if num_inference_steps is not None and (isinstance(num_inference_steps, bool) or num_inference_steps < 1):
        raise ValueError(f"num_inference_steps = {num_inference_steps}: must be at least 1")
    levels, times = _floats(sigmas), _floats(timesteps)
    if levels is None and times is None:
        return Request(num_inference_steps, None, None, mu)
    if levels is not None and flow and len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    count = len(times or levels or ()) - (levels is not None and not flow)
    if count < 1:
        raise ValueError(
            "the list given has no step: give a timestep, a flow sigma, or two sigmas (the last is where the run ends)"
        )
    if num_inference_steps is not None and num_inference_steps != count:
        raise ValueError(
            f"num_inference_steps = {num_inference_steps}, but the list given makes {count} steps: drop one of the two"
        )
    if flow and levels is not None and np.allclose(levels, [1 - i / count for i in range(count)], rtol=0, atol=2e-6):
        levels = None
    return Request(count, times, levels, mu)


def make_plan(config: Mapping[str, Any], model: Noising, asked: Request) -> Plan:
    """The plan of a `set_timesteps` call.

    Raises:
        ValueError: if the call does not fit the config or the model; the message names the fix.
    """
    plans = load_plans(config["plan"])
    shift = shift_of(config, asked.mu) if model.flow else 1.0
    if asked.timesteps is not None or asked.sigmas is not None:
        if config["gamma"] == "auto":
            raise ValueError(
                "explicit timesteps or sigmas with gamma='auto', which has levels of its own: call "
                "set_timesteps(num_inference_steps) alone, or give gamma as a number"
            )
        if plans:
            raise ValueError(
                "explicit timesteps or sigmas, but this scheduler has a plan, which has its own: "
                "call set_timesteps(num_inference_steps) alone, or build the scheduler with plan=None"
            )
        plan = solve(config, model, explicit(config, model, asked, shift))
    elif plans:
        plan = stored(plans, asked.steps)
    elif asked.steps is None:
        raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas: give one of them")
    else:
        own = universal(model, asked.steps, shift) if config["gamma"] == "auto" else None
        plan = own or solve(config, model, named(config, model, asked.steps, shift))
    check_range(plan, model)
    return plan


def universal(model: Noising, n: int, shift: float) -> Plan | None:
    """The universal plan of n evaluations within the model's range, or None if there is none of that number.

    Its levels are in units of sigma_data: an EDM model's own, else 1; a flow's `shift` multiplies them as it does every
    grid.
    """
    if n not in universal_sizes():
        return None
    unit = model.prediction.sigma_data if isinstance(model.prediction, EDM) else shift
    low, high = model.sigma_range
    return universal_plan(n, max(low, unit / 250), min(high, 160 * unit), sigma_data=unit)


def solve(config: Mapping[str, Any], model: Noising, grid: Grid) -> Plan:
    """The config's solver on a grid.

    Raises:
        ValueError: if the solver or its options do not fit.
    """
    check_solver(config)
    name, gamma = config["solver"], config["gamma"]
    options = dict(config["solver_options"] or {})
    if config["basis"] is not None:
        options["basis"] = config["basis"]
    try:
        if name in ("ge", "unified"):
            if model.flow:
                options.setdefault("basis", "velocity")
            return solvers.unified(grid, 2.0 if gamma in (None, "auto") else gamma, config["mu"], **options)
        solver: Callable[..., Plan] = getattr(solvers, name)
        return solver(grid, **options)
    except TypeError as error:
        raise ValueError(
            f"options {options} do not fit solver {name!r} ({error}): see logsnr.solvers.{name}"
        ) from error


def check_solver(config: Mapping[str, Any]) -> None:
    """Refuse a solver that does not exist, and options that only gradient estimation has.

    Raises:
        ValueError: naming the fix.
    """
    name, gamma, mu = config["solver"], config["gamma"], config["mu"]
    known = [solver for solver in solvers.__all__ if solver != "custom"]
    if name not in known:
        guess = nearest(str(name), known)
        hint = f": did you mean {guess!r}?" if guess else "; rows of your own are a plan: pass plan="
        raise ValueError(f"solver {name!r} is not one of {', '.join(known)}{hint}")
    if gamma == "auto":
        fixed = ("solver_options", "basis", "mu", "grid", "start", "end", "plan")
        given = [key for key in fixed if config[key] not in (None, 0.0, {})]
        if given or name != "ge":
            what = ", ".join(given) or f"solver {name!r}"
            raise ValueError(f"gamma 'auto' with {what}: its plans fix that; drop it, or give gamma as a number")
    elif not (gamma is None or isinstance(gamma, int | float | list | tuple)):
        raise ValueError(
            f"gamma = {gamma!r}: give a number, a list with one number for each step that uses it, or 'auto'"
        )
    if name not in ("ge", "unified") and (gamma is not None or mu):
        raise ValueError(
            f"solver {name!r} with gamma = {gamma}, mu = {mu}: only 'ge' and 'unified' take them; "
            "drop them, or put the solver's own options into solver_options"
        )
    if not 0 <= mu < 1:
        raise ValueError(f"mu = {mu}: must be in [0, 1); 0 is deterministic, 1/2 is DDPM")


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
        if not 0.99 * low <= sigma <= 1.01 * high:
            raise ValueError(
                f"sigma = {sigma:.6g} is outside the model's range [{low:.6g}, {high:.6g}]: choose start and end "
                "(or the plan, or the explicit levels) within it"
            )
    if math.isinf(plan.sigmas[0]) and not model.prediction.finite_at_inf:
        raise ValueError(
            f"the first level is sigma = inf, where {model.prediction.name!r} prediction says nothing of the image: "
            "start below, with timesteps, sigmas or start"
        )


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """The factor on sigma: static, or from the pipeline's mu.

    Raises:
        ValueError: if dynamic shifting has no mu, or the factor is not positive.
    """
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError(
                "use_dynamic_shifting is on and set_timesteps got no mu: pass mu (pipelines compute it from the "
                "image's size), or use_dynamic_shifting=False with a fixed shift"
            )
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else float(mu)
    else:
        given = [value for value in (config["shift"], config["flow_shift"]) if value is not None]
        shift = float(given[0]) if given else 1.0
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}: must be in (0, inf); 1 for none, 3 for SD3")
    return shift


def explicit(config: Mapping[str, Any], model: Noising, asked: Request, shift: float) -> Grid:
    """The levels a caller gave: unchanged, but sigmas of a flow are shifted by `mu` where shifting is dynamic.

    Raises:
        ValueError: if they leave the model's range or do not decrease.
    """
    if asked.timesteps is not None:
        low, high = (0, model.steps - 1) if model.table is not None else (0 if model.flow else -math.inf, model.steps)
        for t in asked.timesteps:
            if not low <= t <= high:
                raise ValueError(f"timestep {t:g} is outside [{low}, {high}]: give timesteps the model was trained on")
        return _finish(config, model, [model.sigma(t) for t in asked.timesteps])
    assert asked.sigmas is not None
    if not model.flow:
        return grids.from_sigmas(asked.sigmas)
    for t in asked.sigmas:
        if not 0 < t <= 1:
            raise ValueError(f"sigmas holds {t:g}: the sigmas of a flow model are times in (0, 1], 0 is appended")
    factor = shift if config["use_dynamic_shifting"] else 1.0
    return grids.from_sigmas([*(factor * sigma_from_flow_time(t) for t in asked.sigmas), 0.0])


def named(config: Mapping[str, Any], model: Noising, n: int, shift: float) -> Grid:
    """The grid the config names, with n evaluations.

    Raises:
        ValueError: if the name is unknown for this model, or n, start or end do not fit.
    """
    name = grid_name(config, model)
    if model.flow:
        return _flow(config, name, n, shift)
    start, end = _ends(config, model, name)
    last: grids.Last = "min" if _stops_above_zero(config) else "zero"
    if name in AYS:
        return grids.ays(n, AYS[name], last)
    table = model.table
    if name in ("karras", "log-linear", "beta"):
        spread: dict[str, Callable[..., Grid]] = {
            "karras": partial(grids.karras, rho=float(config["rho"])),
            "log-linear": grids.log_linear,
            "beta": _beta,
        }
        if not math.isinf(start):
            return spread[name](n, start, end, last=last)
        # zero terminal SNR: inf first, then the spacing from the table's largest finite level
        assert table is not None
        rest = spread[name](n - 1, float(table.sigmas[-2]), end, last=last) if n > 1 else (0.0,)
        return grids.from_sigmas([math.inf, *rest])
    assert table is not None
    if name == "ge-paper":
        return grids.ge_paper(n, table, min(config["start"] or 40.0, start), config["end"])
    total = len(table)
    if n > total:
        raise ValueError(f"num_inference_steps = {n}: the model has {total} timesteps; use fewer, or grid='log-linear'")
    if n == 1 and name != "trailing":
        return _finish(config, model, [float(table.sigmas[-1])])  # one step from the offset would be one from no noise
    # an offset that would leave the table (n = T) is as large as fits
    offset = min(int(config["steps_offset"]), total - 1 - (n - 1) * (total // n)) if name == "leading" else 0
    return _finish(config, model, grids.timesteps(n, table, SPACINGS[name], "zero", offset)[:-1])


def grid_name(config: Mapping[str, Any], model: Noising) -> str:
    """The grid that a config asks for: by `grid`, or as stock schedulers say it.

    Raises:
        ValueError: if the model has no such grid.
    """
    name = config["grid"]
    if name is None:
        flags = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log-linear", "use_lu_lambdas": "log-linear"}
        if config["sigma_data"] is not None and config["sigma_schedule"] == "exponential":
            return "log-linear"
        on = [grid for flag, grid in {**flags, "use_beta_sigmas": "beta"}.items() if config[flag]]
        default = "flow" if model.flow else config["timestep_spacing"] if model.table is not None else "karras"
        name = on[0] if on else default
    known = FLOW_GRIDS if model.flow else GRIDS if model.table is not None else ("karras", "log-linear", "beta")
    if name not in known:
        guess = nearest(str(name), known)
        hint = f": did you mean {guess!r}?" if guess else "; or give timesteps or sigmas to set_timesteps"
        kind = "flow model" if model.flow else "model"
        raise ValueError(f"grid {name!r} is not one of {', '.join(known)}, which this {kind} has{hint}")
    return str(name)


def check_config(config: Mapping[str, Any], model: Noising) -> None:
    """Refuse at once what `set_timesteps` would refuse for every number of steps.

    Raises:
        ValueError: naming the fix.
    """
    check_solver(config)
    _stops_above_zero(config)
    for plan in load_plans(config["plan"]).values():
        check_range(plan, model)
    name = grid_name(config, model)
    if model.flow:
        _flow(config, name, 2, 1.0)
    else:
        _ends(config, model, name)


def _ends(config: Mapping[str, Any], model: Noising, name: str) -> tuple[float, float]:
    """Largest and smallest level of a continuous grid."""
    low, high = model.sigma_range
    given = {key: config[key] for key in ("start", "end")}
    if name in (*SPACINGS, *AYS) and any(value is not None for value in given.values()):
        raise ValueError(
            f"start or end with grid {name!r}, whose ends are its timesteps: use grid='log-linear', 'karras', 'beta' "
            "or 'ge-paper'"
        )
    for key, value in given.items():
        if value is not None and not 0.99 * low <= value <= 1.01 * high:
            raise ValueError(f"{key} = {value}: must be in the model's range of sigma, [{low:.6g}, {high:.6g}]")
    start = given["start"] or config["sigma_max"] or high
    end = given["end"] or config["sigma_min"] or low
    return start, end


def _flow(config: Mapping[str, Any], name: str, n: int, shift: float) -> Grid:
    """A grid in flow time: spaced, shifted once, stretched to `shift_terminal`, respaced by name."""
    for key in ("start", "end"):
        if config[key] is not None and not 0 < config[key] <= 1:
            raise ValueError(f"{key} = {config[key]}: levels of a flow model are times in (0, 1]")
    if name == "flow" and config["end"] is not None:
        raise ValueError("end with grid 'flow', which ends where its steps end: use grid='log-linear' or 'karras'")
    terminal, first = config["shift_terminal"], 1.0 if config["start"] is None else float(config["start"])
    if name == "flow" and first == 1 and not terminal:
        return grids.flow(n, shift)
    times = [_shifted(first * (1 - i / n), shift) for i in range(n)]
    if config["start"] is not None:
        times = [t * first / times[0] for t in times]
    if terminal:
        factor = (1 - times[-1]) / (1 - terminal)
        times = [1 - (1 - t) / factor for t in times] if factor > 0 else times
    if name != "flow" and n > 1:
        end = times[-1] if config["end"] is None else float(config["end"])
        spread: dict[str, Callable[..., Grid]] = {"karras": grids.karras, "log-linear": grids.log_linear, "beta": _beta}
        times = list(spread[name](n, times[0], end)[:-1])
    return grids.from_sigmas([*(sigma_from_flow_time(min(t, 1.0)) for t in times), 0.0])


def _shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def _beta(n: int, high: float, low: float, last: str = "zero") -> Grid:
    """Quantiles of a Beta(.6, .6) between two levels (2407.12173)."""
    beta = require("scipy.stats", extra="train", purpose="grid 'beta'").beta
    count = n if last == "zero" else n + 1
    levels = [low + float(beta.ppf(1 - i / max(count - 1, 1), 0.6, 0.6)) * (high - low) for i in range(count)]
    return grids.from_sigmas([*levels, 0.0] if last == "zero" else levels)


def _stops_above_zero(config: Mapping[str, Any]) -> bool:
    final = config["final_sigmas_type"]
    if final not in (None, "zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type {final!r} is not one of zero, sigma_min")
    return final == "sigma_min" or (final is None and not config["set_alpha_to_one"])


def _finish(config: Mapping[str, Any], model: Noising, levels: Iterable[float]) -> Grid:
    """Levels and where they end: at 0, or at the smallest level where the config says so and the last lies above."""
    levels, low = list(levels), model.sigma_range[0]
    end = low if _stops_above_zero(config) and low < levels[-1] else 0.0
    return grids.from_sigmas([*levels, end])


def _floats(values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().tolist()
    return tuple(float(value) for value in values)
