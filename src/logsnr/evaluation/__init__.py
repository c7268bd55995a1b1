"""Evaluation: feature spaces, distances between sets of samples, samplers compared."""

from logsnr.evaluation.features import Classifier, EfficientNet, FeatureSpace, train_classifier
from logsnr.evaluation.metrics import frechet_distance, kernel_distance, nearest_distances

__all__ = [
    "Classifier",
    "EfficientNet",
    "FeatureSpace",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "train_classifier",
]
