"""Folders as people have them: images of the same name, missing ones, hidden folders, splits, labels that are lost.

No label may reach another image without a word.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from a2fpn.data import convert_data, import_data, read_coco
from a2fpn.data.importers import ImportReport
from a2fpn.errors import DataError
from tests.label_sets import annotations, picture, small_set, square, yolo

SQUARE = [[1, 1], [9, 1], [9, 9], [1, 9]]
LOADED = "0 0.5 0.5 0.2 0.2\n"


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def labelme(image: str, label: str = "cat", **shape: Any) -> dict[str, Any]:
    return {"version": "5.5.0", "imagePath": image, "shapes": [{"label": label, "points": SQUARE, **shape}]}


def voc(image: str, label: str = "cat") -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin"), (1, 1), strict=True))
    box = f"<bndbox>{sides}<xmax>9</xmax><ymax>9</ymax></bndbox>"
    return f"<annotation><filename>{image}</filename><object><name>{label}</name>{box}</object></annotation>"


def geojson(_: str, label: str = "cat") -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [SQUARE]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": label}}}


def cvat(*images: tuple[str, str]) -> str:
    shape = '<polygon label="{}" points="1,1;9,1;9,9"/>'
    found = "".join(f'<image name="{name}">{shape.format(label)}</image>' for name, label in images)
    return f"<annotations>{found}</annotations>"


def via(*images: tuple[str, str]) -> dict[str, Any]:
    shape = {"name": "rect", "x": 1, "y": 1, "width": 9, "height": 9}
    return {
        name: {"filename": name, "regions": [{"shape_attributes": shape, "region_attributes": {"label": label}}]}
        for name, label in images
    }


def studio(*images: tuple[str, str]) -> list[dict[str, Any]]:
    value = {"x": 1, "y": 1, "width": 9, "height": 9}
    return [
        {
            "data": {"image": f"/data/local-files/?d={name}"},
            "annotations": [{"result": [{"type": "rectanglelabels", "value": {**value, "rectanglelabels": [label]}}]}],
        }
        for name, label in images
    ]


def coco(*images: tuple[str, str], **image: Any) -> dict[str, Any]:
    names = sorted({label for _, label in images})
    return {
        "images": [
            {"id": n, "file_name": name, "height": 40, "width": 60} | image for n, (name, _) in enumerate(images)
        ],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": names.index(label), "bbox": [1, 1, 9, 9]}
            for n, (_, label) in enumerate(images)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
    }


MANY: dict[str, tuple[str, Callable[..., Any]]] = {
    "coco": ("all.json", coco),
    "cvat": ("annotations.xml", cvat),
    "via": ("via.json", via),
    "labelstudio": ("tasks.json", studio),
}
EACH: dict[str, tuple[str, Callable[..., Any]]] = {
    "labelme": (".json", labelme),
    "voc": (".xml", voc),
    "geojson": (".geojson", geojson),
}


def found(report: ImportReport, folder: Path) -> dict[str, str]:
    """Class of the object of each image."""
    result = {}
    for split in report.splits:
        data = read_coco(folder / "annotations" / f"instances_{split}.json")
        classes = {category.id: category.name for category in data.categories}
        result |= {
            image.file_name: classes[data.annotations[key][0].category_id]
            for key, image in data.images.items()
            if data.annotations[key]
        }
    return result


# Images that are not there


@pytest.mark.parametrize("name", MANY)
def test_the_labels_of_a_missing_image_are_not_another_one_s(name: str, tmp_path: Path) -> None:
    file, write = MANY[name]
    picture(tmp_path / "x" / "images" / "site2" / "1.png")
    save(tmp_path / "x" / file, write(("site1/1.png", "lost"), ("site2/1.png", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.counts == {"missing-image": 1}
    assert "site1/1.png" in str(report.losses[0])
    assert "images/site2/1.png is in another folder" in str(report.losses[0])
    assert found(report, tmp_path / "y") == {"site2/1.png": "cat"}


@pytest.mark.parametrize("name", EACH)
def test_the_labels_beside_an_image_are_its_own(name: str, tmp_path: Path) -> None:
    suffix, write = EACH[name]
    picture(tmp_path / "x" / "site2" / "1.png")
    for site, label in (("site1", "lost"), ("site2", "cat")):
        save(tmp_path / "x" / site / f"1{suffix}", write("1.png", label))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.counts == {"missing-image": 1}
    assert "site1" in str(report.losses[0])
    assert found(report, tmp_path / "y") == {"site2/1.png": "cat"}


def test_an_image_of_another_split_is_another_image(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "val" / "1.png")
    picture(tmp_path / "x" / "train" / "2.png")
    save(tmp_path / "x" / "annotations" / "instances_train.json", coco(("1.png", "lost"), ("2.png", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.counts == {"missing-image": 1}
    assert found(report, tmp_path / "y") == {"2.png": "cat"}


@pytest.mark.parametrize("stated", ["old/1.png", "C:\\data\\other\\1.png", "/home/me/other/1.png", "../other/1.png"])
def test_paths_of_other_machines_and_renamed_roots_are_found(stated: str, tmp_path: Path) -> None:
    picture(tmp_path / "x" / "images" / ("1.png" if stated.startswith("old") else "site/1.png"))
    save(tmp_path / "x" / "annotations.xml", cvat((stated, "cat")))
    assert not import_data(tmp_path / "x", tmp_path / "y").counts


# Images of the same name


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize(
    ("labels", "images"), [("Annotations", "JPEGImages"), ("annotations", "images"), ("ann", "img"), ("", "")]
)
def test_the_image_in_the_same_split_or_site_is_meant(name: str, labels: str, images: str, tmp_path: Path) -> None:
    suffix, write = EACH[name]
    for part in ("a", "b"):
        picture(tmp_path / "x" / part / images / "1.png")
        save(tmp_path / "x" / part / labels / f"1{suffix}", write("1.png", part))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert sorted(found(report, tmp_path / "y").values()) == ["a", "b"]
    assert all(name.split("/")[0] == label for name, label in found(report, tmp_path / "y").items())


@pytest.mark.parametrize("name", MANY)
def test_each_task_has_its_own_images(name: str, tmp_path: Path) -> None:
    file, write = MANY[name]
    for part in ("task1", "task2"):
        picture(tmp_path / "x" / part / "images" / "1.png")
        save(tmp_path / "x" / part / file, write(("1.png", part)))
    if name == "labelstudio":  # its paths start at the folder that it serves
        report = import_data(tmp_path / "x" / "task1", tmp_path / "y")
        assert found(report, tmp_path / "y") == {"1.png": "task1"}
        return
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert sorted(found(report, tmp_path / "y").values()) == ["task1", "task2"]


def test_several_images_that_match_are_named(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        picture(tmp_path / "x" / folder / "1.png")
    picture(tmp_path / "x" / "2.png")
    save(tmp_path / "x" / "annotations.xml", cvat(("1.png", "lost"), ("2.png", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert "image '1.png' matches several images: a/1.png, b/1.png; skipped" in str(report.losses[0])


def test_an_image_of_labels_is_not_the_image(tmp_path: Path) -> None:
    for folder in ("pictures", "masks"):
        picture(tmp_path / "x" / folder / "a.png")
    save(tmp_path / "x" / "x.json", coco(("a.png", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y", format="coco")
    assert report.counts == {}
    assert (tmp_path / "y" / "images" / "a.png").resolve() == tmp_path / "x" / "pictures" / "a.png"


def test_folders_with_numbers_are_no_splits(tmp_path: Path) -> None:
    for folder in ("test1", "test2"):
        picture(tmp_path / "x" / folder / "1.png")
        save(tmp_path / "x" / folder / "1.json", labelme("1.png", folder))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert found(report, tmp_path / "y") == {"test1/1.png": "test1", "test2/1.png": "test2"}


@pytest.mark.parametrize("name", ["voc", "mask_files", "labels", "yolo", "panoptic", "cvat"])
def test_they_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    names = ["test1/1.png", "test2/1.png"]
    convert_data(small_set(tmp_path / "x", names, [square(1), square(2)]), tmp_path / "y", to=name)
    report = import_data(tmp_path / "y", tmp_path / "z", format=name)
    assert report.images == 2
    assert len(found(report, tmp_path / "z")) == 2


# Hidden folders


@pytest.mark.parametrize("name", [*EACH, "coco"])
def test_hidden_folders_of_labels_are_not_read(name: str, tmp_path: Path) -> None:
    suffix, write = EACH.get(name, (".json", lambda image, label: coco((image, label))))
    picture(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / f"a{suffix}", write("a.png", "new"))
    save(tmp_path / "x" / ".ipynb_checkpoints" / f"a{suffix}", write("a.png", "old"))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert found(report, tmp_path / "y") == {"a.png": "new"}


@pytest.mark.parametrize("yaml", ["names: [cat]\ntrain: images\n", None])
def test_hidden_folders_of_images_are_not_read(yaml: str | None, tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": LOADED}, names=yaml)
    save(root / "classes.txt", "cat\n")
    for name in ("a-checkpoint", "b"):
        picture(root / "images" / ".ipynb_checkpoints" / f"{name}.png")
    save(root / "labels" / ".ipynb_checkpoints" / "a-checkpoint.txt", LOADED)
    report = import_data(root, tmp_path / "y")
    assert (report.images, report.annotations, report.counts) == (1, 1, {})


@pytest.mark.parametrize("layout", ["labels", "mask_files"])
def test_hidden_folders_of_masks_are_not_read(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "x" if layout == "labels" else tmp_path / "x" / "i1"
    picture(root / "images" / "a.png")
    mask = Image.fromarray(np.pad(np.full((9, 9), 255, np.uint8), ((5, 26), (5, 46))))
    for path in ("masks/m.png", "masks/.ipynb_checkpoints/m.png"):
        path = path.replace("m.png", "a.png" if layout == "labels" else "m.png")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        mask.save(root / path)
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.annotations, report.categories) == (1, {1: "object"})


# Splits


def test_darknet_s_lists_are_the_splits(tmp_path: Path) -> None:
    root = tmp_path / "x"
    for name in "abcd":
        picture(root / "obj" / f"{name}.jpg")
        save(root / "obj" / f"{name}.txt", LOADED)
    save(root / "obj.names", "cat\n")
    save(root / "obj.data", "classes = 1\ntrain = data/first.txt\nvalid = data\\valid.txt\nnames = data/obj.names\n")
    save(root / "first.txt", "data/obj/a.jpg\ndata/obj/b.jpg\n")
    save(root / "valid.txt", "data/obj/c.jpg\ndata/obj/b.jpg\n")
    report = import_data(root, tmp_path / "y")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 2, "val": 1}
    assert report.notes == {
        "label files of images that no split lists": 1,
        "images listed in train and val, kept in train": 1,
    }
    (root / "obj.data").unlink()
    report = import_data(root, tmp_path / "z")  # the lists alone, by their names
    assert {split: count.images for split, count in report.splits.items()} == {"val": 2}


@pytest.mark.parametrize("lines", ["\ufeff" + LOADED, ""])
def test_yolo_is_detected_by_its_list_of_classes(lines: str, tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": lines}, names=None)
    save(root / "classes.txt", "cat\n")
    report = import_data(root, tmp_path / "y")
    assert (report.format, report.annotations, report.counts) == ("yolo", len(lines) and 1, {})


def test_files_that_name_a_split_come_first(tmp_path: Path) -> None:
    for name in ("1", "2"):
        picture(tmp_path / "x" / f"{name}.png")
    save(tmp_path / "x" / "all.json", coco(("1.png", "cat"), ("2.png", "cat")))
    save(tmp_path / "x" / "train.json", coco(("1.png", "cat")))
    save(tmp_path / "x" / "val.json", coco(("2.png", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert {split: count.images for split, count in report.splits.items()} == {"train": 1, "val": 1}
    assert report.counts == {"duplicate-image": 2}


# Labels that are lost


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.json", labelme("a.png", points=[[1, 1]])),
        ("a.json", labelme("a.png", points=[[90, 90], [99, 90], [99, 99]])),  # outside
        ("a.xml", voc("a.png", "")),
        ("a.geojson", geojson("") | {"geometry": None}),
        ("x.xml", cvat(("a.png", ""))),
        ("x.json", json.loads(json.dumps(via(("a.png", "cat"))).replace("rect", "polyline"))),
        ("x.json", studio(("a.png", ""))),
        ("x.json", coco(("a.png", "cat")) | {"categories": [{"id": 7, "name": "cat"}]}),
    ],
    ids=["labelme", "outside", "voc", "geojson", "cvat", "via", "labelstudio", "coco"],
)
def test_images_that_lost_all_labels_are_no_backgrounds(file: str, content: Any, tmp_path: Path) -> None:
    for image in ("a.png", "b.png"):
        picture(tmp_path / "x" / image)
    save(tmp_path / "x" / file, content)
    report = import_data(tmp_path / "x", tmp_path / "y", unlabeled="keep")
    assert len(report.losses) == 1
    assert [path.name for path in (tmp_path / "y" / "images").iterdir()] == ["b.png"]


def test_a_line_that_can_t_be_read_is_no_background(tmp_path: Path) -> None:
    root = yolo(tmp_path / "x", {"a": "0 5 5 5 5\n", "b": "0 5 5 5 5\n" + LOADED, "c": ""})
    (root / "labels" / "d.txt").write_bytes(b"\xff\xfe\xfa")
    picture(root / "images" / "d.png")
    report = import_data(root, tmp_path / "y", format="yolo")
    assert (report.images, report.annotations) == (2, 1)
    assert report.notes["images of which no label could be read, skipped: they are no backgrounds"] == 2


def test_labelme_s_own_labels_are_no_classes(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    content = labelme("a.png")
    content["shapes"] += labelme("a.png", "__ignore__")["shapes"]
    save(tmp_path / "x" / "a.json", content)
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert report.categories == {1: "cat"}
    assert report.notes == {"shapes labeled __ignore__, skipped": 1}


# COCO files of other tools


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "x" / f"{name}.png")
    save(tmp_path / "x" / "x.json", coco(("a.png", "cat"), ("b.png", "cat"), id=1))
    with pytest.raises(DataError, match=r"the images a\.png and b\.png have the same id 1; ids must be unique"):
        import_data(tmp_path / "x", tmp_path / "y")


def test_ids_as_text_are_numbers(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    content = coco(("a.png", "cat"))
    content["images"][0]["id"] = 3
    content["annotations"][0] |= {"image_id": "3", "category_id": "0"}
    content["categories"][0]["id"] = "0"
    save(tmp_path / "x" / "x.json", content)
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.annotations, report.counts) == (1, {})


@pytest.mark.parametrize("size", [{"height": 0, "width": 0}, {"height": None, "width": None}])
def test_sizes_that_are_not_filled_in_are_read_from_the_images(size: dict[str, Any], tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / "x.json", coco(("a.png", "cat"), **size))
    report = import_data(tmp_path / "x", tmp_path / "y", format="coco")
    assert (report.annotations, report.counts) == (1, {})
    (entry,) = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())["images"]
    assert (entry["height"], entry["width"]) == (40, 60)


def test_names_that_are_urls_become_those_of_the_files(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "images" / "a b.png")
    save(tmp_path / "x" / "x.json", coco(("https://host/bucket/a%20b.png?token=1", "cat")))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert found(report, tmp_path / "y") == {"a b.png": "cat"}


# Others


def test_a_broken_link_does_not_stop_an_import(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / "a.json", labelme("a.png"))
    (tmp_path / "x" / "broken.json").symlink_to(tmp_path / "nothing.json")
    assert import_data(tmp_path / "x", tmp_path / "y").annotations == 1


def test_label_studio_s_image_is_the_one_that_was_drawn_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "x" / f"{name}.png")
    (task,) = studio(("a.png", "cat"))
    task["data"] = {"reference": "/data/local-files/?d=b.png", **task["data"]}
    task["annotations"][0]["result"][0]["to_name"] = "image"
    save(tmp_path / "x" / "x.json", [task])
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert found(report, tmp_path / "y") == {"a.png": "cat"}


def test_tasks_without_annotations_are_named_if_nothing_is_left(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    (task,) = studio(("a.png", "cat"))
    save(tmp_path / "x" / "x.json", [task | {"annotations": [], "predictions": task["annotations"]}])
    with pytest.raises(DataError, match="no image was read; 1 tasks without a submitted annotation"):
        import_data(tmp_path / "x", tmp_path / "y")


def test_rotated_boxes_of_voc_are_polygons(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    values = {"cx": 30, "cy": 20, "w": 20, "h": 10, "angle": math.pi / 2}
    box = "".join(f"<{key}>{value}</{key}>" for key, value in values.items())
    shape = f"<object><name>cat</name><robndbox>{box}</robndbox></object>"
    save(tmp_path / "x" / "a.xml", f"<annotation><filename>a.png</filename>{shape}</annotation>")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    assert annotations(tmp_path / "y")[0]["bbox"] == [25, 10, 10, 20]


def test_boxes_of_voc_that_count_from_0_stay_in_the_image(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png")
    content = voc("a.png").replace("<xmin>1<", "<xmin>0<").replace("<ymin>1<", "<ymin>0<")
    save(tmp_path / "x" / "a.xml", content)
    import_data(tmp_path / "x", tmp_path / "y")
    assert annotations(tmp_path / "y")[0]["bbox"] == [0, 0, 9, 9]


def test_stored_pixels_of_a_rotated_jpeg_are_named_by_the_checks(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "x").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "x" / "a.jpg", exif=exif)
    size = "<size><width>60</width><height>40</height></size>"
    save(tmp_path / "x" / "a.xml", voc("a.jpg").replace("<object>", f"{size}<object>"))
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert not report.counts
    (entry,) = json.loads((tmp_path / "y" / "annotations" / "instances_train.json").read_text())["images"]
    assert (entry["height"], entry["width"]) == (40, 60)  # of the labels; check-data names the rotation
