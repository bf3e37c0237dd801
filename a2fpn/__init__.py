"""a2fpn: any timm backbone x any neck x real two-stage detection heads.

>>> import a2fpn
>>> model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=3)
>>> model.neck.out_spec.names
('p2', 'p3', 'p4', 'p5', 'p6')
"""

from typing import TYPE_CHECKING, Any

from a2fpn._version import __version__
from a2fpn.backbones import list_backbones
from a2fpn.build import create_backbone
from a2fpn.compose import list_necks, register_model
from a2fpn.config import Category, ModelConfig
from a2fpn.detectors import Detector, register_detector
from a2fpn.errors import A2FPNError, CheckpointError, HubError
from a2fpn.finite import NonFiniteError, check_finite
from a2fpn.necks import Neck, create_neck, register_neck
from a2fpn.pretrained.catalog import list_pretrained
from a2fpn.pretrained.hub import push_to_hub
from a2fpn.pretrained.load import create_model, from_pretrained, list_models, save_pretrained
from a2fpn.pyramid import LevelSpec, PyramidSpec

if TYPE_CHECKING:
    from a2fpn.export import export_model
    from a2fpn.inference import Predictor, Result
    from a2fpn.inference.optimize import optimize_for_inference

__all__ = [
    "A2FPNError",
    "Category",
    "CheckpointError",
    "Detector",
    "HubError",
    "LevelSpec",
    "ModelConfig",
    "Neck",
    "NonFiniteError",
    "Predictor",
    "PyramidSpec",
    "Result",
    "__version__",
    "check_finite",
    "create_backbone",
    "create_model",
    "create_neck",
    "export_model",
    "from_pretrained",
    "list_backbones",
    "list_models",
    "list_necks",
    "list_pretrained",
    "optimize_for_inference",
    "push_to_hub",
    "register_detector",
    "register_model",
    "register_neck",
    "save_pretrained",
]


if not TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> Any:
        # Inference brings pycocotools and drawing; building a model must not pay for them.
        if name in ("Predictor", "Result"):
            from a2fpn import inference

            return getattr(inference, name)
        if name == "export_model":
            from a2fpn.export import export_model

            return export_model
        if name == "optimize_for_inference":
            from a2fpn.inference.optimize import optimize_for_inference

            return optimize_for_inference
        raise AttributeError(f"module 'a2fpn' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
