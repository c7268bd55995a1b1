"""Passports of models whose faults are known: which findings each has, and what it cost.

    python benchmarks/passports.py                                                 every model but the Fashion ones
    python benchmarks/passports.py --fashion-mnist fashion_mnist.npz               and those of the zoo
    python benchmarks/passports.py zoo:fashion --fashion-mnist fashion_mnist.npz   names that start so, alone
    python benchmarks/passports.py --table                                         what is done, as a table

An exact mixture; zoo:digits on the digits that it was trained on, on others, and told 1.1 and .9 sigma; the digits
recipe stopped after 8 steps, and trained whole but on log-SNR [-2, 8] alone; a random DDPM pipeline of diffusers; and,
where their data are at hand, the zoo's Fashion-MNIST models on held-out images.  `examine` runs at its defaults.  Each
result goes to passports.json in --out, the table between the marks of passports.md; a model whose findings are not the
expected ones makes the command fail.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from few_step import mixture
from torch import Tensor

from logsnr import zoo
from logsnr.adapters.diffusers.pipelines import denoiser_from
from logsnr.denoiser import Denoiser
from logsnr.evaluation.passport import Passport, Relabelled, examine
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.pixels import Pixels
from logsnr.training import Dataset, load_data, load_recipe, train
from logsnr.training.config import DataConfig

MARKS = ("<!-- table -->", "<!-- end of table -->")

Cond = dict[str, Tensor]
Subject = tuple[Denoiser, Tensor, Cond | None]
"""A model, clean samples in its units, and their conditions."""


def exact() -> Subject:
    model = mixture(64)
    return model, model.sample(2000, generator=torch.Generator().manual_seed(1)), None


def of_zoo(name: str, config: DataConfig, *, seen: bool = False, told: float = 1.0) -> Subject:
    """A model of the zoo on held-out images or on those it was trained on, its network told `told` sigma."""
    model, (images, cond) = load(name), _images(load_data(config), seen)
    subject = model if told == 1 else Relabelled(model, told, "label").denoiser
    return subject, model.encode(images), cond if model.card["classes"] else None


def recipe(**changes: Any) -> Subject:
    """The digits recipe with changes, trained here."""
    with tempfile.TemporaryDirectory() as folder:
        whole = {"max_seconds": None, "samples.every": 0, **changes}
        train(load_recipe("digits", whole), Path(folder), progress=False)
        model = load(folder)
    images, cond = _images(load_data(DataConfig()), False)
    return model, model.encode(images), cond


def pipeline() -> Subject:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    images, _ = _images(load_data(DataConfig()), False)
    model = denoiser_from(diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler()))
    return model, Pixels(17).encode(images), None


def _images(data: Dataset, seen: bool) -> tuple[Tensor, Cond]:
    """Held-out images, or as many of the training images, with their labels."""
    count = len(data.test_images)
    images, labels = (data.train_images, data.train_labels) if seen else (data.test_images, data.test_labels)
    assert labels is not None
    return images[:count], {"class_labels": labels[:count]}


def cases(fashion: Path | None) -> dict[str, tuple[Callable[[], Subject], set[str]]]:
    """Name -> how it is made, and the findings that it should have."""
    digits = DataConfig()
    found: dict[str, tuple[Callable[[], Subject], set[str]]] = {
        "exact mixture": (exact, set()),
        "zoo:digits, training digits": (partial(of_zoo, "zoo:digits", digits, seen=True), set()),
        "zoo:digits, held-out digits": (partial(of_zoo, "zoo:digits", digits), {"misfit"}),
        "zoo:digits told 1.1 sigma": (partial(of_zoo, "zoo:digits", digits, seen=True, told=1.1), {"labels"}),
        "zoo:digits told .9 sigma": (partial(of_zoo, "zoo:digits", digits, seen=True, told=0.9), {"labels"}),
        "digits recipe, 8 steps": (partial(recipe, steps=8), {"undertrained"}),
        "digits recipe, log-SNR [-2, 8]": (partial(recipe, **{"objective.logsnr": [-2.0, 8.0]}), {"short"}),
        "random DDPM pipeline": (pipeline, {"undertrained"}),
    }
    if fashion is not None:
        config = DataConfig(source=str(fashion))
        names = [f"zoo:{name}" for name in zoo.names() if name.startswith("fashion")]
        if not names:
            print(f"--fashion-mnist {fashion}: the zoo has no Fashion-MNIST model, only {', '.join(zoo.names())}")
        for name in names:
            found[f"{name}, held-out images"] = (partial(of_zoo, name, config), set())
    return found


def run(name: str, make: Callable[[], Subject], expected: set[str], machine: str) -> dict[str, Any]:
    """One passport, as the table and the file show it."""
    model, x, cond = make()
    wall, cpu = time.perf_counter(), time.process_time()
    passport = examine(model, x, cond=cond, name=name)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "expected": sorted(expected),
        "found": sorted({f.kind for f in passport.troubles}),
        "findings": [{"kind": f.kind, "severity": f.severity, "text": f.text} for f in passport.findings],
        **_numbers(passport),
        "evaluations": passport.cost,
        "seconds": round(wall, 1),
        "CPU seconds": round(cpu, 1),
        "machine": machine,
    }


def _numbers(p: Passport) -> dict[str, Any]:
    scan, nfe, usable = p.labels, p.finding("nfe"), p.finding("usable")
    whole = None if usable is None or usable.sigmas is None else [float(f"{s:.3g}") for s in usable.sigmas]
    ratios = [level.ratio for level in p.levels if level.trained]
    known = scan is not None and math.isfinite(scan.factor)
    return {
        "parameters": p.parameters,
        "samples": p.samples,
        "c": [round(scan.factor, 3), round(scan.factor * scan.stderr, 3)] if scan is not None and known else None,
        "loss / linear": [float(f"{v:.3g}") for v in (min(ratios), max(ratios))],
        "nats left at the start": None if p.start is None else float(f"{p.start.kl:.2g}"),
        "usable sigma": whole,
        "declared sigma": [float(f"{s:.3g}") for s in p.declared_range],
        "evaluations to choose": "none" if nfe is None or math.isnan(nfe.value) else f"{nfe.value:.0f}",
        "probe": None if p.probe is None else [float(f"{s:.3g}") for s in (p.probe.low, p.probe.high)],
    }


def table(results: dict[str, Any]) -> str:
    """What was found, model by model."""
    lines = [
        "| model | findings | c | loss / linear | nats left | usable sigma | of use by the probe | choose | "
        "evaluations | CPU time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        found = ", ".join(r["found"]) or "none"
        if r["found"] != r["expected"]:
            found += f" (expected: {', '.join(r['expected']) or 'none'})"
        c = "-" if r["c"] is None else "{:.3f} ± {:.3f}".format(*r["c"])
        usable = "none" if r["usable sigma"] is None else "{:g} – {:g}".format(*r["usable sigma"])
        usable += " (all)" if r["usable sigma"] == r["declared sigma"] else ""
        nats, choose = r["nats left at the start"], r["evaluations to choose"].replace("inf", "more than 20")
        probe = "none" if r["probe"] is None else "-" if not r["probe"] else "{:g} – {:g}".format(*r["probe"])
        lines.append(
            f"| {name} | {found} | {c} | {r['loss / linear'][0]:.3g} – {r['loss / linear'][1]:.3g} | {nats:.2g} | "
            f"{usable} | {probe} | {choose} | {r['evaluations']:,} | "
            f"{r['CPU seconds']:.2g} s, {r['machine']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""], help="keep models whose names start so")
    parser.add_argument("--fashion-mnist", type=Path, help="npz with test_images and test_labels")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", default="2 shared CPU cores", help="what the results say of the machine")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file, page = options.out / "passports.json", options.out / "passports.md"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    machine = f"{options.machine}, {options.threads} thread{'s' if options.threads > 1 else ''}"
    known = cases(options.fashion_mnist)
    for name, (make, expected) in {} if options.table else known.items():
        if name.startswith(tuple(options.names)):
            results[name] = run(name, make, expected, machine)
            ordered = {n: results[n] for n in [*known, *results] if n in results}
            replace_file(file, (json.dumps(ordered, indent=1, allow_nan=False) + "\n").encode())
            print(f"{name}: {', '.join(results[name]['found']) or 'none'}", flush=True)
    results = json.loads(file.read_text())
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS)
    head, rest = text.split(MARKS[0])
    body = "\n\n".join([MARKS[0], table(results), MARKS[1]])
    replace_file(page, (head + body + rest.split(MARKS[1])[1].rstrip("\n") + "\n").encode())
    print(table(results))
    sys.exit(any(r["found"] != r["expected"] for r in results.values()))


if __name__ == "__main__":
    main()
