"""The command line ``a2fpn``.

What a user got wrong ends with one line and exit code 2; a traceback means that the package is to blame.
"""

from __future__ import annotations

from typing import Annotated

import typer

from a2fpn._plugins import import_package
from a2fpn._version import __version__
from a2fpn.cli import data, hub
from a2fpn.cli.check_data import check_data
from a2fpn.cli.compare import compare, gallery
from a2fpn.cli.count import calibrate, count
from a2fpn.cli.demo import demo
from a2fpn.cli.door import SETTINGS, Debug, Door
from a2fpn.cli.evaluate import evaluate
from a2fpn.cli.export import export
from a2fpn.cli.info import info
from a2fpn.cli.list_names import list_names
from a2fpn.cli.page import show_page
from a2fpn.cli.predict import predict
from a2fpn.cli.train import train

app = typer.Typer(name="a2fpn", cls=Door, **{**SETTINGS, "add_completion": True})


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"a2fpn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Debug = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module that registers necks, detectors or backbones; repeatable.",
        ),
    ] = None,
) -> None:
    """Object detection and instance segmentation with A²-FPN and other feature pyramids on any timm backbone.

    Start with `a2fpn demo`.
    """
    for name in modules or ():
        import_package(name)


app.command()(demo)
app.command()(predict)
app.command()(export)
app.command()(evaluate)
app.command()(compare)
app.command()(gallery)
app.command()(count)
app.command()(calibrate)
app.command(name="check-data")(check_data)
app.command(name="list")(list_names)
app.command()(info)
app.command(name="app")(show_page)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(train)
app.add_typer(data.app, name="data")
app.add_typer(hub.app, name="hub")
