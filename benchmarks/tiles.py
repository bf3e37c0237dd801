"""Seams: objects found in tiles against those of the untiled image, beside two slicers with the same detector.

``python -m benchmarks.tiles`` uses the nuclei and the model inside the package. Tiles of 256 pixels see small objects,
those of 96 pixels objects that are mostly larger than the part that two tiles share. All sides see each pixel at the
same scale, so what differs comes from the seams, and from the network, whose global context is the tile.

A miss is an object of the untiled result, with a score of at least 0.7, that no object of the tiles covers with an IoU
of 0.5. A duplicate is an object of the tiles that shows the same object as a better one: it covers, or is covered by,
the same object of the untiled result (of any score from 0.3) by more than half.

supervision and sahi are needed for their sides: ``pip install supervision sahi``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import a2fpn
from a2fpn import Predictor
from a2fpn.data import encode_masks
from a2fpn.masks.rle import Rle
from benchmarks import _measure
from benchmarks._nuclei import Scene, load_scenes, mosaic, overlaps
from benchmarks.gpu.record import circumstances

MODEL = "maskrcnn_a2fpn_lite0.nuclei"
OVERLAP = 0.2
THRESHOLD = 0.5
SURE, UNSURE = 0.7, 0.3
GOALS = {"duplicates": 0.005, "misses": 0.01, "memory": 1 / 3}
SIDES = ("a2fpn", "supervision", "supervision, compact masks", "sahi")

Finder = Callable[[], list[Rle]]


def predictor(scale: float) -> Predictor:
    """Our model, which sees every pixel of every side at one scale."""
    return Predictor(a2fpn.create_model(MODEL, pretrained=True), scale=scale, max_objects=2000)


def make_scene(across: int, data: Path | None) -> Scene:
    """Nuclei side by side."""
    scenes = sorted(load_scenes(data), key=lambda scene: scene.pixels.shape[1] * scene.pixels.shape[2])
    return mosaic(scenes, across, 256)


def prepare(
    side: str, across: int, data: Path | None, tile: int | None, scale: float, overlap: float = OVERLAP
) -> Finder:
    """Callable that finds the objects of the scene in tiles, best first; without tiles in the whole image."""
    ours, scene = predictor(scale), make_scene(across, data)
    if side == "a2fpn":
        return lambda: list(ours.predict([scene.pixels], tile=tile, overlap=overlap, score_threshold=THRESHOLD)[0].rles)
    assert tile is not None
    slicer = _sahi if side == "sahi" else functools.partial(_supervision, compact="compact" in side)
    return slicer(ours, scene, tile, overlap)


def _supervision(ours: Predictor, scene: Scene, tile: int, overlap: float, *, compact: bool) -> Finder:
    import supervision

    def detect(pixels: Any) -> Any:
        result = ours(np.ascontiguousarray(pixels), score_threshold=THRESHOLD)
        return supervision.Detections(
            xyxy=result.boxes, mask=result.masks, confidence=result.scores, class_id=result.labels
        )

    slicer = supervision.InferenceSlicer(
        detect,
        slice_wh=tile,
        overlap_wh=int(tile * overlap),
        thread_workers=1,
        **({"compact_masks": True} if compact else {}),
    )

    def find() -> list[Rle]:
        found = slicer(scene.array)
        order = np.argsort(-found.confidence, kind="stable")
        return [encode_masks(np.asarray(found.mask[int(row)])[None])[0] for row in order]

    return find


def _sahi(ours: Predictor, scene: Scene, tile: int, overlap: float) -> Finder:
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
    from sahi.utils.cv import get_coco_segmentation_from_bool_mask

    class Model(DetectionModel):
        """Our detector as sahi wants it."""

        def set_model(self, model: Any, **kwargs: Any) -> None:
            self.model, self.category_mapping = model, {"0": "nucleus"}

        def perform_inference(self, image: Any) -> None:
            self._original_predictions = self.model(np.ascontiguousarray(image), score_threshold=THRESHOLD)

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            found = self._original_predictions
            shift = shift_amount_list[0] if isinstance(shift_amount_list[0], list) else shift_amount_list
            shape = full_shape_list[0] if isinstance(full_shape_list[0], list) else full_shape_list
            objects = []
            for box, score, mask in zip(found.boxes.tolist(), found.scores.tolist(), found.masks, strict=True):
                polygons = get_coco_segmentation_from_bool_mask(mask)
                if polygons:
                    objects.append(
                        ObjectPrediction(
                            bbox=box,
                            category_id=0,
                            score=score,
                            segmentation=polygons,
                            category_name="nucleus",
                            shift_amount=shift,
                            full_shape=shape,
                        )
                    )
            self._object_prediction_list_per_image = [objects]

    model = Model(model=ours, confidence_threshold=THRESHOLD, device="cpu")

    def find() -> list[Rle]:
        found = get_sliced_prediction(
            scene.array,
            model,
            slice_height=tile,
            slice_width=tile,
            overlap_height_ratio=overlap,
            overlap_width_ratio=overlap,
            perform_standard_pred=False,
            verbose=0,
        ).object_prediction_list
        found.sort(key=lambda x: -x.score.value)
        return [encode_masks(np.asarray(x.mask.bool_mask)[None])[0] for x in found]

    return find


def seams(found: list[Rle], sure: list[Rle], every: list[Rle]) -> tuple[float, float]:
    """Share of duplicates among the objects of tiles, and of sure untiled objects that are missed.

    Args:
        found: In tiles, best first.
        sure: Of the untiled image, with a high score.
        every: Of the untiled image, also those with a low score.
    """
    iou = overlaps(found, sure)[0]
    misses = 1 - float((iou.max(0, initial=0) >= 0.5).mean()) if sure else 0.0
    iou, covered = overlaps(found, every)
    shown: set[int] = set()
    duplicates = 0
    for row, share in zip(iou, covered, strict=True):
        if not share.size or share.max() <= 0.5:
            continue
        same = int(row.argmax())
        duplicates += same in shown
        shown.add(same)
    return duplicates / max(1, len(found)), misses


def main(
    *,
    data: Annotated[Path | None, typer.Option(help="COCO folder of nuclei; by default the packaged images.")] = None,
    across: Annotated[int, typer.Option(help="Images of 256 x 256 pixels side by side.", min=1)] = 3,
    scale: Annotated[float, typer.Option(help="Pixels of the network per pixel of the image.")] = 3.0,
    tile: Annotated[list[int] | None, typer.Option(help="Pixels of a tile's side; may be repeated.", min=1)] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of a tile that the next one repeats.", min=0, max=0.9)
    ] = OVERLAP,
    rounds: _measure.Rounds = 3,
    threads: _measure.Threads = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    quick: _measure.Quick = False,
) -> None:
    """Compare tiles with the untiled image, and with the tiles of supervision and SAHI."""
    tiles = tile or [256, 96]
    if quick:
        across, rounds, scale, tiles = 1, 1, 1.0, [128]
    _measure.start(threads, rounds)
    installed = {"supervision": "supervision", "sahi": "sahi"}
    sides = [side for side in SIDES if side == "a2fpn" or importlib.util.find_spec(installed[side.split(",")[0]])]
    scene = make_scene(across, data)
    ours = predictor(scale)
    with torch.inference_mode():
        (whole,) = ours.predict([scene.pixels], score_threshold=UNSURE)
    every, sure = list(whole.rles or ()), list(whole.above(SURE).rles or ())
    extent = float(np.median(np.sqrt(np.prod(whole.boxes[:, 2:] - whole.boxes[:, :2], axis=1))))
    numbers: list[dict[str, Any]] = []
    for size in tiles:
        finders = {side: prepare(side, across, data, size, scale, overlap) for side in sides}
        results: dict[str, list[Rle]] = {}

        def run(side: str, finders: dict[str, Finder] = finders, results: dict[str, list[Rle]] = results) -> None:
            results[side] = finders[side]()

        calls = {side: functools.partial(run, side) for side in sides}
        timings = _measure.time_interleaved(calls, rounds=rounds, warmup=0, title=f"tiles of {size}")
        memory = {side: _measure.peak_memory(prepare, side, across, data, size, scale, overlap) for side in sides}
        rows = []
        for side in sides:
            found = results[side]
            duplicates, misses = seams(found, sure, every)
            ratio = memory["a2fpn"] / memory[side]
            numbers.append(
                {
                    "tile": size,
                    "overlap": overlap,
                    "side": side,
                    "objects": len(found),
                    "duplicates": duplicates,
                    "misses": misses,
                    "seconds": timings.median(side),
                    "ratio": timings.ratio("a2fpn", side).value,
                    "bytes": memory[side],
                    "memory": ratio,
                }
            )
            own = side == "a2fpn"
            rows.append(
                [
                    side,
                    str(len(found)),
                    f"{100 * duplicates:.2f} %",
                    f"{100 * misses:.2f} %",
                    _measure.milliseconds(timings.median(side)),
                    str(timings.ratio("a2fpn", side)),
                    _measure.mebibytes(memory[side]),
                    "" if own else f"{ratio:.2f} {_measure.against(ratio, GOALS['memory'])}",
                ]
            )
            if own:
                goals = " ".join(
                    f"{name} {_measure.against(value, GOALS[name])}"
                    for name, value in (("duplicates", duplicates), ("misses", misses))
                )
        columns = ["", "objects", "duplicates", "misses", "time", "ours / its", "peak memory", "ours / its"]
        _measure.print_table(
            f"{scene.pixels.shape[2]} x {scene.pixels.shape[1]} pixels at {scale:g} x, {len(every)} objects of "
            f"{extent:.0f} pixels, {len(sure)} sure; tiles of {size}. Goals: {goals}",
            columns,
            rows,
        )
        if output is not None:
            scene_facts = {"side": scene.pixels.shape[2], "scale": scale, "extent": extent, "untiled": len(every)}
            here = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
            versions = {name: importlib.metadata.version(name) for name in ("supervision", "sahi") if name in sides}
            document = {**circumstances(torch.device("cpu")), **here, "sides": versions, "rounds": rounds}
            document |= {**scene_facts, "sure": len(sure), "rows": numbers}
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
