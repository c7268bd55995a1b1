"""Write docs/reference/api and docs/reference/cli.md from the library: every public name, every command.

python tools/reference.py

The pages of the API hold paths alone; the site's build reads signatures and docstrings from the sources.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from logsnr.cli import app

OUT = Path(__file__).parents[1] / "docs" / "reference"
PAGES = {
    "models": (
        "Models and their coordinate",
        [
            "load",
            "load_plans",
            "Denoiser",
            "NetworkDenoiser",
            "Estimate",
            "Pixels",
            "TimestepTable",
            "LogsnrError",
            "allow_code",
        ],
        ["predictions", "exact", "guidance"],
    ),
    "sampling": (
        "Sampling and plans",
        [
            *["sample", "plan_for", "universal_plan", "calibrate", "Plan", "trajectory", "Trajectory", "Step"],
            *[
                "evaluations",
                "heun",
                "Churn",
                "solve",
                "invert",
                "reconstruct",
                "interpolate",
                "GaussianStart",
                "probe",
            ],
            *["Probe", "generate", "Generated", "Shards", "NonFiniteError", "published"],
        ],
        ["solvers", "grids"],
    ),
    "training": (
        "Objectives and training",
        ["WeightedELBO", "ObjectiveOutput", "objectives", "Uncertainty", "LoopObjective"],
        ["weightings", "schedules", "training"],
    ),
    "measuring": (
        "Measuring",
        ["bits_per_dim", "Likelihood", "ode_bits_per_dim", "ode_log_likelihood", "augmented_elbo"],
        ["evaluation", "evaluation.compare", "evaluation.passport", "describe", "plot", "projection", "theory"],
    ),
    "adapters": ("Adapters", [], ["adapters"]),
}
"""Pages: title, names of `logsnr`, and rooms whose public names follow."""


def public(module: ModuleType) -> list[str]:
    """The public names of a room: its `__all__`, else what is defined there without an underscore."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")]


def documented(room: str, names: list[str]) -> list[str]:
    """An entry for each public name that is a class or a function: where it is defined, under its public name."""
    module = importlib.import_module(room)
    out = []
    for name in names:
        value = getattr(module, name)
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__.startswith("logsnr."):
            label = f"{room}.{name}"
            options = f"    options:\n      heading: {label}\n      toc_label: {name}"
            out.append(f"::: {value.__module__}.{value.__qualname__}\n{options}\n")
    return out


def api_pages() -> dict[str, str]:
    """File name -> text."""
    pages = {}
    for stem, (title, names, rooms) in PAGES.items():
        lines = [f"# {title}", ""]
        if names:
            lines += ["## `logsnr`", ""]
            lines += documented("logsnr", names)
        for room in rooms:
            module = importlib.import_module(f"logsnr.{room}")
            told = (module.__doc__ or "").strip().splitlines()[0]
            lines += [f"## `logsnr.{room}`", "", told, ""]
            lines += documented(f"logsnr.{room}", public(module))
        pages[f"api-{stem}.md"] = "\n".join(lines).rstrip() + "\n"
    return pages


def commands(group: Any, before: str) -> list[tuple[str, Any]]:
    """(words, command) of a group and of the groups in it."""
    out = []
    for name in group.list_commands(None):
        command = group.commands[name]
        words = f"{before} {name}"
        out += commands(command, words) if hasattr(command, "commands") else [(words, command)]
    return out


def cli_page() -> str:
    """Every command's help, as a terminal of 100 columns prints it."""
    main = typer.main.get_command(app)
    parts = ["# The command line", "", "What `--help` prints, written by `python tools/reference.py`.", ""]
    for words, command in [("logsnr", main), *commands(main, "logsnr")]:
        context = type(command).context_class(command, info_name=words, terminal_width=100, max_content_width=100)
        text = re.sub(r"[ \t]+$", "", command.get_help(context), flags=re.M)
        parts += [f"## {words}", "", "```text", text.strip("\n"), "```", ""]
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """All pages, by file name."""
    return {**api_pages(), "cli.md": cli_page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (OUT / name).write_text(text, encoding="utf-8")
