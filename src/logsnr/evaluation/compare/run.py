"""The comparison: every entry from the same noise, evaluations counted, ends against a many-step teacher's.

    RMSE = sqrt(mean over samples and dimensions of (x - x_teacher)^2)

is discretisation error alone: it knows no data.  FD and KID compare the samples with data, in a stated feature space,
so there the model's own errors count too; the teacher's are the level that samplers are after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare.entries import Entry, ours, own, plan_entry, plans, uncalibrated
from logsnr.evaluation.compare.result import Comparison, Row, Teacher
from logsnr.evaluation.compare.schedulers import peers
from logsnr.evaluation.features import FeatureSpace
from logsnr.evaluation.metrics import Estimated, bootstrap_counts
from logsnr.sampling import Plan
from logsnr.sampling.batches import chunks, in_turn
from logsnr.sampling.counted import Counted, rmse
from logsnr.sampling.start import start
from logsnr.sampling.teacher import NAME, finite_ends, teacher_plan
from logsnr.theory import EtaCurve

Progress = Callable[[int, int, str], None]
"""(done, of how many, what comes next)."""


def compare(
    denoiser: Denoiser,
    nfe: Sequence[int],
    *,
    found: Mapping[str, Plan] | None = None,
    with_peers: bool = True,
    eta: EtaCurve | None = None,
    **options: Any,
) -> Comparison:
    """Every solver and grid of ours, universal plans, the model's own, diffusers' schedulers and the plans given.

        compare(denoiser, [5, 8], found={"mine": plan}, cond={"class_labels": torch.arange(10)})

    Args:
        denoiser: the model; guidance is composed (`logsnr.guidance`), and its evaluations are counted.
        nfe: network evaluations per image.
        found: plans, by name.
        with_peers: whether diffusers' schedulers take part.
        eta: relative error against noise level (`Passport.eta_curve`): our solvers run on its admissible grid too.
        **options: those of `measure`.

    Raises:
        LogsnrError: as `ours`, `peers`, `plans` and `measure`.
    """
    entries = [*ours(denoiser, nfe, eta=eta, noisy=options.get("features") is not None)]
    entries += [*uncalibrated(denoiser, nfe), *own(denoiser, nfe)]
    entries += [*(peers(denoiser, nfe) if with_peers else ()), *plans(denoiser, found or {})]
    return measure(denoiser, entries, **options)


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    entries: Sequence[Entry],
    *,
    n: int = 512,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    teacher_steps: int = 100,
    chunk: int = 256,
    features: FeatureSpace | None = None,
    replicates: int = 100,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    keep: Callable[[Entry | None, Tensor], None] | None = None,
    before: Comparison | None = None,
    so_far: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Run the entries.

    Args:
        denoiser: the model.
        entries: what takes part.
        n: images per entry, at least 2.
        seed: of the noise; the same for all.
        cond: conditions, used in turn.
        teacher_steps: of UniPC-3 on a log-linear grid, ended by a plain denoise.
        chunk: images per network call.
        features: feature space of FD and KID; None for neither.
        replicates: of the bootstrap.
        about: facts to keep with the result.
        progress: called before every entry.
        keep: called with every entry and its samples; with None and the teacher's before.
        before: a comparison that ended early: its rows are taken as they are, and only the others are measured.
        so_far: called after every row that was measured, with all of them.

    Ctrl-C ends the comparison and returns the rows so far (`about["interrupted"]`); before the first it is raised on.

    Returns:
        The measured rows, in the order of the entries.

    Raises:
        LogsnrError: if there is nothing to compare, a number is out of range, the teacher's samples are not finite, or
            the comparison before is another one.
    """
    _check(entries, n, teacher_steps, chunk)
    tell = progress or (lambda done, total, what: None)
    noise = start(denoiser, None, n, torch.Generator().manual_seed(seed))
    runner = _Runner(denoiser, noise, on(in_turn(cond, torch.arange(n)), noise.device), chunk, seed)
    counts = bootstrap_counts(n, replicates, generator=torch.Generator().manual_seed(seed))

    def distances(x: Tensor) -> tuple[Estimated | None, Estimated | None]:
        return (None, None) if features is None else features.distances(x, counts, chunk=chunk)

    tell(0, len(entries), "teacher")
    end, teacher = _teacher(denoiser, runner, teacher_steps, distances)
    keep = keep or (lambda entry, x: None)
    keep(None, end)
    rows: list[Row] = []
    about = dict(about or {})

    def whole(**more: str) -> Comparison:
        return Comparison(
            rows=tuple(rows),
            teacher=teacher,
            samples=n,
            seed=seed,
            sigma_range=denoiser.sampling_range,
            features=None if features is None else features.name,
            reference=0 if features is None else len(features.reference),
            machine=_machine(noise.device),
            about={**about, **more},
        )

    def ended() -> dict[str, str]:
        return {"interrupted": f"after {len(rows)} of {len(entries)} samplers"}

    known = {} if before is None else _rows_of(before, whole())

    def row(entry: Entry) -> Row:
        x, spent, seconds = runner(entry)
        keep(entry, x)
        finite = bool(x.isfinite().all())
        frechet, kernel = distances(x) if finite else (None, None)
        exact = finite and not entry.noisy
        return Row(
            name=entry.name,
            solver=entry.solver,
            grid=entry.grid,
            family=entry.family,
            origin=entry.origin,
            budget=entry.budget,
            evaluations=spent,
            rmse=_error(x, end) if exact else None,
            frechet=frechet,
            kernel=kernel,
            seconds_per_image=seconds,
            finite=finite,
            plan_hash=None if entry.plan is None else entry.plan.hash,
        )

    try:
        for done, entry in enumerate(entries):
            tell(done, len(entries), f"{entry.budget} evaluations: {entry.name}")
            seen = known.get((entry.name, entry.budget, None if entry.plan is None else entry.plan.hash))
            rows.append(seen or row(entry))
            if so_far is not None and seen is None:
                so_far(whole(**ended()))
        tell(len(entries), len(entries), "done")
    except KeyboardInterrupt:
        if not rows:
            raise
        return whole(**ended())
    return whole()


def _rows_of(before: Comparison, now: Comparison) -> dict[tuple[str, int, str | None], Row]:
    """The rows of an earlier comparison, by what they are of.

    Raises:
        LogsnrError: if it is not of the same noise, teacher, features and facts.
    """
    about = {key: value for key, value in before.about.items() if key != "interrupted"}
    pairs = {
        "images": (before.samples, now.samples),
        "seed": (before.seed, now.seed),
        "noise levels": (tuple(before.sigma_range), tuple(now.sigma_range)),
        "features": ((before.features, before.reference), (now.features, now.reference)),
        "teacher's evaluations": (before.teacher.evaluations, now.teacher.evaluations),
        **{key: (about.get(key), now.about.get(key)) for key in sorted({*about, *now.about})},
    }
    for what, (then, this) in pairs.items():
        if then != this:
            raise LogsnrError(
                f"this comparison has {what} {this}, that to go on with {then}: give the same options, or a new folder"
            )
    if not math.isclose(before.teacher.uncertainty, now.teacher.uncertainty, rel_tol=0.01):
        raise LogsnrError("the teacher ends elsewhere than in the comparison to go on with: the model is another one")
    return {(row.name, row.budget, row.plan_hash): row for row in before.rows}


class _Runner:
    """Runs entries from one set of noises."""

    def __init__(self, denoiser: Denoiser, noise: Tensor, cond: Mapping[str, Any], chunk: int, seed: int) -> None:
        self.denoiser, self.noise, self.cond, self.chunk, self.seed = denoiser, noise, cond, chunk, seed

    def __call__(self, entry: Entry) -> tuple[Tensor, int, float]:
        """Samples, counted evaluations per image, seconds per image."""
        generator = torch.Generator().manual_seed(self.seed + 1)  # what is added on the way is not the start again
        parts = []
        began = self._now()
        counted = Counted(self.denoiser)
        for part, cond in chunks(len(self.noise), self.chunk, self.cond):
            # cloned: a scheduler may write over its start
            parts.append(entry.run(counted, self.noise[part].clone(), cond, generator))
        return torch.cat(parts), counted.passes // len(self.noise), (self._now() - began) / len(self.noise)

    def _now(self) -> float:
        if self.noise.is_cuda:
            torch.cuda.synchronize(self.noise.device)
        return time.perf_counter()


def _teacher(
    denoiser: Denoiser,
    runner: _Runner,
    steps: int,
    distances: Callable[[Tensor], tuple[Estimated | None, Estimated | None]],
) -> tuple[Tensor, Teacher]:
    low, high = denoiser.sampling_range

    def run(n: int) -> tuple[Tensor, int, float]:
        return runner(plan_entry(denoiser, teacher_plan(n, low, high), "UniPC-3", "log-linear", "UniPC", "logsnr", n))

    coarse, _, _ = run(steps // 2)
    end, spent, seconds = run(steps)
    finite_ends(end, teacher_plan(steps, low, high))
    frechet, kernel = distances(end)
    return end, Teacher(
        name=f"{NAME}, {steps} steps",
        evaluations=spent,
        uncertainty=rmse(coarse, end),
        frechet=frechet,
        kernel=kernel,
        seconds_per_image=seconds,
    )


def _error(x: Tensor, end: Tensor) -> Estimated:
    """RMSE and its standard error: that of the mean square over samples, by the delta method."""
    squares = (x.double() - end.double()).square().flatten(1).mean(1)
    value = float(squares.mean().sqrt())
    spread = float(squares.std()) / len(squares) ** 0.5
    return Estimated(value=value, stderr=spread / (2 * value) if value > 0 else 0.0)


def _check(entries: Sequence[Entry], n: int, teacher_steps: int, chunk: int) -> None:
    if not entries:
        raise LogsnrError("nothing to compare: no sampler fits the evaluations given; allow more, or widen the filters")
    most = max(entry.budget for entry in entries)
    for name, value, least in (
        ("n", n, 2),
        ("teacher_steps", teacher_steps, max(16, 2 * most)),
        ("chunk", chunk, 1),
    ):
        if value < least:
            why = f", twice the {most} evaluations compared" if name == "teacher_steps" and least > 16 else ""
            raise LogsnrError(f"{name} = {value}: must be at least {least}{why}")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
