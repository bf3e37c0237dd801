"""Pictures of a trained neck: attention maps, entities, gates and reassembly kernels on given images.

    python -m benchmarks.attention_maps --model runs/a2fpn/best --images data/val --output maps.json

The supplement of A2-FPN says that scaled dot-product attention gives nearly the same map for every query, and scaled
cosine attention does not. The mean pairwise distance of the maps that pixels get measures it: 0 for equal maps, 1 for
maps without a key in common.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import a2fpn
from a2fpn.data.images import read_image
from a2fpn.detectors import Detector
from a2fpn.inference import list_images
from a2fpn.layers import ATTENTION_KINDS, MGC, attention_map
from a2fpn.layers.fusion import ChannelGates, KernelPredictor
from benchmarks import _measure as measure

QUERIES = 256
"""Pixels per level and image whose maps are compared."""

Values = dict[tuple[str, ...], list[float]]


@dataclass(frozen=True)
class NeckReport:
    """Means over images; empty mappings where the neck lacks the part.

    Args:
        images: Their number.
        attention: The kind that the neck has.
        map_distance: Per kind and level half the L1 distance of two pixels' attention maps, mean over pairs, in 0..1.
            Kinds other than the neck's own are applied to the same queries and keys.
        map_cosine_distance: The same for one minus the cosine of two maps.
        map_entropy: Per kind and level the entropy of a map relative to the uniform one's, in 0..1.
        context_size: Per level the RMS of the context relative to that of the lateral it is added to.
        orthogonality: Per level the Frobenius norm of ``W W^T - I`` of the entities, whatever the kind of attention.
        gate_change: Per fusion the mean of ``|gate - 1|``.
        kernel_entropy: Per fusion the entropy of the kernels relative to the uniform one's, in 0..1.
        kernel_center: Per fusion the weight of the central pixel.
    """

    images: int
    attention: str | None
    map_distance: Mapping[str, Mapping[str, float]]
    map_cosine_distance: Mapping[str, Mapping[str, float]]
    map_entropy: Mapping[str, Mapping[str, float]]
    context_size: Mapping[str, float]
    orthogonality: Mapping[str, float]
    gate_change: Mapping[str, float]
    kernel_entropy: Mapping[str, float]
    kernel_center: Mapping[str, float]


@torch.no_grad()
def diagnose(model: Detector, images: Iterable[Tensor]) -> NeckReport:
    """Run a detector's backbone and neck on images, one by one, and look into the neck.

    Args:
        model: Any detector; its mode is left as it was.
        images: ``(3, H, W)`` each, uint8 or float in [0, 1].

    Returns:
        The report.

    Raises:
        ValueError: If there is no image.
    """
    values: Values = defaultdict(list)
    device, count = next(model.parameters()).device, 0
    with _evaluating(model), _watched(model.neck, values):
        for image in images:
            model.features(model.preprocess([image.to(device)]))
            count += 1
    if not count:
        raise ValueError("There is no image to look at.")
    means = {key: statistics.fmean(numbers) for key, numbers in values.items()}

    def select(*prefix: str) -> dict[str, float]:
        return {key[-1]: x for key, x in means.items() if key[:-1] == prefix}

    def by_kind(name: str) -> dict[str, dict[str, float]]:
        return {kind: found for kind in ATTENTION_KINDS if (found := select(name, kind))}

    context = next((m for m in model.neck.modules() if isinstance(m, MGC)), None)
    return NeckReport(
        images=count,
        attention=None if context is None else context.attention,
        map_distance=by_kind("distance"),
        map_cosine_distance=by_kind("cosine"),
        map_entropy=by_kind("entropy"),
        context_size=select("size"),
        orthogonality={} if context is None else _orthogonality(context, model.neck.in_spec.names),
        gate_change=select("gate"),
        kernel_entropy=select("kernel entropy"),
        kernel_center=select("kernel center"),
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _watched(neck: a2fpn.Neck, values: Values) -> Iterator[None]:
    """Hooks that write down what the parts of a neck compute."""

    def on_context(mgc: MGC, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features, valid = args
        _look_at_maps(mgc, neck.in_spec.names, features, valid, values)
        # Past the hooks, and before the sum is written into the laterals.
        for level, context, lateral in zip(
            neck.in_spec.names, mgc.forward(features, valid), kwargs["residual"], strict=True
        ):
            values["size", level].append(float(context.float().square().mean().sqrt() / _rms(lateral)))

    def on_gates(name: str) -> Any:
        def hook(gates: ChannelGates, args: tuple[Any, ...]) -> None:
            values["gate", name].append(float((gates.gates(*args) - 1).abs().mean()))

        return hook

    def on_kernels(name: str) -> Any:
        def hook(predictor: KernelPredictor, args: tuple[Any, ...], kernels: Tensor) -> None:
            values["kernel entropy", name].append(float(_entropy(kernels, 1).mean()))
            values["kernel center", name].append(float(kernels[:, kernels.shape[1] // 2].mean()))

        return hook

    with ExitStack() as hooks:
        for path, module in neck.named_modules():
            fusion = path.rpartition(".")[0]
            if isinstance(module, MGC):
                hooks.callback(module.register_forward_pre_hook(on_context, with_kwargs=True).remove)
            elif isinstance(module, ChannelGates):
                hooks.callback(module.register_forward_pre_hook(on_gates(fusion)).remove)
            elif isinstance(module, KernelPredictor):
                hooks.callback(module.register_forward_hook(on_kernels(fusion)).remove)
        yield


def _look_at_maps(
    mgc: MGC, names: Iterable[str], features: list[Tensor], valid: list[Tensor | None], values: Values
) -> None:
    for i, (level, x, nodes) in enumerate(zip(names, features, mgc.nodes(features, valid), strict=True)):
        mask = valid[i]
        pixels = torch.arange(x[0, 0].numel()) if mask is None else mask[0].flatten().nonzero()[:, 0].cpu()
        chosen = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:QUERIES]]
        if len(chosen) < 2:
            continue
        query = mgc.query[i](x).flatten(2).transpose(1, 2)[:, chosen.to(x.device)].float()
        for kind in ATTENTION_KINDS:
            maps = attention_map(query, nodes.float(), kind=kind)[0]
            unit = nn.functional.normalize(maps, dim=1)
            values["distance", kind, level].append(_mean_of_pairs(torch.cdist(maps, maps, p=1) / 2))
            values["cosine", kind, level].append(_mean_of_pairs(1 - unit @ unit.T))
            values["entropy", kind, level].append(float(_entropy(maps, 1).mean()))


def _mean_of_pairs(distances: Tensor) -> float:
    """Mean of a symmetric matrix without its diagonal."""
    n = len(distances)
    return float((distances.sum() - distances.diagonal().sum()) / (n * (n - 1)))


def _entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy of weights relative to that of equal ones; one for a single weight."""
    number = weights.shape[dim]
    return torch.special.entr(weights).sum(dim) / math.log(number) if number > 1 else weights.sum(dim)


def _orthogonality(context: MGC, names: Iterable[str]) -> dict[str, float]:
    grams = ((w @ w.T).float() for w in context.entities)
    return {
        level: float(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        for level, gram in zip(names, grams, strict=True)
    }


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt().clamp(min=1e-12)


def main(
    model: Annotated[str, typer.Option(help="Folder of a saved model, or a name of a2fpn.list_pretrained().")],
    images: Annotated[Path, typer.Option(help="Folder of images.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Option(help="JSON file to write.", dir_okay=False)],
    limit: Annotated[int, typer.Option(help="Images to look at, the first by name.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Look into a trained neck and write what it sees."""
    detector = a2fpn.from_pretrained(model) if Path(model).is_dir() else a2fpn.create_model(model, pretrained=True)
    files = list_images(images)[:limit]
    report = diagnose(detector.to(device), map(read_image, files))
    output.write_text(json.dumps({"model": model, **dataclasses.asdict(report)}, indent=2) + "\n", encoding="utf-8")
    _print(report)


def _print(report: NeckReport) -> None:
    if report.attention is not None:
        levels = list(report.orthogonality)
        rows = [
            [f"map distance, {kind}{' (its own)' if kind == report.attention else ''}", *map(_number, found.values())]
            for kind, found in report.map_distance.items()
        ]
        rows.append(["context / lateral, RMS", *map(_number, report.context_size.values())])
        rows.append(["||W W^T - I||", *map(_number, report.orthogonality.values())])
        measure.print_table(f"Context, {report.images} images", ["", *levels], rows)
    columns = {"|gate - 1|": report.gate_change, "entropy": report.kernel_entropy, "center": report.kernel_center}
    fusions = dict.fromkeys(name for found in columns.values() for name in found)
    if fusions:
        rows = [[name, *(_number(found.get(name)) for found in columns.values())] for name in fusions]
        measure.print_table("Fusions: gates, and kernels", ["", *columns], rows)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


if __name__ == "__main__":
    typer.run(main)
