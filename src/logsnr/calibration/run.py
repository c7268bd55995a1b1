"""Calibration: the best few evaluations of one model, found in minutes, kept as a plan.

    minimise  mean ||x_plan(noise) - x_teacher(noise)||^2     over the sigmas and the rows of n steps

    trial        noises, measurements, budget, the best plan so far                                     (trial.py)
    teacher      fine trajectories from the same noise; those to fit to are remembered level by level   (teacher.py)
    starts       levels to try: evenly spread ones, and those of least summed local error on the cache  (levels.py);
                 each step's coefficients by ridge least squares along the student's own rollout        (rows.py)
    walk         levels one at a time along the teacher's grid, rows fitted anew                        (walk.py)
    descent      all numbers at once against the end-point error, damped Gauss-Newton                   (descent.py)
    contrast     the last step with the teacher's variance                                              (contrast.py)
    report       its errors, and what lies beyond any plan                                              (report.py)

The best built-in solver is one more place to descend from.  What the search may be replaced by, published ways to
choose levels alone, is in baselines.py.
No gradient passes through the network; anything that answers as a Denoiser, guided ones too, can be calibrated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any, Literal

import torch

from logsnr.calibration.baselines import alternatives, ays, ends, gits
from logsnr.calibration.contrast import contrasted
from logsnr.calibration.descent import descended
from logsnr.calibration.effort import EFFORTS
from logsnr.calibration.ledger import SpentError
from logsnr.calibration.report import json_number, reported
from logsnr.calibration.rollout import Metric
from logsnr.calibration.settings import Settings, digest
from logsnr.calibration.starts import starts
from logsnr.calibration.teacher import Cache
from logsnr.calibration.trial import Memo, Progress, Trial
from logsnr.calibration.walk import walked
from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.paths import expanded
from logsnr.sampling.batches import in_turn
from logsnr.sampling.gaussian import GaussianStart
from logsnr.sampling.plan import Basis, Plan
from logsnr.sampling.probing import probe
from logsnr.writing import check_output, only_writer

MOST_NUMBERS = 2**25
"""Of a chunk's finite differences (256 MB in float64), or of a teacher's history."""
STRENGTHS = (1.0, 30.0)
"""Of the descent's prior, in units of one sample: the usual one, and one for when fitting noises are too few."""


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    nfe: int,
    *,
    history: int | Literal["auto"] = "auto",
    basis: Basis | Literal["auto"] = "auto",
    sigma_range: tuple[float, float] | Literal["probe"] | None = None,
    n: int = 96,
    generator: torch.Generator | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    teacher: int = 64,
    rollouts: int | None = None,
    effort: str = "full",
    chunk: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    keep: str | os.PathLike[str] | None = None,
    method: str = "search",
    start: GaussianStart | None = None,
    first: float | None = None,
    contrast: bool = True,
    about: Mapping[str, Any] | None = None,
    memo: Memo | None = None,
) -> Plan:
    """The plan of `nfe` evaluations whose end points lie nearest the teacher's, from the same noise.

    Ctrl-C ends the search and returns the best plan so far (`meta["interrupted"]`); before anything is measured, while
    the teacher runs, it is raised on.  With `resume` a later call goes on where it stopped, to the same plan.

    Args:
        denoiser: the model, guided or not.
        nfe: number of steps, 1 to 20; a guided denoiser asks its network more often.
        history: how many past estimates a row may use, 0 to 3, or "auto".
        basis: what rows combine, or "auto".
        sigma_range: (smallest, largest) level of the teacher and bounds of the plan's; "probe" finds them
            (`logsnr.probe`, with this seed); None is the denoiser's `sampling_range`.
        n: number of noises to fit to, at least 4; half as many to select by and to report on, or all of them up
            to 64.
        generator: source of the seed; or
        seed: the seed itself.
        cond: conditions by keyword; rows of tensors are used in turn.
        metric: features `[B, F]` of samples `[B, *shape]`, in which errors count; None for the samples themselves.
        teacher: evaluations of the teacher, at least 16 and 2 nfe.
        rollouts: the budget of search and report beside the teacher, 40 to 200 rollouts of `n` samples;
            each costs `nfe` answers of the denoiser.  None for 1400 / nfe, so that longer plans cost about the same;
            40 for a quick search.
        effort: "full", or "quick" for rows by least squares on a few sets of levels and a short walk, about a fifth
            of the evaluations (calibration/effort.py).
        chunk: samples per call of the denoiser; None for what keeps finite differences near 256 MB.
        progress: called as the search goes on.
        resume: a file for measurements: read if it exists, written after each.
        keep: without that, a file that they are written to where the search is interrupted.
        method: "search" for the library's own; or a baseline on the same noises: "gits" (iPNDM-4 on levels of least
            local error), "ays" (DPM-Solver++(2M) on levels of least KL bound) or "ends" (built-in solvers, the ends of
            their grids tuned).  These have rows of their own: `history` and `basis` do not matter to them.
        start: plans may begin below the range's largest level, where this brings the noise in closed form; the teacher
            begins at the largest from the same noise.  The search says whether and where that pays, by the fitting and
            the selection noise; a plan that needs the start says so in `meta["start"]`.
        first: the plan's first level, if it is not to be searched for; from the noise itself where there is no start.
        contrast: let the last step bring back the teacher's variance about the mean image (calibration/contrast.py), if
            that costs less than a percent of the error.
        about: what else is to be on record of the model, as JSON values: goes to `meta["about"]`.  Say what its weights
            do not (guidance, prompts): a file of measurements under another one is refused.
        memo: a dictionary that several calls of one denoiser share: plans of other lengths then need no teacher of
            their own.

    Returns:
        The plan.  `meta` holds its provenance and, under `report`, the RMSE of it and of the built-in alternatives on
        noise that the search has not seen.  Where an alternative wins on the selection noise, it is returned.

    Raises:
        LogsnrError: if an argument leaves its range, the teacher is not finite, conditions do not fit, or the resume
            file is of another calibration.
        ValueError: if the denoiser moves the state (CFG++ has no trajectory).
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if chunk is not None and chunk < 1:
        raise LogsnrError(f"chunk = {chunk}: must be at least 1")
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    if effort not in EFFORTS:
        raise unknown("effort", effort, EFFORTS)
    if rollouts is None:
        rollouts = EFFORTS[effort].rollouts(nfe)
    if sigma_range == "probe":
        sigma_range = probe(denoiser, cond=cond, seed=seed, chunk=chunk).sigma_range
    elif isinstance(sigma_range, str):
        raise unknown("sigma_range", sigma_range, ["probe"], ", nor two levels (smallest, largest)")
    low, high = denoiser.sampling_range if sigma_range is None else sigma_range
    settings = Settings(
        nfe=nfe,
        history=history,
        basis=basis,
        sigma_range=(float(low), float(high)),
        n=n,
        seed=seed,
        cond=digest(cond),
        metric=None if metric is None else getattr(metric, "__qualname__", type(metric).__qualname__),
        teacher=teacher,
        rollouts=rollouts,
        method=method,
        first=None if first is None else float(first),
        gaussian=None if start is None else start.fingerprint,
        effort=effort,
        contrast=contrast,
        told=digest(about) if about else None,
    )
    settings.check(denoiser)
    if method != "search" and (start is not None or first is not None):
        raise LogsnrError(f"method = {method!r} begins at the largest level: leave start and first out")
    if start is not None:
        start.check(denoiser)
        start.classes(in_turn(cond, torch.arange(n)), n)
    teacher_chunk = chunk or max(1, min(n, MOST_NUMBERS // (32 * denoiser.dim)))
    chunk = chunk or max(1, min(n, MOST_NUMBERS // (denoiser.dim * (7 * nfe + 4))))
    path = None if resume is None else check_output(resume, "resume")
    with nullcontext() if path is None else only_writer(path, "this calibration"):
        trial = Trial(
            denoiser,
            settings,
            path,
            cond=cond,
            metric=metric,
            chunk=chunk,
            teacher_chunk=teacher_chunk,
            progress=progress,
            start=start,
            memo=memo,
        )
        report, interrupted = None, False
        try:
            with suppress(SpentError):
                trial.tell("teacher")
                cache = trial.remember()
                trial.tell("alternatives")
                trial.rank(alternatives(denoiser, nfe, low, high))
                METHODS[method](trial, cache)
            contrasted(trial)
            report = reported(trial)
        except KeyboardInterrupt:
            if keep is not None and trial.ledger.known:
                trial.ledger.keep(expanded(keep))
            if trial.best is None:
                raise
            interrupted = True
        return finished(trial, report, about, interrupted=interrupted)


def search(trial: Trial, cache: Cache) -> None:
    """From the best start on: walk and descend, descend without the walk, then with a strong prior; a quick search
    walks a little from the best one."""
    deep = trial.settings.tries.deep
    for plan in starts(trial, cache)[: None if deep else 1]:
        on_grid = plan.sigmas[-1] == 0 and set(plan.sigmas) <= set(cache.sigmas)
        moved = walked(trial, plan, cache) if on_grid else plan
        if not deep:
            return
        descended(trial, moved, STRENGTHS[0])
        if moved != plan:
            descended(trial, plan, STRENGTHS[0])
        descended(trial, moved, STRENGTHS[1])


METHODS: dict[str, Callable[[Trial, Cache], None]] = {"search": search, "gits": gits, "ays": ays, "ends": ends}


def finished(
    trial: Trial, report: dict[str, Any] | None, about: Mapping[str, Any] | None, *, interrupted: bool
) -> Plan:
    """The best plan, with where it comes from."""
    assert trial.best is not None
    plan, how, settings = trial.best.plan, trial.best.how, trial.settings
    stock = min(trial.leaders, key=lambda name: trial.tempered(trial.squares(trial.leaders[name], "select")))
    meta: dict[str, Any] = {
        "solver": how.get("name", "calibrated"),
        "found": how,
        "plan_hash": plan.hash,
        **trial.ledger.settings,
        "interrupted": interrupted,
        "selection": {
            "rmse": json_number(trial.rmse(plan, "select")),
            "best_alternative": stock,
            "best_alternative_rmse": json_number(trial.rmse(trial.leaders[stock], "select")),
        },
        "report": report,
        "evaluations": {
            "rollouts": trial.ledger.answers / (settings.nfe * settings.n),
            "samples_times_network": trial.ledger.passes,
            "teacher_samples_times_network": trial.teacher.passes,
        },
    }
    if about:
        meta["about"] = dict(about)
    high = settings.sigma_range[1]
    if trial.start is not None and plan.sigmas[0] < high:
        meta["start"] = {"fingerprint": settings.gaussian, "sigma_from": high}
    trial.tell("done")
    return replace(plan, meta=meta)
