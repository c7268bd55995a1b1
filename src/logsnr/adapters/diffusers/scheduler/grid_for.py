"""Where steps land: the levels that a scheduler's config names, and those that a caller gives.

Names are those of `sampling.names`, by what a grid needs:

    a table      trailing, leading, linspace, ge-paper: timesteps, and where the last one goes
    a range      karras, log-linear, beta, ...: between the model's largest and smallest level, or start and end
    nothing      Align Your Steps' lists (2404.14507)

A flow model's "flow" is t = 1, 1 - 1/n, ..., 1/n, and 0; its other grids are spread over those times.  They
are spaced in flow time t, then shifted: t -> shift t/(1 + (shift - 1) t), which multiplies sigma by `shift` (e^mu under
dynamic shifting), once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from logsnr.adapters.diffusers.config import Noising
from logsnr.errors import unknown
from logsnr.noise import covers, sigma_from_flow_time
from logsnr.sampling import grids
from logsnr.sampling.names import GRIDS, Needs, find_grid
from logsnr.sampling.plan import Grid
from logsnr.timesteps import TimestepTable

TIME_SHIFTS = ("exponential", "linear")


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
        given = {key: config[key] for key in ("shift", "flow_shift") if config[key] is not None}
        if len({*given.values()}) > 1:
            raise ValueError(f"shift = {config['shift']} and flow_shift = {config['flow_shift']}: give one of the two")
        shift = float(next(iter(given.values()), 1.0))
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}: must be in (0, inf); 1 for none, 3 for SD3")
    return shift


def explicit(
    config: Mapping[str, Any],
    model: Noising,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    shift: float,
) -> Grid:
    """The levels a caller gave: timesteps unchanged, sigmas of a flow times `shift`.

    Raises:
        ValueError: if they leave the model's range or do not decrease.
    """
    if timesteps is not None:
        low, high = (0, model.steps - 1) if model.table is not None else (0 if model.flow else -math.inf, model.steps)
        for t in timesteps:
            if not low <= t <= high:
                raise ValueError(f"timestep {t:g} is outside [{low}, {high}]: give timesteps the model was trained on")
        return _finish(config, model, [model.sigma(t) for t in timesteps])
    assert sigmas is not None
    if not model.flow:
        return grids.from_sigmas(sigmas)
    for t in sigmas:
        if not 0 < t <= 1:
            raise ValueError(f"sigmas holds {t:g}: the sigmas of a flow model are times in (0, 1], 0 is appended")
    return grids.from_sigmas([*(shift * sigma_from_flow_time(t) for t in sigmas), 0.0])


def named(config: Mapping[str, Any], model: Noising, n: int, shift: float) -> Grid:
    """The grid the config names, with n evaluations.

    Raises:
        ValueError: if the name is unknown for this model, or n, start or end do not fit.
    """
    name = grid_name(config, model)
    if model.flow:
        return _flow(config, name, n, shift)
    start, end = _ends(config, model, name)
    entry, table = GRIDS[name], model.table
    last: grids.Last = "min" if _stops_above_zero(config) else "zero"
    if entry.needs == "nothing":
        return entry(n, start, end, last=last)
    if entry.needs == "range":
        options: dict[str, Any] = {"rho": float(config["rho"])} if name == "karras" else {}
        if not math.isinf(start):
            return entry(n, start, end, last=last, **options)
        # zero terminal SNR: inf first, then the spacing from the table's largest finite level
        assert table is not None
        rest = entry(n - 1, float(table.sigmas[-2]), end, last=last, **options) if n > 1 else (0.0,)
        return grids.from_sigmas([math.inf, *rest])
    assert table is not None
    if name == "ge-paper":
        return entry(n, start, end, table=table, start=min(config["start"] or 40.0, start), end=config["end"])
    table = _unclipped(config, table)
    total = len(table)
    if n > total:
        raise ValueError(f"num_inference_steps = {n}: the model has {total} timesteps; use fewer, or grid='log-linear'")
    if n == 1 and name in ("leading", "linspace"):
        return _finish(config, model, [float(table.sigmas[-1])])  # one step from the offset would be one from no noise
    if config["skip_last"] and name in ("leading", "linspace") and n < total:
        offset = min(int(config["steps_offset"]), total - 1 - n * (total // (n + 1)))
        even = [(total - 1) * (n - i) / n for i in range(n)]
        steps = map(round, even) if name == "linspace" else ((n - i) * (total // (n + 1)) + offset for i in range(n))
        return _finish(config, model, [float(table.sigma(float(t))) for t in steps])
    # an offset that would leave the table (n = T) is as large as fits
    offset = min(int(config["steps_offset"]), total - 1 - (n - 1) * (total // n))
    options = {"offset": offset} if name == "leading" else {}
    return _finish(config, model, entry(n, start, end, table=table, **options)[:-1])


def _unclipped(config: Mapping[str, Any], table: TimestepTable) -> TimestepTable:
    """The table without the levels above a config's `lambda_min_clipped`, where lambda = -ln sigma.

    Raises:
        ValueError: if fewer than two are left.
    """
    least, lambdas = config["lambda_min_clipped"], -table.sigmas.log()
    if not (isinstance(least, Real) and float(least) <= float(lambdas[1])):
        raise ValueError(
            f"lambda_min_clipped = {least!r}: levels above e^-lambda are left off, so it must be a number up to "
            f"{float(lambdas[1]):.4g}, where two are left; -5.1 is usual, -inf leaves off none"
        )
    count = int((lambdas >= float(least)).sum())
    return table if count == len(table) else TimestepTable(table.alphas_cumprod[:count], name=table.name)


def grid_name(config: Mapping[str, Any], model: Noising) -> str:
    """The grid that a config asks for: by `grid`, or as stock schedulers say it.

    Raises:
        ValueError: if the model has no such grid.
    """
    name = config["grid"]
    if name is None:
        flags = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log-linear", "use_lu_lambdas": "log-linear"}
        if model.edm and config["sigma_schedule"] == "exponential":
            return "log-linear"
        on = [grid for flag, grid in {**flags, "use_beta_sigmas": "beta"}.items() if config[flag]]
        default = "flow" if model.flow else config["timestep_spacing"] if model.table is not None else "karras"
        name = on[0] if on else default
    needs: tuple[Needs, ...] = ("range",) if model.flow or model.table is None else ("range", "table", "nothing")
    kind = "flow model" if model.flow else "model"
    key, grid = find_grid(name, needs, where=f", which this {kind} has")
    if grid.keywords:
        raise ValueError(f"grid {name!r}: a run stops above 0 by final_sigmas_type='sigma_min'; give grid={key!r}")
    return key


def check_spacing(config: Mapping[str, Any], model: Noising) -> None:
    """Refuse a grid, its ends or a place to stop that no number of steps would make right.

    Raises:
        ValueError: naming the fix.
    """
    if config["interpolation_type"] != "linear":
        raise ValueError(
            f"interpolation_type = {config['interpolation_type']!r}: its levels are not those of its timesteps; pass "
            "interpolation_type='linear', with grid='log-linear' for even ratios"
        )
    _stops_above_zero(config)
    if model.table is not None:
        _unclipped(config, model.table)
    for key in ("start", "end"):
        if not (config[key] is None or isinstance(config[key], Real)):
            raise ValueError(f"{key} = {config[key]!r}: give a number")
    if config["time_shift_type"] not in TIME_SHIFTS:
        raise unknown("time_shift_type", config["time_shift_type"], TIME_SHIFTS)
    name = grid_name(config, model)
    if config["gamma"] == "auto":
        ends(config, model)
    elif model.flow:
        if not config["use_dynamic_shifting"]:
            shift_of(config, None)
        _flow(config, name, 2, 1.0)
    else:
        _ends(config, model, name)


def ends(config: Mapping[str, Any], model: Noising) -> tuple[float, float]:
    """Smallest and largest level of a run that has no grid by name: the model's, or `end` and `start`.

    Raises:
        ValueError: if one is outside the model's range, or they do not decrease.
    """
    low, high = model.sigma_range
    given = {key: config[key] for key in ("start", "end")}
    if model.flow:
        _check_times(given)
        given = {key: None if t is None else sigma_from_flow_time(t) for key, t in given.items()}
    _check_levels(given, model)
    first, last = (high if given["start"] is None else given["start"]), (low if given["end"] is None else given["end"])
    if not last < first:
        raise ValueError(f"start = {config['start']}, end = {config['end']}: a run goes down, give start > end")
    return last, first


def _ends(config: Mapping[str, Any], model: Noising, name: str) -> tuple[float, float]:
    """Largest and smallest level of a continuous grid."""
    low, high = model.sigma_range
    given = {key: config[key] for key in ("start", "end")}
    fixed = GRIDS[name].needs in ("table", "nothing") and name != "ge-paper"
    if fixed and any(value is not None for value in given.values()):
        raise ValueError(
            f"start or end with grid {name!r}, whose ends are its timesteps: use grid='log-linear', 'karras', 'beta' "
            "or 'ge-paper'"
        )
    _check_levels(given, model)
    _check_levels({key: config[key] for key in ("sigma_max", "sigma_min") if not fixed}, model)
    start = given["start"] or config["sigma_max"] or high
    end = given["end"] or config["sigma_min"] or low
    return start, end


def _check_levels(given: Mapping[str, float | None], model: Noising) -> None:
    low, high = model.sigma_range
    for key, value in given.items():
        if value is not None and not covers((low, high), value, value):
            raise ValueError(f"{key} = {value}: must be in the model's range of sigma, [{low:.6g}, {high:.6g}]")


def _check_times(given: Mapping[str, float | None]) -> None:
    for key, value in given.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{key} = {value}: levels of a flow model are times in (0, 1]")


def _flow(config: Mapping[str, Any], name: str, n: int, shift: float) -> Grid:
    """A grid in flow time: spaced, shifted once, stretched to `shift_terminal`, respaced by name."""
    _check_times({key: config[key] for key in ("start", "end")})
    if name == "flow" and config["end"] is not None:
        raise ValueError("end with grid 'flow', which ends where its steps end: use grid='log-linear' or 'karras'")
    if name != "flow" and config["sigma_max"] is not None:
        return _between(config, name, n)
    terminal, first = config["shift_terminal"], 1.0 if config["start"] is None else float(config["start"])
    if name == "flow" and first == 1 and not terminal:
        return grids.flow(n, shift)
    first = _shifted(first, 1 / shift)
    times = [_shifted(first * (1 - i / n), shift) for i in range(n)]
    if terminal:
        factor = (1 - times[-1]) / (1 - terminal)
        times = [1 - (1 - t) / factor for t in times] if factor > 0 else times
    if name != "flow" and n > 1:
        end = times[-1] if config["end"] is None else float(config["end"])
        times = list(GRIDS[name](n, times[0], end)[:-1])
    return grids.from_sigmas([*(sigma_from_flow_time(min(t, 1.0)) for t in times), 0.0])


def _between(config: Mapping[str, Any], name: str, n: int) -> Grid:
    """Levels of a flow spaced by name between noise-to-signal ratios, as DPM-Solver's kin has them; no shift."""
    high, low = config["sigma_max"], config["sigma_min"]
    if low is None or any(config[key] is not None for key in ("start", "end")):
        raise ValueError(
            f"sigma_max = {high} with sigma_min = {low}, start = {config['start']}, end = {config['end']}: levels of a "
            f"flow by grid {name!r} lie between sigma_min and sigma_max, or between the times end and start"
        )
    return GRIDS[name](n, float(high), float(low))


def _shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def _stops_above_zero(config: Mapping[str, Any]) -> bool:
    final = config["final_sigmas_type"]
    if final not in (None, "zero", "sigma_min"):
        raise unknown("final_sigmas_type", final, ["zero", "sigma_min"])
    return final == "sigma_min" or (final is None and not config["set_alpha_to_one"])


def _finish(config: Mapping[str, Any], model: Noising, levels: Iterable[float]) -> Grid:
    """Levels and where they end: at 0, or at the smallest level where the config says so and the last lies above."""
    levels, low = list(levels), model.sigma_range[0]
    end = low if _stops_above_zero(config) and low < levels[-1] else 0.0
    return grids.from_sigmas([*levels, end])
