"""The terminal: what people read is printed as it stands.

Names that users gave are no markup, and where no terminal limits a table it is as wide as its columns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn

WIDE = 1000
"""Columns of a pipe or a file; the environment's COLUMNS overrides."""


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where text and tables are printed."""
    from rich.console import Console

    found = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)
    if not (found.is_terminal or found.is_jupyter or os.environ.get("COLUMNS", "").isdigit()):
        found.width = WIDE
    return found


def note(text: str) -> None:
    """Say on stderr, in one line, what nobody asked for and somebody should know."""
    console(stderr=True).print(f"note: {text}", soft_wrap=True)


def _word(text: str) -> TextColumn:
    from rich.progress import TextColumn

    return TextColumn(text, markup=False)


def description() -> TextColumn:
    """The column of a bar that holds the description of its task."""
    return _word("{task.description}")


@contextmanager
def progress_bar(wanted: bool, what: str = "training") -> Iterator[Callable[[float, str], None] | None]:
    """A progress bar that is gone when its work ends; None where no terminal shows it."""
    shown = console(stderr=True)
    if not wanted or not shown.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (_word(what), BarColumn(), description(), TimeElapsedColumn(), _word("elapsed,"))
    # Drawn from the loop five times a second: a drawing thread would compete with the steps for the interpreter.
    left = (TimeRemainingColumn(), _word("left"))
    with Progress(*columns, *left, console=shown, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)
        drawn = 0.0

        def show(fraction: float, text: str) -> None:
            nonlocal drawn
            now = time.perf_counter()
            if now - drawn > 0.2:
                bar.update(task, completed=min(fraction, 1.0), description=text, refresh=True)
                drawn = now

        yield show


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
