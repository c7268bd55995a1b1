"""What calibration buys: plans of 4 to 10 evaluations against every stock solver, from fresh noise.

    python benchmarks/few_step.py --data fashion_mnist.npz                 an exact mixture and the zoo's models
    python benchmarks/few_step.py mixture runs/digits --nfe 5,8            these models, these numbers of evaluations
    python benchmarks/few_step.py runs/fashion-classes@2 --nfe 5           with guidance 2: two evaluations a step
    python benchmarks/few_step.py --table                                  what is done, as a table

Each pair of a model and a number of evaluations is one file in --out and is not done twice, so the work can be cut
into pieces.  Its best peers are another: a new plan can be judged by them without the search for them.  End-point RMSE
against a teacher of the same noise, finer than the one that plans are fitted to.

(a) stock: the best, on the very noise that is reported, of all solvers on log-linear, Karras and even flow-time grids
    over the sampling range, with the last step to sigma 0 or none, and on the table's even timesteps; of all these
    (about 150), the --screen likeliest by 16 other noises (0: all)
(b) tuned: the best, on selection noise, of the --tune leading solvers with the two ends of their grids tuned there, of
    iPNDM on searched levels (GITS), and of DPM++(2M) and UniPC-2 on the levels of least KL bound (Align Your Steps)

Targets: (a) at most .7 in geometric mean over models, (b) at most 1 for each.  FD, where the model's data are at hand,
is in the features of a classifier trained on them, of the reported samples (biased upwards alike for all).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import textwrap
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr import guidance
from logsnr.calibration import calibrate
from logsnr.calibration.baselines import aligned, searched, tuned_ends
from logsnr.calibration.ledger import fingerprint
from logsnr.calibration.rollout import Noises, squares
from logsnr.calibration.teacher import remember, taught
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation.features import FeatureSpace, feature_space
from logsnr.exact import GaussianMixture
from logsnr.loading import load, load_plans
from logsnr.sampling import Plan, grids, sample, solvers
from logsnr.sampling.batches import Cond, in_turn
from logsnr.sampling.names import compared_grids, compared_solvers, find_grid, find_solver
from logsnr.sampling.plan import Grid
from logsnr.sampling.start import start
from logsnr.sampling.table import table_of
from logsnr.sampling.teacher import teacher_plan
from logsnr.training import load_data
from logsnr.training.config import DataConfig

GRIDS = {name: find_grid(name)[1] for name in compared_grids("range")}
SOLVERS: dict[str, Callable[[Grid], Plan]] = {
    **{name: find_solver(name)[1] for name in compared_solvers("rows")},
    **{f"GE({g}) {b}": partial(solvers.ge, gamma=g, basis=b) for g in (1.5, 2.0) for b in ("x0", "velocity")},
    **{f"{name}-4": partial(make, order=4) for name, make in (("AB", solvers.adams_bashforth), ("DEIS", solvers.deis))},
    "DPM++(2M) ramp": partial(solvers.dpmpp, final="ramp"),
    "UniPC-1": partial(solvers.unipc, order=1),
    "UniPC-2 ramp": partial(solvers.unipc, final="ramp"),
}
"""All that are compared everywhere, and some that seldom win."""
MODELS = ("mixture", "zoo:digits", "zoo:fashion-mnist", "zoo:fashion-mnist-classes@2")
PEER_SETTINGS = ("seed", "report", "teacher", "tune", "screen")
Training = tuple[Callable[[Tensor], Tensor], dict[str, Any]]
"""What makes uint8 images of samples, and the recipe's data."""


def mixture(d: int = 8, components: int = 6, seed: int = 0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, generator=g)
    factors = torch.randn(components, d, d, generator=g) * 0.375 / math.sqrt(d)
    covs = factors @ factors.mT + 0.01 * torch.eye(d)
    return GaussianMixture(torch.full((components,), 1 / components), means, covs)


def noises(denoiser: Denoiser, cond: Mapping[str, Any] | None, seed: int, n: int) -> tuple[Tensor, Cond]:
    noise = start(denoiser, None, n, torch.Generator().manual_seed(seed))
    return noise, in_turn(cond, torch.arange(n))


def model(name: str, device: str) -> tuple[Denoiser, Cond | None, Training | None]:
    """A model, its conditions and what it was trained on, of "mixture" or "FOLDER" or "zoo:NAME", and "@GUIDANCE"."""
    if name == "mixture":
        return mixture().to(device), None, None
    source, _, scale = name.partition("@")
    denoiser = load(source, device=device)
    card = denoiser.card
    classes = card.get("classes")
    cond = {"class_labels": torch.arange(classes, device=device)} if classes else None
    trained = (denoiser.decode, card["training"]["data"]) if "data" in card.get("training", {}) else None
    if not scale:
        return denoiser, cond, trained
    if card.get("null_class") is None:
        raise LogsnrError(f"{name}: the model has no null class to guide away from; leave out @{scale}")
    null = {"class_labels": torch.tensor([card["null_class"]], device=device)}
    return guidance.cfg(denoiser, float(scale), null), cond, trained


def judge(trained: Training | None, at: list[Path], seed: int) -> FeatureSpace | None:
    """Features of a classifier of the model's data, None where these are not at hand or have no labels."""
    if trained is None:
        return None
    decode, data = trained
    source = next((str(path) for path in at if path.name == data["source"]), data["source"])
    try:
        config = DataConfig(**{**data, "source": source})
        return feature_space("classifier", decode, load_data(config), source=Path(config.source).name, seed=seed)
    except (LogsnrError, ValueError, OSError) as error:
        print(f"no FD: {error}")
        return None


class Bench:
    """One model with its noises: the same for every number of evaluations."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.denoiser, self.cond, trained = model(name, options.device)
        self.low, self.high = self.denoiser.sampling_range
        self.table = table_of(self.denoiser)
        self.chunk = options.chunk
        seed, steps = options.seed, options.teacher
        draw = partial(noises, self.denoiser, self.cond)
        # of the exact mixture one noise in several hundred switches modes, and is most of its mean square
        many = name == "mixture"
        self.fit, tune = (count * (4 if many else 1) for count in (options.fit, options.select))
        select, count = draw(2 * 10**6 + seed, tune), options.report * (16 if many else 1)
        plan = teacher_plan(steps, self.low, self.high)
        self.select, self.cache = remember(self.denoiser, plan, *select, chunk=self.chunk)
        plan = teacher_plan(3 * steps // 2, self.low, self.high)
        self.report = taught(self.denoiser, plan, *draw(10**6 + seed, count), chunk=self.chunk)
        self.space = judge(trained, options.data, seed)

    def squares(self, plan: Plan, noises: Noises) -> Tensor:
        return squares(self.denoiser, plan, noises, self.chunk, None)

    def error(self, plan: Plan, noises: Noises) -> float:
        return float(self.squares(plan, noises).mean().sqrt())

    def samples(self, plan: Plan) -> Tensor:
        return sample(self.denoiser, plan, noise=self.report.noise, cond=self.report.cond, chunk=self.chunk)

    def frechet(self, sets: dict[str, Tensor]) -> dict[str, list[float]] | None:
        """FD of each set with its standard error, and the plan's less each other one's, with that of the difference.

        All sets start from the same noise, so differences are better known than distances.
        """
        if self.space is None:
            return None
        found = {name: self.space.measure(x).influenced for name, x in sets.items()}
        values = {name: one.estimated for name, one in found.items()}
        values |= {f"plan - {name}": found["plan"].beyond(found[name]) for name in sets if name != "plan"}
        return {name: [one.value, one.stderr] for name, one in values.items()}

    def calibrated(self, n: int) -> tuple[Plan, float | None]:
        """The plan and the seconds it took: the one that a model of the zoo comes with, or a new one."""
        options = self.options
        settings = {"n": self.fit, "seed": options.seed}
        if self.name.startswith("zoo:") and "@" not in self.name:
            plan = load_plans(self.name).get(n)
            made = {} if plan is None else {"n": plan.meta.get("batch"), **plan.meta}  # batch: of plans of version 0.1
            wanted = {"model": fingerprint(self.denoiser), **settings}
            if plan and options.rollouts is None and all(made.get(key) == value for key, value in wanted.items()):
                return plan, None
        out = options.out / f"{file_name(self.name)}-{n}"
        ledger = out.with_suffix(".ledger")  # keeps an interrupted calibration's measurements
        began = time.perf_counter()
        plan = calibrate(
            self.denoiser, n, cond=self.cond, resume=ledger, rollouts=options.rollouts, chunk=self.chunk, **settings
        )
        seconds = time.perf_counter() - began
        if plan.meta["interrupted"]:
            raise KeyboardInterrupt
        plan.save(out.with_suffix(".plan.json"))
        ledger.unlink(missing_ok=True)
        return plan, seconds

    def rivals(self, n: int) -> tuple[tuple[str, Plan], tuple[str, Plan]]:
        """The best stock and the best tuned peer.  Their names are kept: another plan is judged by the same ones."""
        options, low, high = self.options, self.low, self.high
        levels = {g: GRIDS[g](n, high, low) for g in GRIDS} | {"timesteps": grids.timesteps(n, self.table)}
        peers = {f"{s}, {g}": SOLVERS[s](grid) for s in SOLVERS for g, grid in levels.items()}
        on_third = partial(self.error, noises=self.select.first(max(len(self.select) // 3, 16)))

        def at_its_ends(name: str) -> Plan:
            s, g = name.split(", ", 1)
            return tuned_ends(SOLVERS[s], GRIDS[g], n, low, high, on_third)[1]

        tuned: dict[str, Callable[[], Plan]] = {
            "iPNDM-4, searched": lambda: searched(self.cache, n, self.denoiser.sigma_data),
            "DPM++(2M), aligned": lambda: aligned(self.cache, n),
            "UniPC-2, aligned": lambda: aligned(self.cache, n, solvers.unipc),
            **{f"{name}, ends": partial(at_its_ends, name) for name in peers if not name.endswith("timesteps")},
        }
        file = options.out / f"{file_name(self.name)}-{n}.peers.json"
        settings = {
            "model": fingerprint(self.denoiser),
            **{k: getattr(options, k) for k in PEER_SETTINGS},
            "select": len(self.select),
        }
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("settings") != settings:
            few = self.select.first(16)
            ranked = sorted(peers, key=lambda name: self.error(peers[name], few))
            best = min(ranked[: options.screen or None], key=lambda name: self.error(peers[name], self.report))
            leading = [f"{name}, ends" for name in ranked if f"{name}, ends" in tuned][: options.tune]
            names = [name for name in tuned if not name.endswith("ends")] + leading
            winner = min(names, key=lambda name: self.error(tuned[name](), self.select))
            kept = {"settings": settings, "stock": best, "tuned": winner}
            file.write_text(json.dumps(kept, indent=1) + "\n")
        return (kept["stock"], peers[kept["stock"]]), (kept["tuned"], tuned[kept["tuned"]]())

    def run(self, n: int) -> dict[str, Any]:
        options = self.options
        (best, first), (winner, second) = self.rivals(n)
        plan, seconds = self.calibrated(n)
        mine, stock, other = (self.squares(p, self.report) for p in (plan, first, second))
        sets = {"plan": self.samples(plan), "stock": self.samples(first), "teacher": self.report.end}
        return {
            "model": self.name,
            "nfe": n,
            "seed": options.seed,
            "rmse": float(mine.mean().sqrt()),
            "over_stock": ratio(mine, stock),
            "stock_name": best,
            "over_tuned": ratio(mine, other),
            "tuned_name": winner,
            "plan": {"basis": plan.basis, **plan.meta["found"]},
            "evaluations": plan.meta["evaluations"],
            "seconds": seconds,
            "fd": self.frechet(sets),
            "features": None if self.space is None else self.space.name,
            "sizes": {"fit": self.fit, "select": len(self.select), "report": len(self.report)},
            "machine": f"{platform.machine()}, {options.device}, {torch.get_num_threads()} threads",
        }


def ratio(mine: Tensor, other: Tensor) -> list[float]:
    """RMSE over RMSE on the same noises, and its standard error (delta method, in pairs)."""
    a, b = float(mine.mean()), float(other.mean())
    value = math.sqrt(a / b)
    return [value, value * float((mine / a - other / b).std()) / (2 * math.sqrt(len(mine)))]


def file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.removeprefix("zoo:").rstrip("/").split("/")[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every model and number of evaluations, then geometric means."""
    lines = [
        "| model | NFE | RMSE | (a) over best stock | (b) over best tuned | FD plan / stock / teacher "
        "| plan less teacher | rollouts | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fd, less = "", ""
        if row["fd"]:
            fd = " / ".join(f"{v:.2f} ± {e:.2f}" for v, e in (row["fd"][k] for k in ("plan", "stock", "teacher")))
            less = "{:+.3f} ± {:.3f}".format(*row["fd"]["plan - teacher"])
        lines.append(
            f"| {row['model']} | {row['nfe']} | {row['rmse']:.4f} "
            f"| {'{:.3f} ± {:.3f}'.format(*row['over_stock'])} ({row['stock_name']}) "
            f"| {'{:.3f} ± {:.3f}'.format(*row['over_tuned'])} ({row['tuned_name']}) | {fd} | {less} "
            f"| {row['evaluations']['rollouts']:.0f} | {'' if row['seconds'] is None else round(row['seconds'])} |"
        )
    lines.append("")
    for n in sorted({row["nfe"] for row in rows}):
        own = [row for row in rows if row["nfe"] == n]
        a, b = ([row[peer][0] for row in own] for peer in ("over_stock", "over_tuned"))
        mean = math.exp(sum(map(math.log, a)) / len(a))
        said = "meets" if mean <= 0.7 and max(b) <= 1 else "misses"
        lines.append(
            f"NFE {n}, {len(own)} models: (a) geometric mean {mean:.3f}, (b) largest {max(b):.3f}: {said} .7 and 1"
        )
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    """The table with what it needs to be read alone."""
    machines = sorted({row["machine"] for row in rows})
    counts = {row["model"]: row["sizes"]["report"] for row in rows}
    reported = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    sizes = rows[-1]["sizes"]
    features = sorted({row["features"] for row in rows if row["features"]})
    told = f"""End-point RMSE on fresh noises ({reported}), seed {rows[0]["seed"]}, against a teacher of the same
    noise. Plans are fitted to {sizes["fit"]} other noises (the mixture's to {4 * sizes["fit"]}); the zoo's models are
    judged with the plans that they come with, guided ones with plans made under that guidance. (a) is over the best
    stock solver on the very noise that is reported, (b) over the best that was tuned to the model on {sizes["select"]}
    noises, the mixture's on {4 * sizes["select"]} (ends of its grid, GITS, Align Your Steps). `@2` is classifier-free
    guidance of scale 2. FD (features: {", ".join(features) or "none"}) is to the training data; its difference to the
    teacher's is of the same noises, with the error of the difference. Rollouts: evaluations of the fitting batch per
    step, beside the teacher's. Machine: {"; ".join(machines)}. Made by `python benchmarks/few_step.py MODEL --report
    NOISES --data fashion_mnist.npz`, model by model, the mixture's NOISES being a sixteenth, and `--table --write
    docs/results`."""
    title = "# Few-step plans beside every stock solver"
    return "\n\n".join([title, textwrap.fill(" ".join(told.split()), 118), table(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=MODELS, help="mixture, folder of a run, zoo:NAME; each [@GUIDANCE]"
    )
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--data", type=Path, action="append", default=[], help="where a file of training data lies")
    parser.add_argument("--fit", type=int, default=96, help="noises to fit to")
    parser.add_argument("--select", type=int, default=96, help="noises to tune the peers on")
    parser.add_argument("--report", type=int, default=512, help="fresh noises to report on")
    parser.add_argument(
        "--teacher", type=int, default=64, help="evaluations of the teacher; the report's has half more"
    )
    parser.add_argument("--rollouts", type=int, help="budget of calibrate; its own default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", type=int, default=8, help="how many of the leading stock peers get their ends tuned")
    parser.add_argument("--screen", type=int, default=12, help="stock peers measured on the report noise; 0 for all")
    parser.add_argument("--chunk", type=int, default=96, help="samples per call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/few-step"))
    parser.add_argument("--table", action="store_true", help="only print what is done")
    parser.add_argument("--write", type=Path, help="folder for few-step.json and few-step.md, e.g. docs/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in () if options.table else options.models:
        todo = [n for n in map(int, options.nfe.split(",")) if not result(options.out, name, n).exists()]
        try:
            bench = Bench(name, options) if todo else None
        except LogsnrError as error:
            print(f"{name}: {error}")
            continue
        for n in todo:
            assert bench is not None
            with torch.no_grad():
                row = bench.run(n)
            result(options.out, name, n).write_text(json.dumps(row, indent=1) + "\n")
            print(table([row]).splitlines()[2], flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.result.json"))]
    if rows:
        rows.sort(key=lambda row: (row["model"], row["nfe"]))
        print(table(rows))
        if options.write is not None:
            (options.write / "few-step.json").write_text(json.dumps(rows, indent=1) + "\n")
            (options.write / "few-step.md").write_text(page(rows) + "\n")


def result(folder: Path, name: str, n: int) -> Path:
    return folder / f"{file_name(name)}-{n}.result.json"


if __name__ == "__main__":
    main()
