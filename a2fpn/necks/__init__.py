"""Necks: pyramid in, pyramid out. Importing this package registers every neck."""

from a2fpn.necks import a2fpn, carafe_fpn, fpn, pafpn
from a2fpn.necks.neck import NECKS, Neck, PyramidNeck, register_neck

__all__ = ["NECKS", "Neck", "PyramidNeck", "a2fpn", "carafe_fpn", "fpn", "pafpn", "register_neck"]
