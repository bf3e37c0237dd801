"""YOLO: label files wherever they are, damaged lines, and what only YOLO does."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a2fpn.data import read_coco
from a2fpn.data.exporters import convert_data
from a2fpn.data.importers import import_data
from a2fpn.errors import DataError
from tests.label_sets import annotations, datumaro, objects, picture, write_objects, yolo


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 .5 .5 .5 .5", "class 7 is not among the 2 classes 0 to 1"),
        ("0.5 .5 .5 .5 .5", "class 0.5 is not among"),
        ("0 .5 .5 .5", "3 coordinates; expected a box of 4"),
        ("0 .1 .1 .2 .2 .3 .3 .4", "7 coordinates; expected a box of 4, or a polygon of pairs"),
        ("0 .5 .5 .5 .5 .9", "6 numbers: a box with a score"),
        ("0 .5 .5 .5 x", "expected numbers, got '0 .5 .5 .5 x'"),
        ("0 .5 1.3 .5 .5", "the coordinate 1.3 must be in [0, 1]"),
        ("0 20 20 10 10", "the coordinate 20 must be in [0, 1], relative to the image size; are these pixels"),
        ("0 nan .5 .5 .5", "the coordinate nan must be in"),
        ("0 .1 .1 .2 .2 .3 inf", "the coordinate inf must be in"),
        ("0 .5 .5 0 .5", "has no area"),
    ],
)
def test_a_bad_line_of_yolo_is_named_and_left_out(tmp_path: Path, line: str, message: str) -> None:
    root = yolo(tmp_path / "x", {"a": f"1 .5 .5 .5 .5\n\n{line}\n"})
    report = import_data(root, tmp_path / "y")
    assert [raw["bbox"] for raw in annotations(tmp_path / "y")] == [[15, 10, 30, 20]]
    (loss,) = report.losses
    assert (loss.file, loss.place) == (str(root / "labels" / "a.txt"), "line 3")
    assert message in loss.detail
    with pytest.raises(DataError, match=r"a\.txt, line 3: "):
        import_data(root, tmp_path / "z", strict=True)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf0 .5 .5 .5 .5\r\n", "0 .5 .5 .5 .5\n".encode("utf-16")])
def test_byte_order_marks_and_line_ends_are_read(tmp_path: Path, content: bytes) -> None:
    report = import_data(yolo(tmp_path / "x", {"a": content}), tmp_path / "y")
    assert (report.annotations, report.counts) == (1, {})


def test_a_coordinate_over_the_edge_by_rounding_is_cut_off(tmp_path: Path) -> None:
    import_data(yolo(tmp_path / "x", {"a": "0 0 0 1.005 0 1.005 1 0 1\n"}), tmp_path / "y")
    assert annotations(tmp_path / "y")[0]["segmentation"] == [[0, 0, 60, 0, 60, 40, 0, 40]]


def test_training_and_validation_on_the_same_images_lose_nothing(tmp_path: Path) -> None:
    """As ultralytics' smallest sets do."""
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n", "b": "1 .5 .5 .5 .5\n"}, names=None)
    (root / "data.yaml").write_text("train: images\nval: images\nnames: [cat, dog]\n")
    report = import_data(root, tmp_path / "y", strict=True)
    assert (report.splits["train"].images, report.annotations, report.counts) == (2, 2, {})
    assert report.notes == {"images listed in train and val, kept in train": 2}


def test_images_and_labels_without_each_other(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n", "empty": "", "b": "0 .5 .5 .5 .5\n"})
    (root / "images" / "b.png").unlink()
    picture(root / "images" / "alone.png")
    report = import_data(root, tmp_path / "y")
    assert report.splits["train"].images == 3
    assert report.splits["train"].empty == 2
    assert report.counts == {"missing-image": 1}
    assert report.notes == {"images without a label file, kept as background": 1}
    report = import_data(root, tmp_path / "z", unlabeled="skip")
    assert report.splits["train"].images == 2


def test_one_label_file_serves_one_image(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n"})
    picture(root / "images" / "a.jpg")
    report = import_data(root, tmp_path / "y")
    assert (report.images, report.counts) == (1, {"duplicate-stem": 1})


def test_classes_must_be_listed_somewhere(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "1 .5 .5 .5 .5\n"}, names=None)
    with pytest.raises(DataError, match=r"no list of classes; expected names in data.yaml .* --categories FILE"):
        import_data(root, tmp_path / "y")
    assert import_data(root, tmp_path / "y", categories=["cat", "dog"]).categories == {1: "cat", 2: "dog"}
    (root / "classes.txt").write_text("\ufeffcat\ndog\n", encoding="utf-8")
    assert import_data(root, tmp_path / "z").categories == {1: "cat", 2: "dog"}


def test_lists_of_other_machines_are_resolved(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n", "b/c": "", "d": ""})
    (root / "train.txt").write_text("C:\\data\\set\\images\\a.png\n./images/b/c.png\n/home/me/images/gone.png\n")
    (root / "data.yaml").write_text("path: /home/me/set\ntrain: train.txt\nval: [images/d.png]\nnames: {0: cat}\n")
    (root / "val.txt").write_text("images/d.png\n")
    (root / "data.yaml").write_text("path: /home/me/set\ntrain: train.txt\nval: val.txt\ntest: t\nnames: {0: cat}\n")
    report = import_data(root / "data.yaml", tmp_path / "y")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 2, "val": 1}
    (loss,) = report.losses
    assert str(loss) == f"{root / 'train.txt'}, line 3: /home/me/images/gone.png not found"
    (root / "data.yaml").write_text("train: nowhere\nnames: [cat]\n")
    with pytest.raises(DataError, match="train: nowhere is neither an image folder nor a list"):
        import_data(root, tmp_path / "z")
    (root / "data.yaml").write_text("names: [cat\ntrain: x")
    with pytest.raises(DataError, match=r"data.yaml, line 2: invalid YAML"):
        import_data(root, tmp_path / "z")


def test_images_of_one_name_in_two_splits_are_kept_apart(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        picture(tmp_path / "x" / split / "images" / "a.png")
        (tmp_path / "x" / split / "labels").mkdir()
        (tmp_path / "x" / split / "labels" / "a.txt").write_text("0 .5 .5 .5 .5\n")
    # As Roboflow writes it, one folder too high.
    (tmp_path / "x" / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 1, "val": 1}
    assert (tmp_path / "y" / "images" / "val" / "a.png").is_file()


def test_exif_turns_the_image_that_shares_are_taken_of(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {}, names=None)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "images" / "a.jpg", exif=exif)
    (root / "labels" / "a.txt").write_text("0 .5 .5 1 1\n")
    (root / "data.yaml").write_text("names: [cat]\n")
    import_data(root, tmp_path / "y")
    assert annotations(tmp_path / "y")[0]["bbox"] == [0, 0, 40, 60]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/a.png", "images/a.txt"),
        ("images/a.png", "images/a.TXT"),
        ("images/a.png", "labels/a.txt"),
        ("images/a.png", "labels/a.TXT"),
        ("train/a.png", "train/a.Txt"),
        ("images/b/images/a.PNG", "images/b/labels/a.txt"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_labels_of_yolo_are_found_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, label: str, relative: bool
) -> None:
    root = tmp_path / "x"
    picture(root / image)
    (root / label).parent.mkdir(exist_ok=True)
    (root / label).write_text("0 .5 .5 .5 .5\n")
    (root / "data.yaml").write_text(f"train: {image.split('/')[0]}\nnames: [cat]\n")
    monkeypatch.chdir(root)
    report = import_data("." if relative else root, tmp_path / "y", strict=True)
    assert (report.images, report.annotations, report.notes) == (1, 1, {})


def test_images_of_yolo_keep_their_names(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "", ".a": "0 .5 .5 .5 .5\n"})
    assert import_data(root, tmp_path / "y", strict=True).images == 2
    (tmp_path / "elsewhere").mkdir()
    (root / "data.yaml").rename(tmp_path / "elsewhere" / "data.yaml")
    (tmp_path / "elsewhere" / "data.yaml").write_text("train: ../x/images\nnames: [cat]\n")
    import_data(tmp_path / "elsewhere", tmp_path / "z", format="yolo", strict=True)
    assert sorted(path.name for path in (tmp_path / "z" / "images" / "x" / "images").iterdir()) == [".a.png", "a.png"]


def test_label_files_that_no_image_uses_are_lost(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n"})
    (root / "labels" / "a.TXT").write_text("0 .2 .2 .1 .1\n")
    report = import_data(root, tmp_path / "y")
    assert (report.annotations, report.counts) == (1, {"duplicate-stem": 1})
    assert f"{root / 'labels' / 'a.TXT'}: its image has another label file; skipped" in str(report)
    picture(root / "images" / "b.png")
    (root / "labels" / "far").mkdir()
    (root / "labels" / "far" / "c.txt").symlink_to("nowhere")
    assert import_data(root, tmp_path / "v").counts == {"duplicate-stem": 1, "missing-image": 1}
    (root / "labels").rename(root / "Labels")
    report = import_data(root, tmp_path / "z")
    assert report.counts == {"missing-image": 3}


def test_labels_outside_the_data_set_are_not_its_own(tmp_path: Path) -> None:
    for above in ("labels", "labels_of_2024"):
        picture(tmp_path / above / "x" / "images" / "b.png")
        yolo(tmp_path / above / "x", {"a": "0 .5 .5 .5 .5\n"})
        (tmp_path / above / "other.txt").write_text("0 .5 .5 .5 .5\n")
        assert import_data(tmp_path / above / "x", tmp_path / f"{above}_y", strict=True).annotations == 1


def test_yaml_is_read_as_text(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": ""}, names="names: [no, 01, 2020-13-45, null, 1.50]\ntest: null\nval:\n")
    assert list(import_data(root, tmp_path / "y").categories.values()) == ["no", "01", "2020-13-45", "null", "1.50"]


def test_classes_that_share_a_name_are_one(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n2 .2 .2 .1 .1\n"}, names="names: [cat, dog, cat]")
    report = import_data(root, tmp_path / "y")
    assert (report.categories, report.annotations) == ({1: "cat", 2: "dog"}, 2)
    assert report.notes == {"classes with the name of another, merged with it": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: {}", "no list of classes"),
        ("names: {0: a, 300000000: b}", "names needs class numbers from 0 to 99999 as keys, got '300000000'"),
        ("names: {1.5: a}", "got '1.5'"),
        ("names: {-1: a}", "got '-1'"),
        ("names: [[a]]", "a class name must be text, got a list"),
        ('names: ["\\ud800"]', r"a class name must be text, got '\\ud800'"),
        ('names: ["\\U99999999"]', "invalid YAML"),
        ("names: " + "[" * 5000, "invalid YAML"),
        ("names: [a\0]", r"invalid YAML \(unacceptable character #x0000: special characters are not allowed\)"),
        ("names: [a]\ntrain: [{a: b}]", "a path of train must be text, got a dict"),
        ('names: [a]\nkpt_shape: ["a", 3]', "kpt_shape must be "),
        ("names: [a]\nkpt_shape: [17.0, 3]", "kpt_shape must be "),
        ("names: [a]\nkpt_shape: [0, 3]", "kpt_shape must be "),
        ("names: [a]\nkpt_shape: 17", "kpt_shape must be "),
        ("names: [a]\nkpt_shape: [1, 3]\nkpt_names: {0: 5}", "kpt_names must be lists of up to 1 names"),
        ("names: [a]\nkpt_shape: [1, 3]\nkpt_names: [a, b]", "kpt_names must be lists of up to 1 names"),
        ("names: [a]\nkpt_shape: [1, 3]\nkpt_names: {0: [[b]]}", "a name of a keypoint must be text, got a list"),
        ("names: [a]\nkpt_shape: [1, 3]\nkpt_names: nose", "kpt_names needs class numbers .*, got str"),
    ],
)
def test_faults_of_data_yaml_are_named(tmp_path: Path, text: str, message: str) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n"}, names=text)
    with pytest.raises(DataError, match=message) as caught:
        import_data(root, tmp_path / "y", format="yolo")
    assert str(caught.value).startswith(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("named", "points"),
    [
        ("[nose, ear]", (("nose", "ear"), ("nose", "ear"))),
        ("{0: [nose], 1: []}", (("nose",), ())),
        ("[[nose], [nose, ear]]", (("nose",), ("nose", "ear"))),
        ("{1: [nose]}", (("point 1", "point 2"), ("nose",))),
    ],
)
def test_classes_have_keypoints_of_their_own(tmp_path: Path, named: str, points: tuple[tuple[str, ...], ...]) -> None:
    lines = "0 .5 .5 .5 .5 .5 .5 2 .25 .5 1\n1 .5 .5 .5 .5 0 0 0 0 0 0\n"
    text = f"names: [cat, dog]\nkpt_shape: [2, 3]\nkpt_names: {named}\n"
    report = import_data(yolo(tmp_path / "x", {"a": lines}, names=text), tmp_path / "y")
    data = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    assert tuple(tuple(raw.get("keypoints", ())) for raw in data["categories"]) == points
    assert [len(raw.get("keypoints", ())) // 3 for raw in data["annotations"]] == [len(names) for names in points]
    assert report.counts == ({"keypoints": 1} if len(points[0]) == 1 else {})


CAT = {"id": 1, "name": "cat"}


@pytest.mark.parametrize(
    "ring",
    [
        [0, 0, 80, 30, 0, 30],
        [-20, -20, 60, -20, 60, 50, -20, 50],
        [20, -10, 60, 15, 20, 40, -20, 15],
        [10, 10, 60, 10, 60, 5, 30, 5, 30, -9, 60, -9, 60, 20, 10, 20],  # two parts of it are inside
    ],
)
def test_polygons_over_the_edge_are_cut_at_it(tmp_path: Path, ring: list[float]) -> None:
    coco = write_objects(tmp_path / "coco", [CAT], {"bbox": [0, 0, 40, 30], "segmentation": [ring]})
    convert_data(coco, tmp_path / "x", to="yolo")
    import_data(tmp_path / "x", tmp_path / "y", strict=True)
    before, after = (objects(root, "train")["a.png"][0][2] for root in (coco, tmp_path / "y"))
    assert (before & after).sum() / (before | after).sum() > 0.99


def test_a_polygon_outside_the_image_is_lost(tmp_path: Path) -> None:
    beside = {"bbox": [5, 5, 9, 9], "segmentation": [[50, 0, 60, 0, 50, -20, 70, 40, 50, 40]]}
    outside = {"segmentation": [[50, 0, 60, 0, 60, 9]]}
    report = convert_data(write_objects(tmp_path / "coco", [CAT], beside, outside), tmp_path / "x", to="yolo")
    assert report.counts == {"mask": 1, "unusable-object": 1}
    assert "cat: its mask covers no pixel of the image; written as a box" in str(report)
    import_data(tmp_path / "x", tmp_path / "y", strict=True)
    assert [raw["bbox"] for raw in annotations(tmp_path / "y")] == [[5, 5, 9, 9]]


POSE = [{"id": 1, "name": "p", "keypoints": ["a", "b"]}, {"id": 2, "name": "q", "keypoints": ["c"]}, CAT | {"id": 3}]


BOX = {"bbox": [5, 5, 20, 20]}


@pytest.mark.parametrize(
    ("categories", "changes", "points", "counts"),
    [
        (POSE, BOX | {"keypoints": [9, 9, 2, 8, 8, 1]}, [9, 9, 2, 8, 8, 1], {}),
        (POSE, {"keypoints": [9, 9, 2, 12, 8, 1]}, [9, 9, 2, 12, 8, 1], {}),
        (POSE, BOX | {"category_id": 2, "keypoints": [9, 9, 2]}, [9, 9, 2], {}),
        (POSE, BOX | {"category_id": 3}, None, {}),
        (POSE, BOX | {"keypoints": [9, 9, 2, 41, 8, 1]}, [9, 9, 2, 0, 0, 0], {"keypoints": 1}),
        (POSE, BOX | {"keypoints": [9, 9, 2, 8]}, [0] * 6, {"keypoints": 1}),
        (POSE, BOX | {"category_id": 2, "keypoints": [9, 9, 2, 8, 8, 1]}, [0] * 3, {"keypoints": 1}),
        ([CAT], BOX | {"keypoints": [9, 9, 2, 8, 8, 1]}, [9, 9, 2, 8, 8, 1], {}),
    ],
)
def test_keypoints_of_each_class_go_through_yolo(
    tmp_path: Path, categories: list[dict[str, Any]], changes: dict[str, Any], points: Any, counts: dict[str, int]
) -> None:
    report = convert_data(write_objects(tmp_path / "coco", categories, changes), tmp_path / "x", to="yolo")
    assert report.counts == counts
    import_data(tmp_path / "x", tmp_path / "y", strict=True)
    (back,) = annotations(tmp_path / "y")
    assert back.get("keypoints") == points


def test_labels_of_images_in_a_folder_images_come_back(tmp_path: Path) -> None:
    coco = write_objects(tmp_path / "coco", [CAT], BOX, file_name="b/images/a.png")
    convert_data(coco, tmp_path / "x", to="yolo")
    assert len(list((tmp_path / "x").rglob("b/labels/a.txt"))) == 1
    report = import_data(tmp_path / "x", tmp_path / "y", strict=True)
    assert (report.annotations, report.notes) == (1, {})


def test_splits_of_any_name_come_back_through_yolo(tmp_path: Path) -> None:
    (tmp_path / "x" / "annotations").mkdir(parents=True)
    for split in ("train", "site"):
        picture(tmp_path / "x" / f"{split}.png")
        text = datumaro(type="bbox", label_id=0, bbox=[1, 2, 9, 9]).replace("a.png", f"{split}.png")
        (tmp_path / "x" / "annotations" / f"{split}.json").write_text(text)
    convert_data(tmp_path / "x", tmp_path / "y", to="yolo", format="datumaro")
    report = import_data(tmp_path / "y", tmp_path / "z")
    assert {split: count.annotations for split, count in report.splits.items()} == {"train": 1, "site": 1}


def test_boxes_among_masks_are_kept_or_filled(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n1 .1 .1 .4 .1 .4 .4\n"})
    report = import_data(root, tmp_path / "y")
    assert report.counts == {}
    assert report.notes == {"objects without a mask among objects with masks, used for boxes only": 1}
    first, second = read_coco(tmp_path / "y" / "annotations" / "instances_train.json", strict=True).annotations[1]
    assert (first.mask, first.bbox) == (None, (15, 10, 30, 20))
    assert second.mask is not None
    report = import_data(root, tmp_path / "z", box_masks=True)
    assert report.counts == {}
    assert annotations(tmp_path / "z")[0]["segmentation"] == [[15, 10, 45, 10, 45, 30, 15, 30]]
