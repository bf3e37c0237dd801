"""``data.format=auto``: labels of other formats are imported into a cache when a run starts."""

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from a2fpn.data.exporters import convert_data
from a2fpn.errors import DataError
from a2fpn.training.cli import main
from a2fpn.training.config import DataSection
from a2fpn.training.importing import import_folder
from a2fpn.training.sources import open_training_set, open_validation_set
from tests.coco_data import write_coco
from tests.training import metrics, tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of labelme files without a split: 10 images."""
    _, annotations = write_coco(tmp_path / "coco", images=10)
    convert_data(annotations, tmp_path / "labelme", to="labelme", format="coco", images="copy")
    return tmp_path / "labelme"


def section(root: Path, **settings: object) -> DataSection:
    return DataSection(root=str(root), format="auto", cache=str(root.parent / "cache"), **settings)  # type: ignore[arg-type]


def test_a_folder_is_imported_and_split(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = import_folder(section(folder))
    train_set = open_training_set(data)
    assert (len(train_set), len(open_validation_set(data, train_set))) == (8, 2)
    assert Path(data.root).parent == folder.parent / "cache"
    assert "holds labelme labels; importing them into" in caplog.text
    assert "no validation split: 20 %" in caplog.text


def test_the_source_is_read_again_only_when_it_changed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = import_folder(section(folder))
    marked = Path(first.root) / "marked"
    marked.touch()
    caplog.set_level(logging.INFO)
    assert import_folder(section(folder)) == first
    assert marked.exists()
    assert "imported before" in caplog.text
    label = min(folder.rglob("*.json"))
    os.utime(label, ns=(1, 1))
    assert import_folder(section(folder)).root != first.root


def test_what_a_kill_left_is_imported_anew(folder: Path) -> None:
    first = import_folder(section(folder))
    (Path(first.root) / ".complete").unlink()
    (Path(first.root) / "annotations" / "instances_val.json").unlink()
    assert import_folder(section(folder)) == first
    assert len(open_training_set(first)) == 8


def test_processes_that_start_at_once_import_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: import_folder(section(folder)), range(3)))
    assert results[0] == results[1] == results[2]
    assert caplog.text.count("importing them into") == 1


def test_the_source_s_split_stays(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path / split, images=2, seed=len(split))
        shutil.copytree(tmp_path / split / "images", tmp_path / "voc" / split)
        shutil.copy(tmp_path / split / "annotations.json", tmp_path / "voc" / split / "_annotations.coco.json")
    data = import_folder(section(tmp_path / "voc"))
    names = [
        {image["file_name"] for image in json.loads(Path(data.root, file).read_text())["images"]}
        for file in (data.train_annotations, data.val_annotations)
    ]
    assert [len(part) for part in names] == [2, 2]


def test_a_coco_folder_and_coco_alone_are_left_as_they_are(folder: Path, tmp_path: Path) -> None:
    in_place = section(tmp_path / "coco", train_annotations="annotations.json")
    assert import_folder(in_place) is in_place
    unasked = DataSection(root=str(folder))
    assert import_folder(unasked) is unasked
    with pytest.raises(DataError, match=r"a2fpn data import .* data\.format=auto\.$"):
        open_training_set(unasked)


def test_a_folder_without_labels_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    arguments = tiny_run(tmp_path)
    assert main([*arguments, f"data.root={tmp_path / 'empty'}", "data.format=auto", f"data.cache={tmp_path}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train: error: ")
    assert "unknown format" in error


def test_a_run_trains_on_what_was_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    arguments = [*tiny_run(tmp_path), f"data.root={folder}", "data.format=auto", "run.max_steps=1"]
    assert main(arguments) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 1
    assert len(list((tmp_path / "home" / "a2fpn" / "imports").glob("*/.complete"))) == 1
    assert f"root: {folder}" in (tmp_path / "run" / "config.yaml").read_text()
