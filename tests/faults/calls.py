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

SECONDS = 60
"""Processor time: a call that takes longer hangs; how busy the machine is does not matter."""
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
        """What a user would complain of: a hang, a traceback, an error of several lines, a strange exit code."""
        if self.code == -1:
            return f"hangs ({self.err})"
        if "Traceback" in self.err or "not foreseen" in self.err:
            return f"not foreseen: {self.err.strip().splitlines()[-1][:300]}"
        if self.code == 0:
            return ""
        *_, last = self.err.splitlines() or [""]  # notes may stand before
        if self.code != 2 or not last.startswith("logsnr: error: ") or self.err.count("logsnr: error") != 1:
            return f"exit code {self.code}, {self.err[:300]!r}"
        return "" if len(last) < 2100 and last.isprintable() else f"{len(last)} characters: {last[:300]!r}"


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


def complaint(*words: object) -> tuple[Ended, str]:
    """Run `logsnr`; how it ended, and its trouble, with where it arose."""
    ended = call(*words)
    if "not foreseen" not in ended.trouble:
        return ended, ended.trouble
    told = call("--debug", *words).err.splitlines()
    frames = [line.strip() for line in told if line.lstrip().startswith("File ")]
    return ended, f"{ended.trouble}; {'; '.join(frames[-3:])}"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End what takes longer, and what wants more memory."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
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
