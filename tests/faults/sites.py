"""Kill sites: every call that changes the disk, before it and after it."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.processes import Forked

CALLS = (
    (builtins, "open"),
    (os, "open"),
    (os, "mkdir"),
    (os, "truncate"),
    (os, "fsync"),
    (os, "replace"),
    (os, "link"),
    (os, "rename"),
    (os, "unlink"),
)


@contextmanager
def watched(folder: Path, see: Callable[[str], None]) -> Iterator[None]:
    """Call `see` before and after every such call that concerns a folder (of a handle, all)."""

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            concerned = isinstance(args[0], int) or str(args[0]).startswith(str(folder))
            if concerned:
                see(f"before {name}")
            answer = call(*args, **kwargs)
            if concerned:
                see(f"after {name}")
            return answer

        return wrapped

    kept = [(module, name, getattr(module, name)) for module, name in CALLS]
    try:
        for module, name, call in kept:
            setattr(module, name, around(f"{module.__name__}.{name}", call))
        yield
    finally:
        for module, name, call in kept:
            setattr(module, name, call)


def killed_at(work: Callable[[], object], folder: Path, site: int, log: Path | None = None) -> str:
    """Do the work in a fork that kills itself at a site, counted from 0; which one it was, "" if it ended before."""
    reader, writer = os.pipe()

    def child() -> None:
        left = [site]

        def see(name: str) -> None:
            if left[0] == 0:
                os.write(writer, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        with watched(folder, see):
            work()

    process = Forked(child, log)
    os.close(writer)
    code = process.wait()
    with os.fdopen(reader, "rb") as told:
        name = told.read().decode()
    if code is None:
        process.kill()
        raise AssertionError(f"site {site} hangs")
    assert code == (-signal.SIGKILL if name else 0), f"site {site} ({name}) ended with {code}"
    return name
