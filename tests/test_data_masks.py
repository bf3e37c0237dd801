import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_utils
from torchvision.models.detection.roi_heads import paste_masks_in_image

from a2fpn.data.masks import decode_rle, encode_box_masks, encode_masks, segmentation_to_rle
from a2fpn.heads.paste import PASTE_RULES, paste_masks

some_masks = hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=12))


@settings(deadline=None)
@given(some_masks)
def test_masks_survive_encoding_and_are_pycocotools_own(masks):
    rles = encode_masks(masks)
    assert (decode_rle(rles) == masks).all()
    assert (mask_utils.decode(rles).transpose(2, 0, 1) == masks).all()
    assert encode_masks(torch.from_numpy(masks)) == rles


def test_long_runs_and_large_images_survive():
    masks = np.zeros((3, 3000, 700), dtype=bool)
    masks[0], masks[1, 7:2990, 3:650] = True, True
    assert (decode_rle(encode_masks(masks)) == masks).all()


def test_no_masks():
    assert encode_masks(np.zeros((0, 4, 5))) == []
    assert decode_rle([], size=(4, 5)).shape == (0, 4, 5)
    assert encode_box_masks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (4, 5)) == []


def test_masks_without_three_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"\(N, H, W\), got \(4, 5\)"):
        encode_masks(np.zeros((4, 5)))


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.5, 0.9]),
    solid=st.booleans(),
    rule=st.sampled_from(PASTE_RULES),
)
def test_box_masks_are_encoded_as_pasted(seed, height, width, threshold, solid, rule):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(4, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat((corner, corner + torch.rand(4, 2, generator=generator) * 40), dim=1)
    boxes = torch.minimum(boxes, torch.tensor([width, height] * 2))
    masks = torch.ones(4, 1, 28, 28) if solid else torch.rand(4, 1, 28, 28, generator=generator)
    pasted = paste_masks(masks, boxes, (height, width), rule=rule)
    if rule == "torchvision":
        assert torch.equal(pasted, paste_masks_in_image(masks, boxes, (height, width)))
    encoded = encode_box_masks(masks, boxes, (height, width), threshold=threshold, rule=rule)
    assert encoded == encode_masks(pasted[:, 0] > threshold)


@pytest.mark.parametrize("rule", PASTE_RULES)
def test_boxes_over_the_border_are_cut_and_boxes_outside_give_nothing(rule):
    boxes = torch.tensor([[-10.0, -10, 5, 5], [30, 5, 40, 9], [-30, 5, -20, 9], [5, 30, 9, 40], [2, -9, 4, -3]])
    ones = torch.ones(5, 1, 28, 28)
    masks = decode_rle(encode_box_masks(ones, boxes, (20, 20), rule=rule))
    assert masks[0, 0, 0]
    assert masks[0].sum() == 25
    assert not masks[1:].any()


def test_exact_pasting_samples_pixel_centres():
    """A mask linear in the image's coordinates comes back as that function at the centres of the pixels."""
    x0, y0, x1, y1 = 3.3, 2.6, 17.9, 12.2
    cells = (torch.arange(28, dtype=torch.float64) + 0.5) / 28
    mask = 0.01 * (x0 + cells * (x1 - x0)) + 0.02 * (y0 + cells[:, None] * (y1 - y0))
    pasted = paste_masks(mask[None, None], torch.tensor([[x0, y0, x1, y1]]), (20, 20))[0, 0]
    centres = torch.arange(20, dtype=torch.float64) + 0.5
    expected = 0.01 * centres + 0.02 * centres[:, None]
    inside = (centres > x0) & (centres < x1) & ((centres > y0) & (centres < y1))[:, None]
    assert (pasted[~inside] == 0).all()
    # Within half a cell of the box's edge the outermost cell is repeated.
    torch.testing.assert_close(pasted[inside], expected[inside].to(pasted.dtype), atol=0.006, rtol=0)
    torch.testing.assert_close(pasted[4:11, 5:16], expected[4:11, 5:16].to(pasted.dtype), atol=1e-7, rtol=0)


def test_unknown_paste_rule_is_an_error():
    with pytest.raises(ValueError, match="Unknown rule to paste masks 'nearest'; expected one of exact, torchvision"):
        encode_box_masks(torch.zeros(1, 1, 28, 28), torch.zeros(1, 4), (9, 9), rule="nearest")


def test_box_masks_reject_wrong_shapes_and_thresholds():
    with pytest.raises(ValueError, match=r"masks must be .* got \(2, 28, 28\) and \(2, 4\)"):
        encode_box_masks(torch.zeros(2, 28, 28), torch.zeros(2, 4), (9, 9))
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\), got 1"):
        encode_box_masks(torch.zeros(2, 1, 28, 28), torch.zeros(2, 4), (9, 9), threshold=1)


def test_several_polygons_are_one_mask():
    halves = [[0, 0, 2, 0, 2, 4, 0, 4], [4, 0, 6, 0, 6, 4, 4, 4]]
    expected = np.zeros((4, 6), dtype=bool)
    expected[:, [0, 1, 4, 5]] = True
    assert (decode_rle([segmentation_to_rle(halves, 4, 6)])[0] == expected).all()


@settings(deadline=None)
@given(some_masks)
def test_compressed_and_uncompressed_run_lengths_agree(masks):
    height, width = masks.shape[1:]
    for mask, rle in zip(masks, encode_masks(masks), strict=True):
        flat = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(flat, prepend=False))
        counts = [int(run) for run in np.diff(changes, prepend=0, append=flat.size)]
        assert segmentation_to_rle({"size": [height, width], "counts": counts}, height, width)["size"] == rle["size"]
        for given_counts in (counts, rle["counts"], rle["counts"].encode()):
            converted = segmentation_to_rle({"size": [height, width], "counts": given_counts}, height, width)
            assert (decode_rle([converted])[0] == mask).all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"list of polygons or an RLE, got \[\]"),
        (None, "list of polygons or an RLE, got None"),
        ("abc", "list of polygons or an RLE, got 'abc'"),
        ([[1, 1, 5, 5]], r"at least 3 points x, y, x, y, ..., got \[1, 1, 5, 5\]"),  # pycocotools: a box
        ([[1, 1, 5, 5, 2, 2, 7]], "at least 3 points"),
        ([[1, 1, "a", 5, 2, 2]], "at least 3 points"),
        ([1, 1, 5, 5, 2, 2], "at least 3 points x, y, x, y, ..., got 1"),
        ([[1, 1, float("nan"), 5, 2, 2]], "no pixel position"),
        ([[1, 1, 1e12, 5, 2, 2]], "no pixel position"),
        ([[1, 1, 10**400, 5, 2, 2]], "at least 3 points"),
        ({"size": [4, 5], "counts": "0"}, r"size is \[4, 5\], the image's \[height, width\] is \[5, 4\]"),
        ({"counts": "0"}, "size is None"),
        ({"size": [5, 4]}, "counts of an RLE are text or a list of run lengths, got None"),
        ({"size": [5, 4], "counts": [10, 5]}, "add up to 15 pixels, the image has 5 x 4 = 20"),
        ({"size": [5, 4], "counts": [30, -10]}, "counts of an RLE"),
        ({"size": [5, 4], "counts": [10, "10"]}, "counts of an RLE"),
        ({"size": [5, 4], "counts": ""}, "b'' are no compressed RLE"),
        ({"size": [5, 4], "counts": "0"}, "add up to 0 pixels"),
        ({"size": [5, 4], "counts": "é0"}, "no compressed RLE"),
        ({"size": [5, 4], "counts": "o"}, "no compressed RLE"),  # the text ends inside a number
        ({"size": [5, 4], "counts": "oooooooooo0"}, "no compressed RLE"),
        ({"size": [5, 4], "counts": "O"}, "negative run length"),
    ],
)
def test_broken_segmentations_are_errors(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle(segmentation, 5, 4)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_no_text_crashes_or_gives_a_mask_that_does_not_fill_the_image(text):
    try:
        rle = segmentation_to_rle({"size": [5, 4], "counts": text}, 5, 4)
    except ValueError:
        return
    assert (decode_rle([rle])[0] == mask_utils.decode(rle)).all()
