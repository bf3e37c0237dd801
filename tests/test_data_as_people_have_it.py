"""COCO files as tools and people write them: read without losing a box, and never trusted with a path."""

import copy
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from a2fpn.data import (
    CocoDataset,
    CopyPaste,
    DataError,
    ImageError,
    ShardDataset,
    check_data,
    import_data,
    read_coco,
    train_transforms,
    write_shards,
)
from a2fpn.data.copy_paste import paste
from a2fpn.evaluation import annotations_as_detections, evaluate_coco
from a2fpn.instance_metrics import evaluate_instances
from a2fpn.training.sources import credits_of
from tests.helpers import tiny_model

SQUARE = [10, 10, 60, 10, 60, 60, 10, 60]
IMAGE = {"id": 1, "file_name": "a.png", "height": 100, "width": 120}


def entry(number: int, **changes: Any) -> dict[str, Any]:
    x = 20.0 * (number - 1)
    box = [x, 10, 16, 20]
    polygon = [x, 10, x + 16, 10, x + 16, 30, x, 30]
    return {"id": number, "image_id": 1, "category_id": 7, "bbox": box, "segmentation": [polygon]} | changes


def coco(*annotations: dict[str, Any], **lists: Any) -> dict[str, Any]:
    content = {"images": [IMAGE], "annotations": list(annotations), "categories": [{"id": 7, "name": "cat"}]}
    return copy.deepcopy(content | lists)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (100, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path


def codes(data: Any, images: Path | None = None) -> list[str]:
    return [finding.code for finding in check_data(images, data).findings]


MIXED = [entry(1), *(entry(number, segmentation=[]) for number in range(2, 6))]


# --- masks and boxes, each for itself ----------------------------------------------------------------------------


def test_every_box_counts_where_a_few_objects_have_masks(caplog: pytest.LogCaptureFixture) -> None:
    found = [{key: e[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for e in MIXED]
    with caplog.at_level(logging.WARNING):
        metrics = evaluate_coco(coco(*MIXED), found, iou_types=["bbox"])
    assert metrics.bbox is not None
    assert metrics.bbox.ap == pytest.approx(1)
    assert "4 of 5 objects have no mask; they are used for boxes only, in training and evaluation" in caplog.text


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_masks_are_measured_where_there_are_masks(backend: Any) -> None:
    """An object without a mask can neither be missed, nor can what lies on it be wrong."""
    data = coco(*MIXED)
    perfect = annotations_as_detections(data)
    assert len(perfect) == 5
    for found in (perfect, perfect[:1]):
        metrics = evaluate_coco(data, found, iou_types=["segm"], backend=backend)
        assert metrics.segm is not None
        assert metrics.segm.ap == pytest.approx(1)
    elsewhere = [{**perfect[0], "score": 2.0, "segmentation": [[20, 60, 36, 60, 36, 80, 20, 80]]}, *perfect]
    wrong = evaluate_coco(data, elsewhere, iou_types=["segm"], backend=backend)
    assert wrong.segm is not None
    assert wrong.segm.ap == pytest.approx(0.5)
    instances = evaluate_instances(data, perfect)["cat"]
    assert (instances.objects, instances.found) == (1, 1)


def test_samples_say_which_objects_have_masks(folder: Path) -> None:
    dataset = CocoDataset(folder, coco(*MIXED))
    image, target = dataset[0]
    assert target["has_mask"].tolist() == [True] + [False] * 4
    assert target["masks"].areas().tolist() == [320, 0, 0, 0, 0]
    assert len(target["boxes"]) == 5
    assert "has_mask" not in CocoDataset(folder, coco(entry(1), entry(2)))[0][1]
    assert set(CocoDataset(folder, coco(*MIXED[1:]))[0][1]) == {"image_id", "boxes", "labels"}
    options: dict[str, Any] = {"scale_range": (1.0, 1.0), "crop_size": None, "horizontal_flip": 1.0}
    _, flipped = train_transforms(lambda height, width: (2 * height, 2 * width), **options)(image, target)
    assert flipped["boxes"].tolist() == [[240 - 2 * x - 32, 20, 240 - 2 * x, 60] for x in range(0, 100, 20)]
    assert flipped["has_mask"].tolist() == target["has_mask"].tolist()


def test_objects_without_masks_are_covered_but_not_pasted(folder: Path) -> None:
    source = CocoDataset(folder, coco(entry(2), entry(4, segmentation=[])))[0]
    below = CocoDataset(folder, coco(*MIXED))[0]
    _, joined = paste(below, source)
    assert joined["boxes"][:, 0].tolist() == [0, 40, 60, 80, 20]  # the second of those below is covered
    assert joined["has_mask"].tolist() == [True, False, False, False, True]
    plain = CocoDataset(folder, coco(entry(1)))[0]
    assert "has_mask" not in paste(plain, source)[1]
    pasted = CopyPaste(CocoDataset(folder, coco(*MIXED)), probability=1.0)[0][1]
    assert len(pasted["has_mask"]) == len(pasted["boxes"]) == len(pasted["masks"]) == len(pasted["labels"])


@pytest.mark.parametrize("name", ["maskrcnn_fpn", "cascademaskrcnn_fpn", "htc_fpn"])
def test_mask_heads_learn_from_masks_alone_and_box_heads_from_all(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(name, num_classes=1, **({"semantic": "things"} if name == "htc_fpn" else {})).train()
    boxed = tiny_model("fasterrcnn_fpn", num_classes=1)

    def losses(target: dict[str, Any], detector: Any = model) -> dict[str, float]:
        torch.manual_seed(1)
        return {key: float(value) for key, value in detector([image], [target]).items()}

    image, mixed = CocoDataset(folder, coco(*MIXED))[0]
    every = CocoDataset(folder, coco(*(entry(number) for number in range(1, 6))))[0][1]
    plain = {key: value for key, value in mixed.items() if key != "has_mask"}
    of_mixed, of_every, of_plain = losses(mixed), losses(every), losses(plain)
    assert of_mixed["loss_classifier"] == of_every["loss_classifier"] == of_plain["loss_classifier"]
    assert len({of_mixed["loss_mask"], of_every["loss_mask"], of_plain["loss_mask"]}) == 3
    nothing = losses({**mixed, "has_mask": torch.zeros(5, dtype=torch.bool)})
    assert nothing["loss_mask"] == 0
    assert nothing["loss_box_reg"] == of_mixed["loss_box_reg"] > 0
    assert all(math.isfinite(value) for value in (*of_mixed.values(), *nothing.values()))
    del mixed["masks"]
    assert losses(mixed, boxed.train())["loss_box_reg"] > 0
    for wrong in (torch.ones(4, dtype=torch.bool), torch.ones(5)):
        with pytest.raises(ValueError, match=r"image_id 1: has_mask must be bool \(5,\), one for each box, got"):
            model([image], [{**plain, "has_mask": wrong}])


def test_the_mask_loss_is_that_of_the_objects_with_masks(folder: Path) -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("maskrcnn_fpn", num_classes=1).train()
    image, mixed = CocoDataset(folder, coco(entry(1), entry(3, segmentation=[])))[0]
    seen: list[Any] = []
    hook = model.roi_heads.mask_roi_pool.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    torch.manual_seed(1)
    model([image], [mixed])
    hook.remove()
    (boxes,) = seen[0]
    assert len(boxes) > 0
    centers = (boxes[:, 0] + boxes[:, 2]) / 2
    assert (centers < 30).all()  # near the first object, not the second at 40 to 56


def test_semantic_targets_ignore_what_may_be_an_object() -> None:
    from a2fpn.heads.htc import IGNORE, ignore_boxes

    semantic = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    ignore_boxes(semantic, torch.tensor([[0.5, 0.0, 1.5, 2.0]]))
    assert semantic.tolist() == [[IGNORE, IGNORE, 0, 0], [IGNORE, 1, 0, 0], [0, 0, 0, 0]]


# --- parts, boxes, keypoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fragment", [[70, 70, 71, 71], [], [1, 2, 3, 4, 5, 6, 7], [1, 2, math.nan, 4, 5, 6], None, "x"]
)
@pytest.mark.parametrize("first", [False, True])
def test_a_bad_part_does_not_drop_the_good_one(fragment: Any, first: bool) -> None:
    parts = [fragment, SQUARE] if first else [SQUARE, fragment]
    data = coco(entry(1, bbox=[10, 10, 50, 50], segmentation=parts))
    file = read_coco(data)
    (kept,) = file.annotations[1]
    assert kept.area == 2500
    assert file.problems == ()
    (loss,) = file.losses
    assert loss.startswith("the given mapping: annotation 1: a polygon")
    assert loss.endswith("it is kept without 1 such part")
    assert codes(data) == ["bad-part"]
    with pytest.raises(DataError, match="it is kept without 1 such part"):
        read_coco(data, strict=True)


def test_a_missing_box_is_that_of_the_mask() -> None:
    rle = {"size": [100, 120], "counts": [100 * 10 + 10, *[50, 50] * 49, 50, 100 * 120 - 1010 - 4950]}
    for segmentation in ([SQUARE], rle):
        for box in (None, [], [0, 0, 0, 0], [10, 10, -5, 20], [1, 2, 3], [math.nan] * 4):
            data = coco(entry(1, bbox=box, segmentation=segmentation))
            assert read_coco(data, strict=True).annotations[1][0].bbox == (10, 10, 50, 50)
            assert codes(data) == ["box-from-mask"]
        del data["annotations"][0]["bbox"]
        metrics = evaluate_coco(data, annotations_as_detections(data), iou_types=["segm", "bbox"])
        assert metrics.segm is not None
        assert metrics.segm.ap == pytest.approx(1)


def test_a_box_outside_the_image_is_not_replaced() -> None:
    """It contradicts the mask: which of them is right is not known."""
    data = coco(entry(1, bbox=[200, 10, 50, 50], segmentation=[SQUARE]))
    assert len(read_coco(data).problems) == 1
    assert "box-outside" in codes(data)


POINTS = [15.0, 15, 2, 30, 15, 1]
CLASSES = [
    {"id": 7, "name": "vehicle", "keypoints": [], "skeleton": []},
    {"id": 8, "name": "person", "keypoints": ["left_eye", "right_eye"]},
]


@pytest.mark.parametrize("order", [1, -1])
def test_the_class_with_keypoints_counts_in_any_order(order: int) -> None:
    objects = [entry(1), entry(2, category_id=8, keypoints=POINTS)][::order]
    data = coco(*objects, categories=CLASSES[::order])
    file = read_coco(data, strict=True)
    assert (file.num_keypoints, file.keypoint_names) == (2, ("left_eye", "right_eye"))
    assert codes(data) == []


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_classes_with_keypoints_the_one_with_most_objects_counts(order: int) -> None:
    animal = {"id": 9, "name": "animal", "keypoints": ["nose", "left_ear", "right_ear"]}
    objects = [
        entry(1, category_id=9, keypoints=[*POINTS, 1, 1, 2]),
        *(entry(number, category_id=8, keypoints=POINTS) for number in (2, 3)),
    ][::order]
    file = read_coco(coco(*objects, categories=[*CLASSES, animal][::order]))
    assert (file.num_keypoints, file.keypoint_names) == (2, ("left_eye", "right_eye"))
    assert file.problems == ()
    assert len(file.losses) == 1
    assert sorted(len(a.keypoints) for a in file.annotations[1]) == [0, 2, 2]


# --- metadata ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", ["made by a script", None, 7, [], {"description": None}, {"description": {"a": 1}}])
@pytest.mark.parametrize("licenses", ["MIT", None, ["MIT"], [None], {"name": "MIT"}, [{"name": None}, {}]])
def test_metadata_never_stop_a_run(info: Any, licenses: Any, folder: Path) -> None:
    path = folder / "a.json"
    path.write_text(json.dumps(coco(entry(1), info=info, licenses=licenses)))
    credits = credits_of(CocoDataset(folder, path))
    assert all(isinstance(value, str) and value for value in credits.values())
    write_shards(folder, path, folder / "shards", force=True)
    assert credits_of(ShardDataset(folder / "shards")).keys() == credits.keys()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_read_in_one_way_everywhere(encoding: str, folder: Path) -> None:
    path = folder / "a.json"
    data = coco(entry(1), info={"description": "Bäume"}, licenses=[{"name": "CC0"}])
    path.write_text(json.dumps(data, ensure_ascii=False), encoding=encoding)
    dataset = CocoDataset(folder, path)
    assert credits_of(dataset) == {"data": "Bäume", "data_license": "CC0"}
    assert codes(path, folder) == []
    write_shards(folder, path, folder / "shards")
    assert len(list(ShardDataset(folder / "shards"))) == 1
    assert evaluate_coco(path, annotations_as_detections(path)).to_dict()["segm/ap"] == pytest.approx(1)


def test_what_is_no_text_names_the_file(folder: Path) -> None:
    path = folder / "a.json"
    path.write_bytes(b'{"info": "B\xe4ume"}')
    with pytest.raises(DataError, match=r"a\.json, line 1: not UTF-8 text \(byte 0xe4\)"):
        read_coco(path)
    assert codes(path) == ["no-coco"]


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("area", [-1, 0, None, math.nan, math.inf, "320", True, []])
def test_an_area_that_is_none_is_computed(area: Any) -> None:
    data = coco(entry(1, area=area))
    assert read_coco(data).annotations[1][0].area == 320
    assert evaluate_coco(data, annotations_as_detections(data), iou_types=["bbox"]).to_dict()[
        "bbox/ap"
    ] == pytest.approx(1)
    assert codes(data) == ([] if area in (None, []) else ["bad-area"])


@pytest.mark.parametrize("area", [-1, 0])
def test_a_perfect_detection_of_keypoints_counts_whatever_the_area(area: float) -> None:
    points = entry(1, bbox=[10, 10, 60, 60], segmentation=[], keypoints=POINTS, area=area)
    data = coco(points, categories=CLASSES)
    metrics = evaluate_coco(data, annotations_as_detections(data), iou_types=["keypoints"], oks_sigmas=[0.1, 0.1])
    assert metrics.keypoints is not None
    assert metrics.keypoints.ap == pytest.approx(1)


@pytest.mark.parametrize(
    ("area", "found"), [(650.5, True), (649.5, False), (154.5, True), (155.5, False)], ids=["high", "in", "low", "in2"]
)
def test_areas_that_contradict_the_mask_are_named(area: float, found: bool) -> None:
    assert codes(coco(entry(1, area=area))) == ["area-mismatch"] * found


@pytest.mark.parametrize(("area", "found"), [(5011, True), (5009, False), (14, True), (16, False)])
def test_areas_that_contradict_the_box_are_named(area: float, found: bool) -> None:
    """Of an object without a mask the area may be far below that of the box, not above."""
    data = coco(entry(1, bbox=[10, 10, 50, 50], segmentation=None, area=area))
    assert codes(data) == ["area-mismatch"] * found


@pytest.mark.parametrize(
    ("value", "crowd"),
    [(0, False), ("0", False), ("false", False), ("No", False), (0.0, False), (False, False), (None, False)]
    + [(1, True), ("1", True), (" TRUE ", True), ("yes", True), (1.0, True), (True, True), (np.int64(1), True)],
)
def test_iscrowd_is_read_in_any_spelling(value: Any, crowd: bool) -> None:
    data = coco(entry(1), entry(2, iscrowd=value))
    assert read_coco(data, strict=True).annotations[1][1].iscrowd is crowd
    assert "bad-iscrowd" not in codes(data)


def test_numbers_in_memory_may_be_numpys() -> None:
    ids = {"id": np.int64(3), "image_id": np.int32(1), "category_id": np.uint8(7), "area": np.float32(320)}
    data = coco(
        entry(1, **ids, bbox=np.array([0, 10, 16, 20]), segmentation=[np.array([0, 10, 16, 10, 16, 30, 0, 30])]),
        images=[IMAGE | {"id": np.int64(1), "height": np.int64(100)}],
        categories=[{"id": np.int64(7), "name": "cat"}],
    )
    file = read_coco(data, strict=True)
    (only,) = file.annotations[1]
    assert (only.category_id, only.bbox, only.area) == (7, (0, 10, 16, 20), 320)
    assert type(next(iter(file.images))) is int
    assert codes(data) == []


def test_unknown_ids_are_named() -> None:
    data = coco(entry(1), entry(2, category_id=12), entry(3, category_id=12), entry(4, image_id=55))
    report = check_data(None, data)
    messages = {finding.code: finding.message for finding in report.findings}
    assert messages["unknown-category"].endswith("in 2 of 4 annotations: 2, 3 (category_id 12).")
    assert messages["unknown-image"].endswith("in 1 of 4 annotations: 4 (image_id 55).")


def test_swapped_ids_stop_a_run() -> None:
    one = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    other = [{"id": 1, "name": "Dog"}, {"id": 2, "name": "cat"}]
    data = coco(entry(1, category_id=1), categories=one)
    (finding,) = [f for f in check_data(None, data, against=coco(categories=other)).findings if f.severity == "error"]
    assert (finding.code, finding.fatal) == ("category-names", True)
    renamed = coco(categories=[{"id": 1, "name": "tabby"}, {"id": 2, "name": "dog"}])
    (finding,) = [f for f in check_data(None, data, against=renamed).findings if f.code == "category-names"]
    assert not finding.fatal


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def inner(folder: Path) -> Path:
    """A folder of images beside a file that is nobody's business."""
    images = folder / "images"
    images.mkdir()
    (images / "sub").mkdir()
    (folder / "a.png").rename(images / "sub" / "a.png")
    Image.new("RGB", (120, 100)).save(folder / "secret.png")
    return images


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "{root}/secret.png", "sub/../../images2/x.png"]
)
def test_paths_that_leave_the_folder_are_refused_and_named(name: str, inner: Path) -> None:
    name = name.format(root=inner.parent)
    data = coco(entry(1), images=[IMAGE | {"file_name": name}])
    with pytest.raises(ImageError, match=r"is outside the image folder .*; a file name must be a path inside it"):
        CocoDataset(inner, data, strict=True)[0]
    assert "outside-folder" in codes(data, inner)
    path = inner.parent / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="is outside the image folder"):
        write_shards(inner, path, inner.parent / "shards")
    assert not list(inner.parent.glob("shards/*.tar"))


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "sub/../sub/a.png", "{root}/sub/a.png", "sub//a.png"])
def test_paths_that_stay_inside_are_read(name: str, inner: Path) -> None:
    data = coco(entry(1), images=[IMAGE | {"file_name": name.format(root=inner)}])
    assert len(CocoDataset(inner, data, strict=True)[0][1]["boxes"]) == 1
    assert codes(data, inner) == []


def test_links_inside_the_folder_are_their_owners_choice(inner: Path) -> None:
    os.symlink(inner.parent / "secret.png", inner / "link.png")
    data = coco(entry(1), images=[IMAGE | {"file_name": "link.png"}])
    assert len(CocoDataset(inner, data, strict=True)[0][1]["boxes"]) == 1


def test_only_regular_files_go_into_shards(inner: Path) -> None:
    os.symlink("/dev/zero", inner / "endless.png")
    path = inner.parent / "a.json"
    path.write_text(json.dumps(coco(entry(1), images=[IMAGE | {"file_name": "endless.png"}])))
    with pytest.raises(DataError, match=r"endless\.png: can't be read \(not a regular file\)"):
        write_shards(inner, path, inner.parent / "shards")


def test_backslashes_get_a_hint(inner: Path) -> None:
    data = coco(entry(1), images=[IMAGE | {"file_name": "sub\\a.png"}])
    with pytest.raises(ImageError, match=r"sub/a\.png exists; write the name with slashes"):
        CocoDataset(inner, data, strict=True)[0]
    assert codes(data, inner) == ["missing-file", "backslash-in-name"]


def test_images_above_the_limit_are_named_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2fpn.data.check.files.MAX_PIXELS", 100 * 120 - 1)
    (finding,) = check_data(folder, coco(entry(1))).findings
    assert (finding.code, finding.severity) == ("too-large", "error")
    assert "--max-pixels" in finding.advice
    monkeypatch.setattr("a2fpn.data.check.files.MAX_PIXELS", 100 * 120)
    assert check_data(folder, coco(entry(1))).findings == ()


# --- imports -----------------------------------------------------------------------------------------------------


def test_an_import_keeps_what_the_reader_keeps(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("set/images/sub/a.png", "secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 100)).save(tmp_path / name)
    objects = [
        entry(1, segmentation=[SQUARE, [70, 70, 71, 71]], bbox=[10, 10, 50, 50]),
        entry(2, segmentation=[[1, 1]]),
        entry(3, bbox=[0, 0, 0, 0]),
        entry(4, iscrowd="0"),
        entry(5, iscrowd="True"),
    ]
    images = [IMAGE | {"file_name": "sub/a.png"}, IMAGE | {"id": 2, "file_name": "../../secret.png"}]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(coco(*objects, images=images)))
    report = import_data(root, tmp_path / "out")
    assert report.counts == {"unusable-mask": 2, "missing-image": 1}
    file = read_coco(tmp_path / "out" / "annotations" / "instances_train.json", strict=True)
    kept = file.annotations[1]
    assert [a.bbox for a in kept] == [
        (10, 10, 50, 50),
        (20, 10, 16, 20),
        (40, 10, 16, 20),
        (60, 10, 16, 20),
        (80, 10, 16, 20),
    ]
    assert [a.mask is not None for a in kept] == [True, False, True, True, True]
    assert [a.iscrowd for a in kept] == [False, False, False, False, True]
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.png")) == ["a.png"]
