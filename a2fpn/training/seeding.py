"""Random numbers as a pure function of where a run is, so that nothing random has to be stored to resume it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed for torch that depends on every part, 63 bits.

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
    """Run a block with torch's CPU generator seeded by the parts; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield


def use_deterministic_algorithms() -> None:
    """Let every operation of this process take the form whose result is the same each time, where it has one."""
    # Read when cuBLAS starts, which it has not done yet.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
