"""Streamed samples, for data sets that are not files on a disk.

A source reads the bytes of image files and their annotations in COCO's format, as :class:`RawSample`, in the order of
an epoch. Decoding, in any process, gives the same sample as :class:`CocoDataset` for the same file. The order of an
epoch depends only on the seed and the epoch, not on the processes or their speed.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from a2fpn.config import Category
from a2fpn.data.coco import Sample, SampleMaker, SkipReport
from a2fpn.data.coco_file import check_annotations
from a2fpn.data.document import CocoImage
from a2fpn.errors import DataError, ImageError

logger = logging.getLogger(__name__)
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class RawSample:
    """An undecoded image file and its annotations, cheap to send to another process.

    Args:
        name: Its name in messages: its location and the name of the image.
        entry: The image as in ``images`` of a COCO file; id, height and width are used.
        annotations: Its objects as in ``annotations`` of a COCO file.
        image: The content of the image file.
        semantic: The content of its semantic map, if there is one.
        position: Its position in the epoch.
    """

    name: str
    entry: Mapping[str, Any]
    annotations: Sequence[Any]
    image: bytes = field(repr=False)
    semantic: bytes | None = field(default=None, repr=False)
    position: int = 0


@dataclass(frozen=True)
class SampleDecoder:
    """Decodes raw samples; pickled to loader processes instead of the source.

    Args:
        make_sample: Converts an image and checked annotations to a sample.
        categories: The source's classes by id.
        strict: Whether an invalid annotation is an error instead of being dropped.
    """

    make_sample: SampleMaker
    categories: Mapping[int, Category]
    strict: bool = False

    def __call__(self, raw: RawSample, transforms: Callable[..., Any] | None = None) -> tuple[Sample, list[str]]:
        """Return the sample and one message for each annotation that was dropped or partly kept.

        Raises:
            ImageError: If the image can't be read, or its entry lacks an id or the right size.
            DataError: If ``strict``, for the first invalid annotation.
        """
        match raw.entry:
            case {"id": int(image_id), "height": int(height), "width": int(width)} if min(height, width) > 0:
                entry = CocoImage(image_id, raw.name, height, width)
            case _:
                raise ImageError(f"{raw.name}: an image needs an integer id, height and width, got {raw.entry}.")
        checked = check_annotations(
            raw.annotations,
            {image_id: entry},
            self.categories,
            masks=self.make_sample.has_masks,
            num_keypoints=self.make_sample.num_keypoints,
        )
        problems = [f"{raw.name}: {problem}" for problem in (*checked.problems, *checked.losses)]
        if problems and self.strict:
            raise DataError(problems[0])
        objects = checked.usable[image_id]
        sample = self.make_sample(entry, objects, raw.image, semantic=raw.semantic, transforms=transforms)
        return sample, problems


class StreamDataset(IterableDataset[Sample]):
    """Base class of streamed data sets.

    Iteration yields every sample once, as in :class:`CocoDataset`, in the stored order; loader processes take a share
    each. An unreadable image is skipped, logged and counted, or an error if ``strict``. Training uses :meth:`read`
    instead, which handles steps, processes and shuffling.

    Args:
        name: The source, for messages.
        source_categories: The classes of the annotations.
        used_categories: Ids of those that may occur.
        num_samples: Number of images.
        categories: The classes in the order of their labels, usually a model's; matched by id. By default the
            source's own, sorted by id.
        has_masks: Whether objects have masks.
        num_keypoints: Keypoints of every object; 0 for none.
        has_semantic: Whether every image has a semantic map.
        transforms: Called as ``transforms(image, target)`` when iterating.
        keep_crowd: Whether to keep crowds among the objects, marked in ``iscrowd``.
        strict: Whether invalid annotations and unreadable images are errors.

    Attributes:
        name: The source, for messages.
        categories: The classes in the order of their labels.
        num_samples: Number of images.
        keypoint_names: Names of the keypoints, if the source has them.
        decoder: Decoder of raw samples.

    Raises:
        DataError: If a used category is not among ``categories``.
    """

    def __init__(
        self,
        name: str,
        *,
        source_categories: Sequence[Category],
        used_categories: Collection[int],
        num_samples: int,
        categories: Sequence[Category] | None,
        has_masks: bool,
        num_keypoints: int,
        has_semantic: bool,
        transforms: Callable[..., Any] | None,
        keep_crowd: bool,
        strict: bool,
    ) -> None:
        by_id = {category.id: category for category in source_categories}
        own = tuple(by_id[category_id] for category_id in sorted(by_id))
        self.name = name
        self.categories = own if categories is None else tuple(categories)
        self.num_samples = num_samples
        self.keypoint_names: tuple[str, ...] = ()
        self.transforms = transforms
        self.strict = strict
        make_sample = SampleMaker(
            self.categories, has_masks=has_masks, num_keypoints=num_keypoints, keep_crowd=keep_crowd
        )
        unknown = [f"{c.id} ({c.name})" for c in own if c.id in set(used_categories) - make_sample.labels.keys()]
        if unknown:
            known = ", ".join(str(category.id) for category in self.categories)
            raise DataError(
                f"{name}: the category {', '.join(unknown)} is not among the given ones with the ids {known}."
            )
        self.decoder = SampleDecoder(make_sample, by_id, strict)
        self._has_semantic = has_semantic
        self._skipped_annotations: dict[str, None] = {}
        self._skipped_images: dict[str, None] = {}

    @property
    def num_keypoints(self) -> int:
        """Keypoints of every object; 0 for none."""
        return self.decoder.make_sample.num_keypoints

    @property
    def target_keys(self) -> tuple[str, ...]:
        """Keys of the targets, as :attr:`CocoDataset.target_keys <a2fpn.data.CocoDataset.target_keys>`."""
        maker = self.decoder.make_sample
        optional = {
            "masks": maker.has_masks,
            "keypoints": bool(maker.num_keypoints),
            "semantic": self._has_semantic,
            "iscrowd": maker.keep_crowd,
        }
        return ("image_id", "boxes", "labels", *(key for key, present in optional.items() if present))

    @property
    def skipped(self) -> SkipReport:
        """Samples skipped so far that this process knows of."""
        return SkipReport(tuple(self._skipped_annotations), tuple(self._skipped_images))

    def note_annotations(self, problems: Iterable[str]) -> None:
        """Count annotations that were dropped or partly kept, by their messages, and log the first few."""
        for problem in problems:
            if problem not in self._skipped_annotations:
                self._skipped_annotations[problem] = None
                if len(self._skipped_annotations) <= _PROBLEMS_SHOWN:
                    logger.warning("skipped an annotation: %s", problem)

    def note_images(self, names: Iterable[str], reason: str) -> None:
        """Count skipped images by name, and log the reason unless all are known."""
        new = [name for name in names if name not in self._skipped_images]
        if new:
            self._skipped_images |= dict.fromkeys(new)
            logger.warning("skipped %s: %s", "an image" if len(new) == 1 else f"{len(new)} images", reason)

    def steps(self, batch: int) -> int:
        """Number of steps of an epoch, each of ``batch`` images over all processes; a remainder is dropped.

        Raises:
            DataError: If there are fewer images than one step.
        """
        if batch > self.num_samples:
            raise DataError(f"{self.name}: has {self.num_samples} images, fewer than the {batch} of one step.")
        return self.num_samples // batch

    @abstractmethod
    def read(
        self,
        *,
        batch: int,
        seed: int | None,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[list[RawSample]]:
        """Read one process's part of every step of an epoch.

        No sample is read twice in an epoch, by any process.

        Args:
            batch: Images of one step over all processes; a multiple of ``world_size``.
            seed: Determines the order together with the epoch; None for the stored order.
            epoch: Index of the epoch.
            start: The first step; the order from there on is the same as when starting at 0.
            rank: Index of this process.
            world_size: Number of processes.

        Yields:
            The ``batch / world_size`` samples of the process; their positions are ``step * batch + rank``,
            ``step * batch + rank + world_size``, ...

        Raises:
            DataError: If the source can't be read; the message names the file.
        """

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        steps = self.read(batch=1, seed=None)
        for (raw,) in islice(steps, worker.id, None, worker.num_workers) if worker else steps:
            try:
                sample, problems = self.decoder(raw, self.transforms)
            except ImageError as error:
                if self.strict:
                    raise
                self.note_images([raw.name], str(error))
            else:
                self.note_annotations(problems)
                yield sample


def random_order(count: int, *parts: int) -> list[int]:
    """Return a permutation of 0..count - 1 that depends only on the parts.

    Example:
        >>> sorted(random_order(4, 0, 1)), random_order(9, 0, 1) == random_order(9, 0, 1)
        ([0, 1, 2, 3], True)
    """
    order: list[int] = random_generator(*parts).permutation(count).tolist()
    return order


def random_generator(*parts: int) -> np.random.Generator:
    """Return a generator seeded by the parts, which may be negative."""
    return np.random.default_rng([part % 2**64 for part in parts])
