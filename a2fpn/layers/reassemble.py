"""Content-aware reassembly of features, the operator.

Source: Wang et al., "CARAFE", ICCV 2019.

Shape shorthand: ``B`` batch, ``C`` channels, ``(h, w)`` source map, ``(H, W)`` target map, ``k`` kernel side.
"""

from __future__ import annotations

import typing
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2fpn.device import has_triton, is_known, new_size
from a2fpn.layers.choices import check_choice
from a2fpn.layers.precision import autocast_off

Padding = Literal["replicate", "zeros"]
PADDINGS: tuple[str, ...] = typing.get_args(Padding)

_BAG_DEVICES = ("cpu", "cuda")
"""Devices whose ``embedding_bag`` supports ``per_sample_weights`` and its gradient."""


def reassemble(x: Tensor, kernels: Tensor, size: tuple[int, int], *, padding: Padding = "replicate") -> Tensor:
    """Compute each target pixel as a weighted sum over the ``k x k`` neighborhood of its nearest source pixel.

    The nearest source pixel of target pixel ``i`` is ``floor(i * h / H)``, as in nearest-neighbor interpolation,
    for any pair of sizes, up or down. Windows are never materialized: the sum and its gradients are computed by
    ``embedding_bag``, or by small matrix products in Triton on an NVIDIA GPU. Only ``x`` and ``kernels`` are saved for
    the backward pass. A tracer records matrix products of tiles and band matrices instead.

    Args:
        x: Source ``(B, C, h, w)``.
        kernels: Weights ``(B, k * k, H, W)``, usually a softmax over dim 1; row-major over the neighborhood.
        size: ``(H, W)``.
        padding: Padding at the border, ``"replicate"`` or ``"zeros"``.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x``.

    Raises:
        ValueError: If the kernels' channels are not an odd square, their size or batch differs, or for unknown padding.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> center = torch.zeros(1, 9, 3, 3).index_fill_(1, torch.tensor([4]), 1.0)
        >>> reassemble(x, center, (3, 3))[0, 0]
        tensor([[0., 0., 1.],
                [0., 0., 1.],
                [2., 2., 3.]])
    """
    check_choice("padding", padding, PADDINGS)
    k = round(kernels.shape[1] ** 0.5)
    if k * k != kernels.shape[1] or k % 2 == 0:
        raise ValueError(f"Kernels need k * k channels with an odd k (9, 25, 49), got {kernels.shape[1]}.")
    if tuple(kernels.shape[-2:]) != tuple(size) or kernels.shape[0] != x.shape[0]:
        raise ValueError(f"Expected kernels ({x.shape[0]}, {k * k}, {size[0]}, {size[1]}), got {tuple(kernels.shape)}.")
    if padding == "zeros":
        kernels = kernels.masked_fill(_beyond(x, kernels, k), 0)
    if torch.compiler.is_compiling():
        if x.is_cuda:
            compiled: Tensor = _opaque(x, kernels)
            return compiled
    elif _has_triton(x):
        from a2fpn.layers.reassemble_triton import reassemble_triton

        return reassemble_triton(x, kernels)
    kernels = kernels.to(x.dtype)
    if torch.compiler.is_compiling() or x.device.type not in _BAG_DEVICES:
        doubled, halved = (
            all(is_known(new * b == old * a) for new, old in zip(size, x.shape[2:], strict=True))
            for a, b in ((2, 1), (1, 2))
        )
        if doubled or halved:
            return _reassemble_by_tiles(x, kernels, k, *((2, 1) if doubled else (1, 2)))
        return _reassemble_by_shifts(x, kernels, k)
    result: Tensor = _Reassemble.apply(x, kernels, k)
    return result


def _has_triton(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and has_triton(x)


def _source_index(target: int, source: int, device: torch.device) -> Tensor:
    return torch.arange(target, device=device) * source // target


def _beyond(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """Return a mask of the window positions outside the map, ``(k * k, H, W)``."""

    def along(target: int, source: int) -> Tensor:
        place = torch.arange(k, device=x.device)[:, None] - k // 2 + _source_index(target, source, x.device)
        return (place < 0) | (place >= source)

    (h, w), (height, width) = x.shape[2:], kernels.shape[2:]
    return (along(height, h)[:, None, :, None] | along(width, w)[:, None, :]).flatten(0, 1)


# Explicit schemas, since older versions of torch can't infer them from string annotations.
@torch.library.custom_op("a2fpn::reassemble", mutates_args=(), schema="(Tensor x, Tensor kernels) -> Tensor")
def _opaque(x: Tensor, kernels: Tensor) -> Tensor:
    """Opaque operator for torch.compile on a GPU; compiling the decomposed sums would be far slower."""
    if _has_triton(x):
        from a2fpn.layers.reassemble_triton import weighted_sums

        return weighted_sums(x, kernels)
    kernels = kernels.to(x.dtype)
    return _sums(x, kernels, round(kernels.shape[1] ** 0.5))


@_opaque.register_fake
def _(x: Tensor, kernels: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], *kernels.shape[2:])
    return out.to(memory_format=torch.channels_last) if x.is_contiguous(memory_format=torch.channels_last) else out


@torch.library.custom_op(
    "a2fpn::reassemble_gradients",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor kernels) -> (Tensor, Tensor)",
)
def _opaque_gradients(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    if _has_triton(x):
        from a2fpn.layers.reassemble_triton import kernel_gradient, map_gradient

        return map_gradient(grad, x, kernels), kernel_gradient(grad, x, kernels)
    grad_x, grad_kernels = _gradients(grad, x, kernels.to(x.dtype), round(kernels.shape[1] ** 0.5))
    return grad_x, grad_kernels.to(kernels.dtype)


@_opaque_gradients.register_fake
def _(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(kernels)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _opaque_gradients(grad, *ctx.saved_tensors)
    return gradients


_opaque.register_autograd(_backward, setup_context=_keep)


_TILE = 8
"""Grid pixels per tile: their windows overlap, and the matrices are not too small."""


def _reassemble_by_tiles(x: Tensor, kernels: Tensor, k: int, parts: int, step: int) -> Tensor:
    """Compute the same sum as one batched matrix product, for a map of twice or half the size.

    The windows of a tile of vertically adjacent pixels cover one stretch of the source; each kernel is a row of a band
    matrix, shifted to the position of its window in the stretch.

    Args:
        x: Source.
        kernels: Weights.
        k: Side of a window.
        parts: Target pixels per grid pixel and axis: 2 for twice the size.
        step: Source pixels per grid pixel and axis: 2 for half the size.
    """
    batch, channels, height, width = x.shape
    high, wide = kernels.shape[2:]
    columns, tiles = wide // parts, new_size((high // parts + _TILE - 1) // _TILE)
    edge, span = k // 2, step * (_TILE - 1) + k
    length, row = k * span, width + 2 * edge
    rows = F.pad(x, (edge,) * 4, mode="replicate").flatten(2).transpose(1, 2)
    # Stretches of the source per tile; in the last tile, rows beyond the source are clamped and never used.
    tile, column, down, across = (torch.arange(count, device=x.device) for count in (tiles, columns, span, k))
    down = (tile[:, None] * (_TILE * step) + down).clamp(max=height + 2 * edge - 1) * row
    pixels = (column[:, None] * step + across)[:, None] + down[:, None, :, None]
    stretches = rows.index_select(1, pixels.reshape(-1)).reshape(-1, length, channels)
    # Kernels in the same order. Padding the rows by one shift more and reading them at the shorter length shifts each
    # row relative to the one before: a band matrix.
    shift, more = step * k, tiles * (_TILE * parts) - high
    bands = F.pad(kernels.permute(0, 2, 3, 1), (0, 0, 0, 0, 0, more))
    bands = bands.reshape(batch, tiles, _TILE, parts, columns, parts, k * k).permute(0, 1, 4, 3, 5, 2, 6)
    bands = F.pad(bands.reshape(-1, _TILE, k * k), (0, length + shift - k * k)).reshape(-1, _TILE * (length + shift))
    sums = bands[:, : _TILE * length].reshape(-1, parts * parts * _TILE, length) @ stretches
    sums = sums.reshape(batch, tiles, columns, parts, parts, _TILE, channels).permute(0, 1, 5, 3, 2, 4, 6)
    sums = sums.reshape(batch, tiles * (_TILE * parts), wide, channels)
    # Not a slice, whose symbolic size would be a minimum of two sizes.
    return sums.index_select(1, torch.arange(high, device=x.device)).permute(0, 3, 1, 2)


def _reassemble_by_shifts(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """Compute the same sum as k * k shifted products, which compilers fuse and exporters support."""
    rows = _source_index(kernels.shape[-2], x.shape[-2], x.device)
    columns = _source_index(kernels.shape[-1], x.shape[-1], x.device)
    padded = F.pad(x, (k // 2,) * 4, mode="replicate")
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in range(k):
        band = padded[:, :, rows + i]
        for j in range(k):
            out = out + band[:, :, :, columns + j] * kernels[:, i * k + j, None]
    return out


class _Reassemble(torch.autograd.Function):
    """Autograd function of the operator; both passes run in the dtype of ``x``, also under autocast."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, kernels: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.k = k  # type: ignore[attr-defined]
        return _sums(x, kernels, k)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernels = ctx.saved_tensors  # type: ignore[attr-defined]
        return *_gradients(grad, x, kernels, ctx.k), None  # type: ignore[attr-defined]


def _sums(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    with autocast_off(x):
        return _as_map(_sum_bags(_pixels_around(x, kernels, k), _as_rows(kernels), _as_rows(x)), kernels)


def _gradients(grad: Tensor, x: Tensor, kernels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with autocast_off(x):
        rows = _as_rows(grad)
        # One after the other, since the indices of each take as much memory as the kernels.
        grad_kernels = _kernel_gradient(x, kernels, k, rows)
        grad_x = _sum_bags(*_pixels_to(x, kernels, k), rows)
    return _as_map(grad_x, x), grad_kernels


def _kernel_gradient(x: Tensor, kernels: Tensor, k: int, grad: Tensor) -> Tensor:
    index = _pixels_around(x, kernels, k).flatten()
    bags = torch.arange(len(grad), dtype=index.dtype, device=index.device)
    of_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, _as_rows(x), index, bags * k**2, bags.repeat_interleave(k**2), _SUM
    )
    return _as_map(of_weights.view(-1, k**2), kernels)


_SUM = 0
"""Code of ``mode="sum"`` in torch's internal embedding bag operators."""


def _as_rows(x: Tensor) -> Tensor:
    """Reshape ``(B, C, H, W)`` to ``(B * H * W, C)``, without a copy if channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B * H * W, C)`` to ``(B, C, H, W)`` with the batch and size of another map."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _sum_bags(index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


def _pixels_around(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """Row indices of the source pixels in each target pixel's window, ``(B * H * W, k * k)``."""
    (batch, _, h, w), (height, width) = x.shape, kernels.shape[2:]
    rows, columns = _window(height, h, k, x.device), _window(width, w, k, x.device)
    return _join(_in_batch(batch, rows * w, h * w), columns, _index_dtype(batch * h * w, batch * height * width * k**2))


def _pixels_to(x: Tensor, kernels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Inverse of the windows: for each source pixel the target pixels whose window contains it, and its weights."""
    (batch, _, h, w), (height, width) = x.shape, kernels.shape[2:]
    (rows, i, own_row), (columns, j, own_column) = _inverse(height, h, k, x.device), _inverse(width, w, k, x.device)
    rows = _in_batch(batch, rows * width, height * width)
    weights = _as_rows(kernels).flatten()[_join(rows * k**2 + i * k, columns * k**2 + j, torch.int64)]
    own = own_row[:, None, :, None] & own_column[:, None, :]
    weights.view(batch, *own.shape).mul_(own)
    return _join(rows, columns, _index_dtype(batch * height * width, weights.numel())), weights


def _in_batch(batch: int, rows: Tensor, pixels: int) -> Tensor:
    """Offset row starts ``(h, m)`` for each image of a batch, ``(B, h, m)``."""
    return torch.arange(batch, device=rows.device)[:, None, None] * pixels + rows


def _join(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixel indices from row starts ``(B, h, m)`` and columns ``(w, n)``, ``(B * h * w, m * n)``."""
    pixels = rows.to(dtype)[:, :, None, :, None] + columns.to(dtype)[:, None, :]
    return pixels.view(-1, rows.shape[2] * columns.shape[1])


def _index_dtype(*counts: int) -> torch.dtype:
    """Return the smallest integer dtype that can index this many elements."""
    return torch.int32 if max(counts) < 2**31 else torch.int64


def _window(target: int, source: int, k: int, device: torch.device) -> Tensor:
    """Window of every target pixel along one axis, ``(target, k)``, clamped to the map."""
    around = torch.arange(k, device=device) - k // 2
    return (_source_index(target, source, device)[:, None] + around).clamp_(0, source - 1)


def _inverse(target: int, source: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Windows that contain each source pixel, along one axis.

    Returns:
        ``(source, M)`` each: target pixels, positions in their windows, and whether the entry is valid; M is the
        maximum number of windows per pixel, and rows are padded with their first entry.
    """
    # Depends on sizes only, so it runs on the CPU without synchronizing with a GPU.
    pixels = _window(target, source, k, torch.device("cpu")).flatten()
    count = torch.bincount(pixels, minlength=source)
    first = count.cumsum(0) - count
    entry = torch.arange(int(count.max()))
    own = entry < count[:, None]
    pair = pixels.argsort(stable=True)[(first[:, None] + entry * own).clamp_(max=len(pixels) - 1)]
    return (pair // k).to(device), (pair % k).to(device), own.to(device)
