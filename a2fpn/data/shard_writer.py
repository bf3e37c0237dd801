"""Writing of shards from a COCO-format data set."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from a2fpn._atomic import replaced_file, write_text
from a2fpn.data.coco_file import read_coco
from a2fpn.data.images import image_path
from a2fpn.data.shards import INDEX_FILE, INDEX_FORMAT, Shard, ShardIndex, logger
from a2fpn.data.streams import random_order
from a2fpn.data.text_files import read_json
from a2fpn.errors import ConfigError, DataError, ExistingFileError, ImageError

_MISSING_IN_A_ROW = 16  # with so many at the start, the folder is wrong rather than single images
_PATTERN = "shard-{:06d}.tar"


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
    """Write a COCO-format data set as shards; the same data and arguments give the same bytes.

    A shard gets its final name when it is complete and synced, and the index is written after the last shard.

    Args:
        images: The image folder.
        annotations: The JSON file.
        output: The folder of the shards, created if missing.
        semantic: A folder of semantic maps, see :class:`CocoDataset`.
        samples_per_shard: Maximum number of images per shard; None for no limit.
        shard_size: Maximum size of a shard in bytes, if it has more than one image.
        seed: Seed of a random order; None keeps the file's.
        strict: Whether an invalid annotation or a missing image is an error. Otherwise the annotation is written
            unchanged, to be dropped by the reader, and the image is skipped.
        force: Whether to replace shards in the folder.
        progress: Called for each image with the total number.

    Returns:
        The index.

    Raises:
        DataError: If the data set can't be read, or ``strict`` finds a problem.
        ValueError: If a limit is not positive.
        FileExistsError: If there are shards in the folder already, unless ``force``.
        OSError: If they can't be written.
    """
    if shard_size < 1 or (samples_per_shard is not None and samples_per_shard < 1):
        raise ConfigError(
            f"a shard must hold at least one image, got samples_per_shard {samples_per_shard}, size {shard_size}."
        )
    folder, output = Path(images), Path(output)
    semantic_folder = None if semantic is None else Path(semantic)
    for needed in (folder, semantic_folder):
        if needed and not needed.is_dir():
            raise DataError(f"{needed}: no such folder.")
    coco = read_coco(annotations, strict=strict)
    content = read_json(Path(annotations))
    objects: dict[int, list[Any]] = {image_id: [] for image_id in coco.images}
    for raw in content["annotations"]:
        if isinstance(raw, Mapping) and isinstance(raw.get("image_id"), int) and raw["image_id"] in objects:
            objects[raw["image_id"]].append(raw)
    entries = content["images"]
    if seed is not None:
        entries = [entries[number] for number in random_order(len(entries), seed)]

    output.mkdir(parents=True, exist_ok=True)
    old = {*output.glob("shard-*.tar"), *output.glob(INDEX_FILE)}
    if old and not force:
        raise ExistingFileError(f"{output}: already contains shards; choose another folder, or replace them (force).")

    shards: list[Shard] = []
    missing: list[str] = []

    def members() -> Iterator[list[tuple[str, bytes]]]:
        for raw in entries:
            progress(len(entries))
            name, key = raw["file_name"], f"{raw['id']:012d}"
            try:
                files = [(f"{key}{Path(name).suffix.lower() or '.image'}", _content(image_path(folder, name)))]
                if semantic_folder:
                    path = image_path(semantic_folder, name).with_suffix(".png")
                    files.append((f"{key}.semantic.png", _content(path)))
            except (OSError, ImageError) as error:
                reason = str(error).rstrip(".")
                if isinstance(error, OSError):
                    reason = f"{error.filename}: can't be read ({error.strerror})"
                if strict:
                    raise DataError(f"{reason}.") from error
                missing.append(reason)
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
    (output / INDEX_FILE).unlink(missing_ok=True)
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
                        header = tarfile.TarInfo(member)  # default owner, mode and time, for reproducible bytes
                        header.size = len(data)
                        tar.addfile(header, io.BytesIO(data))
                    offsets.append(tar.offset)
                    sample = next(waiting, None)
        shards.append(Shard(name, len(offsets) - 1, hashed.size, hashed.sha256.hexdigest(), offsets))

    if missing:
        logger.warning("skipped %d images, the first is %s", len(missing), missing[0])
    index = ShardIndex(
        info=dict(coco.info),
        licenses=list(coco.licenses),
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
    write_text(output / INDEX_FILE, json.dumps({**INDEX_FORMAT, **asdict(index)}, separators=(",", ":")))
    return index


class _HashedFile:
    """A file that tracks the hash and the size of written data."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _content(path: Path) -> bytes:
    """Read a regular file, not a device or a pipe.

    Raises:
        OSError: If it is not a regular file, or can't be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def _tar_size(offset: int, sample: Sequence[tuple[str, bytes]]) -> int:
    """Size in bytes of a tar file that ends with these files, which start at ``offset``."""
    end = offset + sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for _, data in sample)
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
