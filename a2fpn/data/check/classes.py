"""Statistics of classes, and findings about unused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from a2fpn._text import count_of
from a2fpn.data.annotation_table import AnnotationTable, Rows
from a2fpn.data.check.categories import named
from a2fpn.data.check.problem import names_of
from a2fpn.data.check.report import (
    PICTURED,
    ClassCount,
    Finding,
    few,
)
from a2fpn.data.check.sizes import median_size
from a2fpn.data.document import CocoDocument, CocoImage
from a2fpn.data.rules import Fault


def use_findings(
    file: CocoDocument,
    table: AnnotationTable,
    usable: Rows,
    left_out: Sequence[Fault],
    *,
    elsewhere: frozenset[int] = frozenset(),
) -> Iterator[Finding]:
    """Report usable training data: objects, crowds, unused classes and images without objects.

    Args:
        file: The file.
        table: Its annotations.
        usable: (N,) those that are trained on.
        left_out: Reasons of the others.
        elsewhere: Classes with objects in the other split, which are reported by the comparison of both.
    """
    total, crowds = count_of(len(table), "annotation"), int((usable & table.crowd).sum())
    if not len(table):
        yield Finding("error", "no-annotations", f"{file.name} has no annotation.", "Check the export.", 0, fatal=True)
        return
    if not usable.any():
        reasons = ", ".join(f"{fault.code}: {fault.rows.sum():,}" for fault in left_out)
        message = f"None of {total} can be used ({reasons})."
        yield Finding("error", "no-usable-objects", message, "See these findings.", len(table), fatal=True)
        return
    learn = (
        "Crowds are ignored in training. Where each is one object, as in exports that mark every RLE, set iscrowd to 0."
    )
    if crowds == usable.sum():
        message = f"Every one of the {count_of(crowds, 'usable object')} is a crowd (iscrowd = 1)."
        yield Finding("error", "all-crowd", message, learn, crowds, fatal=True)
    elif crowds:
        share = crowds / int(usable.sum())
        message = f"{share:.1%} of the usable annotations are crowds ({crowds:,})."
        yield Finding("warning" if share > 0.5 else "note", "crowds", message, learn, crowds)
    ids = list(file.categories)
    objects, crowded = (
        np.bincount(table.category[usable & rows], minlength=len(ids)) for rows in (~table.crowd, table.crowd)
    )
    only = [category_id for category_id, n, c in zip(ids, objects, crowded, strict=True) if c and not n]
    if only and len(only) < len(ids):
        message = f"All objects are crowds in {len(only)} of {count_of(len(ids), 'class')}: "
        yield Finding("error", "class-all-crowd", f"{message}{named(names_of(file), only)}.", learn, len(only))
    without = [category_id for category_id, n, c in zip(ids, objects, crowded, strict=True) if not c and not n]
    without = [category_id for category_id in without if category_id not in elsewhere]
    if without:
        message = f"No usable object in {len(without)} of {count_of(len(ids), 'class')}: "
        message += f"{named(names_of(file), without)}."
        yield Finding(
            "warning", "class-without-object", message, "Remove the class, or add images of it.", len(without)
        )
    annotated = np.bincount(table.image[table.image >= 0], minlength=len(file.images))
    images = [file.images[index] for index in np.flatnonzero(annotated == 0).tolist()]
    if images:
        message = f"No annotation in {len(images):,} of {count_of(len(file.images), 'image')}: "
        message += f"{few((entry.id for entry in images), len(images))}."
        advice = "They are trained on as background; remove those that nobody annotated."
        pictured = tuple(entry.id for entry in images[:PICTURED])
        yield Finding("note", "image-without-annotation", message, advice, len(images), pictured)


def scales(images: Sequence[CocoImage], target_size: Callable[[int, int], tuple[int, int]]) -> NDArray[np.float64]:
    """(I, 2) resize factors of each image's width and height."""
    sizes = {(entry.height, entry.width) for entry in images}
    factors = {}
    for height, width in sizes:
        new_height, new_width = target_size(height, width)
        factors[height, width] = (new_width / width, new_height / height)
    return np.array([factors[entry.height, entry.width] for entry in images]).reshape(-1, 2)


def class_counts(
    file: CocoDocument,
    table: AnnotationTable,
    usable: Rows,
    sides: NDArray[np.float64],
    resized: NDArray[np.float64] | None,
) -> tuple[ClassCount, ...]:
    """Count the objects of each class; ``sides`` and ``resized`` are those of the usable objects."""
    objects = usable & ~table.crowd
    category, image = table.category[objects], table.image[objects]
    crowds = np.bincount(table.category[usable & table.crowd], minlength=len(file.categories)).tolist()
    order = np.argsort(category, kind="stable")
    bounds = np.searchsorted(category[order], np.arange(len(file.categories) + 1))
    counts = []
    for index, own in enumerate(file.categories.values()):
        rows = order[bounds[index] : bounds[index + 1]]
        median_resized = None if resized is None else median_size(resized[rows])
        images = len(np.unique(image[rows]))
        counts.append(ClassCount(own, len(rows), images, crowds[index], median_size(sides[rows]), median_resized))
    return tuple(counts)
