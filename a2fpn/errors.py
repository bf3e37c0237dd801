"""Errors about input: configurations, data, checkpoints, the Hub.

Commands print these, and the operating system's errors about files, as one line; everything else keeps its traceback.
Each also derives from the built-in exception that fits it.
"""

from __future__ import annotations

import errno
import os

_ABOUT_FILES = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOENT", "ENOSPC", "ENOTDIR"),
        *("ENOTEMPTY", "EPERM", "EROFS"),
    )
    if hasattr(errno, name)
}


class A2FPNError(Exception):
    """Base of the errors about input: configurations, data, checkpoints, the Hub."""


class ConfigError(A2FPNError, ValueError):
    """A setting, name or option that does not exist or is out of range."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting of the wrong type."""


class MissingFileError(A2FPNError, FileNotFoundError):
    """A named file that does not exist."""


class ExistingFileError(A2FPNError, FileExistsError):
    """A file that would be overwritten without permission."""


class DataError(A2FPNError, ValueError):
    """A COCO file that can't be used; the message names the file and the annotation."""


class ImageError(A2FPNError, ValueError):
    """An image that can't be used; the message names the file."""


class CheckpointError(A2FPNError, ValueError):
    """A checkpoint that is missing, damaged, or not what it claims to be."""


class ExportError(A2FPNError, ValueError):
    """A detector that can't be exported to a format; the message says why and what can be done."""


class RunError(A2FPNError, RuntimeError):
    """A training run that failed for a reason that the user can fix."""

    exit_code = 1


class HubError(A2FPNError, OSError):
    """A failed exchange with the Hub."""


class HubNotFoundError(HubError):
    """A repository, revision or file that does not exist or is private."""


class HubAccessError(HubError):
    """A token that is invalid or lacks permission, or a gated repository."""


class HubOfflineError(HubError):
    """Files that are not in the cache, offline or in offline mode."""


class HubServerError(HubError):
    """A server error, a lost connection, or a timeout."""


class HubCacheError(HubError):
    """A cache that cannot be written to, mostly because the disk is full."""


class HubIntegrityError(HubError):
    """A file that differs from the Hub's even after a second download."""


def message_for_users(error: BaseException) -> str | None:
    """Return the line that a command shows in place of a traceback; None if the error is not about input.

    With the environment variable ``A2FPN_DEBUG`` set to anything but 0, it is None for every error.

    Example:
        >>> message_for_users(ConfigError("Unknown neck 'fpm'."))
        "Unknown neck 'fpm'."
        >>> message_for_users(TypeError("'NoneType' object is not callable")) is None
        True
    """
    about_a_file = isinstance(error, OSError) and error.filename is not None and error.errno in _ABOUT_FILES
    if os.environ.get("A2FPN_DEBUG", "0") not in ("", "0") or not (isinstance(error, A2FPNError) or about_a_file):
        return None
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    r"""Escape the control characters of a text, such as a file's name.

    Example:
        >>> print(printable("a\x1b[31m.png"))
        a\x1b[31m.png
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
