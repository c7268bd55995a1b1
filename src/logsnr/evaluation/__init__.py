"""Evaluation: feature spaces, distances between sets of samples, samplers compared."""

from logsnr.evaluation.features import Classifier, FeatureSpace, train_classifier
from logsnr.evaluation.metrics import frechet_distance, kernel_distance, nearest_distances

__all__ = [
    "Classifier",
    "FeatureSpace",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "train_classifier",
]
