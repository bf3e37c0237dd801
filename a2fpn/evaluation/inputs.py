"""Validation and renumbering of ground truth and detections for the evaluation backends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.coco_file import Annotation, CocoFile
from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Rle
from a2fpn.masks.segmentation import Polygons, parse_segmentations

_MASKS_AT_ONCE = 255  # pycocotools' area raises OverflowError for more


@dataclass(frozen=True)
class EvalInputs:
    """Ground truth and detections, renumbered with ids that both backends accept.

    Images, in the order of their ids, categories and objects are numbered from 1: a match with object id 0 counts as
    unmatched, and hotcoco rejects negative ids.

    Args:
        kind: The IoU type.
        images: Number, height and width of each.
        labels: Names of the categories, all different.
        truth: Annotations.
        detections: Annotations with scores, in the order of the images.
    """

    kind: str
    images: list[dict[str, Any]]
    labels: list[str]
    truth: list[dict[str, Any]]
    detections: list[dict[str, Any]]

    @classmethod
    def of(cls, coco: CocoFile, detections: Sequence[Mapping[str, Any]], kind: str) -> EvalInputs:
        """Renumber everything and check the detections."""
        coco = coco.with_all_masks() if kind == "segm" else coco
        image_numbers = {image_id: number for number, image_id in enumerate(sorted(coco.images), start=1)}
        category_numbers = {category.id: number for number, category in enumerate(coco.categories, start=1)}
        truth = [
            {
                "image_id": image_numbers[image_id],
                "category_id": category_numbers[annotation.category_id],
                "bbox": list(annotation.bbox),
                "area": annotation.area,
                "iscrowd": int(annotation.iscrowd),
                **({"segmentation": annotation.rle} if kind == "segm" else {}),  # polygons are converted on each access
                **(truth_keypoints(annotation, coco) if kind == "keypoints" else {}),
            }
            for image_id, annotations in coco.annotations.items()
            for annotation in annotations
        ]
        images = [
            {"id": number, "height": coco.images[image_id].height, "width": coco.images[image_id].width}
            for image_id, number in image_numbers.items()
        ]
        found: list[dict[str, Any]] = []
        failure = None
        for raw in detections:
            try:
                found.append(_checked(raw, coco, image_numbers, category_numbers, kind))
            except (ValueError, TypeError) as error:
                failure = ValueError(f"detection {len(found)}: {error}")
                break
        _check_masks(found, images, kind)  # those before the failure, so that the first error is reported
        if failure:
            raise failure
        found.sort(key=lambda detection: int(detection["image_id"]))  # stable: equal scores keep their order
        for objects in (truth, found):
            for number, entry in enumerate(objects, start=1):
                entry["id"] = number
        names = [category.name for category in coco.categories]
        labels = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in coco.categories]
        return cls(kind, images, labels, truth, found)

    def compare(
        self, library: tuple[Any, Any], limits: list[int], sigmas: Sequence[float] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Run a backend.

        Args:
            library: Its ``COCO`` and ``COCOeval``.
            limits: Detections per image and class, ascending.
            sigmas: One per keypoint.

        Returns:
            Precision (IoU threshold, recall, class, area, limit) and recall (IoU threshold, class, area, limit); -1
            without ground truth.
        """
        new_index, new_evaluator = library
        categories = [{"id": number, "name": label} for number, label in enumerate(self.labels, start=1)]
        indices = []
        for objects in (self.truth, self.detections):
            index = new_index()
            index.dataset = {"images": self.images, "categories": categories, "annotations": objects}
            index.createIndex()
            indices.append(index)
        evaluator = new_evaluator(*indices, self.kind)
        evaluator.params.catIds = [category["id"] for category in categories]
        evaluator.params.maxDets = limits
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = np.array(sigmas, dtype=np.float64)
        evaluator.evaluate()
        evaluator.accumulate()
        counted = evaluator.eval
        return np.asarray(counted["precision"]), np.asarray(counted["recall"])


def _checked(
    raw: Mapping[str, Any],
    coco: CocoFile,
    image_numbers: Mapping[int, int],
    category_numbers: Mapping[int, int],
    kind: str,
) -> dict[str, Any]:
    """Convert a detection to an annotation; values derived from the mask are added by :func:`_check_masks`.

    Raises:
        ValueError: If it can't be evaluated.
    """
    missing = [key for key in ("image_id", "category_id", "score") if key not in raw]
    if missing:
        raise ConfigError(f"it has no {', '.join(missing)}")
    image_id, category_id, score = raw["image_id"], raw["category_id"], float(raw["score"])
    if image_id not in image_numbers:
        raise ConfigError(f"its image_id {image_id!r} is not in {coco.name}")
    if category_id not in category_numbers:
        raise ConfigError(
            f"its category_id {category_id!r} is not in {coco.name}, which has {sorted(category_numbers)}"
        )
    if not math.isfinite(score):
        raise ConfigError(f"its score is {score}")
    source = kind if kind != "bbox" else "bbox" if "bbox" in raw else "segm"
    key = {"segm": "segmentation"}.get(source, source)
    if key not in raw:
        raise ConfigError(f"it has no {'bbox' if kind == 'bbox' else key}, which {kind!r} needs")
    entry: dict[str, Any] = {
        "image_id": image_numbers[image_id],
        "category_id": category_numbers[category_id],
        "score": score,
        "iscrowd": 0,
    }
    if source == "segm":
        return {**entry, "segmentation": raw[key]}
    if source == "keypoints":
        values = _numbers(raw[key], 3 * coco.num_keypoints, f"keypoints must be {coco.num_keypoints} times x, y, v")
        entry["keypoints"] = values
        (x0, x1), (y0, y1) = ((min(side), max(side)) for side in (values[0::3], values[1::3]))
        bbox = [x0, y0, x1 - x0, y1 - y0]
    else:
        bbox = _numbers(raw[key], 4, "bbox must be [x, y, width, height]")
    return {**entry, "bbox": bbox, "area": bbox[2] * bbox[3]}


def _check_masks(detections: Sequence[dict[str, Any]], images: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Check the masks of detections in batches, and compute boxes and areas from them.

    Args:
        detections: Detections; those with masks are completed in place.
        images: Images in the order of their numbers.
        kind: The IoU type.

    Raises:
        ValueError: If one can't be evaluated.
    """
    positions = [position for position, detection in enumerate(detections) if "segmentation" in detection]
    for start in range(0, len(positions), _MASKS_AT_ONCE):
        some = positions[start : start + _MASKS_AT_ONCE]
        entries = [detections[position] for position in some]
        of_image = [images[entry["image_id"] - 1] for entry in entries]
        masks = parse_segmentations(
            (entry["segmentation"], image["height"], image["width"])
            for entry, image in zip(entries, of_image, strict=True)
        )
        rles: list[Rle] = []
        for position, mask in zip(some, masks, strict=True):
            if isinstance(mask, ValueError):
                raise ConfigError(f"detection {position}: {mask}")
            rles.append(mask.to_rle() if isinstance(mask, Polygons) else mask)
        boxes = mask_utils.toBbox(rles).tolist()
        areas = mask_utils.area(rles).tolist() if kind == "segm" else [width * height for *_, width, height in boxes]
        for entry, rle, bbox, area in zip(entries, rles, boxes, areas, strict=True):
            entry |= {"segmentation": rle, "bbox": bbox, "area": float(area)}


def _numbers(values: Any, count: int, wanted: str) -> list[float]:
    numbers = list(map(float, values))
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"its {wanted}, got {values}")
    return numbers


def truth_keypoints(annotation: Annotation, coco: CocoFile) -> dict[str, Any]:
    """Flattened keypoints, zeros for an object without any, and the number of labeled ones."""
    points = annotation.keypoints or ((0.0, 0.0, 0.0),) * coco.num_keypoints
    return {
        "keypoints": [value for point in points for value in point],
        "num_keypoints": sum(visibility > 0 for *_, visibility in points),
    }
