"""The adaptive noise schedule: a density of noise levels that training itself draws.

histogram.py   Adaptive, the schedule: p ~ w q on bins, q the error, its rms or the gradient's norm
gradient.py    where q comes from when it is a gradient: last-layer norms, and now and then the true ones
variance.py    what a schedule leaves: the loss's variance between and within levels, the gradient's second moment
"""

from logsnr.adaptive.gradient import OutputLayer, gradient_norms
from logsnr.adaptive.histogram import IMPORTANCES, Adaptive, Importance
from logsnr.adaptive.variance import Spread, SpreadMeter

__all__ = ["IMPORTANCES", "Adaptive", "Importance", "OutputLayer", "Spread", "SpreadMeter", "gradient_norms"]
