"""Does the loader keep up: its images/s by workers against the step's, both together, and decoding on the GPU."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file

import a2fpn
from a2fpn.config import PreprocessConfig
from a2fpn.data import CocoDataset, collate, train_transforms
from a2fpn.preprocess import Preprocess
from benchmarks.gpu.record import Record, precision, synchronize

SIDES, BATCH = (384, 800), 8
MODEL = "maskrcnn_a2fpn_r50"


def run(record: Record, data: Path | None) -> None:
    """Measure at each size; without a folder, a small one of JPEG photographs of noise is made."""
    with tempfile.TemporaryDirectory() as folder:
        root = data or _make(Path(folder), count=8 if record.quick else 64)
        for side in (64,) if record.quick else SIDES:
            with record.attempt(side=side):
                _size(record, root, side)
        with record.attempt(what="decode"):
            _decoding(record, root)


def _make(folder: Path, count: int) -> Path:
    from tests.coco_data import write_coco

    write_coco(folder, images=count, seed=0, size=(480, 640))
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations.json").rename(folder / "annotations" / "instances_train.json")
    return folder


def _dataset(root: Path, side: int) -> CocoDataset:
    annotations = sorted((root / "annotations").glob("*.json"))
    chosen = next((path for path in annotations if "train" in path.name), annotations[0])
    rule = Preprocess(PreprocessConfig(min_size=side, max_size=round(side * 1.67)), divisor=32)
    images = next(path.parent for path in sorted((root / "images").rglob("*")) if path.is_file())
    return CocoDataset(images, chosen, transforms=train_transforms(rule.target_size))


def _size(record: Record, root: Path, side: int) -> None:
    device, dataset = record.device, _dataset(root, side)
    cores = len(os.sched_getaffinity(0))
    most = 2 if record.quick else max(1, min(16, cores))
    wanted = (8 if record.quick else 640) * 384 // max(side, 384)
    repeated: Any = ConcatDataset([dataset] * max(1, -(-wanted // len(dataset))))
    pinned = device.type == "cuda"

    def loader(workers: int) -> Any:
        return torch.utils.data.DataLoader(
            repeated, batch_size=BATCH, shuffle=True, num_workers=workers, collate_fn=collate, pin_memory=pinned
        )

    for workers in sorted({1, most // 4 or 1, most}):
        batches, start, images = iter(loader(workers)), 0.0, 0
        for number, (batch, _) in enumerate(batches):
            if number == 2:  # the workers have started
                start = time.perf_counter()
            images += len(batch) if number > 2 else 0
            if start and time.perf_counter() - start > 8:
                break
        rate = images / (time.perf_counter() - start) if images else None
        record.add(
            what="loader alone", side=side, workers=workers, images_per_second=rate, per_worker=rate and rate / workers
        )
        del batches

    overrides = {"backbone": "resnet10t"} if record.quick else {}
    model = a2fpn.create_model(
        MODEL if not record.quick else "maskrcnn_a2fpn", num_classes=len(dataset.categories), **overrides
    )
    model = model.to(device).train().to(memory_format=torch.channels_last)
    options = {"fused": True} if pinned else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, **options)
    with precision("bf16", device) as autocast:

        def step(images: Any, targets: Any) -> None:
            with autocast():
                loss = torch.stack(list(model(images, targets, resize=False).values())).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        ready = list(itertools.islice(loader(most), 6))
        for images, targets in ready[:3]:
            step(images, targets)
        alone = _pace(itertools.chain.from_iterable([ready] * 50), step, device, 2 if record.quick else 6)
        fed = _pace(iter(loader(most)), step, device, 2 if record.quick else 12, skip=3)
    record.add(what="steps on ready batches", side=side, images_per_second=alone)
    record.add(what="steps fed by the loader", side=side, workers=most, images_per_second=fed, share=fed / alone)


def _pace(batches: Any, step: Any, device: torch.device, seconds: float, *, skip: int = 0) -> float:
    for images, targets in itertools.islice(batches, skip):
        step(images, targets)
    synchronize(device)
    start, count = time.perf_counter(), 0
    for images, targets in batches:
        step(images, targets)
        count += len(images)
        if time.perf_counter() - start > seconds:
            break
    synchronize(device)
    return count / (time.perf_counter() - start)


def _decoding(record: Record, root: Path) -> None:
    """Decode by nvJPEG in batches, and on one core; other files than JPEG are left out."""
    files = sorted(path for path in (root / "images").rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:64]
    data = [read_file(str(path)) for path in files]
    if not data:
        record.add(what="decode", side="no JPEG files")
        return
    devices = ["cpu", *(["cuda"] if record.device.type == "cuda" else [])]
    for device in devices:
        decode = lambda part, device=device: decode_jpeg(part, ImageReadMode.RGB, device=device)  # noqa: E731
        with record.attempt(what="decode", side=device):
            decode(data[:BATCH])
            synchronize(record.device)
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < (0.2 if record.quick else 3):
                at = count % len(data)
                part = data[at : at + BATCH]
                decode(part)
                count += len(part)
            synchronize(record.device)
            record.add(what="decode", side=device, images_per_second=count / (time.perf_counter() - start))
