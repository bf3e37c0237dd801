import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers import reassemble
from a2fpn.layers.reassemble import PADDINGS, _index_dtype, _reassemble_by_shifts
from tests.helpers import largest_difference

SIZES = {
    "double": ((5, 7), (10, 14)),
    "one less": ((5, 7), (9, 13)),
    "one more": ((5, 7), (11, 15)),
    "double in one direction": ((5, 7), (10, 7)),
    "half": ((10, 14), (5, 7)),
    "half, rounded up": ((9, 13), (5, 7)),
    "half, rounded down": ((9, 13), (4, 6)),
    "equal": ((5, 7), (5, 7)),
    "one pixel to one": ((1, 1), (1, 1)),
    "one pixel to two": ((1, 1), (2, 2)),
    "one pixel to many": ((1, 1), (3, 5)),
    "many to one pixel": ((3, 5), (1, 1)),
    "one row": ((1, 6), (2, 12)),
    "anything": ((4, 9), (7, 5)),
}
sizes = pytest.mark.parametrize(("source", "target"), SIZES.values(), ids=SIZES)
sides = pytest.mark.parametrize("k", [1, 3, 5])
paddings = pytest.mark.parametrize("padding", PADDINGS)
VECTORS = Path(__file__).parent / "vectors" / "mmcv_carafe.safetensors"
"""Numbers that mmcv stores for its own test (tests/data/for_carafe, Apache-2.0): the second of two images, the second
of four groups of channels."""


def random_kernels(k: int, size: tuple[int, int], *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, k * k, *size, dtype=dtype).softmax(1)


def naive(x: Tensor, kernels: Tensor, size: tuple[int, int], *, padding: str = "replicate") -> Tensor:
    """Every window of every source pixel by unfold, then the nearest source pixel of each target pixel."""
    (b, c, h, w), k = x.shape, round(kernels.shape[1] ** 0.5)
    mode = "constant" if padding == "zeros" else padding
    windows = F.unfold(F.pad(x, (k // 2,) * 4, mode=mode), k).reshape(b, c, k * k, h, w)
    rows = torch.tensor([i * h // size[0] for i in range(size[0])])
    columns = torch.tensor([j * w // size[1] for j in range(size[1])])
    return (windows[..., rows, :][..., columns] * kernels[:, None]).sum(2)


@paddings
@sides
@sizes
def test_equals_unfold(source: tuple[int, int], target: tuple[int, int], k: int, padding: str) -> None:
    x = torch.randn(2, 3, *source, dtype=torch.float64, requires_grad=True)
    # Any weights will do, not only such that sum to one.
    kernels = torch.randn(2, k * k, *target, dtype=torch.float64, requires_grad=True)
    results = [function(x, kernels, target, padding=padding) for function in (reassemble, naive)]
    assert results[0].shape == (2, 3, *target)
    assert largest_difference(results[:1], results[1:]) < 1e-12
    direction = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, (x, kernels), direction) for result in results]
    assert largest_difference(*gradients) < 1e-12


@sides
@sizes
def test_shifts_equal_the_bags(source: tuple[int, int], target: tuple[int, int], k: int) -> None:
    x, kernels = torch.randn(2, 3, *source, dtype=torch.float64), random_kernels(k, target)
    assert largest_difference([_reassemble_by_shifts(x, kernels, k)], [reassemble(x, kernels, target)]) < 1e-12


def test_equals_mmcv() -> None:
    stored = load_file(VECTORS)
    x, kernels = stored["x"].requires_grad_(), stored["kernels"].requires_grad_()
    out = reassemble(x, kernels, (6, 6), padding="zeros")
    gradients = torch.autograd.grad(out.sum(), (x, kernels))
    torch.testing.assert_close(out, stored["output"], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients[0], stored["grad_x"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], stored["grad_kernels"], rtol=1e-6, atol=1e-6)
    assert (reassemble(x, kernels, (6, 6)) - out).abs().max() > 0.1  # another padding is another function


@paddings
@pytest.mark.parametrize("target", [(4, 6), (3, 5), (1, 2)])
def test_gradcheck(target: tuple[int, int], padding: str) -> None:
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    kernels = random_kernels(3, target, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, kernels: reassemble(x, kernels, target, padding=padding), (x, kernels))


@pytest.mark.parametrize(("pixels", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_pixels_are_counted_in_as_few_bits_as_will_do(
    pixels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _index_dtype(5, pixels) == _index_dtype(pixels, 5) == dtype
    x, kernels = torch.randn(2, 3, 5, 7, requires_grad=True), random_kernels(3, (9, 13), dtype=torch.float32)
    expected = reassemble(x, kernels, (9, 13))
    monkeypatch.setattr(sys.modules[_index_dtype.__module__], "_index_dtype", lambda *counts: dtype)
    got = reassemble(x, kernels, (9, 13))
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))


@pytest.mark.parametrize("size", [(10, 14), (9, 13)])
def test_one_hot_kernels_are_nearest_interpolation(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 5, 7)
    center = torch.zeros(2, 25, *size)
    center[:, 12] = 1
    assert torch.equal(reassemble(x, center, size), F.interpolate(x, size=size, mode="nearest"))


def test_one_hot_kernels_off_the_center_shift_and_repeat_the_edge() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    left = torch.zeros(1, 9, 3, 4)
    left[:, 3] = 1
    assert torch.equal(reassemble(x, left, (3, 4))[0, 0], torch.stack([x[0, 0, :, j] for j in (0, 0, 1, 2)], 1))


side = st.integers(1, 6)


@settings(deadline=None, max_examples=40)
@given(h=side, w=side, height=side, width=side, k=st.sampled_from([1, 3, 5]), value=st.floats(-100, 100))
def test_kernels_that_sum_to_one_keep_a_constant_map(
    h: int, w: int, height: int, width: int, k: int, value: float
) -> None:
    x = torch.full((1, 2, h, w), value, dtype=torch.float64)
    out = reassemble(x, random_kernels(k, (height, width), batch=1), (height, width))
    torch.testing.assert_close(out, torch.full_like(out, value), rtol=1e-12, atol=1e-12)


def test_inputs_stay_as_they_were_and_any_memory_format_does() -> None:
    x, kernels = torch.randn(2, 3, 5, 7, dtype=torch.float64), random_kernels(5, (10, 14))
    copies = x.clone(), kernels.clone()
    out = reassemble(x, kernels, (10, 14))
    last = [y.contiguous(memory_format=torch.channels_last) for y in (x, kernels)]
    assert largest_difference([out], [reassemble(*last, (10, 14))]) < 1e-12
    assert largest_difference((x, kernels), copies) == 0


def test_the_result_has_the_dtype_of_the_map() -> None:
    x, kernels = torch.randn(2, 3, 5, 7), random_kernels(3, (10, 14), dtype=torch.float32)
    out = reassemble(x.bfloat16(), kernels, (10, 14))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reassemble(x, kernels, (10, 14)), rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [(10, 14), (9, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_under_autocast(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, kernels = torch.randn(2, 3, 5, 7, requires_grad=True), random_kernels(3, size, dtype=torch.float32)
    kernels.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = reassemble(x.to(dtype), kernels, size)
        gradients = torch.autograd.grad(out.float().sum(), (x, kernels))
    assert out.dtype == dtype
    expected = naive(x, kernels, size)
    expected_gradients = torch.autograd.grad(expected.sum(), (x, kernels))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.1)


class Upsample(nn.Module):
    def __init__(self, padding: str = "replicate") -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        return reassemble(x, kernels, (kernels.shape[-2], kernels.shape[-1]), padding=self.padding)


@paddings
def test_compiles_without_a_graph_break(padding: str) -> None:
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    kernels = random_kernels(3, (7, 11), batch=1)
    compiled = torch.compile(Upsample(padding), backend="eager", fullgraph=True)(x, kernels)
    expected = reassemble(x, kernels, (7, 11), padding=padding)
    assert largest_difference([compiled], [expected]) < 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), x) for y in (compiled, expected)]
    assert largest_difference(*gradients) < 1e-12


@paddings
def test_exports(padding: str) -> None:
    x, kernels = torch.randn(1, 3, 4, 6), random_kernels(3, (8, 12), batch=1, dtype=torch.float32)
    program = torch.export.export(Upsample(padding), (x, kernels))
    torch.testing.assert_close(program.module()(x, kernels), reassemble(x, kernels, (8, 12), padding=padding))


@pytest.mark.parametrize(
    ("channels", "size", "batch", "message"),
    [
        (8, (4, 4), 1, r"k \* k channels with an odd k \(9, 25, 49\), got 8\."),
        (4, (4, 4), 1, r"k \* k channels with an odd k \(9, 25, 49\), got 4\."),
        (9, (4, 5), 1, r"Expected kernels \(1, 9, 4, 4\), got \(1, 9, 4, 5\)\."),
        (9, (4, 4), 2, r"Expected kernels \(1, 9, 4, 4\), got \(2, 9, 4, 4\)\."),
    ],
)
def test_kernels_that_do_not_fit_are_an_error(channels: int, size: tuple[int, int], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reassemble(torch.zeros(1, 3, 2, 2), torch.zeros(batch, channels, *size), (4, 4))


def test_an_unknown_padding_is_an_error() -> None:
    with pytest.raises(ValueError, match="Unknown padding='reflect'; expected one of replicate, zeros"):
        reassemble(torch.zeros(1, 3, 2, 2), torch.zeros(1, 9, 4, 4), (4, 4), padding="reflect")
