import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import a2fpn
from a2fpn import CheckpointError
from a2fpn._serialize import RENAMED, migrate_keys
from a2fpn.config import Category
from a2fpn.detectors import DETECTORS, RCNN
from a2fpn.layers import positional_keys
from a2fpn.pretrained.catalog import PRETRAINED
from a2fpn.pretrained.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Facts,
    file_sha256,
    load_weights,
    read_checkpoint,
    read_weights,
    save_checkpoint,
)
from tests.helpers import randomize, tiny_model

CATEGORIES = (Category(7, "cell"), Category(23, "nucleus"), Category(90, "Zellkern"))


@pytest.fixture(scope="module")
def model() -> RCNN:
    torch.manual_seed(0)
    model = tiny_model(categories=CATEGORIES, neck_args={"nodes": [8, 8, 4, 4]}).eval()
    randomize(model)
    return model


@pytest.fixture
def folder(model: RCNN, tmp_path: Path) -> Path:
    return a2fpn.save_pretrained(model, tmp_path / "model")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / CONFIG_FILE
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes tensors, and the checksum with them."""
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    update_sha256(folder)


def update_sha256(folder: Path) -> None:
    edit_config(folder, lambda data: data.update(sha256=file_sha256(folder / WEIGHTS_FILE)))


@pytest.mark.parametrize("name", [f"{detector}_{neck}" for detector in DETECTORS for neck in ("fpn", "a2fpn_lite")])
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, categories=CATEGORIES, resize="at_least", min_size=40, max_size=90, mean=[0.1, 0.2, 0.3])
    randomize(model, std=0.02)
    loaded = a2fpn.from_pretrained(a2fpn.save_pretrained(model, tmp_path / "new" / "folder"))
    assert loaded.config == model.config
    assert loaded.config.categories == CATEGORIES
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    image = torch.rand(3, 33, 47)
    (expected,), (got,) = model.eval()([image]), loaded([image])
    assert len(got["scores"]) > 0
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_channels_last_models_are_saved_as_they_are(model: RCNN, tmp_path: Path) -> None:
    state = {
        key: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        for key, x in model.state_dict().items()
    }
    save_checkpoint(tmp_path, model.config, state)
    loaded = a2fpn.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())


def test_half_precision_halves_the_file_and_keeps_vectors(model: RCNN, folder: Path, tmp_path: Path) -> None:
    half = a2fpn.save_pretrained(model, tmp_path / "half", half=True)
    sizes = [(path / WEIGHTS_FILE).stat().st_size for path in (half, folder)]
    assert 0.5 < sizes[0] / sizes[1] < 0.6
    stored = load_file(half / WEIGHTS_FILE)
    loaded = a2fpn.from_pretrained(half)
    for key, value in loaded.state_dict().items():
        original = model.state_dict()[key]
        assert value.dtype == original.dtype, key
        if original.ndim > 1:
            assert stored[key].dtype == torch.float16, key
            torch.testing.assert_close(value, original, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(value, original), key
    image = torch.rand(1, 3, 64, 64)
    for a, b in zip(
        model.neck(model.backbone(image)).values(), loaded.neck(loaded.backbone(image)).values(), strict=True
    ):
        assert (a - b).square().mean().sqrt() < 0.01 * a.square().mean().sqrt()


def test_running_variances_beyond_half_precision_survive(model: RCNN, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    key = next(key for key in state if key.endswith("running_var"))
    state[key] = torch.full_like(state[key], 1e6)
    save_checkpoint(tmp_path, model.config, state, half=True)
    assert torch.equal(a2fpn.from_pretrained(tmp_path).state_dict()[key], state[key])


def test_the_folder_says_what_it_is(model: RCNN, tmp_path: Path) -> None:
    metadata = {"segm/ap": 0.61, "data": "nuclei", "license": "CC0"}
    folder = a2fpn.save_pretrained(model, tmp_path, metadata=metadata)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    data = json.loads((folder / CONFIG_FILE).read_text())
    assert data["format_version"] == 2
    assert data["a2fpn_version"] == a2fpn.__version__
    assert data["model"]["categories"][2] == {"id": 90, "name": "Zellkern"}
    checkpoint = read_checkpoint(folder)
    assert checkpoint.metadata == metadata
    assert checkpoint.model == model.config
    assert checkpoint.sha256 == file_sha256(folder / WEIGHTS_FILE)


def test_saving_again_replaces(model: RCNN, folder: Path) -> None:
    other = tiny_model(categories=CATEGORIES, neck_args={"nodes": [8, 8, 4, 4]})
    a2fpn.save_pretrained(other, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    loaded = a2fpn.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in other.state_dict().items())


# Damage


@pytest.mark.parametrize("position", [0, 3000, -1])
def test_a_changed_byte_is_an_error(folder: Path, position: int) -> None:
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged or replaced: its sha256"):
        a2fpn.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 7, 5000])
@pytest.mark.parametrize("checksum", ["kept", "updated"])
def test_a_truncated_file_is_an_error(folder: Path, size: int, checksum: str) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    message = r"model\.safetensors' is damaged"
    if checksum == "updated":
        update_sha256(folder)
        message = r"model\.safetensors' is not a safetensors file"
    with pytest.raises(CheckpointError, match=message):
        a2fpn.from_pretrained(folder)


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_a_pickle_is_refused_and_never_run(folder: Path, write: Callable[[Trap, Path], None]) -> None:
    write(Trap(folder / "sprung"), folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged"):
        a2fpn.from_pretrained(folder)
    update_sha256(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is not a safetensors file"):
        a2fpn.from_pretrained(folder)
    assert not (folder / "sprung").exists()


def test_a_missing_file_is_an_error(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; only safetensors are loaded"):
        a2fpn.from_pretrained(folder)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model' is not a checkpoint folder: it has no config\.json"):
        a2fpn.from_pretrained(folder)


KEY = "neck.lateral.p2.conv.weight"


def shorten(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY][:3].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(KEY), rf"tensors missing \(1\): {KEY}\."),
        (lambda tensors: tensors.update(alien=torch.ones(1)), r"tensors unexpected \(1\): alien\."),
        (shorten, rf"tensors with another shape \(1\): {KEY} \(3, \d+, 1, 1\) instead of \(16, \d+, 1, 1\)\."),
        (lambda tensors: tensors.clear(), r"tensors missing \(\d+\): ([\w.]+, ){4}[\w.]+\."),
        (
            lambda tensors: tensors.update(alien=tensors.pop(KEY)),
            rf"tensors missing \(1\): {KEY}; unexpected \(1\): alien\.",
        ),
    ],
    ids=["missing", "unexpected", "shape", "all missing", "renamed"],
)
def test_weights_must_fit_tensor_by_tensor(
    folder: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match=f"The weights do not match the model: {message}"):
        a2fpn.from_pretrained(folder)


def test_weights_that_do_not_fit_change_nothing() -> None:
    layer = nn.Linear(2, 3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(layer, {"weight": torch.zeros(3, 2)})
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_loading_weights_keeps_dtype_and_parameters() -> None:
    layer = nn.Linear(2, 3)
    parameter = layer.weight
    load_weights(layer, {"weight": torch.ones(3, 2, dtype=torch.float16), "bias": torch.zeros(3, dtype=torch.float64)})
    assert layer.weight is parameter
    assert parameter.requires_grad
    assert parameter.dtype == layer.bias.dtype == torch.float32
    assert torch.equal(parameter, torch.ones(3, 2))


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of one value, or with ``...`` its removal."""

    def edit(data: dict[str, Any]) -> None:
        *sections, key = path.split(".")
        for section in sections:
            data = data[section]
        data[key] = value
        if value is ...:
            del data[key]

    return edit


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 3, r"has format_version 3, this version of a2fpn reads 1 to 2"),
        ("format_version", "1", r"has format_version '1', this version of a2fpn reads 1"),
        ("format_version", ..., r"has format_version None, this version of a2fpn reads 1"),
        ("sha265", "x", r"config\.json: unknown key 'sha265' for Checkpoint\. Did you mean 'sha256'"),
        ("sha256", ..., r"config\.json: the key 'sha256' of Checkpoint is missing"),
        ("model.num_clases", 3, r"config\.json\.model: unknown key 'num_clases' for ModelConfig"),
        ("model.heads.x", 3, r"config\.json\.model\.heads: unknown key 'x' for RCNNConfig"),
        ("model.num_classes", "3", r"config\.json\.model\.num_classes: expected int, got '3'"),
        ("model.num_classes", 4, r"3 categories were given for num_classes=4"),
        ("model.preprocess.resize", "x", r"resize: expected one of 'shortest_edge'"),
        ("model.neck.name", "a2fnp", r"Unknown neck 'a2fnp'\. Did you mean 'a2fpn'"),
        ("model.neck.args.node", 3, r"Neck 'a2fpn' has no argument 'node'\. Did you mean 'nodes'"),
        ("model.backbone.name", "resnet5O", r"Unknown backbone 'resnet5O'"),
        ("model.detector", "maskrnn", r"Unknown detector 'maskrnn'\. Did you mean 'maskrcnn'"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error(folder: Path, path: str, value: Any, message: str) -> None:
    edit_config(folder, change(path, value))
    with pytest.raises(CheckpointError, match=message):
        a2fpn.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_object_is_an_error(folder: Path, content: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json' (is not valid JSON|has format_version None)"):
        a2fpn.from_pretrained(folder)


def test_reading_weights_checks_them(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert read_weights(folder, checkpoint).keys() == load_file(folder / WEIGHTS_FILE).keys()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"metrics": [0.5]}, r"metadata\.metrics: expected an object, got \[0\.5\]"),
        ({"metrics": {"bbox/ap": "0.5"}}, r"The metric 'bbox/ap' must be a number, got '0\.5'"),
        ({"metrics": {"bbox/ap": True}}, r"The metric 'bbox/ap' must be a number, got True"),
        ({"license": 3}, r"metadata\.license: expected str, got 3"),
        ({"max_detections": "all"}, r"metadata\.max_detections: expected int, got 'all'"),
    ],
)
def test_facts_of_a_wrong_type_are_an_error(folder: Path, metadata: dict[str, Any], message: str) -> None:
    before = (folder / CONFIG_FILE).read_bytes()
    with pytest.raises(TypeError, match=message):
        a2fpn.save_pretrained(tiny_model(categories=CATEGORIES), folder, metadata=metadata)
    assert (folder / CONFIG_FILE).read_bytes() == before
    edit_config(folder, change("metadata", metadata))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)


def test_facts_are_read_and_other_metadata_kept(model: RCNN, tmp_path: Path) -> None:
    metadata = {"metrics": {"bbox/ap": 1}, "license": "MIT", "data": "cells", "note": [1, {"a": None}]}
    checkpoint = read_checkpoint(a2fpn.save_pretrained(model, tmp_path, metadata=metadata))
    assert checkpoint.metadata == metadata
    assert checkpoint.facts == Facts({"bbox/ap": 1.0}, license="MIT", data="cells")
    assert checkpoint.facts.max_detections == 100
    assert checkpoint.code_license == "Apache-2.0"


def test_metadata_that_json_cannot_hold_is_an_error_and_replaces_nothing(folder: Path) -> None:
    other = tiny_model(categories=CATEGORIES)
    with pytest.raises(TypeError, match=r"Path is not JSON serializable"):
        a2fpn.save_pretrained(other, folder, metadata={"path": Path("x")})
    assert file_sha256(folder / WEIGHTS_FILE) == read_checkpoint(folder).sha256


def test_threads_load_and_build_at_once(tmp_path):
    folder = a2fpn.save_pretrained(tiny_model(), tmp_path)
    expected = a2fpn.from_pretrained(folder).state_dict()

    def work(number: int) -> bool:
        if number % 2:
            return len(list(torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(400))).parameters())) == 800
        return all(torch.equal(x, expected[key]) for key, x in a2fpn.from_pretrained(folder).state_dict().items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


# Levels carry their names since format version 2


@pytest.mark.parametrize("name", ["maskrcnn_a2fpn", "maskrcnn_bifpn", "retinanet_pafpn_mgc", "htc_carafe_fpn"])
def test_checkpoints_of_version_1_load_to_the_bit(name, tmp_path):
    """Version 1 had the position of a level where version 2 has its name."""
    options = {"semantic": "things"} if name.startswith("htc") else {}
    model = tiny_model(name, **options)
    randomize(model)
    counted = positional_keys(model)
    assert set(counted) != set(counted.values())
    assert len(set(counted.values())) == len(counted)
    assert not [key for key in counted if re.match(r"neck\.\w+\.\d", key) and ".layers." not in key]
    folder = save_checkpoint(tmp_path, model.config, {counted[key]: x for key, x in model.state_dict().items()})
    with pytest.raises(CheckpointError, match="do not match the model"):
        a2fpn.from_pretrained(folder)
    document = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**document, "format_version": 1}))
    again = a2fpn.from_pretrained(folder)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    a2fpn.save_pretrained(again, folder)
    assert json.loads((folder / CONFIG_FILE).read_text())["format_version"] == 2
    assert load_file(folder / WEIGHTS_FILE).keys() == model.state_dict().keys()


def british(data: Any) -> Any:
    """A configuration with the keys that versions before 0.2.0 wrote."""
    old = {new: name for name, new in RENAMED.items()}
    if isinstance(data, list):
        return [british(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "in_chans" in data:  # a backbone's license was always spelled so
        return data
    return {old.get(key, key): british(value) for key, value in data.items()}


@pytest.mark.parametrize("version", [1, 2])
def test_keys_of_older_checkpoints_are_renamed(version, tmp_path):
    model = tiny_model("fcos_fpn", center_radius=2.5)
    metadata = {"license": "CC0", "data_license": "MIT", "data": "cells", "note": {"license": 1}}
    folder = a2fpn.save_pretrained(model, tmp_path, metadata=metadata)
    expected = read_checkpoint(folder)
    document = british(json.loads((folder / CONFIG_FILE).read_text())) | {"format_version": version}
    assert {"centre_radius", "code_licence", "data_licence", "licence"} <= set(re.findall(r"\w+", json.dumps(document)))
    (folder / CONFIG_FILE).write_text(json.dumps(document))
    assert read_checkpoint(folder) == dataclasses.replace(expected, format_version=version)
    assert read_checkpoint(folder).facts == Facts(license="CC0", data_license="MIT", data="cells")


def test_of_both_names_of_a_key_the_current_one_counts():
    assert migrate_keys([{"licence": "a", "license": "b"}, 3]) == [{"license": "b"}, 3]
    assert migrate_keys({"license": "b", "licence": "a"}) == {"license": "b"}


def test_the_embedded_model_is_of_this_version_and_small_enough_to_ship():
    folder = PRETRAINED["maskrcnn_a2fpn_lite0.nuclei"].folder
    checkpoint = read_checkpoint(folder)
    assert checkpoint.format_version == 2
    assert (folder / WEIGHTS_FILE).stat().st_size < 20e6
    stored = read_weights(folder, checkpoint)
    state = a2fpn.from_pretrained(folder).state_dict()
    assert stored.keys() == state.keys()
    assert torch.equal(state["neck.lateral.p3.conv.weight"], stored["neck.lateral.p3.conv.weight"].float())
    assert 0 < checkpoint.facts.count_threshold < 1
