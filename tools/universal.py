"""The universal plans: fitted over a family of models.

    MODELS="zoo:digits zoo:fashion-mnist zoo:fashion-mnist-classes --images fashion_mnist.npz cifar10.npz"
    python tools/universal.py $MODELS               re-makes src/logsnr/sampling/universal.json

The family is of images: every sixth of the digits smoothed by a Gaussian kernel (an exact denoiser of real images),
one Gaussian per class of the images named on the command line (the exact denoiser of their first two moments), a
Gaussian field of 12,288 numbers (the larger images are, the higher their coarse structure lies above the noise), and
the networks named there, their classes in turn.  Two ranges are fitted: "wide" for models whose levels go on to 40
sigma_data or more, "narrow" for those that end at 14 (Stable Diffusion's tables end at 14.6).

What is done is kept in --work, and gone on from.  What a model loses by not being asked: benchmarks/universal.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from logsnr import exact
from logsnr.calibration.universal import Member, fit_universal, member, nodes
from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import LogsnrError
from logsnr.loading import load
from logsnr.noise import alpha_s
from logsnr.pixels import Pixels
from logsnr.sampling import Plan
from logsnr.sampling.universal import FORMAT, WIDE
from logsnr.training import Dataset, load_data
from logsnr.training.config import DataConfig

PLANS = Path(__file__).parents[1] / "src/logsnr/sampling/universal.json"
RANGES = {"wide": 80.0, "narrow": 14.0}


class Smoothed(Denoiser):
    """Points convolved with N(0, h^2): x0 = y + sigma^2/(sigma^2 + h^2) (D(y, sqrt(sigma^2 + h^2)) - y)."""

    def __init__(self, points: Tensor, width: float) -> None:
        super().__init__()
        self.cloud, self.width, self.shape = exact.PointCloud(points), width, tuple(points.shape[1:])
        self.sigma_data = math.hypot(float(points.std()), width)
        self.trained_range = self.cloud.trained_range

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        level = float(sigma)
        wide = math.hypot(level, self.width)
        y = z / alpha_s(level)[0]
        nearest = self.cloud(y * alpha_s(wide)[0], wide).x0
        return Estimate(y + (level / wide) ** 2 * (nearest - y), lambda: (y - nearest) * (level / wide**2))


class Narrow(Denoiser):
    """A model whose levels end at 14 sigma_data."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.shape, self.sigma_data = inner, inner.shape, inner.sigma_data
        low, high = inner.sampling_range
        self.trained_range = low, min(high, RANGES["narrow"] * inner.sigma_data)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        estimate: Estimate = self.inner(z, sigma, **cond)
        return estimate


class Field(Denoiser):
    """A Gaussian of independent directions, the i-th of variance 1/i: the spectrum 1/f^2 of images, of any size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        variances = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
        self.variances = (variances / variances.mean()).float()
        self.shape, self.sigma_data, self.trained_range = (dim,), 1.0, (0.002, 160.0)

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(float(sigma))
        seen = z / (alpha**2 * self.variances + s**2)
        return Estimate(alpha * self.variances * seen, s * seen)


@dataclass(frozen=True)
class Model:
    """A model, its conditions, and the group of models of the same data."""

    denoiser: Denoiser
    group: str
    cond: Mapping[str, Any] | None = None


def family(runs: list[str], images: list[Path], span: str) -> dict[str, Model]:
    """All models by name.

    sigma_data is the standard deviation of all pixels for every model of images, as for the networks (and EDM's).
    """
    from sklearn.datasets import load_digits

    digits = (torch.tensor(load_digits().images, dtype=torch.float32)[:, None] + 0.5) / 17 * 2 - 1
    models = {
        "field 12288d": Model(Field(3 * 64 * 64), "field"),
        "kernel digits": Model(Smoothed(digits[::6], 0.25), "digits"),
    }
    for run in runs:
        denoiser = load(run)
        classes = denoiser.card.get("classes")
        cond = {"class_labels": torch.arange(classes)} if classes else None
        models[f"network {run}"] = Model(denoiser, group(run.removeprefix("zoo:")), cond)
    for path in images:
        data = load_data(DataConfig(source=str(path)))
        if data.train_labels is None:
            raise LogsnrError(
                f"--images {path}: it has no labels to part the images by; give an .npz with train_labels"
            )
        models[f"Gaussians {path.stem}"] = Model(class_gaussians(data, data.train_labels), group(path.stem))
    return in_range(models, span)


def in_range(models: dict[str, Model], span: str) -> dict[str, Model]:
    """The models, cut to the levels of a range."""
    if span == "narrow":
        return {name: replace(one, denoiser=Narrow(one.denoiser)) for name, one in models.items()}
    return models


def members_of(models: dict[str, Model], span: str, n: int, seed: int) -> dict[str, Member]:
    """The models with n noises to fit to, n to select by, and their trajectories."""
    lattice = nodes(min(RANGES[span], WIDE))
    return {name: member(one.denoiser, lattice, cond=one.cond, n=n, seed=seed) for name, one in models.items()}


def group(name: str) -> str:
    """What data a run or file is of: the first word of its name."""
    return re.split("[-_ ]", Path(name).stem)[0]


def class_gaussians(data: Dataset, labels: Tensor, most: int = 1000) -> exact.GaussianMixture:
    """One Gaussian per class of the images, at most 20,000 of them, halved in size until they have `most` numbers."""
    x, labels = Pixels(data.grey_levels).encode(data.train_images[:20_000]), labels[:20_000]
    while x[0].numel() > most:
        x = avg_pool2d(x, 2)
    x = x.flatten(1).double()
    means = torch.stack([x[labels == c].mean(0) for c in range(data.classes)])
    covs = torch.stack([torch.cov(x[labels == c].T) for c in range(data.classes)])
    covs += 1e-4 * torch.eye(x.shape[1], dtype=x.dtype)  # more directions than images would be flat
    model = exact.GaussianMixture(torch.full((data.classes,), 1 / data.classes), means.float(), covs.float())
    model.sigma_data = float(x.std())
    return model


class Work:
    """Results by name, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def recall(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.known:
            began = time.perf_counter()
            self.known[name] = make()
            self.path.write_text(json.dumps(self.known))
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return self.known[name]


def fitted(work: Work, members: dict[str, Member], span: str, nfe: int, without: str | None = None) -> Plan:
    """The plan of relative levels, remembered."""

    def make() -> dict[str, Any]:
        found = fit_universal(list(members.values()), nfe, high=RANGES[span])
        noises = {len(one.fit) for one in members.values()}
        return replace(found.plan, meta={"range": span, "models": list(members), "n": max(noises)}).to_dict()

    return Plan.from_dict(work.recall(f"{span} {nfe} without {without}", make))


def command_line(about: str | None) -> argparse.ArgumentParser:
    """What fitting and judging have in common."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs, or zoo:NAME")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help=".npz files of labelled images")
    parser.add_argument("--nfe", default="3,4,5,6,7,8,9,10,11,12")
    parser.add_argument("--ranges", default="wide,narrow")
    parser.add_argument("-n", "--number", type=int, default=48, help="noises to fit to, and as many to select by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/universal.json"))
    return parser


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, default=PLANS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, found = Work(options.work), {}
    for span in options.ranges.split(","):
        models = family(options.runs, options.images, span)
        members = members_of(models, span, options.number, options.seed)
        found[span] = {nfe: fitted(work, members, span, int(nfe)).to_dict() for nfe in options.nfe.split(",")}
    options.out.write_text(json.dumps({"format": FORMAT, "plans": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
