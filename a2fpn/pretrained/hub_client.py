"""Client of the Hugging Face Hub, with timeouts.

Its errors become a :class:`HubError` in one sentence: the file, its repository, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants, errors

from a2fpn._version import __version__
from a2fpn.errors import (
    CheckpointError,
    ConfigError,
    HubAccessError,
    HubCacheError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)
from a2fpn.pretrained.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Repo:
    """A model repository on the Hub, and its access options.

    Args:
        id: ``org/name``.
        revision: Branch, tag, pull request (``refs/pr/1``) or commit; None is the main branch.
        token: Access token; None for the one saved by ``hf auth login``, False sends none.
        cache_dir: Folder of the cache; None for huggingface_hub's.
        local_files_only: Whether to use the cache only, without network requests.

    Example:
        >>> Repo.parse("acme/cells@v1.0")
        Repo(id='acme/cells', revision='v1.0', token=None, cache_dir=None, local_files_only=False)
    """

    id: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @classmethod
    def parse(cls, name: str, *, revision: str | None = None, **options: Any) -> Repo:
        """Parse ``org/name`` or ``org/name@revision``; options are the other fields.

        Raises:
            ValueError: If the name is malformed, or two revisions are given.
        """
        repo_id, _, tagged = name.partition("@")
        if not is_repo_id(repo_id):
            raise ConfigError(f"{name!r} is not a Hub repository; expected 'org/name' or 'org/name@revision'.")
        if tagged and revision and tagged != revision:
            raise ConfigError(f"{name!r} names a revision and so does revision={revision!r}; give one of them.")
        return cls(repo_id, tagged or revision, **options)


def is_repo_id(name: str) -> bool:
    """Return whether a text has the form ``org/name``.

    Example:
        >>> is_repo_id("acme/cells"), is_repo_id("../cells"), is_repo_id("runs/a/b")
        (True, False, False)
    """
    part = r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(?<![.-])"
    return re.fullmatch(f"{part}/{part}", name) is not None


CONNECT_SECONDS = 1.5
"""Connection timeout in seconds, which allows for one lost packet, resent after a second."""


class Client(HfApi):
    """``HfApi`` with timeouts for repository queries; after a first connection failure it does not try again."""

    _failed: Exception | None = None

    def repo_info(self, *args: Any, **options: Any) -> Any:
        """Query a repository; after a connection failure, raise the same error immediately."""
        if self._failed is not None:
            raise self._failed
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        patience = (CONNECT_SECONDS, seconds, seconds, seconds)  # connect, read, write, pool, as in httpx
        try:
            return super().repo_info(*args, **options, timeout=cast(float, patience))
        except Exception as error:
            if _is_a(error, *_TRANSPORT):
                self._failed = error
            raise


# Exception classes of the client's HTTP library, by name since the library has changed before.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled")
_TRANSPORT = ("TransportError", "RequestException", *_UNREACHABLE)


def _is_a(error: BaseException | None, *names: str) -> bool:
    """Return whether an exception's class or a base class has one of the names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def client(token: str | bool | None) -> Client:
    """Create a client that identifies this package to the server."""
    return Client(token=token, library_name="a2fpn", library_version=__version__)


def location(repo: Repo) -> str:
    """Name of a repository for messages."""
    revision = f" at revision {repo.revision!r}" if repo.revision else ""
    return f"{repo.id!r}{revision} of {constants.ENDPOINT}"


def _cache(repo: Repo) -> str:
    return str(repo.cache_dir or constants.HF_HUB_CACHE)


def offline_message(repo: Repo, missing: Sequence[str], cause: BaseException | None = None) -> str:
    """Message for files that are not in the cache and can't be downloaded."""
    reason = (
        "local_files_only=True"
        if repo.local_files_only
        else "offline mode is on (HF_HUB_OFFLINE)"
        if constants.is_offline_mode()
        else f"the Hub cannot be reached ({_detail(cause)})"
    )
    command = ["hf", "download", repo.id, CONFIG_FILE, WEIGHTS_FILE]
    command += ["--revision", repo.revision] if repo.revision else []
    command += ["--cache-dir", str(repo.cache_dir)] if repo.cache_dir else []
    return (
        f"{' and '.join(missing)} of {location(repo)} {'are' if len(missing) > 1 else 'is'} not in the cache "
        f"{_cache(repo)}, and {reason}. With network access, run: {shlex.join(command)}"
    )


def _detail(error: BaseException | None) -> str:
    """Format an exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


@contextlib.contextmanager
def explained_errors(repo: Repo, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and hf_xet raise into a :class:`HubError`.

    Args:
        repo: The repository.
        files: Files to download; empty for publishing.
    """
    try:
        yield
    except (HubError, CheckpointError):
        raise
    # hf_xet raises built-in errors such as RuntimeError; a ValueError with a cause is a failed forced download.
    except Exception as error:
        known = isinstance(error, (errors.RevisionResolutionError, OSError, RuntimeError)) or _is_a(error, *_TRANSPORT)
        if not known and not (isinstance(error, ValueError) and error.__cause__ is not None):
            raise
        raise _translated(error, repo, files) from error


def _translated(error: Exception, repo: Repo, files: Sequence[str]) -> HubError:
    # These only add that the file is not in the cache either.
    wrappers = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ValueError)
    cause = error.__cause__ if isinstance(error, wrappers) else error
    where = location(repo)
    log_in = "run `hf auth login`, set HF_TOKEN, or give token="
    if isinstance(cause, errors.GatedRepoError):
        return HubAccessError(f"{where} is gated: ask for access at {constants.ENDPOINT}/{repo.id}, then {log_in}.")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return HubNotFoundError(f"{where} does not exist, or is private and this token has no access: {log_in}.")
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubNotFoundError(f"{repo.id!r} of {constants.ENDPOINT} has no revision {repo.revision!r}.")
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return HubAccessError(
                f"{where} is not accessible with this token (the server answered {status}): {log_in}."
            )
        return HubServerError(f"{where}: the server answered {status} ({_detail(cause)}).")
    if isinstance(cause, OSError) and cause.errno in _CACHE_ERRORS:
        return HubCacheError(
            f"The cache {_cache(repo)} cannot be written ({cause.strerror}): give another cache_dir=, or set HF_HOME."
        )
    if cause is None or _is_a(cause, *_UNREACHABLE):
        if files:
            return HubOfflineError(offline_message(repo, files, cause))
        return HubOfflineError(f"Nothing was published to {where}: it cannot be reached ({_detail(cause)}).")
    return HubServerError(f"{where}: the connection failed ({_detail(cause)}); no partial files were kept.")


_CACHE_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "ENOENT", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
    if hasattr(errno, name)
}
