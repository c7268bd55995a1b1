"""Calibration: a model's best few evaluations, as a plan (run.py says how)."""

from logsnr.calibration.baselines import alternatives
from logsnr.calibration.run import calibrate
from logsnr.calibration.trial import Progress

__all__ = ["Progress", "alternatives", "calibrate"]
