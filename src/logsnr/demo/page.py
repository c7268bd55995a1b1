"""The demo's report: what was measured, in the order a newcomer asks."""

from __future__ import annotations

import torch

from logsnr.demo.result import FEATURES, DemoResult, Sampled
from logsnr.images import tile
from logsnr.pixels import Pixels
from logsnr.report import figures
from logsnr.report.page import Html, cards, chart, heading, inline_image, paragraph, picture, row, strip, table


def demo_page(result: DemoResult) -> list[Html]:
    """The parts of the page."""
    return [
        *_opening(result),
        *_samples(result),
        *_few_steps(result),
        *_noise_levels(result),
        *_memory(result),
        *_recipe(result),
    ]


def _opening(result: DemoResult) -> list[Html]:
    training, bound, seen = result.training, result.likelihood, result.recognised
    return [
        paragraph(
            f"Trained in {training.seconds:.0f} seconds on 1,500 real 8×8 handwritten digits, measured on "
            f"{len(bound.per_image)} digits it never saw, and sampled with a handful of network evaluations. "
            "Everything below was computed on this machine just now.",
            kind="lead",
        ),
        *([paragraph(training.warning)] if training.warning else []),
        cards(
            [
                (
                    f"{bound.bits_per_dim:.3f} ± {bound.stderr:.3f}",
                    "bits per dimension, held-out digits without labels",
                ),
                (f"{seen.samples:.1%}", f"of samples recognised; of real digits {seen.held_out:.1%}"),
                (f"{training.seconds:.0f} s", f"training, {training.images_per_second:,.0f} images/s"),
                (f"{training.parameters / 1e6:.2f} M", "parameters (U-Net)"),
            ]
        ),
    ]


def _samples(result: DemoResult) -> list[Html]:
    best = _pick(result, "GE", 20)
    samples = Pixels(result.grey_levels).display(best.images[:100])
    return [
        heading("What it draws"),
        row(
            picture(
                tile(samples, columns=10, scale=5, gap=3),
                f"100 samples, not picked, a digit per column: gradient estimation, {best.nfe} evaluations each.",
            ),
            picture(tile(result.held_out[:100], columns=10, scale=5, gap=3), "100 held-out real digits, as they come."),
        ),
        paragraph(
            "A small classifier, trained on the same digits and calibrated on held-out ones "
            f"(accuracy {result.recognised.accuracy:.1%}), is at least 90 % sure of {result.recognised.samples:.1%} of "
            f"the {len(best.images)} samples, and of {result.recognised.held_out:.1%} of the held-out real digits."
        ),
    ]


def _few_steps(result: DemoResult) -> list[Html]:
    names = list(dict.fromkeys(q.sampler for q in result.samplers))
    evaluations = sorted({q.nfe for q in result.samplers})
    pixels = Pixels(result.grey_levels)

    def cell(q: Sampled | None) -> Html:
        if q is None:
            return Html()
        shown = tile(pixels.display(q.images[:10]), columns=5, scale=4)
        return inline_image(shown, f"{q.sampler}, {q.nfe} evaluations")

    found = {(q.sampler, q.nfe): q for q in result.samplers}
    pictures = [[name, *(cell(found.get((name, n))) for n in evaluations)] for name in names]
    numbers = [
        [q.sampler, q.nfe, "–" if q.rmse is None else f"{q.rmse:.4f}", f"{q.frechet:.2f}", f"{q.confident:.1%}"]
        for q in (*result.samplers, result.teacher)
    ]
    seen = result.recognised
    numbers.append(["real digits", "–", "–", f"{seen.real_frechet:.2f}", f"{seen.held_out:.1%}"])
    curves = {name: [q for q in result.samplers if q.sampler == name] for name in names}
    errors = {
        name: ([float(q.nfe) for q in rows], [q.rmse for q in rows if q.rmse is not None])
        for name, rows in curves.items()
        if rows[0].rmse is not None
    }
    distances = {name: ([float(q.nfe) for q in rows], [q.frechet for q in rows]) for name, rows in curves.items()}
    count = len(result.teacher.images)
    return [
        heading("Quality against network evaluations"),
        paragraph(
            "Every sampler starts from the same noise. DDIM takes the direction the network gives; gradient estimation "
            "(GE) corrects it by the previous one, at no extra cost; the zoo's plans are noise levels and coefficients "
            "that logsnr calibrate found for a model of the same digits, trained longer; DDPM adds fresh noise on the "
            "way and so ends elsewhere. The teacher solves the same equation in many small steps."
        ),
        table(
            ["sampler", *(f"{n} evaluations" for n in evaluations)],
            pictures,
            "Ten samples of every sampler, from the same noise.",
        ),
        picture(
            tile(pixels.display(result.teacher.images[:10]), columns=10, scale=4),
            f"Where that noise leads in {result.teacher.nfe} evaluations: the {result.teacher.sampler}.",
        ),
        row(
            chart(
                figures.against_nfe(errors, ylabel="RMSE to the teacher's end point"),
                "How far few steps land from the exact trajectory of the same noise.",
            ),
            chart(
                figures.against_nfe(distances, ylabel="Fréchet distance", floor=("real digits", seen.real_frechet)),
                f"FD (features: {FEATURES}), {count} samples against 1,000 real digits. Not FID: other features.",
            ),
        ),
        table(
            ["sampler", "evaluations", "RMSE to teacher", "FD", "recognised ≥ .9"],
            numbers,
            f"{count} samples a row, {count // 10} of each digit.",
        ),
        *_recognised(result),
        paragraph(
            "The last row compares as many real digits "
            "with the 1,000 others, and shows the recognised share of held-out digits. Samples can lie nearer to those "
            "1,000 than other real digits do, since the model was trained on them.",
            kind="note",
        ),
    ]


def _recognised(result: DemoResult) -> list[Html]:
    """Why the worst sampler is recognised best, where it is."""
    worst = max(result.samplers, key=lambda q: q.frechet)
    if worst.confident < max(q.confident for q in result.samplers):
        return []
    return [
        paragraph(
            f"{worst.sampler} with {worst.nfe} evaluations is recognised best and lies farthest from the data. Few "
            "steps fall short of the variety of the data: their digits lie too near the mean of their class, and what "
            "is typical is easily recognised. The distance counts the variety that is missing.",
            kind="note",
        )
    ]


def _noise_levels(result: DemoResult) -> list[Html]:
    bound, given, training = result.likelihood, result.likelihood_given_label, result.training
    lo, hi = bound.logsnr_range
    centres, errors = (values.tolist() for values in bound.loss_curve)
    shown = [
        (f"{sigma:g}", tile(torch.stack([noisy, clean], 1).flatten(0, 1), columns=2, scale=5, gap=3))
        for sigma, noisy, clean in result.strip
    ]
    return [
        heading("How well it denoises, noise level by noise level"),
        row(
            chart(
                figures.loss_against_logsnr({"held-out digits": (centres, errors)}, sigma_data=result.sigma_data),
                "Squared error of the predicted noise; half the area under the curve is the bound's diffusion part.",
            ),
            chart(
                figures.weighting_and_density(training.objective.weighting, training.objective.schedule),
                f"Objective {training.objective_name}: the weighting decides what is learnt, the density only "
                "where the computer looks.",
            ),
        ),
        strip(
            shown,
            "Eight held-out digits, a row each: at every noise level the noisy one and what the model makes of it.",
            what="sigma",
        ),
        paragraph(
            f"The variational bound on {len(bound.per_image)} held-out images with {result.grey_levels} grey levels: ",
            Html(f"<b>{bound.bits_per_dim:.4f} ± {bound.stderr:.4f} bits per dimension</b>"),
            f" (diffusion {bound.diffusion:.4f}, reconstruction {bound.reconstruction:.4f}, prior {bound.prior:.4f}), "
            f"on log-SNR [{lo:.2f}, {hi:.2f}], {bound.evaluations:,} evaluations and "
            f"{bound.pilot_evaluations:,} that chose their noise levels. The error is that of noise and noise "
            f"levels; other images of the same kind would move it by ± {bound.data_stderr:.3f}. Told "
            f"which digit it is, the model needs {given.bits_per_dim:.4f} ± {given.stderr:.4f}.",
        ),
    ]


def _memory(result: DemoResult) -> list[Html]:
    seen = result.recognised
    pairs = torch.stack(seen.nearest_pairs, 1).flatten(0, 1)
    rows = [
        [name, *(f"{v:.3f}" for v in quartiles)]
        for name, quartiles in (("samples", seen.samples_nearest), ("held-out digits", seen.held_out_nearest))
    ]
    return [
        heading("Does it copy its training set?"),
        paragraph(
            "Distance (RMS per pixel, on [-1, 1]) from each image to the nearest training image. Samples that were "
            "copies would lie much nearer than digits the model never saw."
        ),
        table(
            ["images", "first quartile", "median", "third quartile"], rows, "Distance to the nearest training image."
        ),
        picture(
            tile(pairs, columns=20, scale=5, gap=3),
            "Twenty samples, each followed by its nearest training image.",
        ),
    ]


def _recipe(result: DemoResult) -> list[Html]:
    training = result.training
    curve = Html()
    if training.losses:
        curve = chart(
            figures.training_curve(training.logged_steps, training.losses),
            f"Training loss, {training.steps} steps; the line is a running mean.",
        )
    return [
        heading("How it was trained"),
        row(
            curve,
            paragraph(
                f"Objective: {training.objective_name}. Data: scikit-learn's digits, {result.grey_levels} grey levels, "
                f"standard deviation {result.sigma_data:.3f} on [-1, 1]. Sampling range: sigma "
                f"{result.sampling_range[0]:.3g} to {result.sampling_range[1]:.3g}. Seed {result.seed}. ",
                "Again: ",
                Html("<code>make demo</code>"),
                "; more samples: ",
                Html("<code>logsnr sample runs/demo --nfe 10</code>"),
                "; your own images: ",
                Html("<code>logsnr train</code>"),
                ".",
            ),
        ),
    ]


def _pick(result: DemoResult, name: str, nfe: int) -> Sampled:
    return next(q for q in result.samplers if q.sampler.startswith(name) and q.nfe == nfe)
