"""VGG Image Annotator on import: both versions, shapes, and the attribute that is the class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2fpn.data import import_data, read_coco
from a2fpn.data.importers import detect
from a2fpn.errors import DataError
from a2fpn.masks.rle import decode_rle
from a2fpn.masks.segmentation import segmentation_to_rle
from tests.label_sets import annotations, picture

SQUARE = {"name": "polygon", "all_points_x": [5, 20, 20, 5], "all_points_y": [5, 5, 20, 20]}


def region(shape: dict[str, Any] | None = None, **attributes: Any) -> dict[str, Any]:
    return {"shape_attributes": shape or SQUARE, "region_attributes": attributes}


def entry(*regions: Any, name: str = "a.png") -> dict[str, Any]:
    return {"filename": name, "size": 123, "regions": list(regions), "file_attributes": {}}


def project(entries: dict[str, Any], **attributes: Any) -> dict[str, Any]:
    return {
        "_via_settings": {"project": {"name": "x"}},
        "_via_img_metadata": entries,
        "_via_attributes": {"region": attributes, "file": {}},
        "_via_data_format_version": "2.0.10",
    }


def write(root: Path, content: Any, *images: str) -> Path:
    for image in images or ("a.png",):
        picture(root / image)
    (root / "via.json").write_text(json.dumps(content))
    return root


def names(folder: Path) -> list[str]:
    return [category.name for category in read_coco(folder / "annotations" / "instances_train.json").categories]


def classes(folder: Path) -> list[str]:
    coco = read_coco(folder / "annotations" / "instances_train.json")
    by_id = {category.id: category.name for category in coco.categories}
    return [by_id[one.category_id] for one in coco.annotations[next(iter(coco.images))]]


@pytest.mark.parametrize(
    "content",
    [
        project({"a.png123": entry(region())}),
        {"a.png123": entry(region())},
        {"a.png123": entry(name="a.png") | {"fileref": "", "base64_img_data": "", "regions": {"0": region()}}},
    ],
    ids=["project", "export", "version 1"],
)
def test_each_version_is_detected_and_read(content: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "x", content)
    assert detect(source) == "via"
    report = import_data(source, tmp_path / "y", category="balloon")
    assert not report.counts
    assert annotations(tmp_path / "y")[0]["segmentation"] == [[5, 5, 20, 5, 20, 20, 5, 20]]
    assert names(tmp_path / "y") == ["balloon"]


def test_a_file_per_split_keeps_the_splits(tmp_path: Path) -> None:
    """The layout of the balloon data set of Matterport's, detectron2's and mmdetection's tutorials."""
    for split in ("train", "val"):
        write(tmp_path / "x" / split, {f"{split}.png123": entry(region(), name=f"{split}.png")}, f"{split}.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert {split: count.annotations for split, count in report.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ({"name": "rect", "x": 5, "y": 5, "width": 10, "height": 4}, 40),
        ({"name": "circle", "cx": 20, "cy": 20, "r": 8}, np.pi * 64),
        ({"name": "ellipse", "cx": 20, "cy": 20, "rx": 12, "ry": 6, "theta": np.pi / 2}, np.pi * 72),
    ],
)
def test_shapes_have_their_area(shape: dict[str, Any], area: float, tmp_path: Path) -> None:
    import_data(write(tmp_path / "x", {"a": entry(region(shape))}), tmp_path / "y", box_masks=True)
    (found,) = annotations(tmp_path / "y")
    assert found["area"] == pytest.approx(area, rel=0.01)
    if shape["name"] == "ellipse":
        rows, columns = np.nonzero(decode_rle([segmentation_to_rle(found["segmentation"], 40, 60)])[0])
        assert np.ptp(rows) > np.ptp(columns)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"label": "cat"}, "cat"),
        ({"species": "cat"}, "cat"),
        ({"note": "blurred", "Class": "cat"}, "cat"),
        ({"note": "blurred", "kind": "cat"}, "cat"),  # a choice before a text
        ({"label": {"cat": True, "dog": False}}, "cat"),
        ({"label": " cat "}, "cat"),
        ({"label": "1"}, "cat"),  # an option with a description
        ({"label": 7}, "7"),
        ({"label": ["cat"]}, "cat"),
    ],
)
def test_the_class_is_the_likely_attribute(attributes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    declared = {"kind": {"type": "dropdown", "options": {}}, "note": {"type": "text"}}
    declared["label"] = {"type": "radio", "options": {"1": "cat"} if attributes.get("label") == "1" else {}}
    report = import_data(write(tmp_path / "x", project({"a": entry(region(**attributes))}, **declared)), tmp_path / "y")
    assert classes(tmp_path / "y") == [expected]
    noted = [note for note in report.notes if "classes are read from the attribute" in note]
    assert len(noted) == (len(attributes) > 1)


def test_options_give_the_classes_and_their_order(tmp_path: Path) -> None:
    declared = {"label": {"type": "dropdown", "options": {"zebra": "", "cat": "tabby"}, "default_options": {}}}
    content = project({"a": entry(region(label="cat"), region(label="zebra"))}, **declared)
    import_data(write(tmp_path / "x", content), tmp_path / "y")
    assert names(tmp_path / "y") == ["zebra", "tabby"]
    assert classes(tmp_path / "y") == ["tabby", "zebra"]


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (entry(region({"name": "polyline"})), "bad-shape", "a.png, regions[0]: a polyline is not supported by COCO"),
        (entry(region({"name": "point", "cx": 1, "cy": 1})), "bad-shape", "a point is not supported"),
        (entry(region(SQUARE | {"all_points_x": [1, 2]})), "bad-shape", "3 or more points, got 2 x and 4 y"),
        (entry(region({"name": "rect", "x": 1, "y": 1})), "bad-shape", "it lacks width"),
        (entry(region({"name": "circle", "cx": 9, "cy": 9, "r": 0})), "bad-shape", "must be positive, got 0 and 0"),
        (
            entry(region({"name": "rect", "x": "?", "y": 1, "width": 2, "height": 2})),
            "bad-shape",
            "x is '?', expected a number",
        ),
        (entry({}), "bad-shape", "it lacks shape_attributes"),
        (entry(None), "bad-shape", "a value of the wrong type"),
        (entry(region(), name="c.png"), "missing-image", "image 'c.png' not found"),
        (entry(region(), name="b.png"), "duplicate-image", "b.png is listed twice"),
        ({"regions": [region()]}, "bad-item", "it has no filename"),
        (7, "bad-item", "it has no filename"),
    ],
)
def test_what_is_lost_is_said(bad: Any, kind: str, message: str, tmp_path: Path) -> None:
    content = {"b.png1": entry(region(), name="b.png"), "bad": bad}
    report = import_data(write(tmp_path / "x", content, "a.png", "b.png"), tmp_path / "y")
    assert report.counts == {kind: 1}
    assert message in str(report.losses[0])
    assert report.annotations == 1


def test_two_marked_options_and_a_missing_class_are_named(tmp_path: Path) -> None:
    marked = [{"cat": True, "dog": True}, {"cat": True}, "", None]
    content = {"a": entry(*(region(label=value) for value in marked))}
    report = import_data(write(tmp_path / "x", content), tmp_path / "y")
    assert report.counts == {"bad-shape": 3}
    assert "its attribute 'label' has 2 values, expected one class" in str(report.losses[0])
    assert classes(tmp_path / "y") == ["cat"]


@pytest.mark.parametrize(("unlabeled", "images"), [("auto", 1), ("keep", 2)])
def test_images_without_regions_are_not_annotated_yet(unlabeled: Any, images: int, tmp_path: Path) -> None:
    content = project({"a": entry(region()), "b": entry(name="b.png")})
    report = import_data(write(tmp_path / "x", content, "a.png", "b.png"), tmp_path / "y", unlabeled=unlabeled)
    assert not report.counts
    assert report.images == images


@pytest.mark.parametrize("content", [[], {"_via_img_metadata": [], "x": "_via_"}, 5])
def test_other_json_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"via\.json: not a VIA file; expected an object of images"):
        import_data(write(tmp_path / "x", content) / "via.json", tmp_path / "y", format="via")
