"""The report's numbers: equal to COCO's, to TIDE's own program, and to what counting by hand gives."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from a2fpn.data import CocoFile, read_coco
from a2fpn.evaluation import annotations_as_detections, evaluate_coco
from a2fpn.report import matching, tide
from a2fpn.report.matching import Scene, match
from a2fpn.report.precision import precision, resampled_ap, resampling

SIZE = 400


def scattered(
    *, images: int = 12, classes: int = 3, seed: int = 0, crowds: float = 0.0, masks: bool = False
) -> tuple[CocoFile, list[dict[str, Any]]]:
    """Random objects, and detections with every kind of error."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def segmentation(box: Any) -> dict[str, Any]:
        x, y, w, h = (float(v) for v in box)
        points = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        rle: dict[str, Any] = mask_utils.merge(mask_utils.frPyObjects(points, SIZE, SIZE))
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    def add(box: Any, image: int, label: int) -> None:
        box = [max(0.0, float(box[0])), max(0.0, float(box[1])), max(2.0, float(box[2])), max(2.0, float(box[3]))]
        entry = {"image_id": image, "category_id": label, "bbox": box, "score": float(rng.random())}
        found.append(entry | ({"segmentation": segmentation(box)} if masks else {}))

    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 14))):
            box = np.concatenate([rng.uniform(0, 250, 2), rng.uniform(8, 140, 2)])
            label = int(rng.integers(1, classes + 1))
            crowd = bool(rng.random() < crowds)
            entry = {"id": len(annotations), "image_id": image, "category_id": label, "bbox": box.tolist()}
            entry["iscrowd"] = int(crowd)
            annotations.append(entry | ({"segmentation": segmentation(box)} if masks else {}))
            for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
                shake = rng.normal(0, rng.choice([0.03, 0.15, 0.4]), 4) * np.tile(box[2:], 2)
                add(box + shake, image, label if rng.random() < 0.8 else int(rng.integers(1, classes + 1)))
        for _ in range(int(rng.integers(0, 4))):
            add(np.concatenate([rng.uniform(0, 250, 2), rng.uniform(8, 140, 2)]), image, int(rng.integers(1, 4)))
    names = [{"id": label, "name": f"class {label}"} for label in range(1, classes + 1)]
    sizes = [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(1, images + 1)]
    coco = read_coco({"images": sizes, "annotations": annotations, "categories": names})
    return coco, found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("crowds", [0.0, 0.15])
def test_average_precision_is_coco_s(kind: matching.Kind, crowds: float) -> None:
    coco, found = scattered(masks=True, crowds=crowds, seed=3)
    scene = Scene.of(coco, found, kind=kind)
    expected = evaluate_coco(coco, found, iou_types=[kind], backend="pycocotools").measured[kind]
    measured = precision(scene, match(scene))
    assert measured.ap == pytest.approx(expected.ap, abs=1e-12)
    assert measured.at(0) == pytest.approx(expected.ap50, abs=1e-12)
    assert measured.at(5) == pytest.approx(expected.ap75, abs=1e-12)
    assert measured.per_class.mean(0) == pytest.approx(list(expected.per_class.values()), abs=1e-12)


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_detections_beyond_the_limit_do_not_count(limit: int) -> None:
    coco, found = scattered(seed=5)
    scene = Scene.of(coco, found, kind="bbox", max_detections=limit)
    expected = evaluate_coco(coco, found, iou_types=["bbox"], max_detections=limit).to_dict()["bbox/ap"]
    assert precision(scene, match(scene)).ap == pytest.approx(expected, abs=1e-12)


def tidecv_says(coco: CocoFile, found: list[dict[str, Any]], kind: matching.Kind) -> tuple[Mapping[str, float], Any]:
    """Costs and counts by the program of TIDE's authors."""
    tidecv = pytest.importorskip("tidecv", reason="tidecv, TIDE's own program, is not installed", exc_type=ImportError)
    truth, predictions = tidecv.Data("truth", max_dets=1000), tidecv.Data("found", max_dets=1000)
    for category in coco.categories:
        truth.add_class(category.id, category.name)
    for image_id, annotations in coco.annotations.items():
        truth.add_image(image_id, str(image_id))
        for a in annotations:
            truth.add_ground_truth(image_id, a.category_id, list(a.bbox), a.rle)
    for d in found:
        predictions.add_detection(d["image_id"], d["category_id"], d["score"], d["bbox"], d.get("segmentation"))
    program = tidecv.TIDE(mode={"bbox": tidecv.TIDE.BOX, "segm": tidecv.TIDE.MASK}[kind])
    run = program.evaluate(truth, predictions)
    counts = {error.short_name: count for error, count in run.count_errors().items()}
    return program.get_main_errors()["found"] | {"ap": run.ap}, counts


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_errors_and_their_cost_are_tide_s(kind: matching.Kind, seed: int) -> None:
    coco, found = scattered(seed=seed, images=30, masks=True)
    costs, counts = tidecv_says(coco, found, kind)
    errors = tide.error_types(Scene.of(coco, found, kind=kind, max_detections=1000))
    assert {name: errors.counts[name] for name in counts} == counts
    assert min(counts.values()) > 0  # every type occurs
    assert 100 * errors.ap == pytest.approx(costs["ap"], abs=1e-9)
    for name in counts:
        assert 100 * errors.cost[name] == pytest.approx(costs[name], abs=1e-9), name


def test_the_bootstrap_counts_an_image_drawn_twice_as_two_images() -> None:
    coco, found = scattered(seed=2, images=6, crowds=0.1)
    scene = Scene.of(coco, found, kind="bbox")
    draws = resampling(6, resamples=5)
    values = resampled_ap(scene, match(scene), draws)
    for times, value in zip(draws.tolist(), values, strict=True):
        copies = [(image, new) for image, count in zip(coco.images, times, strict=True) for new in range(count)]
        numbers = {pair: number for number, pair in enumerate(copies, start=1)}
        twin = CocoFile(
            "twin",
            {n: type(coco.images[i])(n, "x", SIZE, SIZE) for (i, _), n in numbers.items()},
            coco.categories,
            {n: coco.annotations[i] for (i, _), n in numbers.items()},
            False,
            (),
        )
        again = [d | {"image_id": n} for (i, _), n in numbers.items() for d in found if d["image_id"] == i]
        expected = precision(copied := Scene.of(twin, again, kind="bbox"), match(copied)).per_class
        np.testing.assert_allclose(value, expected, atol=1e-12)
