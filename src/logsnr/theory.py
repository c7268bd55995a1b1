"""Theory: what an (eta, nu)-approximate projection guarantees of a grid (2306.04848, sec. 4).

    (dist(x_t) / nu <= sqrt(n) sigma_t <= nu dist(x_t))   implies   ||x0(x_t, sigma_t) - proj(x_t)|| <= eta dist(x_t)

is the error model.  DDIM is then gradient descent on dist^2/2 with step beta_t = 1 - sigma_{t-1}/sigma_t, and

    prod (1 - beta_i (1 + eta_i))  <=  dist(x_{t-1}) / dist(x_N)  <=  prod (1 - beta_i (1 - eta_i)),    i = t ... N

A grid (the paper's schedule) is admissible if these bounds keep sqrt(n) sigma within nu of the distance, so that the
error model holds at every step, from dist(x_N) = sqrt(n) sigma_N on.  In h = -ln(1 - beta), the length of a step in
ln sigma, the upper inequality spends  U = -ln(1 - eta (e^h - 1))  of a budget ln nu, and the lower one less: a grid is
admissible iff its U add up to at most ln nu.  Equal shares of the budget are steps of beta = c/(eta + c),
c = 1 - nu^(-1/n): for a constant eta the paper's largest constant step, for a measured eta(sigma) a grid that is fine
where the denoiser errs.

Everything is a Python float.  A lower bound that reaches 0 stays there: a distance has no sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

EtaCurve = float | Sequence[tuple[float, float]] | Callable[[float], float]
"""Relative error against noise level: one value, (sigma, eta) pairs (linear in ln sigma between them, constant beyond),
or a function."""

ROUNDING = 1e-12
"""Relative slack of the inequalities, so that a grid at its limit is not refused for its last bit."""


def step_sizes(sigmas: Sequence[float]) -> tuple[float, ...]:
    """beta_i = 1 - sigma_{i+1}/sigma_i of n + 1 decreasing noise levels, n values in (0, 1].

    Raises:
        ValueError: unless there are at least two, finite, strictly decreasing, the last >= 0.
    """
    if len(sigmas) < 2:
        raise ValueError(f"{len(sigmas)} sigmas: give at least 2, n + 1 noise levels for n steps")
    for i, (a, b) in enumerate(pairwise(sigmas)):
        if not (math.isfinite(a) and 0 <= b < a):
            raise ValueError(
                f"sigmas[{i}] = {a}, sigmas[{i + 1}] = {b}: noise levels must be finite and strictly decrease to 0 "
                "or above; sort them from noisy to clean and drop repeats"
            )
    return tuple((a - b) / a for a, b in pairwise(sigmas))


def distance_bounds(
    sigmas: Sequence[float], eta: float | Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lower and upper bounds of dist(x) / dist(x_N) at every noise level, n + 1 values each, the first 1.

    Args:
        sigmas: n + 1 decreasing noise levels.
        eta: relative error in [0, 1), one value or one per step.

    Raises:
        ValueError: if a value leaves its range.
    """
    betas = step_sizes(sigmas)
    lower, upper = [1.0], [1.0]
    for beta, error in zip(betas, _etas(eta, len(betas)), strict=True):
        lower.append(lower[-1] * max(0.0, 1 - beta * (1 + error)))
        upper.append(upper[-1] * (1 - beta * (1 - error)))
    return tuple(lower), tuple(upper)


def is_admissible(sigmas: Sequence[float], eta: float | Sequence[float], nu: float) -> bool:
    """Whether the error model holds at every step by the bounds alone (2306.04848, sec. 4).

    prod (1 - beta (1 - eta)) / nu  <=  prod (1 - beta)  <=  nu prod (1 - beta (1 + eta)),  up to every step.

    Args:
        sigmas: n + 1 decreasing noise levels.
        eta: relative error in [0, 1), one value or one per step.
        nu: how far sqrt(n) sigma may be from the distance, at least 1.

    Raises:
        ValueError: if a value leaves its range.
    """
    _check_nu(nu)
    lower, upper = distance_bounds(sigmas, eta)
    ratios = [sigma / sigmas[0] for sigma in sigmas]
    give = 1 + ROUNDING
    return all(
        high <= nu * ratio * give and ratio <= nu * low * give
        for low, high, ratio in zip(lower, upper, ratios, strict=True)
    )


def max_constant_step(eta: float, nu: float, n: int) -> float:
    """beta* = c/(eta + c), c = 1 - nu^(-1/n): a constant step is admissible for n steps iff it is at most that.

    1 where eta is 0: an exact projection allows every step.

    Raises:
        ValueError: if eta is not in [0, 1), nu < 1 or n < 1.
    """
    _check_nu(nu)
    _etas(eta, 1)
    c = _share(nu, n)
    return 1.0 if eta == 0 else c / (eta + c)


def limits(eta: float, nu: float) -> tuple[float, float]:
    """What many steps of the largest constant size reach: (sigma_0/sigma_N, bound of dist(x_0)/dist(x_N)).

    nu^(-1/eta) and nu^(-(1 - eta)/eta), as n -> inf: with a fixed relative error the guarantee does not go to zero.

    Raises:
        ValueError: if eta is not in [0, 1) or nu < 1.
    """
    _check_nu(nu)
    _etas(eta, 1)
    if eta == 0:
        return (0.0, 0.0) if nu > 1 else (1.0, 1.0)
    return nu ** (-1 / eta), nu ** (-(1 - eta) / eta)


def admissible_schedule(
    eta: EtaCurve, nu: float, n: int, *, sigma_max: float, sigma_min: float = 0.0
) -> tuple[float, ...]:
    """A grid of at most n steps from `sigma_max` that is admissible by construction: equal shares of ln nu.

    Each step is beta = c/(eta(sigma) + c) at the noise level where it starts: long where the denoiser projects well.

    Args:
        eta: relative error against noise level.
        nu: how far sqrt(n) sigma may be from the distance, above 1.
        n: number of steps that share the budget.
        sigma_max: where to start.
        sigma_min: where to stop; a step that would pass it ends there, and so does the grid.

    Returns:
        The noise levels; n + 1, or fewer if `sigma_min` is reached before.

    Raises:
        ValueError: if a value leaves its range.
    """
    _check_nu(nu, above=True)
    _check_ends(sigma_max, sigma_min)
    return _walk(eta, _share(nu, n), n, sigma_max, sigma_min)


def grid_between(eta: EtaCurve, n: int, *, sigma_max: float, sigma_min: float) -> tuple[tuple[float, ...], float]:
    """The grid of n steps of equal shares that goes exactly from `sigma_max` to `sigma_min`, and the nu it needs.

    Where the share is so large that no nu is large enough, nu is inf: no guarantee, but still the grid whose steps
    are short where the denoiser errs.

    Raises:
        ValueError: if a value leaves its range, or eta is 0 everywhere, where every grid is admissible.
    """
    _check_ends(sigma_max, sigma_min)
    if n < 1 or sigma_min == 0:
        raise ValueError(f"n = {n}, sigma_min = {sigma_min}: needs n >= 1 and sigma_min > 0; append sigma 0 afterwards")
    low, high = 0.0, 1e-6
    while len(grid := _walk(eta, high, n, sigma_max, 0.0)) == n + 1 and grid[-1] > sigma_min:
        low, high = high, 2 * high
        if high > 1e12:
            raise ValueError(f"eta stays above any step to {sigma_min}: check the curve's values and its range")
    for _ in range(200):
        middle = 0.5 * (low + high)
        grid = _walk(eta, middle, n, sigma_max, 0.0)
        low, high = (middle, high) if len(grid) == n + 1 and grid[-1] > sigma_min else (low, middle)
    grid = _walk(eta, low, n, sigma_max, 0.0) if low > 0 else ()
    if len(grid) < n + 1 or not math.isclose(grid[-1], sigma_min, rel_tol=1e-6):
        raise ValueError(
            f"no grid of {n} equal shares ends at {sigma_min}: eta reaches 0 above it, where one step goes to 0; "
            "raise eta to a small positive floor, or use admissible_schedule"
        )
    return (*grid[:-1], float(sigma_min)), (1 - low) ** -n if low < 1 else math.inf


def interpolated(eta: EtaCurve) -> Callable[[float], float]:
    """The curve as a function of sigma.

    Raises:
        ValueError: if there are no points, or a sigma is not positive.
    """
    if callable(eta):
        return eta
    if isinstance(eta, int | float):
        value = float(eta)
        return lambda sigma: value
    points = sorted((float(sigma), float(error)) for sigma, error in eta)
    if not points or not all(0 < sigma < math.inf for sigma, _ in points):
        raise ValueError(f"eta curve {points}: give (sigma, eta) pairs with sigma in (0, inf)")

    def curve(sigma: float) -> float:
        if sigma <= points[0][0]:
            return points[0][1]
        for (a, low), (b, high) in pairwise(points):
            if sigma <= b:
                return low if a == b else low + (high - low) * math.log(sigma / a) / math.log(b / a)
        return points[-1][1]

    return curve


def _walk(eta: EtaCurve, c: float, n: int, sigma_max: float, sigma_min: float) -> tuple[float, ...]:
    """Up to n steps sigma' = sigma eta/(eta + c)."""
    curve = interpolated(eta)
    grid = [float(sigma_max)]
    while len(grid) <= n and grid[-1] > sigma_min:
        (error,) = _etas(curve(grid[-1]), 1)
        grid.append(max(grid[-1] * error / (error + c), float(sigma_min)))
    return tuple(grid)


def _share(nu: float, n: int) -> float:
    if n < 1:
        raise ValueError(f"n = {n}: needs at least 1 step")
    return -math.expm1(-math.log(nu) / n)


def _check_nu(nu: float, above: bool = False) -> None:
    if not (nu > 1 or (nu == 1 and not above)) or math.isinf(nu):
        raise ValueError(f"nu = {nu}: must be {'above' if above else 'at least'} 1 and finite; the paper speaks of 2")


def _check_ends(sigma_max: float, sigma_min: float) -> None:
    if not 0 <= sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma from {sigma_max} to {sigma_min}: needs 0 <= smallest < largest < inf")


def _etas(eta: float | Sequence[float], n: int) -> tuple[float, ...]:
    values = (float(eta),) * n if isinstance(eta, int | float) else tuple(float(e) for e in eta)
    if len(values) != n:
        raise ValueError(f"{len(values)} values of eta for {n} steps: give one, or one per step")
    for value in values:
        if not 0 <= value < 1:
            raise ValueError(f"eta = {value}: must be in [0, 1); at 1 and above nothing is promised")
    return values
