"""Conversions: every format comes back as it was written, or says what it lost."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from a2fpn.data import check_data, read_coco
from a2fpn.data.exporters import EXPORTERS, convert_data, export_images
from a2fpn.data.importers import IMPORTERS, detect, import_data, list_formats
from a2fpn.data.labeled import CategoryInfo, LabeledImage, LabeledObject
from a2fpn.errors import DataError
from tests.label_sets import FORMATS, OUTLINE, annotations, objects, picture, small_set, square, write_set

NO_CROWDS = {"yolo", "labels", "mask_files"}


ONE_NUMBER_A_PIXEL = {"labels", "panoptic", "voc"}


ONLY_MASKS = {"labels", "mask_files", "panoptic"}


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
    names += [" a ", "\u2028x", "a\x85b", "a\u2028b", "a\u2029\n b", "a\nb", "x" * 300, "x" * 299 + "y", "é" * 200]
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
@pytest.mark.parametrize("control", ["\0", "\x1f", "\r", "\ufffe"])
def test_a_class_that_xml_cannot_hold_is_refused(tmp_path: Path, name: str, control: str) -> None:
    root = small_set(tmp_path / "coco", ["1.png"], [square(1, 1)], [{"id": 1, "name": f"a{control}b"}])
    if EXPORTERS[name].xml:
        with pytest.raises(DataError, match=rf"^{name} can't hold the name 'a\\.*b', as XML has no such control"):
            convert_data(root, tmp_path / "x", to=name)
    else:
        convert_data(root, tmp_path / "x", to=name)
        assert import_data(tmp_path / "x", tmp_path / "y", format=name).categories == {1: f"a{control}b"}


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_that_xml_cannot_name_is_renamed(tmp_path: Path, name: str) -> None:
    root = small_set(tmp_path / "coco", ["a\x01.png", "a_.png"], [square(1, 1), square(2, 2)])
    written = convert_data(root, tmp_path / "x", to=name)
    assert written.counts.get("image-name", 0) == (2 if EXPORTERS[name].xml else 0)
    back = import_data(tmp_path / "x", tmp_path / "y", format=name)
    assert (back.images, back.annotations, back.counts) == (2, 2, {})


@pytest.mark.parametrize("name", FORMATS)
def test_an_image_without_the_suffix_of_its_format_gets_it(tmp_path: Path, name: str) -> None:
    files = ["a", "b.v2", "c.png", "sub/d.raw"]
    root = small_set(tmp_path / "coco", [f"{file}.png" for file in files], [square(n, 1) for n in range(1, 5)])
    for number, format in enumerate(("PNG", "TIFF", "PNG", "JPEG")):
        (root / "images" / f"{files[number]}.png").unlink()
        Image.new("RGB", (40, 30)).save(root / "images" / files[number], format=format)
    path = root / "annotations" / "instances_train.json"
    path.write_text(re.sub(r"\.png(?=\")", "", path.read_text()))
    written = convert_data(root, tmp_path / "x", to=name)
    assert [loss.detail for loss in written.losses] == [
        f"{old} is written as {new}, as such names are not read"
        for old, new in (("a", "a.png"), ("b.v2", "b.v2.tif"), ("sub/d.raw", "sub/d.raw.jpg"))
    ]
    back = import_data(tmp_path / "x", tmp_path / "y", format=name)
    assert (back.images, back.annotations, back.counts) == (4, 4, {})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("file", ["images/a.png", "val/a.png", "labels/a.png", "masks/b/a.png", "b/images/a.png"])
def test_ids_are_kept_in_folders_of_any_name(tmp_path: Path, name: str, file: str) -> None:
    root = small_set(tmp_path / "coco", ["z.png", file], [square(1, 1), square(2, 2)])
    convert_data(root, tmp_path / "x", to=name)
    assert import_data(tmp_path / "x", tmp_path / "y", format=name).counts == {}
    coco = read_coco(tmp_path / "y" / "annotations" / "instances_train.json")
    assert {image.id: Path(image.file_name).name for image in coco.images.values()} == {1: "z.png", 2: "a.png"}
    assert {image: [a.category_id for a in members] for image, members in coco.annotations.items()} == {1: [1], 2: [2]}


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
    assert set(EXPORTERS) | {"coco", "geojson", "via"} == set(IMPORTERS) == set(list_formats())
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
