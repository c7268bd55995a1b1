"""Errors of learned and ideal denoisers along trajectories (2306.04848, sec. 3 and 6), with the same pairing.

    python benchmarks/papers/ge_errors.py --data fashion_mnist.npz

    noise norm      ||eps|| / sqrt n along DDIM: near 1, says the paper, for a learned denoiser all the way down
    noise error     ||eps_hat - eps|| / sqrt n on held-out images with fresh noise
    relative error  ||x0_hat - proj_K(x)|| / dist_K(x) at the state before the step, K the training images

The learned denoiser and the ideal one (the posterior mean over K) each run their own DDIM of 50 steps from the same
noises; the relative error is measured on the states of each. The paper's released code pairs projection and estimate of
different states, which inflates its curve (docs/results/ideal-denoiser.md has both); its envelope on CIFAR-10 is .09.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from runner import in_range, model_of, parsed, parser, table, write
from torch import Tensor

from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.exact import PointCloud
from logsnr.files import replace_file
from logsnr.projection import Points
from logsnr.sampling.grids import timesteps
from logsnr.sampling.table import table_of
from logsnr.training import load_data
from logsnr.training.config import DataConfig

NAME, TITLE = "ge-errors", "Learned and ideal denoisers as projections"
STEPS = 50


@torch.no_grad()
def along(model: Denoiser, points: Points, levels: Sequence[float], y: Tensor) -> dict[str, list[list[float]]]:
    """Each ratio at every step of DDIM, `[steps, samples]`: noise norm, relative error, sigma sqrt(n) / distance."""
    out: dict[str, list[list[float]]] = {"norm": [], "eta": [], "ratio": []}
    n = y[0].numel()
    for sigma, following in pairwise(levels):
        found = points.softmin(y.flatten(1), sigma)
        nearest, distance = points.points[found.index], found.squared.sqrt()
        estimate = model(y / math.hypot(1, sigma), sigma)
        x0 = y - sigma * estimate.eps
        out["norm"].append((estimate.eps.flatten(1).norm(dim=1) / math.sqrt(n)).tolist())
        out["eta"].append(((x0.flatten(1) - nearest).norm(dim=1) / distance).tolist())
        out["ratio"].append((sigma * math.sqrt(n) / distance).tolist())
        y = y + (following - sigma) * estimate.eps
    return out


@torch.no_grad()
def on_images(model: Denoiser, x: Tensor, levels: Sequence[float], seed: int) -> list[list[float]]:
    """||eps_hat - eps|| / sqrt n of held-out images, one noise for all levels, `[levels, images]`."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    out = []
    for sigma in levels:
        estimate = model((x + sigma * eps) / math.hypot(1, sigma), sigma)
        out.append(((estimate.eps - eps).flatten(1).norm(dim=1) / math.sqrt(x[0].numel())).tolist())
    return out


def measured(model: NetworkDenoiser, options: argparse.Namespace) -> dict[str, Any]:
    """All curves of one seed, kept in --work."""
    data = load_data(DataConfig(source=str(options.data)))
    images = data.train_images[: options.n if options.smoke else None]
    points = in_range(options.model, model, images)
    held_out = in_range(options.model, model, data.test_images[: options.n])
    known = Points(points.flatten(1))
    ideal = PointCloud(points.flatten(1))
    levels = timesteps(5 if options.smoke else STEPS, table_of(model), last="min")
    shown = levels[:-1]
    out: dict[str, Any] = {"sigma": list(shown), "points": len(points), "seeds": {}}
    for seed in options.seeds:
        file = options.work / f"{NAME}-{options.model}-{seed}{'-smoke' if options.smoke else ''}.json"
        if not file.exists():
            generator = torch.Generator().manual_seed(seed)
            y = torch.randn(options.n, *model.shape, generator=generator) * math.hypot(1, levels[0])
            flat = _Flat(ideal)
            found = {
                "learned": along(model, known, levels, y),
                "ideal": along(flat, known, levels, y),
                "noise error": {
                    "learned": on_images(model, held_out, shown, seed),
                    "ideal": on_images(flat, held_out, shown, seed),
                },
            }
            replace_file(file, json.dumps(found).encode())
            print(f"seed {seed}: done", flush=True)
        out["seeds"][seed] = json.loads(file.read_text())
    return out


class _Flat(Denoiser):
    """A point cloud's denoiser of vectors, on images."""

    def __init__(self, cloud: PointCloud) -> None:
        super().__init__()
        self.cloud = cloud

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Any:
        found = self.cloud(z.flatten(1), sigma)
        return type(found)(*(part.view_as(z) for part in (found.x0, found.eps)))


def gathered(found: dict[str, Any], pick: Any) -> Tensor:
    """A curve of all seeds, `[levels, seeds * samples]`."""
    return torch.cat([torch.tensor(pick(one)) for one in found["seeds"].values()], 1).double()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(parser(__doc__, (), 200, 1), arguments)
    if options.data is None:
        raise SystemExit("give --data, the training images: they are K")
    model = model_of(options)
    found = measured(model, options)
    curves = {(who, what): gathered(found, lambda s, w=who, k=what: s[w][k])
              for who in ("learned", "ideal") for what in ("norm", "eta", "ratio")}  # fmt: skip
    errors = {who: gathered(found, lambda s, w=who: s["noise error"][w]) for who in ("learned", "ideal")}
    every = max(1, len(found["sigma"]) // 12)
    rows = []
    for i in range(0, len(found["sigma"]), every):
        row = [f"{found['sigma'][i]:.3g}"]
        for who in ("learned", "ideal"):
            row += [f"{curves[who, 'norm'][i].mean():.3f}", f"{errors[who][i].mean():.3f}"]
            row += [f"{curves[who, 'eta'][i].median():.3f} ({curves[who, 'eta'][i].quantile(0.99):.3f})"]
        rows.append(row)
    head = [
        "sigma",
        *(f"{who}: {w}" for who in ("learned", "ideal") for w in ("noise norm", "noise error", "eta (99 %)")),
    ]
    worst = {who: float(curves[who, "eta"].quantile(0.99, dim=1).max()) for who in ("learned", "ideal")}
    text = (
        f"{options.model}, {options.n} trajectories at {len(options.seeds)} seeds, K: {found['points']} images of "
        f"training, DDIM of {len(found['sigma'])} steps; noise error on {options.n} held-out images.\n\n"
        f"{table(head, rows)}\n\nEnvelope of eta (99 % of trajectories): learned {worst['learned']:.3g}, "
        f"ideal {worst['ideal']:.3g}."
    )
    means = {f"{who} {what}": one for (who, what), one in curves.items()}
    means |= {f"{who} noise error": one for who, one in errors.items()}
    values = {"sigma": found["sigma"], "envelope": worst}
    values |= {name: [float(f"{v:.4g}") for v in one.mean(1)] for name, one in means.items()}
    write(NAME, TITLE, text, values, options)


if __name__ == "__main__":
    main()
