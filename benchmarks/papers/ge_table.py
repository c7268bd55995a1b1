"""The table of 2306.04848 (sec. 6): DDIM, gradient estimation and other samplers at 5, 10, 20 and 50 evaluations.

    python benchmarks/papers/ge_table.py --data fashion_mnist.npz
    python benchmarks/papers/ge_table.py --model zoo:fashion-mnist --data fashion_mnist.npz --plans plans.json

The paper's FID of google/ddpm-cifar10-32 (49,920 images) at 5, 10, 20, 50: DDIM 47.2, 16.9, 8.28, 4.83, gradient
estimation 12.6, 3.79, 3.32, 3.41. Another model and other features here: only the order can be compared. Rows are

    GE(2), paper     gamma 2 on the paper's rule, to t = 0
    diffusers        of every family the scheduler and spacing of least RMSE on --few other noises, chosen at each
                     number of evaluations (in hindsight, which favours it)
    default, auto    gradient estimation by default, and what `ls.sample(denoiser, n)` does unasked
    start            auto from a lower level, where the data's Gaussian leads (--start SIGMA)
    calibrated       the model's own plans, or those of --plans

With the model and Inception at hand FID itself is made by

    --model hub:google/ddpm-cifar10-32 --data CIFAR10 --features module:function -n 10000

where the function takes uint8 images and answers with Inception's pool features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from runner import (
    Claim,
    compared,
    in_range,
    judged,
    model_of,
    number,
    parsed,
    parser,
    row_of,
    table,
    told,
    verdicts,
    write,
)

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import Comparison, Entry, measure, ours, own, peers
from logsnr.evaluation.compare.entries import plan_entry
from logsnr.sampling import GaussianStart
from logsnr.sampling.default import auto_plan, default_plan
from logsnr.sampling.grids import paper_timesteps
from logsnr.sampling.plan import check_sigmas, plans_from
from logsnr.sampling.table import table_of
from logsnr.solvers import ge
from logsnr.training import load_data
from logsnr.training.config import DataConfig

NAME, TITLE = "ge-table", "Samplers of the gradient-estimation paper"
PAPER = {"DDIM": (47.2, 16.9, 8.28, 4.83), "GE(2), paper": (12.6, 3.79, 3.32, 3.41)}
FAMILIES = ("DDIM", "PNDM", "DPM-Solver", "DPM++", "DEIS", "UniPC")
IPNDM = "iPNDM-4"
Spacings = dict[tuple[str, int], str]
SEED = 10**6
"""Of the noises that choose among diffusers' spacings."""


def plans_of(model: NetworkDenoiser, options: argparse.Namespace) -> list[Entry]:
    """Rows that are plans of this library."""
    low, high = model.sampling_range
    about = {"sigma_data": model.sigma_data, "finite_at_inf": model.finite_at_inf}
    known, found = table_of(model), []
    start = None if options.start is None or options.data is None else _start(model, options)
    for n in options.nfe:
        steps = paper_timesteps(n, known, min(40.0, known.sigma_range[1]))
        levels = check_sigmas([known.sigma(float(t)) for t in dict.fromkeys(steps)])
        plans = {
            "GE(2), paper": ge(levels, 2.0, final="ge"),
            "default": default_plan(n, low, high, **about),
            "auto": auto_plan(n, low, high, **about, dim=model.dim),
        }
        found += [plan_entry(model, plan, name, "", name, "logsnr", n) for name, plan in plans.items()]
        if start is not None:
            plan = auto_plan(n, low, options.start, sigma_data=model.sigma_data, finite_at_inf=True, dim=model.dim)
            found.append(plan_entry(model, plan, "start", "", "start", "logsnr", n, start))
    if options.plans is not None:
        plans = plans_from(options.plans)
        found += [plan_entry(model, plans[n], "calibrated", "", "plan", "plan", n) for n in options.nfe if n in plans]
    else:
        found += [replace(one, solver="calibrated", grid="") for one in own(model, options.nfe)]
    return found


def _start(model: NetworkDenoiser, options: argparse.Namespace) -> GaussianStart:
    """The Gaussian of the data, in the model's range."""
    images = load_data(DataConfig(source=str(options.data))).train_images[:9000]
    return GaussianStart.fit(in_range(options.model, model, images))


def chosen(model: NetworkDenoiser, options: argparse.Namespace) -> tuple[list[Entry], Spacings]:
    """Of every family of diffusers', and of iPNDM, the entry of least RMSE on a few other noises, at each number."""
    every = peers(model, options.nfe, solvers=FAMILIES, grids=["trailing"] if options.smoke else [])
    every += ours(model, options.nfe, solvers=[IPNDM], grids=["karras"] if options.smoke else [])
    cond = {"class_labels": torch.arange(model.classes)} if model.classes else None
    trial = measure(model, every, n=options.few, seed=SEED, teacher_steps=options.teacher, cond=cond)
    found, spacings = [], {}
    for n in options.nfe:
        for family in (*FAMILIES, IPNDM):
            rows = [row for row in trial.at(n) if family in (row.family, row.solver) and row.rmse is not None]
            rows = [row for row in rows if (row.solver == IPNDM) == (family == IPNDM)]
            if rows:
                best = next(one for one in every if one.key == rows[0].key)
                found.append(replace(best, solver=family, grid=""))
                spacings[family, n] = best.name
                print(f"{n}: {family} is {best.name}", flush=True)
    return found, spacings


def main(arguments: Sequence[str] | None = None) -> None:
    wanted = parser(__doc__, (5, 10, 20, 50), 1000, 5)
    wanted.add_argument("--few", type=int, default=64, help="noises that choose diffusers' spacings")
    wanted.add_argument("--start", type=float, help="level that the data's Gaussian leads to")
    wanted.add_argument("--plans", type=Path, help="calibrated plans, of logsnr calibrate")
    options = parsed(wanted, arguments)
    options.few = 2 if options.smoke else options.few
    model = model_of(options)
    others, spacings = chosen(model, options)
    entries = [*others, *plans_of(model, options)]
    found = compared(f"{NAME}-{options.model.replace(':', '-')}", options, model, entries)
    names = list(dict.fromkeys(row.name for row in found.rows))
    parts, verdict = [told(found)], []
    for by in ("frechet", "rmse") if found.features else ("rmse",):
        what = {"rmse": "RMSE", "frechet": "FD"}[by]
        rows = [[name, *(_number(found, name, n, by) for n in options.nfe)] for name in names]
        parts.append(table((what, *map(str, options.nfe)), rows))
        verdict += claims(found, options.nfe, by)
    rows = [[family, *(spacings.get((family, n), "-") for n in options.nfe)] for family in (*FAMILIES, IPNDM)]
    parts += [verdicts(verdict), table(("chosen", *map(str, options.nfe)), rows)]
    write(NAME, TITLE, "\n\n".join(parts), {"comparison": found.to_dict(), "claims": verdict}, options)


def claims(found: Comparison, nfe: Sequence[int], by: str) -> list[dict[str, object]]:
    """That the paper's sampler beats the others, and that auto beats it."""
    out = []
    names = {(row.name, row.budget) for row in found.rows}
    for n in nfe:
        for family in (*FAMILIES, IPNDM):
            theirs, mine = family if family == IPNDM else f"diffusers {family}", "GE(2), paper"
            pairs = [(mine, theirs, "the paper's sampler"), ("auto", theirs, "auto")]
            for less, more, who in pairs:
                if (more, n) in names:
                    claim = Claim(says=f"{who} is better than {family}", less=less, more=more, by=by, nfe=n)
                    out.append(judged(claim, found))
        claim = Claim(says="auto is better than the paper's sampler", less="auto", more="GE(2), paper", by=by, nfe=n)
        out.append(judged(claim, found))
    return out


def _number(found: Comparison, name: str, n: int, by: str) -> str:
    known = any(row.name == name and row.budget == n for row in found.rows)
    return number(row_of(found, name, n), by) if known else "-"


if __name__ == "__main__":
    main()
