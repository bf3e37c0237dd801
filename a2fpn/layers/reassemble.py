"""Content-aware reassembly of features: the op, CARAFE, GACARAFE and GACAP.

Sources: Wang et al., "CARAFE", ICCV 2019, for kernel-wise reassembly; the A2-FPN abstract for kernels made from
both adjacent levels and for the reweighting of channels before the addition.

Shape shorthand: ``B`` batch, ``C`` channels, ``(h, w)`` source map, ``(H, W)`` target map, ``k`` kernel side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.layers.precision import autocast_off
from a2fpn.layers.recompute import recomputed

# Bytes of gathered windows that a block of rows may hold: about a core's cache, so that a block is read
# back before it leaves, and a bound on what the op needs beyond its input and output.
_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**27}


def reassemble(x: Tensor, kernels: Tensor, size: tuple[int, int]) -> Tensor:
    """Each target pixel becomes a weighted sum of the ``k x k`` neighbourhood of its nearest source pixel.

    The nearest source pixel of target pixel ``i`` is ``floor(i * h / H)``, as in nearest-neighbour interpolation,
    for any pair of sizes, up or down. Beyond the border the edge pixel is repeated. Only ``x`` and ``kernels`` are
    kept for the backward pass; windows are gathered again, a block of rows at a time.

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
    kernels = kernels.to(x.dtype)
    if torch.compiler.is_compiling():
        return _reassemble_by_shifts(x, kernels, k)
    result: Tensor = _Reassemble.apply(x, kernels, k)
    return result


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


class _Blocks:
    """Cuts the reassembly into blocks of target rows, as small matrix products over gathered windows.

    Where the target is exactly twice the source, the four target pixels of a source pixel share one window
    (``scale`` 2); otherwise each target pixel has its own (``scale`` 1).
    """

    def __init__(self, x: Tensor, kernels: Tensor, k: int) -> None:
        self.batch, self.channels, h, w = x.shape
        target_h, target_w = kernels.shape[-2:]
        self.k, self.scale = k, 2 if (target_h, target_w) == (2 * h, 2 * w) else 1
        self.height, self.width = target_h // self.scale, target_w // self.scale
        # One window per source pixel, in order: windows are views, not gathers.
        self.dense = (self.height, self.width) == (h, w)
        self.rows = _source_index(self.height, h, x.device)
        self.columns = _source_index(self.width, w, x.device)
        self.padded = _pad_channels_last(x, k // 2)
        self.kernels = self.blocked(kernels)
        row_bytes = self.batch * self.width * k * k * self.channels * x.element_size()
        self.step = max(1, _BLOCK_BYTES.get(x.device.type, _BLOCK_BYTES["cuda"]) // max(1, row_bytes))

    def blocked(self, x: Tensor) -> Tensor:
        """A view of target-sized ``(B, C, H, W)`` as ``(B, rows, columns, scale, scale, C)``."""
        s = self.scale
        return x.permute(0, 2, 3, 1).view(x.shape[0], self.height, s, self.width, s, x.shape[1]).transpose(2, 3)

    def row_blocks(self) -> list[slice]:
        return [slice(start, min(start + self.step, self.height)) for start in range(0, self.height, self.step)]

    def windows(self, block: slice) -> Tensor:
        """Windows of a block, ``(pixels, k * k, C)``."""
        if self.dense:
            unfolded = self.padded[:, block.start : block.stop + self.k - 1].unfold(1, self.k, 1).unfold(2, self.k, 1)
            return unfolded.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.k * self.k, self.channels)
        gathered = self.padded.flatten(1, 2).index_select(1, self.index(block))
        return gathered.reshape(-1, self.k * self.k, self.channels)

    def add_windows(self, grad: Tensor, windows: Tensor, block: slice) -> None:
        """Adds ``windows`` (as from :meth:`windows`) to ``grad``, shaped like ``padded``, where they were taken."""
        k = self.k
        if not self.dense:
            grad.flatten(1, 2).index_add_(1, self.index(block), windows.reshape(self.batch, -1, self.channels))
            return
        windows = windows.reshape(self.batch, -1, self.width, k, k, self.channels)
        for i in range(k):
            for j in range(k):
                grad[:, block.start + i : block.stop + i, j : j + self.width] += windows[:, :, :, i, j]

    def index(self, block: slice) -> Tensor:
        """Positions in the flattened padded map of every window element of a block of rows."""
        offsets = torch.arange(self.k, device=self.rows.device)
        rows = self.rows[block, None] + offsets
        columns = self.columns[:, None] + offsets
        return (rows[:, None, :, None] * self.padded.shape[2] + columns[None, :, None, :]).flatten()

    def weights(self, block: slice) -> Tensor:
        """Kernels of a block, ``(pixels, scale * scale, k * k)``."""
        return self.kernels[:, block].reshape(-1, self.scale**2, self.k**2)


def _pad_channels_last(x: Tensor, pad: int) -> Tensor:
    """Replicate padding of ``(B, C, h, w)`` to ``(B, h + 2 pad, w + 2 pad, C)`` in one allocation."""
    b, c, h, w = x.shape
    padded = x.new_empty(b, h + 2 * pad, w + 2 * pad, c)
    rows = padded.narrow(1, pad, h)
    rows.narrow(2, pad, w).copy_(x.permute(0, 2, 3, 1))
    rows.narrow(2, 0, pad).copy_(rows.narrow(2, pad, 1))
    rows.narrow(2, pad + w, pad).copy_(rows.narrow(2, pad + w - 1, 1))
    padded.narrow(1, 0, pad).copy_(padded.narrow(1, pad, 1))
    padded.narrow(1, pad + h, pad).copy_(padded.narrow(1, pad + h - 1, 1))
    return padded


class _Reassemble(torch.autograd.Function):
    """The op; its products run in the dtype of ``x``, in both passes, whatever autocast says around them."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, kernels: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.k = k  # type: ignore[attr-defined]
        with autocast_off(x):
            return _weigh(_Blocks(x, kernels, k), kernels)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernels = ctx.saved_tensors  # type: ignore[attr-defined]
        with autocast_off(x):
            grad_x, grad_kernels = _weigh_backward(_Blocks(x, kernels, ctx.k), grad)  # type: ignore[attr-defined]
        return grad_x, grad_kernels, None


def _weigh(blocks: _Blocks, kernels: Tensor) -> Tensor:
    out = _empty_channels_last(kernels, blocks.channels)
    blocked = blocks.blocked(out)
    for block in blocks.row_blocks():
        product = torch.bmm(blocks.weights(block), blocks.windows(block))
        blocked[:, block] = product.reshape(blocked[:, block].shape)
    return out


def _weigh_backward(blocks: _Blocks, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads = blocks.blocked(grad)
    grad_padded = torch.zeros_like(blocks.padded)
    grad_kernels = _empty_channels_last(grad, blocks.k**2)
    blocked = blocks.blocked(grad_kernels)
    for block in blocks.row_blocks():
        g = grads[:, block].reshape(-1, blocks.scale**2, blocks.channels)
        product = torch.bmm(g, blocks.windows(block).transpose(1, 2))
        blocked[:, block] = product.reshape(blocked[:, block].shape)
        blocks.add_windows(grad_padded, torch.bmm(blocks.weights(block).transpose(1, 2), g), block)
    return _fold_border(grad_padded, blocks.k // 2).permute(0, 3, 1, 2), grad_kernels


def _empty_channels_last(like: Tensor, channels: int) -> Tensor:
    b, _, h, w = like.shape
    return like.new_empty(b, h, w, channels).permute(0, 3, 1, 2)


def _fold_border(padded: Tensor, pad: int) -> Tensor:
    """Gradient of replicate padding: adds the border of ``(B, h + 2 pad, w + 2 pad, C)`` to the edge pixels.

    Works in place; the result is the inner part.
    """
    for dim in (1, 2):
        inner = padded.narrow(dim, pad, padded.shape[dim] - 2 * pad)
        inner.narrow(dim, 0, 1).add_(padded.narrow(dim, 0, pad).sum(dim, keepdim=True))
        inner.narrow(dim, inner.shape[dim] - 1, 1).add_(
            padded.narrow(dim, padded.shape[dim] - pad, pad).sum(dim, keepdim=True)
        )
        padded = inner
    return padded


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
        """Returns ``gate_a * a + gate_b * b`` for maps ``(B, C, H, W)``; ``valid`` is a bool ``(B, 1, H, W)``."""
        pooled = torch.cat([_valid_mean(a, valid), _valid_mean(b, valid)], 1)
        gates = 2 * torch.sigmoid(self.gate(F.relu(self.hidden(pooled))))
        gate_a, gate_b = gates[:, :, None, None].to(a.dtype).chunk(2, 1)
        return torch.addcmul(gate_a * a, gate_b, b)


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
