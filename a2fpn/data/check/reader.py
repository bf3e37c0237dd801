"""Findings about a COCO file as a whole, its images and its categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from a2fpn._text import shorten
from a2fpn.data.check.report import PICTURED, Finding, Track, few
from a2fpn.data.document import CocoDocument, CocoImage, EntryFaults, NotCocoError, Source, source_name


def read_document(source: Source, track: Track) -> tuple[CocoDocument | None, list[Finding]]:
    """Read the valid part of a COCO file, and report faults of its images and categories.

    Raises:
        DataError: If there is no such file.
    """
    name = source_name(source)
    try:
        (file,) = [
            CocoDocument.read(given)
            for given in (track([Path(source)], "reading JSON", 1) if isinstance(source, (str, Path)) else [source])
        ]
    except NotCocoError as error:
        advice = "A COCO file is a JSON object with the lists images, annotations and categories."
        return None, [Finding("error", "no-coco", f"{name} {shorten(error.what, 140)}.", advice, 1, fatal=True)]
    findings = [
        *(finding for faults in file.faults for finding in _entry_findings(name, faults)),
        *_duplicate_files(name, file.images),
        *_names_with_backslashes(name, file.images),
    ]
    if not file.faults[0].count:
        findings.append(Finding("error", "no-images", f"{name} lists no image.", "Check the export.", 0, fatal=True))
    return file, findings


_NEEDED = {
    "image": "an integer id, a file_name, and height and width in pixels",
    "category": "an integer id and a name",
}


def _entry_findings(name: str, faults: EntryFaults) -> Iterator[Finding]:
    """Report images or categories for which the reader refuses the whole file."""
    kind, bad, twice = faults.kind, faults.bad, faults.repeated
    if bad:
        message = f"{name}: {len(bad)} of {faults.count} {kind} entries are invalid, at position {few(bad, len(bad))}."
        advice = f"An entry needs {_NEEDED[kind]}; the reader rejects the file."
        yield Finding("error", f"bad-{kind}", message, advice, len(bad), fatal=True)
    if twice:
        message = f"{name}: several entries have the same {kind} id: {few(twice, len(twice))}."
        advice = "Give each entry an id of its own; the reader rejects the file."
        pictured = tuple(twice[:PICTURED]) if kind == "image" else ()
        yield Finding("error", f"duplicate-{kind}-id", message, advice, len(twice), pictured, fatal=True)


def _duplicate_files(name: str, images: Sequence[CocoImage]) -> Iterator[Finding]:
    uses = Counter(entry.file_name for entry in images)
    twice = [file_name for file_name, count in uses.items() if count > 1]
    if twice:
        shown = few((shorten(repr(file_name), 60) for file_name in twice), len(twice))
        message = f"{name}: several images have the same file: {shown}."
        advice = "Merge them into one: for each of them the objects of the others are background."
        pictured = [entry.id for entry in images if uses[entry.file_name] > 1][:PICTURED]
        yield Finding("warning", "duplicate-file-name", message, advice, len(twice), tuple(pictured))


def _names_with_backslashes(name: str, images: Sequence[CocoImage]) -> Iterator[Finding]:
    odd = [entry for entry in images if "\\" in entry.file_name]
    if odd:
        shown = few((f"{entry.id} ({shorten(repr(entry.file_name), 60)})" for entry in odd), len(odd))
        message = f"{name}: backslashes in the names of {len(odd):,} of {len(images):,} images: {shown}."
        advice = "They separate folders on Windows only: use slashes, or let --fix do it."
        pictured = tuple(entry.id for entry in odd[:PICTURED])
        yield Finding("warning", "backslash-in-name", message, advice, len(odd), pictured)
