"""Faults provoked on purpose, and what became of each: `make faults` (minutes; no part of `make test`).

A kind of fault is a generator function: it provokes fault after fault inside a folder of its own and yields of each
what was done and what was lost, kept silent or shown as a traceback ("" if nothing was).  `KINDS` is the list that
`python -m faults` runs, from which the table in docs/reliability.md is written; a new kind is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

Fault = tuple[str, str]
"""(what was provoked, what went wrong: "" if nothing was lost and nothing was silent)."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A row of the table.

    Args:
        what: the fault, in the table's words.
        kept: what must hold afterwards, in the table's words.
        function: "module:function" below this package; (folder) -> faults.
        least: how many have to be provoked for the row to count.
    """

    what: str
    kept: str
    function: str
    least: int = 1

    def provoke(self, folder: Path) -> Iterator[Fault]:
        module, name = self.function.split(":")
        function: Callable[[Path], Iterator[Fault]] = getattr(import_module(f"faults.{module}"), name)
        return function(folder)


KINDS: dict[str, Kind] = {
    "random-kills": Kind(
        what="SIGKILL at a random moment of `train`, then `--resume`",
        kept="the weights of the uninterrupted run, bit for bit",
        function="kills:random_trainings",
        least=30,
    ),
}
