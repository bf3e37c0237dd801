"""COCO-format data sets: samples from images and the annotations of a checked file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from a2fpn._text import shorten
from a2fpn.config import Category
from a2fpn.data.coco_file import Annotation, CocoFile, read_coco
from a2fpn.data.document import CocoImage
from a2fpn.data.images import image_path, read_image, read_labels
from a2fpn.errors import DataError, ImageError
from a2fpn.masks.outlines import Outlines

logger = logging.getLogger(__name__)
Sample = tuple[tv_tensors.Image, dict[str, Any]]
_UNREADABLE_IN_A_ROW = 16  # with so many, the folder is wrong rather than single images


@dataclass(frozen=True)
class SkipReport:
    """Images and annotations that a dataset skipped.

    Args:
        annotations: One message for each dropped annotation.
        images: Unreadable files so far.

    Example:
        >>> str(SkipReport(annotations=("a.json: annotation 7: its image 5 is not in the file",), images=()))
        'skipped 1 annotations and 0 images'
    """

    annotations: tuple[str, ...]
    images: tuple[str, ...]

    def __str__(self) -> str:
        return f"skipped {len(self.annotations)} annotations and {len(self.images)} images"


@dataclass(frozen=True)
class SampleMaker:
    """Converts an image and its annotations from any source to a sample of :class:`CocoDataset`.

    Args:
        categories: The classes in the order of their labels.
        has_masks: Whether targets have masks; objects without one then get an empty one, see ``has_mask`` of
            :class:`CocoDataset`.
        num_keypoints: Keypoints of every object; 0 for targets without keypoints.
        keep_crowd: Whether to keep crowds among the objects, marked in ``iscrowd``.
        gray_bits: Bits used by gray values of image files, see :func:`read_image`.

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
    gray_bits: int = 16

    @functools.cached_property
    def labels(self) -> dict[int, int]:
        """Label of each category id."""
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
            entry: The image's entry; its size must match the image.
            annotations: Its checked annotations, e.g. of :func:`read_coco`; their categories are among the classes.
            image: The image file or its content.
            semantic: Its semantic map likewise, see :class:`CocoDataset`.
            transforms: Called as ``transforms(image, target)`` with masks as :class:`Outlines`, which are rasterized
                afterwards, at their final size.

        Returns:
            Image and target, see :class:`CocoDataset`.

        Raises:
            ImageError: If the image or the map can't be read or has another size.
        """
        size = (entry.height, entry.width)
        pixels = read_image(image, size=size, gray_bits=self.gray_bits, name=entry.file_name)
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
            target["masks"] = Outlines.of([a.mask for a in objects], size)
            has_mask = torch.tensor([a.mask is not None for a in objects], dtype=torch.bool)
            if not has_mask.all():
                target["has_mask"] = has_mask
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
    - ``masks``: :class:`~a2fpn.masks.InstanceMasks`, whose ``dense()`` is (N, H, W); absent if the file has no
      masks,
    - ``has_mask``: bool (N,), only in an image with objects without a mask in a file with masks; their masks are
      empty and ignored by mask heads,
    - ``keypoints``: float32 (N, K, 3), x, y in pixels and visibility (0: not labeled); absent if the file has none,
    - ``semantic``: ``tv_tensors.Mask`` uint8 (H, W) of classes, only with ``semantic``,
    - ``iscrowd``: int64 (N,), only with ``keep_crowd=True``.

    N may be 0. An unreadable image (missing, corrupt, or of another size than in the file) is replaced by
    the next readable one, so that training continues; its name is logged and counted once, over all
    workers. An evaluation must keep one prediction per ``image_id``, or use ``strict=True``.

    Args:
        images: The image folder.
        annotations: The JSON file or its content, see :func:`read_coco`.
        transforms: Called as ``transforms(image, target)``, e.g. :func:`a2fpn.data.train_transforms`, with masks as
            :class:`Outlines`. torchvision's own transforms ignore them; before geometric ones, replace them by
            ``tv_tensors.Mask(target["masks"].to_pixels().dense())``.
        categories: The classes in the order of their labels, usually a model's; matched by id. By default
            the file's own, sorted by id.
        keep_crowd: Whether to keep crowds among the objects, marked in ``iscrowd``.
        semantic: A folder of maps, each an 8-bit PNG (palette or gray) of classes with the name of its image and the
            suffix ``.png``; 255 is ignored. COCO's ``stuffthingmaps`` have this format.
        gray_bits: Bits used by gray values of image files, see :func:`read_image`.
        strict: Whether invalid annotations and unreadable images are errors.

    Attributes:
        coco: The checked file.
        categories: The classes in the order of their labels.
        image_ids: Ids in the order of the samples.
        make_sample: Converts an image and its annotations to a sample.

    Raises:
        DataError: If the folder is missing, the JSON is not a COCO file, an annotation has a category that is
            not among ``categories``, or, if ``strict``, any annotation is invalid.
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
        gray_bits: int = 16,
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
            gray_bits=gray_bits,
        )
        self._check_categories()
        self._unreadable = torch.zeros(len(self.image_ids), dtype=torch.bool)
        self._unreadable.share_memory_()  # shared by all workers

    @property
    def name(self) -> str:
        """The annotation file, for messages."""
        return self.coco.name

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        """Names of the keypoints, if the file has them."""
        return self.coco.keypoint_names

    @property
    def num_keypoints(self) -> int:
        """Keypoints of every object; 0 for none."""
        return self.coco.num_keypoints

    @property
    def target_keys(self) -> tuple[str, ...]:
        """Keys of the targets, checked against those of the detector before training."""
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
                file = image_path(self.root, entry.file_name)
                semantic = self.semantic and image_path(self.semantic, entry.file_name).with_suffix(".png")
                return self.make_sample(entry, annotations, file, semantic=semantic, transforms=self.transforms)
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
            known = shorten(", ".join(f"{category.id} ({category.name})" for category in self.categories), 200)
            raise DataError(
                f"{self.coco.name}: annotations have the category {', '.join(unknown)}; the classes of the model are "
                f"{known}."
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
