"""Progress: a bar of sampling steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def step_bar(total: int) -> Iterator[Callable[[Any], None]]:
    """A bar of `total` evaluations on stderr, as a callback of `sample`; silent where nobody looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task("sampling", total=total)

        def tell(step: Any) -> None:
            if step.estimate is not None:
                bar.advance(task)

        yield tell
