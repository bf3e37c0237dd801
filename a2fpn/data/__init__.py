"""Reading COCO-format data, augmenting it for training, and keeping masks small."""

from a2fpn.data.coco import (
    Annotation,
    CocoDataset,
    CocoFile,
    CocoImage,
    DataError,
    SampleMaker,
    SkipReport,
    collate,
    read_coco,
)
from a2fpn.data.images import ImageError, read_image
from a2fpn.data.masks import Rle, decode_rle, encode_box_masks, encode_masks, segmentation_to_rle
from a2fpn.data.outlines import Outlines
from a2fpn.data.transforms import train_transforms
from a2fpn.masks import InstanceMasks

__all__ = [
    "Annotation",
    "CocoDataset",
    "CocoFile",
    "CocoImage",
    "DataError",
    "ImageError",
    "InstanceMasks",
    "Outlines",
    "Rle",
    "SampleMaker",
    "SkipReport",
    "collate",
    "decode_rle",
    "encode_box_masks",
    "encode_masks",
    "read_coco",
    "read_image",
    "segmentation_to_rle",
    "train_transforms",
]
