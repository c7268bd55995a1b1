"""Trackers: lines of metrics sent to TensorBoard, Weights & Biases or Trackio too, through accelerate.

A tracker that fails is left out from there on: it never ends a training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logsnr.errors import LogsnrError, one_line, require
from logsnr.training.config import Recipe
from logsnr.training.processes import note

PROJECT = "logsnr"
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""What each tracker's package is imported as."""


class Tracker:
    """The tracker of a training; does nothing where the recipe names none.

    Args:
        accelerator: made with `options(recipe, out)`.
        recipe: what is trained: sent along.
        out: folder of the run, whose name the tracked run takes.
    """

    def __init__(self, accelerator: Any, recipe: Recipe, out: Path) -> None:
        self.accelerator, self.name = accelerator, recipe.log_with
        if self.name is not None:
            how = {"wandb": {"wandb": {"name": out.name, "dir": str(out)}}, "trackio": {"trackio": {"name": out.name}}}
            config = flat(recipe.model_dump(mode="json"))
            self._try(
                lambda: accelerator.init_trackers(PROJECT, config=config, init_kwargs=how.get(str(self.name), {}))
            )

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics."""
        values = {key: value for key, value in line.items() if value is not None and key != "step"}
        self._try(lambda: self.accelerator.log(values, step=line["step"]))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *raised: object) -> None:
        """Let it finish what it has not sent."""
        self._try(lambda: [each.finish() for each in self.accelerator.trackers])

    def _try(self, work: Any) -> None:
        if self.name is None:
            return
        try:
            work()
        except Exception as error:  # whatever a service or its package answers
            note(f"{self.name} failed ({one_line(error)}): the training goes on without it")
            self.name = None


def options(recipe: Recipe, out: Path | None) -> dict[str, Any]:
    """What an Accelerator is told of the tracker.

    Raises:
        LogsnrError: if its package is missing, or accelerate too old to know it.
    """
    name = recipe.log_with
    if name is None or out is None:
        return {}
    try:
        require(MODULES[name], extra="train", purpose=f"log_with: {name}")
    except (ImportError, LogsnrError) as error:
        raise LogsnrError(f"log_with: {name} needs the package {name}: pip install {name}") from error
    from accelerate.utils import LoggerType

    if name not in LoggerType.list():
        raise LogsnrError(f"log_with: {name} is unknown to this version of accelerate: pip install -U accelerate")
    return {"log_with": name, "project_dir": str(out)}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe by dotted path, its values as trackers take them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
