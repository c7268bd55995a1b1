"""The scheduler's config: options that may be set later, and what another scheduler takes over of them.

An option that is None is one that nobody gave: whoever builds another scheduler from this config gets that scheduler's
own default, and saved files do not mention it.  `shift` and `flow_shift` are two names of one number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from logsnr.adapters.diffusers.classes import Stock
from logsnr.adapters.diffusers.config import is_edm
from logsnr.adapters.diffusers.scheduler.plan_for import SAMPLER, gamma_to_config, plans_to_config

DEFAULTS = "_use_default_values"
"""Where diffusers keeps the names of options that nobody gave."""
SHIFTS = {"shift": "flow_shift", "flow_shift": "shift"}
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas", "shift_terminal")
_ASKS = frozenset(
    {
        *(key for key in SAMPLER if key not in ("start", "end")),
        *("plan", "timestep_spacing", "final_sigmas_type", "set_alpha_to_one", "rho", "sigma_schedule"),
        *SHIFTS,
        *_SPACINGS,
    }
)
"""Options that ask for a sampler or levels of one's own."""
_KEPT: dict[str, Callable[[Any], Any]] = {
    "plan": plans_to_config,
    "gamma": gamma_to_config,
    "trained_betas": lambda betas: torch.as_tensor(betas).tolist(),
}
"""Options that may be given as more than JSON has, and how a config keeps them."""


class Options(FrozenDict):  # type: ignore[misc]
    """A config as diffusers has it, that also follows `scheduler.config.name = value`; `changes` counts these."""

    changes = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and self[name] is not value:
            for key, new in entailed(as_values({name: value}), self).items():
                dict.__setitem__(self, key, new)
                super().__setattr__(key, new)
            self.__dict__["changes"] = self.changes + 1
        else:
            super().__setattr__(name, value)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of a key; options that are None count among those that nobody gave."""
        value = super().get(key, default)
        if key == DEFAULTS:
            value = [*(value or ()), *(name for name, option in self.items() if option is None)]
        return value


def as_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a config keeps them: plans, tensors and arrays as JSON values."""
    return {key: _KEPT[key](value) if key in _KEPT and value is not None else value for key, value in given.items()}


def entailed(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are given to a config, with what follows from them.

    The shift stands under both its names where the config has both: the one given wins.  A wish ends gamma "auto".
    """
    out = dict(given)
    for key, other in SHIFTS.items():
        if key in given and other not in given and config.get(other) is not None:
            out[other] = given[key]
    if config.get("gamma") == "auto" and given.keys() & _ASKS:
        out.setdefault("gamma", None)
    return out


def wishes(config: Mapping[str, Any], values: Mapping[str, Any], own: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `from_config` builds with: those given, and "auto" where nobody asks for a sampler or levels.

    Args:
        config: of the scheduler to follow.
        values: the same in our words.
        own: whether it is one of ours.
        given: keywords of the caller.
    """
    given = entailed(given, values)
    if given.get("sigma_data") is not None and not is_edm(config):
        given.setdefault("edm", False)  # no word about the network
    if own or given.keys() & _ASKS:
        return given
    if not any(config.get(key) for key in _SPACINGS) and not _spaced(config, values):
        given["gamma"] = "auto"
    return given


def _spaced(config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether the config of one of DPM-Solver's kin says where its timesteps lie, or any says that they are redrawn."""
    stated = "timestep_spacing" in config and "timestep_spacing" not in (config.get(DEFAULTS) or ())
    kin = bool(values.get("skip_last")) and stated and not values.get("use_flow_sigmas")
    return kin or bool(values.get("stochastic_sampling"))


def announce(name: str, stock: Stock, config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Say that the scheduler to follow draws noise and ours will not, unless the caller asks for a sampler."""
    if stock.noise is not None and stock.noise.drawn(config) and not given.keys() & _ASKS:
        warnings.warn(
            f"{name}: {stock.noise.what}; this one draws none: for DDPM's noise pass gamma=1, "
            "mu=0.5, or pass a gamma to say that none is wanted",
            stacklevel=3,
        )
