"""Reading parts of files, wherever they are: a folder, a web server, an object store."""

from __future__ import annotations

import logging
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from a2fpn.errors import DataError

logger = logging.getLogger(__name__)
_WAITS = (0.5, 2.0, 8.0)  # seconds before a network read is tried again
_TIMEOUT = 60.0  # seconds without a byte
_BUSY = (408, 425, 429)  # of the 4xx answers, those that are worth another try
_SKIPPED_AT_ONCE = 2**20  # bytes


def is_remote(location: str | Path) -> bool:
    """Return whether a location is a URL."""
    return "://" in str(location)


def read_bytes(location: str | Path, start: int = 0, end: int | None = None) -> bytes:
    """Read a file, or the part from byte ``start`` up to ``end``; what lies beyond the file is left out.

    Network reads that fail for a reason that may pass are tried again three times, within about ten seconds.

    Args:
        location: A path, an ``http(s)://`` URL, or any URL that fsspec knows, such as ``s3://`` and ``hf://``.
        start: First byte.
        end: Byte after the last one; None reads to the end.

    Raises:
        DataError: If the file is missing or can't be read; the message names it.

    Example:
        >>> read_bytes("missing.tar")
        Traceback (most recent call last):
        ...
        a2fpn.errors.DataError: missing.tar: no such file.
    """
    read = _read_http if str(location).startswith(("http://", "https://")) else _read_other
    waits = iter(_WAITS if is_remote(location) else ())
    while True:
        try:
            return read(str(location), start, end)
        except FileNotFoundError:
            raise DataError(f"{location}: no such file.") from None
        except ImportError as error:
            raise DataError(f"{location}: needs a further package, pip install it: {error}") from error
        except ValueError as error:
            raise DataError(f"{location}: can't be read ({error}).") from error
        except (OSError, HTTPException) as error:
            wait = next(waits, None)
            final = isinstance(error, HTTPError) and error.code < 500 and error.code not in _BUSY
            if wait is None or final:
                raise DataError(f"{location}: can't be read ({error or type(error).__name__}).") from error
            logger.warning("%s: can't be read (%s); trying again in %g s", location, error, wait)
            time.sleep(wait)


def _read_http(url: str, start: int, end: int | None) -> bytes:
    wanted = "" if end is None else str(end - 1)
    headers = {"Range": f"bytes={start}-{wanted}"} if start or end is not None else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as response:
            skip = 0 if response.status == 206 else start  # a server that knows no ranges sends the whole file
            while skip > 0 and (skipped := response.read(min(skip, _SKIPPED_AT_ONCE))):
                skip -= len(skipped)
            data: bytes = response.read(None if end is None else end - start)
            return data
    except HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(url) from error
        if error.code == 416:  # the file ends before the range begins
            return b""
        raise


def _read_other(location: str, start: int, end: int | None) -> bytes:
    if is_remote(location):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(location)
        data: bytes = filesystem.cat_file(path, start=start, end=end)
        return data
    with open(location, "rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)
