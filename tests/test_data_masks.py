import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as mask_utils
from torchvision.models.detection.roi_heads import paste_masks_in_image

from a2fpn.masks import rle as masks_module
from a2fpn.masks.paste import PASTE_RULES, paste_masks
from a2fpn.masks.rle import decode_rle, decode_window, encode_box_masks, encode_masks
from a2fpn.masks.segmentation import parse_segmentations, segmentation_to_rle

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


def test_exact_pasting_samples_pixel_centers():
    """A mask linear in the image's coordinates comes back as that function at the centers of the pixels."""
    x0, y0, x1, y1 = 3.3, 2.6, 17.9, 12.2
    cells = (torch.arange(28, dtype=torch.float64) + 0.5) / 28
    mask = 0.01 * (x0 + cells * (x1 - x0)) + 0.02 * (y0 + cells[:, None] * (y1 - y0))
    pasted = paste_masks(mask[None, None], torch.tensor([[x0, y0, x1, y1]]), (20, 20))[0, 0]
    centers = torch.arange(20, dtype=torch.float64) + 0.5
    expected = 0.01 * centers + 0.02 * centers[:, None]
    inside = (centers > x0) & (centers < x1) & ((centers > y0) & (centers < y1))[:, None]
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
        ([[1, 1, float("nan"), 5, 2, 2]], "not a valid pixel position"),
        ([[1, 1, 1e12, 5, 2, 2]], "not a valid pixel position"),
        ([[1, 1, 10**400, 5, 2, 2]], "at least 3 points"),
        ({"size": [4, 5], "counts": "0"}, r"size is \[4, 5\], the image's \[height, width\] is \[5, 4\]"),
        ({"counts": "0"}, "size is None"),
        ({"size": [5, 4]}, "counts of an RLE are text or a list of run lengths, got None"),
        ({"size": [5, 4], "counts": [10, 5]}, "add up to 15 pixels, the image has 5 x 4 = 20"),
        ({"size": [5, 4], "counts": [30, -10]}, "counts of an RLE"),
        ({"size": [5, 4], "counts": [10, "10"]}, "counts of an RLE"),
        ({"size": [5, 4], "counts": ""}, "b'' are not a compressed RLE"),
        ({"size": [5, 4], "counts": "0"}, "add up to 0 pixels"),
        ({"size": [5, 4], "counts": "é0"}, "not a compressed RLE"),
        ({"size": [5, 4], "counts": "o"}, "not a compressed RLE"),  # the text ends inside a number
        ({"size": [5, 4], "counts": "oooooooooo0"}, "not a compressed RLE"),
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


def runs_of(text):
    """The run lengths of a compressed mask, digit by digit; None if the text is damaged."""
    runs, value, place = [], 0, 0
    for digit in (character - 48 for character in text):
        if not 0 <= digit < 64 or place > 6:
            return None
        value |= (digit & 31) << 5 * place
        place += 1
        if not digit & 32:
            value -= 1 << 5 * place if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, place = 0, 0
    return runs if runs and not place else None


def complaint(text, height, width):
    """What has to be said about a compressed mask; None if it is sound."""
    runs = runs_of(text)
    if runs is None:
        return "are not a compressed RLE"
    if min(runs) < 0:
        return "hold a negative run length"
    if sum(runs) != height * width:
        return f"add up to {sum(runs)} pixels, the image has {height} x {width} = {height * width}"
    return None


def damaged(text, position, characters, skipped):
    position %= len(text) + 1
    return text[:position] + characters + text[position + skipped :]


sound_texts = hnp.arrays(bool, st.just((1, 6, 9))).map(lambda mask: encode_masks(mask)[0]["counts"].encode())
digits = st.integers(48, 111)
texts = st.one_of(
    sound_texts,
    st.builds(damaged, sound_texts, st.integers(0, 99), st.binary(max_size=2), st.integers(0, 2)),
    st.builds(damaged, sound_texts, st.integers(0, 99), st.lists(digits, max_size=8).map(bytes), st.integers(0, 2)),
    st.lists(digits, max_size=30).map(bytes),
    st.binary(max_size=10),
)


@pytest.mark.parametrize("characters", [1, 40, masks_module._PASS])
@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(texts, st.sampled_from([(6, 9), (9, 6), (1, 54), (5, 5)])), max_size=20))
def test_many_masks_are_checked_as_one_by_one_and_as_by_hand(characters, given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks_module, "_PASS", characters)
        found = parse_segmentations([({"size": list(size), "counts": text}, *size) for text, size in given])
    for mask, (text, size) in zip(found, given, strict=True):
        expected = complaint(text, *size)
        if expected is None:
            assert mask == {"size": list(size), "counts": text.decode()}
            assert (decode_rle([mask])[0] == mask_utils.decode(mask)).all()
        else:
            assert isinstance(mask, ValueError)
            assert expected in str(mask)
            assert "add up" in expected or repr(text)[:57] in str(mask)
            with pytest.raises(ValueError, match=f"^{re.escape(str(mask))}$"):
                segmentation_to_rle({"size": list(size), "counts": text}, *size)


@pytest.mark.parametrize(
    ("counts", "message"), [("o", "are not a compressed RLE"), ("O", "hold a negative run length")]
)
def test_broken_run_lengths_are_not_decoded(counts, message):
    sound, broken = encode_masks(np.eye(3)[None])[0], {"size": [3, 3], "counts": counts}
    with pytest.raises(ValueError, match=f"the counts b'{counts}' {message}"):
        decode_rle([sound, broken, sound])
    with pytest.raises(ValueError, match=f"the counts b'{counts}' {message}"):
        decode_window(broken)


def test_every_kind_of_segmentation_keeps_its_place():
    rle = encode_masks(np.eye(3)[None])[0]
    polygon = [[0, 0, 2, 0, 2, 2]]
    runs = {"size": [3, 3], "counts": [0, 1, 3, 1, 3, 1]}
    wrong = {"size": [3, 3], "counts": [1]}
    found = parse_segmentations([(s, 3, 3) for s in (rle, polygon, runs, wrong, {**rle, "counts": "é"}, rle)])
    assert found[0] == found[2] == found[5] == rle
    assert found[1].to_rle() == segmentation_to_rle(polygon, 3, 3)
    assert str(found[3]) == "the run lengths of the mask add up to 1 pixels, the image has 3 x 3 = 9"
    assert "not a compressed RLE" in str(found[4])
    assert parse_segmentations([]) == []


def test_the_sum_of_a_long_text_does_not_overflow():
    text = b"PPPPPP8" * (1 << 17)  # each run 2^33 longer than the one before the last
    total = sum(runs_of(text))
    assert total > 1 << 64
    (error,) = parse_segmentations([({"size": [1 << 16, 1 << 15], "counts": text}, 1 << 16, 1 << 15)])
    assert float(re.search(r"add up to (\d+) pixels", str(error)).group(1)) == pytest.approx(total, rel=1e-12)
