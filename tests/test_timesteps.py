"""Timestep tables: bit-equal to diffusers, exact on the grid, monotone between."""

from __future__ import annotations

import math

import pytest
import torch

from logsnr.timesteps import TimestepTable

TABLES = {
    "ddpm": TimestepTable.ddpm(),
    "stable-diffusion": TimestepTable.stable_diffusion(),
    "cosine": TimestepTable.cosine(),
    "zero-terminal": TimestepTable(torch.linspace(0.9999, 0, 1000, dtype=torch.float64)),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    ("table", "options"),
    [
        ("ddpm", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("stable-diffusion", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_bit_equal_to_diffusers(scheduler: str, table: str, options: dict[str, object]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, scheduler)(num_train_timesteps=1000, **options).alphas_cumprod
    assert torch.equal(TABLES[table].alphas_cumprod, theirs.double())


def test_sigma_ranges_of_the_literature() -> None:
    assert TABLES["ddpm"].sigma_range == pytest.approx((0.0100, 157.4), rel=1e-3)
    assert TABLES["stable-diffusion"].sigma_range == pytest.approx((0.0292, 14.61), rel=2e-3)
    assert TABLES["zero-terminal"].sigma_range[1] == math.inf


@every_table
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grid_points_round_trip_exactly(table: TimestepTable, dtype: torch.dtype) -> None:
    t = torch.arange(len(table), dtype=dtype)
    sigma = table.sigma(t)
    assert torch.equal(sigma, table.sigmas.to(dtype))
    assert torch.equal(table.timestep(sigma), t)
    assert table.sigma(7) == float(table.sigmas[7])
    assert table(float(table.sigmas[7])) == 7


@every_table
def test_continuous_inverse_is_monotone(table: TimestepTable) -> None:
    t = torch.linspace(0, len(table) - 1, 7919, dtype=torch.float64)
    sigma = table.sigma(t)
    assert (sigma[1:] > sigma[:-1]).all()
    # Within 1e-4 of an integer the answer is the integer (float32 sigmas must find their grid point).
    assert float((table.timestep(sigma) - t).abs().max()) <= 1.0001e-4
    between = (t - t.round()).abs() > 2e-4
    torch.testing.assert_close(table.timestep(sigma)[between], t[between], rtol=0, atol=1e-8)
    assert (table.timestep(sigma).diff() >= 0).all()


def test_between_grid_points_log_sigma_is_linear() -> None:
    table = TABLES["ddpm"]
    log = table.sigmas.log()
    assert math.log(table.sigma(499.25)) == pytest.approx(float(0.75 * log[499] + 0.25 * log[500]), rel=1e-13)


def test_last_segment_of_a_zero_terminal_table_is_linear_in_inverse_sigma() -> None:
    table = TABLES["zero-terminal"]
    last = float(table.sigmas[-2])
    assert 1 / table.sigma(998.75) == pytest.approx(0.25 / last, rel=1e-12)
    assert table.sigma(999) == math.inf
    assert table.timestep(math.inf) == 999
    assert table.timestep(4 * last) == pytest.approx(998.75, abs=1e-10)


@every_table
def test_levels_beyond_the_table_clamp(table: TimestepTable) -> None:
    lo, hi = table.sigma_range
    assert table.timestep(lo / 3) == 0
    assert table.timestep(hi * 3) == len(table) - 1
    assert table.sigma(-5.0) == lo
    assert table.sigma(2000.0) == hi


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "at least 2"),
        ([[0.9, 0.5]], "one axis"),
        ([0.1, 0.9], "decrease strictly"),
        ([0.9, 0.9], "decrease strictly"),
        ([1.0, 0.5], r"\(0, 1\)"),
        ([0.9, -0.1], r"\(0, 1\)"),
        ([0.9, 0.0, 0.0], "decrease strictly"),
        ([0.9, math.nan], "decrease strictly"),
    ],
)
def test_bad_tables_are_refused(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepTable(values)
