"""``a2fpn data``: data sets brought into shape, and into shards."""

from __future__ import annotations

import typer

from a2fpn.cli import data_sets
from a2fpn.cli.shard import main

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def _options() -> None:
    """Prepare training data."""


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def shard(context: typer.Context) -> None:
    """Write a COCO-format set as WebDataset shards, or check shards; see `a2fpn data shard --help`."""
    raise typer.Exit(main(context.args))


data_sets.register(app)
