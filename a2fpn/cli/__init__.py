"""The command line: ``a2fpn demo | predict | evaluate | count | calibrate | check-data | list | info | ...``."""

from a2fpn.cli.app import app, main

__all__ = ["app", "main"]
