"""Time to build a detector, against timm's network and the heads; and a backbone against timm's network.

Target: at most 1.3 times either, on medians; all sides take turns in one process. By default on the smallest member of
every family of timm, where anything besides weights to fill weighs most.
"""

from __future__ import annotations

from typing import Annotated

import timm
import typer

import a2fpn
from a2fpn._registry import match_names
from a2fpn.backbones import TimmBackbone
from a2fpn.detectors import DETECTORS
from a2fpn.necks import create_neck
from benchmarks import _measure as measure
from benchmarks.backbones import quiet, smallest

TARGET = 1.3
MODELS = ("maskrcnn_a2fpn", "retinanet_fpn")
"""One that takes all levels of a backbone, and one that leaves the finest out."""


def main(
    pattern: Annotated[str, typer.Option(help="Architectures; the smallest of every family if empty.")] = "",
    model: Annotated[str, typer.Option(help="Detector and neck; both of them if empty.")] = "",
    rounds: measure.Rounds = 5,
    threads: measure.Threads = 0,
    quick: measure.Quick = False,
) -> None:
    """Times one or both kinds of detectors and prints the ratios."""
    rounds = 1 if quick else rounds
    measure.start(threads, rounds)
    names = match_names(timm.list_models(), pattern) if pattern else sorted(smallest())
    for kind in [model] if model else MODELS:
        with quiet():
            timings = {name: time_construction(kind, name, rounds=rounds) for name in names}
        rows, met = [], 0
        for name, times in timings.items():
            network, backbone, heads, detector = (times.median(side) for side in SIDES)
            ratio = detector / (network + heads)
            met += ratio <= TARGET
            milliseconds = [measure.milliseconds(seconds) for seconds in (network, backbone, heads, detector)]
            rows.append(
                [name, *milliseconds, f"{backbone / network:.2f}", f"{ratio:.2f}", measure.against(ratio, TARGET)]
            )
        measure.print_table(
            f"{kind}: a = backbone / timm, b = detector / (timm + heads)", ["", *SIDES, "a", "b", "target of b"], rows
        )
        print(f"{kind}: {met} of {len(rows)} at most {TARGET}.")


SIDES = ("timm", "backbone", "heads", "detector")


def time_construction(model: str, name: str, *, rounds: int) -> measure.Timings:
    """Seconds for timm's network, a backbone, neck and heads on one that is there, and a whole detector."""
    there = a2fpn.create_model(model, backbone=name)
    config, backbone = there.config, there.backbone
    found = backbone.info
    # What the backbone asks timm for, so that neither side has maps to make that the other has not.
    indices = [found.indices[i] for i in sorted({found.source(stride) for stride in config.backbone.strides})]

    def heads() -> None:
        neck = create_neck(config.neck.name, backbone.out_spec, **config.neck.args)
        DETECTORS[config.detector](config, backbone, neck)

    calls = {
        "timm": lambda: timm.create_model(name, features_only=True, out_indices=indices, **found.options),
        "backbone": lambda: TimmBackbone(config.backbone),
        "heads": heads,
        "detector": lambda: a2fpn.create_model(model, backbone=name),
    }
    return measure.time_interleaved(calls, rounds=rounds, title=name)


if __name__ == "__main__":
    typer.run(main)
