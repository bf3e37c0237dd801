"""Backbones as folders that timm itself loads."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import a2fpn
from a2fpn.backbones import TimmBackbone, export_backbone
from a2fpn.config import BackboneConfig, PreprocessConfig
from tests.helpers import tiny_model


def trained(name: str, **options: Any) -> TimmBackbone:
    """A backbone whose batch norms have seen something."""
    backbone = TimmBackbone(BackboneConfig(name, **options)).eval()
    for key, x in backbone.state_dict().items():
        if key.endswith("running_var"):
            x.uniform_(1e-4, 1e-2)
        elif key.endswith("running_mean"):
            x.normal_(0, 0.1)
    return backbone


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"norm": "frozen", "norm_eps": 0.0}),
        ("test_resnet", {"norm": "frozen", "in_chans": 5}),
        ("test_efficientnet", {"norm_eps": 1e-3}),
        ("test_convnext", {}),
        ("test_vit", {}),
        ("test_mambaout", {}),
        ("test_nfnet", {}),
    ],
)
def test_timm_gives_the_same_maps(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    backbone = trained(name, **options)
    folder = export_backbone(backbone, tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    body = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    x = torch.randn(2, options.get("in_chans", 3), 160, 160)
    with torch.no_grad():
        ours = list(backbone.body(x))
        theirs = list(body(x))[-len(ours) :]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
    other = timm.create_model(f"local-dir:{folder}", pretrained=False, features_only=True).eval()
    with torch.no_grad():
        assert not torch.allclose(other(x)[-1], theirs[-1])


def test_another_epsilon_matters(tmp_path: Path) -> None:
    """Without the part of the variance that makes up for it, timm's maps would be others."""
    backbone = trained("test_resnet", norm="frozen", norm_eps=0.0)
    folder = export_backbone(backbone, tmp_path)
    stored = load_file(folder / "model.safetensors")
    own = backbone.body.state_dict()["bn1.running_var"]
    torch.testing.assert_close(stored["bn1.running_var"], own - 1e-5)


def test_layers_without_use_are_left_out_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="a2fpn.backbones.export"):
        lean = export_backbone(TimmBackbone(BackboneConfig("test_efficientnet")), tmp_path / "lean")
    assert caplog.records == []
    assert not any(key.startswith("conv_head") for key in load_file(lean / "model.safetensors"))
    with pytest.raises(RuntimeError, match="conv_head"):
        timm.create_model(f"local-dir:{lean}", pretrained=True)
    with caplog.at_level(logging.WARNING, logger="a2fpn.backbones.export"):
        full = export_backbone(TimmBackbone(BackboneConfig("test_convnext")), tmp_path / "full")
    (record,) = caplog.records
    assert record.getMessage().startswith("The detector does not use head.norm.weight, head.norm.bias of test_convnext")
    assert timm.create_model(f"local-dir:{full}", pretrained=True).num_classes == 0


def test_pixels_are_those_of_the_detector(tmp_path: Path) -> None:
    preprocess = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic")
    folder = export_backbone(TimmBackbone(BackboneConfig("test_resnet")), tmp_path, preprocess=preprocess)
    config = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).pretrained_cfg
    assert (tuple(config["mean"]), tuple(config["std"])) == (preprocess.mean, preprocess.std)
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize("options", [{"norm": "gn"}, {"stride_in_1x1": True}])
def test_what_timm_cannot_build_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    backbone = TimmBackbone(BackboneConfig("resnet18" if "norm" in options else "resnet50", **options))
    with pytest.raises(ValueError, match=r"no option for (norm='gn'|stride_in_1x1=True), so it cannot load"):
        export_backbone(backbone, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_backbone_of_a_detector_survives_training_and_export(tmp_path: Path) -> None:
    model = tiny_model("fasterrcnn_fpn", norm="frozen")
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
    body = timm.create_model(
        f"local-dir:{export_backbone(model.backbone, tmp_path)}", pretrained=True, features_only=True
    )
    again = a2fpn.create_model(
        "fasterrcnn_fpn", backbone="test_efficientnet", backbone_weights=tmp_path / "model.safetensors", norm="frozen"
    )
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model.backbone.eval().body(x)[-1]
        torch.testing.assert_close(body.eval()(x)[-1], expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(again.backbone.eval().body(x)[-1], expected, rtol=1e-3, atol=1e-4)
