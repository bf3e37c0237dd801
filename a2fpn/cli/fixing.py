"""Repaired copies that ``a2fpn check-data --fix`` writes, and the words about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from a2fpn._atomic import write_text
from a2fpn.cli.format import say
from a2fpn.errors import ConfigError, ExistingFileError

if TYPE_CHECKING:
    from a2fpn.data import Change

_SHOWN = 5  # changes of a kind that are printed


def changes_file(output: Path) -> Path:
    """Name of the list of all changes beside a repaired file.

    Example:
        >>> changes_file(Path("fixed.json")).name
        'fixed.changes.txt'
    """
    return output.with_suffix(".changes.txt")


def check_output(annotations: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: If the output is the file that is checked.
        ExistingFileError: If there is a file already, unless ``overwrite``.
    """
    if output.resolve() == annotations.resolve():
        raise ConfigError(f"--fix {output}: this is the checked file; choose another name for the repaired copy.")
    for path in (output, changes_file(output)):
        if path.exists() and not overwrite:
            raise ExistingFileError(f"{path}: exists already; choose another name for --fix, or add --overwrite.")


def write_fixed(annotations: Path, images: Path | None, output: Path, *, quiet: bool = False) -> None:
    """Write a repaired copy and the list of its changes, and say what they are."""
    from a2fpn.data import fix_data

    fixed = fix_data(annotations, images)
    write_text(output, json.dumps(fixed.content))
    if not fixed.changes:
        say(f"Nothing to repair; {output} is a copy.", quiet=quiet)
        return
    listing = changes_file(output)
    write_text(listing, "".join(f"{change}\n" for change in fixed.changes))
    for line in summary(fixed.changes):
        say(line, quiet=quiet)
    said = f"The repaired copy is {output}; all {len(fixed.changes):,} changes are listed in {listing}"
    say(said, quiet=quiet)


def summary(changes: Sequence[Change]) -> list[str]:
    """Return how many changes of each kind there are, with the first of them."""
    lines = []
    for kind in dict.fromkeys(change.kind for change in changes):
        own = [change for change in changes if change.kind == kind]
        lines.append(f"{len(own):,} of kind {kind}:")
        lines += [f"  {str(change).removeprefix(f'{kind}: ')}" for change in own[:_SHOWN]]
        lines += [f"  and {len(own) - _SHOWN:,} more"] if len(own) > _SHOWN else []
    return lines
