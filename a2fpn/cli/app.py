"""The command line ``a2fpn``.

What a user got wrong ends with one line and exit code 2; a traceback means that the package is to blame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from a2fpn._version import __version__
from a2fpn.cli import data, hub
from a2fpn.cli.check_data import check_data
from a2fpn.cli.count import calibrate, count
from a2fpn.cli.demo import demo
from a2fpn.cli.evaluate import evaluate
from a2fpn.cli.info import info
from a2fpn.cli.list_names import list_names
from a2fpn.cli.predict import predict
from a2fpn.cli.train import train


class _Commands(TyperGroup):
    """Turns what is the user's to mend into one line; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, TypeError, ValueError) as error:
            if ctx.params["debug"] or not _is_for_users(error):
                raise
            typer.echo(f"a2fpn: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


def _is_for_users(error: Exception) -> bool:
    """Whether the message was written by this package or is about files."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_in: str = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return isinstance(error, OSError) or raised_in.startswith("a2fpn.")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    app(args=argv, prog_name="a2fpn")


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
    debug: Annotated[
        bool, typer.Option("--debug", envvar="A2FPN_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    """Object detection and instance segmentation with A²-FPN and other pyramids on any backbone of timm.

    Start with `a2fpn demo`.
    """


app.command()(demo)
app.command()(predict)
app.command()(evaluate)
app.command()(count)
app.command()(calibrate)
app.command(name="check-data")(check_data)
app.command(name="list")(list_names)
app.command()(info)
app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(train)
app.add_typer(data.app, name="data")
app.add_typer(hub.app, name="hub")
