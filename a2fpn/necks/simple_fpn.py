"""Simple feature pyramid: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.

Shape shorthand: ``B`` batch, ``C`` channels of the one input map, ``d`` pyramid channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from a2fpn.errors import ConfigError
from a2fpn.layers import ConvNormAct, LevelModules, resample
from a2fpn.necks.neck import Neck, register_neck
from a2fpn.pyramid import PyramidSpec


@register_neck("simple_fpn")
class SimpleFPN(Neck):
    """Builds every level from one map, independently of the others.

    Finer levels come from transposed convolutions, coarser ones from max pooling; a 1x1 and a 3x3 convolution follow.
    For backbones of a single stride, such as plain vision transformers.

    Args:
        in_spec: Output level of the backbone, a single one.
        out_channels: Channels ``d`` of every level.
        extra_levels: Coarser levels added by subsampling.
        strides: Strides of the levels before the extra ones; increasing powers of two.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation between two transposed convolutions (timm name), or None.

    Raises:
        ValueError: For more than one input level, no stride, or a stride that is not a power of two.

    Example:
        >>> import torch
        >>> neck = SimpleFPN(PyramidSpec.from_channels([48], strides=[16]), out_channels=32)
        >>> pyramid = neck({"c4": torch.zeros(1, 48, 5, 7)})
        >>> {name: tuple(x.shape[-2:]) for name, x in pyramid.items()}
        {'p2': (20, 28), 'p3': (10, 14), 'p4': (5, 7), 'p5': (3, 4), 'p6': (2, 2)}
    """

    fuses_levels = False

    def __init__(
        self,
        in_spec: PyramidSpec,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        strides: Sequence[int] = (4, 8, 16, 32),
        norm_layer: str | None = "layernorm2d",
        act_layer: str | None = "gelu",
    ) -> None:
        if len(in_spec) != 1:
            raise ConfigError(
                f"simple_fpn makes its levels from one map, got {len(in_spec)}: {in_spec}. Pass one level, or take "
                "a neck that fuses levels, such as 'fpn'."
            )
        if not strides:
            raise ConfigError("simple_fpn needs at least one stride, got none.")
        super().__init__(in_spec, out_channels=out_channels, extra_levels=extra_levels)
        every = [*strides, *(strides[-1] << (i + 1) for i in range(extra_levels))]
        self.out_spec = PyramidSpec.from_channels([out_channels] * len(every), strides=every, prefix="p")
        (level,) = in_spec.values()

        def stage(stride: int) -> nn.Sequential:
            modules, channels = resample(
                level.channels, level.stride, stride, norm_layer=norm_layer, act_layer=act_layer
            )
            return nn.Sequential(
                *modules,
                ConvNormAct(channels, out_channels, 1, norm_layer=norm_layer),
                ConvNormAct(out_channels, out_channels, 3, norm_layer=norm_layer),
            )

        self.stages = LevelModules(self.out_spec.names[: len(strides)], map(stage, strides))

    def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
        """Maps the one ``(B, C, H, W)`` to ``(B, d, ceil(s H / t), ceil(s W / t))`` per level of stride ``t``."""
        return [stage(features[0]) for stage in self.stages]
