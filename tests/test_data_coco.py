import io
import json
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from a2fpn.config import Category
from a2fpn.data import (
    CocoDataset,
    CocoImage,
    DataError,
    ImageError,
    InstanceMasks,
    SampleMaker,
    collate,
    read_coco,
    read_image,
)
from tests.coco_data import write_coco

IMAGE = {"id": 5, "file_name": "a.png", "height": 40, "width": 60}
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def annotation(**changes):
    return {"id": 3, "image_id": 5, "category_id": 7, "bbox": [10, 10, 10, 10], "segmentation": SQUARE} | changes


def coco(*annotations, images=(IMAGE,), categories=({"id": 7, "name": "cat"},)):
    return {"images": list(images), "annotations": list(annotations), "categories": list(categories)}


def edit(path, change):
    """Changes the content of a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- samples -------------------------------------------------------------------------------------------------


def test_samples_have_the_documented_types_and_fit_each_other(tmp_path):
    dataset = CocoDataset(*write_coco(tmp_path), strict=True)
    assert len(dataset) == 4
    assert dataset.image_ids == [100, 103, 106, 109]
    assert [category.id for category in dataset.categories] == [7, 23, 90]
    for image, target in dataset:
        size = image.shape[1:]
        count = len(target["labels"])
        assert isinstance(image, tv_tensors.Image)
        assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert (target["boxes"].dtype, target["boxes"].shape) == (torch.float32, (count, 4))
        assert isinstance(target["masks"], InstanceMasks)
        assert target["masks"].shape == (count, *size)
        assert target["labels"].dtype == torch.int64
        assert target["boxes"].canvas_size == tuple(size)
        assert set(target) == {"image_id", "boxes", "labels", "masks"}
        # every format of mask lies where its shape was drawn, and the box around it
        drawn = image.amax(0) > 40
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"].dense().bool(), strict=True):
            assert drawn[mask].all()
            ys, xs = mask.nonzero().unbind(1)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert len(dataset[3][1]["labels"]) == 0  # the image without objects


def test_sparse_ids_become_labels_in_the_order_of_the_ids(tmp_path):
    folder, path = write_coco(tmp_path, crowd=False, category_ids=(90, 7, 23))
    dataset = CocoDataset(folder, path)
    raw = json.loads(path.read_text())["annotations"]
    labels = torch.cat([target["labels"] for _, target in dataset])
    assert [dataset.categories[label].id for label in labels] == [a["category_id"] for a in raw]
    assert [category.id for category in dataset.categories] == [7, 23, 90]


def test_given_categories_decide_the_labels(tmp_path):
    folder, path = write_coco(tmp_path, crowd=False)
    model_categories = [Category(90, "c"), Category(1, "unused"), Category(23, "b"), Category(7, "a")]
    labels = CocoDataset(folder, path)[0][1]["labels"]
    other = CocoDataset(folder, path, categories=model_categories)[0][1]["labels"]
    assert other.tolist() == [{0: 3, 1: 2, 2: 0}[label] for label in labels.tolist()]


def test_crowds_are_left_out_unless_asked_for(tmp_path):
    files = write_coco(tmp_path)
    assert len(CocoDataset(*files)[0][1]["labels"]) == 3
    target = CocoDataset(*files, keep_crowd=True)[0][1]
    assert target["iscrowd"].tolist() == [0, 0, 0, 1]
    assert len(target["boxes"]) == len(target["masks"]) == 4


def test_boxes_are_clipped_to_the_image(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    dataset = CocoDataset(tmp_path, coco(annotation(bbox=[-5, 30, 70, 30])))
    assert dataset[0][1]["boxes"].tolist() == [[0, 30, 60, 40]]


def test_a_file_without_masks_gives_no_masks(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    box_only = annotation()
    del box_only["segmentation"]
    dataset = CocoDataset(tmp_path, coco(box_only))
    assert set(dataset[0][1]) == {"image_id", "boxes", "labels"}


def test_transforms_get_image_and_target(tmp_path):
    dataset = CocoDataset(
        *write_coco(tmp_path), transforms=lambda image, target: (image[:, :9], {"id": target["image_id"]})
    )
    image, target = dataset[1]
    assert (image.shape, target) == ((3, 9, 64), {"id": 103})


def test_works_in_loader_workers_and_survives_pickling(tmp_path):
    dataset = CocoDataset(*write_coco(tmp_path))
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert [target["image_id"] for _, targets in batches for target in targets] == dataset.image_ids
    assert isinstance(batches[0][0], list)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2][0], dataset[2][0])


def test_indexing_past_the_end(tmp_path):
    dataset = CocoDataset(*write_coco(tmp_path))
    assert torch.equal(dataset[-1][0], dataset[3][0])
    with pytest.raises(IndexError, match="index 4 is out of range for 4 images"):
        dataset[4]


# --- bad files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("\xff", "not UTF-8 text"),
        ("[]", "not a COCO file; expected an object with the lists images, annotations and categories"),
        ('{"images": [], "annotations": {}, "categories": []}', "not a COCO file"),
    ],
)
def test_what_is_no_coco_file_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=rf"labels\.json(, line 1)?: {message}"):
        read_coco(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (coco(images=[IMAGE, IMAGE]), "image 5 is listed twice"),
        (coco(images=[{**IMAGE, "width": 0}]), "an image needs a whole-number id"),
        (coco(images=[{**IMAGE, "id": "x"}]), "an image needs a whole-number id"),
        (coco(images=["a.png"]), "an image needs .* got a.png"),
        (coco(categories=[{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]), "category 7 is listed twice"),
        (coco(categories=[{"id": 7}]), "a category needs a whole-number id and a name"),
    ],
)
def test_broken_images_and_categories_are_always_errors(data, message):
    with pytest.raises(DataError, match=message):
        read_coco(data)


def test_a_missing_image_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder of images"):
        CocoDataset(tmp_path / "nowhere", coco())


def test_a_used_category_that_the_model_does_not_know_is_an_error(tmp_path):
    data = coco(annotation(), categories=[{"id": 7, "name": "cat"}, {"id": 8, "name": "unused"}])
    with pytest.raises(DataError, match=r"category 7 \(cat\); the classes of the model are 1 \(a\), 2 \(b\)\."):
        CocoDataset(tmp_path, data, categories=[Category(1, "a"), Category(2, "b")])
    assert CocoDataset(tmp_path, data, categories=[Category(7, "cat")]).categories == (Category(7, "cat"),)


# --- bad annotations -----------------------------------------------------------------------------------------

UNUSABLE = {
    "no width": (
        annotation(segmentation=None, bbox=[10, 10, 0, 10]),
        r"annotation 3: its box \[10, 10, 0, 10\] has no area inside",
    ),
    "negative height": (
        annotation(segmentation=None, bbox=[10, 10, 5, -1]),
        "has no area inside the image of 60 x 40 pixels",
    ),
    "outside": (annotation(bbox=[60, 10, 10, 10]), "has no area inside"),
    "left of the image": (annotation(bbox=[-10, 10, 10, 10]), "has no area inside"),
    "vanishing": (annotation(bbox=[59.999999999, 10, 1, 10]), "has no area inside"),
    "NaN": (annotation(segmentation=None, bbox=[10, 10, float("nan"), 10]), "non-numeric values"),
    "text": (annotation(segmentation=None, bbox=[10, 10, "10", 10]), "non-numeric values"),
    "huge": (annotation(segmentation=None, bbox=[10, 10, 10**400, 10]), "annotation 3"),
    "three numbers": (annotation(segmentation=None, bbox=[10, 10, 10]), r"bbox = \[x, y, width, height\]"),
    "no box": ({"id": 3, "image_id": 5, "category_id": 7}, "it needs image_id, category_id and bbox"),
    "unknown image": (annotation(image_id=6), "its image 6 is not in the file"),
    "unknown category": (annotation(category_id=8), "its category 8 is not in the file"),
    "no object": ("rubbish", "the annotation at position 0: it needs"),
    "no id": ({"category_id": 7}, "the annotation at position 0"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_annotations_are_skipped_and_reported_or_errors(case, tmp_path, caplog):
    bad, message = UNUSABLE[case]
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(coco(bad, annotation(id=4, bbox=[20, 20, 10, 10]))))
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(tmp_path, path)
    assert dataset[0][1]["boxes"].tolist() == [[20, 20, 30, 30]]
    assert len(dataset.skipped.annotations) == 1
    assert len(caplog.records) == 1
    assert "labels.json: skipped 1 of 2 annotations" in caplog.text
    assert str(dataset.skipped) == "skipped 1 annotations and 0 images"
    with pytest.raises(DataError, match=rf"labels\.json: .*{message}"):
        CocoDataset(tmp_path, path, strict=True)


def test_many_problems_are_one_message(caplog):
    with caplog.at_level(logging.WARNING):
        file = read_coco(coco(*(annotation(id=i, category_id=8) for i in range(50))))
    assert len(file.problems) == 50
    assert len(caplog.records) == 1
    assert "annotation 9:" in caplog.text
    assert "annotation 10:" not in caplog.text
    assert "and 40 more" in caplog.text


def test_odd_but_usable_annotations(caplog):
    no_id = annotation()
    del no_id["id"]
    file = read_coco(coco(annotation(id=0), annotation(id=0), no_id, annotation(iscrowd=1, area=float("nan"))))
    assert [(a.area, a.iscrowd) for a in file.annotations[5]] == [(100, False)] * 3 + [(100, True)]
    assert file.problems == ()
    assert not caplog.records
    assert read_coco(file) is file


# --- bad images ----------------------------------------------------------------------------------------------


@pytest.fixture
def with_bad_images(tmp_path):
    """Four images, of which number 1 is missing and number 2 is cut off."""
    folder, path = write_coco(tmp_path)
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:-400])
    return folder, path


def test_the_next_readable_image_stands_in_for_an_unreadable_one(with_bad_images, caplog):
    dataset = CocoDataset(*with_bad_images)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [target["image_id"] for _, target in dataset] == [100, 109, 109, 109]
    assert dataset.skipped.images == ("1.png", "2.png")
    assert len(caplog.records) == 2
    assert "1.png: no such file" in caplog.text


def test_unreadable_images_met_by_workers_are_counted_here(with_bad_images):
    dataset = CocoDataset(*with_bad_images)
    list(DataLoader(dataset, collate_fn=collate, num_workers=1))
    assert dataset.skipped.images == ("1.png", "2.png")


def test_strict_makes_unreadable_images_errors(with_bad_images):
    dataset = CocoDataset(*with_bad_images, strict=True)
    with pytest.raises(ImageError, match=r"1\.png: no such file"):
        dataset[1]
    with pytest.raises(ImageError, match=r"2\.png: not a readable image \(.+\)\.$"):
        dataset[2]


def test_nothing_but_unreadable_images_is_an_error(tmp_path):
    dataset = CocoDataset(tmp_path, coco(images=[{**IMAGE, "id": i} for i in range(30)]))
    with pytest.raises(ImageError, match=r"16 images in a row are unreadable, the last is a\.png"):
        dataset[20]


def test_an_image_of_another_size_is_unreadable(tmp_path):
    folder, path = write_coco(tmp_path)
    edit(path, lambda data: data["images"][0].update(height=63, width=80))
    dataset = CocoDataset(folder, path)
    assert "the mask's size is [64, 80], the image's [height, width] is [63, 80]" in dataset.coco.losses[0]
    assert dataset[0][1]["image_id"] == 103
    assert dataset.skipped.images == ("0.png",)
    with pytest.raises(
        ImageError, match=r"0\.png: the image has 80 x 64 pixels \(width x height\), the annotations give 80 x 63"
    ):
        read_image(folder / "0.png", size=(63, 80))


# --- reading images ------------------------------------------------------------------------------------------


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 257 * 100 + 129, (101, 101, 101)),
        ("I;16", 257 * 100 + 128, (100, 100, 100)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, color, expected):
    image = read_image(saved(tmp_path, Image.new(mode, (5, 4), color)))
    assert (image.shape, image.dtype) == ((3, 4, 5), torch.uint8)
    assert tuple(image[:, 2, 3].tolist()) == expected


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert read_image(saved(tmp_path, image))[:, 0, 0].tolist() == [10, 20, 30]
    assert read_image(saved(tmp_path, image, transparency=1))[:, 0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg(tmp_path):
    image = read_image(saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg"))
    assert image[:, 8, 8].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    image = read_image(saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:]))
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def test_gray_values_without_an_agreed_range_are_errors(tmp_path):
    with pytest.raises(
        ImageError, match=r"a\.tif: not a readable image \(floating-point gray values have no standard range"
    ):
        read_image(saved(tmp_path, Image.new("F", (5, 4), 0.5), "a.tif"))
    with pytest.raises(ImageError, match="gray values of 70000 to 70000 don't fit 16 bits"):
        read_image(saved(tmp_path, Image.new("I", (5, 4), 70000), "b.tif"))


def test_exif_is_obeyed_and_annotations_that_contradict_are_an_error(tmp_path):
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, :] = 255  # the top row
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the top row becomes the right column
    path = saved(tmp_path, Image.fromarray(stored), exif=exif)
    turned = read_image(path)
    assert turned.shape == (3, 6, 4)
    assert turned[0, :, -1].eq(255).all()
    assert turned[0, :, :-1].eq(0).all()
    assert torch.equal(read_image(path, size=(6, 4)), turned)
    with pytest.raises(ImageError, match="the size without its EXIF orientation"):
        read_image(path, size=(4, 6))
    with pytest.raises(ImageError, match=r"the image has 4 x 6 pixels \(width x height\), the annotations give 5 x 6"):
        read_image(path, size=(6, 5))


@pytest.mark.parametrize("size", [(1, 1), (20000, 30)])
def test_extreme_sizes(tmp_path, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(saved(tmp_path, Image.new("RGB", size))).shape == (3, *size[::-1])


def test_what_is_no_image_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ImageError, match=r"a\.png: not a readable image \(expected one of JPEG"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"b\.png: not a readable image \(30 x 30 = 900 pixels exceed the limit"):
        read_image(saved(tmp_path, Image.new("RGB", (30, 30)), "b.png"), max_pixels=899)


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_a_sample_made_of_bytes_is_the_samples_of_the_folder(tmp_path):
    folder, annotations = write_coco(tmp_path)
    maps = tmp_path / "maps"
    maps.mkdir()
    for path in folder.iterdir():
        Image.open(path).convert("L").save(maps / path.name)
    dataset = CocoDataset(folder, annotations, semantic=maps, keep_crowd=True)
    for index, image_id in enumerate(dataset.image_ids):
        entry = dataset.coco.images[image_id]
        image, target = dataset.make_sample(
            entry,
            dataset.coco.annotations[image_id],
            (folder / entry.file_name).read_bytes(),
            semantic=(maps / entry.file_name).read_bytes(),
        )
        expected_image, expected = dataset[index]
        assert torch.equal(image, expected_image)
        assert target.keys() == expected.keys() == set(dataset.target_keys)
        for key, value in expected.items():
            got = target[key]
            if key == "masks":
                got, value = got.dense(), value.dense()
            assert got == value if key == "image_id" else torch.equal(got, value), key


def test_messages_name_images_that_are_given_as_bytes():
    with pytest.raises(ImageError, match=r"shard/7\.jpg: not a readable image"):
        read_image(b"no image", name="shard/7.jpg")
    maker, picture = SampleMaker(()), png(Image.new("RGB", (1, 2)))
    with pytest.raises(ImageError, match=r"^a\.png: the image has 1 x 2 pixels"):
        maker(CocoImage(5, "a.png", 3, 4), [], picture)
    with pytest.raises(ImageError, match=r"^the semantic map of a\.png: the map has size \(width, height\) \(3, 2\)"):
        maker(CocoImage(5, "a.png", 2, 1), [], picture, semantic=png(Image.new("L", (3, 2))))
