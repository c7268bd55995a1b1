"""The networks that others trained (tests/models/foreign), each under a convention of its own."""

import json
from pathlib import Path

import diffusers
from safetensors.torch import load_file

from logsnr.denoiser import NetworkDenoiser
from logsnr.predictions import X0, Eps, Flow, Score, V
from logsnr.timesteps import TimestepTable

ROOT = Path(__file__).parent / "models" / "foreign"
MODELS = json.loads((ROOT / "models.json").read_text())["models"]
FINITE = (0.002, 1000.0)
"""The part of a flow's levels, 0 to inf, that is used: at 0 an x0 network knows no noise."""


def scheduler(name):
    """diffusers' scheduler that a model was trained with."""
    about = MODELS[name]["scheduler"]
    return getattr(diffusers, about["class"])(**about["config"])


def network(name):
    """The U-Net itself, in float32."""
    about = MODELS[name]
    net = diffusers.UNet2DModel(**about["network"]["config"])
    net.load_state_dict({key: value.float() for key, value in load_file(ROOT / about["file"]).items()})
    return net.eval().requires_grad_(False)


def foreign(name):
    """A model as a denoiser; its sigma_data is Fashion-MNIST's, .353 of the range of x."""
    low, high = MODELS[name]["range"]
    if name in ("ddpm-eps", "sd-eps", "zero-snr-v"):
        table = TimestepTable(scheduler(name).alphas_cumprod)
        prediction, trained = (V if name == "zero-snr-v" else Eps)(label=table), table.sigma_range
    elif name == "ve-score":
        prediction, trained = Score(path="ve", label=lambda sigma: sigma), (0.01, 50.0)
    else:
        prediction, trained = X0(path="flow", label="flow") if name == "flow-x0-classes" else Flow(), FINITE
    return NetworkDenoiser(
        network(name), prediction, shape=(1, 28, 28), sigma_data=0.353 * (high - low), trained_range=trained
    )
