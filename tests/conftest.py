"""What several test files share, and their order: the longest first, so that parallel workers end together."""

import gc
import sys
from pathlib import Path

import pytest

from logsnr.cli import main
from logsnr.report import figures

LONGEST = (
    "test_passport_networks.py",
    "test_distributed.py",
    "test_readme.py",
    "test_demo.py",
    "test_trainer.py",
    "test_calibrate.py",
    "test_export.py",
    "test_likelihood",
    "test_compare",
)
"""Files (or how their names begin) whose tests take seconds each."""


def pytest_collection():
    """What is collected lives as long as the session: looking for garbage in it is a fifth of the time it takes."""
    gc.disable()


def pytest_collection_modifyitems(items):
    first = [next((i for i, name in enumerate(LONGEST) if item.path.name.startswith(name)), None) for item in items]
    order = sorted(range(len(items)), key=lambda k: (first[k] is None, first[k] or 0, k))
    items[:] = [items[k] for k in order]


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command `logsnr` in this process; answers (exit code, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["logsnr", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def short_passports(monkeypatch):
    """Passports of the same parts, each of fewer levels and steps."""
    from logsnr.evaluation.passport import examination, labels, trajectories

    fewer = {
        trajectories: {"TEACHER": 12, "NFES": (4,), "GAMMA_STEPS": 3, "DRAW_STEPS": 10},
        examination: {"HALF_LEVELS": 3, "PROJECTION_LEVELS": 3},
        labels: {"LEVELS": 4},
    }
    for module, values in fewer.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="session", autouse=True)
def plain_layout():
    """Figures of pages keep matplotlib's margins."""
    figures.LAYOUT = "none"


@pytest.fixture
def tiny(monkeypatch):
    """Tiny pipelines with random weights (examples/tiny.py)."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import tiny

    return tiny
