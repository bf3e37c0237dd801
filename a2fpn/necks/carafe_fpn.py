"""FPN with content-aware upsampling: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019."""

from __future__ import annotations

import typing
from typing import Literal

from torch import Tensor

from a2fpn.layers import CARAFE, ConvNormAct
from a2fpn.layers.choices import check_choice
from a2fpn.necks.neck import PyramidNeck, register_neck
from a2fpn.pyramid import PyramidSpec

ExtraSource = Literal["neck", "backbone"]
EXTRA_SOURCES: tuple[str, ...] = typing.get_args(ExtraSource)


@register_neck("carafe_fpn")
class CARAFEFPN(PyramidNeck):
    """FPN whose top-down path upsamples by CARAFE, with kernels predicted from the coarse map.

    Args:
        in_spec: Output levels of the backbone.
        out_channels: Channels of every level.
        extra_levels: Coarser levels.
        extra_source: Source of the first extra level: the ``"neck"``'s coarsest level, by subsampling; or the
            ``"backbone"``'s, by a 3x3 convolution of stride 2, which then starts the top-down path, as in
            mmdetection's published detectors. Further ones are subsampled.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation after each convolution (timm name), or None.

    Raises:
        ValueError: For an unknown source.
    """

    top_down_fusion = CARAFE

    def __init__(
        self,
        in_spec: PyramidSpec,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        extra_source: ExtraSource = "neck",
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        check_choice("extra_source", extra_source, EXTRA_SOURCES)
        super().__init__(
            in_spec, out_channels=out_channels, extra_levels=extra_levels, norm_layer=norm_layer, act_layer=act_layer
        )
        self.from_backbone = extra_source == "backbone" and extra_levels > 0
        if self.from_backbone:
            extra = self.out_spec.names[len(in_spec)]
            self.lateral.add_module(
                extra,
                ConvNormAct(
                    in_spec.channels[-1], out_channels, 3, stride=2, norm_layer=norm_layer, act_layer=act_layer
                ),
            )
            self.top_down.add_module(self.out_spec.names[len(in_spec) - 1], CARAFE(out_channels))
            self.output.add_module(
                extra, ConvNormAct(out_channels, out_channels, 3, norm_layer=norm_layer, act_layer=act_layer)
            )

    def fuse(self, features: list[Tensor], valid: list[Tensor | None]) -> list[Tensor]:
        """See :meth:`~a2fpn.necks.Neck.fuse`."""
        if self.from_backbone:
            features, valid = [*features, features[-1]], [*valid, None]
        return super().fuse(features, valid)
