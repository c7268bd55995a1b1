"""Describe: what an objective weights, whether it is an ELBO and of which data, and which published one it resembles.

    report = describe(resolve(["--snr_gamma", "5", "--prediction_type", "v_prediction"]))

`resolve` understands names, recipes (sources.py), other people's flags (foreign.py: diffusers' in huggingface.py,
kohya's in kohya.py, their flow times in flow.py) and configuration files (configs.py); `describe` measures (report.py);
`plot` draws (plot.py).
"""

from logsnr.describe.foreign import FLAGS, KOHYA
from logsnr.describe.plot import plot
from logsnr.describe.report import ObjectiveReport, describe
from logsnr.describe.sources import resolve
from logsnr.describe.training import Trained

__all__ = ["FLAGS", "KOHYA", "ObjectiveReport", "Trained", "describe", "plot", "resolve"]
