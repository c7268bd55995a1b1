"""How good a projection is the ideal denoiser?  The experiment of 2306.04848, sec. 3, on whole data sets.

    python benchmarks/ideal_denoiser.py --fashion-mnist fashion_mnist.npz --cifar10 cifar10/ --trajectories 2000

K is the training set, the denoiser its posterior mean, and DDIM takes 50 steps of the DDPM table from pure noise.  At
every state x_t, *before* the step, it records ||x0 - proj_K(x_t)|| / dist_K(x_t), the relative error eta, and
sigma_t sqrt(n) / dist_K(x_t), how far the noise level is from the distance; beside them, what the released code of the
paper records, with projection and distance of the state *after* the step.  Numbers go to ideal-denoiser.json, the
figure to ideal-denoiser.svg in the output folder, after every chunk of trajectories.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.evaluation.error_model import consistency, relative_error, trajectory_error
from logsnr.evaluation.gamma import error_covariance
from logsnr.exact import PointCloud
from logsnr.projection import Points
from logsnr.sampling import Plan, grids, sample, solvers
from logsnr.sampling.counted import rmse
from logsnr.theory import grid_between
from logsnr.timesteps import TimestepTable

QUANTILES = (0.01, 0.5, 0.9, 0.99, 1.0)


def fashion_mnist(path: Path) -> Tensor:
    """Training images of the npz as `[60000, 784]` in [-1, 1]."""
    return _signed(torch.from_numpy(np.load(path)["train_images"]))


def cifar10(folder: Path) -> Tensor:
    """Training images of the 1600 x 1600 sheets as `[50000, 3072]` in [-1, 1]."""
    from PIL import Image

    out = []
    for path in sorted(folder.glob("train-*.webp")):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        out.append(sheet.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    return _signed(torch.from_numpy(np.concatenate(out)).permute(0, 3, 1, 2))


def _signed(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1).flatten(1).contiguous()


@torch.no_grad()
def trajectories(
    points: Points, sigmas: tuple[float, ...], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """`[steps, count]` of each ratio along DDIM from pure noise, projections at the state before and after the step."""
    n = points.shape[0]
    y = torch.randn(count, n, generator=generator) * math.hypot(1, sigmas[0])
    keys = ("eta", "ratio", "eta after", "ratio after")
    out: dict[str, list[Tensor]] = {key: [] for key in keys}
    x0 = torch.empty(0)
    for i, sigma in enumerate(sigmas):
        found = points.softmin(y, sigma)
        nearest, distance = points.points[found.index], found.squared.sqrt()
        if i:
            out["eta after"].append((x0 - nearest).norm(dim=1) / distance)
            out["ratio after"].append(sigmas[i - 1] * math.sqrt(n) / distance)
        if i == len(sigmas) - 1:
            break
        x0 = found.mean
        out["eta"].append((x0 - nearest).norm(dim=1) / distance)
        out["ratio"].append(sigma * math.sqrt(n) / distance)
        y = x0 + (sigmas[i + 1] / sigma) * (y - x0)
        print(f"\r  step {i + 1}/{len(sigmas) - 1}", end="", file=sys.stderr, flush=True)
    return {key: torch.stack(values) for key, values in out.items()}


def summary(sigmas: tuple[float, ...], ratios: dict[str, Tensor]) -> dict[str, Any]:
    """Quantiles over trajectories at every noise level, and the envelope."""
    out: dict[str, Any] = {"trajectories": ratios["eta"].shape[1], "sigma": [round(s, 6) for s in sigmas[:-1]]}
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    for key, values in ratios.items():
        table = values.double().quantile(levels, dim=1)
        out[key] = {
            f"q{q:g}": [float(f"{v:.6g}") for v in row] for q, row in zip(QUANTILES, table.tolist(), strict=True)
        }
        out[key]["mean"] = [float(f"{v:.6g}") for v in values.double().mean(1).tolist()]
    for name, key in (("envelope", "eta"), ("envelope as released", "eta after")):
        out[name] = {}
        for q in ("q0.99", "q1"):
            peak = max(range(len(sigmas) - 1), key=lambda i: out[key][q][i])
            out[name][q] = {"eta": out[key][q][peak], "sigma": out["sigma"][peak]}
    out["nu"] = max(max(out["ratio"]["q1"]), 1 / min(out["ratio"]["q0.01"]))
    return out


def few_steps(points: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """What the measured errors are good for: grids from eta(sigma), gammas from covariances, eta without a reference.

    On the ideal denoiser of `points`: end-point RMSE against a fine run from the same noise, and the share of
    trajectories that end at the same point.
    """
    cloud, high, low = PointCloud(points), 40.0, 0.1
    noise = torch.randn(64, points.shape[1], generator=generator)
    teacher = sample(cloud, solvers.ge(grids.log_linear(100, high, low), 1.5), noise=noise)

    def score(plan: Plan) -> dict[str, float]:
        x = sample(cloud, plan, noise=noise)
        same = float(((x - teacher).norm(dim=1) < 1e-2).double().mean())
        return {"rmse": round(rmse(x, teacher), 4), "same end": round(same, 3)}

    fine = solvers.ddim(grids.log_linear(40, high, low, last="min"))
    curve = trajectory_error(cloud, cloud.reference, fine, noise=noise)
    eta = [(sigma, max(value, 1e-3)) for sigma, value in curve.eta(0.9)]
    out: dict[str, Any] = {"points": len(points), "trajectories": len(noise), "grids": {}, "gammas": {}}
    for n in (5, 10, 20):
        measured, nu = grid_between(eta, n - 1, sigma_max=high, sigma_min=low)
        rows = {
            "log-linear": grids.log_linear(n, high, low),
            "karras": grids.karras(n, high, low),
            "from eta": (*measured, 0.0),
        }
        out["grids"][n] = {
            name: {f"ge {gamma:g}": score(solvers.ge(grid, gamma)) for gamma in (1.0, 1.5, 2.0)}
            for name, grid in rows.items()
        }
        out["grids"][n]["from eta"] |= {
            "sigmas": [round(s, 3) for s in measured],
            "nu": nu if math.isfinite(nu) else None,
        }
        grid = grids.log_linear(n, high, low)
        entry: dict[str, Any] = {}
        for name, target in (("to the teacher's end point", teacher), ("to the projection", cloud.reference)):
            gammas = [1.0] * (n - 2)
            for _ in range(3):  # errors of the run with these gammas ask for others; a few rounds settle
                found = error_covariance(cloud, target, solvers.ge(grid, gammas), noise=noise)
                gammas = [step.gamma for step in found][: n - 2]
            entry[name] = {"gamma": [round(g, 2) for g in gammas], **score(solvers.ge(grid, gammas))}
        trials = {g / 10: score(solvers.ge(grid, g / 10))["rmse"] for g in range(8, 28, 2)}
        best = min(trials, key=lambda g: trials[g])
        entry["best constant"] = {"gamma": best, **score(solvers.ge(grid, best))}
        out["gammas"][n] = entry
    levels = [0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0]
    x = points[torch.randint(len(points), (64,), generator=generator)]
    real = relative_error(cloud, cloud.reference, x, levels, generator=generator)
    own = consistency(cloud, x, levels, generator=generator)
    out["without a reference"] = [
        {"sigma": a.sigma, "eta": round(a.eta.mean, 5), "change": round(b.change.mean, 5),
         "1/ratio": round(1 / a.ratio.mean, 4), "eps norm": round(b.eps_norm.mean, 4)}
        for a, b in zip(real.levels, own, strict=True)
    ]  # fmt: skip
    return out


def figure(results: dict[str, dict[str, Any]]) -> str:
    """The relative error and the noise-to-distance ratio against sigma, as SVG text."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "legend.frameon": False, "svg.hashsalt": "logsnr", "svg.fonttype": "none", "font.family": "sans-serif",
    }  # fmt: skip
    with plt.rc_context(style):
        drawing, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
        for (name, r), colour in zip(results.items(), ("#1f5fa8", "#c8553d"), strict=False):
            label = f"{name}, {r['trajectories']:,} trajectories"
            left.plot(r["sigma"], r["eta"]["q0.5"], color=colour, label=label)
            left.fill_between(r["sigma"], r["eta"]["q0.01"], r["eta"]["q0.99"], color=colour, alpha=0.18, linewidth=0)
            left.plot(r["sigma"], r["eta"]["q1"], ":", color=colour, linewidth=1)
            right.plot(r["sigma"], r["ratio"]["q0.5"], color=colour, label=name)
            right.fill_between(r["sigma"], r["ratio"]["q0.01"], r["ratio"]["q1"], color=colour, alpha=0.18, linewidth=0)
        left.plot([4.5], [0.09], "k*", markersize=9, linestyle="none", label="published envelope, CIFAR-10: about .09")
        left.set(xscale="log", xlabel="sigma", ylabel="eta = |x0 − proj| / dist")
        left.set_ylim(bottom=0)
        right.set(xscale="log", xlabel="sigma", ylabel="sqrt(n) sigma / dist")
        left.legend(loc="upper left", fontsize=8)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(drawing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, help="npz with train_images")
    parser.add_argument("--cifar10", type=Path, help="folder of train-*.webp sheets")
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--chunk", type=int, default=250, help="trajectories at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--few-steps", type=int, metavar="M", help="also: grids and gammas on the first M images")
    args = parser.parse_args()
    sigmas = grids.timesteps(args.steps, TimestepTable.ddpm(), "trailing", last="min")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "ideal-denoiser.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, path, load in (
        ("Fashion-MNIST", args.fashion_mnist, fashion_mnist),
        ("CIFAR-10", args.cifar10, cifar10),
    ):
        if path is None:
            continue
        data, generator = load(path), torch.Generator().manual_seed(args.seed)
        if args.few_steps:
            numbers = few_steps(data[: args.few_steps].clone(), generator)
            (args.out / "few-steps.json").write_text(json.dumps({name: numbers}, indent=1) + "\n")
        points = Points(data)
        done: list[dict[str, Tensor]] = []
        start, total = time.perf_counter(), 0
        while total < args.trajectories:
            count = min(args.chunk, args.trajectories - total)
            done.append(trajectories(points, sigmas, count, generator))
            total += count
            merged = {key: torch.cat([part[key] for part in done], 1) for key in done[0]}
            seconds = time.perf_counter() - start
            results[name] = {
                "points": len(points), "dimensions": points.shape[0], "steps": args.steps,
                **summary(sigmas, merged),
                "milliseconds per query": round(1e3 * seconds / (total * (args.steps + 1)), 2),
                "peak memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }  # fmt: skip
            file.write_text(json.dumps(dict(sorted(results.items(), reverse=True)), indent=1) + "\n")
            print(f"\r{name}: {total} trajectories, {seconds:.0f} s, envelope {results[name]['envelope']}", flush=True)
            (args.out / "ideal-denoiser.svg").write_text(figure(results) + "\n")


if __name__ == "__main__":
    main()
