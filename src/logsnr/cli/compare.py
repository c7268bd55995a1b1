"""`logsnr compare`: every sampler from the same noise, at counted evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed, note
from logsnr.terminal import console, description

if TYPE_CHECKING:
    from torch import Tensor

    from logsnr.evaluation.features import FeatureSpace
    from logsnr.loading import Loaded
    from logsnr.training import Dataset


@app.command(cls=Named)
def compare(
    model: Model,
    nfe: Annotated[str, typer.Option(help="Network evaluations per image, comma-separated.")] = "5,8",
    plan: Annotated[
        list[Path] | None, typer.Option("--plan", help="Plan files (JSON) that take part; may be repeated.")
    ] = None,
    solvers: Annotated[
        str,
        typer.Option(help="Keep solvers whose names start so, e.g. ge,dpm++: {compared}, or a scheduler of diffusers."),
    ] = "",
    grids: Annotated[
        str,
        typer.Option(
            help="Keep grids whose names start so, e.g. karras,trailing: {compared_grids}, or one of diffusers."
        ),
    ] = "",
    peers: Annotated[bool, typer.Option(help="Whether diffusers' schedulers take part.")] = True,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is none, else two evaluations a step.")
    ] = 1.0,
    class_: Annotated[
        str | None, typer.Option("--class", help="Class of a conditional model, name or number [default: all in turn].")
    ] = None,
    n: Annotated[int, typer.Option("--number", "-n", help="Images per sampler.", min=2)] = 512,
    chunk: Annotated[int, typer.Option(help="Images per network call.", min=1)] = 256,
    teacher_steps: Annotated[int, typer.Option(help="Steps of the teacher.", min=16, max=10_000)] = 100,
    data: Annotated[str | None, typer.Option(help="{data} [default: the recipe's].")] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Of FD and KID: {spaces}, none, or module:function [default: what the data allow]."),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(help="Replicates behind the standard errors of FD and KID.", min=2, max=100_000)
    ] = 100,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every grid of a solver, not its best alone.")
    ] = False,
    passport: Annotated[
        Path | None,
        typer.Option(help="JSON of `logsnr passport`: stay in its usable range; the admissible grid of its eta joins."),
    ] = None,
    range_: Range = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.json, .md, .png and .svg.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows that --out holds, and measure the others.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Compare samplers on a model: ours, diffusers' schedulers and plans, from the same noise.

    Example: logsnr compare runs/digits --nfe 5,8 --plan plan.json --out comparison
    """
    from logsnr.cli import support
    from logsnr.errors import LogsnrError
    from logsnr.evaluation.compare import entries as samplers
    from logsnr.evaluation.compare import measure, table, write
    from logsnr.evaluation.compare import peers as theirs
    from logsnr.evaluation.compare.render import read, write_rows
    from logsnr.evaluation.compare.schedulers import ALL, SCHEDULERS
    from logsnr.evaluation.passport import Passport
    from logsnr.interrupts import Interrupted, last_signal
    from logsnr.sampling.names import SOLVERS, compared_grids, compared_solvers
    from logsnr.writing import check_folder

    if resume and out is None:
        raise LogsnrError("--resume without --out: name the folder of the comparison to go on with")
    out = None if out is None else check_folder(out)
    before = read(out) if resume and out is not None else None
    budgets = _numbers(nfe)
    words = {"solvers": _words(solvers), "grids": _words(grids)}
    solvers_known = [*compared_solvers(noisy=True), *(SCHEDULERS if peers else ())]
    samplers.check_words("solver", words["solvers"], solvers_known, SOLVERS)
    samplers.check_words("grid", words["grids"], [*compared_grids(), *(ALL if peers else ())])
    found = samplers.read_plans(plan or [])
    denoiser, guided = support.sampled_model(model, None, None, guidance, None, support.place(device, dtype, compile_))
    label = support.class_of(denoiser, class_)
    about, eta = _about(model, denoiser, guidance, label), None
    if passport is not None:
        known = Passport.load(passport)
        guided.trained_range, eta = known.sampling_range, known.eta_curve
        about["passport"] = passport.name if eta else f"{passport.name}, made without data: no admissible grid"
        if not eta and not json_:
            note(about["passport"])
    cond = support.condition(denoiser, label, n)
    if range_ is not None:
        if passport is not None:
            raise LogsnrError(f"--range {range_} with --passport, which has a range: give one of them")
        few = support.condition(denoiser, label, 12)
        guided.trained_range = support.asked_range(guided, range_, few, seed) or guided.trained_range
        about["range"] = "sigma {:.4g} ... {:.4g}".format(*guided.trained_range)
    images = _data(denoiser, data, features, quiet=hushed(json_))
    entries = [
        *samplers.ours(guided, budgets, **words, eta=eta, noisy=images is not None),
        *(() if any(words.values()) else [*samplers.uncalibrated(guided, budgets), *samplers.own(guided, budgets)]),
        *(theirs(guided, budgets, **words) if peers else ()),
        *samplers.plans(guided, found),
    ]
    if not entries:
        raise LogsnrError(
            f"--nfe {nfe} holds no sampler of these: allow more evaluations, or drop --solvers and --grids"
        )
    with _bar(quiet=hushed(json_)) as tell:
        tell(0, len(entries), "features")
        space = None if images is None else _space(denoiser, images, features, label, seed)
        result = measure(
            guided, entries, n=n, seed=seed, cond=cond, teacher_steps=teacher_steps, chunk=chunk, features=space,
            replicates=bootstrap, about=about, progress=tell, before=before,
            so_far=None if out is None else (lambda rows: write_rows(rows, out)),
        )  # fmt: skip
    files = [] if out is None else write(result, out)
    if json_:
        support.print_json({**result.to_dict(), "files": [str(file) for file in files]})
    else:
        console().print(table(result, everything=everything))
        if files:
            print(f"{out}: {', '.join(file.name for file in files)}")
    if "interrupted" in result.about:
        how = "" if out is None else f": {support.this_command('--resume')}"
        raise Interrupted(f"interrupted {result.about['interrupted']}, which are above{how}", signum=last_signal())


def _numbers(text: str) -> list[int]:
    """Whole numbers of at least 1, in increasing order."""
    from logsnr.errors import LogsnrError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        raise LogsnrError(f"--nfe {text!r}: give whole numbers in 1 ... 1000, separated by commas: --nfe 4,5,6,8")
    return sorted({int(part) for part in parts})


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _data(denoiser: Loaded, source: str | None, name: str | None, *, quiet: bool) -> Dataset | None:
    """The data behind FD and KID; None for neither."""
    from logsnr.cli.data import data_config, image_shape, say
    from logsnr.errors import LogsnrError
    from logsnr.training import load_data

    if source is not None and name == "none":
        raise LogsnrError(f"--data {source} is read for features, which --features none leaves out: drop one of them")
    config = data_config(denoiser, source)
    if name == "none" or (name is None and config is None):
        return None
    if config is None:
        raise LogsnrError(f"--features {name}: this model does not say what it was trained on: give --data")
    try:
        data = load_data(config, progress=not quiet)
    except LogsnrError as error:
        if name is not None or source is not None:
            raise LogsnrError(f"{error}; or --features none") from error
        if not quiet:  # the run may have moved away from its data
            note(f"no FD and KID: {error}; or give --data")
        return None
    if data.shape != image_shape(denoiser):
        raise LogsnrError(f"{config.source} holds images of {data.shape}, the model makes {image_shape(denoiser)}")
    say(data, source, quiet)
    return data


def _space(denoiser: Loaded, data: Dataset, name: str | None, label: int | None, seed: int) -> FeatureSpace:
    """The feature space asked for; without a wish, what the data allow."""
    from logsnr.denoiser import NetworkDenoiser
    from logsnr.evaluation.features import feature_space
    from logsnr.pixels import Pixels

    chosen = name or ("classifier" if data.train_labels is not None else "pixels")

    def decode(x: Tensor) -> Tensor:
        # A pipeline has no grey levels of its own: it takes those of the data.
        if isinstance(denoiser, NetworkDenoiser):
            return denoiser.decode(x)
        return Pixels(data.grey_levels).decode(denoiser.decode_float(x))

    return feature_space(
        chosen, decode, data, source=Path(data.source).stem, seed=seed,
        label=None if label == denoiser.card.get("null_class") else label,
    )  # fmt: skip


def _about(model: str, denoiser: Loaded, guidance: float, label: int | None) -> dict[str, Any]:
    from logsnr.cli.support import model_name

    facts: dict[str, Any] = {"model": model_name(model)}
    if denoiser.card.get("classes"):
        facts["classes"] = "all in turn" if label is None else label
        facts["guidance"] = "none" if guidance == 1 else guidance
    return facts


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of samplers, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    shown = console(stderr=True)
    columns = (description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shown, disable=quiet or not shown.is_terminal, transient=True) as bar:
        task = bar.add_task("features", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
