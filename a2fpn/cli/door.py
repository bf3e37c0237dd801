"""The group of commands that turns errors about input into one line."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from a2fpn._words import COMMANDS, OPTIONS
from a2fpn.errors import message_for_users

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""Arguments that all Typer applications of the package share."""

Debug = Annotated[bool, typer.Option("--debug", help="Show full tracebacks on errors (also A2FPN_DEBUG=1).")]


def prepare_streams() -> None:
    """Let text pass that the encoding of the terminal can't write: such characters become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not those of a test or a notebook
            stream.reconfigure(errors="replace")


class Door(TyperGroup):
    """Commands that end in one line and exit code 2 for errors about input; other errors keep their traceback.

    With ``--debug``, here or in an outer group, all do.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or say which one a word of another library stands for."""
        meant = COMMANDS.get(args[0].lower().replace("-", "_")) if args else None
        if meant is not None and ctx.parent is None and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"No such command {args[0]!r}. Did you mean '{ctx.info_name} {meant}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the outermost group turns errors into lines."""
        if ctx.params.get("debug"):
            ctx.meta["a2fpn.debug"] = True
        try:
            return super().invoke(ctx)
        except Exception as error:
            option = getattr(error, "option_name", None)
            if option is not None and hasattr(error, "possibilities"):
                meant = OPTIONS.get(str(option).lstrip("-").replace("-", "_").lower())
                error.possibilities = [meant] if meant else error.possibilities
            message = message_for_users(error)
            if message is None or ctx.parent is not None or ctx.meta.get("a2fpn.debug"):
                raise
            typer.echo(f"{ctx.info_name.rpartition(' ')[2]}: error: {message}", err=True)
            raise typer.Exit(2) from None
