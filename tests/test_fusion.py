"""Kernels, gates, and what merges two levels with them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.heads import CARAFEMaskPredictor
from a2fpn.layers import CARAFE, GACAP, GACARAFE, DySample
from a2fpn.layers.fusion import POOLINGS, ChannelGates, KernelInit, KernelPredictor
from a2fpn.layers.resample import fit_doubled
from tests.helpers import (
    largest_difference,
    random_target,
    randomize,
    tiny_model,
    weighted_sum,
    with_zero_gradient,
    without_gradient,
)

pools = pytest.mark.parametrize("pool", POOLINGS)


@pytest.mark.parametrize(("doubled", "size"), [(False, (6, 7)), (True, (12, 14))])
def test_fresh_kernels_are_close_to_the_nearest_pixel_and_can_learn(doubled: bool, size: tuple[int, int]) -> None:
    predictor = KernelPredictor(8, kernel_size=5, center_bias=8.0, doubled=doubled)
    kernels = predictor(torch.randn(1, 8, 6, 7))
    torch.testing.assert_close(kernels.sum(1), torch.ones(1, *size))
    assert (kernels[:, 12] > 0.98).all()
    assert (kernels > 0).all()
    weighted_sum([kernels]).backward()
    assert with_zero_gradient(predictor) == []


def test_kernels_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        kernels = KernelPredictor(8)(torch.randn(1, 8, 6, 7))
    assert kernels.dtype == torch.float32
    torch.testing.assert_close(kernels.sum(1), torch.ones(1, 6, 7))


def test_an_even_kernel_has_no_center() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        KernelPredictor(8, kernel_size=4)


@pools
def test_fresh_gates_add(pool: str) -> None:
    a, b = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 5, 7)
    assert torch.equal(ChannelGates(16, pool=pool)(a, b), a + b)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_pooling_starts_as_the_mean(masked: bool) -> None:
    mean, attention = (ChannelGates(16, pool=pool).double() for pool in POOLINGS)
    randomize(mean)
    attention.load_state_dict(mean.state_dict(), strict=False)
    a, b = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    valid = torch.rand(2, 1, 5, 7) < 0.5 if masked else None
    assert largest_difference([mean.gates(a, b, valid)], [attention.gates(a, b, valid)]) < 1e-14
    randomize(attention, std=1)
    assert largest_difference([mean.gates(a, b, valid)], [attention.gates(a, b, valid)]) > 1e-3


def test_attention_pooling_is_a_softmax_over_pixels() -> None:
    gates = ChannelGates(4, pool="attention").double()
    randomize(gates, std=1)
    a, b = torch.randn(2, 1, 4, 3, 2, dtype=torch.float64)
    pooled = []
    for x, focus in zip((a, b), gates.focus, strict=True):
        pixels = [x[0, :, i, j] for i in range(3) for j in range(2)]
        weights = torch.stack([pixel @ focus for pixel in pixels]).exp()
        pooled.append(sum(w * pixel for w, pixel in zip(weights, pixels, strict=True)) / weights.sum())
    expected = 2 * gates.gate(gates.hidden(torch.cat(pooled)).relu()).sigmoid()
    assert largest_difference([gates.gates(a, b)[0]], [expected]) < 1e-12


def test_gates_write_into_the_first_map_only_where_no_gradient_is_recorded() -> None:
    gates = ChannelGates(16)
    randomize(gates)
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
    randomize(gates, std=10)
    a = torch.ones(2, 16, 5, 7)
    out = gates(a, torch.zeros_like(a))
    assert out.min() >= 0
    assert out.max() <= 2
    assert out.std() > 0.1


@pools
def test_gates_do_not_see_padding(pool: str) -> None:
    gates = ChannelGates(16, pool=pool).double()
    randomize(gates)
    a, b = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[1, :, 3:] = valid[1, :, :, 4:] = False
    a, b = (x.masked_fill(~valid, 1e4) for x in (a, b))
    got = gates(a, b, valid)
    assert largest_difference([got[:1]], [gates(a[:1], b[:1])]) < 1e-12
    assert largest_difference([got[1:, :, :3, :4]], [gates(a[1:, :, :3, :4], b[1:, :, :3, :4])]) < 1e-12


@pytest.mark.parametrize(("init", "center"), [("center", 0.69), ("uniform", 1 / 25)])
def test_kernels_start_near_the_center_or_uniform(init: KernelInit, center: float) -> None:
    for fusion in (
        GACARAFE(16, kernel_init=init),
        GACARAFE(16, kernel_init=init, kernels="coarse"),
        GACAP(16, kernel_init=init),
    ):
        kernels = fusion.kernels(torch.randn(2, fusion.kernels.conv.in_channels, 6, 7))
        assert kernels[:, 12].mean().item() == pytest.approx(center, abs=0.02)


UP, DOWN = ((5, 7), (9, 13)), ((9, 13), (5, 7))
FUSIONS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, int], tuple[int, int]]] = {
    "CARAFE": (lambda c: CARAFE(c, compressed_channels=8), *UP),
    "DySample": (DySample, *UP),
    "GACARAFE": (lambda c: GACARAFE(c, compressed_channels=8), *UP),
    "GACARAFE, coarse kernels": (lambda c: GACARAFE(c, compressed_channels=8, kernels="coarse"), *UP),
    "GACARAFE, uniform kernels": (lambda c: GACARAFE(c, compressed_channels=8, kernel_init="uniform"), *UP),
    "GACARAFE, attention pooling": (lambda c: GACARAFE(c, compressed_channels=8, pool="attention"), *UP),
    "GACAP": (lambda c: GACAP(c, compressed_channels=8), *DOWN),
    "GACAP, uniform kernels": (lambda c: GACAP(c, compressed_channels=8, kernel_init="uniform"), *DOWN),
    "GACAP, attention pooling": (lambda c: GACAP(c, compressed_channels=8, pool="attention"), *DOWN),
}
fusions = pytest.mark.parametrize(("fusion", "source", "target"), FUSIONS.values(), ids=FUSIONS)
Fusion = Callable[[int], nn.Module]


@fusions
def test_fusions_have_the_size_of_their_target(
    fusion: Fusion, source: tuple[int, int], target: tuple[int, int]
) -> None:
    a, b = torch.randn(2, 16, *source), torch.randn(2, 16, *target)
    copies = a.clone(), b.clone()
    assert fusion(16)(a, b).shape == b.shape
    assert largest_difference((a, b), copies) == 0


@fusions
def test_gradient_to_every_parameter_of_a_fusion(
    fusion: Fusion, source: tuple[int, int], target: tuple[int, int]
) -> None:
    module = fusion(16)
    randomize(module)
    weighted_sum([module(torch.randn(2, 16, *source), torch.randn(2, 16, *target))]).backward()
    assert with_zero_gradient(module) == []


@pytest.mark.parametrize("kernels", ["fine", "coarse"])
def test_fresh_upsampling_is_close_to_nearest_and_addition(kernels: str) -> None:
    coarse, fine = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 10, 14)
    expected = fine + F.interpolate(coarse, size=(10, 14), mode="nearest")
    got = GACARAFE(16, kernels=kernels)(coarse, fine)
    assert ((got - expected).square().mean() / expected.square().mean()).sqrt() < 0.3


def reads_the_target(module: nn.Module, source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Check whether what comes from the source changes with the target map."""
    a, b, change = (torch.randn(1, 16, *size) for size in (source, target, target))
    randomize(module)
    first, second = module(a, b), module(a, b + change)
    return bool((second - first - change).abs().max() > 1e-3)


@fusions
def test_kernels_come_from_both_levels_but_for_carafe_and_dysample(
    fusion: Fusion, source: tuple[int, int], target: tuple[int, int]
) -> None:
    module = fusion(16)
    alone = isinstance(module, CARAFE | DySample)
    if not alone:
        module.gates.forward = lambda a, b, valid=None: a + b
    assert reads_the_target(module, source, target) != alone


# CARAFE as its authors compute it


def carafe_written_out(module: CARAFE, x: Tensor) -> Tensor:
    """Twice the size, pixel by pixel: zeros beyond the border, four kernels for each coarse pixel."""
    logits = module.kernels.conv(module.compress(x))
    batch, channels, h, w = x.shape
    k = round((logits.shape[1] // 4) ** 0.5)
    out = torch.zeros(batch, channels, 2 * h, 2 * w, dtype=x.dtype)
    for i in range(2 * h):
        for j in range(2 * w):
            own = [place * 4 + i % 2 * 2 + j % 2 for place in range(k * k)]
            kernel = logits[:, own, i // 2, j // 2].softmax(1)
            for place in range(k * k):
                row, column = i // 2 + place // k - k // 2, j // 2 + place % k - k // 2
                if 0 <= row < h and 0 <= column < w:
                    out[:, :, i, j] += kernel[:, place, None] * x[:, :, row, column]
    return out


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 7)])
@pytest.mark.parametrize("k", [3, 5])
def test_carafe_is_that_of_its_authors(size: tuple[int, int], k: int) -> None:
    module = CARAFE(4, compressed_channels=3, kernel_size=k).double()
    randomize(module, std=1)
    x, fine = torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    expected = fine + carafe_written_out(module, x)[:, :, : size[0], : size[1]]
    assert largest_difference([module(x, fine)], [expected]) < 1e-12


def test_fresh_carafe_kernels_are_uniform() -> None:
    module = CARAFE(16)
    kernels = module.kernels(module.compress(torch.randn(1, 16, 5, 7)))
    assert (kernels - 1 / 25).abs().max() < 0.01


# DySample


def dysample_written_out(module: DySample, x: Tensor) -> Tensor:
    """Twice the size, pixel by pixel; positions are of pixel centers, held inside the map."""
    offsets = F.pixel_shuffle(module.offset(x), 2).mul(0.25)
    (batch, channels, h, w), groups = x.shape, module.groups
    width = channels // groups
    out = torch.zeros(batch, channels, 2 * h, 2 * w, dtype=x.dtype)
    for b in range(batch):
        for c in range(channels):
            for i in range(2 * h):
                for j in range(2 * w):
                    group = c // width
                    column = (j / 2 - 0.25 + offsets[b, group, i, j]).clamp(0, w - 1)
                    row = (i / 2 - 0.25 + offsets[b, groups + group, i, j]).clamp(0, h - 1)
                    for y in (row.floor(), row.floor() + 1):
                        for u in (column.floor(), column.floor() + 1):
                            weight = (1 - (row - y).abs()) * (1 - (column - u).abs())
                            out[b, c, i, j] += weight * x[b, c, min(int(y), h - 1), min(int(u), w - 1)]
    return out


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 7)])
def test_dysample_equals_the_paper_pixel_by_pixel(size: tuple[int, int]) -> None:
    module = DySample(4, groups=2).double()
    randomize(module, std=2)
    x, fine = torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    expected = fine + dysample_written_out(module, x)[:, :, : size[0], : size[1]]
    assert largest_difference([module(x, fine)], [expected]) < 1e-12


@pytest.mark.parametrize(
    ("source", "target"), [((5, 7), (10, 14)), ((5, 7), (13, 20)), ((4, 4), (5, 5)), ((3, 3), (3, 3))]
)
def test_dysample_without_offsets_is_bilinear(source: tuple[int, int], target: tuple[int, int]) -> None:
    module = DySample(8).double()
    nn.init.zeros_(module.offset.weight)
    x, fine = torch.randn(2, 8, *source, dtype=torch.float64), torch.zeros(2, 8, *target, dtype=torch.float64)
    expected = F.interpolate(x, size=target, mode="bilinear", align_corners=False)
    assert largest_difference([module(x, fine)], [expected]) < 1e-12


def test_dysample_keeps_its_positions_under_autocast() -> None:
    module, x, fine = DySample(8), torch.randn(1, 8, 40, 300), torch.zeros(1, 8, 80, 600)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, fine)
    torch.testing.assert_close(got, module(x, fine), rtol=0, atol=0.02)


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_divide_the_channels(groups: int) -> None:
    with pytest.raises(ValueError, match=f"{groups} groups do not divide 8 channels"):
        DySample(8, groups=groups)


# Sizes and names


@pytest.mark.parametrize(
    ("size", "cropped"), [((10, 14), True), ((9, 14), True), ((9, 13), True), ((8, 14), False), ((11, 13), False)]
)
def test_a_doubled_map_is_cropped_only_to_rounded_sizes(size: tuple[int, int], cropped: bool) -> None:
    x = torch.randn(2, 3, 10, 14)
    got = fit_doubled(x, size)
    assert got.shape == (2, 3, *size)
    assert torch.equal(got, x[:, :, : size[0], : size[1]] if cropped else F.interpolate(x, size=size, mode="nearest"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GACARAFE(8, kernels="middle"), "Unknown kernels='middle'; expected one of fine, coarse"),
        (lambda: GACAP(8, kernel_init="sharp"), "Unknown kernel_init='sharp'; expected one of center, uniform"),
        (lambda: GACARAFE(8, pool="max"), "Unknown pool='max'; expected one of mean, attention"),
        (lambda: GACAP(8, pool="max"), "Unknown pool='max'; expected one of mean, attention"),
    ],
)
def test_an_unknown_kind_is_an_error_with_those_that_are_known(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_default_is_written_out() -> None:
    """Fine kernels and means: the function of every checkpoint there is."""
    module = GACARAFE(4, compressed_channels=3, kernel_size=3).double()
    randomize(module, std=1)
    coarse, fine = torch.randn(1, 4, 3, 4, dtype=torch.float64), torch.randn(1, 4, 5, 8, dtype=torch.float64)
    nearest = [[i * 3 // 5 for i in range(5)], [j * 4 // 8 for j in range(8)]]
    seen = torch.cat([module.compress_coarse(coarse)[:, :, nearest[0]][..., nearest[1]], module.compress_fine(fine)], 1)
    kernels = (4 * module.kernels.conv(seen)).softmax(1)
    edges = F.pad(coarse, (1,) * 4, mode="replicate")
    up = sum(
        kernels[:, place, None]
        * edges[:, :, [y + place // 3 for y in nearest[0]]][..., [x + place % 3 for x in nearest[1]]]
        for place in range(9)
    )
    gates = module.gates
    pooled = torch.cat([up.mean((2, 3)), fine.mean((2, 3))], 1)
    weights = 2 * gates.gate(gates.hidden(pooled).relu()).sigmoid()
    expected = weights[:, :4, None, None] * up + weights[:, 4:, None, None] * fine
    assert largest_difference([module(coarse, fine)], [expected]) < 1e-12


def test_the_mask_predictor_has_no_activation_behind_carafe() -> None:
    predictor = CARAFEMaskPredictor(8, 3).double()
    randomize(predictor)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    expected = predictor.mask_fcn_logits(carafe_written_out(predictor.upsample, x))
    torch.testing.assert_close(predictor(x), expected.float(), rtol=1e-5, atol=1e-5)
    assert predictor(x).dtype == torch.float32


def test_a_detector_learns_with_carafe_in_the_mask_head() -> None:
    model = tiny_model("maskrcnn_fpn", mask_upsample="carafe").train()
    losses = model([torch.rand(3, 64, 64)], [random_target([[4, 4, 40, 40]], (64, 64))])
    sum(losses.values()).backward()
    assert without_gradient(model.roi_heads.mask_predictor) == []
