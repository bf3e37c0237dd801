"""The report's numbers: equal to COCO's, to TIDE's own program, and to what counting by hand gives."""

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from a2fpn.data import CocoFile, read_coco
from a2fpn.errors import ConfigError
from a2fpn.evaluation import annotations_as_detections, evaluate_coco
from a2fpn.report import Run, matching, tide, write_report
from a2fpn.report.analysis import analyze, calibration, grouped, image_ap, outcomes
from a2fpn.report.matching import Scene, match
from a2fpn.report.precision import precision, resampled_ap, resampling
from tests.coco_data import write_coco

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


def one_class(annotations: list[Any], found: list[Any]) -> Scene:
    """Boxes (x, y, width, height) in one image, detections with a score before."""
    coco = read_coco(
        {
            "images": [{"id": 1, "file_name": "a.png", "height": SIZE, "width": SIZE}],
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": category, "bbox": box}
                for i, (category, box) in enumerate(annotations)
            ],
        }
    )
    results = [{"image_id": 1, "category_id": c, "score": score, "bbox": box} for score, c, box in found]
    return Scene.of(coco, results, kind="bbox")


def test_merged_and_split_objects_are_told_from_others() -> None:
    left, right, alone = [0, 0, 20, 40], [22, 0, 20, 40], [100, 100, 40, 80]
    merged = (0.9, 1, [0, 0, 42, 40])
    halves = [(0.8, 1, [100, 100, 40, 39]), (0.7, 1, [100, 141, 40, 39])]
    errors = tide.error_types(one_class([(1, left), (1, right), (1, alone)], [merged, *halves]))
    assert (errors.counts["Merged"], errors.counts["Split"]) == (1, 1)
    assert errors.merged.tolist() == [True, False, False]
    assert errors.split.tolist() == [False, False, True]
    whole = tide.error_types(
        one_class([(1, left), (1, right), (1, alone)], [(0.9, 1, b) for b in (left, right, alone)])
    )
    assert set(whole.counts.values()) == {0}
    assert set(whole.cost.values()) == {0.0}
    # A detection over objects of another class merges nothing.
    other = tide.error_types(one_class([(2, left), (2, right), (1, alone)], [merged]))
    assert other.counts["Merged"] == 0


def test_the_confusion_matrix_counts_every_object_and_detection_once() -> None:
    scene = one_class(
        [(1, [0, 0, 20, 20]), (2, [50, 0, 20, 20]), (1, [100, 0, 20, 20])],
        [
            (0.9, 1, [0, 0, 20, 20]),  # right
            (0.8, 1, [50, 0, 20, 20]),  # a cell where dust is
            (0.7, 2, [200, 0, 20, 20]),  # nothing there
            (0.4, 1, [100, 0, 20, 20]),  # right, below the threshold
        ],
    )
    outcome = outcomes(scene, match(scene), score_threshold=0.5)
    assert outcome.confusion(scene).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert outcomes(scene, match(scene), score_threshold=0.4).confusion(scene)[0].tolist() == [2, 0, 0]


@pytest.mark.parametrize("seed", [1, 4])
def test_the_confusion_matrix_adds_up(seed: int) -> None:
    coco, found = scattered(seed=seed)
    scene = Scene.of(coco, found, kind="bbox")
    outcome = outcomes(scene, match(scene), score_threshold=0.3)
    matrix = outcome.confusion(scene)
    assert matrix[:-1].sum(1).tolist() == np.bincount(scene.truth.label, minlength=3).tolist()
    assert matrix[:, :-1].sum(0).tolist() == np.bincount(scene.found.label[outcome.shown], minlength=3).tolist()


def test_the_calibration_error_is_the_gap_between_score_and_share() -> None:
    objects = [(1, [30.0 * i, 0, 20, 20]) for i in range(4)]
    found = [(0.75, 1, box) for _, box in objects[:3]] + [(0.75, 1, [300, 300, 20, 20])]
    perfect = calibration(scene := one_class(objects, found), match(scene))
    assert perfect.ece == pytest.approx(0.0, abs=1e-12)
    assert perfect.count.sum() == 4
    sure = calibration(scene := one_class(objects, [(0.95, c, box) for _, c, box in found]), match(scene))
    assert sure.ece == pytest.approx(0.95 - 0.75)


@pytest.mark.parametrize(("bounds", "key"), [((0.0, 32.0), "ap_small"), ((32.0, 96.0), "ap_medium")])
def test_ap_by_size_is_coco_s(bounds: tuple[float, float], key: str) -> None:
    coco, found = scattered(seed=7, images=20, masks=True)
    scene = Scene.of(coco, found, kind="segm")
    (group,) = grouped(scene, np.sqrt(scene.truth.area), np.sqrt(scene.found.area), bounds, unit="")
    expected = evaluate_coco(coco, found, iou_types=["segm"]).to_dict()[f"segm/{key}"]
    assert group.ap == pytest.approx(expected, abs=1e-12)


def test_groups_share_out_all_objects() -> None:
    coco, found = scattered(seed=1)
    analysis = analyze(Scene.of(coco, found, kind="bbox"))
    for name, groups in analysis.groups.items():
        assert sum(group.objects for group in groups) == len(analysis.scene.truth), name


def test_the_ap_of_an_image_is_that_of_a_file_with_this_image_alone() -> None:
    coco, found = scattered(seed=6, images=5)
    scene = Scene.of(coco, found, kind="bbox")
    for image_id, value in zip(scene.image_ids, image_ap(scene, match(scene)), strict=True):
        alone = replace(
            coco, images={image_id: coco.images[image_id]}, annotations={image_id: coco.annotations[image_id]}
        )
        own = [d for d in found if d["image_id"] == image_id]
        expected = evaluate_coco(alone, own, iou_types=["bbox"]).to_dict()["bbox/ap"]
        assert (-1.0 if np.isnan(value) else value) == pytest.approx(expected, abs=1e-12)


class _References(HTMLParser):
    """Addresses that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def references(path: Path) -> tuple[list[str], str]:
    parser = _References()
    parser.feed(path.read_text(encoding="utf-8"))
    return [a for a in parser.found if not a.startswith(("data:", "#"))], " ".join(parser.text)


@pytest.mark.parametrize("models", [1, 2])
def test_the_page_needs_nothing_else_and_escapes_names(models: int, tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path, images=4)
    data = json.loads(path.read_text())
    data["categories"][0]["name"] = "<script>alert(1)</script> $x_1$"
    coco = read_coco(data)
    found = annotations_as_detections(coco)
    runs = [Run("a <b> model", found[1:], {"neck": "<i>"}), Run("other", found[:-1])][:models]
    page = write_report(tmp_path / "new" / "page.html", coco, folder, runs, resamples=20)
    fetched, text = references(page)
    assert fetched == []
    assert "<script" not in page.read_text()
    assert "<script>alert(1)</script> $x_1$" in text
    assert "a <b> model" in text
    assert ("second less first" in text) == (models == 2)
    assert "Worst images" in text


def test_a_perfect_model_has_no_worst_image_and_one_without_detections_a_page(tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path, images=2)
    perfect = write_report(
        tmp_path / "a.html", path, folder, [Run("perfect", annotations_as_detections(path))], resamples=20
    )
    assert "There is no image with an error." in perfect.read_text()
    nothing = write_report(tmp_path / "b.html", path, folder, [Run("blind", [])], resamples=20)
    assert "finds 0 of" in nothing.read_text()


def test_three_models_are_refused(tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path)
    with pytest.raises(ConfigError, match="one or two models, got 3"):
        write_report(tmp_path / "a.html", path, folder, [Run(name, []) for name in "abc"])


def test_the_difference_of_a_model_with_itself_is_certainly_zero(tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path)
    found = annotations_as_detections(path)[1:]
    page = write_report(tmp_path / "a.html", path, folder, [Run("a", found), Run("b", found)], resamples=50)
    assert "These images do not tell which model is better: the difference in AP is +0.000 [+0.000, +0.000]." in (
        html.unescape(page.read_text())
    )
