"""Command line of the training: a YAML recipe, overridden by ``section.key=value`` arguments."""

from __future__ import annotations

import difflib
import logging
import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from rich.console import Console
from rich.logging import RichHandler

from a2fpn.training.config import TrainConfig

DESCRIPTION = """\
Trains a detector on a data set in COCO format.

    accelerate launch train/ --config a2fpn/training/recipes/nuclei_lite0.yaml data.root=DIR
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 train/ --config RECIPE data.root=DIR

Settings on the command line override the recipe: section.key=value or --section.key value.
--strict-data is short for data.strict=true: stop at the first bad image or annotation instead of skipping it.
--resume auto is short for run.resume=auto: continue where the run was cut off, or start it.

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
    """Returns the parser of :class:`TrainConfig`; its errors are raised, not printed."""
    parser = ArgumentParser(
        prog="train",
        usage="train [--config RECIPE] data.root=DIR [section.key=value ...]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given several times.")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Reads the settings from command-line arguments.

    Raises:
        argparse.ArgumentError: For an unknown key, and a missing or wrong value.
    """
    parser = build_parser()
    options = []
    arguments = [SHORT.get(argument, argument) for argument in arguments]
    for previous, argument in zip(["", *arguments[:-1]], arguments, strict=True):
        is_value = previous.startswith("--") and "=" not in previous and not previous.startswith(FLAGS)
        options.append(f"--{argument}" if ASSIGNMENT.match(argument) and not is_value else argument)
    settings = parser.instantiate(parser.parse_args(options))
    return TrainConfig(**{field.name: settings[field.name] for field in fields(TrainConfig)})


def setting_names(section: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every setting.

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
    """Turns an error about the user's input into one line; for an unknown setting it names the likely one."""
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
    """Prints one line and returns the exit code."""
    sys.stderr.write(f"train: error: {error}\n")
    return code


def configure_logging() -> None:
    """Shows what this program says, and only the warnings of the libraries."""
    console = Console(stderr=True)
    if console.is_terminal:  # rich keeps log lines and the progress bar apart
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    else:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO)
    logging.getLogger("a2fpn.training").setLevel(
        logging.DEBUG
    )  # for the log file, which has what the progress bar shows
    logging.getLogger("a2fpn").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the command line says.

    Returns:
        The exit code: 0 after a finished run, 1 after one that failed on the way, 2 for wrong input, 128 + the number
        of the signal that stopped it.
    """
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
    except ArgumentError as error:
        return fail(explain(error))
    configure_logging()

    # After the arguments are known to be right: torch takes seconds.
    from a2fpn.data import DataError, ImageError
    from a2fpn.training.signals import StopRequest
    from a2fpn.training.state import CheckpointWriteError
    from a2fpn.training.trainer import LoaderError, NonFiniteLossError, Trainer

    try:
        trainer = Trainer(config)
    except (OSError, ValueError, TypeError) as error:
        return fail(explain(error))
    try:
        trainer.run()
    except (DataError, ImageError) as error:  # only with data.strict; a loader process puts its traceback in front
        return fail(str(error).strip().splitlines()[-1])
    except (NonFiniteLossError, CheckpointWriteError, LoaderError) as error:
        return fail(error, code=1)
    except StopRequest as stop:
        return fail(stop, code=128 + stop.signum)
    except KeyboardInterrupt:
        saved = (trainer.output / "last").exists()
        return fail("interrupted" + ("; run.resume=auto continues from the last checkpoint" if saved else ""), code=130)
    if trainer.accelerator.is_main_process:
        sys.stdout.write(f"{trainer.summary()}\n")
    return 0
