"""The examination: which measurements are made, on what, and in which order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation.error_model import consistency, relative_error
from logsnr.evaluation.passport.card import (
    HalfPrecision,
    LabelScan,
    Level,
    Passport,
    Pictures,
    Probed,
    Projection,
    Source,
    Start,
)
from logsnr.evaluation.passport.findings import LINEAR_TOLERANCE, START_KL, find, label_trouble, usable_range
from logsnr.evaluation.passport.labels import FACTORS, LEVELS, Relabelled, network_of, scan_labels, scan_levels
from logsnr.evaluation.passport.levels import fit_linear, least_start, level_grid, measure_level, start_from_noise
from logsnr.evaluation.passport.meter import Meter, Samples
from logsnr.evaluation.passport.pictures import PICTURES, take_pictures
from logsnr.evaluation.passport.precision import half_precision
from logsnr.evaluation.passport.trajectories import (
    DRAW_STEPS,
    GAMMA_STEPS,
    NFES,
    STUDENTS,
    TEACHER,
    Trajectories,
    draw,
    follow,
)
from logsnr.projection import Points
from logsnr.sampling.batches import in_turn, take
from logsnr.sampling.probing import probe

FEWEST = 32
"""Samples below which no statement about a data set is made."""
PROJECTED = 32
"""Samples for the projection errors."""
PROJECTION_LEVELS = 11
HALF_SAMPLES, HALF_LEVELS = 8, 7
SCANNED = 2**16
"""Numbers (samples times dimensions) that the label scan sees, between 48 samples and all."""
MOST_REFERENCES = 10_000

Progress = Callable[[str, float], None]


@torch.no_grad()
def examine(
    denoiser: Denoiser,
    data: Tensor | None = None,
    *,
    cond: Mapping[str, Any] | None = None,
    name: str = "",
    images: int = 128,
    trajectories: int = 32,
    levels: int = 21,
    sigma_range: tuple[float, float] | None = None,
    chunk: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Passport:
    """Measure a denoiser and say what follows: about 20,000 evaluations of single samples.

    Half of the data at most are noised, the others are what the linear denoiser and distances are taken from; better
    give samples that the model was not trained on.  Without data the model draws its own: then nothing can be said of
    its labels or its distance to a data set, and everything else is about what it draws.

    Ctrl-C ends the examination once the losses are measured, and returns what there is so far (`interrupted`).

    Args:
        denoiser: the model.
        data: clean samples `[N, *shape]` in the model's units, at least 32; None to let the model draw them.
        cond: conditions, one entry per sample of the data; without data, rows that are used in turn.
        name: what to call the model.
        images: samples noised at every level.
        trajectories: sampling trajectories.
        levels: noise levels of the range.
        sigma_range: the range to examine; None for `denoiser.sampling_range`, further up where the data need more noise
            to be lost in and the model was trained on it.
        chunk: samples at a time.
        seed: of every draw.
        progress: called with (part, share done).

    Raises:
        LogsnrError: if the data are too few, of another shape or not finite, or a number is out of range.
    """
    _check(denoiser, data, cond, images, trajectories, levels, sigma_range, chunk)
    meter = Meter(denoiser, sigma_range or denoiser.sampling_range)
    meter.tell = _teller(meter, data is not None, images, trajectories, levels, progress)
    generator = torch.Generator().manual_seed(seed)
    clean, given, source = _clean(meter, data, cond, images, chunk, generator)
    count = min(images, len(clean) // 2)
    eps = torch.randn(clean[:count].shape, generator=generator)
    samples = Samples(clean[:count], eps, take(given, slice(count))).to(meter.device)
    others = clean[count:]
    linear = fit_linear(others)
    mean = clean.flatten(1).double().mean(0)
    if sigma_range is None and source != "noise":
        meter.begin_at(least_start(linear, len(others), START_KL))
    declared = meter.sampling_range

    def curve(model: Denoiser, part: str) -> tuple[Level, ...]:
        meter.part = part
        grid = level_grid(*declared, levels, denoiser.trained_range)
        return tuple(measure_level(meter, model, samples, s, inside, linear, mean, chunk) for s, inside in grid)

    measured = curve(meter.denoiser, "loss")
    scan: LabelScan | None = None
    judged = measured
    projection: tuple[Projection, ...] = ()
    paths = Trajectories.none(samples.x[:0])
    half: tuple[HalfPrecision, ...] = ()
    start: Start | None = None
    probed: Probed | None = None
    pictures: Pictures | None = None
    interrupted = False
    noise = torch.randn(trajectories, *denoiser.shape, generator=generator).to(meter.device)
    try:
        if source == "data":
            meter.part = "labels"
            scanned = samples.first(min(count, max(48, SCANNED // denoiser.dim)))
            chosen = scan_levels(declared, denoiser.sigma_data)
            scan = scan_labels(meter, scanned, chosen, linear, LINEAR_TOLERANCE, chunk)
        if scan is not None and label_trouble(scan):
            judged = curve(Relabelled(meter.denoiser, 1 / scan.factor, scan.way), "loss, corrected labels")
        probed = _probed(meter, in_turn(given, torch.arange(PICTURES)), declared, chunk, seed)
        projection = _projection(meter, samples, others if source == "data" else None, declared, chunk, seed)
        paths = follow(meter, noise, in_turn(given, torch.arange(trajectories)), chunk)
        meter.part = "half precision"
        sigmas = [s for s, _ in level_grid(*declared, HALF_LEVELS, (0, math.inf))]
        half = half_precision(meter, samples.first(HALF_SAMPLES), sigmas)
        if source != "noise":
            drawn = paths.ends.flatten(1).cpu() if len(paths.ends) > 1 else None
            start = start_from_noise(linear, len(others), declared[1], drawn)
        meter.part = "pictures"
        turn = in_turn(given, torch.arange(PICTURES))
        pictures = take_pictures(meter, samples.first(PICTURES), noise[:PICTURES], turn)
    except KeyboardInterrupt:
        interrupted = True
    usable = usable_range(judged, declared)
    return Passport(
        model=name or type(denoiser).__name__,
        network=_network(denoiser),
        shape=tuple(denoiser.shape),
        sigma_data=denoiser.sigma_data,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        trained_range=denoiser.trained_range,
        declared_range=declared,
        sampling_range=usable or declared,
        source=source,
        samples=count,
        references=len(others),
        trajectories=trajectories,
        seed=seed,
        findings=find(
            levels=measured,
            judged=judged,
            scan=scan,
            start=start,
            end_points=paths.end_points,
            teacher_error=paths.teacher_error,
            lost=paths.lost,
            trajectories=trajectories,
            half=half,
            declared=declared,
            trained=denoiser.trained_range,
            own=sigma_range is None,
            usable=usable,
            sigma_data=denoiser.sigma_data,
            source=source,
        ),
        levels=measured,
        labels=scan,
        start=start,
        projection=projection,
        bends=paths.bends,
        gammas=paths.gammas,
        end_points=paths.end_points,
        teacher_error=paths.teacher_error,
        half=half,
        evaluations=dict(meter.counts),
        corrected=judged if judged is not measured else (),
        probe=probed,
        pictures=pictures,
        interrupted=interrupted,
    )


def _clean(
    meter: Meter,
    data: Tensor | None,
    cond: Mapping[str, Any] | None,
    images: int,
    chunk: int,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Any], Source]:
    """Clean samples on the CPU in random order, with their conditions, and where they come from."""
    if data is not None:
        order = torch.randperm(len(data), generator=generator)[: images + MOST_REFERENCES]
        return data.detach().cpu().float()[order], take(cond, order), "data"
    meter.part = "drawing samples"
    wanted = 2 * images
    given = in_turn(cond, torch.arange(wanted))
    noise = torch.randn(wanted, *meter.shape, generator=generator).to(meter.device)
    drawn = draw(meter, noise, given, chunk).cpu().float()
    finite = drawn.flatten(1).isfinite().all(1)
    if int(finite.sum()) >= FEWEST:
        return drawn[finite], take(given, finite), "model"
    return meter.sigma_data * torch.randn(wanted, *meter.shape, generator=generator), given, "noise"


def _projection(
    meter: Meter, samples: Samples, others: Tensor | None, declared: tuple[float, float], chunk: int, seed: int
) -> tuple[Projection, ...]:
    """eta and nu against the data, and idempotence, at every other level."""
    meter.part = "projection"
    few = samples.first(PROJECTED)
    sigmas = [s for s, _ in level_grid(*declared, PROJECTION_LEVELS, (0, math.inf))]
    quantiles = (0.5, 0.9)

    def source() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    own = consistency(meter, few.x, sigmas, generator=source(), chunk=chunk, cond=few.cond, quantiles=quantiles)
    errors: dict[float, tuple[float, float, float]] = {}
    if others is not None:
        # The noised samples belong to the set: at low noise it is they that x0 should go back to.
        reference = Points(torch.cat([samples.x, others.to(samples.x)]))
        curve = relative_error(
            meter, reference, few.x, sigmas, generator=source(), chunk=chunk, cond=few.cond, quantiles=quantiles
        )
        errors = {e.sigma: (*e.eta.quantiles, e.nu.quantiles[0]) for e in curve.levels}  # type: ignore[misc]
    nothing = (math.nan, math.nan, math.nan)
    out = []
    for level in own:
        eta, eta_high, nu = errors.get(level.sigma, nothing)
        change, change_high = level.change.quantiles
        out.append(
            Projection(sigma=level.sigma, eta=eta, eta_high=eta_high, nu=nu, change=change, change_high=change_high)
        )
    return tuple(out)


def _probed(
    meter: Meter, cond: Mapping[str, Any], declared: tuple[float, float], chunk: int, seed: int
) -> Probed | None:
    """The probe's answer on the declared range; None where it finds no level of use."""
    meter.part = "probe"
    try:
        found = probe(meter, cond=cond, seed=seed, sigma_range=declared, chunk=chunk)
    except LogsnrError:
        return None
    return Probed(low=found.low, high=found.high, evaluations=found.evaluations)


def _network(denoiser: Denoiser) -> str:
    card = getattr(denoiser, "card", None) or {}
    network, prediction = card.get("network"), getattr(denoiser, "prediction", None)
    kind = network.get("kind", "network") if isinstance(network, dict) else network
    parts = [kind or type(getattr(denoiser, "network", denoiser)).__name__]
    if prediction is not None:
        parts.append(f"{prediction.name} prediction")
    return ", ".join(map(str, parts))


def _teller(
    meter: Meter, data: bool, images: int, trajectories: int, levels: int, progress: Progress | None
) -> Callable[[str, int], None] | None:
    if progress is None:
        return None
    ways = 1 if network_of(meter.denoiser) is None else 2
    planned = images * (levels + 2) + 3 * PROJECTED * PROJECTION_LEVELS
    planned += trajectories * (TEACHER * 3 // 2 + len(STUDENTS) * sum(NFES) + GAMMA_STEPS) + 700
    planned += min(images, max(48, SCANNED // meter.dim)) * LEVELS * (ways * (len(FACTORS) - 1) + 1) if data else 0
    planned += 0 if data else 2 * images * DRAW_STEPS

    def tell(part: str, spent: int) -> None:
        progress(part, min(spent / planned, 1.0))

    return tell


def _check(
    denoiser: Denoiser,
    data: Tensor | None,
    cond: Mapping[str, Any] | None,
    images: int,
    trajectories: int,
    levels: int,
    sigma_range: tuple[float, float] | None,
    chunk: int,
) -> None:
    for what, value, fewest in (
        ("images", images, FEWEST),
        ("trajectories", trajectories, 2),
        ("levels", levels, 5),
        ("chunk", chunk, 1),
    ):
        if value < fewest:
            raise LogsnrError(f"{what} = {value}: must be at least {fewest}")
    if sigma_range is not None:
        low, high = sigma_range
        least, most = denoiser.trained_range
        if not (0 < low < high < math.inf and denoiser.covers(low, high)):
            raise LogsnrError(
                f"sigma_range = ({low}, {high}): needs 0 < smallest < largest within the range "
                f"[{least:.4g}, {most:.4g}] that the model was trained on"
            )
    if data is None:
        return
    shape = tuple(denoiser.shape)
    if tuple(data.shape[1:]) != shape or data.ndim != len(shape) + 1 or len(data) < FEWEST:
        raise LogsnrError(
            f"data of shape {tuple(data.shape)}: give at least {FEWEST} samples, [N, {', '.join(map(str, shape))}]"
        )
    if not data.is_floating_point() or not bool(data.isfinite().all()):
        raise LogsnrError(f"data of dtype {data.dtype}: give finite floats in the model's units (denoiser.encode)")
    for key, value in (cond or {}).items():
        if len(value) != len(data):
            raise LogsnrError(f"cond[{key!r}] has {len(value)} entries for {len(data)} samples: give one each")
