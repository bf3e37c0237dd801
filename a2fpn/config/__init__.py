"""Model configuration as plain data: frozen, typed, JSON-serializable dataclasses, validated key by key.

A :class:`ModelConfig` is stored with every checkpoint in ``config.json`` and is sufficient to rebuild the
model. Unknown keys, wrong types and unsupported format versions are errors, never warnings.
"""

from a2fpn.config.bounds import MAX_PIXELS, SCORE_THRESHOLD
from a2fpn.config.heads import HeadsConfig
from a2fpn.config.model import FORMAT_VERSION, HEADS, ModelConfig, heads_type
from a2fpn.config.one_stage import FCOSConfig, OneStageConfig, RetinaNetConfig
from a2fpn.config.parts import STAGES, BackboneConfig, Category, NeckConfig, PreprocessConfig
from a2fpn.config.two_stage import CascadeConfig, HTCConfig, KeypointRCNNConfig, RCNNConfig

__all__ = [
    "FORMAT_VERSION",
    "HEADS",
    "MAX_PIXELS",
    "SCORE_THRESHOLD",
    "STAGES",
    "BackboneConfig",
    "CascadeConfig",
    "Category",
    "FCOSConfig",
    "HTCConfig",
    "HeadsConfig",
    "KeypointRCNNConfig",
    "ModelConfig",
    "NeckConfig",
    "OneStageConfig",
    "PreprocessConfig",
    "RCNNConfig",
    "RetinaNetConfig",
    "heads_type",
]
