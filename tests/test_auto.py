"""``--config auto``: settings chosen by looking at the data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from a2fpn.errors import ConfigError, DataError
from a2fpn.training.auto import CPU, GPU, Machine, choose
from a2fpn.training.cli import main, parse
from a2fpn.training.config import DataSection, StreamSection
from tests.coco_data import write_coco

Box = tuple[float, float]


def write(
    root: Path,
    images: Sequence[tuple[int, int]],
    objects: Sequence[Sequence[Box]],
    *,
    classes: Sequence[str] = ("a",),
    masks: bool = True,
    **fields: Any,
) -> DataSection:
    """Annotations of images (H, W) with boxes (w, h) at their corner; objects take the classes in turn."""
    entries = []
    for index, boxes in enumerate(objects):
        for number, (w, h) in enumerate(boxes):
            entry = {"image_id": index + 1, "category_id": number % len(classes) + 1, "bbox": [0, 0, w, h]} | fields
            entries.append(entry | ({"segmentation": [[0, 0, w, 0, w, h, 0, h]]} if masks else {}))
    keypoints = {"keypoints": ["tip"], "skeleton": []} if "keypoints" in fields else {}
    data = {
        "images": [{"id": i + 1, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(images)],
        "categories": [{"id": i + 1, "name": name, **keypoints} for i, name in enumerate(classes)],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(entries, 1)],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    return DataSection(root=str(root))


def chosen(data: DataSection, machine: Machine = CPU, **given: Any) -> dict[str, Any]:
    settings = {name.replace("__", "."): value for name, value in given.items()}
    return {choice.setting: choice.value for choice in choose(data, given=settings, machine=machine)}


def overrides(values: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model.overrides."): value for name, value in values.items() if "overrides" in name}


@pytest.mark.parametrize(
    ("fields", "detector"),
    [({}, "maskrcnn"), ({"keypoints": [1, 1, 2]}, "keypointrcnn"), ({"keypoints": [0, 0, 0]}, "maskrcnn")],
)
def test_objects_decide_the_detector_not_crowds(tmp_path: Path, fields: dict[str, Any], detector: str) -> None:
    data = write(tmp_path, [(400, 400)], [[(30, 30)]], **fields)
    assert chosen(data)["model.name"].startswith(f"{detector}_")
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    (drawn,) = content["annotations"]
    boxed = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20]}
    path.write_text(json.dumps(content | {"annotations": [drawn | {"iscrowd": 1}, boxed]}))
    assert chosen(data)["model.name"].startswith("fasterrcnn_")


def test_a_model_with_weights_keeps_the_alignment_that_it_was_trained_with(tmp_path: Path) -> None:
    data = write(tmp_path, [(400, 400)], [[(30, 30)]])
    for values in (chosen(data), chosen(data, model__pretrained=False)):
        assert values["model.overrides.roi_aligned"] is True
    for values in (chosen(data, model__name="maskrcnn_fpn_r50"), chosen(data, model__pretrained=True)):
        assert "model.overrides.roi_aligned" not in values
    assert "model.overrides.roi_aligned" not in chosen(data, GPU)


def test_a_tiny_image_keeps_a_valid_size(tmp_path: Path) -> None:
    values = chosen(write(tmp_path, [(4, 9)], [[(3, 3)]]))
    assert 1 <= values["model.overrides.min_size"] <= values["model.overrides.max_size"]


@pytest.mark.parametrize(
    ("images", "objects", "rule"),
    [
        ([(400, 400), (1200, 1200)], [[(30, 30)], [(30, 30)]], "at_least"),  # a microscope
        ([(400, 400), (1200, 1200)], [[(30, 30)], [(90, 90)]], "shortest_edge"),  # photos of one kind of scene
        ([(400, 500), (420, 400)], [[(30, 30)], [(30, 30)]], "shortest_edge"),  # one camera
    ],
)
def test_images_are_resized_as_their_objects_ask_for(tmp_path: Path, images: Any, objects: Any, rule: str) -> None:
    assert overrides(chosen(write(tmp_path, images, objects)))["resize"] == rule


@pytest.mark.parametrize(
    ("side", "size", "machine", "expected"),
    [
        (416, 24, CPU, 416),  # as it is
        (400, 20, CPU, 480),  # 24 pixels
        (400, 12, CPU, 800),
        (500, 12, GPU, 800),  # twice would be 1000
        (100, 4, GPU, 288),  # three times
        (1000, 240, GPU, 384),  # a tenth would do, but shows less
        (300, 240, GPU, 288),
    ],
)
def test_images_are_as_large_as_their_objects_need(
    tmp_path: Path, side: int, size: int, machine: Machine, expected: int
) -> None:
    data = write(tmp_path, [(side, side)] * 2, [[(size, size)]] * 2)
    assert overrides(chosen(data, machine))["min_size"] == expected


@pytest.mark.parametrize(
    ("machine", "longest", "holders", "crop"),
    [
        (CPU, 24, 3, 320),
        (CPU, 320, 3, 320),
        (CPU, 321, 3, 352),
        (CPU, 321, 1, 320),  # one of forty
        (CPU, 700, 3, 512),
        (GPU, 500, 3, 512),
        (GPU, 700, 3, 704),
    ],
)
def test_crops_hold_most_objects(tmp_path: Path, machine: Machine, longest: int, holders: int, crop: int) -> None:
    objects = [(24.0, 24.0)] * (40 - holders) + [(24.0, float(longest))] * holders
    values = chosen(write(tmp_path, [(800, 800)] * 2, [objects, [(24, 24)]]), machine)
    assert overrides(values)["min_size"] == 800
    assert values["data.transforms.crop_size"] == crop


def test_anchors_fit_the_objects_after_resizing(tmp_path: Path) -> None:
    squares = overrides(chosen(write(tmp_path / "a", [(416, 416)], [[(24, 24), (24, 24), (48, 48), (96, 96)]])))
    assert squares["min_size"] == 416
    assert squares["anchor_sizes"] == [[24], [48], [96], [192], [384]]
    assert "anchor_ratios" not in squares
    bars = overrides(chosen(write(tmp_path / "b", [(400, 400)], [[(12, 60), (60, 12), (24, 120)]])))
    assert bars["anchor_ratios"] == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_each_class_counts_alike(tmp_path: Path) -> None:
    """AP is the mean over classes: a thousand windows do not outvote two facades."""
    data = write(tmp_path, [(512, 512)] * 2, [[(18, 18)] * 1000, [(400, 400)] * 2], classes=("window", "facade"))
    path = Path(data.root) / data.train_annotations
    content = json.loads(path.read_text())
    for facades, anchor, crop in ((1, 16, 320), (2, 24, 416)):
        for entry in content["annotations"]:
            entry["category_id"] = facades if entry["bbox"][2] > 18 else 1
        path.write_text(json.dumps(content))
        values = chosen(data, model__overrides__min_size=512)
        assert overrides(values)["anchor_sizes"][0] == [anchor]
        assert values["data.transforms.crop_size"] == crop


@pytest.mark.parametrize(("most", "detections"), [(1, 100), (66, 100), (67, 200), (375, 600)])
def test_detections_are_half_as_many_again_as_objects(tmp_path: Path, most: int, detections: int) -> None:
    values = chosen(write(tmp_path, [(400, 400)] * 2, [[(30, 30)], [(30, 30)] * most]))
    assert values["run.max_detections"] == overrides(values)["detections_per_image"] == detections
    limits = overrides(values)
    assert min(2000, 4 * detections) <= limits["rpn_post_nms_top_n_test"] <= limits["rpn_pre_nms_top_n_test"]


@pytest.mark.parametrize(("images", "few"), [(99, True), (100, False)])
def test_few_images_leave_the_first_stages_alone(tmp_path: Path, images: int, few: bool) -> None:
    values = chosen(write(tmp_path, [(400, 400)] * images, [[(30, 30)]] * images))
    assert ("model.overrides.trainable_layers" in values) == few


@pytest.mark.parametrize(("holders", "rare"), [(4, True), (5, False)])
def test_rare_classes_are_seen_more_often(tmp_path: Path, holders: int, rare: bool) -> None:
    objects = [[(30, 30), (30, 30)]] * holders + [[(30, 30)]] * (100 - holders)
    values = chosen(write(tmp_path, [(400, 400)] * 100, objects, classes=("a", "b")))
    assert ("data.repeat_threshold" in values) == rare


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "maskrcnn"),
        ({"masks": False}, "fasterrcnn"),
        ({"masks": False, "keypoints": [5, 5, 2], "num_keypoints": 1}, "keypointrcnn"),
    ],
)
@pytest.mark.parametrize(("machine", "rest"), [(CPU, "fpn_lite0"), (GPU, "a2fpn_r50")])
def test_the_detector_finds_what_is_annotated(
    tmp_path: Path, fields: dict[str, Any], name: str, machine: Machine, rest: str
) -> None:
    assert chosen(write(tmp_path, [(400, 400)], [[(30, 30)]], **fields), machine)["model.name"] == f"{name}_{rest}"


@pytest.mark.parametrize(
    ("images", "seen"),
    [(10, 2040), (500, 6000), (100_000, 1_200_000)],  # no fewer than twelve times each
)
def test_a_run_is_as_long_as_it_has_images(tmp_path: Path, images: int, seen: int) -> None:
    objects = [[(30.0, 30.0)], *[[]] * (images - 1)]
    values = chosen(write(tmp_path, [(400, 400)] * images, objects))
    assert images * values["data.passes"] * values["run.epochs"] == seen


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    data = write(tmp_path, [(400, 400)], [[(30, 30)]])
    values = chosen(data, GPU, model__name="maskrcnn_fpn_r50", model__overrides__min_size=640)
    assert not {"model.name", "model.overrides.min_size", "model.pretrained"} & values.keys()
    assert values["model.pretrained_backbone"] is True
    assert "model.pretrained_backbone" not in chosen(data, GPU, model__backbone_weights="x")


def test_the_rest_fits_what_is_given(tmp_path: Path) -> None:
    data = write(tmp_path, [(400, 400)] * 100, [[(24, 24)], *[[]] * 99])
    usual = chosen(data)
    assert usual["run.epochs"] * 50 * usual["data.passes"] == 1200
    assert usual["optim.warmup_steps"] == 60
    assert usual["model.overrides.anchor_sizes"][0] == [24]
    assert chosen(data, run__max_steps=800)["optim.warmup_steps"] == 40
    assert "run.epochs" not in chosen(data, run__max_steps=800)
    assert chosen(data, run__max_steps=8)["optim.warmup_steps"] == 2
    assert chosen(data, run__max_steps=100_000)["optim.warmup_steps"] == 200
    assert chosen(data, data__batch_size=1)["optim.warmup_steps"] == 120
    assert chosen(data, run__epochs=24)["optim.warmup_steps"] == 120
    halved = chosen(data, model__overrides__min_size=200)
    assert halved["model.overrides.anchor_sizes"][0] == [12]
    assert halved["model.overrides.max_size"] == 352
    limited = chosen(data, model__overrides__max_size=200)
    assert limited["model.overrides.anchor_sizes"][0] == [12]
    assert limited["model.overrides.min_size"] == 200
    kept = chosen(data, model__overrides__resize="none")
    assert kept["model.overrides.anchor_sizes"][0] == [24]
    assert kept["data.transforms.crop_size"] == 320
    assert not {"model.overrides.min_size", "model.overrides.max_size"} & kept.keys()
    assert chosen(data, model__overrides__detections_per_image=300)["run.max_detections"] == 300
    wrong = chosen(data, model__overrides__min_size="large", run__max_steps=None, data__batch_size=[2])
    assert wrong["optim.warmup_steps"] == 60  # the validation names them
    assert wrong["run.epochs"] == 12


def test_images_that_keep_their_size_are_cropped_if_they_are_larger(tmp_path: Path) -> None:
    data = write(tmp_path, [(300, 320)] * 2, [[(24, 24)], []])
    assert "data.transforms.crop_size" not in chosen(data, model__overrides__resize="none")
    assert chosen(data)["data.transforms.crop_size"] == 320


def test_a_rule_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [(400, 400)], [[(30, 30)]])
    arguments = ["--config", "auto", f"data.root={tmp_path}", "--print_config", "model.overrides.resize=fit"]
    assert main(arguments) != 0
    assert "resize must be one of 'shortest_edge', 'at_least', 'none', got 'fit'" in capsys.readouterr().err


def test_every_choice_has_its_reason_and_is_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path, [(400, 400)] * 3, [[(30, 30)] * 9] * 3)
    arguments = ["--config", "auto", f"data.root={tmp_path}", "optim.lr=0.25"]
    assert main([*arguments, "--print_config"]) == 0
    out, err = capsys.readouterr()
    config = yaml.safe_load(out)
    choices = choose(data, given={"optim.lr": 0.25})
    assert [line for line in err.splitlines() if line.startswith("auto: ")] == [f"auto: {c}" for c in choices]
    assert all(len(choice.reason.split()) > 2 for choice in choices)
    assert config["optim"]["lr"] == 0.25
    assert config["model"]["overrides"]["norm"] == "bn"  # auto.yaml
    for choice in choices:
        value = config
        for part in choice.setting.split("."):
            value = value[part]
        assert value == choice.value


def test_other_recipes_and_arguments_stay(tmp_path: Path) -> None:
    write(tmp_path, [(400, 400)], [[(30, 30)]])
    (tmp_path / "mine.yaml").write_text("data: {batch_size: 1}\nmodel: {overrides: {min_size: 96}}\n")
    for order in (["auto", str(tmp_path / "mine.yaml")], [str(tmp_path / "mine.yaml"), "auto"]):
        names = [f"--config={name}" for name in order]
        config = parse([*names, f"data.root={tmp_path}", "run.epochs=2"])
        assert (config.data.batch_size, config.model.overrides["min_size"], config.run.epochs) == (1, 96, 2)


def test_what_can_t_be_looked_at_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"instances_train\.json has no object"):
        chosen(write(tmp_path, [(40, 40)], [[]]))
    with pytest.raises(ConfigError, match="looks at a folder"):
        choose(DataSection(root=str(tmp_path), stream=StreamSection(shards="x")))
    with pytest.raises(DataError, match="no such"):
        choose(DataSection(root=str(tmp_path / "nowhere")))
    assert main(["--config", "auto"]) == 2
    assert "data.root is missing" in capsys.readouterr().err


def test_a_run_by_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    for split in ("train", "val"):
        _, file = write_coco(tmp_path / split, images=2, seed=len(split))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file.rename(tmp_path / "annotations" / f"instances_{split}.json")
    arguments = ["--config", "auto", f"data.root={tmp_path}", f"run.output={tmp_path / 'run'}", "run.max_steps=1"]
    arguments += [f"data.{split}_images={split}/images" for split in ("train", "val")]
    small = ["model.name=maskrcnn_fpn", "model.pretrained_backbone=false", "model.overrides.backbone=test_efficientnet"]
    small += ["model.overrides.min_size=64", "model.overrides.neck_args.out_channels=16", "data.workers=0"]
    assert main([*arguments, *small, "model.overrides.box_channels=32", "model.overrides.mask_channels=16"]) == 0
    assert (tmp_path / "run" / "best" / "config.json").exists()
