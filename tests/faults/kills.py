"""Kills: of a training, at a random moment."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from faults import Fault
from faults.processes import command

TINY = {
    "network.channels": "[8]",
    "network.layers_per_block": "1",
    "network.mid_attention": "false",
    "network.norm_groups": "4",
    "max_seconds": "null",
    "optimizer.decay": "constant",
    "samples.every": "0",
    "batch": "8",
    "device": "cpu",
}
"""A training of seconds."""


def training(out: Path, *more: str, **options: object) -> list[str]:
    values = {**TINY, **{name: str(value) for name, value in options.items()}}
    return ["train", "digits", "--out", str(out), *(f"--set={k}={v}" for k, v in values.items()), *more]


def weights(folder: Path) -> str:
    """The hash of a run's weights, by its card."""
    return str(json.loads((folder / "card.json").read_text())["weights"]["sha256"])


def random_trainings(folder: Path) -> Iterator[Fault]:
    """A run killed at random moments, resumed until it ends, again and again."""
    options = {"steps": 20, "checkpoint_every": 1, "log_every": 10}
    whole = folder / "whole"
    began = time.perf_counter()
    assert command(training(whole, **options)).wait() == 0
    seconds, expected = time.perf_counter() - began, weights(whole)
    chance, kills, run = random.Random(0), 0, 0
    while kills < 30:
        out, run = folder / f"run-{run}", run + 1
        moments: list[float] = []
        while True:
            more = ["--resume"] if (out / "state" / "state.json").exists() else []
            moments.append(chance.uniform(0.2, 1.0) * seconds)
            process = command(training(out, *more, **options), folder / "log")
            if process.wait(moments[-1]) is not None:
                break
            process.kill()
            process.wait()
        kills += len(moments) - 1
        trouble = "" if weights(out) == expected else "other weights than the uninterrupted run's"
        for moment in moments[:-1]:
            yield f"run {run}, killed after {moment:.2f} s", trouble
            trouble = ""
