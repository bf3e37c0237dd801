"""Random numbers as a pure function of where a run is, so that nothing random has to be stored to resume it."""

from __future__ import annotations

import hashlib
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
    """Runs a block with torch's CPU generator seeded by the parts; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*parts))
        yield
