import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import a2fpn
from a2fpn import Category, CheckpointError, ModelConfig, PyramidSpec
from a2fpn.backbones import ALIASES
from a2fpn.compose import MODELS, parse_name
from a2fpn.config import BackboneConfig, NeckConfig
from a2fpn.detectors import DETECTORS, OneStage
from a2fpn.necks import NECKS
from a2fpn.pretrained.catalog import PRETRAINED, EmbeddedWeights
from tests.helpers import random_target, randomize, tiny_model, tiny_options

CATEGORIES = (Category(7, "cell"), Category(23, "nucleus"), Category(90, "Zellkern"))
# Every alias gives several levels; simple_fpn wants one.
COMPOSABLE = [name for name in NECKS if name != "simple_fpn"]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is forgotten after it."""
    for registry in (MODELS, NECKS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture
def tiny_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> a2fpn.detectors.Detector:
    """A trained-looking model that is listed as ``maskrcnn_fpn_test_resnet.tiny``."""
    model = tiny_model("maskrcnn_fpn", backbone="test_resnet", categories=CATEGORIES)
    model.config = dataclasses.replace(model.config, architecture="maskrcnn_fpn_test_resnet")
    randomize(model)
    folder = a2fpn.save_pretrained(model, tmp_path / "tiny")
    monkeypatch.setitem(PRETRAINED, "maskrcnn_fpn_test_resnet.tiny", EmbeddedWeights(folder, "for tests"))
    return model


# Names


def test_models_are_all_combinations() -> None:
    names = a2fpn.list_models()
    assert len(names) == len(set(names))
    composed = {"_".join(parts) for parts in itertools.product(DETECTORS, COMPOSABLE, ALIASES)}
    # Whoever ran before, doctests too, may have registered more.
    assert set(names) == composed | set(MODELS)
    assert {"maskrcnn_a2fpn_r50", "maskrcnn_fpn_swin_tiny", "fasterrcnn_a2fpn_lite_r18"} <= set(names)


def test_models_come_by_pattern_in_natural_order() -> None:
    assert a2fpn.list_models("maskrcnn_fpn_r*") == [f"maskrcnn_fpn_r{depth}" for depth in (18, 34, 50, 101)]
    assert a2fpn.list_models("fasterrcnn_pafpn_r5") == ["fasterrcnn_pafpn_r50"]
    assert a2fpn.list_models("yolo") == []
    assert a2fpn.list_models("*nuclei", pretrained=True) == ["maskrcnn_a2fpn_lite0.nuclei"]


@pytest.mark.parametrize(
    "name", [f"maskrcnn_{neck}_r18" for neck in COMPOSABLE] + [f"{detector}_fpn_lite0" for detector in DETECTORS]
)
def test_listed_models_can_be_built(name: str) -> None:
    assert name in a2fpn.list_models()
    with torch.device("meta"):
        model = a2fpn.create_model(name)
    assert model.config.architecture == name
    finest = 8 if issubclass(DETECTORS[name.partition("_")[0]], OneStage) else 4
    assert model.spec.strides == tuple(finest << level for level in range(5))


@pytest.mark.parametrize(("detector", "neck"), list(itertools.product(DETECTORS, COMPOSABLE)))
def test_every_name_says_what_it_is(detector: str, neck: str) -> None:
    for alias, backbone in ALIASES.items():
        name = f"{detector}_{neck}_{alias}"
        config = parse_name(name, None)
        assert config.architecture == name
        assert (config.detector, config.neck.name, config.backbone.name) == (detector, neck, backbone)


def test_any_timm_name_can_be_written_out() -> None:
    model = tiny_model("fasterrcnn_fpn_test_resnet", backbone=None)
    assert model.config.backbone.name == "test_resnet"
    assert parse_name("maskrcnn_a2fpn_lite_resnet26d.bt_in1k", None).backbone.name == "resnet26d.bt_in1k"


def test_backbone_may_be_an_argument() -> None:
    assert tiny_model("fasterrcnn_fpn", backbone="test_resnet").config.backbone.name == "test_resnet"
    assert tiny_model("fasterrcnn_fpn_r50", backbone="test_resnet").config.backbone.name == "test_resnet"


def test_models_for_the_cpu_are_narrow() -> None:
    config = parse_name("maskrcnn_a2fpn_lite0", None)
    assert config.neck.args == {"out_channels": 96}
    assert (config.heads.box_channels, config.heads.mask_channels) == (512, 96)
    # The rest of a registered model stays when its backbone is replaced.
    replaced = parse_name("maskrcnn_a2fpn_lite0", "r18")
    assert replaced == dataclasses.replace(config, backbone=BackboneConfig("resnet18.tv_in1k"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maskrcnn_a2fpm_r50", r"Unknown model 'maskrcnn_a2fpm_r50'\. Did you mean 'maskrcnn_a2fpn_r50'"),
        ("maskrcnn_fpn_r51", r"Unknown model 'maskrcnn_fpn_r51'\. Did you mean 'maskrcnn_fpn_r5?\d"),
        ("maskrcnn_a2fpn_lite_resnet5O", r"Unknown model 'maskrcnn_a2fpn_lite_resnet5O'"),
        ("resnet50", r"Unknown model 'resnet50'"),
        ("", r"Unknown model ''"),
        (
            "maskrcnn_a2fpn",
            r"Model 'maskrcnn_a2fpn' needs a backbone: create_model\('maskrcnn_a2fpn', backbone='r50'\)",
        ),
    ],
)
def test_an_unknown_model_is_an_error_with_the_closest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a2fpn.create_model(name)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_clases": 3}, ValueError, r"Unknown argument 'num_clases' of a model\. Did you mean 'num_classes'"),
        ({"min_sise": 3}, ValueError, r"Unknown argument 'min_sise' of a model\. Did you mean 'min_size'"),
        ({"backbon": "r50"}, ValueError, r"Unknown argument 'backbon' of a model\. Did you mean 'backbone'"),
        ({"name": "x"}, TypeError, "multiple values for argument 'name'"),
        ({"architecture": "x"}, ValueError, r"Unknown argument 'architecture' of a model"),
        ({"min_size": "800"}, TypeError, r"preprocess\.min_size: expected int, got '800'"),
        ({"anchor_sizes": [8, 16]}, TypeError, r"heads\.anchor_sizes\[0\]: expected a list, got 8"),
        ({"norm": "group"}, ValueError, r"backbone\.norm: expected one of 'bn', 'frozen', 'sync', 'gn', got 'group'"),
        ({"min_size": 2000}, ValueError, "Expected 1 <= min_size <= max_size, got 2000 and 1333"),
        ({"neck": "a2fnp"}, ValueError, r"Unknown neck 'a2fnp'\. Did you mean 'a2fpn'"),
        (
            {"neck_args": {"chanels": 8}},
            ValueError,
            r"Neck 'fpn' has no argument 'chanels'\. Did you mean 'out_channels'",
        ),
        ({"neck_args": {"norm_layer": nn.BatchNorm2d}}, TypeError, "'norm_layer' must be a JSON value"),
        ({"backbone": "resnet5O"}, ValueError, r"Unknown backbone 'resnet5O'\. Did you mean 'resnet50'"),
        ({"in_chans": 4}, ValueError, "in_chans=4 needs mean and std with 4 values each"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"num_classes": 2, "categories": CATEGORIES}, ValueError, "3 categories were given for num_classes=2"),
        ({"categories": [{"id": 1, "nme": "x"}]}, ValueError, r"categories: unknown key 'nme' for Category"),
        ({"backbone_weights": "no/such.pth"}, FileNotFoundError, r"Backbone weights 'no/such\.pth' do not exist"),
    ],
)
def test_wrong_arguments_are_an_error(overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        a2fpn.create_model("fasterrcnn_fpn", **{"backbone": "test_resnet", **overrides})


def test_one_stage_detectors_start_at_stride_8() -> None:
    for name in ("retinanet_a2fpn_r50", "fcos_fpn_lite0", "retinanet_bifpn_test_resnet"):
        config = parse_name(name, None)
        assert config.backbone.strides == (8, 16, 32)
        assert config.neck.args["extra_levels"] == 0
    assert parse_name("maskrcnn_a2fpn_r50", None).backbone.strides == (4, 8, 16, 32)
    # What the detector wants of its neck is kept when the neck is replaced, as far as it has such arguments.
    assert tiny_model("fcos_fpn", neck="pafpn").config.neck == NeckConfig(
        "pafpn", {"extra_levels": 0, "out_channels": 16}
    )


def test_strides_may_be_chosen() -> None:
    model = tiny_model("retinanet_fpn", strides=[4, 8, 16], top_levels=1, anchor_sizes=None)
    assert model.config.backbone.strides == (4, 8, 16)
    assert model.spec.strides == (4, 8, 16, 32)
    assert a2fpn.create_backbone("test_resnet", strides=[8, 32]).out_spec.strides == (8, 32)


# Overrides


@pytest.mark.parametrize(
    ("section", "overrides"),
    [
        ("backbone", {"norm": "frozen", "trainable_layers": 2}),
        ("preprocess", {"resize": "at_least", "min_size": 100, "max_size": 200, "size_divisor": 64}),
        ("preprocess", {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}),
        ("heads", {"anchor_sizes": ((8, 9),) * 5, "roi_aligned": True, "nms_threshold": 0.4}),
        ("heads", {"rpn_batch_size": 7, "mask_layers": 2, "detections_per_image": 500}),
    ],
)
def test_overrides_reach_their_section(section: str, overrides: dict[str, Any]) -> None:
    default = tiny_model("maskrcnn_fpn", backbone="test_resnet").config
    changed = tiny_model("maskrcnn_fpn", backbone="test_resnet", **overrides).config
    expected = dataclasses.replace(getattr(default, section), **overrides)
    assert changed == dataclasses.replace(default, **{section: expected})


def test_overrides_reach_the_neck() -> None:
    arguments = {"nodes": [4, 4, 4, 4], "attention": "dot"}
    model = tiny_model("fasterrcnn_a2fpn", neck_args=arguments)
    assert model.config.neck == NeckConfig("a2fpn", {"out_channels": 16, **arguments})
    assert model.neck.context.attention == "dot"
    assert arguments == {"nodes": [4, 4, 4, 4], "attention": "dot"}


def test_another_neck_keeps_the_channels_alone() -> None:
    config = a2fpn.create_model("fasterrcnn_a2fpn_lite0", neck="pafpn", neck_args={"extra_levels": 1}).config
    assert config.neck == NeckConfig("pafpn", {"out_channels": 96, "extra_levels": 1})


def test_arguments_are_only_read() -> None:
    overrides = {
        **tiny_options("fasterrcnn"),
        "categories": [{"id": 5, "name": "x"}],
        "num_classes": 1,
        "neck_args": {"out_channels": 8},
    }
    copy = {**overrides, "neck_args": dict(overrides["neck_args"])}
    a2fpn.create_model("fasterrcnn_fpn", **overrides)
    assert overrides == copy


def test_categories_say_how_many_classes_there_are() -> None:
    model = tiny_model("fasterrcnn_fpn", num_classes=None, categories=[{"id": 4, "name": "cat"}, Category(2, "dog")])
    assert model.config.num_classes == 2
    assert model.config.categories == (Category(4, "cat"), Category(2, "dog"))


def test_without_a_number_there_are_80_classes_and_no_categories() -> None:
    model = tiny_model("fasterrcnn_fpn", num_classes=None)
    assert model.config.num_classes == 80
    assert model.config.categories == ()
    assert model.roi_heads.box_predictor.cls_score.out_features == 81


def test_statistics_are_those_of_the_backbone_unless_given() -> None:
    half = (0.5, 0.5, 0.5)
    assert tiny_model("fasterrcnn_fpn_lite0", backbone=None).config.preprocess.mean == half
    assert tiny_model("fasterrcnn_fpn", backbone="r18").config.preprocess.mean == (0.485, 0.456, 0.406)
    assert tiny_model("fasterrcnn_fpn", mean=[0.0, 0.1, 0.2]).config.preprocess.mean == (0.0, 0.1, 0.2)


def test_a_new_model_is_in_training_mode() -> None:
    assert tiny_model("fasterrcnn_fpn").training


def test_one_seed_makes_one_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(tiny_model().state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# Weights


def test_local_backbone_weights_arrive_and_freeze_the_norm(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    model = tiny_model("fasterrcnn_fpn", backbone="test_resnet", backbone_weights=path)
    assert model.config.backbone.norm == "frozen"
    assert torch.equal(model.backbone.body.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    trained = tiny_model("fasterrcnn_fpn", backbone="test_resnet", backbone_weights=path, norm="bn")
    assert trained.config.backbone.norm == "bn"
    assert tiny_model("fasterrcnn_fpn", backbone="test_resnet").config.backbone.norm == "bn"


def test_a_name_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no pretrained weights for 'maskrcnn_a2fpn_r51'\. Did .*tv_coco_graft'"):
        a2fpn.create_model("maskrcnn_a2fpn_r51", pretrained=True)


@pytest.mark.parametrize("name", ["maskrcnn_fpn_test_resnet", "maskrcnn_fpn_test_resnet.tiny"])
def test_pretrained_is_as_it_was_trained(tiny_weights: a2fpn.detectors.Detector, name: str) -> None:
    for model in (a2fpn.create_model(name, pretrained=True), a2fpn.from_pretrained(name)):
        assert model.config == tiny_weights.config
        assert not model.training
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in tiny_weights.state_dict().items())


def test_a_tag_without_weights_is_the_config_alone(tiny_weights: a2fpn.detectors.Detector) -> None:
    model = a2fpn.create_model("maskrcnn_fpn_test_resnet.tiny")
    assert model.config == tiny_weights.config
    assert model.training
    assert not torch.equal(model.neck.lateral[0].conv.weight, tiny_weights.neck.lateral[0].conv.weight)


@pytest.mark.parametrize("argument", ["backbone", "backbone_weights"])
def test_the_backbone_of_a_checkpoint_stays(tiny_weights: a2fpn.detectors.Detector, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"The {argument} of a checkpoint cannot be replaced; .*'test_resnet'"):
        a2fpn.create_model("maskrcnn_fpn_test_resnet.tiny", pretrained=True, **{argument: "r18"})


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"categories": [Category(i, f"c{i}") for i in range(5)]}])
def test_another_number_of_classes_renews_what_depends_on_it(
    tiny_weights: a2fpn.detectors.Detector, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="a2fpn"):
        model = a2fpn.from_pretrained("maskrcnn_fpn_test_resnet", **options)
    assert model.config.num_classes == 5
    assert model.config.categories == tuple(options.get("categories", ()))
    before, after = tiny_weights.state_dict(), model.state_dict()
    renewed = {
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    }
    assert renewed == {
        f"roi_heads.{layer}.{kind}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        for kind in ("weight", "bias")
    }
    assert "num_classes 3 -> 5: re-initialized tensors" in caplog.text
    assert all(key in caplog.text for key in renewed)
    # The new heads train.
    target = random_target([[5.0, 5.0, 40.0, 50.0]], (64, 64), classes=5)
    assert all(loss.isfinite() for loss in model.train()([torch.rand(3, 64, 64)], [target]).values())


def test_the_same_number_of_classes_renews_nothing(
    tiny_weights: a2fpn.detectors.Detector, caplog: pytest.LogCaptureFixture
) -> None:
    others = [Category(i, f"other {i}") for i in range(3)]
    model = a2fpn.from_pretrained("maskrcnn_fpn_test_resnet", num_classes=3, categories=others)
    assert model.config.categories == tuple(others)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in tiny_weights.state_dict().items())
    assert "re-initialized tensors" not in caplog.text


def test_overrides_that_leave_the_weights_alone(tiny_weights: a2fpn.detectors.Detector) -> None:
    model = a2fpn.from_pretrained("maskrcnn_fpn_test_resnet", score_threshold=0.3, resize="none")
    assert model.config.heads.score_threshold == 0.3
    assert model.roi_heads.score_thresh == 0.3
    assert model.preprocess.target_size(5, 7) == (5, 7)


@pytest.mark.parametrize("overrides", [{"neck_args": {"out_channels": 8}}, {"box_channels": 8}, {"neck": "pafpn"}])
def test_overrides_that_change_the_weights_are_an_error(
    tiny_weights: a2fpn.detectors.Detector, overrides: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="The weights do not match the model: tensors"):
        a2fpn.from_pretrained("maskrcnn_fpn_test_resnet", **overrides)


def test_a_source_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'maskrcnn_a2fpn_lite0\.nucli' is neither a checkpoint folder.*Did you mean"):
        a2fpn.from_pretrained("maskrcnn_a2fpn_lite0.nucli")


@pytest.mark.parametrize("name", [name for name, weights in PRETRAINED.items() if isinstance(weights, EmbeddedWeights)])
def test_weights_in_the_package_exist_and_load(name: str) -> None:
    model = a2fpn.from_pretrained(name)
    assert model.config.architecture == name.partition(".")[0]
    assert len(model.config.categories) == model.config.num_classes
    assert all(p.isfinite().all() for p in model.parameters())


# Registering


def test_a_registered_model_is_a_model(registries: None) -> None:
    @a2fpn.register_model("tiny")
    def tiny() -> ModelConfig:
        return ModelConfig("tiny", "fasterrcnn", BackboneConfig("test_resnet"), NeckConfig("fpn", {"out_channels": 8}))

    assert "tiny" in a2fpn.list_models()
    assert a2fpn.create_model("tiny", num_classes=2).config == dataclasses.replace(
        tiny(), num_classes=2, preprocess=a2fpn.create_model("tiny").config.preprocess
    )
    other = a2fpn.create_model("tiny", backbone="test_efficientnet")
    assert other.config.backbone.name == "test_efficientnet"
    assert other.neck.out_channels == 8
    with pytest.raises(ValueError, match="The model name 'tiny' is already registered"):
        a2fpn.register_model("tiny")(tiny)


def test_a_registered_neck_is_a_neck(registries: None) -> None:
    @a2fpn.register_neck("top_only")
    class TopOnly(a2fpn.Neck):
        def __init__(self, in_spec: PyramidSpec, *, out_channels: int = 8, gain: float = 1.0) -> None:
            super().__init__(in_spec, out_channels=out_channels)
            self.gain = gain
            self.layers = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_spec.channels)

        def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
            return [self.gain * layer(x) for layer, x in zip(self.layers, features, strict=True)]

    assert "top_only" in a2fpn.list_necks()
    assert "maskrcnn_top_only_r50" in a2fpn.list_models()
    model = tiny_model("maskrcnn_top_only_test_resnet", backbone=None, neck_args={"gain": 2.0})
    assert isinstance(model.neck, TopOnly)
    assert model.neck.gain == 2.0
    assert len(model.eval()([torch.rand(3, 50, 70)])) == 1
    with pytest.raises(ValueError, match=r"Neck 'top_only' has no argument 'gian'\. Did you mean 'gain'"):
        a2fpn.create_neck("top_only", PyramidSpec.from_channels([8], strides=[8]), gian=1)


def test_backbones_come_by_name_and_option() -> None:
    backbone = a2fpn.create_backbone("test_resnet", norm="frozen", in_chans=1)
    assert backbone(torch.rand(1, 1, 32, 32))["c5"].shape[-2:] == (1, 1)
    with pytest.raises(ValueError, match=r"create_backbone: unknown key 'in_chan' .*Did you mean 'in_chans'"):
        a2fpn.create_backbone("test_resnet", in_chan=1)


def test_a_tagged_name_does_not_start_from_a_pretrained_backbone() -> None:
    with pytest.raises(ValueError, match=r"names trained weights\. Pass pretrained=True to load them, or omit"):
        a2fpn.create_model("maskrcnn_a2fpn_lite0.nuclei", pretrained_backbone=True)


@pytest.mark.parametrize("name", [None, 50, b"maskrcnn_fpn_r50"])
def test_a_name_of_another_kind_is_an_error(name):
    with pytest.raises(TypeError, match=f"A model name must be a string .*, got a {type(name).__name__}"):
        a2fpn.create_model(name)
    with pytest.raises(TypeError, match=f"A checkpoint must be a folder, .*, got a {type(name).__name__}"):
        a2fpn.from_pretrained(name)


def test_an_empty_backbone_is_the_one_that_is_named():
    with pytest.raises(ValueError, match="Unknown backbone ''"):
        a2fpn.create_model("maskrcnn_fpn", backbone="")
