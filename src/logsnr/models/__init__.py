"""Networks and the folders they live in: build from a config, save and load as denoisers."""

from __future__ import annotations

from logsnr.models.base import Network, NetworkConfig
from logsnr.models.card import load_denoiser, save_denoiser
from logsnr.models.dit import DiT, DiTConfig
from logsnr.models.networks import NETWORKS, build_network
from logsnr.models.unet import UNet, UNetConfig

__all__ = [
    "NETWORKS",
    "DiT",
    "DiTConfig",
    "Network",
    "NetworkConfig",
    "UNet",
    "UNetConfig",
    "build_network",
    "load_denoiser",
    "save_denoiser",
]
