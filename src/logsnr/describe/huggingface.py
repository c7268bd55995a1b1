"""Hugging Face: the flags of diffusers' training scripts.

| flags                                 | p, target and factor                                          |
|---------------------------------------|---------------------------------------------------------------|
| none of the following                 | uniform timesteps of --beta_schedule; target --prediction_type|
| --snr_gamma G                         | times min(SNR, G)/SNR; v min(SNR, G)/(SNR + 1); x min(SNR, G) |
| --do_edm_style_training               | x-MSE times sigma^-2: plain eps-MSE, with a v network as well |
| --weighting_scheme S (SD3)            | flow times by S; MSE of x unless --precondition_outputs 0     |
| --guidance_scale G (Flux)             | the same, MSE of the velocity; uniform times unless S         |
| --noise_offset, --input_perturbation, --dream_training: other noise or inputs, not a weighting        |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from logsnr.describe.flow import COSMAP, DRAWN, SIGMA_SQRT, log_time, scheme_density, scheme_factor
from logsnr.describe.training import Log, Trained, drawn_by, weighting_of
from logsnr.errors import LogsnrError
from logsnr.predictions import X0, Eps, Flow, Prediction, V
from logsnr.schedules import Discrete
from logsnr.timesteps import TimestepTable


def beta_table(kind: str, zero_terminal: bool) -> Discrete:
    """The table of betas by diffusers' name, rescaled to zero terminal SNR if so wished."""
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


def min_snr(gamma: float, kind: str) -> Log:
    """ln of Min-SNR's factor on the squared error of what is predicted."""

    def factor(x: Tensor) -> Tensor:
        least = x.clamp(max=math.log(gamma))
        return {"epsilon": least - x, "v_prediction": least - F.softplus(x), "sample": least}[kind]

    return factor


def from_tables(flags: Mapping[str, Any], name: str) -> Trained:
    """Scripts on a table of betas."""
    lost = [key for key in ("logit_mean", "logit_std", "mode_scale", "precondition_outputs", "shift") if key in flags]
    if lost:
        raise LogsnrError(f"--{lost[0]} belongs to --weighting_scheme: give that as well")
    kind, table = flags.get("prediction_type", "epsilon"), flags.get("beta_schedule", "scaled_linear")
    schedule = beta_table(table, flags.get("rescale_betas_zero_snr", False))
    predictions: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": X0()}
    notes, factor = [], None
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
        factor = min_snr(flags["snr_gamma"], kind)
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


def from_flows(flags: Mapping[str, Any], name: str) -> Trained:
    """SD3's scripts and Flux's."""
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
    preconditioned = bool(flags.get("precondition_outputs", not flux))
    density = scheme_density(flags, shift=shift, backwards=True)

    def factor(x: Tensor) -> Tensor:
        out = scheme_factor(scheme, x)
        return out + 2 * log_time(x) if preconditioned else out

    notes = [text for key, text in (("sigma_sqrt", SIGMA_SQRT), ("cosmap", COSMAP)) if key == scheme]
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
    return Trained(
        name=name,
        weighting=weighting_of(density, Flow(), factor),
        log_density=density,
        drawn=DRAWN.get(scheme, "uniform flow times") + ("" if shift == 1 else f", shift {shift:g}"),
        range=(-math.inf, math.inf),
        notes=tuple(notes),
    )
