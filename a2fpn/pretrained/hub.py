"""Download, verification and publication of checkpoints on the Hugging Face Hub; only JSON and safetensors are read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils.sha import git_hash

from a2fpn._version import __version__
from a2fpn.detectors import Detector
from a2fpn.errors import CheckpointError, ConfigError, HubIntegrityError, HubNotFoundError, HubOfflineError
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
from a2fpn.pretrained.hub_client import Client, Repo, client, explained_errors, location, offline_message
from a2fpn.pretrained.provenance import merged_metadata


class Downloaded(NamedTuple):
    """A verified checkpoint in the cache.

    Args:
        folder: The folder in the cache.
        checkpoint: Content of its ``config.json``.
    """

    folder: Path
    checkpoint: Checkpoint


def download_checkpoint(repo: Repo, *, weights: bool = True) -> Downloaded:
    """Download a checkpoint of one commit into the cache and verify it; each file is read once.

    ``config.json`` must have the hash recorded by the Hub, the weights the one stated in ``config.json``. A file with
    another hash is downloaded once more. With everything in the cache, a commit needs no request and a branch or tag
    needs one; offline none is made.

    Args:
        repo: The repository.
        weights: Whether to download the weights, or only ``config.json``.

    Raises:
        HubError: See its subclasses.
        CheckpointError: If the repository has no checkpoint of this package.
    """
    names = [CONFIG_FILE, WEIGHTS_FILE] if weights else [CONFIG_FILE]
    offline = repo.local_files_only or constants.is_offline_mode()
    with explained_errors(repo, names):
        api = client(repo.token)
        # From the cache if the Hub cannot be reached.
        commit = api.resolve_revision(
            repo.id, revision=repo.revision, token=repo.token, cache_dir=repo.cache_dir, local_files_only=offline
        ).resolved
        missing = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(repo.id, name, cache_dir=repo.cache_dir, revision=commit), str)
        ]
        if missing and offline:
            raise HubOfflineError(offline_message(repo, missing))
        if missing:
            _check_files(api, repo, commit, missing)
        folder = _download(repo, CONFIG_FILE, commit, offline=offline).parent
        checkpoint = read_checkpoint(folder)
        if weights:
            _download(repo, WEIGHTS_FILE, commit, offline=offline, expected=checkpoint.sha256)
    return Downloaded(folder, checkpoint)


def _check_files(api: Client, repo: Repo, commit: str, names: Sequence[str]) -> None:
    """Check once, without retries, that the files exist and have a plausible size."""
    # hf_hub_download would retry for 23 s if the server is down.
    info = api.repo_info(repo.id, revision=commit, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if WEIGHTS_FILE in names and WEIGHTS_FILE not in sizes:
        raise HubNotFoundError(missing_weights(location(repo), sizes))
    if CONFIG_FILE in names and CONFIG_FILE not in sizes:
        raise HubNotFoundError(f"{location(repo)} is not a checkpoint of a2fpn: it has no {CONFIG_FILE}.")
    if CONFIG_FILE in names and sizes[CONFIG_FILE] > CONFIG_LIMIT:
        raise CheckpointError(
            f"{location(repo)} has a {CONFIG_FILE} of {sizes[CONFIG_FILE]} bytes, too large for a configuration; it "
            "was not read."
        )


def _download(repo: Repo, name: str, commit: str, *, offline: bool, expected: str | None = None) -> Path:
    """Download a file and return its path in the cache; its hash must be as expected, or as recorded by the Hub."""
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
        # The symlink's target is named after the Hub's hash, a sha256 or a git-sha1; caches without symlinks have none.
        recorded = Path(os.readlink(path)).name if path.is_symlink() else None
        wanted = expected or recorded
        if wanted is None:
            return path
        found = file_sha256(path) if len(wanted) == 64 else git_hash(path.read_bytes())
        if found == wanted:
            return path
        if found == recorded:
            raise CheckpointError(wrong_weights(f"{name} of {location(repo)}", found, wanted))
        if offline:
            break
        if not path.is_symlink():
            path.unlink()  # an existing copy would not be replaced
    advice = "downloads are off; load it once with network access" if offline else "downloading it again did not help"
    raise HubIntegrityError(
        f"{name} of {location(repo)} is damaged: its hash is {found}, it should be {wanted}; {advice}."
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
        model: A detector, or a checkpoint folder, whose own ``README.md``, if any, becomes the card.
        repo_id: ``org/name``; created if it does not exist.
        private: Whether a new repository is private; None for the organization's default.
        create_pr: Whether to open a pull request instead of committing to the main branch.
        token: Access token with write permission; None for the one saved by ``hf auth login``.
        metadata: As in :func:`a2fpn.save_pretrained`, overriding the model's own; only with a detector, since a folder
            has its own.
        commit_message: Title of the commit.

    Returns:
        The commit; ``from_pretrained(repo_id, revision=commit)`` loads what was pushed.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
        CheckpointError: If the folder is not a valid checkpoint.
        ValueError: If metadata are given with a folder, or the folder's card is a symlink or has no valid header.
    """
    repo = Repo.parse(repo_id, token=token)
    if isinstance(model, (str, Path)) and metadata:
        raise ConfigError("A checkpoint folder has its own metadata; metadata= is only for a detector.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(model, (str, Path)):
            check_weights(model, read_checkpoint(model))
            if (Path(model) / CARD_FILE).is_symlink():
                raise ConfigError(
                    f"{CARD_FILE} of {str(model)!r} is a symlink, whose target would be published. Replace it with "
                    "the file itself."
                )
            for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                if (Path(model) / name).is_file():
                    shutil.copyfile(Path(model) / name, folder / name)
        else:
            save_checkpoint(folder, model.config, model.state_dict(), metadata=merged_metadata(model, metadata))
        if not (folder / CARD_FILE).is_file():
            (folder / CARD_FILE).write_text(model_card(read_checkpoint(folder), repo.id), encoding="utf-8")
        api = client(token)
        with explained_errors(repo):
            api.create_repo(repo.id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo.id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
            )
    return commit.oid


def push_space(
    files: Mapping[str, str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a page of a2fpn",
) -> str:
    """Publish the files of a Gradio Space, in one commit.

    Args:
        files: Text by name.
        repo_id: ``org/name`` of the Space; created if it does not exist.
        private: Whether a new Space is private; None for the organization's default.
        token: Access token with write permission; None for the one saved by ``hf auth login``.
        commit_message: Title of the commit.

    Returns:
        The URL of the Space.

    Raises:
        HubError: If the Hub refuses or cannot be reached.
    """
    repo, api = Repo.parse(repo_id, token=token), client(token)
    kind: dict[str, Any] = {"repo_type": "space"}
    with tempfile.TemporaryDirectory() as temporary, explained_errors(repo):
        for name, text in files.items():
            (Path(temporary) / name).write_text(text, encoding="utf-8")
        api.create_repo(repo.id, private=private, exist_ok=True, space_sdk="gradio", **kind)
        api.upload_folder(repo_id=repo.id, folder_path=temporary, commit_message=commit_message, **kind)
    return f"{constants.ENDPOINT}/spaces/{repo.id}"
