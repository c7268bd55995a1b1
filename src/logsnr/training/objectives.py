"""What a recipe trains: from names and parameters to a weighted ELBO, and to what the network predicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from logsnr.errors import LogsnrError, one_line, unknown
from logsnr.objectives import WeightedELBO, objectives
from logsnr.predictions import EDM, PREDICTIONS, Prediction
from logsnr.schedules import SCHEDULES, Adaptive, Linear, Schedule
from logsnr.training.config import AdaptiveConfig, ObjectiveConfig, Part, PredictionConfig
from logsnr.weightings import ELBO, WEIGHTINGS, Weighting

CENTRAL = 0.998
"""Share of a schedule's draws that a trained range covers."""


SAMPLED = {"edm": (0.002, 80.0), "edm2": (0.002, 80.0)}
"""Sigmas between which presets are sampled whose training draws few of them (2206.00364, table 1; 2312.02696)."""


def build_objective(config: ObjectiveConfig, *, dim: int, sigma_data: float) -> WeightedELBO:
    """The objective of a recipe.

    A preset keeps the numbers it was published with, and its end points whatever the schedule.  A weighting that has a
    `sigma_data` and is named without one takes the data's.

    Args:
        config: the recipe's section.
        dim: dimensions of a sample, for the start of an adaptive schedule.
        sigma_data: standard deviation of the data.

    Raises:
        LogsnrError: if a name, a parameter or the range is not allowed.
    """
    if config.preset is not None:
        if config.preset not in objectives:
            raise unknown("objective.preset", config.preset, objectives)
        preset = objectives[config.preset]
        weighting, schedule, name = preset.weighting, preset.schedule, preset.name
    else:
        weighting, name = _weighting(config.weighting or {}, sigma_data), "custom"
        # Without a schedule (and then adaptive), only the range is asked of it.
        schedule = Linear(*(config.logsnr or (-10.0, 10.0)))
    if config.schedule is not None:
        ends = schedule.range
        schedule = _made(config.schedule, SCHEDULES, "objective.schedule", {})
        if config.preset is not None and config.logsnr is None:
            schedule = _between(schedule, ends, config.preset)
    if config.logsnr is not None:
        try:
            schedule = schedule.truncate(*config.logsnr)
        except ValueError as error:
            raise LogsnrError(f"objective.logsnr = {list(config.logsnr)}: {one_line(error)}") from error
    if config.adaptive:
        start = schedule if config.schedule is not None else schedule.range
        schedule = _adaptive(config.adaptive, start, weighting, dim, sigma_data)
    objective = WeightedELBO(weighting, schedule, name=name, target=config.target)
    try:
        objective.scale(dim, sigma_data)
    except ValueError as error:
        raise LogsnrError(f"objective: {one_line(error)}; set objective.logsnr: [lo, hi]") from error
    return objective


def central_logsnr(config: ObjectiveConfig, objective: WeightedELBO) -> tuple[float, float]:
    """(lo, hi) log-SNR of the central `CENTRAL` of the draws; the whole range of an adaptive schedule.

    Of the presets in `SAMPLED` those between which they are sampled, as far as their range goes.
    """
    schedule = objective.schedule
    if config.adaptive:
        # Its density moves as it learns; a uniform floor keeps every level of its range in training.
        return schedule.range
    if config.preset in SAMPLED and config.schedule is None:
        least, most = SAMPLED[config.preset]
        return max(schedule.range[0], -2 * math.log(most)), min(schedule.range[1], -2 * math.log(least))
    tail = (1 - CENTRAL) / 2
    return float(schedule.logsnr(1 - tail)), float(schedule.logsnr(tail))


def build_prediction(config: PredictionConfig, *, sigma_data: float) -> Prediction:
    """The prediction of a recipe; EDM's takes the data's standard deviation."""
    kind = PREDICTIONS[config.name]
    fields: dict[str, Any] = {"path": config.path} if config.path is not None else {}
    return kind(label=config.label, **fields, **({"sigma_data": sigma_data} if kind is EDM else {}))


def _adaptive(
    config: AdaptiveConfig, start: Schedule | tuple[float, float], weighting: Weighting, dim: int, sigma_data: float
) -> Adaptive:
    importance = config.importance
    if importance == "auto":
        importance = "gradient" if isinstance(weighting, ELBO) else "error"
    if importance == "error":
        for name, field in (("true_every", config.true_every), ("true_samples", config.true_samples)):
            if field not in (0, AdaptiveConfig.model_fields[name].default):
                raise LogsnrError(
                    f"objective.adaptive.{name} = {field} is of importance: gradient, and this density is learned from "
                    "the error: leave it out, or set objective.adaptive.importance: gradient"
                )
    try:
        return Adaptive(
            start,
            weighting,
            importance=importance,
            bins=config.bins,
            decay=config.decay,
            floor=config.floor,
            sigma_data=sigma_data,
            dim=dim,
        )
    except ValueError as error:
        raise LogsnrError(f"objective.adaptive: {one_line(error)}; set objective.logsnr: [lo, hi]") from error


def _between(schedule: Schedule, ends: tuple[float, float], preset: str) -> Schedule:
    """The schedule on a preset's range."""
    try:
        return schedule.truncate(*ends)
    except ValueError as error:
        lo, hi = schedule.range
        raise LogsnrError(
            f"objective.schedule on log-SNR [{lo:g}, {hi:g}] does not reach the end points of preset {preset!r}, "
            f"[{ends[0]:g}, {ends[1]:g}]: give others with objective.logsnr: [lo, hi]"
        ) from error


def _weighting(part: Part, sigma_data: float) -> Weighting:
    """The weighting of a name, or of a mapping with its parameters, `base`, `envelope` and `shift`."""
    where = "objective.weighting"
    parameters: dict[str, Any] = {"name": part} if isinstance(part, str) else dict(part)
    envelope, shift = parameters.pop("envelope", False), parameters.pop("shift", 0.0)
    if not isinstance(envelope, bool):
        raise LogsnrError(f"{where}.envelope = {envelope!r}: give true or false")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not math.isfinite(shift):
        raise LogsnrError(f"{where}.shift = {shift!r}: give a finite number, e.g. 2 ln(64/resolution)")
    if isinstance(parameters.get("base"), str | dict):
        parameters["base"] = _weighting(parameters["base"], sigma_data)
    weighting: Weighting = _made(parameters, WEIGHTINGS, where, {"sigma_data": sigma_data})
    try:
        weighting = weighting.envelope() if envelope else weighting
    except ValueError as error:
        raise LogsnrError(f"{where}.envelope: {one_line(error)}; leave it out") from error
    return weighting.shift(shift) if shift else weighting


def _made(part: Part, known: Mapping[str, Any], where: str, defaults: dict[str, Any]) -> Any:
    """The object of a name, or of a mapping of `name` and parameters."""
    parameters = {} if isinstance(part, str) else {key: value for key, value in part.items() if key != "name"}
    name = part if isinstance(part, str) else str(part.get("name"))
    if name not in known:
        raise unknown(where, name, known)
    kind = known[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in parameters.items():
        if key not in fields:
            raise unknown(f"parameter of {where} {name}", key, fields or ["none"])
        if isinstance(value, bool) or not isinstance(value, int | float | Weighting):
            raise LogsnrError(f"{where}.{key} = {value!r}: give a {'weighting' if key == 'base' else 'number'}")
    parameters = {**{key: value for key, value in defaults.items() if key in fields}, **parameters}
    try:
        return kind(**parameters)
    except (TypeError, ValueError) as error:
        raise LogsnrError(f"{where} {name!r}: {one_line(error)}") from error
