"""Sampling: plans are numbers (plan.py), made by solvers on grids, run by one loop (sample.py)."""

from logsnr.sampling import grids, solvers
from logsnr.sampling.plan import Plan
from logsnr.sampling.reference import heun
from logsnr.sampling.sample import Step, sample

__all__ = ["Plan", "Step", "grids", "heun", "sample", "solvers"]
