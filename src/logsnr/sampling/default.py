"""What is sampled with where nobody says: the plan for a model that nobody asked anything.

    4 to 12 evaluations     the universal plan (sampling/universal.py)
    fewer                   GE(1.7) on even t = sigma/(sigma + 4 sigma_data), down to the smallest level
    more                    iPNDM-4 on even theta, sigma = 3 sigma_data tan^2(theta), and a last denoise

Gradient estimation suits few steps and has an error that many do not remove (gamma would have to go to 1.5); iPNDM
converges.  The last two are `default_plan`.

The first level is the model's largest, where pure noise is a state of the model.  An eps or score network knows least
there: an estimate off by .03 at sigma 158 is an x0 off by 5.  Its plan starts at max(min(15 n, 120), 8 n) sigma_data at
most: of few steps none is spent where nothing is learned, and more of them can afford a first state nearer to pure
noise.

The numbers of the default were chosen on the very networks that docs/few-steps.md judges.
"""

from __future__ import annotations

import math
from dataclasses import replace

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.grids import angles, flow_range
from logsnr.sampling.plan import Basis, Grid, Plan
from logsnr.sampling.solvers import ge, ipndm
from logsnr.sampling.universal import universal_plan, universal_sizes

GAMMA = 1.7
MOST = 12
"""Evaluations up to which gradient estimation is the better of the two."""
MIDDLE = 4.0
"""The level in the middle of gradient estimation's times, in units of sigma_data."""
CENTRE = 3.0
"""The level of theta = pi/4, in units of sigma_data."""
UNIVERSAL_FROM = 4
"""The universal plan of three evaluations was judged on no network that its fit did not know."""


def first_level(nfe: int, low: float, high: float, *, sigma_data: float, finite_at_inf: bool) -> float:
    """Where a plan of a model between two levels begins: at the largest if the network knows anything in pure noise."""
    if finite_at_inf:
        return high
    return min(high, max(max(min(15.0 * nfe, 120.0), 8.0 * nfe) * sigma_data, 2 * low))


def default_rows(levels: Grid, basis: Basis = "eps") -> Plan:
    """The default's solver on levels of one's own: gradient estimation, beyond `MOST` steps iPNDM-4."""
    return ge(levels, GAMMA, basis) if len(levels) - 1 <= MOST else ipndm(levels, 4, basis)


def default_plan(nfe: int, low: float, high: float, *, sigma_data: float = 1.0, finite_at_inf: bool = True) -> Plan:
    """Gradient estimation, or with many evaluations iPNDM, on the levels that suit most models.

    Args:
        nfe: number of evaluations.
        low: smallest noise level the model may be asked at; the run ends there, or with many evaluations at 0.
        high: largest.
        sigma_data: standard deviation of the data, in the units of x (about 1 for latents, .5 for images).
        finite_at_inf: whether the network knows anything of x in pure noise (`Prediction.finite_at_inf`): v, flow, x0
            and EDM networks do, eps and score networks do not.

    Raises:
        LogsnrError: if nfe is no positive number, or the range or sigma_data is none.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise LogsnrError(f"nfe = {nfe!r}: must be an integer, at least 1")
    if not 0 < low < high < math.inf:
        raise LogsnrError(f"range of levels ({low}, {high}): needs 0 < low < high < inf")
    if not 0 < sigma_data < math.inf:
        raise LogsnrError(f"sigma_data = {sigma_data}: must be in (0, inf); about 1 for latents, .5 for images")
    high = first_level(nfe, low, high, sigma_data=sigma_data, finite_at_inf=finite_at_inf)
    if nfe <= MOST:
        plan = default_rows(flow_range(nfe, high, low, last="min", shift=MIDDLE * sigma_data))
    else:
        plan = default_rows(angles(nfe, high, low, shift=CENTRE * sigma_data))
    return replace(plan, meta={**plan.meta, "solver": "default", "sigma_data": sigma_data})


def auto_plan(
    nfe: int,
    low: float,
    high: float,
    *,
    sigma_data: float = 1.0,
    finite_at_inf: bool = True,
    dim: int | None = None,
) -> Plan:
    """The universal plan, or the default where there is none of so many evaluations.

    Arguments and errors are those of the two; `plan.meta["solver"]` says which it is.
    """
    if nfe in universal_sizes() and nfe >= UNIVERSAL_FROM and low < high:
        first = first_level(nfe, low, high, sigma_data=sigma_data, finite_at_inf=finite_at_inf)
        return universal_plan(nfe, low, first, sigma_data=sigma_data, dim=dim)
    return default_plan(nfe, low, high, sigma_data=sigma_data, finite_at_inf=finite_at_inf)


def plan_for(denoiser: Denoiser, nfe: int) -> Plan:
    """The plan of `nfe` evaluations for a denoiser about which nothing else is said; `plan.meta["solver"]` says which.

    The model's own (`denoiser.plans`, calibrated for it) where there is one of that number, else `auto_plan` over
    `sampling_range`.  Guided denoisers have the plans of the model inside, made without guidance: still the better ones
    (zoo:fashion-mnist-classes at scale 2, RMSE to the teacher at 5 and 10 evaluations: .085 and .022, of the universal
    plans of 0.1 .110 and .027).

    Raises:
        ValueError: if nfe is no positive number.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(
            f"plan = {nfe!r}: give a Plan (logsnr.solvers make them), or a number of evaluations from 1 on"
        )
    own: Plan | None = denoiser.plans.get(nfe)
    if own is not None:
        return own
    low, high = denoiser.sampling_range
    known = denoiser.finite_at_inf
    return auto_plan(nfe, low, high, sigma_data=denoiser.sigma_data, finite_at_inf=known, dim=denoiser.dim)
