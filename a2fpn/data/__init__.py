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
from a2fpn.data.copy_paste import CopyPaste
from a2fpn.data.images import ImageError, read_image
from a2fpn.data.masks import Rle, decode_rle, encode_box_masks, encode_masks, segmentation_to_rle
from a2fpn.data.outlines import Outlines
from a2fpn.data.samplers import aspect_ratio_groups, epoch_order, repeat_factors
from a2fpn.data.transforms import train_transforms
from a2fpn.masks import InstanceMasks

__all__ = [
    "Annotation",
    "CocoDataset",
    "CocoFile",
    "CocoImage",
    "CopyPaste",
    "DataError",
    "ImageError",
    "InstanceMasks",
    "Outlines",
    "Rle",
    "SampleMaker",
    "SkipReport",
    "aspect_ratio_groups",
    "collate",
    "decode_rle",
    "encode_box_masks",
    "encode_masks",
    "epoch_order",
    "read_coco",
    "read_image",
    "repeat_factors",
    "segmentation_to_rle",
    "train_transforms",
]
