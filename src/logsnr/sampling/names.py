"""Solvers and grids by name: the one list that recipes, command line, comparisons, schedulers and messages read.

    named_plan("DPM++(3M)", 8, low, high, grid="karras")        # the plan; or, in two steps,
    find_solver("dpmpp")[1](find_grid("karras")[1](8, high, low), order=3)

Of a name its letters and digits count, in upper or lower case, and + is p: "dpmpp" and "DPM++" are one.  A name may
bring options, "DPM++(3M)", and a grid stops at its smallest level as "karras, min".  A new solver or grid is one entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from logsnr.errors import LogsnrError, unknown
from logsnr.sampling import grids, literature, solvers
from logsnr.sampling.default import default_plan
from logsnr.sampling.literature import AYSModel, OSSModel
from logsnr.sampling.plan import Grid, Plan
from logsnr.sampling.reference import EDMS_CHURN, heun
from logsnr.sampling.universal import universal_plan
from logsnr.theory import EtaCurve
from logsnr.timesteps import TimestepTable

Options = Mapping[str, Any]
Makes = Literal["rows", "plan", "samples"]
Needs = Literal["range", "table", "eta", "nothing"]


@dataclass(frozen=True, kw_only=True)
class SolverEntry:
    """A solver, as names know it.

    Attributes:
        family: what it is a kind of, whoever wrote it: DDIM and Euler are one family.
        make: (grid, **options) -> Plan.
        makes: "rows" on any grid; or a "plan" with levels of its own, make(nfe, low, high, sigma_data=); or no plan but
            "samples", make(denoiser, grid, ...), by two evaluations a step.
        variants: its names in comparisons, and the options that each stands for.
        noisy: the same of variants that draw noise: they take part where distributions are compared, not trajectories.
        aliases: what else it is called.
    """

    family: str
    make: Callable[..., Any]
    makes: Makes = "rows"
    variants: Mapping[str, Options] = field(default_factory=dict)
    noisy: Mapping[str, Options] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(inspect.signature(self.make).parameters)[1:]


@dataclass(frozen=True, kw_only=True)
class GridEntry:
    """A grid, as names know it: called as `entry(n, sigma_max, sigma_min, table=, eta=, **options)`.

    Attributes:
        make: (n, what it needs, **options) -> Grid.
        needs: "range": largest and smallest level; "table": the model's timesteps; "eta": its measured relative error
            against noise level, and the range; or "nothing": its levels are published.
        compared: whether comparisons try it.
        aliases: what else it is called.
    """

    make: Callable[..., Grid]
    needs: Needs = "range"
    compared: bool = False
    aliases: tuple[str, ...] = ()

    def __call__(
        self,
        n: int,
        sigma_max: float,
        sigma_min: float,
        *,
        table: TimestepTable | None = None,
        eta: EtaCurve | None = None,
        **options: Any,
    ) -> Grid:
        given: dict[Needs, tuple[Any, ...]] = {
            "range": (sigma_max, sigma_min),
            "table": (table,),
            "eta": (eta, sigma_max, sigma_min),
            "nothing": (),
        }
        if any(value is None for value in given[self.needs]):
            raise LogsnrError(f"this grid needs {NEEDED[self.needs]}")
        return self.make(n, *given[self.needs], **options)


def _ge_paper(n: int, table: TimestepTable, start: float = 40.0, end: float | None = None) -> Grid:
    """The paper's grid from its start, or from the table's largest level."""
    return grids.ge_paper(n, table, min(start, table.sigma_range[1]), end)


SOLVERS: dict[str, SolverEntry] = {
    "ddim": SolverEntry(family="DDIM", make=solvers.ddim, variants={"DDIM": {}}, aliases=("euler",)),
    "ge": SolverEntry(
        family="GE",
        make=solvers.ge,
        variants={"GE(1.5)": {"gamma": 1.5}, "GE(2)": {"gamma": 2.0}},
        aliases=("gradient-estimation",),
    ),
    "unified": SolverEntry(family="GE", make=solvers.unified),
    "ddpm": SolverEntry(family="DDPM", make=solvers.ddpm, noisy={"DDPM": {}}),
    "adams-bashforth": SolverEntry(
        family="Adams-Bashforth",
        make=solvers.adams_bashforth,
        variants={"AB-2": {"order": 2}, "AB-3": {"order": 3}},
    ),
    "ipndm": SolverEntry(
        family="PNDM", make=solvers.ipndm, variants={"iPNDM-3": {"order": 3}, "iPNDM-4": {"order": 4}}
    ),
    "deis": SolverEntry(family="DEIS", make=solvers.deis, variants={"DEIS-2": {"order": 2}, "DEIS-3": {"order": 3}}),
    "dpmpp": SolverEntry(
        family="DPM++",
        make=solvers.dpmpp,
        variants={
            "DPM++(2M)": {"order": 2},
            "DPM++(3M)": {"order": 3},
            "DPM++(3M) ramp": {"order": 3, "final": "ramp"},
        },
        aliases=("dpm-solver++",),
    ),
    "unipc": SolverEntry(
        family="UniPC",
        make=solvers.unipc,
        variants={
            "UniPC-2": {"order": 2},
            "UniPC-3": {"order": 3},
            "UniPC-3 ramp": {"order": 3, "final": "ramp"},
        },
    ),
    "heun": SolverEntry(
        family="Heun", make=heun, makes="samples", variants={"Heun": {}}, noisy={"Heun, churned": {"churn": EDMS_CHURN}}
    ),
    "universal": SolverEntry(family="universal", make=universal_plan, makes="plan"),
    "neuralsolver": SolverEntry(
        family="NeuralSolver",
        make=literature.neuralsolver,
        makes="plan",
        variants={"NeuralSolver (SiT)": {"of": "sit"}, "NeuralSolver (FlowDCN)": {"of": "flowdcn"}},
    ),
    "default": SolverEntry(family="GE", make=default_plan, makes="plan"),
}

GRIDS: dict[str, GridEntry] = {
    "log-linear": GridEntry(make=grids.log_linear, compared=True, aliases=("exponential", "lu-lambdas")),
    "karras": GridEntry(make=grids.karras, compared=True),
    "flow": GridEntry(make=grids.flow_range, compared=True),
    "timesteps": GridEntry(make=grids.timesteps, needs="table", compared=True, aliases=("trailing",)),
    "admissible": GridEntry(make=grids.admissible, needs="eta", compared=True),
    "angles": GridEntry(make=grids.angles),
    "beta": GridEntry(make=grids.beta),
    "leading": GridEntry(make=partial(grids.timesteps, spacing="leading"), needs="table"),
    "linspace": GridEntry(make=partial(grids.timesteps, spacing="linspace"), needs="table"),
    "ge-paper": GridEntry(make=_ge_paper, needs="table"),
    **{
        f"{paper}-{model}": GridEntry(make=partial(make, model=model), needs="nothing")
        for paper, make, models in (("ays", literature.ays, AYSModel), ("oss", literature.oss, OSSModel))
        for model in get_args(models)
    },
}

NEEDED: dict[Needs, str] = {
    "table": "a table of timesteps: give table=, or name a grid over a range of levels",
    "eta": "the model's relative error eta(sigma), and there is none: give the passport of one that was examined on "
    "data (logsnr passport MODEL --data ...; compare --passport, or eta=)",
}
"""What a grid misses where it is not given."""


def named_plan(
    solver: str,
    nfe: int,
    low: float,
    high: float,
    *,
    grid: str = "log-linear",
    sigma_data: float = 1.0,
    table: TimestepTable | None = None,
    eta: EtaCurve | None = None,
    **options: Any,
) -> Plan:
    """The plan of a solver by name on a grid by name (universal plans have levels of their own).

    Args:
        solver: a name of `SOLVERS`.
        nfe: number of evaluations.
        low: smallest noise level above 0.
        high: largest.
        grid: a name of `GRIDS`.
        sigma_data: standard deviation of the data.
        table: the model's timesteps, for grids of them.
        eta: the model's relative error, for the grid "admissible".
        **options: of the solver, e.g. `gamma=2.0` or `order=3`; None for its own.

    Raises:
        LogsnrError: if a name is unknown, the solver does not take an option, or the grid's need is not given.
        ValueError: as the solver and the grid.
    """
    name, make = find_solver(solver, "rows", "plan")
    _, levels = find_grid(grid)
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in SOLVERS[name].takes:
            those = [other for other, entry in SOLVERS.items() if option in entry.takes and entry.makes == "rows"]
            raise LogsnrError(f"{option} = {value}: {name} has no {option}; it belongs to {', '.join(those)}")
    if SOLVERS[name].makes == "plan":
        plan: Plan = make(nfe, low, high, sigma_data=sigma_data)
    else:
        plan = make(levels(nfe, high, low, table=table, eta=eta), **given)
    return plan


def compared_solvers(*makes: Makes, noisy: bool = False) -> list[str]:
    """The solvers that take part wherever solvers are compared, of those that make one of `makes`; of all without.

    With `noisy` also those that draw noise, which have a distribution to compare, and no trajectory.
    """
    chosen = [entry for entry in SOLVERS.values() if not makes or entry.makes in makes]
    return [name for entry in chosen for name in (*entry.variants, *(entry.noisy if noisy else ()))]


def compared_grids(*needs: Needs) -> list[str]:
    """The grids that do, ended by a plain denoise and, as "karras, min", at the smallest level itself."""
    names = [name for name, entry in GRIDS.items() if entry.compared and (not needs or entry.needs in needs)]
    return [*names, *(f"{name}, min" for name in names if GRIDS[name].needs == "range")]


def find_solver(name: str, *makes: Makes) -> tuple[str, partial[Any]]:
    """The key in `SOLVERS` of a solver by any of its names, and its maker with the options that the name stands for.

    Of those that make one of `makes`; rows if that is not said.

    Raises:
        LogsnrError: if there is none of that name that makes what is asked for.
    """
    known = {
        key: {key: {}, **{alias: {} for alias in entry.aliases}, **entry.variants, **entry.noisy}
        for key, entry in SOLVERS.items()
        if entry.makes in (makes or ("rows",))
    }
    key, options = _find("solver", name, known)
    return key, partial(SOLVERS[key].make, **options)


def find_grid(
    name: str, needs: Collection[Needs] = ("range", "table", "eta", "nothing"), *, where: str = ""
) -> tuple[str, partial[Grid]]:
    """The key in `GRIDS` of a grid by any of its names, and its entry, stopped at the smallest level for ", min".

    Raises:
        LogsnrError: if there is none of that name with such needs; `where` says in the message why.
    """
    known: dict[str, dict[str, Options]] = {}
    for key, entry in GRIDS.items():
        if entry.needs in needs:
            known[key] = {other: {} for other in (key, *entry.aliases)}
            if "last" in inspect.signature(entry.make).parameters:
                known[key] |= {f"{other}, min": {"last": "min"} for other in (key, *entry.aliases)}
    key, options = _find("grid", name, known, where)
    return key, partial(GRIDS[key], **options)


def plain(name: str) -> str:
    """Letters and digits alone, + as p: "DPM++(2M)" is dpmpp2m."""
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


def _find(what: str, name: str, known: Mapping[str, Mapping[str, Options]], where: str = "") -> tuple[str, Options]:
    """The key of whatever answers to a name, and the options that the name stands for."""
    for key, names in known.items():
        for other, options in names.items():
            if plain(str(name)) == plain(other):
                return key, options
    raise unknown(what, name, known, where)
