"""``a2fpn info``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from a2fpn.cli.format import as_text, table
from a2fpn.cli.list_names import ap_columns

if TYPE_CHECKING:
    from a2fpn.detectors import Detector


INFO_SIZE = (480, 640)  # height and width of the image for which `info` counts operations


def info(
    model: Annotated[str, typer.Argument(help="Name from `a2fpn list`, or checkpoint folder.", metavar="MODEL")],
) -> None:
    """Show a model's architecture, parameters and GMACs, without downloading anything.

    Example: `a2fpn info maskrcnn_a2fpn_r50`
    """
    import a2fpn
    from a2fpn.pretrained.catalog import PRETRAINED, EmbeddedWeights
    from a2fpn.pretrained.checkpoint import read_checkpoint

    weights = PRETRAINED.get(model)
    folder = weights.folder if isinstance(weights, EmbeddedWeights) else Path(model)
    detector = a2fpn.from_pretrained(folder) if folder.is_dir() else a2fpn.create_model(model).eval()
    config = detector.config
    preprocess = config.preprocess
    categories = [category.name for category in config.labeled_categories]
    facts = {
        "detector": config.detector,
        "neck": f"{config.neck.name} {as_text(config.neck.args)}",
        "backbone": config.backbone.name,
        "resize": f"{preprocess.resize}, sides of {preprocess.min_size} to {preprocess.max_size} px, "
        f"padded to multiples of {detector.preprocess.divisor}",
        "mean": as_text(preprocess.mean),
        "std": as_text(preprocess.std),
        "categories": f"{len(categories)}: {as_text(categories[:10])}{', ...' if len(categories) > 10 else ''}",
    }
    if folder.is_dir():
        facts |= {key: as_text(value) for key, value in read_checkpoint(folder).metadata.items()}
    elif weights is not None:
        row = next(row for row in a2fpn.list_pretrained(model) if row.name == model)
        facts |= {
            "weights": row.origin,
            "kind": "trained" if row.trained else "grafted, to be fine-tuned",
            "AP": f"{', '.join(filter(None, ap_columns(row)))} ({row.measured})",
            "license": row.license,
        }
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for key, text in facts.items():
        grid.add_row(key, escape(text))
    typer.echo(config.architecture)
    console.print(grid)
    _print_cost(detector)
    typer.echo("\nPyramid")
    pyramid = table("level", "stride", "channels")
    for name in detector.neck.out_spec.names:
        level = detector.neck.out_spec[name]
        pyramid.add_row(name, str(level.stride), str(level.channels))
    console.print(pyramid)


def _print_cost(detector: Detector) -> None:
    """Parameters of all parts, and operations of those whose work doesn't depend on what is in the image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    batch = detector.preprocess([torch.zeros(len(detector.config.preprocess.mean), *INFO_SIZE)])
    operations: dict[str, float] = {}

    def run(name: str, module: Callable[..., Any], *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = module(*args)
        operations[name] = counter.get_total_flops() / 2e9
        return out

    with torch.inference_mode():
        features = run("backbone", detector.backbone, batch.tensor)
        pyramid = run("neck", detector.neck, features, batch.sizes)
        pyramid = run("top", detector.add_levels, features, pyramid)
        dense = next(name for name, part in detector.named_children() if detector.dense_head in part.modules())
        run(dense, detector.dense_head, list(pyramid.values()))
    grid = table("part", "parameters", "GMACs")
    parts = dict(detector.named_children())
    roi_heads = parts.pop("roi_heads", None)
    if roi_heads is not None:
        parts |= dict(roi_heads.named_children())
    for name, module in {**parts, "all": detector}.items():
        parameters = sum(parameter.numel() for parameter in module.parameters())
        gmacs = sum(operations.values()) if name == "all" else operations.get(name)
        if parameters:
            grid.add_row(name.replace("_", " "), f"{parameters / 1e6:.2f} M", f"{gmacs:.2f}" if gmacs else "")
    image, resized, padded = (
        f"{width} x {height}" for height, width in (INFO_SIZE, batch.sizes[0], batch.tensor.shape[-2:])
    )
    typer.echo(f"\nCost for an image of {image}, resized to {resized}, padded to {padded}")
    Console().print(grid)
    more = "; the heads' grow with the number of proposals" if roi_heads is not None else ""
    typer.echo(f"GMACs are those of convolutions and matrix products{more}.")
