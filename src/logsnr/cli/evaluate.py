"""`logsnr evaluate`: bits per dimension of held-out images, or samples against statistics of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from logsnr.cli.application import (
    CleanEnd,
    Compile,
    Device,
    Dtype,
    Json,
    Limit,
    Named,
    NoisyEnd,
    Seed,
    app,
    hushed,
    models,
)
from logsnr.terminal import console

if TYPE_CHECKING:
    from torch import Tensor

    from logsnr.evaluation.statistics import Statistics
    from logsnr.evaluation.stored import Stored


@app.command(cls=Named)
def evaluate(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SAMPLES",
            help="A model, zoo:digits or the folder of a run; with --stats also images: a folder of shards or "
            "pictures, an .npz or .npy file.",
            autocompletion=models,
        ),
    ],
    stats: Annotated[
        Path | None,
        typer.Option(help="Measure samples: file of logsnr stats, or a reference file of EDM or ADM (mu, sigma)."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Of --stats: {spaces}, or module:function [default: those that the statistics name]."),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Of --stats, comma-separated: {metrics} [default: all that can be had].")
    ] = "",
    n: Annotated[
        int | None, typer.Option("--number", "-n", help="Samples of a model [default: 10000].", min=8, max=10**8)
    ] = None,
    nfe: Annotated[
        int | None, typer.Option(help="Network evaluations per sample of a model [default: 10].", min=1, max=10_000)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance of samples of a model.")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="Class of samples of a model [default: drawn].")] = None,
    chunk: Annotated[int | None, typer.Option(help="Samples per network call [default: 256].", min=1)] = None,
    data: Annotated[str | None, typer.Option(help="Of bits per dimension: {data} [default: the recipe's].")] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(help="Of bits per dimension: evaluations per image, a multiple of 8 [default: 32].", max=100_000),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Of bits per dimension: go on until the standard error is at most this.")
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(
            help="Of bits per dimension: folder of parts of 1,000 images, measured by any number of processes "
            "(torchrun); parts that are there stay."
        ),
    ] = None,
    limit: Limit = None,
    logsnr_min: NoisyEnd = None,
    logsnr_max: CleanEnd = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Measure a model by the bound of held-out images, in bits per dimension, or samples against data (--stats).

    Example: logsnr evaluate runs/digits --evaluations 32

    Example: torchrun --nproc-per-node 4 -m logsnr.cli evaluate runs/cifar10 --tolerance .005 --parts bits

    Example: logsnr evaluate shards --stats cifar10.npz
    """
    from logsnr.cli import support
    from logsnr.devices import find_process
    from logsnr.errors import LogsnrError

    rank, world = find_process()
    if world > 1 and (parts is None or stats is not None):
        many = "name a folder for them with --parts" if stats is None else "make samples by many, and measure with one"
        raise LogsnrError(f"{world} processes (WORLD_SIZE) would all do the same: {many}")
    where = support.place(device, dtype, compile_)
    bits: dict[str, object] = {
        "data": data,
        "evaluations": evaluations,
        "logsnr-min": logsnr_min,
        "logsnr-max": logsnr_max,
    }
    bits |= {"tolerance": tolerance, "parts": parts}
    drawn = {"number": n, "nfe": nfe, "guidance": guidance, "class": class_}
    if stats is None:
        _leave_out("without --stats", features=features, metrics=metrics or None, chunk=chunk, **drawn)
        ends, each = (logsnr_min, logsnr_max), 32 if evaluations is None else evaluations
        _bits(what, data, each, limit, ends, tolerance, parts, (rank, world), where, seed, json_)
        return
    _leave_out("with --stats", **bits)
    if not _is_model(what):
        _leave_out(f"of {what}, which is no model,", **drawn)
    _samples(what, stats, features, metrics, drawn, chunk or 256, limit, where, seed, json_)


def _leave_out(when: str, **options: object) -> None:
    """Refuse options that nothing would read."""
    from logsnr.errors import LogsnrError

    for name, value in options.items():
        if value is not None:
            raise LogsnrError(f"--{name} {value} {when} does nothing: leave it out")


def _is_model(what: str) -> bool:
    """Whether it is one; whatever lies here and is none holds images."""
    from logsnr.files import CARD
    from logsnr.loading import is_pipeline
    from logsnr.paths import expanded
    from logsnr.zoo import PREFIX

    path = expanded(what)
    return what.startswith(PREFIX) or (path / f"{CARD}.json").is_file() or (is_pipeline(what) and not path.is_file())


def _samples(
    what: str,
    file: Path,
    features: str | None,
    metrics: str,
    drawn: dict[str, Any],
    chunk: int,
    limit: int | None,
    where: dict[str, Any],
    seed: int,
    json_: bool,
) -> None:
    from logsnr.cli import support
    from logsnr.evaluation.metrics.measures import METRICS, Measuring, measured, wanted
    from logsnr.evaluation.statistics import Statistics, gather
    from logsnr.evaluation.stored import stored
    from logsnr.terminal import progress_bar

    names = tuple(word.strip() for word in metrics.split(",") if word.strip())
    wanted(names, rows=True, classes=True)  # misspelt ones are told before the work
    reference = Statistics.load(file)
    if _is_model(what):
        images = _drawn(what, reference, drawn, chunk, limit, where, seed)
    else:
        levels, shape = reference.images.get("grey_levels"), reference.images.get("shape", [3])
        images = stored(what, grey_levels=levels, channels=shape[0] if shape[0] in (1, 3) else None, limit=limit)
    space = reference.find_space(features, images.pixels)
    reference.check(space, images.shape, images.pixels, images.prepared)
    chosen = wanted(names, rows=reference.rows is not None, classes=space.probabilities is not None)
    with progress_bar(not hushed(json_), "features") as show:
        tell = None if show is None else lambda done: show(done / images.n, f"{done:,} of {images.n:,}")
        classes = any(METRICS[name].classes for name in chosen)
        found = gather(
            images, space, classes=classes, chunk=chunk, device=where["device"], tell=tell, first=reference.check_width
        )
        measuring = Measuring(found, reference.reference)
        values = measured(measuring, chosen, asked=bool(names))
    facts = {
        "samples": what,
        "images": images.n,
        "stats": str(file),
        "reference": reference.n,
        "features": space.name,
        "fid": space.inception,
        "metrics": {name: {"value": one.value, "stderr": one.stderr} for name, one in values.items()},
        **({"nfe": drawn["nfe"] or 10, "seed": seed} if _is_model(what) else {}),
    }
    if json_:
        support.print_json(facts)
        return
    many = f"{reference.n:,} images of {file.name}" if reference.n else file.name
    table = Table(title=f"{images.n:,} samples of {what} against {many}", title_justify="left")
    for title in ("metric", "value", "error"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    for name, one in values.items():
        metric = METRICS[name]
        told = metric.told.replace("FD", space.frechet) if name.startswith("fd") else metric.told
        table.add_row(told, *(f"{number:.{metric.digits}f}" for number in (one.value, one.stderr)))
    console().print(table)
    print(f"features: {space.name}; the error is the samples' alone, the reference being what it is")


def _drawn(
    model: str,
    reference: Statistics,
    drawn: dict[str, Any],
    chunk: int,
    limit: int | None,
    where: dict[str, Any],
    seed: int,
) -> Stored:
    """Samples of a model, drawn while they are measured: image i and its class come from (seed, i) alone."""
    import torch

    from logsnr.cli import support
    from logsnr.cli.data import image_shape
    from logsnr.errors import LogsnrError
    from logsnr.evaluation.stored import Stored
    from logsnr.pixels import Pixels
    from logsnr.sampling import plan_for
    from logsnr.sampling import sample as run
    from logsnr.sampling.streams import drawn_classes, generators

    guidance = 1.0 if drawn["guidance"] is None else drawn["guidance"]
    denoiser, guided = support.sampled_model(model, None, None, guidance, None, where)
    label, n = support.class_of(denoiser, drawn["class"]), min(drawn["number"] or 10_000, limit or 10**8)
    plan = plan_for(denoiser, drawn["nfe"] or 10)
    if getattr(denoiser, "told", None) == "a text":
        raise LogsnrError(
            f"{model} is told a text: make samples with logsnr generate --prompt, and evaluate their folder"
        )
    support.sampled_condition(denoiser, label, None, 1)  # what it refuses
    classes = int(denoiser.card.get("classes") or 0)

    def parts() -> Iterator[Tensor]:
        for first in range(0, n, chunk):
            rows = range(first, min(first + chunk, n))
            labels = (
                torch.full((len(rows),), label) if label is not None else drawn_classes(seed, rows, max(classes, 1))
            )
            x = run(
                guided,
                plan,
                n=len(rows),
                generator=generators(seed, rows),
                cond={"class_labels": labels.to(where["device"])} if classes else {},
            )
            yield denoiser.decode(x).cpu()

    return Stored(
        source=model, n=n, shape=image_shape(denoiser), pixels=denoiser.pixels or Pixels(), digest="", prepared="",
        parts=parts,
    )  # fmt: skip


def _bits(
    model: str,
    data: str | None,
    evaluations: int,
    limit: int | None,
    ends: tuple[float | None, float | None],
    tolerance: float | None,
    parts: Path | None,
    process: tuple[int, int],
    where: dict[str, Any],
    seed: int,
    json_: bool,
) -> None:
    import torch

    from logsnr.cli import support
    from logsnr.cli.data import held_out_images
    from logsnr.files import fingerprint
    from logsnr.likelihood import bits_per_dim, bits_per_dim_in_parts, default_logsnr_range
    from logsnr.terminal import progress_bar
    from logsnr.writing import check_folder

    rank, world = process
    parts = None if parts is None else check_folder(parts, "--parts")
    logsnr_min, logsnr_max = ends
    denoiser = support.run_denoiser(model, where)
    images, pixels, cond, train = held_out_images(denoiser, data, limit, quiet=hushed(json_))
    lo, hi = default_logsnr_range(pixels)
    options: dict[str, Any] = {
        "pixels": pixels,
        "logsnr_range": (lo if logsnr_min is None else logsnr_min, hi if logsnr_max is None else logsnr_max),
        "cond": cond,
        "evaluations_per_image": evaluations,
        "train": train,
        "tolerance": tolerance,
        "max_evaluations_per_image": max(1024, evaluations),
    }
    if parts is None:
        result = bits_per_dim(denoiser, images, generator=torch.Generator().manual_seed(seed), **options)
    else:
        about = {"model": fingerprint(denoiser.state_dict()), "data": fingerprint({"images": images})}
        with progress_bar(not hushed(json_) and rank == 0, "parts") as show:
            tell = None if show is None else lambda done, total: show(done / total, f"{done} of {total}")
            found = bits_per_dim_in_parts(
                denoiser, images, parts, seed=seed, rank=rank, world=world, about=about, progress=tell, **options
            )
        if found is None:
            there = len(list(parts.glob("part-*.json")))
            if json_:
                support.print_json({"parts": str(parts), "there": there})
            else:
                print(f"{parts}: {there} parts are there; the same line says the whole once all are")
            return
        result = found
    facts = {
        "model": model,
        "images": len(images),
        "grey_levels": pixels.grey_levels,
        "bits_per_dim": result.bits_per_dim,
        "stderr": result.stderr,
        "data_stderr": result.data_stderr,
        "diffusion": result.diffusion,
        "reconstruction": result.reconstruction,
        "prior": result.prior,
        "logsnr_range": list(result.logsnr_range),
        "evaluations": result.evaluations,
        "pilot_evaluations": result.pilot_evaluations,
        "seed": seed,
    }
    if json_:
        support.print_json(facts)
        return
    table = Table(
        title=f"{model} on {len(images)} held-out images ({pixels.grey_levels} grey levels)", title_justify="left"
    )
    table.add_column("log-SNR")
    table.add_column("error of eps per dimension", justify="right")
    for centre, error in zip(*(t.tolist() for t in result.loss_curve), strict=True):
        table.add_row(f"{centre:.2f}", f"{error:.4f}")
    console().print(table)
    spent = f"{result.evaluations} evaluations and {result.pilot_evaluations} of the pilot"
    print(f"{result}; {spent}, seed {seed}")
