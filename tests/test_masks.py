"""Small masks are what planes are, pixel for pixel, and stay small."""

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from a2fpn.masks import InstanceMasks, nearest_pixels

side = st.integers(1, 23)
quick = settings(deadline=None, max_examples=60)


@st.composite
def planes(draw: st.DrawFn) -> Tensor:
    """Some sparse masks, (N, H, W) uint8; some have holes, some no pixel at all."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    count, height, width = draw(st.integers(0, 4)), draw(side), draw(side)
    masks = (torch.rand(count, height, width) < 0.4).to(torch.uint8)
    for mask in masks:
        top, left = int(torch.randint(height, ())), int(torch.randint(width, ()))
        mask[:top], mask[:, :left] = 0, 0
    return masks


@quick
@given(planes())
def test_planes_come_back(masks: Tensor) -> None:
    small = InstanceMasks.from_dense(masks)
    assert small.shape == tuple(masks.shape)
    assert len(small) == len(masks)
    assert small.pixels.dtype == torch.uint8
    assert torch.equal(small.dense(), masks)
    assert torch.equal(small.areas(), masks.flatten(1).sum(1))
    for (x0, y0, x1, y1), mask in zip(small.windows.tolist(), masks, strict=True):
        ys, xs = mask.nonzero().unbind(1)
        assert (x0, y0, x1, y1) == ((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(ys) else (0, 0, 0, 0))


@pytest.mark.parametrize("convert", [Tensor.bool, Tensor.float, lambda x: 255 * x, tv_tensors.Mask])
def test_every_value_but_zero_belongs_to_the_object(convert: Callable[[Tensor], Tensor]) -> None:
    eye = torch.eye(5, dtype=torch.uint8)[None, :3]
    small = InstanceMasks.from_dense(convert(eye))
    assert type(small.pixels) is Tensor
    assert torch.equal(small.dense(), eye)


def test_what_has_no_three_dimensions_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(N, H, W\), got \(3, 4\)"):
        InstanceMasks.from_dense(torch.ones(3, 4))


@quick
@given(planes(), st.data())
def test_moves_are_those_of_the_planes(masks: Tensor, data: st.DataObject) -> None:
    small, size = InstanceMasks.from_dense(masks), tuple(masks.shape[1:])
    top, left = (data.draw(st.integers(0, n - 1)) for n in size)
    height, width = (data.draw(st.integers(1, n - start)) for n, start in zip(size, (top, left), strict=True))
    cropped, part = small.crop(top, left, height, width), masks[:, top : top + height, left : left + width]
    assert torch.equal(cropped.dense(), part)
    new = (data.draw(side), data.draw(side))
    rows, columns = (nearest_pixels(n, old) for n, old in zip(new, (height, width), strict=True))
    resized = cropped.resize(new)
    assert resized.size == new
    assert torch.equal(resized.dense(), part[:, rows][:, :, columns])
    for axis in (0, 1):
        assert torch.equal(resized.flip(axis).dense(), resized.dense().flip(2 - axis))
    assert torch.equal(resized.rotate90().dense(), resized.dense().rot90(dims=(1, 2)))
    tight = resized.tight()
    assert torch.equal(tight.dense(), resized.dense())
    assert torch.equal(tight.windows, InstanceMasks.from_dense(resized.dense()).windows)


@quick
@given(planes(), st.data())
def test_objects_are_chosen_and_joined(masks: Tensor, data: st.DataObject) -> None:
    small = InstanceMasks.from_dense(masks)
    keep = torch.tensor([data.draw(st.booleans()) for _ in masks], dtype=torch.bool)
    assert torch.equal(small[keep].dense(), masks[keep])
    order = torch.tensor(data.draw(st.permutations(range(len(masks)))), dtype=torch.int64)
    assert torch.equal(small[order].dense(), masks[order])
    assert torch.equal((small[keep] + small[~keep]).dense(), torch.cat([masks[keep], masks[~keep]]))


def test_only_masks_of_one_size_can_be_joined() -> None:
    small = InstanceMasks.from_dense(torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match=r"images of \(3, 4\) and \(4, 3\) pixels can't be joined"):
        small + small.rotate90()


def test_they_travel() -> None:
    small = InstanceMasks.from_dense(torch.eye(9)[None])
    for other in (pickle.loads(pickle.dumps(small)), small.to("cpu"), small.to(torch.device("cpu"), non_blocking=True)):
        assert torch.equal(other.dense(), small.dense())
    assert small.to("meta").pixels.device.type == "meta"


def test_a_new_pixel_takes_the_old_one_under_its_center() -> None:
    assert nearest_pixels(2, 4).tolist() == [1, 3]
    assert nearest_pixels(3, 3).tolist() == [0, 1, 2]
    assert nearest_pixels(5, 2).tolist() == [0, 0, 1, 1, 1]


@quick
@given(planes(), st.tuples(side, side))
def test_at_the_corner_it_is_torchs_nearest(masks: Tensor, size: tuple[int, int]) -> None:
    masks = torch.cat([masks, torch.ones_like(masks).sum(0, keepdim=True).clamp(max=1)])  # torch wants one at least
    expected = torch.nn.functional.interpolate(masks[None].float(), size=size, mode="nearest")[0]
    assert torch.equal(InstanceMasks.from_dense(masks).resize(size, at=0.0).dense(), expected.to(torch.uint8))


def test_the_image_may_grow_and_the_masks_do_not() -> None:
    planes = torch.zeros(40, 60, 60, dtype=torch.bool)
    planes[:, 10:20, 30:35] = True
    large = torch.nn.functional.pad(planes, (0, 600, 0, 600))
    sizes = [len(pickle.dumps(InstanceMasks.from_dense(x))) for x in (planes, large)]
    assert abs(sizes[1] - sizes[0]) < 32
    assert sizes[0] < 40 * (50 + 32) + 1500
