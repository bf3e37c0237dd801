"""a2fpn: any timm backbone x any neck x real two-stage detection heads.

>>> import a2fpn
>>> model = a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=3)
>>> model.neck.out_spec.names
('p2', 'p3', 'p4', 'p5', 'p6')
"""

from typing import TYPE_CHECKING, Any

from a2fpn._version import __version__

if TYPE_CHECKING:
    from a2fpn.backbones import list_backbones
    from a2fpn.build import create_backbone
    from a2fpn.compose import list_necks, register_model
    from a2fpn.config import Category, ModelConfig
    from a2fpn.detectors import Detector, register_detector
    from a2fpn.errors import A2FPNError, CheckpointError, HubError
    from a2fpn.export import export_model
    from a2fpn.finite import NonFiniteError, check_finite
    from a2fpn.inference import Predictor, Result
    from a2fpn.inference.optimize import optimize_for_inference
    from a2fpn.necks import Neck, create_neck, register_neck
    from a2fpn.pretrained.catalog import list_pretrained
    from a2fpn.pretrained.hub import push_to_hub
    from a2fpn.pretrained.load import create_model, from_pretrained, list_models, save_pretrained
    from a2fpn.pyramid import LevelSpec, PyramidSpec

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


# Names are imported on first use (PEP 562): shell completion, `--help` and programs that only read data do not wait for
# torch, and building a model does not wait for pycocotools.
_MODULES = {
    "backbones": ["list_backbones"],
    "build": ["create_backbone"],
    "compose": ["list_necks", "register_model"],
    "config": ["Category", "ModelConfig"],
    "detectors": ["Detector", "register_detector"],
    "errors": ["A2FPNError", "CheckpointError", "HubError"],
    "export": ["export_model"],
    "finite": ["NonFiniteError", "check_finite"],
    "inference": ["Predictor", "Result"],
    "inference.optimize": ["optimize_for_inference"],
    "necks": ["Neck", "create_neck", "register_neck"],
    "pretrained.catalog": ["list_pretrained"],
    "pretrained.hub": ["push_to_hub"],
    "pretrained.load": ["create_model", "from_pretrained", "list_models", "save_pretrained"],
    "pyramid": ["LevelSpec", "PyramidSpec"],
}
_SOURCES = {name: f"a2fpn.{module}" for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # with it, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        import importlib.util

        if name in _SOURCES:
            value = getattr(importlib.import_module(_SOURCES[name]), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"a2fpn.{name}"):
            value = importlib.import_module(f"a2fpn.{name}")
        else:
            raise AttributeError(f"module 'a2fpn' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
