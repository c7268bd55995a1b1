"""Few steps on Gaussian fields of 3,072 to 786,432 numbers: universal plans and diffusers' own schedulers, exactly.

    python benchmarks/fields.py                     all sizes and ranges, a few minutes
    python benchmarks/fields.py --sizes 3072        this size

The data are Gaussian fields of three channels with the spectrum 1/f^2 of images, whose denoiser and probability flow
are closed forms.  A sampler is linear there, and treats modes of equal variance alike, so its expected squared error
over all noises is a sum over variances: nothing is drawn (`Modes` in tools/universal.py).  RMSE in units of sigma_data
from pure noise at the largest level.  Ranges: EDM's and DDPM's 160, EDM's 80, Stable Diffusion's 14.6.

The *single* peer is the one scheduler and spacing of least geometric mean over all sizes and numbers of evaluations of
that range, chosen on them: hindsight.  Results go to fields.json and fields.md in --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from logsnr.evaluation.compare import Entry, peers, uncalibrated
from logsnr.files import replace_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fields are those of the fit
from tools.universal import Modes

SIZES = (3072, 12_288, 49_152, 196_608, 786_432)
RANGES = ((0.002, 160.0), (0.002, 80.0), (0.03, 14.6))
NFE = (4, 5, 6, 7, 8, 9, 10, 11, 12)
Errors = dict[str, float]


@torch.no_grad()
def rmse(model: Modes, entry: Entry) -> float:
    """The root of the expected squared error."""
    x = entry.run(model, model.weights.clone(), {}, torch.Generator())
    return math.sqrt(float((x - model.end()).square().mean()))


def judged(model: Modes) -> dict[str, Errors]:
    """Errors of all that takes part, by the number of evaluations."""
    found: dict[str, Errors] = {str(n): {} for n in NFE}
    for entry in [*peers(model, NFE), *uncalibrated(model, NFE)]:
        if entry.evaluations == entry.budget or entry.origin == "diffusers":
            error = rmse(model, entry)
            if math.isfinite(error):
                found[str(entry.budget)][entry.name] = float(f"{error:.4g}")
    return found


def mean(values: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def table(results: dict[str, dict[str, Errors]], sizes: list[int]) -> str:
    """Errors of every cell, and geometric means."""
    text, summary = "", []
    for low, high in RANGES:
        cells = {(size, n): results[f"{size} {low} {high}"][str(n)] for size in sizes for n in NFE}
        theirs = {at: {k: v for k, v in one.items() if k.startswith("diffusers ")} for at, one in cells.items()}
        names = set.intersection(*(set(one) for one in theirs.values()))
        single = min(names, key=lambda name: mean(one[name] for one in theirs.values()))
        best = {at: min(one, key=lambda name: one[name]) for at, one in theirs.items()}
        ours = {at: one["universal, its own levels"] for at, one in cells.items()}
        text += f"\n### Range {low:g} to {high:g}\n\nBest single: {single.removeprefix('diffusers ')}.\n\n"
        columns = ("numbers", "evaluations", "universal", "default", "best of all", "single", "universal over best")
        text += "| " + " | ".join((*columns, "over single")) + " |\n|" + " --- |" * 8 + "\n"
        for (size, n), one in cells.items():
            top = theirs[size, n][best[size, n]]
            row = [f"{size:,}", n, f"{ours[size, n]:.4f}", f"{one['default, its own levels']:.4f}"]
            row += [f"{top:.4f} ({best[size, n].removeprefix('diffusers ')})", f"{one[single]:.4f}"]
            row += [f"{ours[size, n] / top:.2f}", f"{ours[size, n] / one[single]:.2f}"]
            text += "| " + " | ".join(map(str, row)) + " |\n"
        over = {at: ours[at] / theirs[at][best[at]] for at in cells}
        ratios = [ours[at] / one[single] for at, one in cells.items()]
        above = sum(value > 1 for value in over.values())
        summary.append(
            f"| {low:g} to {high:g} | {mean(over.values()):.2f} | {max(over.values()):.2f} | {above} of {len(over)} | "
            f"{mean(ratios):.2f} | {max(ratios):.2f} | {single.removeprefix('diffusers ')} |"
        )
    head = "| range | over the best of each cell | at worst | cells above 1 | over the single | at worst | single |\n"
    return head + "|" + " --- |" * 7 + "\n" + "\n".join(summary) + "\n" + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda v: [int(size) for size in v.split(",")], default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for size in options.sizes:
        for low, high in RANGES:
            results[f"{size} {low} {high}"] = judged(Modes(size, low, high))
            print(f"{size} numbers, {low:g} to {high:g}", flush=True)
    text = f"""# Few steps on Gaussian fields

Spectrum 1/f^2, three channels; exact expected RMSE in units of sigma_data over all noises, from pure noise at the
largest level; peers are diffusers' schedulers on all their spacings. The fit of the universal plans knew fields of
some of these sizes and ranges. `default` is gradient estimation, not taken unasked at these numbers of evaluations.
Made by `python benchmarks/fields.py`.

{table(results, options.sizes)}"""
    replace_file(options.out / "fields.md", text.encode())
    kept = json.dumps(results).replace("}, ", "},\n")
    replace_file(options.out / "fields.json", (kept + "\n").encode())


if __name__ == "__main__":
    main()
