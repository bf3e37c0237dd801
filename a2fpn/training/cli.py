"""Command line of the training: a YAML recipe, overridden by ``section.key=value`` arguments."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.logging import RichHandler

from a2fpn._plugins import import_package
from a2fpn._serialize import from_dict, plain, to_dict
from a2fpn.errors import ConfigError, message_for_users
from a2fpn.training.config import DataSection, TrainConfig
from a2fpn.training.recipes import AUTO, copy_recipe, find_recipe, list_recipes
from a2fpn.training.settings import assign, dump_yaml, flat, read_arguments, read_file, type_of
from a2fpn.training.signals import StopRequest

DESCRIPTION = """\
Train a detector on a COCO-format data set.

    a2fpn train --config nuclei_lite0 data.root=DIR
    accelerate launch -m a2fpn.training --config RECIPE data.root=DIR
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m a2fpn.training --config RECIPE data.root=DIR

Settings on the command line override the recipe: section.key=value, --section.key=value or --section.key value. Values
are YAML. A recipe changes settings key by key; so does a later recipe, and a dotted name such as
model.overrides.neck_args.out_channels=96. model.overrides={} replaces all of them.

--config auto chooses the other settings from the data, and says why:

    a2fpn train --config auto data.root=DIR

SIGTERM, SIGUSR1 and Ctrl-C end the step, write a checkpoint and exit with 128 + the signal's number.
"""


def _parser() -> argparse.ArgumentParser:
    """Build the parser of the options that are not settings; other arguments are left to the caller."""
    parser = argparse.ArgumentParser(
        prog="train",
        usage="train [--config RECIPE] data.root=DIR [section.key=value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="RECIPE", help="YAML file or name from --list; repeatable")
    add("--list", action="store_true", help="list the bundled recipes")
    add("--copy", nargs=2, metavar=("NAME", "FILE"), help="copy a recipe to a file, for editing")
    add("--print_config", action="store_true", help="show all settings as YAML instead of training")
    add("--resume", metavar="auto", help="short for run.resume=auto: continue where the run was cut off, or start it")
    add("--strict-data", action="store_true", help="short for data.strict=true: stop at the first bad image")
    imports = "import a module that registers necks, detectors or backbones; repeatable"
    add("--import", action="append", default=[], dest="modules", metavar="MODULE", help=imports)
    add("--quiet", "-q", action="store_true", help="hide progress and summary; only show warnings and errors")
    add(
        "--json",
        metavar="OUT",
        help="write the run's numbers to a JSON file at the end; - is standard output and implies -q",
    )
    add("--debug", action="store_true", help="show full tracebacks on errors (also A2FPN_DEBUG=1)")
    return parser


def describe(section: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """Yield the help of every setting: name, type, default, and its sentence in the docstring."""
    sentences = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(section) or "", flags=re.MULTILINE))
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        name, hint, sentence = f"{prefix}{field.name}", hints[field.name], " ".join(sentences[field.name].split())
        if is_dataclass(hint):
            yield f"\n{name}: {sentence}"
            yield from describe(hint, f"{name}.")
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "required" if default is dataclasses.MISSING else f"default {json.dumps(plain(default))}"
        yield f"  --{name} {type_name(hint)}, {shown}"
        yield textwrap.fill(sentence, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def type_name(hint: Any) -> str:
    """Name of a type for people who write YAML.

    Example:
        >>> type_name(tuple[float, float] | None), type_name(Literal["sgd", "adamw"])
        ('[float, float] | null', 'sgd | adamw')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_name, args))
    if origin is Literal:
        return " | ".join(args)
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else type_name(arg) for arg in args)}]"
    if origin is dict:
        return "{key: value}"
    return "null" if hint is type(None) else str(hint.__name__)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Read the settings from command-line arguments.

    Raises:
        ConfigError: For an unknown recipe or setting, and a missing or wrong value.
    """
    return _settings(*_options(arguments))


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        parser = _parser()
        if {"-h", "--help"} & set(arguments):  # building the help takes a while
            parser.epilog = "settings:\n" + "\n".join(describe())
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None


def _settings(options: argparse.Namespace, arguments: Sequence[str]) -> TrainConfig:
    recipes = [find_recipe(name) for name in options.config]
    short = [f"run.resume={options.resume}"] if options.resume is not None else []
    short += ["data.strict=true"] if options.strict_data else []
    given = list(read_arguments([*short, *arguments]))
    settings = _joined(recipes, given)
    if not isinstance(settings["data"], dict):
        raise ConfigError(
            f"data is a section, got {settings['data']!r}; the folder of the data set is data.root=DIR, with "
            "data.format=auto for labels of YOLO and others."
        )
    if "root" not in settings["data"]:
        raise ConfigError("the setting data.root is missing, the folder of the data set: data.root=DIR.")
    if AUTO in recipes:
        decided = flat(_joined([path for path in recipes if path != AUTO], given))
        settings = _chosen(settings, decided)
    return from_dict(TrainConfig, settings, where="")


def _joined(recipes: Iterable[Path], given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Merge the settings of recipes, overridden by those given on the command line."""
    settings: dict[str, Any] = {"data": {}}
    for path in recipes:
        for section, value in read_file(path).items():
            settings = assign(settings, section, value)
    for name, value in given:
        settings = assign(settings, name, value, merge=is_dataclass(type_of(name)))
    return settings


def _chosen(settings: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    """Add settings chosen from the data, and log the reasons."""
    from a2fpn.training.auto import choose
    from a2fpn.training.importing import import_folder

    configure_logging()  # an import logs its progress
    data = import_folder(from_dict(DataSection, settings["data"], where="data"))
    for choice in choose(data, given=decided):
        settings = assign(settings, choice.setting, choice.value)
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"auto: {choice}\n")
    return dict(settings)


def fail(error: Any, code: int = 2) -> int:
    """Print one line and return the exit code."""
    sys.stderr.write(f"train: error: {error}\n")
    return code


class _Lines(logging.Formatter):
    """Formatter that marks warnings."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """See ``logging.Formatter.formatMessage``."""
        if record.levelno >= logging.WARNING:
            record.message = f"warning: {record.message}"
        return super().formatMessage(record)


def configure_logging(*, quiet: bool = False) -> None:
    """Show log lines of this program, and only warnings of libraries.

    Args:
        quiet: Whether to show only warnings of this program too.
    """
    console = Console(stderr=True)
    if console.is_terminal:  # rich keeps log lines separate from the progress bar
        logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    else:
        logging.basicConfig()
        logging.getLogger().handlers[0].setFormatter(_Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING if quiet else logging.INFO)
    # For the log file, which also gets what the progress bar shows.
    logging.getLogger("a2fpn.training").setLevel(logging.DEBUG)
    logging.getLogger("a2fpn").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from command-line arguments.

    Returns:
        The exit code: 0 after a finished run, 1 after a failed one, 2 for wrong input, 128 + the number of the signal
        that stopped it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        _parser().print_usage(sys.stderr)
        return fail("no arguments; --help lists all settings, --list the recipes.")
    trainer = None
    try:
        before, remaining = _options(arguments)
        if before.list:
            width = max(map(len, list_recipes()))
            sys.stdout.writelines(f"{name:{width}}  {line}\n" for name, line in list_recipes().items())
            return 0
        if before.copy:
            copy_recipe(before.copy[0], Path(before.copy[1]))
            return 0
        for name in before.modules:
            import_package(name)
        config = _settings(before, remaining)
        if before.print_config:
            sys.stdout.write(dump_yaml(to_dict(config)))
            return 0
        quiet = before.quiet or before.json == "-"
        configure_logging(quiet=quiet)

        # Imported after the arguments are validated: Accelerate takes seconds.
        from a2fpn.training.account import numbers, summary
        from a2fpn.training.trainer import Trainer

        trainer = Trainer(config, quiet=quiet)
        trainer.run()
    except StopRequest as stop:
        return fail(stop, code=128 + stop.signum)
    except KeyboardInterrupt:
        saved = trainer is not None and (trainer.output / "last").exists()
        return fail("interrupted" + ("; run.resume=auto continues from the last checkpoint" if saved else ""), code=130)
    except Exception as error:
        message = message_for_users(error)
        if message is None or "--debug" in arguments:
            raise
        return fail(message, code=getattr(error, "exit_code", 2))
    if trainer.accelerator.is_main_process:
        if before.json:
            text = json.dumps(numbers(trainer), indent=2) + "\n"
            if before.json == "-":
                sys.stdout.write(text)
            else:
                Path(before.json).write_text(text, encoding="utf-8")
        if not quiet:
            sys.stdout.write(f"{summary(trainer)}\n")
    return 0
