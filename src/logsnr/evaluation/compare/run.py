"""The comparison: every entry from the same noise, evaluations counted, ends against a many-step teacher's.

    RMSE = sqrt(mean over samples and dimensions of (x - x_teacher)^2)

is discretisation error alone: it knows no data.  FD and KID compare the samples with data, in a stated feature space,
so there the model's own errors count too; the teacher's are the level that samplers are after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import on
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare.entries import Entry, ours, own, plan_entry, plans, searched, started, uncalibrated
from logsnr.evaluation.compare.result import Cell, Comparison, Row, Teacher
from logsnr.evaluation.compare.schedulers import peers
from logsnr.evaluation.features import FeatureSpace
from logsnr.evaluation.metrics import Estimated, Influenced
from logsnr.sampling import Plan
from logsnr.sampling.batches import chunks, in_turn
from logsnr.sampling.counted import Counted
from logsnr.sampling.gaussian import LABELS, GaussianStart
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
    gaussian: GaussianStart | None = None,
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
        gaussian: a Gaussian start: the default plan begins at the levels it leads to, too.
        **options: those of `measure`.

    Raises:
        LogsnrError: as `ours`, `peers`, `plans` and `measure`.
    """
    entries = [*ours(denoiser, nfe, eta=eta, noisy=options.get("features") is not None)]
    entries += [*searched(denoiser, nfe), *uncalibrated(denoiser, nfe), *own(denoiser, nfe)]
    entries += [] if gaussian is None else started(denoiser, nfe, gaussian)
    entries += [
        *(peers(denoiser, nfe) if with_peers else ()),
        *plans(denoiser, found or {}, [gaussian] if gaussian else ()),
    ]
    return measure(denoiser, entries, **options)


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    entries: Sequence[Entry],
    *,
    n: int = 512,
    seed: int | Sequence[int] = 0,
    cells: tuple[int, int] | None = None,
    cond: Mapping[str, Any] | None = None,
    teacher_steps: int = 100,
    chunk: int = 256,
    features: FeatureSpace | None = None,
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
        n: images per entry and seed, at least 2, for FD and KID 3.
        seed: of the noise, the same for all; of several seeds, every entry runs from the noise of each.
        cells: (i, k): run the i-th of k equal parts, counted from 1, of all entries at the first seed, the second, ...
        cond: conditions, used in turn.
        teacher_steps: of UniPC-3 on a log-linear grid, ended by a plain denoise.
        chunk: images per network call.
        features: feature space of FD and KID; None for neither.
        about: facts to keep with the result.
        progress: called before every run.
        keep: called with every entry and its samples; with None and the teacher's before, seed by seed.
        before: a comparison that ended early, or of other cells: what it holds is taken as it is, the rest is measured.
        so_far: called after every run, with all that is known.

    Ctrl-C ends the comparison and returns the rows so far (`about["interrupted"]`); before the first it is raised on.

    Returns:
        The rows that are known, in the order of the entries.

    Raises:
        LogsnrError: if there is nothing to compare, a number is out of range, the teacher's samples are not finite, or
            the comparison before is another one.
    """
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    _check(entries, n, 2 if features is None else 3, teacher_steps, chunk, seeds)
    runs = _part([(s, entry) for s in seeds for entry in entries], cells)
    tell, keep = progress or (lambda done, total, what: None), keep or (lambda entry, x: None)
    known = {} if before is None else before.known
    teachers = {} if before is None else {cell.seed: cell for cell in before.teacher.cells}

    def whole(**more: str) -> Comparison:
        rows = []
        for entry in entries:
            if found := tuple(known[entry.key, s] for s in seeds if (entry.key, s) in known):
                rows.append(_row(entry, found))
        return Comparison(
            rows=tuple(rows),
            teacher=Teacher(
                name=f"{NAME}, {teacher_steps} steps", cells=tuple(teachers[s] for s in seeds if s in teachers)
            ),
            samples=n,
            seeds=seeds,
            sigma_range=denoiser.sampling_range,
            features=None if features is None else features.name,
            reference=0 if features is None else features.data.n or 0,
            machine=_machine(denoiser.device),
            about={**(about or {}), **more},
        )

    if before is not None:
        whole().check_like(before)
    bench, done = None, 0
    try:
        for done, (s, entry) in enumerate(runs):
            if (entry.key, s) in known:
                continue
            if bench is None or bench.seed != s:
                tell(done, len(runs), "teacher")
                bench = _Bench(denoiser, n, s, in_turn(cond, torch.arange(n)), chunk, features)
                teachers[s] = bench.taught(teacher_steps)
                if before is not None:
                    whole().check_like(before)
                keep(None, bench.end)
            tell(done, len(runs), f"{entry.budget} evaluations: {entry.name}")
            x, cell = bench(entry)
            keep(entry, x)
            known[entry.key, s] = cell
            if so_far is not None:
                so_far(whole(interrupted=f"after {done + 1} of {len(runs)} runs"))
        tell(len(runs), len(runs), "done")
    except KeyboardInterrupt:
        if not known:
            raise
        return whole(interrupted=f"after {done} of {len(runs)} runs")
    return whole()


def _row(entry: Entry, cells: tuple[Cell, ...]) -> Row:
    return Row(
        name=entry.name,
        solver=entry.solver,
        grid=entry.grid,
        family=entry.family,
        origin=entry.origin,
        budget=entry.budget,
        plan_hash=None if entry.plan is None else entry.plan.hash,
        cells=cells,
    )


def _part(runs: list[tuple[int, Entry]], cells: tuple[int, int] | None) -> list[tuple[int, Entry]]:
    """The i-th of k parts of a list, which differ by at most one in length.

    Raises:
        LogsnrError: if there is no such part.
    """
    if cells is None:
        return runs
    i, k = cells
    if not 1 <= i <= k:
        raise LogsnrError(f"cells {i}/{k}: the parts of {k} are 1 to {k}")
    if not (part := runs[(i - 1) * len(runs) // k : i * len(runs) // k]):
        raise LogsnrError(f"cells {i}/{k} holds none of the {len(runs)} runs: give fewer parts")
    return part


class _Bench:
    """The noise of one seed, what the teacher makes of it, and runs of entries from it."""

    def __init__(
        self,
        denoiser: Denoiser,
        n: int,
        seed: int,
        cond: Mapping[str, Any],
        chunk: int,
        features: FeatureSpace | None,
    ) -> None:
        self.denoiser, self.seed, self.chunk, self.features = denoiser, seed, chunk, features
        self.noise = start(denoiser, None, n, torch.Generator().manual_seed(seed))
        self.cond = on(cond, self.noise.device)
        labels = cond.get(LABELS)
        self.strata = labels.cpu() if isinstance(labels, Tensor) and labels.shape == (n,) else None
        self.end = torch.empty(0)
        self.taught_distance: Influenced | None = None

    def taught(self, steps: int) -> Cell:
        """Run the teacher; what it says of itself."""
        low, high = self.denoiser.sampling_range
        plans = {n: teacher_plan(n, low, high) for n in (steps // 2, steps)}
        coarse, _, _ = self.run(plan_entry(self.denoiser, plans[steps // 2], NAME, "", "UniPC", "logsnr", steps // 2))
        self.end, spent, seconds = self.run(plan_entry(self.denoiser, plans[steps], NAME, "", "UniPC", "logsnr", steps))
        finite_ends(self.end, plans[steps])
        self.taught_distance, distances = self.distances(self.end)
        return Cell(
            seed=self.seed, evaluations=spent, rmse=_error(coarse, self.end), seconds_per_image=seconds, **distances
        )

    def __call__(self, entry: Entry) -> tuple[Tensor, Cell]:
        """An entry's samples, and what is said of them."""
        x, spent, seconds = self.run(entry)
        finite = bool(x.isfinite().all())
        distances: dict[str, Any] = self.distances(x)[1] if finite else {}
        return x, Cell(
            seed=self.seed,
            evaluations=spent,
            rmse=_error(x, self.end) if finite and not entry.noisy else None,
            seconds_per_image=seconds,
            finite=finite,
            **distances,
        )

    def distances(self, x: Tensor) -> tuple[Influenced | None, dict[str, Any]]:
        """FD with its influence, and the numbers of a cell that it takes part in."""
        if self.features is None:
            return None, {}
        found = self.features.measure(x, strata=self.strata, chunk=self.chunk)
        mine, teachers = found.influenced, self.taught_distance
        return mine, {
            "frechet": mine.estimated,
            "excess": None if teachers is None else mine.beyond(teachers),
            "kernel": None if self.features.data.rows is None else found.kernel(),
        }

    def run(self, entry: Entry) -> tuple[Tensor, int, float]:
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


def _error(x: Tensor, end: Tensor) -> Estimated:
    """RMSE and its standard error: that of the mean square over samples, by the delta method."""
    squares = (x.double() - end.double()).square().flatten(1).mean(1)
    value = float(squares.mean().sqrt())
    spread = float(squares.std()) / len(squares) ** 0.5
    return Estimated(value=value, stderr=spread / (2 * value) if value > 0 else 0.0)


def _check(entries: Sequence[Entry], n: int, fewest: int, teacher_steps: int, chunk: int, seeds: Sequence[int]) -> None:
    if not entries:
        raise LogsnrError("nothing to compare: no sampler fits the evaluations given; allow more, or widen the filters")
    most = max(entry.budget for entry in entries)
    for name, value, least in (
        ("n", n, fewest),
        ("number of seeds", len(seeds), 1),
        ("teacher_steps", teacher_steps, max(16, 2 * most)),
        ("chunk", chunk, 1),
    ):
        if value < least:
            why = f", twice the {most} evaluations compared" if name == "teacher_steps" and least > 16 else ""
            raise LogsnrError(f"{name} = {value}: must be at least {least}{why}")
    if len(set(seeds)) < len(seeds):
        raise LogsnrError(f"seeds {', '.join(map(str, seeds))}: one is there twice")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
