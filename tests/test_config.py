import collections
import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2fpn._serialize import from_dict, to_dict
from a2fpn.config import (
    BackboneConfig,
    Category,
    FCOSConfig,
    HTCConfig,
    KeypointRCNNConfig,
    ModelConfig,
    NeckConfig,
    PreprocessConfig,
    RCNNConfig,
    RetinaNetConfig,
    heads_type,
)
from a2fpn.detectors import DETECTORS

positive = st.integers(1, 4000)
unit = st.floats(0, 1, allow_nan=False)
above_zero = st.floats(1e-3, 1)
preprocess_configs = st.builds(
    PreprocessConfig,
    resize=st.sampled_from(["shortest_edge", "at_least", "none"]),
    min_size=positive,
    max_size=st.integers(4000, 32_768),
    mean=st.tuples(unit, unit, unit),
    std=st.tuples(above_zero, above_zero, above_zero),
    size_divisor=st.none() | st.integers(1, 1024),
)
head_configs = st.builds(
    RCNNConfig,
    anchor_sizes=st.none() | st.lists(st.lists(positive, min_size=1).map(tuple), max_size=5).map(tuple),
    anchor_ratios=st.lists(st.floats(0.01, 100), min_size=1).map(tuple),
    roi_aligned=st.booleans(),
    nms_threshold=unit,
)


def model_config(**overrides: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "architecture": "maskrcnn_fpn_r50",
            "detector": "maskrcnn",
            "backbone": BackboneConfig("resnet50.tv_in1k"),
            "neck": NeckConfig("fpn"),
            **overrides,
        }
    )


@given(preprocess=preprocess_configs, heads=head_configs, trainable=st.none() | st.integers(0, 4), names=st.data())
def test_a_config_survives_json(
    preprocess: PreprocessConfig, heads: RCNNConfig, trainable: int | None, names: st.DataObject
) -> None:
    texts = names.draw(st.lists(st.text(), min_size=1, max_size=4))
    config = model_config(
        backbone=BackboneConfig("resnet18", norm="frozen", trainable_layers=trainable),
        neck=NeckConfig("a2fpn", {"nodes": [4, 2], "attention": "dot", "norm_layer": None}),
        num_classes=len(texts),
        preprocess=preprocess,
        heads=heads,
        categories=tuple(Category(3 * i, text) for i, text in enumerate(texts)),
    )
    again = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
    assert again == config


def test_neck_arguments_are_equal_after_json_too() -> None:
    config = NeckConfig("a2fpn", {"nodes": (4, 2)})
    assert from_dict(NeckConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_neck_arguments_that_json_cannot_hold_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"neck argument 'norm_layer' must be a JSON value.*got <class 'int'>"):
        NeckConfig("fpn", {"norm_layer": int})


@pytest.mark.parametrize("detector", list(DETECTORS))
def test_no_two_sections_share_a_field(detector: str) -> None:
    # Overrides are flat keywords: each must have one section where it belongs.
    sections = (BackboneConfig, PreprocessConfig, heads_type(detector), ModelConfig)
    names = [f.name for section in sections for f in dataclasses.fields(section) if f.name != "name"]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


@pytest.mark.parametrize(
    "config",
    [BackboneConfig("x"), NeckConfig("x"), PreprocessConfig(), RCNNConfig(), Category(1, "x"), model_config()],
    ids=lambda config: type(config).__name__,
)
def test_configs_are_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("", "num_clases", "config: unknown key 'num_clases' for ModelConfig. Did you mean 'num_classes'?"),
        (
            "backbone",
            "norms",
            "config.backbone: unknown key 'norms' for BackboneConfig. Did you mean 'norm' or 'norm_eps'?",
        ),
        ("neck", "arg", "config.neck: unknown key 'arg' for NeckConfig. Did you mean 'args'?"),
        ("preprocess", "minsize", "config.preprocess: unknown key 'minsize' for PreprocessConfig. Did you mean 'min"),
        ("heads", "nms", "config.heads: unknown key 'nms' for RCNNConfig. Known: anchor_ratios, anchor_rounding, "),
    ],
)
def test_an_unknown_key_is_an_error_that_says_where(section: str, key: str, message: str) -> None:
    data = to_dict(model_config())
    (data[section] if section else data)[key] = 1
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_dict(ModelConfig, data)


@pytest.mark.parametrize("build", [RCNNConfig, heads_type("htc")])
@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [("mask_pool_size", (1, 128), (0, 129)), ("mask_boundary_weight", (1.0, 1000.0), (0.99, 1001.0, math.nan))],
)
def test_sizes_and_weights_of_the_mask_head_have_limits(build: Any, key: str, good: Any, bad: Any) -> None:
    for value in good:
        assert getattr(build(**{key: value}), key) == value
    for value in bad:
        with pytest.raises(ValueError, match=rf"{key} must be between 1 and \d+, got {value}"):
            build(**{key: value})


def test_numbers_of_a_neck_have_limits() -> None:
    """More levels would fill the memory before the neck could say so."""
    assert NeckConfig("fpn", {"out_channels": 65_536}).args == {"out_channels": 65_536}
    for number in (65_537, 10**9, math.nan):
        with pytest.raises(ValueError, match=rf"out_channels must be between -65536 and 65536, got {number}"):
            NeckConfig("fpn", {"out_channels": number})


@pytest.mark.parametrize(("build", "name"), [(RCNNConfig, "rpn_"), (heads_type("retinanet"), "")])
def test_what_is_negative_lies_below_what_is_positive(build: Any, name: str) -> None:
    build(**{f"{name}fg_iou": 0.4, f"{name}bg_iou": 0.4})
    with pytest.raises(ValueError, match=rf"{name}bg_iou=0\.5 must not be above {name}fg_iou=0\.4"):
        build(**{f"{name}fg_iou": 0.4, f"{name}bg_iou": 0.5})


@pytest.mark.parametrize("key", ["architecture", "detector", "backbone", "neck"])
def test_a_missing_key_is_an_error(key: str) -> None:
    data = to_dict(model_config())
    del data[key]
    with pytest.raises(ValueError, match=f"config: the key '{key}' of ModelConfig is missing"):
        from_dict(ModelConfig, data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_classes", "80", "config.num_classes: expected int, got '80'"),
        ("num_classes", 80.0, "config.num_classes: expected int, got 80.0"),
        ("num_classes", True, "config.num_classes: expected int, got True"),
        ("num_classes", None, "config.num_classes: expected int, got None"),
        ("backbone", "resnet50", "config.backbone: expected an object with the fields of BackboneConfig, got str"),
        ("backbone.name", 50, "config.backbone.name: expected str, got 50"),
        ("backbone.trainable_layers", "3", "config.backbone.trainable_layers: expected int, got '3'"),
        ("neck.args", [], "config.neck.args: expected an object, got []"),
        ("preprocess.mean", 0.5, "config.preprocess.mean: expected a list, got 0.5"),
        ("preprocess.mean", "0.5", "config.preprocess.mean: expected a list, got '0.5'"),
        ("preprocess.mean", [0.5, "x"], "config.preprocess.mean[1]: expected float, got 'x'"),
        ("preprocess.std", [True], "config.preprocess.std[0]: expected float, got True"),
        ("heads.roi_aligned", 1, "config.heads.roi_aligned: expected bool, got 1"),
        ("heads.anchor_sizes", [8, 16], "config.heads.anchor_sizes[0]: expected a list, got 8"),
        ("categories", [["cat"]], "config.categories[0]: expected an object with the fields of Category, got list"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_says_where(path: str, value: Any, message: str) -> None:
    data = to_dict(model_config())
    *sections, key = path.split(".")
    section = data
    for step in sections:
        section = section[step]
    section[key] = value
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        from_dict(ModelConfig, data)


@pytest.mark.parametrize(
    ("section", "key", "choices"),
    [
        ("preprocess", "resize", "'shortest_edge', 'at_least', 'none'"),
        ("backbone", "norm", "'bn', 'frozen', 'sync', 'gn'"),
    ],
)
def test_a_value_out_of_its_choices_is_an_error(section: str, key: str, choices: str) -> None:
    data = to_dict(model_config())
    data[section][key] = "other"
    with pytest.raises(ValueError, match=rf"config\.{section}\.{key}: expected one of {choices}, got 'other'"):
        from_dict(ModelConfig, data)


def test_whole_numbers_are_taken_for_floats() -> None:
    config = from_dict(PreprocessConfig, {"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert config.std == (1.0, 1.0, 1.0)
    assert all(isinstance(s, float) for s in config.mean + config.std)


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_a_config_must_be_an_object(data: Any) -> None:
    with pytest.raises(TypeError, match=r"here: expected an object with the fields of Category, got"):
        from_dict(Category, data, where="here")


@pytest.mark.parametrize("number", [0, -3])
def test_at_least_one_class(number: int) -> None:
    with pytest.raises(ValueError, match=rf"at least 1 \(there is no background class\), got {number}"):
        model_config(num_classes=number)


def test_one_category_per_class() -> None:
    with pytest.raises(ValueError, match=r"1 categories were given for num_classes=2"):
        model_config(num_classes=2, categories=(Category(1, "cat"),))


def test_as_many_statistics_as_image_channels() -> None:
    with pytest.raises(ValueError, match=r"in_chans=4 needs mean and std with 4 values each, got 3 and 3"):
        model_config(backbone=BackboneConfig("resnet18", in_chans=4))


def test_categories_have_ids_and_names_even_where_none_are_known() -> None:
    known = (Category(7, "cat"), Category(90, "dog"))
    assert model_config(num_classes=2, categories=known).labeled_categories == known
    assert model_config(num_classes=2).labeled_categories == (Category(1, "class 0"), Category(2, "class 1"))


@pytest.mark.parametrize(
    ("section", "name", "good", "bad"),
    [
        (PreprocessConfig, "size_divisor", (1, 1024), (0, -32, 1025, 15_000)),
        (PreprocessConfig, "max_size", (800, 32_768), (32_769, 10**6)),
        (RCNNConfig, "roi_sampling_ratio", (0, 64), (-1, 65)),
        (RCNNConfig, "box_pool_size", (1, 128), (0, 129)),
        (RCNNConfig, "box_channels", (1, 65_536), (0, 65_537)),
        (RCNNConfig, "detections_per_image", (1, 1_000_000), (0, 1_000_001)),
        (RCNNConfig, "rpn_post_nms_top_n_test", (1, 1_000_000), (0, 10**9)),
        (RCNNConfig, "rpn_batch_size", (1, 1_000_000), (0, -1)),
        (RCNNConfig, "score_threshold", (0.0, 1.0), (-0.1, 1.1, float("nan"))),
        (RCNNConfig, "rpn_nms_threshold", (0.0, 1.0), (-0.1, 1.1, float("nan"))),
        (RCNNConfig, "anchor_sizes", (((1,),), ((8192,),)), (((0,),), ((-8, 4),), ((8193,),))),
        (RCNNConfig, "anchor_ratios", ((0.01,), (100.0,)), ((0.0,), (-1.0,), (float("nan"),))),
        (RCNNConfig, "mask_upsample", ("carafe",), ("xx",)),
        (HTCConfig, "semantic_channels", (1,), (0, 10**6)),
        (KeypointRCNNConfig, "keypoint_pool_size", (1, 128), (0, 129)),
        (RetinaNetConfig, "fg_iou", (0.4, 1.0), (1.5,)),
        (RetinaNetConfig, "box_loss", ("giou",), ("xx",)),
        (FCOSConfig, "top_levels", (0, 8), (-1, 9)),
        (FCOSConfig, "candidates_per_level", (1,), (0,)),
        (FCOSConfig, "nms_threshold", (0.0, 1.0), (2.0,)),
    ],
)
def test_what_would_hurt_at_the_first_image_is_refused_when_it_is_set(
    section: Any, name: str, good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    for value in good:
        assert getattr(section(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=name):
            section(**{name: value})


def test_a_norm_that_does_not_exist_is_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'bn', 'frozen', 'sync', 'gn', got 'xx'"):
        BackboneConfig("resnet50", norm="xx")  # type: ignore[arg-type]
