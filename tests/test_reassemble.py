import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers import CARAFE, GACAP, GACARAFE, reassemble
from a2fpn.layers.reassemble import ChannelGates, KernelPredictor, _narrowest, _reassemble_by_shifts
from tests.helpers import largest_difference, randomise, weighted_sum, with_zero_gradient

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


def random_kernels(k: int, size: tuple[int, int], *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, k * k, *size, dtype=dtype).softmax(1)


def naive(x: Tensor, kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """Every window of every source pixel by unfold, then the nearest source pixel of each target pixel."""
    (b, c, h, w), k = x.shape, round(kernels.shape[1] ** 0.5)
    windows = F.unfold(F.pad(x, (k // 2,) * 4, mode="replicate"), k).reshape(b, c, k * k, h, w)
    rows = torch.tensor([i * h // size[0] for i in range(size[0])])
    columns = torch.tensor([j * w // size[1] for j in range(size[1])])
    return (windows[..., rows, :][..., columns] * kernels[:, None]).sum(2)


@sides
@sizes
def test_equals_unfold(source: tuple[int, int], target: tuple[int, int], k: int) -> None:
    x = torch.randn(2, 3, *source, dtype=torch.float64, requires_grad=True)
    # Any weights will do, not only such that sum to one.
    kernels = torch.randn(2, k * k, *target, dtype=torch.float64, requires_grad=True)
    results = [function(x, kernels, target) for function in (reassemble, naive)]
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


@pytest.mark.parametrize("target", [(4, 6), (3, 5), (1, 2)])
def test_gradcheck(target: tuple[int, int]) -> None:
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    kernels = random_kernels(3, target, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, kernels: reassemble(x, kernels, target), (x, kernels))


@pytest.mark.parametrize(("pixels", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_pixels_are_counted_in_as_few_bits_as_will_do(
    pixels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _narrowest(5, pixels) == _narrowest(pixels, 5) == dtype
    x, kernels = torch.randn(2, 3, 5, 7, requires_grad=True), random_kernels(3, (9, 13), dtype=torch.float32)
    expected = reassemble(x, kernels, (9, 13))
    monkeypatch.setattr(sys.modules[_narrowest.__module__], "_narrowest", lambda *counts: dtype)
    got = reassemble(x, kernels, (9, 13))
    assert torch.equal(got, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))


@pytest.mark.parametrize("size", [(10, 14), (9, 13)])
def test_one_hot_kernels_are_nearest_interpolation(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 5, 7)
    centre = torch.zeros(2, 25, *size)
    centre[:, 12] = 1
    assert torch.equal(reassemble(x, centre, size), F.interpolate(x, size=size, mode="nearest"))


def test_one_hot_kernels_off_the_centre_shift_and_repeat_the_edge() -> None:
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
    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        return reassemble(x, kernels, (kernels.shape[-2], kernels.shape[-1]))


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    kernels = random_kernels(3, (7, 11), batch=1)
    compiled = torch.compile(Upsample(), backend="eager", fullgraph=True)(x, kernels)
    expected = reassemble(x, kernels, (7, 11))
    assert largest_difference([compiled], [expected]) < 1e-12
    gradients = [torch.autograd.grad(y.square().sum(), x) for y in (compiled, expected)]
    assert largest_difference(*gradients) < 1e-12


def test_exports() -> None:
    x, kernels = torch.randn(1, 3, 4, 6), random_kernels(3, (8, 12), batch=1, dtype=torch.float32)
    program = torch.export.export(Upsample(), (x, kernels))
    torch.testing.assert_close(program.module()(x, kernels), reassemble(x, kernels, (8, 12)))


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


# The modules around the op.


def test_fresh_kernels_are_close_to_the_nearest_pixel_and_can_learn() -> None:
    predictor = KernelPredictor(8, kernel_size=5, centre_bias=8.0)
    kernels = predictor(torch.randn(1, 8, 6, 7))
    torch.testing.assert_close(kernels.sum(1), torch.ones(1, 6, 7))
    assert (kernels[:, 12] > 0.98).all()
    assert (kernels > 0).all()
    weighted_sum([kernels]).backward()
    assert with_zero_gradient(predictor) == []


def test_kernels_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        kernels = KernelPredictor(8)(torch.randn(1, 8, 6, 7))
    assert kernels.dtype == torch.float32
    torch.testing.assert_close(kernels.sum(1), torch.ones(1, 6, 7))


def test_an_even_kernel_has_no_centre() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        KernelPredictor(8, kernel_size=4)


def test_fresh_gates_add() -> None:
    a, b = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 5, 7)
    assert torch.equal(ChannelGates(16)(a, b), a + b)


def test_gates_write_into_the_first_map_only_where_no_gradient_is_recorded() -> None:
    gates = ChannelGates(16)
    randomise(gates)
    a, b = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 5, 7)
    before = a.clone(), b.clone()
    expected = gates(a, b)
    assert torch.equal(a, before[0])
    with torch.no_grad():
        got = gates(a, b)
    assert got is a
    assert torch.equal(b, before[1])
    torch.testing.assert_close(got, expected)


def test_gates_lie_between_zero_and_two() -> None:
    gates = ChannelGates(16)
    randomise(gates, std=10)
    a = torch.ones(2, 16, 5, 7)
    out = gates(a, torch.zeros_like(a))
    assert out.min() >= 0
    assert out.max() <= 2
    assert out.std() > 0.1


def test_gates_do_not_see_padding() -> None:
    gates = ChannelGates(16).double()
    randomise(gates)
    a, b = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[1, :, 3:] = valid[1, :, :, 4:] = False
    a, b = (x.masked_fill(~valid, 1e4) for x in (a, b))
    got = gates(a, b, valid)
    assert largest_difference([got[:1]], [gates(a[:1], b[:1])]) < 1e-12
    assert largest_difference([got[1:, :, :3, :4]], [gates(a[1:, :, :3, :4], b[1:, :, :3, :4])]) < 1e-12


FUSIONS = {
    "CARAFE": (CARAFE, (5, 7), (9, 13)),
    "GACARAFE": (GACARAFE, (5, 7), (9, 13)),
    "GACAP": (GACAP, (9, 13), (5, 7)),
}
fusions = pytest.mark.parametrize(("fusion", "source", "target"), FUSIONS.values(), ids=FUSIONS)


@fusions
def test_fusions_have_the_size_of_their_target(
    fusion: type[nn.Module], source: tuple[int, int], target: tuple[int, int]
) -> None:
    module = fusion(16, compressed_channels=8, kernel_size=3)
    a, b = torch.randn(2, 16, *source), torch.randn(2, 16, *target)
    copies = a.clone(), b.clone()
    assert module(a, b).shape == b.shape
    assert largest_difference((a, b), copies) == 0


@fusions
def test_gradient_to_every_parameter_of_a_fusion(
    fusion: type[nn.Module], source: tuple[int, int], target: tuple[int, int]
) -> None:
    module = fusion(16, compressed_channels=8)
    randomise(module)
    weighted_sum([module(torch.randn(2, 16, *source), torch.randn(2, 16, *target))]).backward()
    assert with_zero_gradient(module) == []


@pytest.mark.parametrize("fusion", [CARAFE, GACARAFE])
def test_fresh_upsampling_is_close_to_nearest_and_addition(fusion: type[nn.Module]) -> None:
    coarse, fine = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 10, 14)
    expected = fine + F.interpolate(coarse, size=(10, 14), mode="nearest")
    assert ((fusion(16)(coarse, fine) - expected).square().mean() / expected.square().mean()).sqrt() < 0.3


def reads_the_target(module: nn.Module, source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the kernels, and with them what comes from the source, change with the target map."""
    a, b, change = (torch.randn(1, 16, *size) for size in (source, target, target))
    randomise(module)
    first, second = module(a, b), module(a, b + change)
    return bool((second - first - change).abs().max() > 1e-3)


def test_only_carafe_makes_its_kernels_from_the_source_alone() -> None:
    assert not reads_the_target(CARAFE(16), (5, 7), (9, 13))
    for fusion, source, target in list(FUSIONS.values())[1:]:
        module = fusion(16)
        module.gates.forward = lambda a, b, valid=None: a + b
        assert reads_the_target(module, source, target)
