"""Few steps on networks trained the way others train: the default, automatic plans and diffusers' own schedulers.

    python benchmarks/foreign.py                                all models of tests/models, all peers
    python benchmarks/foreign.py flow-logit --noises 32         this model, on so many noises
    python benchmarks/foreign.py --solvers unipc --grids flow   these peers only, as `logsnr compare` names them
    python benchmarks/foreign.py --table                        what is done, as a page

Every sampler runs from the same noise; its error is the RMSE to the end of a teacher's trajectory (UniPC-3 on 100
geometric levels from the model's largest level).  Judged are

    auto          what `ls.sample(denoiser, n)` and the diffusers scheduler do unasked
    default       its gradient estimation alone; `CANDIDATES` are what it was chosen from
    peers         diffusers' schedulers on every spacing that they offer

The *best single peer* is the scheduler and spacing of least geometric mean over all other models (leave one out), at
each number of evaluations; the *best in hindsight* is the best of all on this very model.  A choice among candidates is
made by leave-one-out too.  What is measured is kept in --work, one file a model; all errors go to foreign.json in --out
and, as tables, between the marks of foreign.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import Comparison, Entry, measure, peers, uncalibrated
from logsnr.evaluation.compare.entries import plan_entry
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.sampling.default import auto_plan
from logsnr.sampling.grids import flow_range
from logsnr.sampling.names import find_solver

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from foreign import MODELS, ROOT, foreign

NAMES = (*MODELS, "cifar10")

NFE = (4, 5, 6, 8, 10)
CANDIDATES = [(solver, middle) for solver in ("GE(1.5)", "GE(1.7)", "GE(2)", "UniPC-3 ramp") for middle in (3.0, 4.0)]
"""Solvers on even times about so many sigma_data, from the first level of the default to the smallest."""
COLUMNS = (
    *("model", "auto", "default", "candidate chosen on the others", "best single peer", "best peer in hindsight"),
    *("auto over single", "default over single", "auto over hindsight"),
)
MARKS = ("<!-- tables -->", "<!-- end of tables -->")


def entries_of(model: NetworkDenoiser, solvers: list[str], grids: list[str]) -> list[Entry]:
    """All that takes part."""
    low, high = model.sampling_range
    about = {"sigma_data": model.sigma_data, "finite_at_inf": model.finite_at_inf}
    found = [*peers(model, NFE, solvers=solvers, grids=grids), *uncalibrated(model, NFE)]
    default = {entry.budget: entry.plan for entry in found if entry.solver == "default"}
    for n in NFE:
        plan = auto_plan(n, low, high, **about)
        found.append(plan_entry(model, plan, "auto", "its own levels", "auto", "logsnr", n))
        for solver, middle in CANDIDATES:
            levels = flow_range(n, default[n].sigmas[0], low, last="min", shift=middle * model.sigma_data)
            plan = candidate(solver)(levels)
            found.append(plan_entry(model, plan, solver, f"about {middle:g}", "candidate", "logsnr", n))
    return found


def candidate(name: str) -> Callable[..., Any]:
    """The maker of a solver by name; gamma may be any number."""
    if name.startswith("GE("):
        return lambda levels: find_solver("ge")[1](levels, gamma=float(name[3:-1]))
    return find_solver(name)[1]


def model_of(name: str) -> NetworkDenoiser:
    """A model by name; of "cifar10" no plans are shipped yet, and no universal plan was fitted to it."""
    if name in MODELS:
        return foreign(name)
    loaded = load(str(ROOT.parent / name))
    assert isinstance(loaded, NetworkDenoiser)
    return loaded.eval().requires_grad_(False)


def judge(name: str, options: argparse.Namespace) -> None:
    """Measure one model."""
    model = model_of(name).to(options.device)
    entries = entries_of(model, options.solvers, options.grids)
    if options.compile:
        model.network = torch.compile(model.network, dynamic=False)
    cond = {"class_labels": torch.arange(10, device=options.device)} if model.classes else None
    result = measure(
        model, entries, n=options.noises, seed=options.seed, cond=cond, chunk=min(options.noises, 500),
        about={"model": name, "compiled": options.compile},
        progress=lambda done, total, what: print(f"{name}: {done} of {total}: {what}", flush=True),
    )  # fmt: skip
    replace_file(options.work / f"{name}.json", (json.dumps(result.to_dict(), indent=1) + "\n").encode())


Errors = dict[str, float]


def errors(result: Comparison, n: int) -> tuple[Errors, Errors, Errors]:
    """RMSE at n evaluations of peers, of candidates, and of our own plans, by name."""
    rows = [row for row in result.at(n) if row.rmse is not None and math.isfinite(row.error)]
    theirs = {row.name: row.error for row in rows if row.origin == "diffusers"}
    tried = {row.name: row.error for row in rows if row.family == "candidate"}
    ours = {row.solver: row.error for row in rows if row.solver in ("auto", "default", "universal")}
    return theirs, tried, ours


def mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def best_single(others: list[Errors]) -> str:
    """The name of least geometric mean over all others, of those that each of them has."""
    names = set.intersection(*(set(one) for one in others))
    return min(names, key=lambda name: mean(one[name] for one in others))


def tables(results: dict[str, Comparison]) -> str:
    """Errors by model and number of evaluations, and ratios with their geometric means."""
    text, ratios = "", []
    for n in NFE:
        all_ = {name: errors(result, n) for name, result in results.items()}
        text += f"\n### {n} evaluations\n\n" + head(COLUMNS)
        for name, (theirs, tried, ours) in all_.items():
            rest = [other for key, other in all_.items() if key != name] or [all_[name]]
            single, chosen = best_single([r[0] for r in rest]), best_single([r[1] for r in rest])
            best = min(theirs, key=lambda key: theirs[key])
            ratio = {
                "auto over single": ours["auto"] / theirs[single],
                "default over single": ours["default"] / theirs[single],
                "candidate over single": tried[chosen] / theirs[single],
                "auto over hindsight": ours["auto"] / theirs[best],
                "default over hindsight": ours["default"] / theirs[best],
            }
            ratios.append((n, ratio))
            error = next(row.rmse.stderr for row in results[name].at(n) if row.solver == "auto" and row.rmse)
            cells = [name, f"{ours['auto']:.4f} ± {error:.4f}", f"{ours['default']:.4f}", told(chosen, tried)]
            cells += [told(single, theirs), told(best, theirs), *(f"{ratio[column]:.2f}" for column in COLUMNS[6:])]
            text += "| " + " | ".join(cells) + " |\n"
    text += "\n### Geometric means over the models\n\n" + head(["evaluations", *ratios[0][1]])
    for at in (*NFE, None):
        row = [mean(r[key] for n, r in ratios if at in (n, None)) for key in ratios[0][1]]
        text += f"| {'all' if at is None else at} | " + " | ".join(f"{value:.2f}" for value in row) + " |\n"
    return text


def head(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns) + "\n"


def told(name: str, found: Errors) -> str:
    return f"{found[name]:.4f} ({name.removeprefix('diffusers ')})"


def write(work: Path, out: Path) -> None:
    """All errors, and the page: what stands around its marks stays."""
    found = {name: work / f"{name}.json" for name in NAMES}
    results = {name: Comparison.from_dict(json.loads(f.read_text())) for name, f in found.items() if f.exists()}
    if not results:
        raise SystemExit(f"{work} holds no model that was judged: run without --table first")
    one = next(iter(results.values()))
    about = f"\n{len(results)} models, {one.samples} noises each (seed {one.seed}), {one.machine}. "
    about += f"Teacher: {one.teacher.name}.\n"
    rows = {
        name: {f"{row.name}, {row.budget}": [float(f"{v:.4g}") for v in (row.error, row.rmse.stderr)]
               for row in result.rows if row.rmse is not None and math.isfinite(row.error)}
        for name, result in results.items()
    }  # fmt: skip
    kept = {"noises": one.samples, "seed": one.seed, "machine": one.machine, "teacher": one.teacher.name, "rmse": rows}
    text = json.dumps(kept).replace("], ", "],\n").replace("}, ", "},\n")
    replace_file(out / "foreign.json", (text + "\n").encode())
    page = out / "foreign.md"
    title = "# Few steps on networks of other conventions"
    old = page.read_text() if page.exists() else f"{title}\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, rest = old.split(MARKS[0])
    text = f"{before}{MARKS[0]}\n{about}{tables(results)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
    replace_file(page, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(NAMES)}; all of them")
    parser.add_argument("--noises", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=10**6)
    parser.add_argument("--solvers", type=lambda v: v.split(","), default=[], help="peers that start so")
    parser.add_argument("--grids", type=lambda v: v.split(","), default=[], help="their spacings that start so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the networks (twice as fast on a CPU)")
    parser.add_argument("--work", type=Path, default=Path("runs/foreign"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    for name in options.models or ([] if options.table else NAMES):
        judge(name, options)
    write(options.work, options.out)


if __name__ == "__main__":
    main()
