"""The theorem of (eta, nu)-approximate projections: its bounds hold, are tight, and make grids."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, Estimate
from logsnr.noise import alpha_s
from logsnr.projection import Flat, Points, Product, ReferenceSet, Sphere
from logsnr.sampling import grids, sample, solvers
from logsnr.theory import (
    admissible_schedule,
    distance_bounds,
    grid_between,
    interpolated,
    is_admissible,
    limits,
    max_constant_step,
    step_sizes,
)

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Erring(Denoiser):
    """A projection with an error of exactly eta dist, in a direction of its own: x0 = p + eta dist u, |u| = 1.

    `direction` "out" is u = (y - p)/dist, "in" the opposite, "random" one per sample and noise level.
    """

    trained_range = (0.0, math.inf)
    sigma_data = 1.0

    def __init__(self, reference: ReferenceSet, etas: dict[float, float], direction: str = "random") -> None:
        super().__init__()
        self.reference, self.etas, self.direction, self.shape = reference, etas, direction, reference.shape

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(sigma)
        y = z / alpha
        p = self.reference.project(y)
        ray, distance = y - p, (y - p).norm(dim=1, keepdim=True)
        u = ray / distance.clamp(min=1e-300)
        if self.direction == "random":
            u = randn(*z.shape, seed=int(1e6 * float(sigma)) % 2**31)
            u = u / u.norm(dim=1, keepdim=True)
        sign = -1 if self.direction == "in" else 1
        x0 = p + sign * self.etas[float(sigma)] * distance * u
        return Estimate(x0, (z - alpha * x0) / s)


def distances(model: Erring, sigmas: list[float], y: Tensor) -> Tensor:
    """dist_K along DDIM from y, relative to the first `[n + 1, B]`."""
    seen: list[Tensor] = []
    sample(
        model,
        solvers.ddim(sigmas),
        noise=y / math.hypot(1, sigmas[0]),
        callback=lambda step: seen.append(model.reference.distance(step.z * math.hypot(1, step.sigma))),
    )
    return torch.stack(seen) / seen[0]


def draw(rng: random.Random) -> tuple[list[float], list[float], float]:
    """A random grid, one eta per step and a nu."""
    n = rng.randint(1, 12)
    sigmas = [rng.uniform(1, 50)]
    for _ in range(n):
        sigmas.append(sigmas[-1] * (1 - rng.choice([rng.uniform(0.01, 0.3), rng.uniform(0.05, 0.99)])))
    top = rng.choice([0.02, 0.2, 0.95])
    return sigmas, [rng.uniform(0, top) for _ in range(n)], rng.choice([1.05, 1.5, 2.0, 5.0])


def references() -> list[ReferenceSet]:
    return [
        Points(randn(1, 4, seed=1)),
        Flat(randn(4, 2, seed=2), randn(4, seed=3)),
        Points(randn(9, 4, seed=4)),
        Sphere(randn(4, seed=5), 0.8),
        Product([Sphere(randn(2, seed=6), 0.5), Points(randn(3, 2, seed=7))]),
    ]


def test_bounds_hold_on_random_draws() -> None:
    """200 grids with errors of their own, 15 runs on each."""
    rng, sets, admissible = random.Random(0), references(), 0
    for i in range(200):
        sigmas, etas, nu = draw(rng)
        reference = sets[i % len(sets)]
        model = Erring(reference, dict(zip(sigmas, etas, strict=False)), rng.choice(["random", "random", "out", "in"]))
        y = 4 * randn(15, 4, seed=i)
        ratio = distances(model, sigmas, y)
        lower, upper = (torch.tensor(b, dtype=F64).unsqueeze(1) for b in distance_bounds(sigmas, etas))
        assert bool((ratio >= lower - 1e-12).all()), (sigmas, etas)
        assert bool((ratio <= upper + 1e-12).all()), (sigmas, etas)
        if is_admissible(sigmas, etas, nu):
            admissible += 1
            noise = torch.tensor(sigmas, dtype=F64).unsqueeze(1) / sigmas[0]  # dist(x_N) = sqrt(n) sigma_N
            assert bool((ratio <= nu * noise * (1 + 1e-9)).all())
            assert bool((noise <= nu * ratio * (1 + 1e-9)).all())
    assert 20 < admissible < 180  # both cases were met


# Check B of the fact sheet: the bounds are attained by radial errors on a point and on a subspace.
@pytest.mark.parametrize("reference", references()[:2])
def test_bounds_are_tight(reference: ReferenceSet) -> None:
    rng = random.Random(1)
    for i in range(50):
        sigmas, etas, _ = draw(rng)
        y, betas = 3 * randn(2, 4, seed=i), step_sizes(sigmas)
        lower, upper = distance_bounds(sigmas, etas)
        out = distances(Erring(reference, dict(zip(sigmas, etas, strict=False)), "out"), sigmas, y)
        torch.testing.assert_close(out, torch.tensor(upper, dtype=F64)[:, None].expand_as(out), rtol=1e-9, atol=1e-13)
        inward = distances(Erring(reference, dict(zip(sigmas, etas, strict=False)), "in"), sigmas, y)
        exact = [1.0]
        for beta, eta in zip(betas, etas, strict=True):
            exact.append(exact[-1] * abs(1 - beta * (1 + eta)))
        torch.testing.assert_close(inward[:, 0], torch.tensor(exact, dtype=F64), rtol=1e-8, atol=1e-12)
        if lower[-1] > 0:
            assert lower == pytest.approx(exact, rel=1e-12)


# Check A: with an exact projection, eps is constant along the run, and any gamma and grid give the same distances.
@pytest.mark.parametrize("reference", references()[:2])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 2.7, -0.4])
def test_exact_projection_scales_distances_with_sigma(reference: ReferenceSet, gamma: float) -> None:
    rng = random.Random(2)
    for i in range(10):
        sigmas = draw(rng)[0]
        model = Erring(reference, dict.fromkeys(sigmas, 0.0), "out")
        y, states = 3 * randn(4, 4, seed=i), []
        plan = solvers.ge(sigmas, gamma)
        sample(model, plan, noise=y / math.hypot(1, sigmas[0]), callback=lambda step, s=states: s.append(step))
        start = reference.distance(y)
        for step in states:
            x = step.z * math.hypot(1, step.sigma)
            torch.testing.assert_close(
                reference.distance(x) / start, torch.full((4,), step.sigma / sigmas[0], dtype=F64)
            )
            torch.testing.assert_close(reference.project(x), reference.project(y), rtol=1e-9, atol=1e-9)


# Check C.
@pytest.mark.parametrize(
    ("eta", "nu", "n", "beta"),
    [(0.1, 2, 10, 0.401079), (0.1, 2, 50, 0.121013), (0.3, 1.5, 20, 0.062702), (0.05, 3, 5, 0.797782)],
)
def test_largest_constant_step(eta: float, nu: float, n: int, beta: float) -> None:
    found = max_constant_step(eta, nu, n)
    assert found == pytest.approx(beta, abs=5e-7)
    assert is_admissible([(1 - found) ** i for i in range(n + 1)], eta, nu)
    longer = 1.001 * found
    assert not is_admissible([(1 - longer) ** i for i in range(n + 1)], eta, nu)


def test_limits_of_many_largest_steps() -> None:
    sigma, distance = limits(0.1, 2)
    assert (sigma, distance) == (pytest.approx(9.766e-4, rel=1e-4), pytest.approx(1.953e-3, rel=1e-4))
    n = 200_000
    beta = max_constant_step(0.1, 2, n)
    assert (1 - beta) ** n == pytest.approx(sigma, rel=1e-3)
    assert (1 + (0.1 - 1) * beta) ** n == pytest.approx(distance, rel=1e-3)
    assert max_constant_step(0.1, 2, n) * n == pytest.approx(math.log(2) / 0.1, rel=1e-3)


def test_exact_projections_allow_everything() -> None:
    assert max_constant_step(0.0, 1.0, 7) == max_constant_step(0.0, 2.0, 1) == 1
    assert is_admissible([50, 3, 2.9, 0], 0.0, 1.0)
    assert limits(0.0, 2.0) == (0.0, 0.0)
    assert admissible_schedule(0.0, 2.0, 5, sigma_max=80.0) == (80.0, 0.0)
    assert not is_admissible([50, 3, 0], 0.01, 1e6)  # a last step to 0 promises no relative distance


def test_a_lower_bound_that_reached_zero_stays_there() -> None:
    # Two factors below 0 would multiply to a bound above 0, and to an admissible schedule, were they not cut.
    sigmas, eta = [1.0, 0.2, 0.04], 0.9
    assert distance_bounds(sigmas, eta)[0] == (1.0, 0.0, 0.0)
    assert not is_admissible(sigmas, eta, 1e9)


def test_admissible_schedules_are_admissible_and_use_the_whole_budget() -> None:
    rng = random.Random(3)
    for _ in range(300):
        knots = sorted(10 ** rng.uniform(-3, 2) for _ in range(rng.randint(1, 6)))
        curve = [(sigma, rng.uniform(1e-4, 0.9)) for sigma in knots]
        nu, n = rng.choice([1.1, 2.0, 4.0]), rng.randint(1, 30)
        grid = admissible_schedule(curve, nu, n, sigma_max=50.0)
        etas = [interpolated(curve)(sigma) for sigma in grid[:-1]]
        assert len(grid) == n + 1
        assert is_admissible(grid, etas, nu)
        assert not is_admissible(grid, etas, nu ** (0.999))
        spent = [-math.log1p(-e * (a / b - 1)) for e, (a, b) in zip(etas, pairwise(grid), strict=True)]
        assert spent == pytest.approx([math.log(nu) / n] * n, rel=1e-9)


def test_constant_eta_gives_the_constant_step() -> None:
    grid = admissible_schedule(0.1, 2.0, 10, sigma_max=40.0)
    assert step_sizes(grid) == pytest.approx([max_constant_step(0.1, 2.0, 10)] * 10, rel=1e-12)
    between, nu = grid_between(0.1, 10, sigma_max=40.0, sigma_min=0.05)
    assert between == pytest.approx(grids.log_linear(10, 40.0, 0.05, last="min"), rel=1e-6)
    assert is_admissible(between, 0.1, nu * (1 + 1e-6)) or math.isinf(nu)
    assert grid_between(0.01, 10, sigma_max=40.0, sigma_min=1.0)[1] == pytest.approx(
        (1 - 0.01 * (40 ** (1 / 10) - 1)) ** -10, rel=1e-6
    )


def test_steps_are_short_where_the_denoiser_errs() -> None:
    curve = [(0.1, 0.001), (1.0, 0.002), (4.0, 0.09), (20.0, 0.02), (80.0, 0.005)]
    grid, nu = grid_between(curve, 12, sigma_max=80.0, sigma_min=0.05)
    assert (len(grid), grid[0], grid[-1]) == (13, 80.0, 0.05)
    ratios = {a: a / b for a, b in pairwise(grid)}
    assert min(ratios, key=lambda sigma: ratios[sigma]) == pytest.approx(4.0, rel=0.5)
    assert is_admissible(grid, [interpolated(curve)(s) for s in grid[:-1]], nu * (1 + 1e-6))
    stopped = admissible_schedule(curve, 4.0, 40, sigma_max=80.0, sigma_min=0.05)
    assert stopped[-1] == 0.05
    assert len(stopped) < 41


def test_curves_interpolate_in_log_sigma_and_are_constant_beyond() -> None:
    curve = interpolated([(10.0, 0.3), (0.1, 0.1)])
    assert [curve(s) for s in (1e-3, 0.1, 1.0, 10.0, 99.0)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.3])
    assert interpolated(lambda sigma: sigma / 2)(0.5) == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: step_sizes([1.0]), "give at least 2"),
        (lambda: step_sizes([1.0, 1.0]), "strictly decrease"),
        (lambda: step_sizes([math.inf, 1.0]), "must be finite"),
        (lambda: is_admissible([2.0, 1.0], 0.1, 0.9), "nu = 0.9"),
        (lambda: is_admissible([2.0, 1.0], 1.0, 2.0), r"eta = 1.0: must be in \[0, 1\)"),
        (lambda: is_admissible([2.0, 1.0], [0.1, 0.1], 2.0), "2 values of eta for 1 steps"),
        (lambda: max_constant_step(0.1, 2.0, 0), "n = 0"),
        (lambda: max_constant_step(-0.1, 2.0, 3), "eta = -0.1"),
        (lambda: limits(0.1, math.inf), "nu = inf"),
        (lambda: admissible_schedule(0.1, 1.0, 3, sigma_max=1.0), "must be above 1"),
        (lambda: admissible_schedule(0.1, 2.0, 3, sigma_max=0.0), "smallest < largest"),
        (lambda: admissible_schedule([], 2.0, 3, sigma_max=1.0), "give .sigma, eta. pairs"),
        (lambda: grid_between(0.1, 3, sigma_max=1.0, sigma_min=0.0), "append sigma 0"),
        (lambda: grid_between(0.0, 3, sigma_max=1.0, sigma_min=0.1), "eta reaches 0"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
