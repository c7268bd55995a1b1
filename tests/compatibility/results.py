"""Verdicts kept as JSON, one file per release of diffusers: the page shows several, a machine has one installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from compatibility.judge import Verdict

FOLDER = Path(__file__).parent / "results"
Verdicts = dict[str, Verdict | str]


def keep(verdicts: Verdicts) -> None:
    """Write the verdicts of the diffusers that is installed."""
    FOLDER.mkdir(exist_ok=True)
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["pipelines"] = {name: one if isinstance(one, str) else asdict(one) for name, one in verdicts.items()}
    (FOLDER / f"{diffusers.__version__}.json").write_text(json.dumps(found, indent=1) + "\n")


def kept() -> dict[str, tuple[dict[str, str], Verdicts]]:
    """By release, the newest first: what else was installed, and the verdicts."""
    out = {}
    for version in sorted((path.stem for path in FOLDER.glob("*.json")), key=_numbers, reverse=True):
        found = json.loads((FOLDER / f"{version}.json").read_text())
        pipelines = found.pop("pipelines")
        out[version] = found, {n: one if isinstance(one, str) else Verdict(**one) for n, one in pipelines.items()}
    return out


def newest() -> bool:
    """Whether the diffusers that is installed is the newest of those whose verdicts are kept."""
    return next(iter(kept())) == diffusers.__version__


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]
