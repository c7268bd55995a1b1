"""The figures of docs/coordinate.md, drawn by the library itself.

python tools/figures.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

import logsnr as ls
from logsnr.denoiser import noisy
from logsnr.images import tile
from logsnr.noise import alpha_s
from logsnr.report.style import COLOURS, FAINT, LOGSNR, drawn, encoded
from logsnr.training.config import DataConfig
from logsnr.training.data import load_data

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
LEVELS = (20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05)
RANGES = {
    "Stable Diffusion's table": (-5.4, 7.1),
    "DDPM's table": (-10.1, 9.2),
    "EDM, sigma .002 to 80": (-2 * math.log(80), -2 * math.log(0.002)),
    "VDM": (-5.0, 13.3),
    "flow times .001 to .999": (-2 * math.log(999), 2 * math.log(999)),
}
OBJECTIVES = ("ddpm", "edm", "flow", "sd3", "vdm++/sigmoid")


def coordinate(figure: Any) -> None:
    """The weights of signal and noise, and the ranges that are in use."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = torch.linspace(-15, 15, 301, dtype=torch.float64)
    alpha, s = torch.sigmoid(x).sqrt(), torch.sigmoid(-x).sqrt()
    upper.plot(x, alpha, color=COLOURS[0], label="alpha, of the image")
    upper.plot(x, s, color=COLOURS[1], label="s, of the noise")
    upper.set(ylabel="weight in z")
    upper.legend(loc="center right")
    for i, (name, (low, high)) in enumerate(RANGES.items()):
        lower.plot((low, high), (-i, -i), color=COLOURS[i], linewidth=4, solid_capstyle="butt")
        lower.text(low, -i + 0.28, name, fontsize=8)
    lower.set(xlabel=LOGSNR, ylim=(-len(RANGES) + 0.4, 0.6))
    lower.set_yticks([])
    upper.set_xlim(-15, 15)


def objectives(figure: Any) -> None:
    """The share of the loss at each level, of a denoiser that knows only the data's spread (.5)."""
    axes = figure.subplots()
    x = torch.linspace(-12, 14, 521, dtype=torch.float64)
    ceiling = torch.sigmoid(x + 2 * math.log(0.5))
    for name, colour in zip(OBJECTIVES, COLOURS, strict=True):
        weight = ls.objectives[name].weighting(x) * ceiling
        axes.plot(x, weight / torch.trapezoid(weight, x), color=colour, label=name)
    weight = ceiling
    axes.plot(x, weight / torch.trapezoid(weight, x), "--", color=FAINT, label="ELBO, w = 1")
    axes.set(xlabel=LOGSNR, ylabel="share of the loss")
    axes.legend()


def digits() -> Any:
    """A held-out digit at every level, and what zoo:digits makes of it."""
    denoiser = ls.load("zoo:digits")
    data = load_data(DataConfig(source="digits"))
    x, cond = denoiser.encode(data.test_images[:1]), {"class_labels": data.test_labels[:1]}
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows: list[list[torch.Tensor]] = [[], []]
    for sigma in LEVELS:
        z = noisy(x, eps, sigma)
        with torch.no_grad():
            estimate = denoiser(z, sigma, **cond)
        alpha, _ = alpha_s(sigma)
        spread = denoiser.sigma_data / (alpha**2 * denoiser.sigma_data**2 + 1 - alpha**2) ** 0.5
        for row, image in zip(rows, (z * spread, estimate.x0), strict=True):
            row.append(denoiser.pixels.display(denoiser.decode(image)))
    return tile(torch.cat([*rows[0], *rows[1]]), columns=len(LEVELS), scale=10, gap=6)


if __name__ == "__main__":
    (ASSETS / "coordinate.svg").write_bytes(encoded(drawn(coordinate, height=4.6, purpose="the figure"), "svg"))
    (ASSETS / "shares.svg").write_bytes(encoded(drawn(objectives, purpose="the figure"), "svg"))
    digits().save(ASSETS / "levels.png")
