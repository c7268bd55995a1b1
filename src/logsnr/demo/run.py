"""The demo, step by step: train, measure, sample, judge, report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from logsnr.demo.page import demo_page
from logsnr.demo.result import FEATURES, DemoResult, Recognised, Sampled, Training
from logsnr.denoiser import NetworkDenoiser, noisy
from logsnr.errors import LogsnrError
from logsnr.evaluation import Classifier, FeatureSpace, nearest_distances, train_classifier
from logsnr.evaluation.compare import Entry, measure, plans
from logsnr.evaluation.metrics import Estimated
from logsnr.files import CARD
from logsnr.images import png, side_by_side, tile
from logsnr.likelihood import Likelihood, bits_per_dim
from logsnr.loading import load_plans
from logsnr.pixels import Pixels
from logsnr.report.page import write_page
from logsnr.sampling import Plan, grids, solvers
from logsnr.terminal import console
from logsnr.training import Dataset, load_data, load_recipe, train
from logsnr.training.checkpoint import has_state
from logsnr.training.metrics import METRICS
from logsnr.writing import check_folder, replace_file

REPORT = "report.json"
"""The demo's numbers; its mark on a folder."""
SAMPLES = 500
EVALUATIONS = (5, 10, 20)
TEACHER_STEPS = 64
STRIP_SIGMAS = (0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 20.0)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    max_seconds: float = 90.0,
    quiet: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the whole demo and write `out`/report.html; returns the summary.

    Args:
        out: folder of the run (`logsnr sample OUT` works afterwards); an earlier demo there is replaced.
        seed: of every draw.
        max_seconds: longest training time; the recipe's number of steps ends it earlier on a quiet machine.
        quiet: print nothing.
        overrides: values of the digits recipe to change, by dotted path.
    """
    terminal = console(quiet=quiet)
    changes = {"seed": seed, "max_seconds": max_seconds, "samples.every": 0, **(overrides or {})}
    recipe = load_recipe("digits", changes)
    data = load_data(recipe.data)
    out = check_folder(out)
    _claim(out)
    terminal.print(f"1/5 training on {len(data.train_images)} real digits, at most {max_seconds:.0f} s")
    summary = train(recipe, out, progress=not quiet, data=data, overwrite=True)
    denoiser = summary.denoiser
    training = Training(
        objective=summary.objective,
        objective_name=recipe.objective.describe(),
        parameters=sum(p.numel() for p in denoiser.parameters()),
        steps=summary.steps,
        of_steps=recipe.steps or summary.steps,
        seconds=summary.seconds,
        images_per_second=summary.images_per_second,
        **_curve(out),
    )
    terminal.print(
        f"    {training.steps} steps in {training.seconds:.0f} s, {training.images_per_second:,.0f} images/s; "
        f"{training.parameters / 1e6:.2f} M parameters"
    )
    if training.warning:
        terminal.print(f"    {training.warning}", style="yellow")
    terminal.print("2/5 variational bound of the held-out digits")
    likelihood, given_label = _bounds(denoiser, data, seed)
    terminal.print(f"    {likelihood}; {given_label.bits_per_dim:.4f} +- {given_label.stderr:.4f} given the label")
    terminal.print("3/5 a classifier to judge samples by")
    classifier, space, recognise = _judge(data, seed)
    terminal.print(f"4/5 sampling {SAMPLES} digits from the same noise, sampler by sampler")
    teacher, rows = _samplers(denoiser, classifier, space, data.classes, seed)
    result = DemoResult(
        seed=seed,
        grey_levels=data.grey_levels,
        sigma_data=denoiser.sigma_data,
        sampling_range=denoiser.sampling_range,
        training=training,
        likelihood=likelihood,
        likelihood_given_label=given_label,
        samplers=rows,
        teacher=teacher,
        recognised=recognise(next(q.images for q in rows if q.sampler.startswith("GE") and q.nfe == max(EVALUATIONS))),
        held_out=Pixels(data.grey_levels).display(data.test_images[:]),
        strip=_strip(denoiser, data, seed),
    )
    terminal.print("5/5 report")
    replace_file(out / REPORT, (json.dumps(result.summary(), indent=2) + "\n").encode())
    replace_file(out / "digits.png", png(_poster(result)))
    page = write_page(out / "report.html", "A diffusion model of handwritten digits", demo_page(result))
    terminal.print(_table(result))
    seen = result.recognised
    terminal.print(
        f"recognised with confidence >= .9: {seen.samples:.1%} of samples (20 evaluations), "
        f"{seen.held_out:.1%} of held-out real digits\n"
        f"distance to the nearest training image (median): {seen.samples_nearest[1]:.3f} for samples, "
        f"{seen.held_out_nearest[1]:.3f} for held-out digits\n"
        f"report: {page}"
    )
    return result.summary()


def _claim(out: Path) -> None:
    """Mark a folder as the demo's own, before anything is trained there.

    Raises:
        LogsnrError: if a model lies there that the demo did not make.
    """
    if (out / REPORT).is_file():
        return
    if has_state(out) or (out / f"{CARD}.json").exists():
        raise LogsnrError(f"{out} holds a model that the demo did not make: give another folder, --out runs/demo-2")
    replace_file(out / REPORT, b'{"unfinished": true}\n')


def _curve(out: Path) -> dict[str, list[float]]:
    path = out / METRICS  # absent if the clock ended the training before its first line
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return {"logged_steps": [line["step"] for line in lines], "losses": [line["loss"] for line in lines]}


def _bounds(denoiser: NetworkDenoiser, data: Dataset, seed: int) -> tuple[Likelihood, Likelihood]:
    """The bound of the held-out digits without their labels, and given them, from the same draws."""
    assert data.test_labels is not None
    null = torch.full_like(data.test_labels, data.classes)
    without, given = (
        bits_per_dim(
            denoiser,
            data.test_images[:],
            cond={"class_labels": labels},
            generator=torch.Generator().manual_seed(seed + 1),
            train=data.train_images[:],
        )
        for labels in (null, data.test_labels)
    )
    return without, given


def _judge(data: Dataset, seed: int) -> tuple[Classifier, FeatureSpace, Callable[[Tensor], Recognised]]:
    """A classifier, the space of its features, and the function that puts samples beside held-out digits."""
    assert data.train_labels is not None
    assert data.test_labels is not None
    train, held_out = data.train_images[:], (data.test_images[:], data.test_labels)
    generator = torch.Generator().manual_seed(seed + 2)
    classifier = train_classifier(train, data.train_labels, held_out, grey_levels=data.grey_levels, generator=generator)
    # Real images against real images, in the numbers and class shares of the comparison: the floor of the distance.
    # (Classes lie far apart in the features: chance class shares alone would cost more than the samples' errors.)
    real = _balanced(data.train_labels, SAMPLES // data.classes)
    pixels = Pixels(data.grey_levels)
    with torch.no_grad():
        reference = classifier.features(train[~real])
    space = FeatureSpace(name=FEATURES, of=lambda x: classifier.features(pixels.decode(x)), reference=reference)
    references = pixels.encode(train)

    def recognise(images: Tensor) -> Recognised:
        samples, others = (nearest_distances(pixels.encode(v), references) for v in (images, held_out[0]))
        pairs = pixels.encode(images[:20]).flatten(1)
        nearest = torch.cdist(pairs, references.flatten(1)).argmin(1)
        with torch.no_grad():
            accuracy = (classifier(held_out[0]).argmax(1) == held_out[1]).double().mean()
        return Recognised(
            accuracy=float(accuracy),
            samples=classifier.confident_share(images),
            held_out=classifier.confident_share(held_out[0]),
            samples_nearest=_quartiles(samples),
            held_out_nearest=_quartiles(others),
            real_frechet=space.distances(pixels.encode(train[real]))[0].value,
            nearest_pairs=(pixels.display(images[:20]), pixels.display(train[nearest])),
        )

    return classifier, space, recognise


def _samplers(
    denoiser: NetworkDenoiser, classifier: Classifier, space: FeatureSpace, classes: int, seed: int
) -> tuple[Sampled, list[Sampled]]:
    """The teacher's row, and those of the samplers."""
    images: list[Tensor] = []
    found = measure(
        denoiser,
        _entries(denoiser),
        n=SAMPLES,
        seed=seed + 3,
        cond={"class_labels": torch.arange(classes)},  # every class equally often, in turn
        teacher_steps=TEACHER_STEPS,
        chunk=SAMPLES,
        features=space,
        keep=lambda _, x: images.append(denoiser.decode(x)),
    )

    def row(name: str, nfe: int, rmse: float | None, frechet: Estimated | None, shown: Tensor) -> Sampled:
        return Sampled(
            sampler=name,
            nfe=nfe,
            rmse=rmse,
            frechet=math.nan if frechet is None else frechet.value,
            confident=classifier.confident_share(shown),
            images=shown,
        )

    teacher = row("teacher (UniPC-3)", found.teacher.evaluations, 0.0, found.teacher.frechet, images[0])
    return teacher, [
        row(r.name, r.evaluations, None if r.rmse is None else r.rmse.value, r.frechet, shown)
        for r, shown in zip(found.rows, images[1:], strict=True)
    ]


def _entries(denoiser: NetworkDenoiser) -> list[Entry]:
    """Every sampler at every number of evaluations that it has a plan of."""
    lo, hi = denoiser.sampling_range
    ready = load_plans("zoo:digits")  # calibrated on a model of the same digits, trained longer
    samplers: dict[str, Callable[[int], Plan | None]] = {
        "zoo:digits' plan": ready.get,
        "DDIM": lambda n: solvers.ddim(grids.log_linear(n, hi, lo)),
        "GE (gamma 2)": lambda n: solvers.ge(grids.log_linear(n, hi, lo), gamma=2.0),
        "DDPM": lambda n: solvers.ddpm(grids.log_linear(n, hi, lo)),
    }
    found = [(name, plan_of(n)) for name, plan_of in samplers.items() for n in EVALUATIONS]
    return [entry for name, plan in found if plan for entry in plans(denoiser, {name: plan})]


@torch.no_grad()
def _strip(denoiser: NetworkDenoiser, data: Dataset, seed: int) -> list[tuple[float, Tensor, Tensor]]:
    pixels = Pixels(data.grey_levels)
    assert data.test_labels is not None
    x, cond = pixels.encode(data.test_images[:8]), {"class_labels": data.test_labels[:8]}
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 5))
    strip = []
    for sigma in STRIP_SIGMAS:
        z = noisy(x, eps, sigma)
        shown = pixels.display(pixels.decode(z)), pixels.display(pixels.decode(denoiser(z, sigma, **cond).x0))
        strip.append((sigma, *shown))
    return strip


def _balanced(labels: Tensor, each: int) -> Tensor:
    """Mask of the first `each` images of every class."""
    of_class = torch.nn.functional.one_hot(labels)
    return ((of_class.cumsum(0) * of_class).sum(1)) <= each


def _poster(result: DemoResult) -> Image.Image:
    """Sixty samples beside sixty held-out digits."""
    best = next(q for q in result.samplers if q.sampler.startswith("GE") and q.nfe == max(EVALUATIONS))
    samples = Pixels(result.grey_levels).display(best.images[:60])
    left, right = (tile(images, columns=10, scale=5, gap=3) for images in (samples, result.held_out[:60]))
    return side_by_side(left, right)


def _quartiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return low, middle, high


def _table(result: DemoResult) -> Table:
    table = Table(title=f"{SAMPLES} samples each, from the same noise; FD (features: {FEATURES})", title_justify="left")
    for name in ("sampler", "evaluations", "RMSE to teacher", "FD", "recognised"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    for q in (*result.samplers, result.teacher):
        error = "-" if q.rmse is None else f"{q.rmse:.4f}"
        table.add_row(q.sampler, str(q.nfe), error, f"{q.frechet:.2f}", f"{q.confident:.1%}")
    seen = result.recognised
    table.add_row("real digits", "-", "-", f"{seen.real_frechet:.2f}", f"{seen.held_out:.1%}")
    return table
