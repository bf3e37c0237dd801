"""FPN: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017."""

from __future__ import annotations

from a2fpn.necks.neck import NearestFusion, PyramidNeck, register_neck


@register_neck("fpn")
class FPN(PyramidNeck):
    """1x1 laterals, nearest top-down path, 3x3 output convolutions; the same function as torchvision's FPN.

    Takes the arguments of :class:`~a2fpn.necks.neck.PyramidNeck`.

    Example:
        >>> import torch
        >>> from a2fpn.pyramid import PyramidSpec
        >>> neck = FPN(PyramidSpec.from_channels([8, 16], strides=[4, 8]), out_channels=32)
        >>> pyramid = neck({"c2": torch.zeros(1, 8, 25, 17), "c3": torch.zeros(1, 16, 13, 9)})
        >>> {name: tuple(x.shape) for name, x in pyramid.items()}
        {'p2': (1, 32, 25, 17), 'p3': (1, 32, 13, 9), 'p4': (1, 32, 7, 5)}
    """

    top_down_fusion = NearestFusion
