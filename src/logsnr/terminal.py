"""The terminal: what people read is printed as it stands.

Names that users gave are no markup, and where no terminal limits a table it is as wide as its columns.
"""

from __future__ import annotations

import os
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


def description() -> TextColumn:
    """The column of a bar that holds the description of its task."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)
