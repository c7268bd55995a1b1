"""What the config of a stock scheduler says, in our scheduler's words.

A stock config may leave out what its class has by default, and some classes say by their name what their model is: flow
schedulers have no prediction type, EDM schedulers call their preconditioning "epsilon".  It may also hold what its
class does not read, kept from a scheduler that stood there before: of that only what describes the network counts.  A
scheduler that was never saved has no name in its config; then the keys tell.  What says nothing is refused, not taken
for DDPM's betas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import diffusers

from logsnr.adapters.diffusers.classes import MODEL, REFUSED, SUPPORTED, Stock
from logsnr.adapters.diffusers.config import beta_table, stated_prediction, states_flow

_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def converted(config: Mapping[str, Any], own: str, init: Callable[..., None]) -> tuple[dict[str, Any], set[str], Stock]:
    """A stock config in our words.

    Args:
        config: of any diffusers scheduler.
        own: the name of our class, whose config is complete.
        init: our constructor.

    Returns:
        The values of the config, and those its class has by default: they describe the model and its pipeline.
        The keys among them that somebody chose: only those does a stock scheduler that follows ours take over.
        What the class implies.

    Raises:
        ValueError: if that scheduler is for another kind of model, or goes through the levels in another way.
    """
    values = {key: value for key, value in config.items() if key != "_use_default_values"}
    chosen = values.keys() - set(config.get("_use_default_values") or ())
    ours = inspect.signature(init).parameters
    if is_own(config, own):
        absent = {key: None for key, parameter in ours.items() if parameter.default is None}  # files have no None
        return {**absent, **values}, chosen, Stock()
    name = class_of(config)
    if name in REFUSED:
        raise ValueError(f"{name}: {REFUSED[name]}; keep it, or wrap its network in logsnr.NetworkDenoiser")
    stock, reads = SUPPORTED.get(name, Stock()), _parameters(name)
    if reads:
        if states_flow(name, values) and values.get("sigma_data") is not None:
            raise ValueError(
                f"{name} with sigma_data = {values['sigma_data']}: its pipeline (Cosmos) keeps the state x + sigma eps "
                "and levels that are no times of a flow; keep its own scheduler"
            )
        unread = {key for key in ours.keys() - reads.keys() - MODEL if key not in stock.implied and _is_stocks(key)}
        values = {key: value for key, value in values.items() if key not in unread}
        values = {key: value for key, value in values.items() if key in ours or key in chosen or key[0] == "_"}
        for key, default in reads.items():
            if key in ours:
                values.setdefault(key, default)
    values = {**values, **stock.implied}
    stated = stated_prediction(name, values)
    if stated is None:
        raise ValueError(
            f"{name or 'this config'} says neither betas nor prediction_type: keep its own scheduler, or wrap its "
            "network in logsnr.NetworkDenoiser; if it is an epsilon, v, sample or flow network on ordinary levels, add "
            "prediction_type"
        )
    implied: dict[str, Any] = {"prediction_type": stated}
    if states_flow(name, values):  # also of a network that does not predict the velocity
        implied["use_flow_sigmas"] = True
    chosen |= {key for key, value in implied.items() if values.get(key) != value}
    values.update(implied)
    if reads and not name.startswith("DDIM"):
        values["clip_noise"] = True
    if stock.skip_last:
        values["skip_last"] = True
        if values.get("use_flow_sigmas") and any(values.get(key) for key in _RESPACED):
            _respace(values, ours)
    return values, chosen, stock


def is_own(config: Mapping[str, Any], own: str) -> bool:
    """Whether a config is of our class; one that was never saved has no name."""
    return bool(config.get("_class_name", own if "solver_options" in config else "") == own)


def class_of(config: Mapping[str, Any]) -> str:
    """The name of the scheduler class that a config is of: as it says, or by its keys; "" if they do not tell."""
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    keys = {key for key in config if key[0] != "_"}
    found = [name for name in (*SUPPORTED, *REFUSED) if keys == _parameters(name).keys()]
    found += sorted(
        (name for name in SUPPORTED if keys >= _parameters(name).keys() and _parameters(name)),
        key=lambda name: -len(_parameters(name)),
    )
    return found[0] if found else ""


@cache
def _parameters(name: str) -> dict[str, Any]:
    """The options of a stock class and their defaults; empty of one that is not installed, or needs what is not."""
    original = getattr(diffusers, name, None) if name else None
    if original is None:
        return {}
    parameters = list(inspect.signature(original.__init__).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {one.name: one.default for one in parameters if one.kind not in kinds}


@cache
def _is_stocks(key: str) -> bool:
    """Whether a stock class has an option of that name."""
    return any(key in _parameters(name) for name in SUPPORTED)


def _respace(values: dict[str, Any], ours: Mapping[str, inspect.Parameter]) -> None:
    """Karras and other levels of flows by DPM-Solver's kin lie between noise-to-signal ratios: its table's ends."""
    complete = {key: values.get(key, parameter.default) for key, parameter in ours.items()}
    low, high = beta_table(complete).sigma_range
    for key, end in (("sigma_min", low), ("sigma_max", high)):
        if values.get(key) is None:
            values[key] = end
