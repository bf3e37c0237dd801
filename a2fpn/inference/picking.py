"""Active learning: selection of the images to label next, by uncertainty and diversity.

Two stages, as in Yang et al., "Plug and Play Active Learning for Object Detection" (CVPR 2024): the most uncertain
images form a pool, from which a diverse subset is selected. Uncertainty is the sum over an image's objects of the
squared 1-vs-2 margin of Brust et al., "Active Learning for Deep Object Detection" (VISAPP 2019), between an object's
score and its complement. Diversity is the greedy k-center of Sener and Savarese, "Active Learning for
Convolutional Neural Networks: A Core-Set Approach" (ICLR 2018), on means of the backbone's coarsest map.

Shape shorthand: N images, C channels.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from a2fpn.data import read_image
from a2fpn.errors import ConfigError, ImageError
from a2fpn.inference.eval_view import eval_view
from a2fpn.inference.predictor import Predictor
from a2fpn.inference.result import Result

logger = logging.getLogger(__name__)
POOL = 4
"""Images in the pool per picked image."""

Track = Callable[[Sequence[Path], str], Iterable[Path]]


@dataclass(frozen=True, eq=False)
class PickedImage:
    """An image worth labeling.

    Args:
        path: The file.
        uncertainty: Sum over the detections; a score of 0.5 counts 1, a score of 0 or 1 counts 0.
        distance: Distance to the nearest labeled or previously picked image, in [0, 2]; infinite for the first.
        result: The model's detections.
    """

    path: Path
    uncertainty: float
    distance: float
    result: Result


def pick_images(
    predictor: Predictor,
    images: Sequence[Path],
    number: int,
    *,
    labeled: Sequence[Path] = (),
    track: Track = lambda paths, _: paths,
) -> list[PickedImage]:
    """Pick the images that are most worth labeling.

    Args:
        predictor: The model.
        images: Files to choose from; unreadable ones are logged and skipped.
        number: Number of images to pick.
        labeled: Images with labels; similar ones are picked last.
        track: Called as ``track(paths, description)`` around long loops.

    Returns:
        The images in the order of picking; without labeled images the most uncertain one comes first.

    Raises:
        ConfigError: If fewer than ``number`` images can be read.
    """
    if not 1 <= number <= len(images):
        raise ConfigError(f"number must be between 1 and {len(images)}, the number of images, got {number}.")
    pool: list[tuple[float, int, Result]] = []  # a heap of the most uncertain
    for position, path in enumerate(track(images, "predicting")):
        try:
            (result,) = predictor([path])
        except ImageError as error:
            logger.warning("skipped: %s", error)
            continue
        entry = (uncertainty(result.scores), -position, result)
        if len(pool) < POOL * number:
            heapq.heappush(pool, entry)
        else:
            heapq.heappushpop(pool, entry)
    if len(pool) < number:
        raise ConfigError(f"only {len(pool)} of {len(images)} images can be read, expected at least {number}.")
    pool.sort(key=lambda entry: entry[:2], reverse=True)
    paths = [images[-position] for _, position, _ in pool]
    features = np.stack([embedding(predictor, path) for path in track(paths, "comparing")])
    known = [embedding(predictor, path) for path in (track(labeled, "comparing with labeled ones") if labeled else ())]
    order = farthest_first(features, np.array(known).reshape(-1, features.shape[1]), number)
    return [PickedImage(paths[row], pool[row][0], distance, pool[row][2]) for row, distance in order]


def uncertainty(scores: NDArray[np.float32]) -> float:
    """Sum of (1 - |p - (1 - p)|)² over scores p.

    Example:
        >>> uncertainty(np.array([0.5, 1.0, 0.75], np.float32))
        1.25
    """
    return float(((1 - np.abs(2 * scores.astype(np.float64) - 1)) ** 2).sum())


def embedding(predictor: Predictor, path: Path) -> NDArray[np.float32]:
    """Mean of the backbone's coarsest map over an image, L2-normalized; (C,)."""
    model = eval_view(predictor.model)
    image = read_image(path, max_pixels=predictor.max_pixels).to(next(model.parameters()).device)
    with torch.inference_mode():
        batch = model.preprocess([image])
        maps = list(model.get_submodule("backbone")(batch.tensor).values())[-1]
        height, width = (
            -(-side * cells // padded)
            for side, cells, padded in zip(batch.sizes[0], maps.shape[-2:], batch.tensor.shape[-2:], strict=True)
        )
        mean = maps[0, :, :height, :width].float().mean((1, 2))
    vector: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=0).cpu().numpy()
    return vector


def farthest_first(points: NDArray[np.float32], centers: NDArray[np.float32], number: int) -> list[tuple[int, float]]:
    """Select points by greedy k-center: each is the farthest from the centers and the points selected before.

    Args:
        points: (N, C); without centers the first point is selected first.
        centers: (M, C).
        number: Number of points, at most N.

    Returns:
        Rows with their distances at selection.

    Example:
        >>> farthest_first(np.array([[0.0], [1.0], [5.0]], np.float32), np.empty((0, 1), np.float32), 2)
        [(0, inf), (2, 5.0)]
    """
    distances = np.full(len(points), np.inf)
    for center in centers:
        distances = np.minimum(distances, np.linalg.norm(points - center, axis=1))
    taken: list[tuple[int, float]] = []
    for _ in range(number):
        row = int(distances.argmax())
        taken.append((row, float(distances[row])))
        distances = np.minimum(distances, np.linalg.norm(points - points[row], axis=1))
        distances[[row for row, _ in taken]] = -1
    return taken
