"""Results in files for other programs hold the objects that were found."""

import csv
import io
import json

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from a2fpn.config import Category
from a2fpn.data import encode_masks, read_coco
from a2fpn.inference import Result
from a2fpn.report.exports import mask_polygons, to_coco, to_csv, to_geojson

SIZE = (40, 60)


def result(masks: bool = True) -> Result:
    """A ring, and an object of two parts."""
    planes = np.zeros((2, *SIZE), dtype=np.uint8)
    planes[0, 5:20, 5:25] = 1
    planes[0, 10:15, 10:20] = 0
    planes[1, 30:35, 0:10] = 1
    planes[1, 30:40, 50:60] = 1
    return Result(
        boxes=np.array([[5, 5, 25, 20], [0, 30, 60, 40]], dtype=np.float32),
        scores=np.array([0.9, 0.4], dtype=np.float32),
        labels=np.array([1, 0]),
        size=SIZE,
        categories=(Category(3, "cell, round"), Category(8, "ring")),
        rles=tuple(encode_masks(planes)) if masks else None,
    )


def area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return float(abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2)


def test_geojson_has_closed_rings_with_holes_and_parts() -> None:
    ring, parts = json.loads(to_geojson(result()))["features"]
    assert ring["properties"]["classification"]["name"] == "ring"
    assert ring["properties"]["measurements"] == {"score": 0.9, "area": 250.0}
    assert ring["geometry"]["type"] == "Polygon"
    outer, hole = ring["geometry"]["coordinates"]
    assert outer[0] == outer[-1]
    assert hole[0] == hole[-1]
    # Corners are cut at half a pixel.
    assert area(outer) - area(hole) == pytest.approx(250, abs=2)
    assert parts["geometry"]["type"] == "MultiPolygon"
    assert sum(area(part[0]) for part in parts["geometry"]["coordinates"]) == pytest.approx(150, abs=2)


def test_polygons_drawn_again_give_the_mask() -> None:
    rles = result().rles
    assert rles is not None
    for rle in rles:
        outer = [part[0] for part in mask_polygons(rle)]
        holes = [hole for part in mask_polygons(rle) for hole in part[1:]]
        drawn = sum(mask_utils.decode(mask_utils.frPyObjects([ring.ravel().tolist()], *SIZE))[..., 0] for ring in outer)
        for hole in holes:
            drawn = drawn - mask_utils.decode(mask_utils.frPyObjects([hole.ravel().tolist()], *SIZE))[..., 0]
        truth = mask_utils.decode(rle)
        assert (drawn != truth).sum() <= 0.05 * truth.sum()


@pytest.mark.parametrize("masks", [True, False])
def test_coco_is_a_file_that_is_read_again(masks: bool) -> None:
    coco = read_coco(json.loads(to_coco([result(masks), result(masks)], ["a.png", "b.png"])), strict=True)
    assert [image.file_name for image in coco.images.values()] == ["a.png", "b.png"]
    assert [a.category_id for a in coco.annotations[2]] == [8, 3]
    assert coco.has_masks == masks
    assert coco.annotations[1][0].area == (250 if masks else 300)


def test_csv_has_a_row_for_each_object_and_quotes_names() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv([result()], ["a.png"]))))
    assert [row["class"] for row in rows] == ["ring", "cell, round"]
    assert rows[0] == {
        "image": "a.png",
        "object": "1",
        "class": "ring",
        "score": "0.9000",
        "x": "5.0",
        "y": "5.0",
        "width": "20.0",
        "height": "15.0",
        "area": "250.0",
    }


def test_nothing_found_gives_empty_files() -> None:
    empty = result().above(1.0)
    assert json.loads(to_geojson(empty))["features"] == []
    assert json.loads(to_coco([empty], ["a.png"]))["annotations"] == []
    assert to_csv([empty], ["a.png"]).count("\n") == 1
