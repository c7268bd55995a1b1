"""Checkpoints: the folder of a run on disk.

runs/digits/
  card.json, model-{step}-{hash}.safetensors     the denoiser with averaged weights: what `load` reads
  state/                                         raw weights, moments, average, objective: what `resume` reads
  metrics.jsonl                                  one line per `log_every` steps
  samples/step-{step}.png
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.files import CARD, check_tensors, read_card, read_pair, write_pair
from logsnr.models.card import save_denoiser
from logsnr.training.config import Recipe
from logsnr.training.metrics import METRICS, Metrics

STATE = "state"
FREE = ("steps", "max_seconds", "checkpoint_every", "log_every", "samples", "device")
"""Entries of a recipe that a resumed run may change: none of them touches what has been computed."""


def has_state(out: Path) -> bool:
    """Whether `out` holds a run that can be resumed."""
    return (out / STATE / f"{STATE}.json").exists()


def data_source(out: Path) -> str | None:
    """Where the data of the run in `out` lay, which its card may not tell to others; None if its state is gone."""
    try:
        return str(read_card(out / STATE, STATE)["recipe"]["data"]["source"])
    except (LogsnrError, KeyError, TypeError):
        return None


def clear(out: Path) -> None:
    """Remove the files of an earlier run in `out`, and nothing else; the state goes first, card and weights last."""
    own = (f"{STATE}/{STATE}.json", f"{STATE}/{STATE}-*.safetensors", METRICS, "samples/step-*.png")
    for pattern in (*own, f"{CARD}.json", "model-*.safetensors"):
        for path in out.glob(pattern):
            path.unlink()


class Kept(Protocol):
    """What is saved of a run: its parts, by name, have a `state_dict`; the moments are the optimizer's."""

    recipe: Recipe
    step: int
    average: NetworkDenoiser
    parts: dict[str, Any]
    optimizer: Any
    scaler: Any
    metrics: Metrics


def save_state(run: Kept, out: Path) -> None:
    """Write the state, then the averaged denoiser, each atomically.

    Raises:
        LogsnrError: if the disk refuses; what was saved before stays loadable.
    """
    recipe = run.recipe.model_dump(mode="json")
    card = {
        "kind": "state",
        "recipe": recipe,
        "seconds": run.metrics.seconds,
        "window_steps": run.metrics.window_steps,
        "scaler": run.scaler.state_dict() if run.scaler else None,
    }
    write_pair(out / STATE, STATE, card, _tensors(run), step=run.step, stem=STATE)
    save_denoiser(run.average, out, step=run.step, training=recipe)


def load_state(run: Kept, out: Path) -> float:
    """Restore the state saved in `out` into a fresh `run`; returns the training seconds behind it.

    Raises:
        LogsnrError: if it is damaged, or belongs to another recipe.
    """
    card, tensors = read_pair(out / STATE, STATE)
    _same_recipe(card.get("recipe") or {}, run.recipe, out)
    tensors.pop("objective.square", None)  # an average that schedules of version 0.1 kept
    expected = _tensors(run)
    if "objective.error" in tensors:
        # A run saved when its schedule tracked the error alone goes on from that.
        expected = {k: v for k, v in expected.items() if k in tensors or not k.startswith(("objective.", "spread"))}
    # Before its first step an optimizer has no moments; each has the shape of its parameter, or is a step count.
    fresh = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    check_tensors(
        tensors,
        {**expected, **fresh},
        lambda problems: (
            f"{out / STATE / card['weights']['file']} does not fit this recipe: {problems}; "
            "resume with the recipe it was written under"
        ),
    )
    _restore(run, card, tensors)
    return float(card["seconds"])


def _tensors(run: Kept) -> dict[str, Tensor]:
    """Everything that changes from step to step, as "part.name"."""
    tensors = {f"{part}.{name}": value for part, it in run.parts.items() for name, value in it.state_dict().items()}
    for i, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    tensors["window"] = run.metrics.window
    if run.metrics.meter:
        tensors["spread"] = run.metrics.meter.sums
    return tensors


def _restore(run: Kept, card: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for part, it in run.parts.items():
        it.load_state_dict(
            {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".", 2)
            moments.setdefault(int(i), {})[name] = value
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    run.metrics.window.copy_(tensors["window"])
    if run.metrics.meter and "spread" in tensors:
        run.metrics.meter.sums.copy_(tensors["spread"])
    run.metrics.window_steps = int(card["window_steps"])
    if run.scaler and card["scaler"]:
        run.scaler.load_state_dict(card["scaler"])
    run.step = int(card["step"])


def _same_recipe(saved: dict[str, Any], recipe: Recipe, out: Path) -> None:
    current = recipe.model_dump(mode="json")
    with suppress(ValidationError):
        # Options that a recipe of its time did not have are at their defaults.
        saved = Recipe.model_validate(saved).model_dump(mode="json")
    # A learning rate that falls to zero at the last step has seen the number of steps all along.
    free = [key for key in FREE if key != "steps" or recipe.optimizer.decay == "constant"]
    for key, value in current.items():
        if key not in free and saved.get(key) != value:
            raise LogsnrError(
                f"{out} was trained with {key} = {saved.get(key)!r}, this recipe says {value!r}: resume with the same "
                f"recipe (only {', '.join(free)} may change), or train into another folder"
            )
