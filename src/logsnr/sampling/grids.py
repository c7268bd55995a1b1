"""Grids: the noise levels that a plan visits.

A grid is a tuple of n + 1 strictly decreasing sigmas for n evaluations.  `last="zero"` ends at sigma 0, whose step is
the plain denoise (n levels of the named spacing, then 0); `last="min"` stops at the smallest level of the spacing
(n + 1 levels), as the papers' tables do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from logsnr.errors import require, unknown
from logsnr.noise import flow_time, sigma_from_flow_time
from logsnr.sampling.plan import Grid, check_sigmas
from logsnr.theory import EtaCurve, grid_between, interpolated
from logsnr.timesteps import TimestepTable

__all__ = [
    "admissible",
    "angles",
    "beta",
    "flow",
    "flow_range",
    "from_schedule",
    "from_sigmas",
    "ge_paper",
    "karras",
    "log_linear",
    "paper_timesteps",
    "timesteps",
]

Last = Literal["zero", "min"]
Spacing = Literal["trailing", "leading", "linspace"]
Style = Literal["log-linear", "ddim", "edm"]

ETA_RANGE = (1e-3, 0.999)
"""Where `admissible` holds eta: at 0 one step would go to sigma 0, and from 1 on nothing is promised of any step."""


class Quantiles(Protocol):
    """A noise schedule, as far as a grid needs it."""

    def grid(self, n: int, /) -> Tensor:
        """n + 1 decreasing sigmas at equal quantiles of the schedule's density, float64."""
        ...


def log_linear(n: int, sigma_max: float, sigma_min: float, last: Last = "zero") -> Grid:
    """Geometric from `sigma_max` to `sigma_min`: uniform in log-SNR (2306.04848, sec. 4).

    The same as the "lu lambdas" of DPM-Solver and the "exponential" sigmas of k-diffusion and diffusers.

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max < inf, or `last` is unknown.
    """
    levels = count_levels(n, last)
    _check_range(sigma_max, sigma_min)
    low, high = math.log(sigma_min), math.log(sigma_max)
    inner = [math.exp(high + (low - high) * i / (levels - 1)) for i in range(1, levels - 1)]
    return _close(sigma_max, inner, sigma_min, levels, last)


def karras(n: int, sigma_max: float, sigma_min: float, rho: float = 7.0, last: Last = "zero") -> Grid:
    """Uniform in sigma^(1/rho) from `sigma_max` to `sigma_min` (EDM, 2206.00364, eq. 5).

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max < inf, rho <= 0, or `last` is unknown.
    """
    levels = count_levels(n, last)
    _check_range(sigma_max, sigma_min)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho = {rho}: must be in (0, inf); EDM uses 7")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    inner = [(high + (low - high) * i / (levels - 1)) ** rho for i in range(1, levels - 1)]
    return _close(sigma_max, inner, sigma_min, levels, last)


def flow(n: int, shift: float = 1.0, last: Last = "zero") -> Grid:
    """Uniform in flow time from t = 1 (sigma inf) to t = 0, then sigma times `shift` (SD3, 2403.03206, eq. 23).

    The shift t -> shift t/(1 + (shift - 1) t) is multiplication of sigma = t/(1 - t).  `last="min"` takes n + 2 times
    from 1 to 0 and leaves out the 0.

    Raises:
        ValueError: if n < 1, shift is not in (0, inf), or `last` is unknown.
    """
    steps = count_levels(n, last)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}: must be in (0, inf); 1 for no shift, 3 for SD3")
    times = [(steps - i) / steps for i in range(n + 1)]
    return check_sigmas([shift * sigma_from_flow_time(t) for t in times])


def flow_range(n: int, sigma_max: float, sigma_min: float, last: Last = "zero", shift: float = 1.0) -> Grid:
    """Uniform in t = sigma/(shift + sigma) from `sigma_max` to `sigma_min`: `flow` for a model with finite ends.

    Half of t lies below sigma = shift.  Shift 1 is flow time; 3 is Stable Diffusion 3's.

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max < inf, shift is not positive and finite, or `last` is
            unknown.
    """
    levels = count_levels(n, last)
    _check_range(sigma_max, sigma_min)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}: must be in (0, inf); 1 for none, 3 for SD3")
    first, final = flow_time(sigma_max / shift), flow_time(sigma_min / shift)
    inner = [shift * sigma_from_flow_time(first + (final - first) * i / (levels - 1)) for i in range(1, levels - 1)]
    return _close(sigma_max, inner, sigma_min, levels, last)


def angles(n: int, sigma_max: float, sigma_min: float, last: Last = "zero", shift: float = 1.0) -> Grid:
    """Uniform in theta from `sigma_max` to `sigma_min`, where sigma = shift tan^2(theta).

    The density of levels in log sigma is the root of that of `flow_range`: half way from there to `log_linear`.  The
    flow time of sigma/shift is sin^2(theta).

    Raises:
        ValueError: as `flow_range`.
    """
    levels = count_levels(n, last)
    _check_range(sigma_max, sigma_min)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift = {shift}: must be in (0, inf); 1 for none")
    first, final = (math.atan(math.sqrt(sigma / shift)) for sigma in (sigma_max, sigma_min))
    inner = [shift * math.tan(first + (final - first) * i / (levels - 1)) ** 2 for i in range(1, levels - 1)]
    return _close(sigma_max, inner, sigma_min, levels, last)


def timesteps(
    n: int, table: TimestepTable, spacing: Spacing = "trailing", last: Last = "zero", offset: int = 0
) -> Grid:
    """Levels of a discrete table, as diffusers spaces them.

    `"trailing"` is T, T - T/n, ... minus 1; `"leading"` is 0, T//n, 2(T//n), ... plus `offset`; `"linspace"` is evenly
    spread over 0 ... T - 1.  `last="min"` ends at the table's smallest sigma.

    Raises:
        ValueError: if n is not in [1, T], a name is unknown, or the levels repeat.
    """
    total = len(table)
    count_levels(n, last)
    if n > total:
        raise ValueError(f"n = {n}: must be in [1, {total}], the table has {total} levels")
    if spacing == "trailing":
        steps = [round(total - i * total / n) - 1 for i in range(n)]
    elif spacing == "leading":
        steps = [(n - 1 - i) * (total // n) + offset for i in range(n)]
    elif spacing == "linspace":
        count = n if last == "zero" else n + 1
        steps = [round((total - 1) * (1 - i / max(count - 1, 1))) for i in range(n)]
    else:
        raise unknown("spacing", spacing, get_args(Spacing))
    if not 0 <= steps[-1] <= steps[0] < total:
        raise ValueError(f"timesteps {steps[0]} ... {steps[-1]} leave the table's [0, {total - 1}]: change offset")
    if last == "min" and steps[-1] == 0:
        raise ValueError(f"{spacing} timesteps of n = {n} already end at t = 0: use last='zero', or another offset")
    return check_sigmas([*(table.sigma(float(t)) for t in steps), 0.0 if last == "zero" else table.sigma(0.0)])


def beta(n: int, sigma_max: float, sigma_min: float, a: float = 0.6, b: float = 0.6, last: Last = "zero") -> Grid:
    """Quantiles of a Beta(a, b) between two levels (2407.12173, which has .6, .6).

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max < inf, `last` is unknown, or levels repeat.
        LogsnrError: if scipy is not installed.
    """
    quantile = require("scipy.stats", extra="train", purpose="grid 'beta'").beta.ppf
    count = count_levels(n, last)
    _check_range(sigma_max, sigma_min)
    levels = [
        sigma_min + float(quantile(1 - i / max(count - 1, 1), a, b)) * (sigma_max - sigma_min) for i in range(count)
    ]
    return check_sigmas([*levels, 0.0] if last == "zero" else levels)


def ge_paper(
    n: int, table: TimestepTable, start: float = 40.0, end: float | None = None, style: Style = "log-linear"
) -> Grid:
    """The gradient-estimation paper's grid (2306.04848, sec. 5): the levels of `paper_timesteps`, n + 1 sigmas.

    Ends at sigma(0) > 0: the paper's output keeps that residual noise.

    Raises:
        ValueError: as `paper_timesteps`, and if rounding makes two levels one (then n is too large for the table).
    """
    steps = paper_timesteps(n, table, start, end, style)
    for i in range(n):
        if steps[i] == steps[i + 1]:
            raise ValueError(
                f"timestep {steps[i]} appears twice in the {style} grid of n = {n}: the table has no two levels there; "
                "use fewer steps, a larger end, or a continuous grid"
            )
    return check_sigmas([table.sigma(float(t)) for t in steps])


def paper_timesteps(
    n: int, table: TimestepTable, start: float = 40.0, end: float | None = None, style: Style = "log-linear"
) -> tuple[int, ...]:
    """The n + 1 integer timesteps of the paper's code, from noisy to clean (repeats are kept).

    `"log-linear"`: n geometric sigmas from start to end, each rounded up to the table, then t = 0; end None is the
    geometric mean of DDIM's last two levels, sqrt(sigma(T/n) sigma(0)).  `"ddim"`: evenly spread in t, end None is
    t = 0.  `"edm"`: n + 1 levels of the rho 7 grid rounded up, end None is .002.

    Raises:
        ValueError: if n < 1, `start` exceeds the table, `end` is not below `start`, or the style is unknown.
    """
    count_levels(n, "min")
    sigma_0, sigma_max = table.sigma_range
    if style == "log-linear" and end is None:
        end = math.sqrt(table.sigma(float(len(table) // n)) * sigma_0)
    elif style == "edm" and end is None:
        end = 0.002
    low = sigma_0 if end is None else end
    if not start <= sigma_max:
        raise ValueError(f"start = {start}: the table ends at sigma {sigma_max:.6g}; start there or below")
    if n > 1 or style != "log-linear":
        _check_range(start, low)
    if style == "log-linear":
        levels = log_linear(n - 1, start, low, last="min") if n > 1 else (start,)
        return (*(_round_up(table, s) for s in levels), 0)
    if style == "edm":
        return tuple(_round_up(table, s) for s in karras(n, start, low, last="min"))
    if style == "ddim":
        first, final = _round_up(table, start), _round_up(table, low)
        return tuple(math.trunc(first + (final - first) * i / n) for i in range(n + 1))
    raise unknown("style", style, get_args(Style))


def from_schedule(schedule: Quantiles, n: int, last: Last = "zero") -> Grid:
    """Equal quantiles of a noise schedule: as many evaluations where training spent as many draws.

    A schedule that itself reaches sigma 0 ends there under either `last`.

    Raises:
        ValueError: if n < 1, `last` is unknown, or the schedule's levels do not decrease.
    """
    count_levels(n, last)
    whole = _floats(schedule.grid(n))
    if last == "min" or whole[-1] == 0:
        return check_sigmas(whole)
    inner = _floats(schedule.grid(n - 1)) if n > 1 else whole[:1]
    return check_sigmas([*inner, 0.0])


def admissible(n: int, eta: EtaCurve, sigma_max: float, sigma_min: float, last: Last = "zero") -> Grid:
    """The admissible schedule of a measured relative error, from `sigma_max` to `sigma_min` (2306.04848, sec. 4).

    `theory.admissible_schedule` of the curve, held within `ETA_RANGE`, for the least nu with which its steps reach
    `sigma_min`: steps beta = c/(eta(sigma) + c) of one c, long where the denoiser projects well.  A constant eta gives
    the log-linear grid.  The step to sigma 0 is not among those that share nu.

    Args:
        n: evaluations.
        eta: relative error against noise level: `Passport.eta_curve`, `ErrorCurve.eta()`, or any curve.
        sigma_max: largest level.
        sigma_min: smallest level above 0.
        last: "zero" or "min".

    Raises:
        ValueError: if n < 1, not 0 < sigma_min < sigma_max < inf, `last` is unknown, or the curve is empty or nan.
    """
    steps = count_levels(n, last) - 1
    _check_range(sigma_max, sigma_min)
    curve, (least, most) = interpolated(eta), ETA_RANGE

    def held(sigma: float) -> float:
        error = curve(sigma)
        return error if math.isnan(error) else min(max(error, least), most)

    if steps == 0:
        return check_sigmas([sigma_max, 0.0])
    found, _ = grid_between(held, steps, sigma_max=sigma_max, sigma_min=sigma_min)
    return check_sigmas([*found, 0.0] if last == "zero" else found)


def from_sigmas(sigmas: Sequence[float] | Tensor) -> Grid:
    """A grid of one's own: n + 1 strictly decreasing sigmas.

    Raises:
        ValueError: if there are fewer than two, one is nan or negative, or they do not strictly decrease.
    """
    return check_sigmas(_floats(sigmas) if isinstance(sigmas, Tensor) else sigmas)


def count_levels(n: int, last: Last) -> int:
    """How many levels of a spacing the grid takes before a possible 0."""
    if n < 1:
        raise ValueError(f"n = {n}: a grid needs at least 1 evaluation")
    if last not in get_args(Last):
        raise unknown("last", last, get_args(Last), " (end at sigma 0, or stop at the smallest level)")
    return n if last == "zero" else n + 1


def _check_range(sigma_max: float, sigma_min: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma from {sigma_max} to {sigma_min}: needs 0 < smallest < largest < inf; last='zero' appends sigma 0, "
            "flow() starts at sigma inf"
        )


def _close(sigma_max: float, inner: list[float], sigma_min: float, levels: int, last: Last) -> Grid:
    """The grid with its end points as given, not as rounding leaves them."""
    ends = [sigma_max, *inner, sigma_min][:levels] if levels == 1 else [sigma_max, *inner, sigma_min]
    return check_sigmas([*ends, 0.0] if last == "zero" else ends)


def _round_up(table: TimestepTable, sigma: float) -> int:
    """Smallest t with sigma(t) >= sigma; a level within float32 rounding of a grid point is that grid point."""
    below = torch.searchsorted(table.sigmas, torch.tensor(sigma * (1 - 1e-6), dtype=torch.float64))
    return min(int(below), len(table) - 1)


def _floats(values: Tensor) -> list[float]:
    out: list[float] = values.detach().to("cpu", torch.float64).flatten().tolist()
    return out
