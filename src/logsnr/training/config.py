"""Recipes: one YAML file that says what is trained, how, and for how long.

Every section (sections.py) is a model that refuses unknown keys; `load_recipe` turns the first mistakes into one clear
line with the dotted path, the value and what is allowed.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from logsnr.errors import LogsnrError, one_line, shown, unknown
from logsnr.models.base import NetworkConfig
from logsnr.models.networks import AnyNetworkConfig, network_entry
from logsnr.models.unet import UNetConfig
from logsnr.paths import RECIPES, recipe_names
from logsnr.reading import LARGEST_YAML, check_format, parse_yaml, read_text
from logsnr.training.sections import (
    AdaptiveConfig,
    Count,
    DataConfig,
    EMAConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Part,
    PositiveFloat,
    PredictionConfig,
    Probability,
    SamplesConfig,
    Section,
)

__all__ = [
    "AdaptiveConfig",
    "DataConfig",
    "EMAConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Part",
    "PredictionConfig",
    "Recipe",
    "SamplesConfig",
    "load_recipe",
    "recipe_from",
    "recipe_text",
]

FORMAT = 1
"""Version of recipes; one may say which it is of, as `format: 1`."""


class Recipe(Section):
    """A whole training.

    Args:
        init_from: begin as another model, zoo:NAME or the folder of a run, instead of at random (initial.py).
        conditional: condition on the data's labels.
        label_dropout: probability of replacing a label by the null class (for classifier-free guidance).
        sigma_data: standard deviation of the data; measured on the training images when not given.
        batch: images per step, over all processes.
        accumulate: parts in which each process takes its share of a batch, one after the other, to save memory.
        parallel: what each of several processes holds: "ddp", all weights, or "fsdp", its part of them (parallel.py).
        recompute: compute a block's activations again in the backward pass instead of keeping them.
        compile: compile the network's blocks (torch.compile).
        steps: stop after this many steps; or
        max_seconds: after this much training time, whichever comes first.
        seed: the master seed: weights, batches, noise and dropout derive from it.
        precision: "no" (float32), "bf16" or "fp16" for the network; states and losses stay float32.
        device: "auto" or "cpu".
        checkpoint_every: steps between checkpoints (0 = only at the end).
        log_every: steps between lines of metrics.jsonl, and of a log where no terminal shows a bar.
        log_with: send those lines to a tracker too, through accelerate: "tensorboard", "wandb" or "trackio".
    """

    data: DataConfig = DataConfig()
    network: AnyNetworkConfig = UNetConfig()
    prediction: PredictionConfig = PredictionConfig()
    objective: ObjectiveConfig = ObjectiveConfig(preset="vdm++/sigmoid", logsnr=(-10, 10))
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    samples: SamplesConfig = SamplesConfig()
    init_from: str | None = None
    conditional: bool = False
    label_dropout: Probability = 0.1
    sigma_data: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    batch: Count = 128
    accumulate: Count = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    recompute: bool = False
    compile: bool = False
    steps: Count | None = None
    max_seconds: PositiveFloat | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    log_every: Count = 50
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = None

    @field_validator("precision", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @model_validator(mode="after")
    def _ends(self) -> Recipe:
        if self.steps is None and self.max_seconds is None:
            raise ValueError("training has no end: give steps or max_seconds")
        if self.steps is None and self.optimizer.decay in ("linear", "cosine"):
            raise ValueError(f"optimizer.decay = {self.optimizer.decay!r} falls to zero at the last step: give steps")
        if self.network.classes:
            raise ValueError(f"network.classes = {self.network.classes} comes from the data: use conditional: true")
        return self


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the bare name of a recipe that comes with the library ("digits", "fashion_mnist").
        overrides: values by dotted path, as a mapping {"optimizer.lr": 1e-3} or as texts ["optimizer.lr=1e-3"];
            objective.preset takes the place of the file's weighting and schedule, objective.weighting that of a preset.

    Raises:
        LogsnrError: if the file is missing or not YAML, or anything in it is not allowed.
    """
    path = _bundled(str(path)) or Path(path)
    try:
        values = parse_yaml(read_text(path, largest=LARGEST_YAML))
    except OSError as error:
        beside = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"there are {', '.join([*beside, *recipe_names()])}"
        raise LogsnrError(f"recipe {path} cannot be read ({error.strerror}): {hint}") from error
    except ValueError as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(error)
        raise LogsnrError(f"recipe {path} cannot be read: {why}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise LogsnrError(f"recipe {path} holds a {type(values).__name__}: a recipe is a mapping of named sections")
    check_format(values.pop("format", FORMAT), FORMAT, f"recipe {path}", f"write format: {FORMAT}, or leave it out")
    pairs = _pairs(overrides)
    _make_way(values.get("objective"), dict(pairs))
    for key, value in pairs:
        _assign(values, key, value)
    return recipe_from(values, name=str(path))


def recipe_from(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """Validate the sections of a recipe.

    Raises:
        LogsnrError: one line with the dotted path, value and remedy of each mistake.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise LogsnrError(f"{name}: " + "; ".join(_explain(dict(item), values) for item in error.errors())) from error


def recipe_text(recipe: Recipe) -> str:
    """A recipe as a file that says everything, defaults too: `load_recipe` reads the same recipe from it."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _bundled(name: str) -> Path | None:
    """The recipe that comes with the library under a bare name, unless a file of that name lies here."""
    if not name.isidentifier() or Path(name).exists():
        return None
    return next((file for folder in RECIPES if (file := folder / f"{name}.yaml").is_file()), None)


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise LogsnrError(f"override {text!r} has no value: write it as optimizer.lr=1e-3")
        try:
            pairs.append((key.strip(), parse_yaml(value)))
        except LogsnrError as error:
            raise LogsnrError(f"override {shown(text)} is {error}") from error
    return pairs


def _make_way(objective: Any, overrides: Mapping[str, Any]) -> None:
    """Take out of a file's objective what an override replaces: a preset, or weighting and schedule."""
    if not isinstance(objective, dict):
        return
    if overrides.get("objective.preset") is not None:
        objective.pop("weighting", None)
        objective.pop("schedule", None)
    elif overrides.get("objective.weighting") is not None:
        objective.pop("preset", None)


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            inner = {}
        values[section] = dict(inner)
        values = values[section]
    values[last] = value


def _explain(error: dict[str, Any], values: Mapping[str, Any]) -> str:
    """One mistake of a recipe's values in words."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(location) or "recipe"
    if error["type"] == "extra_forbidden":
        valid, section = sorted(_section(location[:-1], values).model_fields), ".".join(location[:-1])
        return f"{section}: {unknown('key', location[-1], valid)}" if section else str(unknown("key", path, valid))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if location else message
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        return str(unknown(path, error["input"], re.findall(r"'(.*?)'", error["ctx"]["expected"])))
    return f"{path} = {shown(error['input'])}: {message[0].lower()}{message[1:]}"


def _section(location: Sequence[str], values: Mapping[str, Any]) -> type[BaseModel]:
    """The model at a dotted path of the recipe."""
    model: type[BaseModel] = Recipe
    for part in location:
        inner = typing.cast("Any", model.model_fields[part].annotation) if part in model.model_fields else None
        for kind in (inner, *typing.get_args(inner)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return network_entry(values["network"].get("kind", "unet")).config if model is NetworkConfig else model
