"""Conversion of state dicts: third-party checkpoints to ours, and FPN detectors to A2-FPN detectors."""

from a2fpn.convert._common import load_array_pickle, read_state_dict
from a2fpn.convert.detectron2 import from_detectron2
from a2fpn.convert.graft import TARGETS, graft, graft_model
from a2fpn.convert.mmdet import from_mmdet
from a2fpn.convert.torchvision import from_torchvision, load_torchvision

__all__ = [
    "TARGETS",
    "from_detectron2",
    "from_mmdet",
    "from_torchvision",
    "graft",
    "graft_model",
    "load_array_pickle",
    "load_torchvision",
    "read_state_dict",
]
