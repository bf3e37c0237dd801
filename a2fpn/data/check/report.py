"""Report of a data check, as data and as text."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from a2fpn._text import count_of, shorten
from a2fpn.config import Category
from a2fpn.masks.rle import Rle

Severity = Literal["error", "warning", "note"]
T = TypeVar("T")
SHOWN = 5  # offenders listed in a message
PICTURED = 50  # images of a finding kept for pictures
_CLASSES_SHOWN = 40
_WIDTH = 110  # letters in a line


class Track(Protocol):
    """Shows the progress of a loop."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Yield the items."""


@dataclass(frozen=True)
class Finding:
    """One kind of problem with all its occurrences.

    Args:
        severity: ``"error"``: data is lost, misread, or useless for a class. ``"warning"``: probably a mistake;
            training continues without the data concerned. ``"note"``: information.
        code: A stable name, such as ``"box-outside"``.
        message: A sentence with the ids of the first offenders and their number.
        advice: Recommended action.
        count: Number of annotations, images or classes concerned.
        image_ids: The first images concerned.
        fatal: Whether training would be useless or stop at once: nothing to learn from, or nothing to evaluate.

    Example:
        >>> print(Finding("note", "example", "An example in 1 of 3 images: 7.", "Nothing to do.", 1))
        note     An example in 1 of 3 images: 7. [example]
                 Nothing to do.
    """

    severity: Severity
    code: str
    message: str
    advice: str
    count: int
    image_ids: tuple[int, ...] = ()
    fatal: bool = False

    def __str__(self) -> str:
        first, other = f"{self.severity:<9}", " " * 9
        parts = ((first, f"{self.message} [{self.code}]"), (other, self.advice))
        return "\n".join(
            textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=other, break_on_hyphens=False)
            for start, text in parts
        )


@dataclass(frozen=True)
class ClassCount:
    """Number and sizes of the usable objects of one class.

    Args:
        category: Id and name.
        objects: Objects, without crowds.
        images: Images with such objects.
        crowds: Crowds, which are ignored in training.
        median_size: Median of the square root of the boxes' areas in pixels of the files; None without objects.
        median_resized: The same in pixels of the network's input; None without objects or resize rule.
    """

    category: Category
    objects: int
    images: int
    crowds: int
    median_size: float | None
    median_resized: float | None


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image with its drawable annotations.

    Args:
        image_id: As in the file.
        file_name: Path relative to the image folder.
        size: Height and width in the annotations, pixels.
        boxes: (K, 4) float32, xyxy.
        labels: (K,) int64, indices into the report's classes.
        crowds: (K,) bool.
        rles: A mask per object, empty if invalid; None if the file has no masks.
        codes: Codes of the findings that concern the image.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    rles: tuple[Rle, ...] | None
    codes: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """Result of :func:`check_data`.

    Args:
        name: The annotation file.
        images: Number of images in it.
        annotations: Number of annotations in it.
        opened: Number of image files opened.
        classes: One entry per category, sorted by id.
        findings: Errors first, then warnings, then notes.
        examples: Images to draw, those with findings first.
    """

    name: str
    images: int
    annotations: int
    opened: int
    classes: tuple[ClassCount, ...]
    findings: tuple[Finding, ...]
    examples: tuple[AnnotatedImage, ...] = field(default=(), repr=False)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that are errors."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are warnings."""
        return self._of("warning")

    @property
    def fatal(self) -> tuple[Finding, ...]:
        """Errors that leave nothing to learn from or to evaluate."""
        return tuple(finding for finding in self.findings if finding.fatal)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable built-ins, without ``examples``."""
        counts = {"images": self.images, "annotations": self.annotations, "opened": self.opened}
        classes = [
            {"id": count.category.id, "name": count.category.name}
            | {key: value for key, value in dataclasses.asdict(count).items() if key != "category"}
            for count in self.classes
        ]
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"name": self.name, **counts, "classes": classes, "findings": findings}

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {count_of(self.images, 'image')}, {count_of(self.annotations, 'annotation')}, "
            f"{count_of(len(self.classes), 'class')}; {count_of(self.opened, 'image file')} opened"
        ]
        if self.classes:
            parts.append(self._class_table())
        parts += map(str, self.findings)
        kinds = Counter(finding.severity for finding in self.findings)
        verdict = ", ".join(count_of(kinds[kind], kind) for kind in ("error", "warning", "note"))
        return "\n\n".join([*parts, f"{verdict}{'; training would be in vain' if self.fatal else ''}"])

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def _class_table(self) -> str:
        """Format one line per class, the most frequent first; with very many only the first and the last."""
        ranked = sorted(self.classes, key=lambda count: -count.objects)
        rows = [["class", "objects", "images", "crowds", "median px", "resized px"]]
        for count in ranked:
            sizes = ("-" if size is None else f"{size:.1f}" for size in (count.median_size, count.median_resized))
            name = shorten(repr(count.category.name)[1:-1], 32)
            rows.append(
                [f"{name} ({count.category.id})", *map(str, (count.objects, count.images, count.crowds)), *sizes]
            )
        if len(ranked) > _CLASSES_SHOWN:
            half = _CLASSES_SHOWN // 2
            rows[half + 1 : -half] = [[f"... {len(ranked) - 2 * half} more ...", *[""] * 5]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join("  ".join(line).rstrip() for line in lines)


def few(names: Iterable[object], count: int) -> str:
    """Format the first of ``count`` names and the number of the others.

    Example:
        >>> few([7, 8], 2), few(range(1200), 1200)
        ('7, 8', '0, 1, 2, 3, 4 and 1,195 more')
    """
    shown = [str(name) for name in itertools.islice(names, SHOWN)]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")
