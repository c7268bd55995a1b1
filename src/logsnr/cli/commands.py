"""Commands: `logsnr demo | train | export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Json, Model, Seed, app, hushed, recipe_stems


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path("runs/demo"),
    seed: Seed = 0,
    max_seconds: Annotated[float, typer.Option(help="Longest training time.")] = 90.0,
    json_: Json = False,
) -> None:
    """Train a model of real digits, measure it, sample it in few steps, and write a report.

    Example: logsnr demo --out runs/demo
    """
    from logsnr.cli import support
    from logsnr.demo import run_demo
    from logsnr.interrupts import Interrupted, signal_of

    try:
        summary = run_demo(out, seed=seed, max_seconds=max_seconds, quiet=hushed(json_))
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted: the demo in {out} begins anew next time", signum=signal_of(stop)) from stop
    if json_:
        support.print_json(summary)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe file, or the name of a bundled one: digits, fashion_mnist, cifar10_small.",
            autocompletion=recipe_stems,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/NAME].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue exactly where the last checkpoint ends.")] = False,
    init_from: Annotated[
        str | None, typer.Option(help="Fine-tune: begin as another model, zoo:NAME or the folder of a run.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: --set batch=64 --set ema.decay=.99")
    ] = None,
    json_: Json = False,
) -> None:
    """Train a denoiser by a recipe.

    Example: logsnr train recipes/digits.yaml --out runs/digits --set steps=500
    """
    from logsnr.cli import support
    from logsnr.interrupts import Interrupted
    from logsnr.training import load_recipe
    from logsnr.training import train as run

    config = load_recipe(recipe, [*(set_ or []), *([] if init_from is None else [f"init_from={init_from}"])])
    folder = out or Path("runs") / Path(recipe).stem
    try:
        summary = run(config, folder, resume=resume, progress=not hushed(json_))
    except Interrupted as stop:
        raise Interrupted(f"{stop}: {support.this_command('--resume')}", signum=stop.signum) from stop
    if json_:
        support.print_json({"folder": str(folder), **summary.to_dict()})
    else:
        print(f"{folder}: {summary}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pipeline; must not exist, or be empty.")],
    to: Annotated[str, typer.Option(help="What to write: diffusers.")] = "diffusers",
    class_: Annotated[
        str | None, typer.Option("--class", help="Class that the pipeline draws [default: the null condition].")
    ] = None,
    keep_classes: Annotated[
        bool, typer.Option("--keep-classes", help="Leave the class to whoever calls the pipeline.")
    ] = False,
    json_: Json = False,
) -> None:
    """Write a trained model as a stock diffusers pipeline, for DiffusionPipeline.from_pretrained.

    Example: logsnr export runs/digits --to diffusers -o pipelines/digits
    """
    from logsnr.adapters.diffusers.export import export_diffusers, pipeline_for, scheduler_for
    from logsnr.cli import support
    from logsnr.errors import LogsnrError

    if to != "diffusers":
        raise LogsnrError(f"--to {to!r}: the one format is diffusers")
    denoiser = support.run_denoiser(model)
    label = support.class_of(denoiser, class_)
    folder = export_diffusers(denoiser, out, class_label=label, keep_classes=keep_classes)
    pipeline, scheduler = pipeline_for(denoiser), type(scheduler_for(denoiser)).__name__
    if json_:
        support.print_json({"out": str(folder), "pipeline": pipeline, "scheduler": scheduler, "class": label})
        return
    call = "class_labels=[3], num_inference_steps=20" if keep_classes else "num_inference_steps=20"
    print(f"{folder}: {pipeline} with {scheduler}")
    print(f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}); pipe({call}).images[0]")
