"""Tiles: where they lie, and that objects cut by their borders become whole again, once."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils

from a2fpn.data import decode_rle, encode_masks
from a2fpn.inference.tiling import TileDetections, Window, merge_tiles, tile_windows


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 700), width=st.integers(1, 700), tile=st.integers(16, 300), overlap=st.floats(0, 0.9))
def test_tiles_cover_the_image_and_overlap(height: int, width: int, tile: int, overlap: float) -> None:
    windows = tile_windows((height, width), tile, overlap)
    assert len(windows) == len(set(windows))
    for axis, side in ((0, width), (1, height)):
        spans = sorted({(window[axis], window[axis + 2]) for window in windows})
        assert spans[0][0] == 0
        assert spans[-1][1] == side
        assert {stop - start for start, stop in spans} == {min(side, tile)}
        for (_, stop), (start, _) in itertools.pairwise(spans):
            assert stop - start >= int(tile * overlap) - 1
    assert len(windows) == len({w[0] for w in windows}) * len({w[1] for w in windows})


def test_an_image_no_larger_than_a_tile_is_one() -> None:
    assert tile_windows((100, 60), 100) == [(0, 0, 60, 100)]


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(15, 0.2, "tile must be at least 16 pixels, got 15"), (64, 1.0, r"between 0 and 0\.9 of a tile, got 1\.0")],
)
def test_tiles_out_of_range(tile: int, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile_windows((100, 100), tile, overlap)


SIZE = (200, 260)


def discs(number: int, radii: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Discs that don't touch each other."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    taken = np.zeros(SIZE, dtype=bool)
    found: list[np.ndarray] = []
    for _ in range(200):
        radius = rng.integers(*radii)
        y, x = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        disc = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        if len(found) < number and not (taken & disc).any():
            taken |= (rows - y) ** 2 + (columns - x) ** 2 <= (radius + 2) ** 2
            found.append(disc)
    return found


def box_of(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def look(objects: list[np.ndarray], labels: list[int], window: Window, *, masks: bool, seed: int) -> TileDetections:
    """What a perfect detector would find in a tile."""
    rng = np.random.default_rng(seed)
    x0, y0, x1, y1 = window
    seen = []
    for mask, label in zip(objects, labels, strict=True):
        part = np.zeros_like(mask)
        part[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
        if part.any():
            seen.append((part, label))
    return TileDetections(
        window,
        np.array([box_of(part) for part, _ in seen], dtype=np.float32).reshape(-1, 4),
        rng.uniform(0.5, 1, len(seen)).astype(np.float32),
        np.array([label for _, label in seen], dtype=np.int64),
        tuple(encode_masks(np.array([part[y0:y1, x0:x1] for part, _ in seen]).reshape(-1, y1 - y0, x1 - x0)))
        if masks
        else None,
    )


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("overlap", [0.2, 0.5])
@pytest.mark.parametrize(("number", "radii"), [(40, (3, 8)), (12, (15, 30)), (3, (45, 60))])
def test_objects_in_tiles_are_the_objects_of_the_image(
    number: int, radii: tuple[int, int], overlap: float, masks: bool
) -> None:
    objects = discs(number, radii, seed=0)
    labels = [index % 2 for index in range(len(objects))]
    windows = tile_windows(SIZE, 80, overlap)
    tiles = [look(objects, labels, window, masks=masks, seed=i) for i, window in enumerate(windows)]
    assert sum(len(tile.scores) for tile in tiles) > len(objects)
    merged = merge_tiles(tiles, SIZE)
    assert merged.window == (0, 0, 260, 200)
    assert (np.diff(merged.scores) <= 0).all()
    expected = {tuple(map(int, box_of(mask))): label for mask, label in zip(objects, labels, strict=True)}
    assert {tuple(map(int, box)): label for box, label in zip(merged.boxes, merged.labels, strict=True)} == expected
    assert len(merged.scores) == len(objects)
    if masks:
        assert merged.rles is not None
        by_box = {tuple(map(int, box_of(mask))): mask for mask in objects}
        for box, mask in zip(merged.boxes, decode_rle(merged.rles), strict=True):
            np.testing.assert_array_equal(mask, by_box[tuple(map(int, box))])
    else:
        assert merged.rles is None


def tile_of(window: Window, rows: list[tuple[list[float], float, int]]) -> TileDetections:
    return TileDetections(
        window,
        np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row[1] for row in rows], dtype=np.float32),
        np.array([row[2] for row in rows], dtype=np.int64),
    )


LEFT, RIGHT = (0, 0, 100, 100), (80, 0, 180, 100)


def merge(left: list[tuple[list[float], float, int]], right: list[tuple[list[float], float, int]]) -> list[list[float]]:
    merged = merge_tiles([tile_of(LEFT, left), tile_of(RIGHT, right)], (100, 180))
    return [[*box, round(score, 3)] for box, score in zip(merged.boxes.tolist(), merged.scores.tolist(), strict=True)]


def test_the_whole_one_stays_even_if_its_part_scores_more() -> None:
    assert merge([([85, 10, 100, 30], 0.9, 0)], [([85, 10, 120, 30], 0.6, 0)]) == [[85, 10, 120, 30, 0.6]]


def test_parts_become_one_with_the_best_score() -> None:
    assert merge([([70, 10, 100, 30], 0.9, 0)], [([80, 10, 120, 30], 0.6, 0)]) == [[70, 10, 120, 30, 0.9]]


def test_a_sliver_belongs_to_what_covers_it_unless_something_resembles_it_more() -> None:
    large, sliver = ([80, 10, 120, 60], 0.9, 0), ([96, 20, 100, 24], 0.5, 0)
    assert merge([sliver], [large]) == [[80, 10, 120, 60, 0.9]]
    assert len(merge([sliver], [large, ([80, 80, 120, 90], 0.5, 0)])) == 2
    # Two that are inside each other, each seen by both tiles.
    inner = ([75, 20, 100, 40], 0.5, 0), ([80, 20, 105, 40], 0.5, 0)
    assert merge([([60, 10, 100, 90], 0.9, 0), inner[0]], [([80, 10, 120, 90], 0.9, 0), inner[1]]) == [
        [60, 10, 120, 90, 0.9],
        [75, 20, 105, 40, 0.5],
    ]


def test_of_two_whole_ones_the_better_stays() -> None:
    assert merge([([84, 10, 96, 30], 0.6, 0)], [([84, 10, 96, 31], 0.7, 0)]) == [[84, 10, 96, 31, 0.7]]


def test_other_classes_and_neighbors_are_other_objects() -> None:
    assert len(merge([([84, 10, 96, 30], 0.6, 0)], [([84, 10, 96, 30], 0.7, 1)])) == 2
    assert len(merge([([84, 10, 96, 30], 0.6, 0)], [([84, 28, 96, 60], 0.7, 0)])) == 2


def test_a_part_that_joins_two_objects_swallows_neither() -> None:
    whole = [([85, 10, 95, 29], 0.8, 0), ([85, 31, 95, 50], 0.7, 0)]
    # By boxes it can't be told from an object of its own; what matters is that both whole ones are there.
    assert {(85, 10, 95, 29), (85, 31, 95, 50)} <= {tuple(row[:4]) for row in merge(whole, [([80, 9, 96, 51], 0.9, 0)])}


def test_duplicates_of_one_tile_are_the_detectors_business() -> None:
    pair = [([10.0, 10, 30, 30], 0.9, 0), ([11.0, 10, 30, 30], 0.8, 0)]
    assert len(merge(pair, [])) == 2


def test_a_border_of_the_image_cuts_nothing() -> None:
    # It touches the image's top, and is seen by both tiles: the better of two whole ones stays as it is.
    assert merge([([84, 0, 96, 20], 0.9, 0)], [([84, 0, 96, 22], 0.8, 0)]) == [[84, 0, 96, 20, 0.9]]


def test_nothing_found_anywhere() -> None:
    merged = merge_tiles([tile_of(LEFT, []), tile_of(RIGHT, [])], (100, 180))
    assert merged.boxes.shape == (0, 4)
    assert merged.scores.shape == merged.labels.shape == (0,)


def test_merged_masks_are_json_able() -> None:
    objects = discs(3, (45, 60), seed=0)
    windows = tile_windows(SIZE, 80, 0.2)
    tiles = [look(objects, [0] * len(objects), window, masks=True, seed=i) for i, window in enumerate(windows)]
    merged = merge_tiles(tiles, SIZE)
    assert merged.rles is not None
    for rle, mask in zip(merged.rles, decode_rle(merged.rles), strict=True):
        assert isinstance(rle["counts"], str)
        assert rle["size"] == list(SIZE)
        assert int(mask_utils.area(rle)) == int(mask.sum())
