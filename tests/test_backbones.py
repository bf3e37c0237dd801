import copy
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import a2fpn
from a2fpn.backbones import (
    ALIASES,
    TimmBackbone,
    pretrained_statistics,
    resolve_backbone_name,
    weights_license,
)
from a2fpn.backbones.pretrained import _resized, _say_license
from a2fpn.config import BackboneConfig, PreprocessConfig
from a2fpn.device import without_values
from a2fpn.layers import resample
from a2fpn.preprocess import Preprocess
from a2fpn.pyramid import level_size
from tests.helpers import (
    largest_difference,
    random_target,
    randomize,
    tiny_model,
    weighted_sum,
    with_zero_gradient,
    without_gradient,
)
from tests.processes import run_python

# One of each kind: maps at stride 2, classifier parts to leave out, sizes rounded down, channels last (NHWC).
FAMILIES = ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_byobnet"]
# And those that lack strides, the one by having a single one.
EVERY_KIND = [*FAMILIES, "test_vit", "efficientvim_m1"]
families = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, **options: object) -> TimmBackbone:
    return TimmBackbone(BackboneConfig(name, **options))


def check_maps(backbone: TimmBackbone, x: torch.Tensor) -> None:
    maps = backbone(x)
    assert tuple(maps) == backbone.out_spec.names == ("c2", "c3", "c4", "c5")
    assert backbone.out_spec.strides == (4, 8, 16, 32)
    for name, level in backbone.out_spec.items():
        assert maps[name].shape == (len(x), level.channels, *level_size(x.shape[-2:], level.stride)), name


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("size", [(64, 96), (97, 133)])
def test_maps_are_as_declared(name: str, size: tuple[int, int]) -> None:
    check_maps(build(name).eval(), torch.randn(2, 3, *size))


@families
def test_maps_lie_where_their_strides_say(name: str) -> None:
    """What is seen at a cell comes from the pixels around it: a dot moves by whole cells when moved by the stride."""
    backbone = build(name).eval()
    x = torch.zeros(3, 3, 256, 256)
    x[1, :, 128:132, 64:68] = 9
    x[2, :, 64:68, 160:164] = 9
    for stride, maps in zip(backbone.out_spec.strides[:2], list(backbone(x).values())[:2], strict=True):
        for image, (row, column) in ((1, (130, 66)), (2, (66, 162))):
            change = (maps[image] - maps[0]).abs().sum(0)
            height, width = change.shape
            assert (height, width) == (256 // stride, 256 // stride)
            rows = (change.sum(1) * torch.arange(height)).sum() / change.sum()
            columns = (change.sum(0) * torch.arange(width)).sum() / change.sum()
            assert abs(rows.item() * stride - row) < 3 * stride
            assert abs(columns.item() * stride - column) < 3 * stride


CHANNELS = {
    "r18": (64, 128, 256, 512),
    "r34": (64, 128, 256, 512),
    "r50": (256, 512, 1024, 2048),
    "r101": (256, 512, 1024, 2048),
    "convnext_tiny": (96, 192, 384, 768),
    "swin_tiny": (96, 192, 384, 768),
    "mobilenetv2_100": (24, 32, 96, 320),
    "lite0": (24, 40, 112, 320),
}


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_are_backbones_with_a_pinned_tag(name: str) -> None:
    assert "." in resolve_backbone_name(name)
    with torch.device("meta"):
        backbone = build(name)
        assert backbone.out_spec.channels == CHANNELS[name]
        check_maps(backbone, torch.empty(1, 3, 97, 133))


def test_swin_takes_images_of_any_size_and_gives_channels_first() -> None:
    backbone = build("swin_tiny").eval()
    check_maps(backbone, torch.randn(1, 3, 64, 96))


def test_wanted_strides_are_found_wherever_they_are() -> None:
    backbone = TimmBackbone(BackboneConfig("test_efficientnet"), strides=(8, 32))
    assert backbone.out_spec.names == ("c3", "c5")
    assert [tuple(x.shape[-2:]) for x in backbone(torch.randn(1, 3, 64, 96)).values()] == [(8, 12), (2, 3)]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_gradient_to_every_parameter(name: str) -> None:
    backbone = build(name)
    # Residual branches start at zero, and let nothing through.
    randomize(backbone)
    weighted_sum(backbone(torch.randn(2, 3, 64, 96))).backward()
    assert with_zero_gradient(backbone) == []


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_image_channels(name: str, channels: int) -> None:
    check_maps(build(name, in_chans=channels), torch.randn(1, channels, 64, 64))


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("strides", [(4, 8, 16), (8, 32), (16,), (8, 16, 32, 64, 128)])
def test_no_parameter_is_dead_whatever_levels_are_wanted(name: str, strides: tuple[int, ...]) -> None:
    backbone = build(name, strides=strides).eval()
    assert backbone.out_spec.strides == strides
    weighted_sum(backbone(torch.randn(1, 3, 128, 128))).backward()
    assert without_gradient(backbone) == []
    # What is left out is left out, and not only frozen; a few numbers timm itself freezes.
    assert sum(p.numel() for p in backbone.parameters() if not p.requires_grad) < 10


def test_what_lies_behind_the_last_level_is_left_out() -> None:
    whole, part = build("test_efficientnet"), build("test_efficientnet", strides=(4, 8))
    kept = sum(parameter.numel() for parameter in part.parameters())
    assert kept < 0.5 * sum(parameter.numel() for parameter in whole.parameters())
    part.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    expected = whole.eval()(x)
    assert all(torch.equal(got, expected[name]) for name, got in part.eval()(x).items())


def test_missing_levels_are_made_from_the_one_there_is() -> None:
    backbone = build("test_vit").eval()
    assert [key for key in backbone.made] == ["4", "8", "16", "32"]
    assert len(build("test_vit", strides=(16,)).made) == 0
    (level,) = build("test_vit", strides=(16,)).out_spec.values()
    modules, channels = resample(level.channels, 16, 4)
    assert [type(module) for module in backbone.made["4"][:-1]] == [type(module) for module in modules]
    assert backbone.out_spec.channels == (channels, 2 * channels, level.channels, level.channels)


def test_missing_levels_of_a_pyramid_are_made_from_the_nearest() -> None:
    backbone = build("efficientvim_m1")
    assert backbone.info.strides == (16, 32, 64)
    # Those that it has stay as they are, and so do the names of its tensors.
    assert list(backbone.made) == ["4", "8"]
    assert backbone._sources == [0, 0, 0, 1]


def test_no_levels_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs at least one stride, got none"):
        build("test_resnet", strides=())


@pytest.mark.parametrize("neck", a2fpn.list_necks())
def test_a_detector_on_a_vision_transformer(neck: str) -> None:
    model = tiny_model(f"maskrcnn_{neck}", backbone="test_vit")
    assert model.neck.out_spec.strides == (4, 8, 16, 32, 64)
    assert model.config.backbone.strides == ((16,) if neck == "simple_fpn" else (4, 8, 16, 32))
    losses = model([torch.rand(3, 64, 96)], [random_target([[8, 8, 40, 40]], (64, 96))])
    torch.stack(list(losses.values())).sum().backward()
    assert without_gradient(model.backbone) == []
    assert len(model.eval()([torch.rand(3, 70, 50)])) == 1


def test_images_laid_out_channels_last_do_not_crash_torch() -> None:
    """A 1x1 convolution with stride on few channels; without care the process dies, so another one is asked."""
    code = """
import torch, a2fpn
backbone = a2fpn.create_backbone("fastvit_t8", levels=(4,))
for _ in range(4):
    x = torch.rand(2, 3, 128, 160).contiguous(memory_format=torch.channels_last)
    backbone(x)["c2"].square().mean().backward()
print("alive")
"""
    done = run_python(code)
    assert done.stdout.strip() == "alive", done.stderr


# Fixed sizes


def on_meta(name: str, **options: object) -> TimmBackbone:
    with torch.device("meta"):
        return build(name, **options)


def test_a_fixed_size_is_said_and_taken(caplog: pytest.LogCaptureFixture) -> None:
    backbone = on_meta("mixer_s32_224").eval()
    assert "mixer_s32_224 is built for images of 224 x 224" in caplog.text
    check_maps(backbone, torch.empty(1, 3, 200, 224, device="meta"))
    with pytest.raises(ValueError, match=r"built for images of at most 224 x 224, got 224 x 225"):
        backbone(torch.empty(1, 3, 224, 225, device="meta"))


def test_a_fixed_size_can_be_chosen() -> None:
    backbone = on_meta("mixer_s32_224", image_size=448).eval()
    check_maps(backbone, torch.empty(1, 3, 448, 300, device="meta"))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_resnet", 224, "'test_resnet' takes images of any size; leave image_size at None, got 224"),
        ("efficientformer_l1", 448, "supports images of 224 x 224 only, got image_size=448"),
        ("mixer_s32_224", 0, "image_size must be between 1 and 8192, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_an_error(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(name, image_size=size)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lite0", {}, {"size_divisor": None, "min_size": 800, "interpolation": "bicubic"}),
        ("r50", {}, {"size_divisor": None, "interpolation": "bilinear"}),
        ("r50", {"interpolation": "bicubic", "mean": [0.1, 0.2, 0.3]}, {"interpolation": "bicubic"}),
        ("maxvit_tiny_tf_224", {}, {"size_divisor": 224, "min_size": 800}),
        ("maxvit_tiny_tf_224", {"size_divisor": 448}, {"size_divisor": 448}),
        ("mixer_s32_224", {}, {"size_divisor": 224, "min_size": 224, "max_size": 224}),
        ("coat_tiny", {}, {"size_divisor": 448, "min_size": 448, "max_size": 448}),
        ("efficientformer_l1", {}, {"size_divisor": 224, "min_size": 224, "max_size": 224}),
        ("mixer_s32_224", {"image_size": 448}, {"size_divisor": 448, "min_size": 448, "max_size": 448}),
    ],
)
def test_a_backbone_says_how_images_are_prepared(
    name: str, options: dict[str, object], expected: dict[str, object]
) -> None:
    with torch.device("meta"):
        model = a2fpn.create_model("fasterrcnn_fpn", backbone=name, **options)
    got = vars(model.config.preprocess)
    assert {key: got[key] for key in expected} == expected
    assert got["mean"] == tuple(options.get("mean", pretrained_statistics(name)[0]))


def test_images_are_resized_by_the_interpolation() -> None:
    image = torch.rand(3, 10, 10)
    results = {}
    for mode in ("bilinear", "bicubic"):
        config = PreprocessConfig(min_size=20, max_size=20, interpolation=mode, mean=(0.0,) * 3, std=(1.0,) * 3)
        results[mode] = Preprocess(config, divisor=1)([image]).tensor
        expected = nn.functional.interpolate(image[None], size=(20, 20), mode=mode, align_corners=False)
        torch.testing.assert_close(results[mode], expected)
    assert not torch.equal(*results.values())


def test_padding_inside_does_not_depend_on_padding_outside() -> None:
    backbone = on_meta("maxvit_tiny_tf_224").eval()
    assert backbone.padded_size(230, 90) == (448, 224)
    check_maps(backbone, torch.empty(1, 3, 230, 90, device="meta"))


# Weights


@families
def test_local_weights_arrive(name: str, tmp_path: Path) -> None:
    source = timm.create_model(name)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    backbone = TimmBackbone(BackboneConfig(name), weights=path)
    # Some feature extractors rename "stages.0" to "stages_0".
    stored = {key.replace(".", "_"): value for key, value in source.state_dict().items()}
    own = {key.replace(".", "_"): value for key, value in backbone.body.state_dict().items()}
    assert own
    assert all(torch.equal(value, stored[key]) for key, value in own.items())


def test_local_weights_are_adapted_to_other_image_channels(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    backbone = TimmBackbone(BackboneConfig("test_resnet", in_chans=4), weights=path)
    assert backbone.body.conv1[0].weight.shape[1] == 4
    assert torch.equal(backbone.body.layer4[0].conv1.weight, source.layer4[0].conv1.weight)


@pytest.mark.parametrize("other", ["test_efficientnet", "test_convnext"])
def test_weights_of_another_network_are_an_error(other: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(other).state_dict(), path)
    with pytest.raises(ValueError, match=r"weights\.safetensors' does not contain weights of 'test_resnet'"):
        TimmBackbone(BackboneConfig("test_resnet"), weights=path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"This is not a file of weights.")
    with pytest.raises(ValueError, match=rf"{name}' does not contain weights of 'test_resnet': "):
        TimmBackbone(BackboneConfig("test_resnet"), weights=path)


def test_a_weights_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"Backbone weights 'no/such\.safetensors' do not exist"):
        TimmBackbone(BackboneConfig("test_resnet"), weights="no/such.safetensors")


# Frozen parts


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_frozen_norm_is_a_fixed_map(name: str) -> None:
    trained, frozen = build(name), build(name, norm="frozen")
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    counters = {key for key in trained.state_dict() if key.endswith("num_batches_tracked")}
    report = frozen.load_state_dict(trained.state_dict(), strict=False)
    assert report.missing_keys == []
    assert set(report.unexpected_keys) <= counters
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())

    x = torch.randn(2, 3, 64, 64)
    expected, before = trained.eval()(x), copy.deepcopy(frozen.state_dict())
    got = frozen.train()(x)
    for level in expected:
        torch.testing.assert_close(got[level], expected[level], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_byobnet"])
@pytest.mark.parametrize("trained", range(6))
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32)])
def test_the_deepest_stages_are_trained_and_the_others_stay_as_they_are(
    name: str, trained: int, strides: tuple[int, ...]
) -> None:
    backbone = build(name, trainable_layers=trained, strides=strides).train()
    before = copy.deepcopy(backbone.state_dict())
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [x.requires_grad for x in maps.values()] == [stride > 32 >> trained for stride in strides]
    if trained:
        weighted_sum(maps).backward()
        torch.optim.SGD(backbone.parameters(), lr=1.0).step()
    changed = {key.split(".")[1] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    stages = [child for child, _ in backbone.body.named_children() if child.startswith(("layer", "stages"))]
    assert stages[max(0, 4 - trained) :] == [stage for stage in stages if stage in changed]
    # The stem of a network without a map of stride 2 belongs to the stage of stride 4.
    assert (changed <= set(stages)) == (trained < (5 if 2 in backbone.info.strides else 4))


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    backbone = build("test_resnet", trainable_layers=1)
    for _ in range(2):
        backbone.train()
        assert backbone.training
        assert not backbone.body.layer3.training
        assert not any(module.training for module in backbone.body.layer3.modules())
        assert all(module.training for module in backbone.body.layer4.modules())
        backbone.eval()
        assert not any(module.training for module in backbone.modules())


def test_a_copy_has_its_own_frozen_parts() -> None:
    backbone = copy.deepcopy(build("test_resnet", trainable_layers=1)).train()
    assert not backbone.body.conv1.training
    assert backbone.body.layer4.training


@pytest.mark.parametrize("number", [-1, 6])
def test_trainable_layers_are_at_most_the_stages(number: int) -> None:
    with pytest.raises(ValueError, match=f"trainable_layers must be between 0 and 5, got {number}"):
        build("test_resnet", trainable_layers=number)


def test_branches_side_by_side_are_frozen_from_the_image_on() -> None:
    """The finest map of such a network depends on the deepest layers."""
    backbone = on_meta("hrnet_w18_small", trainable_layers=3)
    trained = {name for name, p in backbone.body.named_parameters() if p.requires_grad}
    ids = backbone.layer_ids()
    frozen = {ids[f"body.{name}"] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert max(frozen) < min(ids[f"body.{name}"] for name in trained)
    assert any(name.startswith("stage4") for name in trained)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_frozen_parts_get_no_gradient_and_the_others_do(name: str) -> None:
    backbone = build(name, trainable_layers=2).train()
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert frozen
    before = copy.deepcopy(frozen)
    weighted_sum(backbone(torch.randn(2, 3, 64, 64))).backward()
    assert without_gradient(backbone) == []
    assert any(p.requires_grad for p in backbone.body.parameters())
    torch.optim.SGD(backbone.parameters(), lr=1.0, weight_decay=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


def test_a_network_of_one_stride_is_frozen_from_the_image_on() -> None:
    backbone = build("test_vit", trainable_layers=3)
    trained = {
        layer for name, layer in backbone.layer_ids().items() if dict(backbone.named_parameters())[name].requires_grad
    }
    frozen = set(backbone.layer_ids().values()) - trained
    assert max(frozen) < min(trained)
    assert 0.3 < len(frozen) / len(frozen | trained) < 0.5
    # What makes the levels is new, and no one trained it before.
    for number in (0, 3):
        assert all(p.requires_grad for p in build("test_vit", trainable_layers=number).made.parameters())
    assert not any(p.requires_grad for p in build("test_vit", trainable_layers=0).body.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_the_mode_that_a_network_is_built_in_does_not_matter(
    name: str, mode: Callable[[], AbstractContextManager]
) -> None:
    options = {"strides": (8, 16), "trainable_layers": 3}
    expected = build(name, **options)
    with mode():
        backbone = build(name, **options)
    assert [(key, p.shape, p.requires_grad) for key, p in backbone.named_parameters()] == [
        (key, p.shape, p.requires_grad) for key, p in expected.named_parameters()
    ]
    weighted_sum(backbone.train()(torch.randn(2, 3, 64, 64))).backward()
    assert without_gradient(backbone) == []


@pytest.mark.parametrize("norm", ["frozen", "sync", "gn"])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_norms_are_converted_with_their_activations(name: str, norm: str) -> None:
    trained, converted = build(name).eval(), build(name, norm=norm)
    kinds = {
        "frozen": (timm.layers.FrozenBatchNormAct2d, FrozenBatchNorm2d),
        "sync": (nn.SyncBatchNorm,),
        "gn": (nn.GroupNorm,),
    }
    norms = {name: module for name, module in trained.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms
    for key, old in norms.items():
        new = converted.get_submodule(key)
        assert isinstance(new, kinds[norm])
        # torch's own converter drops them.
        assert type(getattr(new, "act", None)) is type(getattr(old, "act", None))
    if norm != "gn":
        converted.load_state_dict(trained.state_dict(), strict=False)
        x = torch.randn(2, 3, 64, 64)
        assert largest_difference(trained(x), converted.eval()(x)) < 1e-4
    else:
        weighted_sum(converted.train()(torch.randn(1, 3, 64, 64))).backward()
        assert without_gradient(converted) == []


def test_batch_norm_of_vectors_is_frozen_too() -> None:
    free, frozen = on_meta("levit_128s"), on_meta("levit_128s", norm="frozen").train()
    assert sum(isinstance(module, nn.BatchNorm1d) for module in free.modules()) > 0
    for module in frozen.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())


def saved_bytes(backbone: TimmBackbone, x: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = backbone(x)
        size = sum(kept.values())
    torch.stack([m.square().mean() for m in maps.values()]).sum().backward()
    return size, {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(name: str) -> None:
    plain = build(name)
    checkpointed = build(name, grad_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 96, 96)
    (more, expected), (less, got) = saved_bytes(plain, x), saved_bytes(checkpointed, x)
    assert less < 0.9 * more
    for key in expected:
        torch.testing.assert_close(got[key], expected[key])


def test_networks_without_gradient_checkpointing_are_an_error() -> None:
    with pytest.raises(ValueError, match="timm does not support gradient checkpointing for 'hrnet_w18_small'"):
        on_meta("hrnet_w18_small", grad_checkpointing=True)


# The last two: no groups in timm, and names that a wrapper joined.
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "pit_ti_224", "poolformer_s12", "test_convnext"]
)
def test_every_parameter_has_a_layer(name: str) -> None:
    backbone = on_meta(name)
    ids = backbone.layer_ids()
    assert list(sorted(ids)) == sorted(name for name, _ in backbone.named_parameters())
    assert set(ids.values()) == set(range(max(ids.values()) + 1))
    assert len(set(ids.values())) >= 3
    first = next(
        name for name, _ in backbone.body.named_parameters() if "stem" in name or "embed" in name or "conv" in name
    )
    assert ids[f"body.{first}"] == 0
    assert all(layer == max(ids.values()) for name, layer in ids.items() if name.startswith("made."))
    # Depth grows along the network: what the last map alone depends on is deeper than the stem.
    assert max(layer for name, layer in ids.items() if name.startswith("body.")) >= max(ids.values()) - 1


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", r"Unknown backbone 'resnet5O'\. Did you mean 'resnet50'"),
        ("r55", r"Unknown backbone 'r55'\. Did you mean .*'r50'"),
        ("", r"Unknown backbone ''"),
        ("resnet50.a1_in2k", r"Backbone 'resnet50' has no weights 'a1_in2k'\. Did you mean 'a1_in1k'"),
    ],
)
def test_unknown_names_are_an_error_with_the_closest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)


def test_statistics_come_from_the_weights() -> None:
    assert pretrained_statistics("r50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert pretrained_statistics("lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_license_that_asks_for_care_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_license.cache_clear()
    assert weights_license("convnextv2_atto.fcmae") == "cc-by-nc-4.0"
    assert weights_license("convnextv2_atto.fcmae") == "cc-by-nc-4.0"
    assert caplog.text.count("'cc-by-nc-4.0'") == 1
    caplog.clear()
    assert weights_license("lite0") == "apache-2.0"
    assert caplog.text == ""


def test_the_license_of_the_weights_goes_into_the_config(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    model = tiny_model("fasterrcnn_fpn", backbone="test_resnet.r160_in1k", backbone_weights=path)
    assert model.config.backbone.license == "apache-2.0"
    assert a2fpn.from_pretrained(a2fpn.save_pretrained(model, tmp_path)).config.backbone.license == "apache-2.0"
    assert tiny_model("fasterrcnn_fpn", backbone="test_resnet").config.backbone.license is None


# The first four are resized by timm's loader, the others by ours: position embeddings and tables of attention biases of
# every layout, one network for each.
@pytest.mark.parametrize(
    ("name", "size", "resized"),
    [
        ("vit_tiny_patch16_224", None, r"^$"),
        ("swin_s3_tiny_224", None, r"^$"),
        ("eva02_tiny_patch14_224", None, r"pos_embed|patch_embed\.proj\.weight"),
        ("test_coatnet", 320, r"bias_table"),
        ("cait_xxs24_224", 448, r"pos_embed"),
        pytest.param("convit_tiny", 448, r"pos_embed", marks=pytest.mark.slow),
        pytest.param("crossvit_tiny_240", 480, r"pos_embed_[01]", marks=pytest.mark.slow),
        pytest.param("eca_botnext26ts_256", 512, r"(height|width)_rel", marks=pytest.mark.slow),
        pytest.param("efficientformerv2_s0", 448, r"attention_biases", marks=pytest.mark.slow),
        pytest.param("gcvit_xxtiny", 448, r"bias_table", marks=pytest.mark.slow),
        pytest.param("hiera_tiny_224", 448, r"pos_embed", marks=pytest.mark.slow),
        ("levit_128s", 448, r"attention_biases"),
        pytest.param("nest_tiny", 448, r"pos_embed", marks=pytest.mark.slow),
        pytest.param("pit_ti_224", 448, r"pos_embed", marks=pytest.mark.slow),
        pytest.param("visformer_tiny", 448, r"pos_embed[123]", marks=pytest.mark.slow),
        pytest.param("volo_d1_224", 448, r"pos_embed", marks=pytest.mark.slow),
    ],
)
def test_weights_arrive_under_switches(name: str, size: int | None, resized: str, tmp_path: Path) -> None:
    with without_values():
        shapes = timm.create_model(name).state_dict()
    source = {key: (0.02 * torch.randn(x.shape)).to(x.dtype) for key, x in shapes.items()}
    # Told apart from what a constructor makes, and smooth.
    for key, x in source.items():
        if re.search(resized, key) and "proj" not in key:
            x.copy_(torch.linspace(1, 2, x.numel()).reshape(x.shape))
    path = tmp_path / "weights.safetensors"
    save_file(source, path)
    backbone = TimmBackbone(BackboneConfig(name, image_size=size), weights=path)
    stored = {key.replace(".", "_"): x for key, x in source.items()}
    different = set()
    for key, x in backbone.body.state_dict().items():
        # Wrappers of timm put a prefix before names, or join their parts.
        candidates = (key.replace(".", "_"), key.partition(".")[2].replace(".", "_"))
        before = next(stored[c] for c in candidates if c in stored)
        if before.shape != x.shape:
            different.add(key)
            assert re.search(resized, key)
            assert "proj" in key or 0.8 < x.min() < x.max() < 2.2
            torch.testing.assert_close(x.mean(), before.mean(), rtol=0.1, atol=0.01)
        else:
            assert torch.equal(before, x), key
    assert bool(different) == (resized != "^$")


def test_weights_that_know_one_size_only_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("gmlp_ti16_224").state_dict(), path)
    with pytest.raises(
        ValueError, match=r"gate\.proj\.weight is \(196, 196\), expected \(784, 784\)\. Omit image_size"
    ):
        TimmBackbone(BackboneConfig("gmlp_ti16_224", image_size=448), weights=path)
    TimmBackbone(BackboneConfig("gmlp_ti16_224"), weights=path)


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "axes"),
    [
        ("pos_embed", (1, 49, 3), (1, 81, 3), (1,)),
        ("pos_embed", (1, 5, 7, 3), (1, 10, 14, 3), (1, 2)),
        ("pos_embed1", (1, 3, 7, 7), (1, 3, 14, 14), (2, 3)),
        ("levels.0.pos_embed", (1, 4, 49, 3), (1, 4, 196, 3), (2,)),
        ("attn.attention_biases", (2, 49), (2, 196), (1,)),
        ("attn.relative_position_bias_table", (169, 2), (729, 2), (0,)),
        # Fifteen and thirty-one would also make grids beside six others.
        ("attn.pos_embed.height_rel", (15, 4), (31, 4), (0,)),
    ],
)
def test_positions_are_interpolated(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    """A ramp along the rows is one afterwards, and other axes are not mixed."""
    cells = shape[axes[0]] if len(axes) == 2 or name.endswith("_rel") else math.isqrt(shape[axes[0]])
    goal = wanted[axes[0]] if len(axes) == 2 or name.endswith("_rel") else math.isqrt(wanted[axes[0]])

    def ramp(count: int, whole: tuple[int, ...]) -> torch.Tensor:
        rows = torch.linspace(-1, 1, count)
        if len(axes) == 1 and not name.endswith("_rel"):
            rows = rows.repeat_interleave(count)
        values = rows.reshape([len(rows) if axis == axes[0] else 1 for axis in range(len(whole))])
        others = [axis for axis in range(len(whole)) if axis not in axes]
        factors = torch.arange(1.0, 1 + math.prod(whole[axis] for axis in others))
        return values * factors.reshape([whole[axis] if axis in others else 1 for axis in range(len(whole))]).expand(
            whole
        )

    got, expected = _resized(name, ramp(cells, shape), torch.Size(wanted)), ramp(goal, wanted)
    assert got.shape == wanted
    # Corners differ by how far a cell's center lies from the edge.
    assert (got - expected).abs().max() < 0.2 * expected.abs().max()
    torch.testing.assert_close(got.flip(axes[0]), -got, rtol=1e-4, atol=1e-4)


def test_class_tokens_stay_when_positions_are_interpolated() -> None:
    x = torch.randn(1, 2 + 16, 3)
    got = _resized("pos_embed", x, torch.Size((1, 2 + 64, 3)))
    assert torch.equal(got[:, :2], x[:, :2])


@pytest.mark.parametrize(("name", "shape"), [("layer1.0.conv1.weight", (8, 4, 3, 3)), ("pos_embed", (2, 81, 4))])
def test_only_positions_are_interpolated(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*, expected \({shape[0]}, "):
        _resized(name, torch.zeros([1, 49, 3] if name == "pos_embed" else [4, 4, 3, 3]), torch.Size(shape))


def test_pretrained_backbones_have_frozen_norms_and_a_license(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    backbone = a2fpn.create_backbone("test_resnet.r160_in1k", weights=path)
    assert (backbone.config.norm, backbone.config.license) == ("frozen", "apache-2.0")
    assert a2fpn.create_backbone("test_resnet.r160_in1k", weights=path, norm="bn").config.norm == "bn"
    assert a2fpn.create_backbone("test_resnet").config.norm == "bn"


@pytest.mark.parametrize(("trained", "wanted"), [("bn", "frozen"), ("frozen", "bn")])
def test_trained_and_frozen_batch_norm_load_into_each_other(trained: str, wanted: str, tmp_path: Path) -> None:
    model = tiny_model("fasterrcnn_fpn", backbone="test_resnet", norm=trained).eval()
    folder = a2fpn.save_pretrained(model, tmp_path)
    loaded = a2fpn.from_pretrained(folder, norm=wanted)
    assert loaded.config.backbone.norm == wanted
    counters = [key for key in loaded.state_dict() if key.endswith("num_batches_tracked")]
    assert bool(counters) == (wanted == "bn")
    x = torch.rand(1, 3, 64, 64)
    assert largest_difference(model.backbone(x), loaded.backbone(x)) < 1e-4
