"""Damaged files: every kind that the library writes and reads again, 300 mutations of each, through the commands."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import logsnr as ls
from faults import Fault
from faults.calls import call, complaint, inside
from faults.damage import Mutation, of_json, of_yaml

MANY = 300
RECIPE = """
data: {source: digits, holdout: 0.5}
network: {channels: [8], layers_per_block: 1, mid_attention: false, norm_groups: 4}
objective: {weighting: {name: sigmoid, bias: 1.0}, schedule: cosine, logsnr: [-8, 8]}
optimizer: {lr: 1.0e-3, warmup: 2}
samples: {every: 0}
steps: 2
batch: 4
device: cpu
"""
BOUNDED = ("--set", "steps=3", "--set", "max_seconds=5", "--set", "batch=4", "--set", "samples.every=0")
"""Whatever a mutation says, a training that starts ends."""


CALIBRATION = ("--nfe", 2, "-n", 8, "--rollouts", 40)


@dataclass(frozen=True)
class Damaged:
    """A kind of file: where it lies in the scene, how it is damaged, and a command that reads it."""

    file: str
    mutate: Mutation
    words: tuple[object, ...]


FILES = {
    "plan": Damaged("plan.json", of_json, ("sample", "run", "--plan", "plan.json", "-n", 1, "--out", "x.npy")),
    "plans": Damaged("run/plans.json", of_json, ("sample", "run", "--nfe", 3, "-n", 1, "--out", "x.npy")),
    "recipe": Damaged("recipe.yaml", of_yaml, ("train", "recipe.yaml", "--out", "new", *BOUNDED)),
    "card": Damaged("run/card.json", of_json, ("sample", "run", "--nfe", 2, "-n", 1, "--out", "x.npy")),
    "state": Damaged(
        "run/state/state.json", of_json, ("train", "recipe.yaml", "--out", "run", "--resume", "--set", "steps=3")
    ),
    "ledger": Damaged("ledger.json", of_json, ("calibrate", "run", *CALIBRATION, "--resume", "ledger.json")),
}


def scene(folder: Path) -> None:
    """A recipe, a run with plans, a plan and a ledger; made in a second or two."""
    with inside(folder):
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        calls = [
            ("train", "recipe.yaml", "--out", "run"),
            ("calibrate", "run", *CALIBRATION, "--resume", "ledger.json"),
        ]
        assert not [ended for words in calls if (ended := call(*words, seconds=600)).code]
        plans = {str(n): ls.solvers.unipc(ls.grids.karras(n, 20.0, 0.02)).to_dict() for n in (2, 3)}
        Path("run/plans.json").write_text(json.dumps(plans), encoding="utf-8")
        ls.solvers.ddpm(ls.grids.karras(3, 20.0, 0.02)).save("plan.json")


def damaged(folder: Path, kind: str, many: int = MANY, seed: int = 0) -> Iterator[Fault]:
    """Mutations of one kind of file."""
    it, chance, whole, now = FILES[kind], random.Random(f"{kind} {seed}"), folder / "whole", folder / "now"
    if not whole.exists():
        scene(whole)
    data = (whole / it.file).read_bytes()
    for i in range(many):
        shutil.copytree(whole, now)
        (now / it.file).write_bytes(it.mutate(data, chance))
        with inside(now):
            _, trouble = complaint(*it.words)
        yield f"{it.file}, mutation {i}", trouble
        shutil.rmtree(now)


plan, plans, recipe, card, state, ledger = (partial(damaged, kind=kind) for kind in FILES)
