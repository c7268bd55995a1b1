"""What a diffusers scheduler config says of its model: the noise levels, their labels, the state, the prediction.

    config                                      levels                        label                 state
    betas (DDPM, SD, SDXL, DiT)                 sqrt((1 - abar)/abar)         t in 0 ... T - 1      z
    flow_prediction, FlowMatch* (SD3, Flux)     sigma = t/(1 - t)             T t                   z/(alpha + s)
    ... with invert_sigmas (Mochi)              the same                      T (1 - t), F reversed z/(alpha + s)
    timestep_type continuous (SVD)              sigma_min ... sigma_max       ln(sigma)/4           z
    sigma_data (EDM schedulers)                 sigma_min ... sigma_max       ln(sigma)/4           z

The state is what pipelines hold between steps.  It is z itself for everything trained on a variance-preserving path:
`add_noise` returns z, pipelines start from z = noise, and `scale_model_input` has nothing to do, except that EDM's
networks get z over its standard deviation there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logsnr.adapters.diffusers.classes import REFUSED
from logsnr.errors import unknown
from logsnr.noise import alpha_s, flow_time, path_scale, sigma_from_flow_time
from logsnr.predictions import EDM, X0, Eps, Flow, Prediction, V, label_edm
from logsnr.timesteps import TimestepTable, cosine_betas, to_zero_terminal

PREDICTIONS: dict[str, type[Prediction]] = {"epsilon": Eps, "v_prediction": V, "sample": X0, "flow_prediction": Flow}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

_OTHER_KEYS = frozenset({"timestep_scaling", "scale_factors", "stages", "n_grid"})
"""What only configs of such schedulers have: one that was never saved has no name in its config."""

_EDM_KEYS = frozenset({"sigma_data", "sigma_schedule", "rho"})


def stated_prediction(name: str, config: Mapping[str, Any], *, complete: bool = True) -> str | None:
    """The prediction type that a scheduler's config says, or that its kind implies; None for other models.

    Args:
        name: of the scheduler's class; "" if unknown.
        config: its config.
        complete: whether it holds all that its class has, or is a note in somebody's own words.
    """
    keys, named = config.keys(), bool(name)
    if name in REFUSED or not (named or _OTHER_KEYS.isdisjoint(keys)):
        return None
    edm = name.startswith("EDM") or (not named and (keys >= _EDM_KEYS or not complete))
    if config.get("sigma_data") is not None and not edm:  # consistency models, trigonometric flow
        return None
    if "prediction_type" in keys:
        return str(config["prediction_type"])
    if states_flow(name, config, complete=complete):
        return "flow_prediction"
    return "epsilon" if "beta_start" in keys or not complete else None


def states_flow(name: str, config: Mapping[str, Any], *, complete: bool = True) -> bool:
    """Whether a scheduler's levels are those of a flow, whatever its network predicts; arguments as above."""
    shifted = "shift" in config and "beta_start" not in config
    return name.startswith("FlowMatch") or (
        shifted and (not complete or (not name and "num_train_timesteps" in config))
    )


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether a config's model is EDM's: it has a sigma_data, and nothing says that this is no more than a spread."""
    return config.get("sigma_data") is not None and config.get("edm") is not False


@dataclass(frozen=True)
class Noising:
    """The model behind a scheduler: its prediction, its levels and how they are named.

    Attributes:
        prediction: the meaning of the network's output; its label is the timestep.
        steps: num_train_timesteps, T.
        table: the levels of a model of T betas; None for a flow or a continuous model.
        flow: whether the pipeline's state is (1 - t) x + t eps.
        inverted: whether flow labels run the other way.
        sigma_range: (smallest, largest) level the model may be asked at.
        sigma_data: standard deviation of the data, in the units of x: EDM's own, or the config's; else 1.
    """

    prediction: Prediction
    steps: int
    table: TimestepTable | None
    flow: bool
    inverted: bool
    sigma_range: tuple[float, float]
    sigma_data: float = 1.0
    _amplitudes: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def edm(self) -> bool:
        """Whether the network is EDM's: fed with `c_in z`."""
        return isinstance(self.prediction, EDM)

    def scale(self, sigma: float) -> float:
        """k with `state = k z`: 1, or 1/(alpha + s) for flows."""
        return path_scale("flow", *alpha_s(sigma)) if self.flow else 1.0

    def timestep(self, sigma: float) -> float:
        """The label of a level, as the model is told."""
        return self.prediction.timestep(sigma)

    def sigma(self, timestep: float) -> float:
        """The level of a label."""
        if self.table is not None:
            return self.table.sigma(float(timestep))
        if not self.flow:
            return math.exp(4 * timestep)
        t = timestep / self.steps
        return sigma_from_flow_time(1 - t if self.inverted else t)

    def amplitudes(
        self, timesteps: Tensor, like: Tensor, told: Mapping[float, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(signal, noise) of the state at labels, to broadcast over `like`, in at least float32.

        Everything happens on the device of `like`, but for labels that are `told`.

        Args:
            timesteps: `[]` or `[B]`; `[B, F]` of frames, `[B, N]` of tokens.
            like: `[B, ...]`.
            told: levels of labels that are not the model's own.

        Raises:
            ValueError: if the timesteps fit no axis of `like`.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        t, shape = timesteps.to(like.device), _along(timesteps.shape, like.shape)
        if told:
            levels = [told[label] if label in told else self.sigma(label) for label in t.flatten().tolist()]
            pairs = [tuple(a * self.scale(sigma) for a in alpha_s(sigma)) for sigma in levels]
            pair: Any = torch.tensor(pairs, dtype=dtype, device=like.device).unbind(-1)
        elif self.flow:
            t = t.to(dtype) / self.steps
            pair = (t, 1 - t) if self.inverted else (1 - t, t)
        elif self.table is None:
            pair = alpha_s((4 * t.to(dtype)).exp())
        elif t.is_floating_point():
            sigma = self.table.sigma(t.cpu() if t.device.type == "mps" else t.double())
            pair = alpha_s(sigma.to(like.device, dtype))
        else:
            pair = tuple(self._on(like.device)[:, t].to(dtype))
        signal, noise = (a.reshape(shape) for a in pair)
        return signal, noise

    def _on(self, device: torch.device) -> Tensor:
        """(alpha, s) of the whole table `[2, T]` on a device, remembered."""
        known = self._amplitudes.get(device)
        if known is None:
            assert self.table is not None
            abar = self.table.alphas_cumprod
            known = torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float().to(device)
            self._amplitudes[device] = known
        return known


def _along(labels: torch.Size, samples: torch.Size) -> tuple[int, ...]:
    """The shape in which labels broadcast over samples.

    Raises:
        ValueError: if they fit no axis.
    """
    batch, ones = samples[:1], [1] * (len(samples) - 1)
    if len(labels) == 0 or (len(labels) == 1 and labels[0] in (1, *batch)):
        return (-1, *ones)
    if len(labels) == 2 and labels[0] in (1, *batch):
        if labels[1] == 1:
            return (-1, *ones)
        # frames of [B, C, F, H, W], or of [B, F, C, H, W]; tokens of [B, N, C]
        axis = next((axis for axis in (2, 1) if len(samples) == 5 and samples[axis] == labels[1]), 0)
        axis = 1 if len(samples) == 3 and samples[1] == labels[1] else axis
        if axis:
            return (labels[0], *(labels[1] if i == axis else 1 for i in range(1, len(samples))))
    raise ValueError(
        f"timesteps {[*labels]} for samples {[*samples]}: give one of each sample [B], of each frame [B, F] of "
        "[B, C, F, H, W], or of each token [B, N] of [B, N, C]"
    )


@dataclass(frozen=True)
class _FlowLabel:
    """T t, or T (1 - t)."""

    steps: int
    inverted: bool

    def __call__(self, sigma: Any) -> Any:
        t = flow_time(sigma)
        return (1 - t if self.inverted else t) * self.steps


def noising(config: Mapping[str, Any]) -> Noising:
    """The model that a scheduler config describes.

    Raises:
        ValueError: if the prediction type or beta schedule is unknown, or an epsilon model has zero terminal SNR.
    """
    kind, steps = config["prediction_type"], int(config["num_train_timesteps"])
    if kind not in PREDICTIONS:
        raise unknown("prediction_type", kind, PREDICTIONS, ", as the network was trained to predict")
    given = config.get("sigma_data")
    unit = 1.0 if given is None else float(given)
    if not 0 < unit < math.inf:
        raise ValueError(f"sigma_data = {unit}: must be in (0, inf), the standard deviation of the data")
    if is_edm(config):
        if kind != "epsilon":
            raise ValueError(
                f"prediction_type {kind!r} with sigma_data = {unit}: an EDM network is 'epsilon', that is F with "
                "x0 = c_skip y + c_out F; pass edm=False if this is only the data's spread, or drop sigma_data"
            )
        return Noising(EDM(sigma_data=unit), steps, None, False, False, _ends(config, 0.002, 80.0), unit)
    if kind == "flow_prediction" or config["use_flow_sigmas"]:
        inverted = bool(config["invert_sigmas"])
        label = _FlowLabel(steps, inverted)
        prediction = (
            Flow(label=label, reverse=inverted)
            if kind == "flow_prediction"
            else PREDICTIONS[kind](label=label, path="flow")  # type: ignore[call-arg]
        )
        return Noising(prediction, steps, None, True, inverted, (0.0, math.inf), unit)
    table = beta_table(config)
    if config["timestep_type"] == "continuous" and kind == "v_prediction":
        ends = _ends(config, *table.sigma_range)
        return Noising(V(label=label_edm), steps, None, False, False, ends, unit)
    if kind == "epsilon" and math.isinf(table.sigma_range[1]):
        raise ValueError(
            "prediction_type 'epsilon' with zero terminal SNR (rescale_betas_zero_snr, or a last beta of 1): at "
            "sigma = inf such a network says nothing of the image, and samples come out black or nan; pass "
            "rescale_betas_zero_snr=False, or use a model trained with v_prediction"
        )
    return Noising(PREDICTIONS[kind](label=table), steps, table, False, False, table.sigma_range, unit)


def _ends(config: Mapping[str, Any], low: float, high: float) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a model without a table."""
    low, high = (config[key] or default for key, default in (("sigma_min", low), ("sigma_max", high)))
    if not 0 < low < high:
        raise ValueError(f"sigma_min = {low}, sigma_max = {high}: give 0 < sigma_min < sigma_max")
    return low, high


def beta_table(config: Mapping[str, Any]) -> TimestepTable:
    """The table of a config's betas, as diffusers' schedulers compute it, in float32.

    Raises:
        ValueError: if the schedule is unknown, or the betas do not make a table.
    """
    steps, start, end = int(config["num_train_timesteps"]), config["beta_start"], config["beta_end"]
    schedule, trained = config["beta_schedule"], config["trained_betas"]
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float32)
        if len(betas) != steps:
            raise ValueError(
                f"trained_betas has {len(betas)} values for num_train_timesteps = {steps}: make them equal"
            )
    elif schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    elif schedule == "squaredcos_cap_v2":
        betas = cosine_betas(steps)
    elif schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    else:
        raise unknown("beta_schedule", schedule, BETA_SCHEDULES, "; or give the betas as trained_betas")
    shift = config["snr_shift_scale"]
    if shift == 1 and config["rescale_betas_zero_snr"]:
        betas = _betas(to_zero_terminal(torch.cumprod(1 - betas, 0)))
    abar = torch.cumprod(1 - betas, 0)
    if shift != 1:  # CogVideoX shifts, and rescales, the products themselves
        abar = abar / (shift + (1 - shift) * abar)
        if config["rescale_betas_zero_snr"]:
            abar = torch.cumprod(1 - _betas(to_zero_terminal(abar)), 0)
    return TimestepTable(abar, name="scheduler config")


def _betas(abar: Tensor) -> Tensor:
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def limit(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a config does to x0: clipping or dynamic thresholding, as DDIM does; None for neither.

    Raises:
        ValueError: if a bound is none.
    """
    ratio, most = float(config["dynamic_thresholding_ratio"]), float(config["sample_max_value"])
    bound = float(config["clip_sample_range"])
    if config["thresholding"]:
        if not (0 < ratio <= 1 and most >= 1):
            raise ValueError(
                f"dynamic_thresholding_ratio = {ratio} must be in (0, 1] (.995 is usual), sample_max_value = {most} at "
                "least 1, the range of x: change them, or pass thresholding=False"
            )
        return partial(_threshold, ratio, most)
    if config["clip_sample"]:
        if not bound > 0:
            raise ValueError(f"clip_sample_range = {bound}: must be above 0 (1 is usual); or pass clip_sample=False")
        return partial(_clip, bound)
    return None


def _clip(most: float, x0: Tensor) -> Tensor:
    return x0.clamp(-most, most)


def _threshold(ratio: float, highest: float, x0: Tensor) -> Tensor:
    """Dynamic thresholding (2205.11487): clip each image to a quantile of its absolute values, and divide by it."""
    s = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, highest)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
