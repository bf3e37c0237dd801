"""Prediction: results, tiles, test-time augmentation, optimized models and pictures."""

from a2fpn.inference.options import PredictOptions
from a2fpn.inference.predictor import Predictor, list_images
from a2fpn.inference.result import Result

__all__ = ["PredictOptions", "Predictor", "Result", "list_images"]
