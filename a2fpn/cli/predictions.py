"""The folder that ``a2fpn predict`` writes: a manifest, results as they come, other formats; nothing of anyone else."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from a2fpn._atomic import append_line, write_text
from a2fpn._text import name_some
from a2fpn.cli.own_files import OwnFiles
from a2fpn.cli.tile_journal import TileJournal, done_tiles, whole_lines
from a2fpn.config import Category
from a2fpn.data.slides import SlideOptions, Window
from a2fpn.errors import ConfigError, ExistingFileError
from a2fpn.inference.result import Result
from a2fpn.training.lock import RunLock
from a2fpn.writers import FORMATS, ImageFormat, ImageResult, RunFormat
from a2fpn.writers.base import unique_stems
from a2fpn.writers.coco import STREAM, to_line

MANIFEST = "manifest.json"
TILES = ".tiles.jsonl"
STAMP = ("bytes", "changed")
_LINE = {"file_name", "image_id", "stem", "height", "width", "microns_per_pixel", "results"}


@dataclass(frozen=True)
class Job:
    """An image to be predicted.

    Args:
        path: The file, as it was given.
        image_id: Its id in the results.
        stem: Name of its own files in the folder, without a suffix.
    """

    path: Path
    image_id: int
    stem: str


class PredictionFolder:
    """Folder of results of ``a2fpn predict``, written image by image.

    ``manifest.json`` holds the settings, the table of images (id, file name as given, stem) and the names of the run's
    files from the start, and at the end also how these were written. A run that goes on replaces no file of another
    name, and none that somebody changed since.

    ``predictions.jsonl`` gets a line per image as soon as it is done. Formats with a file for each image are written
    then as well, those with one file for all at the end, from the lines. One process at a time writes, until
    :meth:`close`.

    Args:
        folder: Made if need be.
        paths: The images.
        settings: What decides about the results, as JSON values.
        formats: Names of :data:`a2fpn.writers.FORMATS`.
        categories: The classes, in the order of the labels.
        overwrite: Whether files that are there may be replaced. A link is replaced itself, never what it leads to.
        resume: Whether to continue the run that the folder holds.
        reading: How image files are read, for pictures of what an earlier run found.

    Attributes:
        changed: File names of images with results that are no longer what they were; they count as not done.
        edited: Names of files of done images that somebody changed since; they stay as they are.

    Raises:
        ConfigError: For an unknown format, if images are read from the folder, the run in it had other settings, or
            another process writes to it.
        ExistingFileError: If a file is there that this run did not write, or was changed since, and would be replaced.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        settings: Mapping[str, Any],
        *,
        formats: Sequence[str],
        categories: Sequence[Category],
        overwrite: bool = False,
        resume: bool = False,
        reading: SlideOptions | None = None,
    ) -> None:
        # The folder of a link counts, and that of what it leads to.
        read_from = {parent for path in paths for parent in (path.parent.resolve(), path.resolve().parent)}
        if folder.resolve() in read_from:
            raise ConfigError(f"--output {folder} is a folder that images are read from; choose another one.")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--output {folder} is a file; expected a folder to write to.")
        chosen = [FORMATS[name] for name in dict.fromkeys(formats)]
        self._each = [form for form in chosen if isinstance(form, ImageFormat)]
        self._whole = [form for form in chosen if isinstance(form, RunFormat) and form.file != STREAM]
        self.folder, self.settings, self.categories = folder, dict(settings), tuple(categories)
        self._reading = reading
        self._stamps: dict[str, Mapping[str, int]] = {}
        self._found: dict[str, int] = {}
        self._lock = RunLock(folder, option="--output", keep=False)
        try:
            self._begin(list(dict.fromkeys(paths)), overwrite=overwrite, resume=resume)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, paths: Sequence[Path], *, overwrite: bool, resume: bool) -> None:
        """Take up the run that the folder holds, or start one."""
        known = self._manifest() if resume else {}
        self.jobs, folder = _plan(paths, known), self.folder
        stamps = {_name(job.path): _stamp(job.path) for job in self.jobs}
        self.changed = {name for name, stamp in stamps.items() if self._stamps.get(name, stamp) != stamp}
        self._stamps |= stamps
        self._resumed = resume and bool(known)
        if self._resumed:
            self._found = {line["file_name"]: len(line["results"]) for line in self._kept()}
            self.changed &= {line["file_name"] for line in self._lines()}
        else:
            self._own = OwnFiles(folder)
        self._refuse_folders()
        done = [job for job in self.jobs if _name(job.path) in self._found]
        self.edited = self._own.changed(self._names(done))
        if not overwrite:
            if self._resumed:
                self._refuse_replaced()
            else:
                self._refuse_existing(resume)
        self._own.claim(self._all_names)
        self._table = {**known, **{_name(job.path): job for job in self.jobs}}
        self._write_manifest()
        # Anew, without the line that a kill has cut off; replacing a link instead of following it.
        write_text(folder / STREAM, "".join(json.dumps(line) + "\n" for line in self._kept()) if self._found else "")

    def _write_manifest(self) -> None:
        images = [
            {"id": job.image_id, "file_name": name, "stem": job.stem, **self._stamps.get(name, {})}
            for name, job in self._table.items()
        ]
        held = {"settings": self.settings, "images": images, "files": self._own.to_json()}
        write_text(self.folder / MANIFEST, json.dumps(held, indent=1) + "\n")

    def _names(self, jobs: Sequence[Job]) -> list[str]:
        """Names of the files of each image."""
        return [f"{job.stem}{form.suffix}" for form in self._each for job in jobs]

    @property
    def _all_names(self) -> list[str]:
        """Names of the files and folders of all formats."""
        return [*(form.file for form in self._whole), *self._names(self.jobs)]

    @property
    def pending(self) -> list[Job]:
        """The images that have no results yet."""
        return [job for job in self.jobs if _name(job.path) not in self._found]

    @property
    def objects(self) -> dict[str, int]:
        """Objects found in each image that is done, by its file name."""
        return dict(self._found)

    @property
    def draws(self) -> bool:
        """True if pictures are written."""
        return FORMATS["overlay"] in self._each

    @property
    def journals(self) -> dict[Path, int]:
        """Images of which some tiles are done, and how many."""
        paths = {job.path: self.folder / f"{job.stem}{TILES}" for job in self.jobs}
        return {path: done_tiles(journal) for path, journal in paths.items() if journal.exists()}

    def journal(self, job: Job, windows: Sequence[Window]) -> TileJournal:
        """Tiles of an image that are done, in a file that stays until the image is."""
        path = self.folder / f"{job.stem}{TILES}"
        if not self._resumed:
            path.unlink(missing_ok=True)
        return TileJournal(path, job.path, windows)

    def add(self, job: Job, result: Result) -> None:
        """Write an image's own files and its line."""
        self._write_each(job, result)
        append_line(self.folder / STREAM, to_line(ImageResult(result, _name(job.path), job.stem, job.image_id)))
        self._found[_name(job.path)] = len(result)
        (self.folder / f"{job.stem}{TILES}").unlink(missing_ok=True)

    def finish(self) -> None:
        """Write what is of all images; where nothing was predicted, nothing stays."""
        if not self._found:
            if self.journals:
                return
            for name in (MANIFEST, STREAM):  # what this run has written, whatever else it may replace
                (self.folder / name).unlink(missing_ok=True)
            return
        for image in self._images() if self._each else ():
            # An earlier run may have been asked for other formats.
            self._write_each(Job(Path(image.name), image.image_id, image.stem), image.result, missing=True)
        for form in self._whole:
            form.write(self._images(), self.categories, self.folder / form.file)
            self._own.note(form.file)
        self._write_manifest()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    @property
    def results(self) -> Path:
        """The file that holds the results of all images."""
        return self.folder / (self._whole[0].file if self._whole else STREAM)

    def best(self) -> Path:
        """The file to look at: that of the image with most objects, where there are such files."""
        if not self._each:
            return self.results
        stems = {_name(job.path): job.stem for job in self.jobs}
        return self.folder / f"{stems[max(self._found, key=self._found.__getitem__)]}{self._each[0].suffix}"

    def _write_each(self, job: Job, result: Result, *, missing: bool = False) -> None:
        for form in self._each:
            path = self.folder / f"{job.stem}{form.suffix}"
            if not (missing and path.exists()):
                form.write(result, path)
                self._own.note(path.name)

    def _images(self) -> Iterator[ImageResult]:
        """The results, read from the disk one by one."""
        for line in self._lines():
            result = Result.from_coco(
                line["results"],
                size=(line["height"], line["width"]),
                categories=self.categories,
                path=line["file_name"],
                microns_per_pixel=line["microns_per_pixel"],
            )
            result = replace(result, reading=self._reading)
            yield ImageResult(result, line["file_name"], line["stem"], line["image_id"])

    def _manifest(self) -> dict[str, Job]:
        """The images of the run in the folder, by file name; nothing where there is no run."""
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            settings = dict(held["settings"])
            table = {row["file_name"]: Job(Path(row["file_name"]), row["id"], row["stem"]) for row in held["images"]}
            self._stamps = {row["file_name"]: {key: row[key] for key in STAMP if key in row} for row in held["images"]}
            self._own = OwnFiles(self.folder, held.get("files"))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a manifest of a2fpn predict; give another --output.") from error
        if any(Path(job.stem).name != job.stem for job in table.values()):
            raise ConfigError(f"{path} names files outside its folder; give another --output.")
        for key in settings.keys() | self.settings.keys():
            was, now = settings.get(key), self.settings.get(key)
            if was != now:
                raise ConfigError(
                    f"--resume: {key} was {was!r} in the run in {self.folder}, got {now!r}. Give the "
                    "same settings, another --output, or --overwrite to start over."
                )
        return table

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The lines of the images that are done, as far as they are whole."""
        yield from itertools.takewhile(lambda line: line.keys() >= _LINE, whole_lines(self.folder / STREAM))

    def _kept(self) -> Iterator[dict[str, Any]]:
        """The lines of the images that are what they were."""
        return (line for line in self._lines() if line["file_name"] not in self.changed)

    def _refuse_existing(self, resume: bool) -> None:
        journals = [f"{job.stem}{TILES}" for job in self.jobs]
        there = OwnFiles(self.folder).foreign([MANIFEST, STREAM, *self._all_names, *journals])
        advice = "" if resume or MANIFEST not in there else "--resume continues that run, "
        self._refuse(there, "not made by this run", advice)

    def _refuse_replaced(self) -> None:
        """Refuse to replace what the run that goes on did not write, or somebody changed since."""
        pending = self.pending
        # A kill between an image's own files and its line leaves the files of the first one.
        unfinished = self._own.unfinished(self._names(pending[1:]))
        self._refuse(dict.fromkeys([*self._own.foreign(self._all_names), *unfinished]), "not made by this run")
        replaced = [*(form.file for form in self._whole), *self._names(pending)]
        advice = "Delete it to have it written again, or leave its format out of --format; "
        self._refuse(self._own.changed(replaced), "changed since this run wrote it", advice)

    def _refuse_folders(self) -> None:
        """Refuse folders in the place of an image's files: they are never replaced."""
        paths = (self.folder / f"{job.stem}{form.suffix}" for form in self._each for job in self.jobs)
        found = next((path for path in paths if path.is_dir() and not path.is_symlink()), None)
        if found is not None:
            raise ExistingFileError(f"{found} is a folder, expected a file to write; give another --output.")

    def _refuse(self, there: Iterable[str], why: str, advice: str = "") -> None:
        names = list(there)
        if names:
            effect = "starts over and replaces it" if self._resumed else "replaces what is there"
            raise ExistingFileError(
                f"{self.folder} holds {name_some(names)}, {why}. {advice}--overwrite {effect}; "
                "or give another --output."
            )


def _name(path: Path) -> str:
    return os.fspath(path)


def _stamp(path: Path) -> dict[str, int]:
    """Size and time of change of an image file; nothing if it can't be had."""
    try:
        about = path.stat()
    except OSError:
        return {}
    return dict(zip(STAMP, (about.st_size, about.st_mtime_ns), strict=True))


def _plan(paths: Sequence[Path], known: Mapping[str, Job]) -> list[Job]:
    """Ids and stems of images; those that an earlier run gave stay.

    Ids are the file names where they are different numbers, else 1, 2, ...
    """
    numbers = {int(path.stem) for path in paths if path.stem.isdecimal()}
    used_ids = {job.image_id for job in known.values()}
    by_name = len(numbers) == len(paths) and all(str(job.image_id) == job.path.stem for job in known.values())
    counter = (number for number in itertools.count(1) if number not in used_ids)
    new = [path for path in paths if _name(path) not in known]
    stems = unique_stems(new, taken=[job.stem for job in known.values()])
    made = {
        _name(path): Job(path, int(path.stem) if by_name else next(counter), stem)
        for path, stem in zip(new, stems, strict=True)
    }
    return [(known.get(_name(path)) or made[_name(path)]) for path in paths]
