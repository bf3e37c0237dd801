"""The command line: ``a2fpn demo | predict | evaluate | check-data | list | info | train | data | hub``."""

from a2fpn.cli.app import app, main

__all__ = ["app", "main"]
