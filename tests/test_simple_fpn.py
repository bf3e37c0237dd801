import pytest
import torch
from timm.layers import GELU, LayerNorm2d
from torch import nn

from a2fpn import LevelSpec, PyramidSpec
from a2fpn.backbones import TimmBackbone
from a2fpn.config import BackboneConfig
from a2fpn.layers import ConvNormAct
from a2fpn.necks.simple_fpn import SimpleFPN
from tests.helpers import build_neck, random_features

VIT = PyramidSpec.from_channels([32], strides=[16])


@pytest.mark.parametrize("size", [(5, 7), (4, 6), (1, 1)])
def test_sizes_follow_the_strides(size: tuple[int, int]) -> None:
    pyramid = build_neck("simple_fpn", VIT)({"c4": torch.randn(2, 32, *size)})
    h, w = size
    half, quarter = ((-(-h // 2), -(-w // 2)), (-(-h // 4), -(-w // 4)))
    assert {name: tuple(x.shape[-2:]) for name, x in pyramid.items()} == {
        "p2": (4 * h, 4 * w),
        "p3": (2 * h, 2 * w),
        "p4": size,
        "p5": half,
        "p6": quarter,
    }


def test_levels_are_built_as_in_the_paper() -> None:
    """Modules and channels of ViTDet's released code."""
    neck = build_neck("simple_fpn", VIT)
    built = [[type(module) for module in stage] for stage in neck.stages]
    heads = [ConvNormAct, ConvNormAct]
    assert built == [
        [nn.ConvTranspose2d, LayerNorm2d, GELU, nn.ConvTranspose2d, *heads],
        [nn.ConvTranspose2d, *heads],
        heads,
        [nn.MaxPool2d, *heads],
    ]
    assert [stage[-2].conv.in_channels for stage in neck.stages] == [8, 16, 32, 32]
    for stage in neck.stages:
        assert [conv.conv.kernel_size for conv in stage[-2:]] == [(1, 1), (3, 3)]
        assert all(isinstance(conv.norm, LayerNorm2d) and conv.conv.bias is None for conv in stage[-2:])


def test_the_coarse_level_is_the_maximum() -> None:
    neck = build_neck("simple_fpn", VIT, strides=[32], extra_levels=0)
    x = torch.randn(1, 32, 4, 6)
    blocks = x.reshape(1, 32, 2, 2, 3, 2).amax((3, 5))
    torch.testing.assert_close(neck({"c4": x})["p5"], neck.stages[0][1:](blocks))


@pytest.mark.parametrize(
    ("stride", "strides", "expected"),
    [(8, (4, 8, 16, 32), (4, 8, 16, 32, 64)), (16, (8, 16), (8, 16, 32)), (16, (2, 64), (2, 64, 128))],
)
def test_strides_are_free(stride: int, strides: tuple[int, ...], expected: tuple[int, ...]) -> None:
    spec = PyramidSpec.from_channels([32], strides=[stride])
    neck = build_neck("simple_fpn", spec, strides=strides)
    assert neck.out_spec.strides == expected
    pyramid = neck(random_features(spec, (256, 384)))
    assert [tuple(x.shape[-2:]) for x in pyramid.values()] == [(256 // s, 384 // s) for s in expected]


def test_levels_do_not_depend_on_each_other() -> None:
    neck = build_neck("simple_fpn", VIT)
    neck({"c4": torch.randn(1, 32, 4, 6)})["p3"].sum().backward()
    reached = [any(p.grad is not None for p in stage.parameters()) for stage in neck.stages]
    assert reached == [False, True, False, False]


def test_a_vision_transformer_is_enough() -> None:
    backbone = TimmBackbone(BackboneConfig("test_vit"), strides=(16,))
    neck = SimpleFPN(backbone.out_spec, out_channels=16)
    pyramid = neck(backbone(torch.rand(1, 3, 160, 160)))
    assert [tuple(x.shape) for x in pyramid.values()] == [(1, 16, side, side) for side in (40, 20, 10, 5, 3)]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (PyramidSpec.from_channels([8, 8], strides=[8, 16]), {}, r"from one map, got 2: .*c3.*c4.*such as 'fpn'"),
        (PyramidSpec({"c4": LevelSpec(8, 14)}), {}, r"power of two of their stride, got stride 14"),
        (VIT, {"strides": [4, 12]}, r"power of two of their stride, got stride 12"),
        (VIT, {"strides": [8, 4]}, r"strides of a pyramid must not decrease from level to level, got \[8, 4"),
        (VIT, {"strides": []}, r"needs at least one stride, got none"),
    ],
)
def test_bad_input(spec: PyramidSpec, options: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_neck("simple_fpn", spec, **options)
