import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import fails, run, save

from a2fpn.config import Category, PreprocessConfig
from a2fpn.data import DataError, check_data, read_coco
from a2fpn.inference.draw import draw_grid
from a2fpn.inference.report import draw_report
from a2fpn.preprocess import Preprocess
from tests.coco_data import write_coco

SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]
RLE = {"size": [40, 60], "counts": [400 + 10, *[20, 20] * 19, 20, 40 * 60 - 410 - 20 * 39]}
IMAGES = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2, 3)]
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]


def annotation(number, **changes):
    return {
        "id": number,
        "image_id": 1 + number % 3,
        "category_id": 7 + number % 2 * 2,
        "bbox": [10, 10, 20, 20],
        "segmentation": SQUARE if number % 2 else RLE,
        "iscrowd": 0,
        "area": 400,
    } | changes


def coco(**lists):
    return {
        "images": copy.deepcopy(IMAGES),
        "annotations": [annotation(number) for number in range(1, 7)],
        "categories": copy.deepcopy(CATEGORIES),
    } | lists


def codes(report, severity=None):
    return [finding.code for finding in report.findings if severity in (None, finding.severity)]


def find(report, code):
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


def check(data, **options):
    return check_data(None, data, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of `coco`."""
    for entry in IMAGES:
        Image.new("RGB", (60, 40), "gray").save(tmp_path / entry["file_name"])
    return tmp_path


def test_clean_data_has_no_findings(folder):
    report = check_data(folder, coco(), decode=True)
    assert report.findings == ()
    assert (report.images, report.annotations, report.opened) == (3, 6, 3)
    assert [(c.category.id, c.objects, c.images, c.crowds, c.median_size) for c in report.classes] == [
        (7, 3, 3, 0, 20.0),
        (9, 3, 3, 0, 20.0),
    ]
    assert str(report).endswith("0 errors, 0 warnings, 0 notes")


NO_MASK = {"segmentation": None}
LEFT_OUT = {
    "bad-ids": [
        {"category_id": "7"},
        {"image_id": None},
        {"image_id": 1.0},
        {"category_id": [7]},
        {"image_id": {"id": 1}},
    ],
    "unknown-image": [{"image_id": 99}, {"image_id": 2**70 % 2**62}],
    "unknown-category": [{"category_id": 8}, {"category_id": -1}],
    "bad-box": [
        {"bbox": None} | NO_MASK,
        {"bbox": [1, 2, 3]} | NO_MASK,
        {"bbox": [1, 2, float("nan"), 4]} | NO_MASK,
        {"bbox": [1, 2, float("inf"), 4]} | NO_MASK,
        {"bbox": [1, 2, 10**400, 4]} | NO_MASK,
        {"bbox": ["1", 2, 3, 4]} | NO_MASK,
        {"bbox": "1234"} | NO_MASK,
    ],
    "empty-box": [{"bbox": [5, 5, side, 9]} | NO_MASK for side in (0, -1, 0.001)],
    "box-outside": [{"bbox": [60, 5, 9, 9]}, {"bbox": [-9, 5, 9, 9]}, {"bbox": [5, 1e300, 9, 9]}],
}

KEPT_WITHOUT_MASK = {
    "bad-polygon": [
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        {"segmentation": [[10, 10, 30, 10, 30, float("nan")]]},
        {"segmentation": [[10, 10, 30, 10, 30, 1e7]]},
        {"segmentation": [10, 10, 30, 10, 30, 30]},
        {"segmentation": [[[10, 10], [30, 10], [30, 30]]]},
    ],
    "bad-mask": [
        {"segmentation": {"size": [40, 60], "counts": [5]}},
        {"segmentation": {"size": [60, 40], "counts": [2400]}},
        {"segmentation": {"size": [40, 60], "counts": "\ud800"}},
        {"segmentation": {"counts": [2400]}},
        {"segmentation": "text"},
        {"segmentation": 5},
    ],
    "empty-mask": [
        {"segmentation": [[10, 10, 20, 10, 30, 10]]},
        {"segmentation": {"size": [40, 60], "counts": [2400]}},
        {"segmentation": [[70, 10, 90, 10, 90, 30]]},
    ],
}


@pytest.mark.parametrize(
    ("code", "change"), [(code, change) for code, changes in LEFT_OUT.items() for change in changes], ids=str
)
def test_what_the_reader_leaves_out_is_named(code, change):
    data = coco()
    data["annotations"][2] |= change
    report = check(data)
    finding = find(report, code)
    assert set(codes(report)) - {"no-segmentation"} == {code}
    assert (finding.severity, finding.count, finding.fatal) == ("warning", 1, False)
    assert "in 1 of 6 annotations: 3" in finding.message
    assert "The reader skips them." in finding.advice
    assert len(read_coco(data).problems) == 1
    assert sum(count.objects for count in report.classes) == 5


@pytest.mark.parametrize(
    ("code", "change"), [(code, change) for code, changes in KEPT_WITHOUT_MASK.items() for change in changes], ids=str
)
def test_a_mask_that_cannot_be_used_leaves_the_box(code, change):
    data = coco()
    data["annotations"][2] |= change
    report = check(data)
    assert codes(report) == [code]
    assert find(report, code).advice.endswith("The reader keeps the boxes without a mask.")
    assert sum(count.objects for count in report.classes) == 6
    file = read_coco(data)
    assert (len(file.problems), len(file.losses)) == (0, 1)
    (bare,) = [a for annotations in file.annotations.values() for a in annotations if a.mask is None]
    assert bare.bbox == (10, 10, 20, 20)
    with pytest.raises(DataError, match=r"annotation 3: .*without"):
        read_coco(data, strict=True)


def test_keypoints_of_another_number_are_named():
    data = coco()
    for entry in data["annotations"]:
        entry["keypoints"] = [1, 2, 2] * 3
    assert codes(check(data)) == []
    data["annotations"][0]["keypoints"] = [1, 2, 2] * 2
    data["annotations"][1]["keypoints"] = [1, 2, "x"] * 3
    data["annotations"][2]["keypoints"] = []
    data["categories"][1]["keypoints"] = ["a", "b", "c"]
    assert find(check(data), "bad-keypoints").count == 2
    file = read_coco(data)
    assert (len(file.problems), len(file.losses)) == (0, 2)
    assert sum(bool(a.keypoints) for annotations in file.annotations.values() for a in annotations) == 3


@pytest.mark.parametrize(
    ("code", "severity", "change"),
    [
        ("annotation-id-zero", "note", {"id": 0}),
        ("duplicate-annotation-id", "warning", {"id": 2}),
        ("no-annotation-id", "note", {"id": "3"}),
        (
            "box-over-edge",
            "note",
            {"bbox": [10, 10, 20, 31.5], "segmentation": [[10, 10, 30, 10, 30, 41, 10, 41]], "area": 620},
        ),
        (
            "box-far-over-edge",
            "warning",
            {"bbox": [10, 10, 20, 61], "segmentation": [[10, 10, 30, 10, 30, 71, 10, 71]], "area": 1220},
        ),
        ("mask-box-mismatch", "warning", {"bbox": [10, 10, 20, 24]}),
        ("mask-box-mismatch", "warning", {"bbox": [14, 10, 20, 20]}),
        ("no-segmentation", "warning", {"segmentation": []}),
        ("no-segmentation", "warning", {"segmentation": None}),
        ("no-segmentation", "warning", {"segmentation": {}}),
        ("box-from-mask", "note", {"bbox": None}),
        ("box-from-mask", "note", {"bbox": [5, 5, 0, 9]}),
        ("box-from-mask", "note", {"bbox": [5, 5, 9, -1]}),
        ("box-from-mask", "note", {"bbox": ["1", 2, 3, 4]}),
        ("bad-area", "warning", {"area": 0}),
        ("bad-area", "warning", {"area": -1}),
        ("bad-area", "warning", {"area": "400"}),
        ("bad-area", "warning", {"area": float("inf")}),
        ("area-mismatch", "warning", {"area": 194.5}),
        ("area-mismatch", "warning", {"area": 810.5}),
        ("area-mismatch", "warning", {"area": 0.4}),
        ("bad-iscrowd", "warning", {"iscrowd": "perhaps"}),
        ("bad-iscrowd", "warning", {"iscrowd": 2}),
        ("bad-iscrowd", "warning", {"iscrowd": []}),
    ],
)
def test_what_is_kept_but_doubtful_is_named(code, severity, change):
    data = coco()
    data["annotations"][2] |= change
    report = check(data)
    assert codes(report) == [code]
    assert find(report, code).severity == severity
    assert read_coco(data).problems == ()


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [10, 10, 20, 30.9], "segmentation": [[10, 10, 30, 10, 30, 40, 10, 40]], "area": 600},
        {"bbox": [12.9, 10, 17.1, 20]},
        {"bbox": [10, 10, 48, 20], "segmentation": [[10, 10, 53.5, 10, 53.5, 30, 10, 30]], "area": 870},
        {"iscrowd": False},
        {"iscrowd": "0"},
        {"area": 195.5},
        {"area": 809.5},
        {"area": None},
    ],
)
def test_what_is_within_tolerance_is_not_named(change):
    data = coco()
    data["annotations"][2] |= change
    assert codes(check(data)) == []


def test_images_and_categories_for_which_the_reader_refuses_the_file():
    for key, entry, code in [
        ("images", {"id": 4}, "bad-image"),
        ("images", IMAGES[0] | {"id": "4"}, "bad-image"),
        ("images", IMAGES[0] | {"id": 4, "width": 0}, "bad-image"),
        ("images", 5, "bad-image"),
        ("images", IMAGES[0] | {"file_name": "other.png"}, "duplicate-image-id"),
        ("categories", {"id": 3}, "bad-category"),
        ("categories", {"id": 7, "name": "cow"}, "duplicate-category-id"),
    ]:
        data = coco()
        data[key].append(entry)
        finding = find(check(data), code)
        assert (finding.severity, finding.fatal, finding.count) == ("error", True, 1)
        with pytest.raises(DataError):
            read_coco(data)


def test_several_images_of_one_file():
    data = coco()
    data["images"][2]["file_name"] = "1.png"
    finding = find(check(data), "duplicate-file-name")
    assert (finding.severity, finding.count, finding.image_ids) == ("warning", 1, (1, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("9" * 5000, "JSON"),
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        ('{"images": [], "annotations": {}}', "has no list annotations, categories"),
    ],
)
def test_what_is_no_coco_file_is_one_fatal_finding(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    (finding,) = check(path).findings
    assert finding.code == "no-coco"
    assert message in finding.message
    assert finding.fatal


def test_files_that_cannot_be_opened_are_errors_of_the_caller(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        check(tmp_path / "none.json")
    with pytest.raises(DataError, match="no such folder of images"):
        check_data(tmp_path / "none", coco())
    with pytest.raises(ValueError, match="sample must be 0 or more, got -1"):
        check(coco(), sample=-1)


def test_data_that_teaches_nothing_is_fatal():
    everything = {
        "all-crowd": coco(annotations=[annotation(n, iscrowd=1) for n in range(1, 7)]),
        "no-usable-objects": coco(annotations=[annotation(n, bbox=[100, 10, 20, 20]) for n in range(1, 7)]),
        "no-annotations": coco(annotations=[]),
        "no-images": coco(images=[]),
        "box-shares": coco(annotations=[annotation(n, bbox=[0.1, 0.2, 0.5, 0.5]) for n in range(1, 7)]),
    }
    for code, data in everything.items():
        report = check(data)
        assert code in [finding.code for finding in report.fatal], code
        assert str(report).endswith("training would be in vain")
    assert "(box-outside: 6)" in find(check(everything["no-usable-objects"]), "no-usable-objects").message


def test_crowds_are_counted_and_a_class_of_crowds_is_an_error():
    data = coco()
    for entry in data["annotations"][1::2]:
        entry["iscrowd"] = 1
    report = check(data)
    assert codes(report) == ["class-all-crowd", "crowds"]
    assert "1 of 2 classes: 7 ('cat')" in find(report, "class-all-crowd").message
    assert find(report, "crowds").message == "50.0% of the usable annotations are crowds (3)."
    assert report.fatal == ()
    assert [count.crowds for count in report.classes] == [3, 0]
    data["annotations"][0]["iscrowd"] = 1
    assert find(check(data), "crowds").severity == "warning"


def test_classes_and_images_without_objects():
    data = coco(categories=[*CATEGORIES, {"id": 1, "name": "cow"}])
    data["images"].append({"id": 4, "file_name": "4.png", "height": 40, "width": 60})
    report = check(data)
    assert codes(report) == ["class-without-object", "image-without-annotation"]
    assert "1 of 3 classes: 1 ('cow')" in find(report, "class-without-object").message
    assert find(report, "image-without-annotation").image_ids == (4,)


def test_boxes_given_as_corners():
    boxes = [[30, 10, 50, 30], [5, 5, 25, 25], [40, 20, 59, 39]] * 2
    entries = [annotation(n + 1, bbox=box, segmentation=None) for n, box in enumerate(boxes)]
    assert "box-corners" in codes(check(coco(annotations=entries)), "error")
    right = [annotation(n + 1, bbox=[x, y, u - x, v - y], segmentation=None) for n, (x, y, u, v) in enumerate(boxes)]
    assert codes(check(coco(annotations=right))) == []


def test_categories_must_fit_the_model_and_the_other_file():
    model = (Category(7, "cat"), Category(9, "dog"))
    assert codes(check(coco(), categories=model, against=coco())) == []

    more = check(coco(), categories=(*model, Category(1, "cow")))
    assert codes(more) == ["class-not-in-data"]
    fewer = check(coco(), categories=model[:1])
    assert find(fewer, "unknown-class").fatal
    assert "doesn't know: 9 ('dog')" in find(fewer, "unknown-class").message

    named = find(check(coco(), categories=(Category(7, "CAT"), Category(9, "cow"))), "category-names")
    assert "9 is 'cow' for the model and 'dog'" in named.message

    shifted = find(check(coco(), categories=(Category(8, "cat"), Category(10, "dog"))), "no-common-category")
    assert shifted.fatal
    assert "2 of the names agree with ids 1 lower" in shifted.message

    cats = coco(annotations=[annotation(n) for n in (2, 4, 6)])
    assert find(check(coco(), against=cats), "class-not-measured").count == 1
    assert find(check(cats, against=coco()), "class-not-learned").count == 1
    swapped = check(coco(), against=cats, against_is="training")
    assert find(swapped, "class-not-learned").count == 1
    alone = check(cats)
    assert find(alone, "class-without-object").count == 1
    assert "class-without-object" not in codes(check(cats, against=coco()), "warning")  # said by the comparison
    broken = check(coco(), against={"images": []})
    assert codes(broken, "error") == ["no-coco"]


def exif(path, size, orientation):
    image = Image.new("RGB", size, "gray")
    tags = image.getexif()
    tags[274] = orientation
    image.save(path, exif=tags)


def test_files_are_compared_with_what_the_json_says(folder):
    names = {
        "exif-turned": "turned.tif",
        "exif-ignored": "ignored.jpg",
        "exif-ambiguous": "ambiguous.png",
        "size-mismatch": "size.png",
        "unreadable-file": "text.png",
        "missing-file": "nowhere.png",
        None: "good.png",
    }
    exif(folder / "turned.tif", (40, 60), 6)
    exif(folder / "ignored.jpg", (60, 40), 8)
    exif(folder / "ambiguous.png", (60, 40), 3)
    Image.new("L", (40, 60)).save(folder / "size.png")
    (folder / "text.png").write_text("no image")
    exif(folder / "good.png", (60, 40), 1)
    images = [IMAGES[0] | {"id": 1 + n, "file_name": name} for n, name in enumerate(names.values())]
    report = check_data(folder, coco(images=images))
    found = {finding.code: finding for finding in report.findings if finding.code != "image-without-annotation"}
    assert set(found) == set(names) - {None}
    for number, code in enumerate(names, 1):
        if code is not None:
            assert found[code].image_ids == (number,), code
            assert f"in 1 of 7 opened images: {number} ({names[code]!r})" in found[code].message
            assert not found[code].fatal
    assert codes(report, "error") == ["exif-ignored", "size-mismatch", "unreadable-file", "missing-file"]
    assert "40 x 60 instead of 60 x 40" in found["size-mismatch"].message


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "\ud800.png", "", ".", "../" * 50, "/dev/zero", "[red].png"])
def test_hostile_file_names_are_missing_or_unreadable(folder, name):
    data = coco()
    data["images"][0]["file_name"] = name
    report = check_data(folder, data, examples=3)
    assert codes(report, "error")[0] in ("missing-file", "unreadable-file", "outside-folder")
    str(report).encode()
    draw_report(report, folder)


def test_truncated_files_are_found_by_decoding(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    assert codes(check_data(folder, coco())) == []
    report = check_data(folder, coco(), decode=True)
    assert find(report, "unreadable-file").image_ids == (1,)


def test_without_any_file_training_is_in_vain_and_the_right_folder_is_named(folder):
    deep = folder / "deep"
    deep.mkdir()
    for entry in IMAGES:
        (folder / entry["file_name"]).rename(deep / entry["file_name"])
    finding = find(check_data(folder, coco()), "missing-file")
    assert finding.fatal
    assert f"'1.png' lies in {deep}." in finding.advice


def test_a_sample_of_files_is_spread_evenly(tmp_path):
    images = [IMAGES[0] | {"id": n, "file_name": f"{n}.png"} for n in range(101)]
    report = check_data(tmp_path, coco(images=images), sample=3)
    assert report.opened == 3
    assert find(report, "missing-file").image_ids == (0, 50, 100)
    assert check_data(tmp_path, coco(images=images), sample=0).opened == 0
    assert check_data(tmp_path, coco(images=images), sample=1000).opened == 101


def test_sizes_are_those_of_the_networks_input():
    rule = Preprocess(PreprocessConfig(min_size=80, max_size=1000), divisor=1)
    report = check(coco(), target_size=rule.target_size)
    assert [count.median_resized for count in report.classes] == [40.0, 40.0]
    assert codes(report) == ["object-size"]
    assert "measures 20.0 pixels, and 40.0 in the network's input" in find(report, "object-size").message

    small = find(check(coco(), target_size=lambda height, width: (height // 4, width // 4)), "object-size")
    assert small.severity == "warning"
    assert "enlarge the input 6.4 times" in small.advice
    large = find(check(coco(), target_size=lambda height, width: (height * 20, width * 20)), "object-size")
    assert large.severity == "note"
    assert "0.64 times" in large.advice


def test_anchors_that_do_not_fit_come_with_ones_that_do():
    def finding(box, size, segmentation=None):
        entries = [annotation(n, bbox=box, segmentation=segmentation) for n in range(1, 7)]
        options = {
            "target_size": lambda *size: size,
            "anchor_sizes": [[size], [2 * size]],
            "anchor_ratios": (0.5, 1, 2),
        }
        return find(check(coco(annotations=entries), **options), "anchors")

    assert finding([10, 10, 20, 20], 16).severity == "note"
    smaller = finding([10, 10, 20, 20], 64)
    assert smaller.severity == "warning"
    assert "shape of 0% of the objects" in smaller.message
    assert "anchor_sizes=[[16], [32]]" in smaller.advice or "anchor_sizes=[[32], [64]]" in smaller.advice
    longer = finding([2, 10, 56, 9], 16)
    assert "anchor_ratios=[0.25, 0.5, 1, 2, 4]" in longer.advice


def test_anchors_that_fit_no_object_of_a_class_are_found():
    """AP is the mean over classes: many small objects do not hide a few large ones."""
    small = [annotation(n, bbox=[10, 10, 8, 8], category_id=7, segmentation=None) for n in range(1, 39)]
    large = [annotation(n, bbox=[0, 0, 40, 40], category_id=9, segmentation=None) for n in (39, 40)]
    options = {"target_size": lambda *size: size, "anchor_sizes": [[8]], "anchor_ratios": (1,)}
    found = find(check(coco(annotations=[*small, *large]), **options), "anchors")
    assert "shape of 50% of the objects, each class counted alike (IoU" in found.message
    assert found.count == 2
    alone = find(check(coco(annotations=small), **options), "anchors")
    assert "shape of 100% of the objects (IoU" in alone.message


def test_the_report_is_json_and_text():
    data = coco(categories=[*CATEGORIES, *({"id": 100 + n, "name": f"class {n}\x1b[31m\ud800"} for n in range(60))])
    report = check(data)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["classes"][0] == {
        "id": 7,
        "name": "cat",
        "objects": 3,
        "images": 3,
        "crowds": 0,
        "median_size": 20.0,
        "median_resized": None,
    }
    assert again["findings"][0]["code"] == "class-without-object"
    text = str(report)
    text.encode()
    assert "\x1b" not in text
    assert "... 22 more ..." in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_track_sees_every_loop(folder):
    seen = []

    def track(items, description, total):
        seen.append((description, total))
        return items

    check_data(folder, coco(), track=track)
    assert seen == [("reading annotations", 6), ("checking masks", 6), ("opening images", 3)]


def test_real_data_has_no_errors():
    if "A2FPN_DATA" not in os.environ:
        pytest.skip("A2FPN_DATA names no folder of COCO sets")
    files = sorted(Path(os.environ["A2FPN_DATA"]).glob("*/annotations/*.json"))
    assert files
    for path in files:
        images = path.parent.parent / "images"
        deeper = images / path.stem.rpartition("_")[2]
        report = check_data(deeper if deeper.is_dir() else images, path, decode=True, examples=4)
        assert report.errors == (), path
        assert read_coco(path).problems == ()
        assert len(report.examples) == 4


# --- hostile input -------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.text(max_size=3),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))
KEYS = ["id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "area", "file_name", "height", "width"]
near = st.one_of(
    values,
    st.integers(-1, 12),
    st.lists(st.floats(-10, 70) | st.sampled_from([float("nan"), 1e308, 10**400]), min_size=4, max_size=4),
    st.lists(st.lists(st.floats(-10, 70) | scalars, max_size=9), max_size=3),
    st.fixed_dictionaries(
        {"size": st.sampled_from([[40, 60], [60, 40], [1, 1], "40"]), "counts": st.text() | st.lists(st.integers())}
    ),
)
entries = st.dictionaries(st.sampled_from([*KEYS, "name", "keypoints"]), near, max_size=3)


@st.composite
def damaged(draw):
    """A COCO file with some entries changed, emptied or replaced."""
    data = coco()
    for _ in range(draw(st.integers(0, 6))):
        key = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
        position = draw(st.integers(0, len(data[key]) - 1))
        if isinstance(data[key][position], dict):
            data[key][position] = draw(st.just(data[key][position] | draw(entries)) | values)
    if draw(st.integers(0, 9)) == 0:
        data[draw(st.sampled_from(["images", "annotations", "categories"]))] = draw(values)
    return data


def always(data, folder):
    """What holds for the report of any data."""
    options = {"target_size": lambda height, width: (2 * height, 2 * width), "anchor_sizes": [[8], [16]]}
    report = check_data(folder, data, against=data, categories=(Category(7, "cat"),), examples=2, **options)
    str(report).encode()
    assert json.loads(json.dumps(report.to_dict()))["images"] == report.images
    assert all(finding.count >= 0 and finding.message and finding.advice for finding in report.findings)
    return report


relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(data=values | st.dictionaries(st.sampled_from(["images", "annotations", "categories"]), st.lists(values)))
def test_any_json_gives_a_report(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data, default=str) if not _too_long(data) else "0")
    always(path, tmp_path)
    if isinstance(data, dict):
        always(data, tmp_path)


def _too_long(data):
    try:
        json.loads(json.dumps(data))
    except ValueError:
        return True
    return False


@relaxed
@given(data=damaged())
def test_damaged_data_gives_a_report_that_knows_what_the_reader_does(folder, data):
    report = always(data, folder)
    try:
        coco_file = read_coco(data)
    except (DataError, TypeError, OverflowError):
        assert report.fatal
        return
    usable = sum(count.objects + count.crowds for count in report.classes)
    kept = sum(map(len, coco_file.annotations.values()))
    if "bad-image" not in codes(report) and "bad-category" not in codes(report):  # else the reader takes more
        assert usable <= kept
    if coco_file.problems:
        assert any("The reader skips them" in finding.advice for finding in report.findings)
    elif kept and not report.fatal:
        assert usable > 0


# --- pictures ------------------------------------------------------------------------------------------------------


def test_images_with_findings_are_drawn_first(tmp_path):
    images, path = write_coco(tmp_path, images=6)
    data = json.loads(path.read_text())
    (images / "4.png").unlink()
    data["annotations"][6]["bbox"] = [500, 5, 10, 10]
    report = check_data(images, data, examples=4)
    assert [example.image_id for example in report.examples[:2]] == [112, 103]
    assert report.examples[0].codes == ("missing-file",)
    assert "box-outside" in report.examples[1].codes
    assert len(report.examples) == 4
    picture = draw_report(report, images)
    assert picture.width == 3 * 664 + 24


def test_the_cells_of_a_grid_hold_their_pictures_apart(tmp_path):
    images, path = write_coco(tmp_path, images=4, size=(64, 80))
    report = check_data(images, path, examples=4)
    picture = np.asarray(draw_report(report, images))
    columns = (picture == 255).all(axis=(0, 2))
    assert columns[:24].all()
    assert columns[24 + 640 : 48 + 640].all()
    assert not columns[24:600].all()
    rows = (picture == 255).all(axis=(1, 2))
    assert rows[:24].all()
    assert rows[-24:].all()


def test_a_grid_needs_images_and_a_remark_for_each():
    with pytest.raises(ValueError, match="at least one image, got 1 for 0"):
        draw_grid([], [""])
    with pytest.raises(ValueError, match="no images to draw"):
        draw_report(check(coco()), ".")


# --- command line --------------------------------------------------------------------------------------------------


def test_check_data_prints_draws_and_writes_its_report(folder, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco()))
    plot, numbers = tmp_path / "look.png", tmp_path / "out.json"
    output = run("check-data", "--images", folder, "--annotations", path, "--plot", plot, "--json", numbers)
    assert "3 images, 6 annotations, 2 classes; 3 image files opened" in output
    assert "0 errors, 0 warnings, 1 note" in output
    assert Image.open(plot).width == 3 * 664 + 24
    assert json.loads(numbers.read_text())["findings"][0]["code"] == "object-size"


def test_exit_codes_tell_errors_from_warnings(tmp_path):
    path = tmp_path / "a.json"
    warned = coco()
    warned["annotations"][0]["bbox"] = [500, 1, 2, 3]
    path.write_text(json.dumps(warned))
    assert "[box-outside]" in run("check-data", "--annotations", path)
    run("check-data", "--annotations", path, "--strict", code=1)
    path.write_text(json.dumps(coco(annotations=[])))
    assert "training would be in vain" in run("check-data", "--annotations", path, code=1)
    path.write_text("no json")
    assert "is not valid JSON" in run("check-data", "--annotations", path, code=1)
    assert "none.json: no such file" in fails("check-data", "--annotations", tmp_path / "none.json")
    assert "no such folder of images" in fails("check-data", "--annotations", path, "--images", tmp_path / "none")
    assert "give --images too" in fails("check-data", "--annotations", path, "--plot", tmp_path / "a.png")
    run("check-data", code=2)


def test_a_model_gives_classes_input_size_and_anchors(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco()))
    model = save(tmp_path / "model", categories=(Category(7, "cat"),), num_classes=1)
    output = run("check-data", "--annotations", path, "--model", model, code=1)
    assert "[unknown-class]" in output
    assert "20.0 pixels, and 32.0 in the network's input" in output
    assert "[anchors]" in output
    output = run("check-data", "--annotations", path, "--model", model, "--min-size", 80, code=1)
    assert "and 40.0 in the network's input" in output
    output = run("check-data", "--annotations", path, "--model", "fcos_fpn_lite0")
    assert "[object-size]" in output
    assert "[anchors]" not in output
    assert "[anchors]" in run("check-data", "--annotations", path, "--model", "retinanet_fpn_lite0")
    assert "min_size <= max_size, got 9000 and 1333" in fails("check-data", "--annotations", path, "--min-size", 9000)
