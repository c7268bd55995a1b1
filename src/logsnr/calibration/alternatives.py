"""Built-in alternatives: what a calibrated plan has to beat, from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from logsnr.sampling import grids, solvers
from logsnr.sampling.plan import Grid, Plan

SOLVERS: dict[str, Callable[[Grid], Plan]] = {
    "DDIM": solvers.ddim,
    "GE(2)": partial(solvers.ge, gamma=2.0),
    "GE(1.5)": partial(solvers.ge, gamma=1.5),
    "iPNDM-3": partial(solvers.ipndm, order=3),
    "iPNDM-4": partial(solvers.ipndm, order=4),
    "DEIS-3": partial(solvers.deis, order=3),
    "DPM++(2M)": solvers.dpmpp,
    "UniPC-2": solvers.unipc,
    "UniPC-3 ramp": partial(solvers.unipc, order=3, final="ramp"),
}

GRIDS: dict[str, Callable[[int, float, float], Grid]] = {
    "log-linear": grids.log_linear,
    "karras": grids.karras,
    "log-linear, min": partial(grids.log_linear, last="min"),
    "karras, min": partial(grids.karras, last="min"),
    "flow": grids.flow_range,
    "flow, min": partial(grids.flow_range, last="min"),
}
"""Ended by a plain denoise, or at the smallest level itself (one step of the grid more, and its noise stays)."""


def alternatives(n: int, low: float, high: float) -> dict[str, Plan]:
    """Every solver on every grid from `high` to `low`, and 0, named "solver, grid"; plans that coincide appear once."""
    found: dict[str, Plan] = {}
    for solver, plan_of in SOLVERS.items():
        for grid, levels_of in GRIDS.items():
            # a grid of one level is that of its first, whatever its spacing
            plan = plan_of(levels_of(n, high, low))
            if all(plan != other for other in found.values()):
                found[f"{solver}, {grid}"] = plan
    return found
