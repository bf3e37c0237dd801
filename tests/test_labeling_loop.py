"""From predictions to corrected labels to a better start: what programs open, and the loop that the docs show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import a2fpn
from a2fpn.cli import main
from a2fpn.config import Category
from a2fpn.data import decode_rle, encode_masks, import_data, read_coco
from a2fpn.errors import DataError
from a2fpn.inference import Result
from a2fpn.writers import write_results
from a2fpn.writers.labeling import PROGRAMS
from tests.coco_data import write_coco

SIZE = (48, 64)


def masks() -> np.ndarray:
    """A disk, two parts, a ring, and one pixel."""
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    planes = np.zeros((4, *SIZE), dtype=np.uint8)
    planes[0] = (rows - 12) ** 2 + (columns - 12) ** 2 <= 64
    planes[1, 30:40, 5:15] = planes[1, 30:40, 20:30] = 1
    planes[2, 5:25, 35:60] = 1
    planes[2, 10:20, 42:52] = 0
    planes[3, 45, 60] = 1
    return planes


def result(path: Path, *, with_masks: bool = True) -> Result:
    Image.new("RGB", (SIZE[1], SIZE[0])).save(path)
    planes = masks()
    corners = [np.nonzero(plane) for plane in planes]
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in corners]
    return Result(
        boxes=np.array(boxes, dtype=np.float32),
        scores=np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32),
        labels=np.array([0, 1, 0, 1]),
        size=SIZE,
        categories=(Category(3, "cell"), Category(8, "two parts")),
        rles=tuple(encode_masks(planes)) if with_masks else None,
        path=str(path),
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_masks_come_back_from_what_programs_open(tmp_path: Path, program: str) -> None:
    (folder,) = write_results([result(tmp_path / "a.png")], tmp_path / "found", [program])
    assert folder == tmp_path / "found" / program
    if program == "labelstudio":
        submit(folder / "tasks.json")
    report = import_data(folder, tmp_path / "coco")
    coco = read_coco(tmp_path / "coco" / "annotations" / "instances_train.json")
    assert {c.id: c.name for c in coco.categories} == {3: "cell", 8: "two parts"}
    found = [(a.category_id, decode_rle([a.rle])[0]) for members in coco.annotations.values() for a in members if a.rle]
    assert len(found) == 4 - report.counts.get("overlap", 0)
    for plane, category in zip(masks()[:3], (3, 8, 3), strict=True):
        ious = [(mask & plane).sum() / (mask | plane).sum() for label, mask in found if label == category]
        assert max(ious) >= 0.95, program


def submit(file: Path) -> None:
    """Accept every prediction, as Label Studio does when a task is submitted."""
    tasks = json.loads(file.read_text())
    for task in tasks:
        task["annotations"] = [{"result": task["predictions"][-1]["result"]}]
    file.write_text(json.dumps(tasks))


def test_predictions_count_as_labels_only_once_they_are_submitted(tmp_path: Path) -> None:
    (folder,) = write_results([result(tmp_path / name) for name in ("a.png", "b.png")], tmp_path, ["labelstudio"])
    tasks = json.loads((folder / "tasks.json").read_text())
    assert [set(task) for task in tasks] == [{"id", "data", "predictions"}] * 2
    (prediction,) = tasks[0]["predictions"]
    assert prediction["score"] == pytest.approx(0.75)
    assert [region["score"] for region in prediction["result"]] == pytest.approx([0.9, 0.8, 0.8, 0.7, 0.6])
    with pytest.raises(DataError, match="no image was read"):
        import_data(folder, tmp_path / "none")
    tasks[1]["annotations"] = [{"result": prediction["result"][:1]}]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    report = import_data(folder, tmp_path / "coco")
    assert (report.images, report.annotations) == (1, 1)
    assert report.notes["tasks without a submitted annotation: images without labels"] == 1


def test_label_studio_finds_a_control_for_each_region(tmp_path: Path) -> None:
    found = replace(result(tmp_path / "100%.png"), categories=(Category(3, 'a "cell" & <b>'), Category(8, "two parts")))
    boxes = result(tmp_path / "b c.png", with_masks=False)
    (folder,) = write_results([found, replace(boxes, categories=found.categories)], tmp_path, ["labelstudio"])
    root = ElementTree.parse(folder / "labeling_config.xml").getroot()
    controls = {control.attrib["name"]: control for control in root}
    assert len(controls) == len(root)  # names must be unique
    tasks = json.loads((folder / "tasks.json").read_text())
    regions = [region for task in tasks for region in task["predictions"][0]["result"]]
    assert {region["type"] for region in regions} == {"polygonlabels", "brushlabels", "rectanglelabels"}
    for region in regions:
        control = controls[region["from_name"]]
        assert control.tag.lower() == region["type"]
        assert control.attrib["toName"] == region["to_name"] == "image"
        assert {label.attrib["value"] for label in control} >= set(region["value"][region["type"]])
    prefix = "/data/local-files/?d="
    paths = [folder / unquote(task["data"]["image"].removeprefix(prefix)) for task in tasks]
    assert [path.name for path in paths] == ["100%.png", "b c.png"]
    assert all(path.is_file() for path in paths)


def test_masks_without_holes_are_polygons_to_be_edited(tmp_path: Path) -> None:
    (folder,) = write_results([result(tmp_path / "a.png")], tmp_path, ["labelme"])
    shapes = json.loads((folder / "a.json").read_text())["shapes"]
    assert [shape["shape_type"] for shape in shapes] == ["polygon", "polygon", "polygon", "mask", "polygon"]
    assert shapes[1]["group_id"] == shapes[2]["group_id"] is not None
    assert (folder / "a.png").exists()


def test_boxes_are_rectangles(tmp_path: Path) -> None:
    (folder,) = write_results([result(tmp_path / "a.png", with_masks=False)], tmp_path, ["labelme"])
    shapes = json.loads((folder / "a.json").read_text())["shapes"]
    assert shapes[0]["points"] == [[4, 4], [21, 21]]
    assert {shape["shape_type"] for shape in shapes} == {"rectangle"}


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(list(map(str, arguments)))


def test_the_loop_from_no_labels(tmp_path: Path, in_this_process: None) -> None:
    """Pick, predict, correct, import, train, pick again: the commands of docs/data.md."""
    options: dict[str, Any] = {"backbone": "test_efficientnet", "num_classes": 1, "neck_args": {"out_channels": 16}}
    options |= {"min_size": 64, "max_size": 96, "detections_per_image": 3, "box_channels": 32, "mask_channels": 16}
    model = a2fpn.create_model("maskrcnn_fpn", score_threshold=0.0, **options)
    a2fpn.save_pretrained(model, tmp_path / "model")
    photos, _ = write_coco(tmp_path / "data", images=8)

    run("data", "pick", "--model", tmp_path / "model", "--images", photos, "--number", 5, "--output", tmp_path / "pick")
    where = ("--model", tmp_path / "model", "--score-threshold", 0, "--output", tmp_path / "found")
    run("predict", tmp_path / "pick" / "images", *where, "--format", "labelme")
    labels = sorted((tmp_path / "found" / "labelme").glob("*.json"))
    labels = [path for path in labels if path.name not in ("categories.json", "image_ids.json")]
    assert len(labels) == 5
    for path in labels:  # a person removes what is wrong and draws what is right
        record = json.loads(path.read_text())
        square = {"label": "object", "points": [[10, 10], [30, 10], [30, 30], [10, 30]], "shape_type": "polygon"}
        record["shapes"] = [{**square, "group_id": None, "flags": {}}]
        path.write_text(json.dumps(record))
    run("data", "import", tmp_path / "found" / "labelme", "--output", tmp_path / "coco", "--val", 0.4, "--no-check")
    annotations = tmp_path / "coco" / "annotations"
    train, val = (read_coco(annotations / f"instances_{split}.json") for split in ("train", "val"))
    assert (len(train.images), len(val.images)) == (3, 2)
    assert {a.area for part in (train, val) for members in part.annotations.values() for a in members} == {400.0}

    small = [f"model.name=local-dir:{tmp_path / 'model'}", "model.overrides={}"]
    settings = [*small, "data.workers=0", "data.passes=1", "data.transforms.crop_size=64", "run.max_steps=2"]
    folder = [f"data.root={tmp_path / 'coco'}", f"run.output={tmp_path / 'run'}"]
    run("train", "--config", "few_labels", *folder, *settings, "run.trackers=[]", "run.max_detections=3")
    best = tmp_path / "run" / "best"
    labeled = [f"--labeled={annotations / f'instances_{split}.json'}" for split in ("train", "val")]
    run("data", "pick", "--model", best, "--images", photos, "--number", 2, *labeled, "--output", tmp_path / "more")
    again = {path.name for path in (tmp_path / "more" / "images").iterdir()}
    assert len(again) == 2
    assert not again & {image.file_name for part in (train, val) for image in part.images.values()}
