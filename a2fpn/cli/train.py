"""``a2fpn train``."""

from __future__ import annotations

import typer

from a2fpn.errors import ConfigError


def train(context: typer.Context) -> None:
    """Train a detector on a COCO-format data set: `a2fpn train --config RECIPE data.root=DIR`.

    `a2fpn train --help` lists all settings. On several GPUs: `accelerate launch -m a2fpn.training ...`.
    """
    try:
        from a2fpn.training.cli import main
    except ModuleNotFoundError as error:
        raise ConfigError(f'Training needs {error.name}: pip install "a2fpn[train]".') from error

    debug = ["--debug"] if context.meta.get("a2fpn.debug") else []
    raise typer.Exit(main([*context.args, *debug]))
