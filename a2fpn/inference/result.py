"""Detections of one image.

Shape shorthand: N objects of K keypoints, an image of H x W pixels.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from a2fpn._registry import did_you_mean
from a2fpn._words import RESULT
from a2fpn.config import SCORE_THRESHOLD, Category
from a2fpn.data.slides import SlideOptions, Thumbnail, open_slide
from a2fpn.errors import A2FPNError, ConfigError, ConfigTypeError
from a2fpn.inference.found import FoundObject
from a2fpn.inference.to_supervision import to_detections, to_keypoints
from a2fpn.masks.rle import Rle, decode_rle, shrunk_masks

if TYPE_CHECKING:
    import supervision

_DRAWN = 2**26  # maximum pixels of an image that is drawn on at full size
_NOTEBOOK_SIDE = 1600  # pixels of a picture in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Detections of one image, by descending score.

    ``result[0]`` is the best object, and iteration goes over all. ``result[:5]``, ``result["cat"]`` and
    ``result[result.scores > 0.9]`` are results with a subset of the objects. A notebook displays the picture.

    Masks are run-length encoded: those of four hundred objects in a large image take kilobytes.

    Args:
        boxes: (N, 4) float32, x0 y0 x1 y1 in pixels of the image.
        scores: (N,) float32 in [0, 1], descending.
        labels: (N,) int64, indices into ``categories``.
        size: Height and width of the image.
        categories: The model's classes, in the order of the labels.
        rles: A COCO run-length encoding per object; None if the model predicts no masks.
        image: (H, W, 3) uint8 RGB; None if the image was read from ``path`` and can be read again.
        path: The file the image was read from, if any.
        keypoints: (N, K, 3) float32, x and y in pixels of the image and 1 for visible; None if it predicts none.
        keypoint_scores: (N, K) float32, logit of each keypoint's heatmap maximum; above 0 it counts as confident.
        keypoint_names: K names, or empty if unknown.
        score_threshold: Minimum score of the objects; None if not set.
        microns_per_pixel: Pixel size stated by the image file; None if it states none.
        reading: Options with which the file was read; None for the defaults.
        thumbnail: Thumbnail of a slide, see :meth:`a2fpn.data.slides.Slide.thumbnail`, which :meth:`plot` draws on.

    Example:
        >>> result = Result(
        ...     boxes=np.array([[2, 2, 6, 5]], dtype=np.float32),
        ...     scores=np.array([0.75], dtype=np.float32),
        ...     labels=np.array([0]),
        ...     size=(8, 10),
        ...     categories=(Category(7, "cat"),),
        ... )
        >>> result
        <Result: 1 object in 10 x 8 pixels: 1 cat>
        >>> result[0], [found.name for found in result], len(result["cat"])
        (<cat 0.75 at [2, 2, 6, 5]>, ['cat'], 1)
        >>> result.to_coco(image_id=3)
        [{'image_id': 3, 'category_id': 7, 'bbox': [2.0, 2.0, 4.0, 3.0], 'score': 0.75}]
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    size: tuple[int, int]
    categories: tuple[Category, ...]
    rles: tuple[Rle, ...] | None = None
    image: NDArray[np.uint8] | None = None
    path: str | None = None
    keypoints: NDArray[np.float32] | None = None
    keypoint_scores: NDArray[np.float32] | None = None
    keypoint_names: tuple[str, ...] = ()
    score_threshold: float | None = None
    microns_per_pixel: float | None = None
    reading: SlideOptions | None = None
    thumbnail: Thumbnail | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> FoundObject: ...
    @overload
    def __getitem__(self, index: slice | str | Sequence[int] | NDArray[Any] | Tensor) -> Result: ...

    def __getitem__(self, index: int | slice | str | Sequence[int] | NDArray[Any] | Tensor) -> FoundObject | Result:
        if isinstance(index, str):
            known = [category.name for category in self.categories]
            if index not in known:
                raise ConfigError(f"Unknown class {index!r}. {did_you_mean(index, known)}")
            return self._kept(np.flatnonzero(np.asarray(self.names) == index))
        chosen = index.cpu().numpy() if isinstance(index, Tensor) else index
        if not isinstance(chosen, slice):
            chosen = np.asarray(chosen, dtype=None if np.size(chosen) else np.int64)
            if chosen.dtype.kind not in "biu" or chosen.ndim > 1:
                raise ConfigTypeError(
                    f"Objects are selected by a number, a slice, a class, a list of numbers or a mask, got {index!r}."
                )
        kept = np.arange(len(self))[chosen]
        return self._object(int(kept)) if np.ndim(kept) == 0 else self._kept(kept)

    def __iter__(self) -> Iterator[FoundObject]:
        return (self._object(index) for index in range(len(self)))

    def _object(self, index: int) -> FoundObject:
        return FoundObject(
            box=self.boxes[index],
            score=float(self.scores[index]),
            label=int(self.labels[index]),
            name=self.categories[int(self.labels[index])].name,
            size=self.size,
            rle=None if self.rles is None else self.rles[index],
            keypoints=None if self.keypoints is None else self.keypoints[index],
        )

    if not TYPE_CHECKING:  # with it, type checkers would accept any name

        def __getattr__(self, name: str) -> Any:
            known = [*(field.name for field in fields(self)), *(n for n in vars(Result) if not n.startswith("_"))]
            advice = "" if name.startswith("_") else f" {did_you_mean(name, known, RESULT)}"
            raise AttributeError(f"A Result has no attribute {name!r}.{advice}")

    def _repr_png_(self) -> bytes | None:
        """Return the picture for a notebook, or None without an image to draw on."""
        try:
            picture = self.plot()
        except (A2FPNError, OSError):
            return None
        picture.thumbnail((_NOTEBOOK_SIDE, _NOTEBOOK_SIDE))
        content = io.BytesIO()
        picture.save(content, "PNG")
        return content.getvalue()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        objects = "1 object" if len(self) == 1 else f"{len(self)} objects"
        return f"<Result: {objects} in {self.size[1]} x {self.size[0]} pixels{': ' if counts else ''}{counts}>"

    @property
    def names(self) -> tuple[str, ...]:
        """Class name of each object."""
        return tuple(self.categories[label].name for label in self.labels.tolist())

    @property
    def counts(self) -> dict[str, int]:
        """Number of objects of each class, in the order of the labels, without absent classes."""
        return dict(Counter(self.categories[label].name for label in sorted(self.labels.tolist())))

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """(N, H, W) bool, decoded on each access; None if the model predicts no masks."""
        return None if self.rles is None else decode_rle(self.rles, size=self.size)

    def above(self, score_threshold: float) -> Result:
        """Return the objects with at least the given score.

        Args:
            score_threshold: Minimum score in [0, 1].
        """
        kept = self._kept(np.flatnonzero(self.scores >= score_threshold))
        return replace(kept, score_threshold=score_threshold)

    def _kept(self, kept: NDArray[np.intp]) -> Result:
        return replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            rles=None if self.rles is None else tuple(self.rles[index] for index in kept),
            keypoints=None if self.keypoints is None else self.keypoints[kept],
            keypoint_scores=None if self.keypoint_scores is None else self.keypoint_scores[kept],
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO result records, as read by pycocotools' ``loadRes`` and COCO's servers.

        Args:
            image_id: The image's id in the annotations.

        Returns:
            Per object image_id, category_id (the original id of its category), bbox (x, y, width, height in
            pixels), score and, if there are masks, segmentation (compressed RLE), if there are keypoints, keypoints
            (x, y and visibility of each, 3 K numbers).
        """
        corners = self.boxes.astype(np.float64)
        sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        records: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": self.categories[label].id, "bbox": bbox, "score": score}
            for label, bbox, score in zip(self.labels.tolist(), sides.tolist(), self.scores.tolist(), strict=True)
        ]
        for record, rle in zip(records, self.rles or (), strict=False):
            record["segmentation"] = rle
        if self.keypoints is not None:
            for record, points in zip(records, self.keypoints, strict=True):
                record["keypoints"] = points.ravel().tolist()
        return records

    @classmethod
    def from_coco(
        cls,
        records: Sequence[Mapping[str, Any]],
        *,
        size: tuple[int, int],
        categories: tuple[Category, ...],
        path: str | None = None,
        microns_per_pixel: float | None = None,
    ) -> Result:
        """Build a result from records of :meth:`to_coco`.

        Args:
            records: Records by descending score.
            size: Height and width of the image.
            categories: The classes, in the order of the labels.
            path: The image file.
            microns_per_pixel: As in the result.

        Raises:
            ValueError: If the class of a record is not among them.

        Example:
            >>> record = {"category_id": 7, "bbox": [2.0, 2.0, 4.0, 3.0], "score": 0.75}
            >>> Result.from_coco([record], size=(8, 10), categories=(Category(7, "cat"),))
            <Result: 1 object in 10 x 8 pixels: 1 cat>
        """
        known = {category.id: label for label, category in enumerate(categories)}
        unknown = {record["category_id"] for record in records} - known.keys()
        if unknown:
            raise ConfigError(f"Unknown category_id {min(unknown)}; expected an id of the {len(categories)} classes.")
        boxes = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
        points = [np.reshape(record["keypoints"], (-1, 3)) for record in records if "keypoints" in record]
        return cls(
            boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32),
            scores=np.array([record["score"] for record in records], dtype=np.float32),
            labels=np.array([known[record["category_id"]] for record in records], dtype=np.int64),
            size=size,
            categories=categories,
            rles=tuple(record["segmentation"] for record in records if "segmentation" in record) or None,
            keypoints=np.array(points, dtype=np.float32) if points else None,
            path=path,
            microns_per_pixel=microns_per_pixel,
        )

    def to_supervision(self) -> supervision.Detections:
        """Return supervision's ``Detections``, with the names as ``data["class_name"]``.

        Masks are compact if the installed version supports it, else dense. ``Detections`` have no field for keypoints:
        they are in ``data["keypoints"]``, and in :meth:`to_supervision_keypoints`.
        """
        return to_detections(
            self.boxes,
            self.scores,
            self.labels,
            names=self.names,
            size=self.size,
            rles=self.rles,
            keypoints=self.keypoints,
        )

    def to_supervision_keypoints(self) -> supervision.KeyPoints:
        """Return supervision's ``KeyPoints``, for its keypoint annotators.

        Raises:
            ValueError: If the model predicts no keypoints.
        """
        if self.keypoints is None:
            raise ConfigError("This result has no keypoints; they come from detectors such as keypointrcnn.")
        return to_keypoints(self.keypoints, self.labels, names=self.names)

    def load_image(self) -> NDArray[np.uint8]:
        """Return the (H, W, 3) uint8 image, read again from ``path`` unless it was given in memory.

        Raises:
            ValueError: If there is neither an image nor a path.
            OSError: If the file no longer exists.
        """
        if self.image is not None:
            return self.image
        if self.path is None:
            raise ConfigError("This result holds neither the image nor its path; give the image to plot(image=...).")
        # The file was already read under the predictor's own limit.
        reading = replace(self.reading or SlideOptions(whole=True), max_pixels=None)
        with open_slide(self.path, reading) as slide:
            return _as_rgb(to_array(slide.read((0, 0, *slide.size[::-1]))))

    def plot(
        self,
        image: NDArray[np.uint8] | None = None,
        *,
        score_threshold: float | None = None,
        boxes: bool | None = None,
        labels: bool | None = None,
        legend: bool = True,
    ) -> Image.Image:
        """Draw the objects on the image, enlarging small images by an integer factor.

        Confident keypoints are drawn, with a skeleton if they have COCO's names.

        Args:
            image: (H, W, 3) uint8 RGB; None for the image of the result, or that of its path.
            score_threshold: Objects with a lower score are omitted. None draws all objects of a result that was made
                with a threshold, otherwise those from 0.5 on.
            boxes: Whether to draw boxes; None omits them if there are masks and more than 40 objects.
            labels: Whether to write class and score next to objects that have room for it; None does so for up
                to 40 objects.
            legend: Whether to add a strip below the picture with the classes, counts and score ranges.

        Returns:
            An RGB picture; ``.save("overlay.png")`` writes it, a notebook displays it.

        Raises:
            ValueError: If there is no image, or one of another type or size.
        """
        from a2fpn.inference.draw import draw

        if score_threshold is None:
            score_threshold = SCORE_THRESHOLD if self.score_threshold is None else self.score_threshold
        shown = self.above(score_threshold)
        if image is None and self.image is None:
            small = self.thumbnail or self._small()
            if small is not None:
                image, shown = _as_rgb(small.pixels), shown.shrunk(small.side)
        image = self.load_image() if image is None else image
        return draw(shown, image, boxes=boxes, labels=labels, legend=legend)

    def shrunk(self, side: int) -> Result:
        """Return the result downscaled by an integer factor.

        Args:
            side: The factor.
        """
        size = (-(-self.size[0] // side), -(-self.size[1] // side))
        return replace(
            self,
            boxes=self.boxes / np.float32(side),
            size=size,
            rles=None if self.rles is None else tuple(shrunk_masks(self.rles, side, size)),
            keypoints=None
            if self.keypoints is None
            else self.keypoints * np.array([1 / side, 1 / side, 1], np.float32),
            image=None,
            microns_per_pixel=None if self.microns_per_pixel is None else self.microns_per_pixel * side,
            thumbnail=None,
        )

    def _small(self) -> Thumbnail | None:
        """Thumbnail of the file if it is too large to be drawn on."""
        if self.path is None or self.size[0] * self.size[1] <= _DRAWN:
            return None
        with open_slide(self.path, replace(self.reading or SlideOptions(), max_pixels=None, whole=False)) as slide:
            return slide.thumbnail()


def _as_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert channels (H, W, C) to RGB: the first three, or the first as gray."""
    return pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)


def to_array(image: Tensor) -> NDArray[np.uint8]:
    """Convert a tensor (3, H, W), uint8 or float in [0, 1], to a uint8 array (H, W, 3)."""
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
    return np.asarray(pixels.detach().permute(1, 2, 0).cpu())
