"""Content-aware reassembly of features: the op, CARAFE, GACARAFE and GACAP.

Sources: Wang et al., "CARAFE", ICCV 2019, for kernel-wise reassembly; the A2-FPN abstract for kernels made from
both adjacent levels and for the reweighting of channels before the addition.

Shape shorthand: ``B`` batch, ``C`` channels, ``(h, w)`` source map, ``(H, W)`` target map, ``k`` kernel side.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers.precision import autocast_off
from a2fpn.layers.recompute import recomputed

_BAG_DEVICES = ("cpu", "cuda")
"""Where torch has weighted bags and their gradients."""


def reassemble(x: Tensor, kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """Each target pixel becomes a weighted sum of the ``k x k`` neighbourhood of its nearest source pixel.

    The nearest source pixel of target pixel ``i`` is ``floor(i * h / H)``, as in nearest-neighbour interpolation,
    for any pair of sizes, up or down. Beyond the border the edge pixel is repeated. Windows are never gathered: the sum
    and its gradients are weighted bags of pixels, or products of small matrices in Triton on an NVIDIA GPU. Only ``x``
    and ``kernels`` are kept for the backward pass.

    Args:
        x: Source ``(B, C, h, w)``.
        kernels: Weights ``(B, k * k, H, W)``, usually a softmax over dim 1; row-major over the neighbourhood.
        size: ``(H, W)``.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``x``.

    Raises:
        ValueError: If the kernels' channels are no odd square, or their size or batch differs.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> centre = torch.zeros(1, 9, 3, 3).index_fill_(1, torch.tensor([4]), 1.0)
        >>> reassemble(x, centre, (3, 3))[0, 0]
        tensor([[0., 0., 1.],
                [0., 0., 1.],
                [2., 2., 3.]])
    """
    k = round(kernels.shape[1] ** 0.5)
    if k * k != kernels.shape[1] or k % 2 == 0:
        raise ValueError(f"Kernels need k * k channels with an odd k (9, 25, 49), got {kernels.shape[1]}.")
    if tuple(kernels.shape[-2:]) != tuple(size) or kernels.shape[0] != x.shape[0]:
        raise ValueError(f"Expected kernels ({x.shape[0]}, {k * k}, {size[0]}, {size[1]}), got {tuple(kernels.shape)}.")
    if not torch.compiler.is_compiling() and _has_triton(x.device, x.dtype):
        from a2fpn.layers.reassemble_triton import reassemble_triton

        return reassemble_triton(x, kernels)
    kernels = kernels.to(x.dtype)
    if torch.compiler.is_compiling() or x.device.type not in _BAG_DEVICES:
        return _reassemble_by_shifts(x, kernels, k)
    result: Tensor = _Reassemble.apply(x, kernels, k)
    return result


@functools.cache
def _has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels run there: on NVIDIA GPUs with TF32 and bfloat16, by a C compiler."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    )


def _source_index(target: int, source: int, device: torch.device) -> Tensor:
    return torch.arange(target, device=device) * source // target


def _reassemble_by_shifts(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """The same sum written as k * k shifted products: what compilers fuse and exporters understand."""
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
    """The op; its sums run in the dtype of ``x``, in both passes, whatever autocast says around them."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, kernels: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.k = k  # type: ignore[attr-defined]
        with autocast_off(x):
            return _as_map(_sum_bags(_pixels_around(x, kernels, k), _as_rows(kernels), _as_rows(x)), kernels)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernels = ctx.saved_tensors  # type: ignore[attr-defined]
        with autocast_off(x):
            rows = _as_rows(grad)
            # One after the other: the indices of either take as much memory as the kernels.
            grad_kernels = _kernel_gradient(x, kernels, ctx.k, rows)  # type: ignore[attr-defined]
            grad_x = _sum_bags(*_pixels_to(x, kernels, ctx.k), rows)  # type: ignore[attr-defined]
        return _as_map(grad_x, x), grad_kernels, None


def _kernel_gradient(x: Tensor, kernels: Tensor, k: int, grad: Tensor) -> Tensor:
    index = _pixels_around(x, kernels, k).flatten()
    bags = torch.arange(len(grad), dtype=index.dtype, device=index.device)
    of_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, _as_rows(x), index, bags * k**2, bags.repeat_interleave(k**2), _SUM
    )
    return _as_map(of_weights.view(-1, k**2), kernels)


_SUM = 0
"""The mode of a bag in torch's own operators."""


def _as_rows(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` as ``(B * H * W, C)``, without a copy where pixels are contiguous."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """``(B * H * W, C)`` as ``(B, C, H, W)`` with the batch and size of another map."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _sum_bags(index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


def _pixels_around(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """For every target pixel the source pixels of its window, ``(B * H * W, k * k)``, as rows of the source."""
    (batch, _, h, w), (height, width) = x.shape, kernels.shape[2:]
    rows, columns = _window(height, h, k, x.device), _window(width, w, k, x.device)
    return _join(_in_batch(batch, rows * w, h * w), columns, _narrowest(batch * h * w, batch * height * width * k**2))


def _pixels_to(x: Tensor, kernels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every source pixel the target pixels whose window it is in, and its weights there: the inverse."""
    (batch, _, h, w), (height, width) = x.shape, kernels.shape[2:]
    (rows, i, own_row), (columns, j, own_column) = _inverse(height, h, k, x.device), _inverse(width, w, k, x.device)
    rows = _in_batch(batch, rows * width, height * width)
    weights = _as_rows(kernels).flatten()[_join(rows * k**2 + i * k, columns * k**2 + j, torch.int64)]
    own = own_row[:, None, :, None] & own_column[:, None, :]
    weights.view(batch, *own.shape).mul_(own)
    return _join(rows, columns, _narrowest(batch * height * width, weights.numel())), weights


def _in_batch(batch: int, rows: Tensor, pixels: int) -> Tensor:
    """Starts of rows ``(h, m)`` in each image of a batch, ``(B, h, m)``."""
    return torch.arange(batch, device=rows.device)[:, None, None] * pixels + rows


def _join(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of starts of rows ``(B, h, m)`` and columns ``(w, n)``, ``(B * h * w, m * n)``."""
    pixels = rows.to(dtype)[:, :, None, :, None] + columns.to(dtype)[:, None, :]
    return pixels.view(-1, rows.shape[2] * columns.shape[1])


def _narrowest(*counts: int) -> torch.dtype:
    """What counts so far in the least memory."""
    return torch.int32 if max(counts) < 2**31 else torch.int64


def _window(target: int, source: int, k: int, device: torch.device) -> Tensor:
    """Along one axis the window of every target pixel, ``(target, k)``; beyond the border the edge is repeated."""
    around = torch.arange(k, device=device) - k // 2
    return (_source_index(target, source, device)[:, None] + around).clamp_(0, source - 1)


def _inverse(target: int, source: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis the windows that every source pixel is in.

    Returns:
        ``(source, M)`` each: target pixels, places in their windows, and whether the entry counts; M is the most
        windows that a pixel is in, and the rest of a row repeats its first entry.
    """
    # Sizes alone decide it: on the CPU nothing waits for a GPU.
    pixels = _window(target, source, k, torch.device("cpu")).flatten()
    count = torch.bincount(pixels, minlength=source)
    first = count.cumsum(0) - count
    entry = torch.arange(int(count.max()))
    own = entry < count[:, None]
    pair = pixels.argsort(stable=True)[(first[:, None] + entry * own).clamp_(max=len(pixels) - 1)]
    return (pair // k).to(device), (pair % k).to(device), own.to(device)


class KernelPredictor(nn.Module):
    """Predicts normalised reassembly kernels: a 3x3 convolution, scaled, softmax over the neighbourhood.

    ``logits = scale * conv(x)``; the convolution's bias starts at ``centre_bias / scale`` on the centre, so that a
    fresh predictor is close to nearest-neighbour sampling. The scale keeps the softmax trainable where a large bias
    alone would leave it dead.

    Args:
        in_channels: Channels of the input.
        kernel_size: ``k``, odd.
        centre_bias: Initial logit of the centre over its neighbours.
        scale: Fixed factor on the convolution's output.
    """

    def __init__(self, in_channels: int, *, kernel_size: int = 5, centre_bias: float = 4.0, scale: float = 4.0) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        self.scale = scale
        self.conv = nn.Conv2d(in_channels, kernel_size**2, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.001)
        self.reset_centre(centre_bias)

    def reset_centre(self, centre_bias: float) -> None:
        """Sets the bias to ``centre_bias / scale`` on the centre and 0 around it."""
        if self.conv.bias is None:
            raise RuntimeError("The predictor's convolution has a bias by construction.")
        with torch.no_grad():
            self.conv.bias.zero_()
            self.conv.bias[len(self.conv.bias) // 2] = centre_bias / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, in_channels, H, W)`` to float32 kernels ``(B, k * k, H, W)`` that sum to one over dim 1."""
        logits: Tensor = self.conv(x) * self.scale
        return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


class ChannelGates(nn.Module):
    """Channel reweighting of two maps before they are added (A2-FPN abstract).

    Both maps are averaged over their valid pixels; a two-layer perceptron gives a gate ``2 * sigmoid(.)`` for each
    channel of each map. The last layer starts at zero, so gates start at exactly one.

    Args:
        channels: Channels of either map.
        reduction: The hidden layer has ``channels // reduction`` units, at least 8.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * channels, max(8, channels // reduction))
        self.gate = nn.Linear(self.hidden.out_features, 2 * channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
        """Returns ``gate_a * a + gate_b * b`` for maps ``(B, C, H, W)``; ``valid`` is a bool ``(B, 1, H, W)``.

        Where no gradient is recorded, the sum is written into ``a``.
        """
        pooled = torch.cat([_valid_mean(a, valid), _valid_mean(b, valid)], 1)
        gates = 2 * torch.sigmoid(self.gate(F.relu(self.hidden(pooled))))
        gate_a, gate_b = gates[:, :, None, None].to(a.dtype).chunk(2, 1)
        gated = gate_a * a if torch.is_grad_enabled() else a.mul_(gate_a)
        return gated.addcmul_(gate_b, b)


def _valid_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean((2, 3))
    return (x * valid).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)


class CARAFE(nn.Module):
    """Content-aware upsampling whose kernels come from the coarse level alone, then addition.

    Source: Wang et al., "CARAFE", ICCV 2019. There a convolution on the coarse map predicts the kernels of the four
    sub-positions; here it runs on the compressed map after nearest upsampling, which serves any pair of sizes.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels from which kernels are predicted.
        kernel_size: ``k``.
    """

    def __init__(self, channels: int, *, compressed_channels: int = 64, kernel_size: int = 5) -> None:
        super().__init__()
        self.compress = nn.Conv2d(channels, compressed_channels, 1)
        self.kernels = KernelPredictor(compressed_channels, kernel_size=kernel_size)

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merges ``(B, C, h, w)`` into ``(B, C, H, W)``; ``valid`` is unused, kept for one signature of fusions."""
        return recomputed(self, self._merge, coarse, fine)

    def _merge(self, coarse: Tensor, fine: Tensor) -> Tensor:
        size = (fine.shape[-2], fine.shape[-1])
        kernels: Tensor = self.kernels(F.interpolate(self.compress(coarse), size=size, mode="nearest"))
        return fine + reassemble(coarse, kernels, size)


class GACARAFE(nn.Module):
    """Content-aware upsampling whose kernels are made from both adjacent levels, gates, then addition.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels to which either map is compressed before kernels are predicted.
        kernel_size: ``k``.

    Example:
        >>> GACARAFE(16)(torch.randn(1, 16, 5, 5), torch.randn(1, 16, 9, 10)).shape
        torch.Size([1, 16, 9, 10])
    """

    def __init__(self, channels: int, *, compressed_channels: int = 64, kernel_size: int = 5) -> None:
        super().__init__()
        self.compress_coarse = nn.Conv2d(channels, compressed_channels, 1)
        self.compress_fine = nn.Conv2d(channels, compressed_channels, 1)
        self.kernels = KernelPredictor(2 * compressed_channels, kernel_size=kernel_size)
        self.gates = ChannelGates(channels)

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merges ``coarse`` ``(B, C, h, w)`` into ``fine`` ``(B, C, H, W)``; ``valid`` is the fine level's mask."""
        return recomputed(self, self._merge, coarse, fine, valid)

    def _merge(self, coarse: Tensor, fine: Tensor, valid: Tensor | None) -> Tensor:
        size = (fine.shape[-2], fine.shape[-1])
        context = F.interpolate(self.compress_coarse(coarse), size=size, mode="nearest")
        kernels = self.kernels(torch.cat([context, self.compress_fine(fine)], 1))
        merged: Tensor = self.gates(reassemble(coarse, kernels, size), fine, valid)
        return merged


class GACAP(nn.Module):
    """Content-aware pooling, the mirror of GACARAFE for the bottom-up path.

    Kernels are predicted on the coarse grid from both levels and applied in the fine map around each coarse pixel;
    a 1x1 convolution, gates and the addition follow.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels to which either map is compressed before kernels are predicted.
        kernel_size: ``k``.

    Example:
        >>> GACAP(16)(torch.randn(1, 16, 9, 10), torch.randn(1, 16, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
    """

    def __init__(self, channels: int, *, compressed_channels: int = 64, kernel_size: int = 5) -> None:
        super().__init__()
        self.compress_fine = nn.Conv2d(channels, compressed_channels, 1)
        self.compress_coarse = nn.Conv2d(channels, compressed_channels, 1)
        self.kernels = KernelPredictor(2 * compressed_channels, kernel_size=kernel_size)
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        self.gates = ChannelGates(channels)

    def forward(self, fine: Tensor, coarse: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merges ``fine`` ``(B, C, H, W)`` into ``coarse`` ``(B, C, h, w)``; ``valid`` is the coarse level's mask."""
        return recomputed(self, self._merge, fine, coarse, valid)

    def _merge(self, fine: Tensor, coarse: Tensor, valid: Tensor | None) -> Tensor:
        size = (coarse.shape[-2], coarse.shape[-1])
        # Compression is linear, so averaging first gives the same map for a quarter of the work.
        context = self.compress_fine(F.adaptive_avg_pool2d(fine, size))
        kernels = self.kernels(torch.cat([context, self.compress_coarse(coarse)], 1))
        merged: Tensor = self.gates(self.project(reassemble(fine, kernels, size)), coarse, valid)
        return merged
