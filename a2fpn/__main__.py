"""``python -m a2fpn``: the command line."""

from a2fpn.cli import main

main()
