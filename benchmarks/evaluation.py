"""``evaluate_coco`` with each of its libraries against pycocotools as its own readme uses it.

Objects, and detections of them that lie a little beside or have the wrong class: on 5,000 images with 100 detections
each, and on 1,000 images with 30 that have masks. The time is from the dicts of a COCO file and of COCO results to the
12 numbers; ours also checks every annotation and detection. Targets: all 12 numbers within 1e-6, in at most a fifth of
pycocotools' time with the library that is the default. A round takes two minutes.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from a2fpn.data import encode_box_masks
from a2fpn.evaluation import BACKENDS, evaluate_coco
from benchmarks import _measure as measure

PEER = "pycocotools itself"
DEFAULT = "hotcoco"
SIDES = (PEER, *(f"evaluate_coco, {backend}" for backend in BACKENDS if backend != "auto"))
TARGET = 0.2
TOLERANCE = 1e-6
SIZE = (480, 640)
CLASSES = 80
OBJECTS = 7  # per image, as on COCO


@dataclass(frozen=True)
class Case:
    """A comparison.

    Args:
        kind: ``"bbox"`` or ``"segm"``.
        images: How many.
        detections: Per image.
    """

    kind: str
    images: int
    detections: int

    def __str__(self) -> str:
        what = {"bbox": "boxes", "segm": "masks"}[self.kind]
        return f"{what}: {self.images} images of {OBJECTS} objects and {self.detections} detections"


CASES = (Case("bbox", 5000, 100), Case("segm", 1000, 30))
QUICK_CASES = (Case("bbox", 20, 10), Case("segm", 5, 10))


@functools.lru_cache(maxsize=1)
def scene(case: Case) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file and COCO results, the same in every process."""
    rng = np.random.default_rng(0)
    total, found = case.images * OBJECTS, case.images * case.detections
    corners = rng.random((total, 2)) * (SIZE[1] - 140, SIZE[0] - 80)
    boxes = np.concatenate([corners, np.exp(rng.normal(4, 0.7, (total, 2))).clip(4, 300)], 1)
    boxes[:, 2:] = np.minimum(boxes[:, 2:], SIZE[::-1] - boxes[:, :2])
    classes = rng.integers(1, CLASSES + 1, total)
    # Which object each detection shows.
    shown = np.repeat(np.arange(case.images), case.detections) * OBJECTS + rng.integers(0, OBJECTS, found)
    moved = boxes[shown] + rng.normal(0, 8, (found, 4))
    moved[:, 2:] = moved[:, 2:].clip(1)
    called = np.where(rng.random(found) < 0.8, classes[shown], rng.integers(1, CLASSES + 1, found))
    scores = rng.random(found).round(3)
    truth = objects(case, boxes, classes, OBJECTS)
    results = objects(case, moved, called, case.detections)
    for number, annotation in enumerate(truth, start=1):
        area = float(np.prod(annotation["bbox"][2:]))
        annotation |= {"id": number, "iscrowd": int(number % 50 == 0), "area": area}
    for result, score in zip(results, scores.tolist(), strict=True):
        result["score"] = score
    file = {
        "images": [
            {"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for number in range(case.images)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)],
        "annotations": truth,
    }
    return file, results


def objects(case: Case, boxes: NDArray[np.float64], classes: NDArray[np.int64], per_image: int) -> list[dict[str, Any]]:
    """Entries of boxes or of round masks."""
    key, shapes = "bbox", boxes.tolist()
    entries = [
        {"image_id": number // per_image, "category_id": label, key: shape}
        for number, (label, shape) in enumerate(zip(classes.tolist(), shapes, strict=True))
    ]
    if case.kind == "segm":
        across = torch.linspace(-1, 1, 28)
        disc = (across[:, None].square() + across.square() <= 1).float()[None, None]
        corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        for entry, box in zip(entries, corners, strict=True):
            (entry["segmentation"],) = encode_box_masks(disc, box[None], SIZE)
    return entries


def prepare(side: str, case: Case) -> measure.Call:
    """Make the scene; return one evaluation, which gives the 12 numbers."""
    file, results = scene(case)
    if side == PEER:
        return functools.partial(theirs, file, results, case.kind)
    backend: Any = side.rpartition(" ")[2]
    return functools.partial(ours, file, results, case.kind, backend)


def ours(file: dict[str, Any], results: Sequence[dict[str, Any]], kind: str, backend: Any) -> list[float]:
    """The 12 numbers by ``evaluate_coco``."""
    return list(evaluate_coco(file, results, iou_types=[kind], backend=backend).to_dict().values())


def theirs(file: dict[str, Any], results: Sequence[dict[str, Any]], kind: str) -> list[float]:
    """The 12 numbers by pycocotools."""
    unused = "bbox" if kind == "segm" else "segmentation"  # else the box would say how large a mask is
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**file, "annotations": [{**annotation} for annotation in file["annotations"]]}
        truth.createIndex()
        found = truth.loadRes([{k: v for k, v in result.items() if k != unused} for result in results])
        evaluator = COCOeval(truth, found, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(number) for number in evaluator.stats]


def compare(case: Case) -> tuple[dict[str, float], float]:
    """The largest difference of the 12 numbers to pycocotools' of each side, and their AP.

    Raises:
        RuntimeError: If one is too large.
    """
    wanted = prepare(PEER, case)()
    differences = {
        side: max(abs(a - b) for a, b in zip(prepare(side, case)(), wanted, strict=True)) for side in SIDES[1:]
    }
    for side, difference in differences.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{case}: the numbers of {side} differ by {difference:.1e} from pycocotools'.")
    return differences, wanted[0]


def main(rounds: measure.Rounds = 3, quick: measure.Quick = False, threads: measure.Threads = 0) -> None:
    """Compare the 12 numbers and times of all libraries, and the peak memory with masks."""
    rounds = 1 if quick else rounds
    measure.start(threads, rounds)
    for case in QUICK_CASES if quick else CASES:
        differences, ap = compare(case)
        calls = {side: prepare(side, case) for side in SIDES}
        timings = measure.time_interleaved(calls, rounds=rounds, warmup=0, title=str(case))
        memory = {side: measure.peak_memory(prepare, side, case) for side in SIDES} if case.kind == "segm" else {}
        rows = []
        for side in SIDES:
            ratio = timings.ratio(side, PEER)
            target = TARGET if side.endswith(DEFAULT) else None
            difference = f"{differences[side]:.0e}" if side in differences else ""
            cells = [difference, f"{timings.median(side):.2f} s", str(ratio), measure.against(ratio.value, target)]
            rows.append([side, *cells, *([measure.mebibytes(memory[side])] if memory else [])])
        columns = ["", "largest difference", "time", "ratio", "target", *(["memory"] if memory else [])]
        measure.print_table(f"{case}; AP {ap:.3f}", columns, rows)


if __name__ == "__main__":
    typer.run(main)
