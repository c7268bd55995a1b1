"""Scripts: the flags of other people's training scripts, read by one table.

A script draws noise levels, has a target F, and multiplies its squared error by factors (training.py).  scripts.yaml
says whose flags there are, which of them exclude each other or do nothing, and what is worth knowing; here stands what
is computed:

| script         | levels                                                      | squared error of            |
|----------------|-------------------------------------------------------------|-----------------------------|
| diffusers      | uniform timesteps of --beta_schedule                        | --prediction_type           |
| diffusers_sd3  | flow times by --weighting_scheme, of u backwards            | x = z - t u, or velocity    |
| diffusers_flux | the same                                                    | the velocity u = eps - x    |
| kohya          | uniform timesteps of --beta_schedule, some cut              | eps or v (SD and SDXL)      |
| kohya_flux     | flow times v or sigmoid(scale n), shifted; or as SD3's      | the velocity                |
| kohya_sd3      | flow times by --weighting_scheme, shifted                   | x                           |
| musubi         | flow times by --timestep_sampling, on a range (trainers.py) | the velocity                |
| simple_tuner   | flow times sigmoid, uniform or Beta, shifted                | the velocity                |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from logsnr.describe.flow import drawn_by_scheme, log_time, scheme_factor, uniform
from logsnr.describe.trainers import Drawn, Flags, of_musubi, of_simple_tuner, shift_of_size
from logsnr.describe.training import Trained, drawn_by, weighting_of
from logsnr.errors import LogsnrError, unknown
from logsnr.predictions import X0, Eps, Flow, Prediction, V
from logsnr.schedules import Discrete
from logsnr.schedules.base import log_normal
from logsnr.timesteps import TimestepTable, to_zero_terminal

_ALL = (-math.inf, math.inf)
_KINDS: dict[str, tuple[type, float, str]] = {
    "positive": (float, 0.0, "a number above 0"),
    "count": (int, 0.0, "a number above 0"),
    "number": (float, -math.inf, "a number"),
    "integer": (int, -math.inf, "a number"),
}
"""Type, what it lies above, and how it is asked for."""


@cache
def table() -> dict[str, Any]:
    """scripts.yaml."""
    out: dict[str, Any] = yaml.safe_load((files(__package__) / "scripts.yaml").read_text(encoding="utf-8"))
    return out


def flags() -> dict[str, Any]:
    """All flags that are understood: to each the values it takes, or their kind."""
    return {flag: values for family in table()["flags"].values() for flag, values in family.items()}


def from_flags(words: Sequence[str]) -> Trained:
    """The objective of a script's flags, e.g. ["--snr_gamma", "5", "--prediction_type=v_prediction"].

    Raises:
        LogsnrError: for a flag that is not known, a missing or a wrong value, or flags that exclude each other.
    """
    given = _parse(words)
    named = {key: value or True for key, value in given.items()}  # a switch that is off tells as well
    kind, script = next(
        item for item in table()["scripts"].items() if any(_holds(when, named) for when in item[1]["told_by"])
    )
    mixed = [key for key in given if not any(key in table()["flags"][family] for family in script["whose"])]
    if mixed:
        owner = next(family for family, own in table()["flags"].items() if mixed[0] in own)
        others = script["whose"][0]
        raise LogsnrError(f"--{mixed[0]} is a flag of {owner}, the others are of {others}: give one family")
    full = {**script["defaults"], **given}
    for when, why in script.get("refused", {}).items():
        if _holds(when, full):
            raise LogsnrError(why.format(first=next((key for key in given if key in when.split()[0].split("|")), "")))
    density, drawn, span = DRAWS[kind](full)
    factors = [factor for when, factor in FACTORS[kind].items() if _holds(when, full)]

    def factor(x: Tensor) -> Tensor:
        seen = _before_rescaling(full, x) if kind == "kohya" else x
        return sum((factor(full, seen) for factor in factors), torch.zeros_like(x))

    notes = [table()["shared"][name] for name in script.get("shared", ())]
    return Trained(
        name=" ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in given.items()),
        weighting=weighting_of(density, _target(full), factor),
        log_density=density,
        drawn=drawn,
        range=span,
        notes=(
            *_beside(script, full, given),
            *(
                text.format(**full)
                for part in (script["notes"], *notes)
                for when, text in part.items()
                if _holds(when, full)
            ),
        ),
    )


def _holds(when: str, given: Flags) -> bool:
    """Whether all words of a condition hold (scripts.yaml)."""
    for word in when.split():
        keys, _, values = word.removeprefix("!").partition("=")
        found = [given[key] for key in keys.split("|") if key in given]
        hit = any(str(value) in values.split("|") if values else value is not False for value in found)
        if hit == word.startswith("!"):
            return False
    return True


def _beside(script: Mapping[str, Any], full: Flags, given: Flags) -> list[str]:
    """What flags do that is no matter of w and p, and which do nothing."""
    notes, outside = [], table()["outside"]
    for key in given:
        failing = [word for word in script.get("acts", {}).get(key, "").split() if not _holds(word, full)]
        if key not in script.get("reads", given):
            notes.append(f"--{key} does nothing in {script['name']}.")
        elif failing:
            other = failing[0].removeprefix("!").partition("=")[0]
            where = "with" if failing[0].startswith("!") else "in" if other in full else "without"
            value = f" {full[other]}" if where == "in" else ""
            notes.append(f"--{key} does nothing {where} --{other}{value}.")
        elif key in outside:
            notes.append(f"--{key} {outside[key]}.")
    return notes


def _parse(words: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    known, rest = flags(), list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in known:
            raise unknown("flag", word, [f"--{name}" for name in known])
        if not equals and known[key] == "switch":
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise LogsnrError(f"--{key} has no value: give {_wanted(known[key])}")
            value = rest.pop(0)
        given[key] = _value(key, value, known[key])
    return given


def _value(key: str, text: str, kind: str | list[str]) -> Any:
    if isinstance(kind, list):
        if text not in kind:
            raise unknown(f"--{key}", text, kind)
        return text
    if kind not in _KINDS:
        return text if kind == "pixels" else text.lower() in ("1", "true", "yes")
    of, above, _ = _KINDS[kind]
    try:
        value = of(text)
    except ValueError:
        value = math.nan
    if not above < value < math.inf:
        raise LogsnrError(f"--{key} {text}: give {_wanted(kind)}")
    return value


def _wanted(kind: str | list[str]) -> str:
    if isinstance(kind, list):
        return f"one of {', '.join(kind)}"
    return _KINDS[kind][2] if kind in _KINDS else "pixels, e.g. 1024 or 1024,768"


def beta_table(kind: str, zero_terminal: bool = False) -> Discrete:
    """The table of betas by diffusers' name, rescaled to zero terminal SNR if so wished."""
    tables = {
        "scaled_linear": TimestepTable.stable_diffusion,
        "linear": TimestepTable.ddpm,
        "squaredcos_cap_v2": TimestepTable.cosine,
    }
    found: TimestepTable = tables[kind]()
    if zero_terminal:
        found = TimestepTable(to_zero_terminal(found.alphas_cumprod), name=f"{kind}, zero SNR")
    return Discrete(found)


def _of_table(full: Flags) -> Drawn:
    kind = full["beta_schedule"]
    schedule = beta_table(kind, full.get("rescale_betas_zero_snr", False) or full.get("zero_terminal_snr", False))
    lo, hi = schedule.range
    if "min_timestep" in full or "max_timestep" in full:
        first, last = full.get("min_timestep", 0), full.get("max_timestep", 1000) - 1
        if not 0 <= first < last < len(schedule.table):
            raise LogsnrError(f"timesteps {first} ... {last + 1}: give 0 <= min_timestep < max_timestep <= 1000")
        lo, hi = (-2 * math.log(float(schedule.table.sigmas[i])) for i in (last, first))
    return drawn_by(schedule), f"uniform timesteps of the {kind} table", (lo, hi)


def _of_flux(full: Flags) -> Drawn:
    sampling = full["timestep_sampling"]
    if sampling == "sigma":
        return drawn_by_scheme(full, shift=full.get("discrete_flow_shift", 3.0))
    if sampling == "uniform":
        return uniform, "uniform flow times", _ALL
    scale, move = full.get("sigmoid_scale", 1.0), 0.0
    if sampling == "shift":
        move = math.log(full.get("discrete_flow_shift", 3.0))
    elif sampling == "flux_shift":
        move = shift_of_size(sampling, full.get("resolution", "1024"))
    words = f"flow times sigmoid({scale:g} n)" + (f", shift {math.exp(move):.4g}" if move else "")
    return lambda x: log_normal(x, -2 * move, 2 * scale), words, _ALL


def _before_rescaling(full: Flags, x: Tensor) -> Tensor:
    """Log-SNR that factors are formed with: of the table before --zero_terminal_snr rescaled it."""
    if not full.get("zero_terminal_snr"):
        return x
    root = beta_table(full["beta_schedule"]).table.alphas_cumprod.sqrt()
    alpha = torch.sigmoid(x).sqrt() * ((root[0] - root[-1]) / root[0]) + root[-1]
    return 2 * alpha.log() - torch.log1p(-alpha.square())


def _target(full: Flags) -> Prediction:
    if "weighting_scheme" in full or "flow_schedule_shift" in full:
        return Flow()
    if full.get("do_edm_style_training"):  # x-MSE times sigma^-2 is eps-MSE, of a v network too
        return Eps()
    kind = "v_prediction" if full.get("v_parameterization") else full.get("prediction_type", "epsilon")
    targets: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
    return targets[kind]


def _min_snr(gamma: float, x: Tensor) -> Tensor:
    return x.clamp(max=math.log(gamma))


def _clip(x: Tensor) -> Tensor:
    """kohya's SNR where it divides."""
    return x.clamp(max=math.log(1000))


def _scheme(full: Flags, x: Tensor) -> Tensor:
    return scheme_factor(full["weighting_scheme"], x)


def _scheme_of_x(full: Flags, x: Tensor) -> Tensor:
    """The squared error of x is t^2 times that of the velocity."""
    return _scheme(full, x) + 2 * log_time(x)


DRAWS: dict[str, Callable[[Flags], Drawn]] = {
    "musubi": of_musubi,
    "simple_tuner": of_simple_tuner,
    "kohya_flux": _of_flux,
    "kohya_sd3": lambda f: drawn_by_scheme(f, shift=f.get("training_shift", 1.0), backwards=False),
    "kohya": _of_table,
    "diffusers_flux": lambda f: drawn_by_scheme(f, shift=f.get("shift", 1.0)),
    "diffusers_sd3": lambda f: drawn_by_scheme(f, shift=f.get("shift", 1.0)),
    "diffusers": _of_table,
}
"""How each script draws its levels."""

FACTORS: dict[str, dict[str, Callable[[Flags, Tensor], Tensor]]] = {
    "musubi": {"": _scheme},
    "simple_tuner": {},
    "kohya_flux": {"model_prediction_type=sigma_scaled": _scheme},
    "kohya_sd3": {"": _scheme_of_x},
    "kohya": {
        "min_snr_gamma !v_parameterization": lambda f, x: _min_snr(f["min_snr_gamma"], x) - x,
        "min_snr_gamma v_parameterization": lambda f, x: _min_snr(f["min_snr_gamma"], x) - F.softplus(x),
        "scale_v_pred_loss_like_noise_pred": lambda f, x: F.logsigmoid(_clip(x)),
        "v_pred_like_loss": lambda f, x: (f["v_pred_like_loss"] * (-F.logsigmoid(_clip(x))).exp()).log1p(),
        "debiased_estimation_loss !v_parameterization": lambda f, x: -0.5 * _clip(x),
        "debiased_estimation_loss v_parameterization": lambda f, x: -F.softplus(_clip(x)),
    },
    "diffusers_flux": {"": _scheme},
    "diffusers_sd3": {"precondition_outputs=0": _scheme, "!precondition_outputs=0": _scheme_of_x},
    "diffusers": {
        "snr_gamma prediction_type=epsilon": lambda f, x: _min_snr(f["snr_gamma"], x) - x,
        "snr_gamma prediction_type=v_prediction": lambda f, x: _min_snr(f["snr_gamma"], x) - F.softplus(x),
        "snr_gamma prediction_type=sample": lambda f, x: _min_snr(f["snr_gamma"], x),
    },
}
"""ln of what each script multiplies the squared error by, by condition."""
