"""Imports of label images and of one mask file per object: values, layouts and pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a2fpn.data.importers import import_data
from tests.label_sets import annotations, objects, picture


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        *((suffix, np.uint8) for suffix in (".png", ".bmp", ".gif")),
        *((".PNG", np.uint16), (".TIF", np.uint16), (".tif", np.int32), (".tif", np.float32)),
    ],
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
    ("image", "labels"),
    [
        ("images/a.png", "masks/a.png"),
        ("site/images/a.png", "site/masks/a.png"),
        ("site/images/a.png", "labels/site/images/a.png"),
        ("images/site/images/a.png", "labels/site/images/a.png"),
        ("images/train/a.png", "images/train/a_masks.png"),
        ("train/site/images/a.png", "train/site/masks/a_mask.png"),
        ("train/images/site/a.png", "train/masks/site/a.png"),
        ("site/images/a.png", "site/masks/cell/a.png"),
        ("PNGImages/a.png", "PedMasks/a_mask.png"),
        ("set/photos/a.png", "set/masks/a.png"),
        ("A1/plant_rgb.png", "A1/plant_label.png"),
        ("data/1/1-img.png", "data/1/1-mask.png"),
    ],
)
def test_label_images_are_found_beside_their_images(tmp_path: Path, image: str, labels: str) -> None:
    picture(tmp_path / "x" / image)
    picture(tmp_path / "x" / f"{Path(image).parent}/other.png")
    path = picture(tmp_path / "x" / labels, mode="L")
    Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(path)
    report = import_data(tmp_path / "x", tmp_path / "y", format="labels", categories=["cell", "debris"])
    assert (report.images, report.annotations, report.counts) == (1, 1, {})


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("images/site 2/a.png", "labels/site 1/a.png"),
        ("site 2/a.png", "site 1/a_mask.png"),
        ("set 2/photos/a.png", "set 1/masks/a.png"),
        ("a_rgb.png", "a_label.png"),
    ],
)
def test_label_images_of_another_folder_are_not_taken(tmp_path: Path, image: str, labels: str) -> None:
    picture(tmp_path / "x" / image)
    if image == "a_rgb.png":
        picture(tmp_path / "x" / "a_img.png")
    picture(tmp_path / "x" / "site 1" / "b.png")
    picture(tmp_path / "x" / "site 1" / "b_mask.png", mode="L")
    picture(tmp_path / "x" / labels, mode="L")
    report = import_data(tmp_path / "x", tmp_path / "y", format="labels")
    assert report.counts == {"missing-image": 1}


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
    picture(tmp_path / "x" / "b.png")
    report = import_data(tmp_path / "x", tmp_path / "y", format="labels", unlabeled="keep")
    assert message in str(report.losses[0])
    assert report.images == 1  # a.png is no background


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


def test_a_mask_in_a_jpeg_has_its_own_pixels(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "1" / "images" / "1.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[8:24, 16:40] = 255
    mask[12, 30] = 0
    (tmp_path / "x" / "1" / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "x" / "1" / "masks" / "2.jpg", quality=75)
    import_data(tmp_path / "x", tmp_path / "y", category="nucleus")
    ((*_, found),) = objects(tmp_path / "y", "train")["1.png"]
    assert (found == (mask > 0)).all()


def test_a_mask_file_may_have_the_name_of_its_image(tmp_path: Path) -> None:
    for unit, masks in (("1", "12"), ("7", "12")):
        picture(tmp_path / "x" / unit / "images" / f"{unit}.png")
        for mask in masks:
            picture(tmp_path / "x" / unit / "masks" / f"{mask}.png", mode="L")
            Image.new("L", (60, 40), 255).save(tmp_path / "x" / unit / "masks" / f"{mask}.png")
    report = import_data(tmp_path / "x", tmp_path / "y")
    assert (report.format, report.images, report.annotations) == ("mask_files", 2, 4)
