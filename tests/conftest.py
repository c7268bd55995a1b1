"""What several test files share."""

import sys
from pathlib import Path

import pytest

from logsnr.cli import main


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
