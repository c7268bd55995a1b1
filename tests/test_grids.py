"""Grids: the paper's tables digit for digit, end points, and errors that say what to do."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch

from logsnr.noise import flow_time
from logsnr.sampling import grids, literature
from logsnr.theory import admissible_schedule, grid_between, interpolated, is_admissible
from logsnr.timesteps import TimestepTable

DDPM, SD = TimestepTable.ddpm(), TimestepTable.stable_diffusion()


@pytest.mark.parametrize(
    ("n", "steps"),
    [
        (5, (853, 652, 380, 116, 22, 0)),
        (10, (853, 765, 665, 549, 415, 271, 149, 73, 33, 14, 0)),
        (
            20,
            (853, 810, 765, 717, 666, 611, 551, 487, 418, 345, 274, 207, 151, 107, 75, 51, 34, 23, 15, 9, 0),
        ),
    ],
)
def test_paper_log_linear_timesteps(n: int, steps: tuple[int, ...]) -> None:
    assert grids.paper_timesteps(n, DDPM) == steps
    assert grids.ge_paper(n, DDPM) == tuple(DDPM.sigma(float(t)) for t in steps)


def test_paper_log_linear_timesteps_of_fifty() -> None:
    steps = grids.paper_timesteps(50, DDPM)
    assert len(steps) == 51
    assert steps[:3] == (853, 836, 818)
    assert steps[-4:] == (8, 6, 5, 0)


def test_paper_sigmas() -> None:
    five, ten = grids.ge_paper(5, DDPM), grids.ge_paper(10, DDPM)
    assert [f"{s:.4g}" for s in five[:4]] == ["40.09", "8.634", "1.847", "0.3979"]
    assert [f"{s:.2f}" for s in (five[5], ten[10])] == ["0.01", "0.01"]
    expected = ["40.09", "19.50", "9.425", "4.541", "2.202", "1.070", ".5182", ".2513", ".1212", ".0600"]
    for value, golden in zip(ten, expected, strict=False):
        digits = len(golden.split(".")[1])
        assert f"{value:.{digits}f}" == f"{float(golden):.{digits}f}"
    assert f"{five[4]:.4f}" == "0.0858"


@pytest.mark.parametrize(
    ("n", "end", "level"), [(5, 0.0850677, 0.723591), (10, 0.0585054, 0.342260), (20, 0.0419553, 0.176010)]
)
def test_paper_end_rule(n: int, end: float, level: float) -> None:
    # The paper's code forms sqrt(1/abar - 1) in float32, which puts sigma(0) at .0100008 instead of .0100013 and
    # the end 2.5e-5 lower; redo that here for its digits.  The integer timesteps are the same either way.
    abar = DDPM.alphas_cumprod.float()
    paper_sigma = (1 / abar - 1).sqrt()
    assert f"{float(paper_sigma[0]):.7f}" == "0.0100008"
    assert f"{float(paper_sigma[1]):.7f}" == "0.0148304"
    assert f"{float(paper_sigma[1000 // n]):.6f}" == f"{level:.6f}"
    assert f"{float((paper_sigma[1000 // n] * paper_sigma[0]).sqrt()):.7f}" == f"{end:.7f}"
    assert DDPM.sigma(0.0) == pytest.approx(0.0100008, rel=6e-5)
    assert grids.paper_timesteps(n, DDPM, end=end) == grids.paper_timesteps(n, DDPM)


def test_table_ends() -> None:
    assert f"{DDPM.sigma(999.0):.3f}" == "157.407"
    assert f"{SD.sigma(999.0):.4f}" == "14.6146"
    # .029168 in the paper's float32 arithmetic, .0291675 here
    assert f"{float((1 / SD.alphas_cumprod.float() - 1).sqrt()[0]):.6f}" == "0.029168"
    assert SD.sigma(0.0) == pytest.approx(0.029168, abs=1e-6)


def test_paper_other_styles() -> None:
    ddim = grids.paper_timesteps(10, DDPM, 157.0, 0.002, "ddim")
    assert ddim == (999, 899, 799, 699, 599, 499, 399, 299, 199, 99, 0)
    offset = grids.paper_timesteps(10, DDPM, 40.0, style="ddim")
    assert offset == (853, 767, 682, 597, 511, 426, 341, 255, 170, 85, 0)
    edm = grids.paper_timesteps(10, DDPM, 80.0, style="edm")
    assert edm == (930, 868, 794, 705, 591, 441, 252, 93, 22, 2, 0)
    # EDM's .002 lies below the table: from 20 steps on, its last levels collapse and cost an evaluation
    assert grids.paper_timesteps(20, DDPM, 80.0, style="edm")[-3:] == (2, 0, 0)
    with pytest.raises(ValueError, match="timestep 0 appears twice"):
        grids.ge_paper(20, DDPM, 80.0, style="edm")


def test_stable_diffusion_timesteps() -> None:
    end = SD.sigma(100.0)  # the authors' scheduler ends its log-linear part at sigma(T/n)
    assert grids.paper_timesteps(10, SD, 8.35, end) == (901, 830, 751, 663, 566, 461, 353, 252, 166, 100, 0)
    expected = (8.39, 5.88, 4.12, 2.88, 2.03, 1.42, 0.997, 0.701, 0.492, 0.344, 0.0292)
    for value, golden in zip(grids.ge_paper(10, SD, 8.35, end), expected, strict=True):
        assert float(f"{value:.3g}") == golden
    ddim = grids.paper_timesteps(10, SD, 8.35, 0.02, "ddim")
    assert ddim == (901, 810, 720, 630, 540, 450, 360, 270, 180, 90, 0)


def test_log_linear_sub_sampled() -> None:
    full = grids.log_linear(199, 10.0, 0.005, last="min")  # 200 levels
    sub = grids.from_sigmas([*full[::10], full[-1]])
    assert len(sub) == 21
    assert [f"{s:.5f}" for s in sub[:3]] == ["10.00000", "6.82526", "4.65842"]
    assert f"{sub[-2]:.5f}" == "0.00705"
    assert sub[-1] == 0.005


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33])
def test_log_linear_is_geometric(n: int) -> None:
    grid = grids.log_linear(n, 40.0, 0.02, last="min")
    assert len(grid) == n + 1
    assert (grid[0], grid[-1]) == (40.0, 0.02)
    for a, b in pairwise(grid):
        assert b / a == pytest.approx((0.02 / 40) ** (1 / n), rel=1e-12)
    zero = grids.log_linear(n, 40.0, 0.02)
    assert len(zero) == n + 1
    assert zero[-1] == 0
    assert zero[:-1] == (grids.log_linear(n - 1, 40.0, 0.02, last="min") if n > 1 else (40.0,))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_flow_range_is_even_in_flow_time(n: int) -> None:
    grid = grids.flow_range(n, 40.0, 0.02, last="min")
    times = [flow_time(s) for s in grid]
    steps = [(b - a) * n for a, b in pairwise(times)]
    assert steps == pytest.approx([flow_time(0.02) - flow_time(40.0)] * n, rel=1e-12)
    assert (grid[0], grid[-1]) == (40.0, 0.02)
    zero = grids.flow_range(n, 40.0, 0.02)
    assert zero[:-1] == (grids.flow_range(n - 1, 40.0, 0.02, last="min") if n > 1 else (40.0,))
    # towards both ends it becomes the flow grid itself, whose first level is inf
    assert grids.flow_range(n + 1, 1e9, 1e-9, last="min")[1:-1] == pytest.approx(grids.flow(n + 1)[1:-1], rel=1e-6)
    # a shift is the unit of the levels
    unit = [3 * sigma for sigma in grids.flow_range(n, 40.0 / 3, 0.02 / 3, last="min")]
    assert grids.flow_range(n, 40.0, 0.02, last="min", shift=3.0) == pytest.approx(unit, rel=1e-12)


def test_karras_is_edm_eq_5() -> None:
    n = 18
    expected = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    assert grids.karras(n, 80.0, 0.002) == pytest.approx([*expected, 0.0], rel=1e-12)
    # f = sigma^(1/rho) is uniform; rho -> inf is log-linear
    roots = [s ** (1 / 3) for s in grids.karras(10, 5.0, 0.1, rho=3.0, last="min")]
    steps = [a - b for a, b in pairwise(roots)]
    assert steps == pytest.approx([steps[0]] * 10, rel=1e-12)
    assert grids.karras(10, 5.0, 0.1, rho=1e6) == pytest.approx(grids.log_linear(10, 5.0, 0.1), rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_angles_are_even_and_half_way_between_two_grids(shift: float) -> None:
    """sigma = shift tan^2(theta), t = sin^2(theta): where a step is short in log sigma it is as much longer in t."""
    grid = grids.angles(400, 40.0, 0.02, last="min", shift=shift)
    theta = [math.asin(math.sqrt(sigma / (sigma + shift))) for sigma in grid]
    assert [b - a for a, b in pairwise(theta)] == pytest.approx([(theta[-1] - theta[0]) / 400] * 400, rel=1e-6)
    assert (grid[0], grid[-1]) == (40.0, 0.02)
    assert grids.angles(401, 40.0, 0.02, shift=shift) == (*grid, 0.0)
    even = [s / (s + shift) for s in grid]
    products = [math.log(a / b) * (s - t) for (a, b), (s, t) in zip(pairwise(grid), pairwise(even), strict=True)]
    assert max(products) / min(products) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="shift = 0: must be in"):
        grids.angles(4, 40.0, 0.02, shift=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_times(shift: float) -> None:
    n = 10
    grid = grids.flow(n, shift)
    assert grid[0] == math.inf
    assert grid[-1] == 0
    for i in range(1, n):
        t = 1 - i / n
        shifted = shift * t / (1 + (shift - 1) * t)  # SD3's formula
        assert grid[i] / (1 + grid[i]) == pytest.approx(shifted, rel=1e-12)
    assert grids.flow(n, shift, last="min") == grids.flow(n + 1, shift)[:-1]


@pytest.mark.parametrize("n", [1, 5, 7, 10, 50])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_are_those_of_diffusers(n: int, spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    grid = grids.timesteps(n, DDPM, spacing)
    if n == 1 and spacing == "linspace":
        assert grid == (DDPM.sigma(999.0), 0.0)  # from the noise, where numpy's linspace(0, 999, 1) is t = 0
    else:
        assert grid == (*(DDPM.sigma(float(t)) for t in scheduler.timesteps), 0.0)


def test_timesteps_last_level() -> None:
    assert grids.timesteps(4, DDPM, "linspace", last="min") == tuple(
        DDPM.sigma(float(t)) for t in (999, 749, 500, 250, 0)
    )
    assert grids.timesteps(4, DDPM, "trailing", last="min")[-1] == DDPM.sigma(0.0)
    assert grids.timesteps(4, DDPM, "leading", last="min", offset=1)[-2:] == (DDPM.sigma(1.0), DDPM.sigma(0.0))
    with pytest.raises(ValueError, match="already end at t = 0"):
        grids.timesteps(4, DDPM, "leading", last="min")
    zero_terminal = TimestepTable([0.9, 0.5, 0.1, 0.0])
    assert grids.timesteps(2, zero_terminal)[0] == math.inf


@pytest.mark.parametrize("model", get_args(literature.AYSModel))
def test_align_your_steps(model: str) -> None:
    listed = tuple(literature._table()["ays"]["levels"][model])
    assert len(listed) == 11
    assert literature.ays(10, model, last="min") == listed
    assert literature.ays(10, model) == (*listed[:-1], 0.0)
    assert literature.ays(5, model, last="min") == listed[::2]
    twenty = literature.ays(20, model, last="min")
    assert twenty[::2] == listed
    for a, middle, b in zip(listed, twenty[1::2], listed[1:], strict=False):
        assert middle == pytest.approx(math.sqrt(a * b), rel=1e-14)
    # as numpy's interpolation of log sigma over [0, 1]
    position = [10 * i / 7 for i in range(8)]
    for x, sigma in zip(position, literature.ays(7, model, last="min"), strict=True):
        k = min(int(x), 9)
        expected = math.log(listed[k]) + (x - k) * (math.log(listed[k + 1]) - math.log(listed[k]))
        assert math.log(sigma) == pytest.approx(expected, abs=1e-13)
    assert literature.ays(1, model) == (listed[0], 0.0)


def test_align_your_steps_levels_are_those_of_the_table() -> None:
    """The published timesteps name the same levels of Stable Diffusion's table, to their three digits."""
    for model, steps in {
        "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
        "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
    }.items():
        for sigma, t in zip(literature._table()["ays"]["levels"][model], steps, strict=False):
            assert abs(SD.timestep(sigma) - t) < 1


KNOTS = [(0.1, 0.4), (1.0, 0.3), (4.0, 0.09), (20.0, 0.02), (80.0, 0.005)]


@pytest.mark.parametrize("n", [2, 5, 12, 40])
def test_the_admissible_grid_is_the_papers_schedule_of_the_curve(n: int) -> None:
    """Of n steps for the least nu that reaches the end, each of an equal share of ln nu; then sigma 0."""
    grid = grids.admissible(n, KNOTS, 80.0, 0.3)
    _, nu = grid_between(KNOTS, n - 1, sigma_max=80.0, sigma_min=0.3)
    curve = interpolated(KNOTS)
    assert (len(grid), grid[0], *grid[-2:]) == (n + 1, 80.0, 0.3, 0.0)
    if math.isfinite(nu):  # else no nu is large enough: the steps are of one c all the same
        assert grid[:-1] == pytest.approx(admissible_schedule(KNOTS, nu, n - 1, sigma_max=80.0), rel=1e-6)
        assert is_admissible(grid[:-1], [curve(sigma) for sigma in grid[:-2]], nu * (1 + 1e-6))
    shares = [curve(a) * (a - b) / b for a, b in pairwise(grid[:-1])]
    assert shares == pytest.approx([shares[0]] * (n - 1), rel=1e-5)
    assert grids.admissible(n, KNOTS, 80.0, 0.3, last="min") == grids.admissible(n + 1, KNOTS, 80.0, 0.3)[:-1]


def test_a_constant_error_gives_the_log_linear_grid() -> None:
    for n in (1, 2, 3, 10):
        assert grids.admissible(n, 0.1, 40.0, 0.02) == pytest.approx(grids.log_linear(n, 40.0, 0.02), rel=1e-6)


def test_errors_beyond_the_theory_are_held_within_it() -> None:
    """A point cloud's eta vanishes at low noise, a poor network's exceeds 1: the theory refuses both."""
    low, high = grids.ETA_RANGE
    wild = interpolated([(0.1, 0.0), (1.0, 0.5), (9.0, 3.0)])
    found, _ = grid_between(lambda s: min(max(wild(s), low), high), 7, sigma_max=9.0, sigma_min=0.1)
    assert grids.admissible(8, wild, 9.0, 0.1) == (*found, 0.0)
    for curve in (wild, 0.0, 1.0):
        with pytest.raises(ValueError, match="eta"):
            grid_between(curve, 7, sigma_max=9.0, sigma_min=0.1)


class Uniform:
    """Uniform in log sigma: its quantiles are a log-linear grid."""

    def __init__(self, low: float, ends_at_zero: bool = False) -> None:
        self.low, self.ends_at_zero = low, ends_at_zero

    def grid(self, n: int) -> torch.Tensor:
        out = torch.logspace(1, math.log10(self.low), n + 1, dtype=torch.float64)
        if self.ends_at_zero:
            out[-1] = 0
        return out


def test_from_schedule() -> None:
    for n in (1, 2, 9):
        assert grids.from_schedule(Uniform(0.01), n) == pytest.approx(grids.log_linear(n, 10.0, 0.01), rel=1e-12)
        expected = grids.log_linear(n, 10.0, 0.01, last="min")
        assert grids.from_schedule(Uniform(0.01), n, last="min") == pytest.approx(expected, rel=1e-12)
        ended = Uniform(0.01, ends_at_zero=True)
        assert grids.from_schedule(ended, n) == grids.from_schedule(ended, n, last="min")
        assert len(grids.from_schedule(ended, n)) == n + 1


def test_from_sigmas_takes_tensors() -> None:
    assert grids.from_sigmas(torch.tensor([3.0, 1.0, 0.0])) == (3.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.log_linear(0, 1.0, 0.1), "n = 0"),
        (lambda: grids.karras(0, 1.0, 0.1), "n = 0"),
        (lambda: grids.flow(0), "n = 0"),
        (lambda: grids.timesteps(0, DDPM), "n = 0"),
        (lambda: grids.ge_paper(0, DDPM), "n = 0"),
        (lambda: grids.from_schedule(Uniform(0.1), 0), "n = 0"),
        (lambda: grids.log_linear(3, 0.1, 1.0), "sigma from 0.1 to 1.0: needs 0 < smallest < largest < inf"),
        (lambda: grids.log_linear(3, math.inf, 1.0), "sigma from inf"),
        (lambda: grids.karras(3, 1.0, 0.0), "sigma from 1.0 to 0.0"),
        (lambda: grids.flow_range(0, 1.0, 0.1), "n = 0"),
        (lambda: grids.flow_range(3, 0.1, 1.0), "sigma from 0.1 to 1.0"),
        (lambda: grids.flow_range(3, 1.0, 0.1, shift=0.0), "shift = 0.0"),
        (lambda: grids.karras(3, 1.0, 0.1, rho=0.0), "rho = 0.0"),
        (lambda: grids.log_linear(3, 1.0, 0.1, last="max"), "last 'max' is not one of zero"),
        (lambda: grids.flow(3, shift=0.0), "shift = 0.0"),
        (lambda: grids.timesteps(1001, DDPM), r"n = 1001: must be in \[1, 1000\]"),
        (lambda: grids.timesteps(3, DDPM, "even"), "spacing 'even' is not one of"),
        (lambda: grids.timesteps(3, DDPM, "leading", offset=400), "change offset"),
        (lambda: literature.ays(0), "n = 0"),
        (lambda: literature.ays(10, "sd3"), "model 'sd3' is not one of sd15, sdxl, svd"),
        (lambda: literature.ays(10, last="max"), "last 'max' is not one of zero"),
        (lambda: grids.ge_paper(10, SD, start=40.0), "start = 40.0: the table ends at sigma 14.6146"),
        (lambda: grids.ge_paper(10, DDPM, 1.0, 2.0), "sigma from 1.0 to 2.0"),
        (lambda: grids.ge_paper(10, DDPM, style="cosine"), "style 'cosine' is not one of"),
        (lambda: grids.ge_paper(300, DDPM), "appears twice"),
        (lambda: grids.admissible(0, 0.1, 1.0, 0.1), "n = 0"),
        (lambda: grids.admissible(3, 0.1, 0.1, 1.0), "sigma from 0.1 to 1.0"),
        (lambda: grids.admissible(3, 0.1, 1.0, 0.1, last="max"), "last 'max' is not one of zero"),
        (lambda: grids.admissible(3, [], 1.0, 0.1), "give .sigma, eta. pairs"),
        (lambda: grids.admissible(3, math.nan, 1.0, 0.1), r"eta = nan: must be in \[0, 1\)"),
        (lambda: grids.from_sigmas([1.0, 1.0, 0.0]), r"sigmas\[1\] = 1.0 is not below"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
