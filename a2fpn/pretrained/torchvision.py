"""Download of torchvision's published weights into torch.hub's cache."""

from __future__ import annotations

import contextlib
import http.client
import logging
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple
from urllib.request import urlopen

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from a2fpn._atomic import replaced_file
from a2fpn.errors import (
    CheckpointError,
    HubAccessError,
    HubCacheError,
    HubError,
    HubIntegrityError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)
from a2fpn.pretrained.catalog import TorchvisionWeights
from a2fpn.pretrained.checkpoint import file_sha256

_logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Timeout of the server in seconds."""


class Download(NamedTuple):
    """A file to be downloaded.

    Args:
        what: The weights, for messages.
        url: Source URL.
        file: Destination file.
    """

    what: str
    url: str
    file: Path


def read_torchvision(weights: TorchvisionWeights, *, local_files_only: bool = False) -> dict[str, Tensor]:
    """Load the state dict of a torchvision detector from torch.hub's cache, downloading it if necessary.

    The file must have the hash at the end of its name, also in the cache; a file with another hash is downloaded once
    more. Only tensors are unpickled.

    Args:
        weights: The weights.
        local_files_only: Whether to use the cache only, without network requests; implied by ``HF_HUB_OFFLINE=1``.

    Returns:
        The tensors, by torchvision's names.

    Raises:
        HubError: If it could not be downloaded; subclasses give the reason.
        CheckpointError: If the file holds anything but tensors.
    """
    from huggingface_hub.constants import is_offline_mode

    wanted = Download(f"{weights.builder}, {weights.tag}", weights.published.url, weights.file)
    digest = wanted.file.stem.rpartition("-")[2]
    if not (wanted.file.is_file() and file_sha256(wanted.file).startswith(digest)):
        if local_files_only or is_offline_mode():
            reason = "local_files_only=True" if local_files_only else "offline mode is on (HF_HUB_OFFLINE)"
            raise HubOfflineError(_cannot(wanted, reason))
        with _explained(wanted):
            wanted.file.parent.mkdir(parents=True, exist_ok=True)
            _download(wanted, digest)
    try:
        # The file exists, so this only reads it; a download would print to standard output.
        state = torch.hub.load_state_dict_from_url(wanted.url, map_location="cpu", check_hash=True, weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{str(wanted.file)!r} holds more than tensors, or is damaged, and is not loaded: {reason}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{str(wanted.file)!r} holds no state dict but a {type(state).__name__}.")
    return dict(state)


def _download(wanted: Download, digest: str) -> None:
    """Download a file whose sha256 begins with ``digest``; torch.hub's function has no time limit.

    Raises:
        HubIntegrityError: If the downloaded file has another hash; it is not kept.
        OSError: As raised by ``urlopen``.
    """
    _logger.info("Downloading %s from %s", wanted.what, wanted.url)
    with urlopen(wanted.url, timeout=PATIENCE) as answer, replaced_file(wanted.file) as partial:
        length = answer.length  # None if the server does not send it
        with (
            partial.open("wb") as file,
            tqdm(  # type: ignore[no-untyped-call]
                total=length, unit="B", unit_scale=True, desc=wanted.file.name
            ) as bar,
        ):
            while part := answer.read(2**20):
                file.write(part)
                bar.update(len(part))
        if length is not None and partial.stat().st_size != length:
            raise ConnectionError(f"{partial.stat().st_size} of {length} bytes received")
        found = file_sha256(partial)
        if not found.startswith(digest):
            raise HubIntegrityError(
                _cannot(wanted, f"the downloaded file has another hash (sha256 {found}, expected {digest}...)")
            )


def _cannot(wanted: Download, reason: str) -> str:
    lacking = "damaged" if wanted.file.is_file() else "not"
    return (
        f"The weights of torchvision's {wanted.what} are {lacking} in torch.hub's cache, and could not be downloaded "
        f"from {wanted.url}: {reason}. Download this file elsewhere and put it at {wanted.file}"
    )


@contextlib.contextmanager
def _explained(wanted: Download) -> Iterator[None]:
    """Convert download errors to a :class:`HubError`."""
    try:
        yield
    except HubError:
        raise
    except urllib.error.HTTPError as error:
        kind = {401: HubAccessError, 403: HubAccessError, 404: HubNotFoundError, 410: HubNotFoundError}
        raise kind.get(error.code, HubServerError)(
            _cannot(wanted, f"the server answered {error.code} {error.reason}")
        ) from error
    except urllib.error.URLError as error:
        raise HubOfflineError(_cannot(wanted, f"it cannot be reached ({error.reason})")) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise HubServerError(_cannot(wanted, f"the connection failed ({type(error).__name__})")) from error
    except OSError as error:
        raise HubCacheError(_cannot(wanted, error.strerror or str(error))) from error
