"""The papers' experiments: claims are judged by paired differences, and every experiment runs from end to end."""

import json
import sys
from pathlib import Path

import pytest

from logsnr.evaluation.compare.result import Cell, Comparison, Row, Teacher
from logsnr.evaluation.metrics import Estimated

PAPERS = Path(__file__).parents[1] / "benchmarks" / "papers"
sys.path.insert(0, str(PAPERS))
import runner  # noqa: E402


def row(name, values):
    cells = [
        Cell(seed=seed, evaluations=5, rmse=Estimated(value=value, stderr=0.1), seconds_per_image=1.0)
        for seed, value in enumerate(values)
    ]
    return Row(name=name, solver=name, grid="", family="", origin="logsnr", budget=5, cells=tuple(cells))


def found(**rows):
    made = tuple(row(name, values) for name, values in rows.items())
    return Comparison(
        rows=made, teacher=Teacher(name="t", cells=made[0].cells), samples=2, seeds=(0, 1, 2), sigma_range=(0.1, 1.0),
        features=None, reference=0, machine="m", about={"model": "m"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("less", "verdict"),
    [
        ((1.1, 2.1, 3.1), "refuted"),
        ((0.9, 1.91, 2.89), "confirmed"),
        ((0.5, 2.5, 3.0), "undecided"),
        ((0.5,), "undecided"),
    ],
)
def test_a_claim_is_decided_by_the_paired_difference_over_seeds(less, verdict):
    """Values that differ by much between seeds and by little within: only pairs decide."""
    result = found(ours=less, theirs=(1.0, 2.0, 3.0))
    claim = runner.Claim(says="ours is better", less="ours", more="theirs", by="rmse", nfe=5)
    judged = runner.judged(claim, result)
    assert judged["verdict"] == verdict
    assert judged["seeds"] == len(less)
    assert verdict in runner.verdicts([judged])


def test_a_page_keeps_what_stands_around_its_model(tmp_path):
    options = runner.parsed(runner.parser(None, (5,), 2, 1), ["--work", str(tmp_path), "--out", str(tmp_path)])
    for model, body in (("one", "first"), ("two", "second"), ("one", "third")):
        options.model = model
        runner.write("page", "Title", body, {"body": body}, options)
    text = (tmp_path / "page.md").read_text()
    assert "first" not in text
    assert text.index("third") < text.index("second")
    assert json.loads((tmp_path / "page.json").read_text()) == {"one": {"body": "third"}, "two": {"body": "second"}}


@pytest.mark.heavy
@pytest.mark.parametrize("name", [path.stem for path in sorted(PAPERS.glob("*_*.py"))])
def test_every_experiment_runs(name, tmp_path):
    module = __import__(name)
    module.main(["--smoke", "--model", "zoo:digits", "--data", "digits", "--threads", "1", "--work", str(tmp_path)])
    page = (tmp_path / f"{name.replace('_', '-')}.md").read_text()
    (of, values), *others = json.loads((tmp_path / f"{name.replace('_', '-')}.json").read_text()).items()
    assert values
    assert not others
    assert f"## {of}\n" in page
    assert "| --- |" in page
