"""Sampling: plans are numbers (plan.py), made by solvers on grids (by name: names.py), run by one loop (loop.py)."""

from logsnr.sampling import grids, solvers
from logsnr.sampling.default import default_plan, plan_for
from logsnr.sampling.gaussian import GaussianStart
from logsnr.sampling.inversion import ddim_invert, interpolate, invert, reconstruct
from logsnr.sampling.loop import NonFiniteError, Step, evaluations, sample
from logsnr.sampling.plan import Plan
from logsnr.sampling.probing import Probe, probe
from logsnr.sampling.recorded import Trajectory, trajectory
from logsnr.sampling.reference import Churn, Solution, heun, solve
from logsnr.sampling.streams import generators
from logsnr.sampling.universal import universal_plan

__all__ = [
    "Churn",
    "GaussianStart",
    "NonFiniteError",
    "Plan",
    "Probe",
    "Solution",
    "Step",
    "Trajectory",
    "ddim_invert",
    "default_plan",
    "evaluations",
    "generators",
    "grids",
    "heun",
    "interpolate",
    "invert",
    "plan_for",
    "probe",
    "reconstruct",
    "sample",
    "solve",
    "solvers",
    "trajectory",
    "universal_plan",
]
