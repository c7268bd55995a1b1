"""Running what pages print: Python, commands of a shell and recipes, in a folder with what a page takes for granted."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import ROOT, Block

from logsnr.cli import main
from logsnr.training.config import recipe_from

TINY = [
    "--set=steps=2",
    "--set=network.channels=[4]",
    "--set=network.mid_attention=false",
    "--set=network.norm_groups=2",
    "--set=samples.every=0",
]
SMALLER = {
    "train": shlex.join(TINY),
    "sample": "-n 4",
    "generate": "-n 8 --chunk 4 --shard 4",
    "passport": "--trajectories=2 --images=32",
    "compare": "--number=4 --teacher-steps=16 --solvers=ge,DDIM",
    "calibrate": "--rollouts=40 --number=8",
}
"""Options that make a command quick: of an option given twice the last counts, all else of a line runs as printed."""
NOT_RUN = "Not run in tests: "
"""How the title of a block begins that is left out; the reason follows, for whoever reads the page."""
SHELL = ("cd", "git", "source", "open")
"""Programs of a shell that a page may name and that nothing here stands for."""


def command(line: str) -> None:
    """Run one shell line as `logsnr` would, in this process."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "logsnr", line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code, line


def shell(block: Block, smaller: Mapping[str, str] = SMALLER) -> None:
    """Run the lines of a block: ours in this process, of others what they name has to be there."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if not words or words[0] in SHELL:
            continue
        if words[0] == "torchrun":  # the same command, in one process
            at = next(i for i, word in enumerate(words) if word in ("logsnr", "logsnr.cli"))
            words = ["logsnr", *words[at + 1 :]]
        if words[0] == "logsnr":
            command(f"{shlex.join(words)} {smaller.get(words[1], '')}")
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        elif words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            named = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", line)))
            assert set(named) <= set(extras["optional-dependencies"]), line
        elif words[0] in ("python", "accelerate"):
            script = next(word for word in words if word.endswith(".py"))
            text = (ROOT / script).read_text(encoding="utf-8")
            for flag in (re.split("[= ]", word)[0] for word in words if word.startswith("--")):
                assert re.search(rf"{flag}(?![\w-])", text), line
        else:
            raise AssertionError(f"nothing is known of {words[0]!r}: {line}")


def recipe(block: Block) -> None:
    """A recipe, or sections of one on top of the default recipe."""
    values = yaml.safe_load(block.text)
    assert isinstance(values, Mapping)
    recipe_from({"data": {"source": "digits"}, "steps": 1, **values})


def appears(expected: str, told: str) -> None:
    """Every line of an output is in what was told; `...` stands for times and last digits."""
    flat = " ".join(told.split())
    for line in expected.splitlines():
        pattern = " ?.*? ?".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        assert re.search(pattern, flat), f"{line!r} is not in {flat!r}"


def run(page: Path, block: Block, names: dict[str, Any], smaller: Mapping[str, str] = SMALLER) -> None:
    """Run a block as it is printed, Python with the names that the blocks before it left."""
    if block.title.startswith(NOT_RUN):
        return
    if block.kind in ("yaml", "json") and block.title:  # a file, of that name
        Path(block.title).write_text(block.text, encoding="utf-8")
    if block.kind == "python":
        exec(compile(block.text, f"{page.name}, line {block.line}", "exec"), names)
    elif block.kind == "sh":
        shell(block, smaller)
    elif block.kind == "yaml":
        recipe(block)
    elif block.kind == "json":
        json.loads(block.text)
    else:
        assert block.kind in ("text", "diff"), f"{page.name}, line {block.line}: a block of what?"
