"""Configs: training configurations of EDM (NVlabs' training_options.json) and of k-diffusion.

Both draw sigma and average a factor times the squared error of EDM's preconditioned target (training.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from logsnr.describe.training import Log, Trained, drawn_by, weighting_of
from logsnr.errors import LogsnrError, unknown
from logsnr.predictions import EDM, Eps, Prediction
from logsnr.schedules import Cosine, EDMTraining, InterpolatedCosine, Linear, VPLinear
from logsnr.schedules.base import log_sech


def from_config(config: Mapping[str, Any], name: str) -> Trained:
    """The objective of an EDM (`loss_kwargs`) or k-diffusion (`model.sigma_sample_density`) configuration.

    Raises:
        LogsnrError: if it is neither, or names something unknown.
    """
    if isinstance(config.get("loss_kwargs"), Mapping):
        return _edm(config["loss_kwargs"], name)
    model = config.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("sigma_sample_density"), Mapping):
        return _k_diffusion(model, name)
    raise LogsnrError(
        f"{name} is no configuration that is understood: it needs EDM's loss_kwargs, or k-diffusion's "
        "model.sigma_sample_density"
    )


def _edm(kwargs: Mapping[str, Any], name: str) -> Trained:
    kind = str(kwargs.get("class_name", "EDMLoss")).rpartition(".")[2]
    sigma_data = float(kwargs.get("sigma_data", 0.5))

    def number(key: str, default: float) -> float:
        return float(kwargs.get(key, default))

    span: tuple[float, float] = (-math.inf, math.inf)
    notes: tuple[str, ...] = ()
    target: Prediction = EDM(sigma_data=sigma_data)
    p: Log
    if kind == "EDMLoss":
        mean, std = number("P_mean", -1.2), number("P_std", 1.2)
        p, drawn = drawn_by(EDMTraining(mean, std)), f"ln sigma ~ N({mean:g}, {std:g}^2)"
    elif kind == "EDM2Loss":
        mean, std = number("P_mean", -0.4), number("P_std", 1.0)
        p, drawn = drawn_by(EDMTraining(mean, std)), f"ln sigma ~ N({mean:g}, {std:g}^2)"
        notes = ("EDM2 divides by a learned exp(u(sigma)): this is its start; at the end w ~ 1/E[loss].",)
    elif kind == "VPLoss":
        vp = VPLinear(number("beta_min", 0.1), number("beta_min", 0.1) + number("beta_d", 19.9))
        p, drawn, span, target = vp.log_density, "uniform times of the VP-SDE", vp.range, Eps()
    elif kind == "VELoss":
        least, most = number("sigma_min", 0.02), number("sigma_max", 100.0)
        ve = Linear(-2 * math.log(most), -2 * math.log(least))
        p, drawn, span, target = ve.log_density, f"log-uniform sigma in [{least:g}, {most:g}]", ve.range, Eps()
    else:
        raise unknown(f"{name}: loss_kwargs.class_name", kind, ["EDMLoss", "EDM2Loss", "VPLoss", "VELoss"])
    return Trained(
        name=f"{name}: {kind}",
        weighting=weighting_of(p, target),
        log_density=p,
        drawn=drawn,
        range=span,
        sigma_data=sigma_data,
        notes=notes,
    )


def _k_diffusion(model: Mapping[str, Any], name: str) -> Trained:
    density, sigma_data = model["sigma_sample_density"], float(model.get("sigma_data", 1.0))
    kind = density.get("type")
    middle = float(density.get("mean", density.get("loc", math.log(sigma_data))))
    span = -math.inf, math.inf
    if "min_value" in density or "max_value" in density or kind == "loguniform":
        least = float(density.get("min_value", model.get("sigma_min", 0.0)))
        most = float(density.get("max_value", model.get("sigma_max", math.inf)))
        span = -2 * math.log(most), -2 * math.log(least) if least else math.inf
    p: Log
    if kind == "lognormal":
        p = EDMTraining(middle, float(density.get("std", density.get("scale", 1.2)))).log_density
    elif kind == "loglogistic":
        scale = float(density.get("scale", 0.5))
        p = lambda x: 2 * log_sech((0.5 * x + middle) / (2 * scale)) - math.log(8 * scale)  # noqa: E731
    elif kind == "loguniform":
        p = Linear(*span).log_density
    elif kind in ("v-diffusion", "cosine"):
        p = Cosine(-2 * math.log(sigma_data)).log_density
    elif kind == "cosine-interpolated":
        low, high, image = (float(density[key]) for key in ("noise_d_low", "noise_d_high", "image_d"))
        p = InterpolatedCosine(low, high, image * sigma_data).log_density
    elif kind == "split-lognormal":
        one, two = (float(density.get(f"std_{i}", density.get(f"scale_{i}", 1.0))) for i in (1, 2))
        top = math.log(2 / (one + two)) - 0.5 * math.log(2 * math.pi) - math.log(2)
        p = lambda x: top - 0.5 * ((-0.5 * x - middle) / torch.where(-0.5 * x < middle, one, two)).square()  # noqa: E731
    else:
        known = ["lognormal", "loglogistic", "loguniform", "v-diffusion", "cosine", "cosine-interpolated"]
        known += ["split-lognormal"]
        raise unknown(f"{name}: sigma_sample_density.type", kind, known)
    data = 2 * math.log(sigma_data)
    soft = (
        "soft-min-snr is VDM++'s sigmoid, sigmoid(-lambda - 2 ln sigma_data) on eps errors, times p: not divided out."
    )
    weights: dict[str, tuple[Log | None, tuple[str, ...]]] = {
        "karras": (None, ()),
        "snr": (lambda x: -F.softplus(-x - data), ()),
        "soft-min-snr": (lambda x: data - x - 2 * torch.logaddexp(-x, torch.full_like(x, data)), (soft,)),
    }
    weight = str(model.get("loss_weighting", "karras"))
    if weight not in weights:
        raise unknown(f"{name}: loss_weighting", weight, weights)
    factor, notes = weights[weight]
    if model.get("has_variance"):
        notes = (*notes, "has_variance divides by a learned exp(logvar): this is its start.")
    simple = model.get("loss_config") == "simple"
    return Trained(
        name=name,
        weighting=weighting_of(p, Eps() if simple else EDM(sigma_data=sigma_data), None if simple else factor),
        log_density=p,
        drawn=f"sigma by k-diffusion's {kind}",
        range=span,
        sigma_data=sigma_data,
        notes=notes,
    )
