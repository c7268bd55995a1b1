"""What calibration buys: a plan of 4 to 10 evaluations against every stock solver, from fresh noise.

    python benchmarks/few_step.py                                      an exact mixture in 8 dimensions
    python benchmarks/few_step.py runs/digits --batch 64 --nfe 4,5,6   a trained model, its classes in turn

End-point RMSE against a teacher of the same noise, with twice the evaluations of the one that plans are fitted to.
(a) stock: the best, on the very noise that is reported, of all solvers on log-linear and karras grids over the sampling
range, with the last step to sigma 0 or none; (b) tuned: the best, on selection noise, of the leading solvers with their
two ends tuned there, and of iPNDM on searched levels (GITS).  Targets: (a) at most .7 in geometric mean, (b) at most 1.
With --screen K only the K stock peers that do best on a few of the selection noises take part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from logsnr.calibration import calibrate
from logsnr.calibration.baselines import searched, tuned_ends
from logsnr.calibration.descent import mean_square
from logsnr.calibration.rollout import Batch, spread_cond
from logsnr.calibration.teacher import remember, teacher_ends, teacher_grid
from logsnr.denoiser import Denoiser
from logsnr.exact import GaussianMixture
from logsnr.load import load
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.plan import Grid
from logsnr.sampling.sample import start

SOLVERS: dict[str, Callable[[Grid], Plan]] = {
    "DDIM": solvers.ddim,
    **{f"GE({g})": partial(solvers.ge, gamma=g) for g in (1.5, 2.0)},
    **{f"GE({g}) {b}": partial(solvers.ge, gamma=g, basis=b) for g in (1.5, 2.0) for b in ("x0", "velocity")},
    **{f"AB-{p}": partial(solvers.adams_bashforth, order=p) for p in (2, 3, 4)},
    **{f"iPNDM-{p}": partial(solvers.ipndm, order=p) for p in (3, 4)},
    **{f"DEIS-{p}": partial(solvers.deis, order=p) for p in (2, 3, 4)},
    "DPM++(2M)": solvers.dpmpp,
    "DPM++(2M) ramp": partial(solvers.dpmpp, final="ramp"),
    "DPM++(3M)": partial(solvers.dpmpp, order=3),
    "DPM++(3M) ramp": partial(solvers.dpmpp, order=3, final="ramp"),
    **{f"UniPC-{p}": partial(solvers.unipc, order=p) for p in (1, 2, 3)},
    **{f"UniPC-{p} ramp": partial(solvers.unipc, order=p, final="ramp") for p in (2, 3)},
}
GRIDS: dict[str, Callable[[int, float, float], Grid]] = {
    "log-linear": grids.log_linear,
    "karras": grids.karras,
    "log-linear, min": partial(grids.log_linear, last="min"),
    "karras, min": partial(grids.karras, last="min"),
}


def mixture(d: int = 8, components: int = 6, seed: int = 0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, generator=g)
    factors = torch.randn(components, d, d, generator=g) * 0.375 / math.sqrt(d)
    covs = factors @ factors.mT + 0.01 * torch.eye(d)
    return GaussianMixture(torch.full((components,), 1 / components), means, covs)


def noises(denoiser: Denoiser, cond: Mapping[str, Any] | None, seed: int, n: int) -> Batch:
    noise = start(denoiser, None, n, torch.Generator().manual_seed(seed))
    return Batch(noise=noise, cond=spread_cond(cond, 0, n), end=noise.new_empty(n, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="folder of a run; without it an exact mixture")
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--batch", type=int, default=128, help="noises to fit to, and to select by")
    parser.add_argument("--report", type=int, default=512, help="fresh noises to report on")
    parser.add_argument("--teacher", type=int, default=96, help="evaluations of the calibration's teacher")
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tune", type=int, default=8, help="how many of the best stock peers get their ends tuned")
    parser.add_argument(
        "--screen", type=int, metavar="K", help="for slow models: measure only the K likeliest stock peers"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    denoiser: Denoiser = mixture() if options.run is None else load(options.run)
    denoiser = denoiser.to(options.device)
    classes = None if options.run is None else denoiser.card.get("classes")
    cond = {"class_labels": torch.arange(classes, device=options.device)} if classes else None
    low, high = denoiser.sampling_range
    grid = teacher_grid(options.teacher, low, high)
    chunk = 512 if options.device == "cpu" else 4096
    print(f"{options.run or 'exact mixture'}: {options.batch} fit, {options.batch} select, {options.report} report")
    print(f"{'nfe':>3} {'seed':>4} {'RMSE':>8} {'a':>6} {'b':>6} {'spent':>6} {'s':>6}  best stock / best tuned / plan")
    ratios: dict[int, list[tuple[float, float]]] = {}
    rows = []
    for seed in map(int, options.seeds.split(",")):
        fresh = noises(denoiser, cond, 10**6 + seed, options.report)
        report = teacher_ends(denoiser, fresh, teacher_grid(2 * options.teacher, low, high), chunk, None)
        select, cache = remember(denoiser, noises(denoiser, cond, 2 * 10**6 + seed, options.batch), grid, chunk, None)

        def error(plan: Plan, batch: Batch) -> float:
            return math.sqrt(mean_square(denoiser, plan, batch, chunk, None))

        for n in map(int, options.nfe.split(",")):
            peers = {(s, g): SOLVERS[s](GRIDS[g](n, high, low)) for s in SOLVERS for g in GRIDS}
            few = select.first(options.screen or len(select))
            ranked = sorted(peers, key=lambda name: error(peers[name], few))
            stock = {name: error(peers[name], report) for name in ranked[: options.screen]}
            best = min(stock, key=stock.__getitem__)
            tuned: dict[str, tuple[float, Plan]] = {}
            plan = searched(cache, n, denoiser.sigma_data)
            tuned["iPNDM-4, searched"] = error(plan, select), plan
            for s, g in ranked[: options.tune]:
                on_select = partial(error, batch=select)
                tuned[f"{s}, {g}"] = tuned_ends(SOLVERS[s], GRIDS[g], n, low, high, on_select)
            winner = min(tuned, key=lambda name: tuned[name][0])
            best_tuned = error(tuned[winner][1], report)
            began = time.perf_counter()
            plan = calibrate(
                denoiser,
                n,
                batch=options.batch,
                seed=seed,
                cond=cond,
                teacher=options.teacher,
                rollouts=options.rollouts,
            )
            seconds, own = time.perf_counter() - began, error(plan, report)
            a, b = own / stock[best], own / best_tuned
            ratios.setdefault(n, []).append((a, b))
            spent = plan.meta["evaluations"]["rollouts"]
            found = " ".join(f"{key}={value}" for key, value in plan.meta["found"].items())
            print(
                f"{n:3d} {seed:4d} {own:8.4f} {a:6.3f} {b:6.3f} {spent:6.1f} {seconds:6.1f}  "
                f"{', '.join(best)} {stock[best]:.4f} / {winner} {best_tuned:.4f} / {plan.basis} {found}",
                flush=True,
            )
            rows.append({"nfe": n, "seed": seed, "rmse": own, "stock": stock[best], "tuned": best_tuned})
    for n, values in ratios.items():
        a, b = (math.exp(sum(math.log(v[i]) for v in values) / len(values)) for i in range(2))
        print(f"NFE {n}: geometric mean over seeds of (a) {a:.3f}, (b) {b:.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
