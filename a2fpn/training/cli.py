"""Command line of the training: a YAML recipe, overridden by ``section.key=value`` arguments."""

from __future__ import annotations

import argparse
import difflib
import logging
import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich.console import Console
from rich.logging import RichHandler

from a2fpn._plugins import import_package
from a2fpn._serialize import RENAMED
from a2fpn.errors import message_for_users
from a2fpn.training.config import TrainConfig
from a2fpn.training.recipes import copy_recipe, find_recipe, list_recipes
from a2fpn.training.signals import StopRequest

DESCRIPTION = """\
Trains a detector on a data set in COCO format.

    a2fpn train --config nuclei_lite0 data.root=DIR
    accelerate launch -m a2fpn.training --config RECIPE data.root=DIR
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m a2fpn.training --config RECIPE data.root=DIR

A recipe is a YAML file, or the name of one that comes with the package:
--list shows their names, --copy NAME FILE copies one, to be edited.

Settings on the command line override the recipe: section.key=value or --section.key value.
--strict-data is short for data.strict=true: stop at the first bad image or annotation instead of skipping it.
--resume auto is short for run.resume=auto: continue where the run was cut off, or start it.
--import MODULE imports a module that registers necks, detectors or backbones; may be repeated.
--debug, or A2FPN_DEBUG=1, shows the traceback of every error.

SIGTERM, SIGUSR1 and Ctrl-C end the step, write a checkpoint and exit with 128 + the signal's number.
"""
ASSIGNMENT = re.compile(r"\w+(\.\w+)*=")
FLAGS = ("--help", "--print_config")  # take no value after a blank
SHORT = {"--strict-data": "--data.strict=true", "--resume": "--run.resume"}
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: -*(?P<argument>[\w.]+)"
    r"|Option '(?P<option>[\w.]+)' is not accepted"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"
)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description and shows types and defaults."""


def build_parser() -> ArgumentParser:
    """Return the parser of :class:`TrainConfig`; its errors are raised, not printed."""
    parser = ArgumentParser(
        prog="train",
        usage="train [--config RECIPE] data.root=DIR [section.key=value ...]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file or a name of --list; may be repeated.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Read the settings from command-line arguments.

    Raises:
        argparse.ArgumentError: For an unknown key, and a missing or wrong value.
        ConfigError: For an unknown recipe.
    """
    arguments = list(arguments)
    for position, (previous, argument) in enumerate(zip(["", *arguments], arguments, strict=False)):
        option, equals, name = argument.partition("=")
        if previous == "--config":
            arguments[position] = _recipe(argument)
        elif option == "--config" and equals:
            arguments[position] = f"--config={_recipe(name)}"
    parser = build_parser()
    options = []
    arguments = [SHORT.get(argument, argument) for argument in arguments]
    for previous, argument in zip(["", *arguments[:-1]], arguments, strict=True):
        is_value = previous.startswith("--") and "=" not in previous and not previous.startswith(FLAGS)
        options.append(f"--{argument}" if ASSIGNMENT.match(argument) and not is_value else argument)
    settings = parser.instantiate(parser.parse_args(options))
    return TrainConfig(**{field.name: settings[field.name] for field in fields(TrainConfig)})


def _recipe(name: str) -> str:
    """Return the path of a recipe, or its text where that had to be changed: keys of older versions are renamed."""
    path = find_recipe(name)
    text = path.read_text(encoding="utf-8", errors="replace")
    current = re.sub(rf"\b({'|'.join(RENAMED)})(?=\s*:)", lambda match: RENAMED[match[0]], text)
    return str(path) if current == text else current


def setting_names(section: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting.

    Example:
        >>> "optim.lr" in setting_names()
        True
    """
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind):
            yield from setting_names(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def explain(error: Exception) -> str:
    """Turn an error about the user's input into one line; for an unknown setting it names the likely one."""
    message = " ".join(str(error).split())
    match = UNKNOWN_KEY.search(message)
    if match is None:
        return message
    key = match["argument"] or match["option"] or f"{match['group']}.{match['key']}"
    known = list(setting_names())
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[part] for part in difflib.get_close_matches(key.rpartition(".")[2], by_last_part, n=1)
    ]
    return f"unknown setting '{key}'. " + (f"Did you mean '{close[0]}'?" if close else "See --help for all settings.")


def fail(error: Any, code: int = 2) -> int:
    """Print one line and return the exit code."""
    sys.stderr.write(f"train: error: {error}\n")
    return code


def configure_logging() -> None:
    """Show what this program says, and only the warnings of the libraries."""
    console = Console(stderr=True)
    if console.is_terminal:  # rich keeps log lines and the progress bar apart
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    else:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO)
    # For the log file, which has what the progress bar shows.
    logging.getLogger("a2fpn.training").setLevel(logging.DEBUG)
    logging.getLogger("a2fpn").setLevel(logging.INFO)


def _door_parser() -> argparse.ArgumentParser:
    """The options that are no settings; whatever else is given is left alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--copy", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE")
    parser.add_argument("--debug", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns:
        The exit code: 0 after a finished run, 1 after one that failed on the way, 2 for wrong input, 128 + the number
        of the signal that stopped it.
    """
    before, remaining = _door_parser().parse_known_args(sys.argv[1:] if arguments is None else arguments)
    trainer = None
    try:
        if before.list:
            width = max(map(len, list_recipes()))
            sys.stdout.writelines(f"{name:{width}}  {line}\n" for name, line in list_recipes().items())
            return 0
        if before.copy:
            copy_recipe(before.copy[0], Path(before.copy[1]))
            return 0
        for name in before.modules:
            import_package(name)
        config = parse(remaining)
        configure_logging()

        # After the arguments are known to be right: Accelerate takes seconds.
        from a2fpn.training.trainer import Trainer

        trainer = Trainer(config)
        trainer.run()
    except ArgumentError as error:
        return fail(explain(error))
    except StopRequest as stop:
        return fail(stop, code=128 + stop.signum)
    except KeyboardInterrupt:
        saved = trainer is not None and (trainer.output / "last").exists()
        return fail("interrupted" + ("; run.resume=auto continues from the last checkpoint" if saved else ""), code=130)
    except Exception as error:
        message = message_for_users(error)
        if message is None or before.debug:
            raise
        return fail(message, code=getattr(error, "exit_code", 2))
    if trainer.accelerator.is_main_process:
        sys.stdout.write(f"{trainer.summary()}\n")
    return 0
