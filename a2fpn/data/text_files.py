"""Reading of text and JSON files in common encodings."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import orjson

from a2fpn.errors import DataError


class UnreadableTextError(DataError):
    """An existing file that is not text, or not JSON."""


_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        DataError: If it can't be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: the file can't be read ({error.strerror}).") from None


def has_byte_order_mark(path: Path) -> bool:
    """Return whether a file begins with a byte order mark, which RFC 8259 forbids in JSON."""
    return read_bytes(path).startswith((codecs.BOM_UTF8, *_UTF16))


def read_text(path: Path) -> str:
    """Read text in UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        DataError: If it can't be read.
        UnreadableTextError: If it is not such text.
    """
    content = read_bytes(path)
    encoding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UnreadableTextError(f"{path}, line {line}: not UTF-8 text (byte {content[error.start]:#x}).") from None


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DataError: If there is no such file.
        UnreadableTextError: If it is not JSON; the message names the line.
    """
    text = read_text(path)
    if not text.strip():
        raise UnreadableTextError(f"{path}: the file is empty.")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass  # the standard library accepts NaN, and has better error messages
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # raises for surrogates, which are no text
        return value
    except json.JSONDecodeError as error:
        raise UnreadableTextError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:
        raise UnreadableTextError(f"{path}: not valid JSON ({error}).") from None
