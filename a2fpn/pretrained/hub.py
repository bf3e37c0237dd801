"""The Hugging Face Hub, client side: download, verify, publish. Only ``config.json`` and safetensors travel.

What goes wrong is told as a :class:`HubError` in one sentence: what was wanted, from where, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils.sha import git_hash

from a2fpn._version import __version__
from a2fpn.detectors import Detector
from a2fpn.errors import (
    CheckpointError,
    ConfigError,
    HubAccessError,
    HubCacheError,
    HubError,
    HubIntegrityError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)
from a2fpn.pretrained.card import CARD_FILE, model_card
from a2fpn.pretrained.checkpoint import (
    CONFIG_FILE,
    CONFIG_LIMIT,
    WEIGHTS_FILE,
    Checkpoint,
    check_weights,
    file_sha256,
    missing_weights,
    read_checkpoint,
    save_checkpoint,
    wrong_weights,
)
from a2fpn.pretrained.provenance import merged_metadata


@dataclass(frozen=True)
class Repo:
    """A model repository on the Hub, and how to reach it.

    Args:
        id: ``org/name``.
        revision: Branch, tag, pull request (``refs/pr/1``) or commit; None is the main branch.
        token: Access token; None takes the one saved by ``hf auth login``, False sends none.
        cache_dir: Folder of the cache; None takes huggingface_hub's.
        local_files_only: Whether to take everything from the cache and ask nobody.

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
        """Read ``org/name`` or ``org/name@revision``; options are the other fields.

        Raises:
            ValueError: If it is no such name, or two revisions are given.
        """
        repo_id, _, tagged = name.partition("@")
        if not is_repo_id(repo_id):
            raise ConfigError(f"{name!r} is no repository of the Hub; expected 'org/name' or 'org/name@revision'.")
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


class Downloaded(NamedTuple):
    """A checkpoint in the cache, read and checked.

    Args:
        folder: The folder in the cache.
        checkpoint: What its ``config.json`` says.
    """

    folder: Path
    checkpoint: Checkpoint


def download_checkpoint(repo: Repo, *, weights: bool = True) -> Downloaded:
    """Bring a checkpoint into the cache, all of it from one commit, and check it: each file is read once.

    ``config.json`` must have the hash that the Hub recorded, the weights the one that ``config.json`` names. A file
    that has not is downloaded once more. With everything in the cache, a commit needs no request and a branch or tag
    one; offline none is made.

    Args:
        repo: What to download.
        weights: Whether to download the weights, or ``config.json`` alone.

    Raises:
        HubError: See its children.
        CheckpointError: If the repository holds no checkpoint of this package.
    """
    names = [CONFIG_FILE, WEIGHTS_FILE] if weights else [CONFIG_FILE]
    offline = repo.local_files_only or constants.is_offline_mode()
    with _explained(repo, names):
        api = _api(repo.token)
        # The cache's where the Hub cannot be reached.
        commit = api.resolve_revision(
            repo.id, revision=repo.revision, token=repo.token, cache_dir=repo.cache_dir, local_files_only=offline
        ).resolved
        missing = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(repo.id, name, cache_dir=repo.cache_dir, revision=commit), str)
        ]
        if missing and offline:
            raise HubOfflineError(_offline(repo, missing))
        if missing:
            _check_files(api, repo, commit, missing)
        folder = _download(repo, CONFIG_FILE, commit, offline=offline).parent
        checkpoint = read_checkpoint(folder)
        if weights:
            _download(repo, WEIGHTS_FILE, commit, offline=offline, expected=checkpoint.sha256)
    return Downloaded(folder, checkpoint)


def _check_files(api: _Api, repo: Repo, commit: str, names: Sequence[str]) -> None:
    """Ask once, without retries, whether the files are there and can be what they are called."""
    # Not hf_hub_download's own look: on a server that is down it retries for 23 s.
    info = api.repo_info(repo.id, revision=commit, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if WEIGHTS_FILE in names and WEIGHTS_FILE not in sizes:
        raise HubNotFoundError(missing_weights(_where(repo), sizes))
    if CONFIG_FILE in names and CONFIG_FILE not in sizes:
        raise HubNotFoundError(f"{_where(repo)} is no checkpoint of a2fpn: it has no {CONFIG_FILE}.")
    if CONFIG_FILE in names and sizes[CONFIG_FILE] > CONFIG_LIMIT:
        raise CheckpointError(f"{_where(repo)} has a {CONFIG_FILE} of {sizes[CONFIG_FILE]} bytes; refused unread.")


def _download(repo: Repo, name: str, commit: str, *, offline: bool, expected: str | None = None) -> Path:
    """Path of a file in the cache whose content has the expected hash, or else the one that the Hub recorded."""
    for again in (False, True):
        path = Path(
            hf_hub_download(
                repo.id,
                name,
                revision=commit,
                token=repo.token,
                cache_dir=repo.cache_dir,
                local_files_only=offline,
                force_download=again,
                library_name="a2fpn",
                library_version=__version__,
            )
        )
        # The link carries the hash that the Hub gave, a sha256 or a git-sha1; caches without links carry none.
        recorded = Path(os.readlink(path)).name if path.is_symlink() else None
        wanted = expected or recorded
        if wanted is None:
            return path
        found = file_sha256(path) if len(wanted) == 64 else git_hash(path.read_bytes())
        if found == wanted:
            return path
        if found == recorded:
            raise CheckpointError(wrong_weights(f"{name} of {_where(repo)}", found, wanted))
        if offline:
            break
        if not path.is_symlink():
            path.unlink()  # a copy that exists would be left as it is
    advice = (
        "nothing can be downloaded now; load it once with a network" if offline else "downloading it again did not help"
    )
    raise HubIntegrityError(
        f"{name} of {_where(repo)} is damaged: its hash is {found}, it should be {wanted}; {advice}."
    )


def push_to_hub(
    model: Detector | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    metadata: Mapping[str, Any] | None = None,
    commit_message: str = "Upload a detector of a2fpn",
) -> str:
    """Publish a detector as ``config.json``, ``model.safetensors`` and a card, in one commit.

    Args:
        model: A detector, or a checkpoint folder, whose own ``README.md`` then is the card if it has one.
        repo_id: ``org/name``; made if it does not exist.
        private: Whether a new repository is private; None takes the organization's default.
        create_pr: Whether to open a pull request in place of a commit to the main branch.
        token: Access token with write permission; None takes the one saved by ``hf auth login``.
        metadata: As in :func:`a2fpn.save_pretrained`, over what is known of the model; only with a detector, a folder
            has its own.
        commit_message: Title of the commit.

    Returns:
        The commit; ``from_pretrained(repo_id, revision=commit)`` loads what was pushed.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
        CheckpointError: If the folder holds no sound checkpoint.
        ValueError: If metadata are given with a folder, or the folder's card is a link or has no valid header.
    """
    repo = Repo.parse(repo_id, token=token)
    if isinstance(model, (str, Path)) and metadata:
        raise ConfigError("A checkpoint folder has its own metadata; metadata= goes with a detector.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(model, (str, Path)):
            check_weights(model, read_checkpoint(model))
            if (Path(model) / CARD_FILE).is_symlink():
                raise ConfigError(
                    f"{CARD_FILE} of {str(model)!r} is a link; what it leads to would be published. Put the file "
                    "itself there."
                )
            for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                if (Path(model) / name).is_file():
                    shutil.copyfile(Path(model) / name, folder / name)
        else:
            save_checkpoint(folder, model.config, model.state_dict(), metadata=merged_metadata(model, metadata))
        if not (folder / CARD_FILE).is_file():
            (folder / CARD_FILE).write_text(model_card(read_checkpoint(folder), repo.id), encoding="utf-8")
        api = _api(token)
        with _explained(repo):
            api.create_repo(repo.id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
            )
    return commit.oid


CONNECT_SECONDS = 1.5
"""Seconds that a connection may take to be made: one lost packet is sent again after a second."""


class _Api(HfApi):
    """The client, with time limits on its look at a repository; a first failure to connect is not tried again."""

    _failed: Exception | None = None

    def repo_info(self, *args: Any, **options: Any) -> Any:
        if self._failed is not None:
            raise self._failed
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        patience = (CONNECT_SECONDS, seconds, seconds, seconds)  # connect, read, write, pool, as httpx takes them
        try:
            return super().repo_info(*args, **options, timeout=cast(float, patience))
        except Exception as error:
            if _is_a(error, *_TRANSPORT):
                self._failed = error
            raise


# Classes of the client's HTTP library, by name: which library that is has changed before.
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "OfflineModeIsEnabled")
_TRANSPORT = ("TransportError", "RequestException", *_UNREACHABLE)


def _is_a(error: BaseException | None, *names: str) -> bool:
    """Return whether an exception's class, or one that it inherits from, has one of the names."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _api(token: str | bool | None) -> _Api:
    return _Api(token=token, library_name="a2fpn", library_version=__version__)


def _where(repo: Repo) -> str:
    """A repository as messages name it."""
    revision = f" at revision {repo.revision!r}" if repo.revision else ""
    return f"{repo.id!r}{revision} of {constants.ENDPOINT}"


def _cache(repo: Repo) -> str:
    return str(repo.cache_dir or constants.HF_HUB_CACHE)


def _offline(repo: Repo, missing: Sequence[str], cause: BaseException | None = None) -> str:
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
        f"{' and '.join(missing)} of {_where(repo)} {'are' if len(missing) > 1 else 'is'} not in the cache "
        f"{_cache(repo)}, and {reason}. Where there is a network, run: {shlex.join(command)}"
    )


def _detail(error: BaseException | None) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


@contextlib.contextmanager
def _explained(repo: Repo, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and hf_xet raise into a :class:`HubError`.

    Args:
        repo: What is talked about.
        files: What is to be downloaded; nothing when something is published.
    """
    try:
        yield
    except (HubError, CheckpointError):
        raise
    # hf_xet raises built-in errors, RuntimeError among them; a ValueError with a cause is a download forced in vain.
    except Exception as error:
        known = isinstance(error, (errors.RevisionResolutionError, OSError, RuntimeError)) or _is_a(error, *_TRANSPORT)
        if not known and not (isinstance(error, ValueError) and error.__cause__ is not None):
            raise
        raise _translated(error, repo, files) from error


def _translated(error: Exception, repo: Repo, files: Sequence[str]) -> HubError:
    # These only say that nothing was in the cache either.
    wrappers = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ValueError)
    cause = error.__cause__ if isinstance(error, wrappers) else error
    where = _where(repo)
    log_in = "give token= or run `hf auth login`"
    if isinstance(cause, errors.GatedRepoError):
        return HubAccessError(f"{where} is gated: ask for access at {constants.ENDPOINT}/{repo.id}, then {log_in}.")
    if isinstance(cause, errors.RepositoryNotFoundError):
        return HubNotFoundError(f"{where} does not exist, or is private and not for this token: {log_in}.")
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubNotFoundError(f"{repo.id!r} of {constants.ENDPOINT} has no revision {repo.revision!r}.")
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return HubAccessError(f"{where} is not for this token (the server answered {status}): {log_in}.")
        return HubServerError(f"{where}: the server answered {status} ({_detail(cause)}).")
    if isinstance(cause, OSError) and cause.errno in _CACHE_ERRORS:
        return HubCacheError(
            f"The cache {_cache(repo)} cannot be written ({cause.strerror}): give another cache_dir=, or set HF_HOME."
        )
    if cause is None or _is_a(cause, *_UNREACHABLE):
        if files:
            return HubOfflineError(_offline(repo, files, cause))
        return HubOfflineError(f"Nothing was published to {where}: it cannot be reached ({_detail(cause)}).")
    return HubServerError(f"{where}: the connection failed ({_detail(cause)}); nothing half-done was kept.")


_CACHE_ERRORS = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "ENOENT", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
    if hasattr(errno, name)
}
