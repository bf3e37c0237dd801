"""Results in files for other programs hold the objects that were found."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from a2fpn.config import Category
from a2fpn.data import decode_rle, encode_masks, read_coco
from a2fpn.inference import Result
from a2fpn.writers import FORMATS, write_results
from a2fpn.writers.geojson import mask_polygons, to_geojson

SIZE = (40, 60)
CATEGORIES = (Category(3, "cell, round"), Category(8, "ring"))


def result(masks: bool = True, path: str = "a.png") -> Result:
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
        categories=CATEGORIES,
        rles=tuple(encode_masks(planes)) if masks else None,
        image=np.zeros((*SIZE, 3), np.uint8),
        path=path,
    )


def area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return float(abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2)


def written(results: list[Result], form: str, folder: Path) -> str:
    (path,) = write_results(results, folder, [form])
    return path.read_text(encoding="utf-8")


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


def filled(polygons: list[list[np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centers lie inside polygons with holes, by matplotlib."""
    y, x = np.mgrid[: size[0], : size[1]]
    centers = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1)
    inside = np.zeros(len(centers), dtype=bool)
    for outer, *holes in polygons:
        part = Outline(outer).contains_points(centers)
        for hole in holes:
            part &= ~Outline(hole).contains_points(centers)
        inside |= part
    return inside.reshape(size)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_filled_again_give_the_mask(seed: int) -> None:
    """Also of masks without any shape: holes in holes, pixels that touch at corners, at the image's border."""
    mask = np.random.default_rng(seed).random((17, 23)) < 0.2 + 0.03 * seed
    (rle,) = encode_masks(mask[None])
    polygons, pixels = mask_polygons(rle)
    assert pixels == mask.sum()
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)


def test_a_mask_without_a_pixel_has_no_polygon() -> None:
    assert mask_polygons(encode_masks(np.zeros((1, 4, 5)))[0]) == ([], 0)


@pytest.mark.parametrize("masks", [True, False])
def test_coco_data_sets_are_read_again(masks: bool, tmp_path: Path) -> None:
    text = written([result(masks), result(masks, "b.png")], "coco-dataset", tmp_path)
    coco = read_coco(json.loads(text), strict=True)
    assert [image.file_name for image in coco.images.values()] == ["a.png", "b.png"]
    assert [a.category_id for a in coco.annotations[2]] == [8, 3]
    assert coco.has_masks == masks
    assert coco.annotations[1][0].area == (250 if masks else 300)


def same(first: Result, second: Result) -> bool:
    arrays = all((getattr(first, x) == getattr(second, x)).all() for x in ("boxes", "scores", "labels"))
    return arrays and first.size == second.size and first.rles == second.rles


@pytest.mark.parametrize("masks", [True, False])
def test_lines_and_coco_results_give_the_results_back(masks: bool, tmp_path: Path) -> None:
    results = [result(masks), replace(result(masks, "b.png"), size=(50, 60), rles=None)]
    lines = [json.loads(line) for line in written(results, "jsonl", tmp_path).splitlines()]
    assert [(line["image_id"], line["file_name"], line["stem"]) for line in lines] == [
        (1, "a.png", "a"),
        (2, "b.png", "b"),
    ]
    records = json.loads(written(results, "coco", tmp_path))
    for number, (line, truth) in enumerate(zip(lines, results, strict=True), start=1):
        size = (line["height"], line["width"])
        assert same(Result.from_coco(line["results"], size=size, categories=CATEGORIES), truth)
        own = [record for record in records if record["image_id"] == number]
        assert {record["file_name"] for record in own} == {truth.path}
        assert same(Result.from_coco(own, size=truth.size, categories=CATEGORIES), truth)


def test_records_of_another_models_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="category_id 8 is none of the 1 classes' ids"):
        Result.from_coco(result().to_coco(1), size=SIZE, categories=CATEGORIES[:1])


def test_csv_has_a_row_for_each_object_and_quotes_names(tmp_path: Path) -> None:
    rows = list(csv.DictReader(written([result()], "csv", tmp_path).splitlines()))
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


def test_nothing_found_gives_empty_files(tmp_path: Path) -> None:
    empty: Any = [result().above(1.0)]
    assert json.loads(written(empty, "geojson", tmp_path))["features"] == []
    assert json.loads(written(empty, "coco-dataset", tmp_path))["annotations"] == []
    assert json.loads(written(empty, "coco", tmp_path)) == []
    assert written(empty, "csv", tmp_path).count("\n") == 1


def test_images_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    paths = write_results([result(path="x/a.png"), result(path="y/A.png")], tmp_path, ["overlay", "geojson"])
    assert [path.name for path in paths] == ["a.png", "A_2.png", "a.geojson", "A_2.geojson"]
    assert all(path.is_file() for path in paths)


def test_formats_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown format of results 'geojsn'. Did you mean 'geojson'"):
        write_results([result()], tmp_path, ["geojsn"])
    with pytest.raises(ValueError, match="at least one result"):
        write_results([], tmp_path, ["coco"])
    assert list(tmp_path.iterdir()) == []
    assert set(FORMATS) >= {"coco", "csv", "geojson", "jsonl", "overlay"}
    assert decode_rle(result().rles or ())[0].sum() == 250
