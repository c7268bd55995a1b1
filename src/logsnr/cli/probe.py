"""`logsnr probe`: between which noise levels a model is of use, without data."""

from __future__ import annotations

from typing import Annotated

import typer

from logsnr.cli.application import Json, Model, Seed, app
from logsnr.terminal import console


@app.command()
def probe(
    model: Model,
    class_: Annotated[
        str | None, typer.Option("--class", help="Class of a conditional model, name or number [default: all in turn].")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of a diffusers pipeline: a text, or a class's name.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Find between which noise levels a model's answers are of use: some 300 evaluations, no data.

    Example: logsnr probe runs/digits
    """
    from dataclasses import asdict

    from rich.table import Table

    from logsnr.cli import support
    from logsnr.sampling import probe as run
    from logsnr.sampling.probing import HIGH_LIMIT, LOW_LIMIT

    denoiser, _ = support.sampled_model(model, prompt, None, 1.0, None)
    label = support.class_of(denoiser, class_)
    found = run(denoiser, cond=support.sampled_condition(denoiser, label, prompt, 12), seed=seed)
    if json_:
        support.print_json(asdict(found))
        return
    table = Table()
    for name in ("sigma", "error", "limit", ""):
        table.add_column(name, justify="right")
    for level in found.evidence:
        limit = HIGH_LIMIT if level.end == "high" else LOW_LIMIT
        table.add_row(f"{level.sigma:.4g}", f"{level.error:.3g}", f"{limit:g}", "" if level.good else "out")
    console().print(table)
    low, high = found.sigma_range
    print(f"of use from sigma {low:.4g} to {high:.4g}: --range {low:.4g},{high:.4g} of sample, calibrate and compare")
    print(f"{found.evaluations} network evaluations, seed {seed}")
