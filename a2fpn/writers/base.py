"""Result formats by name: with a file for each image, or one for all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from a2fpn._registry import Registry
from a2fpn.config import Category
from a2fpn.errors import ConfigError
from a2fpn.inference.result import Result


@dataclass(frozen=True)
class ImageResult:
    """Result of an image with its names and id.

    Args:
        result: The objects.
        name: The image file, as given.
        stem: Unique name of the image's own files, without a suffix.
        image_id: Its id in formats with image ids.
    """

    result: Result
    name: str
    stem: str
    image_id: int


@dataclass(frozen=True)
class ImageFormat:
    """A format with a file for each image.

    Args:
        suffix: Suffix of the file's name after the image's stem.
        write: Writes the file, atomically.
    """

    suffix: str
    write: Callable[[Result, Path], None]


@dataclass(frozen=True)
class RunFormat:
    """A format with one file, or folder, for all images.

    Args:
        file: Its name.
        write: Writes it from an iterable of images, and all classes in the order of the labels.
    """

    file: str
    write: Callable[[Iterable[ImageResult], Sequence[Category], Path], None]


FORMATS: Registry[ImageFormat | RunFormat] = Registry("format of results")


def image_format(
    name: str, *, suffix: str
) -> Callable[[Callable[[Result, Path], None]], Callable[[Result, Path], None]]:
    """Return a decorator that registers a function to write an image's file."""

    def decorator(write: Callable[[Result, Path], None]) -> Callable[[Result, Path], None]:
        FORMATS.register(name)(ImageFormat(suffix, write))
        return write

    return decorator


RunWriter = Callable[[Iterable[ImageResult], Sequence[Category], Path], None]


def run_format(name: str, *, file: str) -> Callable[[RunWriter], RunWriter]:
    """Return a decorator that registers a function to write the file, or folder, of all images."""

    def decorator(write: RunWriter) -> RunWriter:
        FORMATS.register(name)(RunFormat(file, write))
        return write

    return decorator


def write_results(results: Sequence[Result], folder: str | Path, formats: Sequence[str]) -> list[Path]:
    """Write results in several formats; files of the same names are replaced.

    Args:
        results: One for each image, at least one.
        folder: The folder; created if necessary.
        formats: Names of :data:`FORMATS`.

    Returns:
        The written files, by format.

    Raises:
        ValueError: Without results, or for an unknown format.
    """
    if not results:
        raise ConfigError("Expected at least one result to write, got none.")
    chosen = [FORMATS[name] for name in formats]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [result.path or "image" for result in results]
    stems = unique_stems(names)
    images = [
        ImageResult(result, name, stem, number)
        for number, (result, name, stem) in enumerate(zip(results, names, stems, strict=True), start=1)
    ]
    written = []
    for form in chosen:
        if isinstance(form, RunFormat):
            form.write(images, results[0].categories, folder / form.file)
            written.append(folder / form.file)
            continue
        for image in images:
            written.append(folder / f"{image.stem}{form.suffix}")
            form.write(image.result, written[-1])
    return written


def unique_stems(names: Iterable[str | os.PathLike[str]], taken: Iterable[str] = ()) -> Iterator[str]:
    """Yield names without suffixes, numbered if repeated; comparison ignores case, as do some file systems.

    Args:
        names: Files.
        taken: Stems already in use.

    Example:
        >>> list(unique_stems(["a/cell.png", "b/Cell.jpg"]))
        ['cell', 'Cell_2']
    """
    used = {stem.lower() for stem in taken}
    for name in names:
        stem = Path(name).stem
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        free = next(x for x in itertools.chain([stem], numbered) if x.lower() not in used)
        used.add(free.lower())
        yield free
