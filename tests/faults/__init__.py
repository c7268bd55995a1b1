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
    "kill-sites": Kind(
        what="SIGKILL before and after every call that changes the folder of a `train`, then `--resume`",
        kept="every card that exists loads as the weights of its step; the end is the uninterrupted run's, bit for bit",
        function="kills:training_sites",
        least=100,
    ),
    "random-kills": Kind(
        what="SIGKILL at a random moment of `train`, then `--resume`",
        kept="the weights of the uninterrupted run, bit for bit",
        function="kills:random_trainings",
        least=30,
    ),
    "random-kills-sharded": Kind(
        what="SIGKILL at a random moment of one of two processes of `train` with sharded checkpoints, then `--resume`",
        kept="the other ends within 60 s with one line that says so; the weights of the uninterrupted run, bit for bit",
        function="ranks:random_sharded",
        least=50,
    ),
    "random-kills-calibrate": Kind(
        what="SIGKILL at a random moment of `calibrate --resume FILE`, then the same again",
        kept="the plan of the uninterrupted search, bit for bit",
        function="kills:random_calibrations",
        least=30,
    ),
    "random-kills-sample": Kind(
        what="SIGKILL at a random moment of a loop of `sample`, one file each, then on at the first missing one",
        kept="every file whole, the images of the undisturbed loop",
        function="kills:random_samplings",
        least=30,
    ),
    "random-kills-generate": Kind(
        what="SIGKILL at a random moment of one of two processes of `generate`, then the same again",
        kept="every shard whole; in the end the files of one undisturbed process, bit for bit",
        function="kills:random_generations",
        least=30,
    ),
    "interruptions": Kind(
        what="Ctrl-C or SIGTERM at a random moment of `train`, `calibrate`, `compare` and `passport`",
        kept="exit code 130 or 143, one line that says what was kept; trainings and searches go on to the same end",
        function="stops:interruptions",
        least=30,
    ),
    "interruptions-generate": Kind(
        what="Ctrl-C or SIGTERM at a random moment of `generate`, then the same again",
        kept="exit code 130 or 143, one line that says how to go on; in the end the undisturbed files, bit for bit",
        function="stops:generations",
        least=8,
    ),
    "full-disk": Kind(
        what="the disk is full, or refuses, at the n-th file of `train`, `calibrate`, `sample`, `generate`, `compare`, "
        "`passport`",
        kept="one line that names the file, exit code 2, what was there before intact; with space, on to the same end",
        function="disks:refusing",
        least=15,
    ),
    "two-in-a-folder": Kind(
        what="two `train`, two `calibrate --resume` of one file, or a `train` over somebody's model, at one time",
        kept="one of them is refused in one line that names the other; nothing of the first is lost",
        function="disks:together",
        least=20,
    ),
    "damaged-plan": Kind(
        what="a plan, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:plan",
        least=300,
    ),
    "damaged-plans": Kind(
        what="a run's plans, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:plans",
        least=300,
    ),
    "damaged-recipe": Kind(
        what="a recipe, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:recipe",
        least=300,
    ),
    "damaged-card": Kind(
        what="a card, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:card",
        least=300,
    ),
    "damaged-state": Kind(
        what="a state, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:state",
        least=300,
    ),
    "damaged-ledger": Kind(
        what="a ledger, damaged at random: bytes or values",
        kept="read whole, or refused in one line; no traceback, no hang",
        function="mutations:ledger",
        least=300,
    ),
    "wrong-lines": Kind(
        what="a wrong command line: options with values that nobody means, alone and in pairs",
        kept="one line that says what is wrong, exit code 2",
        function="lines:wrong_lines",
        least=300,
    ),
    "lies": Kind(
        what="archives, headers and links that lie: .npy, .npz, safetensors, YAML, JSON, PNG",
        kept="refused in one line; no code run, nothing quoted, memory and time bounded",
        function="lies:all_lies",
        least=300,
    ),
    "odd-images": Kind(
        what="odd images, folders and arrays",
        kept="read as a person sees them and said so, or refused in one line",
        function="images:read",
        least=60,
    ),
}
