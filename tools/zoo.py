"""Publish a trained run in the zoo: half-precision weights, calibrated plans, and a card of what was measured on them.

    logsnr train recipes/digits.yaml --out runs/zoo-digits --set steps=2500 --set ema.decay=.998 --set max_seconds=null
    python tools/zoo.py runs/zoo-digits digits

Everything is measured on the rounded weights that are shipped: the variational bound of held-out images (a conditional
model's under its null condition, and given the label), and end-point RMSE and FD of the plans beside stock samplers.
Each stage keeps its result in the run's folder under zoo/, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from logsnr import zoo
from logsnr.calibration import calibrate
from logsnr.denoiser import NetworkDenoiser
from logsnr.evaluation.compare import measure, ours, peers, plans, uncalibrated
from logsnr.evaluation.compare.result import Comparison
from logsnr.evaluation.features import feature_space
from logsnr.evaluation.metrics import Estimated
from logsnr.files import replace_file
from logsnr.likelihood import bits_per_dim
from logsnr.models import load_denoiser, save_denoiser
from logsnr.sampling import Plan
from logsnr.training import Dataset, load_data
from logsnr.training.config import DataConfig, ObjectiveConfig

NFE = (4, 5, 6, 8, 10)
LEADERS = 4
"""Of all solvers on all grids, ours and diffusers', so many are measured at each number of evaluations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="of the model in the zoo")
    parser.add_argument("--data", help="where the training data lie [default: the recipe's source]")
    parser.add_argument("--images", type=int, default=1000, help="held-out images of the bound")
    parser.add_argument("--samples", type=int, default=500, help="samples of the comparison")
    parser.add_argument("--few", type=int, default=48, help="noises that all solvers on all grids are ranked by")
    parser.add_argument("-n", "--number", type=int, default=96, help="noises that plans are fitted to")
    parser.add_argument("--rollouts", type=int, help="budget of each plan [default: that of calibrate]")
    parser.add_argument("--chunk", type=int, default=96, help="images per call of the network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.run / "zoo"
    denoiser = _rounded(options.run, work)
    if options.compile:
        denoiser.network.compile(dynamic=False)
    card = denoiser.card
    recipe = card["training"]
    source = options.data or recipe["data"]["source"]
    data = load_data(DataConfig(**{**recipe["data"], "source": source}))
    recipe["data"]["source"] = Path(source).name  # where it lay on this machine is nobody's business

    def stage(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = work / f"{name}.json"
        if not file.exists():
            began = time.perf_counter()
            replace_file(file, (json.dumps(make(), indent=1) + "\n").encode())
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    bound = stage("bound", lambda: _bound(denoiser, data, options.images))
    cond = {"class_labels": torch.arange(card["classes"])} if card["classes"] else None

    def fitted(nfe: int) -> dict[str, Any]:
        ledger = work / f"ledger-{nfe}.json"
        sizes = {"n": options.number, "rollouts": options.rollouts, "chunk": options.chunk}
        return calibrate(denoiser, nfe, **sizes, cond=cond, resume=ledger).to_dict()

    found = {nfe: Plan.from_dict(stage(f"plan-{nfe}", partial(fitted, nfe))) for nfe in NFE}
    comparison = Comparison.from_dict(stage("quality", lambda: _quality(denoiser, data, found, cond, options)))
    measured = {"bound": bound, "quality": _best(comparison), "machine": comparison.machine}
    folder = zoo.FOLDER / options.name
    shutil.rmtree(folder, ignore_errors=True)
    save_denoiser(denoiser, folder, step=card["step"], training=recipe, measured=measured, dtype=torch.float16)
    sets = {str(nfe): plan.to_dict() for nfe, plan in found.items()}
    replace_file(folder / zoo.PLANS, (json.dumps(sets, indent=1) + "\n").encode())
    text = _readme(options.name, denoiser, measured, len(data.train_images))
    replace_file(folder / "README.md", text.encode())
    print(text)


def _rounded(run: Path, work: Path) -> NetworkDenoiser:
    """The run's model with the weights that will be shipped."""
    denoiser = load_denoiser(run)
    card = denoiser.card
    save_denoiser(denoiser, work / "rounded", step=card["step"], training=card["training"], dtype=torch.float16)
    return load_denoiser(work / "rounded")


def _bound(denoiser: NetworkDenoiser, data: Dataset, limit: int) -> dict[str, Any]:
    """The bound of the first held-out images, the same draws with and without the label."""
    images = data.test_images[:limit]
    classes = denoiser.card["classes"]
    conditions: dict[str, Any] = {"bits_per_dim": None}
    if classes:
        assert data.test_labels is not None
        conditions["bits_per_dim"] = {"class_labels": torch.full((len(images),), classes)}
        conditions["given_label"] = {"class_labels": data.test_labels[:limit]}
    facts: dict[str, Any] = {"images": len(images), "grey_levels": data.grey_levels, "seed": 0}
    for name, cond in conditions.items():
        found = bits_per_dim(
            denoiser,
            images,
            cond=cond,
            generator=torch.Generator().manual_seed(0),
            evaluations_per_image=32,
        )
        error = "stderr" if name == "bits_per_dim" else f"{name}_stderr"
        facts |= {name: found.bits_per_dim, error: found.stderr, "logsnr_range": list(found.logsnr_range)}
    return facts


def _quality(
    denoiser: NetworkDenoiser,
    data: Dataset,
    found: dict[int, Plan],
    cond: dict[str, Any] | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    space = None
    if data.train_labels is not None:
        space = feature_space("classifier", denoiser.decode, data, source="its training data", seed=0)
    stock = [*ours(denoiser, NFE), *peers(denoiser, NFE)]
    ranked = measure(denoiser, stock, n=options.few, seed=10**7, cond=cond, chunk=options.chunk)
    leaders = {(row.name, row.budget) for n in NFE for row in ranked.at(n)[:LEADERS]}
    entries = [
        *(entry for entry in stock if (entry.name, entry.budget) in leaders),
        *uncalibrated(denoiser, NFE),
        *plans(denoiser, {f"calibrated {nfe}": plan for nfe, plan in found.items()}),
    ]
    sizes = {"n": options.samples, "chunk": options.chunk}
    return measure(denoiser, entries, **sizes, seed=10**6, cond=cond, features=space).to_dict()


def _best(c: Comparison) -> dict[str, Any]:
    """At each number of evaluations: the calibrated, the universal and the default plan, and the best of all others."""
    rows = []
    for budget in c.budgets:
        kinds: dict[str, dict[str, Any]] = {}
        for row in sorted((r for r in c.at(budget) if r.rmse is not None), key=lambda r: r.error):
            kind = next((k for k in ("calibrated", "universal", "default") if k in row.name.lower()), "stock")
            assert row.rmse is not None
            kinds.setdefault(kind, {
                "evaluations": row.evaluations,
                "sampler": kind if kind != "stock" else f"best of all others: {row.name}",
                "rmse": row.rmse.value,
                **_distance(row.frechet),
            })  # fmt: skip
        rows += [kinds[kind] for kind in ("calibrated", "universal", "default", "stock") if kind in kinds]
    teacher = {"evaluations": c.teacher.evaluations, "sampler": c.teacher.name, "rmse": 0.0}
    rows.append({**teacher, **_distance(c.teacher.frechet)})
    facts = {"samples": c.samples, "seed": c.seeds[0], "features": c.features, "reference": c.reference}
    return {**facts, "rows": rows}


def _distance(found: Estimated | None) -> dict[str, float]:
    return {} if found is None else {"fd": found.value, "fd_stderr": found.stderr}


def _readme(name: str, denoiser: NetworkDenoiser, measured: dict[str, Any], images: int) -> str:
    card, recipe = denoiser.card, denoiser.card["training"]
    bound, quality = measured["bound"], measured["quality"]
    parameters = sum(p.numel() for p in denoiser.parameters()) / 1e6
    shape = " x ".join(map(str, denoiser.shape[1:]))
    condition = f"class-conditional ({card['classes']} classes)" if card["classes"] else "unconditional"
    article = "A" if card["classes"] else "An"
    given = ""
    if "given_label" in bound:
        given = f" without the label, {bound['given_label']:.3f} +- {bound['given_label_stderr']:.3f} given it"
    lo, hi = bound["logsnr_range"]
    features = quality["features"]
    distance = f"; FD (features: {features}) to {quality['reference']} real images" if features else ""
    lines = [
        f"# zoo:{name}",
        "",
        f"{article} {condition} U-Net of {parameters:.2f} M parameters for {shape} images, trained on {images:,} "
        f"images of `{recipe['data']['source']}` with `logsnr train`: {card['step']} steps of {recipe['batch']}, seed "
        f"{recipe['seed']}, {ObjectiveConfig(**recipe['objective']).describe()}. Weights in float16; everything below "
        f"was measured on them. Machine: {measured['machine']}.",
        "",
        f"    logsnr sample zoo:{name} --nfe 5 --out samples.png",
        "",
        f"- Variational bound of {bound['images']} held-out images: {bound['bits_per_dim']:.3f} +- "
        f"{bound['stderr']:.3f} bits/dim{given} ({bound['grey_levels']} grey levels, log-SNR [{lo:g}, {hi:.2f}], "
        "seed 0).",
        f"- Quality against evaluations: {quality['samples']} samples from noise of seed {quality['seed']}, RMSE to "
        f"the end points of the teacher in the last row{distance}.",
        "",
        "| evaluations | sampler | RMSE | FD |",
        "|---|---|---|---|",
    ]
    for row in quality["rows"]:
        fd = f"{row['fd']:.2f} +- {row['fd_stderr']:.2f}" if "fd" in row else "-"
        lines.append(f"| {row['evaluations']} | {row['sampler']} | {row['rmse']:.4f} | {fd} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
