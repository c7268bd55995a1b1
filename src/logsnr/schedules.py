"""The public shelf of noise schedules: the fixed ones of `schedule.py` and the one that learns, of `adaptive/`."""

from logsnr.adaptive import Adaptive
from logsnr.density import Schedule
from logsnr.schedule import (
    SCHEDULES,
    Cosine,
    CosMap,
    Discrete,
    EDMSampling,
    EDMTraining,
    FlowUniform,
    InterpolatedCosine,
    Linear,
    LogitNormal,
    VPLinear,
)

__all__ = [
    "SCHEDULES",
    "Adaptive",
    "CosMap",
    "Cosine",
    "Discrete",
    "EDMSampling",
    "EDMTraining",
    "FlowUniform",
    "InterpolatedCosine",
    "Linear",
    "LogitNormal",
    "Schedule",
    "VPLinear",
]
