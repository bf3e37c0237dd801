import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2fpn.pyramid import LevelSpec, PyramidSpec, check_features, level_name, level_size
from tests.helpers import pyramid_spec, random_features


def test_a_spec_is_an_ordered_mapping() -> None:
    spec = PyramidSpec.from_channels([64, 128, 256], strides=[4, 8, 16], prefix="p")
    assert spec.names == ("p2", "p3", "p4")
    assert spec.channels == (64, 128, 256)
    assert spec.strides == (4, 8, 16)
    assert len(spec) == 3
    assert spec["p3"] == LevelSpec(channels=128, stride=8)
    assert "p5" not in spec


def test_specs_are_equal_by_value_and_survive_copies() -> None:
    spec = pyramid_spec()
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert spec != pyramid_spec(3)


def test_a_spec_does_not_follow_its_source() -> None:
    levels = {"c2": LevelSpec(8, 4)}
    spec = PyramidSpec(levels)
    levels["c3"] = LevelSpec(8, 8)
    assert spec.names == ("c2",)


@pytest.mark.parametrize("strides", [[8, 4], [4, 4, 2], [4, 16, 8]])
def test_strides_must_not_decrease(strides: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must not decrease from level to level, got \["):
        PyramidSpec({str(i): LevelSpec(8, stride) for i, stride in enumerate(strides)})


def test_a_spec_needs_a_level() -> None:
    with pytest.raises(ValueError, match="at least one level"):
        PyramidSpec({})


def test_levels_of_one_stride_are_told_apart() -> None:
    spec = PyramidSpec.from_channels([8, 16, 32, 64], strides=[16, 32, 32, 32])
    assert spec.names == ("c4", "c5", "c5b", "c5c")
    assert spec.strides == (16, 32, 32, 32)


def test_channels_and_strides_must_have_one_count() -> None:
    with pytest.raises(ValueError, match=r"3 channel counts were given for 4 strides \[4, 8, 16, 32\]"):
        PyramidSpec.from_channels([1, 2, 3])


@given(st.integers(0, 12), st.sampled_from("cp"))
def test_a_name_says_the_stride(exponent: int, prefix: str) -> None:
    assert level_name(prefix, 2**exponent) == f"{prefix}{exponent}"


@given(st.integers(-8, 4096).filter(lambda n: n < 1 or n.bit_count() != 1))
def test_only_powers_of_two_have_a_name(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"power of two of their stride, got stride {stride}\."):
        level_name("p", stride)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_level_size_is_that_of_a_subsampled_image(height: int, width: int, stride: int) -> None:
    assert level_size((height, width), stride) == torch.empty(height, width)[::stride, ::stride].shape


def test_features_as_declared_pass() -> None:
    check_features(random_features(pyramid_spec(), (65, 97)), pyramid_spec())


def test_names_count_and_order_are_checked() -> None:
    spec = pyramid_spec(2)
    maps = random_features(spec, (32, 32))
    expected = r"Expected feature maps named \['c2', 'c3'\] in this order, got "
    with pytest.raises(ValueError, match=expected + r"\['c3', 'c2'\]"):
        check_features(dict(reversed(maps.items())), spec)
    with pytest.raises(ValueError, match=expected + r"\['c2'\]"):
        check_features({"c2": maps["c2"]}, spec)
    with pytest.raises(ValueError, match=expected + r"\['c2', 'c3', 'c4'\]"):
        check_features({**maps, "c4": maps["c3"]}, spec)
    with pytest.raises(ValueError, match=expected + r"\['c2', 'p3'\]"):
        check_features({"c2": maps["c2"], "p3": maps["c3"]}, spec)


@pytest.mark.parametrize(
    ("shape", "got"), [((2, 13, 4, 4), r"\(2, 13, 4, 4\)"), ((12, 4, 4), r"\(12, 4, 4\)"), ((2, 12), r"\(2, 12\)")]
)
def test_shapes_are_checked(shape: tuple[int, ...], got: str) -> None:
    spec = pyramid_spec(2)
    with pytest.raises(ValueError, match=rf"Level c3: expected a map \(B, 12, H, W\), got {got}"):
        check_features({**random_features(spec, (32, 32)), "c3": torch.zeros(shape)}, spec)


def test_batch_sizes_are_checked() -> None:
    spec = pyramid_spec(2)
    with pytest.raises(ValueError, match=r"same batch size, got \{'c2': 2, 'c3': 3\}"):
        check_features({**random_features(spec, (32, 32)), "c3": torch.zeros(3, 12, 4, 4)}, spec)
