"""Schedules: densities of noise levels.

base.py        what each can do: draw (stratified), truncate, invert, lay out a grid
published.py   those of the papers, and `SCHEDULES`, by the names that recipes say
adaptive.py    the one that learns from the training it serves
variance.py    what a schedule leaves of the variance, between noise levels and within
"""

from logsnr.schedules.adaptive import Adaptive
from logsnr.schedules.base import Schedule
from logsnr.schedules.published import (
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
