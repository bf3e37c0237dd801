"""Prediction: results, tiles, test-time augmentation, optimized models and pictures."""

from a2fpn.inference.predictor import PredictOptions, Predictor, check_source, is_pattern, list_images
from a2fpn.inference.result import FoundObject, Result

__all__ = ["FoundObject", "PredictOptions", "Predictor", "Result", "check_source", "is_pattern", "list_images"]
