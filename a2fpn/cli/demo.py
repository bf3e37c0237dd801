"""``a2fpn demo``."""

from __future__ import annotations

import dataclasses
import time
from importlib import resources
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from a2fpn.cli.format import ap_text, progress_bar, table
from a2fpn.cli.options import Device, Output, Threshold, pick_device
from a2fpn.config import SCORE_THRESHOLD

DEMO_MODEL = "maskrcnn_a2fpn_lite0.nuclei"
DEMO_DATA = Path(str(resources.files("a2fpn"))) / "assets" / "nuclei_demo"


def demo(
    *,
    output: Output = Path("a2fpn_demo"),
    score_threshold: Threshold = SCORE_THRESHOLD,
    device: Device = None,
) -> None:
    """Segment nuclei in the bundled microscopy images.

    Example: `a2fpn demo --output a2fpn_demo`
    """
    import a2fpn
    from a2fpn.data import read_coco
    from a2fpn.evaluation import evaluate_coco
    from a2fpn.inference import Predictor

    coco = read_coco(DEMO_DATA / "annotations.json")
    model = a2fpn.create_model(DEMO_MODEL, pretrained=True)
    # AP takes objects of all scores.
    predictor = Predictor(model, device=pick_device(device), score_threshold=model.rule.score_threshold)
    limit = predictor.model.config.heads.detections_per_image
    output.mkdir(parents=True, exist_ok=True)

    grid = table("image", "objects found", "annotated", "mask AP", "ms")
    records: list[dict[str, Any]] = []
    found: dict[Path, int] = {}
    with progress_bar() as progress:
        for entry in progress.track(list(coco.images.values()), description="segmenting"):
            path = DEMO_DATA / "images" / entry.file_name
            if not found:
                predictor(path)  # the first run of a process also sets up kernels and memory
            start = time.perf_counter()
            (result,) = predictor([path])
            milliseconds = 1000 * (time.perf_counter() - start)
            detections = result.to_coco(entry.id)
            truth = coco.annotations[entry.id]
            alone = dataclasses.replace(coco, images={entry.id: entry}, annotations={entry.id: truth})
            metrics = evaluate_coco(alone, detections, iou_types=["segm"], max_detections=limit)
            picture = output / f"{path.stem}.png"
            result.plot(score_threshold=score_threshold).save(picture)
            found[picture] = len(result.above(score_threshold))
            grid.add_row(
                path.name, str(found[picture]), str(len(truth)), ap_text(metrics, "segm"), f"{milliseconds:.0f}"
            )
            records += detections
    metrics = evaluate_coco(coco, records, iou_types=["segm"], max_detections=limit)
    annotated = sum(map(len, coco.annotations.values()))
    grid.add_section()
    grid.add_row("all", str(sum(found.values())), str(annotated), ap_text(metrics, "segm"), "")
    Console().print(grid)
    typer.echo(f"{DEMO_MODEL}; objects found with a score of {score_threshold} or more. Pictures are in {output}")
    typer.echo(f"Open {max(found, key=lambda picture: found[picture])}")
