"""COCO-format data: the JSON read and checked once, the images on demand.

Label problems are found when the file is read, not in the middle of an epoch. By default they are skipped,
logged once and counted; with ``strict=True`` the first one is an error. What can't be read as a COCO file
at all, or names a category the model doesn't know, is always an error.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as mask_utils
from torch.utils.data import Dataset
from torchvision import tv_tensors

from a2fpn.config import Category
from a2fpn.data.images import read_image, read_labels
from a2fpn.errors import DataError, ImageError
from a2fpn.masks.outlines import Outlines
from a2fpn.masks.rle import Rle
from a2fpn.masks.segmentation import Polygons, parse_segmentations

logger = logging.getLogger(__name__)
Sample = tuple[tv_tensors.Image, dict[str, Any]]
_UNREADABLE_IN_A_ROW = 16  # after so many, the folder is wrong rather than an image
_PROBLEMS_SHOWN = 10
_MIN_BOX_SIDE = 0.01  # pixels; less may vanish when float32 holds the corners of a box in a large image


@dataclass(frozen=True)
class CocoImage:
    """One entry of ``images``.

    Args:
        id: The image's id.
        file_name: Path relative to the image folder.
        height: Pixels.
        width: Pixels.
    """

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class Annotation:
    """One checked entry of ``annotations``.

    Args:
        category_id: Id of the class, as in the file.
        bbox: x, y, width, height in pixels, as in the file; positive width and height.
        mask: The mask, or None in a file without masks.
        area: Pixels; as in the file, else of the mask, else of the box.
        iscrowd: Whether it marks a group, which is ignored in training and evaluation.
        keypoints: x, y in pixels and visibility (0: not labeled, 1: hidden, 2: visible) of each keypoint; empty in a
            file without keypoints, and in one with them for an object that has none.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    mask: Polygons | Rle | None
    area: float
    iscrowd: bool
    keypoints: tuple[tuple[float, float, float], ...] = ()

    @property
    def rle(self) -> Rle | None:
        """The mask as run lengths; polygons are filled on each call, about 20 µs."""
        return self.mask.to_rle() if isinstance(self.mask, Polygons) else self.mask


@dataclass(frozen=True)
class CocoFile:
    """A COCO file, checked.

    Args:
        name: The file, for messages.
        images: By image id, in the file's order.
        categories: Sorted by id.
        annotations: By image id; every image has an entry.
        has_masks: False if no annotation of the file has a segmentation.
        problems: One message for each annotation that was left out.
        num_keypoints: Keypoints of every object; 0 if no annotation of the file has any.
        keypoint_names: Their names, if the categories give them.
    """

    name: str
    images: Mapping[int, CocoImage]
    categories: tuple[Category, ...]
    annotations: Mapping[int, Sequence[Annotation]]
    has_masks: bool
    problems: tuple[str, ...]
    num_keypoints: int = 0
    keypoint_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class SkipReport:
    """Images and annotations that a dataset skipped.

    Args:
        annotations: One message for each annotation left out.
        images: The files that could not be read so far.

    Example:
        >>> str(SkipReport(annotations=("a.json: annotation 7: its image 5 is not in the file",), images=()))
        'skipped 1 annotations and 0 images'
    """

    annotations: tuple[str, ...]
    images: tuple[str, ...]

    def __str__(self) -> str:
        return f"skipped {len(self.annotations)} annotations and {len(self.images)} images"


def read_coco(source: str | Path | Mapping[str, Any] | CocoFile, *, strict: bool = False) -> CocoFile:
    """Read and check a COCO file.

    Annotation ids may be 0, repeated or missing: nothing depends on them. A missing ``iscrowd`` is 0, a
    missing ``area`` is computed.

    Args:
        source: The JSON file, or its content. A :class:`CocoFile` is returned as it is.
        strict: Whether an unusable annotation (unknown image or category, a box without area or outside
            the image, a mask that is missing where others have one or doesn't fit the image) is an error
            instead of being left out.

    Raises:
        DataError: If the source is no COCO file; if ``strict``, for the first unusable annotation.

    Example:
        >>> coco = read_coco({
        ...     "images": [{"id": 5, "file_name": "a.png", "height": 40, "width": 60}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [
        ...         {"id": 1, "image_id": 5, "category_id": 7, "bbox": [10, 10, 20, 20]},
        ...         {"id": 2, "image_id": 5, "category_id": 7, "bbox": [10, 10, 0, 20]},
        ...     ],
        ... })
        >>> coco.annotations[5][0].area
        400.0
        >>> coco.problems
        ('the given mapping: annotation 2: its box [10, 10, 0, 20] has no area inside the image of 60 x 40 pixels',)
    """
    if isinstance(source, CocoFile):
        return source
    name = "the given mapping" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else _load_json(Path(source))
    if not isinstance(data, Mapping) or not all(
        isinstance(data.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{name}: no COCO file; expected an object with the lists images, annotations and categories.")
    images = _index((_parse_image(raw, name) for raw in data["images"]), f"{name}: image")
    categories = _index((_parse_category(raw, name) for raw in data["categories"]), f"{name}: category")
    entries: list[Any] = data["annotations"]
    has_masks = not entries or any(isinstance(raw, Mapping) and raw.get("segmentation") for raw in entries)
    keypoint_names, num_keypoints = _keypoints_of_file(data)

    annotations, found = check_annotations(
        entries, images, categories, has_masks=has_masks, num_keypoints=num_keypoints
    )
    problems = [f"{name}: {problem}" for problem in found]
    if problems and strict:
        raise DataError(problems[0])
    if problems:
        more = [f"and {len(problems) - _PROBLEMS_SHOWN} more"] if len(problems) > _PROBLEMS_SHOWN else []
        shown = "\n  ".join(problems[:_PROBLEMS_SHOWN] + more)
        logger.warning("%s: skipped %d of %d annotations:\n  %s", name, len(problems), len(entries), shown)
    ordered = tuple(categories[category_id] for category_id in sorted(categories))
    return CocoFile(name, images, ordered, annotations, has_masks, tuple(problems), num_keypoints, keypoint_names)


def check_annotations(
    entries: Sequence[Any],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, Category],
    *,
    has_masks: bool,
    num_keypoints: int = 0,
) -> tuple[dict[int, list[Annotation]], list[str]]:
    """Check annotations as :func:`read_coco` does, for sources that give them image by image.

    Args:
        entries: What stands in ``annotations`` of a COCO file.
        images: By image id.
        categories: By category id.
        has_masks: Whether every object must have a mask.
        num_keypoints: Keypoints of every object; 0 for none.

    Returns:
        The usable ones by image id, with an entry for every image, and one message for each of the others.
    """
    annotations: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    problems: list[str] = []
    masks = _parse_masks(entries, images) if has_masks else {}
    for position, raw in enumerate(entries):
        try:
            annotation = _parse_annotation(raw, images, categories, masks.get(position), num_keypoints=num_keypoints)
        except (ValueError, OverflowError) as error:
            has_id = isinstance(raw, Mapping) and "id" in raw
            label = f"annotation {raw['id']}" if has_id else f"the annotation at position {position}"
            problems.append(f"{label}: {error}")
        else:
            annotations[raw["image_id"]].append(annotation)
    return annotations, problems


@dataclass(frozen=True)
class SampleMaker:
    """Turns an image and its annotations, wherever they come from, into a sample as :class:`CocoDataset` gives it.

    Args:
        categories: The classes in the order of their labels.
        has_masks: Whether targets have masks; then every annotation must.
        num_keypoints: Keypoints of every object; 0 for targets without.
        keep_crowd: Whether crowds appear among the objects, marked in ``iscrowd``.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (60, 40)).save(file, "png")
        >>> make_sample = SampleMaker((Category(7, "cat"),))
        >>> cat = Annotation(category_id=7, bbox=(10, 10, 20, 20), mask=None, area=400, iscrowd=False)
        >>> image, target = make_sample(CocoImage(5, "a.png", height=40, width=60), [cat], file.getvalue())
        >>> tuple(image.shape), target["boxes"].tolist()
        ((3, 40, 60), [[10.0, 10.0, 30.0, 30.0]])
    """

    categories: tuple[Category, ...]
    has_masks: bool = False
    num_keypoints: int = 0
    keep_crowd: bool = False

    @functools.cached_property
    def labels(self) -> dict[int, int]:
        """The label of each category id."""
        return {category.id: label for label, category in enumerate(self.categories)}

    def __call__(
        self,
        entry: CocoImage,
        annotations: Sequence[Annotation],
        image: str | Path | bytes,
        *,
        semantic: str | Path | bytes | None = None,
        transforms: Callable[..., Any] | None = None,
    ) -> Sample:
        """Make a sample.

        Args:
            entry: The image's entry; its size must be the image's.
            annotations: Its checked annotations, e.g. of :func:`read_coco`; their categories are among the classes.
            image: The image file or its content.
            semantic: Its semantic map likewise, see :class:`CocoDataset`.
            transforms: Called as ``transforms(image, target)``; masks are :class:`Outlines` there and become pixels
                afterwards, at the size they have then.

        Returns:
            Image and target, see :class:`CocoDataset`.

        Raises:
            ImageError: If the image or the map can't be read or has another size.
        """
        size = (entry.height, entry.width)
        pixels = read_image(image, size=size, name=entry.file_name)
        objects = [a for a in annotations if self.keep_crowd or not a.iscrowd]
        boxes = torch.tensor([a.bbox for a in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor(size[::-1] * 2)).float()
        target: dict[str, Any] = {
            "image_id": entry.id,
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.labels[a.category_id] for a in objects], dtype=torch.int64),
        }
        if self.has_masks:
            target["masks"] = Outlines.of([a.mask for a in objects if a.mask], size)
        if self.num_keypoints:
            none = ((0.0, 0.0, 0.0),) * self.num_keypoints
            keypoints = torch.tensor([a.keypoints or none for a in objects], dtype=torch.float32)
            target["keypoints"] = keypoints.reshape(-1, self.num_keypoints, 3)
        if semantic is not None:
            target["semantic"] = tv_tensors.Mask(read_labels(semantic, size, name=entry.file_name))
        if self.keep_crowd:
            target["iscrowd"] = torch.tensor([a.iscrowd for a in objects], dtype=torch.int64)
        if transforms is not None:
            pixels, target = transforms(pixels, target)
        if isinstance(target.get("masks"), Outlines):
            target = {**target, "masks": target["masks"].to_pixels()}
        return pixels, target


class CocoDataset(Dataset[Sample]):
    """Images of a folder with the annotations of a COCO file.

    A sample is ``(image, target)``: the image is uint8 RGB (3, H, W) in [0, 255], the target a dict of

    - ``image_id``: int, as in the file,
    - ``boxes``: ``tv_tensors.BoundingBoxes`` float32 (N, 4), xyxy in pixels, clipped to the image,
    - ``labels``: int64 (N,) in 0..len(categories) - 1; there is no background label,
    - ``masks``: :class:`~a2fpn.masks.InstanceMasks`, whose ``dense()`` gives (N, H, W); absent if the file has no
      masks at all,
    - ``keypoints``: float32 (N, K, 3), x, y in pixels and visibility (0: not labeled); absent if the file has none,
    - ``semantic``: ``tv_tensors.Mask`` uint8 (H, W) of classes, only with ``semantic``,
    - ``iscrowd``: int64 (N,), only with ``keep_crowd=True``.

    N may be 0. In the place of an unreadable image (missing, corrupt, of another size than the file says)
    stands the next readable one, so that training goes on; its name is logged and counted once, over all
    workers. An evaluation must keep one prediction per ``image_id``, or use ``strict=True``.

    Args:
        images: The image folder.
        annotations: The JSON file or its content, see :func:`read_coco`.
        transforms: Called as ``transforms(image, target)``, e.g. :func:`a2fpn.data.train_transforms`. Masks are
            :class:`Outlines` there. torchvision's own transforms pass them by; where they move anything, put
            ``tv_tensors.Mask(target["masks"].to_pixels().dense())`` in their place first.
        categories: The classes in the order of their labels, usually a model's; matched by id. By default
            the file's own, sorted by id.
        keep_crowd: Whether crowds appear among the objects, marked in ``iscrowd``.
        semantic: A folder of maps, each an 8-bit PNG (palette or gray) of classes with the name of its image and the
            suffix ``.png``; 255 marks pixels to ignore. COCO's ``stuffthingmaps`` are such.
        strict: Whether bad annotations and unreadable images are errors.

    Attributes:
        coco: The checked file.
        categories: The classes in the order of their labels.
        image_ids: Ids in the order of the samples.
        make_sample: What makes a sample of an image and its annotations.

    Raises:
        DataError: If the folder is missing, the JSON is no COCO file, an annotation has a category that is
            not among ``categories``, or, if ``strict``, any annotation is unusable.
        ImageError: From indexing, if 16 images in a row are unreadable or, if ``strict``, one is.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path | Mapping[str, Any] | CocoFile,
        *,
        transforms: Callable[..., Any] | None = None,
        categories: Sequence[Category] | None = None,
        keep_crowd: bool = False,
        semantic: str | Path | None = None,
        strict: bool = False,
    ) -> None:
        self.root = Path(images)
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder of images.")
        self.semantic = None if semantic is None else Path(semantic)
        if self.semantic is not None and not self.semantic.is_dir():
            raise DataError(f"{self.semantic}: no such folder of semantic maps.")
        self.coco = read_coco(annotations, strict=strict)
        self.categories = self.coco.categories if categories is None else tuple(categories)
        self.image_ids = list(self.coco.images)
        self.transforms = transforms
        self.keep_crowd = keep_crowd
        self.strict = strict
        self.make_sample = SampleMaker(
            self.categories,
            has_masks=self.coco.has_masks,
            num_keypoints=self.coco.num_keypoints,
            keep_crowd=keep_crowd,
        )
        self._check_categories()
        self._unreadable = torch.zeros(len(self.image_ids), dtype=torch.bool)
        self._unreadable.share_memory_()  # one for all workers

    @property
    def name(self) -> str:
        """The annotation file, for messages."""
        return self.coco.name

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Names of the keypoints, if the file gives them."""
        return self.coco.keypoint_names

    @property
    def target_keys(self) -> tuple[str, ...]:
        """Keys of the targets; a detector that needs others reports so before training starts."""
        optional = {
            "masks": self.coco.has_masks,
            "keypoints": bool(self.coco.num_keypoints),
            "semantic": self.semantic is not None,
            "iscrowd": self.keep_crowd,
        }
        return ("image_id", "boxes", "labels", *(key for key, present in optional.items() if present))

    @property
    def skipped(self) -> SkipReport:
        """Images and annotations skipped so far."""
        files = tuple(self.coco.images[self.image_ids[i]].file_name for i in self._unreadable.nonzero().flatten())
        return SkipReport(self.coco.problems, files)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images.")
        for attempt in range(min(len(self), _UNREADABLE_IN_A_ROW)):
            position = (index + attempt) % len(self)
            entry = self.coco.images[self.image_ids[position]]
            try:
                annotations = self.coco.annotations[entry.id]
                semantic = self.semantic and (self.semantic / entry.file_name).with_suffix(".png")
                return self.make_sample(
                    entry, annotations, self.root / entry.file_name, semantic=semantic, transforms=self.transforms
                )
            except ImageError as error:
                if self.strict:
                    raise
                if not self._unreadable[position]:
                    self._unreadable[position] = True
                    logger.warning("skipped an image: %s", error)
        raise ImageError(f"{self.root}: {attempt + 1} images in a row are unreadable, the last is {entry.file_name}.")

    def _check_categories(self) -> None:
        used = {a.category_id for annotations in self.coco.annotations.values() for a in annotations}
        unknown = [f"{c.id} ({c.name})" for c in self.coco.categories if c.id in used - self.make_sample.labels.keys()]
        if unknown:
            known = ", ".join(str(category.id) for category in self.categories)
            raise DataError(
                f"{self.coco.name}: annotations have the category {', '.join(unknown)}, "
                f"which is not among the given ones with the ids {known}."
            )


def collate(batch: Sequence[Sample]) -> tuple[list[tv_tensors.Image], list[dict[str, Any]]]:
    """Collect samples into a list of images, which may differ in size, and a list of targets.

    Example:
        >>> images, targets = collate([(torch.zeros(3, 4, 5), {}), (torch.zeros(3, 6, 7), {})])
        >>> [tuple(image.shape) for image in images]
        [(3, 4, 5), (3, 6, 7)]
    """
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no readable JSON ({error}).") from error


def _index(entries: Iterable[Any], label: str) -> dict[int, Any]:
    """Maps entries by id; the id must be unique."""
    by_id: dict[int, Any] = {}
    for entry in entries:
        if entry.id in by_id:
            raise DataError(f"{label} {entry.id} is listed twice; ids must be unique.")
        by_id[entry.id] = entry
    return by_id


def _parse_image(raw: Any, name: str) -> CocoImage:
    match raw:
        case {"id": int(), "file_name": str(), "height": int(), "width": int()} if min(raw["height"], raw["width"]) > 0:
            return CocoImage(raw["id"], raw["file_name"], raw["height"], raw["width"])
    raise DataError(f"{name}: an image needs a whole-number id, file_name, height and width (pixels, > 0), got {raw}.")


def _parse_category(raw: Any, name: str) -> Category:
    match raw:
        case {"id": int(), "name": str()}:
            return Category(raw["id"], raw["name"])
    raise DataError(f"{name}: a category needs a whole-number id and a name, got {raw}.")


def _keypoints_of_file(data: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Names and number of the keypoints of a COCO file; no names and 0 if it has none."""
    lengths = [
        len(raw["keypoints"])
        for raw in data["annotations"]
        if isinstance(raw, Mapping) and isinstance(raw.get("keypoints"), list) and raw["keypoints"]
    ]
    if not lengths:
        return (), 0
    names = next((raw["keypoints"] for raw in data["categories"] if isinstance(raw.get("keypoints"), list)), None)
    return ((), lengths[0] // 3) if names is None else (tuple(map(str, names)), len(names))


def _parse_keypoints(values: Any, count: int) -> tuple[tuple[float, float, float], ...]:
    """Keypoints of an annotation; none where they are left out.

    Raises:
        ValueError: If there is another number of them, or something else than numbers.
    """
    if not count or values is None or values == []:
        return ()
    if not isinstance(values, list) or len(values) != 3 * count:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise ValueError(f"its keypoints must be a list of 3 x {count} numbers as in the rest of the file, got {got}")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError("its keypoints hold something else than numbers")
    return tuple(
        (float(x), float(y), float(v)) for x, y, v in zip(values[::3], values[1::3], values[2::3], strict=True)
    )


def _parse_masks(entries: Sequence[Any], images: Mapping[int, CocoImage]) -> dict[int, Polygons | Rle | ValueError]:
    """Check the masks of all entries at once, by position; those that name no image are left out."""
    of_image = {
        position: images[raw["image_id"]]
        for position, raw in enumerate(entries)
        if isinstance(raw, Mapping) and isinstance(raw.get("image_id"), int) and raw["image_id"] in images
    }
    masks = parse_segmentations(
        (entries[position].get("segmentation"), image.height, image.width) for position, image in of_image.items()
    )
    return dict(zip(of_image, masks, strict=True))


def _parse_annotation(
    raw: Any,
    images: Mapping[int, CocoImage],
    categories: Mapping[int, Category],
    mask: Polygons | Rle | ValueError | None,
    *,
    num_keypoints: int,
) -> Annotation:
    match raw:
        case {"image_id": int(image_id), "category_id": int(category_id), "bbox": list(bbox)} if len(bbox) == 4:
            pass
        case _:
            raise ValueError("it needs image_id, category_id and bbox = [x, y, width, height]")
    if image_id not in images:
        raise ValueError(f"its image {image_id} is not in the file")
    if category_id not in categories:
        raise ValueError(f"its category {category_id} is not in the file")
    image = images[image_id]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in bbox):
        raise ValueError(f"its box holds something else than numbers: {bbox}")
    x, y, width, height = map(float, bbox)
    inside = (min(x + width, image.width) - max(x, 0), min(y + height, image.height) - max(y, 0))
    if min(inside) < _MIN_BOX_SIDE:
        raise ValueError(f"its box {bbox} has no area inside the image of {image.width} x {image.height} pixels")
    if isinstance(mask, ValueError):
        raise mask
    area = raw.get("area")
    if not isinstance(area, (int, float)) or not math.isfinite(area):
        rle = mask.to_rle() if isinstance(mask, Polygons) else mask
        area = mask_utils.area(rle) if rle else width * height
    keypoints = _parse_keypoints(raw.get("keypoints"), num_keypoints)
    return Annotation(category_id, (x, y, width, height), mask, float(area), bool(raw.get("iscrowd", 0)), keypoints)
