"""The command line in processes of its own: forks of this one, which has imported everything, so that each takes
milliseconds to start."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


class Forked:
    """A function, running in a fork of this process.

    Args:
        work: what to do; its SystemExit is the exit code, another exception a traceback and code 1.
        log: where stdout and stderr go.
    """

    def __init__(self, work: Callable[[], object], log: Path | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _child(work, log)

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def poll(self) -> int | None:
        """Exit code, minus the signal that ended it, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, seconds: float = 300.0) -> int | None:
        """The exit code; None if it is still running after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return self._status


def command(arguments: Sequence[object], log: Path | None = None) -> Forked:
    """`logsnr ARGUMENTS`."""
    from logsnr import cli

    def work() -> None:
        sys.argv = ["logsnr", *map(str, arguments)]
        cli.main()

    return Forked(work, log)


def _child(work: Callable[[], object], log: Path | None) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Import what commands need, once."""
    import accelerate  # noqa: F401
    import diffusers.models.unets.unet_2d  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import logsnr.cli.support
    import logsnr.training  # noqa: F401

    torch.set_num_threads(1)
