"""Networks and the folders they live in: build from a config, save and load as denoisers."""

from __future__ import annotations

from logsnr.models.card import load_denoiser, save_denoiser
from logsnr.models.config import NetworkConfig
from logsnr.models.unet import UNet, build_network

__all__ = ["NetworkConfig", "UNet", "build_network", "load_denoiser", "save_denoiser"]
