"""Checks of a COCO data set before a model is trained on it."""

from a2fpn.data.check.checker import check_data
from a2fpn.data.check.report import AnnotatedImage, ClassCount, DataReport, Finding

__all__ = ["AnnotatedImage", "ClassCount", "DataReport", "Finding", "check_data"]
