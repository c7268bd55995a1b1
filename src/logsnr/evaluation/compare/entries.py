"""Entries: what takes part in a comparison, each with the network evaluations it will spend.

    ours             every solver of this library on every grid over the sampling range, and on those ended at its min
    uncalibrated     plans that need no calibration: the default, and the universal ones
    searched         plans that others published
    plans            calibrated or hand-made plans
    started          the default plan from lower levels, where a Gaussian start leads
    peers            diffusers' schedulers (schedulers.py)

A budget is a number of network evaluations per image.  A method gets the largest n whose *counted* evaluations fit:
Heun's n steps cost 2n - 1, a guided denoiser's double, whatever `denoiser.cost` says at the levels visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError, unknown
from logsnr.evaluation.compare.result import Key
from logsnr.sampling import Plan, evaluations, sample
from logsnr.sampling.default import default_plan, first_level
from logsnr.sampling.gaussian import GaussianStart
from logsnr.sampling.loop import updates
from logsnr.sampling.names import (
    GRIDS,
    NEEDED,
    SOLVERS,
    Makes,
    compared_grids,
    compared_solvers,
    find_grid,
    find_solver,
    plain,
)
from logsnr.sampling.plan import Grid, plans_from
from logsnr.sampling.start import check_start
from logsnr.sampling.table import table_of
from logsnr.sampling.universal import universal_plan, universal_sizes
from logsnr.theory import EtaCurve

Runner = Callable[[Denoiser, Tensor, Mapping[str, Any], torch.Generator], Tensor]
"""(denoiser, starting states z, conditions, source of noise) -> samples."""


OWN = "the model's plan"
"""What a plan is called that came with the model."""
STARTED = "Gaussian start"
"""What is told of a plan that begins where one leads."""
FIRST = (40.0, 20.0, 10.0, 5.0)
"""Levels that a start leads to, in units of sigma_data."""
STEPS: tuple[Makes, ...] = ("rows", "samples")
"""What a solver on any grid makes."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sampler at one number of evaluations.

    Attributes:
        solver: its name, e.g. "DPM++(2M)".
        grid: name of its levels, e.g. "karras".
        family: what it is a kind of, whoever wrote it: DDIM and Euler are one family.
        origin: "logsnr", "diffusers" or "plan".
        budget: evaluations it was allowed.
        evaluations: evaluations that it will spend, per image.
        run: the sampler itself.
        plan: its numbers, where it has any.
        noisy: whether it draws noise on the way: then it has no trajectory to be compared.
    """

    solver: str
    grid: str
    family: str
    origin: str
    budget: int
    evaluations: int
    run: Runner
    plan: Plan | None = None
    noisy: bool = False

    @property
    def name(self) -> str:
        """Solver and grid, and whose they are unless ours."""
        told = f"{self.solver}, {self.grid}" if self.grid else self.solver
        return f"diffusers {told}" if self.origin == "diffusers" else told

    @property
    def key(self) -> Key:
        """What tells it from other entries, and its row from other rows."""
        return self.name, self.budget, None if self.plan is None else self.plan.hash


def ours(
    denoiser: Denoiser,
    nfe: Iterable[int],
    *,
    solvers: Sequence[str] = (),
    grids: Sequence[str] = (),
    eta: EtaCurve | None = None,
    noisy: bool = False,
) -> list[Entry]:
    """Every solver on every grid at every budget; plans that coincide take part once.

    Args:
        denoiser: the model; `cost` is what is counted.
        nfe: budgets.
        solvers: what names to keep start with (letters and digits count, + is p); none for all.
        grids: the same of grids.
        eta: relative error of the denoiser as a projection against noise level, e.g. `Passport.eta_curve`; with one
            the grid "admissible" takes part. None or an empty curve: it does not.
        noisy: let solvers that draw noise take part: DDPM, and Heun with EDM's churn.

    Raises:
        LogsnrError: if "admissible" is asked for by name and there is no curve.
    """
    known = compared_grids(*("range", "table", "nothing"), *(() if _empty(eta) else ("eta",)))
    for word in grids:
        if not kept(known, [word]) and kept(compared_grids(), [word]):
            raise LogsnrError(f"grid {word!r} needs {NEEDED['eta']}")

    @cache
    def levels(grid: str, n: int) -> Grid | None:
        return _levels(denoiser, grid, n, eta)

    out: list[Entry] = []
    for budget in nfe:
        seen: set[Hashable] = set()
        names = compared_solvers(*STEPS, noisy=noisy)
        for solver in (one for one in names if kept([one, find_solver(one, *STEPS)[0]], solvers)):
            for grid in kept(known, grids):
                entry = largest(budget, partial(_ours, denoiser, solver, grid, levels, budget))
                if entry is None:
                    continue
                same = None if entry.plan is None else (entry.plan.sigmas, *updates(entry.plan))
                if same is None or same not in seen:
                    out.append(entry)
                    seen.add(same)
    return out


def _empty(eta: EtaCurve | None) -> bool:
    return eta is None or (isinstance(eta, Sequence) and not eta)


def _ours(
    denoiser: Denoiser, solver: str, grid: str, levels_of: Callable[[str, int], Grid | None], budget: int, n: int
) -> Entry | None:
    levels = levels_of(grid, n)
    if levels is None:
        return None
    name, make = find_solver(solver, *STEPS)
    about = SOLVERS[name]
    noisy, churn = solver in about.noisy, make.keywords.get("churn")
    if churn is not None:  # what it raises stays within what the model knows
        make = partial(make, churn=replace(churn, s_max=min(churn.s_max, denoiser.trained_range[1] / math.sqrt(2))))
    if about.makes == "rows":
        return plan_entry(denoiser, make(levels), solver, grid, about.family, "logsnr", budget)
    spent = sum(map(denoiser.cost, levels[:-1])) + sum(denoiser.cost(sigma) for sigma in levels[1:] if sigma > 0)
    return Entry(
        solver=solver, grid=grid, family=about.family, origin="logsnr", budget=budget, evaluations=spent, noisy=noisy,
        run=lambda model, noise, cond, generator: make(
            model, levels, noise=noise, cond=cond, generator=generator if noisy else None
        ),
    )  # fmt: skip


def plan_entry(
    denoiser: Denoiser,
    plan: Plan,
    solver: str,
    grid: str,
    family: str,
    origin: str,
    budget: int,
    gaussian: GaussianStart | None = None,
) -> Entry:
    """A plan as an entry, from a Gaussian start where one is given."""
    return Entry(
        solver=solver, grid=grid, family=family, origin=origin, budget=budget, plan=plan, noisy=plan.noisy,
        evaluations=evaluations(denoiser, plan),
        run=lambda model, noise, cond, generator: sample(
            model, plan, noise=noise, cond=cond, generator=generator, start=gaussian, check=False
        ),
    )  # fmt: skip


def _levels(denoiser: Denoiser, grid: str, n: int, eta: EtaCurve | None = None) -> Grid | None:
    """n evaluations on a grid by name; None where it has not so many levels."""
    low, high = denoiser.sampling_range
    table = table_of(denoiser)
    name, make = find_grid(grid)
    if GRIDS[name].needs == "table" and n > len(table):
        return None
    return make(n, high, low, table=table, eta=eta)


def uncalibrated(denoiser: Denoiser, nfe: Iterable[int]) -> list[Entry]:
    """The plans that serve most models without calibration: the default one, and the universal one where there is
    any of so many evaluations."""
    low, high = denoiser.sampling_range
    about: dict[str, Any] = {"sigma_data": denoiser.sigma_data, "finite_at_inf": denoiser.finite_at_inf}

    def default(budget: int, n: int) -> Entry:
        plan = default_plan(n, low, high, **about)
        return plan_entry(denoiser, plan, "default", "its own levels", "GE", "logsnr", budget)

    def universal(budget: int, n: int) -> Entry | None:
        if n not in universal_sizes():
            return None
        first = first_level(n, low, high, **about)
        plan = universal_plan(n, low, first, sigma_data=denoiser.sigma_data, dim=denoiser.dim)
        return plan_entry(denoiser, plan, "universal", "its own levels", "universal", "logsnr", budget)

    found: dict[Hashable, Entry] = {}
    for make in (default, universal):
        for budget in sorted(nfe):
            entry = largest(budget, partial(make, budget))
            if entry is not None and entry.plan is not None:
                found.setdefault(entry.plan.hash, entry)  # beyond the largest plan a budget has none
    return list(found.values())


def searched(denoiser: Denoiser, nfe: Iterable[int], solvers: Sequence[str] = ()) -> list[Entry]:
    """Plans that others searched on networks of theirs and printed, at the budgets they are for (`ls.published`)."""
    low, high = denoiser.sampling_range

    def entry(name: str, budget: int, n: int) -> Entry | None:
        key, make = find_solver(name, "plan")
        try:
            plan = make(n, low, high, sigma_data=denoiser.sigma_data)
        except LogsnrError:  # none of so many evaluations, or none for this range
            return None
        return plan_entry(denoiser, plan, name, "its own levels", SOLVERS[key].family, "logsnr", budget)

    names = [one for one in compared_solvers("plan") if kept([one, find_solver(one, "plan")[0]], solvers)]
    found = [largest(budget, partial(entry, name, budget)) for name in names for budget in sorted(nfe)]
    return list({one.plan.hash: one for one in reversed(found) if one is not None and one.plan is not None}.values())


def started(denoiser: Denoiser, nfe: Iterable[int], gaussian: GaussianStart) -> list[Entry]:
    """The default plan from each of a few levels below the largest, to which a Gaussian start leads.

    Raises:
        LogsnrError: if the start is none of this model, or the model's range holds none of the levels.
    """
    gaussian.check(denoiser)
    low, high = denoiser.sampling_range
    levels = [first for times in FIRST if 4 * low < (first := times * denoiser.sigma_data) < 0.9 * high]
    if not levels:
        raise LogsnrError(
            f"a Gaussian start leads to {min(FIRST):g} ... {max(FIRST):g} sigma_data, which this model's range, sigma "
            f"{high:.4g} ... {low:.4g}, does not hold: leave the start out"
        )

    def entry(budget: int, first: float, n: int) -> Entry:
        plan = default_plan(n, low, first, sigma_data=denoiser.sigma_data)
        how = (f"default, {STARTED}", f"from sigma {first:.3g}", STARTED, "logsnr")
        return plan_entry(denoiser, plan, *how, budget, gaussian)

    found = [largest(budget, partial(entry, budget, first)) for budget in nfe for first in levels]
    return [one for one in found if one is not None]


def own(denoiser: Denoiser, nfe: Iterable[int]) -> list[Entry]:
    """The plans that came with the model, the largest that fits each budget."""

    def entry(budget: int, n: int) -> Entry | None:
        plan = denoiser.plans.get(n)
        if plan is None or not denoiser.covers(min(plan.sigmas[:-1]), plan.sigmas[0]):  # the range may be narrower
            return None
        gaussian = denoiser.start if _how(plan) else None
        if _how(plan) and gaussian is None:
            return None
        return plan_entry(denoiser, plan, OWN, _how(plan), "plan", "plan", budget, gaussian)

    found = [largest(budget, partial(entry, budget)) for budget in nfe]
    return list({one.plan.hash: one for one in found if one is not None and one.plan is not None}.values())


def _how(plan: Plan) -> str:
    """What is told of a plan beside its name."""
    return STARTED if plan.meta.get("start") and "tail" not in plan.meta else ""


def plans(denoiser: Denoiser, found: Mapping[str, Plan], starts: Iterable[GaussianStart] = ()) -> list[Entry]:
    """Named plans as entries, each at the evaluations it counts on this denoiser.

    Args:
        denoiser: the model.
        found: plans, by name.
        starts: Gaussian starts, beside the model's own, for the plans that were calibrated with one.

    Raises:
        LogsnrError: if one visits levels that the denoiser was not trained on, or needs a start that is not there.
    """
    low, high = denoiser.trained_range
    known = {one.fingerprint: one for one in (*starts, denoiser.start) if one is not None}
    out = []
    for name, plan in found.items():
        visited = plan.sigmas[:-1]
        if max(visited) == math.inf:
            check_start(denoiser, math.inf)
        if not denoiser.covers(min(visited), max(visited)):
            raise LogsnrError(
                f"plan {name} visits sigma {max(visited):.6g} ... {min(visited):.6g}, this model was trained on "
                f"{high:.6g} ... {low:.6g}: give a plan made for it (logsnr calibrate)"
            )
        gaussian = known.get(plan.meta["start"]["fingerprint"]) if _how(plan) else None
        if _how(plan) and gaussian is None:
            raise LogsnrError(
                f"plan {name} begins where a Gaussian start leads, which is not there: give the one that it was "
                "calibrated with (--start FILE)"
            )
        spent = evaluations(denoiser, plan)
        out.append(plan_entry(denoiser, plan, name, _how(plan), "plan", "plan", spent, gaussian))
    return out


def read_plans(paths: Iterable[Path]) -> dict[str, Plan]:
    """Plans from files of one or of several, by the file's name; two of one name are told apart by their folders.

    Raises:
        LogsnrError: if one cannot be read.
    """
    found: dict[str, Plan] = {}
    for path in paths:
        try:
            several = plans_from(path)
        except (OSError, ValueError) as error:
            raise LogsnrError(f"plan {path} cannot be read ({error}): give a file of logsnr calibrate") from error
        for nfe, plan in several.items():
            which = "" if len(several) == 1 else f", {nfe}"
            name = path.stem + which
            names = (name, f"{path.parent.name}/{name}", f"{path}{which}")  # a report tells no place but at need
            found[next((free for free in names if free not in found), name)] = plan
    return found


def kept(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The names that start with one of the words wanted; all of them without any."""
    words = tuple(map(plain, wanted))
    return [name for name in names if not words or plain(name).startswith(words)]


def check_words(what: str, words: Sequence[str], names: Iterable[str], also: Iterable[str] = ()) -> None:
    """Refuse a word that no name starts with, nor another name of theirs (`also`).

    Raises:
        LogsnrError: naming the nearest name.
    """
    known = list(names)
    for word in words:
        if not plain(word) or not kept([*known, *also], [word]):
            raise unknown(what, word, known)


def largest(budget: int, make: Callable[[int], Entry | None]) -> Entry | None:
    """The entry of most steps whose evaluations fit a budget; None if not even one step does."""
    for n in range(budget, 0, -1):
        entry = make(n)
        if entry is not None and entry.evaluations <= budget:
            return entry
    return None
