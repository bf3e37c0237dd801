import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2fpn.config import Category
from a2fpn.data import encode_masks
from a2fpn.inference import Result
from a2fpn.inference import draw as drawing
from a2fpn.inference.canvas import Entry
from a2fpn.inference.draw import draw
from a2fpn.inference.labels import _overlap, box_areas, place_labels
from a2fpn.inference.shapes import PALETTE, neighbor_colors

CATEGORIES = tuple(Category(index, name) for index, name in enumerate(["cell", "_background_", "a $cost$ of \\frac"]))


def result_of(masks, labels=None, *, rles=True, path=None, scores=None):
    """A result whose boxes enclose the masks, (N, H, W)."""
    masks = np.asarray(masks, dtype=bool)
    boxes = []
    for mask in masks:
        ys, xs = np.nonzero(mask)
        boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    return Result(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.linspace(1, 0.5, len(masks), dtype=np.float32) if scores is None else scores,
        labels=np.zeros(len(masks), dtype=np.int64) if labels is None else np.array(labels),
        size=masks.shape[1:],
        categories=CATEGORIES,
        rles=tuple(encode_masks(masks)) if rles else None,
        path=path,
    )


def grid(n, size, side):
    """n square masks of a side side by side, (n, H, W)."""
    masks = np.zeros((n, *size), dtype=bool)
    columns = size[1] // (side + 2)
    for index, mask in enumerate(masks):
        y, x = (side + 2) * (index // columns), (side + 2) * (index % columns)
        mask[y : y + side, x : x + side] = True
    return masks


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "scale"), [((256, 256), 3), ((100, 256), 3), ((120, 640), 2), ((700, 768), 1), ((110, 1200), 1)]
)
def test_small_images_are_enlarged_by_a_whole_factor(size, scale):
    picture = draw(result_of(grid(2, size, 50)), noise(size), legend=False)
    assert picture.size == (size[1] * scale, size[0] * scale)
    assert max(picture.size) >= 768


def test_small_objects_enlarge_the_picture_up_to_a_limit():
    assert draw(result_of(grid(3, (100, 1000), 8)), noise((100, 1000)), legend=False).size == (2000, 200)
    assert draw(result_of(grid(3, (100, 1000), 30)), noise((100, 1000)), legend=False).size == (1000, 100)
    assert draw(result_of(grid(3, (100, 2000), 8)), noise((100, 2000)), legend=False).size == (2000, 100)


def test_an_enormous_image_is_shrunk(monkeypatch):
    monkeypatch.setattr(drawing, "_MAX_AREA", 800 * 1000 / 4)
    assert draw(result_of(grid(2, (800, 1000), 100)), noise((800, 1000)), legend=False).size == (500, 400)


@pytest.mark.parametrize("size", [(800, 900), (100, 80), (900, 40)])
def test_the_legend_never_hides_the_picture(size):
    result, image = result_of(grid(2, size, 30)), noise(size)
    bare, full = (np.asarray(draw(result, image, legend=legend)) for legend in (False, True))
    np.testing.assert_array_equal(full[: bare.shape[0], : bare.shape[1]], bare)
    strip = np.concatenate([full[bare.shape[0] :].ravel(), full[:, bare.shape[1] :].ravel()])
    assert len(strip) > 0
    assert (strip == 255).mean() > 0.5
    assert strip.min() < 100
    assert full.shape[1] >= 480


def test_without_objects_the_picture_is_the_image():
    image = noise((800, 900))
    result = result_of(np.zeros((0, 800, 900)))
    np.testing.assert_array_equal(np.asarray(draw(result, image))[:800], image)


def test_masks_are_drawn_where_they_are_and_holes_stay_open():
    mask = np.zeros((800, 800), dtype=bool)
    mask[100:400, 200:500] = True
    mask[200:300, 300:400] = False
    black = np.zeros((800, 800, 3), dtype=np.uint8)
    picture = np.asarray(draw(result_of([mask]), black, boxes=False, labels=False, legend=False))
    changed = picture.any(axis=2)
    assert changed[110:190, 210:490].all()
    assert not changed[210:290, 310:390].any()
    outside = np.ones_like(mask)
    outside[95:405, 195:505] = False
    assert not changed[outside].any()
    # The line is of the full color, the area translucent.
    assert picture[150, 200:202].max() > 200
    assert 0 < picture[150, 250].max() < 100


def test_even_one_pixel_is_visible():
    mask = np.zeros((40, 300), dtype=bool)
    mask[10, 200] = True
    black = np.zeros((40, 300, 3), dtype=np.uint8)
    picture = np.asarray(draw(result_of([mask]), black, boxes=False, labels=False, legend=False))
    scale = picture.shape[0] // 40
    ys, xs = np.nonzero(picture.any(axis=2))
    assert abs(ys.mean() / scale - 10.5) < 1
    assert abs(xs.mean() / scale - 200.5) < 1


def test_an_empty_mask_draws_nothing():
    result = result_of(grid(1, (800, 800), 20))
    empty = tuple(encode_masks(np.zeros((1, 800, 800))))
    image = noise((800, 800))
    result = Result(result.boxes, result.scores, result.labels, (800, 800), CATEGORIES, rles=empty)
    picture = draw(result, image, boxes=False, labels=False, legend=False)
    np.testing.assert_array_equal(np.asarray(picture), image)


def test_many_objects_get_neither_boxes_nor_text():
    size = (120, 400)
    many, few = result_of(grid(41, size, 20)), result_of(grid(40, size, 20))
    image = noise(size)

    def same(result, **options):
        return draw(result, image).tobytes() == draw(result, image, **options).tobytes()

    assert same(many, boxes=False, labels=False)
    assert same(few, boxes=True, labels=True)
    assert not same(few, boxes=False)
    assert not same(few, labels=False)
    boxes_only = result_of(grid(41, size, 20), rles=False)
    assert same(boxes_only, boxes=True, labels=False)
    assert not same(boxes_only, boxes=False)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12, unique=True))
def test_classes_have_colors_of_their_own(labels):
    colors = drawing._class_colors(np.array(labels))
    assert colors.keys() == set(labels)
    assert len({tuple(color) for color in colors.values()}) == len(labels)


def test_a_class_keeps_its_color_from_picture_to_picture():
    alone = drawing._class_colors(np.array([5]))[5]
    np.testing.assert_array_equal(drawing._class_colors(np.array([2, 5, 9]))[5], alone)
    assert len(drawing._class_colors(np.arange(80))) == 80


@given(st.integers(1, 256), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_nearest_object_has_another_color(n, seed):
    corners = np.random.default_rng(seed).uniform(0, 100, (n, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + 10], axis=1)
    colors = np.array(neighbor_colors(boxes))
    assert colors.shape == (n,)
    assert colors.min() >= 0
    assert colors.max() < len(PALETTE)
    distances = np.square(corners[:, None] - corners[None]).sum(-1) + np.diag([np.inf] * n)
    same = colors[:, None] == colors[None]
    later_sees_earlier = [distances[i, :i].argmin() for i in range(1, n)]
    assert not any(same[i, j] for i, j in enumerate(later_sees_earlier, start=1))


@given(st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_labels_hide_neither_objects_nor_each_other(n, seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 500, (n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(2, 200, (n, 2))], axis=1).astype(np.float32)
    places = place_labels([f"thing {score:.2f}" for score in rng.uniform(size=n)], boxes, (600, 550), 12)
    assert len(places) == n
    rects = np.array([place for place in places if place is not None]).reshape(-1, 4)
    assert (rects[:, :2] >= 0).all()
    assert (rects[:, 2] <= 600).all()
    assert (rects[:, 3] <= 550).all()
    for index, rect in enumerate(rects):
        assert not _overlap(rect, np.delete(rects, index, axis=0)).any()
        assert (_overlap(rect, boxes) <= 0.2 * box_areas(boxes) + 1e-3).all()


def pose(names=(), *, scores=None, visible=(1, 1, 1)):
    """One object of three keypoints that hang one under the other in the middle of a gray image."""
    return Result(
        boxes=np.array([[100, 100, 700, 700]], dtype=np.float32),
        scores=np.array([0.9], dtype=np.float32),
        labels=np.array([0]),
        size=(800, 800),
        categories=(Category(1, "person"),),
        keypoints=np.array([[[400, y, v] for y, v in zip((200, 400, 600), visible, strict=True)]], dtype=np.float32),
        keypoint_scores=None if scores is None else np.array([scores], dtype=np.float32),
        keypoint_names=names,
    )


ARM = ("left_shoulder", "left_elbow", "left_wrist")


@pytest.mark.parametrize(
    ("result", "points", "limbs"),
    [
        (pose(ARM), (200, 400, 600), (300, 500)),
        (pose(), (200, 400, 600), ()),
        (pose(("left_shoulder", "tail", "left_wrist")), (200, 400, 600), ()),
        (pose(ARM, visible=(1, 1, 0)), (200, 400), (300,)),
        (pose(ARM, scores=(5, -1, 2)), (200, 600), ()),
        (pose(visible=(0, 0, 0)), (), ()),
    ],
)
def test_keypoints_are_drawn_and_joined_where_their_names_are_known(result, points, limbs):
    image = np.full((800, 800, 3), 90, dtype=np.uint8)
    picture = np.asarray(draw(result, image, boxes=False, labels=False, legend=False)).astype(int)
    changed = (picture != 90).any(2)
    for y in (200, 300, 400, 500, 600):
        assert changed[y, 400] == (y in (*points, *limbs)), y
        # In the color of the object, not white.
        if changed[y, 400]:
            assert np.ptp(picture[y, 400]) > 50
    assert changed.sum() < 3000
    assert not changed[:, :380].any()


def test_keypoints_scale_with_the_picture():
    small = pose(ARM)
    small = Result(**{**vars(small), "boxes": small.boxes / 10, "size": (80, 80), "keypoints": small.keypoints / 10})
    picture = np.asarray(draw(small, np.full((80, 80, 3), 90, dtype=np.uint8), boxes=False, labels=False, legend=False))
    assert (picture[200] != 90).any(1).nonzero()[0].mean() == pytest.approx(400, abs=1)


def test_one_object_with_room_gets_its_label_on_top():
    (place,) = place_labels(["cat 0.97"], np.array([[100, 100, 300, 300]], dtype=np.float32), (600, 600), 12)
    assert place[0] == 100
    assert place[3] == 100


def test_the_legend_says_what_is_there():
    result = result_of(
        grid(5, (800, 800), 30),
        labels=[0, 0, 2, 0, 2],
        path="/somewhere/image.png",
        scores=np.array([0.99, 0.9, 0.9, 0.51, 0.9], dtype=np.float32),
    )
    colors = np.zeros((5, 3))
    title, *entries = drawing._legend(result, colors)
    assert (title.name, title.note) == ("image.png", "800 × 800 px, 5 objects")
    assert [(entry.name, entry.note) for entry in entries] == [
        ("cell", "3, score 0.51–0.99"),
        ("a $cost$ of \\frac", "2, score 0.90"),
    ]


@pytest.mark.parametrize("width", [480, 700, 3000])
def test_the_legend_fits_its_width(width):
    entries = [Entry(np.zeros((1, 3)), f"class {i}", "3, score 0.51–0.99") for i in range(40)]
    rows = drawing._wrap(entries, width, 14)
    assert sum(map(len, rows)) == 40
    assert len(rows[0]) == 1
    assert all(x + entry.width(14) <= width + 2.5 * 14 for row in rows for x, entry in row)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (30, 20_000), (5000, 3)])
def test_extreme_sizes(size):
    masks = np.ones((1, *size), dtype=bool)
    picture = draw(result_of(masks, labels=[2]), noise(size))
    assert picture.width >= 480


def test_names_are_text_and_not_markup():
    size = (200, 800)
    masks = grid(3, size, 100)
    picture = draw(result_of(masks, labels=[0, 1, 2]), noise(size))
    assert picture.height > 200


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((40, 61, 3), dtype=np.uint8), r"shape \(40, 60, 3\), got uint8 of shape \(40, 61, 3\)"),
        (np.zeros((40, 60), dtype=np.uint8), r"got uint8 of shape \(40, 60\)"),
        (np.zeros((40, 60, 3)), r"got float64 of shape \(40, 60, 3\)"),
    ],
)
def test_another_image_is_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        draw(result_of(grid(1, (40, 60), 10)), image)
