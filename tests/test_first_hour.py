"""Input of the first hour: words of other libraries, and data as people have it."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import a2fpn
from a2fpn._words import MODEL, OPTIONS, PREDICTION, RESULT, SETTINGS, advice_on_model
from a2fpn.cli import main
from a2fpn.cli.app import app
from a2fpn.config import Category
from a2fpn.data import CocoDataset, encode_masks, read_image
from a2fpn.inference import FoundObject
from a2fpn.inference.result import Result
from a2fpn.pretrained.catalog import PRETRAINED, TorchvisionWeights
from a2fpn.training.config import DataSection, StreamSection
from a2fpn.training.settings import setting_names, type_of
from a2fpn.training.sources import open_training_set, open_validation_set
from tests.helpers import tiny_model

LIVELY = {
    "score_threshold": 0.05,
    "detections_per_image": 100,
    "num_classes": 2,
    "min_size": 64,
    "categories": ["cat", "dog"],
}


@pytest.fixture(scope="module")
def model() -> a2fpn.Detector:
    """A detector whose objects score anything between 0 and 1."""
    torch.manual_seed(0)
    model = tiny_model("maskrcnn_fpn", **LIVELY).eval()
    with torch.no_grad():
        model.get_submodule("roi_heads.box_predictor.cls_score").weight.mul_(SPREAD)
    return model


@pytest.fixture(scope="module")
def predictor(model: a2fpn.Detector) -> a2fpn.Predictor:
    return a2fpn.Predictor(model)


SPREAD = 300.0
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


def result() -> Result:
    return Result(
        boxes=np.array([[0, 0, 4, 4], [4, 0, 9, 5], [1, 1, 3, 3]], dtype=np.float32),
        scores=np.array([0.9, 0.5, 0.2], dtype=np.float32),
        labels=np.array([1, 0, 1]),
        size=(8, 10),
        categories=(Category(1, "cat"), Category(2, "dog"), Category(3, "cow")),
        rles=tuple(encode_masks(np.arange(80).reshape(1, 8, 10) < [[[5]], [[9]], [[70]]])),
        image=np.zeros((8, 10, 3), dtype=np.uint8),
    )


# One threshold


def test_a_call_leaves_out_what_scores_less_than_a_half_and_its_picture_shows_all_of_it(
    predictor: a2fpn.Predictor,
) -> None:
    every = predictor(PIXELS, score_threshold=0)
    assert {bool(score < 0.5) for score in every.scores} == {True, False}, "needs objects on both sides"
    default = predictor(PIXELS)
    assert default.scores.tolist() == [score for score in every.scores.tolist() if score >= 0.5]
    assert default.score_threshold == 0.5
    assert default.plot().tobytes() == default.plot(score_threshold=0.5).tobytes()
    some = predictor(PIXELS, score_threshold=0.3)
    assert some.plot().tobytes() == some.plot(score_threshold=0).tobytes() != default.plot().tobytes()


def test_a_model_that_was_told_to_keep_everything_does() -> None:
    all_of_it = tiny_model("maskrcnn_fpn", **{**LIVELY, "score_threshold": 0.0}).eval()
    assert len(a2fpn.Predictor(all_of_it)(PIXELS)) == len(a2fpn.Predictor(all_of_it)(PIXELS, score_threshold=0))


def test_evaluation_takes_all_scores_of_the_model(predictor: a2fpn.Predictor) -> None:
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert len(predictor.predict([tensor])[0]) == len(predictor(PIXELS, score_threshold=0))


def test_a_model_that_is_stricter_than_a_half_stays_so() -> None:
    strict = tiny_model("maskrcnn_fpn", **{**LIVELY, "score_threshold": 0.99}).eval()
    every = a2fpn.Predictor(strict)(PIXELS, score_threshold=0).scores
    assert (every < 0.99).any()
    assert len(a2fpn.Predictor(strict)(PIXELS)) == int((every > 0.99).sum())


# Results


def test_a_result_is_indexed_as_lists_arrays_and_classes_are() -> None:
    found = result()
    first = found[0]
    assert isinstance(first, FoundObject)
    assert (first.name, first.label, first.box.tolist()) == ("dog", 1, [0, 0, 4, 4])
    assert first.score == pytest.approx(0.9)
    assert found[-1].name == "dog"
    assert [thing.name for thing in found] == ["dog", "cat", "dog"]
    for index, kept in (
        (slice(1, None), [0.5, 0.2]),
        ("dog", [0.9, 0.2]),
        ("cow", []),
        ([2, 0], [0.2, 0.9]),
        ([], []),
        (found.scores > 0.4, [0.9, 0.5]),
        (torch.tensor([False, True, False]), [0.5]),
    ):
        assert found[index].scores.tolist() == pytest.approx(kept)
        assert len(found[index].rles or ()) == len(kept)
    assert repr(first) == "<dog 0.90 at [0, 0, 4, 4]>"


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (3, IndexError, "3"),
        ("bird", ValueError, r"Unknown class 'bird'\. Known: cat, cow, dog\."),
        (0.5, TypeError, r"selected by a number, a slice, a class, a list of numbers or a mask, got 0\.5"),
        ([True, False], IndexError, "boolean"),
    ],
)
def test_a_wrong_index_is_an_error(index: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        result()[index]  # type: ignore[call-overload]


def test_the_mask_of_an_object_is_that_of_the_result(predictor: a2fpn.Predictor) -> None:
    found = predictor(PIXELS, score_threshold=0)
    assert found.masks is not None
    for position, thing in enumerate(found):
        assert thing.mask is not None
        np.testing.assert_array_equal(thing.mask, found.masks[position])


def test_a_notebook_shows_the_picture_and_nothing_where_there_is_none() -> None:
    found = result()
    content = found._repr_png_()
    assert content is not None
    assert Image.open(io.BytesIO(content)).size == found.plot().size
    gone = Result(found.boxes, found.scores, found.labels, found.size, found.categories, path="gone.png")
    assert gone._repr_png_() is None
    assert Result(found.boxes, found.scores, found.labels, found.size, found.categories)._repr_png_() is None


def test_the_picture_of_a_notebook_is_never_huge() -> None:
    wide = Result(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (20, 4000), ())
    content = Result(**{**vars(wide), "image": np.zeros((20, 4000, 3), np.uint8)})._repr_png_()
    assert content is not None
    assert Image.open(io.BytesIO(content)).width == 1600


def test_tab_finds_what_is_imported_late_and_the_options() -> None:
    assert {"Predictor", "Result", "create_model", "optimize_for_inference"} <= set(dir(a2fpn))
    import inspect

    for function in (a2fpn.Predictor, a2fpn.Predictor.__call__, a2fpn.Predictor.predict):
        names = set(inspect.signature(function).parameters)
        assert {"score_threshold", "nms_threshold", "tile", "overlap", "tta"} <= names
        assert "options" not in names


# Words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("conf", "Did you mean 'score_threshold'"),
        ("box_nms_thresh", "Did you mean 'nms_threshold'"),
        ("max_det", "Did you mean 'max_objects'"),
        ("score_treshold", "Did you mean 'score_threshold'"),
        ("imgsz", "min_size=800"),
        ("device", "Predictor\\(model, device="),
        ("verbose", "without output"),
    ],
)
def test_an_unknown_option_is_named_with_what_was_meant(predictor: a2fpn.Predictor, word: str, message: str) -> None:
    for call in (
        lambda: predictor(PIXELS, **{word: 1}),
        lambda: predictor.predict([torch.zeros(3, 64, 64)], **{word: 1}),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'. .*{message}"):
            call()


def test_every_word_leads_to_a_name_that_exists_or_to_a_sentence() -> None:
    from a2fpn.config import BackboneConfig, PreprocessConfig, RCNNConfig
    from a2fpn.inference import PredictOptions

    parts = (BackboneConfig, PreprocessConfig, RCNNConfig)
    arguments = {f.name for part in parts for f in dataclasses.fields(part)} | {"num_classes", "categories"}
    known = {
        "prediction": (PREDICTION, {f.name for f in dataclasses.fields(PredictOptions)}),
        "model": (MODEL, arguments | {"pretrained_backbone"}),
        "settings": (SETTINGS, {*setting_names(), "model.overrides.min_size"}),
        "result": (RESULT, {name for name in dir(result()) if not name.startswith("_")}),
    }
    for kind, (words, names) in known.items():
        for word, meaning in words.items():
            assert meaning in names or " " in meaning, (kind, word, meaning)
            assert word not in names or kind == "model", (kind, word)
    assert type_of("model.overrides.min_size")
    commands = [get_command(app).commands[name] for name in ("predict", "evaluate")]  # type: ignore[attr-defined]
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    for meaning in OPTIONS.values():
        assert meaning.split()[0] in {*options, "IMAGES"}, meaning


def test_an_unknown_attribute_of_a_result_is_named_with_what_was_meant() -> None:
    found = result()
    with pytest.raises(AttributeError, match=r"no attribute 'xyxy'\. Did you mean 'boxes'"):
        found.xyxy  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"result\.plot\(\)\.save"):
        found.show()  # type: ignore[attr-defined]
    assert not hasattr(found, "_ipython_display_")


@pytest.mark.parametrize("weights", [w for w in PRETRAINED.values() if isinstance(w, TorchvisionWeights)])
def test_torchvisions_names_lead_to_its_weights(weights: TorchvisionWeights) -> None:
    ours = next(name for name, listed in PRETRAINED.items() if listed is weights)
    builder = weights.builder
    if weights.tag == "COCO_V1":
        with pytest.raises(ValueError, match=re.escape(f"Did you mean '{ours}'?")):
            a2fpn.create_model(builder)
        with pytest.raises(ValueError, match=re.escape(f"Did you mean '{ours}'?")):
            a2fpn.create_model(builder, pretrained=True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mask_rcnn_R_50_FPN_3x.yaml", "'maskrcnn_fpn_r50'"),
        ("faster_rcnn_R_101_FPN_3x", "'fasterrcnn_fpn_r101'"),
        ("mask-rcnn_r50_fpn_1x_coco", "'maskrcnn_fpn_r50'"),
        ("cascade-mask-rcnn_r50_fpn_1x_coco", "'cascademaskrcnn_fpn_r50'"),
        ("htc_r50_fpn_1x_coco", "'htc_fpn_r50'"),
        ("mask-rcnn_r50_pafpn_1x_coco", "'maskrcnn_pafpn_r50'"),
        ("yolov8n-seg.pt", "yolov8n-seg is not available"),
        ("yolo11n", "yolo11n is not available"),
    ],
)
def test_names_of_other_libraries_lead_to_ours(name: str, advice: str) -> None:
    assert advice in str(advice_on_model(name))
    with pytest.raises(ValueError, match=re.escape(advice)):
        a2fpn.create_model(name)
    for suggestion in re.findall(r"'(\w+)'", str(advice_on_model(name))):
        assert suggestion in a2fpn.list_models(suggestion)


@pytest.mark.parametrize("name", ["maskrcnn_a2fpn_lite_r50", "htc_fpn_swin_tiny", "nonsense", ""])
def test_names_of_our_own_are_no_words_of_others(name: str) -> None:
    assert name == "" or advice_on_model(name) is None or name in a2fpn.list_models()


def test_a_backbone_alone_is_no_detector() -> None:
    with pytest.raises(ValueError, match=r"It is a backbone: .*'maskrcnn_fpn_resnet18'"):
        a2fpn.create_model("resnet18")


# Models


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["cat", "dog"], (Category(1, "cat"), Category(2, "dog"))),
        ({0: "cat", 7: "dog"}, (Category(0, "cat"), Category(7, "dog"))),
        ([{"id": 3, "name": "cat"}, Category(4, "dog")], (Category(3, "cat"), Category(4, "dog"))),
    ],
)
def test_categories_come_as_people_have_them(given: object, expected: tuple[Category, ...]) -> None:
    built = a2fpn.create_model("fasterrcnn_fpn", backbone="test_resnet", categories=given)
    assert (built.config.categories, built.config.num_classes) == (expected, 2)


class OwnNeck(nn.Module):
    pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"categories": "cat"}, "expected a list of names"),
        ({"categories": [3]}, "expected an object"),
        ({"num_classes": ["cat"]}, r"Pass class names as categories=\[\.\.\.\]"),
        ({"num_classes": True}, "num_classes must be a number"),
        ({"neck": OwnNeck}, r"got OwnNeck\. Register the class with @a2fpn\.register_neck"),
        ({"neck": OwnNeck()}, r"got OwnNeck\. Register the class"),
        ({"backbone": nn.Conv2d(3, 3, 1)}, r"got a Conv2d\. .*register_model"),
        ({"weights_backbone": "DEFAULT"}, "Did you mean 'pretrained_backbone'"),
        ({"nc": 3}, "Did you mean 'num_classes'"),
        ({"weights": "DEFAULT"}, "pretrained=True"),
        ({"pretrained": "best.pth"}, r"pretrained must be True or False, got 'best\.pth'\. .*from_pretrained"),
        ({"pretrained_backbone": "r50.pth"}, "backbone_weights=FILE"),
    ],
)
def test_arguments_of_another_kind_are_told_in_a_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a2fpn.create_model("fasterrcnn_fpn", **{"backbone": "test_resnet", **arguments})


def test_a_batch_is_as_good_as_a_list(model: a2fpn.Detector) -> None:
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for batched, alone in zip(model(images), model(list(images)), strict=True):
            assert torch.equal(batched["boxes"], alone["boxes"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.rand(3, 64, 96), r"got a tensor \(3, 64, 96\)\. For one image: model\(\[image\]\)"),
        ("image.png", r"got a str\. Files, arrays and PIL images go to a2fpn\.Predictor"),
        (["image.png"], "got a list of str"),
        (PIXELS, "got a ndarray"),
        ([PIXELS], "got a list of ndarray"),
        (Image.new("RGB", (8, 8)), "got a Image"),
        (None, "got a NoneType"),
    ],
)
def test_what_a_detector_does_not_take_is_told_in_a_sentence(
    model: a2fpn.Detector, given: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    half = tiny_model("fasterrcnn_fpn").to(dtype).eval()
    with pytest.raises(TypeError, match=r"autocast.*optimize_for_inference"):
        half([torch.rand(3, 64, 64)])


@pytest.mark.parametrize("word", ["predict", "val", "fit", "save", "export", "save_pretrained", "push_to_hub"])
def test_methods_of_other_libraries_say_where_it_is_done(model: a2fpn.Detector, word: str) -> None:
    with pytest.raises(TypeError, match="a2fpn"):
        getattr(model, word)("image.jpg", data="coco.yaml")


def test_train_is_a_mode_and_no_run() -> None:
    built = tiny_model("fasterrcnn_fpn")
    assert built.eval().train() is built
    assert built.training
    assert not built.train(False).training
    with pytest.raises(TypeError, match="a2fpn train --config finetune_folder"):
        built.train(data="coco.yaml", epochs=3)
    with pytest.raises(TypeError, match="a2fpn train"):
        built.train("coco.yaml")  # type: ignore[arg-type]


# Necks


def test_maps_without_names_are_told_by_type_and_shapes(model: a2fpn.Detector) -> None:
    spec = model.neck.in_spec
    maps = [torch.rand(1, level.channels, 64 // level.stride, 64 // level.stride) for level in spec.values()]
    for given, shown in ((maps, "a list of 4: "), (tuple(maps), "a tuple of 4: "), (maps[0], "a tensor (1, ")):
        with pytest.raises(TypeError, match="Expected feature maps by name") as caught:
            model.neck(given)
        assert shown in str(caught.value)
        assert "dict(zip(neck.in_spec.names, maps))" in str(caught.value)
        assert len(str(caught.value)) < 400
    assert model.neck(dict(zip(spec.names, maps, strict=True))).keys() == model.neck.out_spec.keys()


class Wrong(a2fpn.Neck):
    """A neck whose second level is changed."""

    def __init__(self, change: str) -> None:
        super().__init__(a2fpn.PyramidSpec.from_channels([8] * 4), out_channels=8)
        self.change = change

    def fuse(self, features: list[torch.Tensor], valid: object) -> list[torch.Tensor]:
        x = features[1]
        changed = {
            "": [x],
            "size": [x[..., ::2, ::2]],
            "channels": [torch.cat([x, x], dim=1)],
            "levels": [x] * 4,
        }[self.change]
        return [features[0], *changed, *features[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("size", r"declares level p3 with 8 channels at stride 8, which is \(1, 8, 8, 12\) here, and .*\(1, 8, 4, 6\)"),
        ("channels", r"and returned \(1, 16, 8, 12\)"),
        ("levels", "declares 5 levels and returned 7"),
    ],
)
def test_a_neck_that_returns_another_pyramid_than_it_declares_is_told(change: str, message: str) -> None:
    maps = {f"c{i}": torch.rand(1, 8, 64 // (1 << i), 96 // (1 << i)) for i in range(2, 6)}
    maps["c3"] = torch.rand(1, 8, 8, 12)
    with pytest.raises(ValueError, match=message):
        Wrong(change)(maps)
    assert Wrong("")(maps)["p3"].shape == (1, 8, 8, 12)


# Checkpoints and names


def test_a_run_folder_says_where_its_checkpoints_are(model: a2fpn.Detector, tmp_path: Path) -> None:
    a2fpn.save_pretrained(model, tmp_path / "run" / "last")
    with pytest.raises(ValueError, match=r"training run, whose checkpoints are in last: .*last"):
        a2fpn.from_pretrained(tmp_path / "run")
    a2fpn.save_pretrained(model, tmp_path / "run" / "best")
    with pytest.raises(ValueError, match=r"checkpoints are in best and last: .*best"):
        a2fpn.from_pretrained(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"it has no config\.json\. Names of models with weights: a2fpn list"):
        a2fpn.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"give its folder, '.*best'"):
        a2fpn.from_pretrained(tmp_path / "run" / "best" / "model.safetensors")


def test_files_of_other_kinds_say_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="a2fpn hub convert FILE --from"):
        a2fpn.from_pretrained(tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"File not found\. For a weights file, convert it"):
        a2fpn.from_pretrained("gone.pth")


def test_without_a_network_the_weights_of_a_backbone_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(OSError, match=r"offline mode is on.*hf download timm/resnet18\.tv_in1k model\.safetensors"):
        a2fpn.create_model("fasterrcnn_fpn_r18", pretrained_backbone=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses
    with pytest.raises(OSError, match=r"cannot be reached.*backbone_weights=FILE"):
        a2fpn.create_model("fasterrcnn_fpn_r18", pretrained_backbone=True)
    assert time.perf_counter() - start < 20


# Fixed sizes


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", None),
        ("levit_128s", 448),
        ("cait_s24_384", 768),
        ("beit_large_patch16_512", 512),
        ("cait_m36_384", 768),
        ("cait_m48_448", 448),
        ("test_coatnet", 640),
        ("resmlp_12_224", 224),
        ("efficientformer_l1", 224),
    ],
)
def test_a_network_of_fixed_size_is_built_for_a_roomy_one(name: str, side: int | None) -> None:
    config = a2fpn.compose.compose("fasterrcnn_fpn", backbone=name)
    found = config.backbone.image_size or a2fpn.backbones.find_backbone_info(name).size
    assert found == side
    if side is not None:
        assert config.preprocess.max_size == side


def test_a_size_builds_a_network_of_fixed_size_for_it_or_is_refused_at_once() -> None:
    built = a2fpn.create_model("fasterrcnn_fpn", backbone="levit_128s", num_classes=2, min_size=192, max_size=250)
    assert built.config.backbone.image_size == 256
    with torch.no_grad():
        built.eval()([torch.rand(3, 100, 150)])
    with pytest.raises(ValueError, match=r"efficientformer_l1' supports images of 224 x 224 only, and max_size=256"):
        a2fpn.create_model("fasterrcnn_fpn", backbone="efficientformer_l1", min_size=192, max_size=256)
    a2fpn.create_model("fasterrcnn_fpn", backbone="efficientformer_l1", min_size=192, max_size=224)


# Sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.jpg", "URLs are not supported; download the image first"),
        ("S3://bucket/a.jpg", "URLs are not supported"),
        ("clip.mp4", "videos are not supported.*ffmpeg"),
        ("photos/*.jpg", r"No image matches photos/\*\.jpg"),
    ],
)
def test_what_is_no_image_file_is_told(predictor: a2fpn.Predictor, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictor(source)


def test_a_pattern_is_read_and_a_file_of_that_name_too(predictor: a2fpn.Predictor, tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c[1].png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = predictor(str(tmp_path / "[ab]*"))
    assert [Path(str(one.path)).name for one in found] == ["a.png", "b.png"]
    assert isinstance(predictor(str(tmp_path / "c[1].png")), Result)


def test_gray_values_of_twelve_bits_are_told_and_can_be_scaled(
    predictor: a2fpn.Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eight = np.repeat(PIXELS[..., :1], 3, axis=2)
    twelve = (PIXELS[..., 0].astype(np.float64) * 4095 / 255).round().astype(np.uint16)
    Image.fromarray(twelve).save(tmp_path / "cells.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "cells.tif", gray_bits=12).permute(1, 2, 0).numpy(), eight)
    assert not caplog.records
    assert read_image(tmp_path / "cells.tif").max() <= 16
    assert "the largest gray value is" in caplog.text
    assert "--gray-bits 12" in caplog.text
    with pytest.raises(ValueError, match=r"gray values of 0 to \d+ don't fit 11 bits"):
        read_image(tmp_path / "cells.tif", gray_bits=11)
    scaled = a2fpn.Predictor(predictor.model, gray_bits=12)(tmp_path / "cells.tif")
    np.testing.assert_array_equal(scaled.load_image(), eight)
    assert scaled.scores.tolist() == predictor(eight).scores.tolist()
    with pytest.raises(ValueError, match="gray_bits must be between 9 and 16, got 8"):
        a2fpn.Predictor(predictor.model, gray_bits=8)


def test_training_and_evaluation_read_gray_values_as_a_prediction_does(tmp_path: Path) -> None:
    twelve = (PIXELS[..., 0].astype(np.float64) * 4095 / 255).round().astype(np.uint16)
    Image.fromarray(twelve).save(tmp_path / "cells.tif")
    shape = {"height": twelve.shape[0], "width": twelve.shape[1]}
    labels = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "cells.tif", **shape}],
        "annotations": [labels],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "cells.json").write_text(json.dumps(content))
    section = DataSection(
        str(tmp_path), train_images=".", train_annotations="cells.json", val_images=".", val_annotations="cells.json"
    )
    for bits in (12, 16):
        chosen = dataclasses.replace(section, gray_bits=bits)
        training = open_training_set(chosen)
        assert isinstance(training, CocoDataset)
        expected = read_image(tmp_path / "cells.tif", gray_bits=bits)
        for dataset in (training, open_validation_set(chosen, training)):
            assert torch.equal(dataset[0][0], expected)
    with pytest.raises(ValueError, match=r"data\.gray_bits must be at least 9 and at most 16, got 8"):
        dataclasses.replace(section, gray_bits=8)
    stream = dataclasses.replace(section, gray_bits=12, group_by_aspect=False, stream=StreamSection(shards="shards"))
    with pytest.raises(ValueError, match=r"data\.gray_bits needs a folder of images; set it to 16 for a stream"):
        open_training_set(stream)


def test_the_bytes_of_a_file_are_an_image(predictor: a2fpn.Predictor) -> None:
    content = io.BytesIO()
    Image.fromarray(PIXELS).save(content, "PNG")
    assert predictor(content.getvalue()).scores.tolist() == predictor(PIXELS).scores.tolist()
    with pytest.raises(ValueError, match="the given bytes: not a readable image"):
        predictor(b"no image")


def test_the_section_of_the_data_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "finetune_folder", "data=coco.yaml"])
    assert caught.value.code == 2
    assert "data.root=DIR" in capsys.readouterr().err


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exit_code == 2
    return " ".join(outcome.output.replace("\u2502", " ").split())


def test_commands_and_options_of_other_libraries_are_told() -> None:
    assert "Did you mean 'a2fpn evaluate'" in run("val")
    assert "Did you mean 'a2fpn data import'" in run("import")
    assert "--score-threshold" in run("predict", "x.png", "--conf", "0.3", "--model", "m")
    assert "--model" in run("predict", "x.png", "--weights", "m")


def test_settings_of_other_libraries_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for word, meaning in (
        ("epochs", "'run.epochs'"),
        ("batch", "'data.batch_size'"),
        ("device", "CUDA_VISIBLE_DEVICES"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--config", "finetune_folder", "data.root=x", f"{word}=1"])
        assert caught.value.code == 2
        assert meaning in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.yaml", "train: images\nnames: {0: cell}\n", "belongs to yolo labels"),
        ("a.xml", "<annotation><filename>a.jpg</filename></annotation>", "belongs to voc labels"),
        ("a.json", '{"version": "5.0", "shapes": [], "imagePath": "a.jpg"}', "belongs to labelme labels"),
        ("a.csv", "x,y", "is not a COCO file"),
    ],
)
def test_labels_of_another_format_say_how_to_import_them(
    tmp_path: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(PIXELS).save(folder / "images" / "a.jpg")
    (folder / name).write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["check-data", "--annotations", str(folder / name)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"a2fpn data import {folder} --output set_coco" in error
