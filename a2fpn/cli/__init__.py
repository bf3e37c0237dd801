"""The command line: ``a2fpn demo | predict | evaluate | count | calibrate | check-data | list | info | ...``."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    try:
        from a2fpn.cli.app import app
        from a2fpn.cli.door import prepare_streams

        prepare_streams()
        app(args=argv, prog_name="a2fpn")
    except KeyboardInterrupt:  # Ctrl-C before a command begins: the imports take half a second
        sys.exit(130)
