"""Partial reads of files by fsspec, from a folder, a web server or an object store."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from a2fpn.errors import DataError

logger = logging.getLogger(__name__)
_WAITS = (0.5, 2.0, 8.0)  # seconds before each retry of a network read
_BUSY = (408, 425, 429)  # the 4xx responses worth a retry


def is_remote(location: str | Path) -> bool:
    """Return whether a location is a URL."""
    return "://" in str(location)


def read_bytes(location: str | Path, start: int = 0, end: int | None = None) -> bytes:
    """Read a file, or its bytes from ``start`` to ``end``, clipped to its size.

    Network reads that fail for a transient reason are retried three times, within about ten seconds.

    Args:
        location: A path, or any URL that fsspec supports, such as ``https://``, ``s3://`` and ``hf://``.
        start: First byte.
        end: End, exclusive; None for the end of the file.

    Raises:
        DataError: If the file is missing or can't be read; the message names it.

    Example:
        >>> read_bytes("missing.tar")
        Traceback (most recent call last):
        ...
        a2fpn.errors.DataError: missing.tar: no such file.
    """
    import fsspec

    web = str(location).startswith(("http://", "https://"))
    options: dict[str, Any] = {"client_kwargs": {"trust_env": True}} if web else {}  # use proxies of the environment
    limits = {"start": start, "end": end} if start or end is not None else {}
    waits = iter(_WAITS if is_remote(location) else ())
    while True:
        try:
            filesystem, path = fsspec.core.url_to_fs(str(location), **options)
            data: bytes = filesystem.cat_file(path, **limits)
        except FileNotFoundError:
            raise DataError(f"{location}: no such file.") from None
        except Exception as error:  # each file system has its own errors
            wait = next(waits, None)
            status = getattr(error, "status", 500)
            passing = not isinstance(error, (ValueError, ImportError)) and (status >= 500 or status in _BUSY)
            if wait is None or not passing:
                raise DataError(f"{location}: can't be read ({error or type(error).__name__}).") from error
            logger.warning("%s: can't be read (%s); trying again in %g s", location, error, wait)
            time.sleep(wait)
        else:
            # A server without range requests sends the whole file.
            return data if end is None or len(data) <= end - start else data[start:end]
