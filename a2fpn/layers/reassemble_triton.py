"""Reassembly on CUDA: Triton kernels, forward and backward, of :func:`a2fpn.layers.reassemble.reassemble`.

The windows of a tile of target pixels lie in one small region of the source. So a tile of the result is a product of
matrices, ``(targets, source pixels) @ (source pixels, channels)``, whose first factor holds a weight where the source
pixel is in the target's window and zero elsewhere. On matrix units the zeros cost less than reading a source pixel once
for every window that it is in. Both gradients are products of the same kind: nothing is scattered, no atomic is used,
and the same inputs give the same bits.

Source positions are counted beyond the border too, where the edge pixel is read; so every weight has a position of its
own. Products of float32 are made of three of TF32, which round about like float32; sums are float32 for every dtype.
A pixel that is not finite can make targets of its tile NaN whose windows it is not in.

In the kernels ``(h, w)`` is the size of the source, ``(height, width)`` that of the target; ``(i, j)`` are target
pixels, ``(r, c)`` source positions; strides are named after batch, channels, rows and columns: ``x_b, x_d, x_y, x_x``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of maps that the kernels take."""

Grid = tuple[int, int, int]

# Sizes change from batch to batch and tell the compiler nothing; nor do strides of what is read number by number.
_SIZES = ("h", "w", "height", "width")
_WEIGHTS = ("weights_b", "weights_d", "weights_y", "weights_x")


def reassemble_triton(x: Tensor, kernels: Tensor) -> Tensor:
    """Each target pixel becomes a weighted sum of the ``k x k`` neighborhood of its nearest source pixel.

    Args:
        x: Source ``(B, C, h, w)`` of a dtype in :data:`DTYPES`; channels-last is the fast layout, any is right.
        kernels: Weights ``(B, k * k, H, W)``, k odd; they are rounded to the dtype of ``x``.

    Returns:
        ``(B, C, H, W)`` in the dtype and memory format of ``x``.
    """
    result: Tensor = _Reassemble.apply(x, kernels)
    return result


class _Reassemble(torch.autograd.Function):
    """Keeps its inputs and nothing else; a gradient has the dtype and layout of what it belongs to."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        last = x.is_contiguous(memory_format=torch.channels_last)
        out = torch.empty(
            (*x.shape[:2], *kernels.shape[2:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        _launch(_weighted_sums, x, kernels, out, tile=(4, 16), part=(2, 16), sizes=_sizes(x, kernels))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernels = ctx.saved_tensors  # type: ignore[attr-defined]
        sizes = _sizes(x, kernels)
        of_x, of_kernels = (
            torch.empty_like(y) if wanted else None
            for y, wanted in zip((x, kernels), ctx.needs_input_grad, strict=True)  # type: ignore[attr-defined]
        )
        if of_x is not None:
            _launch(_map_gradient, grad, kernels, of_x, tile=(8, 8), part=(4, 8), sizes=sizes)
        if of_kernels is not None:
            _launch_kernel_gradient(x, grad, of_kernels, sizes)
        return of_x, of_kernels


def _sizes(x: Tensor, kernels: Tensor) -> tuple[int, ...]:
    return (*x.shape[1:], *kernels.shape[2:])


def _side(kernels: Tensor) -> int:
    return round(kernels.shape[1] ** 0.5)


def _launch(
    kernel: Any,
    source: Tensor,
    kernels: Tensor,
    result: Tensor,
    *,
    tile: tuple[int, int],
    part: tuple[int, int],
    sizes: tuple[int, ...],
) -> None:
    """Runs a weighted sum of pixels, one program per tile of the result and block of channels.

    Args:
        kernel: What to run.
        source: What is summed.
        kernels: Weights.
        result: Written; a map with as many channels as ``source``.
        tile: Rows and columns of a tile; at least 64 pixels, which Hopper's matrix units multiply at a time.
        part: Rows and columns of what is read of ``source`` at a time; at least 16 pixels.
        sizes: Channels, and the sizes of source and target of the forward pass.
    """
    channels = result.shape[1]
    block = _block(channels, 512 // result.element_size())
    tiles = triton.cdiv(result.shape[2], tile[0]) * triton.cdiv(result.shape[3], tile[1])
    with torch.cuda.device_of(result):
        kernel[(tiles, triton.cdiv(channels, block), len(result))](
            source,
            kernels,
            result,
            *sizes,
            *source.stride(),
            *kernels.stride(),
            *result.stride(),
            k=_side(kernels),
            rows=tile[0],
            columns=tile[1],
            part_rows=part[0],
            part_columns=part[1],
            block=block,
            num_warps=8 if block == 256 else 4,
        )


def _launch_kernel_gradient(x: Tensor, grad: Tensor, result: Tensor, sizes: tuple[int, ...]) -> None:
    rows, columns = 4, 16
    tiles = triton.cdiv(grad.shape[2], rows) * triton.cdiv(grad.shape[3], columns)
    with torch.cuda.device_of(result):
        _kernel_gradient[(tiles, 1, len(result))](
            x,
            grad,
            result,
            *sizes,
            *x.stride(),
            *grad.stride(),
            *result.stride(),
            k=_side(result),
            rows=rows,
            columns=columns,
            # Twice the size: the windows of 4 x 16 targets lie in 6 x 12 or 7 x 13 pixels, one part.
            part_rows=8,
            part_columns=16,
            block=_block(x.shape[1], 128 // x.element_size()),
            num_warps=4,
        )


def _block(channels: int, most: int) -> int:
    """Channels of a program; a product has at least 16."""
    return max(16, min(triton.next_power_of_2(channels), most))


@triton.jit
def _pixels(row: Any, column: Any, rows: tl.constexpr, columns: tl.constexpr) -> Any:
    """Rows and columns of the pixels of a rectangle, from its first on, row by row."""
    flat = tl.arange(0, rows * columns)
    return row + flat // columns, column + flat % columns


@triton.jit
def _tile(height: Any, width: Any, rows: tl.constexpr, columns: tl.constexpr) -> Any:
    """First row and column of the tile of this program."""
    across = tl.cdiv(width, columns)
    return tl.program_id(0) // across * rows, tl.program_id(0) % across * columns


@triton.jit
def _region(start: Any, count: tl.constexpr, source: Any, target: Any, k: tl.constexpr) -> Any:
    """Along one axis the source positions, begin and end, of the windows of ``count`` targets."""
    last = tl.minimum(start + count, target) - 1
    return start * source // target - k // 2, last * source // target + k // 2 + 1


@triton.jit
def _readers(start: Any, count: tl.constexpr, shift: Any, source: Any, target: Any, k: tl.constexpr) -> Any:
    """Along one axis the targets, begin and end, whose windows reach ``count`` source pixels, shifted.

    A shift is for edge pixels alone: they are read in place of the positions beyond them.
    """
    first = tl.where(shift > 0, source - 1, start) + shift
    last = tl.where(shift < 0, 0, tl.minimum(start + count, source) - 1) + shift
    begin = tl.cdiv(tl.maximum(first - k // 2, 0) * target, source)
    return begin, tl.minimum(tl.cdiv((last + k // 2 + 1) * target, source), target)


@triton.jit
def _clamp(position: Any, size: Any) -> Any:
    return tl.minimum(tl.maximum(position, 0), size - 1)


@triton.jit
def _window(
    i: Any, j: Any, r: Any, c: Any, h: Any, w: Any, height: Any, width: Any,
    weights_d: Any, weights_y: Any, weights_x: Any, k: tl.constexpr,
) -> Any:  # fmt: skip
    """Offsets of the weights of source positions in the windows of targets, and which are in them."""
    a, b = i * h // height, j * w // width
    inside = (i < height) & (j < width) & (tl.abs(r - a) <= k // 2) & (tl.abs(c - b) <= k // 2)
    # A sum of a term of the target and one of the source: the matrix of offsets is one addition.
    of_target = i.to(tl.int64) * weights_y + j.to(tl.int64) * weights_x - (a * k + b).to(tl.int64) * weights_d
    of_source = ((r + k // 2) * k + c + k // 2).to(tl.int64) * weights_d
    return of_target + of_source, inside


@triton.jit
def _offsets(row: Any, column: Any, channel: Any, stride_d: Any, stride_y: Any, stride_x: Any) -> Any:
    """Offsets ``(pixels, channels)`` in a map."""
    pixel = row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
    return pixel[:, None] + channel.to(tl.int64)[None, :] * stride_d


@triton.jit(do_not_specialize=(*_SIZES, *_WEIGHTS))
def _weighted_sums(
    x: Any, weights: Any, out: Any,
    channels: Any, h: Any, w: Any, height: Any, width: Any,
    x_b: Any, x_d: Any, x_y: Any, x_x: Any,
    weights_b: Any, weights_d: Any, weights_y: Any, weights_x: Any,
    out_b: Any, out_d: Any, out_y: Any, out_x: Any,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """The forward pass of a tile of targets."""
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
    grad: Any, weights: Any, result: Any,
    channels: Any, h: Any, w: Any, height: Any, width: Any,
    grad_b: Any, grad_d: Any, grad_y: Any, grad_x: Any,
    weights_b: Any, weights_d: Any, weights_y: Any, weights_x: Any,
    result_b: Any, result_d: Any, result_y: Any, result_x: Any,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a tile of source pixels: over the targets whose windows they are in."""
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
    x: Any, grad: Any, weights: Any,
    channels: Any, h: Any, w: Any, height: Any, width: Any,
    x_b: Any, x_d: Any, x_y: Any, x_x: Any,
    grad_b: Any, grad_d: Any, grad_y: Any, grad_x: Any,
    weights_b: Any, weights_d: Any, weights_y: Any, weights_x: Any,
    k: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
    part_rows: tl.constexpr, part_columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of the weights of a tile of targets: each is a sum over channels."""
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
