"""The reference of recipes, from the classes that read them: every key with meaning, unit, default and allowed values.

logsnr recipes --reference > docs/recipe-reference.md
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from logsnr.models.networks import NETWORKS, OWN
from logsnr.objectives import objectives
from logsnr.predictions import LABELS, PREDICTIONS
from logsnr.sampling.names import SOLVERS
from logsnr.schedules import SCHEDULES
from logsnr.training.config import Recipe
from logsnr.training.optimizers import PREFIX
from logsnr.weightings import WEIGHTINGS

HEAD = """# Recipe reference

Every key of a recipe. This page is made from the classes that read recipes: `logsnr recipes --reference`.

A recipe is a YAML file of these sections; what it leaves out has its default, an unknown key is refused with the
nearest valid one, and `--set section.key=value` replaces a value on the command line. `logsnr train RECIPE
--print-config` prints a recipe with everything filled in, `--dry-run` what its training takes, and `--smoke` runs its
code for twenty steps. The recipes that come with the library are in [recipes.md](recipes.md).
"""

UNITS = {
    "batch": "images", "steps": "steps", "max_seconds": "s", "checkpoint_every": "steps", "log_every": "steps",
    "sigma_data": "of x, in [-1, 1]", "data.size": "pixels", "data.shape": "channels, pixels, pixels",
    "data.workers": "processes", "data.holdout": "share of the images", "label_dropout": "probability",
    "network.patch": "pixels", "network.head_dim": "channels", "network.channels": "channels",
    "network.dropout": "probability", "network.dropout_side": "places of the map", "network.norm_groups": "groups",
    "network.layers_per_block": "blocks", "network.depth": "blocks", "network.heads": "heads",
    "network.width": "channels", "network.told": "channels", "network.label_width": "channels",
    "network.label_frequency": "radians per unit of the label", "network.mlp_ratio": "widths",
    "network.classes": "classes", "data.classes": "classes", "data.grey_levels": "levels",
    "objective.logsnr": "log-SNR, nats", "objective.adaptive.bins": "bins", "objective.adaptive.decay": "per draw",
    "objective.adaptive.floor": "share of the draws", "objective.adaptive.true_every": "steps",
    "objective.adaptive.true_samples": "draws", "optimizer.lr": "per step", "optimizer.betas": "per step",
    "optimizer.weight_decay": "per step, times lr", "optimizer.warmup": "steps", "optimizer.after": "steps",
    "optimizer.clip": "norm of the gradient over the scale", "ema.decay": "per step", "ema.half_life": "images",
    "ema.others": "images", "samples.every": "steps", "samples.count": "images", "samples.steps": "evaluations",
}  # fmt: skip
"""What a number counts; a key of networks stands for all kinds."""

NAMES: dict[str, Iterable[str]] = {
    "objective.preset": objectives,
    "prediction.name": PREDICTIONS,
    "prediction.label": LABELS,
    "samples.solver": [name for name, entry in SOLVERS.items() if entry.makes in ("rows", "plan")],
    "optimizer.name": ["adamw", f"{PREFIX}CLASS"],
}
"""Keys whose values are names of a registry."""
PARTS: dict[str, Mapping[str, Any]] = {"objective.weighting": WEIGHTINGS, "objective.schedule": SCHEDULES}
"""And those that name a class, whose parameters stand beside it."""


def reference() -> str:
    """The whole page."""
    parts = [HEAD, *_section("", Recipe)]
    return "\n".join(parts).rstrip() + "\n"


def _section(path: str, model: type[BaseModel], title: str = "") -> Iterator[str]:
    """A heading, what the section is, a table of its own keys, and the sections inside."""
    summary, meanings = documented(model)
    yield f"\n## {title or path or 'The recipe itself'}\n\n{summary}\n"
    inner: list[tuple[str, type[BaseModel], str]] = []
    rows = ["| key | meaning | unit | default | allowed |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        below = _model(field.annotation)
        if key == "network":
            kinds = [(kind, entry.config) for kind, entry in [*NETWORKS.items(), ('"module:Class"', OWN)]]
            inner += [(key, config, f"network, kind: {kind}") for kind, config in kinds]
        elif below is not None:
            inner.append((key, below, ""))
        if below is None or key == "objective.adaptive":
            rows.append(_row(key, name, field, meanings))
    yield "\n".join(rows) + "\n"
    for key, config, named in inner:
        yield from _section(key, config, named)


def _row(key: str, name: str, field: FieldInfo, meanings: dict[str, str]) -> str:
    if key in PARTS:
        allowed = "; ".join(f"`{name}`{_parameters(kind)}" for name, kind in PARTS[key].items())
    elif key in NAMES:
        allowed = ", ".join(f"`{each}`" for each in NAMES[key])
    else:
        allowed = _allowed(field)
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        assert value is not PydanticUndefined
        default = f"`{_yaml(value)}`"
    cells = [f"`{name}`", meanings.get(name, ""), UNITS.get(key, ""), default, allowed]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _parameters(kind: Any) -> str:
    names = [field.name for field in dataclasses.fields(kind)]
    return f" ({', '.join(names)})" if names else ""


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, if it does."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "pattern": "matching `{}`"}
_BOUNDS |= {"min_length": "at least {} of them", "max_length": "at most {} of them"}
_TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "mapping", type(None): "null"}


def _allowed(field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    return ", ".join([_kind(field.annotation), *bounds])


def _bounds(metadata: list[Any]) -> list[str]:
    found = []
    for each in metadata:
        inner = getattr(each, "metadata", None)
        if isinstance(inner, list):
            found += _bounds(inner)
            continue
        for bound, told in _BOUNDS.items():
            value = getattr(each, bound, None)
            if value is not None:
                found.append(told.format(f"{value:,}" if isinstance(value, int) else value))
    return list(dict.fromkeys(found))


def _kind(annotation: Any) -> str:
    """A type in words: "whole number, at least 1", "`a` or `b`", "null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([_kind(arguments[0]), *_bounds(list(arguments[1:]))])
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(_kind(each) for each in arguments)
    if origin in (tuple, list):
        if Ellipsis in arguments or origin is list:
            return f"a list, each {_kind(arguments[0])}"
        same = len(set(arguments)) == 1
        return f"[{len(arguments)} values], each {_kind(arguments[0])}" if same else "a list"
    if origin is dict:
        return "mapping"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return _TYPES.get(annotation, "any value")


def documented(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Summary of a class's docstring, and the meaning of each of its fields, bases included."""
    summary, meanings = "", {}
    for kind in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        text = inspect.cleandoc(kind.__doc__ or "")
        head, _, arguments = text.partition("\nArgs:\n")
        summary = " ".join(head.split())
        for match in re.finditer(r"^    (\w+): (.*(?:\n        .*)*)", arguments, re.MULTILINE):
            meanings[match[1]] = " ".join(match[2].split())
    return summary, meanings
