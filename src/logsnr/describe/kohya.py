"""Kohya: the options of kohya-ss/sd-scripts.

Stable Diffusion and SDXL, target eps (or v with --v_parameterization), SNR clipped to 1000 where it divides:

| option                                | what it does to w                                             |
|---------------------------------------|---------------------------------------------------------------|
| --v_parameterization                  | target v: times (1 + e^-lambda)                               |
| --min_snr_gamma G                     | times min(SNR, G)/SNR; with v min(SNR, G)/(SNR + 1)           |
| --debiased_estimation_loss            | times SNR^-1/2; with v 1/(SNR + 1)                            |
| --scale_v_pred_loss_like_noise_pred   | v only: times SNR/(SNR + 1), which is plain eps-MSE again     |
| --v_pred_like_loss R                  | eps only: times 1 + R (SNR + 1)/SNR                           |
| --zero_terminal_snr                   | the table reaches SNR 0; factors keep the SNR it had before   |
| --min_timestep, --max_timestep        | cuts the range of noise levels                                |
| --noise_offset, --multires_noise_...  | other noise: not a weighting                                  |
| --ip_noise_gamma                      | other inputs: not a weighting                                 |
| --loss_type l1, huber, smooth_l1      | another loss than the square: not a weighted ELBO             |

Flux, squared error of the velocity u = eps - x, at flow times t (n normal, v uniform):

| option                                | what it does                                                  |
|---------------------------------------|---------------------------------------------------------------|
| --timestep_sampling sigma             | t by --weighting_scheme, shifted by --discrete_flow_shift (3) |
| ... uniform; sigmoid                  | t = v; t = sigmoid(scale n), scale = --sigmoid_scale          |
| ... shift; flux_shift                 | the latter shifted by --discrete_flow_shift; by e^mu, which   |
|                                       | grows with --resolution (256 tokens .5, 4096 tokens 1.15)     |
| --model_prediction_type raw, additive | u_hat is the output; the output plus z                        |
| ... sigma_scaled                      | u_hat = z - t output; the scheme's factor on the loss         |
| everything of SD's table but --ip_noise_gamma and --loss_type: nothing                                |

SD3 (told by --training_shift): t by --weighting_scheme, not backwards, then shifted; x-MSE times the scheme's factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from logsnr.describe.flow import COSMAP, DRAWN, SIGMA_SQRT, log_time, scheme_density, scheme_factor, uniform
from logsnr.describe.huggingface import beta_table, min_snr
from logsnr.describe.training import Log, Trained, drawn_by, weighting_of
from logsnr.errors import LogsnrError
from logsnr.predictions import Eps, Flow, V
from logsnr.schedules.base import log_normal

FLUX = ("timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type")
"""Options that Flux's scripts alone have."""
_SHARED = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale", "ip_noise_gamma", "loss_type")
_FEW, _MANY, _TOKEN = (256, 0.5), (4096, 1.15), 16
"""mu of flux_shift at two numbers of tokens, and a token's side in pixels."""
_CLIP = math.log(1000)


def from_stable_diffusion(flags: Mapping[str, Any], name: str) -> Trained:
    """The scripts of SD and SDXL.

    Raises:
        LogsnrError: for options that exclude each other.
    """
    v, ends_at_zero = flags.get("v_parameterization", False), flags.get("zero_terminal_snr", False)
    kind = flags.get("beta_schedule", "scaled_linear")
    schedule = beta_table(kind, ends_at_zero)
    notes, factors, p = [], list[Log](), drawn_by(schedule)
    if "min_snr_gamma" in flags:
        factors.append(min_snr(flags["min_snr_gamma"], "v_prediction" if v else "epsilon"))
    if "scale_v_pred_loss_like_noise_pred" in flags:
        if not v:
            raise LogsnrError("--scale_v_pred_loss_like_noise_pred needs --v_parameterization")
        factors.append(lambda x: F.logsigmoid(x.clamp(max=_CLIP)))
        notes.append("v-loss times SNR/(SNR + 1) is plain eps-MSE: the weighting of v is undone.")
    if "v_pred_like_loss" in flags:
        if v:
            raise LogsnrError("--v_pred_like_loss is for eps networks: leave out --v_parameterization")
        ratio = flags["v_pred_like_loss"]
        factors.append(lambda x: (ratio * (-F.logsigmoid(x.clamp(max=_CLIP))).exp()).log1p())
    if "debiased_estimation_loss" in flags:
        factors.append(lambda x: -F.softplus(x.clamp(max=_CLIP)) if v else -0.5 * x.clamp(max=_CLIP))
        notes.append(
            "Inconsistent: debiased estimation weights eps errors by e^(-lambda/2) with an eps network, by e^-lambda "
            "with a v network, so the same option trains two objectives (older versions: SNR^-1/2 for both)."
        )
    snr = _before_rescaling(kind) if ends_at_zero else lambda x: x
    if ends_at_zero and factors:
        notes.append(
            "Inconsistent: the scripts store each timestep's SNR before --zero_terminal_snr changes the table, and "
            "weight by that."
        )
    if ends_at_zero and not v:
        notes.append("An eps network knows nothing at SNR 0: --zero_terminal_snr needs --v_parameterization.")
    lo, hi = schedule.range
    if "min_timestep" in flags or "max_timestep" in flags:
        first, last = flags.get("min_timestep", 0), flags.get("max_timestep", 1000) - 1
        if not 0 <= first < last < len(schedule.table):
            raise LogsnrError(f"timesteps {first} ... {last + 1}: give 0 <= min_timestep < max_timestep <= 1000")
        lo, hi = (-2 * math.log(float(schedule.table.sigmas[i])) for i in (last, first))

    def factor(x: Tensor) -> Tensor:
        then = snr(x)
        return sum((f(then) for f in factors), torch.zeros_like(x))

    return Trained(
        name=name,
        weighting=weighting_of(p, V() if v else Eps(), factor),
        log_density=p,
        drawn="uniform timesteps of SD's table",
        range=(lo, hi),
        notes=(*notes, *_no_square(flags)),
    )


def from_flux(flags: Mapping[str, Any], name: str) -> Trained:
    """The scripts of Flux (and Chroma).

    Raises:
        LogsnrError: for a resolution that is none.
    """
    sampling = flags.get("timestep_sampling", "sigma")
    kind = flags.get("model_prediction_type", "sigma_scaled")
    scheme = flags.get("weighting_scheme", "none")
    notes = _idle(flags, [k for k in flags if k not in (*FLUX, *_SHARED, "resolution")], "Flux's scripts")
    if sampling == "sigma":
        shift = flags.get("discrete_flow_shift", 3.0)
        density = scheme_density(flags, shift=shift, backwards=True)
        drawn = DRAWN.get(scheme, "uniform flow times") + f", shift {shift:g}"
        idle = ["sigmoid_scale", "resolution", *_lost_parameters(scheme)]
        notes.append("--timestep_sampling sigma, the default, draws from a table shifted by --discrete_flow_shift (3).")
        if scheme == "logit_normal" and flags.get("logit_mean", 0.0) != 0:
            notes.append("--logit_mean acts on u, and the scripts take timestep 1 - u: a positive mean: less noise.")
    else:
        density, drawn = _drawn_flux(sampling, flags)
        used = {"uniform": [], "sigmoid": ["sigmoid_scale"], "shift": ["sigmoid_scale", "discrete_flow_shift"]}
        keep = used.get(sampling, ["sigmoid_scale", "resolution"])
        idle = [key for key in ("sigmoid_scale", "discrete_flow_shift", "resolution") if key not in keep]
        idle += ["logit_mean", "logit_std", "mode_scale"]
        if scheme in DRAWN:
            idle.append("weighting_scheme")
        if sampling == "flux_shift" and "resolution" not in flags:
            notes.append("flux_shift grows with the image: shown for 1024 x 1024, give --resolution for another.")
    notes += _idle(flags, idle, f"--timestep_sampling {sampling}")
    scaled = kind == "sigma_scaled"
    if scheme in ("sigma_sqrt", "cosmap"):
        notes += [{"sigma_sqrt": SIGMA_SQRT, "cosmap": COSMAP}[scheme]] if scaled else []
        notes += [] if scaled else _idle(flags, ["weighting_scheme"], f"--model_prediction_type {kind}")
    if scaled:
        notes.append(
            "--model_prediction_type sigma_scaled, the default, turns the output into x and compares it with the "
            "velocity: the output that it asks for, (z - u)/sigma, is not what a Flux network gives; raw is."
        )
    return Trained(
        name=name,
        weighting=weighting_of(density, Flow(), lambda x: scheme_factor(scheme if scaled else "none", x)),
        log_density=density,
        drawn=drawn,
        range=(-math.inf, math.inf),
        notes=(*notes, *_no_square(flags)),
    )


def from_sd3(flags: Mapping[str, Any], name: str) -> Trained:
    """The scripts of SD3.

    Raises:
        LogsnrError: for timesteps that are cut.
    """
    cut = [key for key in ("min_timestep", "max_timestep") if key in flags]
    if cut:
        raise LogsnrError(f"--{cut[0]} squeezes the flow times of SD3's scripts, which is not understood: leave it out")
    scheme, shift = flags.get("weighting_scheme", "uniform"), flags.get("training_shift", 1.0)
    density = scheme_density(flags, shift=shift, backwards=False)
    notes = _idle(flags, [k for k in flags if k not in (*_SHARED[:4], "training_shift", "loss_type")], "SD3's scripts")
    notes += _idle(flags, _lost_parameters(scheme), f"--weighting_scheme {scheme}")
    notes += [text for key, text in (("sigma_sqrt", SIGMA_SQRT), ("cosmap", COSMAP)) if key == scheme]
    notes.append("Here u is the flow time: a positive --logit_mean means more noise, unlike in diffusers' scripts.")
    return Trained(
        name=name,
        weighting=weighting_of(density, Flow(), lambda x: scheme_factor(scheme, x) + 2 * log_time(x)),
        log_density=density,
        drawn=DRAWN.get(scheme, "uniform flow times") + ("" if shift == 1 else f", shift {shift:g}"),
        range=(-math.inf, math.inf),
        notes=(*notes, *_no_square(flags)),
    )


def _drawn_flux(sampling: str, flags: Mapping[str, Any]) -> tuple[Log, str]:
    if sampling == "uniform":
        return uniform, "uniform flow times"
    scale, move = flags.get("sigmoid_scale", 1.0), 0.0
    if sampling == "shift":
        move = math.log(flags.get("discrete_flow_shift", 3.0))
    elif sampling == "flux_shift":
        tokens = _tokens(flags.get("resolution", "1024"))
        move = _FEW[1] + (tokens - _FEW[0]) * (_MANY[1] - _FEW[1]) / (_MANY[0] - _FEW[0])
    words = f"flow times sigmoid({scale:g} n)" + (f", shift {math.exp(move):.4g}" if move else "")
    return lambda x: log_normal(x, -2 * move, 2 * scale), words


def _tokens(resolution: str) -> int:
    """Tokens of an image, "1024" or "1024,768" pixels."""
    parts = [part.strip() for part in resolution.split(",")]
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) >= _TOKEN for part in parts):
        raise LogsnrError(f"--resolution {resolution}: give a side or width,height in pixels, e.g. 1024 or 1024,768")
    return (int(parts[0]) // _TOKEN) * (int(parts[-1]) // _TOKEN)


def _before_rescaling(kind: str) -> Log:
    """Log-SNR that a timestep had in the table before it was rescaled to end at SNR 0."""
    root = beta_table(kind, False).table.alphas_cumprod.sqrt()
    first, last = float(root[0]), float(root[-1])

    def before(x: Tensor) -> Tensor:
        alpha = torch.sigmoid(x).sqrt() * ((first - last) / first) + last
        return 2 * alpha.log() - torch.log1p(-alpha.square())

    return before


def _lost_parameters(scheme: str) -> list[str]:
    used = {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}.get(scheme, ())
    return [key for key in ("logit_mean", "logit_std", "mode_scale") if key not in used]


def _idle(flags: Mapping[str, Any], keys: list[str], where: str) -> list[str]:
    return [f"--{key} does nothing in {where}." for key in keys if key in flags]


def _no_square(flags: Mapping[str, Any]) -> list[str]:
    kind = flags.get("loss_type", "l2")
    if kind == "l1":
        return ["--loss_type l1 is no square: this is not what it trains."]
    return [] if kind == "l2" else [f"--loss_type {kind} is no square: this holds for small errors only."]
