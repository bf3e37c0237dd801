"""Facts that identify the model and data of a report, with hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from a2fpn._version import __version__
from a2fpn.data import CocoFile
from a2fpn.data.images import image_path
from a2fpn.pretrained.checkpoint import file_sha256

if TYPE_CHECKING:
    from a2fpn.detectors import Detector


def model_facts(detector: Detector) -> dict[str, str]:
    """Name, parts, input size, number of parameters and hash of the weights in memory.

    The hash covers names, dtypes, shapes and values, sorted by name, independent of the source of the weights.

    Example:
        >>> import a2fpn
        >>> model_facts(a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet", num_classes=2))["neck"]
        'a2fpn'
    """
    config = detector.config
    digest = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    classes = config.labeled_categories
    return {
        "detector": config.detector,
        "neck": config.neck.name,
        "backbone": config.backbone.name,
        "input": f"{config.preprocess.resize}, {config.preprocess.min_size} to {config.preprocess.max_size} px",
        "parameters": f"{sum(p.numel() for p in detector.parameters()) / 1e6:.2f} M",
        "classes": f"{len(classes)}: {', '.join(c.name for c in classes[:10])}{', ...' if len(classes) > 10 else ''}",
        "sha256 of the weights": digest.hexdigest(),
        "a2fpn": __version__,
    }


def data_facts(coco: CocoFile, images: Path, annotations: Path | None = None) -> dict[str, str]:
    """Numbers of images and objects, and the hashes of the annotation file and of all images together.

    Args:
        coco: The parsed file.
        images: The image folder.
        annotations: The file; None omits its hash.
    """
    digest = hashlib.sha256()
    for image_id in sorted(coco.images):
        digest.update(file_sha256(image_path(images, coco.images[image_id].file_name)).encode())
    objects = [a for some in coco.annotations.values() for a in some]
    counts = Counter(a.category_id for a in objects if not a.iscrowd)
    facts = {
        "annotations": str(annotations or coco.name),
        "images": f"{len(coco.images)} in {images}",
        "objects": f"{sum(counts.values())} and {sum(a.iscrowd for a in objects)} crowds",
        "classes": f"{len(coco.categories)}, {len(counts)} of them with objects",
        "left out": f"{len(coco.problems)} unusable annotations",
        "sha256 of the images": digest.hexdigest(),
    }
    return facts | ({"sha256 of the annotations": file_sha256(annotations)} if annotations else {})


def merged_facts(facts: list[Mapping[str, str]]) -> dict[str, list[str]]:
    """Merge facts of several models to one row per fact; missing values are empty."""
    names = dict.fromkeys(name for each in facts for name in each)
    return {name: [each.get(name, "") for each in facts] for name in names}
