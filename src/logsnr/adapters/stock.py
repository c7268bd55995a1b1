"""What the config of a stock scheduler says, in our scheduler's words.

A stock config may leave out what its class has by default, and some classes say by their name what their model is: flow
schedulers have no prediction type, EDM schedulers call their preconditioning "epsilon".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

from logsnr.adapters.noising import OTHER_MODELS, for_flow


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
    # A scheduler that was never saved has no name in its config; the key sets tell EDM's from consistency models'.
    edm = name.startswith("EDM") or (not name and {"sigma_data", "sigma_schedule", "rho"} <= values.keys())
    if name.startswith(OTHER_MODELS) or (values.get("sigma_data") is not None and not edm and name != own):
        raise ValueError(
            f"{name or 'this config'} is for a model that is not an epsilon, v, sample, flow or EDM network on a table "
            "or a range of levels (a consistency model, or trigonometric flow): keep its own scheduler, or wrap its "
            "network in logsnr.NetworkDenoiser"
        )
    original = getattr(diffusers, name, None) if name and name != own else None
    if original is not None:
        ours = inspect.signature(init).parameters
        for key, parameter in inspect.signature(original.__init__).parameters.items():
            if key in ours and parameter.default is not inspect.Parameter.empty:
                values.setdefault(key, parameter.default)
    if "prediction_type" not in values and for_flow(name, values):
        values["prediction_type"] = "flow_prediction"
    return values
