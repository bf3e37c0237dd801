"""Import of labels in other formats into a cache at the start of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from rich.console import Console
from rich.progress import track

from a2fpn.data.importers import detect, import_data
from a2fpn.data.importers.files import walk
from a2fpn.data.operations import save_coco, split_coco
from a2fpn.errors import DataError
from a2fpn.training.config import DataSection

logger = logging.getLogger(__name__)
VAL_SHARE = 0.2
"""Share of images for validation if the labels have no split of their own."""

_DONE = ".complete"  # written last
T = TypeVar("T")


def holds_coco(data: DataSection) -> bool:
    """Return whether the folder has the training annotations named by the settings."""
    return (Path(data.root) / data.train_annotations).exists()


def import_folder(data: DataSection) -> DataSection:
    """Import labels of another format into the cache, once for each state of the folder's files.

    The first process imports, others wait for it. If the labels have no split, about every fifth image is for
    validation, by a hash of its name.

    Returns:
        The settings with the paths of the imported data; unchanged if the folder is in COCO format already, or the
        run trains from a stream.

    Raises:
        DataError: If the format of the folder is unknown, or it can't be imported.
    """
    root = Path(data.root)
    if data.format != "auto" or data.stream.shards or data.stream.dataset or not root.is_dir() or holds_coco(data):
        return data
    name = detect(root)
    cache = Path(data.cache) if data.cache else _default_cache()
    folder = cache / f"{root.resolve().name}-{_state(root)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if (folder / _DONE).exists():
            logger.info("%s holds %s labels, imported before into %s", root, name, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
            _import(root, name, folder, strict=data.strict)
    usual = DataSection(root=str(folder))
    return dataclasses.replace(
        data,
        root=usual.root,
        train_images=usual.train_images,
        train_annotations=usual.train_annotations,
        val_images=usual.val_images,
        val_annotations=usual.val_annotations,
    )


def _import(root: Path, name: str, folder: Path, *, strict: bool) -> None:
    logger.info("%s holds %s labels; importing them into %s", root, name, folder)
    report = import_data(root, folder, format=name, strict=strict, track=_bar)
    logger.info("%s", report)
    if "train" not in report.splits:
        raise DataError(
            f"{root} has the splits {', '.join(report.splits)} and none for training; import it with a2fpn data "
            "import, and name what to train on: data.root=DIR data.train_annotations=FILE."
        )
    if "val" not in report.splits:
        annotations = folder / "annotations"
        for split, part in split_coco(annotations / "instances_train.json", val=VAL_SHARE).items():
            save_coco(part, annotations / f"instances_{split}.json", overwrite=True)
        logger.info(
            "The labels have no validation split: %.0f %% of the images are for validation. If several images show "
            "one scene, import them with a2fpn data import --val %g --group-by REGEX instead.",
            100 * VAL_SHARE,
            VAL_SHARE,
        )
    (folder / _DONE).touch()


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "a2fpn" / "imports"


def _state(root: Path) -> str:
    """Hash of the folder's path and of the names, sizes and times of its files."""
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    paths = (Path(folder, name) for folder, _, names in walk(root) for name in names)
    for path in sorted(filter(Path.is_file, paths)):
        status = path.stat()
        digest.update(os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _bar(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Show a transient progress bar on a terminal."""
    console = Console(stderr=True)
    return track(
        items, description, total=total or None, console=console, transient=True, disable=not console.is_terminal
    )
