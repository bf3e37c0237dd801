"""Entry point of ``python -m hub``."""

from a2fpn.cli.hub import main

if __name__ == "__main__":
    main()
