"""Features: spaces in which samples are compared with data, by name, and networks that make them."""

from logsnr.evaluation.features.classifier import Classifier, train_classifier
from logsnr.evaluation.features.efficientnet import EfficientNet
from logsnr.evaluation.features.registry import (
    FEATURES,
    FeatureEntry,
    Material,
    feature_space,
    find_space,
    told_spaces,
)
from logsnr.evaluation.features.space import FeatureSpace, Space

__all__ = [
    "FEATURES",
    "Classifier",
    "EfficientNet",
    "FeatureEntry",
    "FeatureSpace",
    "Material",
    "Space",
    "feature_space",
    "find_space",
    "told_spaces",
    "train_classifier",
]
