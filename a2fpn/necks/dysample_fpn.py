"""FPN with dynamic upsampling: Liu et al., "Learning to Upsample by Learning to Sample", ICCV 2023."""

from __future__ import annotations

from a2fpn.layers import DySample
from a2fpn.necks.neck import PyramidNeck, register_neck


@register_neck("dysample_fpn")
class DySampleFPN(PyramidNeck):
    """FPN whose top-down path samples the coarse map bilinearly at learned points.

    Takes the arguments of :class:`~a2fpn.necks.neck.PyramidNeck`.
    """

    top_down_fusion = DySample
