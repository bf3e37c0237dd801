"""FPN: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017."""

from __future__ import annotations

from a2fpn.necks.neck import NearestFusion, PyramidNeck, register_neck
from a2fpn.pyramid import PyramidSpec


@register_neck("fpn")
class FPN(PyramidNeck):
    """1x1 laterals, nearest top-down path, 3x3 output convolutions; the same function as torchvision's FPN.

    Args:
        in_spec: What the backbone gives.
        out_channels: Channels of every level.
        extra_levels: Coarser levels added by subsampling.
        norm_layer: Norm after each convolution (timm name), or None.
        act_layer: Activation after each convolution (timm name), or None.

    Example:
        >>> import torch
        >>> neck = FPN(PyramidSpec.from_channels([8, 16], strides=[4, 8]), out_channels=32)
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
        norm_layer: str | None = None,
        act_layer: str | None = None,
    ) -> None:
        super().__init__(
            in_spec,
            top_down=NearestFusion,
            out_channels=out_channels,
            extra_levels=extra_levels,
            norm_layer=norm_layer,
            act_layer=act_layer,
        )
