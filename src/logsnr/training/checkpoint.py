"""Checkpoints: the folder of a run on disk.

runs/digits/
  card.json, model-{step}-{hash}.safetensors     the denoiser with averaged weights: what `load` reads
  state/                                         raw weights, moments, average, objective: what `resume` reads
  metrics.jsonl                                  one line per `log_every` steps
  samples/step-{step}.png
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from logsnr.errors import LogsnrError
from logsnr.files import check_tensors, read_pair, replace_file, write_pair
from logsnr.models.card import CARD, save_denoiser
from logsnr.training.config import Recipe
from logsnr.training.run import Run

STATE = "state"
METRICS = "metrics.jsonl"
FREE = ("steps", "max_seconds", "checkpoint_every", "log_every", "samples", "device")
"""Entries of a recipe that a resumed run may change: none of them touches what has been computed."""


def has_state(out: Path) -> bool:
    """Whether `out` holds a run that can be resumed."""
    return (out / STATE / f"{STATE}.json").exists()


def clear(out: Path) -> None:
    """Remove the files of an earlier run in `out`, and nothing else; the state goes first, card and weights last."""
    own = (f"{STATE}/{STATE}.json", f"{STATE}/{STATE}-*.safetensors", METRICS, "samples/step-*.png")
    for pattern in (*own, f"{CARD}.json", "model-*.safetensors"):
        for path in out.glob(pattern):
            path.unlink()


def save_state(run: Run, out: Path, seconds: float) -> None:
    """Write the state, then the averaged denoiser, each atomically.

    Raises:
        LogsnrError: if the disk refuses; what was saved before stays loadable.
    """
    values, tensors = run.state()
    recipe = run.recipe.model_dump(mode="json")
    card = {"kind": "state", "recipe": recipe, "seconds": seconds, **values}
    write_pair(out / STATE, STATE, card, tensors, step=run.step, stem=STATE)
    save_denoiser(run.average, out, step=run.step, training=recipe)


def load_state(run: Run, out: Path) -> float:
    """Restore the state saved in `out` into a fresh `run`; returns the training seconds behind it.

    Raises:
        LogsnrError: if there is none, it is damaged, or it belongs to another recipe.
    """
    if not has_state(out):
        raise LogsnrError(f"{out} holds no run to resume: start it without resume, or give the folder of a run")
    card, tensors = read_pair(out / STATE, STATE)
    _same_recipe(card.get("recipe") or {}, run.recipe, out)
    tensors.pop("objective.square", None)  # an average that schedules of version 0.1 kept
    _, expected = run.state()
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
    run.restore(int(card["step"]), card, tensors)
    return float(card["seconds"])


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a crash cut short: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
            kept.append(line + "\n")
    replace_file(path, "".join(kept).encode())


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
