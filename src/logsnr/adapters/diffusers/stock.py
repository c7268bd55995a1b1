"""What the config of a stock scheduler says, in our scheduler's words.

A stock config may leave out what its class has by default, and some classes say by their name what their model is: flow
schedulers have no prediction type, EDM schedulers call their preconditioning "epsilon".  A scheduler that was never
saved has no name in its config; then the keys tell.  What says nothing is refused, not taken for DDPM's betas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from logsnr.adapters.diffusers.config import stated_prediction, states_flow


def converted(config: Mapping[str, Any], own: str, init: Callable[..., None]) -> dict[str, Any]:
    """The values of a config, and those its class has by default: they describe the model and its pipeline.

    Args:
        config: of any diffusers scheduler.
        own: the name of our class, whose config is complete.
        init: our constructor: only arguments of its own are filled in.

    Raises:
        ValueError: if that scheduler is for another kind of model.
    """
    values = {key: value for key, value in config.items() if key != "_use_default_values"}
    name = str(values.get("_class_name", ""))
    name = "" if name == own else name
    original = getattr(diffusers, name, None) if name else None
    if original is not None:
        ours = inspect.signature(init).parameters
        for key, parameter in inspect.signature(original.__init__).parameters.items():
            if key in ours and parameter.default is not inspect.Parameter.empty:
                values.setdefault(key, parameter.default)
    stated = stated_prediction(name, values)
    if stated is None:
        raise ValueError(
            f"{name or 'this config'} says neither betas nor prediction_type, or is for a consistency model, a staged "
            "or reversed flow, codes, ...: keep its own scheduler, or wrap its network in logsnr.NetworkDenoiser; if "
            "it is an epsilon, v, sample or flow network on ordinary levels, add prediction_type"
        )
    if states_flow(name, values):  # also of a network that does not predict the velocity
        values["use_flow_sigmas"] = True
    return {**values, "prediction_type": stated}
