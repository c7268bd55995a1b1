"""Multistep rows: certified orders, closed forms, the folded corrector, ends and refusals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from logsnr.exact import GaussianMixture
from logsnr.noise import alpha_s, flow_time, sigma_from_flow_time
from logsnr.sampling import Plan, grids, sample, solvers
from logsnr.sampling.loop import updates

F64 = torch.float64
Solver = Callable[[Sequence[float]], Plan]

# Orders: a mixture of two Gaussians on the line, where the flow keeps quantiles, so that every state is known exactly.

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=F64) for v in ([0.4, 0.6], [-1.0, 0.7], [0.5, 0.4]))
MIXTURE = GaussianMixture(WEIGHTS, MEANS[:, None], STDS.square()[:, None, None])
QUANTILES = torch.tensor([0.07, 0.2, 0.35, 0.5, 0.8, 0.95], dtype=F64)
HIGH, LOW = 10.0, 0.1


@cache
def exact(sigma: float) -> Tensor:
    """The states y = z/alpha of the quantiles: bisection on the distribution function."""
    low, high = torch.full_like(QUANTILES, -100.0), torch.full_like(QUANTILES, 100.0)
    for _ in range(64):
        y = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((y[:, None] - MEANS) / (STDS**2 + sigma**2).sqrt())).sum(1) < QUANTILES
        low, high = torch.where(below, y, low), torch.where(below, high, y)
    return (low + high) / 2


def flow_uniform(n: int) -> tuple[float, ...]:
    first, last = flow_time(HIGH), flow_time(LOW)
    inner = [sigma_from_flow_time(first + (last - first) * i / n) for i in range(1, n)]
    return grids.from_sigmas([HIGH, *inner, LOW])


GRIDS: dict[str, Callable[[int], tuple[float, ...]]] = {
    "log-linear": lambda n: grids.log_linear(n, HIGH, LOW, last="min"),
    "karras": lambda n: grids.karras(n, HIGH, LOW, last="min"),
    "flow-uniform": flow_uniform,
}


def error_from_exact_start(*plans: Plan) -> list[float]:
    """Mean errors of plans on one grid at the end of their rows of full length, each from exact states before them."""
    sigmas = plans[0].sigmas
    firsts = [max(map(len, plan.rows)) - 1 for plan in plans]
    z = torch.stack([exact(sigmas[0]) * alpha_s(sigmas[0])[0]] * len(plans)).numpy()
    histories: list[list[np.ndarray]] = [[] for _ in plans]
    for i, (steps, sigma) in enumerate(zip(zip(*map(updates, plans), strict=True), sigmas, strict=False)):
        estimate = MIXTURE(torch.from_numpy(z).reshape(-1, 1), sigma)
        x0, eps = (t.reshape(z.shape).numpy() for t in (estimate.x0, estimate.eps))
        values = {"eps": eps, "x0": x0, "velocity": eps - x0}
        following = (exact(sigmas[i + 1]) * alpha_s(sigmas[i + 1])[0]).numpy() if i < max(firsts) else z[0]
        for j, (plan, step) in enumerate(zip(plans, steps, strict=True)):
            histories[j] = [values[plan.basis][j], *histories[j]][: firsts[j] + 1]
            terms = histories[j] if step.basis == plan.basis else [values[step.basis][j]]
            moved = z[j] * step.keep + sum(w * e for w, e in zip(step.weights, terms, strict=False))
            z[j] = following if i < firsts[j] else moved
    return np.abs(z / alpha_s(sigmas[-1])[0] - exact(sigmas[-1]).numpy()).mean(1).tolist()


SOLVERS: dict[str, tuple[Solver, int]] = {
    "Euler": (solvers.ddim, 1),
    "GE(2)": (partial(solvers.ge, gamma=2.0), 1),
    "GE(1.5)": (partial(solvers.ge, gamma=1.5), 2),
    **{
        f"AB-{p} {basis}": (partial(solvers.adams_bashforth, order=p, basis=basis), p)
        for p in (2, 3, 4)
        for basis in ("eps", "x0", "velocity")
    },
    # The classical constants mistake an uneven grid by 1/12 of its second difference: order 2 whatever the name.
    **{f"iPNDM-{p}": (partial(solvers.ipndm, order=p), 2) for p in (2, 3, 4)},
    **{f"DEIS-{p} {t}": (partial(solvers.deis, order=p, time=t), p) for p in (2, 3, 4) for t in ("vp", "log")},
    "DPM++(2M)": (solvers.dpmpp, 2),
    "DPM++(2M) exact": (partial(solvers.dpmpp, form="exact"), 2),
    "DPM++(3M)": (partial(solvers.dpmpp, order=3), 3),
    "DPM++(3M) published": (partial(solvers.dpmpp, order=3, form="published"), 2),
    **{f"UniPC-{p} {b}": (partial(solvers.unipc, order=p, variant=b), p + 1) for p in (1, 2) for b in ("bh2", "bh1")},
    "UniPC-3": (partial(solvers.unipc, order=3), 4),
    "UniP-2": (partial(solvers.unipc, corrector=False), 2),
}


@cache
def errors(grid: str, n: int) -> dict[str, float]:
    """All solvers side by side: what costs time is asking the mixture."""
    plans = [solver(GRIDS[grid](n)) for solver, _ in SOLVERS.values()]
    return dict(zip(SOLVERS, error_from_exact_start(*plans), strict=True))


@pytest.mark.parametrize("grid", [pytest.param(g, marks=[pytest.mark.heavy] * (g == "karras")) for g in GRIDS])
@pytest.mark.parametrize("name", SOLVERS)
def test_order(name: str, grid: str) -> None:
    coarse, fine = (errors(grid, n)[name] for n in (160, 320))
    assert abs(math.log2(coarse / fine) - SOLVERS[name][1]) < 0.25


def test_ipndm_has_its_nominal_order_where_sigma_is_evenly_spaced() -> None:
    def even(n: int) -> tuple[float, ...]:
        return grids.from_sigmas([4 + (0.5 - 4) * i / n for i in range(n + 1)])

    for order in (2, 3, 4):
        (coarse,), (fine,) = (error_from_exact_start(solvers.ipndm(even(n), order)) for n in (80, 160))
        assert abs(math.log2(coarse / fine) - order) < 0.25


# Rows


def random_grid(seed: int, n: int = 9, zero: bool = True, infinite: bool = False) -> tuple[float, ...]:
    rng = random.Random(seed)
    inner = sorted((math.exp(rng.uniform(-4, 4)) for _ in range(n + 1 - zero - infinite)), reverse=True)
    return grids.from_sigmas([*[math.inf] * infinite, *inner, *[0.0] * zero])


@pytest.mark.parametrize("final", ["denoise", "ramp"])
@pytest.mark.parametrize("name", [name for name in SOLVERS if name[:2] not in ("Eu", "GE")])
def test_rows_sum_to_one(name: str, final: str) -> None:
    """UniPC's too: what its corrector adds is a difference of two rows that sum to 1."""
    for seed in range(6):
        for zero, infinite in ((True, False), (False, False), (True, True), (False, True)):
            if infinite and "bh1" in name:
                continue
            plan = SOLVERS[name][0](random_grid(seed, zero=zero, infinite=infinite), final=final)
            for row in plan.rows:
                assert math.fsum(row) == pytest.approx(1, abs=1e-13 * max(1, *map(abs, row)))
            if zero or final == "ramp":
                assert len(updates(plan)[-1].weights) == 1 or "UniPC" in name
            assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_even_steps_give_the_classical_constants(order: int) -> None:
    classical = solvers.ipndm(random_grid(0), order, final="full").rows[order - 1]
    assert classical == {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}.get(
        order, (55 / 24, -59 / 24, 37 / 24, -9 / 24)
    )
    levels = [3 - 0.25 * i for i in range(9)]
    even = {
        "eps": levels,
        "x0": [1 / v for v in reversed(levels)],
        "velocity": [sigma_from_flow_time(v / 4) for v in levels],
    }
    for basis, grid in even.items():
        for row in solvers.adams_bashforth(grid, order, basis).rows[order - 1 :]:
            assert row == pytest.approx(classical, abs=1e-12)
    for row in solvers.deis(grids.log_linear(6, 1.0, 1 - 1e-3, last="min"), order, "log").rows[order - 1 :]:
        assert row == pytest.approx(classical, abs=1e-3)  # in the limit of short steps


@pytest.mark.parametrize("basis", ["eps", "x0", "velocity"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_is_exact_for_polynomials(order: int, basis: str) -> None:
    """An estimate that is a polynomial of degree order - 1 in the basis's variable is integrated exactly."""
    variable = {"eps": lambda s: s, "x0": lambda s: 1 / s, "velocity": flow_time}[basis]
    grid = random_grid(order, 8, zero=False)
    v = [variable(sigma) for sigma in grid]
    for i, row in enumerate(solvers.adams_bashforth(grid, order, basis).rows):
        for degree in range(len(row)):
            scale = max(abs(u) for u in v[max(i - order + 1, 0) : i + 2])
            powers = [(v[i - j] / scale) ** degree for j in range(len(row))]
            mean = ((v[i + 1] / scale) ** (degree + 1) - (v[i] / scale) ** (degree + 1)) / (degree + 1)
            expected = mean * scale / (v[i + 1] - v[i])
            error = math.fsum(c * p for c, p in zip(row, powers, strict=True)) - expected
            assert abs(error) < 1e-11 * max(map(abs, row))


@pytest.mark.parametrize(
    ("kind", "order"),
    [*((kind, p) for kind in ("deis vp", "deis log") for p in (2, 3, 4)), ("dpmpp", 2), ("dpmpp", 3)],
)
def test_exponential_weights_to_the_last_digits(kind: str, order: int) -> None:
    """Against 40 digits of the defining integral, on short steps, long ones and tiny levels."""
    mp = pytest.importorskip("mpmath")
    for grid in ((40.0, 13.0, 5.0, 1.1, 0.02), (1.0, 0.99, 0.981, 0.97, 0.96), (80.0, 9.0, 0.4, 0.01, 0.0005)):
        if kind == "dpmpp":
            row = solvers.dpmpp(grid, order, "exact").rows[order - 1]
        else:
            row = solvers.deis(grid, order, kind[5:], final="full").rows[order - 1]
        with mp.workdps(40):
            levels = [mp.mpf(sigma) for sigma in grid[order - 1 :: -1]]
            a, b = levels[0], mp.mpf(grid[order])

            def u(sigma, mp=mp):
                if kind != "deis vp":
                    return mp.log(sigma)
                b0, slope = mp.mpf(0.1), mp.mpf(20.0) - mp.mpf(0.1)
                return (mp.sqrt(b0**2 + 2 * slope * mp.log(1 + sigma**2)) - b0) / slope

            power = -1 if kind == "dpmpp" else 1
            total = b**power - a**power
            nodes = [u(level) for level in levels]
            for j, c in enumerate(row):
                others = nodes[:j] + nodes[j + 1 :]

                def integrand(x, others=others, power=power, u=u):  # over log sigma
                    here = u(mp.exp(x))
                    return power * mp.exp(power * x) * mp.fprod(here - o for o in others)

                pieces = mp.linspace(mp.log(a), mp.log(b), 5)
                expected = mp.quad(integrand, pieces) / total / mp.fprod(nodes[j] - o for o in others)
                assert abs(c - float(expected)) < 1e-14 * max(1, *map(abs, row)) / min(1, math.log(a / b))


# What equals what


def test_members_that_coincide() -> None:
    grid = random_grid(3)
    gammas = [1 + (b - c) / (2 * (a - b)) for a, b, c in zip(grid, grid[1:], grid[2:-1], strict=False)]
    assert_rows(solvers.adams_bashforth(grid, 2), solvers.ge(grid, gammas), 1e-12)
    assert solvers.ipndm(grid, 2) == solvers.ge(grid, 1.5)
    assert solvers.ipndm(grid, 2, basis="velocity") == solvers.ge(grid, 1.5, basis="velocity")
    for one in (solvers.adams_bashforth, solvers.ipndm, solvers.deis):
        assert updates(one(grid, 1)) == updates(solvers.ddim(grid))
    for first in (solvers.dpmpp(grid, 1), solvers.unipc(grid, 1, corrector=False)):
        assert updates(first) == updates(solvers.ddim(grid))
    assert_rows(solvers.unipc(grid, 2, corrector=False), solvers.dpmpp(grid, 2), 1e-13)
    geometric = grids.log_linear(8, 20.0, 0.1, last="min")
    assert_rows(solvers.dpmpp(geometric), solvers.ge(geometric, 1.5, basis="x0"), 1e-12)
    third, mixed = solvers.unipc(grid, 3, corrector=False), solvers.dpmpp(grid, 3)
    assert third.rows[2:] == mixed.rows[2:]


def assert_rows(a: Plan, b: Plan, tolerance: float) -> None:
    assert (a.sigmas, a.basis) == (b.sigmas, b.basis)
    for x, y in zip(a.rows, b.rows, strict=True):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)


def unipc_unfolded(grid: Sequence[float], order: int, variant: str, z: Tensor) -> Tensor:
    """The paper's predictor and corrector with their linear systems, on corrected states (algorithms 1 to 3)."""
    lam = [-math.log(sigma) if sigma > 0 else math.inf for sigma in grid]
    history: list[Tensor] = []
    before: tuple[Tensor, int] | None = None

    def system(i: int, p: int, nodes: list[float]) -> tuple[Tensor, Tensor, float, float]:
        h = lam[i + 1] - lam[i]
        scale = math.expm1(-h) if variant == "bh2" else -h
        phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
        for k in range(1, p + 1):
            b.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        r = torch.tensor([(u - lam[i]) / h for u in nodes], dtype=F64)
        return torch.stack([r**k for k in range(p)]), torch.tensor(b, dtype=F64), scale, math.expm1(-h)

    def move(i: int, z: Tensor, estimates: list[Tensor], nodes: list[float], weights: Tensor, scale: float) -> Tensor:
        (alpha, s), (_, s_before) = alpha_s(grid[i + 1]), alpha_s(grid[i])
        h = lam[i + 1] - lam[i]
        out = (s / s_before) * z - alpha * math.expm1(-h) * estimates[0]
        for w, u, e in zip(weights, nodes, estimates[1:], strict=True):
            out = out - alpha * scale * w * (e - estimates[0]) / ((u - lam[i]) / h)
        return out

    for i in range(len(grid) - 1):
        x0 = MIXTURE(z, grid[i]).x0
        if before is not None:
            start, p = before
            nodes = [*(lam[i - 1 - k] for k in range(1, p)), lam[i]]
            matrix, b, scale, _ = system(i - 1, p, nodes)
            rho = torch.full((1,), 0.5, dtype=F64) if p == 1 else torch.linalg.solve(matrix, b)
            z = move(i - 1, start, [*history[:p], x0], nodes, rho, scale)
        history = [x0, *history]
        if grid[i + 1] == 0:
            return x0
        p = min(order, i + 1)
        nodes = [lam[i - k] for k in range(1, p)]
        before = (z, p)
        if p == 1:
            z = move(i, z, history[:1], [], torch.zeros(0, dtype=F64), 0.0)
            continue
        matrix, b, scale, _ = system(i, p - 1, nodes)
        rho = torch.full((1,), 0.5, dtype=F64) if p == 2 else torch.linalg.solve(matrix, b)
        z = move(i, z, history[:p], nodes, rho, scale)
    return z


@pytest.mark.parametrize("variant", ["bh2", "bh1"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_folds_exactly(order: int, variant: str) -> None:
    noise = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    for grid in (grids.log_linear(9, 20.0, 0.05), grids.karras(7, 20.0, 0.05, last="min"), (9.0, 4.0, 3.5, 0.6, 0.0)):
        expected = unipc_unfolded(grid, order, variant, noise)
        actual = sample(MIXTURE, solvers.unipc(grid, order, variant), noise=noise)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_starts_at_infinity_are_limits_of_high_ones() -> None:
    tail = (8.0, 3.0, 1.0, 0.4, 0.1, 0.0)
    plans: list[Solver] = [
        partial(solvers.adams_bashforth, order=4, basis="x0"),
        partial(solvers.adams_bashforth, order=4, basis="velocity"),
        partial(solvers.adams_bashforth, order=4),
        partial(solvers.dpmpp, order=2, form="exact"),
        partial(solvers.unipc, order=2),
        partial(solvers.unipc, order=1),
    ]
    for solver in plans:
        from_inf, from_high = solver((math.inf, *tail)), solver((1e150, *tail))
        assert from_inf.rows[0] == (1.0,)
        rate = 0.05 if from_inf.meta["solver"] in ("dpmpp", "unipc") else 1e-12  # logarithms go slowly to infinity
        for a, b in zip(from_inf.rows[1:], from_high.rows[1:], strict=True):
            length = max(len(a), len(b))
            for x, y in zip((*a, *[0.0] * (length - len(a))), (*b, *[0.0] * (length - len(b))), strict=True):
                assert x == pytest.approx(y, abs=rate)


# Ends and refusals


def test_lower_orders_ramp_up() -> None:
    for n in (1, 2, 3):
        grid = grids.log_linear(n, 10.0, 0.1, last="min")
        for plan in (
            solvers.adams_bashforth(grid, 4),
            solvers.ipndm(grid),
            solvers.deis(grid, 4),
            solvers.dpmpp(grid, 3),
        ):
            assert [len(row) for row in plan.rows] == list(range(1, n + 1))
        assert [len(row) for row in solvers.unipc(grid, 3).rows] == [1, 2, 3][:n]


def test_final_rules() -> None:
    zero, stop = grids.log_linear(6, 10.0, 0.1), grids.log_linear(6, 10.0, 0.1, last="min")

    def lengths(plan: Plan) -> list[int]:
        return [len(row) for row in plan.rows]

    assert lengths(solvers.dpmpp(zero, 3)) == [1, 2, 3, 3, 3, 1]
    assert lengths(solvers.dpmpp(zero, 3, final="ramp")) == [1, 2, 3, 3, 2, 1]
    assert lengths(solvers.dpmpp(stop, 3)) == [1, 2, 3, 3, 3, 3]
    assert lengths(solvers.dpmpp(stop, 3, final="ramp")) == [1, 2, 3, 3, 2, 1]
    assert lengths(solvers.adams_bashforth(zero, 4, final="full")) == [1, 2, 3, 4, 4, 4]
    assert lengths(solvers.adams_bashforth(zero, 4, "velocity", final="full")) == [1, 2, 3, 4, 4, 4]
    assert solvers.adams_bashforth(zero, 2, final="full").rows[-1] == pytest.approx(
        solvers.ge(
            zero, [1 + (b - c) / (2 * (a - b)) for a, b, c in zip(zero, zero[1:], zero[2:], strict=False)], final="ge"
        ).rows[-1]
    )
    assert solvers.ipndm(zero, 4, final="full").rows[-1] == solvers.ipndm(stop, 4).rows[-1]
    assert solvers.unipc(zero, 3).rows[-1] == (1.0,)
    assert lengths(solvers.unipc(zero, 2)) == [1, 2, 3, 3, 3, 1]


def test_custom_rows() -> None:
    grid = (3.0, 1.0, 0.0)
    assert solvers.custom(grid, [[1.0], [1.5, -0.5]]) == Plan(grid, ((1.0,), (1.5, -0.5)))
    assert solvers.custom(grid, [[1.0], [1.5, -0.5]], "x0").basis == "x0"
    with pytest.raises(ValueError, match=r"rows\[1\] = \(1.5, -0.4\) sums to 1.1: a row must sum to 1"):
        solvers.custom(grid, [[1.0], [1.5, -0.4]])


GRID = (3.0, 1.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.adams_bashforth(GRID, 0), r"order = 0: must be an integer in \[1, 4\]"),
        (lambda: solvers.adams_bashforth(GRID, 5), "order = 5"),
        (lambda: solvers.adams_bashforth(GRID, 2.5), "order = 2.5: must be an integer"),
        (lambda: solvers.adams_bashforth(GRID, True), "order = True"),
        (lambda: solvers.adams_bashforth(GRID, 2, "v"), "basis 'v' is not one of eps, x0, velocity"),
        (lambda: solvers.adams_bashforth(GRID, 2, final="ge"), "final 'ge' is not one of denoise, ramp, full"),
        (lambda: solvers.adams_bashforth(GRID, 2, "x0", "full"), "no finite row to sigma = 0.0: use final='denoise'"),
        (lambda: solvers.ipndm(GRID, 5), r"order = 5: must be an integer in \[1, 4\]"),
        (lambda: solvers.ipndm(GRID, 2, "y"), "basis 'y' is not one of"),
        (lambda: solvers.deis(GRID, 5), "order = 5"),
        (lambda: solvers.deis(GRID, 2, "edm"), "time 'edm' is not one of vp, log"),
        (lambda: solvers.deis(GRID, 2, betas=(20.0, 0.1)), r"betas = \(20.0, 0.1\): needs 0 <= b_0 < b_1"),
        (lambda: solvers.deis(GRID, 2, final="full"), "deis has no finite row to sigma = 0.0"),
        (lambda: solvers.dpmpp(GRID, 4), r"order = 4: must be an integer in \[1, 3\]"),
        (lambda: solvers.dpmpp(GRID, 2, "midpoint"), "form 'midpoint' is not one of published, exact"),
        (lambda: solvers.dpmpp(GRID, 2, final="full"), "dpmpp has no finite row to sigma = 0.0"),
        (lambda: solvers.unipc(GRID, 4), "order = 4"),
        (lambda: solvers.unipc(GRID, 2, "bh3"), "variant 'bh3' is not one of bh2, bh1"),
        (lambda: solvers.unipc(GRID, 2, final="full"), "unipc has no finite row to sigma = 0.0"),
        (lambda: solvers.unipc((math.inf, *GRID), 2, "bh1"), "its corrector is infinite there"),
        (lambda: solvers.dpmpp((1.0, 1.0, 0.0)), "is not below"),
        (lambda: solvers.unipc((1.0,)), "give at least 2"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
