"""What a model loses by not being asked: universal plans against its own, and against stock solvers.

    MODELS="zoo:digits zoo:fashion-mnist zoo:fashion-mnist-classes --images fashion_mnist.npz cifar10.npz"
    python benchmarks/universal.py $MODELS          leave-one-out regret, ratios to stock solvers

Each plan of the family (tools/universal.py) is fitted once more without the model that it is judged on (all models of
one data set, by the first word of their names, are left out together), and compared: with the model's own calibrated
plan (regret; a zoo model's is the one it comes with), and with GE(2), DPM++(2M) and UniPC-2, each on the better of a
log-linear and a Karras grid over the model's sampling range.  Exact mixtures of 8, 16 and 48 dimensions are judged too,
and take part in no fit: where a small mixture decides, and how late, is no guide to images.  It writes
docs/results/universal.md.  What is done is kept in --work, and gone on from.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from logsnr import exact
from logsnr.calibration import calibrate
from logsnr.calibration.rollout import mean_square
from logsnr.calibration.teacher import taught
from logsnr.calibration.universal import Member
from logsnr.loading import load_plans
from logsnr.sampling import Plan, grids, solvers
from logsnr.sampling.batches import in_turn
from logsnr.sampling.start import start
from logsnr.sampling.teacher import teacher_plan
from logsnr.sampling.universal import scaled

sys.path.insert(0, str(Path(__file__).parents[1]))  # the family is that of the tool
from tools.universal import RANGES, Model, Work, command_line, family, fitted, in_range, members_of

RESULTS = Path(__file__).parents[1] / "docs/results"
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


def mixture(d: int, k: int, seed: int, spread: float, floor: float, decay: float = 0.0) -> exact.GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1) ** (-decay / 2)
    means = torch.randn(k, d, generator=g) * scale
    factors = torch.randn(k, d, d, generator=g) * (spread / math.sqrt(d)) * scale[:, None]
    return exact.GaussianMixture(torch.ones(k) / k, means, factors @ factors.mT + floor**2 * torch.eye(d))


def mixtures() -> dict[str, Model]:
    return {
        "mixture 8d": Model(mixture(8, 6, 11, 0.4, 0.1), "8d"),
        "mixture 16d": Model(mixture(16, 8, 12, 0.5, 0.1), "16d"),
        "mixture 48d": Model(mixture(48, 10, 13, 0.7, 0.05, 1.0), "48d"),
    }


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", help="judge these groups only, such as digits, fashion, 8d")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder for universal.json and .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options.work)
    for span in options.ranges.split(","):
        models = family(options.runs, options.images, span)
        members = members_of(models, span, options.number, options.seed)
        models |= in_range(mixtures(), span)
        for name, one in models.items():
            if not options.only or one.group in options.only:
                for nfe in map(int, options.nfe.split(",")):
                    judge(work, models, members, span, nfe, name, options.seed)
    write(work, options.out, vars(options))


def judge(
    work: Work,
    models: dict[str, Model],
    members: dict[str, Member],
    span: str,
    n: int,
    name: str,
    seed: int,
) -> None:
    """RMSE of one model on noise that no fit has seen, with the plan of the others and with what it competes with."""
    one = models[name]
    (low, high), denoiser = one.denoiser.sampling_range, one.denoiser
    rest = {other: members[other] for other in members if models[other].group != one.group}
    without = None if len(rest) == len(members) else one.group
    plan = scaled(fitted(work, rest, span, n, without), denoiser.sigma_data, low, high)
    shipped = load_plans(name.removeprefix("network ")) if span == "wide" and name.startswith("network zoo:") else {}

    def make() -> dict[str, Any]:
        noise = start(denoiser, None, JUDGED, torch.Generator().manual_seed(10**6 + seed))
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
    about = {key: settings[key] for key in ("seed", "number", "threads")} | {"judged": JUDGED, "machine": MACHINE}
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
