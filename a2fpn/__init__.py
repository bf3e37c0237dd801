"""a2fpn: any timm backbone x any neck x real two-stage detection heads.

>>> import a2fpn
>>> model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=3)
>>> model.neck.out_spec.names
('p2', 'p3', 'p4', 'p5', 'p6')
"""

from typing import TYPE_CHECKING, Any

from a2fpn._version import __version__
from a2fpn.checkpoint import CheckpointError
from a2fpn.config import Category, ModelConfig
from a2fpn.factory import (
    create_backbone,
    create_model,
    create_neck,
    from_pretrained,
    list_models,
    list_necks,
    register_model,
    save_pretrained,
)
from a2fpn.hub import HubError, push_to_hub
from a2fpn.necks import Neck, register_neck
from a2fpn.pyramid import LevelSpec, PyramidSpec

if TYPE_CHECKING:
    from a2fpn.inference import Predictor, Result

__all__ = [
    "Category",
    "CheckpointError",
    "HubError",
    "LevelSpec",
    "ModelConfig",
    "Neck",
    "Predictor",
    "PyramidSpec",
    "Result",
    "__version__",
    "create_backbone",
    "create_model",
    "create_neck",
    "from_pretrained",
    "list_models",
    "list_necks",
    "push_to_hub",
    "register_model",
    "register_neck",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    # Inference brings pycocotools and drawing; building a model must not pay for them.
    if name in ("Predictor", "Result"):
        from a2fpn import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'a2fpn' has no attribute {name!r}")
