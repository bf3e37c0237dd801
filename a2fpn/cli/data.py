"""``a2fpn data``: data sets brought into shape, and into shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from a2fpn.cli import data_sets
from a2fpn.cli.door import SETTINGS, Debug, Door
from a2fpn.cli.pick import pick
from a2fpn.errors import ConfigError

UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

app = typer.Typer(name="data", cls=Door, **SETTINGS)


def parse_size(text: str) -> int:
    """Read a size in bytes.

    Raises:
        ValueError: If it is none.

    Example:
        >>> parse_size("256MB"), parse_size("1.5 GiB"), parse_size("4096")
        (256000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text.strip())
    if match is None or match[2] not in UNITS:
        raise ConfigError(f"--shard-size: expected a size such as 256MB or 1GiB, got {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


@app.callback()
def _options(*, debug: Debug = False) -> None:
    """Prepare training data."""


@app.command()
def shard(
    *,
    images: Annotated[Path | None, typer.Option(help="Image folder.", metavar="DIR")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO annotation file.", metavar="JSON")] = None,
    output: Annotated[Path | None, typer.Option(help="Output folder for the shards.", metavar="DIR")] = None,
    semantic: Annotated[
        Path | None, typer.Option(help="Folder of semantic maps; see a2fpn.data.CocoDataset.", metavar="DIR")
    ] = None,
    samples_per_shard: Annotated[int | None, typer.Option(help="Maximum images per shard.", metavar="N")] = None,
    shard_size: Annotated[
        str, typer.Option(help="Maximum shard size, such as 256MB or 1GiB.", metavar="SIZE")
    ] = "256MB",
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Shuffle the images.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed for --shuffle.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on the first bad annotation or missing image.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite shards in the output folder.")] = False,
    check: Annotated[
        str | None,
        typer.Option(help="Verify existing shards against their index instead of writing.", metavar="DIR_OR_URL"),
    ] = None,
) -> None:
    """Convert a COCO data set to WebDataset shards for `data.stream.shards`, or verify existing shards.

    Example: `a2fpn data shard --images DIR --annotations JSON --output shards`
    """
    from a2fpn.data import write_shards

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        if check is not None:
            _check(check, bar)
            return
        if images is None or annotations is None or output is None:
            given = {"--images": images, "--annotations": annotations, "--output": output}
            raise ConfigError(f"needs {', '.join(name for name, path in given.items() if path is None)}; see --help.")
        try:
            index = write_shards(
                images,
                annotations,
                output,
                semantic=semantic,
                samples_per_shard=samples_per_shard,
                shard_size=parse_size(shard_size),
                seed=seed if shuffle else None,
                strict=strict,
                force=force,
                progress=lambda total: bar.update(task, total=total, advance=1),
            )
        except KeyboardInterrupt:
            typer.echo("interrupted before the index was written; restart with --force", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"{output}: {index.num_samples} images in {len(index.shards)} shards")


def _check(location: str, bar: Progress) -> None:
    from a2fpn.data import check_shards

    shards = problems = 0
    for _, problem in check_shards(location):
        shards += 1
        bar.advance(bar.task_ids[0])
        if problem:
            problems += 1
            typer.echo(f"a2fpn: error: {problem}", err=True)
    typer.echo(f"{location}: {shards} shards, {problems} of them damaged")
    if problems:
        raise typer.Exit(1)


data_sets.register(app)
app.command()(pick)
