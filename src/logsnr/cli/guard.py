"""How a command ends: the one place where exceptions meet the user.

Whatever a command raises becomes one line on stderr and exit code 2; `--debug` shows the traceback before it.  After
Ctrl-C and SIGTERM the line says what was kept, and the code is 128 and the signal: 130 and 143.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from logsnr.errors import one_line
from logsnr.interrupts import signal_of

BAD_INPUT = 2
"""Exit code of everything that a user can mend."""
_MEMORY = re.compile(r"allocate|out of memory|size calculation overflowed", re.IGNORECASE)
_AMOUNT = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGTPE]iB))")


class Stopped(Exception):  # noqa: N818
    """An interruption on its way out: command lines end at a KeyboardInterrupt by themselves, and say nothing."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__(str(stop) or "interrupted")
        self.code = 128 + signal_of(stop)


def guarded(command: Callable[[], object], *, debug: bool = False, quiet: bool = False) -> int:
    """Run a command; its exit code.  Warnings are notes of a line each, none if `quiet`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding lacks ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _unsaid if quiet else _noted
            code = command()
        sys.stdout.flush()
    except Stopped as stop:
        print(f"logsnr: {stop}", file=sys.stderr)
        return stop.code
    except Exception as error:
        if debug:
            traceback.print_exc()
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the whole help
            print(error, file=sys.stderr)
        else:
            print(f"logsnr: error: {one_line(told(error))}", file=sys.stderr)
        return BAD_INPUT
    return code if isinstance(code, int) else 0


def _noted(message: Warning | str, *rest: object, **more: object) -> None:
    print(f"logsnr: note: {one_line(str(message))}", file=sys.stderr)


def _unsaid(*rest: object, **more: object) -> None:
    pass


def told(error: Exception) -> str:
    """What happened and what to do, in one line."""
    text = one_line(error)
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        asked = _AMOUNT.search(text)
        much = f" (asked for {asked[1]} at once)" if asked else ""
        return f"out of memory{much}: take fewer at a time (--number, --chunk, batch), or a smaller model"
    if hasattr(error, "format_message"):  # of the command line itself
        context = getattr(error, "ctx", None)
        path = getattr(context, "command_path", None) or "logsnr"
        said = " ".join(str(error.format_message()).split()).rstrip(".")
        return f"{said}; see {path} --help"
    if isinstance(error, ValueError) or type(error).__module__.startswith("logsnr."):
        return text
    return f"{type(error).__name__}: {text}; this was not foreseen: --debug shows where, please report it"


def _of_system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        place = f" for {error.filename}" if error.filename else ", or stdout is full"
        return f"no space left on the device{place}: free some, or write to another folder"
    return f"{where}{error.strerror or one_line(error)}"
