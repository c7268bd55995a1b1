"""Wrong command lines: every option of every command with values that nobody means, alone and in pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer

from faults import Fault
from faults.calls import complaint, inside
from faults.mutations import scene
from logsnr.cli import app
from logsnr.training.config import Recipe

VALUES = [
    "", " ", "x", "-1", "0", "1", "1e400", "9" * 20, "nan", "inf", "-inf", "1,2", "2,1", "0x10", "None", "[bold]x[/]",
    "[/]", "$\\frac{", "\x1b[31m", "\udcff", "é", "a" * 300, "a" * 5000, ".", "text", "text/x", "broken.json",
    "broken.npz", "empty", "missing.json", "missing.npz", "/proc/none/x", "plan.json", "run", "recipe.yaml", "true",
    "-", "1e-320", "three",
]  # fmt: skip
"""Numbers out of range, texts that are none, names of files of another kind.  No place outside of the folder that a
command could write to."""
BASE: dict[str, tuple[str, ...]] = {
    "train": ("recipe.yaml", "--out", "new"),
    "sample": ("run", "--nfe", "2", "-n", "2", "--out", "x.npy"),
    "generate": ("run", "--nfe", "2", "-n", "4", "--chunk", "2", "--shard", "4", "--out", "shards"),
    "calibrate": ("run", "--nfe", "2", "-n", "8", "--method", "gits"),
    "evaluate": ("run", "--evaluations", "8", "--limit", "8"),
    "stats": ("digits", "--features", "pixels", "--out", "stats.npz"),
    "export": ("run", "--out", "pipeline"),
    "objective": ("edm",),
    "compare": ("run", "--nfe", "2", "-n", "8", "--teacher-steps", "16", "--no-peers", "--features", "none"),
    "passport": ("run", "--images", "8", "--trajectories", "4", "--data", "none", "--out", "page.html"),
    "probe": ("run",),
}
"""A line of each command that is right and quick."""
MODELS = (
    "",
    "nowhere",
    ".",
    "zoo:",
    "zoo:digit",
    "zoo:../digits",
    "run/card.json",
    "owner/name",
    "text",
    "empty",
    "a" * 5000,
)
DEMO = (
    ("--seed", "x"),
    ("--max-seconds", "soon"),
    ("--max-seconds", "nan"),
    ("--max-seconds", "-1"),
    ("--out", "text"),
    ("x",),
)


def lines(chance: random.Random) -> Iterator[tuple[str, ...]]:
    """Command lines, most of them wrong."""
    yield from (
        ("x",),
        ("sampel", "run"),
        ("--nope",),
        ("--version", "x"),
        ("--quiet",),
        ("-h",),
        ("train", "--", "--out"),
    )
    yield from (("demo", *words) for words in DEMO)
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, base in BASE.items():
        options = [p.opts[-1] for p in commands[name].params if p.opts[0].startswith("-") and not p.is_flag]
        flags = [p.opts[0] for p in commands[name].params if p.opts[0].startswith("-") and p.is_flag]
        yield (name,)
        yield (name, *base, "--nope")
        yield (name, *base, "--json=1")
        yield (name, *base, "x", "y")
        for model in MODELS if base[0] == "run" else ():
            yield (name, model, *base[1:])
        for option in options:
            yield (name, *base, option)
            for value in chance.sample(VALUES, 6):
                yield (name, *base, option, value)
        for _ in range(12):
            one, other = chance.choice(options), chance.choice(options)
            more = chance.sample(flags, min(len(flags), chance.randrange(2)))
            yield (name, *base, one, chance.choice(VALUES), other, chance.choice(VALUES), *more)
    for key in _keys(Recipe.model_validate({"steps": 1}).model_dump()):
        yield ("train", *BASE["train"], "--set", key)
        for value in chance.sample([*VALUES, "[]", "{}", "null", "[1, 2]", "{name: x}", "[[", "*a", "!!int x"], 3):
            yield ("train", *BASE["train"], "--set", "steps=1", "--set", f"{key}={value}")


def _keys(values: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield before + key
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{key}.")


def stage(folder: Path) -> None:
    """What the lines name: a run, a plan and a recipe; files of other kinds, damaged ones, none."""
    scene(folder)
    (folder / "text").write_text("a secret", encoding="utf-8")
    (folder / "broken.json").write_text('{"sigmas": [', encoding="utf-8")
    np.savez(folder / "broken.npz", images=np.zeros((8, 8, 8), np.uint8))
    data = (folder / "broken.npz").read_bytes()
    (folder / "broken.npz").write_bytes(data[: len(data) // 2])
    (folder / "empty").mkdir()


def wrong_lines(folder: Path, many: int | None = None, seed: int = 0) -> Iterator[Fault]:
    """Lines, run one after the other; those that are right count for nothing."""
    chance = random.Random(seed)
    here = folder / "a" / "b"
    stage_at = here if not here.exists() else None
    if stage_at:
        here.mkdir(parents=True)
        stage(here)
    chosen = list(lines(chance))
    with inside(here):
        for words in chosen if many is None else chance.sample(chosen, many):
            ended, trouble = complaint(*words)
            if not trouble and "a secret" in ended.out + ended.err:
                trouble = "quotes a file's contents"
            if trouble or ended.code != 0:
                yield " ".join(repr(w)[:60] for w in words), trouble
