"""COCO-format data in WebDataset shards: tar files for sequential reads, from a disk or over the network.

For each image a shard has ``<key>.<suffix>`` with the bytes of the image file, ``<key>.semantic.png`` if the data set
has semantic maps, and ``<key>.json`` with ``{"image": ..., "annotations": [...]}`` as in the COCO file. The key is the
image id. ``index.json`` next to the shards lists their content and the offset of each sample, so that any range of a
shard can be read on its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

from a2fpn.config import Category
from a2fpn.data.storage import is_remote, read_bytes
from a2fpn.data.streams import RawSample, StreamDataset, random_order
from a2fpn.errors import DataError

logger = logging.getLogger(__name__)
INDEX_FORMAT = {"format": "a2fpn shards of a COCO set", "version": 1}
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        name: The file's name.
        samples: Number of images.
        bytes: Size of the file.
        sha256: Hex digest of the file.
        offsets: Start of each sample, and end of the last one, in bytes.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: Sequence[int]


@dataclass(frozen=True)
class ShardIndex:
    """Content of ``index.json``.

    Args:
        info: ``info`` of the COCO file.
        licenses: Likewise.
        categories: The classes as in the COCO file.
        used_categories: Ids of the classes with objects.
        has_masks: Whether the objects have masks.
        num_keypoints: Keypoints of every object; 0 for none.
        has_semantic: Whether the images have semantic maps.
        num_samples: Images in all shards.
        shards: The tar files.
    """

    info: Any
    licenses: Any
    categories: Sequence[Mapping[str, Any]]
    used_categories: Sequence[int]
    has_masks: bool
    num_keypoints: int
    has_semantic: bool
    num_samples: int
    shards: Sequence[Shard]


def read_index(location: str | Path) -> ShardIndex:
    """Read the index of a folder of shards.

    Args:
        location: The folder or its URL.

    Raises:
        DataError: If there is no index, or it has another version.
    """
    path = _join(location, INDEX_FILE)
    try:
        content = json.loads(read_bytes(path))
        if {key: content.pop(key, None) for key in INDEX_FORMAT} != INDEX_FORMAT:
            raise ValueError("unknown format")
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        index = ShardIndex(**content)
        if any(len(shard.offsets) != shard.samples + 1 for shard in index.shards):
            raise ValueError("counts and offsets differ")
    except DataError as error:
        raise DataError(f"{str(error)[:-1]}; `a2fpn data shard` writes it when all shards are complete.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a shard index that this version can read ({error}).") from error
    return index


def check_shards(location: str | Path) -> Iterator[tuple[Shard, str | None]]:
    """Read every shard and compare it with the index.

    Args:
        location: The folder or its URL.

    Yields:
        Each shard, and its problem or None.

    Raises:
        DataError: If there is no index.
    """
    for shard in read_index(location).shards:
        path = _join(location, shard.name)
        try:
            data = read_bytes(path)
            problem = None
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                found = len(_samples(path, data))
                problem = (
                    f"{path}: {len(data)} bytes with {found} complete samples, the index says {shard.bytes} with "
                    f"{shard.samples}; the sha256 differs: the file is damaged or replaced."
                )
        except DataError as error:
            problem = str(error)
        yield shard, problem


class ShardDataset(StreamDataset):
    """COCO-format data in WebDataset shards, as written by ``a2fpn data shard`` and :func:`write_shards`.

    The samples are those of :class:`CocoDataset` for the same data. See :class:`StreamDataset` for iteration, and
    :meth:`read` for the order of an epoch.

    Args:
        location: The folder of the shards, or its URL: ``http(s)://``, or any that fsspec supports.
        transforms: Called as ``transforms(image, target)`` when iterating.
        categories: The classes in the order of their labels, usually a model's; matched by id. By default the
            data set's own, sorted by id.
        keep_crowd: Whether to keep crowds among the objects, marked in ``iscrowd``.
        shuffle_buffer: Size of the shuffle buffer over all processes, in undecoded images.
        strict: Whether invalid annotations, unreadable images and damaged shards are errors. Otherwise they are counted
            and skipped in iteration, and replaced by other samples in training, whose number of steps is fixed.

    Attributes:
        index: Content of ``index.json``.

    Raises:
        DataError: If there is no index, an annotation has a category that is not among ``categories`` or, if
            ``strict``, a local shard is missing or of another size.

    Example:
        >>> ShardDataset("missing")
        Traceback (most recent call last):
        ...
        a2fpn.errors.DataError: missing/index.json: no such file; `a2fpn data shard` writes ...
    """

    def __init__(
        self,
        location: str | Path,
        *,
        transforms: Callable[..., Any] | None = None,
        categories: Sequence[Category] | None = None,
        keep_crowd: bool = False,
        shuffle_buffer: int = 512,
        strict: bool = False,
    ) -> None:
        self.index = index = read_index(location)
        super().__init__(
            str(location),
            source_categories=[Category(raw["id"], raw["name"]) for raw in index.categories],
            used_categories=index.used_categories,
            num_samples=index.num_samples,
            categories=categories,
            has_masks=index.has_masks,
            num_keypoints=index.num_keypoints,
            has_semantic=index.has_semantic,
            transforms=transforms,
            keep_crowd=keep_crowd,
            strict=strict,
        )
        names = next((raw["keypoints"] for raw in index.categories if raw.get("keypoints")), ())
        self.keypoint_names = tuple(map(str, names)) if index.num_keypoints else ()
        self._location = location
        self._shuffle_buffer = shuffle_buffer
        for shard in () if is_remote(location) else index.shards:
            self._check_size(shard)

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

        The shards are concatenated in random order and divided into ``batch`` lanes of equal length; step k takes the
        k-th sample of each lane. Within a lane, chunks of ``shuffle_buffer / batch`` samples are read at a time and
        shuffled. So a step has images from many shards, every process reads only its own lanes, and the order depends
        neither on the number of processes nor on the first step.
        """
        steps = self.steps(batch)
        shards = self.index.shards
        if seed is not None:
            shards = [shards[number] for number in random_order(len(shards), seed, epoch)]
        first = list(accumulate((shard.samples for shard in shards), initial=0))
        row = [(shard, begin) for shard, begin in zip(shards, first, strict=False) if shard.samples]
        lanes = [self._lane(row, lane, steps, batch, seed, epoch, start) for lane in range(rank, batch, world_size)]
        for step in range(start, steps):
            yield [
                replace(next(lane), position=step * batch + rank + number * world_size)
                for number, lane in enumerate(lanes)
            ]

    def _lane(
        self,
        row: Sequence[tuple[Shard, int]],
        lane: int,
        steps: int,
        batch: int,
        seed: int | None,
        epoch: int,
        start: int,
    ) -> Iterator[RawSample]:
        """Yield the samples of one lane from a step on."""
        length = math.ceil(self._shuffle_buffer / batch)
        # The first chunks of lanes differ in length, so that not all lanes read at the same step.
        bounds = [max(begin, 0) for begin in range(-(lane * length // batch), steps, length)]
        for number, (begin, end) in enumerate(zip(bounds, [*bounds[1:], steps], strict=True)):
            if end > start:
                size = end - begin
                order = range(size) if seed is None else random_order(size, seed, epoch, lane, number)
                samples = self._stretch(row, lane * steps + begin, size, whole=seed is not None)
                yield from (samples[place] for place in order[max(start - begin, 0) :])

    def _stretch(self, row: Sequence[tuple[Shard, int]], begin: int, size: int, *, whole: bool) -> list[RawSample]:
        """Read a chunk of the concatenated shards; unless strict, unreadable samples are counted.

        If ``whole``, they are replaced by readable ones from the same chunk, or from the next one with any; otherwise
        they are returned empty.
        """
        for place in (*range(begin, self.num_samples, size), *range(0, begin, size)):
            samples: list[RawSample] = []
            for shard, first in row:
                here = range(max(place - first, 0), min(place + size - first, shard.samples))
                try:
                    samples += self._read(shard, here) if here else []
                except DataError as error:
                    if self.strict:
                        raise
                    names = self._names(shard, here)
                    self.note_images(names, str(error))
                    samples += [RawSample(name, {}, (), b"") for name in names]
            readable = [sample for sample in samples if sample.entry]
            if not whole:
                return samples
            if readable:
                return list(islice(cycle(readable), size))
        raise DataError(f"{self.name}: none of {self.num_samples} images can be read.")

    def _read(self, shard: Shard, samples: range) -> list[RawSample]:
        """Read a range of samples of a shard in one request."""
        begin, end = samples.start, samples.stop
        path = _join(self._location, shard.name)
        data = read_bytes(path, shard.offsets[begin], shard.offsets[end])
        if len(data) < shard.offsets[end] - shard.offsets[begin]:
            raise DataError(
                f"{path}: ends after {shard.offsets[begin] + len(data)} bytes, the index says {shard.bytes} bytes with "
                f"{shard.samples} samples; the file is cut off."
            )
        found = _samples(path, data)
        if len(found) != len(samples):
            raise DataError(
                f"{path}: holds {len(found)} complete samples where the index says {len(samples)}, at bytes "
                f"{shard.offsets[begin]} to {shard.offsets[end]}; the file is damaged or replaced."
            )
        return found

    def _names(self, shard: Shard, samples: range) -> list[str]:
        """Return the names of unreadable samples for counting."""
        return [f"{_join(self._location, shard.name)}: image {number}" for number in samples]

    def _check_size(self, shard: Shard) -> None:
        """Check up front that a local shard exists and has its size."""
        path = Path(_join(self._location, shard.name))
        if not path.is_file():
            problem = f"{path}: no such file; the index says that it holds {shard.samples} images."
        elif path.stat().st_size != shard.bytes:
            problem = (
                f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes} with {shard.samples} images; "
                "the file is cut off, damaged or replaced."
            )
        else:
            return
        if self.strict:
            raise DataError(problem)
        self.note_images(self._names(shard, range(shard.samples)), problem)


def _samples(path: str, data: bytes) -> list[RawSample]:
    """Return the complete samples in a part of a tar file; a truncated one at its end is dropped.

    Raises:
        DataError: If it is not a tar file, or a sample's JSON can't be read.
    """
    groups: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                groups.setdefault(key, {})[suffix] = file.read() if file else b""
    except tarfile.ReadError:
        pass  # the caller counts the samples read so far
    samples = []
    for key, files in groups.items():
        label, semantic = files.pop("json", None), files.pop("semantic.png", None)
        if label is None or not files:
            continue
        ((suffix, image),) = list(files.items())[:1]
        try:
            content = json.loads(label)
            entry, annotations = dict(content["image"]), list(content["annotations"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: {key}.json can't be read ({error}); the file is damaged.") from error
        samples.append(RawSample(f"{path}: {key}.{suffix}", entry, annotations, image, semantic))
    return samples


def _join(location: str | Path, name: str) -> str:
    return f"{str(location).rstrip('/')}/{name}"
