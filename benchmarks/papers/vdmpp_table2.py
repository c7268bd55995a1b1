"""Table 2 of 2303.00848: weightings, outputs and schedules at equal training, with two samplers.

    python benchmarks/papers/vdmpp_table2.py --steps 1500                    # 16 rows x 5 seeds on the digits
    python benchmarks/papers/vdmpp_table2.py --recipe fashion_mnist --data F.npz --steps 3000
    python benchmarks/papers/vdmpp_table2.py --only 3 --seeds 0,1            # a row; the same command goes on

Every run has the recipe's network, data and optimizer, and **one range of noise levels for training and sampling, for
all rows** (the recipe's); runs of one seed share initial weights, batches and noise.  On the averaged weights:

    ancestral    DDPM's sampler on a geometric grid
    churned      EDM's stochastic Heun with its own churn, on its own grid

FD is of samples from one set of noises for each seed, to the training images.  A difference between rows is decided by
the 95 % interval (Student's t) of its paired difference over seeds.  The paper's FIDs (ImageNet 64 x 64, one run each)
stand beside, of another model and other features: only the order can be compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from runner import numbers, table, verdict_of, verdicts, write

from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.features import FeatureSpace, feature_space
from logsnr.evaluation.metrics import summarise
from logsnr.files import replace_file
from logsnr.sampling import heun, sample
from logsnr.sampling.grids import karras, log_linear
from logsnr.sampling.reference import EDMS_CHURN
from logsnr.sampling.solvers import ddpm
from logsnr.training import Dataset, load_data, load_recipe, train
from logsnr.training.checkpoint import has_state

NAME, TITLE = "vdmpp-table2", "Table 2 of the VDM++ paper, at our scale"
SEED = 20_000
"""Of samples and features; training takes its own."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row: what is predicted, drawn and weighted, and the paper's FID with either sampler."""

    prediction: str
    schedule: str
    weighting: str
    ancestral: float | None = None
    churned: float | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.prediction}, {self.schedule}, {self.weighting}"


def _rows() -> list[Setting]:
    """The paper's sixteen rows, in its order; EDM's own is the row that it reproduces."""
    found = [Setting(prediction="eps", schedule="cosine", weighting="eps-cosine", ancestral=1.85, churned=1.55)]
    for bias, ancestral, churned in (
        (1, 1.75, None),
        (2, 1.68, 1.46),
        (3, 1.73, None),
        (4, 1.80, None),
        (5, 1.94, None),
    ):
        found.append(
            Setting(
                prediction="eps", schedule="cosine", weighting=f"sigmoid({bias})", ancestral=ancestral, churned=churned
            )
        )
    more = (
        ("eps", "adaptive", "sigmoid(2)", 1.70, 1.44),
        ("eps", "adaptive", "edm-monotonic", 1.67, 1.44),
        ("edm", "edm-training", "edm", None, 1.45),
        ("edm", "adaptive", "edm", None, 1.43),
        ("edm", "adaptive", "sigmoid(2)", None, 1.55),
        ("edm", "adaptive", "edm-monotonic", None, 1.43),
        ("v", "adaptive", "v", None, 1.62),
        ("v", "adaptive", "sigmoid(2)", None, 1.51),
        ("v", "adaptive", "edm-monotonic", None, 1.45),
    )
    return found + [Setting(prediction=p, schedule=s, weighting=w, ancestral=a, churned=c) for p, s, w, a, c in more]


ROWS = {setting.name: setting for setting in _rows()}
CLAIMS = (
    ("sigmoid(2) is better than the eps baseline", "eps, cosine, sigmoid(2)", "eps, cosine, eps-cosine"),
    ("adaptive is better than cosine (sigmoid(2))", "eps, adaptive, sigmoid(2)", "eps, cosine, sigmoid(2)"),
    ("adaptive is better than EDM's density (EDM)", "edm, adaptive, edm", "edm, edm-training, edm"),
    ("EDM-monotonic is better than EDM", "edm, adaptive, edm-monotonic", "edm, adaptive, edm"),
    ("EDM-monotonic is better than sigmoid(2) (eps)", "eps, adaptive, edm-monotonic", "eps, adaptive, sigmoid(2)"),
    (
        "EDM-monotonic is better than sigmoid(2) (EDM's output)",
        "edm, adaptive, edm-monotonic",
        "edm, adaptive, sigmoid(2)",
    ),
    ("EDM-monotonic is better than the v baseline", "v, adaptive, edm-monotonic", "v, adaptive, v"),
    ("sigmoid(2) is better than the v baseline", "v, adaptive, sigmoid(2)", "v, adaptive, v"),
    ("v is better than eps (sigmoid(2))", "v, adaptive, sigmoid(2)", "eps, adaptive, sigmoid(2)"),
)
"""What the table is read to say."""


def changes(setting: Setting, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A row as changes of the recipe."""
    bias = setting.weighting.removeprefix("sigmoid(").rstrip(")")
    weighting: Any = (
        {"name": "sigmoid", "bias": float(bias)} if setting.weighting.startswith("sigmoid") else setting.weighting
    )
    adaptive = setting.schedule == "adaptive"
    return {
        "prediction.name": setting.prediction, "objective.weighting": weighting, "objective.adaptive": adaptive,
        "objective.schedule": "cosine" if adaptive else setting.schedule, "seed": seed, "steps": options.steps,
        "samples.every": 0, "max_seconds": None, "checkpoint_every": max(options.steps // 4, 1),
        "device": options.device,
        **({"data.source": options.data} if options.data else {}),
        **({"network.channels": [8, 8], "network.mid_attention": False} if options.smoke else {}),
    }  # fmt: skip


@torch.no_grad()
def distances(model: NetworkDenoiser, space: FeatureSpace, classes: int, seed: int, options: argparse.Namespace) -> Any:
    """FD of both samplers."""
    low, high = model.trained_range
    generator = torch.Generator().manual_seed(SEED + seed)
    noise = torch.randn(options.n, *model.shape, generator=generator).to(options.device)
    labels = torch.arange(options.n, device=options.device) % classes if classes else None
    churn = replace(EDMS_CHURN, s_max=min(EDMS_CHURN.s_max, high / 2**0.5), s_min=max(EDMS_CHURN.s_min, low))
    steps = ddpm(log_linear(options.evaluations, high, low))
    grid, out = karras((options.evaluations + 1) // 2, high, low), {}
    for name in ("ancestral", "churned"):
        parts, draws = [], torch.Generator().manual_seed(SEED + seed)
        for i in range(0, options.n, options.chunk):
            part = slice(i, i + options.chunk)
            cond = None if labels is None else {"class_labels": labels[part]}
            if name == "ancestral":
                parts.append(sample(model, steps, noise=noise[part], cond=cond, generator=draws, check=False))
            else:
                parts.append(heun(model, grid, churn=churn, noise=noise[part], cond=cond, generator=draws))
        found = space.measure(torch.cat(parts), strata=labels).frechet
        out[name] = {"value": found.value, "stderr": found.stderr}
    return out


def run(setting: Setting, seed: int, data: Dataset, space: FeatureSpace | None, options: argparse.Namespace) -> Any:
    """Train, or go on training, and measure."""
    recipe = load_recipe(options.recipe, changes(setting, options, seed))
    folder = options.work / f"{NAME}-{options.recipe}" / f"{list(ROWS).index(setting.name)}-{options.steps}-{seed}"
    began = time.process_time()
    summary = train(recipe, folder, progress=False, data=data, resume=has_state(folder))
    assert isinstance(summary.denoiser, NetworkDenoiser)
    model = summary.denoiser.eval()
    space = space or feature_space(options.features, model.decode, data, source=options.recipe, seed=0)
    found = distances(model, space, data.classes if recipe.conditional else 0, seed, options)
    minutes = (time.process_time() - began) / 60
    return {**found, "loss": summary.loss, "core_minutes": minutes, "features": space.name}, space


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--data", help="in place of the recipe's source")
    parser.add_argument("--features", default="classifier")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=numbers, default=list(range(5)))
    parser.add_argument("--only", type=numbers, help="rows, counted from 0")
    parser.add_argument("-n", "--number", dest="n", type=int, default=1000, help="samples of each run and sampler")
    parser.add_argument("--evaluations", type=int, default=63)
    parser.add_argument("--chunk", type=int, default=250)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/papers"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        few = {"steps": 2, "seeds": [0, 1], "only": [0, 2, 8], "n": 8, "evaluations": 3, "out": options.work}
        vars(options).update(few)
    options.model = options.recipe
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    data = load_data(load_recipe(options.recipe, {"data.source": options.data} if options.data else {}).data)
    file = options.work / f"{NAME}-{options.recipe}-{options.steps}{'-smoke' if options.smoke else ''}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    space: FeatureSpace | None = None
    for seed in options.seeds:
        for i, setting in enumerate(ROWS.values()):
            if (options.only is None or i in options.only) and f"{setting.name}, {seed}" not in known:
                known[f"{setting.name}, {seed}"], space = run(setting, seed, data, space, options)
                replace_file(file, (json.dumps(known, indent=1) + "\n").encode())
                print(f"{setting.name}, seed {seed}: {known[f'{setting.name}, {seed}']}", flush=True)
    report(known, options)


def report(known: dict[str, Any], options: argparse.Namespace) -> None:
    """The table, with the paper's beside it, and the verdicts."""
    lines, judged = [], []
    values = {
        (name, by): {s: known[f"{name}, {s}"][by]["value"] for s in options.seeds if f"{name}, {s}" in known}
        for name in ROWS for by in ("ancestral", "churned")
    }  # fmt: skip
    for name, setting in ROWS.items():
        if not values[name, "churned"]:
            continue
        row = [name]
        for by in ("ancestral", "churned"):
            told = summarise(list(values[name, by].values()))
            theirs = getattr(setting, by)
            row += [f"{told.mean:.3f} ± {told.stderr:.3f}", "-" if theirs is None else f"{theirs}"]
        lines.append(row)
    for says, less, more in CLAIMS:
        for by in ("ancestral", "churned"):
            if values[less, by] and values[more, by]:
                claim = {"claim": f"{says}, {by}", "nfe": options.evaluations, "by": "frechet"}
                judged.append(claim | {"less": less, "more": more} | verdict_of(values[less, by], values[more, by]))
    one = next(iter(known.values()))
    minutes = sum(cell["core_minutes"] for cell in known.values())
    head = ("output, schedule, weighting", "ancestral: FD", "paper", "churned: FD", "paper")
    text = (
        f"Recipe `{options.recipe}`, {options.steps} steps, seeds {', '.join(map(str, options.seeds))}; {options.n} "
        f"samples of {options.evaluations} evaluations; FD (features: {one['features']}); {minutes:.0f} "
        "core-minutes.\n\n"
        f"{table(head, lines)}\n\n{verdicts(judged)}"
    )
    write(NAME, TITLE, text, {"runs": known, "claims": judged}, options)


if __name__ == "__main__":
    main()
