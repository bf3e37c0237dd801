"""Scale of a slide in micrometers per pixel, from various metadata."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    import tifffile

_LARGEST = 40.0
"""Micrometers per pixel from which a resolution is that of a screen or printer: 600 dpi are 42."""
_UNITS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "nm": 1e-3, "pm": 1e-6}
_INCH = 25_400.0
_TAG_UNITS = {2: _INCH, 3: 10_000.0}  # TIFF's ResolutionUnit: inch, centimeter


def microns_per_pixel(file: tifffile.TiffFile) -> float | None:
    """Return the scale along x stated by OME, ImageJ, Aperio or the resolution tags of a TIFF.

    Resolutions of screens and printers (more than 40 µm per pixel) are ignored.
    """
    found = (_from_ome(file), _from_imagej(file), _from_aperio(file), _from_tags(file))
    return next(filter(None, map(_believed, found)), None)


def of_dots(dots_per_inch: tuple[float, float] | None) -> float | None:
    """Return the scale along x of a resolution in dots per inch; those of screens and printers are ignored."""
    return None if not dots_per_inch or not dots_per_inch[0] else _believed(_INCH / float(dots_per_inch[0]))


def _believed(scale: float | None) -> float | None:
    return scale if scale is not None and 0 < scale < _LARGEST else None


def _from_ome(file: tifffile.TiffFile) -> float | None:
    text = file.ome_metadata
    if not text or "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities may expand without bound
        return None
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    for element in root.iter():
        if element.tag.rpartition("}")[2] == "Pixels" and "PhysicalSizeX" in element.attrib:
            unit = _UNITS.get(element.get("PhysicalSizeXUnit", "µm"))
            size = _number(element.get("PhysicalSizeX"))
            return None if unit is None or size is None else size * unit
    return None


def _from_imagej(file: tifffile.TiffFile) -> float | None:
    metadata = file.imagej_metadata
    if not metadata:
        return None
    unit = _UNITS.get(str(metadata.get("unit", "")).replace("\\u00B5", "µ"))
    per_unit = _resolution(file)
    return None if unit is None or not per_unit else unit / per_unit


def _from_aperio(file: tifffile.TiffFile) -> float | None:
    if not file.is_svs:
        return None
    match = re.search(r"\bMPP\s*=\s*([0-9.]+)", file.pages[0].description)  # type: ignore[union-attr]
    return _number(match[1]) if match else None


def _from_tags(file: tifffile.TiffFile) -> float | None:
    tag = file.series[0].keyframe.tags.get("ResolutionUnit")
    unit = _TAG_UNITS.get(int(tag.value)) if tag is not None else None
    per_unit = _resolution(file)
    return None if unit is None or not per_unit else unit / per_unit


def _resolution(file: tifffile.TiffFile) -> float | None:
    """Pixels per unit of length along x."""
    tag = file.series[0].keyframe.tags.get("XResolution")
    if tag is None:
        return None
    above, below = tag.value
    return above / below if below else None


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
