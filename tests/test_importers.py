"""Imports: every format comes back as it was written; damaged members are named and counted."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from a2fpn.cli import main
from a2fpn.data import check_data, read_coco, read_image
from a2fpn.data.exporters import EXPORTERS, convert_data, export_images
from a2fpn.data.exporters.rings import bridge, to_one_ring, trace
from a2fpn.data.importers import IMPORTERS, detect, import_data, list_formats
from a2fpn.data.importers.files import ImageIndex, image_size
from a2fpn.data.importers.label_studio import pack_runs, unpack_runs
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject
from a2fpn.data.splits import assign_splits
from a2fpn.errors import DataError
from a2fpn.masks.rle import decode_rle, encode_masks
from a2fpn.masks.segmentation import segmentation_to_rle
from tests.coco_data import write_coco

NO_CROWDS = {"yolo", "labels", "mask_files"}
ONE_NUMBER_A_PIXEL = {"labels", "panoptic", "voc"}
ONLY_MASKS = {"labels", "mask_files", "panoptic"}
FORMATS = EXPORTERS.names()


def ring_and_parts() -> tuple[dict[str, Any], np.ndarray, list[list[float]]]:
    """A ring with a hole as RLE, and an object of two polygons, apart from each other."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:25, 5:30] = True
    mask[10:15, 10:20] = False
    mask[18:20, 12:16] = False
    rle = {**encode_masks(mask[None])[0]}
    parts = [[35.5, 5, 45, 5, 45, 12, 35.5, 12], [48, 20, 58, 20, 55.25, 30]]
    return rle, mask, parts


def write_set(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A COCO folder with holes, parts, a crowd, sub-folders, a background, and ids that leave gaps."""
    rle, _, parts = ring_and_parts()
    crowd = encode_masks((np.arange(40)[:, None] >= 33).repeat(60, 1)[None])[0]
    categories = [{"id": 3, "name": "cell"}, {"id": 17, "name": "stop sign", "supercategory": "things"}]
    for number, split in enumerate(splits):
        data: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for index in range(3):
            name = f"site_{index}/{split}{index}.png"
            path = root / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(10 * number + index).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            image_id = 100 * number + index + 1
            data["images"].append({"id": image_id, "file_name": name, "height": 40, "width": 60})
            if index == 2:
                continue
            for category, segmentation, is_crowd in ((17, rle, 0), (3, parts, 0), (3, crowd, 1)):
                full = decode_rle([segmentation_to_rle(segmentation, 40, 60)])[0]
                ys, xs = np.nonzero(full)
                box = [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": box,
                        "area": int(full.sum()),
                        "iscrowd": is_crowd,
                        "segmentation": segmentation,
                    }
                )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def objects(folder: Path, split: str) -> dict[str, list[tuple[str, bool, np.ndarray]]]:
    """Class, crowd flag and pixels of every object, by file name."""
    coco = read_coco(folder / "annotations" / f"instances_{split}.json", strict=True)
    names = {category.id: category.name for category in coco.categories}
    return {
        entry.file_name: [
            (names[a.category_id], a.iscrowd, decode_rle([a.rle])[0] if a.rle else np.zeros(0))
            for a in coco.annotations[image_id]
        ]
        for image_id, entry in coco.images.items()
    }


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_set(tmp_path / "coco")


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_can_hold_comes_back_to_the_pixel(coco: Path, tmp_path: Path, name: str) -> None:
    written = convert_data(coco, tmp_path / name, to=name)
    assert detect(tmp_path / name) == name
    report = import_data(tmp_path / name, tmp_path / "back")
    assert report.format == name
    assert not report.counts
    assert report.categories == {3: "cell", 17: "stop sign"}
    assert written.counts == ({"crowd": 4} if name in NO_CROWDS else {})
    for split in ("train", "val"):
        before, after = objects(coco, split), objects(tmp_path / "back", split)
        ids = [read_coco(root / "annotations" / f"instances_{split}.json").images for root in (coco, tmp_path / "back")]
        assert dict(ids[1]) == dict(ids[0])
        assert list(after) == list(before)
        for file, old in before.items():
            kept = [item for item in old if not (item[1] and name in NO_CROWDS)]
            new = after[file]
            if name in ("labels", "mask_files"):  # grouped by class
                kept, new = (sorted(part, key=lambda item: item[0]) for part in (kept, new))
            assert [item[:2] for item in new] == [item[:2] for item in kept]
            for (*_, mask), (*_, wanted) in zip(new, kept, strict=True):
                assert (mask == wanted).all()
        found = check_data(
            tmp_path / "back" / "images", tmp_path / "back" / "annotations" / f"instances_{split}.json", decode=True
        )
        assert not found.errors


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversion_is_the_same_each_time(coco: Path, tmp_path: Path, name: str) -> None:
    for number in (1, 2):
        convert_data(coco, tmp_path / f"{name}{number}", to=name)
        import_data(tmp_path / f"{name}{number}", tmp_path / f"back{number}", val=0)
    first, second = (
        (tmp_path / f"back{number}" / "annotations" / "instances_val.json").read_bytes() for number in (1, 2)
    )
    assert first == second


@pytest.mark.parametrize("name", sorted(ONE_NUMBER_A_PIXEL))
def test_what_lies_under_others_is_reported(tmp_path: Path, name: str) -> None:
    root = write_set(tmp_path / "coco", ("train",))
    path = root / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    data["categories"] = data["categories"][:1]
    over = {"segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]], "bbox": [0, 0, 20, 20], "category_id": 3, "image_id": 3}
    under = {"segmentation": [[0, 0, 30, 0, 30, 30, 0, 30]], "bbox": [0, 0, 30, 30], "category_id": 3, "image_id": 3}
    data["annotations"] = [{"id": 1, **over}, {"id": 2, **under}]
    path.write_text(json.dumps(data))
    report = convert_data(root, tmp_path / name, to=name)
    assert report.counts == {"overlap": 1}
    assert "400 of its 900 pixels are covered by other objects" in str(report)


@pytest.mark.parametrize("name", ["cvat", "datumaro", "labelme", "yolo"])
def test_keypoints_come_back(tmp_path: Path, name: str) -> None:
    root = write_set(tmp_path / "coco", ("train",))
    path = root / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    data["categories"] = [{"id": 1, "name": "person", "keypoints": ["nose", "eye", "ear"], "skeleton": [[1, 2]]}]
    points = [10.5, 20.25, 2, 12, 22, 1, 0, 0, 0]
    box = {"bbox": [5, 6, 30, 20], "image_id": 1, "category_id": 1, "keypoints": points, "num_keypoints": 2}
    data["annotations"] = [{"id": 1, "iscrowd": 0, "area": 600, **box}]
    path.write_text(json.dumps(data))
    report = convert_data(root, tmp_path / name, to=name)
    assert not report.counts
    import_data(tmp_path / name, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "annotations" / "instances_train.json").read_text())
    assert back["categories"] == data["categories"]
    (annotation,) = back["annotations"]
    assert annotation["keypoints"] == points
    assert annotation["bbox"] == [5, 6, 30, 20]


OUTLINE = [5, 5, 20, 5, 20, 20, 5, 20]


def small_set(
    root: Path, names: list[str], entries: list[dict[str, Any]], categories: list[dict[str, Any]] | None = None
) -> Path:
    """A COCO folder of images of 40 x 30 pixels; an entry without image_id belongs to the first."""
    for name in names:
        picture(root / "images" / name, (40, 30))
    data = {
        "images": [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names, 1)],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, **entry} for n, entry in enumerate(entries, 1)],
        "categories": categories or [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    return root


def square(image: int = 1, category: int = 1, **entry: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [5, 5, 15, 15], "segmentation": [OUTLINE], **entry}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "a.jpg", "a.jpg.png", "a_2.png"],
        ["A.png", "a.png", "sub/a.png"],
        ["00001.png", "a_00001.png", "a.png"],
        ["face.png", "face_mask.jpg", "x_gt.png", "y-seg.png", "z_labels.png"],
        [".hidden.png", "categories.png", "image_ids.png"],
    ],
)
def test_no_image_takes_the_files_of_another(tmp_path: Path, name: str, names: list[str]) -> None:
    if names[0] == "A.png" and name not in ("cvat", "labels", "labelstudio", "mask_files", "yolo"):
        names = names[:2]  # these find no a.png beside sub/a.png, and report it
    classes = ["cat"] if name == "mask_files" else ["cat", "dog"]  # one has no folder of its own
    entries = [square(n, 1 + n % len(classes)) for n in range(1, len(names) + 1)]
    categories = [{"id": n, "name": text} for n, text in enumerate(classes, 1)]
    written = convert_data(small_set(tmp_path / "coco", names, entries, categories), tmp_path / "x", to=name)
    back = import_data(tmp_path / "x", tmp_path / "y")
    assert (back.format, back.images, back.annotations, back.counts) == (name, len(names), len(names), {})
    data = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    assert {raw["image_id"]: raw["category_id"] for raw in data["annotations"]} == {
        entry["image_id"]: entry["category_id"] for entry in entries
    }
    renamed = {raw["file_name"] for raw in data["images"]} - set(names)
    assert written.counts == ({"image-name": len(renamed)} if renamed else {})
    for file in renamed:
        assert f" is written as {file}, as " in str([str(loss) for loss in written.losses])


def test_names_of_images_are_kept_where_only_stems_agree(tmp_path: Path) -> None:
    root = small_set(tmp_path / "coco", ["a.png", "a.jpg"], [square(1), square(2)])
    for name in ("cvat", "datumaro", "labelstudio", "mask_files"):
        assert not convert_data(root, tmp_path / name, to=name).counts


@pytest.mark.parametrize("name", FORMATS)
def test_images_of_one_name_in_two_splits_are_exported(tmp_path: Path, name: str) -> None:
    for number, split in enumerate(("train", "valid")):
        picture(tmp_path / "in" / split / "a.png", (40, 30))
        data = {
            "images": [{"id": number, "file_name": "a.png", "height": 30, "width": 40}],
            "annotations": [square(number, 1 + number)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        (tmp_path / "in" / split / "_annotations.coco.json").write_text(json.dumps(data))
    convert_data(tmp_path / "in", tmp_path / "x", to=name, format="coco")
    back = import_data(tmp_path / "x", tmp_path / "y")
    assert {split: (count.images, count.annotations) for split, count in back.splits.items()} == {
        "train": (1, 1),
        "val": (1, 1),
    }
    assert [raw["category_id"] for raw in annotations(tmp_path / "y", "val")] == [2]


@pytest.mark.parametrize(("name", "split"), [("../../up/a.png", ""), ("{root}/up/a.png", ""), ("a.png", "../up")])
def test_no_file_is_written_outside_the_output(tmp_path: Path, name: str, split: str) -> None:
    name = name.format(root=tmp_path)
    image = LabeledImage(picture(tmp_path / "a.png"), name, 40, 60, [LabeledObject("cat", (1, 1, 5, 5))], split)
    for format in FORMATS:
        output = tmp_path / "out" / "in" / format
        export_images([image], output, format=format, categories=[CategoryInfo("cat")])
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["in"]
    assert {path.name for path in (tmp_path / "out" / "in").iterdir()} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_any_class_has_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    names = ["mask", "no_mask", "..", ".", "a/b", "a_b", "a%2Fb", "images", "labels", "train", "a", "100%"]
    categories = [{"id": n, "name": text} for n, text in enumerate(names, 1)]
    files = [f"{n}.png" for n in range(len(names))] + ["a/0.png"]
    entries = [square(n, n) for n in range(1, len(names) + 1)]
    assert not convert_data(small_set(tmp_path / "coco", files, entries, categories), tmp_path / "x", to=name).counts
    back = import_data(tmp_path / "x", tmp_path / "y", format=name, unlabeled="keep")
    assert back.categories == dict(enumerate(names, 1))
    if name in ("cvat", "labels", "labelstudio", "mask_files", "yolo"):  # as above
        assert {raw["image_id"]: raw["category_id"] for raw in annotations(tmp_path / "y")} == {
            n: n for n in range(1, len(names) + 1)
        }


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversion_drops_what_the_reader_drops(tmp_path: Path, name: str) -> None:
    entries = [
        square(segmentation=[OUTLINE, [5, 5, 6, 6]]),
        square(segmentation=[OUTLINE[:7]], bbox=[1, 1, 9, 9]),
        square(segmentation={"size": [30, 40], "counts": [7]}, bbox=[2, 2, 9, 9]),
        {"bbox": [100, 100, 5, 5]},
        {"category_id": 2},
        {"category_id": 2, "keypoints": [1, 2, 3, 4]},
        {"category_id": 2, "bbox": [3, 3, 9, 9], "keypoints": [1, 2, 2] * 3},
        {"category_id": 2, "bbox": [4, 4, 9, 9], "keypoints": [math.nan, 2, 2]},
        {"category_id": 2, "keypoints": [9, 9, 2, 14, 14, 2]},
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "keypoints": ["nose", "tail"]}]
    report = convert_data(small_set(tmp_path / "coco", ["a.png"], entries, categories), tmp_path / "x", to=name)
    losses = [str(loss) for loss in report.losses]
    assert report.counts["unusable-mask"] == 3
    assert report.counts["unusable-object"] == 3
    for place, message in (
        ("annotation 1", "got 4 numbers; kept without that"),
        ("annotation 3", "the run lengths of the mask add up to 7 pixels, the image has 30 x 40 = 1200"),
        ("annotation 4", "lies outside the image of 40 x 30 pixels; skipped"),
        ("annotation 5", "it has neither box nor mask; skipped"),
        ("annotation 6", "4 numbers are not x, y and visibility of 2 keypoints; kept without them"),
        ("annotation 7", "9 numbers are not x, y and visibility of 2 keypoints; kept without them"),
        ("annotation 8", "3 numbers are not x, y and visibility of 2 keypoints; kept without them"),
    ):
        assert [text for text in losses if f", {place}: " in text and message in text], (place, losses)
    import_data(tmp_path / "x", tmp_path / "y")
    boxes = [raw["bbox"] for raw in annotations(tmp_path / "y")]
    wanted = [[1, 1, 9, 9], [2, 2, 9, 9], [3, 3, 9, 9], [4, 4, 9, 9], [5, 5, 15, 15], [8, 8, 7, 7]]
    assert sorted(boxes) == ([[5, 5, 15, 15]] if name in ONLY_MASKS else wanted)


@pytest.mark.parametrize("name", ["cvat", "datumaro", "labelme", "labelstudio", "voc", *sorted(ONLY_MASKS)])
def test_a_box_that_is_not_that_of_its_mask_is_kept_or_reported(tmp_path: Path, name: str) -> None:
    rle = {"size": [30, 40], "counts": [905, 10, 285]}
    other = [22, 2, 30, 2, 30, 10, 22, 10]
    entries = [
        square(bbox=[1, 1, 25, 25]),
        square(category=2, segmentation=rle, bbox=[25, 0, 15, 30]),
        square(segmentation=[other], bbox=[21.5, 2, 9, 8]),  # by rounding
    ]
    report = convert_data(small_set(tmp_path / "coco", ["a.png"], entries), tmp_path / "x", to=name)
    assert report.counts == ({"box": 2} if name in ONLY_MASKS else {})
    import_data(tmp_path / "x", tmp_path / "y")
    back = annotations(tmp_path / "y")
    assert all("segmentation" in raw for raw in back)
    if name not in ONLY_MASKS:
        assert [raw["bbox"] for raw in back[:2]] == [[1, 1, 25, 25], [25, 0, 15, 30]]
        assert name == "voc" or back[2]["bbox"] == [22, 2, 8, 8]


@pytest.mark.parametrize("name", sorted({*ONLY_MASKS, "voc"}))
def test_masks_between_pixels_are_reported(tmp_path: Path, name: str) -> None:
    entry = square(segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], bbox=[5, 5, 1, 1])
    report = convert_data(small_set(tmp_path / "coco", ["a.png"], [entry]), tmp_path / "x", to=name)
    assert report.counts == {"mask": 1}
    assert "its mask covers no pixel" in str(report)


@pytest.mark.parametrize("name", ["cvat", "datumaro", "labelme", "yolo"])
def test_keypoints_without_names_keep_their_order(tmp_path: Path, name: str) -> None:
    every = [number for n in range(12) for number in (n + 1, n + 2, 2)]
    some = [0, 0, 0] + every[3:-3] + [0, 0, 0]
    root = small_set(tmp_path / "coco", ["a.png", "b.png"], [square(1, keypoints=some), square(2, keypoints=every)])
    report = convert_data(root, tmp_path / "x", to=name)
    assert report.notes == {"classes whose keypoints have no names, now point 1, point 2, ...": 1}
    import_data(tmp_path / "x", tmp_path / "y")
    assert [raw["keypoints"] for raw in annotations(tmp_path / "y")] == [some, every]


def test_mask_files_are_written_again(tmp_path: Path) -> None:
    for entries in ([square(), square(category=2)], [square()], [square()]):
        shutil.rmtree(tmp_path / "coco", ignore_errors=True)
        root = small_set(tmp_path / "coco", ["a.png"], entries)
        convert_data(root, tmp_path / "x", to="mask_files", overwrite=True)
        back = import_data(tmp_path / "x", tmp_path / "y", overwrite=True)
        assert (back.images, back.annotations, back.counts) == (1, len(entries), {})


def test_names_of_formats_are_checked(tmp_path: Path, coco: Path) -> None:
    assert set(EXPORTERS) | {"coco"} == set(IMPORTERS) == set(list_formats())
    with pytest.raises(ValueError, match=r"Unknown export format 'yollo'\. Did you mean 'yolo'"):
        convert_data(coco, tmp_path / "x", to="yollo")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "a.xyz").write_bytes(b"")
    with pytest.raises(DataError, match=r"unknown format; expected one of coco, .* found 1 \.xyz"):
        detect(tmp_path / "y")


def test_images_are_linked_or_copied_and_output_is_guarded(coco: Path, tmp_path: Path) -> None:
    for placing in ("link", "copy"):
        import_data(coco, tmp_path / placing, images=placing)  # type: ignore[arg-type]
        path = tmp_path / placing / "images" / "site_0" / "train0.png"
        assert path.is_symlink() == (placing == "link")
        assert path.read_bytes() == (coco / "images" / "site_0" / "train0.png").read_bytes()
    with pytest.raises(DataError, match="link is not empty; choose another folder, or overwrite it"):
        import_data(coco, tmp_path / "link")
    # Copies take the place of links, and never write through them into the source.
    before = (coco / "images" / "site_0" / "train0.png").read_bytes()
    import_data(coco, tmp_path / "link", images="copy", overwrite=True)
    assert not path.is_symlink()
    assert (coco / "images" / "site_0" / "train0.png").read_bytes() == before
    with pytest.raises(DataError, match="is inside the source"):
        import_data(coco, coco / "out")


# Splits


def test_splits_depend_on_names_and_not_on_order() -> None:
    names = [f"site_{i % 7}/img{i}.png" for i in range(70)]
    splits = dict(zip(names, assign_splits(names, val=0.2, group_by=r"site_(\d+)"), strict=True))
    turned = dict(zip(names[::-1], assign_splits(names[::-1], val=0.2, group_by=r"site_(\d+)"), strict=True))
    assert splits == turned
    groups = {name.split("/")[0]: split for name, split in splits.items()}
    assert all(groups[name.split("/")[0]] == split for name, split in splits.items())
    assert {"train", "val"} == set(splits.values())
    assert assign_splits(names, val=0.2) != assign_splits(names, val=0.2, seed=1)


@given(st.integers(2, 60), st.floats(0.01, 0.6), st.floats(0, 0.35))
@settings(max_examples=50, deadline=None)
def test_shares_are_met_by_one_image(count: int, val: float, test: float) -> None:
    splits = assign_splits([f"{i}.png" for i in range(count)], val=val, test=test)
    assert splits.count("train") >= 1
    assert abs(splits.count("val") - val * count) <= 1
    if count > 2:
        assert abs(splits.count("test") - test * count) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 1.0}, r"val must lie in \(0, 1\)"),
        ({"val": 0.5, "test": 0.5}, "their sum below 1"),
        ({"val": 0.2, "group_by": "("}, "is not a valid regular expression"),
        ({"val": 0.2, "group_by": "slide"}, "matches no image name; the first is 'a'"),
        ({"val": 0.2, "group_by": "^"}, "2 images are 1 group; a split needs two or more"),
    ],
)
def test_splits_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        assign_splits(["a", "b"], **options)


def test_a_source_without_splits_gets_them(tmp_path: Path) -> None:
    yolo(tmp_path / "x", {f"site_{i % 3}_{i}": "0 .5 .5 .5 .5\n" for i in range(9)})
    report = import_data(tmp_path / "x", tmp_path / "y", val=0.3, group_by=r"site_(\d)")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 6, "val": 3}
    convert_data(write_set(tmp_path / "z"), tmp_path / "w", to="yolo")
    with pytest.raises(DataError, match=r"splits train, val; omit val and test \(--val, --test\) to keep"):
        import_data(tmp_path / "w", tmp_path / "v", val=0.3)


# YOLO


def yolo(root: Path, labels: dict[str, str | bytes], *, names: str | None = "names: [cat, dog]\n") -> Path:
    """A YOLO folder with an image for each label file."""
    for name, text in labels.items():
        picture(root / "images" / f"{name}.png")
        path = root / "labels" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if names is not None:
        (root / "data.yaml").write_text(names)
    return root


def picture(path: Path, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def annotations(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())[
        "annotations"
    ]
    return result


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


def write_objects(root: Path, categories: list[dict[str, Any]], *annotations: dict[str, Any], **image: Any) -> Path:
    """A COCO folder with one image of 40 x 30 pixels."""
    entry = {"id": 1, "file_name": "a.png", "height": 30, "width": 40} | image
    picture(root / "images" / entry["file_name"], (40, 30))
    listed = [{"id": number, "image_id": 1, "category_id": 1, **raw} for number, raw in enumerate(annotations, 1)]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": [entry], "annotations": listed, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


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


# Damaged members of the other formats


def labelme(shapes: list[dict[str, Any]], **changes: Any) -> str:
    record = {"version": "5.5.0", "shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 60}
    return json.dumps(record | changes)


SQUARE = [[1, 1], [9, 1], [9, 9], [1, 9]]
VOC = (
    "<annotation><filename>a.png</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>9</xmax><ymax>{}</ymax></bndbox></object></annotation>"
)
CVAT = '<annotations>\n<image name="{}" width="{}" height="40">\n{}\n</image></annotations>'
STUDIO = {
    "type": "rectanglelabels",
    "original_width": 60,
    "original_height": 40,
    "value": {"x": 0, "y": 0, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]},
}


def datumaro(**annotation: Any) -> str:
    labels = {"label": {"labels": [{"name": "cat"}]}}
    item = {"id": "a", "annotations": [annotation], "image": {"path": "a.png", "size": [40, 60]}}
    return json.dumps({"categories": labels, "items": [item]})


def studio(**changes: Any) -> str:
    return json.dumps(
        [{"id": 5, "data": {"image": "/data/upload/1/12345678-a.png"}, "annotations": [{"result": [STUDIO | changes]}]}]
    )


@pytest.mark.parametrize(
    ("name", "file", "content", "loss"),
    [
        (
            "labelme",
            "a.json",
            labelme([{"label": "cat", "points": SQUARE[:2]}]),
            "shapes[0]: a polygon needs 3 points, got 2",
        ),
        ("labelme", "a.json", labelme([{"label": "cat", "points": [[1, "x"]]}]), "points must be pairs of numbers"),
        ("labelme", "a.json", labelme([{"label": "", "points": SQUARE}]), "shapes[0]: it has no label, got ''"),
        (
            "labelme",
            "a.json",
            labelme([{"label": "c", "points": SQUARE, "shape_type": "linestrip"}]),
            "a linestrip is not supported",
        ),
        ("labelme", "a.json", labelme([], imageHeight=41), "it gives 60 x 41 pixels, a.png has 60 x 40"),
        ("labelme", "a.json", labelme([], imagePath="..\\b.png")[:-5], "not valid JSON"),
        ("labelme", "b.json", labelme([], imagePath="C:\\x\\b.png"), "image 'C:\\\\x\\\\b.png' not found"),
        ("labelme", "a.json", "", "the file is empty"),
        ("voc", "a.xml", VOC.format("x"), "line 1: object 1: ymax is 'x', expected a number"),
        ("voc", "a.xml", VOC.format("-3"), "object 1: its box from 1, 1 to 9, -3 has no area"),
        ("voc", "a.xml", VOC.format(9).replace("cat", ""), "object 1: it has no name"),
        ("voc", "a.xml", VOC.format(9)[:-5], "line 1: invalid XML"),
        ("voc", "a.xml", VOC.format(9).replace("a.png", "D:\\b.png"), None),
        ("cvat", "x.xml", CVAT.format("b.png", 60, ""), "image 'b.png': image 'b.png' not found"),
        ("cvat", "x.xml", CVAT.format("a.png", 61, ""), "it gives 61 x 40 pixels, a.png has 60 x 40"),
        ("cvat", "x.xml", CVAT.format("a.png", 60, '<polygon label="c" points="1,2;3,4;5"/>'), "it has 5 coordinates"),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<polyline label="c" points="1,2;3,4"/>'),
            "a polyline is not supported",
        ),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<box label="c" xtl="1" ytl="q"/>'),
            "ytl is 'q', expected a number",
        ),
        (
            "cvat",
            "x.xml",
            CVAT.format("a.png", 60, '<mask label="c" rle="0, 9" left="0" top="0" width="2" height="2"/>'),
            "its runs add up to 9 pixels, its window has 4",
        ),
        ("cvat", "x.xml", CVAT.format("a.png", 60, "")[:-9], "line 4: invalid XML"),
        (
            "datumaro",
            "annotations/train.json",
            datumaro(type="polygon", label_id=0, points=[1, 2, 3]),
            "pairs x, y, got 3",
        ),
        ("datumaro", "annotations/train.json", datumaro(type="bbox", label_id=4, bbox=[1, 2, 3, 4]), "label_id is 4"),
        ("datumaro", "annotations/train.json", datumaro(type="polyline", label_id=0), "a polyline is not supported"),
        ("labelstudio", "x.json", studio(value={"rectanglelabels": ["cat"], "x": 0}), "it lacks y"),
        ("labelstudio", "x.json", studio(original_width=61), "drawn on 61 x 40 pixels, the image has 60 x 40"),
        ("labelstudio", "x.json", studio(type="keypointlabels"), "keypointlabels is not supported"),
        (
            "labelstudio",
            "x.json",
            studio(type="brushlabels", value={"brushlabels": ["c"], "format": "rle", "rle": [0]}),
            "is truncated",
        ),
    ],
)
def test_damaged_members_are_named_and_left_out(
    tmp_path: Path, name: str, file: str, content: str, loss: str | None
) -> None:
    root = tmp_path / "x"
    for image in ("a.png", "untouched.png"):
        picture(root / image)
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("\ufeff" + content, encoding="utf-8")
    if loss is None:
        assert import_data(root, tmp_path / "y", format=name).counts == {}
        return
    report = import_data(root, tmp_path / "y", format=name, unlabeled="keep")
    (found,) = report.losses
    assert found.file == str(root / file)
    assert loss in str(found)
    assert "\n" not in str(found)
    record = json.loads((tmp_path / "y" / "import_report.json").read_text())
    assert record["files"] == {str(root / file): {found.kind: 1}}


@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "labelstudio", "labels", "datumaro"])
def test_images_without_labels_wait_for_them(tmp_path: Path, name: str) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to=name)
    picture(tmp_path / "x" / "later.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.images, sum(report.notes.values())) == (3, 1)
    report = import_data(tmp_path / "x", tmp_path / "z", unlabeled="keep")
    assert (report.images, report.splits["train"].empty) == (4, 2)


def test_xml_with_entities_of_its_own_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    bomb = '<!DOCTYPE a [<!ENTITY b "c">]>\n<annotations>&b;</annotations>'
    (tmp_path / "x" / "a.xml").write_text(bomb)
    with pytest.raises(DataError, match="defines XML entities"):
        import_data(tmp_path / "x", tmp_path / "y")


# Malformed records and odd names


def panoptic(root: Path, segments: Any, *, name: str = "a.png", category: Any = None, file: str = "x") -> Path:
    """A panoptic set of one image, whose map has the ids 1 in its left half and 2 in its right half."""
    picture(root / "images" / name)
    ids = np.zeros((40, 60, 3), np.uint8)
    ids[:, :30, 0], ids[:, 30:, 0] = 1, 2
    (root / file).mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(root / file / "a.png")
    data = {
        "images": [{"id": 1, "file_name": name, "height": 40, "width": 60}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [category or {"id": 1, "name": "cat", "isthing": 1}],
    }
    (root / f"{file}.json").write_text(json.dumps(data))
    return root


SEGMENTS = [{"id": 1, "category_id": 1, "iscrowd": 0}, {"id": 2, "category_id": 1, "iscrowd": 0}]


def task(**changes: Any) -> str:
    return json.dumps([{"id": 5, "data": {"image": "a.png"}, "annotations": [{"result": [STUDIO]}]} | changes])


def datumaro_file(**changes: Any) -> str:
    return json.dumps(json.loads(datumaro(type="bbox", label_id=0, bbox=[1, 2, 3, 4])) | changes)


LABELS = {"label": {"labels": [{"name": "cat"}]}}
POLYGON = {"type": "polygon", "label_id": 0, "points": [1, 2, 9, 2, 9, 9]}
CAT_SHAPE = {"label": "cat", "points": SQUARE}
NOSE_SHAPE = {"label": "nose", "points": [[3, 3]], "shape_type": "point"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
CVAT_MASK = '<mask label="c" rle="{}" left="{}" top="0" width="2" height="2"/>'


@pytest.mark.parametrize(
    ("name", "content", "kind", "loss"),
    [
        (
            "labelme",
            labelme([{**CAT_SHAPE, "group_id": [1]}]),
            "bad-shape",
            "shapes[0]: its group is [1], expected a number",
        ),
        (
            "labelme",
            labelme([{**CAT_SHAPE, "points": [[math.inf] * 2] * 2, "shape_type": "mask", "mask": PNG}]),
            "bad-shape",
            "shapes[0]: a value of the wrong type or size (cannot convert float infinity",
        ),
        ("labelme", labelme([{**CAT_SHAPE, "label": "\ud800"}]), "unreadable-labels", "half of a character"),
        (
            "labelme",
            labelme([CAT_SHAPE, NOSE_SHAPE | {"group_id": 4}]),
            "bad-shape",
            "shapes[1]: the group 4 of the point has no obj",
        ),
        (
            "labelme",
            labelme([CAT_SHAPE | {"group_id": 4}, NOSE_SHAPE | {"group_id": 4}, NOSE_SHAPE | {"group_id": 4}]),
            "bad-shape",
            "shapes[2]: the group 4 has another point 'nose'",
        ),
        (
            "labelme",
            labelme(
                [CAT_SHAPE | {"group_id": 4}, CAT_SHAPE | {"group_id": 4, "label": "dog"}, NOSE_SHAPE | {"group_id": 4}]
            ),
            "ambiguous-points",
            "shapes[0]: the group 4 has several objects; its points are those of the first",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><width>abc</width></size><object>"),
            "unreadable-",
            "is 'abc', ex",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><width>inf</width></size><object>"),
            "unreadable-",
            "is 'inf', ex",
        ),
        (
            "voc",
            VOC.format(9).replace("<object>", "<size><height>nan</height></size><object>"),
            "unreadable-",
            "is 'nan'",
        ),
        (
            "cvat",
            CVAT.format("a.png", 60, CVAT_MASK.format("0, 4", "inf")),
            "bad-shape",
            "left is 'inf', expected a number",
        ),
        (
            "cvat",
            CVAT.format("a.png", 60, CVAT_MASK.format(f"{2**62},{2**62}", 0)),
            "bad-shape",
            "its runs add up to 9223",
        ),
        ("cvat", CVAT.format("a.png", 60, '<bax label="c"/>'), "unsupported-shape", "bax 1: a bax is not supported"),
        (
            "cvat",
            CVAT.format("a.png", 60, '<skeleton label="c">' + 2 * '<points label="n" points="1,2"/>' + "</skeleton>"),
            "bad-shape",
            "it has two points 'n'",
        ),
        (
            "datumaro",
            datumaro(**POLYGON, attributes=[1]),
            "bad-shape",
            "items[0].annotations[0]: a value of the wrong type",
        ),
        ("datumaro", datumaro(**POLYGON, group=[1]), "bad-shape", "items[0].annotations[0]: its group is [1]"),
        (
            "datumaro",
            datumaro(**POLYGON | {"type": [1]}),
            "bad-shape",
            "items[0].annotations[0]: a value of the wrong type",
        ),
        (
            "datumaro",
            datumaro(**POLYGON | {"points": [[1], 2]}),
            "bad-shape",
            "items[0].annotations[0]: a value of the wr",
        ),
        (
            "datumaro",
            datumaro_file(items=[{"id": "a", "annotations": 5}]),
            "bad-item",
            "annotations is '5', expected a list",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": [1]}),
            "bad-categories",
            "categories.points: a value of",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": {"items": [5]}}),
            "bad-categories",
            "categories.points:",
        ),
        (
            "datumaro",
            datumaro_file(categories=LABELS | {"points": {"items": [{"label_id": "x"}]}}),
            "bad-categories",
            "categories.points: a value of the wrong type",
        ),
        ("labelstudio", studio(value=[1]), "bad-shape", "task 5, result[0]: a value of the wrong type"),
        ("labelstudio", studio(meta=[1]), "bad-shape", "task 5, result[0]: a value of the wrong type"),
        ("labelstudio", studio(meta={"group": [1]}), "bad-shape", "task 5, result[0]: its group is [1]"),
        ("labelstudio", studio(type="choices", value=[1]), "", ""),
        ("labelstudio", task(annotations=5), "bad-item", "tasks[0]: annotations is '5', expected a list"),
        ("labelstudio", task(annotations=[{"result": {"a": 1}}]), "bad-item", "tasks[0]: result is"),
        (
            "labelstudio",
            studio(value=STUDIO["value"] | {"rectanglelabels": ["cat", "dog"]}),
            "several-labels",
            "task 5, result[0]: it has the labels cat, dog; the first is used",
        ),
        ("labelstudio", studio(value=STUDIO["value"] | {"rectanglelabels": [None]}), "bad-shape", "it has no label in"),
    ],
)
def test_malformed_records_are_counted(tmp_path: Path, name: str, content: str, kind: str, loss: str) -> None:
    for image in ("a.png", "untouched.png"):
        picture(tmp_path / "x" / image)
    path = tmp_path / "x" / ("a.xml" if name in ("voc", "cvat") else "a.json")
    path.write_text(content)
    report = import_data(tmp_path / "x", tmp_path / "y", format=name, unlabeled="keep")
    assert [(found.kind.startswith(kind), found.file, loss in str(found)) for found in report.losses] == [
        (True, str(path), True)
    ] * bool(kind)


@pytest.mark.parametrize(
    ("segments", "loss"),
    [
        (None, None),
        ([5], "annotations[0].segments_info[0]: a value of the wrong type"),
        ([SEGMENTS[0] | {"id": [1]}], "annotations[0].segments_info[0]: a value of the wrong type or size (unhashable"),
        (
            [SEGMENTS[0] | {"category_id": [1]}],
            "annotations[0].segments_info[0]: a value of the wrong type or size (unh",
        ),
        ([{"id": 1}], "annotations[0].segments_info[0]: it lacks category_id"),
        ([SEGMENTS[0] | {"id": 7}], "annotations[0].segments_info[0]: segment 7: it has no pixel in the map"),
        (5, "annotations[0]: segments_info is '5', expected a list"),
    ],
)
def test_malformed_segments_are_counted(tmp_path: Path, segments: Any, loss: str | None) -> None:
    root = panoptic(tmp_path / "x", segments)
    picture(root / "images" / "untouched.png")
    losses = list(map(str, import_data(root, tmp_path / "y", unlabeled="keep").losses))
    if loss is not None:
        assert losses.pop(0).startswith(f"{root / 'x.json'}, {loss}")
    if segments != 5:
        assert losses.pop().startswith(f"{root / 'x' / 'a.png'}: pixels of ")
    assert losses == []


def test_classes_of_one_id_or_one_name(tmp_path: Path) -> None:
    """In two files the same id may be another class; in one file it may not."""
    panoptic(tmp_path / "x", SEGMENTS, file="panoptic_train")
    dog = {"id": 1, "name": "dog", "isthing": 1}
    root = panoptic(tmp_path / "x", SEGMENTS, name="b.png", category=dog, file="panoptic_val")
    report = import_data(root, tmp_path / "y")
    assert report.categories == {1: "cat", 2: "dog"}
    assert report.notes == {"classes whose id is taken or too large, with a new one": 1}
    assert [raw["category_id"] for split in ("train", "val") for raw in annotations(tmp_path / "y", split)] == [
        1,
        1,
        2,
        2,
    ]
    data = json.loads((root / "panoptic_val.json").read_text())
    (root / "panoptic_val.json").write_text(json.dumps(data | {"categories": [dog, dog | {"name": "cat"}]}))
    with pytest.raises(DataError, match=r"panoptic_val\.json: two categories have the same id"):
        import_data(root, tmp_path / "z")
    (tmp_path / "x").rename(tmp_path / "w")
    segments = [segment | {"category_id": 2**70} for segment in SEGMENTS]
    panoptic(tmp_path / "x", segments, category={"id": 2**70, "name": "cat"})
    (tmp_path / "x" / "categories.json").write_text(
        json.dumps([{"id": 2**70, "name": "cat"}, {"id": 5, "name": "cat"}])
    )
    report = import_data(tmp_path / "x", tmp_path / "v")
    assert (report.categories, report.annotations) == ({1: "cat"}, 2)
    assert report.notes["classes with the name of another, merged with it"] == 1


@pytest.mark.parametrize(
    ("value", "crowd"), [("0", 0), ("false", 0), ("True", 1), (1, 1), ("yes", 1), (None, 0), (2, 0)]
)
@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "datumaro", "panoptic"])
def test_flags_are_read_in_any_spelling(tmp_path: Path, name: str, value: Any, crowd: int) -> None:
    root = panoptic(tmp_path / "x", [segment | {"iscrowd": value} for segment in SEGMENTS])
    if name != "panoptic":
        (root / "x.json").unlink()
        text = "" if value is None else str(value)
        attribute = f'<attribute name="iscrowd">{text}</attribute>'
        (root / ("a.xml" if name in ("voc", "cvat") else "train.json")).write_text(
            {
                "labelme": labelme([CAT_SHAPE | {"flags": {"iscrowd": value}}]),
                "voc": VOC.format(9).replace("<bndbox>", f"<iscrowd>{text}</iscrowd><bndbox>"),
                "cvat": CVAT.format("a.png", 60, f'<polygon label="c" points="1,2;9,2;9,9">{attribute}</polygon>'),
                "datumaro": datumaro(**POLYGON, attributes={"is_crowd": value}),
            }[name]
        )
        for path in (root / "x").iterdir():
            path.unlink()
    report = import_data(root, tmp_path / "y", format=name)
    assert {raw["iscrowd"] for raw in annotations(tmp_path / "y")} == {crowd}
    assert [note.startswith("values of is") for note in report.notes] == [True] * (value == 2)


def test_values_of_masks_beyond_8_bits(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "JPEGImages" / "a.png")
    (tmp_path / "x" / "Annotations").mkdir()
    (tmp_path / "x" / "Annotations" / "a.xml").write_text(VOC.format(9))
    values = np.zeros((40, 60), np.uint16)
    values[2:9, 2:9], values[20:30, 20:30] = 1, 257
    (tmp_path / "x" / "SegmentationObject").mkdir()
    Image.fromarray(values).save(tmp_path / "x" / "SegmentationObject" / "a.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert annotations(tmp_path / "y")[0]["area"] == 49
    assert "SegmentationObject/a.png: pixels of 257, which are no objects of a.xml; skipped" in str(report)


@pytest.mark.parametrize(
    ("subset", "split"),
    [("site/1", "site_1"), ("../x", "_x"), ("..", "train"), ("é" * 300, "é" * 48)],
)
def test_splits_of_any_name_are_safe_names_of_files(tmp_path: Path, subset: str, split: str) -> None:
    picture(tmp_path / "x" / "a.png")
    content = CVAT.format("a.png", 60, '<polygon label="c" points="1,2;9,2;9,9"/>')
    (tmp_path / "x" / "a.xml").write_text(content.replace("<image ", f'<image subset="{subset}" '))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert list(report.splits) == [split]
    assert len(annotations(tmp_path / "y", split)) == 1
    assert report.notes == {f"images of the split {subset!r}, called {split!r}": 1}


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"yolo", "labels", "mask_files"}))
@pytest.mark.parametrize(
    "names",
    [
        ("a%20b.png", "a b.png"),
        ("x?d=y.png", "y.png"),
        ("c:d.png", "d.png"),
        (" lead.png", "lead.png"),
        ("a%2520b.png", "a%20b.png"),
    ],
)
def test_names_like_others_are_not_confused(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    for number, file in enumerate(names, 1):
        picture(tmp_path / "x" / "images" / file)
        data["images"].append({"id": number, "file_name": file, "height": 40, "width": 60})
        left = 10 * number
        polygon = [left, 5, left + 5, 5, left + 5, 20, left, 20]
        entry = {"id": number, "image_id": number, "category_id": 1, "segmentation": [polygon], "iscrowd": 0}
        data["annotations"].append(entry | {"bbox": [left, 5, 5, 15], "area": 75})
    (tmp_path / "x" / "annotations").mkdir()
    (tmp_path / "x" / "annotations" / "instances_train.json").write_text(json.dumps(data))
    assert not convert_data(tmp_path / "x", tmp_path / "z", to=name).counts
    report = import_data(tmp_path / "z", tmp_path / "y")
    assert (report.images, report.counts) == (2, {})
    back = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    files = {raw["id"]: raw["file_name"] for raw in back["images"]}
    assert {files[raw["image_id"]]: raw["bbox"][0] for raw in back["annotations"]} == dict(
        zip(names, (10, 20), strict=True)
    )


@pytest.mark.parametrize("name", ["labelme", "voc", "cvat", "datumaro"])
@pytest.mark.parametrize("names", [("A.png", "a.png"), ("Site/a.png", "site/a.png")])
def test_names_that_differ_in_case_are_two_images(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    root = tmp_path / "x"
    for number, file in enumerate(names):
        picture(root / file)
        content = {
            "labelme": labelme([CAT_SHAPE | {"label": file}], imagePath=Path(file).name),
            "voc": VOC.format(9).replace("cat", file),
            "cvat": CVAT.format(file, 60, f'<polygon label="{file}" points="1,2;9,2;9,9"/>'),
            "datumaro": datumaro(**POLYGON)
            .replace('"path": "a.png"', f'"path": "{file}"')
            .replace('"cat"', f'"{file}"'),
        }[name]
        suffix = ".xml" if name in ("voc", "cvat") else ".json"
        path = root / file if name in ("labelme", "voc") else root / f"{number}.png"
        path.with_suffix(suffix).write_text(content)
    if (root / names[0]).samefile(root / names[1]):
        pytest.skip("the file system ignores case")
    report = import_data(root, tmp_path / "y")
    assert (report.images, report.annotations, report.counts) == (2, 2, {})
    classes, images = report.categories, {}
    for split in report.splits:
        data = json.loads((tmp_path / "y" / "annotations" / f"instances_{split}.json").read_text())
        files = {raw["id"]: raw["file_name"] for raw in data["images"]}
        images |= {files[raw["image_id"]]: classes[raw["category_id"]] for raw in data["annotations"]}
    assert images == dict(zip(names, names, strict=True))


def test_an_ambiguous_name_is_not_taken_for_a_stem(tmp_path: Path) -> None:
    for file in ("b/a.png", "c/a.png", "a.png.jpg"):
        picture(tmp_path / file)
    index = ImageIndex(tmp_path)
    assert index.find("a.png") is None
    assert index.find("x/c/a.png") == tmp_path / "c" / "a.png"
    assert index.find("/data/local-files/?d=b/a.png") == tmp_path / "b" / "a.png"


def test_names_in_another_composition_are_found(tmp_path: Path) -> None:
    """As macOS decomposes them."""
    picture(tmp_path / "x" / "e\u0301.png")
    (tmp_path / "x" / "a.xml").write_text(CVAT.format("\u00e9.png", 60, ""), encoding="utf-8")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.images, report.counts) == (1, {})


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode")
def test_names_that_are_no_text_are_counted(tmp_path: Path) -> None:
    for name in (b"\xe9.png", b"a.png"):
        picture(tmp_path / "x" / os.fsdecode(name))
    (tmp_path / "x" / "a.json").write_text(labelme([CAT_SHAPE]))
    report = import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    assert (report.images, report.counts) == (1, {"unsafe-name": 1})
    assert "the name \\udce9.png is not valid UTF-8; skipped" in str(report)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to="voc")
    for number, folder in enumerate(("JPEGImages", "Annotations", "SegmentationObject", "ImageSets")):
        (tmp_path / "x" / folder).rename(tmp_path / f"data_{number}")
        (tmp_path / "x" / folder).symlink_to(tmp_path / f"data_{number}")
    (tmp_path / "x" / "again").symlink_to("JPEGImages")
    (tmp_path / "x" / "up").symlink_to("..")
    picture(tmp_path / "unrelated.png")
    report = import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    assert (report.format, report.images, report.counts) == ("voc", 3, {})
    assert report.splits["train"].masks == 6


@pytest.mark.parametrize("name", ["voc", "cvat", "labelme"])
def test_files_in_utf_16_are_detected(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "x" / "a.png")
    shape = '<box label="c" xtl="1" ytl="2" xbr="9" ybr="9"/>'
    content = {"voc": VOC.format(9), "cvat": CVAT.format("a.png", 60, shape), "labelme": labelme([CAT_SHAPE])}[name]
    path = tmp_path / "x" / ("a.json" if name == "labelme" else "a.xml")
    path.write_text(content, encoding="utf-16")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.format, report.annotations, report.counts) == (name, 1, {})
    if name != "labelme":
        path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>\n' + content, encoding="utf-16")
        with pytest.raises(DataError, match="defines XML entities"):
            import_data(tmp_path / "x", tmp_path / "z", strict=True)


# Label images


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", np.uint8), (".PNG", np.uint16), (".TIF", np.uint16), (".tif", np.int32), (".tif", np.float32)],
)
def test_label_images_of_all_depths(tmp_path: Path, suffix: str, dtype: type) -> None:
    picture(tmp_path / "x" / "a.png")
    values = np.zeros((40, 60), dtype=dtype)
    values[2:10, 3:20] = 7
    values[12:30, 3:20] = min(int(np.iinfo(dtype).max), 70_000) if np.issubdtype(dtype, np.integer) else 70_000
    values[15:20, 5:9] = 0
    (tmp_path / "x" / "masks").mkdir()
    Image.fromarray(values).save(tmp_path / "x" / "masks" / f"a_cp_masks{suffix}")
    report = import_data(tmp_path / "x", tmp_path / "y", category="nucleus")
    assert (report.format, report.categories) == ("labels", {1: "nucleus"})
    masks = [item[2] for item in objects(tmp_path / "y", "train")["a.png"]]
    assert [(mask == (values == value)).all() for mask, value in zip(masks, np.unique(values)[1:], strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((40, 61), np.uint8), "61 x 40 pixels, its image has 60 x 40"),
        (np.zeros((40, 60, 3), np.uint8), "expected a single channel, got mode RGB"),
        (np.full((40, 60), 0.5, np.float32), "not integers"),
        (np.full((40, 60), -1, np.int32), "the negative value -1"),
    ],
)
def test_label_images_that_are_none(tmp_path: Path, values: np.ndarray, message: str) -> None:
    picture(tmp_path / "x" / "a.png")
    (tmp_path / "x" / "labels").mkdir()
    Image.fromarray(values).save(tmp_path / "x" / "labels" / "a.tif")
    report = import_data(tmp_path / "x", tmp_path / "y", format="labels")
    assert message in str(report.losses[0])


def test_the_layout_of_the_data_science_bowl(tmp_path: Path) -> None:
    unit = tmp_path / "x" / "stage1_train" / "0a1b"
    picture(unit / "images" / "0a1b.png")
    for number, box in enumerate(((2, 2, 9, 9), (20, 5, 30, 15))):
        mask = np.zeros((40, 60), np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 255
        (unit / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(unit / "masks" / f"{number}.png")
    picture(unit / "masks" / "empty.png", mode="L")
    report = import_data(tmp_path / "x", tmp_path / "y", category="nucleus")
    assert (report.format, report.annotations) == ("mask_files", 2)
    assert report.counts == {"unusable-object": 1}
    assert [raw["bbox"] for raw in annotations(tmp_path / "y")] == [[2, 2, 7, 7], [20, 5, 10, 10]]


def test_a_mask_file_may_have_the_name_of_its_image(tmp_path: Path) -> None:
    for unit, masks in (("1", "12"), ("7", "12")):
        picture(tmp_path / "x" / unit / "images" / f"{unit}.png")
        for mask in masks:
            picture(tmp_path / "x" / unit / "masks" / f"{mask}.png", mode="L")
            Image.new("L", (60, 40), 255).save(tmp_path / "x" / unit / "masks" / f"{mask}.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.format, report.images, report.annotations) == ("mask_files", 2, 4)


# Rings and runs


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_rings_give_back_the_pixels(seed: int, height: int, width: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    if not mask.any():
        return
    rings = trace(mask.astype(np.uint8))
    assert all(len(ring) >= 4 for ring in rings)
    ring = to_one_ring({**encode_masks(mask[None])[0]}, height, width)
    assert ring is not None
    back = decode_rle([segmentation_to_rle([ring.ravel().tolist()], height, width)])[0]
    assert (back == mask).all()


def test_parts_that_overlap_are_one_object(tmp_path: Path) -> None:
    parts = [[1.0, 1, 20, 1, 20, 20, 1, 20], [10.0, 10, 30, 10, 30, 30, 10, 30]]
    ring = to_one_ring(parts, 40, 40)
    assert ring is not None
    union = decode_rle([segmentation_to_rle(parts, 40, 40)])[0]
    assert (decode_rle([segmentation_to_rle([ring.ravel().tolist()], 40, 40)])[0] == union).all()
    assert len(bridge([])) == 0


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 70_000)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_runs_of_brushes_come_back(runs: list[tuple[int, int]]) -> None:
    values = np.repeat(np.array([v for v, _ in runs], np.uint8), [n for _, n in runs])
    assert (unpack_runs(np.array(pack_runs(values), np.uint8), len(values)) == values).all()
    with pytest.raises(ValueError, match=r"is truncated|the image needs"):
        unpack_runs(np.array(pack_runs(values)[:-3], np.uint8), len(values))


def test_literal_runs_of_brushes_are_read() -> None:
    # Two values one by one, as Label Studio packs what doesn't repeat: flag 0, width 3 (index 0), length 2.
    bits = (
        f"{2:032b}{7:05b}" + "".join(f"{w - 1:04b}" for w in (3, 4, 8, 16)) + "0" + "00" + "001" + f"{9:08b}{200:08b}"
    )
    bits += "0" * (-len(bits) % 8)
    content = np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], np.uint8)
    assert unpack_runs(content, 2).tolist() == [9, 200]


# The command line


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command_imports_reports_and_checks(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["data", "convert", str(coco), "--to", "labelme", "--output", str(tmp_path / "x")], capsys)
    assert code == 0
    (tmp_path / "x" / "train" / "site_0" / "train0.json").write_text("{")
    code, out, _ = run(["data", "import", str(tmp_path / "x"), "--output", str(tmp_path / "y")], capsys)
    assert code == 0
    assert re.search(r"\(labelme\).*5 images, 9 annotations, 2 classes", out)
    assert "train0.json, line 1: not valid JSON" in out
    assert f"check of {tmp_path / 'y' / 'annotations' / 'instances_train.json'}: 0 errors" in out
    code, _, err = run(["data", "import", str(tmp_path / "gone"), "--output", str(tmp_path / "z")], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "no such file or folder" in err


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"no image"), os.remove])
def test_unreadable_images_are_left_out(coco: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    convert_data(coco, tmp_path / "x", to="yolo", images="copy")
    change(tmp_path / "x" / "images" / "train" / "site_0" / "train0.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.images == 5
    assert report.counts == {"missing-image" if change is os.remove else "unreadable-image": 1}


def test_the_synthetic_set_of_the_other_tests_survives(tmp_path: Path) -> None:
    images, path = write_coco(tmp_path / "coco")
    convert_data(path, tmp_path / "x", to="cvat", format="coco")
    assert import_data(tmp_path / "x", tmp_path / "y").counts == {}
    assert images.is_dir()


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp", "gray.jpg", "progressive.jpg"])
def test_sizes_of_headers_are_those_of_the_pictures(tmp_path: Path, name: str, orientation: int | None) -> None:
    options: dict[str, Any] = {"progressive": True} if name.startswith("prog") else {}
    if orientation is not None and not name.endswith("bmp"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.new("L" if name.startswith("gray") else "RGB", (61, 40)).save(tmp_path / name, **options)
    assert image_size(tmp_path / name) == tuple(read_image(tmp_path / name).shape[1:])


def test_a_training_run_says_how_to_import(tmp_path: Path) -> None:
    from a2fpn.training.config import DataSection
    from a2fpn.training.sources import open_training_set

    root = yolo(tmp_path / "x", {"a": "0 .5 .5 .5 .5\n"})
    with pytest.raises(DataError, match=r"holds yolo labels and no annotations/.*\. Import them.*a2fpn data import"):
        open_training_set(DataSection(root=str(root)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such"):
        open_training_set(DataSection(root=str(tmp_path / "empty")))


def test_new_images_get_new_ids(tmp_path: Path) -> None:
    convert_data(write_set(tmp_path / "coco", ("train",)), tmp_path / "x", to="labelme")
    picture(tmp_path / "x" / "train" / "a_new.png")
    import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    data = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())
    ids = {raw["file_name"]: raw["id"] for raw in data["images"]}
    assert ids == {"site_0/train0.png": 1, "site_1/train1.png": 2, "site_2/train2.png": 3, "a_new.png": 4}
