"""Calibration: a model's best few evaluations, as a plan (run.py says how)."""

from logsnr.calibration.baselines import Method, alternatives
from logsnr.calibration.run import calibrate
from logsnr.calibration.search import Progress

__all__ = ["Method", "Progress", "alternatives", "calibrate"]
