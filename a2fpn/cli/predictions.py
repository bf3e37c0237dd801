"""The folder that ``a2fpn predict`` writes: a manifest, results as they come, pictures; nothing of anyone else."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2fpn._atomic import replaced_file, write_text
from a2fpn.errors import ConfigError, ExistingFileError

if TYPE_CHECKING:
    from PIL import Image

MANIFEST, STREAM, RESULTS = "manifest.json", "predictions.jsonl", "predictions.json"


@dataclass(frozen=True)
class Job:
    """An image to be predicted.

    Args:
        path: The file, as it was given.
        image_id: Its id in the results.
        picture: Name of its picture in the folder.
    """

    path: Path
    image_id: int
    picture: str


class PredictionFolder:
    """Folder of results of ``a2fpn predict``, written image by image.

    ``manifest.json`` holds the settings and the table of images (id, file name as given, picture) from the start,
    ``predictions.jsonl`` a line per image as soon as it is done, ``predictions.json`` all COCO results at the end.

    Args:
        folder: Made if need be.
        paths: The images.
        settings: What decides about the results, as JSON values.
        overwrite: Whether files that are there may be replaced. A link is replaced itself, never what it leads to.
        resume: Whether to continue the run that the folder holds.

    Raises:
        ConfigError: If images are read from the folder, or the run in it had other settings.
        ExistingFileError: If a file of the same name is there and neither is wanted.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        # The folder of a link counts, and that of what it leads to.
        read_from = {parent for path in paths for parent in (path.parent.resolve(), path.resolve().parent)}
        if folder.resolve() in read_from:
            raise ConfigError(f"--output {folder} is a folder that images are read from; choose another one.")
        self.folder, self.settings = folder, dict(settings)
        known = self._manifest() if resume else {}
        self.jobs = _plan(list(dict.fromkeys(paths)), known)
        self._lines: dict[str, dict[str, Any]] = {}
        if resume and known:
            self._lines = {line["file_name"]: line for line in self._read()}
        elif not overwrite:
            self._refuse_existing(resume)
        folder.mkdir(parents=True, exist_ok=True)
        table = {**known, **{_name(job.path): job for job in self.jobs}}
        images = [{"id": job.image_id, "file_name": name, "picture": job.picture} for name, job in table.items()]
        write_text(folder / MANIFEST, json.dumps({"settings": self.settings, "images": images}, indent=1) + "\n")
        # Anew, without the line that a kill has cut off; replacing a link instead of following it.
        write_text(folder / STREAM, "".join(map(_line, self._lines.values())))

    @property
    def pending(self) -> list[Job]:
        """The images that have no results yet."""
        return [job for job in self.jobs if _name(job.path) not in self._lines]

    @property
    def objects(self) -> dict[str, int]:
        """Objects found in each image that is done, by the name of its picture."""
        return {line["picture"]: len(line["results"]) for line in self._lines.values()}

    def add(self, job: Job, results: Iterable[Mapping[str, Any]], picture: Image.Image) -> None:
        """Write the picture and the results of an image."""
        with replaced_file(self.folder / job.picture) as partial:
            picture.save(partial, format="png")
        name = _name(job.path)
        line = {
            "image_id": job.image_id,
            "file_name": name,
            "picture": job.picture,
            "results": [{**record, "file_name": name} for record in results],
        }
        flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with open(self.folder / STREAM, "a", encoding="utf-8", opener=lambda path, _: os.open(path, flags)) as stream:
            stream.write(_line(line))
        self._lines[name] = line

    def finish(self) -> Path:
        """Write all results as one COCO JSON and return its path; where there are none, nothing stays."""
        path = self.folder / RESULTS
        if not self._lines:
            for name in (MANIFEST, STREAM, RESULTS):
                (self.folder / name).unlink(missing_ok=True)
            return path
        write_text(path, json.dumps([record for line in self._lines.values() for record in line["results"]]))
        return path

    def _manifest(self) -> dict[str, Job]:
        """The images of the run in the folder, by file name; nothing where there is no run."""
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            settings = dict(held["settings"])
            table = {row["file_name"]: Job(Path(row["file_name"]), row["id"], row["picture"]) for row in held["images"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no manifest of a2fpn predict; give another --output.") from error
        if any(Path(job.picture).name != job.picture for job in table.values()):
            raise ConfigError(f"{path} names pictures outside its folder; give another --output.")
        for key in settings.keys() | self.settings.keys():
            was, now = settings.get(key), self.settings.get(key)
            if was != now:
                raise ConfigError(
                    f"--resume: {key} was {was!r} in the run that {self.folder} holds, now it is {now!r}. Give the "
                    "same settings, another --output, or --overwrite to start anew."
                )
        return table

    def _read(self) -> Iterator[dict[str, Any]]:
        path = self.folder / STREAM
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                yield json.loads(text)
            except ValueError:  # cut off
                return

    def _refuse_existing(self, resume: bool) -> None:
        names = [MANIFEST, STREAM, RESULTS, *(job.picture for job in self.jobs)]
        there = [name for name in names if os.path.lexists(self.folder / name)]
        if not there:
            return
        advice = "" if resume else f"{'--resume continues that run, ' if MANIFEST in there else ''}"
        raise ExistingFileError(
            f"{self.folder} holds {', '.join(there[:3])}{f' and {len(there) - 3} more' if len(there) > 3 else ''}, "
            f"not made by this run. {advice}--overwrite replaces what is there; or give another --output."
        )


def _name(path: Path) -> str:
    return os.fspath(path)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _plan(paths: Sequence[Path], known: Mapping[str, Job]) -> list[Job]:
    """Ids and pictures of images; those that an earlier run gave stay.

    Ids are the file names where they are different numbers, else 1, 2, ... Pictures are named as the images, and
    numbered where names repeat.
    """
    numbers = {int(path.stem) for path in paths if path.stem.isdecimal()}
    used_ids = {job.image_id for job in known.values()}
    by_name = len(numbers) == len(paths) and all(str(job.image_id) == job.path.stem for job in known.values())
    counter = (number for number in itertools.count(1) if number not in used_ids)
    taken = {job.picture.lower() for job in known.values()}  # some file systems take both cases for one
    jobs = []
    for path in paths:
        job = known.get(_name(path))
        if job is None:
            numbered = (f"{path.stem}_{number}.png" for number in itertools.count(2))
            candidates = itertools.chain([f"{path.stem}.png"], numbered)
            picture = next(name for name in candidates if name.lower() not in taken)
            taken.add(picture.lower())
            job = Job(path, int(path.stem) if by_name else next(counter), picture)
        jobs.append(job)
    return jobs
