"""Detection data sets of the Hugging Face ``datasets`` library, streamed or on disk."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from a2fpn.config import Category
from a2fpn.data.images import open_image, shown_size
from a2fpn.data.storage import read_bytes
from a2fpn.data.streams import RawSample, StreamDataset, random_generator, random_order
from a2fpn.errors import DataError

BoxFormat = Literal["xywh", "xyxy", "cxcywh"]
_TO_XYWH: dict[BoxFormat, Callable[[float, float, float, float], list[float]]] = {
    "xywh": lambda x, y, width, height: [x, y, width, height],
    "xyxy": lambda left, top, right, bottom: [left, top, right - left, bottom - top],
    "cxcywh": lambda x, y, width, height: [x - width / 2, y - height / 2, width, height],
}
_CATEGORY = ("category_id", "category", "label", "labels")  # its names in data sets


class HfDataset(StreamDataset):
    """A detection data set of the ``datasets`` library.

    A row has the columns

    - ``image``: an ``Image`` feature, or the file's content as bytes,
    - ``objects``: a list of objects, or an object of lists, with ``bbox`` in pixels, ``category_id`` or ``category``,
      and optionally ``area``, ``iscrowd``, ``id``, ``keypoints`` and ``segmentation``: polygons, a run-length encoding,
      or either of them as JSON text,
    - optionally ``image_id``, by default the position in the epoch, ``width`` and ``height``, by default the file's.

    The samples are those of :class:`CocoDataset` for the same images and annotations. See :class:`StreamDataset` for
    iterating, and :meth:`read` for the order of an epoch.

    Args:
        dataset: A split, ``datasets.Dataset`` or ``datasets.IterableDataset``, e.g. of
            ``datasets.load_dataset(..., split="train", streaming=True)``.
        transforms: Called as ``transforms(image, target)`` when iterating.
        categories: The classes in the order of their labels, usually a model's, or those of a COCO file to evaluate on;
            matched by name if the category is a ``ClassLabel`` or text, else by id. By default those of the
            ``ClassLabel``, with ids from 0.
        num_samples: Number of rows; by default as stated by the data set.
        bbox_format: Format of ``bbox``: x, y, width and height as in COCO, two corners, or center and size.
        num_keypoints: Keypoints of every object; 0 does not read any.
        keypoint_names: Their names, required for flips.
        keep_crowd: Whether to keep crowds among the objects, marked in ``iscrowd``.
        shuffle_buffer: Size of the shuffle buffer of a streamed data set, in rows.
        split_by_file: Whether each process reads its own files of a streamed data set, instead of reading all and
            keeping its part; the number of files must be a multiple of that of processes, all with as many rows.
        strict: Whether invalid annotations and unreadable images are errors.

    Raises:
        DataError: If columns are missing, the number of rows is unknown, or ``categories`` lacks a class.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        transforms: Callable[..., Any] | None = None,
        categories: Sequence[Category] | None = None,
        num_samples: int | None = None,
        bbox_format: BoxFormat = "xywh",
        num_keypoints: int = 0,
        keypoint_names: Sequence[str] = (),
        keep_crowd: bool = False,
        shuffle_buffer: int = 512,
        split_by_file: bool = False,
        strict: bool = False,
    ) -> None:
        library = _library()
        if isinstance(dataset, Mapping):
            raise DataError(f"the data set has the splits {', '.join(dataset)}; give one of them, e.g. by split=.")
        if bbox_format not in _TO_XYWH:
            raise DataError(f"bbox_format must be one of {', '.join(_TO_XYWH)}, got {bbox_format!r}.")
        name = "/".join(str(part) for part in (dataset.info.dataset_name, dataset.split) if part) or "the data set"
        features = dataset.features
        if not features or not {"image", "objects"} <= features.keys():
            raise DataError(
                f"{name}: needs the columns image and objects, got {', '.join(features or ()) or 'unknown'}."
            )
        objects = _fields(features["objects"])
        self._category_key = next((key for key in _CATEGORY if key in objects), "")
        if "bbox" not in objects or not self._category_key:
            raise DataError(f"{name}: objects need bbox and one of {', '.join(_CATEGORY)}, got {', '.join(objects)}.")
        names = getattr(_innermost(objects[self._category_key]), "names", None)
        if names is None and categories is None:
            raise DataError(f"{name}: {self._category_key} is not a ClassLabel; pass the classes as categories.")
        classes = [Category(number, label) for number, label in enumerate(names or ())]
        if categories is not None:
            classes = list(categories)
        by_name = {category.name: category.id for category in classes}
        if unknown := [label for label in names or () if label not in by_name]:
            raise DataError(
                f"{name}: the classes {', '.join(unknown)} are not among the given ones, {', '.join(by_name)}."
            )
        # A ClassLabel's values are indices into its list of names; other values are the ids themselves.
        self._ids: dict[Any, int] = by_name if names is None else {n: by_name[label] for n, label in enumerate(names)}
        if num_samples is None and isinstance(dataset, library.Dataset):
            num_samples = len(dataset)
        elif num_samples is None and dataset.info.splits and dataset.split:
            num_samples = dataset.info.splits[str(dataset.split)].num_examples
        if not num_samples:
            raise DataError(f"{name}: the number of rows is unknown; give num_samples.")
        super().__init__(
            name,
            source_categories=classes,
            used_categories=(),
            num_samples=num_samples,
            categories=categories,
            has_masks="segmentation" in objects,
            num_keypoints=num_keypoints,
            has_semantic=False,
            transforms=transforms,
            keep_crowd=keep_crowd,
            strict=strict,
        )
        if isinstance(features["image"], library.Image):
            dataset = dataset.cast_column("image", library.Image(decode=False))
        self.keypoint_names = tuple(keypoint_names)
        self._dataset = dataset
        self._to_xywh = _TO_XYWH[bbox_format]
        self._shuffle_buffer = shuffle_buffer
        self._split_by_file = split_by_file

    @classmethod
    def load(cls, path: str, *, options: Mapping[str, Any] | None = None, **arguments: Any) -> HfDataset:
        """Open a data set from the Hub or files, streamed, or from a folder written by ``save_to_disk``.

        Args:
            path: First argument of ``datasets.load_dataset``, or the folder.
            options: Its further arguments, such as ``split``, ``revision`` and ``data_files``.
            **arguments: Arguments of the class.
        """
        library = _library()
        if Path(path, "state.json").is_file():
            return cls(library.load_from_disk(path), **arguments)
        return cls(library.load_dataset(path, **{"streaming": True, **(options or {})}), **arguments)

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
        """See :meth:`StreamDataset.read`.

        A streamed data set is shuffled by ``datasets``: the order of its files, and a buffer of rows. Every process
        reads all rows up to its last one and keeps its part, so the order does not depend on the number of processes;
        to start at a later step, the preceding rows are read again without decoding. With ``split_by_file`` this holds
        for a process's own files, and the order depends on the number of processes. A data set on disk is fully
        shuffled, and every process reads only its own rows.

        If ``datasets`` reads parquet files by threads it waits five seconds at the end of a shuffled pass, see
        ``datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN``.
        """
        library = _library()
        steps, share = self.steps(batch), batch // world_size
        if isinstance(self._dataset, library.Dataset):
            count = len(self._dataset)
            order = range(count) if seed is None else random_order(count, seed, epoch)
            rows: Iterator[Any] = map(
                self._dataset.__getitem__, order[start * batch + rank : steps * batch : world_size]
            )
        else:
            stream = self._dataset
            if seed is not None:
                shuffle_seed = int(random_generator(seed, epoch).integers(2**32))
                stream = stream.shuffle(seed=shuffle_seed, buffer_size=self._shuffle_buffer)
            if self._split_by_file and world_size > 1:
                if stream.num_shards % world_size:
                    raise DataError(
                        f"{self.name}: has {stream.num_shards} files, not divisible by {world_size} processes; set "
                        "split_by_file=False or repack it."
                    )
                stream = library.distributed.split_dataset_by_node(stream, rank, world_size)
                rows = iter(stream.skip(start * share))
            else:
                rows = islice(stream.skip(start * batch), rank, None, world_size)
        for step in range(start, steps):
            positions = range(step * batch + rank, (step + 1) * batch, world_size)
            samples = [self._raw(row, position) for position, row in zip(positions, rows, strict=False)]
            if len(samples) < share:
                raise DataError(
                    f"{self.name}: process {rank} of {world_size} ran out of rows in step {step} of {steps}; "
                    f"num_samples is {self.num_samples}, which must not be more than there are"
                    + (", in equal parts in every process's files." if self._split_by_file else ".")
                )
            yield samples

    def _raw(self, row: Mapping[str, Any], position: int) -> RawSample:
        """Convert a row to COCO's format."""
        content, file = _content(row["image"])
        image_id = row.get("image_id", position)
        size = {key: row.get(key) for key in ("width", "height")}
        if None in size.values():
            try:
                with open_image(io.BytesIO(content), max_pixels=None) as image:
                    size = dict(zip(("height", "width"), shown_size(image), strict=True))
            except (OSError, ValueError):
                pass  # reported on decoding
        objects = row["objects"]
        if isinstance(objects, Mapping):
            if len({len(values) for values in objects.values()}) > 1:
                raise DataError(f"{self.name}: image {image_id}: its objects' columns have different lengths.")
            objects = [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
        return RawSample(
            f"{self.name}: {file or f'image {image_id}'}",
            {"id": image_id, **size},
            [self._annotation(raw, image_id) for raw in objects or ()],
            content,
            position=position,
        )

    def _annotation(self, raw: Mapping[str, Any], image_id: int) -> dict[str, Any]:
        category = raw[self._category_key]
        box, segmentation = raw["bbox"], raw.get("segmentation")
        if isinstance(segmentation, str):
            with contextlib.suppress(ValueError):  # reported when the annotation is checked
                segmentation = json.loads(segmentation)
        return {
            **raw,
            "image_id": image_id,
            "category_id": self._ids.get(category, category),
            "bbox": self._to_xywh(*box) if box and len(box) == 4 and None not in box else box,
            "segmentation": segmentation,
        }


def _library() -> Any:
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise DataError("reading Hugging Face data sets needs a package: pip install datasets") from error
    return datasets


def _content(image: Any) -> tuple[bytes, str]:
    """Return the content of an image file, and its name if it has one."""
    if isinstance(image, bytes):
        return image, ""
    if isinstance(image, Image.Image):  # from rows built by a function
        file = io.BytesIO()
        image.save(file, "png")
        return file.getvalue(), ""
    content, path = image["bytes"], image["path"] or ""
    return content if content is not None else read_bytes(path), Path(path).name


def _innermost(feature: Any) -> Any:
    """Return the element type of a list, or of a list of lists."""
    while (inner := getattr(feature, "feature", None)) is not None:
        feature = inner
    return feature[0] if isinstance(feature, list) else feature


def _fields(feature: Any) -> Mapping[str, Any]:
    """Return the features of an object, for a list of objects or an object of lists."""
    inner = _innermost(feature)
    return inner if isinstance(inner, Mapping) else {}
