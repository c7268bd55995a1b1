"""The ceiling of few-step plans: levels and rows trained by backpropagation through the denoiser.

    python benchmarks/ceiling.py                                 an exact mixture and zoo:digits, at 4, 5, 6 and 8
    python benchmarks/ceiling.py zoo:fashion-mnist --nfe 5       this model; an hour of a core
    python benchmarks/ceiling.py --table                         what is done, as a page

Calibration asks the denoiser for values alone.  Here Adam follows the exact gradient of the same loss (Cauchy's, of the
end point's error) on the same fitting noises, in log sigma of all inner levels and in every coefficient of rows of
`--history` estimates, from each of two starts, the calibrated plan and the automatic one; the selection noises say at
which step a run is best, and which run.  That is the honest upper bound of what a plan of such rows can reach, at many
times the cost: a step is `nfe` evaluations of every fitting noise and twice that for the gradient.  Both are judged on
--report noises that nothing was fitted to.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from few_step import mixture
from torch import Tensor

from logsnr.calibration import calibrate
from logsnr.calibration.rollout import TAIL
from logsnr.denoiser import Denoiser
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.sampling import Plan, sample
from logsnr.sampling.batches import Cond, in_turn
from logsnr.sampling.default import auto_plan
from logsnr.sampling.teacher import teacher_ends, teacher_plan

MODELS, NFE = ("mixture", "zoo:digits"), (4, 5, 6, 8)
SEEDS = {"fit": 1, "select": 2, "report": 3}
FIT, SELECT = 96, 96


class Trained(torch.nn.Module):
    """A plan of eps rows with its inner levels and all coefficients as parameters; the ends are held."""

    def __init__(self, plan: Plan, history: int) -> None:
        super().__init__()
        self.first, self.last = plan.sigmas[0], plan.sigmas[-1]
        self.gaps = torch.nn.Parameter(torch.tensor([math.log(s) for s in plan.sigmas[1:-1]], dtype=torch.float64))
        rows = []
        for i, row in enumerate(plan.rows):
            width = min(i + 1, history + 1)
            rows.append(torch.nn.Parameter(torch.tensor([*row, *[0.0] * width][:width], dtype=torch.float64)))
        self.rows = torch.nn.ParameterList(rows)

    def levels(self) -> list[Tensor]:
        """All levels, the ends as they were."""
        ends = [torch.tensor(value, dtype=torch.float64) for value in (self.first, self.last)]
        return [ends[0], *self.gaps.exp().unbind(), ends[1]]

    def forward(self, denoiser: Denoiser, noise: Tensor, cond: Cond) -> Tensor:
        """The ends of the trajectories, with their gradient: dy = e_bar dsigma in y = z/alpha."""
        levels, estimates = self.levels(), []
        y = noise.double() * math.hypot(1, self.first)
        for i, row in enumerate(self.rows):
            sigma = levels[i]
            scale = (1 + sigma * sigma).sqrt()
            z = (y / scale).to(noise.dtype)
            estimates.append(denoiser(z, sigma.to(noise.dtype).expand(len(z)), **cond).eps.double())
            step = sum(c * e for c, e in zip(row, reversed(estimates), strict=False))
            y = y + (levels[i + 1] - sigma) * step
        return y / math.hypot(1, self.last)

    def plan(self) -> Plan:
        """As numbers."""
        sigmas = tuple(float(s.detach()) for s in self.levels())
        return Plan(sigmas, tuple(tuple(row.tolist()) for row in self.rows), "eps", meta={"solver": "ceiling"})


def tempered(ends: Tensor, goal: Tensor) -> Tensor:
    """Cauchy's loss, as calibration has it."""
    q = (ends - goal).square().flatten(1).mean(1)
    c = TAIL * q.mean().detach()
    return (c * (1 + q / c).log()).mean()


def trained(
    denoiser: Denoiser, plan: Plan, fit: Any, select: Any, options: argparse.Namespace
) -> tuple[float, Plan, int]:
    """The least selection loss, its plan, and the evaluations of single samples that were spent."""
    model = Trained(plan, options.history)
    adam = torch.optim.Adam([{"params": [model.gaps], "lr": options.lr}, {"params": model.rows, "lr": options.lr / 3}])
    best, spent = (math.inf, plan), 0
    for step in range(options.steps + 1):
        if step % options.every == 0:
            with torch.no_grad():
                found = float(tempered(model(denoiser, select["noise"], select["cond"]), select["end"].double()))
            levels = [float(s.detach()) for s in model.levels()]
            spent += len(select["noise"]) * plan.nfe
            if found < best[0] and all(a > b for a, b in pairwise(levels)):
                best = found, model.plan()
        loss = tempered(model(denoiser, fit["noise"], fit["cond"]), fit["end"].double())
        adam.zero_grad()
        loss.backward()
        adam.step()
        spent += 3 * len(fit["noise"]) * plan.nfe  # a backward pass costs two forward ones
    return *best, spent


def in_eps(plan: Plan) -> bool:
    """Whether the ceiling can begin there."""
    return plan.basis == "eps" and plan.keep is None and not plan.noisy


def judge(name: str, nfe: int, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrated and trained plans of one model at one number of evaluations."""
    denoiser: Denoiser = mixture() if name == "mixture" else load(name)  # type: ignore[assignment]
    denoiser.requires_grad_(False)
    low, high = denoiser.sampling_range
    classes = getattr(denoiser, "classes", 0)
    cond: Cond = {"class_labels": torch.arange(classes)} if classes else {}
    teacher, sets = teacher_plan(100, low, high), {}
    for what, n in (("fit", FIT), ("select", SELECT), ("report", options.report)):
        generator = torch.Generator().manual_seed(options.seed * 10 + SEEDS[what])
        dtype = torch.float64 if name == "mixture" else torch.float32
        noise = torch.randn(n, *denoiser.shape, generator=generator, dtype=dtype)
        given = in_turn(cond, torch.arange(n))
        sets[what] = {"noise": noise, "cond": given, "end": teacher_ends(denoiser, teacher, noise, given)}
    about: dict[str, Any] = {"sigma_data": denoiser.sigma_data, "finite_at_inf": denoiser.finite_at_inf}
    began = time.process_time()
    own = calibrate(denoiser, nfe, cond=cond, seed=options.seed, basis="eps", history=options.history, contrast=False)
    minutes = {"calibrated": (time.process_time() - began) / 60}
    starts = {"calibrated": own, "automatic": auto_plan(nfe, low, high, **about, dim=denoiser.dim)}
    ends: dict[str, Plan] = dict(starts)
    losses, spent, began = {}, 0, time.process_time()
    for start, plan in starts.items():
        if in_eps(plan):
            losses[start], ends[f"Adam from {start}"], cost = trained(
                denoiser, plan, sets["fit"], sets["select"], options
            )
            spent += cost
    minutes["Adam"] = (time.process_time() - began) / 60
    counted = own.meta["evaluations"]
    calibrated = counted["samples_times_network"] + counted["teacher_samples_times_network"]
    report, errors = sets["report"], {}
    for which, plan in ends.items():
        x = sample(denoiser, plan, noise=report["noise"], cond=report["cond"], check=False)
        q = (x - report["end"]).double().square().flatten(1).mean(1)
        errors[which] = {"rmse": float(q.mean().sqrt()), "median": float(q.median().sqrt())}
    ceiling = f"Adam from {min(losses, key=lambda start: losses[start])}"
    return {
        "model": name, "nfe": nfe, "report": options.report, "errors": errors, "ceiling": ceiling, "minutes": minutes,
        "ratio": errors["calibrated"]["rmse"] / errors[ceiling]["rmse"],
        "median ratio": errors["calibrated"]["median"] / errors[ceiling]["median"],
        "evaluations": {"calibrated": calibrated, "Adam": spent},
    }  # fmt: skip


def page(work: Path, out: Path) -> None:
    """All that is done."""
    found = sorted((json.loads(f.read_text()) for f in work.glob("*.json")), key=lambda r: (r["model"], r["nfe"]))
    lines = [
        "| model | evaluations | automatic | calibrated | ceiling | calibrated over ceiling | of medians | cost |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        errors = one["errors"]
        spent = one["evaluations"]["calibrated"] / one["evaluations"]["Adam"]
        shown = [f"{errors[which]['rmse']:.4f}" for which in ("automatic", "calibrated", one["ceiling"])]
        numbers = [*shown, f"{one['ratio']:.3f}", f"{one['median ratio']:.3f}", f"{spent:.2f}"]
        lines.append(f"| {one['model']} | {one['nfe']} | {' | '.join(numbers)} |")
    marks = ("<!-- made -->", "<!-- /made -->")
    file = out / "ceiling.md"
    old = file.read_text() if file.exists() else f"# The ceiling of few-step plans\n\n{marks[0]}\n{marks[1]}\n"
    before, rest = old.split(marks[0])
    text = "\n".join(lines)
    replace_file(file, f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}".encode())
    replace_file(out / "ceiling.json", (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--nfe", type=lambda v: [int(n) for n in v.split(",")], default=list(NFE))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=20, help="steps between looks at the selection noises")
    parser.add_argument("--lr", type=float, default=0.01, help="Adam's, in log sigma; a third of it for rows")
    parser.add_argument("--history", type=int, default=2, help="past estimates in a row")
    parser.add_argument("--report", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/ceiling"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.models or ([] if options.table else MODELS):
        for nfe in options.nfe:
            file = options.work / f"{name.replace(':', '-').replace('/', '-')}-{nfe}.json"
            if not file.exists():
                found = judge(name, nfe, options)
                replace_file(file, (json.dumps(found, indent=1) + "\n").encode())
                print(f"{name} at {nfe}: calibrated over ceiling {found['ratio']:.3f}", flush=True)
    page(options.work, options.out)


if __name__ == "__main__":
    main()
