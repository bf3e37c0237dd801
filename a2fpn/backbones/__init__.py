"""timm networks as backbones: NCHW feature maps by stride, with frozen parts that stay in evaluation mode.

The only part of the package that calls :func:`timm.create_model`.
"""

from a2fpn.backbones.attach import find_backbone_info, list_backbones
from a2fpn.backbones.export import export_backbone
from a2fpn.backbones.info import BackboneInfo, UnsupportedBackboneError
from a2fpn.backbones.names import ALIASES, backbone_module, resolve_backbone_name
from a2fpn.backbones.pretrained import preprocessing, pretrained_statistics, weights_license
from a2fpn.backbones.timm_backbone import TimmBackbone

__all__ = [
    "ALIASES",
    "BackboneInfo",
    "TimmBackbone",
    "UnsupportedBackboneError",
    "backbone_module",
    "export_backbone",
    "find_backbone_info",
    "list_backbones",
    "preprocessing",
    "pretrained_statistics",
    "resolve_backbone_name",
    "weights_license",
]
