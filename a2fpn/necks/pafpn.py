"""PAFPN: Liu et al., "Path Aggregation Network for Instance Segmentation", CVPR 2018."""

from __future__ import annotations

from a2fpn.necks.neck import NearestFusion, PyramidNeck, StridedFusion, register_neck
from a2fpn.pyramid import PyramidSpec


@register_neck("pafpn")
class PAFPN(PyramidNeck):
    """FPN followed by a bottom-up path of strided convolutions.

    Args:
        in_spec: What the backbone gives.
        out_channels: Channels of every level.
        extra_levels: Coarser levels added by subsampling.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation after each convolution (timm name), or None.
    """

    def __init__(
        self,
        in_spec: PyramidSpec,
        *,
        out_channels: int = 256,
        extra_levels: int = 1,
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__(
            in_spec,
            top_down=NearestFusion,
            bottom_up=StridedFusion,
            out_channels=out_channels,
            extra_levels=extra_levels,
            norm_layer=norm_layer,
            act_layer=act_layer,
        )
