"""What several test files share."""

import sys

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
