"""Qualitative comparison of models, as in Figure 1 of the paper's supplement, and one model's results, Figure 2.

Images are picked by a rule that is stated on the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pycocotools import mask as mask_utils

from a2fpn.data import CocoFile, Rle
from a2fpn.errors import ConfigError
from a2fpn.inference.shapes import PALETTE
from a2fpn.report.analysis import image_ap
from a2fpn.report.matching import Floats, Ints, Kind, Scene, match
from a2fpn.report.outlines import object_colors
from a2fpn.report.precision import mean, precision

if TYPE_CHECKING:
    from a2fpn import Predictor, Result

Pick = Literal["disagree", "random", "worst"]
Track = Callable[[Sequence[Path]], Iterable[Path]]


@dataclass(frozen=True, eq=False)
class Cell:
    """Objects drawn on an image.

    Args:
        boxes: (N, 4) x, y, width, height in pixels.
        rles: N masks, or None.
        texts: Class and score of each object.
        colors: Color of each object, "#RRGGBB".
        remark: Caption below the image.
    """

    boxes: Floats
    rles: tuple[Rle, ...] | None
    texts: tuple[str, ...]
    colors: tuple[str, ...]
    remark: str = ""

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True, eq=False)
class Column:
    """An image with a cell for each row of the figure.

    Args:
        path: The image file.
        size: Height and width in pixels.
        cells: Cells in the order of the rows.
    """

    path: Path
    size: tuple[int, int]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Content of a comparison figure.

    Args:
        rows: Names of the rows: annotations, if there are any, and models.
        columns: The images.
        note: The rule by which images were picked.
    """

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    note: str


def compare(
    models: Mapping[str, Predictor],
    images: Sequence[Path],
    *,
    coco: CocoFile | None = None,
    folder: Path | None = None,
    pick: Pick = "disagree",
    count: int = 8,
    score_threshold: float = 0.5,
    seed: int = 0,
    track: Track = iter,
) -> Comparison:
    """Predict images with every model and pick those to show.

    Args:
        models: Models by display name; with several models the first and the last are compared to pick images.
        images: Files to choose from.
        coco: Annotations of these images; they are the first row, and models are compared by AP. Without them models
            are compared by the share of objects that both find.
        folder: Image folder that the annotations' names are relative to; required with ``coco``.
        pick: ``"disagree"`` shows images where the models differ most, half in favor of each; ``"worst"`` those with
            the lowest AP; ``"random"`` a random choice.
        count: Number of images.
        score_threshold: Objects with a lower score are not drawn.
        seed: Seed of the random choice.
        track: Called with the images during prediction, to show progress.

    Raises:
        ConfigError: If there is no model or image, for ``"worst"`` without annotations, if an image is not in the
            annotations, or if the class ids of a model have other meanings.
    """
    if not models or not images or count < 1:
        raise ConfigError(
            f"Expected models, images and a count of at least 1, got {len(models)}, {len(images)}, {count}."
        )
    if pick == "worst" and coco is None:
        raise ConfigError("'worst' needs annotations: give them, or pick 'random' or 'disagree'.")
    if coco is not None:
        for name, predictor in models.items():
            _check_categories(name, predictor, coco)
    ids = _image_ids(images, coco, folder) if coco is not None else list(range(len(images)))
    only = _random(len(images), count, seed)[0] if pick == "random" else list(range(len(images)))
    results: dict[str, dict[int, Result]] = {name: {} for name in models}
    paths = {images[position]: position for position in only}
    for path in track(list(paths)):
        for name, predictor in models.items():
            (results[name][paths[path]],) = predictor([path])
    quality = None if coco is None else {name: _quality(found, ids, coco) for name, found in results.items()}
    chosen, note = _pick(results, quality, images, pick, only, count, score_threshold, seed)
    columns = [
        _column(
            images[position],
            [results[name][position].above(score_threshold) for name in models],
            coco,
            ids[position],
            [
                f"AP {quality[name][1][position]:.2f}" if quality and not np.isnan(quality[name][1][position]) else ""
                for name in models
            ],
        )
        for position in chosen
    ]
    rows = (*(["annotations"] if coco is not None else []), *models)
    return Comparison(rows, tuple(columns), note)


def show(name: str, results: Sequence[Result], remarks: Sequence[str], note: str) -> Comparison:
    """Show results of one model on image files, with a remark for each.

    Args:
        name: Name of the model.
        results: Results with their ``path`` set.
        remarks: Caption of each, before the number of objects.
        note: The rule by which images were picked.
    """
    columns = [
        _column(Path(str(result.path)), [result], None, 0, [remark])
        for result, remark in zip(results, remarks, strict=True)
    ]
    return Comparison((name,), tuple(columns), note)


def _check_categories(name: str, predictor: Predictor, coco: CocoFile) -> None:
    names = {category.id: category.name for category in predictor.categories}
    shared = [category for category in coco.categories if category.id in names]
    wrong = [category for category in shared if names[category.id].casefold() != category.name.casefold()]
    if wrong or not shared:
        first = f"id {wrong[0].id} is {names[wrong[0].id]!r} and {wrong[0].name!r}" if wrong else "no id is shared"
        raise ConfigError(f"The categories of {name} and {coco.name} differ: {first}.")


def _image_ids(images: Sequence[Path], coco: CocoFile, folder: Path | None) -> list[int]:
    known = {((folder or Path()) / entry.file_name).resolve(): entry.id for entry in coco.images.values()}
    unknown = [path for path in images if path.resolve() not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not among the images of {coco.name}.")
    return [known[path.resolve()] for path in images]


def _quality(found: Mapping[int, Result], ids: Sequence[int], coco: CocoFile) -> tuple[float, dict[int, float]]:
    """AP over the predicted images, and of each by its position."""
    masks = coco.has_masks and all(result.rles is not None for result in found.values())
    kind: Kind = "segm" if masks else "bbox"
    known = {category.id for category in coco.categories}
    chosen = [ids[position] for position in found]
    part = replace(
        coco,
        images={i: coco.images[i] for i in chosen},
        annotations={i: coco.annotations[i] for i in chosen},
    )
    records = [
        record
        for position, result in found.items()
        for record in result.to_coco(ids[position])
        if record["category_id"] in known
    ]
    limit = max([100, *map(len, found.values())])
    scene = Scene.of(part, records, kind=kind, max_detections=limit)
    matches = match(scene)
    by_id = dict(zip(scene.image_ids, image_ap(scene, matches).tolist(), strict=True))
    return precision(scene, matches).ap, {position: by_id[ids[position]] for position in found}


def _pick(
    results: Mapping[str, Mapping[int, Result]],
    quality: Mapping[str, tuple[float, Mapping[int, float]]] | None,
    images: Sequence[Path],
    pick: Pick,
    positions: Sequence[int],
    count: int,
    score_threshold: float,
    seed: int,
) -> tuple[list[int], str]:
    """Choose images to show, by position, and describe the rule."""
    total, names = len(images), list(results)
    if pick == "random":
        return _random(total, count, seed)
    if quality is not None and pick == "worst":
        means = {p: mean(np.array([quality[name][1][p] for name in names])) for p in positions}
        order = sorted((p for p in positions if not np.isnan(means[p])), key=lambda p: means[p])
        return order[:count], (
            f"Chosen to show failures: of {total} images the {len(order[:count])} with the lowest AP"
            f"{', the mean of the models' if len(names) > 1 else ''}. {_overall(quality)}"
        )
    if len(names) < 2:
        raise ConfigError("'disagree' needs two models or more: give another, or pick 'random' or 'worst'.")
    first, last = names[0], names[-1]
    if quality is None:
        agreement = {
            p: _agreement(results[first][p].above(score_threshold), results[last][p].above(score_threshold))
            for p in positions
        }
        order = sorted(positions, key=lambda p: agreement[p])[:count]
        return order, (
            f"Chosen to differ: of {total} images the {len(order)} where {first} and {last} share the fewest objects "
            f"(IoU of 0.50 or more, score of {score_threshold:g} or more). Nothing tells which is right."
        )
    gain = {p: quality[last][1][p] - quality[first][1][p] for p in positions}
    gain = {p: value for p, value in gain.items() if not np.isnan(value)}
    ahead = sorted((p for p in gain if gain[p] > 0), key=lambda p: -gain[p])
    behind = sorted((p for p in gain if gain[p] < 0), key=lambda p: gain[p])
    if not ahead and not behind:  # such as the last checkpoint of a run if it is the best
        drawn, how = _random(total, count, seed)
        return drawn, f"{first} and {last} have the same AP in every image. {how} {_overall(quality)}"
    half = count // 2
    for_last = ahead[: max(half, count - len(behind))]
    for_first = behind[: count - len(for_last)]
    note = (
        f"Chosen to differ: of {total} images the {len(for_first)} where {first} has the higher AP by most, then the "
        f"{len(for_last)} where {last} has. {first} is ahead in {len(behind)} images, {last} in {len(ahead)}. "
        f"{_overall(quality)}"
    )
    return for_first + for_last, note


def _random(total: int, count: int, seed: int) -> tuple[list[int], str]:
    """Draw positions of images at random, sorted, and describe the rule."""
    if count >= total:
        return list(range(total)), f"All {total} images."
    drawn = np.random.default_rng(seed).permutation(total)[:count]
    return np.sort(drawn).tolist(), f"{count} of {total} images, drawn at random (seed {seed})."


def _overall(quality: Mapping[str, tuple[float, Mapping[int, float]]]) -> str:
    told = ", ".join(f"{name} {ap:.3f}" for name, (ap, _) in quality.items())
    return f"AP over all images: {told}."


def _agreement(one: Result, other: Result) -> float:
    """F1 of two sets of objects: twice the matches over all objects; 1 if there are none."""
    pairs = int((_partners(_cell(one), _cell(other)) >= 0).sum())
    return 2 * pairs / total if (total := len(one) + len(other)) else 1.0


def _partners(cell: Cell, reference: Cell) -> Ints:
    """Match objects to the reference at IoU 0.50: its row or -1; one to one, the highest IoU first."""
    partners = np.full(len(cell), -1, dtype=np.int64)
    if not len(cell) or not len(reference):
        return partners
    masks = cell.rles is not None and reference.rles is not None
    pair: tuple[Any, Any] = (cell.boxes, reference.boxes)
    if masks:
        pair = (list(cell.rles or ()), list(reference.rles or ()))
    overlaps = np.asarray(mask_utils.iou(*pair, [0] * len(reference)), dtype=np.float64)
    while overlaps.max() >= 0.5:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        partners[row] = column
        overlaps[row], overlaps[:, column] = 0, 0
    return partners


def _column(
    path: Path, results: Sequence[Result], coco: CocoFile | None, image_id: int, remarks: Sequence[str]
) -> Column:
    """Build the cells of an image, in which an object has the same color in every row."""
    cells = [
        replace(_cell(result), remark=", ".join(filter(None, (remark, _count(len(result))))))
        for result, remark in zip(results, remarks, strict=True)
    ]
    labels: list[Any] = [result.names for result in results]
    if coco is not None:
        names = {category.id: category.name for category in coco.categories}
        truth = [a for a in coco.annotations[image_id] if not a.iscrowd]
        boxes = np.array([a.bbox for a in truth], dtype=np.float64).reshape(-1, 4)
        rles = tuple(a.region(coco.images[image_id]) for a in truth) if coco.has_masks else None
        labels.insert(0, tuple(names[a.category_id] for a in truth))
        cells.insert(0, Cell(boxes, rles, labels[0], (), _count(len(truth))))
    known = sorted({name for row in labels for name in row})
    if len(known) > 1:
        by_name = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(known)}
        cells = [
            replace(cell, colors=tuple(by_name[name] for name in row)) for cell, row in zip(cells, labels, strict=True)
        ]
    else:
        cells[0] = replace(cells[0], colors=tuple(object_colors(cells[0].boxes)))
        for number, cell in enumerate(cells[1:], start=1):
            own = object_colors(cell.boxes)
            shared = [cells[0].colors[p] if p >= 0 else own[row] for row, p in enumerate(_partners(cell, cells[0]))]
            cells[number] = replace(cell, colors=tuple(shared))
        cells = [replace(cell, texts=()) for cell in cells]  # a single class needs no names
    return Column(path, results[0].size, tuple(cells))


def _cell(result: Result) -> Cell:
    boxes = result.boxes.astype(np.float64)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    texts = [f"{name} {score:.2f}" for name, score in zip(result.names, result.scores.tolist(), strict=True)]
    return Cell(boxes, result.rles, tuple(texts), ())


def _count(number: int) -> str:
    return f"{number} object{'' if number == 1 else 's'}"
