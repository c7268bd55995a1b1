"""Foreign: the flags of other people's training scripts, read from a command line.

Every script has a density p, a target F and a factor omega on its squared error (training.py): diffusers' scripts are
in huggingface.py, kohya-ss/sd-scripts in kohya.py, the flow times of both in flow.py.  Flags say whose script it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from logsnr.describe.huggingface import from_flows, from_tables
from logsnr.describe.kohya import FLUX, from_flux, from_sd3, from_stable_diffusion
from logsnr.describe.training import Trained
from logsnr.errors import LogsnrError, unknown

FLAGS: dict[str, type | tuple[str, ...]] = {
    "snr_gamma": float,
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "rescale_betas_zero_snr": bool,
    "weighting_scheme": ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none", "uniform"),
    "logit_mean": float,
    "logit_std": float,
    "mode_scale": float,
    "precondition_outputs": int,
    "shift": float,
    "guidance_scale": float,
    "do_edm_style_training": bool,
    "noise_offset": float,
    "input_perturbation": float,
    "dream_training": bool,
    "resolution": str,
}
"""What is understood of diffusers' scripts (and of the scheduler they load), and its values."""

KOHYA: dict[str, type | tuple[str, ...]] = {
    "v_parameterization": bool,
    "min_snr_gamma": float,
    "debiased_estimation_loss": bool,
    "scale_v_pred_loss_like_noise_pred": bool,
    "v_pred_like_loss": float,
    "zero_terminal_snr": bool,
    "min_timestep": int,
    "max_timestep": int,
    "noise_offset": float,
    "multires_noise_iterations": int,
    "ip_noise_gamma": float,
    "loss_type": ("l2", "l1", "huber", "smooth_l1"),
    "timestep_sampling": ("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    "sigmoid_scale": float,
    "discrete_flow_shift": float,
    "model_prediction_type": ("raw", "additive", "sigma_scaled"),
    "training_shift": float,
}
"""What is understood of kohya's sd-scripts, and its values."""

_OUTSIDE = {
    "noise_offset": "adds a constant per channel to the noise: other noise, not another weighting",
    "multires_noise_iterations": "adds low-frequency noise: other noise, not another weighting",
    "ip_noise_gamma": "perturbs the network's input but not its target: other data, not another weighting",
    "input_perturbation": "perturbs the network's input but not its target: other data, not another weighting",
    "dream_training": "moves input and target by the network's own error: other data, not another weighting",
    "guidance_scale": "is an input of the guidance-distilled network: a condition, not another weighting",
}


_COMMON = ("beta_schedule", "noise_offset", "resolution")
"""Flags of both families, wherever they have an effect."""
_SCHEMES = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale")
"""Flags of diffusers' flow scripts that kohya's have as well."""
_ANY_NUMBER = ("logit_mean", "mode_scale", "precondition_outputs", "min_timestep", "noise_offset", "guidance_scale")


def from_flags(words: Sequence[str]) -> Trained:
    """The objective of a script's flags, e.g. ["--snr_gamma", "5", "--prediction_type=v_prediction"].

    Raises:
        LogsnrError: for a flag that is not known, a missing or a wrong value, or flags that exclude each other.
    """
    flags = _parse(words)
    name = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in flags.items())
    read, heeded = _script(flags)
    trained = read(flags, name)
    notes = (f"--{key} {_OUTSIDE[key]}." for key in _OUTSIDE if key in flags and key in heeded)
    return dataclasses.replace(trained, notes=(*notes, *trained.notes))


def _script(flags: Mapping[str, Any]) -> tuple[Callable[[Mapping[str, Any], str], Trained], Iterable[str]]:
    """Whose script it is, and which of the flags outside of w and p it heeds."""
    if any(key in FLUX for key in flags):
        _one_family(flags, (*_COMMON, *_SCHEMES))
        return from_flux, ("ip_noise_gamma", "guidance_scale")
    if "training_shift" in flags or flags.get("weighting_scheme") == "uniform":
        _one_family(flags, (*_COMMON, *_SCHEMES))
        return from_sd3, ()
    if any(key in KOHYA and key not in FLAGS for key in flags):
        _one_family(flags, _COMMON)
        return from_stable_diffusion, _OUTSIDE
    return from_flows if "weighting_scheme" in flags or "guidance_scale" in flags else from_tables, _OUTSIDE


def _one_family(flags: Mapping[str, Any], shared: Sequence[str]) -> None:
    mixed = [key for key in flags if key in FLAGS and key not in shared]
    if mixed:
        raise LogsnrError(f"--{mixed[0]} is a flag of diffusers' scripts, the others are kohya's: give one family")


def _parse(words: Sequence[str]) -> dict[str, Any]:
    known = {**FLAGS, **KOHYA}
    flags: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in known:
            raise unknown("flag", word, [f"--{name}" for name in known])
        kind = known[key]
        if kind is bool and not equals:
            flags[key] = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise LogsnrError(f"--{key} has no value: give {_values(kind)}")
            value = rest.pop(0)
        flags[key] = _value(key, value, kind)
    return flags


def _value(key: str, text: str, kind: type | tuple[str, ...]) -> Any:
    if isinstance(kind, tuple):
        if text not in kind:
            raise unknown(f"--{key}", text, kind)
        return text
    if kind is bool:
        return text.lower() in ("1", "true", "yes")
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    positive = key not in _ANY_NUMBER
    if not math.isfinite(value) or (positive and value <= 0):
        raise LogsnrError(f"--{key} {text}: give {_values(kind)}" + (" above 0" if positive else ""))
    return value


def _values(kind: type | tuple[str, ...]) -> str:
    if isinstance(kind, tuple):
        return f"one of {', '.join(kind)}"
    return "pixels, e.g. 1024 or 1024,768" if kind is str else "a number"
