"""Odd images and folders, and arrays of doubtful layout: the right value, or a refusal in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from odd_images import CASES, judged

from faults import Fault


def read(folder: Path) -> Iterator[Fault]:
    """Every case of odd_images.py, each in a folder of its own."""
    for i, case in enumerate(CASES):
        (folder / str(i)).mkdir()
        outcome = judged(case, folder / str(i))
        yield case.name, "" if outcome in ("right", "refused") else outcome
