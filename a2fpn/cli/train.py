"""``a2fpn train``."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Train a detector on a data set in COCO format: `a2fpn train --config RECIPE data.root=DIR`.

    `a2fpn train --help` lists all settings. On several GPUs: `accelerate launch -m a2fpn.training ...`.
    """
    from a2fpn.training.cli import main

    raise typer.Exit(main(context.args))
