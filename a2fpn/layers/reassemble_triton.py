"""Reassembly on CUDA: Triton kernels, forward and backward, of :func:`a2fpn.layers.reassemble.reassemble`.

The windows of a tile of target pixels lie in one small region of the source. So a tile of the result is a matrix
product, ``(targets, source pixels) @ (source pixels, channels)``, whose first factor holds the weight of a source pixel
in the target's window and zero elsewhere. On tensor cores the zeros cost less than reading a source pixel once for
every window that contains it. Both gradients are products of the same kind, without scatters or atomics, and therefore
deterministic.

Source positions extend beyond the border, where the edge pixel is read, so that every weight has its own position.
float32 products are computed as three TF32 products, with about the precision of float32; accumulation is in float32
for every dtype. A non-finite pixel can turn targets of its tile into NaN even if their windows do not contain it.

In the kernels ``(h, w)`` is the size of the source, ``(height, width)`` that of the target; ``(i, j)`` are target
pixels, ``(r, c)`` source positions; strides are named after batch, channels, rows and columns: ``x_b, x_d, x_y, x_x``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Supported dtypes of maps."""

# Not specialized on: sizes change from batch to batch, and the strides of the weights, which are loaded elementwise, do
# not help the compiler.
_SIZES = ("h", "w", "height", "width")
_WEIGHTS = ("weights_b", "weights_d", "weights_y", "weights_x")


@dataclass(frozen=True)
class Plan:
    """Launch configuration of a kernel.

    Args:
        tile: Rows and columns of a program's pixels; at least 64 pixels, the tile of Hopper's matrix instructions.
        part: Rows and columns of the pixels read per step of the reduction; at least 16 pixels.
        block: Channels of a program, or channels summed per step; at least 16.
        num_warps: Warps of a program.
        maxnreg: Maximum registers per thread, where higher occupancy is worth the spilling.
    """

    tile: tuple[int, int]
    part: tuple[int, int]
    block: int
    num_warps: int
    maxnreg: int | None = None


# By bytes per element. At twice the size the windows of 4 x 16 targets cover 6 x 12 source pixels, and 8 x 8 source
# pixels are in the windows of 24 x 24 targets.
SUMS = {2: Plan((4, 16), (2, 16), 128, 8), 4: Plan((4, 16), (2, 16), 128, 4)}
MAP_GRADIENT = {2: Plan((8, 8), (4, 8), 128, 8, maxnreg=128), 4: Plan((8, 8), (4, 8), 128, 4)}
KERNEL_GRADIENT = {2: Plan((4, 16), (8, 16), 64, 8, maxnreg=128), 4: Plan((4, 16), (4, 16), 32, 8)}


def reassemble_triton(x: Tensor, kernels: Tensor) -> Tensor:
    """Compute each target pixel as a weighted sum over the ``k x k`` neighborhood of its nearest source pixel.

    Args:
        x: Source ``(B, C, h, w)`` of a dtype in :data:`DTYPES`; any layout works, channels-last is fast.
        kernels: Weights ``(B, k * k, H, W)``, k odd; they are cast to the dtype of ``x``.

    Returns:
        ``(B, C, H, W)`` in the dtype and memory format of ``x``.
    """
    result: Tensor = _Reassemble.apply(x, kernels)
    return result


class _Reassemble(torch.autograd.Function):
    """Autograd function that saves its inputs only; gradients have the dtype and layout of their inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        return weighted_sums(x, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernels = ctx.saved_tensors  # type: ignore[attr-defined]
        of_x, of_kernels = ctx.needs_input_grad  # type: ignore[attr-defined]
        return (
            map_gradient(grad, x, kernels) if of_x else None,
            kernel_gradient(grad, x, kernels) if of_kernels else None,
        )


def weighted_sums(x: Tensor, kernels: Tensor) -> Tensor:
    """Forward pass of :func:`reassemble_triton`, without autograd."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (*x.shape[:2], *kernels.shape[2:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    _launch(_weighted_sums, SUMS, out, out.shape[1], (x, kernels, out), x, kernels)
    return out


def map_gradient(grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
    """Gradient of the source, ``(B, C, h, w)``, given that of the result."""
    of_x = torch.empty_like(x)
    _launch(_map_gradient, MAP_GRADIENT, of_x, of_x.shape[1], (grad, kernels, of_x), x, kernels)
    return of_x


def kernel_gradient(grad: Tensor, x: Tensor, kernels: Tensor) -> Tensor:
    """Gradient of the kernels, ``(B, k * k, H, W)``, given that of the result."""
    of_kernels = torch.empty_like(kernels)
    # It sums over channels, so one program handles all of them.
    _launch(_kernel_gradient, KERNEL_GRADIENT, of_kernels, 1, (x, grad, of_kernels), x, kernels)
    return of_kernels


def _launch(
    kernel: Any, plans: dict[int, Plan], result: Tensor, channels: int, operands: tuple[Tensor, ...], x: Tensor,
    kernels: Tensor,
) -> None:  # fmt: skip
    """Launch a kernel with one program per tile of ``result`` and block of ``channels``."""
    plan = plans[x.element_size()]
    block = max(16, min(triton.next_power_of_2(x.shape[1]), plan.block))
    tiles = triton.cdiv(result.shape[2], plan.tile[0]) * triton.cdiv(result.shape[3], plan.tile[1])
    options = {} if plan.maxnreg is None else {"maxnreg": plan.maxnreg}
    with torch.cuda.device_of(result):
        kernel[(tiles, triton.cdiv(channels, block), len(result))](
            *operands,
            *x.shape[1:],
            *kernels.shape[2:],
            *(stride for operand in operands for stride in operand.stride()),
            k=round(kernels.shape[1] ** 0.5),
            rows=plan.tile[0],
            columns=plan.tile[1],
            part_rows=plan.part[0],
            part_columns=plan.part[1],
            block=block,
            num_warps=plan.num_warps,
            **options,
        )


@triton.jit
def _pixels(row: tl.tensor, column: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """Rows and columns of the pixels of a rectangle, in row-major order."""
    flat = tl.arange(0, rows * columns)
    return row + flat // columns, column + flat % columns


@triton.jit
def _tile(height: tl.tensor, width: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> tl.tensor:
    """First row and column of the tile of this program."""
    across = tl.cdiv(width, columns)
    return tl.program_id(0) // across * rows, tl.program_id(0) % across * columns


@triton.jit
def _region(start: tl.tensor, count: tl.constexpr, source: tl.tensor, target: tl.tensor, k: tl.constexpr) -> tl.tensor:
    """Range of source positions covered by the windows of ``count`` targets, along one axis."""
    last = tl.minimum(start + count, target) - 1
    return start * source // target - k // 2, last * source // target + k // 2 + 1


@triton.jit
def _readers(
    start: tl.tensor, count: tl.constexpr, shift: tl.tensor, source: tl.tensor, target: tl.tensor, k: tl.constexpr
) -> tl.tensor:
    """Range of targets whose windows contain any of ``count`` source positions, along one axis.

    A shift addresses positions beyond the border, where the edge pixel is read.
    """
    first = tl.where(shift > 0, source - 1, start) + shift
    last = tl.where(shift < 0, 0, tl.minimum(start + count, source) - 1) + shift
    begin = tl.cdiv(tl.maximum(first - k // 2, 0) * target, source)
    return begin, tl.minimum(tl.cdiv((last + k // 2 + 1) * target, source), target)


@triton.jit
def _clamp(position: tl.tensor, size: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(position, 0), size - 1)


@triton.jit
def _window(
    i: tl.tensor, j: tl.tensor, r: tl.tensor, c: tl.tensor,
    h: tl.tensor, w: tl.tensor, height: tl.tensor, width: tl.tensor,
    weights_d: tl.tensor, weights_y: tl.tensor, weights_x: tl.tensor, k: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Offsets of the weights of source positions in targets' windows, and a mask of the positions inside."""
    a, b = i * h // height, j * w // width
    inside = (i < height) & (j < width) & (tl.abs(r - a) <= k // 2) & (tl.abs(c - b) <= k // 2)
    # One term per target and one per source position, so that the offsets take one broadcast addition.
    of_target = i.to(tl.int64) * weights_y + j.to(tl.int64) * weights_x - (a * k + b).to(tl.int64) * weights_d
    of_source = ((r + k // 2) * k + c + k // 2).to(tl.int64) * weights_d
    return of_target + of_source, inside


@triton.jit
def _offsets(
    row: tl.tensor, column: tl.tensor, channel: tl.tensor, stride_d: tl.tensor, stride_y: tl.tensor, stride_x: tl.tensor
) -> tl.tensor:
    """Offsets ``(pixels, channels)`` in a map."""
    pixel = row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
    return pixel[:, None] + channel.to(tl.int64)[None, :] * stride_d


@triton.jit(do_not_specialize=(*_SIZES, *_WEIGHTS))
def _weighted_sums(
    x: tl.tensor, weights: tl.tensor, out: tl.tensor,
    channels: tl.tensor, h: tl.tensor, w: tl.tensor, height: tl.tensor, width: tl.tensor,
    x_b: tl.tensor, x_d: tl.tensor, x_y: tl.tensor, x_x: tl.tensor,
    weights_b: tl.tensor, weights_d: tl.tensor, weights_y: tl.tensor, weights_x: tl.tensor,
    out_b: tl.tensor, out_d: tl.tensor, out_y: tl.tensor, out_x: tl.tensor,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the forward pass for a tile of targets."""
    image = tl.program_id(2).to(tl.int64)
    x, weights, out = x + image * x_b, weights + image * weights_b, out + image * out_b
    channel = tl.program_id(1) * block + tl.arange(0, block)
    first_i, first_j = _tile(height, width, rows, columns)
    i, j = _pixels(first_i, first_j, rows, columns)
    first_r, end_r = _region(first_i, rows, h, height, k)
    first_c, end_c = _region(first_j, columns, w, width, k)
    across = tl.cdiv(end_c - first_c, part_columns)
    total = tl.zeros((rows * columns, block), tl.float32)
    for part in range(tl.cdiv(end_r - first_r, part_rows) * across):
        part_r, part_c = first_r + part // across * part_rows, first_c + part % across * part_columns
        r, c = _pixels(part_r, part_c, part_rows, part_columns)
        place, inside = _window(
            i[:, None], j[:, None], r[None, :], c[None, :], h, w, height, width, weights_d, weights_y, weights_x, k
        )
        weight = tl.load(weights + place, mask=inside, other=0.0).to(x.dtype.element_ty)
        place = _offsets(_clamp(r, h), _clamp(c, w), channel, x_d, x_y, x_x)
        value = tl.load(x + place, mask=(channel < channels)[None, :], other=0.0)
        total = tl.dot(weight, value, total, input_precision="tf32x3")
    mask = ((i < height) & (j < width))[:, None] & (channel < channels)[None, :]
    tl.store(out + _offsets(i, j, channel, out_d, out_y, out_x), total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*_SIZES, *_WEIGHTS))
def _map_gradient(
    grad: tl.tensor, weights: tl.tensor, result: tl.tensor,
    channels: tl.tensor, h: tl.tensor, w: tl.tensor, height: tl.tensor, width: tl.tensor,
    grad_b: tl.tensor, grad_d: tl.tensor, grad_y: tl.tensor, grad_x: tl.tensor,
    weights_b: tl.tensor, weights_d: tl.tensor, weights_y: tl.tensor, weights_x: tl.tensor,
    result_b: tl.tensor, result_d: tl.tensor, result_y: tl.tensor, result_x: tl.tensor,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of a tile of source pixels by summing over the targets whose windows contain them."""
    image = tl.program_id(2).to(tl.int64)
    grad, weights, result = grad + image * grad_b, weights + image * weights_b, result + image * result_b
    channel = tl.program_id(1) * block + tl.arange(0, block)
    first_r, first_c = _tile(h, w, rows, columns)
    r, c = _pixels(first_r, first_c, rows, columns)
    total = tl.zeros((rows * columns, block), tl.float32)
    for down in range(tl.where(first_r == 0, -(k // 2), 0), tl.where(first_r + rows >= h, k // 2, 0) + 1):
        first_i, end_i = _readers(first_r, rows, down, h, height, k)
        for right in range(tl.where(first_c == 0, -(k // 2), 0), tl.where(first_c + columns >= w, k // 2, 0) + 1):
            first_j, end_j = _readers(first_c, columns, right, w, width, k)
            own = (r < h) & (c < w) & (_clamp(r + down, h) == r) & (_clamp(c + right, w) == c)
            across = tl.cdiv(end_j - first_j, part_columns)
            for part in range(tl.cdiv(end_i - first_i, part_rows) * across):
                part_i, part_j = first_i + part // across * part_rows, first_j + part % across * part_columns
                i, j = _pixels(part_i, part_j, part_rows, part_columns)
                place, inside = _window(
                    i[None, :], j[None, :], (r + down)[:, None], (c + right)[:, None],
                    h, w, height, width, weights_d, weights_y, weights_x, k,
                )  # fmt: skip
                weight = tl.load(weights + place, mask=inside & own[:, None], other=0.0).to(grad.dtype.element_ty)
                mask = ((i < height) & (j < width))[:, None] & (channel < channels)[None, :]
                value = tl.load(grad + _offsets(i, j, channel, grad_d, grad_y, grad_x), mask=mask, other=0.0)
                total = tl.dot(weight, value, total, input_precision="tf32x3")
    mask = ((r < h) & (c < w))[:, None] & (channel < channels)[None, :]
    tl.store(
        result + _offsets(r, c, channel, result_d, result_y, result_x), total.to(result.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=(*_SIZES, *_WEIGHTS))
def _kernel_gradient(
    x: tl.tensor, grad: tl.tensor, weights: tl.tensor,
    channels: tl.tensor, h: tl.tensor, w: tl.tensor, height: tl.tensor, width: tl.tensor,
    x_b: tl.tensor, x_d: tl.tensor, x_y: tl.tensor, x_x: tl.tensor,
    grad_b: tl.tensor, grad_d: tl.tensor, grad_y: tl.tensor, grad_x: tl.tensor,
    weights_b: tl.tensor, weights_d: tl.tensor, weights_y: tl.tensor, weights_x: tl.tensor,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of a tile of targets' weights by summing over channels."""
    image = tl.program_id(2).to(tl.int64)
    x, grad, weights = x + image * x_b, grad + image * grad_b, weights + image * weights_b
    first_i, first_j = _tile(height, width, rows, columns)
    i, j = _pixels(first_i, first_j, rows, columns)
    first_r, end_r = _region(first_i, rows, h, height, k)
    first_c, end_c = _region(first_j, columns, w, width, k)
    across = tl.cdiv(end_c - first_c, part_columns)
    for part in range(tl.cdiv(end_r - first_r, part_rows) * across):
        part_r, part_c = first_r + part // across * part_rows, first_c + part % across * part_columns
        r, c = _pixels(part_r, part_c, part_rows, part_columns)
        total = tl.zeros((rows * columns, part_rows * part_columns), tl.float32)
        for start in range(0, channels, block):
            channel = start + tl.arange(0, block)
            mask = ((i < height) & (j < width))[:, None] & (channel < channels)[None, :]
            direction = tl.load(grad + _offsets(i, j, channel, grad_d, grad_y, grad_x), mask=mask, other=0.0)
            place = _offsets(_clamp(r, h), _clamp(c, w), channel, x_d, x_y, x_x)
            value = tl.load(x + place, mask=(channel < channels)[None, :], other=0.0)
            total = tl.dot(direction, tl.trans(value), total, input_precision="tf32x3")
        place, inside = _window(
            i[:, None], j[:, None], r[None, :], c[None, :], h, w, height, width, weights_d, weights_y, weights_x, k
        )
        tl.store(weights + place, total.to(weights.dtype.element_ty), mask=inside)
