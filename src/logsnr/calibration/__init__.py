"""Calibration: a model's best few evaluations, as a plan (search.py says how)."""

from logsnr.calibration.alternatives import alternatives
from logsnr.calibration.search import Progress, calibrate

__all__ = ["Progress", "alternatives", "calibrate"]
