"""`logsnr compare`: every sampler from the same noise, at counted evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed, note
from logsnr.cli.sample import NegativePrompt, NullClass
from logsnr.terminal import console, description

if TYPE_CHECKING:
    from torch import Tensor

    from logsnr.evaluation.compare import Comparison
    from logsnr.evaluation.features import FeatureSpace
    from logsnr.evaluation.statistics import Statistics
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
    prompts: Annotated[Path | None, typer.Option(help="Of a diffusers pipeline: a file with a prompt a line.")] = None,
    negative_prompt: NegativePrompt = None,
    null_class: NullClass = None,
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
    stats: Annotated[
        Path | None,
        typer.Option(help="Data of FD and KID: file of logsnr stats, or a reference file of EDM or ADM (mu, sigma)."),
    ] = None,
    start: Annotated[
        str,
        typer.Option(help="Gaussian start that takes part: of data, of model, none, or a file of logsnr calibrate."),
    ] = "none",
    everything: Annotated[
        bool, typer.Option("--all", help="Print every grid of a solver, not its best alone.")
    ] = False,
    passport: Annotated[
        Path | None,
        typer.Option(help="JSON of `logsnr passport`: stay in its usable range; the admissible grid of its eta joins."),
    ] = None,
    range_: Range = None,
    out: Annotated[Path | None, typer.Option(help="Folder for comparison.html, .json, .md, .png and .svg.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --out holds, of any process, and measure the rest.")
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds: how many from --seed on, e.g. 3, or which, e.g. 0,1,2.")
    ] = None,
    cells: Annotated[
        str | None,
        typer.Option(help="Measure one part of all samplers and seeds, e.g. 2/4 [default: torchrun's part, else all]."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Compare samplers on a model: ours, diffusers' schedulers and plans, from the same noise.

    Example: logsnr compare runs/digits --nfe 5,8 --plan plan.json --out comparison

    Example: logsnr compare zoo:digits --stats digits.npz --seeds 3 --out comparison

    Example: logsnr compare pipelines/sd --prompts prompts.txt --guidance 7.5 --features none --out comparison
    """
    from logsnr.cli import starts, support
    from logsnr.devices import find_process
    from logsnr.errors import LogsnrError
    from logsnr.evaluation.compare import entries as samplers
    from logsnr.evaluation.compare import measure, table, write
    from logsnr.evaluation.compare import peers as theirs
    from logsnr.evaluation.compare.render import read, write_rows
    from logsnr.evaluation.compare.schedulers import ALL, SCHEDULERS
    from logsnr.evaluation.passport import Passport
    from logsnr.files import fingerprint
    from logsnr.interrupts import Interrupted, last_signal
    from logsnr.sampling.names import SOLVERS, compared_grids, compared_solvers
    from logsnr.writing import check_folder

    rank, world = find_process()
    part = _part(cells) or ((rank + 1, world) if world > 1 else None)
    for option, given in (("--resume", resume), ("--cells", part)):
        if given and out is None:
            raise LogsnrError(f"{option} without --out: name the folder of the comparison")
    quiet = hushed(json_) or rank > 0
    drawn = _seeds(seeds, seed)
    reference = None if stats is None else _statistics(stats, data, features, start)
    out = None if out is None else check_folder(out)
    before = read(out) if resume and out is not None else None
    budgets = _numbers(nfe)
    words = {"solvers": _words(solvers), "grids": _words(grids)}
    solvers_known = [*compared_solvers(noisy=True), *(SCHEDULERS if peers else ())]
    samplers.check_words("solver", words["solvers"], solvers_known, SOLVERS)
    samplers.check_words("grid", words["grids"], [*compared_grids(), *(ALL if peers else ())])
    found = samplers.read_plans(plan or [])
    denoiser, guided = support.sampled_model(
        model, None, negative_prompt, guidance, null_class, support.place(device, dtype, compile_)
    )
    label = support.class_of(denoiser, class_)
    about, eta = _about(model, denoiser, guidance, label), None
    if passport is not None:
        known = Passport.load(passport)
        guided.trained_range, eta = known.sampling_range, known.eta_curve
        about["passport"] = passport.name if eta else f"{passport.name}, made without data: no admissible grid"
        if not eta and not quiet:
            note(about["passport"])
    cond, texts = support.prompted(denoiser, model, prompts, label, n)
    if texts:
        about["prompts"] = support.about_prompts(texts)
    if range_ is not None:
        if passport is not None:
            raise LogsnrError(f"--range {range_} with --passport, which has a range: give one of them")
        guided.trained_range = support.asked_range(guided, range_, dict(cond), seed) or guided.trained_range
        about["range"] = "sigma {:.4g} ... {:.4g}".format(*guided.trained_range)
    images = None if reference is not None else _data(denoiser, data, features, start, quiet=quiet)
    gaussian = starts.found_start(denoiser, start, data, seed, quiet=quiet)
    if stats is not None:
        assert reference is not None
        which = fingerprint({"mu": reference.mean, "sigma": reference.covariance})
        about["statistics"] = f"{stats.name} ({which[:12]})"
    if gaussian is not None:
        about["start"] = f"{start if start in starts.STARTS else Path(start).name} ({gaussian.fingerprint[:12]})"
    entries = [
        *samplers.ours(guided, budgets, **words, eta=eta, noisy=images is not None or reference is not None),
        *(() if words["grids"] else samplers.searched(guided, budgets, words["solvers"])),
        *(() if any(words.values()) else [*samplers.uncalibrated(guided, budgets), *samplers.own(guided, budgets)]),
        *(() if gaussian is None else samplers.started(guided, budgets, gaussian)),
        *(theirs(guided, budgets, **words) if peers else ()),
        *samplers.plans(guided, found, starts.starts_of(gaussian, plan or [])),
    ]
    if not entries:
        raise LogsnrError(
            f"--nfe {nfe} holds no sampler of these: allow more evaluations, or drop --solvers and --grids"
        )

    if out is not None and not resume and part is None:
        for file in out.glob("cells-*-of-*.json"):  # of a comparison before this one
            file.unlink()

    def so_far(result: Comparison) -> None:
        if out is not None:
            write_rows(result, out, part)

    with _bar(quiet=quiet) as tell:
        tell(0, len(entries), "features")
        if reference is not None:
            space: FeatureSpace | None = _space_of(denoiser, reference, features)
        else:
            space = None if images is None else _space(denoiser, images, features, label, drawn[0])
        result = measure(
            guided, entries, n=n, seed=drawn, cells=part, cond=cond, teacher_steps=teacher_steps, chunk=chunk,
            features=space, about=about, progress=tell, before=before,
            so_far=so_far,
        )  # fmt: skip
    files = [] if out is None else [write_rows(result, out, part)] if part else write(result, out)
    if json_:
        support.print_json({**result.to_dict(), "files": [str(file) for file in files]})
    else:
        if part is None:
            console().print(table(result, everything=everything))
        if files:
            print(f"{out}: {', '.join(file.name for file in files)}")
        if part is not None and rank == 0:
            print("once every part is there, the same line with --resume and without --cells writes the whole")
    if "interrupted" in result.about:
        how = "" if out is None else f": {support.this_command('--resume')}"
        raise Interrupted(f"interrupted {result.about['interrupted']}, which are above{how}", signum=last_signal())


def _seeds(text: str | None, seed: int) -> tuple[int, ...]:
    """The seeds of --seeds: so many from --seed on, or those that are listed."""
    from logsnr.errors import LogsnrError

    if text is None:
        return (seed,)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise LogsnrError(f"--seeds {text!r}: give how many, e.g. --seeds 3, or which: --seeds 0,1,2")
    if len(parts) == 1:
        if not 1 <= int(text) <= 1000:
            raise LogsnrError(f"--seeds {text}: give a number in 1 ... 1000, or a list: --seeds 0,1,2")
        return tuple(range(seed, seed + int(text)))
    if seed:
        raise LogsnrError(f"--seeds {text} with --seed {seed}: give one of them")
    return tuple(map(int, parts))


def _part(text: str | None) -> tuple[int, int] | None:
    """(i, k) of --cells i/k."""
    from logsnr.errors import LogsnrError

    if text is None:
        return None
    i, _, k = text.partition("/")
    if not all(part.isascii() and part.isdigit() for part in (i, k)) or not 1 <= int(i) <= int(k):
        raise LogsnrError(f"--cells {text!r}: give a part of so many, from 1 on: --cells 2/4")
    return int(i), int(k)


def _statistics(file: Path, data: str | None, features: str | None, start: str) -> Statistics:
    """The reference of FD and KID in a file, which says what other options would."""
    from logsnr.errors import LogsnrError
    from logsnr.evaluation.statistics import Statistics

    if data is not None and start != "data":
        raise LogsnrError(f"--data {data} with --stats {file}, which is of data: give one of them")
    if features == "none":
        raise LogsnrError(f"--stats {file} is read for features, which --features none leaves out: drop one of them")
    return Statistics.load(file)


def _numbers(text: str) -> list[int]:
    """Whole numbers of at least 1, in increasing order."""
    from logsnr.errors import LogsnrError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 1000 for part in parts):
        raise LogsnrError(f"--nfe {text!r}: give whole numbers in 1 ... 1000, separated by commas: --nfe 4,5,6,8")
    return sorted({int(part) for part in parts})


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _data(denoiser: Loaded, source: str | None, name: str | None, start: str, *, quiet: bool) -> Dataset | None:
    """The data behind FD and KID; None for neither."""
    from logsnr.cli.data import data_config, image_shape, say
    from logsnr.errors import LogsnrError
    from logsnr.training import load_data

    if source is not None and name == "none" and start != "data":
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
    from logsnr.evaluation.features import feature_space

    chosen = name or ("classifier" if data.train_labels is not None else "pixels")

    return feature_space(
        chosen, _decoding(denoiser, data.grey_levels), data, source=Path(data.source).stem, seed=seed,
        label=None if label == denoiser.card.get("null_class") else label,
    )  # fmt: skip


def _space_of(denoiser: Loaded, reference: Statistics, name: str | None) -> FeatureSpace:
    """The space that was asked for, or that the statistics name, with them as its data."""
    import torch

    from logsnr.cli.data import image_shape
    from logsnr.evaluation.features import FeatureSpace
    from logsnr.pixels import Pixels

    levels = int(reference.images.get("grey_levels", 256))
    pixels = denoiser.pixels or Pixels(levels)
    shape, decode = image_shape(denoiser), _decoding(denoiser, levels)
    space = reference.find_space(name, pixels)
    reference.check(space, shape, pixels)
    reference.check_width(space(torch.zeros(1, *shape, dtype=torch.uint8)).shape[1], space)
    return FeatureSpace(name=space.name, of=lambda x: space(decode(x)), reference=reference.reference)


def _decoding(denoiser: Loaded, grey_levels: int) -> Callable[[Tensor], Tensor]:
    """Samples to stored images; a pipeline has no grey levels of its own, and takes those of the data."""
    from logsnr.denoiser import NetworkDenoiser
    from logsnr.pixels import Pixels

    if isinstance(denoiser, NetworkDenoiser):
        return denoiser.decode
    return lambda x: Pixels(grey_levels).decode(denoiser.decode_float(x))


def _about(model: str, denoiser: Loaded, guidance: float, label: int | None) -> dict[str, Any]:
    from logsnr.cli.support import model_name
    from logsnr.denoiser import NetworkDenoiser
    from logsnr.files import fingerprint

    facts: dict[str, Any] = {"model": model_name(model)}
    if isinstance(denoiser, NetworkDenoiser):  # of a pipeline they are gigabytes
        facts["weights"] = fingerprint(denoiser.state_dict())[:12]
    if denoiser.card.get("classes"):
        facts["classes"] = "all in turn" if label is None else label
    if denoiser.card.get("classes") or guidance != 1:
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
