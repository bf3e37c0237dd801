"""COCO files that are damaged or unusual, on import; what import and convert say of the folders that they find."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a2fpn.data import convert_data, import_data
from a2fpn.errors import DataError

SQUARE = [5, 5, 20, 5, 20, 20, 5, 20]
IMAGES = [{"id": number, "file_name": f"{number}.png", "height": 30, "width": 40} for number in (1, 2)]
POSE = {"id": 1, "name": "pose", "keypoints": ["a", "b"]}
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def write(root: Path, **content: Any) -> Path:
    (root / "images").mkdir(parents=True)
    for image in IMAGES:
        Image.new("RGB", (40, 30)).save(root / "images" / str(image["file_name"]))
    (root / "annotations").mkdir()
    data = {"images": IMAGES, "annotations": [], "categories": CATEGORIES} | content
    (root / "annotations" / "x.json").write_text(json.dumps(data))
    return root


def one(**fields: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 15, 15]} | fields


def imported(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "annotations" / "instances_train.json").read_text())
    return result


def test_a_single_polygon_needs_no_list(tmp_path: Path) -> None:
    report = import_data(write(tmp_path / "x", annotations=[one(segmentation=SQUARE)]), tmp_path / "y")
    assert report.counts == {}
    assert imported(tmp_path / "y")["annotations"][0]["segmentation"] == [SQUARE]


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"segmentation": [[5, 5, None, 5, 9, 9]]}, "unusable-mask", "a polygon has a coordinate that is not a number"),
        ({"segmentation": [["5", *SQUARE[1:]]]}, "unusable-mask", "a polygon has a coordinate that is not a number"),
        ({"segmentation": [5, None, 6, 5, 9, 9]}, "unusable-mask", "a polygon has a coordinate that is not a number"),
        ({"segmentation": 5}, "unusable-mask", "a segmentation is a list of polygons or an RLE, got 5"),
        ({"bbox": [1, 2, 3]}, "bad-annotation", "its bbox needs x, y, width and height, got 3 numbers"),
        ({"bbox": [1, 2, None, 3]}, "bad-annotation", r"its bbox must be a list of numbers, got \[1, 2, None, 3\]"),
        ({"bbox": 7}, "bad-annotation", "its bbox must be a list of numbers, got 7"),
        ({"keypoints": ["x"]}, "bad-annotation", "its keypoints must be a list of numbers"),
        ({"image_id": [1]}, "bad-annotation", r"its image_id must be an integer, got \[1\]"),
        ({"category_id": {}}, "bad-annotation", r"its category_id must be an integer, got \{\}"),
        ({"category_id": 9}, "bad-annotation", "its category 9 is not in the file"),
        ({"image_id": 9}, "unknown-image", "1 annotations of the image 9, which the file doesn't list"),
    ],
)
def test_damaged_annotations_are_counted(tmp_path: Path, fields: dict[str, Any], kind: str, message: str) -> None:
    damaged, whole = one(**fields), one(id=2, image_id=2)
    report = import_data(write(tmp_path / "x", annotations=[damaged, whole]), tmp_path / "y")
    assert report.counts == {kind: 1}
    (loss,) = report.losses
    assert kind == "unknown-image" or loss.place == "annotation 1"
    assert re.search(message, loss.detail)
    assert report.annotations == (2 if kind == "unusable-mask" else 1)


def test_an_annotation_without_an_image_is_counted(tmp_path: Path) -> None:
    lost = {key: value for key, value in one().items() if key != "image_id"}
    report = import_data(write(tmp_path / "x", annotations=[lost, one(id=2)]), tmp_path / "y")
    assert [loss.detail for loss in report.losses] == ["it lacks image_id; skipped"]
    assert report.annotations == 1


@pytest.mark.parametrize("image", [{"id": [1]}, {"width": 1e999}, {"height": "tall"}])
def test_damaged_images_are_counted(tmp_path: Path, image: dict[str, Any]) -> None:
    images = [IMAGES[0] | image, IMAGES[1]]
    report = import_data(write(tmp_path / "x", images=images, annotations=[one(image_id=2)]), tmp_path / "y")
    assert report.counts == {"bad-image": 1}
    assert report.annotations == 1


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([*CATEGORIES, {"id": 2, "name": "cow"}], "category 2 is listed twice; ids must be unique"),
        ([{"id": 2**70, "name": "cat"}], "a category needs an integer id, a name and a skeleton of pairs, got"),
        ([{"id": 1, "name": ""}], "a category needs an integer id, a name and a skeleton of pairs, got"),
        ([5], "a category needs an integer id, a name and a skeleton of pairs, got 5"),
        ([POSE | {"skeleton": [[1, 1e30]]}], "a skeleton of pairs, got"),
        ([POSE | {"skeleton": [[1, -(10**400)]]}], "a skeleton of pairs, got"),
        ([POSE | {"skeleton": [[1]]}], "a skeleton of pairs, got"),
        ([{"id": 1, "name": "\ud800"}], r"not valid JSON \(it has \\ud800, half of a character\)"),
    ],
)
def test_categories_that_cannot_be_read_stop_the_import(tmp_path: Path, categories: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_data(write(tmp_path / "x", categories=categories, annotations=[one()]), tmp_path / "y")


def test_categories_of_one_name_are_merged_and_noted(tmp_path: Path) -> None:
    twice = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
    objects = [one(), one(id=2, category_id=2, bbox=[8, 8, 9, 9])]
    report = import_data(write(tmp_path / "x", categories=twice, annotations=objects), tmp_path / "y")
    assert report.notes == {"classes with the name of another, merged with it": 1}
    assert imported(tmp_path / "y")["categories"] == twice[:1]
    assert [raw["category_id"] for raw in imported(tmp_path / "y")["annotations"]] == [1, 1]


def test_a_class_keeps_its_skeleton_when_another_file_has_its_id(tmp_path: Path) -> None:
    pose = {"id": 1, "name": "pose", "keypoints": ["a", "b"], "skeleton": [[1, 2]]}
    root = write(tmp_path / "x", annotations=[one(image_id=1)], images=IMAGES[:1])
    drawn = one(image_id=2, keypoints=[6, 6, 2, 8, 8, 2], num_keypoints=2)
    second = {"images": IMAGES[1:], "annotations": [drawn], "categories": [pose]}
    (root / "annotations" / "y.json").write_text(json.dumps(second))
    import_data(root, tmp_path / "y")
    (found,) = (raw for raw in imported(tmp_path / "y")["categories"] if raw["name"] == "pose")
    assert (found["keypoints"], found["skeleton"]) == (["a", "b"], [[1, 2]])
    assert found["id"] not in (1, 2)


def test_annotations_of_an_earlier_import_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "x", annotations=[one(), one(id=2, image_id=2)])
    assert import_data(source, tmp_path / "y", val=0.5).notes == {}
    assert import_data(source, tmp_path / "y", val=0.5, overwrite=True).notes == {}
    (note,) = import_data(source, tmp_path / "y", overwrite=True).notes
    assert re.match(r"instances_val\.json from before stays in .*annotations; delete it if it is from an earlier", note)


@pytest.mark.parametrize("format", ["yolo", "voc", "labelme", "labels", "mask_files", "cvat", "datumaro", "panoptic"])
def test_labels_of_an_earlier_conversion_are_named(tmp_path: Path, format: str) -> None:
    objects = [one(segmentation=[SQUARE]), one(id=2, image_id=2, segmentation=[SQUARE])]
    both = write(tmp_path / "both", annotations=objects)
    first = write(tmp_path / "first", annotations=objects[:1], images=IMAGES[:1])
    (first / "images" / "2.png").unlink()
    out = tmp_path / "out"
    convert_data(both, out, to=format)
    assert not [note for note in convert_data(both, out, to=format, overwrite=True).notes if "before" in note]
    stays = [note for note in convert_data(first, out, to=format, overwrite=True).notes if "files from before" in note]
    assert bool(stays) == any(path.stem == "2" for path in out.rglob("*"))
    assert len(stays) == 1


def test_label_images_of_one_value_are_noted(tmp_path: Path) -> None:
    for number in range(3):  # the first shows nothing
        for folder in ("images", "masks"):
            (tmp_path / "x" / folder).mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 30), 255 * (number > 0)).save(tmp_path / "x" / folder / f"{number}.png")
    notes = import_data(tmp_path / "x", tmp_path / "y").notes
    assert notes == {"images with a single label, no image with more: if it marks all objects, number them": 2}


def test_a_file_away_from_its_images_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "x", annotations=[one(segmentation=[SQUARE])])
    alone = tmp_path / "alone" / "few.json"
    alone.parent.mkdir()
    alone.write_bytes((source / "annotations" / "x.json").read_bytes())
    Image.new("RGB", (40, 30)).save(alone.parent / "plot.png")  # no image of the data set
    message = "no image was read; 2 missing-image: .* Images are searched for in the given folder, or in that of the"
    with pytest.raises(DataError, match=message):
        import_data(alone, tmp_path / "y")
    with pytest.raises(DataError, match=message):
        convert_data(alone, tmp_path / "z", to="yolo")


def test_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x" / "cvat.zip"
    path.parent.mkdir()
    path.write_bytes(b"PK")
    for source in (path, path.parent):
        with pytest.raises(DataError, match="an archive; unpack it and import the folder"):
            import_data(source, tmp_path / "y")


def test_names_with_spaces_and_masks_in_upper_case_come_back_from_voc(tmp_path: Path) -> None:
    source = write(
        tmp_path / "x", annotations=[one(segmentation=[SQUARE]), one(id=2, image_id=2, segmentation=[SQUARE])]
    )
    report = import_data(source, tmp_path / "y", val=0.5)
    assert {split: count.images for split, count in report.splits.items()} == {"train": 1, "val": 1}
    voc = tmp_path / "voc"
    convert_data(tmp_path / "y", voc, to="voc", images="copy")
    for path in [*voc.rglob("[12].*")]:
        path.rename(path.with_name(f"a {path.stem}{path.suffix.upper() if 'Object' in str(path) else path.suffix}"))
    for path in [*voc.rglob("Annotations/*.xml")]:
        path.write_text(path.read_text().replace("<filename>", "<filename>a "))
    for path in [*voc.rglob("ImageSets/*/*.txt")]:
        path.write_text("".join(f"a {line}  1\n" for line in path.read_text().split()))
    (voc / "image_ids.json").unlink(missing_ok=True)
    again = import_data(voc, tmp_path / "z")
    assert {split: count.images for split, count in again.splits.items()} == {"train": 1, "val": 1}
    assert sum(count.masks for count in again.splits.values()) == 2


def as_downloaded(root: Path, *kinds: str) -> Path:
    """Write COCO's own layout, with an image per split and the files of the given kinds."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        Image.new("RGB", (40, 30)).save(root / f"{split}2017" / f"{split}.jpg")
        image = {"id": 1, "file_name": f"{split}.jpg", "height": 30, "width": 40}
        contents: dict[str, dict[str, Any]] = {
            "instances": {"annotations": [one(), one(id=2, category_id=2)], "categories": CATEGORIES},
            "person_keypoints": {"annotations": [one(keypoints=[5, 5, 2, 0, 0, 0])], "categories": [POSE]},
            "stuff": {"annotations": [one(id=7)], "categories": [{"id": 1, "name": "sky"}]},
            "captions": {"annotations": [{"id": 1, "image_id": 1, "caption": "a thing"}]},
        }
        for kind in kinds:
            data = {"info": {}, "images": [image], **contents[kind]}
            (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(data))
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps({"images": [], "categories": []}))
    return root


def test_coco_as_downloaded(tmp_path: Path) -> None:
    root = as_downloaded(tmp_path / "x", "captions", "instances", "person_keypoints", "stuff")
    report = import_data(root, tmp_path / "y")
    assert (report.format, report.images, report.annotations, report.counts) == ("coco", 2, 4, {})
    assert set(report.splits) == {"train", "val"}
    assert list(report.categories.values()) == ["cat", "dog"]
    (note,) = report.notes
    assert note.startswith("files left out")
    assert report.notes[note] == 7


def test_keypoints_without_instances_are_read(tmp_path: Path) -> None:
    report = import_data(as_downloaded(tmp_path / "x", "captions", "person_keypoints"), tmp_path / "y")
    assert (report.images, report.annotations, report.counts, set(report.splits)) == (2, 2, {}, {"train", "val"})
    assert list(report.categories.values()) == ["pose"]


def test_a_file_given_by_its_path_is_read(tmp_path: Path) -> None:
    root = as_downloaded(tmp_path / "x", "instances", "person_keypoints")
    report = import_data(root / "annotations" / "person_keypoints_val2017.json", tmp_path / "y")
    assert (report.annotations, list(report.splits)) == (1, ["val"])


def test_captions_alone_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2017\.json: not a COCO file; expected the lists"):
        import_data(as_downloaded(tmp_path / "x", "captions"), tmp_path / "y")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_val2017", "val"),
        ("livecell_coco_val", "val"),
        ("validation_annotations", "val"),
        ("annotations-test", "test"),
        ("_annotations.coco.train", "train"),
        ("train_val", "train"),  # both are named: as without a name
        ("contest", "train"),
        ("labels", "train"),
    ],
)
def test_the_split_is_a_word_of_the_name(tmp_path: Path, name: str, split: str) -> None:
    root = write(tmp_path / "x", annotations=[one()])
    (root / "annotations" / "x.json").rename(root / "annotations" / f"{name}.json")
    assert list(import_data(root, tmp_path / "y").splits) == [split]
