"""Checkpoints from anyone: each loads, or a CheckpointError says why; soon, and in little memory."""

import contextlib
import copy
import json
import math
import re
import shutil
import struct
import subprocess
import sys
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
        (("model", "backbone", "name"), "local-dir:/tmp/evil"),
        (("model", "backbone", "taps"), ["__class__", "../x"]),
        (("metadata",), {"metrics": {"bbox/ap": 10**400}}),
        (("metadata",), {"metrics": "__import__('os')"}),
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


def test_a_config_alone_asks_for_no_memory(folder, config):
    """Without weights nothing shows that a huge model exists; with them, its tensors must be there."""
    wide = changed(config, ("model", "neck", "args"), {"out_channels": 2**14})
    wide = changed(wide, ("model", "heads", "box_channels"), 2**14)
    (folder / CONFIG_FILE).write_text(json.dumps(wide))
    try:
        with pytest.raises(CheckpointError, match=r"more than 536,870,912 numbers, and nothing shows that there are"):
            a2fpn.create_model(f"local-dir:{folder}")
        with pytest.raises(CheckpointError, match=r"The weights do not fit the model"):
            a2fpn.create_model(f"local-dir:{folder}", pretrained=True)
    finally:
        (folder / CONFIG_FILE).write_text(json.dumps(config))


HOSTILE = """
import json, pathlib, resource, struct, sys
import a2fpn
from a2fpn.errors import CheckpointError
from a2fpn.pretrained.checkpoint import file_sha256
folder = pathlib.Path(sys.argv[1])
config, weights = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()
a2fpn.from_pretrained(folder)  # what is imported late is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, used + 400 * 2**20))


def refused(config_text, data=weights, load=True):
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(config_text)
    try:
        a2fpn.create_model(f"local-dir:{folder}", pretrained=load)
    except CheckpointError as error:
        assert len(str(error)) < 5000
        print(error)
    else:
        sys.exit("it was loaded")


def edited(data=weights, **heads):
    new = json.loads(json.dumps(config))
    new["model"]["heads"].update(heads)
    (folder / "model.safetensors").write_bytes(data)
    new["sha256"] = file_sha256(folder / "model.safetensors")
    return json.dumps(new)


for load in (True, False):
    refused(edited(box_channels=10**6), load=load)
    refused(edited(mask_channels=10**5), load=load)
refused("[" * 10**5 + "]" * 10**5)
refused("[" + "[]," * 10**6 + "[]]")
refused(" " * (2**22 + 1))
for end in (10**10, 2**63 - 1):
    header = json.dumps({"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, end]}}).encode()
    data = struct.pack("<Q", len(header)) + header
    refused(edited(data), data)
data = struct.pack("<Q", 2**40) + b"{}"
refused(edited(data), data)
header = b'{"x' + b'y' * 10**7 + b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
data = struct.pack("<Q", len(header)) + header
refused(edited(data), data)
print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MB more")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(folder, tmp_path):
    """With 400 MB left, none of these runs out of memory."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(copied)], capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(re.search(r"peak (\d+) MB more", run.stdout)[1]) < 250


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
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            read_weights(tmp_path, read_checkpoint(tmp_path))


def test_a_folder_of_pickles_is_refused(folder, tmp_path):
    (tmp_path / CONFIG_FILE).write_text((folder / CONFIG_FILE).read_text())
    (tmp_path / "model.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"but model.pth: a pickle .* never loaded.* `python -m hub convert`\."):
        a2fpn.from_pretrained(tmp_path)
