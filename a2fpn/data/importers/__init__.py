"""Importers of other formats to COCO folders, one module per format."""

from a2fpn.data.importers import (  # noqa: F401  # each registers its format
    coco,
    cvat,
    datumaro,
    geojson,
    label_images,
    label_studio,
    labelme,
    mask_files,
    panoptic,
    via,
    voc,
    yolo,
)
from a2fpn.data.importers.base import IMPORTERS, Importer, ImportOptions, detect, read_categories, register_importer
from a2fpn.data.importers.folder import Folder
from a2fpn.data.importers.importing import ImportReport, import_data, list_formats, open_source
from a2fpn.data.importers.writer import SplitCount

__all__ = [
    "IMPORTERS",
    "Folder",
    "ImportOptions",
    "ImportReport",
    "Importer",
    "SplitCount",
    "detect",
    "import_data",
    "list_formats",
    "open_source",
    "read_categories",
    "register_importer",
]
