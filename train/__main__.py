"""Entry point of ``accelerate launch train/``, ``torchrun train/`` and ``python -m train``."""

import sys
from pathlib import Path

if not __package__:  # started as `python train/`: replace train/ by the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from a2fpn.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
