"""Weightings: w = 1 trains likelihood, sigmoid(2) trains samples?  The digits recipe with either, judged by both.

    python benchmarks/weightings.py --steps 1500 --seeds 3        # 6 runs; the same command goes on where it stopped
    python benchmarks/weightings.py --only elbo 0 --steps 1500    # one run
    python benchmarks/weightings.py --report --steps 1500         # the table, docs/results/weightings.md and .json

Runs of one seed share initial weights, batches and noise; the recipe is recipes/digits.yaml but for the weighting, the
number of steps and the clock: noise levels in [-8, 8] adapt to each weighting.  On the averaged weights of the end:

bound    bits/dim of all held-out digits, under the null condition and given the label; the same draws for all runs,
         levels in VDM's range (log-SNR [-5, 7.88] for 17 grey levels), which lies inside the trained one
FD       of samples from one set of noises, all classes in turn, at a fixed number of evaluations, in the features of a
         classifier of the digits (one for all runs) to the training digits

A weighting is said to win where the 95 % interval of the mean paired difference over seeds (Student's t) leaves out 0;
else the two are said to be undecided.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import ours
from logsnr.evaluation.features import feature_space
from logsnr.evaluation.metrics import summarise
from logsnr.files import replace_file
from logsnr.likelihood import bits_per_dim
from logsnr.sampling.counted import Counted
from logsnr.training import Dataset, load_data, load_recipe, train
from logsnr.training.checkpoint import has_state

WEIGHTINGS: dict[str, Any] = {"elbo": "elbo", "sigmoid": {"name": "sigmoid", "bias": 2.0}}
SHOWN = {"elbo": "w = 1", "sigmoid": "sigmoid(2 - lambda)"}
SAMPLERS, GRID, NFE = ("UniPC-3", "GE(2)"), "log-linear", 20
BATCH, SEED = 256, 20_000
"""Of bounds, samples and features; training takes its own."""


def measured(denoiser: NetworkDenoiser, data: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """The bound and the samples of one model."""
    assert data.test_labels is not None
    images, labels = data.test_images[: args.images], data.test_labels[: args.images]
    out: dict[str, Any] = {"images": len(images), "grey_levels": data.grey_levels, "samples": args.samples}
    for name, told in (("bound", torch.full_like(labels, data.classes)), ("given_label", labels)):
        found = bits_per_dim(
            denoiser,
            images,
            cond={"class_labels": told},
            generator=torch.Generator().manual_seed(SEED),
            evaluations_per_image=args.evaluations,
        )
        out[name] = {
            "value": found.bits_per_dim,
            "stderr": found.stderr,
            "data_stderr": found.data_stderr,
            "logsnr_range": list(found.logsnr_range),
        }
    space = feature_space("classifier", denoiser.decode, data, source="the digits", seed=0)
    noise = torch.randn(args.samples, *denoiser.shape, generator=torch.Generator().manual_seed(SEED + 1))
    cond = torch.arange(args.samples) % data.classes
    out |= {"features": space.name, "reference": space.data.n}
    for entry in ours(denoiser, [NFE], solvers=SAMPLERS, grids=[GRID]):
        if entry.solver not in SAMPLERS:
            continue
        parts = []
        for some, classes in zip(noise.split(BATCH), cond.split(BATCH), strict=True):
            counted = Counted(denoiser)
            parts.append(entry.run(counted, some, {"class_labels": classes}, torch.Generator()))
            assert counted.evaluations == entry.evaluations
        found = space.measure(torch.cat(parts), strata=cond)
        frechet, kernel = found.frechet, found.kernel()
        out[entry.solver] = {
            "evaluations": entry.evaluations,
            "fd": {"value": frechet.value, "stderr": frechet.stderr},
            "kid": {"value": kernel.value, "stderr": kernel.stderr},
        }
    return out


def run(weighting: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on training, and measure."""
    changes = {
        "objective.weighting": WEIGHTINGS[weighting],
        "seed": seed,
        "samples.every": 0,
        "max_seconds": None,
        "checkpoint_every": 250,
        "device": "cpu",
    }
    if args.steps:
        changes["steps"] = args.steps
    recipe = load_recipe("digits", changes)
    data, out = load_data(recipe.data), args.out / f"{weighting}-{recipe.steps}-{seed}"
    began = time.process_time()
    summary = train(recipe, out, progress=False, data=data, resume=has_state(out))
    trained = time.process_time()
    print(f"  {out.name}: {summary}", flush=True)
    return {
        "weighting": weighting,
        "seed": seed,
        "steps": summary.steps,
        "objective": recipe.objective.describe(),
        "training_loss": summary.loss,
        "parameters": sum(p.numel() for p in summary.denoiser.parameters()),
        **measured(summary.denoiser, data, args),
        # Of this process: a training that was interrupted counts from where it went on.
        "core_minutes": {"training": (trained - began) / 60, "measuring": (time.process_time() - trained) / 60},
        "machine": f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


NUMBERS = {
    "bits/dim": lambda r: r["bound"],
    "bits/dim given the label": lambda r: r["given_label"],
    **{f"FD, {name}": lambda r, name=name: r[name]["fd"] for name in SAMPLERS},
}
"""What is compared: a number with its standard error, less being better."""


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, paired differences with their 95 % intervals (Student's t) and who wins, number by number."""
    by = {(r["weighting"], r["seed"]): r for r in rows}
    seeds = sorted({s for w, s in by if all((other, s) in by for other in WEIGHTINGS)})
    out: dict[str, Any] = {"seeds": seeds}
    for name, read in NUMBERS.items() if seeds else ():
        pairs = [(read(by["elbo", s])["value"], read(by["sigmoid", s])["value"]) for s in seeds]
        gap = summarise([one - two for one, two in pairs])
        means = {w: statistics.mean(p[i] for p in pairs) for i, w in enumerate(WEIGHTINGS)}
        out[name] = {"means": means, "difference": gap.mean, "stderr": gap.stderr, "half": gap.half}
        out[name]["ahead"] = "elbo" if gap.mean < 0 else "sigmoid"
        out[name]["decided"] = gap.decided
    return out


def page(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """Everything in Markdown."""
    if not rows:
        return "no runs yet"
    first = rows[0]
    lo, hi = first["bound"]["logsnr_range"]
    each = sum(sum(r["core_minutes"].values()) for r in rows)
    lines = [
        "# w = 1 against sigmoid(2) on digits",
        "",
        f"The digits recipe with either weighting, {first['steps']} steps, {len(found['seeds'])} seeds in pairs "
        f"({first['parameters'] / 1e6:.2f} M parameters). Bits/dim: the bound of {first['images']} held-out digits, "
        f"{first['grey_levels']} grey levels, log-SNR [{lo:g}, {hi:.2f}], under the null condition and given the "
        f"label; FD (features: {first['features']}) of {first['samples']:,} samples to {first['reference']:,} training "
        f"digits, {NFE} evaluations on a {GRID} grid. ± one standard error: over noise for bits/dim, over samples for "
        "FD.",
        "",
        f"| weighting | seed | {' | '.join(NUMBERS)} |",
        "|---|---|" + "---|" * len(NUMBERS),
    ]
    for r in rows:
        cells = [_cell(read(r)["value"], read(r)["stderr"], name) for name, read in NUMBERS.items()]
        lines.append(f"| {SHOWN[r['weighting']]} | {r['seed']} | {' | '.join(cells)} |")
    gaps = [_cell(found[name]["difference"], found[name]["half"], name, sign="+") for name in NUMBERS]
    lines += [f"| difference, mean over seeds, ± half of its 95 % interval (Student's t) | | {' | '.join(gaps)} |", ""]
    for name in NUMBERS:
        ahead, decided = SHOWN[found[name]["ahead"]], found[name]["decided"]
        how = f"{ahead} is better" if decided else f"{ahead} is ahead, undecided: the interval holds 0"
        lines.append(f"- {name}: {how}.")
    lines += [
        "",
        f"`python benchmarks/weightings.py --steps {first['steps']} --seeds {len(found['seeds'])}`, then `--report`: "
        f"{each:.0f} core-minutes in all ({first['machine']}).",
    ]
    return "\n".join(lines)


def _cell(value: float, error: float, name: str, sign: str = "") -> str:
    digits = 3 if name.startswith("FD") else 4
    spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{value:{sign}.{digits}f}{spread}"


def report(args: argparse.Namespace) -> None:
    steps = args.steps or load_recipe("digits").steps
    files = sorted(args.out.glob(f"*-{steps}-*.json"))
    rows = sorted((json.loads(f.read_text()) for f in files), key=lambda r: (r["weighting"], r["seed"]))
    found = summary_of(rows)
    text = page(rows, found)
    print(text)
    if rows:
        args.write.mkdir(parents=True, exist_ok=True)
        replace_file(args.write / "weightings.md", (text + "\n").encode())
        facts = json.dumps({"summary": found, "runs": rows}, indent=1).replace("NaN", "null")
        replace_file(args.write / "weightings.json", (facts + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each training [default: the recipe's]")
    parser.add_argument("--only", nargs=2, metavar=("WEIGHTING", "SEED"), help="one run")
    parser.add_argument("--images", type=int, help="held-out digits of the bound [default: all]")
    parser.add_argument("--evaluations", type=int, default=64, help="per image of the bound, a multiple of 8")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/weightings"), help="folder of the runs and their JSON")
    parser.add_argument("--report", action="store_true", help="print and write the summary, run nothing")
    parser.add_argument("--write", type=Path, default=Path("docs/results"), help="where --report writes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.report:
        report(args)
        return
    wanted = [(w, seed) for seed in range(args.seeds) for w in WEIGHTINGS]
    if args.only:
        wanted = [(args.only[0], int(args.only[1]))]
    steps = args.steps or load_recipe("digits").steps
    for weighting, seed in wanted:
        path = args.out / f"{weighting}-{steps}-{seed}.json"
        if path.exists():
            continue
        found = run(weighting, seed, args)
        replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        told = [f"{name} {_cell(read(found)['value'], read(found)['stderr'], name)}" for name, read in NUMBERS.items()]
        print(f"{path.name}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
