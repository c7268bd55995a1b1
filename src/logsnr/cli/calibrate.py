"""`logsnr calibrate`: plans of one or several lengths, of a run, a model of the zoo, or a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logsnr.cli.application import Compile, Device, Dtype, Json, Model, Named, Range, Seed, app, hushed, note
from logsnr.cli.sample import NegativePrompt, NullClass

if TYPE_CHECKING:
    from logsnr.denoiser import Denoiser
    from logsnr.loading import Loaded
    from logsnr.sampling import Plan


@app.command(cls=Named)
def calibrate(
    model: Model,
    nfe: Annotated[str, typer.Option(help="Network evaluations per image, 1 to 20; several share one teacher.")] = "6",
    out: Annotated[Path, typer.Option(help="Where the plan, or the plans, are written (JSON).")] = Path("plan.json"),
    effort: Annotated[
        str, typer.Option(help="full, or quick: levels and rows without a descent, a fifth of the evaluations.")
    ] = "full",
    budget: Annotated[float | None, typer.Option(help="Minutes: take of effort and number what fits.")] = None,
    n: Annotated[int, typer.Option("--number", "-n", help="Noises to fit to; others select and report.")] = 96,
    rollouts: Annotated[int | None, typer.Option(help="Budget, 40 to 200 rollouts of these; else 1400/NFE.")] = None,
    resume: Annotated[Path | None, typer.Option(help="File that keeps measurements, to go on after Ctrl-C.")] = None,
    method: Annotated[
        str, typer.Option(help="search, or a baseline on the same noises: gits, ays, ends (see docs/calibration.md).")
    ] = "search",
    prompts: Annotated[Path | None, typer.Option(help="Of a diffusers pipeline: a file with a prompt a line.")] = None,
    guidance: Annotated[
        str, typer.Option(help="Classifier-free guidance, e.g. 7.5; or 3:9, drawn between for one plan for all.")
    ] = "1",
    negative_prompt: NegativePrompt = None,
    null_class: NullClass = None,
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
    chunk: Annotated[int | None, typer.Option(help="Images per network call [default: by their size].", min=1)] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    compile_: Compile = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Find a model's best few-step plan, against a many-step teacher from the same noise.

    Example: logsnr calibrate runs/digits --nfe 5 --out plan.json

    Example: logsnr calibrate pipelines/sd --prompts prompts.txt --guidance 7.5 --nfe 4,6,8 --out plans.json
    """
    from logsnr.cli import starts, support
    from logsnr.denoiser import NetworkDenoiser
    from logsnr.errors import LogsnrError
    from logsnr.interrupts import Interrupted, last_signal, signal_of
    from logsnr.sampling.plan import save_plans
    from logsnr.writing import check_output, is_stream

    nfes = _numbers(nfe)
    usable = None
    if passport is not None and range_ is not None:
        raise LogsnrError(f"--range {range_} with --passport, which has a range: give one of them")
    if budget is not None and (rollouts is not None or resume is not None or effort != "full"):
        raise LogsnrError(f"--budget {budget:g} chooses --effort and --rollouts, anew each time: leave it or them out")
    out = check_output(out)
    keep = None if is_stream(out) else out.with_suffix(".measured.json")
    if resume is not None:
        keep = check_output(resume, "--resume")
    what = _told(model, n, prompts, guidance, negative_prompt, null_class, support.place(device, dtype, compile_))
    if range_ is not None:
        usable = support.asked_range(what.guided, range_, what.cond, seed)
    if passport is not None:
        from logsnr.evaluation.passport import Passport

        usable = Passport.load(passport).sampling_range
    gaussian = None
    if isinstance(what.denoiser, NetworkDenoiser):
        gaussian = starts.fitted_start(what.denoiser, start, data, seed, quiet=hushed(json_))
    elif start != "none":
        raise LogsnrError(f"--start {start}: of a pipeline it is fitted in Python (docs/start.md); leave it out")
    starts.check_start(gaussian, out)
    sizes: dict[str, Any] = {"effort": effort, "n": n, "rollouts": rollouts}
    if budget is not None:
        sizes = _within(what, nfes, budget, n, chunk)
    plans: dict[int, Plan] = {}
    memo: dict[str, Any] = {}
    try:
        for number in nfes:
            kept_at = None if keep is None else _of(keep, number, nfes)
            if kept_at is not None and resume is None and len(nfes) > 1:
                kept_at.unlink(missing_ok=True)  # as one plan's, which an interruption writes anew
            files = {"resume": kept_at if resume or len(nfes) > 1 else None, "keep": kept_at}
            plans[number] = searched(
                what,
                number,
                quiet=hushed(json_),
                sigma_range=usable,
                method=method,
                start=gaussian,
                first=first,
                chunk=chunk,
                seed=seed,
                memo=memo,
                **sizes,
                **files,
            )
            if plans[number].meta["interrupted"]:
                break
    except KeyboardInterrupt as stop:
        if not plans:
            kept = keep is not None and _of(keep, nfes[0], nfes).exists()
            how = f": {support.this_command('--resume', str(keep))}" if kept else ""
            raise Interrupted(f"interrupted before there was a plan{how}", signum=signal_of(stop)) from stop
    try:
        if len(nfes) == 1:
            plans[nfes[0]].save(out)
        else:
            save_plans(plans, out)
    except OSError:
        found = {str(number): plan.to_dict() for number, plan in plans.items()}
        support.print_json(found if len(nfes) > 1 else found[str(nfes[0])])  # minutes of work: on stdout it is not lost
        raise
    kept_start = next(filter(None, [starts.keep_start(gaussian, plan, out) for plan in plans.values()]), None)
    beside = {"start": str(kept_start)} if kept_start else {}
    facts = [{"nfe": p.nfe, "hash": p.hash, "report": p.meta["report"]} for p in plans.values()]
    if json_:
        several = {"plans": facts} if len(nfes) > 1 else facts[0]
        support.print_json({"out": str(out), **several, **beside})
    else:
        for plan in plans.values():
            _tell(out, plan)
    cut = [plan for plan in plans.values() if plan.meta["interrupted"]]
    if cut or len(plans) < len(nfes):
        how = f"; what was measured is kept: {support.this_command('--resume', str(keep))}" if keep else ""
        best = f"the best plan of {cut[0].nfe} evaluations so far" if cut else f"of {len(plans)} of {len(nfes)} plans"
        raise Interrupted(f"interrupted: {out} is {best}{how}", signum=last_signal())
    if resume is None and keep is not None and len(nfes) > 1:
        for number in nfes:
            _of(keep, number, nfes).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Told:
    """A model with all that it is told.

    Args:
        denoiser: the model.
        guided: the same, or its guided one.
        cond: its conditions, used in turn.
        about: what the plan's file says of them.
    """

    denoiser: Loaded
    guided: Denoiser
    cond: dict[str, Any]
    about: dict[str, Any]


def _told(
    model: str,
    n: int,
    prompts: Path | None,
    guidance: str,
    negative_prompt: str | None,
    null_class: int | None,
    where: Mapping[str, Any],
) -> Told:
    """The model by the options of the command.

    Raises:
        LogsnrError: if an option does not fit it.
    """
    import torch

    from logsnr.adapters.diffusers.pipelines import PipelineDenoiser
    from logsnr.cli import support
    from logsnr.guidance import SCALE, cfg

    low, high = _scales(guidance)
    drawn = low < high
    asked = low if high == 1 else high  # a range is guidance, also where it ends at none
    denoiser, guided = support.sampled_model(model, None, negative_prompt, asked, null_class, where)
    about: dict[str, Any] = {} if asked == 1 else {"guidance": [low, high] if drawn else high}
    given, texts = support.prompted(denoiser, model, prompts, None, n)
    cond = dict(given)
    if isinstance(denoiser, PipelineDenoiser):
        about |= {"pipeline": support.model_name(model), "shape": list(denoiser.shape), **denoiser.about}
        if texts:
            about["prompts"] = support.about_prompts(texts)
        if negative_prompt is not None:
            about["negative_prompt"] = negative_prompt
        if drawn:
            guided = denoiser.guided_each()
    elif drawn:
        guided = cfg(denoiser, None, {"class_labels": denoiser.card["null_class"]})
    if drawn:
        rows = next((len(v) for v in cond.values() if isinstance(v, torch.Tensor)), 1)
        times = -(-SCALES // rows)
        cond = {name: torch.cat([value] * times) for name, value in cond.items()}
        # evenly spread however many are used: multiples of the golden ratio
        parts = torch.arange(rows * times, dtype=torch.float64).mul(0.6180339887498949).add(0.5).frac()
        cond[SCALE] = (low + (high - low) * parts).float()
    return Told(denoiser=denoiser, guided=guided, cond=cond, about=about)


BEYOND = 0.5
"""From this share on, it is said that no plan brings more."""
SCALES = 64
"""Guidance scales that are drawn from a range, at least."""


def _scales(text: str) -> tuple[float, float]:
    """(lowest, highest) of `--guidance`: a number, or two of them.

    Raises:
        LogsnrError: if it is neither.
    """
    from logsnr.errors import LogsnrError

    try:
        low, _, high = text.partition(":")
        ends = float(low), float(high or low)
    except ValueError:
        ends = (1.0, 0.0)
    if not ends[0] <= ends[1]:
        raise LogsnrError(f"--guidance {text!r}: give a scale, e.g. 7.5, or two for a range, e.g. 3:9")
    return ends


def _numbers(text: str) -> list[int]:
    """The numbers of evaluations, each once.

    Raises:
        LogsnrError: if one is no number that a plan can have.
    """
    from logsnr.calibration.settings import MOST_STEPS
    from logsnr.errors import LogsnrError

    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(1 <= number <= MOST_STEPS for number in found):  # before any of them is sought
        raise LogsnrError(f"--nfe {text!r}: give a number, 1 to {MOST_STEPS}, or several, e.g. 4,6,8")
    return found


def _of(path: Path, number: int, nfes: Sequence[int]) -> Path:
    """The file of one of several plans."""
    return path if len(nfes) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _within(what: Told, nfes: Sequence[int], minutes: float, n: int, chunk: int | None) -> dict[str, Any]:
    """Effort, noises and rollouts that fit into so many minutes, said on stderr."""
    from logsnr.calibration.budget import fitting, rate

    per_answer = rate(what.guided, what.denoiser.sigma_data, what.cond, chunk or 16)
    sizes = fitting(nfes, minutes, per_answer, n=n)
    given = "" if sizes.rollouts is None else f" --rollouts {sizes.rollouts}"
    note(
        f"{per_answer * 1e3:.3g} ms per answer: --effort {sizes.effort} -n {sizes.n}{given}, about "
        f"{sizes.seconds / 60:.2g} minutes"
    )
    return {"effort": sizes.effort, "n": sizes.n, "rollouts": sizes.rollouts}


def searched(what: Told, nfe: int, *, quiet: bool, **options: Any) -> Plan:
    """One plan, with a bar on a terminal; conditions are taken in turn."""
    from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from logsnr.calibration import Progress
    from logsnr.calibration import calibrate as search
    from logsnr.terminal import console, description

    shown = console(stderr=True)
    columns = (description(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=shown, disable=quiet or not shown.is_terminal) as bar:
        task = bar.add_task("teacher", total=1.0)

        def tell(progress: Progress) -> None:
            told = f"{nfe} evaluations: {progress.stage}, RMSE {progress.error:.4f}, {progress.evaluations:,} asked"
            bar.update(task, completed=progress.spent, description=told)

        return search(what.guided, nfe, cond=what.cond or None, about=what.about, progress=tell, **options)


def _tell(out: Path, plan: Plan) -> None:
    """The report of a plan."""
    report = plan.meta["report"]
    if report is not None:
        own = f"this plan, +- {report['stderr']:.4f}; half of its samples below {report['median']:.4f}"
        if report["strayed"]:
            own += f", {report['strayed']:.0%} elsewhere than the teacher's"
        errors = {own: report["rmse"], **report["alternatives"]}
        print(f"{out}: {plan.nfe} evaluations; RMSE to the teacher's end points on noise the search has not seen:")
        for name, error in sorted(errors.items(), key=lambda item: item[1])[:6]:
            print(f"  {error:.4f}  {name}")
        if (beyond := report.get("outside", [0.0])[-1]) > BEYOND:
            print(f"  {beyond:.0%} of what is left lies outside what any plan of these estimates reaches")
