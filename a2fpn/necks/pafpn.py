"""PAFPN: Liu et al., "Path Aggregation Network for Instance Segmentation", CVPR 2018."""

from __future__ import annotations

from a2fpn.necks.neck import NearestFusion, PyramidNeck, StridedFusion, register_neck


@register_neck("pafpn")
class PAFPN(PyramidNeck):
    """FPN followed by a bottom-up path of strided convolutions.

    Takes the arguments of :class:`~a2fpn.necks.neck.PyramidNeck`.
    """

    top_down_fusion = NearestFusion
    bottom_up_fusion = StridedFusion
