"""Results in files for other programs hold the objects that were found."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pycocotools import mask as mask_utils

from a2fpn.config import Category
from a2fpn.data import decode_rle, encode_masks, read_coco
from a2fpn.inference import Result
from a2fpn.instance_metrics import label_image
from a2fpn.masks.rle import as_text
from a2fpn.writers import FORMATS, write_results
from a2fpn.writers.geojson import features, mask_polygons
from a2fpn.writers.measures import measures

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


def test_geojson_has_closed_rings_with_holes_and_parts(tmp_path: Path) -> None:
    ring, parts = json.loads(written([result()], "geojson", tmp_path))["features"]
    assert ring["properties"]["classification"]["name"] == "ring"
    assert ring["properties"]["measurements"] == {
        "score": 0.9,
        "area": 250.0,
        "equivalent_diameter": pytest.approx(17.841, abs=1e-3),
        "eccentricity": pytest.approx(0.651, abs=1e-3),
    }
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
    polygons = mask_polygons(rle)
    np.testing.assert_array_equal(filled(polygons, mask.shape), mask)


def test_a_mask_without_a_pixel_has_no_polygon() -> None:
    assert mask_polygons(encode_masks(np.zeros((1, 4, 5)))[0]) == []


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
    with pytest.raises(ValueError, match="Unknown category_id 8; expected an id of the 1 classes"):
        Result.from_coco(result().to_coco(1), size=SIZE, categories=CATEGORIES[:1])


def check_geojson(text: str) -> list[dict[str, Any]]:
    """The features of a text that RFC 7946 and QuPath's reader of it allow."""
    collection = json.loads(text)
    assert set(collection) == {"type", "features"}
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        assert set(feature) == {"type", "geometry", "properties"}
        assert feature["type"] == "Feature"
        geometry, facts = feature["geometry"], feature["properties"]
        polygons = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}[geometry["type"]]
        for ring in (ring for polygon in polygons for ring in polygon):
            assert len(ring) >= 4
            assert ring[0] == ring[-1]
            assert all(len(point) == 2 and all(isinstance(x, float) for x in point) for point in ring)
        assert set(facts) == {"objectType", "classification", "measurements"}
        assert facts["objectType"] == "detection"
        assert set(facts["classification"]) == {"name", "color"}
        assert all(isinstance(x, int) and 0 <= x <= 255 for x in facts["classification"]["color"])
        assert len(facts["classification"]["color"]) == 3
        assert all(isinstance(x, float) for x in facts["measurements"].values())
    return list(collection["features"])


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_geojson_has_the_form_that_qupath_reads(masks: bool, scale: float | None, tmp_path: Path) -> None:
    text = written([replace(result(masks), microns_per_pixel=scale)], "geojson", tmp_path)
    first, _ = check_geojson(text)
    assert ("area_um2" in first["properties"]["measurements"]) == (scale is not None)
    assert len(list(features(result(masks)))) == 2


def test_csv_has_a_row_for_each_object_and_quotes_names(tmp_path: Path) -> None:
    rows = list(csv.DictReader(written([result()], "csv", tmp_path).splitlines()))
    assert [row["class"] for row in rows] == ["ring", "cell, round"]
    known = {key: value for key, value in rows[0].items() if value}
    assert known == {
        "image": "a.png",
        "object": "1",
        "class": "ring",
        "score": "0.9",
        "x": "5.0",
        "y": "5.0",
        "width": "20.0",
        "height": "15.0",
        "area": "250.0",
        "centroid_x": "15.0",
        "centroid_y": "12.5",
        "equivalent_diameter": "17.8412",
        "eccentricity": "0.6511",
    }
    microns = [name for name in rows[0] if "um" in name]
    assert len(microns) == 8
    (row, _) = csv.DictReader(written([replace(result(), microns_per_pixel=0.5)], "csv", tmp_path).splitlines())
    assert (row["area_um2"], row["width_um"], row["centroid_y_um"]) == ("62.5", "10.0", "6.25")


def measured(mask: np.ndarray) -> dict[str, float | None]:
    ys, xs = np.nonzero(mask)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, 0, 0]
    only = Result(
        boxes=np.array([box], dtype=np.float32),
        scores=np.ones(1, np.float32),
        labels=np.zeros(1, np.int64),
        size=mask.shape,
        categories=CATEGORIES,
        rles=tuple(encode_masks(mask[None])),
    )
    return next(measures(only))


def test_shapes_are_measured_by_their_moments() -> None:
    y, x = np.mgrid[:300, :300] + 0.5
    for angle in (0.0, 0.4, 1.3):
        along = (x - 150) * np.cos(angle) + (y - 140) * np.sin(angle)
        across = -(x - 150) * np.sin(angle) + (y - 140) * np.cos(angle)
        ellipse = measured((along / 100) ** 2 + (across / 60) ** 2 <= 1)
        assert ellipse["eccentricity"] == pytest.approx(0.8, abs=2e-3)
        assert ellipse["equivalent_diameter"] == pytest.approx(2 * np.sqrt(6000), abs=0.3)
        assert ellipse["centroid_x"] == pytest.approx(150, abs=0.1)
        assert ellipse["centroid_y"] == pytest.approx(140, abs=0.1)
    pixel = np.zeros((5, 6), bool)
    pixel[2, 4] = True
    one = measured(pixel)
    assert (one["area"], one["centroid_x"], one["centroid_y"], one["eccentricity"]) == (1, 4.5, 2.5, 0)
    pixel[2, :] = True
    assert measured(pixel)["eccentricity"] == pytest.approx(np.sqrt(1 - 1 / 36), abs=1e-4)
    nothing = measured(np.zeros((5, 6), bool))
    assert (nothing["area"], nothing["centroid_x"], nothing["eccentricity"]) == (0, None, None)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_label_images_are_the_masks_in_tiles(scale: float | None, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed; it comes with the extra 'slides'")
    rng = np.random.default_rng(0)
    size, masks = (700, 1100), []
    for _ in range(60):
        mask = np.zeros(size, bool)
        top, left = rng.integers(0, 650), rng.integers(0, 1050)
        mask[top : top + rng.integers(1, 300), left : left + rng.integers(1, 300)] = True
        masks.append(mask)
    found = Result(
        boxes=np.array(
            [
                [np.nonzero(m)[1].min(), np.nonzero(m)[0].min(), np.nonzero(m)[1].max() + 1, np.nonzero(m)[0].max() + 1]
                for m in masks
            ],
            dtype=np.float32,
        ),
        scores=np.linspace(1, 0.5, 60, dtype=np.float32),
        labels=np.zeros(60, np.int64),
        size=size,
        categories=CATEGORIES,
        rles=tuple(encode_masks(np.array(masks))),
        path="a.png",
        microns_per_pixel=scale,
    )
    (path,) = write_results([found], tmp_path, ["labels"])
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert (page.dtype, page.shape, page.is_tiled) == (np.uint16, size, True)
        assert (page.get_resolution(unit=5)[0] if scale else None) == (4e6 / 1e6 if scale else None)
        labels = page.asarray()
    np.testing.assert_array_equal(labels, label_image(found.rles or (), size, scores=found.scores.tolist()))
    # Masks that nothing covers come back whole.
    np.testing.assert_array_equal(labels == 1, masks[0])


@pytest.mark.slow
def test_many_objects_need_32_bits(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed; it comes with the extra 'slides'")
    count = 65_536
    places = np.arange(count)
    boxes = np.stack([places % 512, places // 512, places % 512 + 1, places // 512 + 1], 1).astype(np.float32)
    size = (128, 512)
    starts = (boxes[:, 0] * 128 + boxes[:, 1]).astype(int).tolist()
    counts = [{"size": list(size), "counts": [start, 1, 128 * 512 - start - 1]} for start in starts]
    for number, dtype in ((count - 1, np.uint16), (count, np.uint32)):
        found = Result(
            boxes=boxes[:number],
            scores=np.ones(number, np.float32),
            labels=np.zeros(number, np.int64),
            size=size,
            categories=CATEGORIES,
            rles=tuple(as_text(mask_utils.frPyObjects(counts[:number], *size))),
            path="a.png",
        )
        (path,) = write_results([found], tmp_path, ["labels"])
        labels = tifffile.imread(path)
        assert labels.dtype == dtype
        assert labels.max() == number
        assert len(np.unique(labels)) == count


def test_label_images_need_masks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A label image needs masks"):
        write_results([result(masks=False)], tmp_path, ["labels"])


def test_nothing_found_gives_an_empty_label_image(tmp_path: Path) -> None:
    found = result().above(1.0)
    # Lines of the disk do not say whether a model without objects has masks.
    again = Result.from_coco(found.to_coco(1), size=found.size, categories=found.categories)
    for number, empty in enumerate((found, again)):
        (path,) = write_results([empty], tmp_path / str(number), ["labels"])
        labels = pytest.importorskip("tifffile").imread(path)
        assert labels.shape == found.size
        assert not labels.any()


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
    assert set(FORMATS) >= {"coco", "csv", "geojson", "jsonl", "labels", "overlay"}
    assert decode_rle(result().rles or ())[0].sum() == 250
