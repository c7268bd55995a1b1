"""What several test files share, and their order: the longest first, so that parallel workers end together."""

import gc
import sys
from pathlib import Path

import pytest

from logsnr.cli import main

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
def tiny(monkeypatch):
    """Tiny pipelines with random weights (examples/tiny.py)."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import tiny

    return tiny
