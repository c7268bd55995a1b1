"""Calibration: the best few evaluations of one model, found in minutes, kept as a plan.

    minimise  mean ||x_plan(noise) - x_teacher(noise)||^2     over the sigmas and the rows of n steps

Three noises, drawn from one seed by purpose and never mixed: *fit* (levels and coefficients), *select* (basis,
history, strength of the prior, when to stop, and whether to beat the built-in solvers at all), *report* (drawn after
the plan's hash is on record, used once).  The search itself is in search.py, and what it may be replaced by, published
ways to choose levels alone, in baselines.py.
No gradient passes through the network; anything that answers as a Denoiser, guided ones too, can be calibrated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from logsnr.calibration.arguments import check_arguments, digest_of
from logsnr.calibration.baselines import Method
from logsnr.calibration.ledger import Ledger, Meter, fingerprint
from logsnr.calibration.search import Progress, Search, SpentError
from logsnr.calibration.teacher import Metric
from logsnr.denoiser import Denoiser
from logsnr.sampling.plan import Basis, Plan

EFFORT = 1400
"""Evaluations of the fitting batch that a search may take, unless told."""


@torch.no_grad()
def calibrate(
    denoiser: Denoiser,
    nfe: int,
    *,
    history: int | Literal["auto"] = "auto",
    basis: Basis | Literal["auto"] = "auto",
    sigma_range: tuple[float, float] | None = None,
    batch: int = 96,
    generator: torch.Generator | None = None,
    seed: int = 0,
    cond: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    teacher: int = 64,
    rollouts: int | None = None,
    chunk: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    method: Method = "search",
) -> Plan:
    """The plan of `nfe` evaluations whose end points lie nearest the teacher's, from the same noise.

    Ctrl-C ends the search and returns the best plan so far (`meta["interrupted"]`); before anything is measured, while
    the teacher runs, it is raised on.  With `resume` a later call goes on where it stopped, to the same plan.

    Args:
        denoiser: the model, guided or not.
        nfe: number of steps, 1 to 20; a guided denoiser asks its network more often.
        history: how many past estimates a row may use, 0 to 3, or "auto".
        basis: what rows combine, or "auto".
        sigma_range: (smallest, largest) level of the teacher and bounds of the plan's; None is the denoiser's
            `sampling_range`.
        batch: number of noises to fit to, at least 4; half as many to select by and to report on, or all of them up
            to 64.
        generator: source of the seed; or
        seed: the seed itself.
        cond: conditions by keyword; rows of tensors are used in turn.
        metric: features `[B, F]` of samples `[B, *shape]`, in which errors count; None for the samples themselves.
        teacher: evaluations of the teacher, at least 16 and 2 nfe.
        rollouts: the budget of search and report beside the teacher, 40 to 200 rollouts of `batch` samples; each costs
            `nfe` answers of the denoiser.  None for 1400 / nfe, so that longer plans cost about the same.
        chunk: samples per call of the denoiser; None for what keeps finite differences near 256 MB.
        progress: called as the search goes on.
        resume: a file for measurements: read if it exists, written after each.
        method: "search" for the library's own; or a baseline on the same noises: "gits" (iPNDM-4 on levels of least
            local error), "ays" (DPM-Solver++(2M) on levels of least KL bound) or "ends" (built-in solvers, the ends of
            their grids tuned).  These have rows of their own: `history` and `basis` do not matter to them.

    Returns:
        The plan.  `meta` holds its provenance and, under `report`, the RMSE of it and of the built-in alternatives on
        noise that the search has not seen.  Where an alternative wins on the selection noise, it is returned.

    Raises:
        LogsnrError: if an argument leaves its range, the teacher is not finite, conditions do not fit, or the resume
            file is of another calibration.
        ValueError: if the denoiser moves the state (CFG++ has no trajectory).
    """
    if rollouts is None:
        rollouts = min(max(EFFORT // max(nfe, 1), 40), 200)
    low, high = check_arguments(denoiser, nfe, history, basis, sigma_range, batch, teacher, rollouts, chunk, method)
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    chunk = chunk or max(1, min(batch, 2**25 // (denoiser.dim * (7 * nfe + 4))))
    settings: dict[str, Any] = {
        "model": fingerprint(denoiser),
        "nfe": nfe,
        "history": history,
        "basis": basis,
        "sigma_range": [low, high],
        "batch": batch,
        "seed": seed,
        "cond": digest_of(cond),
        "metric": None if metric is None else getattr(metric, "__qualname__", type(metric).__qualname__),
        "teacher": {"solver": "unipc-3", "evaluations": teacher, "grid": "log-linear"},
        "rollouts": rollouts,
        "method": method,
    }
    meter = Meter(denoiser)
    ledger = Ledger(meter, settings, None if resume is None else Path(resume))
    search = Search(meter, ledger, settings, chunk, metric, cond, progress)
    try:
        search.run()
    except KeyboardInterrupt:
        if search.best is None:
            raise
        return search.finish(interrupted=True)
    except SpentError:
        pass
    try:
        search.report()
    except KeyboardInterrupt:
        return search.finish(interrupted=True)
    return search.finish(interrupted=False)
