"""COCO metrics for boxes, masks and keypoints, fast, and spared from pycocotools' traps.

pycocotools takes an annotation with id 0 for unmatched, crashes on an empty list of detections and on a
missing ``iscrowd`` or ``area``, never returns from some broken run lengths, prints to the terminal, and its
summary knows only 100 detections per image. None of this happens here. The matching and the numbers are its
own, but for one thing: whether a detected mask is small or large is decided by the mask, as in detectron2, not
by the box that comes with it.

Two libraries count alike, to the last bits of a float64: hotcoco is the default and many times as fast,
pycocotools the reference. Whichever counts, the order in which the images' detections come does not matter:
equal scores count in the order of the image ids and, within an image, in the order given.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data.coco import Annotation, CocoFile, read_coco
from a2fpn.errors import ConfigError
from a2fpn.masks.rle import Polygons, Rle, parse_segmentations

logger = logging.getLogger(__name__)
IOU_TYPES = ("bbox", "segm", "keypoints")
Backend = Literal["auto", "hotcoco", "pycocotools"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)
_MASKS_AT_ONCE = 255  # pycocotools' area raises OverflowError for more
COCO_SIGMAS = tuple(
    tenth / 10
    for tenth in (0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89)
)
"""Standard deviations with which people place COCO's 17 keypoints, nose first as in its files; see ``oks_sigmas``."""


@dataclass(frozen=True)
class BoxMaskMetrics:
    """The 12 COCO numbers of one kind of IoU, in [0, 1]; -1 where the ground truth has no such object.

    Precision and recall are means over the classes. "Small" objects have an area below 32² pixels, "large"
    ones above 96². All numbers but ``ar1`` and ``ar10`` use the ``max_detections`` best detections per image
    and class (COCO's definition says 100).

    Args:
        ap: Average precision, the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: As ``ap``, for small objects.
        ap_medium: For medium objects.
        ap_large: For large objects.
        ar1: Average recall with 1 detection per image and class.
        ar10: With 10.
        ar100: With ``max_detections``; 100 in the COCO definition, hence the name.
        ar_small: As ``ar100``, for small objects.
        ar_medium: For medium objects.
        ar_large: For large objects.
        per_class: ``ap`` by class name; names that occur twice are followed by the category id.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: Mapping[str, float]


@dataclass(frozen=True)
class KeypointMetrics:
    """The 10 COCO numbers of keypoints, in [0, 1]; -1 where the ground truth has no such object.

    The object keypoint similarity (OKS) takes the place of the IoU: the mean over an object's labeled keypoints
    of ``exp(-d² / (8 area sigma²))``, d the distance in pixels. Objects without a labeled keypoint count neither
    way, and neither do small ones.

    Args:
        ap: Average precision, the mean over the OKS thresholds 0.50, 0.55, ..., 0.95.
        ap50: At OKS 0.50.
        ap75: At OKS 0.75.
        ap_medium: As ``ap``, for objects with an area of 32² to 96² pixels.
        ap_large: For larger ones.
        ar: Average recall, the mean over the thresholds.
        ar50: At OKS 0.50.
        ar75: At OKS 0.75.
        ar_medium: As ``ar``, for medium objects.
        ar_large: For large objects.
        per_class: ``ap`` by class name; names that occur twice are followed by the category id.
    """

    ap: float
    ap50: float
    ap75: float
    ap_medium: float
    ap_large: float
    ar: float
    ar50: float
    ar75: float
    ar_medium: float
    ar_large: float
    per_class: Mapping[str, float]


@dataclass(frozen=True)
class CocoMetrics:
    """The result of an evaluation.

    Args:
        bbox: For boxes, or None if not asked for.
        segm: For masks, or None if not asked for.
        max_detections: How many detections per image and class counted, of boxes and masks.
        keypoints: For keypoints, or None if not asked for.
    """

    bbox: BoxMaskMetrics | None
    segm: BoxMaskMetrics | None
    max_detections: int
    keypoints: KeypointMetrics | None = None

    @property
    def measured(self) -> dict[str, BoxMaskMetrics | KeypointMetrics]:
        """Metrics that were asked for, by kind of IoU."""
        found = {kind: getattr(self, kind) for kind in IOU_TYPES}
        return {kind: metrics for kind, metrics in found.items() if metrics is not None}

    def to_dict(self, *, per_class: bool = False) -> dict[str, float]:
        """Return the numbers by name, e.g. ``"segm/ap"``; with ``per_class`` also ``"segm/ap/<class>"``."""
        flat: dict[str, float] = {}
        for kind, metrics in self.measured.items():
            values = dataclasses.asdict(metrics)
            classes = values.pop("per_class")
            flat |= {f"{kind}/{name}": value for name, value in values.items()}
            flat |= {f"{kind}/ap/{name}": value for name, value in classes.items()} if per_class else {}
        return flat


def evaluate_coco(
    ground_truth: str | Path | Mapping[str, Any] | CocoFile,
    detections: Iterable[Mapping[str, Any]],
    *,
    iou_types: Sequence[str] = ("bbox", "segm"),
    max_detections: int = 100,
    max_keypoint_detections: int = 20,
    oks_sigmas: Sequence[float] = COCO_SIGMAS,
    backend: Backend = "auto",
) -> CocoMetrics:
    """Compare detections with a COCO ground truth.

    All images of the ground truth count, also those without a detection. Annotations that
    :func:`a2fpn.data.read_coco` finds unusable are left out and logged; crowds stay, as regions in which
    detections count neither for nor against.

    Args:
        ground_truth: A COCO file, its content, or what ``read_coco`` returned for it (``dataset.coco``),
            which saves reading it again.
        detections: COCO results: dicts of ``image_id``, ``category_id`` (the file's own ids), ``score``,
            ``bbox`` (x, y, width, height in pixels), ``segmentation`` (RLE, as in ``Result.to_coco()``) and
            ``keypoints`` (x, y, visibility of each one after the other; the last is not looked at).
            Only what the asked-for ``iou_types`` need; a missing ``bbox`` is taken from the mask. They are
            not changed. All other arguments are checked before the first is taken, so that a generator that
            predicts does not predict in vain.
        iou_types: Any of ``"bbox"``, ``"segm"`` and ``"keypoints"``.
        max_detections: How many of the best detections per image and class count, of boxes and masks. COCO
            says 100, which is too few for images with more objects; say so where you publish numbers with
            another value.
        max_keypoint_detections: The same of keypoints; COCO says 20.
        oks_sigmas: For each keypoint of the file the standard deviation with which people place it, in units of
            the object's size (the root of its area); COCO's 17 by default.
        backend: Which library counts. They agree; ``"auto"`` takes hotcoco, or pycocotools with a line in the
            log where hotcoco can't be imported.

    Raises:
        DataError: If the ground truth is no COCO file.
        ValueError: If a detection names an unknown image or category or lacks a needed value, if masks or
            keypoints are asked for and the ground truth has none, if there is not one sigma per keypoint, if
            the backend is not installed, or for an argument out of its range.

    Example:
        >>> ground_truth = {
        ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
        ... }
        >>> detection = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 15], "score": 0.9}
        >>> metrics = evaluate_coco(ground_truth, [detection], iou_types=["bbox"])
        >>> {name: round(value, 3) for name, value in metrics.to_dict(per_class=True).items() if "ap" in name}
        ...     # doctest: +ELLIPSIS
        {'bbox/ap': 0.6, 'bbox/ap50': 1.0, 'bbox/ap75': 1.0, ..., 'bbox/ap/cat': 0.6}
    """
    if not iou_types or not set(iou_types) <= set(IOU_TYPES):
        raise ConfigError(f"iou_types must be some of {', '.join(IOU_TYPES)}, got {list(iou_types)}.")
    for name, limit in {"max_detections": max_detections, "max_keypoint_detections": max_keypoint_detections}.items():
        if limit < 1:
            raise ConfigError(f"{name} must be at least 1, got {limit}.")
    library = _library(backend)
    coco = read_coco(ground_truth)
    if "segm" in iou_types and not coco.has_masks:
        raise ConfigError(f"{coco.name} has no masks; evaluate boxes only, with iou_types=['bbox'].")
    if "keypoints" in iou_types:
        _check_sigmas(coco, oks_sigmas)
    given = list(detections)
    results: dict[str, Any] = {}
    for kind in dict.fromkeys(iou_types):
        scene = _EvalInputs.of(coco, given, kind)
        if kind == "keypoints":
            results[kind] = _keypoint_metrics(scene, library, max_keypoint_detections, oks_sigmas)
        else:
            results[kind] = _box_mask_metrics(scene, library, max_detections)
    return CocoMetrics(results.get("bbox"), results.get("segm"), max_detections, results.get("keypoints"))


def common_iou_types(ground_truth: CocoFile, keys: Collection[str]) -> list[str]:
    """Return what can be evaluated: what a detector predicts and a file has annotated.

    Args:
        ground_truth: The file.
        keys: What the detector predicts, e.g. ``detector.target_keys``.

    Example:
        >>> coco = read_coco({"images": [], "annotations": [], "categories": []})
        >>> common_iou_types(coco, ["boxes", "masks"]), common_iou_types(coco, ["boxes", "keypoints"])
        (['bbox', 'segm'], ['bbox'])
    """
    masks = "masks" in keys and ground_truth.has_masks
    keypoints = "keypoints" in keys and ground_truth.num_keypoints > 0
    return ["bbox"] + ["segm"] * masks + ["keypoints"] * keypoints


def annotations_as_detections(ground_truth: str | Path | Mapping[str, Any] | CocoFile) -> list[dict[str, Any]]:
    """Return the objects of a ground truth, crowds left out, as perfect detections with score 1.

    In a file with keypoints, those of an object without a labeled one lie in the middle of its box, where they count
    neither way.

    Evaluated against the same file they reach AP 1, which checks a data set and its ids from end to end.

    Example:
        >>> annotations_as_detections({
        ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
        ... })
        [{'image_id': 1, 'category_id': 7, 'bbox': [10.0, 10.0, 20.0, 20.0], 'score': 1.0}]
    """
    coco = read_coco(ground_truth)
    return [
        {
            "image_id": image_id,
            "category_id": annotation.category_id,
            "bbox": list(annotation.bbox),
            "score": 1.0,
            **({"segmentation": rle} if (rle := annotation.rle) else {}),
            **({"keypoints": _perfect_keypoints(annotation, coco)} if coco.num_keypoints else {}),
        }
        for image_id, annotations in coco.annotations.items()
        for annotation in annotations
        if not annotation.iscrowd
    ]


@functools.cache
def _library(backend: Backend) -> tuple[Any, Any]:
    """Return the classes ``COCO`` and ``COCOeval`` of a library; both have pycocotools' interface."""
    if backend not in BACKENDS:
        raise ConfigError(f"Unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}.")
    if backend == "pycocotools":
        return _silent_pycocotools()
    try:
        import hotcoco
    except ImportError as error:
        if backend == "hotcoco":
            raise ConfigError(f"hotcoco can't be imported ({error}); install it, or take 'pycocotools'.") from error
        logger.warning("hotcoco can't be imported (%s): pycocotools evaluates, which takes many times as long", error)
        return _silent_pycocotools()
    return hotcoco.COCO, hotcoco.COCOeval


def _silent_pycocotools() -> tuple[Any, Any]:
    """Pycocotools' classes without their progress messages, which nothing else turns off."""

    def silent(function: Any) -> Any:
        namespace = {**function.__globals__, "print": lambda *_: None}
        return types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)

    coco, evaluator = pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval
    return (
        type("COCO", (coco,), {"__init__": silent(coco.__init__), "createIndex": silent(coco.createIndex)}),
        type("COCOeval", (evaluator,), {name: silent(getattr(evaluator, name)) for name in ("evaluate", "accumulate")}),
    )


def _check_sigmas(coco: CocoFile, sigmas: Sequence[float]) -> None:
    if not coco.num_keypoints:
        raise ConfigError(f"{coco.name} has no keypoints; evaluate boxes only, with iou_types=['bbox'].")
    if len(sigmas) != coco.num_keypoints:
        raise ConfigError(
            f"{coco.name} has {coco.num_keypoints} keypoints per object, oks_sigmas are {len(sigmas)}; give one sigma "
            f"for each keypoint{' (the default is those of COCO)' if len(sigmas) == len(COCO_SIGMAS) else ''}."
        )
    if not all(sigma > 0 and math.isfinite(sigma) for sigma in sigmas):
        raise ConfigError(f"oks_sigmas must be positive numbers, got {list(sigmas)}.")


@dataclass(frozen=True)
class _EvalInputs:
    """Ground truth and detections, renumbered with ids that both libraries accept.

    Images, in the order of their ids, categories and objects are numbered from 1: an object with id 0 counts as no
    match, and hotcoco takes no negative ids.

    Args:
        kind: The kind of IoU.
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
    def of(cls, coco: CocoFile, detections: Sequence[Mapping[str, Any]], kind: str) -> _EvalInputs:
        """Numbers everything and checks the detections."""
        image_numbers = {image_id: number for number, image_id in enumerate(sorted(coco.images), start=1)}
        category_numbers = {category.id: number for number, category in enumerate(coco.categories, start=1)}
        truth = [
            {
                "image_id": image_numbers[image_id],
                "category_id": category_numbers[annotation.category_id],
                "bbox": list(annotation.bbox),
                "area": annotation.area,
                "iscrowd": int(annotation.iscrowd),
                **({"segmentation": annotation.rle} if kind == "segm" else {}),  # polygons become one at each access
                **(_truth_keypoints(annotation, coco) if kind == "keypoints" else {}),
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
        _check_masks(found, images, kind)  # of those before the failure, as the first is the one to report
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
        """Let a library count.

        Args:
            library: Its ``COCO`` and ``COCOeval``.
            limits: Detections per image and class, ascending.
            sigmas: One per keypoint.

        Returns:
            Precision (IoU threshold, recall, class, area, limit) and recall (IoU threshold, class, area, limit); -1
            where there is nothing to find.
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
    """A detection as an annotation; what comes from the mask is left to :func:`_check_masks`.

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
    """Check the masks of detections, many at once, and take boxes and areas from them.

    Args:
        detections: Those with masks are completed in place.
        images: In the order of their numbers.
        kind: The kind of IoU.

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


def _perfect_keypoints(annotation: Annotation, coco: CocoFile) -> list[float]:
    x, y, width, height = annotation.bbox
    found = _truth_keypoints(annotation, coco)
    keypoints: list[float] = found["keypoints"]
    return keypoints if found["num_keypoints"] else [x + width / 2, y + height / 2, 0.0] * coco.num_keypoints


def _truth_keypoints(annotation: Annotation, coco: CocoFile) -> dict[str, Any]:
    """The keypoints one after the other, zeros for an object that has none, and how many are labeled."""
    points = annotation.keypoints or ((0.0, 0.0, 0.0),) * coco.num_keypoints
    return {
        "keypoints": [value for point in points for value in point],
        "num_keypoints": sum(visibility > 0 for *_, visibility in points),
    }


def _box_mask_metrics(scene: _EvalInputs, library: tuple[Any, Any], max_detections: int) -> BoxMaskMetrics:
    limits = sorted({min(1, max_detections), min(10, max_detections), max_detections})
    precision, recall = scene.compare(library, limits)
    every, small, medium, large = range(4)
    iou50, iou75 = 0, 5
    return BoxMaskMetrics(
        ap=_mean(precision[..., every, -1]),
        ap50=_mean(precision[iou50, ..., every, -1]),
        ap75=_mean(precision[iou75, ..., every, -1]),
        ap_small=_mean(precision[..., small, -1]),
        ap_medium=_mean(precision[..., medium, -1]),
        ap_large=_mean(precision[..., large, -1]),
        ar1=_mean(recall[..., every, 0]),
        ar10=_mean(recall[..., every, limits.index(min(10, max_detections))]),
        ar100=_mean(recall[..., every, -1]),
        ar_small=_mean(recall[..., small, -1]),
        ar_medium=_mean(recall[..., medium, -1]),
        ar_large=_mean(recall[..., large, -1]),
        per_class={label: _mean(precision[:, :, k, every, -1]) for k, label in enumerate(scene.labels)},
    )


def _keypoint_metrics(
    scene: _EvalInputs, library: tuple[Any, Any], max_detections: int, sigmas: Sequence[float]
) -> KeypointMetrics:
    precision, recall = scene.compare(library, [max_detections], sigmas)
    every, medium, large = range(3)
    oks50, oks75 = 0, 5
    return KeypointMetrics(
        ap=_mean(precision[..., every, -1]),
        ap50=_mean(precision[oks50, ..., every, -1]),
        ap75=_mean(precision[oks75, ..., every, -1]),
        ap_medium=_mean(precision[..., medium, -1]),
        ap_large=_mean(precision[..., large, -1]),
        ar=_mean(recall[..., every, -1]),
        ar50=_mean(recall[oks50, ..., every, -1]),
        ar75=_mean(recall[oks75, ..., every, -1]),
        ar_medium=_mean(recall[..., medium, -1]),
        ar_large=_mean(recall[..., large, -1]),
        per_class={label: _mean(precision[:, :, k, every, -1]) for k, label in enumerate(scene.labels)},
    )


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean over what was measured; what was not is marked with -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0
