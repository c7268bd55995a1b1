"""The universal plans: fitted over a family of models, and what a model loses by not being asked.

    MODELS="zoo:digits zoo:fashion-mnist zoo:fashion-mnist-classes --images fashion_mnist.npz cifar10.npz"
    python benchmarks/universal.py fit $MODELS      re-makes src/logsnr/sampling/universal.json
    python benchmarks/universal.py judge $MODELS    leave-one-out regret, ratios to stock solvers

The family is of images: every sixth of the digits smoothed by a Gaussian kernel (an exact denoiser of real images),
one Gaussian per class of the images named on the command line (the exact denoiser of their first two moments), a
Gaussian field of 12,288 numbers (the larger images are, the higher their coarse structure lies above the noise), and
the networks named there, their classes in turn.  Two ranges are fitted: "wide" for models whose levels go on to 40
sigma_data or more, "narrow" for those that end at 14 (Stable Diffusion's tables end at 14.6).

`judge` fits each plan once more without the model that it is judged on (all models of one data set, by the first word
of their names, are left out together), and compares: with the model's own calibrated plan (regret; a zoo model's is the
one it comes with), and with GE(2), DPM++(2M) and UniPC-2, each on the better of a log-linear and a Karras grid over the
model's sampling range.  Exact mixtures of 8, 16 and 48 dimensions are judged too, and take part in no fit: where a
small mixture decides, and how late, is no guide to images.  It writes docs/results/universal.md.
Both commands keep what is done in --work and go on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
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
from logsnr.calibration import calibrate
from logsnr.calibration.rollout import mean_square
from logsnr.calibration.teacher import taught
from logsnr.calibration.universal import Member, fit_universal, member, nodes
from logsnr.denoiser import Denoiser, Estimate
from logsnr.errors import LogsnrError
from logsnr.loading import load, load_plans
from logsnr.noise import alpha_s
from logsnr.pixels import Pixels
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.batches import in_turn
from logsnr.sampling.start import start
from logsnr.sampling.teacher import teacher_plan
from logsnr.sampling.universal import FORMAT, WIDE, scaled
from logsnr.training import Dataset, load_data
from logsnr.training.config import DataConfig

PLANS = Path(__file__).parents[1] / "src/logsnr/sampling/universal.json"
RESULTS = Path(__file__).parents[1] / "docs/results"
RANGES = {"wide": 80.0, "narrow": 14.0}
JUDGED = 128
"""Noises to judge by."""
OWN = (4, 5, 6, 8, 10)
"""Numbers of evaluations at which models have plans of their own."""
MACHINE = f"{platform.machine()}, cpu"
PEERS: dict[str, Callable[[tuple[float, ...]], Plan]] = {
    "GE(2)": solvers.ge,
    "DPM++(2M)": solvers.dpmpp,
    "UniPC-2": solvers.unipc,
}


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


def mixture(d: int, k: int, seed: int, spread: float, floor: float, decay: float = 0.0) -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1) ** (-decay / 2)
    means = torch.randn(k, d, generator=g) * scale
    factors = torch.randn(k, d, d, generator=g) * (spread / math.sqrt(d)) * scale[:, None]
    return exact.GaussianMixture(torch.ones(k) / k, means, factors @ factors.mT + floor**2 * torch.eye(d))


@dataclass(frozen=True)
class Model:
    """A model, its conditions, the group that is left out with it, and whether plans are fitted to it."""

    denoiser: Denoiser
    group: str
    cond: Mapping[str, Any] | None = None
    fitted: bool = True


def family(runs: list[str], images: list[Path], span: str) -> dict[str, Model]:
    """All models by name.

    sigma_data is the standard deviation of all pixels for every model of images, as for the networks (and EDM's).
    """
    from sklearn.datasets import load_digits

    digits = (torch.tensor(load_digits().images, dtype=torch.float32)[:, None] + 0.5) / 17 * 2 - 1
    models = {
        "mixture 8d": Model(mixture(8, 6, 11, 0.4, 0.1), "8d", fitted=False),
        "mixture 16d": Model(mixture(16, 8, 12, 0.5, 0.1), "16d", fitted=False),
        "mixture 48d": Model(mixture(48, 10, 13, 0.7, 0.05, 1.0), "48d", fitted=False),
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
    if span == "narrow":
        models = {name: replace(one, denoiser=Narrow(one.denoiser)) for name, one in models.items()}
    return models


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


def fitted(work: Work, members: dict[str, Member], span: str, n: int, without: str | None, batch: int) -> Plan:
    """The plan of relative levels, remembered."""

    def make() -> dict[str, Any]:
        found = fit_universal(list(members.values()), n, high=RANGES[span])
        meta = {"range": span, "models": list(members), "batch": batch}
        return replace(found.plan, meta=meta).to_dict()

    return Plan.from_dict(work.recall(f"{span} {n} without {without}", make))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "judge"))
    parser.add_argument("runs", nargs="*", help="folders of runs, or zoo:NAME")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help=".npz files of labelled images")
    parser.add_argument("--nfe", default="3,4,5,6,7,8,9,10,11,12")
    parser.add_argument("--ranges", default="wide,narrow")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--only", nargs="+", help="judge these groups only, such as digits, fashion, 8d")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/universal.json"))
    parser.add_argument("--out", type=Path, help=f"of fit {PLANS.name}, of judge a folder for universal.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options.work)
    sizes, found = list(map(int, options.nfe.split(","))), {}
    for span in options.ranges.split(","):
        models = family(options.runs, options.images, span)
        lattice = nodes(min(RANGES[span], WIDE))
        members = {
            name: member(one.denoiser, lattice, cond=one.cond, batch=options.batch, seed=options.seed)
            for name, one in models.items()
            if one.fitted
        }
        if options.command == "fit":
            plans = {str(n): fitted(work, members, span, n, None, options.batch).to_dict() for n in sizes}
            found[span] = plans
        else:
            for name, one in models.items():
                if not options.only or one.group in options.only:
                    for n in sizes:
                        judge(work, models, members, span, n, name, options)
    if options.command == "fit":
        out = options.out or PLANS
        out.write_text(json.dumps({"format": FORMAT, "plans": found}, indent=1) + "\n")
    else:
        write(work, options.out or RESULTS, vars(options))


def judge(
    work: Work,
    models: dict[str, Model],
    members: dict[str, Member],
    span: str,
    n: int,
    name: str,
    options: argparse.Namespace,
) -> None:
    """RMSE of one model on noise that no fit has seen, with the plan of the others and with what it competes with."""
    one = models[name]
    (low, high), denoiser = one.denoiser.sampling_range, one.denoiser
    rest = {other: members[other] for other in members if models[other].group != one.group}
    without = None if len(rest) == len(members) else one.group
    plan = scaled(fitted(work, rest, span, n, without, options.batch), denoiser.sigma_data, low, high)
    shipped = load_plans(name.removeprefix("network ")) if span == "wide" and name.startswith("network zoo:") else {}

    def make() -> dict[str, Any]:
        noise = start(denoiser, None, JUDGED, torch.Generator().manual_seed(10**6 + options.seed))
        cond = in_turn(one.cond, torch.arange(JUDGED))
        batch = taught(denoiser, teacher_plan(96, low, high), noise, cond, chunk=512)

        def rmse(plan: Plan) -> float:
            return math.sqrt(mean_square(denoiser, plan, batch, 512, None))

        own = shipped[n] if n in shipped else calibrate(denoiser, n, seed=1, cond=one.cond) if n in OWN else None
        spacings = (grids.log_linear, grids.karras)
        return {
            "rmse": rmse(plan),
            "own": None if own is None else rmse(own),
            **{peer: min(rmse(solve(grid(n, high, low))) for grid in spacings) for peer, solve in PEERS.items()},
        }

    row = work.recall(f"judged {span} {n} {name}", make)
    print(f"{span} {n} {name}: {row}", flush=True)


def write(work: Work, out: Path, settings: dict[str, Any]) -> None:
    """All that was judged, as JSON and as tables of ratios with their geometric means."""
    rows = []
    for key, row in work.known.items():
        if key.startswith("judged "):
            _, span, n, name = key.split(" ", 3)
            rows.append({"range": span, "nfe": int(n), "model": name, **row})
    rows.sort(key=lambda row: (row["range"] != "wide", row["model"], row["nfe"]))
    out.mkdir(parents=True, exist_ok=True)
    about = {key: settings[key] for key in ("seed", "batch", "threads")} | {"judged": JUDGED, "machine": MACHINE}
    (out / "universal.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    columns = ("own", *PEERS)
    text = f"""# Universal plans on models that they were not fitted to

Each row: the plan of n evaluations, fitted once more without the model and all others of its data; its RMSE to the
teacher on {JUDGED} noises that no fit has seen; that over the RMSE of the model's own calibrated plan (regret), and
over three solvers, each on the better of a log-linear and a Karras grid over the model's range, chosen on the same
noise. The mixtures take part in no fit. Seed {settings["seed"]}; machine: {MACHINE}. Made by `benchmarks/universal.py`.
"""
    for span in RANGES:
        chosen = [row for row in rows if row["range"] == span]
        sizes = sorted({row["nfe"] for row in chosen})
        if not chosen:
            continue
        text += f"\n## {span.capitalize()} ranges\n\n| model | evaluations | RMSE | over its own plan | "
        text += " | ".join(f"over {peer}" for peer in PEERS) + " |\n|" + " --- |" * (4 + len(PEERS)) + "\n"
        for row in chosen:
            values = (f"{row['rmse'] / row[c]:.2f}" if row[c] else "" for c in columns)
            text += f"| {row['model']} | {row['nfe']} | {row['rmse']:.4f} | " + " | ".join(values) + " |\n"
        for kind in ("network", "mixture"):
            for n in sizes:
                some = [row for row in chosen if row["nfe"] == n and row["model"].startswith(kind)]
                if some:
                    values = (mean([row["rmse"] / row[c] for row in some if row[c]]) for c in columns)
                    text += f"| geometric mean, {kind}s | {n} | | " + " | ".join(values) + " |\n"
    (out / "universal.md").write_text(text)


def mean(ratios: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}" if ratios else ""


if __name__ == "__main__":
    main()
