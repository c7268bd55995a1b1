"""Metrics: distances between sets of samples, in the features or pixels they are given, each with a standard error.

    moments.py      FD, its error and its limit of infinitely many samples, from moments that stream by
    kernel.py       KID with the error of a U-statistic
    neighbours.py   precision, recall, density, coverage; the nearest of a set
    classes.py      the Inception score
    distances.py    FD and KID of features in memory, bootstrapped
    measures.py     all of them by name, of samples that stream by

An FD belongs to its features: it is "FID" in Inception-v3's pool features only, "FD (features: X)" in any other.
"""

from logsnr.evaluation.metrics.distances import (
    Reference,
    bootstrap_counts,
    frechet_distance,
    kernel_distance,
)
from logsnr.evaluation.metrics.kernel import kernel_estimate
from logsnr.evaluation.metrics.moments import Estimated, Moments, Normal
from logsnr.evaluation.metrics.neighbours import nearest_distances, neighbourhoods

__all__ = [
    "Estimated",
    "Moments",
    "Normal",
    "Reference",
    "bootstrap_counts",
    "frechet_distance",
    "kernel_distance",
    "kernel_estimate",
    "nearest_distances",
    "neighbourhoods",
]
