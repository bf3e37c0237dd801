import copy
import json
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from a2fpn import PyramidSpec, create_neck, list_necks
from a2fpn.layers import ATTENTION_KINDS
from a2fpn.layers.fusion import ChannelGates
from a2fpn.necks import NECKS
from a2fpn.pyramid import Features, level_size
from tests.helpers import (
    build_neck,
    largest_difference,
    pyramid_spec,
    random_features,
    randomize,
    torch_from,
    weighted_sum,
    with_zero_gradient,
    without_gradient,
)

FUSING = [name for name in NECKS if name != "simple_fpn"]
WITH_CONTEXT = ["a2fpn", "a2fpn_lite", "pafpn_mgc"]
# simple_fpn makes a pyramid of one map, all others of two to six.
CASES = [(name, pyramid_spec(levels)) for name in FUSING for levels in (2, 4, 6)]
CASES += [("fpn", pyramid_spec(1)), ("a2fpn", pyramid_spec(3, finest=3)), ("a2fpn", pyramid_spec(5))]
CASES += [("simple_fpn", PyramidSpec.from_channels([16], strides=[stride])) for stride in (8, 16)]
cases = pytest.mark.parametrize(("name", "spec"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.names))
every_neck = pytest.mark.parametrize("name", list(NECKS))
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"reasoning": "gcn"}) for name in WITH_CONTEXT),
    *((name, {"distribute": "own"}) for name in WITH_CONTEXT),
    *((name, {"context_init": init}) for name in WITH_CONTEXT for init in ("gate", "small")),
    *((name, {"node_budget": 2}) for name in WITH_CONTEXT),  # one node attends to itself alone: no gradient
    *((name, {"kernels": "coarse"}) for name in ("a2fpn", "a2fpn_lite")),
    *((name, {"kernel_init": "uniform"}) for name in ("a2fpn", "a2fpn_lite")),
    *((name, {"pool": "attention"}) for name in ("a2fpn", "a2fpn_lite")),
    ("carafe_fpn", {"extra_source": "backbone"}),
]
every_option = pytest.mark.parametrize(
    ("name", "option"), OPTIONS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, *x.items()))
)


def spec_for(name: str) -> PyramidSpec:
    return pyramid_spec() if name in FUSING else PyramidSpec.from_channels([16], strides=[16])


def double(features: Features) -> Features:
    return {name: x.double() for name, x in features.items()}


def test_necks_come_by_name_and_pattern() -> None:
    assert {
        "fpn",
        "pafpn",
        "carafe_fpn",
        "dysample_fpn",
        "pafpn_mgc",
        "a2fpn_lite",
        "a2fpn",
        "bifpn",
        "simple_fpn",
    } <= set(list_necks())
    assert list_necks("a2fpn*") == ["a2fpn", "a2fpn_lite"]


@cases
@pytest.mark.parametrize(("extra_levels", "size"), [(0, (65, 64)), (1, (97, 133)), (2, (32, 95))])
def test_pyramid_is_as_declared(name: str, spec: PyramidSpec, extra_levels: int, size: tuple[int, int]) -> None:
    neck = build_neck(name, spec, extra_levels=extra_levels)
    features = random_features(spec, size)
    pyramid = neck(features)

    assert tuple(pyramid) == neck.out_spec.names
    assert neck.out_spec.names == tuple(f"p{stride.bit_length() - 1}" for stride in neck.out_spec.strides)
    assert neck.out_spec.channels == (16,) * len(pyramid)
    made = len(spec) if name in FUSING else 4
    assert len(pyramid) == made + extra_levels
    if name in FUSING:
        assert neck.out_spec.strides[: len(spec)] == spec.strides
    by_stride = {level.stride: features[c].shape[-2:] for c, level in spec.items()}
    last, (height, width) = list(by_stride.items())[-1]
    for p, level in neck.out_spec.items():
        expected = by_stride.get(level.stride, level_size((height * last, width * last), level.stride))
        assert tuple(pyramid[p].shape) == (2, 16, *expected), p


@pytest.mark.parametrize("name", FUSING)
@pytest.mark.parametrize("sizes", [[(17, 25), (8, 12), (4, 6), (2, 3)], [(16, 24), (9, 13), (9, 7), (1, 1)]])
def test_any_sizes_that_shrink_will_do(name: str, sizes: list[tuple[int, int]]) -> None:
    spec = pyramid_spec()
    features = {c: torch.randn(1, spec[c].channels, *size) for c, size in zip(spec, sizes, strict=True)}
    pyramid = build_neck(name, extra_levels=0)(features)
    assert [tuple(x.shape[-2:]) for x in pyramid.values()] == sizes


@every_neck
def test_inputs_stay_as_they_were(name: str) -> None:
    features = random_features(spec_for(name), (64, 96))
    copies = {level: x.clone() for level, x in features.items()}
    build_neck(name, spec_for(name))(features)
    assert list(features) == list(copies)
    assert largest_difference(features, copies) == 0


@every_neck
def test_nothing_is_remembered_from_call_to_call(name: str) -> None:
    neck = build_neck(name, spec_for(name)).eval()
    randomize(neck)
    features = random_features(spec_for(name), (64, 96))
    first = neck(features)
    neck(random_features(spec_for(name), (33, 200), batch=1))
    assert largest_difference(first, neck(features)) == 0


@every_neck
def test_gradient_to_every_parameter(name: str) -> None:
    neck = build_neck(name, spec_for(name))
    features = random_features(spec_for(name), (65, 97))
    (weighted_sum(neck(features)) + sum(neck.losses().values())).backward()
    # Not even a fresh neck, in parts of which zeros stop gradients, leaves a parameter out.
    assert without_gradient(neck) == []
    neck.zero_grad()
    randomize(neck)
    (weighted_sum(neck(features)) + sum(neck.losses().values())).backward()
    assert with_zero_gradient(neck) == []


@every_neck
def test_recomputing_in_training_changes_no_gradient(name: str) -> None:
    neck = build_neck(name, spec_for(name))
    randomize(neck)
    features = random_features(spec_for(name), (65, 97))
    gradients = []
    for training in (True, False):
        neck.train(training).zero_grad()
        torch.manual_seed(0)  # the weights of the sum
        weighted_sum(neck(features)).backward()
        gradients.append({key: p.grad.clone() for key, p in neck.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert largest_difference(*gradients) == 0


@torch_from(2, 5, "activation checkpointing does not know the meta device")
@every_neck
def test_shapes_can_be_probed_without_memory(name: str) -> None:
    with torch.device("meta"):
        neck = build_neck(name, spec_for(name))
        pyramid = neck(random_features(spec_for(name), (64, 96)))
    assert [x.shape[1] for x in pyramid.values()] == list(neck.out_spec.channels)
    assert {x.device.type for x in pyramid.values()} == {"meta"}


@every_neck
def test_gradient_to_every_input(name: str) -> None:
    features = random_features(spec_for(name), (65, 97), requires_grad=True)
    weighted_sum(build_neck(name, spec_for(name))(features)).backward()
    assert all(x.grad is not None and x.grad.abs().amin((2, 3)).any() for x in features.values())


@every_neck
@pytest.mark.parametrize("channels", [8, 24])
def test_channels_norm_and_activation_are_free(name: str, channels: int) -> None:
    spec = spec_for(name)
    neck = build_neck(name, spec, out_channels=channels, norm_layer="batchnorm2d", act_layer="relu").train()
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in neck.modules())
    # A single image is enough, also in training.
    pyramid = neck(random_features(spec, (129, 160), batch=1))
    assert {x.shape[1] for x in pyramid.values()} == {channels}
    assert all(x.isfinite().all() for x in pyramid.values())
    weighted_sum(pyramid).backward()


@every_neck
@pytest.mark.parametrize("argument", ["norm_layer", "act_layer"])
def test_an_unknown_layer_is_an_error(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}='batchnrm' is not a layer known to timm"):
        build_neck(name, spec_for(name), **{argument: "batchnrm"})


@every_neck
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda neck: pickle.loads(pickle.dumps(neck))])
def test_copies_compute_the_same(name: str, duplicate: Any) -> None:
    neck = build_neck(name, spec_for(name)).eval()
    features = random_features(spec_for(name), (64, 96))
    assert largest_difference(neck(features), duplicate(neck)(features)) == 0


@every_neck
def test_weights_fit_a_neck_of_the_same_arguments(name: str) -> None:
    neck, other = (build_neck(name, spec_for(name)).eval() for _ in range(2))
    randomize(neck)
    other.load_state_dict(neck.state_dict())
    features = random_features(spec_for(name), (64, 96))
    assert largest_difference(neck(features), other(features)) == 0


@every_neck
def test_bfloat16_autocast_stays_close(name: str) -> None:
    neck = build_neck(name, spec_for(name)).eval()
    features = random_features(spec_for(name), (65, 97))
    expected = neck(features)
    with torch.autocast("cpu", torch.bfloat16):
        got = neck(features)
    for level, x in expected.items():
        error = (got[level].float() - x).square().mean().sqrt() / x.square().mean().sqrt()
        assert error < 0.03, level


@every_neck
def test_channels_last_is_the_same(name: str) -> None:
    neck = build_neck(name, spec_for(name)).eval()
    features = random_features(spec_for(name), (65, 97))
    last = {level: x.contiguous(memory_format=torch.channels_last) for level, x in features.items()}
    assert largest_difference(neck(features), neck(last)) < 1e-4


# Padding


@every_neck
def test_images_that_fill_the_batch_need_no_sizes(name: str) -> None:
    neck = build_neck(name, spec_for(name)).eval()
    randomize(neck)
    features = random_features(spec_for(name), (64, 96))
    assert largest_difference(neck(features), neck(features, [(64, 96), (64, 96)])) == 0


@every_neck
def test_an_image_does_not_see_its_neighbors(name: str) -> None:
    neck = build_neck(name, spec_for(name)).double().eval()
    randomize(neck)
    features = double(random_features(spec_for(name), (64, 96), batch=3))
    sizes = [(64, 96), (33, 80), (64, 20)]
    together = neck(features, sizes)
    for i, size in enumerate(sizes):
        alone = neck({level: x[i : i + 1] for level, x in features.items()}, [size])
        assert largest_difference({level: x[i : i + 1] for level, x in together.items()}, alone) < 1e-10


@every_neck
def test_padding_reaches_no_further_than_convolutions_do(name: str) -> None:
    """Global context must not see padding."""
    spec = spec_for(name)
    neck = build_neck(name, spec).double().eval()
    randomize(neck)
    for module in neck.modules():
        if isinstance(module, ChannelGates):
            # Gates average border pixels too, which convolutions have mixed with padding. Here they stay at one.
            torch.nn.init.zeros_(module.gate.weight)
            torch.nn.init.zeros_(module.gate.bias)
    clean = double(random_features(spec, (64, 1024), batch=1))
    dirty = {level: x.clone() for level, x in clean.items()}
    for level, x in dirty.items():
        x[..., 768 // spec[level].stride :] += 100
    pyramids = [neck(features, [(64, 768)]) for features in (clean, dirty)]
    far, near = (
        [{p: x[..., columns(neck.out_spec[p].stride)] for p, x in pyramid.items()} for pyramid in pyramids]
        for columns in (lambda stride: slice(128 // stride), lambda stride: slice(896 // stride, None))
    )
    assert largest_difference(*far) < 1e-10
    assert largest_difference(*near) > 1


@pytest.mark.parametrize("name", WITH_CONTEXT)
def test_context_sees_everything_else(name: str) -> None:
    neck = build_neck(name).double().eval()
    randomize(neck)
    clean = double(random_features(neck.in_spec, (64, 1024), batch=1))
    changed = {level: x.clone() for level, x in clean.items()}
    changed["c5"][..., -1] += 100
    assert (neck(clean)["p2"][..., 0] - neck(changed)["p2"][..., 0]).abs().max() > 1e-6


# Members of the family


def load_torchvision_fpn(neck: torch.nn.Module, reference: FeaturePyramidNetwork) -> None:
    kinds = {"inner_blocks": neck.lateral, "layer_blocks": neck.output}
    renamed = {}
    for key, value in reference.state_dict().items():
        kind, position, _, tensor = key.split(".")
        levels = kinds[kind]
        name = "lateral" if levels is neck.lateral else "output"
        renamed[f"{name}.{levels.names[int(position)]}.conv.{tensor}"] = value
    neck.load_state_dict(renamed)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (200, 333)])
def test_fpn_is_the_function_of_torchvision(size: tuple[int, int]) -> None:
    spec = pyramid_spec()
    reference = FeaturePyramidNetwork(list(spec.channels), 16, extra_blocks=LastLevelMaxPool())
    randomize(reference)
    neck = build_neck("fpn")
    load_torchvision_fpn(neck, reference)
    features = random_features(spec, size)
    assert largest_difference(neck(features), reference(features)) == 0.0


def test_a_fresh_mgc_changes_nothing() -> None:
    plain, context = build_neck("pafpn"), build_neck("pafpn_mgc")
    report = context.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all(key.startswith("context.") for key in report.missing_keys)
    features = random_features(pyramid_spec(), (65, 97))
    assert largest_difference(plain(features), context(features)) == 0.0


@pytest.mark.parametrize("name", WITH_CONTEXT)
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_attention_is_an_argument(name: str, kind: str) -> None:
    neck = build_neck(name, attention=kind, orthogonal_weight=0.5)
    randomize(neck)
    assert neck.context.attention == kind
    assert neck.context.global_reasoning.attention == kind
    assert all(x.isfinite().all() for x in neck(random_features(pyramid_spec(), (64, 96))).values())
    losses = neck.losses()
    assert list(losses) == ["loss_orthogonal"]
    torch.testing.assert_close(losses["loss_orthogonal"], 0.5 * neck.context.orthogonal_loss())
    assert losses["loss_orthogonal"] > 0


@every_neck
def test_only_context_has_losses(name: str) -> None:
    losses = build_neck(name, spec_for(name)).losses()
    assert (list(losses) == ["loss_orthogonal"]) == (name in WITH_CONTEXT)
    assert all(loss.ndim == 0 for loss in losses.values())


@pytest.mark.parametrize(("name", "budget"), [("a2fpn", 64), ("pafpn_mgc", 64), ("a2fpn_lite", 32)])
def test_nodes_follow_the_stride(name: str, budget: int) -> None:
    with torch.device("meta"):
        neck = create_neck(name, PyramidSpec.from_channels([256, 512, 1024, 2048]), out_channels=8)
    shapes = [tuple(w.shape) for w in neck.context.entities]
    assert shapes == [(4 * budget, 256), (3 * budget, 512), (2 * budget, 1024), (budget, 2048)]


def test_a_narrow_backbone_has_fewer_nodes_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="a2fpn"):
        neck = create_neck("a2fpn", PyramidSpec.from_channels([24, 40, 112, 320]), out_channels=8)
    assert [len(w) for w in neck.context.entities] == [24, 40, 112, 64]
    assert "[24, 40, 112, 64] semantic nodes per level, not [256, 192, 128, 64]" in caplog.text


def test_nodes_that_were_asked_for_are_not_lowered() -> None:
    with pytest.raises(ValueError, match=r"9 nodes on a level of 8 channels"):
        build_neck("a2fpn", nodes=[9, 4, 4, 4])


# Options


@every_option
@pytest.mark.parametrize("size", [(65, 97), (32, 200)])
def test_an_option_leaves_the_pyramid_as_declared(name: str, option: dict[str, Any], size: tuple[int, int]) -> None:
    neck, plain = build_neck(name, **option), build_neck(name)
    features = random_features(pyramid_spec(), size)
    shapes = [[(level, x.shape) for level, x in n(features).items()] for n in (neck, plain)]
    assert shapes[0] == shapes[1]
    assert json.loads(json.dumps(option)) == option


@every_option
def test_an_option_is_another_function_or_another_start(name: str, option: dict[str, Any]) -> None:
    sizes = [(16, 24), (9, 13), (9, 7), (1, 1)]
    neck, plain = build_neck(name, **option).eval(), build_neck(name).eval()
    randomize(neck)
    fitting = {k: x for k, x in neck.state_dict().items() if plain.state_dict().get(k, x[..., :0]).shape == x.shape}
    plain.load_state_dict(fitting, strict=False)
    levels = zip(pyramid_spec().items(), sizes, strict=True)
    features = {c: torch.randn(1, level.channels, *size) for (c, level), size in levels}
    got, expected = neck(features), plain(features)
    assert [tuple(x.shape[-2:]) for x in got.values()][:4] == sizes
    assert (largest_difference(got, expected) > 1e-3) == (option != {"context_init": "small"})


@every_option
def test_an_option_has_a_gradient_for_every_parameter(name: str, option: dict[str, Any]) -> None:
    neck = build_neck(name, **option)
    features = random_features(pyramid_spec(), (65, 97))
    weighted_sum(neck(features)).backward()
    assert without_gradient(neck) == []
    neck.zero_grad()
    randomize(neck)
    weighted_sum(neck(features)).backward()
    assert with_zero_gradient(neck) == []


@every_option
def test_with_an_option_an_image_does_not_see_its_neighbors(name: str, option: dict[str, Any]) -> None:
    neck = build_neck(name, **option).double().eval()
    randomize(neck)
    features = double(random_features(pyramid_spec(), (64, 96)))
    sizes = [(64, 96), (33, 80)]
    together = neck(features, sizes)
    for i, size in enumerate(sizes):
        alone = neck({level: x[i : i + 1] for level, x in features.items()}, [size])
        assert largest_difference({level: x[i : i + 1] for level, x in together.items()}, alone) < 1e-10


@every_option
def test_with_an_option_context_and_gates_do_not_see_padding(name: str, option: dict[str, Any]) -> None:
    if name == "carafe_fpn":
        pytest.skip("neither context nor gates")
    neck = build_neck(name, **option).double().eval()
    randomize(neck)
    clean = double(random_features(pyramid_spec(), (64, 1024), batch=1))
    # Padding begins where no convolution mixes it with what gates average: they stay at one.
    for module in neck.modules():
        if isinstance(module, ChannelGates):
            torch.nn.init.zeros_(module.gate.weight)
            torch.nn.init.zeros_(module.gate.bias)
    dirty = {level: x.clone() for level, x in clean.items()}
    for level, x in dirty.items():
        x[..., 768 // neck.in_spec[level].stride :] += 100
    clean, dirty = (neck(features, [(64, 768)]) for features in (clean, dirty))
    strides = {level: spec.stride for level, spec in neck.out_spec.items()}
    far = [{p: x[..., : 128 // strides[p]] for p, x in pyramid.items()} for pyramid in (clean, dirty)]
    assert largest_difference(*far) < 1e-10


@pytest.mark.parametrize("name", WITH_CONTEXT)
def test_the_defaults_are_the_first_readings_and_add_no_tensor(name: str) -> None:
    chosen = {"reasoning": "attention", "distribute": "all", "context_init": "zero"}
    if name != "pafpn_mgc":
        chosen |= {"kernels": "fine", "kernel_init": "center", "pool": "mean"}
    necks = []
    for options in ({}, chosen):
        torch.manual_seed(0)
        necks.append(build_neck(name, **options).eval())
    states = [neck.state_dict() for neck in necks]
    assert list(states[0]) == list(states[1])
    assert not [key for key in states[0] if key.startswith("context.gate.") or ".focus." in key]
    features = random_features(pyramid_spec(), (65, 97))
    assert largest_difference(necks[0](features), necks[1](features)) == 0


def test_what_a_member_lacks_has_no_options() -> None:
    for option in ("kernels", "kernel_init", "pool"):
        with pytest.raises(ValueError, match=rf"Neck 'pafpn_mgc' has no argument '{option}'"):
            build_neck("pafpn_mgc", **{option: "mean"})


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("pafpn_mgc", {"reasoning": "graph"}, "Unknown reasoning='graph'; expected one of attention, gcn"),
        ("a2fpn", {"distribute": "none"}, "Unknown distribute='none'; expected one of all, own"),
        ("a2fpn_lite", {"context_init": "one"}, "Unknown context_init='one'; expected one of zero, gate, small"),
        ("a2fpn", {"kernels": "all"}, "Unknown kernels='all'; expected one of fine, coarse"),
        ("a2fpn", {"kernel_init": "sharp"}, "Unknown kernel_init='sharp'; expected one of center, uniform"),
        ("a2fpn_lite", {"pool": "max"}, "Unknown pool='max'; expected one of mean, attention"),
        ("carafe_fpn", {"extra_source": "c5"}, "Unknown extra_source='c5'; expected one of neck, backbone"),
    ],
)
def test_an_unknown_value_is_an_error_with_those_that_are_known(
    name: str, option: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_neck(name, **option)


def test_an_extra_level_of_the_backbone_begins_the_top_down_path() -> None:
    neck = build_neck("carafe_fpn", extra_source="backbone", extra_levels=2).double()
    features = double(random_features(pyramid_spec(), (64, 96)))
    pyramid = neck(features)
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6", "p7"]
    top = neck.lateral[4](features["c5"])
    assert largest_difference([pyramid["p6"]], [neck.output[4](top)]) < 1e-12
    merged = neck.top_down[3](top, neck.lateral[3](features["c5"]))
    assert largest_difference([pyramid["p5"]], [neck.output[3](merged)]) < 1e-12
    assert largest_difference([pyramid["p7"]], [pyramid["p6"][..., ::2, ::2]]) == 0


# Bad input


@every_neck
def test_a_neck_checks_its_inputs(name: str) -> None:
    spec = spec_for(name)
    neck, features = build_neck(name, spec), random_features(spec, (64, 96))
    level, x = next(iter(features.items()))
    wrong: dict[str, tuple[dict[str, Tensor], str]] = {
        "name": ({f"x{k}": v for k, v in features.items()}, r"Expected feature maps named \['c.*got \['x"),
        "count": ({**features, "c7": x}, r"Expected feature maps named .*got \[.*'c7'\]"),
        "channels": ({**features, level: x[:, :-1]}, rf"Level {level}: expected a map \(B, {x.shape[1]}, H, W\), got"),
        "dimensions": ({**features, level: x[0]}, rf"Level {level}: expected a map .* got"),
    }
    for maps, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            neck(maps)


@pytest.mark.parametrize("name", FUSING)
def test_maps_that_grow_are_an_error(name: str) -> None:
    features = random_features(pyramid_spec(), (64, 96))
    features["c4"] = torch.zeros(2, features["c4"].shape[1], 9, 6)
    with pytest.raises(ValueError, match=r"Level c4 \(9, 6\) is larger than the finer c3 \(8, 12\); maps must shrink"):
        build_neck(name)(features)


@every_neck
@pytest.mark.parametrize("options", [{"out_channels": 0}, {"extra_levels": -1}, {"extra_levels": 9}])
def test_numbers_must_make_sense(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Expected out_channels >= 1 and 0 to 8 extra_levels, got"):
        build_neck(name, spec_for(name), **options)


@every_neck
def test_an_unknown_argument_is_an_error_with_the_closest(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Neck '{name}' has no argument 'out_chanels'. Did you mean 'out_channels'"):
        build_neck(name, spec_for(name), out_chanels=8)


@pytest.mark.parametrize("name", WITH_CONTEXT)
@pytest.mark.parametrize("argument", ["top_down", "bottom_up", "context"])
def test_the_parts_of_a_member_are_no_arguments(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"Neck '{name}' has no argument '{argument}'"):
        create_neck(name, pyramid_spec(), **{argument: None})


def test_an_unknown_neck_is_an_error_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"Unknown neck 'a2fnp'\. Did you mean 'a2fpn'"):
        create_neck("a2fnp", pyramid_spec())


def test_simple_fpn_takes_one_map() -> None:
    with pytest.raises(ValueError, match=r"from one map, got 4.*such as 'fpn'"):
        build_neck("simple_fpn", pyramid_spec())


def test_a_pyramid_goes_from_fine_to_coarse_by_twos() -> None:
    strides = build_neck("a2fpn", pyramid_spec(3, finest=3), extra_levels=2).out_spec.strides
    assert [math.log2(stride) for stride in strides] == [3, 4, 5, 6, 7]
