"""Interruptions: work that Ctrl-C or SIGTERM ends in order.

A search or a comparison can stop anywhere: the signal raises `Interrupted`, and what was measured is handed on.  A
training stops between steps: inside `put_off` the signal waits until the loop asks.  A second Ctrl-C is not put off.
Handlers that somebody else has installed stay.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work was asked to end and did; the message says what was kept and how to go on.

    Args:
        message: for people.
        signum: the signal that asked.
    """

    def __init__(self, message: str = "", *, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


def signal_of(stop: KeyboardInterrupt) -> int:
    """The signal behind an interruption."""
    return stop.signum if isinstance(stop, Interrupted) else signal.SIGINT


_last: list[int] = []


def last_signal() -> int:
    """The signal that came last, for whoever was handed a result instead of an exception."""
    return _last[-1] if _last else signal.SIGINT


class Asked:
    """Whether an end was asked for: `signum`, None so far."""

    signum: int | None = None


@contextmanager
def put_off() -> Iterator[Asked]:
    """Let signals wait inside: whoever works looks at `signum` when it suits."""
    asked = Asked()

    def later(signum: int, frame: FrameType | None) -> None:
        _last[:] = [signum]
        if asked.signum is not None and signum == signal.SIGINT:
            raise Interrupted("interrupted twice: what was not saved is lost", signum=signum)
        asked.signum = asked.signum or signum

    with _handled(later):
        yield asked


@contextmanager
def raised() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise `Interrupted` inside."""

    def at_once(signum: int, frame: FrameType | None) -> None:
        _last[:] = [signum]
        raise Interrupted(signum=signum)

    with _handled(at_once):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    before: dict[int, Any] = {}
    vars(handler)["logsnr"] = True
    for signum in SIGNALS:
        old = signal.getsignal(signum)
        if old in (signal.SIG_DFL, signal.default_int_handler) or hasattr(old, "logsnr"):
            before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
