"""Necks: pyramid in, pyramid out. Importing this package registers every neck."""

from a2fpn.necks import a2fpn, bifpn, carafe_fpn, dysample_fpn, fpn, pafpn, simple_fpn
from a2fpn.necks.neck import NECKS, Neck, PyramidNeck, create_neck, register_neck

__all__ = [
    "NECKS",
    "Neck",
    "PyramidNeck",
    "a2fpn",
    "bifpn",
    "carafe_fpn",
    "create_neck",
    "dysample_fpn",
    "fpn",
    "pafpn",
    "register_neck",
    "simple_fpn",
]
