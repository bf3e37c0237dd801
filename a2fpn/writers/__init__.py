"""Writers of results in the formats of other programs, one module per format."""

from a2fpn.writers import coco, geojson, labeling, labels, overlay, table  # noqa: F401  # each registers its formats
from a2fpn.writers.base import FORMATS, ImageFormat, ImageResult, RunFormat, image_format, run_format, write_results

__all__ = [
    "FORMATS",
    "ImageFormat",
    "ImageResult",
    "RunFormat",
    "image_format",
    "run_format",
    "write_results",
]
