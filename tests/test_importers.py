"""Imports: damaged members are named and counted; splits, names and links."""

import base64
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from a2fpn.cli import main
from a2fpn.data import check_data, read_image
from a2fpn.data.exporters import convert_data
from a2fpn.data.exporters.rings import bridge, to_one_ring, trace
from a2fpn.data.images import SUFFIXES
from a2fpn.data.importers import import_data
from a2fpn.data.importers.files import ImageIndex, image_size
from a2fpn.data.importers.label_studio import pack_runs, unpack_runs
from a2fpn.data.splits import assign_splits
from a2fpn.errors import DataError
from a2fpn.masks.rle import decode_rle, encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle
from tests.coco_data import write_coco
from tests.label_sets import FORMATS, annotations, datumaro, picture, small_set, square, write_set, yolo

# Splits


def test_splits_depend_on_names_and_not_on_order() -> None:
    names = [f"site_{i % 7}/img{i}.png" for i in range(70)]
    splits = dict(zip(names, assign_splits(names, val=0.2, group_by=r"site_(\d+)"), strict=True))
    turned = dict(zip(names[::-1], assign_splits(names[::-1], val=0.2, group_by=r"site_(\d+)"), strict=True))
    assert splits == turned
    groups = {name.split("/")[0]: split for name, split in splits.items()}
    assert all(groups[name.split("/")[0]] == split for name, split in splits.items())
    assert {"train", "val"} == set(splits.values())
    assert assign_splits(names, val=0.2) != assign_splits(names, val=0.2, seed=1)


@given(st.integers(2, 60), st.floats(0.01, 0.6), st.floats(0, 0.35))
@settings(max_examples=50, deadline=None)
def test_shares_are_met_by_one_image(count: int, val: float, test: float) -> None:
    splits = assign_splits([f"{i}.png" for i in range(count)], val=val, test=test)
    assert splits.count("train") >= 1
    assert abs(splits.count("val") - val * count) <= 1
    if count > 2:
        assert abs(splits.count("test") - test * count) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 1.0}, r"val must lie in \(0, 1\)"),
        ({"val": 0.5, "test": 0.5}, "their sum below 1"),
        ({"val": 0.2, "group_by": "("}, "is not a valid regular expression"),
        ({"val": 0.2, "group_by": "slide"}, "matches no image name; the first is 'a'"),
        ({"val": 0.2, "group_by": "^"}, "2 images are 1 group; a split needs two or more"),
    ],
)
def test_splits_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assign_splits(["a", "b"], **options)


def test_a_source_without_splits_gets_them(tmp_path: Path) -> None:
    yolo(tmp_path / "x", {f"site_{i % 3}_{i}": "0 .5 .5 .5 .5\n" for i in range(9)})
    report = import_data(tmp_path / "x", tmp_path / "y", val=0.3, group_by=r"site_(\d)")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 6, "val": 3}
    convert_data(write_set(tmp_path / "z"), tmp_path / "w", to="yolo")
    with pytest.raises(DataError, match=r"splits train, val; omit val and test \(--val, --test\) to keep"):
        import_data(tmp_path / "w", tmp_path / "v", val=0.3)


# Damaged members of the other formats


def labelme(shapes: list[dict[str, Any]], **changes: Any) -> str:
    record = {"version": "5.5.0", "shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 60}
    return json.dumps(record | changes)


SQUARE = [[1, 1], [9, 1], [9, 9], [1, 9]]


VOC = (
    "<annotation><filename>a.png</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>9</xmax><ymax>{}</ymax></bndbox></object></annotation>"
)


CVAT = '<annotations>\n<image name="{}" width="{}" height="40">\n{}\n</image></annotations>'


STUDIO = {
    "type": "rectanglelabels",
    "original_width": 60,
    "original_height": 40,
    "value": {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]},
}


def studio(**changes: Any) -> str:
    return json.dumps(
        [{"id": 5, "data": {"image": "/data/upload/1/12345678-a.png"}, "annotations": [{"result": [STUDIO | changes]}]}]
    )


@pytest.mark.parametrize(
    ("name", "file", "content", "loss"),
    [
        (
            "labelme",
            "a.json",
            labelme([{"label": "cat", "points": SQUARE[:2]}]),
            "shapes[0]: a polygon needs 3 points, got 2",
        ),
        ("labelme", "a.json", labelme([{"label": "cat", "points": [[1, "x"]]}]), "points must be pairs of numbers"),
        ("labelme", "a.json", labelme([{"label": "cat", "points": SQUARE, "shape_type": "rotation"}]), None),
        ("labelme", "a.json", labelme([{"label": "", "points": SQUARE}]), "shapes[0]: it has no label, got ''"),
        (
            "labelme",
            "a.json",
            labelme([{"label": "c", "points": SQUARE, "shape_type": "linestrip"}]),
            "a linestrip is not supported",
        ),
        ("labelme", "a.json", labelme([], imageHeight=41), "it gives 60 x 41 pixels, a.png has 60 x 40"),
        ("labelme", "a.json", labelme([], imagePath="..\\b.png")[:-5], "not valid JSON"),
        ("labelme", "b.json", labelme([], imagePath="C:\\x\\b.png"), "image 'C:\\\\x\\\\b.png' not found"),
        ("labelme", "a.json", "", "the file is empty"),
        ("voc", "a.xml", VOC.format("x"), "line 1: object 1: ymax is 'x', expected a number"),
        ("voc", "a.xml", VOC.format("-3"), "object 1: its box from 1, 1 to 9, -3 has no area"),
        ("voc", "a.xml", VOC.format(9).replace("cat", ""), "object 1: it has no name"),
        ("voc", "a.xml", VOC.format(9)[:-5], "line 1: invalid XML"),
        ("voc", "a.xml", VOC.format(9).replace("a.png", "D:\\b.png"), None),
        ("cvat", "x.xml", CVAT.format("b.png", 60, ""), "image 'b.png': image 'b.png' not found"),
        ("cvat", "x.xml", CVAT.format("a.png", 61, ""), "it gives 61 x 40 pixels, a.png has 60 x 40"),
        ("cvat", "x.xml", CVAT.format("a.png", 60, '<polygon label="c" points="1,2;3,4;5"/>'), "it has 5 coordinates"),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<polyline label="c" points="1,2;3,4"/>'),
            "a polyline is not supported",
        ),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<box label="c" xtl="1" ytl="q"/>'),
            "ytl is 'q', expected a number",
        ),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<mask label="c" rle="0, 9" left="0" top="0" width="2" height="2"/>'),
            "its runs add up to 9 pixels, its window has 4",
        ),
        ("cvat", "x.xml", CVAT.format("a.png", 60, "")[:-9], "line 4: invalid XML"),
        (
            "datumaro",
            "annotations/train.json",
            datumaro(type="polygon", label_id=0, points=[1, 2, 3]),
            "pairs x, y, got 3",
        ),
        ("datumaro", "annotations/train.json", datumaro(type="bbox", label_id=4, bbox=[1, 2, 3, 4]), "label_id is 4"),
        ("datumaro", "annotations/train.json", datumaro(type="polyline", label_id=0), "a polyline is not supported"),
        ("labelstudio", "x.json", studio(value={"rectanglelabels": ["cat"], "x": 0}), "it lacks y"),
        ("labelstudio", "x.json", studio(original_width=61), "drawn on 61 x 40 pixels, the image has 60 x 40"),
        ("labelstudio", "x.json", studio(type="keypointlabels"), "keypointlabels is not supported"),
        (
            "labelstudio",
            "x.json",
            studio(type="brushlabels", value={"brushlabels": ["c"], "format": "rle", "rle": [0]}),
            "is truncated",
        ),
    ],
)
def test_damaged_members_are_named_and_left_out(
    tmp_path: Path, name: str, file: str, content: str, loss: str | None
) -> None:
    root = tmp_path / "x"
    for image in ("a.png", "untouched.png"):
        picture(root / image)
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("\ufeff" + content, encoding="utf-8")
    if loss is None:
        assert import_data(root, tmp_path / "y", format=name).counts == {}
        return
    report = import_data(root, tmp_path / "y", format=name, unlabeled="keep")
    (found,) = report.losses
    assert found.file == str(root / file)
    assert loss in str(found)
    assert "\n" not in str(found)
    record = json.loads((tmp_path / "y" / "import_report.json").read_text())
    assert record["files"] == {str(root / file): {found.kind: 1}}


def embedding(root: Path, changes: dict[str, Any], **image: Any) -> bytes:
    """Write labelme's file of an image that is only in it; return the image's content."""
    content = io.BytesIO()
    Image.new("RGB", (60, 40), (9, 90, 200)).save(content, **({"format": "JPEG"} | image))
    (root / "site 1").mkdir(parents=True)
    encoded = base64.b64encode(content.getvalue()).decode()
    record = labelme([CAT_SHAPE], **{"imagePath": "..\\scans\\q.bmp", "imageData": encoded} | changes)
    (root / "site 1" / "p.json").write_text(record)
    return content.getvalue()


@pytest.mark.parametrize("images", ["link", "copy"])
@pytest.mark.parametrize(("format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif")])
def test_an_image_in_the_file_of_its_labels_is_written(tmp_path: Path, images: Any, format: str, suffix: str) -> None:
    content = embedding(tmp_path / "x", {}, format=format)
    for _ in range(2):
        report = import_data(tmp_path / "x", tmp_path / "y", images=images, overwrite=True)
        assert (report.images, report.annotations, report.counts) == (1, 1, {})
        placed = tmp_path / "y" / "images" / "site 1" / f"p.{suffix}"
        assert placed.read_bytes() == content
        assert not placed.is_symlink()
    assert not check_data(tmp_path / "y" / "images", tmp_path / "y" / "annotations" / "instances_train.json").errors


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_in_the_file_of_its_labels_is_converted(tmp_path: Path, name: str) -> None:
    content = embedding(tmp_path / "x", {})
    assert not convert_data(tmp_path / "x", tmp_path / "z", to=name, format="labelme").counts
    back = import_data(tmp_path / "z", tmp_path / "y", format=name)
    assert (back.images, back.annotations, back.counts) == (1, 1, {})
    (placed,) = (path for path in (tmp_path / "y" / "images").rglob("*") if path.is_file())
    assert placed.read_bytes() == content


def test_a_file_is_preferred_to_the_image_in_its_labels(tmp_path: Path) -> None:
    embedding(tmp_path / "x", {"imagePath": "q.png"})
    source = picture(tmp_path / "x" / "site 1" / "q.png")
    import_data(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "y" / "images" / "site 1" / "q.png").readlink() == source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imageData": "bm8gaW1hZ2U="}, "imageData is not a readable image (expected one of JPEG, "),
        ({"imageData": "x"}, "imageData is not a readable image (Invalid base64"),
        ({"imageData": 7}, "imageData is not a readable image ("),
        ({"imageData": ""}, "image '..\\\\scans\\\\q.bmp' not found; skipped"),
        ({"imageHeight": 41}, "it gives 60 x 41 pixels, ..\\scans\\q.bmp has 60 x 40; skipped"),
    ],
)
def test_an_image_in_labels_that_is_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    embedding(tmp_path / "x", changes)
    (tmp_path / "x" / "b.json").write_text(labelme([CAT_SHAPE], imagePath="b.png"))
    picture(tmp_path / "x" / "b.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.images == 1
    assert [message in str(loss) for loss in report.losses] == [True]


@pytest.mark.parametrize("format", ["auto", "labelstudio"])
def test_another_export_of_label_studio_is_named(tmp_path: Path, format: str) -> None:
    picture(tmp_path / "x" / "a.png")
    shape = {"original_width": 60, "original_height": 40, "points": SQUARE, "polygonlabels": ["cat"]}
    tasks = [{"image": "/data/upload/1/12345678-a.png", "id": 7, "label": [shape]}]
    (tmp_path / "x" / "min.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match=r"task 7: it names no image in data; export as JSON, not as JSON-MIN"):
        import_data(tmp_path / "x", tmp_path / "y", format=format)


@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "labelstudio", "labels", "datumaro"])
def test_images_without_labels_wait_for_them(tmp_path: Path, name: str) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to=name)
    picture(tmp_path / "x" / "later.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.images, sum(report.notes.values())) == (3, 1)
    report = import_data(tmp_path / "x", tmp_path / "z", unlabeled="keep")
    assert (report.images, report.splits["train"].empty) == (4, 2)


def test_xml_with_entities_of_its_own_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]>\n<annotations>&b;</annotations>'
    (tmp_path / "x" / "a.xml").write_text(bomb)
    with pytest.raises(DataError, match="defines XML entities"):
        import_data(tmp_path / "x", tmp_path / "y")


# Malformed records and odd names


def panoptic(root: Path, segments: Any, *, name: str = "a.png", category: Any = None, file: str = "x") -> Path:
    """A panoptic set of one image, whose map has the ids 1 in its left half and 2 in its right half."""
    picture(root / "images" / name)
    ids = np.zeros((40, 60, 3), np.uint8)
    ids[:, :30, 0], ids[:, 30:, 0] = 1, 2
    (root / file).mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(root / file / "a.png")
    data = {
        "images": [{"id": 1, "file_name": name, "height": 40, "width": 60}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [category or {"id": 1, "name": "cat", "isthing": 1}],
    }
    (root / f"{file}.json").write_text(json.dumps(data))
    return root


SEGMENTS = [{"id": 1, "category_id": 1, "iscrowd": 0}, {"id": 2, "category_id": 1, "iscrowd": 0}]


def task(**changes: Any) -> str:
    return json.dumps([{"id": 5, "data": {"image": "a.png"}, "annotations": [{"result": [STUDIO]}]} | changes])


def datumaro_file(**changes: Any) -> str:
    return json.dumps(json.loads(datumaro(type="bbox", label_id=0, bbox=[1, 2, 3, 4])) | changes)


LABELS = {"label": {"labels": [{"name": "cat"}]}}


POLYGON = {"type": "polygon", "label_id": 0, "points": [1, 2, 9, 2, 9, 9]}


CAT_SHAPE = {"label": "cat", "points": SQUARE}


NOSE_SHAPE = {"label": "nose", "points": [[3, 3]], "shape_type": "point"}


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="


CVAT_MASK = '<mask label="c" rle="{}" left="{}" top="0" width="2" height="2"/>'


@pytest.mark.parametrize(
    ("name", "content", "kind", "loss"),
    [
        (
            "labelme",
            labelme([{**CAT_SHAPE, "group_id": [1]}]),
            "bad-shape",
            "shapes[0]: its group is [1], expected a number",
        ),
        (
            "labelme",
            labelme([{**CAT_SHAPE, "points": [[math.inf] * 2] * 2, "shape_type": "mask", "mask": PNG}]),
            "bad-shape",
            "shapes[0]: a value of the wrong type or size (cannot convert float infinity",
        ),
        ("labelme", labelme([{**CAT_SHAPE, "label": "\ud800"}]), "unreadable-labels", "half of a character"),
        (
            "labelme",
            labelme([CAT_SHAPE, NOSE_SHAPE | {"group_id": 4}]),
            "bad-shape",
            "shapes[1]: the group 4 of the point has no obj",
        ),
        (
            "labelme",
            labelme([CAT_SHAPE | {"group_id": 4}, NOSE_SHAPE | {"group_id": 4}, NOSE_SHAPE | {"group_id": 4}]),
            "bad-shape",
            "shapes[2]: the group 4 has another point 'nose'",
        ),
        (
            "labelme",
            labelme(
                [CAT_SHAPE | {"group_id": 4}, CAT_SHAPE | {"group_id": 4, "label": "dog"}, NOSE_SHAPE | {"group_id": 4}]
            ),
            "ambiguous-points",
            "shapes[0]: the group 4 has several objects; its points are those of the first",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><width>abc</width></size><object>"),
            "unreadable-",
            "is 'abc', ex",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><width>inf</width></size><object>"),
            "unreadable-",
            "is 'inf', ex",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><height>nan</height></size><object>"),
            "unreadable-",
            "is 'nan'",
        ),
        (
            "cvat",
            CVAT.format("a.png", 60, CVAT_MASK.format("0, 4", "inf")),
            "bad-shape",
            "left is 'inf', expected a number",
        ),
        (
            "cvat",
            CVAT.format("a.png", 60, CVAT_MASK.format(f"{2**62},{2**62}", 0)),
            "bad-shape",
            "its runs add up to 9223",
        ),
        ("cvat", CVAT.format("a.png", 60, '<bax label="c"/>'), "unsupported-shape", "bax 1: a bax is not supported"),
        (
            "cvat",
            CVAT.format("a.png", 60, '<skeleton label="c">' + 2 * '<points label="n" points="1,2"/>' + "</skeleton>"),
            "bad-shape",
            "it has two points 'n'",
        ),
        (
            "datumaro",
            datumaro(**POLYGON, attributes=[1]),
            "bad-shape",
            "items[0].annotations[0]: a value of the wrong type",
        ),
        ("datumaro", datumaro(**POLYGON, group=[1]), "bad-shape", "items[0].annotations[0]: its group is [1]"),
        (
            "datumaro",
            datumaro(**POLYGON | {"type": [1]}),
            "bad-shape",
            "items[0].annotations[0]: a value of the wrong type",
        ),
        (
            "datumaro",
            datumaro(**POLYGON | {"points": [[1], 2]}),
            "bad-shape",
            "items[0].annotations[0]: a value of the wr",
        ),
        (
            "datumaro",
            datumaro_file(items=[{"id": "a", "annotations": 5}]),
            "bad-item",
            "annotations is '5', expected a list",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": [1]}),
            "bad-categories",
            "categories.points: a value of",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": {"items": [5]}}),
            "bad-categories",
            "categories.points:",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": {"items": [{"label_id": "x"}]}}),
            "bad-categories",
            "categories.points: a value of the wrong type",
        ),
        ("labelstudio", studio(value=[1]), "bad-shape", "task 5, result[0]: a value of the wrong type"),
        ("labelstudio", studio(meta=[1]), "bad-shape", "task 5, result[0]: a value of the wrong type"),
        ("labelstudio", studio(meta={"group": [1]}), "bad-shape", "task 5, result[0]: its group is [1]"),
        ("labelstudio", studio(type="choices", value=[1]), "", ""),
        ("labelstudio", task(annotations=5), "bad-item", "tasks[0]: annotations is '5', expected a list"),
        ("labelstudio", task(annotations=[{"result": {"a": 1}}]), "bad-item", "tasks[0]: result is"),
        (
            "labelstudio",
            studio(value=STUDIO["value"] | {"rectanglelabels": ["cat", "dog"]}),
            "several-labels",
            "task 5, result[0]: it has the labels cat, dog; the first is used",
        ),
        ("labelstudio", studio(value=STUDIO["value"] | {"rectanglelabels": [None]}), "bad-shape", "it has no label in"),
    ],
)
def test_malformed_records_are_counted(tmp_path: Path, name: str, content: str, kind: str, loss: str) -> None:
    for image in ("a.png", "untouched.png"):
        picture(tmp_path / "x" / image)
    path = tmp_path / "x" / ("a.xml" if name in ("voc", "cvat") else "a.json")
    path.write_text(content)
    report = import_data(tmp_path / "x", tmp_path / "y", format=name, unlabeled="keep")
    assert [(found.kind.startswith(kind), found.file, loss in str(found)) for found in report.losses] == [
        (True, str(path), True)
    ] * bool(kind)


@pytest.mark.parametrize(
    ("segments", "loss"),
    [
        (None, None),
        ([5], "annotations[0].segments_info[0]: a value of the wrong type"),
        ([SEGMENTS[0] | {"id": [1]}], "annotations[0].segments_info[0]: a value of the wrong type or size (unhashable"),
        (
            [SEGMENTS[0] | {"category_id": [1]}],
            "annotations[0].segments_info[0]: a value of the wrong type or size (unh",
        ),
        ([{"id": 1}], "annotations[0].segments_info[0]: it lacks category_id"),
        ([SEGMENTS[0] | {"id": 7}], "annotations[0].segments_info[0]: segment 7: it has no pixel in the map"),
        (5, "annotations[0]: segments_info is '5', expected a list"),
    ],
)
def test_malformed_segments_are_counted(tmp_path: Path, segments: Any, loss: str | None) -> None:
    root = panoptic(tmp_path / "x", segments)
    picture(root / "images" / "untouched.png")
    losses = list(map(str, import_data(root, tmp_path / "y", unlabeled="keep").losses))
    if loss is not None:
        assert losses.pop(0).startswith(f"{root / 'x.json'}, {loss}")
    if segments != 5:
        assert losses.pop().startswith(f"{root / 'x' / 'a.png'}: pixels of ")
    assert losses == []


def test_classes_of_one_id_or_one_name(tmp_path: Path) -> None:
    """In two files the same id may be another class; in one file it may not."""
    panoptic(tmp_path / "x", SEGMENTS, file="panoptic_train")
    dog = {"id": 1, "name": "dog", "isthing": 1}
    root = panoptic(tmp_path / "x", SEGMENTS, name="b.png", category=dog, file="panoptic_val")
    report = import_data(root, tmp_path / "y")
    assert report.categories == {1: "cat", 2: "dog"}
    assert report.notes == {"classes whose id is taken or too large, with a new one": 1}
    assert [raw["category_id"] for split in ("train", "val") for raw in annotations(tmp_path / "y", split)] == [
        1,
        1,
        2,
        2,
    ]
    data = json.loads((root / "panoptic_val.json").read_text())
    (root / "panoptic_val.json").write_text(json.dumps(data | {"categories": [dog, dog | {"name": "cat"}]}))
    with pytest.raises(DataError, match=r"panoptic_val\.json: two categories have the same id"):
        import_data(root, tmp_path / "z")
    (tmp_path / "x").rename(tmp_path / "w")
    segments = [segment | {"category_id": 2**70} for segment in SEGMENTS]
    panoptic(tmp_path / "x", segments, category={"id": 2**70, "name": "cat"})
    (tmp_path / "x" / "categories.json").write_text(
        json.dumps([{"id": 2**70, "name": "cat"}, {"id": 5, "name": "cat"}])
    )
    report = import_data(tmp_path / "x", tmp_path / "v")
    assert (report.categories, report.annotations) == ({1: "cat"}, 2)
    assert report.notes["classes with the name of another, merged with it"] == 1


@pytest.mark.parametrize(
    ("value", "crowd"), [("0", 0), ("false", 0), ("True", 1), (1, 1), ("yes", 1), (None, 0), (2, 0)]
)
@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "datumaro", "panoptic"])
def test_flags_are_read_in_any_spelling(tmp_path: Path, name: str, value: Any, crowd: int) -> None:
    root = panoptic(tmp_path / "x", [segment | {"iscrowd": value} for segment in SEGMENTS])
    if name != "panoptic":
        (root / "x.json").unlink()
        text = "" if value is None else str(value)
        attribute = f'<attribute name="iscrowd">{text}</attribute>'
        (root / ("a.xml" if name in ("voc", "cvat") else "train.json")).write_text(
            {
                "labelme": labelme([CAT_SHAPE | {"flags": {"iscrowd": value}}]),
                "voc": VOC.format(9).replace("<bndbox>", f"<iscrowd>{text}</iscrowd><bndbox>"),
                "cvat": CVAT.format("a.png", 60, f'<polygon label="c" points="1,2;9,2;9,9">{attribute}</polygon>'),
                "datumaro": datumaro(**POLYGON, attributes={"is_crowd": value}),
            }[name]
        )
        for path in (root / "x").iterdir():
            path.unlink()
    report = import_data(root, tmp_path / "y", format=name)
    assert {raw["iscrowd"] for raw in annotations(tmp_path / "y")} == {crowd}
    assert [note.startswith("values of is") for note in report.notes] == [True] * (value == 2)


def test_values_of_masks_beyond_8_bits(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "JPEGImages" / "a.png")
    (tmp_path / "x" / "Annotations").mkdir()
    (tmp_path / "x" / "Annotations" / "a.xml").write_text(VOC.format(9))
    values = np.zeros((40, 60), np.uint16)
    values[2:9, 2:9], values[20:30, 20:30] = 1, 257
    (tmp_path / "x" / "SegmentationObject").mkdir()
    Image.fromarray(values).save(tmp_path / "x" / "SegmentationObject" / "a.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert annotations(tmp_path / "y")[0]["area"] == 49
    assert "SegmentationObject/a.png: pixels of 257, which are no objects of a.xml; skipped" in str(report)


@pytest.mark.parametrize(
    ("subset", "split"),
    [("site/1", "site_1"), ("../x", "_x"), ("..", "train"), ("é" * 300, "é" * 48)],
)
def test_splits_of_any_name_are_safe_names_of_files(tmp_path: Path, subset: str, split: str) -> None:
    picture(tmp_path / "x" / "a.png")
    content = CVAT.format("a.png", 60, '<polygon label="c" points="1,2;9,2;9,9"/>')
    (tmp_path / "x" / "a.xml").write_text(content.replace("<image ", f'<image subset="{subset}" '))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert list(report.splits) == [split]
    assert len(annotations(tmp_path / "y", split)) == 1
    assert report.notes == {f"images of the split {subset!r}, called {split!r}": 1}


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"yolo", "labels", "mask_files"}))
@pytest.mark.parametrize(
    "names",
    [
        ("a%20b.png", "a b.png"),
        ("x?d=y.png", "y.png"),
        ("c:d.png", "d.png"),
        (" lead.png", "lead.png"),
        ("a%2520b.png", "a%20b.png"),
    ],
)
def test_names_like_others_are_not_confused(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number, file in enumerate(names, 1):
        picture(tmp_path / "x" / "images" / file)
        data["images"].append({"id": number, "file_name": file, "height": 40, "width": 60})
        left = 10 * number
        polygon = [left, 5, left + 5, 5, left + 5, 20, left, 20]
        entry = {"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon], "iscrowd": 0}
        data["annotations"].append(entry | {"bbox": [left, 5, 5, 15], "area": 75})
    (tmp_path / "x" / "annotations").mkdir()
    (tmp_path / "x" / "annotations" / "instances_train.json").write_text(json.dumps(data))
    assert not convert_data(tmp_path / "x", tmp_path / "z", to=name).counts
    report = import_data(tmp_path / "z", tmp_path / "y")
    assert (report.images, report.counts) == (2, {})
    back = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    files = {raw["id"]: raw["file_name"] for raw in back["images"]}
    assert {files[raw["image_id"]]: raw["bbox"][0] for raw in back["annotations"]} == dict(
        zip(names, (10, 20), strict=True)
    )


@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "datumaro"])
@pytest.mark.parametrize("names", [("A.png", "a.png"), ("Site/a.png", "site/a.png")])
def test_names_that_differ_in_case_are_two_images(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    root = tmp_path / "x"
    for number, file in enumerate(names):
        picture(root / file)
        content = {
            "labelme": labelme([CAT_SHAPE | {"label": file}], imagePath=Path(file).name),
            "voc": VOC.format(9).replace("cat", file),
            "cvat": CVAT.format(file, 60, f'<polygon label="{file}" points="1,2;9,2;9,9"/>'),
            "datumaro": datumaro(**POLYGON)
            .replace('"path": "a.png"', f'"path": "{file}"')
            .replace('"cat"', f'"{file}"'),
        }[name]
        suffix = ".xml" if name in ("voc", "cvat") else ".json"
        path = root / file if name in ("labelme", "voc") else root / f"{number}.png"
        path.with_suffix(suffix).write_text(content)
    if (root / names[0]).samefile(root / names[1]):
        pytest.skip("the file system ignores case")
    report = import_data(root, tmp_path / "y")
    assert (report.images, report.annotations, report.counts) == (2, 2, {})
    classes, images = report.categories, {}
    for split in report.splits:
        data = json.loads((tmp_path / "y" / "annotations" / f"instances_{split}.json").read_text())
        files = {raw["id"]: raw["file_name"] for raw in data["images"]}
        images |= {files[raw["image_id"]]: classes[raw["category_id"]] for raw in data["annotations"]}
    assert images == dict(zip(names, names, strict=True))


def test_an_ambiguous_name_is_not_taken_for_a_stem(tmp_path: Path) -> None:
    for file in ("b/a.png", "c/a.png", "a.png.jpg"):
        picture(tmp_path / file)
    index = ImageIndex(tmp_path)
    assert index.find("a.png") is None
    assert index.find("x/c/a.png") == tmp_path / "c" / "a.png"
    assert index.find("/data/local-files/?d=b/a.png") == tmp_path / "b" / "a.png"


def test_names_in_another_composition_are_found(tmp_path: Path) -> None:
    """As macOS decomposes them."""
    picture(tmp_path / "x" / "e\u0301.png")
    (tmp_path / "x" / "a.xml").write_text(CVAT.format("\u00e9.png", 60, ""), encoding="utf-8")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.images, report.counts) == (1, {})


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode")
def test_names_that_are_no_text_are_counted(tmp_path: Path) -> None:
    for name in (b"\xe9.png", b"a.png"):
        picture(tmp_path / "x" / os.fsdecode(name))
    (tmp_path / "x" / "a.json").write_text(labelme([CAT_SHAPE]))
    report = import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    assert (report.images, report.counts) == (1, {"unsafe-name": 1})
    assert "the name \\udce9.png is not valid UTF-8; skipped" in str(report)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to="voc")
    for number, folder in enumerate(("JPEGImages", "Annotations", "SegmentationObject", "ImageSets")):
        (tmp_path / "x" / folder).rename(tmp_path / f"data_{number}")
        (tmp_path / "x" / folder).symlink_to(tmp_path / f"data_{number}")
    (tmp_path / "x" / "again").symlink_to("JPEGImages")
    (tmp_path / "x" / "up").symlink_to("..")
    picture(tmp_path / "unrelated.png")
    report = import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    assert (report.format, report.images, report.counts) == ("voc", 3, {})
    assert report.splits["train"].masks == 6


@pytest.mark.parametrize("name", ["voc", "cvat", "labelme"])
def test_files_in_utf_16_are_detected(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "x" / "a.png")
    shape = '<box label="c" xtl="1" ytl="2" xbr="9" ybr="9"/>'
    content = {"voc": VOC.format(9), "cvat": CVAT.format("a.png", 60, shape), "labelme": labelme([CAT_SHAPE])}[name]
    path = tmp_path / "x" / ("a.json" if name == "labelme" else "a.xml")
    path.write_text(content, encoding="utf-16")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.format, report.annotations, report.counts) == (name, 1, {})
    if name != "labelme":
        path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>\n' + content, encoding="utf-16")
        with pytest.raises(DataError, match="defines XML entities"):
            import_data(tmp_path / "x", tmp_path / "z", strict=True)


# Rings and runs


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_rings_give_back_the_pixels(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    if not mask.any():
        return
    rings = trace(mask.astype(np.uint8))
    assert all(len(ring) >= 4 for ring in rings)
    ring = to_one_ring({**encode_masks(mask[None])[0]}, height, width)
    assert ring is not None
    back = decode_rle([segmentation_to_rle([ring.ravel().tolist()], height, width)])[0]
    assert (back == mask).all()


def test_parts_that_overlap_are_one_object(tmp_path: Path) -> None:
    parts = [[1.0, 1, 20, 1, 20, 20, 1, 20], [10.0, 10, 30, 10, 30, 30, 10, 30]]
    ring = to_one_ring(parts, 40, 40)
    assert ring is not None
    union = decode_rle([segmentation_to_rle(parts, 40, 40)])[0]
    assert (decode_rle([segmentation_to_rle([ring.ravel().tolist()], 40, 40)])[0] == union).all()
    assert len(bridge([])) == 0


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 70_000)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_runs_of_brushes_come_back(runs: list[tuple[int, int]]) -> None:
    values = np.repeat(np.array([v for v, _ in runs], np.uint8), [n for _, n in runs])
    assert (unpack_runs(np.array(pack_runs(values), np.uint8), len(values)) == values).all()
    with pytest.raises(ValueError, match=r"is truncated|the image needs"):
        unpack_runs(np.array(pack_runs(values)[:-3], np.uint8), len(values))


def test_literal_runs_of_brushes_are_read() -> None:
    # Two values one by one, as Label Studio packs what doesn't repeat: flag 0, width 3 (index 0), length 2.
    bits = (
        f"{2:032b}{7:05b}" + "".join(f"{w - 1:04b}" for w in (3, 4, 8, 16)) + "0" + "00" + "001" + f"{9:08b}{200:08b}"
    )
    bits += "0" * (-len(bits) % 8)
    content = np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], np.uint8)
    assert unpack_runs(content, 2).tolist() == [9, 200]


# The command line


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command_imports_reports_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = write_set(tmp_path / "coco")
    code, out, _ = run(["data", "convert", str(coco), "--to", "labelme", "--output", str(tmp_path / "x")], capsys)
    assert code == 0
    (tmp_path / "x" / "train" / "site_0" / "train0.json").write_text("{")
    code, out, _ = run(["data", "import", str(tmp_path / "x"), "--output", str(tmp_path / "y")], capsys)
    assert code == 0
    assert re.search(r"\(labelme\).*5 images, 9 annotations, 2 classes", out)
    assert "train0.json, line 1: not valid JSON" in out
    assert f"check of {tmp_path / 'y' / 'annotations' / 'instances_train.json'}: 0 errors" in out
    code, _, err = run(["data", "import", str(tmp_path / "gone"), "--output", str(tmp_path / "z")], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "no such file or folder" in err


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"no image"), os.remove])
def test_unreadable_images_are_left_out(tmp_path: Path, change: Callable[[Path], object]) -> None:
    coco = write_set(tmp_path / "coco")
    convert_data(coco, tmp_path / "x", to="yolo", images="copy")
    change(tmp_path / "x" / "images" / "train" / "site_0" / "train0.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.images == 5
    assert report.counts == {"missing-image" if change is os.remove else "unreadable-image": 1}


def test_the_synthetic_set_of_the_other_tests_survives(tmp_path: Path) -> None:
    images, path = write_coco(tmp_path / "coco")
    convert_data(path, tmp_path / "x", to="cvat", format="coco")
    assert import_data(tmp_path / "x", tmp_path / "y").counts == {}
    assert images.is_dir()


@pytest.mark.skipif(not features.check("avif"), reason="needs PIL's decoder of AVIF")
@pytest.mark.parametrize("name", FORMATS)
def test_images_of_every_suffix_are_found(tmp_path: Path, name: str) -> None:
    files = [f"{suffix[1:]}{suffix}" for suffix in SUFFIXES if suffix not in (".heic", ".heif")]
    root = small_set(tmp_path / "coco", files, [square(n, 1) for n in range(1, len(files) + 1)])
    assert not convert_data(root, tmp_path / "x", to=name).counts
    back = import_data(tmp_path / "x", tmp_path / "y", format=name)
    assert (back.images, back.annotations, back.counts) == (len(files), len(files), {})


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_macos_adds_are_passed_over(tmp_path: Path, name: str) -> None:
    convert_data(write_set(tmp_path / "coco"), tmp_path / "x", to=name)
    for path in [path for path in (tmp_path / "x").rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "x" / ".DS_Store").write_bytes(b"Bud1")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.format, report.images, report.counts) == (name, 6, {})
    assert not [note for note in report.notes if "label" in note]


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp", "gray.jpg", "progressive.jpg"])
def test_sizes_of_headers_are_those_of_the_pictures(tmp_path: Path, name: str, orientation: int | None) -> None:
    options: dict[str, Any] = {"progressive": True} if name.startswith("prog") else {}
    if orientation is not None and not name.endswith("bmp"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.new("L" if name.startswith("gray") else "RGB", (61, 40)).save(tmp_path / name, **options)
    assert image_size(tmp_path / name) == tuple(read_image(tmp_path / name).shape[1:])


def test_a_training_run_says_how_to_import(tmp_path: Path) -> None:
    from a2fpn.training.config import DataSection
    from a2fpn.training.sources import open_training_set

    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n"})
    with pytest.raises(DataError, match=r"holds yolo labels and no annotations/.*\. Import them.*a2fpn data import"):
        open_training_set(DataSection(root=str(root)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such"):
        open_training_set(DataSection(root=str(tmp_path / "empty")))


def test_new_images_get_new_ids(tmp_path: Path) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to="labelme")
    picture(tmp_path / "x" / "train" / "a_new.png")
    import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    data = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    ids = {raw["file_name"]: raw["id"] for raw in data["images"]}
    assert ids == {"site_0/train0.png": 1, "site_1/train1.png": 2, "site_2/train2.png": 3, "a_new.png": 4}
