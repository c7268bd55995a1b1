"""Networks and the folders they live in: build from a config, save and load as denoisers."""

from __future__ import annotations

from logsnr.models.base import Network, NetworkConfig
from logsnr.models.card import load_denoiser, save_denoiser
from logsnr.models.dit import DiT, DiTConfig
from logsnr.models.networks import NETWORKS, build_network
from logsnr.models.unet import UNet, UNetConfig
from logsnr.models.uvit import UViT, UViTConfig

__all__ = [
    "NETWORKS",
    "DiT",
    "DiTConfig",
    "Network",
    "NetworkConfig",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
    "build_network",
    "load_denoiser",
    "save_denoiser",
]
