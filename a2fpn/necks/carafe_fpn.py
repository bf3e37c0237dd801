"""FPN with content-aware upsampling: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019."""

from __future__ import annotations

from a2fpn.layers import CARAFE
from a2fpn.necks.neck import PyramidNeck, register_neck


@register_neck("carafe_fpn")
class CARAFEFPN(PyramidNeck):
    """FPN whose top-down path reassembles the coarse map with kernels that it predicts itself.

    Takes the arguments of :class:`~a2fpn.necks.neck.PyramidNeck`.
    """

    top_down_fusion = CARAFE
