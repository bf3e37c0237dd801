"""Instance masks: pixels, RLE, polygons, pasting and training targets."""

from a2fpn.masks.instances import InstanceMasks, nearest_pixels

__all__ = ["InstanceMasks", "nearest_pixels"]
