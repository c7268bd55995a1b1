"""Recipes: one YAML file that says what is trained, how, and for how long.

Every section is a model that refuses unknown keys; `load_recipe` turns the first mistakes into one clear line with the
dotted path, the value and what is allowed.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.models.base import NetworkConfig
from logsnr.models.networks import NETWORKS, AnyNetworkConfig
from logsnr.models.unet import UNetConfig
from logsnr.predictions import LABELS, PREDICTIONS
from logsnr.sampling.names import SOLVERS, find_solver, named_plan
from logsnr.sampling.plan import Plan

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Part = str | dict[str, Any]
"""A name, or a mapping of `name` and the parameters of that class."""

_PACKAGE = Path(__file__).resolve().parent.parent
RECIPES = (_PACKAGE / "recipes", _PACKAGE.parent.parent / "recipes")
"""Where bundled recipes lie: in an installed package, and in a checkout."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Images to train on (data.py lists the formats).

    Args:
        source: "digits", an .npz or .npy file, or a folder of images; paths are relative to the working directory.
        grey_levels: per channel (digits have 17, whatever is said here); recipes of before say `levels`.
        size: for folders: crop to the central square and resize to this side.
        channels: for folders: 1 for grey, 3 for colour (the default).
        holdout: fraction of the images held out, where the source has no held-out part of its own.
        split_seed: seed of that split; the held-out part stays the same for every training seed.
        flip: mirror each image left to right with probability 1/2.
    """

    source: str = "digits"
    grey_levels: Annotated[int, Field(ge=2, le=256, validation_alias=AliasChoices("grey_levels", "levels"))] = 256
    size: Annotated[int, Field(ge=2, le=4096)] | None = None
    channels: Literal[1, 3] | None = None
    holdout: Probability = 0.1
    split_seed: Annotated[int, Field(ge=0)] = 0
    flip: bool = False


class PredictionConfig(_Section):
    """What the network's output means (predictions.py).

    Args:
        name: a name of `PREDICTIONS`.
        label: how the network is told the noise level; "flow" (1000 t) suits the U-Net.
        path: "vp", "ve" or "flow", the scaling of the network's input; the prediction's own by default.
    """

    name: str = "edm"
    label: str = "flow"
    path: Literal["vp", "ve", "flow"] | None = None

    @model_validator(mode="after")
    def _known(self) -> PredictionConfig:
        for key, value, known in (("name", self.name, PREDICTIONS), ("label", self.label, LABELS)):
            if value not in known:
                raise unknown(key, value, known)
        if self.name == "edm" and self.path is not None:
            raise ValueError(f"path = {self.path!r}: EDM prediction scales its own input; leave path out")
        return self


class AdaptiveConfig(_Section):
    """How the density of noise levels is learned (schedules/adaptive.py).

    Args:
        importance: p ~ w times "error" or "gradient"; "auto" takes the gradient for the ELBO, where the error
            stays large at levels that teach little, and the error otherwise.
        bins: bins of log-SNR.
        decay: memory per draw.
        floor: share of uniform draws.
        true_every: for the gradient, steps between measurements of true gradient norms over all parameters, which
            mend the last layer's (0 = never).
        true_samples: draws in each, per process.
    """

    importance: Literal["auto", "error", "gradient"] = "auto"
    bins: Count = 100
    decay: Probability = 0.999
    floor: Annotated[float, Field(gt=0, le=1)] = 0.01
    true_every: Annotated[int, Field(ge=0)] = 50
    true_samples: Count = 8

    @field_validator("importance", mode="before")
    @classmethod
    def _gone(cls, value: Any) -> Any:
        if value == "rms":
            raise ValueError("'rms' never did better than 'error' and is no more: give error or gradient")
        return value


class ObjectiveConfig(_Section):
    """What is minimised (objectives.py): a preset by name, or a weighting and a schedule.

    Args:
        preset: a name of `objectives`, e.g. "vdm++/sigmoid".
        weighting: name, or {name: sigmoid, bias: 2.0}; with `schedule`, in place of a preset.
        schedule: name, or {name: cosine, shift: 0}: the density of noise levels in training.
        logsnr: (lo, hi) to which noise levels are truncated.
        adaptive: true, or {importance: gradient, ...}: learn the density during training.  It starts from `schedule`
            where one is named, else from what an untrained network is good for.
        uncertainty: divide by a learned e^u, as EDM2 does (uncertainty.py): trains w e^-u = 2 p/E[error] instead of w.
    """

    preset: str | None = None
    weighting: Part | None = None
    schedule: Part | None = None
    logsnr: tuple[Finite, Finite] | None = None
    adaptive: AdaptiveConfig | None = None
    uncertainty: bool = False

    @field_validator("adaptive", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {} if value else None
        if value is not None and not isinstance(value, (dict, AdaptiveConfig)):
            raise ValueError(f"{value!r}: give true, false or a mapping, e.g. {{importance: gradient}}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> ObjectiveConfig:
        if self.preset is None and self.weighting is not None and self.schedule is None and self.adaptive:
            if self.logsnr is None:
                raise ValueError("an adaptive density without a schedule needs its range: set logsnr: [lo, hi]")
        elif self.preset is None and (self.weighting is None or self.schedule is None):
            raise ValueError("give a preset, or both a weighting and a schedule")
        if self.preset is not None and self.weighting is not None:
            raise ValueError(f"preset = {self.preset!r} brings its own weighting: give a preset or a weighting")
        if self.uncertainty and self.adaptive:
            raise ValueError(
                "uncertainty weights by p over the error, and an adaptive p is w times the error: together w again; "
                "leave one of them out"
            )
        if self.logsnr is not None and not self.logsnr[0] < self.logsnr[1]:
            raise ValueError(f"logsnr = {list(self.logsnr)}: give [lo, hi] with lo < hi")
        return self

    def describe(self) -> str:
        """The objective in a few words, e.g. "sigmoid(bias=2) on [-10, 10], adaptive from cosine"."""
        name = self.preset or _words(self.weighting)
        where = "" if self.logsnr is None else f" on [{self.logsnr[0]:g}, {self.logsnr[1]:g}]"
        drawn = _words(self.schedule) if self.schedule is not None else "the preset's schedule"
        if self.adaptive:
            by = "" if self.adaptive.importance == "auto" else f" by {self.adaptive.importance}"
            start = "" if self.schedule is None else f" from {drawn}"
            return f"{name}{where}, adaptive{by}{start}"
        over = " over its learned uncertainty" if self.uncertainty else ""
        return f"{name}{over}{where}" if self.schedule is None else f"{name}{over}{where}, drawn by {drawn}"


def _words(part: Part | None) -> str:
    if part is None or isinstance(part, str):
        return part or ""
    parameters = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in part.items()
        if key != "name"
    )
    return f"{part.get('name')}({parameters})" if parameters else str(part.get("name"))


class OptimizerConfig(_Section):
    """AdamW.

    Args:
        lr: learning rate after warm-up.
        betas: decay of the two moments.
        weight_decay: decoupled weight decay.
        warmup: steps over which the learning rate rises linearly.
        decay: "constant" afterwards, or "linear" to zero at the recipe's last step.
        clip: largest gradient norm of the loss *divided by the objective's scale*; null for no clipping.
    """

    lr: PositiveFloat = 1e-3
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Literal["constant", "linear"] = "constant"
    clip: PositiveFloat | None = 1.0


class EMAConfig(_Section):
    """Exponential moving average of the weights; `ramp` starts it short: min(decay, (1 + n) / (10 + n)) at update n."""

    decay: Probability = 0.999
    ramp: bool = True


class SamplesConfig(_Section):
    """Pictures of samples: every `every` steps (0 = never), `count` images from fixed noise.

    Args:
        every: steps between pictures.
        count: images in one.
        solver: a name of `sampling.names`, e.g. "ge" or "DPM++(3M)".
        steps: network evaluations per image.
        gamma: gradient estimation's extrapolation; 2 where nothing is said.
    """

    every: Annotated[int, Field(ge=0)] = 1000
    count: Count = 64
    solver: str = "ge"
    steps: Count = 20
    gamma: PositiveFloat | None = None

    @model_validator(mode="after")
    def _a_plan(self) -> SamplesConfig:
        self.plan(0.01, 100.0, 1.0)
        return self

    def plan(self, low: float, high: float, sigma_data: float) -> Plan:
        """The sampler of a model with this range of noise levels."""
        gamma = self.gamma if "gamma" in SOLVERS[find_solver(self.solver, "rows", "plan")[0]].takes else None
        return named_plan(self.solver, self.steps, low, high, sigma_data=sigma_data, gamma=gamma)


class Recipe(_Section):
    """A whole training.

    Args:
        conditional: condition on the data's labels.
        label_dropout: probability of replacing a label by the null class (for classifier-free guidance).
        sigma_data: standard deviation of the data; measured on the training images when not given.
        batch: images per step, over all processes.
        steps: stop after this many steps; or
        max_seconds: after this much training time, whichever comes first.
        seed: the master seed: weights, batches, noise and dropout derive from it.
        precision: "no" (float32), "bf16" or "fp16" for the network; states and losses stay float32.
        device: "auto" or "cpu".
        checkpoint_every: steps between checkpoints (0 = only at the end).
        log_every: steps between lines of metrics.jsonl.
    """

    data: DataConfig = DataConfig()
    network: AnyNetworkConfig = UNetConfig()
    prediction: PredictionConfig = PredictionConfig()
    objective: ObjectiveConfig = ObjectiveConfig(preset="vdm++/sigmoid", logsnr=(-10, 10))
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    samples: SamplesConfig = SamplesConfig()
    conditional: bool = False
    label_dropout: Probability = 0.1
    sigma_data: PositiveFloat | None = None
    batch: Count = 128
    steps: Count | None = None
    max_seconds: PositiveFloat | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu"] = "auto"
    checkpoint_every: Annotated[int, Field(ge=0)] = 1000
    log_every: Count = 50

    @field_validator("precision", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false

    @model_validator(mode="after")
    def _ends(self) -> Recipe:
        if self.steps is None and self.max_seconds is None:
            raise ValueError("training has no end: give steps or max_seconds")
        if self.steps is None and self.optimizer.decay == "linear":
            raise ValueError("optimizer.decay = 'linear' falls to zero at the last step: give steps")
        if self.network.classes:
            raise ValueError(f"network.classes = {self.network.classes} comes from the data: use conditional: true")
        return self


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file, or the bare name of a recipe that comes with the library ("digits", "fashion_mnist").
        overrides: values by dotted path, as a mapping {"optimizer.lr": 1e-3} or as texts ["optimizer.lr=1e-3"].

    Raises:
        LogsnrError: if the file is missing or not YAML, or anything in it is not allowed.
    """
    path = _bundled(str(path)) or Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        beside = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        bundled = sorted({p.stem for folder in RECIPES for p in folder.glob("*.yaml")})
        hint = f"there are {', '.join([*beside, *bundled])}" if beside or bundled else "check the path"
        raise LogsnrError(f"recipe {path} cannot be read ({error.strerror}): {hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LogsnrError(f"recipe {path} is not valid YAML: {one_line(error)}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise LogsnrError(f"recipe {path} holds a {type(values).__name__}: a recipe is a mapping of sections")
    for key, value in _pairs(overrides):
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
            pairs.append((key.strip(), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise LogsnrError(f"override {text!r} is not valid YAML: {one_line(error)}") from error
    return pairs


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
    return f"{path} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _section(location: Sequence[str], values: Mapping[str, Any]) -> type[BaseModel]:
    """The model at a dotted path of the recipe."""
    model: type[BaseModel] = Recipe
    for part in location:
        inner = typing.cast("Any", model.model_fields[part].annotation) if part in model.model_fields else None
        for kind in (inner, *typing.get_args(inner)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return NETWORKS[values["network"].get("kind", "unet")].config if model is NetworkConfig else model
