"""400 objects cost what their own pixels cost, on an image of any size: in the loader and in a training step."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection.roi_heads import paste_masks_in_image

from a2fpn.data import CocoDataset, InstanceMasks, encode_box_masks, train_transforms
from a2fpn.heads import matching
from a2fpn.layers import reassemble
from tests.helpers import tiny_model

SMALL, LARGE = 256, 512
OBJECTS = 400
PLANES = OBJECTS * (LARGE**2 - SMALL**2)  # bytes by which N planes of uint8 grow from one canvas to the other


def peak_allocated(call: Callable[[], Any], path: Path) -> int:
    """The most bytes that torch has allocated at once during a call, exactly."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def corners(count: int) -> torch.Tensor:
    """Squares of 10 pixels in the upper left corner, 250 x 250 pixels, (N, 4) xyxy."""
    index = torch.arange(count)
    corner = torch.stack([index % 20, index // 20], 1) * 12 + 2
    return torch.cat([corner, corner + 10], 1)


def step_peak(side: int, count: int, path: Path, *, dense: bool = False) -> int:
    """The peak of a training step on an image of side x side pixels, with the same objects whatever the side."""
    torch.manual_seed(0)
    model = tiny_model("maskrcnn_fpn").train()
    boxes = corners(count)
    masks = InstanceMasks(torch.ones(100 * count, dtype=torch.uint8), boxes, (side, side))
    target = {"boxes": boxes.float(), "labels": torch.zeros(count, dtype=torch.int64), "masks": masks}
    image = torch.zeros(3, side, side, dtype=torch.uint8)

    def step() -> None:
        wanted = {**target, "masks": masks.dense()} if dense else target
        sum(model([image], [wanted], resize=False).values()).backward()

    return peak_allocated(step, path)


def test_the_memory_of_a_step_does_not_grow_with_the_image_times_the_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 2**18)  # boxes and objects have a bound of their own, of 32 MB
    path = tmp_path / "trace.json"
    growth, of_four = (step_peak(LARGE, n, path) - step_peak(SMALL, n, path) for n in (OBJECTS, 4))
    # What grows is the image and its features.
    assert growth < of_four + 0.05 * PLANES
    # Planes, which a user may give, would not go unnoticed.
    assert step_peak(LARGE, OBJECTS, path, dense=True) > OBJECTS * LARGE**2


def folder(root: Path, side: int) -> CocoDataset:
    """One image with 200 polygons and 200 run lengths, enlarged to twice its size by the transforms."""
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(root / "0.png")
    objects = []
    for index, (x0, y0, x1, y1) in enumerate(corners(OBJECTS).tolist()):
        start = x0 * side + y0
        counts = [start, *([10, side - 10] * 9), 10, side * side - start - 9 * side - 10]
        segmentation = {"size": [side, side], "counts": counts} if index % 2 else [[x0, y0, x1, y0, x1, y1, x0, y1]]
        objects.append({"image_id": 0, "category_id": 1, "bbox": [x0, y0, 10, 10], "segmentation": segmentation})
    data = {
        "images": [{"id": 0, "file_name": "0.png", "height": side, "width": side}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": objects,
    }
    augment = train_transforms(lambda h, w: (2 * h, 2 * w), scale_range=(1, 1), crop_size=None)
    return CocoDataset(root, data, transforms=augment)


@pytest.mark.parametrize("side", [SMALL, 4 * SMALL])
def test_samples_of_the_loader_stay_small_on_the_way_and_in_the_end(tmp_path: Path, side: int) -> None:
    dataset = folder(tmp_path, side)
    image, target = dataset[0]
    assert target["masks"].areas().tolist() == [20 * 20] * OBJECTS
    assert len(pickle.dumps(target)) < OBJECTS * (20 * 20 + 32 + 16 + 8) + 4000
    peak = peak_allocated(lambda: dataset[0], tmp_path / "trace.json")
    assert peak < 2 * image.numel() + (4 << 20)


def test_run_lengths_of_predicted_masks_take_a_twentieth_of_the_memory_of_planes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(50, 1, 28, 28, generator=generator)
    boxes, size = 2 * corners(50).float(), (LARGE, LARGE)
    path = tmp_path / "trace.json"
    ours = peak_allocated(lambda: encode_box_masks(masks, boxes, size), path)
    planes = peak_allocated(lambda: paste_masks_in_image(masks, boxes, size) > 0.5, path)
    assert 20 * (ours - masks.nbytes) < planes


def test_reassembly_takes_a_tenth_of_the_memory_of_unfolding(tmp_path: Path) -> None:
    x, weights, size = torch.randn(1, 256, 32, 48), torch.rand(1, 25, 64, 96), (64, 96)

    def unfolded() -> torch.Tensor:
        windows = F.unfold(F.interpolate(x, size=size), 5, dilation=2, padding=4)
        return torch.einsum("bckhw,bkhw->bchw", windows.view(1, 256, 25, *size), weights)

    path = tmp_path / "trace.json"
    # Also the first calls, whose buffers of the library do not count.
    assert torch.allclose(reassemble(x, weights, size)[..., 4:-4, 4:-4], unfolded()[..., 4:-4, 4:-4], atol=1e-4)
    ours, naive = (peak_allocated(call, path) for call in (lambda: reassemble(x, weights, size), unfolded))
    assert 10 * ours < naive
