"""Plans: validation, tails, and JSON that keeps every bit."""

from __future__ import annotations

import json
import math
import random

import pytest

from logsnr.sampling import Plan, grids, solvers


def awkward_plan() -> Plan:
    """Sixty-four steps of floats with no short decimal form, from inf to 0, with noise."""
    rng = random.Random(0)
    sigmas = (math.inf, *sorted((math.exp(rng.gauss(0, 20)) for _ in range(63)), reverse=True), 0.0)
    rows = tuple(tuple(rng.gauss(0, 1) / 3 for _ in range(min(i + 1, 4))) for i in range(64))
    down = tuple(s * rng.random() for s in sigmas[1:])
    return Plan(sigmas, rows, "x0", down, {"solver": "random", "note": "σ"})


def test_json_round_trip_is_bit_exact(tmp_path) -> None:
    plan = awkward_plan()
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan
    assert [s.hex() for s in back.sigmas] == [s.hex() for s in plan.sigmas]
    assert [c.hex() for row in back.rows for c in row] == [c.hex() for row in plan.rows for c in row]
    assert [s.hex() for s in back.sigma_down] == [s.hex() for s in plan.sigma_down]
    assert back.meta == plan.meta
    assert back.hash == plan.hash
    assert json.loads((tmp_path / "plan.json").read_text())["sigmas"][0] == "inf"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]  # no temporary file left


def test_save_leaves_the_old_plan_when_it_fails(tmp_path) -> None:
    path = tmp_path / "plan.json"
    solvers.ddim([1.0, 0.0]).save(path)
    with pytest.raises(TypeError):
        Plan((2.0, 0.0), ((1.0,),), meta={"bad": object()}).save(path)
    assert Plan.load(path).sigmas == (1.0, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_hash_is_of_the_numbers_only() -> None:
    plan = Plan((2.0, 1.0, 0.0), ((1.0,), (1.5, -0.5)))
    assert plan.hash == Plan([2, 1, -0.0], [[1], [1.5, -0.5]], meta={"a": 1}).hash
    assert plan == Plan([2, 1, 0], [[1], [1.5, -0.5]], meta={"a": 1})
    others = [
        Plan((2.0, 1.0, 0.0), ((1.0,), (1.5, -0.5)), "x0"),
        Plan((2.0, math.nextafter(1.0, 2), 0.0), ((1.0,), (1.5, -0.5))),
        Plan((2.0, 1.0, 0.0), ((1.0,), (1.5, math.nextafter(-0.5, 0)))),
        Plan((2.0, 1.0, 0.0), ((1.0,), (1.5, -0.5)), sigma_down=(0.5, 0.0)),
    ]
    assert len({plan.hash, *(p.hash for p in others)}) == 5
    assert len(plan.hash) == 64


def test_nfe_is_the_number_of_rows_and_noisy_means_a_draw() -> None:
    grid = grids.log_linear(5, 10.0, 0.1)
    assert solvers.ge(grid).nfe == 5
    assert not solvers.ge(grid).noisy
    assert solvers.ddpm(grid).noisy
    assert not Plan(grid, ((1.0,),) * 5, sigma_down=grid[1:]).noisy


def test_tail_folds_the_missing_history_onto_the_oldest_estimate() -> None:
    rows = ((1.0,), (1.5, -0.5), (2.0, -1.25, 0.25), (2.5, -2.0, 1.0, -0.5), (1.0,))
    plan = Plan((5.0, 4.0, 3.0, 2.0, 1.0, 0.0), rows, sigma_down=(4.0, 2.5, 2.0, 0.5, 0.0))
    tail = plan.tail(2)
    assert tail.sigmas == (3.0, 2.0, 1.0, 0.0)
    assert tail.rows == ((1.0,), (2.5, -1.5), (1.0,))
    assert tail.sigma_down == (2.0, 0.5, 0.0)
    assert tail.meta["tail"] == 2
    assert tail.tail(1).meta["tail"] == 3
    assert plan.tail(0) == plan
    for k in range(plan.nfe):
        assert [sum(row) for row in plan.tail(k).rows] == [sum(row) for row in rows[k:]]
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\]"):
        plan.tail(5)


def test_tail_of_gradient_estimation_is_gradient_estimation_of_the_rest() -> None:
    grid = grids.log_linear(8, 40.0, 0.05)
    for k in range(8):
        assert solvers.ge(grid, 2.3).tail(k) == solvers.ge(grid[k:], 2.3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigmas": (1.0,), "rows": ()}, "1 sigmas: give at least 2"),
        ({"sigmas": (1.0, 1.0)}, r"sigmas\[1\] = 1.0 is not below sigmas\[0\] = 1.0"),
        ({"sigmas": (1.0, 2.0)}, r"sigmas\[1\] = 2.0 is not below sigmas\[0\] = 1.0"),
        ({"sigmas": (math.nan, 0.0)}, r"sigmas\[0\] = nan"),
        ({"sigmas": (1.0, -0.5)}, r"sigmas\[1\] = -0.5"),
        ({"sigmas": (math.inf, math.inf)}, r"sigmas\[1\] = inf is not below"),
        ({"rows": ((1.0,), (1.0,))}, "2 rows for 2 sigmas: give one row per step, 1"),
        ({"rows": ((1.0, 0.0),)}, r"rows\[0\] has 2 entries: step 0 can use 1 to 1"),
        ({"rows": ((),)}, r"rows\[0\] has 0 entries"),
        ({"rows": ((math.inf,),)}, r"rows\[0\] = \(inf,\): coefficients must be finite"),
        ({"basis": "v"}, "basis 'v' is not one of eps, x0, velocity"),
        ({"sigmas": (math.inf, 1.0), "rows": ((2.0,),)}, r"rows\[0\] = \(2.0,\) at sigma = inf"),
        ({"sigma_down": (0.0, 0.0)}, "sigma_down has 2 entries: give one per step, 1"),
        ({"sigmas": (2.0, 1.0), "sigma_down": (1.5,)}, r"sigma_down\[0\] = 1.5: must be in \[0, sigmas\[1\]\]"),
        ({"sigma_down": (math.nan,)}, r"sigma_down\[0\] = nan"),
    ],
)
def test_bad_fields_are_named(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"sigmas": (1.0, 0.0), "rows": ((1.0,),), **kwargs})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "the plan has format 2, of a newer logsnr"),
        ({"version": None}, "the plan has format None, this version reads format 1"),
        ({"gamma": 2}, r"unknown keys \['gamma'\]"),
        ({"rows": "1"}, "rows = '1': give a list"),
        ({"rows": [["1"]]}, r"rows\[0\] holds '1'"),
        ({"sigmas": [True, 0]}, "sigmas holds True"),
        ({"sigmas": ["inf", "inf"]}, "is not below"),
    ],
)
def test_bad_json_is_named(change, message: str, tmp_path) -> None:
    values = {**solvers.ddim([1.0, 0.0]).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(values)


def test_missing_keys_and_other_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"lacks \['basis', 'rows'\]"):
        Plan.from_dict({"version": 1, "sigmas": [1.0, 0.0]})
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json cannot be read as a plan"):
        Plan.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="holds a list"):
        Plan.load(tmp_path / "b.json")
