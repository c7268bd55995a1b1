"""What is sampled with where nobody says: the plan for a model that nobody asked anything.

    GE(1.7) on even times t = sigma/(sigma + 4 sigma_data), from the first level to the smallest

Half of the levels lie above 4 sigma_data and half below, where an image takes shape.  The first level is the model's
largest, where pure noise is a state of the model.  An eps or score network knows least there: an estimate off by .03 at
sigma 158 is an x0 off by 5.  Its plan starts at max(min(12 n, 80), 8 n) sigma_data at most: of few steps none is spent
where nothing is learned, and more of them can afford a first state nearer to pure noise.

From `UNIVERSAL_FROM` evaluations on, the universal plan of that number is better (sampling/universal.py).  All
numbers here were chosen on the very networks that docs/few-steps.md judges, trained for this in the ways of others.
"""

from __future__ import annotations

import math
from dataclasses import replace

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.sampling.grids import flow_range
from logsnr.sampling.plan import Plan
from logsnr.sampling.solvers import ge
from logsnr.sampling.universal import universal_plan, universal_sizes

GAMMA = 1.7
MIDDLE = 4.0
"""The level in the middle of the times, in units of sigma_data."""
HIGHEST = 120.0
"""Of a network that knows nothing at sigma inf: the first level of universal plans at most, in units of sigma_data."""
UNIVERSAL_FROM = {True: 6, False: 8}
"""The number of evaluations from which universal plans win, by whether the network knows anything at sigma inf."""


def default_plan(nfe: int, low: float, high: float, *, sigma_data: float = 1.0, finite_at_inf: bool = True) -> Plan:
    """Gradient estimation on the levels that suit most models.

    Args:
        nfe: number of evaluations.
        low: smallest noise level the model may be asked at; the run ends there.
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
    if not finite_at_inf:
        high = min(high, max(max(min(12.0 * nfe, 80.0), 8.0 * nfe) * sigma_data, 2 * low))
    plan = ge(flow_range(nfe, high, low, last="min", shift=MIDDLE * sigma_data), GAMMA)
    return replace(plan, meta={**plan.meta, "solver": "default", "gamma": GAMMA, "sigma_data": sigma_data})


def auto_plan(nfe: int, low: float, high: float, *, sigma_data: float = 1.0, finite_at_inf: bool = True) -> Plan:
    """The better of the default and the universal plan, as far as networks that were asked can tell.

    Arguments and errors are those of `default_plan`; `plan.meta["solver"]` says which of the two it is.
    """
    if nfe in universal_sizes() and nfe >= UNIVERSAL_FROM[finite_at_inf]:
        high = high if finite_at_inf else min(high, max(HIGHEST * sigma_data, 2 * low))
        return universal_plan(nfe, low, high, sigma_data=sigma_data)
    return default_plan(nfe, low, high, sigma_data=sigma_data, finite_at_inf=finite_at_inf)


def plan_for(denoiser: Denoiser, nfe: int) -> Plan:
    """The plan of `nfe` evaluations for a denoiser about which nothing else is said; `plan.meta["solver"]` says which.

    The model's own (`denoiser.plans`, calibrated for it) where there is one of that number, else `auto_plan` over
    `sampling_range`.  Guided denoisers have the plans of the model inside, made without guidance: still the better ones
    (zoo:fashion-mnist-classes at scale 2, RMSE to the teacher at 5 and 10 evaluations: .085 and .022, of the universal
    plans .110 and .027).

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
    return auto_plan(nfe, low, high, sigma_data=denoiser.sigma_data, finite_at_inf=denoiser.finite_at_inf)
