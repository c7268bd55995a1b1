"""The universal plans: fitted over a family of models, and what a model loses by not being asked.

    python benchmarks/universal.py fit zoo:digits zoo:fashion-mnist      re-makes src/logsnr/sampling/universal.json
    python benchmarks/universal.py judge zoo:digits zoo:fashion-mnist    leave-one-out regret, ratios to stock solvers

The family: exact mixtures of 8, 16 and 48 dimensions, every sixth of the digits smoothed by a Gaussian kernel (an exact
denoiser of real images), and the networks named on the command line, their classes in turn.  Two ranges are fitted:
"wide" for models whose levels go on to 40 sigma_data or more, "narrow" for those that end at 14 (Stable Diffusion's
tables end at 14.6).  A plan's first level is each model's own largest.

`judge` fits each plan once more without the model that it is judged on (all networks of one data set, and its kernel,
are left out together), and prints its RMSE over that of the model's own calibrated plan (regret; a zoo model's is the
one it comes with), and over GE(2), DPM++(2M) and UniPC-2, each on the better of a log-linear and a Karras grid over the
model's sampling range.
Both commands keep what is done in --work and go on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr import exact
from logsnr.calibration import calibrate
from logsnr.calibration.descent import mean_square
from logsnr.calibration.rows import lengthened
from logsnr.calibration.universal import Member, fit_universal, member, relative_start
from logsnr.denoiser import Denoiser, Estimate
from logsnr.load import load, load_plans
from logsnr.noise import alpha_s
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.universal import FORMAT, scaled

OUT = Path(__file__).parents[1] / "src/logsnr/sampling/universal.json"
RANGES = {"wide": 80.0, "narrow": 14.0}
HISTORY = 2
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
        self.sigma_data = math.hypot(self.cloud.sigma_data, width)
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


def mixture(d: int, k: int, seed: int, spread: float, floor: float, decay: float = 0.0) -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1) ** (-decay / 2)
    means = torch.randn(k, d, generator=g) * scale
    factors = torch.randn(k, d, d, generator=g) * (spread / math.sqrt(d)) * scale[:, None]
    return exact.GaussianMixture(torch.ones(k) / k, means, factors @ factors.mT + floor**2 * torch.eye(d))


Family = dict[str, tuple[str, Denoiser, Mapping[str, Any] | None]]
"""Name -> (group that is left out together, model, conditions)."""


def family(runs: list[str], span: str) -> Family:
    from sklearn.datasets import load_digits

    digits = (torch.tensor(load_digits().images, dtype=torch.float32)[:, None] + 0.5) / 17 * 2 - 1
    models: Family = {
        "mixture 8d": ("8d", mixture(8, 6, 11, 0.4, 0.1), None),
        "mixture 16d": ("16d", mixture(16, 8, 12, 0.5, 0.1), None),
        "mixture 48d": ("48d", mixture(48, 10, 13, 0.7, 0.05, 1.0), None),
        "digits, kernel": ("digits", Smoothed(digits[::6], 0.25), None),
    }
    for run in runs:
        denoiser, name = load(run), network(run)
        classes = denoiser.card.get("classes")
        cond = {"class_labels": torch.arange(classes)} if classes else None
        models[name] = (name.split()[1].split("-")[0], denoiser, cond)
    if span == "narrow":
        models = {name: (group, Narrow(d), cond) for name, (group, d, cond) in models.items()}
    return models


def network(run: str) -> str:
    return f"network {Path(run.removeprefix('zoo:')).name}"


def split(plan: Plan, n: int, rank: int) -> Plan:
    """The plan with levels put into its largest gaps until it has n; the first into the gap of that rank."""
    while plan.nfe < n:
        levels = plan.sigmas[:-1]
        gaps = [math.log(a / b) for a, b in itertools.pairwise(levels)]
        i = sorted(range(len(gaps)), key=lambda i: -gaps[i])[min(rank, len(gaps) - 1)] + 1
        middle, rank = math.sqrt(levels[i - 1] * levels[i]), 0
        plan = Plan((*levels[:i], middle, *levels[i:], 0.0), (*plan.rows[:i], (1.6, -0.6), *plan.rows[i:]))
    return lengthened(plan, HISTORY)


def starts(members: list[Member], n: int, high: float, shorter: Plan | None) -> list[Plan]:
    """The best of a few evenly spread grids on fit noise, and of a shorter plan with a level put into a large gap."""
    tries = [
        relative_start(spread(n, high, last)[:-1], 1.6, HISTORY)
        for spread in (grids.log_linear, grids.karras, grids.flow_range)
        for last in (0.1, 0.2, 0.35)
    ]
    if shorter is not None:
        tries += [split(shorter, n, first) for first in range(3)]

    def total(plan: Plan) -> float:
        return sum(math.log(max(m.error(plan, m.fit.first(16)), 1e-30)) for m in members)

    return sorted(tries, key=total)[:1]


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
        everyone = list(members.values())
        keys = [f"{span} {n - less} without {without}" for less in (1, 2)]
        shorter = next((Plan.from_dict(work.known[key]) for key in keys if key in work.known), None)
        high = RANGES[span]
        found = fit_universal(everyone, starts(everyone, n, high, shorter), low=1 / 250, high=high)
        meta = {"range": span, "models": list(members), "batch": batch}
        return Plan(found.plan.sigmas, found.plan.rows, found.plan.basis, None, meta).to_dict()

    return Plan.from_dict(work.recall(f"{span} {n} without {without}", make))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "judge"))
    parser.add_argument("runs", nargs="*", help="folders of runs, or zoo:NAME")
    parser.add_argument("--nfe", default="3,4,5,6,7,8,9,10")
    parser.add_argument("--ranges", default="wide,narrow")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--only", nargs="+", help="judge these groups only: 8d, 16d, 48d, digits, fashion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/universal.json"))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options.work)
    plans: dict[str, dict[str, Any]] = {}
    for span in options.ranges.split(","):
        models = family(options.runs, span)
        members = {
            name: member(denoiser, cond=cond, batch=options.batch, seed=options.seed)
            for name, (_, denoiser, cond) in models.items()
        }
        for n in map(int, options.nfe.split(",")):
            if options.command == "fit":
                plan = fitted(work, members, span, n, None, options.batch)
                plans.setdefault(span, {})[str(n)] = plan.to_dict()
                options.out.write_text(json.dumps({"format": FORMAT, "plans": plans}, indent=1) + "\n")
            else:
                judge(work, models, members, span, n, options)


def judge(
    work: Work, models: Family, members: dict[str, Member], span: str, n: int, options: argparse.Namespace
) -> None:
    """Print regret and ratios of every model (or those of --only), and their geometric means."""
    table, batch = [], options.batch
    shipped = {network(run): load_plans(run) for run in options.runs if run.startswith("zoo:") and span == "wide"}
    for name, (group, denoiser, cond) in models.items():
        if options.only and group not in options.only:
            continue
        rest = {other: members[other] for other in models if models[other][0] != group}
        plan = scaled(fitted(work, rest, span, n, group, batch), denoiser.sigma_data, *denoiser.sampling_range)
        low, high = denoiser.sampling_range
        judged = members[name].select

        def error(plan: Plan, denoiser: Denoiser = denoiser, judged: Any = judged) -> float:
            return math.sqrt(mean_square(denoiser, plan, judged, 512, None))

        def own(denoiser: Denoiser = denoiser, cond: Any = cond) -> dict[str, Any]:
            return calibrate(denoiser, n, batch=96, seed=1, cond=cond).to_dict()

        plans = shipped.get(name, {})
        best = error(plans[n] if n in plans else Plan.from_dict(work.recall(f"own {span} {n} {name}", own)))
        spacings = (grids.log_linear, grids.karras)
        peers = [min(error(solve(grid(n, high, low))) for grid in spacings) for solve in PEERS.values()]
        mine = error(plan)
        table.append([mine / best, *(mine / peer for peer in peers)])
        print(f"{span:7} {n:2} {name:16} {mine:8.4f} " + " ".join(f"{v:6.3f}" for v in table[-1]), flush=True)
    means = [math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*table, strict=True)]
    print(f"{span:7} {n:2} {'geometric mean':25} " + " ".join(f"{v:6.3f}" for v in means))
    print(f"  columns: RMSE, over the model's own plan, over {', over '.join(PEERS)}")
    work.recall(f"judged {span} {n} {options.only or ''}", lambda: dict(zip(("own", *PEERS), means, strict=True)))


if __name__ == "__main__":
    main()
