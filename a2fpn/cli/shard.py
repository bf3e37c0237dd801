"""``a2fpn data shard``: writes a COCO-format set as WebDataset shards, or checks shards that are there."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

DESCRIPTION = """\
Writes a COCO-format set as WebDataset shards for data.stream.shards, or checks shards (--check)."""
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Parser(ArgumentParser):
    """A parser whose errors are raised, not printed."""

    def error(self, message: str) -> NoReturn:
        """Raises the message."""
        raise ValueError(f"{message}; see --help.")


def parse_size(text: str) -> int:
    """Reads a size in bytes.

    Raises:
        ValueError: If it is none.

    Example:
        >>> parse_size("256MB"), parse_size("1.5 GiB"), parse_size("4096")
        (256000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"--shard-size: expected a size such as 256MB or 1GiB, got {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


def build_parser() -> Parser:
    """Returns the parser of the command."""
    parser = Parser(prog="a2fpn data shard", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--images", metavar="DIR", help="folder of the images")
    parser.add_argument("--annotations", metavar="JSON", help="COCO file")
    parser.add_argument("--semantic", metavar="DIR", help="folder of semantic maps, see a2fpn.data.CocoDataset")
    parser.add_argument("--output", metavar="DIR", help="folder of the shards")
    parser.add_argument("--samples-per-shard", type=int, metavar="N", help="largest number of images in a shard")
    parser.add_argument("--shard-size", default="256MB", metavar="SIZE", help="largest size of a shard (256MB)")
    parser.add_argument("--shuffle", action="store_true", help="write the images in random order")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random order (0)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad annotation or missing image")
    parser.add_argument("--force", action="store_true", help="replace shards that are in the output folder")
    parser.add_argument("--check", metavar="DIR_OR_URL", help="compare shards with their index instead of writing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks shards as the command line says.

    Returns:
        The exit code: 0, 1 if checked shards are damaged, 2 for wrong input or a disk that can't be written, 130 for an
        interruption.
    """
    from a2fpn.data import ShardIndex, check_shards, write_shards  # not before --help: torch takes seconds
    from a2fpn.training.cli import configure_logging

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        options = build_parser().parse_args(arguments)
        configure_logging()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            if options.check:
                shards = problems = 0
                for _, problem in check_shards(options.check):
                    shards += 1
                    bar.advance(task)
                    if problem:
                        problems += 1
                        sys.stderr.write(f"shard: error: {problem}\n")
                sys.stdout.write(f"{options.check}: {shards} shards, {problems} of them damaged\n")
                return 1 if problems else 0
            missing = [name for name in ("images", "annotations", "output") if getattr(options, name) is None]
            if missing:
                raise ValueError(f"needs {', '.join(f'--{name}' for name in missing)}; see --help.")
            index: ShardIndex = write_shards(
                options.images,
                options.annotations,
                options.output,
                semantic=options.semantic,
                samples_per_shard=options.samples_per_shard,
                shard_size=parse_size(options.shard_size),
                seed=options.seed if options.shuffle else None,
                strict=options.strict,
                force=options.force,
                progress=lambda total: bar.update(task, total=total, advance=1),
            )
    except (OSError, ValueError) as error:
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return _fail("interrupted; there is no index yet: start again with --force", code=130)
    sys.stdout.write(f"{options.output}: {index.num_samples} images in {len(index.shards)} shards\n")
    return 0


def _fail(error: str, code: int = 2) -> int:
    sys.stderr.write(f"shard: error: {error}\n")
    return code
