"""Statistics of a COCO file: classes, object sizes and objects per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a2fpn.data.annotation_table import crowd_flag
from a2fpn.data.operations import Source, box_size, load_coco


@dataclass(frozen=True)
class DataStats:
    """Statistics of a COCO file.

    Args:
        images: Number of images.
        annotations: Number of annotations, without crowds.
        crowds: Number of crowds.
        classes: Number of annotations by class name, without crowds, the most frequent first.
        sizes: Square root of each box's area, pixels.
        densities: Number of annotations of each image.
    """

    images: int
    annotations: int
    crowds: int
    classes: Mapping[str, int]
    sizes: tuple[float, ...]
    densities: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable built-ins: counts, and quantiles of sizes and densities."""
        shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
        return {
            "images": self.images,
            "annotations": self.annotations,
            "crowds": self.crowds,
            "classes": dict(self.classes),
            "sizes": {f"{share:g}": _quantile(self.sizes, share) for share in shares},
            "densities": {f"{share:g}": _quantile(self.densities, share) for share in shares},
        }


def coco_stats(source: Source) -> DataStats:
    """Compute the statistics of a COCO file.

    Example:
        >>> coco_stats({
        ...     "images": [{"id": 1, "file_name": "a.png"}],
        ...     "categories": [{"id": 7, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 9]}],
        ... }).sizes
        (6.0,)
    """
    data = load_coco(source)
    names = {raw["id"]: str(raw["name"]) for raw in data["categories"]}
    objects = [raw for raw in data["annotations"] if not crowd_flag(raw.get("iscrowd"))]
    classes = Counter({name: 0 for name in names.values()})
    classes.update(names[raw["category_id"]] for raw in objects)
    per_image = Counter(raw["image_id"] for raw in objects)
    return DataStats(
        len(data["images"]),
        len(objects),
        len(data["annotations"]) - len(objects),
        dict(classes.most_common()),
        tuple(box_size(raw) for raw in objects),
        tuple(per_image[raw["id"]] for raw in data["images"]),
    )


def _quantile(values: Sequence[float], share: float) -> float | None:
    """Quantile of the values; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return round(float(ordered[round(share * (len(ordered) - 1))]), 2)
