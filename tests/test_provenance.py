"""Tests of a model's provenance, which travels with it, and of marks on what no longer holds."""

from pathlib import Path

import pytest
import torch

import a2fpn
from a2fpn.pretrained.card import model_card
from a2fpn.pretrained.checkpoint import CheckpointError, load_weights, read_checkpoint
from tests.helpers import tiny_model

FACTS = {
    "metrics": {"bbox/ap": 0.5},
    "max_detections": 300,
    "data": "cells",
    "data_license": "CC0-1.0",
    "license": "MIT",
    "recipe": "cells_1x",
    "note": "mine",
    "device": "a fast one",
    "run_metrics": [{"step": 5, "bbox/ap": 0.4}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a2fpn.save_pretrained(tiny_model("fasterrcnn_fpn"), tmp_path / "first", metadata=FACTS)


def test_a_model_saved_again_is_told_in_the_same_words(folder: Path, tmp_path: Path) -> None:
    model = a2fpn.from_pretrained(folder).to(memory_format=torch.channels_last)
    again = a2fpn.save_pretrained(model, tmp_path / "again")
    assert read_checkpoint(again).metadata == read_checkpoint(folder).metadata
    assert model_card(read_checkpoint(again), "a/b") == model_card(read_checkpoint(folder), "a/b")
    third = a2fpn.save_pretrained(a2fpn.from_pretrained(again), tmp_path / "third", metadata={"note": "other"})
    assert read_checkpoint(third).metadata == {**read_checkpoint(folder).metadata, "note": "other"}


@pytest.mark.parametrize("change", ["classes", "training", "settings"])
def test_what_was_measured_is_marked_when_it_no_longer_holds(change: str, folder: Path, tmp_path: Path) -> None:
    overrides = {"classes": {"num_classes": 7}, "training": {}, "settings": {"min_size": 96}}[change]
    model = a2fpn.from_pretrained(folder, **overrides)
    if change == "training":
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.bias[0] += 1e-6
    metadata = read_checkpoint(a2fpn.save_pretrained(model, tmp_path / "x")).metadata
    assert "metrics" not in metadata
    assert "max_detections" not in metadata
    assert metadata.keys().isdisjoint({"device", "run_metrics"})
    assert metadata["derived_from"]["metrics"] == {"bbox/ap": 0.5}
    assert metadata["derived_from"]["device"] == FACTS["device"]
    assert {key: metadata[key] for key in ("data_license", "license", "recipe", "note")} == {
        key: FACTS[key] for key in ("data_license", "license", "recipe", "note")
    }


def test_new_data_do_not_have_the_licence_of_the_old(folder: Path, tmp_path: Path) -> None:
    model = a2fpn.from_pretrained(folder)
    metadata = read_checkpoint(a2fpn.save_pretrained(model, tmp_path / "x", metadata={"data": "photos"})).metadata
    assert metadata["data"] == "photos"
    assert metadata.keys().isdisjoint({"data_license", "recipe"})
    assert metadata["license"] == "MIT"


def test_a_model_trained_on_names_the_data_of_its_origin_below_it(folder: Path, tmp_path: Path) -> None:
    model = a2fpn.from_pretrained(folder, num_classes=7)
    given = {"data": "photos", "device": "a slow one"}
    trained = read_checkpoint(a2fpn.save_pretrained(model, tmp_path / "x", metadata=given))
    assert trained.metadata.keys() >= given.keys()
    assert trained.metadata["derived_from"]["data_license"] == FACTS["data_license"]
    card = model_card(trained, "a/b")
    assert "\n* data: photos\n" in card
    assert "\n* derived_from:\n    * architecture: fasterrcnn_fpn\n" in card
    assert f"\n    * data_license: {FACTS['data_license']}\n" in card


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    model = tiny_model("fasterrcnn_fpn")
    state = model.state_dict()
    name = "roi_heads.box_predictor.cls_score.weight"
    message = rf"with another dtype \(1\): {name} {str(dtype).removeprefix('torch.')} instead of float32"
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, {**state, name: state[name].to(dtype)})
    load_weights(model, {**state, name: state[name].to(torch.bfloat16)})
    counter = next(name for name, x in state.items() if not x.is_floating_point())
    with pytest.raises(CheckpointError, match=f"{counter} float32 instead of int64"):
        load_weights(model, {**state, counter: state[counter].float()})
