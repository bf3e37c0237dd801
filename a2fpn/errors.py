"""Errors about input: configurations, data, checkpoints, the Hub.

Commands turn these into one line, and what the operating system says of a file; everything else keeps its traceback.
Each has the built-in class that fits it as a second base.
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
    """A file that was named and does not exist."""


class ExistingFileError(A2FPNError, FileExistsError):
    """A file that would be replaced without being asked for."""


class DataError(A2FPNError, ValueError):
    """A COCO file can't be used; the message names the file and the annotation."""


class ImageError(A2FPNError, ValueError):
    """An image can't be used; the message names the file."""


class CheckpointError(A2FPNError, ValueError):
    """A checkpoint that is missing, damaged, or not what it says it is."""


class ExportError(A2FPNError, ValueError):
    """A detector that can't be written in a format; the message says why and what can be done."""


class RunError(A2FPNError, RuntimeError):
    """A training run that failed on the way for a reason that its owner can mend."""

    exit_code = 1


class HubError(A2FPNError, OSError):
    """Something that went wrong between here and the Hub."""


class HubNotFoundError(HubError):
    """A repository, revision or file that does not exist, or that this user may not know of."""


class HubAccessError(HubError):
    """A token that is wrong or not enough, or a gated repository."""


class HubOfflineError(HubError):
    """Files that are not in the cache while there is no network, or none is wanted."""


class HubServerError(HubError):
    """A server that failed, or a connection that broke or was too slow."""


class HubCacheError(HubError):
    """A cache that cannot be written to, because the disk is full above all."""


class HubIntegrityError(HubError):
    """A file that is still not the Hub's after it was downloaded again."""


def message_for_users(error: BaseException) -> str | None:
    """The line that a command shows in place of a traceback; None for what is no error about input.

    With the environment variable ``A2FPN_DEBUG`` set to anything but 0, nothing is.

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
    r"""Return text in which control characters, such as those of a file's name, are written out.

    Example:
        >>> print(printable("a\x1b[31m.png"))
        a\x1b[31m.png
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
