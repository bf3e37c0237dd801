"""The overfitting benchmark runs; whether detectors pass it is not judged here."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer

from a2fpn.data import DataError
from benchmarks import overfit
from tests.coco_data import write_coco


def folder(tmp_path: Path, **options: object) -> Path:
    _, path = write_coco(tmp_path, size=(100, 120), crowd=False, **options)
    (tmp_path / "annotations").mkdir()
    shutil.move(path, tmp_path / "annotations" / "instances_train.json")
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["retina*", "fcos"], ["fcos", "retinanet"]),
        pytest.param(["keypoint*", "maskrcnn"], ["keypointrcnn", "maskrcnn"], marks=pytest.mark.slow),
    ],
)
def test_it_prints_a_row_for_every_detector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patterns: list[str], names: list[str]
) -> None:
    overfit.main(folder(tmp_path), detectors=patterns, backbone="test_resnet", quick=True)
    table = capsys.readouterr().out.rpartition("Trained on 2 images")[2]
    assert re.findall(r"│ (\w+)_fpn_test_resnet +│ +\d\.\d{3} │", table) == names


def test_a_failure_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfit, "IMAGES", 2)
    monkeypatch.setattr(overfit, "SIZE", 128)
    with pytest.raises(typer.Exit) as error:
        overfit.main(folder(tmp_path), detectors=["fcos"], backbone="test_resnet", steps=1)
    assert error.value.exit_code == 1


def test_what_it_cannot_use_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"No detector matches \['yolo'\]; there are cascademaskrcnn"):
        overfit.main(tmp_path, detectors=["yolo"])
    with pytest.raises(DataError, match=r"has 3 images of at most 256 pixels .*, expected 8"):
        overfit.main(folder(tmp_path), detectors=["fcos"])


def test_made_up_keypoints_are_center_and_ends() -> None:
    mask = torch.zeros(10, 20, dtype=torch.uint8)
    mask[3:6, 4:9] = 1
    assert overfit.mask_keypoints(mask).tolist() == [[6.5, 4.5, 2], [4.5, 3.5, 2], [8.5, 3.5, 2]]
