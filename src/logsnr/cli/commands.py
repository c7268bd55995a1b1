"""Commands: `logsnr demo | train | export`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logsnr.cli.application import Json, Model, Seed, app, hushed, recipe_stems

if TYPE_CHECKING:
    from logsnr.training.config import Recipe


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
            help="A recipe file, or the name of a bundled one (logsnr recipes): digits, images, cifar10, ...",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count: parameters, memory, FLOPs. Nothing is trained or written.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Twenty steps with a small network on drawn images: does it all run?")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Only print the whole recipe, defaults and --set filled in.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train a denoiser by a recipe.

    Example: logsnr train recipes/digits.yaml --out runs/digits --set steps=500
    """
    from logsnr.cli import support
    from logsnr.interrupts import Interrupted
    from logsnr.training import load_recipe
    from logsnr.training import train as run
    from logsnr.training.processes import first_process

    config = load_recipe(recipe, [*(set_ or []), *([] if init_from is None else [f"init_from={init_from}"])])
    if print_config or dry_run:
        _say(config, dry_run, json_)
        return
    if smoke:
        _smoke(config, out, json_)
        return
    folder = out or Path("runs") / Path(recipe).stem
    try:
        summary = run(config, folder, resume=resume, progress=not hushed(json_))
    except Interrupted as stop:
        raise Interrupted(f"{stop}: {support.this_command('--resume')}", signum=stop.signum) from stop
    if not first_process():
        return  # one of several says it
    if json_:
        support.print_json({"folder": str(folder), **summary.to_dict()})
    else:
        print(f"{folder}: {summary}")


def _say(recipe: Recipe, cost: bool, json_: bool) -> None:
    """Print a whole recipe, or what its training takes."""
    from logsnr.cli import support
    from logsnr.training.config import recipe_text
    from logsnr.training.costs import cost_of

    if cost:
        found = cost_of(recipe)
        facts, text = found.to_dict(), str(found)
    else:
        facts, text = recipe.model_dump(mode="json"), recipe_text(recipe).rstrip()
    if json_:
        support.print_json(facts)
    else:
        print(text)


def _smoke(recipe: Recipe, out: Path | None, json_: bool) -> None:
    """Train a recipe's code for a few steps, and load what comes of it."""
    from logsnr.cli import support
    from logsnr.loading import load
    from logsnr.training import train as run
    from logsnr.training.synthetic import cut_down, synthetic

    with TemporaryDirectory() if out is None else nullcontext(out) as folder:
        summary = run(cut_down(recipe), folder, progress=not hushed(json_), data=synthetic(recipe.data))
        load(folder)
    facts = {"kind": "smoke", **summary.to_dict()}
    if json_:
        support.print_json(facts)
    else:
        print(f"smoke: {summary}; saved and loaded" + ("" if out is None else f": {out}"))


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
