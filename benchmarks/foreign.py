"""Few steps on networks trained the way others train: the default, automatic plans and diffusers' own schedulers.

    python benchmarks/foreign.py                                all models of tests/models, all peers
    python benchmarks/foreign.py flow-logit --noises 32         this model, on so many noises
    python benchmarks/foreign.py --solvers unipc --grids flow   these peers only, as `logsnr compare` names them
    python benchmarks/foreign.py --table                        what is done, as a page

Every sampler runs from the same noise; its error is the RMSE to the end of a teacher's trajectory (UniPC-3 on 100
geometric levels from the model's largest level).  Judged are

    auto          what `ls.sample(denoiser, n)` and the diffusers scheduler do unasked
    held out      the same, of plans that were fitted without this network (--plans, of tools/universal.py --held-out)
    default       gradient estimation alone
    start         auto from a lower level, brought there by the Gaussian of the data (--images), and down to where
                  `ls.probe` finds the network of use, if 16 other noises say that it is nearer to the teacher
    peers         diffusers' schedulers on every spacing that they offer

The *best single peer* is the scheduler and spacing of least geometric mean over all other models (leave one out), at
each number of evaluations; the *best in hindsight* is the best of all on this very model.  What is measured is kept in
--work, one file a model; all errors go to foreign.json in --out and, as tables, between the marks of foreign.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.evaluation.compare import Comparison, Entry, measure, peers, uncalibrated
from logsnr.evaluation.compare.entries import plan_entry
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.sampling import GaussianStart, Plan, probe, sample
from logsnr.sampling.batches import Cond, in_turn
from logsnr.sampling.default import auto_plan, first_level
from logsnr.sampling.plan import plans_from
from logsnr.sampling.teacher import teacher_plan
from logsnr.sampling.universal import scaled
from logsnr.training import load_data
from logsnr.training.config import DataConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from foreign import MODELS, ROOT, foreign

NAMES = (*MODELS, "cifar10")

NFE = (4, 5, 6, 8, 10)
FIRSTS = (40.0, 14.0, 7.0, 3.5)
"""Levels to start from, in units of sigma_data."""
FEW = 16
"""Noises that choose among them."""
OURS = ("held out", "auto", "start", "default")
COLUMNS = ("model", *OURS, "best single peer", "best peer in hindsight")
RATIOS = ("held out over single", "start over single", "held out over hindsight")
MARKS = ("<!-- tables -->", "<!-- end of tables -->")


def entries_of(model: NetworkDenoiser, name: str, cond: Cond, options: argparse.Namespace) -> list[Entry]:
    """All that takes part."""
    low, high = model.sampling_range
    found = [*peers(model, options.nfe, solvers=options.solvers, grids=options.grids)]
    found += uncalibrated(model, options.nfe)
    for n in options.nfe:
        found.append(entry(model, automatic(model, n, low, high), "auto", n))
    if options.plans and (file := options.plans / f"without {name}.json").exists():
        for n, relative in plans_from(file).items():
            first = first_level(n, low, high, sigma_data=model.sigma_data, finite_at_inf=model.finite_at_inf)
            found.append(entry(model, scaled(relative, model.sigma_data, low, first), "held out", n))
    if options.images:
        least, most = MODELS[name]["range"] if name in MODELS else (-1, 1)
        data = load_data(DataConfig(source=options.images))
        x = (least + (most - least) * data.train_images[:9000].float() / 255).to(options.device)
        labels = data.train_labels[:9000] if model.classes and data.train_labels is not None else None
        found += started(model, GaussianStart.fit(x, labels=labels), cond, options)
    return found


def automatic(model: NetworkDenoiser, n: int, low: float, high: float, *, knows: bool | None = None) -> Plan:
    """The plan of a model between two levels unasked; `knows` something in the state there, if not told by its kind."""
    known = model.finite_at_inf if knows is None else knows
    return auto_plan(n, low, high, sigma_data=model.sigma_data, finite_at_inf=known, dim=model.dim)


def entry(model: NetworkDenoiser, plan: Plan, name: str, n: int) -> Entry:
    return plan_entry(model, plan, name, "its own levels", name, "logsnr", n)


def started(model: NetworkDenoiser, gaussian: GaussianStart, cond: Cond, options: argparse.Namespace) -> list[Entry]:
    """At each number of evaluations the best of `auto` and of automatic plans from lower levels, from the noise itself
    and from the data's Gaussian, with the model's smallest level and the probed one, on a few noises of their own."""
    low, high = model.sampling_range
    noise = torch.randn(FEW, *model.shape, generator=torch.Generator().manual_seed(options.seed + 1)).to(options.device)
    few = in_turn(cond, torch.arange(FEW))
    ends = sample(model, teacher_plan(100, low, high), noise=noise, cond=few)
    bottom = probe(model, cond=few, seed=options.seed).low
    found = []
    for n in options.nfe:
        tried: list[tuple[Plan, GaussianStart | None]] = [(automatic(model, n, low, high), None)]
        for last in {low, bottom}:
            for first in (u * model.sigma_data for u in FIRSTS if 2 * last < u * model.sigma_data < high):
                tried += [(automatic(model, n, last, first, knows=True), start) for start in (None, gaussian)]
        logs = [squares(sample(model, p, noise=noise, cond=few, start=s), ends).log() for p, s in tried]
        plan, start = tried[chosen(logs)]
        print(f"start, {n}: sigma {plan.sigmas[0]:.4g}, {'noise' if start is None else 'Gaussian'}", flush=True)
        one = entry(model, plan, "start", n)
        if start is not None:
            one = replace(one, run=partial(begun, plan, start))
        found.append(one)
    return found


def squares(x: Tensor, ends: Tensor) -> Tensor:
    """Mean squared error of each sample, float64."""
    return (x.double() - ends.double()).square().flatten(1).mean(1)


def chosen(logs: list[Tensor]) -> int:
    """Of logarithms of paired errors the least on average, of those two standard errors below the first; or the first.

    A few samples end in another mode than the teacher's whatever the plan, and would be most of a mean square.
    """
    below = [one - logs[0] for one in logs]
    sure = [i for i, d in enumerate(below) if i and float(d.mean() + 2 * d.std() / math.sqrt(len(d))) < 0]
    return min(sure, key=lambda i: float(below[i].mean()), default=0)


def begun(plan: Plan, start: GaussianStart, model: Denoiser, noise: Tensor, cond: Cond, generator: Any) -> Tensor:
    """The run of an entry from a Gaussian."""
    return sample(model, plan, noise=noise, cond=cond, start=start, check=False)


def model_of(name: str) -> NetworkDenoiser:
    """A model by name; of "cifar10", whose own plans take no part, no universal plan was fitted to it."""
    if name in MODELS:
        return foreign(name)
    loaded = load(str(ROOT.parent / name))
    assert isinstance(loaded, NetworkDenoiser)
    return loaded.eval().requires_grad_(False)


def judge(name: str, options: argparse.Namespace) -> None:
    """Measure one model; rows measured before, of the same plan on the same noises, are kept."""
    model, file = model_of(name).to(options.device), options.work / f"{name}.json"
    if options.compile:
        model.network = torch.compile(model.network, dynamic=False)
    cond = {"class_labels": torch.arange(10, device=options.device)} if model.classes else {}
    entries = entries_of(model, name, cond, options)
    before = Comparison.from_dict(json.loads(file.read_text())) if file.exists() else None
    if before is not None and (before.samples, before.seeds) != (options.noises, (options.seed,)):
        raise SystemExit(f"{file} is of {before.samples} noises of seeds {before.seeds}: give them, or another --work")
    kept = {} if before is None else {(row.name, row.budget): row for row in before.rows}
    wanted = {(one.name, one.budget): None if one.plan is None else one.plan.hash for one in entries}
    kept = {at: row for at, row in kept.items() if at in wanted and row.plan_hash == wanted[at]}
    result = measure(
        model, [one for one in entries if (one.name, one.budget) not in kept],
        n=options.noises, seed=options.seed, cond=cond, chunk=min(options.noises, 500),
        about={"model": name, "compiled": options.compile},
        progress=lambda done, total, what: print(f"{name}: {done} of {total}: {what}", flush=True),
    )  # fmt: skip
    result = replace(result, rows=(*kept.values(), *result.rows))
    replace_file(file, (json.dumps(result.to_dict(), indent=1) + "\n").encode())


Errors = dict[str, float]


def errors(result: Comparison, n: int) -> tuple[Errors, Errors]:
    """RMSE at n evaluations of peers, by name, and of our own plans."""
    rows = [row for row in result.at(n) if row.rmse is not None and math.isfinite(row.error)]
    theirs = {row.name: row.error for row in rows if row.origin == "diffusers"}
    ours = {row.solver: row.error for row in rows if row.solver in OURS}
    return theirs, {"held out": ours["auto"], "start": ours["auto"], **ours}


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
    sizes = sorted(set.intersection(*(set(result.budgets) for result in results.values())))
    for n in sizes:
        all_ = {name: errors(result, n) for name, result in results.items()}
        text += f"\n### {n} evaluations\n\n" + head((*COLUMNS, *RATIOS))
        for name, (theirs, ours) in all_.items():
            single = best_single([other[0] for key, other in all_.items() if key != name] or [theirs])
            best = min(theirs, key=lambda key: theirs[key])
            ratio = {f"{one} over single": ours[one] / theirs[single] for one in OURS}
            ratio |= {f"{one} over hindsight": ours[one] / theirs[best] for one in OURS}
            ratios.append((n, ratio))
            error = next(row.rmse.stderr for row in results[name].at(n) if row.solver == "auto" and row.rmse)
            cells = [name, f"{ours['held out']:.4f} ± {error:.4f}", *(f"{ours[one]:.4f}" for one in OURS[1:])]
            cells += [told(single, theirs), told(best, theirs), *(f"{ratio[column]:.2f}" for column in RATIOS)]
            text += "| " + " | ".join(cells) + " |\n"
    text += "\n### Geometric means over the models\n\n" + head(["evaluations", *ratios[0][1]])
    for at in (*sizes, None):
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
    about = f"\n{len(results)} models, {one.samples} noises each (seed {one.seeds[0]}), {one.machine}. "
    about += f"Teacher: {one.teacher.name}.\n"
    rows = {
        name: {f"{row.name}, {row.budget}": [float(f"{v:.4g}") for v in (row.error, row.rmse.stderr)]
               for row in result.rows if row.rmse is not None and math.isfinite(row.error)}
        for name, result in results.items()
    }  # fmt: skip
    kept = {
        "noises": one.samples,
        "seed": one.seeds[0],
        "machine": one.machine,
        "teacher": one.teacher.name,
        "rmse": rows,
    }
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
    parser.add_argument("--nfe", type=lambda v: [int(n) for n in v.split(",")], default=list(NFE))
    parser.add_argument("--noises", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=10**6)
    parser.add_argument("--solvers", type=lambda v: v.split(","), default=[], help="peers that start so")
    parser.add_argument("--grids", type=lambda v: v.split(","), default=[], help="their spacings that start so")
    parser.add_argument("--plans", type=Path, help="folder of the plans fitted without each network")
    parser.add_argument("--images", help="an .npz of the models' training images, for Gaussian starts")
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
