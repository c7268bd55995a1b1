"""Foreign: the flags of diffusers' and kohya's training scripts.

Every one of them is a density p, a target F and a factor omega on its squared error (training.py).

diffusers' scripts

| flags                                 | p, target and factor                                          |
|---------------------------------------|---------------------------------------------------------------|
| none of the following                 | uniform timesteps of --beta_schedule; target --prediction_type|
| --snr_gamma G                         | times min(SNR, G)/SNR; v min(SNR, G)/(SNR + 1); x min(SNR, G) |
| --do_edm_style_training               | x-MSE times sigma^-2: plain eps-MSE, with a v network as well |
| --weighting_scheme S (SD3)            | flow times by S; MSE of x unless --precondition_outputs 0     |
| --guidance_scale G (Flux)             | the same, MSE of the velocity; uniform times unless S         |
| --noise_offset, --input_perturbation, --dream_training: other noise or inputs, not a weighting        |

kohya's sd-scripts, target eps (or v with --v_parameterization), SNR clipped to 1000 where it divides:

| option                                | what it does to w                                             |
|---------------------------------------|---------------------------------------------------------------|
| --v_parameterization                  | target v: times (1 + e^-lambda)                               |
| --min_snr_gamma G                     | times min(SNR, G)/SNR; with v min(SNR, G)/(SNR + 1)           |
| --debiased_estimation_loss            | times SNR^-1/2; with v 1/(SNR + 1)                            |
| --scale_v_pred_loss_like_noise_pred   | v only: times SNR/(SNR + 1), which is plain eps-MSE again     |
| --v_pred_like_loss R                  | eps only: times 1 + R (SNR + 1)/SNR                           |
| --zero_terminal_snr                   | the table reaches SNR 0                                       |
| --min_timestep, --max_timestep        | cuts the range of noise levels                                |
| --noise_offset, --multires_noise_...  | other noise: not a weighting                                  |
| --ip_noise_gamma                      | other inputs: not a weighting                                 |
| --loss_type huber, smooth_l1          | another loss than the square: not a weighted ELBO             |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.density import log_normal, log_sech
from logsnr.describe.training import Log, Trained, drawn_by, weighting_of
from logsnr.errors import LogsnrError, nearest
from logsnr.prediction import X0, Eps, Flow, Prediction, V
from logsnr.schedule import Discrete
from logsnr.timesteps import TimestepTable

FLAGS: dict[str, type | tuple[str, ...]] = {
    "snr_gamma": float,
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "rescale_betas_zero_snr": bool,
    "weighting_scheme": ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
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
    "loss_type": ("l2", "huber", "smooth_l1"),
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


def from_flags(words: Sequence[str]) -> Trained:
    """The objective of a script's flags, e.g. ["--snr_gamma", "5", "--prediction_type=v_prediction"].

    Raises:
        LogsnrError: for a flag that is not known, a missing or a wrong value, or flags that exclude each other.
    """
    flags = _parse(words)
    name = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in flags.items())
    if any(key in KOHYA and key not in FLAGS for key in flags):
        mixed = [key for key in flags if key in FLAGS and key not in ("beta_schedule", "noise_offset")]
        if mixed:
            raise LogsnrError(f"--{mixed[0]} is a flag of diffusers' scripts, the others are kohya's: give one family")
        return _kohya(flags, name)
    if "weighting_scheme" in flags or "guidance_scale" in flags:
        return _sd3(flags, name)
    return _diffusers(flags, name)


def _outside(flags: Mapping[str, Any]) -> list[str]:
    """Notes on flags that are no weighting."""
    return [f"--{key} {_OUTSIDE[key]}." for key in _OUTSIDE if key in flags]


def _parse(words: Sequence[str]) -> dict[str, Any]:
    known = {**FLAGS, **KOHYA}
    flags: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("--") or key not in known:
            near = nearest(key, known)
            raise LogsnrError(f"unknown flag {word}: " + (f"did you mean --{near}?" if near else f"known: {_all()}"))
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
            raise LogsnrError(f"--{key} {text}: give {_values(kind)}")
        return text
    if kind is bool:
        return text.lower() in ("1", "true", "yes")
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    positive = key not in ("logit_mean", "mode_scale", "precondition_outputs", "min_timestep", "noise_offset")
    if not math.isfinite(value) or (positive and value <= 0):
        raise LogsnrError(f"--{key} {text}: give {_values(kind)}" + (" above 0" if positive else ""))
    return value


def _values(kind: type | tuple[str, ...]) -> str:
    return f"one of {', '.join(kind)}" if isinstance(kind, tuple) else "a number"


def _all() -> str:
    return ", ".join(f"--{key}" for key in (*FLAGS, *KOHYA))


def _table(kind: str, zero_terminal: bool) -> Discrete:
    tables = {
        "scaled_linear": TimestepTable.stable_diffusion,
        "linear": TimestepTable.ddpm,
        "squaredcos_cap_v2": TimestepTable.cosine,
    }
    table: TimestepTable = tables[kind]()
    if zero_terminal:
        root = table.alphas_cumprod.sqrt()
        table = TimestepTable(((root - root[-1]) * root[0] / (root[0] - root[-1])).square(), name=f"{kind}, zero SNR")
    return Discrete(table)


def _diffusers(flags: Mapping[str, Any], name: str) -> Trained:
    lost = [key for key in ("logit_mean", "logit_std", "mode_scale", "precondition_outputs", "shift") if key in flags]
    if lost:
        raise LogsnrError(f"--{lost[0]} belongs to --weighting_scheme: give that as well")
    kind, table = flags.get("prediction_type", "epsilon"), flags.get("beta_schedule", "scaled_linear")
    schedule = _table(table, flags.get("rescale_betas_zero_snr", False))
    predictions: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
    notes, factor = _outside(flags), None
    if flags.get("do_edm_style_training"):
        if "snr_gamma" in flags:
            raise LogsnrError("--snr_gamma is not offered with --do_edm_style_training: leave one of them out")
        if kind == "sample":
            raise LogsnrError("--do_edm_style_training: --prediction_type must be epsilon or v_prediction")
        if kind == "v_prediction":
            notes.append("EDM-style training weights a v network's errors as an eps network's: not plain v-MSE.")
        notes.append("With an EDM scheduler the same script leaves out sigma^-2, and trains plain MSE of x.")
        kind = "epsilon"
    if "snr_gamma" in flags:
        factor = _min_snr(flags["snr_gamma"], kind)
        notes.append("Min-SNR in these scripts is min(SNR, gamma)/SNR for eps and /(SNR + 1) for v: one weighting.")
        notes.append("The scripts do not offer it with EDM-style preconditioning.")
    if kind == "epsilon" and schedule.range[0] == -math.inf:
        notes.append("An eps network knows nothing at SNR 0: use v_prediction with a zero-terminal-SNR table.")
    p = drawn_by(schedule)
    return Trained(
        name=name or "diffusers' defaults",
        weighting=weighting_of(p, predictions[kind], factor),
        log_density=p,
        drawn=f"uniform timesteps of the {table} table",
        range=schedule.range,
        notes=tuple(notes),
    )


def _min_snr(gamma: float, kind: str) -> Log:
    def factor(x: Tensor) -> Tensor:
        least = x.clamp(max=math.log(gamma))
        return {"epsilon": least - x, "v_prediction": least - F.softplus(x), "sample": least}[kind]

    return factor


def _sd3(flags: Mapping[str, Any], name: str) -> Trained:
    foreign = ("snr_gamma", "prediction_type", "beta_schedule", "do_edm_style_training")
    clash = [key for key in foreign if key in flags]
    if clash:
        raise LogsnrError(
            f"--{clash[0]} belongs to scripts without --weighting_scheme and --guidance_scale: leave one of them out"
        )
    scheme, shift = flags.get("weighting_scheme", "none"), float(flags.get("shift", 1.0))
    flux = "guidance_scale" in flags
    if flux and flags.get("precondition_outputs"):
        raise LogsnrError("--precondition_outputs is a flag of SD3's scripts, --guidance_scale of Flux's: give one")
    move, preconditioned = 2 * math.log(shift), bool(flags.get("precondition_outputs", not flux))
    notes = _outside(flags)

    def density(x: Tensor) -> Tensor:
        base = x + move
        if scheme == "logit_normal":
            # The scripts index a decreasing table by u: flow time is 1 - u, so the mean changes sign.
            return log_normal(base, 2 * flags.get("logit_mean", 0.0), 2 * flags.get("logit_std", 1.0))
        if scheme == "mode":
            return _mode(base, flags.get("mode_scale", 1.29))
        return 2 * log_sech(0.25 * base) - math.log(8)

    def factor(x: Tensor) -> Tensor:
        t = F.logsigmoid(-0.5 * x)
        out = 2 * t if preconditioned else torch.zeros_like(x)
        if scheme == "sigma_sqrt":
            return out - 2 * t
        if scheme == "cosmap":
            return out - (1 - 2 * t.exp() + 2 * (2 * t).exp()).log()
        return out

    if scheme == "mode" and not -1 <= flags.get("mode_scale", 1.29) <= 2 / (math.pi - 2):
        raise LogsnrError(
            f"--mode_scale {flags['mode_scale']}: give a number in -1 ... 1.75, or noise levels fold over"
        )
    if scheme == "sigma_sqrt":
        notes.append("sigma_sqrt multiplies by sigma^-2, despite its name.")
    if scheme == "cosmap":
        notes.append("cosmap is a factor on uniform times here; SD3 draws times by that density.")
    if scheme == "logit_normal" and flags.get("logit_mean", 0.0) != 0:
        notes.append(
            "--logit_mean acts on u, and the scripts take timestep 1 - u: a positive mean means less noise, the "
            "opposite of the paper's m."
        )
    if preconditioned:
        notes.append("--precondition_outputs 1 (the SD3 scripts' default) is MSE of x, sigma^2 times that of velocity.")
    if flux:
        notes.append(
            "FLUX.1-dev's scheduler shifts dynamically, that is in sampling: its training times are not shifted."
        )
    else:
        notes.append("A scheduler with shift != 1 (SD3: 3) moves every level by -2 ln(shift): give --shift.")
    words = {"logit_normal": "logit-normal flow times", "mode": "flow times by mode sampling"}
    return Trained(
        name=name,
        weighting=weighting_of(density, Flow(), factor),
        log_density=density,
        drawn=words.get(scheme, "uniform flow times") + ("" if shift == 1 else f", shift {shift:g}"),
        range=(-math.inf, math.inf),
        notes=tuple(notes),
    )


def _mode(x: Tensor, scale: float) -> Tensor:
    """ln p of log-SNR for flow time f(u) = 1 - u - scale (cos^2(pi u/2) - 1 + u), u uniform (2403.03206, eq. 20)."""
    t = torch.sigmoid(-0.5 * x)
    lo, hi = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        u = 0.5 * (lo + hi)
        above = 1 - u - scale * ((0.5 * math.pi * u).cos().square() - 1 + u) > t
        lo, hi = torch.where(above, u, lo), torch.where(above, hi, u)
    slope = 1 + scale * (1 - 0.5 * math.pi * (math.pi * 0.5 * (lo + hi)).sin())
    return F.logsigmoid(-0.5 * x) + F.logsigmoid(0.5 * x) - math.log(2) - slope.clamp(min=1e-12).log()


def _kohya(flags: Mapping[str, Any], name: str) -> Trained:
    v = flags.get("v_parameterization", False)
    schedule = _table(flags.get("beta_schedule", "scaled_linear"), flags.get("zero_terminal_snr", False))
    notes = _outside(flags)
    p, factors = drawn_by(schedule), []
    if "min_snr_gamma" in flags:
        factors.append(_min_snr(flags["min_snr_gamma"], "v_prediction" if v else "epsilon"))
    if "scale_v_pred_loss_like_noise_pred" in flags:
        if not v:
            raise LogsnrError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization")
        factors.append(lambda x: F.logsigmoid(x.clamp(max=math.log(1000))))
        notes.append("v-loss times SNR/(SNR + 1) is plain eps-MSE: the weighting of v is undone.")
    if "v_pred_like_loss" in flags:
        if v:
            raise LogsnrError("--v_pred_like_loss is for eps networks: leave out --v_parameterization")
        ratio = flags["v_pred_like_loss"]
        factors.append(lambda x: (ratio * (-F.logsigmoid(x.clamp(max=math.log(1000)))).exp()).log1p())
    if "debiased_estimation_loss" in flags:
        factors.append(lambda x: -F.softplus(x.clamp(max=math.log(1000))) if v else -0.5 * x.clamp(max=math.log(1000)))
        notes.append(
            "Inconsistent: debiased estimation weights eps errors by e^(-lambda/2) with an eps network, by e^-lambda "
            "with a v network, so the same option trains two objectives (older versions: SNR^-1/2 for both)."
        )
    if flags.get("loss_type", "l2") != "l2":
        notes.append(f"--loss_type {flags['loss_type']} is no square: this holds for small ones only.")
    lo, hi = schedule.range
    if "min_timestep" in flags or "max_timestep" in flags:
        first, last = flags.get("min_timestep", 0), flags.get("max_timestep", 1000) - 1
        if not 0 <= first < last < len(schedule.table):
            raise LogsnrError(f"timesteps {first} ... {last + 1}: give 0 <= min_timestep < max_timestep <= 1000")
        lo, hi = (-2 * math.log(float(schedule.table.sigmas[i])) for i in (last, first))
    weighting = weighting_of(p, V() if v else Eps(), lambda x: sum((f(x) for f in factors), torch.zeros_like(x)))
    return Trained(
        name=name, weighting=weighting, log_density=p, drawn="uniform timesteps of SD's table", range=(lo, hi),
        notes=tuple(notes),
    )  # fmt: skip
