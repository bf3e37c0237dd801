"""Entry point of ``accelerate launch -m a2fpn.training`` and ``torchrun -m a2fpn.training``."""

import sys

from a2fpn.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
