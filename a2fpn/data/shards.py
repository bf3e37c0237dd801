"""COCO-format data in WebDataset shards: tar files that are read in long runs, from a disk or over the network.

A shard holds, one after the other for each image, ``<key>.<suffix>`` with the image file's own bytes,
``<key>.semantic.png`` where the set has semantic maps, and ``<key>.json`` with ``{"image": ..., "annotations": [...]}``
as the COCO file has them. The key is the image id. ``index.json`` beside the shards says what each holds, and where in
it each sample begins; so any stretch of any shard can be read without the rest.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import IO, Any

from a2fpn._atomic import replaced_file, write_text
from a2fpn.config import Category
from a2fpn.data.coco import read_coco
from a2fpn.data.storage import is_remote, read_bytes
from a2fpn.data.streams import RawSample, StreamDataset, random_order
from a2fpn.errors import ConfigError, DataError, ExistingFileError

logger = logging.getLogger(__name__)
_MISSING_IN_A_ROW = 16  # after so many at the beginning, the folder is wrong rather than an image
_FORMAT = {"format": "a2fpn shards of a COCO set", "version": 1}
_INDEX = "index.json"
_PATTERN = "shard-{:06d}.tar"


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        name: The file's name.
        samples: Number of images.
        bytes: Size of the file.
        sha256: Of the file, in hexadecimal.
        offsets: Where each sample begins, and where the last one ends, in bytes.
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
        info: What the COCO file says of its origin.
        licenses: Likewise.
        categories: The classes as the COCO file has them.
        used_categories: Ids of the classes that have an object.
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
        DataError: If there is no index, or none of this version.
    """
    path = _join(location, _INDEX)
    try:
        content = json.loads(read_bytes(path))
        if {key: content.pop(key, None) for key in _FORMAT} != _FORMAT:
            raise ValueError("of another format")
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        index = ShardIndex(**content)
        if any(len(shard.offsets) != shard.samples + 1 for shard in index.shards):
            raise ValueError("counts and offsets differ")
    except DataError as error:
        raise DataError(f"{str(error)[:-1]}; `a2fpn data shard` writes it when all shards are whole.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no index of shards that this version reads ({error}).") from error
    return index


def check_shards(location: str | Path) -> Iterator[tuple[Shard, str | None]]:
    """Read every shard and compare it with the index.

    Args:
        location: The folder or its URL.

    Yields:
        Each shard, and what is wrong with it or None.

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
                    f"{path}: {len(data)} bytes with {found} whole samples, the index says {shard.bytes} with "
                    f"{shard.samples}; the sha256 differs: the file is damaged or another one."
                )
        except DataError as error:
            problem = str(error)
        yield shard, problem


class ShardDataset(StreamDataset):
    """COCO-format data in WebDataset shards, as ``a2fpn data shard`` and :func:`write_shards` write them.

    The samples are those of :class:`CocoDataset` for the same set. See :class:`StreamDataset` for iterating, and
    :meth:`read` for the order of an epoch.

    Args:
        location: The folder of the shards, or its URL: ``http(s)://``, or whatever fsspec knows.
        transforms: Called as ``transforms(image, target)`` when iterating.
        categories: The classes in the order of their labels, usually a model's; matched by id. By default the
            set's own, sorted by id.
        keep_crowd: Whether crowds appear among the objects, marked in ``iscrowd``.
        shuffle_buffer: Images, over all processes, that are held as files in memory and shuffled.
        strict: Whether bad annotations, unreadable images and bad shards are errors. Otherwise they are counted and
            left out when iterating; in training, which takes as many steps, others stand in for what can't be read.

    Attributes:
        index: What ``index.json`` says.

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

        The shards in random order are one long row, which is cut into ``batch`` lanes of equal length; step k takes the
        k-th sample of each lane. Within a lane, stretches of ``shuffle_buffer / batch`` samples are read at a time, and
        shuffled. So a step has images from many shards, every process reads but its own lanes, and neither the number
        of processes nor the step at which reading begins changes the order.
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
        # Lanes begin with stretches of different lengths, so that they don't all read at the same step.
        bounds = [max(begin, 0) for begin in range(-(lane * length // batch), steps, length)]
        for number, (begin, end) in enumerate(zip(bounds, [*bounds[1:], steps], strict=True)):
            if end > start:
                size = end - begin
                order = range(size) if seed is None else random_order(size, seed, epoch, lane, number)
                samples = self._stretch(row, lane * steps + begin, size, whole=seed is not None)
                yield from (samples[place] for place in order[max(start - begin, 0) :])

    def _stretch(self, row: Sequence[tuple[Shard, int]], begin: int, size: int, *, whole: bool) -> list[RawSample]:
        """Read a stretch of the row of shards; unless strict, what can't be read is counted.

        If ``whole``, unreadable samples are replaced by readable ones from the same stretch, or from the next one that
        has any; otherwise they are returned empty.
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
        """Read some samples of a shard in one go."""
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
                f"{path}: holds {len(found)} whole samples where the index says {len(samples)}, at bytes "
                f"{shard.offsets[begin]} to {shard.offsets[end]}; the file is damaged or another one."
            )
        return found

    def _names(self, shard: Shard, samples: range) -> list[str]:
        """Return the names under which unreadable samples are counted."""
        return [f"{_join(self._location, shard.name)}: image {number}" for number in samples]

    def _check_size(self, shard: Shard) -> None:
        """Find out before any training whether a local shard is there and has its size."""
        path = Path(_join(self._location, shard.name))
        if not path.is_file():
            problem = f"{path}: no such file; the index says that it holds {shard.samples} images."
        elif path.stat().st_size != shard.bytes:
            problem = (
                f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes} with {shard.samples} images; "
                f"the file is cut off, damaged or another one."
            )
        else:
            return
        if self.strict:
            raise DataError(problem)
        self.note_images(self._names(shard, range(shard.samples)), problem)


def write_shards(
    images: str | Path,
    annotations: str | Path,
    output: str | Path,
    *,
    semantic: str | Path | None = None,
    samples_per_shard: int | None = None,
    shard_size: int = 256_000_000,
    seed: int | None = None,
    strict: bool = False,
    force: bool = False,
    progress: Callable[[int], None] = lambda total: None,
) -> ShardIndex:
    """Write a COCO-format set as shards; the same set and arguments give the same bytes.

    A shard appears under its name when it is whole and on the disk, the index after the last of them.

    Args:
        images: The image folder.
        annotations: The JSON file.
        output: The folder of the shards, made if missing.
        semantic: A folder of semantic maps, see :class:`CocoDataset`.
        samples_per_shard: Largest number of images in a shard; None sets no limit.
        shard_size: Largest size of a shard in bytes, if it has more than one image.
        seed: Seed of a random order; None keeps the file's.
        strict: Whether an unusable annotation or a missing image is an error. Otherwise the annotation is written as it
            is, to be left out by the reader, and the image is left out.
        force: Whether shards in the folder are replaced.
        progress: Called for each image with the number of all.

    Returns:
        The index.

    Raises:
        DataError: If the set can't be read, or ``strict`` finds something.
        ValueError: If a limit is not positive.
        FileExistsError: If there are shards in the folder already, unless ``force``.
        OSError: If they can't be written.
    """
    if shard_size < 1 or (samples_per_shard is not None and samples_per_shard < 1):
        raise ConfigError(
            f"a shard needs room for an image, got samples_per_shard {samples_per_shard}, size {shard_size}."
        )
    folder, output = Path(images), Path(output)
    semantic_folder = None if semantic is None else Path(semantic)
    for needed in (folder, semantic_folder):
        if needed and not needed.is_dir():
            raise DataError(f"{needed}: no such folder.")
    coco = read_coco(annotations, strict=strict)
    content = json.loads(Path(annotations).read_bytes())
    objects: dict[int, list[Any]] = {image_id: [] for image_id in coco.images}
    for raw in content["annotations"]:
        if isinstance(raw, Mapping) and isinstance(raw.get("image_id"), int) and raw["image_id"] in objects:
            objects[raw["image_id"]].append(raw)
    entries = content["images"]
    if seed is not None:
        entries = [entries[number] for number in random_order(len(entries), seed)]

    output.mkdir(parents=True, exist_ok=True)
    old = {*output.glob("shard-*.tar"), *output.glob(_INDEX)}
    if old and not force:
        raise ExistingFileError(f"{output}: holds shards already; choose another folder, or replace them (force).")

    shards: list[Shard] = []
    missing: list[str] = []

    def members() -> Iterator[list[tuple[str, bytes]]]:
        for raw in entries:
            progress(len(entries))
            name, key = raw["file_name"], f"{raw['id']:012d}"
            try:
                files = [(f"{key}{Path(name).suffix.lower() or '.image'}", (folder / name).read_bytes())]
                if semantic_folder:
                    path = (semantic_folder / name).with_suffix(".png")
                    files.append((f"{key}.semantic.png", path.read_bytes()))
            except OSError as error:
                if strict:
                    raise DataError(f"{error.filename}: can't be read ({error.strerror}).") from error
                missing.append(f"{error.filename}: can't be read ({error.strerror})")
                if len(missing) == len(entries) or (len(missing) == _MISSING_IN_A_ROW and not shards):
                    raise DataError(
                        f"{len(missing)} images in a row can't be read, the last is {missing[-1]}."
                    ) from error
            else:
                label = {"image": raw, "annotations": objects[raw["id"]]}
                yield [*files, (f"{key}.json", json.dumps(label, separators=(",", ":")).encode())]

    waiting = members()
    sample = next(waiting, None)
    if sample is None:
        raise DataError(f"{annotations}: lists no image.")
    (output / _INDEX).unlink(missing_ok=True)
    while sample:
        name = _PATTERN.format(len(shards))
        with replaced_file(output / name) as partial, partial.open("wb") as file:
            hashed = _HashedFile(file)
            with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                offsets = [0]
                while sample and (
                    len(offsets) == 1
                    or (
                        _tar_size(offsets[-1], sample) <= shard_size
                        and (samples_per_shard is None or len(offsets) <= samples_per_shard)
                    )
                ):
                    for member, data in sample:
                        header = tarfile.TarInfo(member)  # owner, mode and time are the same everywhere
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))
                    offsets.append(tar.offset)
                    sample = next(waiting, None)
        shards.append(Shard(name, len(offsets) - 1, hashed.size, hashed.sha256.hexdigest(), offsets))

    if missing:
        logger.warning("skipped %d images, the first is %s", len(missing), missing[0])
    index = ShardIndex(
        info=content.get("info", {}),
        licenses=content.get("licenses", []),
        categories=content["categories"],
        used_categories=sorted({a.category_id for image in coco.annotations.values() for a in image}),
        has_masks=coco.has_masks,
        num_keypoints=coco.num_keypoints,
        has_semantic=semantic is not None,
        num_samples=sum(shard.samples for shard in shards),
        shards=shards,
    )
    for leftover in old - {output / shard.name for shard in shards}:
        leftover.unlink(missing_ok=True)
    write_text(output / _INDEX, json.dumps({**_FORMAT, **asdict(index)}, separators=(",", ":")))
    return index


class _HashedFile:
    """A file that keeps the hash and the size of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _tar_size(offset: int, sample: Sequence[tuple[str, bytes]]) -> int:
    """Bytes of a tar file that ends with these files, which begin at ``offset``."""
    end = offset + sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for _, data in sample)
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _samples(path: str, data: bytes) -> list[RawSample]:
    """Return the whole samples in a part of a tar file; cut off ones at its end are left out.

    Raises:
        DataError: If it is no tar file, or a sample's JSON can't be read.
    """
    groups: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                groups.setdefault(key, {})[suffix] = file.read() if file else b""
    except tarfile.ReadError:
        pass  # what was read so far is counted by the caller
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
