"""Commands: `logsnr demo | train | calibrate | export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed, recipe_stems


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


@app.command(cls=Named)
def calibrate(
    model: Model,
    nfe: Annotated[int, typer.Option(help="Network evaluations per image, 1 to 20.")] = 6,
    out: Annotated[Path, typer.Option(help="Where the plan is written (JSON).")] = Path("plan.json"),
    n: Annotated[int, typer.Option("--number", "-n", help="Noises to fit to; others select and report.")] = 96,
    rollouts: Annotated[int | None, typer.Option(help="Budget, 40 to 200 rollouts of these; else 1400/NFE.")] = None,
    resume: Annotated[Path | None, typer.Option(help="File that keeps measurements, to go on after Ctrl-C.")] = None,
    method: Annotated[
        str, typer.Option(help="search, or a baseline on the same noises: gits, ays, ends (see docs/calibration.md).")
    ] = "search",
    start: Annotated[
        str,
        typer.Option(
            help="Let plans begin below the largest level, from a Gaussian of the data, of the model's own samples "
            "(model), or not (none); it is kept as start.safetensors beside the plan that needs it."
        ),
    ] = "none",
    first: Annotated[
        float | None, typer.Option(help="First noise level of the plan [default: searched for where there is a start].")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Of --start data: {data} [default: the recipe's].")] = None,
    passport: Annotated[
        Path | None, typer.Option(help="JSON of `logsnr passport`: stay in its usable range of noise levels.")
    ] = None,
    range_: Range = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Find a model's best few-step plan, against a many-step teacher from the same noise.

    Example: logsnr calibrate runs/digits --nfe 5 --out plan.json
    """
    from logsnr.cli import starts, support
    from logsnr.errors import LogsnrError
    from logsnr.interrupts import Interrupted, last_signal, signal_of
    from logsnr.writing import check_output, is_stream

    usable = None
    if passport is not None and range_ is not None:
        raise LogsnrError(f"--range {range_} with --passport, which has a range: give one of them")
    out = check_output(out)
    keep = None if is_stream(out) else out.with_suffix(".measured.json")
    if resume is not None:
        keep = check_output(resume, "--resume")
    denoiser = support.run_denoiser(model, support.place(device, dtype, compile_))
    if range_ is not None:
        usable = support.asked_range(denoiser, range_, support.condition(denoiser, None, 12), seed)
    if passport is not None:
        from logsnr.evaluation.passport import Passport

        usable = Passport.load(passport).sampling_range
    gaussian = starts.fitted_start(denoiser, start, data, seed, quiet=hushed(json_))
    starts.check_start(gaussian, out)
    try:
        plan = support.calibrated(
            denoiser,
            nfe,
            n,
            rollouts,
            resume,
            keep,
            seed,
            quiet=hushed(json_),
            sigma_range=usable,
            method=method,
            start=gaussian,
            first=first,
        )
    except KeyboardInterrupt as stop:
        how = f": {support.this_command('--resume', str(keep))}" if keep and keep.exists() else ""
        raise Interrupted(f"interrupted before there was a plan{how}", signum=signal_of(stop)) from stop
    try:
        plan.save(out)
    except OSError:
        support.print_json(plan.to_dict())  # minutes of work: on stdout it is not lost
        raise
    kept = starts.keep_start(gaussian, plan, out)
    report = plan.meta["report"]
    if json_:
        facts = {"out": str(out), "nfe": plan.nfe, "hash": plan.hash, "report": report}
        support.print_json(facts | ({"start": str(kept)} if kept else {}))
    elif report is not None:
        errors = {"this plan": report["rmse"], **report["alternatives"]}
        print(f"{out}: {plan.nfe} evaluations; RMSE to the teacher's end points on noise the search has not seen:")
        for name, error in sorted(errors.items(), key=lambda item: item[1])[:6]:
            print(f"  {error:.4f}  {name}")
    if plan.meta.get("interrupted"):
        how = f"; what was measured is kept: {support.this_command('--resume', str(keep))}" if keep else ""
        raise Interrupted(
            f"interrupted: {out} is the best plan of {plan.nfe} evaluations so far{how}", signum=last_signal()
        )


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
