"""GeoJSON of QuPath on import, and results that QuPath opened and this package reads back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a2fpn import Category, Result
from a2fpn.data import import_data, read_coco
from a2fpn.data.importers import detect
from a2fpn.data.importers.shapes import ellipse, with_holes
from a2fpn.errors import DataError
from a2fpn.masks.rle import decode_rle, encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle
from a2fpn.writers import write_results
from tests.label_sets import annotations, picture

SQUARE = [[5, 5], [20, 5], [20, 20], [5, 20], [5, 5]]
HOLE = [[8, 8], [12, 8], [12, 12], [8, 12], [8, 8]]


def feature(coordinates: Any = (SQUARE,), kind: str = "Polygon", **properties: Any) -> dict[str, Any]:
    given = {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}} | properties
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": given}


def collection(*features: Any, **more: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features), **more}


def write(root: Path, content: Any, name: str = "a.geojson", image: str = "a.png") -> Path:
    picture(root / image)
    (root / name).write_text(json.dumps(content))
    return root


def names(folder: Path) -> list[str]:
    coco = read_coco(folder / "annotations" / "instances_train.json")
    return [category.name for category in coco.categories]


@pytest.mark.parametrize("content", [collection(feature()), [feature()], feature()], ids=["collection", "list", "one"])
@pytest.mark.parametrize("name", ["a.geojson", "a.json", "a.png.geojson"])
def test_each_layout_of_a_file_is_detected_and_read(content: Any, name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "x", content, name)
    assert detect(source) == "geojson"
    report = import_data(source, tmp_path / "y")
    assert not report.counts
    assert annotations(tmp_path / "y")[0]["segmentation"] == [[5, 5, 20, 5, 20, 20, 5, 20]]
    assert names(tmp_path / "y") == ["Tumor"]


def test_parts_are_polygons_and_holes_are_cut(tmp_path: Path) -> None:
    other = [[30, 5], [40, 5], [40, 15], [30, 15]]  # not closed
    features = [feature([[SQUARE], [other]], "MultiPolygon"), feature([[SQUARE, HOLE], [other]], "MultiPolygon")]
    report = import_data(write(tmp_path / "x", collection(*features)), tmp_path / "y")
    assert not report.counts
    parts, ring = annotations(tmp_path / "y")
    assert [len(polygon) for polygon in parts["segmentation"]] == [8, 8]
    mask = decode_rle([segmentation_to_rle(ring["segmentation"], 40, 60)])[0]
    expected = np.zeros((40, 60), dtype=bool)
    expected[5:20, 5:20], expected[8:12, 8:12], expected[5:15, 30:40] = True, False, True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(8))
def test_results_come_back_with_the_same_pixels(seed: int, tmp_path: Path) -> None:
    """Holes in holes, pixels that touch at corners, objects of several parts."""
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 40, 60)) < 0.1 + 0.1 * seed
    masks[:, :, :20] = False
    result = Result(
        boxes=np.array([[20, 0, 60, 40]] * 3, dtype=np.float32),
        scores=np.array([0.9, 0.8, 0.7], dtype=np.float32),
        labels=np.array([1, 0, 1]),
        size=(40, 60),
        categories=(Category(1, "cell"), Category(2, "stop sign")),
        rles=tuple(encode_masks(masks)),
        path="a.png",
    )
    picture(tmp_path / "x" / "a.png")
    write_results([result], tmp_path / "x", ["geojson"])
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    found = annotations(tmp_path / "y")
    assert [names(tmp_path / "y")[entry["category_id"] - 1] for entry in found] == ["stop sign", "cell", "stop sign"]
    rles = [segmentation_to_rle(entry["segmentation"], 40, 60) for entry in found]
    np.testing.assert_array_equal(decode_rle(rles), masks)


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        ({"name": "Tumor: Positive"}, "Tumor: Positive"),
        ({"names": ["Tumor", "Positive"]}, "Tumor: Positive"),
        ("Tumor", "Tumor"),
        (None, "object"),
        (["Tumor"], None),
        ({}, "object"),
    ],
)
def test_classes_are_those_that_qupath_shows(classification: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path / "x", collection(feature(classification=classification), feature()))
    report = import_data(tmp_path / "x", tmp_path / "y")
    if name is None:
        assert "its classification must be an object with a name, got ['Tumor']" in str(report.losses[0])
        return
    assert not report.counts
    assert names(tmp_path / "y") == list(dict.fromkeys(sorted([name, "Tumor"])))


@pytest.mark.parametrize("key", ["class", "label", "category"])
def test_classes_of_other_programs_are_properties(key: str, tmp_path: Path) -> None:
    write(tmp_path / "x", collection(feature(classification=None, **{key: "car"})))
    import_data(tmp_path / "x", tmp_path / "y")
    assert names(tmp_path / "y") == ["car"]


def test_other_planes_and_ignored_classes_are_left_out(tmp_path: Path) -> None:
    second = feature()
    second["geometry"] |= {"plane": {"c": -1, "z": 1, "t": 0}}
    first = feature()
    first["geometry"] |= {"plane": {"c": -1, "z": 0, "t": 0}}
    content = collection(first, second, feature(classification={"name": "Ignore*"}))
    report = import_data(write(tmp_path / "x", content), tmp_path / "y")
    assert report.annotations == 1
    assert report.counts == {"other-plane": 1}
    assert "it is on plane z = 1, t = 0; only the first is read" in str(report.losses[0])
    assert report.notes == {"objects of the class Ignore*, which QuPath ignores, skipped": 1}


def test_both_suffixes_of_ome_tiff_may_be_missing(tmp_path: Path) -> None:
    assert not import_data(write(tmp_path / "x", feature(), image="a.ome.tif"), tmp_path / "y").counts


def test_objects_without_a_class_take_the_option(tmp_path: Path) -> None:
    bare = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}, "properties": None}
    import_data(write(tmp_path / "x", [bare]), tmp_path / "y", category="nucleus")
    assert names(tmp_path / "y") == ["nucleus"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (collection(feature([5, 5], "Point")), "unsupported-shape", "features[0]: a Point is not supported by COCO"),
        (collection(feature(objectType="tmaCore")), "unsupported-shape", "a tmaCore is not an object"),
        (collection(feature(objectType=[])), "unsupported-shape", "a [] is not an object"),
        (collection(feature([SQUARE[:2]])), "bad-shape", "a ring needs 3 points, got 2"),
        (collection(feature([["x"]])), "bad-shape", "must be rings of positions x, y"),
        (collection(feature([])), "bad-shape", "its geometry has no coordinates"),
        (collection(feature([[]], "MultiPolygon")), "bad-shape", "its geometry has no coordinates"),
        (collection(feature([SQUARE, [[1, 1], [2, float("nan")], [3, 3]]])), "bad-shape", "not a valid pixel position"),
        (collection(feature([[[-80, -20], [-70, -20], [-70, -10]]])), "unusable-object", "lies outside the image"),
        (collection(feature(), None, 7), "bad-shape", "a value of the wrong type"),
        (collection({"type": "Feature"}), "bad-shape", "it lacks geometry"),
        (collection(feature(), crs={"type": "name"}), "unreadable-labels", "(crs), expected pixels of the image"),
        ({"type": "FeatureCollection"}, "unreadable-labels", "not GeoJSON; expected an object with the list features"),
    ],
)
def test_what_is_lost_is_said(content: Any, kind: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "x", content)
    picture(tmp_path / "x" / "b.png")
    (tmp_path / "x" / "b.geojson").write_text(json.dumps(collection(feature())))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.counts[kind]
    assert message in " ".join(str(loss) for loss in report.losses)
    assert report.images >= 1


def test_a_file_without_its_image_and_a_second_one_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x", collection(feature()))
    for name in ("a.json", "c.geojson"):
        (tmp_path / "x" / name).write_text(json.dumps(collection(feature())))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.counts == {"missing-image": 1, "duplicate-stem": 1}
    with pytest.raises(DataError, match="image 'c' not found"):
        import_data(tmp_path / "x", tmp_path / "z", strict=True)


def test_annotations_around_detections_are_noted(tmp_path: Path) -> None:
    content = collection(feature(), feature([HOLE], objectType="detection"), feature([HOLE], objectType="cell"))
    report = import_data(write(tmp_path / "x", content), tmp_path / "y")
    assert report.annotations == 3
    assert "files with annotations beside detections or cells; all became objects, also regions" in report.notes


def test_ellipses_have_their_area_and_holes_may_cross_the_border() -> None:
    mask = decode_rle([segmentation_to_rle([ellipse((30, 20), (12, 6), 90)], 40, 60)])[0]
    assert mask.sum() == pytest.approx(np.pi * 72, rel=0.03)
    assert np.ptp(np.nonzero(mask)[0]) > np.ptp(np.nonzero(mask)[1])
    with pytest.raises(ValueError, match="must be positive, got 0 and 5"):
        ellipse((1, 1), (0, 5))
    outer, hole = [-10.0, -10, 20, -10, 20, 20, -10, 20], [-5.0, -5, 70, -5, 70, 10, -5, 10]
    mask = decode_rle([segmentation_to_rle(with_holes([[outer, hole]], 40, 60), 40, 60)])[0]
    expected = np.zeros((40, 60), dtype=bool)
    expected[10:20, :20] = True
    np.testing.assert_array_equal(mask, expected)
