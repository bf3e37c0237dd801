"""Problems of annotations, and their conversion to findings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a2fpn._text import count_of
from a2fpn.data.annotation_table import AnnotationTable, Rows
from a2fpn.data.check.report import PICTURED, SHOWN, Finding, Severity, few
from a2fpn.data.document import CocoDocument, is_whole


@dataclass(frozen=True, eq=False)
class Problem:
    """Annotations with one problem.

    Args:
        severity: As in :class:`Finding`.
        code: As in :class:`Finding`.
        rows: (N,) mask of the annotations.
        statement: Description, to be followed by "in 3 of 100 annotations".
        advice: As in :class:`Finding`.
        detail: Further details, placed after their ids.
    """

    severity: Severity
    code: str
    rows: Rows
    statement: str
    advice: str
    detail: str = ""

    def finding(self, file: CocoDocument, table: AnnotationTable) -> Finding:
        """Convert to a finding."""
        rows = self.rows.nonzero()[0].tolist()
        names = [annotation_name(table.entries[row], row) for row in rows[:SHOWN]]
        images = dict.fromkeys(file.images[index].id for index in table.image[self.rows].tolist() if index >= 0)
        total = count_of(len(table), "annotation")
        message = f"{self.statement} in {len(rows):,} of {total}: {few(names, len(rows))}{self.detail}."
        pictured = tuple(itertools.islice(images, PICTURED))
        return Finding(self.severity, self.code, message, self.advice, len(rows), pictured)


def used_categories(file: CocoDocument, table: AnnotationTable) -> frozenset[int]:
    """Ids of the file's categories that occur in annotations."""
    ids = list(file.categories)
    return frozenset(ids[index] for index in set(table.category[table.category >= 0].tolist()))


def names_of(file: CocoDocument) -> dict[int, str]:
    """Names of the file's categories by id."""
    return {category_id: category.name for category_id, category in file.categories.items()}


def annotation_name(raw: Mapping[str, Any], row: int) -> str:
    """Id of an annotation, or its position if it has none."""
    annotation_id = raw.get("id")
    return str(annotation_id) if is_whole(annotation_id) else f"the one at position {row}"
