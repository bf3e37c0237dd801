import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from a2fpn.backbones import ALIASES, TimmBackbone, pretrained_statistics, resolve_backbone_name
from a2fpn.config import BackboneConfig
from tests.helpers import randomise, weighted_sum, with_zero_gradient

# One of each kind: maps at stride 2, classifier parts to leave out, sizes rounded down, channels last (NHWC).
FAMILIES = ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_byobnet"]
families = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, **options: object) -> TimmBackbone:
    return TimmBackbone(BackboneConfig(name, **options))


def check_maps(backbone: TimmBackbone, x: torch.Tensor) -> None:
    maps = backbone(x)
    assert tuple(maps) == backbone.out_spec.names == ("c2", "c3", "c4", "c5")
    assert backbone.out_spec.strides == (4, 8, 16, 32)
    for name, level in backbone.out_spec.items():
        assert maps[name].shape[:2] == (len(x), level.channels)
        # Networks round down or up, and nothing else.
        for side, got in zip(x.shape[-2:], maps[name].shape[-2:], strict=True):
            assert side // level.stride <= got <= -(-side // level.stride), name


@families
@pytest.mark.parametrize("size", [(64, 96), (97, 133)])
def test_maps_are_as_declared(name: str, size: tuple[int, int]) -> None:
    check_maps(build(name), torch.randn(2, 3, *size))


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
        # Swin insists on whole patches.
        check_maps(backbone, torch.empty(1, 3, *((100, 132) if "swin" in name else (97, 133))))


def test_swin_takes_images_of_any_size_and_gives_channels_first() -> None:
    backbone = build("swin_tiny").eval()
    check_maps(backbone, torch.randn(1, 3, 64, 96))


def test_wanted_strides_are_found_wherever_they_are() -> None:
    backbone = TimmBackbone(BackboneConfig("test_efficientnet"), strides=(8, 32))
    assert backbone.out_spec.names == ("c3", "c5")
    assert [tuple(x.shape[-2:]) for x in backbone(torch.randn(1, 3, 64, 96)).values()] == [(8, 12), (2, 3)]


@families
def test_gradient_to_every_parameter(name: str) -> None:
    backbone = build(name)
    # Residual branches start at zero, and let nothing through.
    randomise(backbone)
    weighted_sum(backbone(torch.randn(2, 3, 64, 96))).backward()
    assert with_zero_gradient(backbone) == []


def test_any_number_of_image_channels() -> None:
    check_maps(build("test_resnet", in_chans=5), torch.randn(1, 5, 64, 64))


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
    with pytest.raises(ValueError, match=r"weights\.safetensors' holds no weights of 'test_resnet'"):
        TimmBackbone(BackboneConfig("test_resnet"), weights=path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_holds_no_weights_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"This is not a file of weights.")
    with pytest.raises(ValueError, match=rf"{name}' holds no weights of 'test_resnet': "):
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
@pytest.mark.parametrize("trained", range(5))
def test_the_deepest_levels_are_trained_and_the_others_stay_as_they_are(name: str, trained: int) -> None:
    backbone = build(name, trainable_layers=trained).train()
    before = copy.deepcopy(backbone.state_dict())
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [x.requires_grad for x in maps.values()] == [level >= 4 - trained for level in range(4)]
    if trained:
        weighted_sum(maps).backward()
        torch.optim.SGD(backbone.parameters(), lr=1.0).step()
    changed = {key.split(".")[1] for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    stages = [child for child, _ in backbone.body.named_children() if child.startswith(("layer", "stages"))]
    assert stages[4 - trained :] == [stage for stage in stages if stage in changed]
    assert (changed <= set(stages)) == (trained < 4)


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


@pytest.mark.parametrize("number", [-1, 5])
def test_trainable_layers_are_at_most_the_levels(number: int) -> None:
    with pytest.raises(ValueError, match=f"trainable_layers must be between 0 and 4, got {number}"):
        build("test_resnet", trainable_layers=number)


def test_networks_whose_stages_cannot_be_told_apart_are_an_error() -> None:
    with pytest.raises(ValueError, match="trainable_layers=2 is not supported for 'test_efficientnet'"):
        build("test_efficientnet", trainable_layers=2)


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


def test_networks_without_the_wanted_maps_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'test_vit' has maps of stride \[16, 16, 16\], none of stride \[4, 8, 32\]"):
        build("test_vit")


def test_statistics_come_from_the_weights() -> None:
    assert pretrained_statistics("r50") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert pretrained_statistics("lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
