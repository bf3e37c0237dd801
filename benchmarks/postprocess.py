"""From masks predicted inside boxes to COCO run lengths: ``encode_box_masks`` against torchvision and pycocotools.

Their way is that of torchvision's own evaluation: every mask is pasted into an image of its own, and what is above one
half is encoded by pycocotools, mask by mask. Targets for 100 masks on 1500x2000, with torchvision's rule to paste and
every pixel equal: at most 0.15 of the time and 0.05 of the peak memory. How far the default rule is from it is stated:
it samples at the centers of pixels, where torchvision rounds boxes down to whole pixels first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import typer
from pycocotools import mask as mask_utils
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from a2fpn.data import Rle, encode_box_masks
from a2fpn.masks.paste import PASTE_RULES, PasteRule
from benchmarks import _measure as measure

PEER = "torchvision, pycocotools"
SIDES = (PEER, *PASTE_RULES)
TIME_TARGET, MEMORY_TARGET = 0.15, 0.05
CELLS = 28


@dataclass(frozen=True)
class Case:
    """Masks of an image.

    Args:
        masks: How many.
        size: Height and width of the image.
        side: Median side of a box, pixels.
        targets: Whether the targets apply.
    """

    masks: int
    size: tuple[int, int]
    side: int
    targets: bool = False

    def __str__(self) -> str:
        return f"{self.masks} masks of about {self.side} pixels on {self.size[0]}x{self.size[1]}"


CASES = (Case(100, (1500, 2000), 100, targets=True), Case(100, (800, 1088), 60), Case(400, (800, 1088), 20))
QUICK_CASES = (Case(5, (150, 200), 30, targets=True),)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Smooth random masks (N, 1, M, M) and boxes, the same in every process; some boxes reach the border."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(case.masks, 1, 7, 7, generator=generator)
    masks = F.interpolate(blobs, (CELLS, CELLS), mode="bicubic", align_corners=False).add(0.3).mul(4).sigmoid()
    limits = torch.tensor(case.size[::-1])
    sides = torch.minimum(torch.randn(case.masks, 2, generator=generator).mul(0.8).exp() * case.side, limits * 0.9)
    corners = torch.rand(case.masks, 2, generator=generator) * limits - sides / 2
    boxes = torch.cat([corners, corners + sides], 1).clamp(min=0)
    return masks, torch.minimum(boxes, limits.repeat(2))


def prepare(side: str, case: Case) -> measure.Call:
    """Makes inputs; returns one encoding."""
    masks, boxes = inputs(case)
    if side == PEER:
        return functools.partial(theirs, masks, boxes, case.size)
    return functools.partial(encode_box_masks, masks, boxes, case.size, rule=cast(PasteRule, side))


def theirs(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Rle]:
    """Pasted, thresholded and encoded."""
    pasted = (paste_masks_in_image(masks, boxes, size) > 0.5).numpy()
    encoded = [mask_utils.encode(np.array(mask[0, :, :, None], dtype=np.uint8, order="F"))[0] for mask in pasted]
    return [Rle(size=list(size), counts=rle["counts"].decode()) for rle in encoded]


def compare(case: Case) -> str:
    """Compare the masks of the default rule with torchvision's.

    Raises:
        RuntimeError: If torchvision's rule changes a pixel.
    """
    wanted = prepare(PEER, case)()
    different = sum(a != b for a, b in zip(prepare("torchvision", case)(), wanted, strict=True))
    if different:
        raise RuntimeError(f"{case}: {different} masks differ from torchvision's.")
    exact = prepare("exact", case)()
    ious = [overlap(a, b) for a, b in zip(exact, wanted, strict=True)]
    return (
        f"{case}: every pixel equal with torchvision's rule. The default rule's masks overlap torchvision's with a "
        f"mean IoU of {np.mean(ious):.3f} (lowest {min(ious):.3f}) and have {areas(exact) / areas(wanted):.3f} of "
        "their area."
    )


def overlap(first: Rle, second: Rle) -> float:
    """IoU of two masks."""
    return float(mask_utils.iou([first], [second], [False])[0, 0]) if areas([first, second]) else 1.0


def areas(rles: Sequence[Rle]) -> float:
    """Pixels of all masks."""
    return float(sum(mask_utils.area(rle) for rle in rles))  # not the list at once: from 256 on that overflows


def main(rounds: measure.Rounds = 7, quick: measure.Quick = False, threads: measure.Threads = 0) -> None:
    """Compares masks, times and peak memory."""
    rounds = 1 if quick else rounds
    measure.start(threads, rounds)
    rows = []
    for case in QUICK_CASES if quick else CASES:
        measure.console().print(compare(case))
        calls = {side: prepare(side, case) for side in SIDES}
        timings = measure.time_interleaved(calls, rounds=rounds, title=str(case))
        memory = {side: measure.peak_memory(prepare, side, case) for side in SIDES}
        for side in SIDES:
            judged = case.targets and side == "torchvision"
            ratio, share = timings.ratio(side, PEER), memory[side] / max(1, memory[PEER])
            rows.append(
                [
                    str(case) if side == PEER else "",
                    side if side == PEER else f"ours, {side} rule",
                    measure.milliseconds(timings.median(side)),
                    str(ratio),
                    measure.against(ratio.value, TIME_TARGET if judged else None),
                    measure.mebibytes(memory[side]),
                    f"{share:.3f}",
                    measure.against(share, MEMORY_TARGET if judged else None),
                ]
            )
    columns = ["", "", "time", "ratio", "target", "memory", "ratio", "target"]
    measure.print_table("Masks in boxes to COCO run lengths: time, then peak memory", columns, rows)


if __name__ == "__main__":
    typer.run(main)
