"""Schedules: densities of noise levels.

base.py        what each can do: draw (stratified), truncate, invert, lay out a grid
published.py   those of the papers, and of its rivals later.py
adaptive.py    the one that learns from the training it serves
variance.py    what a schedule leaves of the variance, between noise levels and within
"""

from logsnr.schedules.adaptive import Adaptive
from logsnr.schedules.base import Schedule
from logsnr.schedules.later import FlowBeta, FlowMode, Laplace
from logsnr.schedules.published import (
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
    "FlowBeta",
    "FlowMode",
    "FlowUniform",
    "InterpolatedCosine",
    "Laplace",
    "Linear",
    "LogitNormal",
    "Schedule",
    "VPLinear",
]

SCHEDULES: dict[str, type[Schedule]] = {
    "cosine": Cosine,
    "linear": Linear,
    "edm-training": EDMTraining,
    "edm-sampling": EDMSampling,
    "flow": FlowUniform,
    "logit-normal": LogitNormal,
    "cosmap": CosMap,
    "vp-linear": VPLinear,
    "interpolated-cosine": InterpolatedCosine,
    "laplace": Laplace,
    "flow-mode": FlowMode,
    "flow-beta": FlowBeta,
}
"""Schedules by name: what recipes and the command line say."""
