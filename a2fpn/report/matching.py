"""Matching of detections with annotations, shared by all parts of a report.

The matching is COCO's: within an image and class, detections by descending score are each matched to the remaining
annotation with the highest IoU. Overlaps of all pairs in an image are computed once, across classes.

Shape shorthand: N detections, M annotations, T IoU thresholds, D and G detections and annotations of one image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from a2fpn.data import CocoFile, DataError, Rle, segmentation_to_rle

Kind = Literal["bbox", "segm"]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of all images, grouped by image.

    Args:
        image: (N,) index of the image in the scene.
        label: (N,) index of the class in the file's categories.
        box: (N, 4) x, y, width, height in pixels.
        area: (N,) pixels, of the mask if masks are compared.
        score: (N,) in [0, 1], descending within an image; 1 for annotations.
        crowd: (N,) whether it is a region in which detections are ignored.
        rles: N run-length encodings; None if boxes are compared.
    """

    image: Ints
    label: Ints
    box: Floats
    area: Floats
    score: Floats
    crowd: Bools
    rles: tuple[Rle, ...] | None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def elongation(self) -> Floats:
        """(N,) long side of the box over its short side, at least 1."""
        sides = np.maximum(self.box[:, 2:], 1e-9)
        longest: Floats = sides.max(1) / sides.min(1)
        return longest


@dataclass(frozen=True, eq=False)
class Scene:
    """Annotations and detections of a set of images, with the overlap of each pair.

    Args:
        coco: The parsed annotations.
        kind: The compared kind, boxes or masks.
        image_ids: Image ids in ascending order.
        truth: The annotations.
        found: The best detections of each image and class.
        overlaps: Per image (D, G) IoU; with a crowd the share of the detection inside it.
        max_detections: Maximum number of detections per image and class.
    """

    coco: CocoFile
    kind: Kind
    image_ids: tuple[int, ...]
    truth: Objects
    found: Objects
    overlaps: tuple[Floats, ...]
    max_detections: int

    @classmethod
    def of(
        cls, coco: CocoFile, detections: Sequence[Mapping[str, Any]], *, kind: Kind = "segm", max_detections: int = 100
    ) -> Scene:
        """Sort objects by image and compute the overlaps.

        Args:
            coco: The annotations.
            detections: COCO results that :func:`a2fpn.evaluation.evaluate_coco` accepts.
            kind: Boxes or masks.
            max_detections: Maximum number of detections per image and class.

        Raises:
            DataError: If masks are requested and the file has none.

        Example:
            >>> from a2fpn.data import read_coco
            >>> coco = read_coco({
            ...     "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            ...     "categories": [{"id": 7, "name": "cat"}],
            ...     "annotations": [{"id": 0, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20]}],
            ... })
            >>> found = [{"image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 15], "score": 0.9}]
            >>> Scene.of(coco, found, kind="bbox").overlaps[0].tolist()
            [[0.75]]
        """
        if kind == "segm" and not coco.has_masks:
            raise DataError(f"{coco.name} has no masks; compare boxes, with kind='bbox'.")
        coco = coco.with_all_masks() if kind == "segm" else coco
        image_ids = tuple(sorted(coco.images))
        truth, found = _annotated(coco, image_ids, kind), _detected(coco, image_ids, detections, kind, max_detections)
        overlaps = tuple(
            _overlaps(found, truth, found_rows, truth_rows)
            for found_rows, truth_rows in zip(_rows(found, image_ids), _rows(truth, image_ids), strict=True)
        )
        return cls(coco, kind, image_ids, truth, found, overlaps, max_detections)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, all different."""
        names = [category.name for category in self.coco.categories]
        return tuple(c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in self.coco.categories)

    @property
    def positives(self) -> Bools:
        """(M,) annotations to find: those that are not crowds."""
        return ~self.truth.crowd

    def images(self) -> Iterator[tuple[slice, slice, Floats]]:
        """Rows of the detections and of the annotations of each image, with their overlaps."""
        yield from zip(_rows(self.found, self.image_ids), _rows(self.truth, self.image_ids), self.overlaps, strict=True)


@dataclass(frozen=True, eq=False)
class Matches:
    """Matches of detections at each IoU threshold.

    Args:
        partner: (T, N) row of the annotation that a detection is matched to, or -1.
        ignored: (T, N) detections that are neither true nor false positives.
    """

    partner: Ints
    ignored: Bools

    @property
    def right(self) -> Bools:
        """(T, N) true positives."""
        return (self.partner >= 0) & ~self.ignored

    @property
    def wrong(self) -> Bools:
        """(T, N) false positives."""
        return (self.partner < 0) & ~self.ignored


def match(
    scene: Scene, *, thresholds: Floats = IOU_THRESHOLDS, ignored: Bools | None = None, outside: Bools | None = None
) -> Matches:
    """Match detections with annotations as in pycocotools.

    Args:
        scene: The objects.
        thresholds: (T,) minimum IoU of a match.
        ignored: (M,) ignored annotations, whose matched detections are ignored too; crowds always are.
        outside: (N,) detections that are ignored unless they match.

    Returns:
        The matches; a detection matched to an ignored annotation has it as its partner and is ignored as well.
    """
    optional = scene.truth.crowd if ignored is None else scene.truth.crowd | ignored
    partner = np.full((len(thresholds), len(scene.found)), -1, dtype=np.int64)
    ignored = np.zeros(partner.shape, dtype=bool)
    limits = np.minimum(thresholds, 1 - 1e-10)[:, None]
    for found_rows, truth_rows, overlaps in scene.images():
        found_labels, truth_labels = scene.found.label[found_rows], scene.truth.label[truth_rows]
        near = np.where(found_labels[:, None] == truth_labels, overlaps, -1.0)
        crowd, spare = scene.truth.crowd[truth_rows], optional[truth_rows]
        free = np.ones((len(limits), near.shape[1]), dtype=bool)
        for row in np.flatnonzero((near >= limits.min()).any(1)).tolist():
            fits = free & (near[row] >= limits)
            for group in (fits & ~spare, fits & spare):  # annotations that are not ignored come first
                open_to = np.flatnonzero(group.any(1) & (partner[:, found_rows.start + row] < 0))
                if not len(open_to):
                    continue
                # Of equal IoUs the last, as in pycocotools.
                reverse = np.where(group[open_to], near[row], -1.0)[:, ::-1].argmax(1)
                chosen = near.shape[1] - 1 - reverse
                partner[open_to, found_rows.start + row] = truth_rows.start + chosen
                ignored[open_to, found_rows.start + row] = spare[chosen]
                free[open_to, chosen] = crowd[chosen]  # a crowd matches any number
    if outside is not None:
        ignored |= (partner < 0) & outside
    return Matches(partner, ignored)


def _rows(objects: Objects, image_ids: Sequence[int]) -> list[slice]:
    edges = np.searchsorted(objects.image, np.arange(len(image_ids) + 1)).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _annotated(coco: CocoFile, image_ids: Sequence[int], kind: Kind) -> Objects:
    label_of = {category.id: label for label, category in enumerate(coco.categories)}
    entries = [(position, a) for position, image_id in enumerate(image_ids) for a in coco.annotations[image_id]]
    return Objects(
        image=np.array([position for position, _ in entries], dtype=np.int64),
        label=np.array([label_of[a.category_id] for _, a in entries], dtype=np.int64),
        box=np.array([a.bbox for _, a in entries], dtype=np.float64).reshape(-1, 4),
        area=np.array([a.area for _, a in entries], dtype=np.float64),
        score=np.ones(len(entries)),
        crowd=np.array([a.iscrowd for _, a in entries], dtype=bool),
        rles=tuple(rle for _, a in entries if (rle := a.rle)) if kind == "segm" else None,
    )


def _detected(
    coco: CocoFile, image_ids: Sequence[int], detections: Sequence[Mapping[str, Any]], kind: Kind, limit: int
) -> Objects:
    label_of = {category.id: label for label, category in enumerate(coco.categories)}
    position_of = {image_id: position for position, image_id in enumerate(image_ids)}
    image = np.array([position_of[d["image_id"]] for d in detections], dtype=np.int64)
    label = np.array([label_of[d["category_id"]] for d in detections], dtype=np.int64)
    score = np.array([d["score"] for d in detections], dtype=np.float64)
    order = np.lexsort((-score, label, image))
    starts = np.flatnonzero(np.diff(image[order] * len(coco.categories) + label[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    kept = np.sort(order[rank < limit])  # equal scores keep their order
    kept = kept[np.lexsort((-score[kept], image[kept]))]
    rles = None
    if kind == "segm":
        rles = tuple(_rle(detections[row]["segmentation"], coco, image_ids[image[row]]) for row in kept.tolist())
    if rles is None:
        box = np.array([detections[row]["bbox"] for row in kept.tolist()], dtype=np.float64).reshape(-1, 4)
        area = box[:, 2] * box[:, 3]
    else:
        box = np.asarray(mask_utils.toBbox(list(rles)) if rles else (), dtype=np.float64).reshape(-1, 4)
        area = np.array([mask_utils.area(rle) for rle in rles], dtype=np.float64)
    return Objects(image[kept], label[kept], box, area, score[kept], np.zeros(len(kept), dtype=bool), rles)


def _rle(segmentation: Any, coco: CocoFile, image_id: int) -> Rle:
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), (str, bytes)):
        return segmentation  # type: ignore[return-value]
    entry = coco.images[image_id]
    return segmentation_to_rle(segmentation, entry.height, entry.width)


def _overlaps(found: Objects, truth: Objects, found_rows: slice, truth_rows: slice) -> Floats:
    shape = (found_rows.stop - found_rows.start, truth_rows.stop - truth_rows.start)
    if not all(shape):
        return np.zeros(shape)
    crowd = truth.crowd[truth_rows].astype(np.uint8).tolist()
    if found.rles is None or truth.rles is None:
        pair: tuple[Any, Any] = (found.box[found_rows], truth.box[truth_rows])
    else:
        pair = (list(found.rles[found_rows]), list(truth.rles[truth_rows]))
    return np.asarray(mask_utils.iou(*pair, crowd), dtype=np.float64).reshape(shape)
