"""The front page: the same model, the same noise, 5 evaluations, as a table and as a picture.

    python benchmarks/front_page.py                          # zoo:fashion-mnist-classes
    python benchmarks/front_page.py MODEL --nfe 5 -n 128     # another model of the zoo, or a run

Every sampler starts from the same noise, and its error is the distance of its ends from those of a teacher that follows
the same noise in 100 evaluations.  Stock samplers are diffusers' own, with their default spacing and with the best of
all that they offer, chosen on the very noise that is reported, which flatters them.  Ours out of the box is what
`logsnr.sample(denoiser, 5)` and the scheduler do for a model that was never calibrated, calibrated the plan that
`logsnr calibrate` found on other noise.  The table goes between the marks of README.md and docs/index.md, the picture
to docs/assets/front-page.png.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import logsnr as ls
from logsnr.evaluation.compare import Entry, Row, measure, peers, plans
from logsnr.images import tile
from logsnr.report.style import drawn, encoded
from logsnr.sampling.default import auto_plan

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- front page: begin -->", "<!-- front page: end -->"
STOCK = {"DDIM": "leading", "DPM++(2M)": "linspace", "UniPC-2": "linspace"}
"""Samplers of diffusers, and the spacing that each has where nothing is said."""
BOX, CALIBRATED = "logsnr, out of the box", "logsnr, calibrated"
BOXED = (
    "The plan out of the box was fitted to other networks, one of them of the same images: on networks left out of the "
    "fit it has [.76 of the best single scheduler's error](FEW_STEPS)."
)
SHOWN, NFE, NUMBER = 10, 5, 128


def entries(denoiser: Any, nfe: int) -> list[Entry]:
    """The stock samplers on every spacing, and ours."""
    low, high = denoiser.sampling_range
    known = {"sigma_data": denoiser.sigma_data, "finite_at_inf": denoiser.finite_at_inf, "dim": denoiser.dim}
    stock = [entry for entry in peers(denoiser, [nfe]) if entry.solver in STOCK]
    return [*stock, *plans(denoiser, {BOX: auto_plan(nfe, low, high, **known), CALIBRATED: denoiser.plans[nfe]})]


def table(rows: list[tuple[str, Row | None, Row]], model: str, nfe: int, n: int) -> str:
    """Markdown: a row per sampler."""
    worst = rows[0][2].rmse.value
    lines = [
        f"| {nfe} evaluations of `{model}` | error, default spacing | error, best spacing | of DDIM's best |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, default, best in rows:
        bold = "**" if name == CALIBRATED else ""
        first = "" if default is None else f"{default.rmse.value:.3f}"
        error = f"{best.rmse.value:.3f} ± {best.rmse.stderr:.3f}"
        lines.append(f"| {bold}{name}{bold} | {first} | {bold}{error}{bold} | {best.rmse.value / worst:.2f} |")
    command = " ".join(["python benchmarks/front_page.py", *([] if model == DEFAULT else [model])])
    command += ("" if nfe == NFE else f" --nfe {nfe}") + ("" if n == NUMBER else f" -n {n}")
    told = (
        f"RMSE per pixel to the end of a 100-step teacher from the same noise, on [-1, 1]; {n} images, seed 0, "
        f"one kind of CPU. {BOXED} Made, with the picture, by `{command}`."
    )
    return "\n".join([*lines, "", told])


def picture(samples: dict[str, Tensor], denoiser: Any, nfe: int) -> bytes:
    """The same images, a row per sampler."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(samples), 2, width_ratios=(1, 4))
        for (left, right), (name, x) in zip(axes, samples.items(), strict=True):
            shown = tile(denoiser.pixels.display(denoiser.decode(x[:SHOWN])).cpu(), columns=SHOWN, scale=2, gap=2)
            right.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            left.text(1, 0.5, name, ha="right", va="center", fontsize=10)
            for one in (left, right):
                one.set_axis_off()

    figure = drawn(draw, width=9.0, height=0.72 * len(samples), purpose="the picture")
    return encoded(figure, "png", dpi=110)


DEFAULT = "zoo:fashion-mnist-classes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT)
    parser.add_argument("--nfe", type=int, default=NFE)
    parser.add_argument("-n", "--number", type=int, default=NUMBER)
    parser.add_argument("--out", type=Path, help="a folder with README.md and docs to write into [default: of the "
                        "default model alone this repository, of others none: the table is printed]")  # fmt: skip
    options = parser.parse_args()
    if options.out is None and (options.model, options.nfe, options.number) == (DEFAULT, NFE, NUMBER):
        options.out = ROOT
    denoiser, nfe = ls.load(options.model), options.nfe
    classes = {"class_labels": torch.arange(denoiser.classes)} if denoiser.classes else None
    kept: dict[tuple[str, str], Tensor] = {}

    def keep(entry: Entry | None, x: Tensor) -> None:
        kept["teacher" if entry is None else entry.solver, "" if entry is None else entry.grid] = x

    found = measure(denoiser, entries(denoiser, nfe), n=options.number, cond=classes, keep=keep)
    rows = []
    for name in (*STOCK, BOX, CALIBRATED):
        of = sorted((row for row in found.rows if row.solver == name), key=lambda row: row.rmse.value)
        rows.append((name, next((row for row in of if row.grid == STOCK.get(name)), None), of[0]))
    text = f"{BEGIN}\n{table(rows, options.model, nfe, options.number)}\n{END}"
    samples = {"teacher, 100": kept["teacher", ""]}
    samples |= {f"{name}, {nfe}": kept[name, best.grid] for name, _, best in rows}
    print(text)
    if options.out is None:
        return
    for page, link in (
        (options.out / "README.md", "docs/few-steps.md"),
        (options.out / "docs" / "index.md", "few-steps.md"),
    ):
        old, new = page.read_text(encoding="utf-8"), text.replace("FEW_STEPS", link)
        page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _, new=new: new, old, flags=re.S), encoding="utf-8")
    (options.out / "docs" / "assets" / "front-page.png").write_bytes(picture(samples, denoiser, nfe))


if __name__ == "__main__":
    main()
