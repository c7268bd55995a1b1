"""Metrics: distances between sets of samples, in the features or pixels they are given, each with a standard error.

    moments.py      FD, its error and its limit of infinitely many samples, from moments that stream by
    kernel.py       KID with the error of a U-statistic
    neighbours.py   precision, recall, density, coverage; the nearest of a set
    classes.py      the Inception score
    measures.py     all of them by name, of samples that stream by
    seeds.py        means over repetitions, with Student's intervals

An FD belongs to its features: it is "FID" in Inception-v3's pool features only, "FD (features: X)" in any other.
"""

from logsnr.evaluation.metrics.kernel import kernel_distance, kernel_estimate
from logsnr.evaluation.metrics.measures import Gathered, Measuring, Reference
from logsnr.evaluation.metrics.moments import Estimated, Influenced, Moments, Normal, frechet_distance
from logsnr.evaluation.metrics.neighbours import nearest_distances, neighbourhoods
from logsnr.evaluation.metrics.seeds import Summary, student, summarise

__all__ = [
    "Estimated",
    "Gathered",
    "Influenced",
    "Measuring",
    "Moments",
    "Normal",
    "Reference",
    "Summary",
    "frechet_distance",
    "kernel_distance",
    "kernel_estimate",
    "nearest_distances",
    "neighbourhoods",
    "student",
    "summarise",
]
