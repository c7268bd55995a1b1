"""Blocks of code in pages of Markdown, as they are printed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<pad>[ ]*)```(?P<kind>[\w-]*)[ ]*(?P<more>[^\n`]*)\n(?P<text>.*?)^(?P=pad)```[ ]*$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands in its title, its text and the line that it begins at."""

    kind: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["kind"],
            "".join(re.findall(r'title="([^"]*)"', found["more"])),
            dedent(found["text"]),
            text.count("\n", 0, found.start()) + 1,
        )
        for found in FENCE.finditer(text)
    ]


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind == "python"]
