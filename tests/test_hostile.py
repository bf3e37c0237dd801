"""Checkpoints from anyone: strict keys, types and bounds, no code, and only tensors that belong there."""

import contextlib
import copy
import json
import math
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import a2fpn
from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import CONFIG_FILE, WEIGHTS_FILE, file_sha256, read_checkpoint, read_weights
from tests.helpers import tiny_model

FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
FAST, LONG = 40, 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a2fpn.save_pretrained(tiny_model("maskrcnn_fpn"), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def config(folder) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


@pytest.fixture(scope="module")
def weights(folder) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    owner = config
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return config


def refused_or_loaded(folder, config: Any) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        a2fpn.from_pretrained(folder)


def fuzz_weights(folder, config, weights, cases: int) -> None:
    """Random bytes in and after the header; the config names the damaged file, as an attacker's would."""
    header = struct.unpack("<Q", weights[:8])[0]

    @settings(FUZZ, max_examples=cases)
    @given(st.integers(0, header + 8), st.binary(min_size=1, max_size=12), st.integers(0, len(weights)))
    def check(at, junk, length):
        path = folder / WEIGHTS_FILE
        path.write_bytes((weights[:at] + junk + weights[at + len(junk) :])[: max(length, header // 2)])
        checkpoint = changed(config, ("sha256",), file_sha256(path))
        refused_or_loaded(folder, checkpoint)

    check()
    (folder / WEIGHTS_FILE).write_bytes(weights)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_hostile_weights(folder, config, weights):
    fuzz_weights(folder, config, weights, FAST)


@pytest.mark.slow
def test_thousands_of_hostile_weights(folder, config, weights):
    fuzz_weights(folder, config, weights, LONG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "heads", "mask_layers"), 10**9),
        (("model", "backbone", "name"), "hf-hub:mallory/evil"),
        (("model", "backbone", "name"), "local-dir:/tmp/evil"),
        (("model", "backbone", "taps"), ["__class__", "../x"]),
        (("metadata",), {"metrics": {"bbox/ap": 10**400}}),
        (("metadata",), {"metrics": "__import__('os')"}),
        (("model", "neck", "name"), "../../evil"),
        (("model", "detector"), "os.system"),
        (("model", "preprocess", "min_size"), math.inf),
        (("model", "preprocess", "mean"), [10**400] * 3),
        (("model", "heads", "code"), "import os"),
        (("format_version",), 3),
        (("sha256",), "../../etc/passwd"),
    ],
)
def test_known_attacks(folder, config, path, value):
    (folder / CONFIG_FILE).write_text(json.dumps(changed(config, path, value)))
    try:
        with pytest.raises(CheckpointError):
            a2fpn.from_pretrained(folder)
    finally:
        (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_links_in_a_folder(folder, config, tmp_path):
    """A link is followed as the system does, and what it leads to must be the file that belongs there."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (linked / name).symlink_to(folder / name)
    assert a2fpn.from_pretrained(linked).config.num_classes == 3
    (tmp_path / "secret").write_text("password: hunter2")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        kept = (linked / name).readlink()
        (linked / name).unlink()
        (linked / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError) as raised:
            a2fpn.from_pretrained(linked)
        assert "hunter2" not in str(raised.value)
        (linked / name).unlink()
        (linked / name).symlink_to(linked / name)
        with pytest.raises(CheckpointError, match=r"has no (config\.json|model\.safetensors)"):
            a2fpn.from_pretrained(linked)
        (linked / name).unlink()
        (linked / name).symlink_to(kept)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"format_version": 1' + "0" * 5000 + "}", "\x00", '"a"', " " * (2**24 + 1)]
)
def test_what_is_no_config(tmp_path, text):
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


def test_a_pickle_named_safetensors_and_a_tensor_of_10_gb(folder, config, tmp_path):
    huge = json.dumps({"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10**10]}}).encode()
    for data in (b"\x80\x04\x95cos\nsystem\n.", struct.pack("<Q", len(huge)) + huge, struct.pack("<Q", 2**60)):
        (tmp_path / WEIGHTS_FILE).write_bytes(data)
        digest = file_sha256(tmp_path / WEIGHTS_FILE)
        (tmp_path / CONFIG_FILE).write_text(json.dumps(changed(config, ("sha256",), digest)))
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            read_weights(tmp_path, read_checkpoint(tmp_path))


def test_a_folder_of_pickles_is_refused(folder, tmp_path):
    (tmp_path / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text())
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"but model.pth: pickles .* never loaded.* `a2fpn hub convert`\."):
        a2fpn.from_pretrained(tmp_path)
