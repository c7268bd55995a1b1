"""Checkpoints: the folder of a run on disk.

runs/digits/
  card.json, model-{step}-{hash}.safetensors     the denoiser with averaged weights: what `load` reads
  averages/NAME/                                 the same with weights averaged over another half-life
  state/                                         raw weights, moments, average, objective: what `resume` reads;
                                                 of sharded runs a folder of parts (shards.py)
  metrics.jsonl                                  one line per `log_every` steps
  samples/step-{step}.png
  .lock                                          while somebody trains

A checkpoint is one commit: both weight files, then state.json, then card.json, which every reader goes by.  Each names
its step; what a kill leaves between the two is found and mended by the next resume.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.files import CARD, MODEL, Pair, check_tensors, read_card, read_pair, weight_files, write_pairs
from logsnr.models.card import denoiser_pair
from logsnr.reading import mapping, reading
from logsnr.training.config import Recipe
from logsnr.training.metrics import METRICS, Metrics
from logsnr.training.optimizers import learning_rate
from logsnr.training.parallel import spread, whole
from logsnr.training.processes import note
from logsnr.training.sections import DataConfig
from logsnr.training.shards import Shards, read_shards, remove_shards, shapes, verified

STATE = "state"
AVERAGES = "averages"
_FIX = "restore it, or train into another folder"
FREE = ("steps", "max_seconds", "checkpoint_every", "log_every", "log_with", "samples", "device")
"""Entries of a recipe that a resumed run may change: none of them touches what has been computed."""
LAYOUT = ("parallel", "accumulate", "recompute", "compile")
"""And those that touch no more than its rounding."""
FREE_OF_DATA = ("in_memory", "workers", "shape", "classes")
"""And those of its data."""


def has_state(out: Path) -> bool:
    """Whether `out` holds a run that can be resumed."""
    return (out / STATE / f"{STATE}.json").exists()


def data_source(out: Path) -> str | None:
    """Where the data of the run in `out` lay, which its card may not tell to others; None if its state is gone."""
    try:
        return str(read_card(out / STATE, STATE)["recipe"]["data"]["source"])
    except (LogsnrError, KeyError, TypeError):
        return None


def data_as_then(config: DataConfig, out: Path) -> DataConfig:
    """The data of a resumed run: in memory where it was begun when they always were."""
    try:
        before = read_card(out / STATE, STATE)["recipe"]["data"]
    except (LogsnrError, KeyError, TypeError):
        return config
    old = isinstance(before, dict) and "in_memory" not in before and config.in_memory is None
    return config.model_copy(update={"in_memory": True}) if old else config


def check_free(out: Path) -> None:
    """Make sure that no training lies in `out`, nor a model that somebody put there.

    Raises:
        LogsnrError: if one does.
    """
    if has_state(out):
        raise LogsnrError(f"{out} already holds a run: resume it (resume=True, --resume) or choose another folder")
    if (out / f"{CARD}.json").exists():
        raise LogsnrError(
            f"{out} holds a trained model ({CARD}.json) without the state of its training, which would be replaced: "
            "choose another folder"
        )


def clear(out: Path) -> None:
    """Remove the files of an earlier run in `out`, and nothing else; the state goes first, card and weights last."""
    (out / STATE / f"{STATE}.json").unlink(missing_ok=True)
    pictures = [p for p in (out / "samples").glob("step-*.png") if re.fullmatch(r"step-\d{8,}\.png", p.name)]
    remove_shards(out / STATE)
    for path in (*weight_files(out / STATE, STATE), out / METRICS, *pictures, out / f"{CARD}.json"):
        path.unlink(missing_ok=True)
    for folder in (out, *(out / AVERAGES).glob("*")):
        for path in (*weight_files(folder, MODEL), folder / f"{CARD}.json"):
            path.unlink(missing_ok=True)


class Kept(Protocol):
    """What is saved of a run: its parts, by name, have a `state_dict`; the moments are the optimizer's."""

    recipe: Recipe
    step: int
    rank: int
    world: int
    shards: Shards | None
    data_fingerprint: str
    data_in_memory: bool
    average: NetworkDenoiser
    averages: dict[str, NetworkDenoiser]
    parts: dict[str, Any]
    optimizer: Any
    scaler: Any
    metrics: Metrics


def save_state(run: Kept, out: Path) -> None:
    """Write the state and the averaged denoiser in one commit: all weights, then state.json, then card.json.

    Every process has to ask.  A sharded state is written while the training goes on (`run.shards.wait`).

    Raises:
        LogsnrError: if the disk refuses; what was saved before stays loadable.
    """
    card = {
        "kind": "state",
        "recipe": run.recipe.model_dump(mode="json"),
        "data": run.data_fingerprint,
        "processes": run.world,
        "seconds": run.metrics.seconds,
        "window_steps": run.metrics.window_steps,
        "scaler": run.scaler.state_dict() if run.scaler else None,
    }
    models, tensors, step = _models(run, out), _tensors(run), run.step
    state = Pair(folder=out / STATE, name=STATE, stem=STATE, card=card, tensors=tensors)
    if run.shards:
        run.shards.save(
            tensors,
            out / STATE,
            step,
            lambda entry: write_pairs([replace(state, entry=entry, tensors={}), *models], step=step),
        )
    elif run.rank == 0:
        write_pairs([state, *models], step=step)
        remove_shards(out / STATE)


def repair(run: Kept, out: Path) -> None:
    """Write the averaged denoiser anew where card and weights are not those of the state that was loaded.

    A kill in the middle of a commit leaves the state a checkpoint ahead of them, the first one without a card.  Every
    process has to ask.
    """
    models = _models(run, out)
    if run.rank:
        return
    remove_shards(out / STATE, read_card(out / STATE, STATE)["weights"].get("folder"))
    model = models[-1]
    with suppress(LogsnrError):
        card, found = read_pair(out, CARD)
        same = found.keys() == model.tensors.keys() and card["step"] == run.step
        if same and all(torch.equal(found[name], value.cpu()) for name, value in model.tensors.items()):
            return
    note(f"{out / CARD}.json is not of step {run.step}, as the state is: a kill came between them; written anew")
    write_pairs(models, step=run.step)


def _models(run: Kept, out: Path) -> list[Pair]:
    """The averaged denoisers, the model's last; of sharded ones the first process takes all weights into its memory."""
    training = run.recipe.model_dump(mode="json")
    pairs = []
    for folder, model in (*((out / AVERAGES / name, one) for name, one in run.averages.items()), (out, run.average)):
        weights = None
        if run.shards:
            parts = ((name, whole(part)) for name, part in model.network.state_dict().items())
            weights = {name: value.cpu() for name, value in parts if run.rank == 0}
        pairs.append(denoiser_pair(model, folder, training=training, weights=weights))
    return pairs


def saved_recipe(recipe: Recipe, out: Path) -> Recipe:
    """The recipe of a resumed run, with what the saved one took from the model that it began from."""
    saved = read_card(out / STATE, STATE).get("recipe")
    kept = saved if isinstance(saved, dict) and saved.get("init_from") else {}
    missing = {key: kept.get(key) for key in ("init_from", "sigma_data") if getattr(recipe, key) is None}
    return recipe.model_copy(update=missing)


def load_state(run: Kept, out: Path) -> float:
    """Restore the state saved in `out` into a fresh `run`; returns the training seconds behind it.

    Raises:
        LogsnrError: if it is damaged, or belongs to another recipe or other data.
    """
    card, tensors, shards = _read(run, out / STATE)
    weights = card["weights"]
    with reading(out / STATE / f"{STATE}.json", _FIX, "the state of a run"):
        saved = mapping(card["recipe"], "its recipe", _FIX)
    _same_recipe(saved, run, out)
    if card.get("data") not in (None, run.data_fingerprint):
        # A folder that is decoded as needed goes by its names, and went by its pixels when it was in memory.
        then = "" if run.data_in_memory else ", with data.in_memory: true if they were in memory then"
        raise LogsnrError(
            f"{out} was trained on other images or labels than {run.recipe.data.source!r} holds now: resume with "
            f"those{then}, or go on from its weights in another folder (--init-from {out})"
        )
    if card.get("processes") not in (None, run.world):
        dropped = "; dropout draws otherwise" if getattr(run.recipe.network, "dropout", 0) else ""
        note(
            f"{out} was trained by {card['processes']} processes, now by {run.world}: images, levels and noise go on "
            f"as they would have, sums are rounded otherwise{dropped}"
        )
    tensors.pop("objective.square", None)  # an average that schedules of version 0.1 kept
    if run.shards or shards:
        _begin(run.optimizer)
    expected = _tensors(run)
    if "objective.error" in tensors:
        # A run saved when its schedule tracked the error alone goes on from that.
        expected = {k: v for k, v in expected.items() if k in tensors or not k.startswith(("objective.", "spread"))}
    # Before its first step an optimizer has no moments; each has the shape of its parameter, or is a step count.
    begun = {key: value for key, value in expected.items() if key.startswith("optimizer.")}
    fresh = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    expected = {key: value for key, value in {**expected, **fresh}.items() if key in fresh or key not in begun}
    check_tensors(
        tensors,
        expected,
        lambda problems: (
            f"{out / STATE / str(weights.get('folder') or weights.get('file'))} does not fit this recipe: {problems}; "
            "resume with the recipe it was written under"
        ),
    )
    if shards:
        tensors = {key: torch.zeros_like(begun.get(key, value)) for key, value in expected.items()}
        read_shards(shards, tensors)
    elif run.shards:
        tensors = {key: spread(value, begun.get(key, expected[key])) for key, value in tensors.items()}
    with reading(out / STATE / f"{STATE}.json", _FIX, "the state of a run"):
        _restore(run, card, tensors)
        seconds = float(card["seconds"])
    before, now = saved.get("steps"), run.recipe.steps
    falls = run.recipe.optimizer.decay in ("linear", "cosine")
    if falls and isinstance(before, int) and before and now and before != now:
        was, rate = (learning_rate(run.recipe.optimizer, min(run.step, steps), steps) for steps in (before, now))
        note(
            f"steps = {before} before, {now} now: the learning rate falls to zero at step {now}, so it goes on from "
            f"{rate:.3g} instead of {max(was, 0.0):.3g}; a run of {now} steps from its start would end elsewhere"
        )
    return seconds


def _read(run: Kept, state: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path | None]:
    """Card and tensors of a state; of one in shards their shapes alone, and the shards' folder."""
    card = read_card(state, STATE)
    if "folder" not in card["weights"]:
        return *read_pair(state, STATE), None
    folder = verified(card, state, run.rank, run.world)
    return card, shapes(folder), folder


def _begin(optimizer: Any) -> None:
    """Let an optimizer make its moments, by a step of zeros: what is read next takes their place, and the weights'."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    getattr(optimizer, "optimizer", optimizer).step()
    optimizer.zero_grad(set_to_none=True)


def _tensors(run: Kept) -> dict[str, Tensor]:
    """Everything that changes from step to step, as "part.name"."""
    tensors = {f"{part}.{name}": value for part, it in run.parts.items() for name, value in it.state_dict().items()}
    for i, moments in run.optimizer.state_dict()["state"].items():
        # Of an SGD without momentum there is a moment that is None.
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items() if value is not None}
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
        # What is kept is the mean over processes.
        run.metrics.meter.sums.copy_(tensors["spread"]).mul_(card.get("processes", run.world) / run.world)
    run.metrics.window_steps = int(card["window_steps"])
    if run.scaler and card["scaler"]:
        run.scaler.load_state_dict(card["scaler"])
    run.step = int(card["step"])


def _same_recipe(saved: dict[str, Any], run: Kept, out: Path) -> None:
    current = run.recipe.model_dump(mode="json")
    with suppress(ValidationError):
        # Options that a recipe of its time did not have are at their defaults.
        saved = Recipe.model_validate(saved).model_dump(mode="json")
    for values in (saved, current):
        values["data"] = {k: v for k, v in (values.get("data") or {}).items() if k not in FREE_OF_DATA}
    for key, value in current.items():
        if key not in (*FREE, *LAYOUT) and saved.get(key) != value:
            raise LogsnrError(
                f"{out} was trained with {key} = {saved.get(key)!r}, this recipe says {value!r}: resume with the same "
                f"recipe (only {', '.join((*FREE, *LAYOUT))} may change), or train into another folder"
            )
