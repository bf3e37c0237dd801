"""Figures of docs/necks.md: what a trained A2-FPN computes on a real image.

    python -m benchmarks.neck_figures --output docs/images

Attention of chosen pixels under the three kinds, where nodes gather, reassembly kernels and channel gates, of the
packaged nuclei model on one of the packaged images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

import a2fpn
from a2fpn.data.images import read_image
from a2fpn.detectors import Detector
from a2fpn.layers import ATTENTION_KINDS, MGC, attention_map
from a2fpn.layers.fusion import ChannelGates, KernelPredictor

MODEL = "maskrcnn_a2fpn_lite0.nuclei"
IMAGE = Path(a2fpn.__file__).parent / "assets" / "nuclei_demo" / "images" / "0208.jpg"
QUERIES = ((0.30, 0.35), (0.62, 0.55), (0.08, 0.90))
"""Query pixels, as shares of height and width."""
_COLORS = ("#E69F00", "#56B4E9", "#D55E00")


@dataclass
class Seen:
    """Inputs and outputs of the parts of a neck, on one image.

    Args:
        features: Of the backbone, as the context got them.
        kernels: Per fusion ``(k * k, H, W)``.
        gates: Per fusion the gates of both maps.
    """

    features: list[Tensor] = field(default_factory=list)
    kernels: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level."""
        return [(int(x.shape[-2]), int(x.shape[-1])) for x in self.features]


@torch.no_grad()
def look(model: Detector, image: Tensor) -> Seen:
    """Run backbone and neck on an image, and keep what the parts compute.

    Args:
        model: A detector with a neck of the A2-FPN family.
        image: (3, H, W), uint8.
    """
    seen = Seen()

    def on_context(module: MGC, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.features = [x.clone() for x in args[0]]

    def on_kernels(name: str) -> Callable[..., None]:
        def hook(module: KernelPredictor, args: tuple[Any, ...], kernels: Tensor) -> None:
            seen.kernels[name] = kernels[0].float()

        return hook

    def on_gates(name: str) -> Callable[..., None]:
        def hook(module: ChannelGates, args: tuple[Any, ...]) -> None:
            seen.gates[name] = module.gates(*args)[0].float()

        return hook

    with ExitStack() as hooks:
        for path, module in model.neck.named_modules():
            fusion = path.rpartition(".")[0].replace("top_down.", "down to ").replace("bottom_up.", "up to ")
            if isinstance(module, MGC):
                hooks.callback(module.register_forward_pre_hook(on_context, with_kwargs=True).remove)
            elif isinstance(module, KernelPredictor):
                hooks.callback(module.register_forward_hook(on_kernels(fusion)).remove)
            elif isinstance(module, ChannelGates):
                hooks.callback(module.register_forward_pre_hook(on_gates(fusion)).remove)
        model.features(model.preprocess([image]))
    return seen


@torch.no_grad()
def gathering(mgc: MGC, seen: Seen, level: int, kind: Any) -> Tensor:
    """Weights with which the nodes of a level gather its pixels, ``(nodes, H, W)``."""
    pixels = seen.features[level].flatten(2).transpose(1, 2).float()
    weights = attention_map(mgc.entities[level][None].float(), pixels, kind=kind)[0]
    return weights.unflatten(1, seen.sizes[level])


@torch.no_grad()
def attention(mgc: MGC, seen: Seen, level: int, kind: Any, pixel: tuple[int, int]) -> Tensor:
    """Weights of a level's pixels in the context of one of them, by way of the level's nodes, ``(H, W)``."""
    x, nodes = seen.features[level], mgc.nodes(seen.features)[level].float()
    if nodes.shape[1] > len(mgc.entities[level]):  # those of all levels: only the own ones have pixels here
        before = sum(len(mgc.entities[i]) for i in range(level))
        nodes = nodes[:, before : before + len(mgc.entities[level])]
    query = mgc.query[level](x).flatten(2).transpose(1, 2).float()
    at = pixel[0] * seen.sizes[level][1] + pixel[1]
    to_nodes = attention_map(query[:, at : at + 1], nodes, kind=kind)[0, 0]
    return torch.einsum("n,nhw->hw", to_nodes, gathering(mgc, seen, level, kind))


def _show(axes: Any, picture: Any, title: str = "", **options: Any) -> None:
    axes.imshow(picture, **options)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])


def draw_attention(mgc: MGC, seen: Seen, shown: Any, level: int) -> Figure:
    """Maps of the query pixels, a row for each kind of attention."""
    height, width = seen.sizes[level]
    pixels = [(int(y * height), int(x * width)) for y, x in QUERIES]
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    grid = figure.subplots(len(ATTENTION_KINDS), 1 + len(pixels), squeeze=False)
    for row, kind in zip(grid, ATTENTION_KINDS, strict=True):
        _show(row[0], shown, extent=(0, width, height, 0))
        row[0].set_ylabel(kind, fontsize=10)
        for (y, x), color, axes in zip(pixels, _COLORS, row[1:], strict=True):
            row[0].plot(x + 0.5, y + 0.5, "o", ms=9, mfc=color, mec="white")
            _show(axes, attention(mgc, seen, level, kind, (y, x)), cmap="magma")
            axes.plot(x, y, "o", ms=7, mfc="none", mec=color, mew=2)
            for side in axes.spines.values():
                side.set(color=color, linewidth=2)
    return figure


def draw_entities(mgc: MGC, seen: Seen, level: int, count: int = 8) -> Figure:
    """Gathering weights of the first nodes of a level."""
    figure = Figure(figsize=(9.6, 5), layout="constrained")
    maps = gathering(mgc, seen, level, mgc.attention)
    for number, axes in enumerate(figure.subplots(2, count // 2).flat):
        _show(axes, maps[number], f"node {number}", cmap="magma")
    return figure


def draw_kernels(seen: Seen, shown: Any, name: str) -> Figure:
    """Kernels at the query pixels, and the weight of their centers over the map."""
    kernels = seen.kernels[name]
    count, height, width = kernels.shape
    side = round(count**0.5)
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    left, right = above.subplots(1, 2)
    _show(left, shown, "query pixels", extent=(0, width, height, 0))
    right.set_title("weight of the center", fontsize=9)
    drawn = right.imshow(kernels[count // 2], cmap="viridis")
    right.set(xticks=[], yticks=[])
    above.colorbar(drawn, ax=right, shrink=0.8)
    for (y, x), color, axes in zip(QUERIES, _COLORS, below.subplots(1, len(QUERIES)), strict=True):
        at = int(y * height), int(x * width)
        left.plot(at[1] + 0.5, at[0] + 0.5, "o", ms=9, mfc=color, mec="white")
        _show(axes, kernels[:, at[0], at[1]].view(side, side), cmap="viridis")
        for edge in axes.spines.values():
            edge.set(color=color, linewidth=3)
    return figure


def draw_gates(seen: Seen) -> Figure:
    """Gates of every fusion, sorted."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, gates in seen.gates.items():
        values = np.sort(gates.numpy())
        axes.plot(np.linspace(0, 100, len(values)), values, label=name, ls="-" if "down" in name else "--")
    axes.axhline(1, color="#888888", lw=0.8)
    axes.set(xlabel="channels of both maps, sorted, %", ylabel="gate", ylim=(0, 2))
    axes.legend(fontsize=8)
    return figure


def draw(model: Detector, image: Tensor) -> dict[str, Figure]:
    """All figures by name.

    Args:
        model: A detector with an ``a2fpn`` neck.
        image: (3, H, W), uint8.
    """
    seen = look(model, image)
    mgc = next(module for module in model.neck.modules() if isinstance(module, MGC))
    shown = image.permute(1, 2, 0).numpy()
    level = 1  # fine enough to see objects, coarse enough to see single pixels
    return {
        "attention": draw_attention(mgc, seen, shown, level),
        "entities": draw_entities(mgc, seen, level),
        "kernels": draw_kernels(seen, shown, "down to p2"),
        "gates": draw_gates(seen),
    }


def main(
    output: Annotated[Path, typer.Option(help="Folder to write to.", file_okay=False)],
    model: Annotated[str, typer.Option(help="Folder of a saved model, or a name.")] = MODEL,
    image: Annotated[Path, typer.Option(help="Image to look at.")] = IMAGE,
) -> None:
    """Draw the figures."""
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in draw(a2fpn.from_pretrained(model), read_image(image)).items():
        figure.savefig(output / f"{name}.jpg", dpi=100, pil_kwargs={"quality": 85})
        typer.echo(f"{output / name}.jpg")


if __name__ == "__main__":
    typer.run(main)
