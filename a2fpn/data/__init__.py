"""Data sets in COCO format: reading, checks, augmentation and conversion."""

from a2fpn.data.check import check_data
from a2fpn.data.check.fix import Change, FixedData, fix_data
from a2fpn.data.check.report import AnnotatedImage, ClassCount, DataReport, Finding
from a2fpn.data.coco import CocoDataset, Sample, SampleMaker, SkipReport, collate
from a2fpn.data.coco_file import Annotation, CocoFile, read_coco
from a2fpn.data.copy_paste import CopyPaste
from a2fpn.data.document import CocoImage
from a2fpn.data.exporters import convert_data
from a2fpn.data.hf import HfDataset
from a2fpn.data.images import read_image
from a2fpn.data.importers import ImportReport, import_data
from a2fpn.data.samplers import aspect_ratio_groups, epoch_order, repeat_factors
from a2fpn.data.shard_writer import write_shards
from a2fpn.data.shards import Shard, ShardDataset, ShardIndex, check_shards
from a2fpn.data.streams import RawSample, SampleDecoder, StreamDataset
from a2fpn.data.transforms import train_transforms
from a2fpn.errors import DataError, ImageError
from a2fpn.masks import InstanceMasks
from a2fpn.masks.outlines import Outlines
from a2fpn.masks.rle import Rle, decode_rle, encode_box_masks, encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle

__all__ = [
    "AnnotatedImage",
    "Annotation",
    "Change",
    "ClassCount",
    "CocoDataset",
    "CocoFile",
    "CocoImage",
    "CopyPaste",
    "DataError",
    "DataReport",
    "Finding",
    "FixedData",
    "HfDataset",
    "ImageError",
    "ImportReport",
    "InstanceMasks",
    "Outlines",
    "RawSample",
    "Rle",
    "Sample",
    "SampleDecoder",
    "SampleMaker",
    "Shard",
    "ShardDataset",
    "ShardIndex",
    "SkipReport",
    "StreamDataset",
    "aspect_ratio_groups",
    "check_data",
    "check_shards",
    "collate",
    "convert_data",
    "decode_rle",
    "encode_box_masks",
    "encode_masks",
    "epoch_order",
    "fix_data",
    "import_data",
    "read_coco",
    "read_image",
    "repeat_factors",
    "segmentation_to_rle",
    "train_transforms",
    "write_shards",
]
