"""Multistep solvers: rows that integrate the polynomial through the last estimates.

In each basis the flow is an exact integral of one estimate over one variable,

    basis       d(state) = e d(variable)            state                 variable
    eps         dy = eps dsigma                     y = z/alpha           sigma
    x0          d(z/s) = x0 dk                      z/s                   k = 1/sigma
    velocity    d(z/(alpha + s)) = (eps - x0) dt    z/(alpha + s)         t = sigma/(1 + sigma)

and a solver of order p replaces e over the step by the polynomial in a coordinate u through the last p estimates:

    c_j = 1/(v' - v) * integral of l_j(u(v)) dv,    l_j the Lagrange polynomials of u_i, ..., u_{i-p+1}.

    adams_bashforth    u = v, the basis's own variable (variable-step)
    deis               basis eps,  u = time of a VP process (tAB) or log sigma
    dpmpp              basis x0,   u = log k = -log sigma
    unipc              basis x0,   u = log k, and a corrector
    ipndm              no integral: Adams-Bashforth's constants of an evenly spaced u

The l_j sum to 1, so every row does.  The first rows have fewer estimates and so a lower order.  A polynomial in a
coordinate that is infinite at an end of the grid has no node there: that estimate is left out, which is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from logsnr.errors import unknown
from logsnr.noise import flow_time
from logsnr.sampling.plan import BASES, Basis, Grid, Plan, check_sigmas

Final = Literal["denoise", "ramp", "full"]
"""How a run ends: `"denoise"` steps to sigma 0 with row [1] and keeps the order elsewhere; `"ramp"` gives the k-th
step from the end at most order k, wherever it ends (the papers' rule for few steps); `"full"` keeps the order to the
end, where that is finite."""

Form = Literal["published", "exact"]
DeisTime = Literal["vp", "log"]
Variant = Literal["bh2", "bh1"]

# Integrals of a constant, and of polynomials of degree 1, 2, 3 through equally spaced points.
CLASSICAL: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def adams_bashforth(grid: Sequence[float], order: int = 2, basis: Basis = "eps", final: Final = "denoise") -> Plan:
    """Variable-step Adams-Bashforth in the basis's own variable: sigma for eps, 1/sigma for x0, t for velocity.

    Order 2 in eps is gradient estimation with gamma = 1 + (sigma - sigma')/(2 (sigma_prev - sigma)).  In 1/sigma the
    steps of every usual grid grow so fast (x0) that a high order needs many of them.

    Args:
        grid: n + 1 decreasing sigmas.
        order: 1 to 4; 1 is DDIM.
        basis: what is combined.
        final: how the run ends; `"full"` to sigma 0 exists for eps and velocity.

    Raises:
        ValueError: if the order is out of range, a name is unknown, or the last row would be infinite.
    """
    sigmas = check_sigmas(grid)
    if basis not in BASES:
        raise unknown("basis", basis, BASES)
    variables: dict[Basis, Callable[[float], float]] = {"eps": float, "x0": _inverse, "velocity": flow_time}
    variable = variables[basis]
    orders = _orders(sigmas, order, 4, final)
    rows = []
    for i, p in enumerate(orders):
        v, v_ = variable(sigmas[i]), variable(sigmas[i + 1])
        nodes = [variable(sigma) for sigma in sigmas[max(i - p + 1, 0) : i + 1][::-1]]
        if p > 1:
            _check_finite(v_, sigmas[i + 1], f"adams_bashforth in basis {basis!r}")
        rows.append(_row(nodes, [v + (v_ - v) * x for x in _gauss()[0]], _gauss()[1]))
    meta = {"solver": "adams_bashforth", "order": order, "final": final}
    return Plan(sigmas, tuple(rows), basis, None, meta)


def ipndm(grid: Sequence[float], order: int = 4, basis: Basis = "eps", final: Final = "denoise") -> Plan:
    """Improved pseudo-numerical method (2204.13902): Adams-Bashforth's classical constants, whatever the grid.

    Order 2 is gradient estimation with gamma 1.5.  On a grid that is a smooth, uneven function of the step every
    order above 1 converges at second order, with a small constant; only sigmas in even steps give the nominal one.

    Args:
        grid: n + 1 decreasing sigmas.
        order: 1 to 4.
        basis: what is combined.
        final: how the run ends.

    Raises:
        ValueError: if the order is out of range or a name is unknown.
    """
    sigmas = check_sigmas(grid)
    rows = tuple(CLASSICAL[p - 1] for p in _orders(sigmas, order, 4, final))
    return Plan(sigmas, rows, basis, None, {"solver": "ipndm", "order": order, "final": final})


def deis(
    grid: Sequence[float],
    order: int = 3,
    time: DeisTime = "vp",
    betas: tuple[float, float] = (0.1, 20.0),
    final: Final = "denoise",
) -> Plan:
    """DEIS (2204.13902): eps as a polynomial in a time, integrated exactly over sigma.

    `order` counts estimates: the papers' tAB3, of degree 3, is order 4 here.

    Args:
        grid: n + 1 decreasing sigmas.
        order: 1 to 4.
        time: the coordinate: `"vp"` is the time t of the VP process with log(1 + sigma^2) = b_0 t + (b_1 - b_0) t^2/2
            (DEIS-tAB); `"log"` is log sigma, as diffusers' "logrho".
        betas: (b_0, b_1) of that process; .1 and 20 are 2011.13456's.
        final: how the run ends; the step to sigma 0 is always a plain denoise.

    Raises:
        ValueError: if the order or betas leave their range, a name is unknown, or `"full"` is asked to sigma 0.
    """
    sigmas = check_sigmas(grid)
    if time not in get_args(DeisTime):
        raise unknown("time", time, get_args(DeisTime))
    low, high = betas
    if not 0 <= low < high < math.inf:
        raise ValueError(f"betas = {betas}: needs 0 <= b_0 < b_1 < inf; (0.1, 20) is the usual VP process")

    def vp(sigma: float) -> float:
        if math.isinf(sigma):
            return math.inf
        log_variance, slope = math.log1p(sigma * sigma), high - low
        # (sqrt(b_0^2 + 2 slope L) - b_0)/slope without cancellation at small sigma
        return 2 * log_variance / (math.sqrt(low * low + 2 * slope * log_variance) + low) if sigma > 0 else 0.0

    coordinate = vp if time == "vp" else _log
    meta: dict[str, Any] = {"solver": "deis", "order": order, "time": time, "final": final}
    if time == "vp":
        meta["betas"] = [low, high]
    orders = _orders(sigmas, order, 4, final)
    return Plan(sigmas, tuple(_log_rows(sigmas, orders, coordinate, 1, "deis")), "eps", None, meta)


def dpmpp(grid: Sequence[float], order: int = 2, form: Form | None = None, final: Final = "denoise") -> Plan:
    """DPM-Solver++ multistep (2211.01095), 2M and 3M: x0 as a polynomial in log-SNR, integrated exactly over 1/sigma.

    The published 2M takes the slope's weight as 1/2 (midpoint): [1 + r, -r] with r = h/(2 h_prev), gradient estimation
    in x0 with gamma 1.5 on a log-linear grid.  The published 3M halves the weight of the second difference, by which
    it converges at second order; `"exact"` is third order.

    Args:
        grid: n + 1 decreasing sigmas.
        order: 1 to 3.
        form: `"published"` (what diffusers and the authors' code do) or `"exact"`; None is published up to order 2
            and exact at order 3.
        final: how the run ends; `"full"` is not defined to sigma 0.

    Raises:
        ValueError: if the order is out of range, a name is unknown, or `"full"` is asked to sigma 0.
    """
    sigmas = check_sigmas(grid)
    orders = _orders(sigmas, order, 3, final)
    if form not in (None, *get_args(Form)):
        raise unknown("form", form, get_args(Form))
    form = form or ("exact" if order == 3 else "published")
    rows = _log_rows(sigmas, orders, _log, -1, "dpmpp")
    if form == "published":
        rows = [_published(sigmas, i, row) for i, row in enumerate(rows)]
    meta = {"solver": "dpmpp", "order": order, "form": form, "final": final}
    return Plan(sigmas, tuple(rows), "x0", None, meta)


def unipc(
    grid: Sequence[float],
    order: int = 2,
    variant: Variant = "bh2",
    corrector: bool = True,
    final: Final = "denoise",
) -> Plan:
    """UniPC (2302.04867): predictor and corrector in x0, one evaluation a step, folded into rows.

    The model is evaluated at the predicted state z_i alone.  That estimate corrects the state, z_i^c = z_i + d_i, and
    the next step starts from z_i^c.  Prediction p and correction w both move z/s from z_{i-1}^c, over the same
    interval of k = 1/sigma:

        z_i^c/s_i - z_i/s_i = (k_i - k_{i-1}) sum_j (w_j - p_j) x0_{i-j},

    a combination of estimates that later steps keep, so the plan's state is z_i and its row

        c_i = p_i + (k_i - k_{i-1})/(k_{i+1} - k_i) (w_i - p_{i-1}),

    one estimate longer than the predictor's.  Both p and w sum to 1, so c does.  At sigma 0 (k infinite) nothing is
    left of d; a run that stops above 0 ends on a predicted state.  The order is one more than the nominal one.

    Args:
        grid: n + 1 decreasing sigmas.
        order: 1 to 3, of the predictor.
        variant: B(h) of the paper, e^h - 1 (`"bh2"`) or h (`"bh1"`); it matters where two estimates are combined.
        corrector: False for UniP.
        final: how the run ends; `"ramp"` is the published rule, `"full"` is not defined to sigma 0.

    Raises:
        ValueError: if the order is out of range, a name is unknown, `"full"` is asked to sigma 0, or `"bh1"` is
            corrected from sigma inf, where h is infinite.
    """
    sigmas = check_sigmas(grid)
    orders = _orders(sigmas, order, 3, final)
    if variant not in get_args(Variant):
        raise unknown("variant", variant, get_args(Variant))
    if variant == "bh1" and corrector and math.isinf(sigmas[0]) and len(sigmas) > 2:
        raise ValueError(
            "sigmas[0] = inf with variant 'bh1': its corrector is infinite there; use 'bh2', or start below"
        )
    predictors = _log_rows(sigmas, orders, _log, -1, "unipc")
    for i, row in enumerate(predictors):
        if len(row) == 2:  # the paper's simplified weight 1/2
            predictors[i] = _midpoint(sigmas, i, _b(sigmas, i, variant))
    rows = predictors[:1]
    for i, (before, now) in enumerate(pairwise(predictors), 1):
        if not corrector or sigmas[i + 1] == 0:
            rows.append(now)
            continue
        if len(before) == 1:
            half = _b(sigmas, i - 1, variant) / 2
            correction: tuple[float, ...] = (half, 1 - half)
        else:
            nodes = sigmas[i - len(before) : i + 1][::-1]
            points, weights = _log_points(sigmas[i - 1], sigmas[i], -1)
            correction = _row(
                [_log(sigma / sigmas[i]) for sigma in nodes], [_log(p / sigmas[i]) for p in points], weights
            )
        ratio = (_inverse(sigmas[i]) - _inverse(sigmas[i - 1])) / (_inverse(sigmas[i + 1]) - _inverse(sigmas[i]))
        length = max(len(now), len(correction))
        terms = zip(_pad(now, length), _pad(correction, length), _pad((0.0, *before), length), strict=True)
        rows.append(tuple(p + ratio * (w - q) for p, w, q in terms))
    meta = {"solver": "unipc", "order": order, "variant": variant, "corrector": corrector, "final": final}
    return Plan(sigmas, tuple(rows), "x0", None, meta)


def _orders(sigmas: Grid, order: int, highest: int, final: Final) -> list[int]:
    """How many estimates each step combines."""
    if isinstance(order, bool) or order not in range(1, highest + 1):
        raise ValueError(f"order = {order}: must be an integer in [1, {highest}]")
    if final not in get_args(Final):
        raise unknown("final", final, get_args(Final))
    n = len(sigmas) - 1
    orders = [min(order, i + 1, n - i if final == "ramp" else order) for i in range(n)]
    if sigmas[-1] == 0 and final == "denoise":
        orders[-1] = 1
    return orders


def _log_rows(
    sigmas: Grid, orders: Sequence[int], coordinate: Callable[[float], float], power: int, name: str
) -> list[tuple[float, ...]]:
    """Rows of polynomials in `coordinate`, integrated over sigma^power."""
    rows: list[tuple[float, ...]] = []
    for i, p in enumerate(orders):
        if p == 1:
            rows.append((1.0,))
            continue
        _check_finite(_log(sigmas[i + 1]), sigmas[i + 1], name)
        # relative to the current level where the coordinate is log sigma: no digits are lost to its size
        here = sigmas[i] if coordinate is _log else 1.0
        points, weights = _log_points(sigmas[i], sigmas[i + 1], power)
        nodes = [coordinate(sigma / here) for sigma in sigmas[i - p + 1 : i + 1][::-1]]
        rows.append(_row(nodes, [coordinate(point / here) for point in points], weights))
    return rows


def _row(nodes: Sequence[float], points: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """Weighted means of the Lagrange polynomials of the finite nodes; weights sum to 1."""
    nodes = [node for node in nodes if math.isfinite(node)]
    u, row = np.asarray(points), []
    for j, node in enumerate(nodes):
        factors = [(u - other) / (node - other) for other in nodes[:j] + nodes[j + 1 :]]
        row.append(math.fsum((np.asarray(weights) * math.prod(factors)).tolist()))
    return tuple(row) if len(row) > 1 else (1.0,)


@lru_cache
def _gauss() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gauss-Legendre on [0, 1]: points and weights that sum to 1."""
    x, w = np.polynomial.legendre.leggauss(32)
    return tuple((0.5 * (1 + x)).tolist()), tuple((w / w.sum()).tolist())


def _log_points(sigma: float, target: float, power: int) -> tuple[list[float], list[float]]:
    """Points between two positive levels, and weights (sum 1) of the mean over sigma^power, power 1 or -1."""
    length = math.log(target / sigma)
    panels = max(1, math.ceil(abs(length)))
    x, w = _gauss()
    where = [(k + a) / panels for k in range(panels) for a in x]
    points = [sigma * math.exp(length * a) for a in where]
    # the largest density is 1: no overflow
    density = [b * math.exp(power * length * a) for a, b in zip(where, w * panels, strict=True)]
    total = math.fsum(density)
    return points, [d / total for d in density]


def _midpoint(sigmas: Grid, i: int, scale: float) -> tuple[float, ...]:
    """[1 + r, -r] with r = scale h/(2 h_prev), h the steps in log sigma."""
    r = scale * math.log(sigmas[i] / sigmas[i + 1]) / (2 * math.log(sigmas[i - 1] / sigmas[i]))
    return 1 + r, -r


def _published(sigmas: Grid, i: int, row: tuple[float, ...]) -> tuple[float, ...]:
    """The published 2M and 3M: slope's mean 1/2 instead of its integral; half of the square's mean."""
    if len(row) == 1:
        return row
    if len(row) == 2:
        return _midpoint(sigmas, i, 1.0)
    one, two = (_log(sigma / sigmas[i]) for sigma in (sigmas[i - 1], sigmas[i - 2]))
    points, weights = _log_points(sigmas[i], sigmas[i + 1], -1)
    square = math.fsum(w * _log(p / sigmas[i]) ** 2 for p, w in zip(points, weights, strict=True))
    # second divided difference of x0 over the nodes 0, one, two
    second = (1 / (one * two), 1 / (one * (one - two)), 1 / (two * (two - one)))
    return tuple(c - 0.5 * square * d for c, d in zip(row, second, strict=True))


def _b(sigmas: Grid, i: int, variant: Variant) -> float:
    """B(h) over the integral 1 - e^{-h} of step i: 1 for bh2."""
    h = math.log(sigmas[i] / sigmas[i + 1])
    return 1.0 if variant == "bh2" else -h / math.expm1(-h)


def _pad(row: tuple[float, ...], length: int) -> tuple[float, ...]:
    return row + (0.0,) * (length - len(row))


def _inverse(sigma: float) -> float:
    return math.inf if sigma == 0 else 1 / sigma


def _log(sigma: float) -> float:
    return -math.inf if sigma == 0 else math.log(sigma)


def _check_finite(value: float, sigma: float, name: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} has no finite row to sigma = {sigma}: use final='denoise' or 'ramp' there")
