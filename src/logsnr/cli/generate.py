"""`logsnr generate`: any number of images into shards, by any number of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed
from logsnr.cli.sample import (
    Class,
    Gamma,
    Grid,
    Guidance,
    NegativePrompt,
    Nfe,
    NullClass,
    Order,
    PlanFile,
    Prompt,
    SigmaMax,
    SigmaMin,
    Solver,
    StartFile,
    asked,
)


@app.command(cls=Named)
def generate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the shards.")],
    n: Annotated[
        int, typer.Option("--number", "-n", help="How many images; more than before adds to a folder.", min=1)
    ] = 50_000,
    nfe: Nfe = None,
    solver: Solver = "auto",
    gamma: Gamma = None,
    order: Order = None,
    grid: Grid = "log-linear",
    sigma_max: SigmaMax = None,
    sigma_min: SigmaMin = None,
    range_: Range = None,
    plan: PlanFile = None,
    start: StartFile = None,
    class_: Class = None,
    classes: Annotated[
        str, typer.Option(help="How a class-conditional model's classes are dealt: balanced (in turn) or drawn.")
    ] = "balanced",
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line: image i takes prompt i modulo their number.", metavar="FILE"),
    ] = None,
    negative_prompt: NegativePrompt = None,
    guidance: Guidance = 1.0,
    null_class: NullClass = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of the shards: npz (arrays) or png (a folder of pictures each).")
    ] = "npz",
    chunk: Annotated[
        int | None, typer.Option(help="Images per network call [default: 250, of large images fewer].", min=1)
    ] = None,
    shard: Annotated[
        int | None, typer.Option(help="Images per shard, whole chunks [default: 1000, at most 64 MiB].", min=1)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where the folder holds another set.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Make many images in shards; image i depends on the seed and i alone, and what is there is not made again.

    Example: logsnr generate zoo:digits --nfe 5 -n 50000 --out shards

    Example: logsnr generate owner/name --prompts prompts.txt --guidance 7.5 -n 30000 --out shards

    Example: torchrun --nproc-per-node 2 -m logsnr.cli generate zoo:digits -n 50000 --out shards
    """
    from logsnr.cli import support
    from logsnr.errors import LogsnrError
    from logsnr.generation import generate as run
    from logsnr.interrupts import Interrupted
    from logsnr.writing import check_folder

    texts = None if prompts is None else support.read_prompts(prompts)
    for option, value in (("--class", class_), ("--prompt", prompt)):
        if value is not None and texts is not None:
            raise LogsnrError(f"{option} {value} with --prompts {prompts}: give one of them")
        if value is not None and classes != "balanced":
            raise LogsnrError(f"{option} {value} with --classes {classes}: give one of them")
    check_folder(out)
    what = asked(
        model, nfe=nfe, solver=solver, gamma=gamma, order=order, grid=grid, sigma_max=sigma_max, sigma_min=sigma_min,
        range_=range_, plan=plan, start=start, class_=class_, prompt=prompt, negative_prompt=negative_prompt,
        guidance=guidance, null_class=null_class, where=support.place(device, dtype, compile_, measures=False),
        seed=seed, prompts=texts,
    )  # fmt: skip
    if texts is None:
        support.sampled_condition(what.denoiser, what.label, prompt, 1)  # what it refuses
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of a machine
    told = {"prompt": prompt, "negative_prompt": negative_prompt, "null_class": null_class}
    try:
        done = run(
            what.guided,
            what.plan,
            out,
            n=n,
            seed=seed,
            classes=what.label if what.label is not None else classes if prompt is None else None,
            start=what.start,
            format=format_,
            chunk=chunk,
            shard=shard,
            overwrite=overwrite,
            progress=speaks and not hushed(json_),
            model=support.model_name(model),
            told={name: value for name, value in told.items() if value is not None},
            prompts=texts,
        )
    except Interrupted as stop:
        raise Interrupted(f"{stop}: {support.this_command(without='--overwrite')}", signum=stop.signum) from stop
    if json_ and speaks:
        support.print_json(done.to_dict())
    elif speaks:
        print(done)
