"""Universal plans: few-step plans for a model that nobody calibrated.

    sigma_0 = the model's largest,     sigma_i = sigma_data u_i,     rows as they are

In units of sigma_data all data have variance 1, and neither eps nor x0 rows know the unit: u_i and the rows were fitted
once over several models (calibration/universal.py, tools/universal.py) and are kept in universal.json, one plan
per number of evaluations and range.  The first level is the model's own largest, because pure noise is a state of the
model there and nowhere below: at sigma it lacks the mean image, which is sqrt(D) |mean| / sigma standard deviations of
the noise along its own direction, and large images have large D.  Models whose levels reach 40 sigma_data get the
*wide* plans, whose first evaluation sees little but noise; others (Stable Diffusion's end at 14.6) the *narrow* ones.
The coarsest structure of an image of D numbers stands out of the noise up to about .1 sqrt(D) sigma_data (a spectrum of
1/f^2), so models of `LARGE` numbers and more get the *large* plans, whose second level is above that.
Other levels that leave a model's range are drawn together, geometrically, until they fit.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from logsnr.errors import LogsnrError, unknown
from logsnr.sampling.plan import Plan

FORMAT = 1
WIDE = 40.0
"""From this largest level on, in units of sigma_data, a model gets the wide plans."""


LARGE = 60_000
"""From so many dimensions on a model of a wide range gets the large plans."""


def universal_plan(nfe: int, low: float, high: float, *, sigma_data: float = 1.0, dim: int | None = None) -> Plan:
    """The plan that serves most models best at `nfe` evaluations, without calibration.

    Args:
        nfe: number of evaluations.
        low: smallest noise level the model may be asked at.
        high: largest.
        sigma_data: standard deviation of the data, in the units of x (about 1 for latents, .5 for images).
        dim: number of dimensions of a sample; None for fewer than `LARGE`.

    Raises:
        LogsnrError: if there is no plan of `nfe` evaluations, or the range or sigma_data is none.
    """
    known = universal_sizes()
    if isinstance(nfe, bool) or nfe not in known:
        more = ", of which there are universal plans (for others use solvers.unipc or solvers.ge, or calibrate)"
        raise unknown("nfe", nfe, known, more)
    if not 0 < low < high < math.inf:
        raise LogsnrError(f"range of levels ({low}, {high}): needs 0 < low < high < inf")
    if not 0 < sigma_data < math.inf:
        raise LogsnrError(f"sigma_data = {sigma_data}: must be in (0, inf); about 1 for latents, .5 for images")
    span = "narrow" if high < WIDE * sigma_data else "wide" if (dim or 0) < LARGE else "large"
    return scaled(_stored()[span][nfe], sigma_data, low, high)


def universal_sizes() -> tuple[int, ...]:
    """Numbers of evaluations for which there are universal plans, in order."""
    return tuple(sorted(_stored()["wide"]))


def scaled(relative: Plan, sigma_data: float, low: float, high: float) -> Plan:
    """A plan of relative levels in a model's units: from `high`, the others drawn together where they leave the range.

    Those beyond [low, high / 1.25] keep their proportions in log sigma within it.
    """
    inner = [sigma_data * u for u in relative.sigmas[1:-1]]
    levels = _within(inner, low, max(high / 1.25, math.sqrt(low * high))) if inner else []
    meta = {**relative.meta, "solver": "universal", "sigma_data": sigma_data}
    return replace(relative, sigmas=(high, *levels, relative.sigmas[-1]), meta=meta)


def _within(levels: list[float], low: float, high: float) -> list[float]:
    """Falling levels, drawn together geometrically where they leave [low, high]."""
    first, last = min(levels[0], high), max(levels[-1], low)
    if (first, last) == (levels[0], levels[-1]):
        return levels
    if len(levels) == 1:
        return [min(last, high)]
    if not last < first:  # all of them lie beyond one end
        first, last = high, low
    span = math.log(levels[0] / levels[-1])
    inner = (last * (first / last) ** (math.log(s / levels[-1]) / span) for s in levels[1:-1])
    return [first, *inner, last]


@cache
def _stored() -> dict[str, dict[int, Plan]]:
    """The plans of universal.json, by range and number of evaluations."""
    data: dict[str, Any] = json.loads((files(__package__) / "universal.json").read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise LogsnrError(f"universal.json has format {data.get('format')}: this version reads {FORMAT}; reinstall")
    return {span: {int(n): Plan.from_dict(plan) for n, plan in of.items()} for span, of in data["plans"].items()}
