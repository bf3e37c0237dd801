"""Random numbers as a pure function of the position in a run, so that resuming needs no stored random state."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed for torch from all parts.

    Example:
        >>> derived_seed("augment", 0, 1) == derived_seed("augment", 0, 1)
        True
        >>> derived_seed("augment", 0, 1) == derived_seed("augment", 1, 0)
        False
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed torch's CPU generator by the parts for a block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield


def use_deterministic_algorithms() -> None:
    """Use deterministic algorithms in this process wherever they exist."""
    # Read at the start of cuBLAS, which is still to come.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
