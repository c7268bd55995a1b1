"""Sampling: plans are numbers (plan.py), made by solvers on grids (by name: names.py), run by one loop (loop.py)."""

from logsnr.sampling import grids, solvers
from logsnr.sampling.inversion import ddim_invert, interpolate, invert, reconstruct
from logsnr.sampling.loop import NonFiniteError, Step, evaluations, sample
from logsnr.sampling.plan import Plan
from logsnr.sampling.reference import Churn, Solution, heun, solve
from logsnr.sampling.universal import universal_plan

__all__ = [
    "Churn",
    "NonFiniteError",
    "Plan",
    "Solution",
    "Step",
    "ddim_invert",
    "evaluations",
    "grids",
    "heun",
    "interpolate",
    "invert",
    "reconstruct",
    "sample",
    "solve",
    "solvers",
    "universal_plan",
]
