import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from a2fpn.necks.bifpn import BiFPNLayer, WeightedFusion
from a2fpn.necks.bifpn import halve as halve_of_the_neck
from tests.helpers import (
    build_neck,
    largest_difference,
    pyramid_spec,
    random_features,
    random_target,
    randomize,
    tiny_model,
)


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def test_a_layer_is_the_one_of_the_paper() -> None:
    """The three-level case of EfficientDet's figure 2 (d), edge by edge."""
    layer = BiFPNLayer(8, ["p2", "p3", "p4"], norm_layer="layernorm2d", act_layer="silu")
    randomize(layer)
    p3, p4, p5 = (torch.randn(1, 8, side, side) for side in (12, 6, 3))
    middle = layer.top_down[1]([p4, F.interpolate(p5, scale_factor=2)])
    out3 = layer.top_down[0]([p3, F.interpolate(middle, scale_factor=2)])
    out4 = layer.bottom_up[0]([p4, middle, halve(out3)])
    out5 = layer.bottom_up[1]([p5, halve(out4)])
    assert largest_difference(layer([p3, p4, p5]), [out3, out4, out5]) == 0


@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=3))
@settings(max_examples=25, deadline=None)
def test_fusion_is_fast_and_normalized(weights: list[float]) -> None:
    node = WeightedFusion(4, len(weights), norm_layer=None, act_layer=None)
    node.weight.data = torch.tensor(weights)
    maps = [torch.randn(1, 4, 5, 6) for _ in weights]
    positive = [max(w, 0.0) for w in weights]
    mean = sum(w * x for w, x in zip(positive, maps, strict=True)) / (sum(positive) + 1e-4)
    torch.testing.assert_close(node(maps), node.pointwise(node.depthwise(mean)), rtol=1e-4, atol=1e-5)


def test_fusion_starts_as_the_mean() -> None:
    node = WeightedFusion(4, 3, norm_layer=None, act_layer="silu")
    maps = [torch.randn(1, 4, 5, 6) for _ in range(3)]
    mean = torch.stack(maps).mean(0)
    torch.testing.assert_close(node(maps), node.pointwise(node.depthwise(F.silu(mean))), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("levels", "inputs"), [(2, [2, 2]), (5, [2, 2, 2, 2, 3, 3, 3, 2])])
def test_nodes_have_the_inputs_of_the_paper(levels: int, inputs: list[int], repeats: int) -> None:
    neck = build_neck("bifpn", pyramid_spec(levels), extra_levels=0, repeats=repeats)
    fusions = [len(m.weight) for m in neck.modules() if isinstance(m, WeightedFusion)]
    assert fusions == inputs * repeats


def test_maps_are_halved_around_even_pixels() -> None:
    """TensorFlow's SAME, which EfficientDet uses, gives 2, 4, 6, 7."""
    ramp = torch.arange(8.0).view(1, 1, 1, 8)
    assert halve_of_the_neck(ramp).flatten().tolist() == [1, 3, 5, 7]
    assert halve_of_the_neck(ramp[..., :7]).flatten().tolist() == [1, 3, 5, 6]


def test_extra_levels_take_part_in_the_fusion() -> None:
    neck = build_neck("bifpn", extra_levels=2)
    assert neck.out_spec.names == ("p2", "p3", "p4", "p5", "p6", "p7")
    pyramid = neck(random_features(pyramid_spec(), (64, 96)))
    pyramid["p2"].square().sum().backward()
    coarsest = neck.layers[0].top_down[-1]
    assert coarsest.weight.grad.abs().min() > 0


@pytest.mark.parametrize("extra_levels", [0, 1])
def test_one_pixel_and_one_image_can_be_trained_on(extra_levels: int) -> None:
    neck = build_neck("bifpn", extra_levels=extra_levels).train()
    pyramid = neck(random_features(pyramid_spec(), (4, 4), batch=1))
    assert all(x.shape[-2:] == (1, 1) and x.isfinite().all() for x in pyramid.values())
    sum(x.square().sum() for x in pyramid.values()).backward()
    # What the default norm is there for.
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        build_neck("bifpn", norm_layer="batchnorm2d").train()(random_features(pyramid_spec(), (4, 4), batch=1))


@given(data=st.data(), levels=st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_any_number_of_levels_of_any_sizes(data: st.DataObject, levels: int) -> None:
    sizes = [(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))]
    for _ in range(levels - 1):
        sizes.append(tuple(data.draw(st.integers(1, side)) for side in sizes[-1]))
    spec = pyramid_spec(levels)
    features = {c: torch.randn(1, spec[c].channels, *size) for c, size in zip(spec, sizes, strict=True)}
    pyramid = build_neck("bifpn", spec, extra_levels=0, repeats=1)(features)
    assert [tuple(x.shape) for x in pyramid.values()] == [(1, 16, *size) for size in sizes]


def test_a_detector_with_it_trains_and_detects() -> None:
    model = tiny_model("fasterrcnn_bifpn", neck_args={"repeats": 1})
    image = torch.rand(3, 64, 96)
    losses = model([image], [random_target([[4, 4, 30, 40]], (64, 96))])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.neck.parameters())
    (detections,) = model.eval()([image])
    assert detections["boxes"].isfinite().all()


def test_a_single_level_has_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match=r"needs at least 2, got 1; raise extra_levels"):
        build_neck("bifpn", pyramid_spec(1), extra_levels=0)
    pyramid = build_neck("bifpn", pyramid_spec(1), extra_levels=1)(random_features(pyramid_spec(1), (64, 96)))
    assert [tuple(x.shape[-2:]) for x in pyramid.values()] == [(16, 24), (8, 12)]


def test_repeats_must_be_positive() -> None:
    with pytest.raises(ValueError, match="Expected repeats >= 1, got 0"):
        build_neck("bifpn", repeats=0)
