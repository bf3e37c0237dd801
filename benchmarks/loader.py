"""Images per second of the loader against torchvision's ``CocoDetection`` with v2 transforms, in one process.

Both sides decode, flip with probability 0.5, resize to a shortest side of 800 (longest at most 1333) and deliver what
their models take: images in uint8 and masks as :class:`~a2fpn.data.InstanceMasks` here, images in float32 and masks as
planes there. Targets: at least 2 times torchvision's
best form, which resizes uint8, and 2.5 times the one that converts to float first. Then how much ours differ: the IoU
of our masks, filled at the target size, with torchvision's, filled at the file's size and resized.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from a2fpn.config import PreprocessConfig
from a2fpn.data import CocoDataset, collate, train_transforms
from a2fpn.preprocess import Preprocess
from benchmarks import _measure as measure

OURS, UINT8, FLOAT = "a2fpn", "torchvision, uint8", "torchvision, float first"
TARGETS = {UINT8: 2.0, FLOAT: 2.5}
MIN_SIZE, MAX_SIZE = 800, 1333


def torchvision_dataset(images: Path, annotations: Path, *, flip: float, float_first: bool) -> Dataset[Any]:
    """The pipeline of torchvision's documentation."""
    to_float = [v2.ToDtype(torch.float32, scale=True)]
    transforms = v2.Compose(
        [
            v2.ToImage(),
            *(to_float if float_first else []),
            v2.RandomHorizontalFlip(flip),
            v2.Resize(MIN_SIZE, max_size=MAX_SIZE, antialias=True),
            *([] if float_first else to_float),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset = CocoDetection(images, str(annotations), transforms=transforms)
    wrapped: Dataset[Any] = wrap_dataset_for_transforms_v2(
        dataset, target_keys=["image_id", "boxes", "labels", "masks"]
    )
    return wrapped


def our_dataset(images: Path, annotations: Path, *, flip: float) -> CocoDataset:
    """The package's data set with the same transforms."""
    rule = Preprocess(PreprocessConfig(min_size=MIN_SIZE, max_size=MAX_SIZE), divisor=32)
    transforms = train_transforms(rule.target_size, scale_range=(1, 1), crop_size=None, horizontal_flip=flip)
    return CocoDataset(images, annotations, transforms=transforms)


def epoch(dataset: Dataset[Any], indices: Sequence[int], workers: int) -> measure.Call:
    """A call that loads the images in batches of two."""
    loader = DataLoader(Subset(dataset, indices), batch_size=2, num_workers=workers, collate_fn=collate)

    def run() -> None:
        for _ in loader:
            pass

    return run


def mask_iou(ours: CocoDataset, theirs: Dataset[Any], indices: Sequence[int]) -> Tensor:
    """IoU of the masks of every object that both sides keep."""
    values = []
    for index in indices:
        (_, a), (_, b) = ours[index], theirs[index]
        if a["image_id"] != b["image_id"]:
            raise RuntimeError(f"Image {a['image_id']} stands where torchvision has {b['image_id']}.")
        planes, boxes = a["masks"].dense().bool(), b["boxes"].as_subclass(Tensor)
        for plane, box in zip(planes, a["boxes"].as_subclass(Tensor), strict=True):
            # Either side drops objects that the other keeps: each of ours is compared with the nearest of theirs.
            other = b["masks"][int((boxes - box).abs().sum(1).argmin())].as_subclass(Tensor).bool()
            values.append((plane & other).sum() / (plane | other).sum())
    return torch.stack(values)


def main(
    data: Annotated[Path, typer.Option(help="A folder in COCO format, e.g. coco128, with a sub-folder annotations.")],
    rounds: measure.Rounds = 5,
    quick: measure.Quick = False,
    threads: measure.Threads = 0,
    workers: Annotated[int, typer.Option(help="Loader processes.", min=0)] = 0,
) -> None:
    """Measure the loaders and print ratios of images per second."""
    annotations = sorted((data / "annotations").glob("*.json"))[0]
    images = next(folder for folder in (data / "images" / "val2017", data / "images") if folder.is_dir())
    measure.start(threads, 1 if quick else rounds)
    ours = our_dataset(images, annotations, flip=0.5)
    # torchvision's transforms fail on images without an annotation, and count crowds as objects.
    indices = [
        index
        for index, image_id in enumerate(ours.image_ids)
        if ours.coco.annotations[image_id] and not any(a.iscrowd for a in ours.coco.annotations[image_id])
    ][: 4 if quick else None]
    sides: dict[str, Dataset[Any]] = {
        OURS: ours,
        UINT8: torchvision_dataset(images, annotations, flip=0.5, float_first=False),
        FLOAT: torchvision_dataset(images, annotations, flip=0.5, float_first=True),
    }
    timings = measure.time_interleaved(
        {name: epoch(dataset, indices, workers) for name, dataset in sides.items()},
        rounds=1 if quick else rounds,
        title="loading",
    )
    rows = []
    for name in sides:
        speedup = timings.ratio(name, OURS)
        target = TARGETS.get(name)
        met = "" if target is None else f">= {target:.1f} {'met' if speedup.value >= target else 'missed'}"
        rows.append([name, f"{len(indices) / timings.median(name):.1f}", str(speedup), met])
    measure.print_table(
        f"{len(indices)} images of {data.name} at {MIN_SIZE} pixels with masks, {workers} workers",
        ["loader", "images/s", "ours is faster by", "target"],
        rows,
    )
    iou = mask_iou(
        our_dataset(images, annotations, flip=0),
        torchvision_dataset(images, annotations, flip=0, float_first=False),
        indices,
    )
    measure.console().print(
        f"IoU of our masks with torchvision's: mean {iou.mean():.4f}, 5 % below {iou.quantile(0.05):.4f}, "
        f"lowest {iou.min():.4f}, {len(iou)} objects."
    )


if __name__ == "__main__":
    typer.run(main)
