"""The passport of a denoiser: measured curves, pictures, and findings in plain words with their numbers.

    passport = examine(denoiser, data)          # ~20,000 evaluations of single samples
    passport.troubles                           # what is wrong with it, if anything
    calibrate(denoiser, 6, sigma_range=passport.sampling_range)

What the data say needs data (labels, distances); without any the model's own draws stand in for them.  `card` holds
the values, `levels`, `labels`, `trajectories` and `precision` measure, `findings` judges.
"""

from logsnr.evaluation.passport.card import Finding, Level, Passport
from logsnr.evaluation.passport.examination import examine
from logsnr.evaluation.passport.labels import Relabelled

__all__ = ["Finding", "Level", "Passport", "Relabelled", "examine"]
