"""Import of data sets in other formats to COCO folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from a2fpn._text import count_of
from a2fpn.data.check.report import Track
from a2fpn.data.importers.base import IMPORTERS, Importer, ImportOptions, detect, read_categories
from a2fpn.data.importers.folder import REPORT_FILE, Folder
from a2fpn.data.importers.placing import ImagePlacer, Placing, check_output
from a2fpn.data.importers.writer import CocoWriter, SplitCount, SplitRule
from a2fpn.data.labeled import CategoryInfo, Loss, LossLog
from a2fpn.data.leftovers import file_states, untouched
from a2fpn.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class ImportReport:
    """Statistics of an import: read, written and lost.

    Args:
        format: Format of the source.
        source: The data set.
        output: The output folder.
        splits: Statistics of each split.
        categories: Name by id.
        losses: The first 10,000 losses in detail.
        counts: Number of losses by kind.
        files: Number of losses by kind and file.
        notes: Other information with its count.
    """

    format: str
    source: str
    output: str
    splits: Mapping[str, SplitCount]
    categories: Mapping[int, str]
    losses: tuple[Loss, ...] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """Total number of images."""
        return sum(count.images for count in self.splits.values())

    @property
    def annotations(self) -> int:
        """Total number of annotations."""
        return sum(count.annotations for count in self.splits.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable built-ins."""
        return dataclasses.asdict(self) | {"categories": {str(key): name for key, name in self.categories.items()}}

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.format}) -> {self.output}: {count_of(self.images, 'image')}, "
            f"{count_of(self.annotations, 'annotation')}, {count_of(len(self.categories), 'class')}"
        ]
        for split, count in self.splits.items():
            lines.append(
                f"  {split:<6} {count_of(count.images, 'image')} ({count.empty:,} without objects), "
                f"{count_of(count.annotations, 'annotation')} ({count.masks:,} with masks, {count.crowds:,} crowds)"
            )
        lines += [f"  note   {number:,} {what}" for what, number in self.notes.items()]
        for kind, number in sorted(self.counts.items(), key=lambda pair: -pair[1]):
            examples = [str(loss) for loss in self.losses if loss.kind == kind][:3]
            lines.append(f"  lost   {number:,} {kind}")
            lines += [f"           {example}" for example in examples]
            if number > len(examples):
                lines.append(f"           and {number - len(examples):,} more, see {REPORT_FILE}")
        return "\n".join(lines)


def import_data(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "auto",
    images: Placing = "link",
    val: float = 0.0,
    test: float = 0.0,
    group_by: str = "",
    seed: int = 0,
    categories: str | Path | Sequence[str] | None = None,
    category: str = "",
    unlabeled: Literal["auto", "keep", "skip"] = "auto",
    box_masks: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    track: Track | None = None,
) -> ImportReport:
    """Import a data set of another format into a COCO folder.

    The output has ``images/``, ``annotations/instances_{train,val,test}.json`` and ``import_report.json``.
    Splits of the source are kept; categories keep the source's order, or are sorted by name if it lists none. Image
    ids are those of the source if it has any, else the file names if these are distinct numbers, else they count
    from 1.

    Args:
        source: The data set's folder, or a file of it such as ``data.yaml``.
        output: The folder to write.
        format: One of :func:`list_formats`; ``"auto"`` detects it.
        images: Whether images are linked or copied.
        val: Share of images for validation, for a source without splits; by names, not by order.
        test: Share for testing likewise.
        group_by: A regular expression that finds the group in an image's name; groups are never divided.
        seed: Seed of the split.
        categories: The classes in their order, or a file with them: a COCO file (whose ids are kept) or one name per
            line. By default those of the source.
        category: The class of objects in formats with masks but no classes; by default the only class.
        unlabeled: Whether images without labels are backgrounds; ``"auto"`` means yes for YOLO only.
        box_masks: Whether boxes are converted to masks if other objects have masks; otherwise they train boxes only.
        strict: Whether the first loss is an error.
        overwrite: Whether the output may be non-empty.
        track: Called as ``track(items, description, total)`` around long loops.

    Returns:
        Report of everything read, written and lost.

    Raises:
        DataError: If the source is not a data set of the format, or, if ``strict``, for the first loss.
    """
    source, output = Path(source), Path(output)
    track = track or _untracked
    if output.resolve().is_relative_to(Folder.of(source).root.resolve()):
        raise DataError(f"the output {output} is inside the source {source}; choose a folder outside it.")
    before = file_states(output / "annotations") if overwrite else {}
    log = LossLog(strict=strict)
    rule = SplitRule(val, test, group_by, seed)
    check_output(output, overwrite=overwrite)
    importer = open_source(source, log, format=format, categories=categories, category=category, unlabeled=unlabeled)
    with ImagePlacer(output / "images", images) as placer:
        writer = CocoWriter(output, log, images=placer, box_masks=box_masks, splits=rule)
        for image in track(importer.read_labeled(), f"reading {importer.name}", importer.total):
            image_id = importer.image_ids.get(image.name)
            writer.add(image if image_id is None else dataclasses.replace(image, id=image_id))
        splits, names = writer.close(importer.categories, track)
    for path in untouched(output / "annotations", before):
        log.note(f"{path.name} from before stays in {path.parent}; delete it if it is from an earlier import")
    report = ImportReport(
        importer.name,
        str(source),
        str(output),
        splits,
        names,
        tuple(log.losses),
        dict(log.counts),
        {file: dict(counts) for file, counts in log.files.items()},
        dict(log.notes),
    )
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    (output / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report


def open_source(
    source: str | Path,
    log: LossLog,
    *,
    format: str = "auto",
    categories: str | Path | Sequence[str] | None = None,
    category: str = "",
    unlabeled: Literal["auto", "keep", "skip"] = "auto",
) -> Importer:
    """Open a data set; see :func:`import_data`."""
    infos: Sequence[CategoryInfo] = ()
    if isinstance(categories, (str, Path)):
        infos = read_categories(categories)
    elif categories is not None:
        infos = [CategoryInfo(name) for name in categories]
    folder = Folder.of(source)
    name = detect(folder) if format == "auto" else format
    return IMPORTERS[name](folder, log, ImportOptions(tuple(infos), unlabeled, category))


def list_formats() -> list[str]:
    """Return the names of the formats that can be imported."""
    return IMPORTERS.names()


def _untracked(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    return items
