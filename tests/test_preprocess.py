import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a2fpn.config import PreprocessConfig
from a2fpn.masks import InstanceMasks
from a2fpn.preprocess import Preprocess, resize_boxes, resize_target

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def rule(resize: str, min_size: int = 800, max_size: int = 1333, **options: object) -> Preprocess:
    return Preprocess(PreprocessConfig(resize=resize, min_size=min_size, max_size=max_size, **options), divisor=32)


side = st.integers(1, 5000)
limits = st.tuples(st.integers(1, 2000), st.integers(1, 2000)).map(sorted)


@settings(deadline=None)
@given(side, side, limits, st.sampled_from(["shortest_edge", "at_least", "none"]))
def test_aspect_is_kept_and_limits_are_obeyed(height: int, width: int, limits: list[int], resize: str) -> None:
    minimum, maximum = limits
    size = rule(resize, minimum, maximum).target_size(height, width)
    short, long = sorted((height, width))
    new_short, new_long = sorted(size)
    assert new_short >= 1
    assert abs(new_short - short * new_long / long) <= 1
    if resize == "none":
        assert size == (height, width)
        return
    assert new_long <= maximum
    if resize == "shortest_edge":
        assert new_short == minimum or new_long == maximum
    elif short >= minimum and long <= maximum:
        assert size == (height, width)
    elif new_short > short:
        # It enlarges for the short side alone, and shrinks for the long side alone.
        assert new_short == minimum or new_long == maximum
    else:
        assert new_long == maximum


@settings(deadline=None)
@given(side, side, limits, st.sampled_from(["shortest_edge", "at_least", "none"]))
def test_a_turned_image_becomes_a_turned_image(height: int, width: int, limits: list[int], resize: str) -> None:
    preprocess = rule(resize, *limits)
    assert preprocess.target_size(height, width) == preprocess.target_size(width, height)[::-1]


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("shortest_edge", (480, 640), (800, 1066)),
        ("shortest_edge", (480, 1000), (639, 1333)),
        ("shortest_edge", (1600, 2000), (800, 1000)),
        ("shortest_edge", (97, 104), (800, 857)),
        ("shortest_edge", (1, 1), (800, 800)),
        ("shortest_edge", (20000, 30), (1333, 1)),
        ("at_least", (480, 640), (800, 1066)),
        ("at_least", (900, 1300), (900, 1300)),
        ("at_least", (1333, 2666), (666, 1333)),
        ("at_least", (20000, 30), (1333, 1)),
        ("none", (20000, 30), (20000, 30)),
    ],
)
def test_target_sizes(resize: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert rule(resize).target_size(*size) == expected


def test_the_short_side_is_exact_at_every_size() -> None:
    # 800 / 97 * 97 is 799.99... in floating point.
    preprocess = rule("shortest_edge", 800, 32_768)
    assert {min(preprocess.target_size(n, n + 7)) for n in range(1, 2000)} == {800}


@pytest.mark.parametrize("size", [(1, 1), (20000, 30), (33, 47)])
@pytest.mark.parametrize("resize", ["shortest_edge", "at_least"])
def test_any_image_becomes_a_batch(size: tuple[int, int], resize: str) -> None:
    preprocess = rule(resize, 16, 200)
    batch = preprocess([torch.rand(3, *size)])
    assert batch.sizes == [preprocess.target_size(*size)]
    assert batch.original_sizes == [size]
    assert batch.tensor.shape[-2:] == tuple(-(-s // 32) * 32 for s in batch.sizes[0])
    assert batch.tensor.isfinite().all()


def test_images_are_normalized_and_padded_with_zeros() -> None:
    images = [torch.rand(3, 40, 50), torch.rand(3, 33, 60)]
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    batch = rule("none", mean=mean, std=std)(images)
    assert batch.tensor.shape == (2, 3, 64, 64)
    assert batch.tensor.dtype == torch.float32
    assert batch.sizes == batch.original_sizes == [(40, 50), (33, 60)]
    for row, image, (height, width) in zip(batch.tensor, images, batch.sizes, strict=True):
        expected = torch.stack([(c - m) / s for c, m, s in zip(image, mean, std, strict=True)])
        torch.testing.assert_close(row[:, :height, :width], expected)
        assert not row[:, height:].any()
        assert not row[:, :, width:].any()


@pytest.mark.parametrize("resize", ["shortest_edge", "none"])
def test_bytes_are_255ths(resize: str) -> None:
    image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8)
    preprocess = rule(resize, 32, 64)
    torch.testing.assert_close(preprocess([image]).tensor, preprocess([image.float() / 255]).tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_will_do(dtype: torch.dtype) -> None:
    image = torch.rand(3, 20, 31).to(dtype)
    batch = rule("shortest_edge", 32, 64)([image])
    assert batch.tensor.dtype == torch.float32
    assert torch.equal(batch.tensor, rule("shortest_edge", 32, 64)([image.float()]).tensor)


def test_images_stay_as_they_were() -> None:
    image = torch.rand(3, 20, 31)
    copy = image.clone()
    rule("shortest_edge", 32, 64)([image])
    assert torch.equal(image, copy)


def test_an_image_is_the_same_alone_and_among_others() -> None:
    preprocess = rule("shortest_edge", 32, 64)
    images = [torch.rand(3, 20, 31), torch.rand(3, 50, 17), torch.rand(3, 32, 32)]
    together = preprocess(images)
    for i, image in enumerate(images):
        alone = preprocess([image])
        height, width = alone.sizes[0]
        assert together.sizes[i] == (height, width)
        assert torch.equal(together.tensor[i, :, :height, :width], alone.tensor[0, :, :height, :width])


def test_resized_images_are_not_resized_again() -> None:
    batch = rule("shortest_edge", 64, 64, **PLAIN)([image := torch.rand(3, 20, 31)], resize=False)
    assert batch.sizes == [(20, 31)]
    assert torch.equal(batch.tensor[0, :, :20, :31], image)


@pytest.mark.parametrize(("given", "divisor"), [(None, 32), (48, 48)])
def test_the_divisor_is_the_models_unless_given(given: int | None, divisor: int) -> None:
    preprocess = rule("none", size_divisor=given)
    assert preprocess.divisor == divisor
    assert preprocess([torch.rand(3, 50, 50)]).tensor.shape[-2:] == (-(-50 // divisor) * divisor,) * 2


def test_any_number_of_channels() -> None:
    preprocess = rule("none", mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(preprocess([torch.ones(1, 32, 32)]).tensor, torch.full((1, 1, 32, 32), 2.0))


def test_statistics_are_no_part_of_the_weights() -> None:
    preprocess = rule("none")
    assert preprocess.state_dict() == {}
    assert preprocess.to(torch.device("meta")).mean.device.type == "meta"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 8, 8), r"Expected an image \(3, H, W\) with H, W >= 1, got \(1, 8, 8\)"),
        (torch.rand(8, 8, 3), r"Expected an image \(3, H, W\) .* got \(8, 8, 3\)"),
        (torch.rand(8, 8), r"Expected an image \(3, H, W\) .* got \(8, 8\)"),
        (torch.rand(2, 3, 8, 8), r"Expected an image \(3, H, W\) .* got \(2, 3, 8, 8\)"),
        (torch.rand(3, 0, 8), r"Expected an image \(3, H, W\) .* got \(3, 0, 8\)"),
    ],
)
def test_images_of_another_shape_are_an_error(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule("none")([image])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_images_of_another_dtype_are_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"float image in \[0, 1\] or a uint8 image in \[0, 255\], got {dtype}"):
        rule("none")([torch.ones(3, 8, 8).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_images_beyond_the_unit_range_are_an_error(dtype: torch.dtype) -> None:
    ramp = torch.linspace(0, 1, 192).view(3, 8, 8).to(dtype)
    rule("none")([ramp])
    message = r"float image in \[0, 1\] or a uint8 image in \[0, 255\], got .* values from"
    for wrong in (ramp * 255, ramp - 0.5, (ramp - 0.45) / 0.225, ramp + float("inf"), ramp * float("nan")):
        with pytest.raises(ValueError, match=message):
            rule("none")([wrong])
    # A bicubic resize goes beyond by itself.
    rule("none")([ramp * 1.4 - 0.2], resize=False)
    with pytest.raises(ValueError, match="values from"):
        rule("none")([ramp * 255], resize=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "Expected 1 <= min_size <= max_size, got 0 and 1333"),
        ({"min_size": 2000}, "Expected 1 <= min_size <= max_size, got 2000 and 1333"),
        ({"std": (1.0, 0.0, 1.0)}, "one positive std per channel"),
        ({"mean": (0.0, 0.0)}, "one positive std per channel"),
    ],
)
def test_rules_that_make_no_sense_are_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule("none", **options)


# Targets follow the image.


@given(st.tuples(side, side), st.tuples(side, side))
def test_boxes_go_there_and_back(old: tuple[int, int], new: tuple[int, int]) -> None:
    boxes = torch.tensor([[0.0, 0.0, old[1], old[0]], [0.0, 0.0, old[1] / 2, old[0] / 4]], dtype=torch.float64)
    moved = resize_boxes(boxes, old, new)
    torch.testing.assert_close(moved[0], torch.tensor([0.0, 0.0, new[1], new[0]], dtype=torch.float64))
    torch.testing.assert_close(resize_boxes(moved, new, old), boxes)


def test_a_target_follows_its_image() -> None:
    planes = torch.zeros(1, 4, 6, dtype=torch.uint8)
    planes[0, :2, :3] = 1
    masks = InstanceMasks.from_dense(planes)
    target = {"boxes": torch.tensor([[0.0, 0.0, 3.0, 2.0]]), "labels": torch.tensor([2]), "masks": masks}
    boxes = target["boxes"].clone()
    resized = resize_target(target, (4, 6), (8, 18))
    assert resized["boxes"].tolist() == [[0.0, 0.0, 9.0, 4.0]]
    assert resized["labels"] is target["labels"]
    expected = torch.zeros(1, 8, 18, dtype=torch.uint8)
    expected[0, :4, :9] = 1
    assert torch.equal(resized["masks"].dense(), expected)
    assert torch.equal(target["boxes"], boxes)
    assert torch.equal(masks.dense(), planes)


def test_a_target_without_objects_follows_its_image() -> None:
    masks = InstanceMasks.from_dense(torch.zeros(0, 4, 6))
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks}
    resized = resize_target(target, (4, 6), (8, 18))
    assert {key: tuple(value.shape) for key, value in resized.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 8, 18),
    }


def test_a_target_of_the_right_size_is_a_copy() -> None:
    target = {"boxes": torch.ones(1, 4)}
    same = resize_target(target, (4, 6), (4, 6))
    assert same == target
    assert same is not target
