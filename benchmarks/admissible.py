"""The place of the admissible grid: a passport's eta(sigma) as levels, beside grids that know nothing of the model.

    python benchmarks/admissible.py                        an exact mixture, zoo:digits, and an ideal denoiser of digits
    python benchmarks/admissible.py zoo:digits --nfe 5     this model, these numbers of evaluations
    python benchmarks/admissible.py --table                what is done, as a page

Each model is examined on its data (`examine`), and its 90 % quantile of eta makes `grids.admissible`; then `ours` and
`measure` run five solvers on every grid from the same noise.  The ideal denoiser is the posterior mean of the first
300 training digits, a point cloud: the paper's case, where every sample is a projection.  Results go to
admissible.json in --out, tables between the marks of admissible.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from few_step import mixture
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.evaluation.compare import Comparison, measure, ours
from logsnr.evaluation.passport import examine
from logsnr.exact import PointCloud
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.theory import grid_between
from logsnr.training import load_data
from logsnr.training.config import DataConfig

MODELS = ("mixture", "zoo:digits", "digits cloud")
SHOWN = ("DDIM", "GE(2)", "iPNDM-3", "DPM++(2M)", "UniPC-2")
GRIDS = ("log-linear", "karras", "flow", "timesteps", "admissible")
CLOUD = 300
MARKS = ("<!-- tables -->", "<!-- end of tables -->")

Cond = dict[str, Tensor]


def model(name: str) -> tuple[Denoiser, Tensor, Cond | None, Cond | None]:
    """A denoiser, the data that it is examined on with their conditions, and the conditions that it samples under."""
    if name == "mixture":
        exact = mixture()
        return exact, exact.sample(2000, generator=torch.Generator().manual_seed(1)), None, None
    data = load_data(DataConfig())
    denoiser = load("zoo:digits") if name == "digits cloud" else load(name)
    if name == "digits cloud":
        points = denoiser.encode(data.train_images[:CLOUD])
        return PointCloud(points), points, None, None
    assert data.test_labels is not None
    cond = {"class_labels": data.test_labels} if denoiser.card["classes"] else None
    turn = {"class_labels": torch.arange(denoiser.card["classes"])} if cond else None
    return denoiser, denoiser.encode(data.test_images), cond, turn


def run(name: str, nfe: list[int], samples: int) -> dict[str, Any]:
    """The passport's curve, the levels it makes and what they need, and the comparison."""
    denoiser, x, cond, turn = model(name)
    passport = examine(denoiser, x, cond=cond, name=name)
    low, high = denoiser.sampling_range
    curve = passport.eta_curve
    entries = ours(denoiser, nfe, solvers=SHOWN, eta=curve)
    result = measure(denoiser, entries, n=samples, cond=turn, about={"model": name})
    levels = {e.budget: e.plan.sigmas for e in entries if (e.solver, e.grid) == ("DDIM", "admissible") and e.plan}
    held = [(sigma, min(max(eta, 1e-3), 0.999)) for sigma, eta in curve]
    needs = {n: grid_between(held, n - 1, sigma_max=high, sigma_min=low)[1] for n in nfe}
    return {
        "eta": [[float(f"{s:.4g}"), float(f"{e:.4g}")] for s, e in curve],
        "nu measured": max(e.nu for e in passport.projection if math.isfinite(e.nu)),
        "nu needed": {n: nu if math.isfinite(nu) else None for n, nu in needs.items()},
        "levels": {n: [float(f"{s:.4g}") for s in sigmas] for n, sigmas in levels.items()},
        **measured(result),
    }


def measured(c: Comparison) -> dict[str, Any]:
    """[RMSE, standard error] by evaluations, solver and grid."""
    table: dict[str, Any] = {str(n): {solver: {} for solver in SHOWN} for n in c.budgets}
    for row in c.rows:
        assert row.rmse is not None
        pair = [float(f"{v:.4g}") for v in (row.rmse.value, row.rmse.stderr)]
        table[str(row.budget)][row.solver][row.grid] = pair
    facts = {"samples": c.samples, "seed": c.seeds[0], "teacher": c.teacher.name, "machine": c.machine}
    return {**facts, "teacher's uncertainty": float(f"{c.teacher.uncertainty:.3g}"), "rmse": table}


def tables(results: dict[str, Any]) -> str:
    """RMSE and its standard error of every solver on every grid, and the geometric mean of their ratios."""
    lines = []
    for name, found in results.items():
        lines += ["", f"## {name}: {found['samples']} samples, seed {found['seed']}, {found['machine']}", ""]
        eta = ", ".join(f"{e:.3g} at {s:.3g}" for s, e in found["eta"])
        needed = ", ".join(f"{'none' if v is None else f'{v:.3g}'} at {n}" for n, v in found["nu needed"].items())
        lines += [
            f"eta, 90 % quantile, at sigma: {eta}. nu measured {found['nu measured']:.3g}; the nu that makes the grid "
            f"admissible: {needed} evaluations.",
            "",
            "| evaluations | solver | " + " | ".join(GRIDS) + " |",
            "|---|---|" + "---:|" * len(GRIDS),
        ]
        for budget, rows in found["rmse"].items():
            for solver, cells in rows.items():
                told = [f"{cells[grid][0]:.4f} ± {cells[grid][1]:.4f}" for grid in GRIDS]
                lines.append(f"| {budget} | {solver} | " + " | ".join(told) + " |")
            ratios = [
                math.exp(fmean(math.log(cells["admissible"][0] / cells[grid][0]) for cells in rows.values()))
                for grid in GRIDS
            ]
            lines.append(f"| {budget} | *admissible / grid* | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join(lines).strip()


def show(results: dict[str, Any], page: Path) -> None:
    """Put the tables between the marks of the page."""
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS)
    head, rest = text.split(MARKS[0])
    body = "\n\n".join([MARKS[0], tables(results), MARKS[1]])
    replace_file(page, (head + body + rest.split(MARKS[1])[1].rstrip("\n") + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="mixture, digits cloud, or a model of digits")
    parser.add_argument("--nfe", default="5,8,10")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "admissible.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in () if options.table else options.models:
        results[name] = run(name, [int(n) for n in options.nfe.split(",")], options.samples)
        replace_file(file, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
        print(f"{name}: done", flush=True)
    results = json.loads(file.read_text())
    show(results, options.out / "admissible.md")
    print(tables(results))


if __name__ == "__main__":
    main()
