"""Content-aware fusion of two adjacent levels: CARAFE, GACARAFE and GACAP.

Sources: Wang et al., "CARAFE", ICCV 2019, for reassembly by predicted kernels; the A2-FPN abstract for kernels made
from both adjacent levels and for channel reweighting before the addition.

Shape shorthand: ``B`` batch, ``C`` channels, ``(h, w)`` coarse map, ``(H, W)`` fine map, ``k`` kernel side.
"""

from __future__ import annotations

import typing
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.device import is_exported, is_on_accelerator
from a2fpn.layers.checkpointing import maybe_checkpoint
from a2fpn.layers.choices import check_choice
from a2fpn.layers.reassemble import reassemble
from a2fpn.layers.resample import average, fit_doubled

Pooling = Literal["mean", "attention"]
POOLINGS: tuple[str, ...] = typing.get_args(Pooling)
KernelGrid = Literal["fine", "coarse"]
KERNEL_GRIDS: tuple[str, ...] = typing.get_args(KernelGrid)
KernelInit = Literal["center", "uniform"]
KERNEL_INITS: tuple[str, ...] = typing.get_args(KernelInit)

_STARTS: dict[KernelInit, tuple[float, float]] = {"center": (4.0, 4.0), "uniform": (0.0, 1.0)}
"""Center bias and scale of each initialization."""


class KernelPredictor(nn.Module):
    """Predicts normalized reassembly kernels: a 3x3 convolution, scaled, softmax over the neighborhood.

    ``logits = scale * conv(x)``; the convolution's bias is initialized to ``center_bias / scale`` at the center, close
    to nearest-neighbor sampling. The scale keeps the softmax from saturating, as a large bias alone would make it.

    Args:
        in_channels: Channels of the input.
        kernel_size: ``k``, odd.
        center_bias: Initial logit of the center relative to its neighbors.
        scale: Fixed factor on the convolution's output.
        doubled: Whether to predict kernels for a map of twice the input's size: four per pixel, pixel-shuffled.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        kernel_size: int = 5,
        center_bias: float = 4.0,
        scale: float = 4.0,
        doubled: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        self.scale = scale
        self.doubled = doubled
        self.conv = nn.Conv2d(in_channels, kernel_size**2 * (4 if doubled else 1), 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.001)
        self.reset_center(center_bias)

    def reset_center(self, center_bias: float) -> None:
        """Set the bias to ``center_bias / scale`` at the center and 0 elsewhere."""
        if self.conv.bias is None:
            raise RuntimeError("The predictor's convolution has a bias by construction.")
        with torch.no_grad():
            self.conv.bias.zero_()
            # Channels are ordered by position in the kernel, then by sub-pixel.
            places = self.conv.bias.view(-1, 4 if self.doubled else 1)
            places[len(places) // 2] = center_bias / self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Predict kernels that sum to one over dim 1.

        Args:
            x: ``(B, in_channels, H, W)``.

        Returns:
            float32 ``(B, k * k, H, W)``, or ``(B, k * k, 2 H, 2 W)`` if doubled.
        """
        logits: Tensor = self.conv(x) * self.scale
        if self.doubled:
            logits = F.pixel_shuffle(logits, 2)
        return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


class ChannelGates(nn.Module):
    """Channel reweighting of two maps before they are added (A2-FPN abstract).

    Both maps are pooled over their valid pixels; a two-layer MLP predicts a gate ``2 * sigmoid(.)`` for each channel
    of each map. The last layer is zero-initialized, so gates start at exactly one.

    Args:
        channels: Channels of either map.
        reduction: The hidden layer has ``channels // reduction`` units, at least 8.
        pool: ``"mean"``, or ``"attention"``: weights by a softmax over the pixels of a zero-initialized linear
            projection, so that it starts as the mean (Cao et al., "GCNet", ICCV Workshops 2019).

    Raises:
        ValueError: For an unknown pooling.
    """

    def __init__(self, channels: int, *, reduction: int = 8, pool: Pooling = "mean") -> None:
        super().__init__()
        check_choice("pool", pool, POOLINGS)
        self.hidden = nn.Linear(2 * channels, max(8, channels // reduction))
        self.gate = nn.Linear(self.hidden.out_features, 2 * channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.focus: nn.ParameterList | None = None
        if pool == "attention":
            self.focus = nn.ParameterList(torch.zeros(channels) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return ``gate_a * a + gate_b * b`` for maps ``(B, C, H, W)``; ``valid`` is a bool ``(B, 1, H, W)``.

        With gradients disabled, the sum is written to ``a`` in place.
        """
        gate_a, gate_b = self.gates(a, b, valid)[:, :, None, None].to(a.dtype).chunk(2, 1)
        if is_exported():
            return gate_a * a + gate_b * b
        gated = gate_a * a if torch.is_grad_enabled() else a.mul_(gate_a)
        return gated.addcmul_(gate_b, b)

    def gates(self, a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
        """Gates of both maps, ``(B, 2 C)`` in 0..2."""
        if self.focus is None:
            pooled = torch.cat([_valid_mean(a, valid), _valid_mean(b, valid)], 1)
        else:
            pooled = torch.cat([_attention_pool(x, w, valid) for x, w in zip((a, b), self.focus, strict=True)], 1)
        return 2 * torch.sigmoid(self.gate(F.relu(self.hidden(pooled))))


def _valid_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean((2, 3))
    return (x * valid).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)


def _attention_pool(x: Tensor, focus: Tensor, valid: Tensor | None) -> Tensor:
    logits = torch.einsum("bchw,c->bhw", x, focus.to(x.dtype)).flatten(1)
    if valid is not None:
        logits = logits.masked_fill(~valid.flatten(1), torch.finfo(logits.dtype).min)
    weights = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return torch.einsum("bcn,bn->bc", x.flatten(2), weights.to(x.dtype))


class CARAFE(nn.Module):
    """Content-aware upsampling with kernels predicted from the coarse level alone, then addition.

    Source: Wang et al., "CARAFE", ICCV 2019, with the arithmetic and initialization of the authors' code in mmcv: a
    convolution of the compressed coarse map predicts kernels for four sub-positions; borders are zero-padded. A fine
    map of twice the size, or one pixel less, is handled by cropping; for any other size the kernels are those of the
    nearest sub-position.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels from which kernels are predicted.
        kernel_size: ``k``.

    Example:
        >>> CARAFE(16)(torch.randn(1, 16, 5, 5), torch.randn(1, 16, 9, 10)).shape
        torch.Size([1, 16, 9, 10])
    """

    def __init__(self, channels: int, *, compressed_channels: int = 64, kernel_size: int = 5) -> None:
        super().__init__()
        self.compress = nn.Conv2d(channels, compressed_channels, 1)
        nn.init.xavier_uniform_(self.compress.weight)
        nn.init.constant_(typing.cast(Tensor, self.compress.bias), 0.0)
        self.kernels = KernelPredictor(
            compressed_channels, kernel_size=kernel_size, center_bias=0.0, scale=1.0, doubled=True
        )

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``(B, C, h, w)`` into ``(B, C, H, W)``; ``valid`` is unused, for a common signature of fusions."""
        return maybe_checkpoint(self, self._merge, coarse, fine)

    def _merge(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return fine + self.upsample(coarse, (fine.shape[-2], fine.shape[-1]))

    def upsample(self, coarse: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps ``(B, C, h, w)`` to ``(B, C, H, W)``, without the addition."""
        kernels = fit_doubled(self.kernels(self.compress(coarse)), size)
        return reassemble(coarse, kernels, size, padding="zeros")


class GACARAFE(nn.Module):
    """Content-aware upsampling with kernels predicted from both adjacent levels, then gated addition.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels to which either map is compressed before kernels are predicted.
        kernel_size: ``k``.
        kernels: Resolution of their prediction: ``"fine"``, from the upsampled compressed coarse map concatenated with
            the compressed fine one; or ``"coarse"``, from the sum of both, the fine map averaged first, four kernels
            per pixel, pixel-shuffled. A fine map of twice the size, or one pixel less, is handled by cropping; for any
            other size the kernels are those of the nearest sub-position.
        kernel_init: Kernels at the start: near the ``"center"``, with scaled logits, which keeps the function of a neck
            that samples the nearest pixel; or ``"uniform"``, with plain logits as in CARAFE.
        pool: Pooling of the gates, see :class:`ChannelGates`.

    Raises:
        ValueError: For an unknown grid, initialization or pooling.

    Example:
        >>> GACARAFE(16)(torch.randn(1, 16, 5, 5), torch.randn(1, 16, 9, 10)).shape
        torch.Size([1, 16, 9, 10])
    """

    def __init__(
        self,
        channels: int,
        *,
        compressed_channels: int = 64,
        kernel_size: int = 5,
        kernels: KernelGrid = "fine",
        kernel_init: KernelInit = "center",
        pool: Pooling = "mean",
    ) -> None:
        super().__init__()
        check_choice("kernels", kernels, KERNEL_GRIDS)
        check_choice("kernel_init", kernel_init, KERNEL_INITS)
        self.compress_coarse = nn.Conv2d(channels, compressed_channels, 1)
        self.compress_fine = nn.Conv2d(channels, compressed_channels, 1)
        doubled = kernels == "coarse"
        center_bias, scale = _STARTS[kernel_init]
        self.kernels = KernelPredictor(
            compressed_channels * (1 if doubled else 2),
            kernel_size=kernel_size,
            center_bias=center_bias,
            scale=scale,
            doubled=doubled,
        )
        self.gates = ChannelGates(channels, pool=pool)

    def forward(self, coarse: Tensor, fine: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``coarse`` ``(B, C, h, w)`` into ``fine`` ``(B, C, H, W)``; ``valid`` is the fine level's mask."""
        return maybe_checkpoint(self, self._merge, coarse, fine, valid)

    def _merge(self, coarse: Tensor, fine: Tensor, valid: Tensor | None) -> Tensor:
        size = (fine.shape[-2], fine.shape[-1])
        merged: Tensor = self.gates(reassemble(coarse, self._kernels(coarse, fine), size), fine, valid)
        return merged

    def _kernels(self, coarse: Tensor, fine: Tensor) -> Tensor:
        size = (fine.shape[-2], fine.shape[-1])
        if self.kernels.doubled:
            # Compression is linear, so averaging first gives the same map at a quarter of the cost.
            averaged = average(fine, (coarse.shape[-2], coarse.shape[-1]))
            context = self.compress_coarse(coarse) + self.compress_fine(averaged)
            return fit_doubled(self.kernels(context), size)
        context = F.interpolate(self.compress_coarse(coarse), size=size, mode="nearest")
        kernels: Tensor = self.kernels(torch.cat([context, self.compress_fine(fine)], 1))
        return kernels


class GACAP(nn.Module):
    """Content-aware pooling, the counterpart of GACARAFE in the bottom-up path.

    Kernels are predicted at the coarse resolution from both levels and applied to the fine map around each coarse
    pixel; a 1x1 convolution and gated addition follow.

    Args:
        channels: Channels of both maps.
        compressed_channels: Channels to which either map is compressed before kernels are predicted.
        kernel_size: ``k``.
        kernel_init: See :class:`GACARAFE`.
        pool: Pooling of the gates, see :class:`ChannelGates`.

    Raises:
        ValueError: For an unknown initialization or pooling.

    Example:
        >>> GACAP(16)(torch.randn(1, 16, 9, 10), torch.randn(1, 16, 5, 5)).shape
        torch.Size([1, 16, 5, 5])
    """

    def __init__(
        self,
        channels: int,
        *,
        compressed_channels: int = 64,
        kernel_size: int = 5,
        kernel_init: KernelInit = "center",
        pool: Pooling = "mean",
    ) -> None:
        super().__init__()
        check_choice("kernel_init", kernel_init, KERNEL_INITS)
        self.compress_fine = nn.Conv2d(channels, compressed_channels, 1)
        self.compress_coarse = nn.Conv2d(channels, compressed_channels, 1)
        center_bias, scale = _STARTS[kernel_init]
        self.kernels = KernelPredictor(
            2 * compressed_channels, kernel_size=kernel_size, center_bias=center_bias, scale=scale
        )
        self.project = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        self.gates = ChannelGates(channels, pool=pool)

    def forward(self, fine: Tensor, coarse: Tensor, valid: Tensor | None = None) -> Tensor:
        """Merge ``fine`` ``(B, C, H, W)`` into ``coarse`` ``(B, C, h, w)``; ``valid`` is the coarse level's mask."""
        return maybe_checkpoint(self, self._merge, fine, coarse, valid)

    def _merge(self, fine: Tensor, coarse: Tensor, valid: Tensor | None) -> Tensor:
        size = (coarse.shape[-2], coarse.shape[-1])
        # Compression is linear, so both orders give the same map: averaging first saves three quarters of the products,
        # averaging last as much memory traffic, which is what takes time on a GPU.
        last = is_on_accelerator(fine)
        context = average(self.compress_fine(fine), size) if last else self.compress_fine(average(fine, size))
        kernels = self.kernels(torch.cat([context, self.compress_coarse(coarse)], 1))
        merged: Tensor = self.gates(self.project(reassemble(fine, kernels, size)), coarse, valid)
        return merged
