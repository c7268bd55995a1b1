"""Evaluation: feature spaces, distances between sets of samples, samplers compared."""

from logsnr.evaluation.features import Classifier, train_classifier
from logsnr.evaluation.metrics import frechet_distance, kernel_distance, nearest_distances
from logsnr.evaluation.quality import FeatureSpace, Judge, Quality, compare_samplers

__all__ = [
    "Classifier",
    "FeatureSpace",
    "Judge",
    "Quality",
    "compare_samplers",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "train_classifier",
]
