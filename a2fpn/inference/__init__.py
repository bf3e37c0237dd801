"""Inference: results, tiling, test-time augmentation, optimized models and visualization."""

from a2fpn.inference.found import FoundObject
from a2fpn.inference.options import PredictOptions
from a2fpn.inference.predictor import Predictor
from a2fpn.inference.result import Result
from a2fpn.inference.sources import check_source, is_pattern, list_images

__all__ = ["FoundObject", "PredictOptions", "Predictor", "Result", "check_source", "is_pattern", "list_images"]
