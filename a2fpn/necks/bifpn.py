"""BiFPN: Tan et al., "EfficientDet: Scalable and Efficient Object Detection", CVPR 2020.

As in the paper: nodes with a single input are removed, inputs are fused with fast normalized weights, skip connections
lead from each input to its output, the layer is repeated, and extra levels take part in the fusion. As in the authors'
code: the activation comes between the fusion and the convolution. Differences:

* each backbone level is projected once, not once per outgoing edge, so that there are fewer parameters than in
  mmdetection's BiFPN of the same width;
* the norm is not a batch norm (see :class:`BiFPN`);
* maps are halved by max pooling centered on even pixels, as strided convolutions are everywhere here; TensorFlow's
  "SAME" pads maps of even size only at the end, which shifts them by a pixel. EfficientDet's weights are therefore not
  compatible.

Shape shorthand: ``B`` batch, ``C_i`` channels and ``H_i, W_i`` size of level ``i``, ``d`` pyramid channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2fpn.errors import ConfigError
from a2fpn.layers import ConvNormAct, LevelModules
from a2fpn.layers.conv import resolve_layer
from a2fpn.necks.neck import Neck, register_neck
from a2fpn.pyramid import PyramidSpec

# The paper's epsilon of fast normalized fusion.
_EPS = 1e-4


@register_neck("bifpn")
class BiFPN(Neck):
    """Repeated top-down and bottom-up fusion with learned weights and separable convolutions.

    The default norm is a layer norm over the channels of each pixel, not EfficientDet's batch norm: detectors train
    on one or two images per step, a coarse map may be a single pixel (an error of batch norm in training), and
    statistics over a map would let padding influence the features.

    Args:
        in_spec: Output levels of the backbone.
        out_channels: Channels ``d`` of every level.
        extra_levels: Coarser levels, max-pooled from the coarsest one before the fusion, in which they take part.
        repeats: Number of BiFPN layers.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation before each separable convolution (timm name), or None.

    Raises:
        ValueError: For fewer than two levels, extra ones included, or fewer than one repeat.

    Example:
        >>> neck = BiFPN(PyramidSpec.from_channels([8, 16], strides=[4, 8]), out_channels=32, repeats=2)
        >>> pyramid = neck({"c2": torch.zeros(1, 8, 25, 17), "c3": torch.zeros(1, 16, 13, 9)})
        >>> {name: tuple(x.shape) for name, x in pyramid.items()}
        {'p2': (1, 32, 25, 17), 'p3': (1, 32, 13, 9), 'p4': (1, 32, 7, 5)}
    """

    def __init__(
        self,
        in_spec: PyramidSpec,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        repeats: int = 3,
        norm_layer: str | None = "layernorm2d",
        act_layer: str | None = "silu",
    ) -> None:
        super().__init__(in_spec, out_channels=out_channels, extra_levels=extra_levels)
        levels = len(self.out_spec)
        if levels < 2:
            raise ConfigError(f"bifpn fuses levels and needs at least 2, got {levels}; raise extra_levels.")
        if repeats < 1:
            raise ConfigError(f"Expected repeats >= 1, got {repeats}.")
        self.lateral = LevelModules(
            self.out_spec.names[: len(in_spec)],
            (ConvNormAct(channels, out_channels, norm_layer=norm_layer) for channels in in_spec.channels),
        )
        self.layers = nn.ModuleList(
            BiFPNLayer(out_channels, self.out_spec.names, norm_layer=norm_layer, act_layer=act_layer)
            for _ in range(repeats)
        )

    def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
        """See :meth:`Neck.fuse`; the extra levels are included."""
        pyramid: list[Tensor] = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        while len(pyramid) < len(self.out_spec):
            pyramid.append(halve(pyramid[-1]))
        for layer in self.layers:
            pyramid = layer(pyramid)
        return pyramid


class BiFPNLayer(nn.Module):
    """One top-down and one bottom-up pass.

    Args:
        channels: Channels ``d`` of every level.
        levels: Names of the levels, at least 2.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation before each separable convolution (timm name), or None.
    """

    def __init__(self, channels: int, levels: Sequence[str], *, norm_layer: str | None, act_layer: str | None) -> None:
        super().__init__()

        def node(inputs: int) -> WeightedFusion:
            return WeightedFusion(channels, inputs, norm_layer=norm_layer, act_layer=act_layer)

        self.top_down = LevelModules(levels[:-1], (node(2) for _ in levels[1:]))
        # The coarsest level has no top-down node and therefore two inputs.
        self.bottom_up = LevelModules(levels[1:], (node(2 if name == levels[-1] else 3) for name in levels[1:]))

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``(B, d, H_i, W_i)`` per level to the same, finest first, for any decreasing sizes."""
        top_down = list(pyramid)
        for i in reversed(range(len(pyramid) - 1)):
            upsampled = F.interpolate(top_down[i + 1], size=pyramid[i].shape[-2:], mode="nearest")
            top_down[i] = self.top_down[i]([pyramid[i], upsampled])
        fused = top_down[:1]
        for i, node in enumerate(self.bottom_up, start=1):
            down = halve(fused[-1])
            if down.shape[-2:] != pyramid[i].shape[-2:]:
                # Sizes differ by a row or column with backbones that round sizes down.
                down = F.interpolate(down, size=pyramid[i].shape[-2:], mode="nearest")
            skips = [pyramid[i]] if i == len(self.bottom_up) else [pyramid[i], top_down[i]]
            fused.append(node([*skips, down]))
        return fused


class WeightedFusion(nn.Module):
    """Fast normalized fusion, activation, 3x3 separable convolution.

    ``sum_i w_i x_i / (eps + sum_j w_j)`` with ``w_i = relu(weight_i)``, initialized to equal weights.

    Args:
        channels: Channels ``d`` of every map.
        inputs: Number of maps.
        norm_layer: Norm after the convolution (timm name), or None.
        act_layer: Activation before it (timm name), or None.
    """

    def __init__(self, channels: int, inputs: int, *, norm_layer: str | None, act_layer: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.act = nn.Identity() if act_layer is None else resolve_layer("act_layer", act_layer)()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = ConvNormAct(channels, channels, norm_layer=norm_layer)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse maps ``(B, d, H, W)`` of one size into one."""
        weight = F.relu(self.weight)
        weight = weight / (weight.sum() + _EPS)
        fused = maps[0] * weight[0]
        for x, w in zip(maps[1:], weight[1:], strict=True):
            fused = fused + x * w
        y: Tensor = self.pointwise(self.depthwise(self.act(fused)))
        return y


def halve(x: Tensor) -> Tensor:
    """Maps ``(B, d, H, W)`` to ``(B, d, ceil(H / 2), ceil(W / 2))``."""
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
