"""The command line in this process: thousands of calls, each with a limit of time and of memory."""

from __future__ import annotations

import io
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from logsnr.cli import main

SECONDS = 30
"""A call that takes longer hangs."""
MEMORY = 24 * 2**30
"""Bytes of addresses that a call may have: more is refused to it, as a small machine would."""


class Hang(BaseException):
    """A call took too long."""


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    code: int
    out: str
    err: str

    @property
    def trouble(self) -> str:
        """What a user would complain of: a hang, a traceback, more than one line, an exit code of neither kind."""
        if self.code == -1:
            return f"hangs ({self.err})"
        if "Traceback" in self.err or "not foreseen" in self.err:
            return f"not foreseen: {self.err.strip().splitlines()[-1][:300]}"
        if self.code == 0:
            return ""
        if self.code != 2 or not self.err.startswith("logsnr: error: ") or self.err.count("\n") != 1:
            return f"exit code {self.code}, {self.err[:300]!r}"
        return "" if len(self.err) < 2100 and self.err.strip().isprintable() else f"{len(self.err)} characters"


def call(*words: object, seconds: float = SECONDS) -> Ended:
    """Run `logsnr` with these words."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["logsnr", *map(str, words)]
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err), limited(seconds):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    except Hang:
        return Ended(-1, out.getvalue(), f"more than {seconds:g} s")
    except BaseException as error:
        return Ended(1, out.getvalue(), f"Traceback: {type(error).__name__}: {error}")
    finally:
        sys.argv = before
    return Ended(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End what takes longer, and what wants more memory."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
