"""Solvers: functions that turn a grid into a plan.

A solver chooses coefficients, nothing else: `sample` is one loop for all of them.

    ddim               [1]                    Euler in sigma; eta > 0 adds noise (2010.02502; 2206.00364)
    ddpm               [1], and noise         posterior variance: unified with mu = 1/2 (2006.11239)
    ge, unified        [gamma, 1 - gamma]     gradient estimation (2306.04848, eq. 12); gamma = 1 is DDIM
    adams_bashforth, ipndm, deis, dpmpp, unipc      polynomials through more estimates: multistep.py
    custom             rows of one's own
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from logsnr.errors import unknown
from logsnr.sampling.multistep import adams_bashforth, deis, dpmpp, ipndm, unipc
from logsnr.sampling.plan import Basis, Plan, check_sigmas

__all__ = ["adams_bashforth", "custom", "ddim", "ddpm", "deis", "dpmpp", "ge", "ipndm", "unified", "unipc"]

Final = Literal["denoise", "ge"]


def ddim(grid: Sequence[float], eta: float = 0.0) -> Plan:
    """DDIM (2010.02502): y' = y + (sigma' - sigma) eps, the same step in every basis; Song's eta adds noise.

    Noise of variance (eta sigma')^2 (1 - (sigma'/sigma)^2) in y, i.e. a step down to
    sigma_down = sigma' sqrt(1 - eta^2 (1 - (sigma'/sigma)^2)); eta 1 is `ddpm`.

    Args:
        grid: n + 1 decreasing sigmas.
        eta: amount of noise in [0, 1].

    Raises:
        ValueError: if eta is out of range.
    """
    sigmas = check_sigmas(grid)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be in [0, 1]; 0 is deterministic, 1 is DDPM")
    plan = _plan(sigmas, [(1.0,)] * (len(sigmas) - 1), "eps", {"solver": "ddim"})
    if eta == 0:
        return plan
    # (1 - r)(1 + r) keeps its digits for short steps; min keeps rounding from passing sigma'
    ratios = [b / a for a, b in pairwise(sigmas)]
    down = [b * math.sqrt(max(1 - eta * eta * (1 - r) * (1 + r), 0.0)) for b, r in zip(sigmas[1:], ratios, strict=True)]
    lower = tuple(min(b, low) for b, low in zip(sigmas[1:], down, strict=True))
    return Plan(sigmas, plan.rows, "eps", lower, {"solver": "ddim", "eta": eta})


def ddpm(grid: Sequence[float]) -> Plan:
    """Ancestral sampling with the posterior variance ("fixed small"): `unified` with gamma 1 and mu 1/2."""
    sigmas = check_sigmas(grid)
    return _plan(sigmas, [(1.0,)] * (len(sigmas) - 1), "eps", {"solver": "ddpm"}, mu=0.5)


def ge(
    grid: Sequence[float], gamma: float | Sequence[float] = 2.0, basis: Basis = "eps", final: Final = "denoise"
) -> Plan:
    """Gradient estimation: e_bar_i = gamma e_i + (1 - gamma) e_{i-1}, of raw estimates; the first step is DDIM.

    gamma 2 is the paper's choice; 1.5 is the one constant of second order on a geometric grid.  Which basis is
    combined matters: eps, x0 and velocity are different algorithms under the same gamma.

    Args:
        grid: n + 1 decreasing sigmas.
        gamma: one value, or one for each step that uses it: steps 1 ... n - 1, without the last one if that is a
            plain denoise.
        basis: what is combined.
        final: the step to sigma 0: `"denoise"` returns x0 itself, `"ge"` extrapolates there too.  A grid that stops
            above 0 uses gamma on its last step either way, as the paper does.

    Raises:
        ValueError: if gamma is not finite or has the wrong length, or a name is unknown.
    """
    return unified(grid, gamma, 0.0, basis=basis, final=final)


def unified(
    grid: Sequence[float],
    gamma: float | Sequence[float] = 1.0,
    mu: float = 0.0,
    basis: Basis = "eps",
    final: Final = "denoise",
) -> Plan:
    """DDIM (gamma 1, mu 0), DDPM (1, 1/2), gradient estimation (2, 0) and all between (2306.04848, app. A).

    Each step goes down to sigma_down = sigma' (sigma'/sigma)^(mu/(1 - mu)) and noise of variance
    sigma'^2 - sigma_down^2 brings it back up to sigma'.

    Args:
        grid: n + 1 decreasing sigmas.
        gamma: as in `ge`.
        mu: amount of noise in [0, 1).
        basis: as in `ge`.
        final: as in `ge`.

    Raises:
        ValueError: if gamma or mu leaves its range, gamma has the wrong length, or a name is unknown.
    """
    sigmas = check_sigmas(grid)
    if final not in ("denoise", "ge"):
        raise unknown("final", final, ["denoise", "ge"])
    if str(gamma) == "auto":
        raise ValueError(
            "gamma = 'auto': a grid of your own takes numbers; 'auto' means levels and gammas together, which is "
            "logsnr.universal_plan(nfe, low, high, sigma_data=...)"
        )
    n = len(sigmas) - 1
    plain_end = sigmas[-1] == 0 and final == "denoise"
    count = max(n - 2 if plain_end else n - 1, 0)
    gammas = list(gamma) if isinstance(gamma, Sequence) else [float(gamma)] * count
    if len(gammas) != count:
        raise ValueError(
            f"gamma has {len(gammas)} values: {count} of the {n} steps use one (the first is DDIM"
            + (", the last a plain denoise)" if plain_end else ")")
        )
    if not all(math.isfinite(g) for g in ([gamma] if isinstance(gamma, int | float) else gammas)):
        raise ValueError(f"gamma = {gamma}: must be finite; 1 is DDIM, 2 the paper's choice")
    rows = [(1.0,), *((float(g), 1 - float(g)) for g in gammas), *[(1.0,)] * (n - 1 - count)]
    name = "unified" if mu else "ge"
    values = gammas if isinstance(gamma, Sequence) else float(gamma)
    return _plan(sigmas, rows, basis, {"solver": name, "gamma": values, "final": final}, mu=mu)


def custom(grid: Sequence[float], rows: Sequence[Sequence[float]], basis: Basis = "eps") -> Plan:
    """Rows of one's own, that sum to 1 as every consistent solver's do (`Plan` itself takes any finite rows).

    Raises:
        ValueError: if a row does not fit or its sum differs from 1 by more than 1e-6.
    """
    plan = _plan(grid, rows, basis, {"solver": "custom"})
    for i, row in enumerate(plan.rows):
        if not abs(math.fsum(row) - 1) <= 1e-6:
            raise ValueError(
                f"rows[{i}] = {row} sums to {math.fsum(row):.9g}: a row must sum to 1, or not even a constant estimate "
                "is integrated right; divide by the sum, or build Plan(...) if that is meant"
            )
    return plan


def _plan(
    grid: Sequence[float], rows: Sequence[Sequence[float]], basis: Basis, meta: dict[str, Any], mu: float = 0.0
) -> Plan:
    """A plan from rows, with the noise of mu."""
    sigmas = check_sigmas(grid)
    down = None
    if not 0 <= mu < 1:
        raise ValueError(f"mu = {mu}: must be in [0, 1); 0 is deterministic, 1/2 is DDPM")
    if mu > 0:
        meta = {**meta, "mu": mu}
        power = mu / (1 - mu)
        # sigma'/sigma is 0 from sigma inf: everything is redrawn; min keeps rounding from passing sigma'.
        down = tuple(min(b, b * (b / a) ** power) for a, b in pairwise(sigmas))
    return Plan(sigmas, tuple(tuple(float(c) for c in row) for row in rows), basis, down, meta)
