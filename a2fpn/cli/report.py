"""``a2fpn evaluate --report``: what the page needs of each model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from a2fpn.detectors import Detector
    from a2fpn.evaluation import CocoMetrics


@dataclass(frozen=True)
class Reported:
    """A model of a report.

    Args:
        name: On the page.
        facts: See :func:`a2fpn.report.model_facts`.
        detections: COCO results that were kept.
    """

    name: str
    facts: Mapping[str, str]
    detections: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, detector: Detector) -> Reported:
        """Look at a model before it is optimized."""
        from a2fpn.report import model_facts

        return cls(name, model_facts(detector))

    def keep(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass on detections, and keep them."""
        for record in records:
            self.detections.append(record)
            yield record


def write_page(
    path: Path,
    models: Sequence[Reported],
    tables: Sequence[CocoMetrics],
    images: Path,
    annotations: Path,
    *,
    gray_bits: int = 16,
) -> None:
    """Write the page and say where; models with other kinds of output are compared by what both have."""
    from a2fpn.data import read_coco
    from a2fpn.report import Run, data_facts, write_report

    coco = read_coco(annotations)
    common = [kind for kind in tables[0].measured if all(kind in table.measured for table in tables)]
    write_report(
        path,
        coco,
        images,
        [Run(model.name, model.detections, model.facts) for model in models],
        iou_types=common,
        max_detections=tables[0].max_detections,
        data=data_facts(coco, images, annotations),
        gray_bits=gray_bits,
        metrics=tables if all(list(table.measured) == common for table in tables) else None,
    )
    typer.echo(f"Open {path}")
