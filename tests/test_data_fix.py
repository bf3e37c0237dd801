"""Repaired copies of COCO files: every change is right, listed, and the only one."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a2fpn.cli.fixing import summary
from a2fpn.data import Change, DataError, check_data, fix_data, read_coco
from tests.coco_data import write_coco
from tests.test_cli import fails, run

SQUARE = [10, 10, 60, 10, 60, 60, 10, 60]
LINE = [1, 1, 5, 5]


def entry(number: int, **changes: Any) -> dict[str, Any]:
    base = {"id": number, "image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 50], "segmentation": [SQUARE]}
    return base | {"area": 2500, "iscrowd": 0} | changes


def coco(*annotations: Any, **lists: Any) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.png", "height": 100, "width": 120}]
    return copy.deepcopy(
        {"images": images, "annotations": [*annotations], "categories": [{"id": 7, "name": "c"}]} | lists
    )


@pytest.mark.parametrize(
    ("wrong", "right", "kinds"),
    [
        ({"area": -1}, {"area": 2500}, ["area"]),
        ({"area": 0}, {"area": 2500}, ["area"]),
        ({"area": None}, {"area": 2500}, ["area"]),
        ({"area": math.nan}, {"area": 2500}, ["area"]),
        ({"area": "2500"}, {"area": 2500}, ["area"]),
        ({"area": 0.25}, {"area": 2500}, ["area"]),
        ({"area": -1, "segmentation": None}, {"area": 2500, "segmentation": None}, ["area"]),
        ({"area": 9000, "segmentation": []}, {"area": 2500, "segmentation": []}, ["area"]),
        ({"bbox": None}, {"bbox": [10, 10, 50, 50]}, ["box"]),
        ({"bbox": [0, 0, 0, 0]}, {"bbox": [10, 10, 50, 50]}, ["box"]),
        ({"bbox": [30, 10, 50, 50]}, {"bbox": [10, 10, 50, 50]}, ["box"]),
        (
            {"bbox": [90, 70, 50, 50], "segmentation": [], "area": 900},
            {"bbox": [90, 70, 30, 30], "segmentation": [], "area": 900},
            ["box"],
        ),
        (
            {"bbox": [-5, 10, 50, 50], "segmentation": [], "area": -1},
            {"bbox": [0, 10, 45, 50], "segmentation": [], "area": 2250},
            ["box", "area"],
        ),
        # The area is that of the whole box, of which a fifth is left.
        (
            {"bbox": [-5, 90, 50, 50], "segmentation": [], "area": 2500},
            {"bbox": [0, 90, 45, 10], "segmentation": [], "area": 450},
            ["box", "area"],
        ),
        ({"bbox": [-1e9, -1e9, 2e9, 2e9]}, {"bbox": [10, 10, 50, 50]}, ["box"]),
        ({"segmentation": [SQUARE, LINE]}, {"segmentation": [SQUARE]}, ["mask"]),
        ({"segmentation": [LINE]}, {"segmentation": []}, ["mask"]),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, {"segmentation": []}, ["mask"]),
        ({"segmentation": {"size": [100, 120], "counts": [12000]}}, {"segmentation": []}, ["mask"]),
        ({"iscrowd": "0"}, {"iscrowd": 0}, ["iscrowd"]),
        ({"iscrowd": "True"}, {"iscrowd": 1}, ["iscrowd"]),
        ({"iscrowd": True}, {"iscrowd": 1}, ["iscrowd"]),
        ({"iscrowd": None}, {"iscrowd": 0}, ["iscrowd"]),
        ({"iscrowd": "perhaps"}, {"iscrowd": 0}, ["iscrowd"]),
        ({"id": 0}, {"id": 10}, ["id"]),
        ({"id": "1"}, {"id": 10}, ["id"]),
        ({"id": 9}, {"id": 10}, ["id"]),
        # What has no one right answer stays.
        ({"image_id": 99}, {}, []),
        ({"category_id": "7"}, {}, []),
        ({"bbox": [500, 10, 50, 50]}, {}, []),
        ({"bbox": None, "segmentation": [], "area": -1}, {}, []),
        ({"keypoints": [1, 2, 2]}, {}, []),
    ],
    ids=str,
)
def test_each_fault_has_its_repair(wrong: dict[str, Any], right: dict[str, Any], kinds: list[str]) -> None:
    data = coco(entry(9), entry(1, **wrong))
    before = copy.deepcopy(data)
    fixed = fix_data(data)
    assert str(data) == str(before)
    assert [change.kind for change in fixed.changes] == kinds
    expected = entry(1, **{**wrong, **right})
    assert fixed.content["annotations"][0] == entry(9)
    assert fixed.content["annotations"][1] == expected
    if kinds:
        assert {f.code for f in check_data(None, fixed.content).findings} <= {"no-segmentation", "crowds"}
    assert fix_data(fixed.content).changes == ()


def test_a_sound_file_stays_as_it_is(tmp_path: Path) -> None:
    images, path = write_coco(tmp_path, crowd=True)
    data = json.loads(path.read_text())
    data["annotations"][0]["id"] = 99  # its ids begin at 0
    fixed = fix_data(data | {"info": "anything", "more": [1]}, images)
    assert fixed.changes == ()
    assert fixed.content == data | {"info": "anything", "more": [1]}


def test_what_stands_between_is_kept() -> None:
    data = coco("rubbish", entry(1, id=0, note="x"), entry(1), entry(1), images=["rubbish", {"id": 1}])
    fixed = fix_data(data)
    assert fixed.content["images"] == data["images"]
    assert fixed.content["annotations"][0] == "rubbish"
    assert [raw["id"] for raw in fixed.content["annotations"][1:]] == [2, 1, 3]
    assert fixed.content["annotations"][1]["note"] == "x"
    assert str(fixed.changes[0]) == "id: annotation 0: 0 -> 2 (not an integer above 0)"
    with pytest.raises(DataError, match="not a COCO file"):
        fix_data({"images": []})
    with pytest.raises(DataError, match="no such folder of images"):
        fix_data(data, "nowhere")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    for name in ("sub/a.png", "one/b.png", "two/b.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 100)).save(images / name)
    Image.new("RGB", (120, 100)).save(tmp_path / "secret.png")
    return images


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("sub/a.png", "sub/a.png"),
        ("sub\\a.png", "sub/a.png"),
        ("a.png", "sub/a.png"),
        ("images/sub/a.png", "sub/a.png"),
        ("C:\\data\\sub\\a.png", "sub/a.png"),
        ("../images/sub/a.png", "../images/sub/a.png"),  # leads into the folder: nothing to repair
        ("{root}/sub/a.png", "sub/a.png"),
        ("/data/me/two/b.png", "two/b.png"),
        ("b.png", "b.png"),  # two files have the name
        ("../secret.png", "../secret.png"),
        ("a.jpg", "a.jpg"),
        ("nowhere\\c.png", "nowhere\\c.png"),
    ],
)
def test_paths_lead_to_the_one_file_of_the_name(name: str, right: str, folder: Path) -> None:
    images = [{"id": 1, "file_name": name.format(root=folder), "height": 100, "width": 120}]
    fixed = fix_data(coco(entry(1), images=images), folder)
    assert fixed.content["images"][0]["file_name"] == right
    assert [change.kind for change in fixed.changes] == ["path"] * (right != name)


def test_without_a_folder_only_backslashes_change() -> None:
    images = [{"id": 1, "file_name": "sub\\a.png", "height": 100, "width": 120}]
    assert fix_data(coco(entry(1), images=images)).content["images"][0]["file_name"] == "sub/a.png"


def test_the_command_writes_a_copy_and_lists_every_change(folder: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "a.json", tmp_path / "b.json"
    images = [{"id": 1, "file_name": "sub\\a.png", "height": 100, "width": 120}]
    wrong = [entry(number, area=-1) for number in range(1, 9)]
    content = json.dumps(coco(*wrong, images=images))
    path.write_text(content, encoding="utf-8-sig")
    out = run("check-data", "--annotations", path, "--images", folder, "--fix", output)
    assert "8 of kind area:" in out
    assert "annotation 1: -1 -> 2500.0 (not above 0)" in out
    assert "and 3 more" in out
    assert "all 10 changes are listed in" in out
    assert "0 errors, 0 warnings" in out
    lines = (tmp_path / "b.changes.txt").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0] == "encoding: the file: 'a byte order mark' -> 'none' (JSON must not have one)"
    assert lines[1].startswith("path: image 1: 'sub\\\\a.png' -> 'sub/a.png'")
    assert path.read_text(encoding="utf-8-sig") == content
    assert read_coco(output, strict=True).annotations[1][0].area == 2500
    assert output.read_bytes()[:1] == b"{"
    for given, message in ((output, "exists already; choose another name"), (path, "the checked file")):
        assert message in fails("check-data", "--annotations", path, "--images", folder, "--fix", given)
    again = run("check-data", "--annotations", output, "--images", folder, "--fix", tmp_path / "c.json")
    assert "Nothing to repair" in again
    run("check-data", "--annotations", path, "--fix", output, "--overwrite")
    bad = coco(entry(1, area=-1), entry(2, image_id=99), categories=[])
    path.write_text(json.dumps(bad))
    assert "no-usable-objects" in run("check-data", "--annotations", path, "--fix", output, "--overwrite", code=1)


def test_few_changes_are_all_shown() -> None:
    changes = [Change("area", f"annotation {number}", 0, 1.0, "x") for number in range(5)]
    assert len(summary(changes)) == 6
    assert summary([*changes, changes[0]])[-1] == "  and 1 more"
