"""The opt-in check for NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from a2fpn import NonFiniteError, check_finite, create_neck, list_necks
from a2fpn.necks import Neck
from a2fpn.pyramid import Features, PyramidSpec
from tests.helpers import tiny_model


def _neck_and_features(name: str) -> tuple[Neck, Features]:
    strides = [8] if name == "simple_fpn" else [4, 8]
    neck = create_neck(name, PyramidSpec.from_channels([16] * len(strides), strides=strides), out_channels=8)
    return neck, {f"c{s.bit_length() - 1}": torch.randn(1, 16, 64 // s, 64 // s) for s in strides}


@pytest.mark.parametrize("name", list_necks())
def test_without_the_check_nothing_is_raised_and_with_it_the_input_is_named(name: str) -> None:
    neck, features = _neck_and_features(name)
    next(iter(features.values()))[0, 0, 0, 0] = float("nan")
    neck(features)
    with pytest.raises(NonFiniteError, match=r"the model itself .* non-finite input: 1 of"), check_finite(neck):
        neck(features)


@pytest.mark.parametrize("name", list_necks())
def test_the_first_module_that_makes_one_is_named(name: str) -> None:
    neck, features = _neck_and_features(name)
    module_name, module = [(n, m) for n, m in neck.named_modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        module.weight.fill_(float("inf"))
    message = rf"^{module_name} \(Conv2d\) .* output.*finite: look at its weights"
    with pytest.raises(NonFiniteError, match=message), check_finite(neck):
        neck(features)


def test_a_sound_detector_passes_and_keeps_no_hooks() -> None:
    model = tiny_model().eval()
    image = [torch.rand(3, 64, 80)]
    with check_finite(model):
        model(image)
    with torch.no_grad():
        model.roi_heads.box_head.fc6.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"roi_heads\.box_head\.fc6 \(Linear\)"), check_finite(model):
        model(image)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_nan_in_an_image_is_the_images_fault() -> None:
    model = tiny_model().eval()
    with pytest.raises(NonFiniteError, match="look at the images"), check_finite(model):
        model([torch.full((3, 64, 64), float("nan"))])
