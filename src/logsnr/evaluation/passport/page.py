"""The passport's page: findings first, then pictures, then every curve with how to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from logsnr.evaluation.passport import Finding, Passport
from logsnr.evaluation.passport.findings import (
    END_TARGET,
    LABEL_TOLERANCE,
    LINEAR_TOLERANCE,
    SIGNIFICANT,
    label_trouble,
)
from logsnr.images import tile
from logsnr.report import figures
from logsnr.report.page import Html, cards, chart, heading, markup, paragraph, row, strip, table, write_page

STEEP = 10.0
"""Largest value of a curve about 1 that a linear axis shows."""
WORDS = {"error": "trouble", "warning": "warning", "info": "note"}


def write_passport(passport: Passport, path: Path) -> Path:
    """Write the page, whole."""
    return write_page(path, f"Passport of {passport.model}", passport_page(passport))


def passport_page(passport: Passport) -> list[Html]:
    """The parts of the page."""
    return [
        *_opening(passport),
        *_findings(passport.findings),
        *_ranges(passport),
        *_pictures(passport),
        *_loss(passport),
        *_labels(passport),
        *_projection(passport),
        *_sampling(passport),
        *_ends(passport),
        *_numbers(passport),
    ]


def _opening(p: Passport) -> list[Html]:
    source = {
        "data": f"Measured on {p.samples} clean samples; {p.references} others stand for the data.",
        "model": f"No data were given. The model drew {p.samples + p.references} samples itself, and everything below "
        "is about those: whether they resemble anything, and whether the noise labels are right, cannot be told.",
        "noise": "No data were given and the model's own samples are not finite: noise stands in for them, and only "
        "what needs no data is judged.",
    }[p.source]
    size = f"{p.parameters / 1e6:.2f} M" if p.parameters else "none"
    return [
        paragraph(
            f"{p.network}; samples of {' × '.join(map(str, p.shape))}. {source} {p.cost:,} network evaluations of "
            f"single samples, seed {p.seed}.",
            kind="lead",
        ),
        cards(
            [
                (str(len(p.troubles)), "findings of trouble"),
                (_usable(p), "usable range of sigma"),
                (_choice(p), "evaluations to choose"),
                (size, "parameters"),
            ]
        ),
    ]


def _usable(p: Passport) -> str:
    found = p.finding("usable")
    return "none" if found is None or found.sigmas is None else _span(found.sigmas)


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3g} – {ends[1]:.3g}"


def _choice(p: Passport) -> str:
    found = p.finding("nfe")
    if found is None or math.isnan(found.value):
        return "none"
    return f"{found.value:.0f}" if math.isfinite(found.value) else f"> {max(e.nfe for e in p.end_points)}"


def _findings(findings: Sequence[Finding]) -> list[Html]:
    items = "".join(f'<li><b class="{f.severity}">{WORDS[f.severity]}</b> {markup(f.text)}</li>' for f in findings)
    return [heading("Findings"), Html(f'<ul class="findings">{items}</ul>')]


def _ranges(p: Passport) -> list[Html]:
    probe = "no level found" if p.probe is None else _span((p.probe.low, p.probe.high))
    spent = 0 if p.probe is None else p.probe.evaluations
    rows = [
        ["trained on, as the model says", _span(p.trained_range)],
        ["that sampling needs", _span(p.declared_range)],
        ["usable: no worse than a linear denoiser", _usable(p)],
    ]
    if spent or "probe" in p.evaluations:
        rows.append([f"of use by the probe: its own samples alone, {spent} evaluations", probe])
    return [table(["range", "sigma"], rows, "Ranges of noise levels.")]


def _pictures(p: Passport) -> list[Html]:
    if p.pictures is None:
        return []
    shown, width = p.pictures, p.pictures.denoised.shape[-1]
    scale = max(1, 48 // width)
    # A row per sample; a column per level, of pairs (noisy, denoised), or per step.
    images, paths = shown.denoised, shown.trajectory
    levels = images.view(len(shown.sigmas), 2, shown.columns, *images.shape[1:]).transpose(1, 2).flatten(1, 2)
    steps = paths.view(-1, len(shown.steps), *paths.shape[1:]).transpose(0, 1)
    return [
        heading("What it does to samples"),
        strip(
            [
                (f"{sigma:.3g}", tile(pairs, columns=2, scale=scale, gap=2))
                for sigma, pairs in zip(shown.sigmas, levels, strict=True)
            ],
            f"{'Held-out' if p.source == 'data' else 'Drawn'} samples, a row each: at every noise level the noisy one "
            "and what the model makes of it.",
            what="sigma",
        ),
        strip(
            [
                (name, tile(column, columns=1, scale=scale, gap=2))
                for name, column in zip((*(f"{s:.3g}" for s in shown.steps[:-1]), "end"), steps, strict=True)
            ],
            f"Sampling, {len(shown.steps) - 1} evaluations of gradient estimation: the estimate of x at every level, "
            "and the end.",
            what="sigma",
        ),
    ]


def _loss(p: Passport) -> list[Html]:
    sigmas = [level.sigma for level in p.levels]
    shade = [(0.0, p.trained_range[0]), (p.trained_range[1], math.inf)]
    usable = p.finding("usable")
    ratios = {"the model": p.levels, "its labels put right": p.corrected} if p.corrected else {"the model": p.levels}
    judged = "its labels put right" if p.corrected else "the model"
    steep = _steep([level.loss for level in p.levels])
    apart = _steep([level.ratio for level in p.levels])
    return [
        heading("Noise level by noise level"),
        row(
            chart(
                figures.against_logsnr(
                    {
                        "the model": (sigmas, [level.loss for level in p.levels]),
                        "linear denoiser": (sigmas, [level.linear for level in p.levels]),
                    },
                    ylabel="error of eps per dimension",
                    shade=shade,
                    log=steep,
                    bottom=None if steep else 0,
                ),
                "Squared error of the predicted noise. Grey: outside the range that the model says it was trained on.",
            ),
            chart(
                figures.against_logsnr(
                    {name: (sigmas, [level.ratio for level in levels]) for name, levels in ratios.items()},
                    ylabel="squared error / linear",
                    shade=shade,
                    marked=None if usable is None else usable.sigmas,
                    bars={judged: [SIGNIFICANT * level.ratio_stderr for level in p.judged]},
                    level=(f"undertrained above {LINEAR_TOLERANCE:g}", LINEAR_TOLERANCE),
                    log=apart,
                    bottom=None if apart else 0,
                ),
                "Against the linear denoiser fitted to other samples: a trained model is below 1. Bars are three "
                "standard errors: a level counts as undertrained where its whole bar lies above the line. Green: "
                "the usable range, the longest run without such a level.",
            ),
        ),
        row(
            chart(
                figures.against_logsnr(
                    {
                        "the model": (sigmas, [level.eps_norm for level in p.levels]),
                        "an ideal one of that error": (sigmas, [level.eps_norm_ideal for level in p.levels]),
                    },
                    ylabel="mean square of eps per dimension",
                    shade=shade,
                    log=steep,
                    bottom=None if steep else 0,
                ),
                "Calibration of the predicted noise: an ideal denoiser's error is orthogonal to its answer, so the "
                "two curves meet.",
            ),
            chart(
                figures.against_logsnr(
                    {"||E x0 - E x||": (sigmas, [level.bias for level in p.levels])},
                    ylabel="bias over sigma_data",
                    shade=shade,
                    bottom=0,
                    top=0.1,
                ),
                "Bias: how far the mean of x0 is from the mean of the samples. At high noise x0 should be that mean.",
            ),
        ),
    ]


def _steep(values: Sequence[float]) -> bool:
    """Whether values that should be about 1 need a logarithmic axis."""
    return max((v for v in values if math.isfinite(v)), default=0.0) > STEEP


def _labels(p: Passport) -> list[Html]:
    scan = p.labels
    if scan is None:
        return []
    said = (
        f"Labels count as wrong above {math.exp(LABEL_TOLERANCE) - 1:.1%} and three standard errors, where all levels "
        f"but one agree: these {'are' if label_trouble(scan) else 'are not'}."
        if math.isfinite(scan.factor)
        else "Fewer than three levels could be judged, which is too few for a statement."
    )
    told = "its network's label is changed alone" if scan.way == "label" else "it is asked there as a whole"
    return [
        heading("Noise labels"),
        row(
            chart(
                figures.against_factor(scan.factors, scan.curve, 1 / scan.factor),
                f"Squared error when the model is told k sigma ({told}), over {len(scan.sigmas)} levels.",
            ),
            paragraph(
                "A model whose labels are right errs least at k = 1. Over all levels this one behaves as if "
                "sigma were ",
                Html(f"<b>{scan.factor:.3f} sigma</b>"),
                f" (standard error {scan.stderr:.3f}). {said}",
            ),
        ),
    ]


def _projection(p: Passport) -> list[Html]:
    if not p.projection:
        return []
    sigmas = [e.sigma for e in p.projection]
    first = Html()
    if p.source == "data":
        first = chart(
            figures.against_logsnr(
                {
                    "eta, median": (sigmas, [e.eta for e in p.projection]),
                    "eta, 90 %": (sigmas, [e.eta_high for e in p.projection]),
                    "nu, median": (sigmas, [e.nu for e in p.projection]),
                },
                ylabel="eta and nu",
                bottom=0,
            ),
            f"As a projection on the {p.samples + p.references} samples: eta = error of x0 over the distance, nu = how "
            "far sqrt(n) sigma is from that distance (2306.04848). The samples that were noised are part of the set.",
        )
    second = chart(
        figures.against_logsnr(
            {
                "median": (sigmas, [e.change for e in p.projection]),
                "90 %": (sigmas, [e.change_high for e in p.projection]),
            },
            ylabel="change of x0 over the distance",
            bottom=0,
        ),
        "Idempotence: how far x0 moves when it is denoised again half way. 0 for a projection; a lower bound of eta.",
    )
    return [heading("The denoiser as a projection"), row(*([first] if first else []), second)]


def _sampling(p: Passport) -> list[Html]:
    charts = []
    if p.bends:
        charts.append(
            chart(
                figures.against_logsnr(
                    {"exact trajectories": ([b.sigma for b in p.bends], [b.curvature for b in p.bends])},
                    ylabel="d eps / d ln sigma, RMS",
                    bottom=0,
                ),
                "Curvature: how fast the direction changes. Steps belong where it is large.",
            )
        )
    if p.gammas:
        charts.append(
            chart(
                figures.against_logsnr(
                    {"gamma*": ([g.sigma for g in p.gammas], [g.gamma for g in p.gammas])},
                    ylabel="gamma*",
                    log=all(g.gamma > 0 for g in p.gammas),
                    level=("the paper's 2", 2.0),
                ),
                f"The weight of the present direction against the one before, with the least error towards the end "
                f"point, at each of {len(p.gammas) + 1} DDIM steps.",
            )
        )
    return [heading("Trajectories"), row(*charts)] if charts else []


def _ends(p: Passport) -> list[Html]:
    if not p.end_points:
        return []
    names = list(dict.fromkeys(e.solver for e in p.end_points))
    series = {
        n: ([float(e.nfe) for e in p.end_points if e.solver == n], [e.rmse for e in p.end_points if e.solver == n])
        for n in names
    }
    nfes = sorted({e.nfe for e in p.end_points})
    found = {(e.solver, e.nfe): e.rmse for e in p.end_points}
    return [
        heading("What a few evaluations buy"),
        chart(
            figures.against_nfe(series, ylabel="end-point RMSE / sigma_data", floor=("enough", END_TARGET)),
            f"{p.trajectories} trajectories against a many-step teacher from the same noise (itself known to "
            f"{p.teacher_error:.4f}), on geometric levels over the declared range.",
        ),
        table(
            ["sampler", *(f"{k} evaluations" for k in nfes)],
            [[n, *(f"{found[n, k]:.4f}" for k in nfes)] for n in names],
            "End-point RMSE over sigma_data.",
        ),
    ]


def _numbers(p: Passport) -> list[Html]:
    parts = [heading("Numbers")]
    rows = [["evaluations: " + part, f"{count:,}"] for part, count in p.evaluations.items()]
    rows += [
        ["declared sampling range", f"{p.declared_range[0]:.4g} – {p.declared_range[1]:.4g}"],
        ["trained range", f"{p.trained_range[0]:.4g} – {p.trained_range[1]:.4g}"],
        ["standard deviation of the data", f"{p.sigma_data:.4g}"],
    ]
    if p.start is not None:
        rows += [
            ["pure noise at the largest sigma: KL to the true states", f"{p.start.kl:.2g} nats"],
            ["… mean left, in units of the noise", f"{p.start.mean_leak:.3f}"],
            ["… largest variance left, of the noise's", f"{p.start.variance_leak:.2%}"],
        ]
    parts.append(table([], rows, "What was spent and measured."))
    if p.half:
        worst = {d: [h for h in p.half if h.dtype == d] for d in dict.fromkeys(h.dtype for h in p.half)}
        body = [
            [
                d,
                f"{max((h.excess for h in hs if math.isfinite(h.excess)), default=math.nan):.2%}",
                sum(h.non_finite for h in hs),
            ]
            for d, hs in worst.items()
        ]
        parts.append(
            table(["precision", "largest added squared error", "answers lost"], body, "Half precision against float32.")
        )
    return parts
