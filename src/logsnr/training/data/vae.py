"""VAEs: images to latents and back, for sets that are encoded before a training.

    posterior N(m, d^2) of an image      x ~ N((m - shift) scale, (d scale)^2)          image = VAE(x/scale + shift)

x is what a network denoises; shift and scale are the VAE's own (`shift_factor`, `scaling_factor`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, one_line, require
from logsnr.paths import expanded
from logsnr.pixels import Pixels

KINDS = ("AutoencoderKL", "AutoencoderTiny")
"""Classes of diffusers that are read."""


class VAE:
    """An `AutoencoderKL` or `AutoencoderTiny` of diffusers, in float32.

    Args:
        folder: with its config.json and weights; of a pipeline, the sub-folder vae is taken.
        device: where it runs.

    Raises:
        LogsnrError: if there is none, or one of another class.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        path = expanded(folder)
        path = path / "vae" if (path / "vae" / "config.json").is_file() else path
        if not (path / "config.json").is_file():
            raise LogsnrError(f"{folder} holds no VAE (no config.json): give the folder of one, or of a pipeline")
        try:
            name = json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name")
        except (ValueError, AttributeError) as error:
            raise LogsnrError(f"{path / 'config.json'} is damaged ({one_line(error)}): copy it again") from error
        if name not in KINDS:
            raise LogsnrError(f"{path} holds {name}: VAEs that are read are {' and '.join(KINDS)}")
        kind = getattr(require("diffusers", extra="diffusers", purpose="a VAE"), name)
        try:
            self.network = kind.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
        except Exception as error:
            raise LogsnrError(f"the VAE in {path} cannot be read ({one_line(error)}): copy it again") from error
        self.network = self.network.eval().requires_grad_(False).to(device)
        config = self.network.config
        self.name = path.parent.name if path.name == "vae" else path.name
        self.scale, self.shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        self.channels = int(config.in_channels)
        self.stochastic = name == "AutoencoderKL"

    @property
    def identity(self) -> str:
        """sha256 of its config and weights."""
        digest = hashlib.sha256(f"{self.scale} {self.shift}".encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def shape(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """Of the latents of images (C, H, W).

        Raises:
            LogsnrError: if it does not take such images.
        """
        if image[0] != self.channels:
            raise LogsnrError(f"images have {image[0]} channels, the VAE takes {self.channels}: see --channels")
        _, _, *sides = self.moments(torch.zeros(1, *image, dtype=torch.uint8))[0].shape
        factor = image[1] // sides[0] or 1
        if [factor * side for side in sides] != [*image[1:]]:
            raise LogsnrError(f"images of {image[1]} x {image[2]} are no multiple of {factor}: give another --size")
        return (int(self.network.config.latent_channels), *sides)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x, `[B, C, H, W]` on the CPU, of stored images (uint8)."""
        answer = self.network.encode(Pixels().encode(images).to(self.network.device))
        if not self.stochastic:
            mean = (answer.latents - self.shift) * self.scale
            return mean.cpu(), torch.zeros_like(mean).cpu()
        posterior = answer.latent_dist
        return ((posterior.mean - self.shift) * self.scale).cpu(), (posterior.std * self.scale).cpu()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Stored images (uint8) of latents."""
        latents: Any = (x / self.scale + self.shift).to(self.network.device, torch.float32)
        return Pixels().decode(self.network.decode(latents, return_dict=False)[0])
