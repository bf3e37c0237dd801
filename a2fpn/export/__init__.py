"""Export of detectors to files that run without this package: ONNX and torch.export programs."""

from a2fpn.export.file import FORMATS, export_model
from a2fpn.export.quantize import quantize
from a2fpn.export.verify import Comparison, verify

__all__ = ["FORMATS", "Comparison", "export_model", "quantize", "verify"]
