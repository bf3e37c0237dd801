"""Exporters of labeled images to other formats, one module per format."""

from a2fpn.data.exporters import (  # noqa: F401  # each registers its format
    cvat,
    datumaro,
    label_images,
    label_studio,
    labelme,
    mask_files,
    panoptic,
    voc,
    yolo,
)
from a2fpn.data.exporters.base import EXPORTERS, Exporter, ExportOptions, export_images, register_exporter
from a2fpn.data.exporters.convert import convert_data

__all__ = [
    "EXPORTERS",
    "ExportOptions",
    "Exporter",
    "convert_data",
    "export_images",
    "register_exporter",
]
