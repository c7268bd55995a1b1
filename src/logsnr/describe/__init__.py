"""Describe: what an objective weights, whether it is an ELBO and of which data, and which published one it resembles.

    describe(WeightedELBO(weighting, schedule)).verdict()
    describe(resolve(["--snr_gamma", "5", "--prediction_type", "v_prediction"]))

`resolve` understands names and recipes (sources.py), other people's flags (scripts.py, its table in scripts.yaml, flow
times in flow.py) and configuration files (configs.py); `describe` measures (report.py); `plot` draws (plot.py).
"""

from logsnr.describe.picture import plot
from logsnr.describe.report import ObjectiveReport, describe
from logsnr.describe.sources import resolve
from logsnr.describe.training import Trained

__all__ = ["ObjectiveReport", "Trained", "describe", "plot", "resolve"]
