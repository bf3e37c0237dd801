"""Every architecture of timm as a backbone of a detector: how it attaches, and whether it then does what it declares.

Makes the table that ships with the package, architecture by architecture, on the meta device: shapes and the graph of
gradients are those of a real run, but nothing is computed. Of every family of timm the smallest member also takes a
real training step. The output is appended to, so that a sweep may stop and go on.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import logging
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import timm
import torch
import typer
from torch import Tensor, nn

import a2fpn
from a2fpn._registry import match_names
from a2fpn.backbones import BackboneInfo, TimmBackbone, find_backbone_info, preprocessing
from a2fpn.backbones.freezing import contributors, drop_unused
from a2fpn.backbones.info import PYRAMID, read_table
from a2fpn.backbones.probe import feature_info, measure, probe
from a2fpn.config import BackboneConfig, ModelConfig, NeckConfig, PreprocessConfig, RCNNConfig
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.necks import create_neck
from a2fpn.pyramid import level_size
from benchmarks._measure import print_table

T = TypeVar("T")
TABLE = Path(a2fpn.__file__).parent / "assets" / "backbones.csv"
SIZES = ((256, 256), (200, 333))
"""Square, and not square and no multiple of 32."""

_HEADS = RCNNConfig(
    rpn_pre_nms_top_n_train=50,
    rpn_post_nms_top_n_train=20,
    box_channels=16,
    box_batch_size=16,
)


class FaultError(Exception):
    """A backbone doesn't do what it declares."""


def main(
    output: Annotated[Path, typer.Option(help="Rows go here; what it holds is not done again.")] = Path(
        "build/backbones.csv"
    ),
    pattern: Annotated[str, typer.Option(help="Only architectures that match.")] = "",
    part: Annotated[str, typer.Option(help="Only a part: '3/10' is the third tenth.")] = "1/1",
    check: Annotated[bool, typer.Option(help="Try the shipped table instead of making one; fails on a fault.")] = False,
    write: Annotated[bool, typer.Option(help="Put the complete output in the place of the shipped table.")] = False,
) -> None:
    """Sweep over timm's architectures."""
    number, count = read_part(part)
    names, trained = match_names(timm.list_models(), pattern)[number - 1 :: count], smallest()
    print(f"Part {number}/{count} of timm {timm.__version__}: {len(names)} architectures.", flush=True)
    if check:
        with quiet():
            faults = {
                name: fault for name in names if (fault := _fault(find_backbone_info(name), train=name in trained))
            }
        real = len(trained & set(names))
        print(f"{len(names) - len(faults)} of {len(names)} attach as the table says; {real} also took a training step.")
        if faults:
            raise SystemExit("\n".join(f"{name}: {fault}" for name, fault in faults.items()))
        return
    with quiet():
        rows = sweep(names, output, trained)
    _summarize(rows)
    if write:
        if missing := set(timm.list_models()) - {row["architecture"] for row in rows}:
            raise SystemExit(f"{len(missing)} architectures are missing: {sorted(missing)[:3]} ...")
        _write(sorted(rows, key=lambda row: row["architecture"]), TABLE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it no backbone says what is special about it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def read_part(part: str) -> tuple[int, int]:
    """Parse one of several interleaved parts, from ``"k/n"``.

    Raises:
        ValueError: If it is no part.
    """
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"A part is written k/n with 1 <= k <= n, got {part!r}.")
    return int(index), int(count)


def sweep(names: list[str], output: Path, trained: set[str]) -> list[dict[str, str]]:
    """Rows of the table for some architectures, appended one by one to a file; those that it has are kept.

    Args:
        names: Architectures.
        output: The file.
        trained: Architectures that also take a real training step.
    """
    rows = _read(output)
    done = {row["architecture"] for row in rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    left = [name for name in names if name not in done]
    for number, name in enumerate(left, start=1):
        start = time.perf_counter()
        row = _row(probe(name), train=name in trained)
        rows.append(row)
        _append(row, output)
        seconds = time.perf_counter() - start
        print(f"{number}/{len(left)} {name}: {row['adaptations']} ({seconds:.1f} s) {row['reason']}", flush=True)
        if number % 25 == 0:
            gc.collect()
    return rows


def _row(found: BackboneInfo, *, train: bool) -> dict[str, str]:
    try:
        if not found.reason:
            found = _on_meta(_survey, found)
            _try(found, train=train)
    except Exception as error:
        found = dataclasses.replace(found, reason=str(error))
    return {**found.to_row(), "trained": str(train and not found.reason)}


def _survey(found: BackboneInfo, device: str) -> BackboneInfo:
    """Find out what is unused in a network."""
    with torch.device(device):
        whole = dataclasses.replace(found, unused=(), unused_from_8=())
        backbones = [_backbone(whole, device, strides) for strides in (PYRAMID, PYRAMID[1:])]
        unused = [drop_unused(backbone.body, backbone._example) for backbone in backbones]
    return dataclasses.replace(found, unused=unused[0], unused_from_8=unused[1])


def _fault(found: BackboneInfo, *, train: bool) -> Exception | None:
    """Return the fault of a backbone in a detector; whatever a network raises is one."""
    try:
        _try(found, train=train)
    except Exception as error:
        return error
    return None


def _try(found: BackboneInfo, *, train: bool) -> None:
    _on_meta(_check, found)
    if train:
        _train(found)


def _on_meta(call: Callable[[BackboneInfo, str], T], found: BackboneInfo) -> T:
    """Call on the meta device, or with real numbers for networks that look at values or unroll recurrent layers."""
    try:
        return call(found, "meta")
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
    return call(found, "cpu")


def _check(found: BackboneInfo, device: str) -> None:
    """Build a detector, run it up to the proposals' scores at all sizes, and compare with what was declared.

    Raises:
        FaultError: With what differs.
    """
    with torch.device(device):
        backbone = _backbone(found, device)
        model = _detector(backbone).eval()
        for height, width in SIZES:
            size = model.preprocess.target_size(height, width) if found.size else (height, width)
            raw: list[Tensor] = []
            # The graph is the same at every size.
            with _listening(backbone.body, raw), torch.set_grad_enabled((height, width) == SIZES[0]):
                maps = backbone(torch.zeros(1, 3, *size))
                _compare(backbone, maps, raw, size)
                outputs = model.dense_head(list(model.neck(maps).values()))
            if (height, width) == SIZES[0]:
                _require_gradients(backbone, [x for output in outputs for x in output])
                if found.unused_from_8 == found.unused:
                    _require_gradients(backbone.body, [raw[i] for i in set(backbone._sources[1:])])
        if found.unused_from_8 != found.unused:
            coarse = _backbone(found, device, PYRAMID[1:])
            _require_gradients(coarse.body, coarse._example())


def _compare(backbone: TimmBackbone, maps: dict[str, Tensor], raw: list[Tensor], size: tuple[int, int]) -> None:
    declared = {name: (1, level.channels, *level_size(size, level.stride)) for name, level in backbone.out_spec.items()}
    got = {name: tuple(x.shape) for name, x in maps.items()}
    if got != declared:
        raise FaultError(f"For an image of {size} it declares {declared} and gives {got}.")
    found, padded = backbone.info, backbone.padded_size(*size)
    # The other side: before maps are cropped, the network itself divides the image by its strides.
    own = measure(raw, padded, feature_info(backbone.body).channels())
    strides = tuple(stride for stride in found.strides if stride in own.strides)
    if own.strides != strides or not (own.exact or found.resized):
        raise FaultError(f"For an image of {padded} the network's own strides are {own.strides}, declared {strides}.")


def _require_gradients(module: nn.Module, outputs: list[Tensor]) -> None:
    reached = set().union(*contributors(outputs))
    _no_unused([name for name, p in module.named_parameters() if p.requires_grad and p not in reached])


def _no_unused(names: list[str]) -> None:
    if names:
        raise FaultError(f"No gradient reaches {len(names)} parameters: {', '.join(names[:5])}.")


def _train(found: BackboneInfo) -> None:
    """A training step with real numbers."""
    torch.manual_seed(0)
    model = _detector(_backbone(found)).train()
    # Two images, since batch norm in training needs more than one value.
    images = [torch.rand(3, 128, 160)] * 2
    target = {"boxes": torch.tensor([[10.0, 20.0, 90.0, 100.0]]), "labels": torch.tensor([0])}
    losses = model(images, [target] * 2)
    torch.stack(list(losses.values())).sum().backward()
    _no_unused([name for name, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None])


def _backbone(found: BackboneInfo, device: str = "cpu", strides: tuple[int, ...] = PYRAMID) -> TimmBackbone:
    backbone = TimmBackbone(BackboneConfig(found.architecture, strides=strides), info=found)
    if device == "meta" and any(isinstance(module, nn.RNNBase) for module in backbone.modules()):
        raise NotImplementedError("recurrent layers on meta")
    return backbone


def _detector(backbone: TimmBackbone) -> Detector:
    config, found = backbone.config, backbone.info
    wanted = preprocessing(config, info=found)
    if found.size is None:
        wanted["resize"] = "none"
    neck = NeckConfig("fpn", {"out_channels": 16})
    whole = ModelConfig(
        "backbones", "fasterrcnn", config, neck, num_classes=2, preprocess=PreprocessConfig(**wanted), heads=_HEADS
    )
    return DETECTORS[whole.detector](whole, backbone, create_neck(neck.name, backbone.out_spec, **neck.args))


@contextlib.contextmanager
def _listening(body: nn.Module, maps: list[Tensor]) -> Iterator[None]:
    """Within it a list gets the maps that a network gives."""
    handle = body.register_forward_hook(lambda module, inputs, output: maps.extend(output))
    try:
        yield
    finally:
        handle.remove()


def smallest() -> set[str]:
    """Of every family of timm the architecture with the fewest parameters, by the shipped table."""
    table = read_table()

    def parameters(name: str) -> float:
        return table[name].parameters if name in table else float("inf")

    families = (timm.list_models(module=module) for module in timm.list_modules())
    return {min(family, key=parameters) for family in families if family}


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _append(row: dict[str, str], path: Path) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _write(rows: list[dict[str, str]], path: Path) -> None:
    fresh = path.with_suffix(".part")
    fresh.unlink(missing_ok=True)
    for row in rows:
        _append(row, fresh)
    shutil.move(fresh, path)


def _summarize(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["adaptations"] for row in rows)
    attached = sum(not row["reason"] for row in rows)
    print_table(
        f"timm {timm.__version__}: {attached} of {len(rows)} attach ({100 * attached / max(1, len(rows)):.2f} %)",
        ["adaptations", "architectures"],
        [[how, str(count)] for how, count in counts.most_common()],
    )
    for row in rows:
        if row["reason"]:
            print(f"{row['architecture']}: {row['reason']}")


if __name__ == "__main__":
    typer.run(main)
