"""Checkpoints from anyone: each loads, or a CheckpointError says why; soon, and in little memory."""

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
from a2fpn.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, file_sha256, read_checkpoint, read_weights
from tests.helpers import tiny_model

FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
FAST, LONG = 40, 2000

numbers = st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, -1, 10**9, 10**12, 10**400]), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["hf-hub:a/b", "../x", "r50"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return a2fpn.save_pretrained(tiny_model("maskrcnn_fpn"), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def config(folder) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


@pytest.fixture(scope="module")
def weights(folder) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def places(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values in nested objects."""
    found = [path] if path else []
    return found + [p for key in (tree if isinstance(tree, dict) else ()) for p in places(tree[key], (*path, key))]


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


def fuzz_config(folder, config, cases: int) -> None:
    @settings(FUZZ, max_examples=cases)
    @given(st.sampled_from(places(config)), values, st.booleans())
    def check(path, value, extra):
        refused_or_loaded(folder, changed(config, (*path[:-1], path[-1] + "s" * extra), value))

    check()
    (folder / CONFIG_FILE).write_text(json.dumps(config))


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


def test_hostile_configs(folder, config):
    fuzz_config(folder, config, FAST)


def test_hostile_weights(folder, config, weights):
    fuzz_weights(folder, config, weights, FAST)


@pytest.mark.slow
def test_thousands_of_hostile_configs_and_weights(folder, config, weights):
    fuzz_config(folder, config, LONG)
    fuzz_weights(folder, config, weights, LONG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "heads", "box_channels"), 10**10),
        (("model", "heads", "mask_layers"), 10**9),
        (("model", "neck", "args"), {"out_channels": 10**10}),
        (("model", "num_classes"), 10**10),
        (("model", "backbone", "in_chans"), 10**9),
        (("model", "backbone", "name"), "hf-hub:mallory/evil"),
        (("model", "neck", "name"), "../../evil"),
        (("model", "detector"), "os.system"),
        (("model", "preprocess", "min_size"), math.inf),
        (("model", "preprocess", "mean"), [10**400] * 3),
        (("model", "heads", "code"), "import os"),
        (("format_version",), 2),
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
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            read_weights(tmp_path, read_checkpoint(tmp_path))


def test_a_folder_of_pickles_is_refused(folder, tmp_path):
    (tmp_path / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text())
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"but model.pth: a pickle .* never loaded.* `python -m hub convert`\."):
        a2fpn.from_pretrained(tmp_path)
