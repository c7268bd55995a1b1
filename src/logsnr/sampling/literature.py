"""Few-step settings that others published, as they printed them (literature.json has the numbers and their sources).

    ays           levels of 10 steps; others by interpolation, linear in log sigma
    oss           flow times of 10, 20 or 40 steps; others by interpolation, linear in log t
    neuralsolver  flow times and coefficients of 5 to 10 and 15 steps: rows of velocities on levels of their own

`published["oss-flux"](10)` is the whole plan, with the solver that its authors ran it with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import accumulate
from typing import Any, Literal

from logsnr.errors import LogsnrError, unknown
from logsnr.noise import flow_time
from logsnr.noise import sigma_from_flow_time as sigma_of
from logsnr.sampling.grids import Last, count_levels, timesteps
from logsnr.sampling.multistep import dpmpp
from logsnr.sampling.plan import Grid, Plan, check_sigmas
from logsnr.sampling.solvers import ddim
from logsnr.timesteps import TimestepTable

AYSModel = Literal["sd15", "sdxl", "svd"]
OSSModel = Literal["flux", "wan", "chroma"]
NeuralSolverModel = Literal["sit", "flowdcn"]
FORMAT = 1
RAMP_BELOW = 10
"""Of fewer steps DPM-Solver's last are of lower order."""


def ays(n: int, model: AYSModel = "sd15", last: Last = "zero") -> Grid:
    """Align Your Steps (2404.14507): the published 10-step levels, interpolated log-linearly to other n.

    n + 1 levels at even distances along the list; `last="zero"` puts 0 in place of the smallest, as its users do.

    Raises:
        ValueError: if n < 1, the model is unknown, or `last` is.
    """
    levels = _spread(_listed("ays", "levels", model, "; for others use log_linear or from_sigmas"), n, last)
    return check_sigmas([*levels[:-1], 0.0] if last == "zero" else levels)


def oss(n: int, model: OSSModel = "flux", last: Last = "zero") -> Grid:
    """Optimal stepsizes (2503.21774): the published flow times, interpolated log-linearly in t to other n.

    n + 1 levels sigma = t/(1 - t); `last="zero"` puts 0 in place of the smallest, as its users do. Wan's begins at pure
    noise, sigma inf.

    Raises:
        ValueError: if n < 1, the model is unknown, or `last` is.
    """
    times = _spread(_listed("oss", "times", model, "; for others use flow or flow_range"), n, last)
    levels = [sigma_of(t) for t in times]
    return check_sigmas([*levels[:-1], 0.0] if last == "zero" else levels)


def neuralsolver(
    nfe: int, low: float = 0.0, high: float = math.inf, *, sigma_data: float = 1.0, of: NeuralSolverModel = "sit"
) -> Plan:
    """NeuralSolver (2505.21114): searched times of a flow, and rows of its velocities.

        z(t_{i+1}) = z(t_i) + (t_{i+1} - t_i) (c_i0 v_0 + ... + c_ii v_i),    sum_j c_ij = 1

    The printed steps are divided by their sum, which rounding keeps within 2e-4 of 1. A model whose largest level is
    below infinity has the same times from there on, drawn together evenly.

    Args:
        nfe: number of evaluations, 5 to 10; of FlowDCN's also 15.
        low: smallest level that the model may be asked at.
        high: largest.
        sigma_data: not used: the times are as they are.
        of: the network that it was searched on, "sit" or "flowdcn".

    Raises:
        LogsnrError: if there is none of so many evaluations, or the last of them lies below `low`.
    """
    found = _table()["neuralsolver"]["of"]
    if of not in found:
        raise unknown("neuralsolver", of, found)
    sizes = [int(n) for n in found[of]]
    if isinstance(nfe, bool) or nfe not in sizes:
        raise unknown("nfe", nfe, sizes, f", of which NeuralSolver has settings ({of})")
    steps, rows = found[of][str(nfe)]["steps"], [[], *found[of][str(nfe)]["coefficients"]]
    done = [0.0, *(part / math.fsum(steps) for part in accumulate(steps[:-1])), 1.0]
    first = flow_time(high)
    sigmas = (high, *(sigma_of(first * (1 - part)) for part in done[1:]))
    if sigmas[-2] < low:
        raise LogsnrError(f"NeuralSolver's last level is sigma {sigmas[-2]:.3g}, the model's least {low:.3g}")
    complete = tuple((1 - math.fsum(row), *reversed(row)) for row in rows)
    return Plan(sigmas, complete, "velocity", meta={"solver": "neuralsolver", "of": of})


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published setting: `setting(n)` is its plan of n evaluations.

    Attributes:
        source: where it was published.
        make: n -> plan.
        steps: the numbers of evaluations that were printed; of others, where there are any, levels are interpolated.
    """

    source: str
    make: Callable[[int], Plan]
    steps: tuple[int, ...]

    def __call__(self, nfe: int) -> Plan:
        plan = self.make(nfe)
        return replace(plan, meta={**plan.meta, "source": self.source})


class Literature(Mapping[str, Published]):
    """Published settings by name."""

    def __getitem__(self, name: str) -> Published:
        if name not in _settings():
            raise unknown("published setting", name, _settings())
        return _settings()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_settings())

    def __len__(self) -> int:
        return len(_settings())

    def __repr__(self) -> str:
        return f"published settings: {', '.join(self)}"


published = Literature()
"""Settings that others published: `published["neuralsolver-sit"](8)` is a plan.

AYS runs its levels with DPM-Solver++(2M), OSS with Euler's steps of the flow; "dpm-solver++-sd" is that solver's own
setting for Stable Diffusion's table, (2M) on even times (2211.01095, sec. 7). EDM's is no plan, since Heun asks twice
at a level: `heun(denoiser, grids.karras(18, 80, .002))`.
"""


def _dpm_solver_sd(n: int) -> Plan:
    levels = timesteps(n, TimestepTable.stable_diffusion(), "linspace", last="min")
    return dpmpp(levels, 2, final="ramp" if n < RAMP_BELOW else "full")


def _euler(n: int, model: OSSModel) -> Plan:
    return ddim(oss(n, model))


def _aligned(n: int, model: AYSModel) -> Plan:
    return dpmpp(ays(n, model), 2)


@cache
def _settings() -> dict[str, Published]:
    table = _table()
    makers: tuple[tuple[str, str, Callable[..., Plan]], ...] = (("ays", "levels", _aligned), ("oss", "times", _euler))
    found = {
        f"{paper}-{model}": Published(
            source=table[paper]["source"], make=partial(make, model=model), steps=(len(numbers) - 1,)
        )
        for paper, key, make in makers
        for model, numbers in table[paper][key].items()
    }
    found |= {
        f"neuralsolver-{of}": Published(
            source=table["neuralsolver"]["source"], make=partial(neuralsolver, of=of), steps=tuple(map(int, numbers))
        )
        for of, numbers in table["neuralsolver"]["of"].items()
    }
    source = "DPM-Solver++ (Lu et al., 2211.01095), sec. 7: order 2, multistep, even times, on Stable Diffusion's table"
    return found | {"dpm-solver++-sd": Published(source=source, make=_dpm_solver_sd, steps=(10, 15, 20, 25))}


def _listed(paper: str, key: str, model: str, more: str) -> list[float]:
    known = _table()[paper][key]
    if model not in known:
        raise unknown("model", model, known, more)
    numbers: list[float] = known[model]
    return numbers


def _spread(listed: Sequence[float], n: int, last: Last) -> list[float]:
    """n + 1 numbers at even distances along a falling list, linear in their logarithms between two of them."""
    count_levels(n, last)
    out = []
    for i in range(n + 1):
        whole, part = divmod(i * (len(listed) - 1), n)
        number = listed[whole]
        out.append(number if part == 0 else number * (listed[whole + 1] / number) ** (part / n))
    return out


@cache
def _table() -> dict[str, Any]:
    """literature.json."""
    data: dict[str, Any] = json.loads((files(__package__) / "literature.json").read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise LogsnrError(f"literature.json has format {data.get('format')}: this version reads {FORMAT}; reinstall")
    return data
