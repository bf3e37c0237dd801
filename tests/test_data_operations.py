"""COCO files split, merged, cut down and renamed; near-duplicate images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from a2fpn.cli import main
from a2fpn.data import check_data, read_coco
from a2fpn.data.duplicates import image_hash, near_duplicates
from a2fpn.data.operations import load_coco, merge_coco, rename_categories, save_coco, split_coco, subset_coco
from a2fpn.data.plots import draw_stats
from a2fpn.data.stats import coco_stats
from a2fpn.errors import DataError
from tests.coco_data import write_coco


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    _, path = write_coco(tmp_path / "coco", images=10)
    content: dict[str, Any] = json.loads(path.read_text()) | {"info": {"year": 2026}}
    return content


def unchanged(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def test_a_split_parts_images_with_what_belongs_to_them(data: dict[str, Any]) -> None:
    before = unchanged(data)
    parts = split_coco(data, val=0.2, test=0.1)
    assert {name: len(part["images"]) for name, part in parts.items()} == {"train": 7, "val": 2, "test": 1}
    for key in ("images", "annotations"):
        together = [json.dumps(raw) for part in parts.values() for raw in part[key]]
        assert sorted(together) == sorted(json.dumps(raw) for raw in data[key])
    for part in parts.values():
        assert part["categories"] == data["categories"]
        assert part["info"] == {"year": 2026}
        assert read_coco(part, strict=True).problems == ()
    turned = {**data, "images": data["images"][::-1]}
    names = {raw["file_name"] for raw in split_coco(turned, val=0.2, test=0.1)["val"]["images"]}
    assert names == {raw["file_name"] for raw in parts["val"]["images"]}
    assert unchanged(data) == before


def test_parts_merge_to_the_whole(data: dict[str, Any]) -> None:
    parts = split_coco(data, val=0.3)
    merged = merge_coco([parts["train"], parts["val"]])
    assert merged["categories"] == data["categories"]
    assert {raw["id"]: raw["file_name"] for raw in merged["images"]} == {
        raw["id"]: raw["file_name"] for raw in data["images"]
    }
    ids = [raw["id"] for raw in merged["annotations"]]
    assert len(set(ids)) == len(ids) == len(data["annotations"])


def test_merging_maps_classes_by_name_and_numbers_anew(data: dict[str, Any]) -> None:
    other = json.loads(json.dumps(data))
    for raw in other["categories"]:
        raw["id"] += 16
    other["categories"][0]["name"] = "new"
    for raw in other["annotations"]:
        raw["category_id"] += 16
    merged = merge_coco([data, other], prefixes=["", "b/"])
    names = {raw["id"]: raw["name"] for raw in merged["categories"]}
    assert list(names.values()) == ["shape 7", "shape 23", "shape 90", "new"]
    assert len(names) == 4  # shape 7's id was taken by nothing: 23 is shape 23's, so the new class got another
    coco = read_coco(merged, strict=True)
    assert len(coco.images) == 20
    old = {raw["id"]: raw["name"] for raw in other["categories"]}
    wanted = sorted(old[raw["category_id"]] for raw in other["annotations"])
    assert sorted(names[raw["category_id"]] for raw in merged["annotations"][len(data["annotations"]) :]) == wanted
    with pytest.raises(DataError, match=r"the image '0.png' is in files 1 and 2; give the files prefixes"):
        merge_coco([data, other])
    with pytest.raises(DataError, match="two or more files, got 1"):
        merge_coco([data])


def test_merging_refuses_other_keypoints_of_one_class(data: dict[str, Any]) -> None:
    one, two = ({**data, "images": [], "annotations": [], "categories": [c]} for c in (
        {"id": 1, "name": "person", "keypoints": ["nose"]}, {"id": 1, "name": "person", "keypoints": ["eye"]}
    ))  # fmt: skip
    with pytest.raises(DataError, match="the class 'person' has different keypoints in two files"):
        merge_coco([one, two])


def test_renaming_joins_classes(data: dict[str, Any]) -> None:
    renamed = rename_categories(data, {"shape 23": "shape 7"})
    assert [raw["id"] for raw in renamed["categories"]] == [7, 90]
    assert {raw["category_id"] for raw in renamed["annotations"]} == {7, 90}
    assert len(renamed["annotations"]) == len(data["annotations"])
    with pytest.raises(DataError, match=r"no class 'shape 32'. Did you mean 'shape"):
        rename_categories(data, {"shape 32": "x"})


def test_subsets_by_class_image_number_and_size(data: dict[str, Any]) -> None:
    part = subset_coco(data, categories=["shape 7"], drop_empty=True)
    assert {raw["category_id"] for raw in part["annotations"]} == {7}
    assert {raw["id"] for raw in part["images"]} == {raw["image_id"] for raw in part["annotations"]}
    part = subset_coco(data, images=["[0-3].png"])
    assert [raw["file_name"] for raw in part["images"]] == ["0.png", "1.png", "2.png", "3.png"]
    few, more = ({raw["id"] for raw in subset_coco(data, number=n)["images"]} for n in (3, 6))
    assert len(few) == 3
    assert few < more
    assert few != {raw["id"] for raw in subset_coco(data, number=3, seed=5)["images"]}
    sizes = coco_stats(data).sizes
    limit = sorted(sizes)[len(sizes) // 2]
    large = subset_coco({**data, "annotations": [a for a in data["annotations"] if not a["iscrowd"]]}, min_size=limit)
    assert len(large["annotations"]) == sum(size >= limit for size in sizes)
    for options, message in (
        ({"number": 11}, "number must be between 1 and 10"),
        ({"categories": ["shap 7"]}, "Did you mean 'shape 7'"),
        ({"images": ["x*"]}, "no image 'x\\*'"),
    ):
        with pytest.raises(DataError, match=message):
            subset_coco(data, **options)  # type: ignore[arg-type]


def test_a_subset_keeps_classes_of_one_name_and_images_named_like_patterns() -> None:
    images = [{"id": i, "file_name": name} for i, name in enumerate(("a[1].png", "a1.png"))]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}]
    annotations = [{"id": i, "image_id": 0, "category_id": category} for i, category in enumerate((3, 9, 4))]
    data = {"images": images, "annotations": annotations, "categories": categories}
    part = subset_coco(data, categories=["cat"])
    assert [raw["id"] for raw in part["annotations"]] == [0, 1]
    assert [raw["id"] for raw in part["categories"]] == [3, 9]
    assert [raw["file_name"] for raw in subset_coco(data, images=["a[1].png"])["images"]] == ["a[1].png", "a1.png"]
    assert [raw["file_name"] for raw in subset_coco(data, images=["a[[]1].png"])["images"]] == ["a[1].png"]


def test_a_merged_file_keeps_names_of_keypoints_and_licenses() -> None:
    def one(name: str, license_name: str, **fields: Any) -> dict[str, Any]:
        return {
            "images": [{"id": 1, "file_name": name, "license": 1}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1}],
            "categories": [{"id": 1, "name": "cat", **fields}],
            "licenses": [{"id": 1, "name": license_name}],
        }

    points = {"keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}
    first = one("a.png", "CC0")
    merged = merge_coco([first, one("b.png", "MIT", **points), one("c.png", "CC0", **points)])
    assert merged["categories"] == [{"id": 1, "name": "cat", **points}]
    assert [raw["license"] for raw in merged["images"]] == [1, 2, 1]
    assert merged["licenses"] == [{"id": 1, "name": "CC0"}, {"id": 2, "name": "MIT"}]
    assert first["licenses"] == [{"id": 1, "name": "CC0"}]  # inputs are not modified
    assert first["categories"] == [{"id": 1, "name": "cat"}]


@pytest.mark.parametrize("value", ["0", "false", 0, None])
def test_stats_read_crowds_as_the_reader_does(data: dict[str, Any], value: object) -> None:
    plain = {**data, "annotations": [raw | {"iscrowd": value} for raw in data["annotations"]]}
    assert (coco_stats(plain).crowds, coco_stats(plain).annotations) == (0, 36)


def test_stats_count_without_crowds(data: dict[str, Any], tmp_path: Path) -> None:
    stats = coco_stats(data)
    assert (stats.images, stats.crowds) == (10, 1)
    assert stats.annotations == sum(stats.classes.values()) == len(stats.sizes) == sum(stats.densities) == 35
    record = stats.to_dict()
    assert record["densities"]["0"] == 0
    assert record["densities"]["1"] == 4
    draw_stats(stats, tmp_path / "s.png", title="set")
    assert Image.open(tmp_path / "s.png").width > 500
    draw_stats(coco_stats({"images": [], "annotations": [], "categories": []}), tmp_path / "e.svg")
    with pytest.raises(DataError, match="the image format is not supported"):
        draw_stats(stats, tmp_path / "s.xyz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "not a COCO file"),
        ({"images": [{"id": 1}]}, "an entry of images needs an integer id and file_name"),
        ({"images": [{"id": [1], "file_name": "a"}]}, r"needs an integer id and file_name, got \{'id': \[1\]"),
        ({"categories": [{"id": "x", "name": "a"}]}, "an entry of categories needs an integer id and name"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "the id 1 is listed twice in images"),
        ({"annotations": [{"id": 1}]}, "an annotation needs integers image_id and category_id"),
        ({"annotations": [{"id": 1, "image_id": [1], "category_id": 7}]}, "needs integers image_id and category_id"),
    ],
)
def test_files_that_are_no_coco(data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_coco(data | change)


@pytest.mark.parametrize(("field", "listed"), [("image_id", "images"), ("category_id", "categories")])
def test_annotations_of_what_is_not_listed_are_left_out_and_named(
    data: dict[str, Any], caplog: pytest.LogCaptureFixture, field: str, listed: str
) -> None:
    lost = data["annotations"][0] | {"id": 999, field: 100_000}
    part = {**data, "annotations": [*data["annotations"], lost]}
    other = {**data, "images": [{"id": 100_000, "file_name": "other.png"}], "annotations": []}
    merged = merge_coco([other, part])  # there, the other file has an image of that id
    assert len(merged["annotations"]) == len(data["annotations"])
    assert f"left out 1 annotation whose {field} is not in {listed}, the first with {field} 100000" in caplog.text


def test_files_are_not_overwritten_unasked(data: dict[str, Any], tmp_path: Path) -> None:
    save_coco(data, tmp_path / "a" / "b.json")
    with pytest.raises(DataError, match=r"b.json exists; choose another file"):
        save_coco(data, tmp_path / "a" / "b.json")
    save_coco(data, tmp_path / "a" / "b.json", overwrite=True)
    assert load_coco(tmp_path / "a" / "b.json") == data


# Near duplicates


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with structure of several sizes."""
    rng = np.random.default_rng(seed)
    layers = [Image.fromarray(rng.integers(0, 255, (n, n, 3), dtype=np.uint8)).resize(size) for n in (3, 6, 12)]
    pixels = sum(weight * np.asarray(layer, float) for weight, layer in zip((0.5, 0.3, 0.2), layers, strict=True))
    return Image.fromarray(np.asarray(pixels).astype(np.uint8))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((80, 60)),
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: image.crop((3, 2, 160, 120)),
        lambda image: image.convert("L"),
    ],
)
def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path, change: Any) -> None:
    for number in range(8):
        scene(number).save(tmp_path / f"a{number}.png")
        scene(100 + number).save(tmp_path / f"b{number}.png")
    change(scene(3)).save(tmp_path / "b5.png")
    (tmp_path / "b7.png").write_bytes(b"no image")
    first, second = ([f"{letter}{number}.png" for number in range(8)] for letter in "ab")
    pairs = near_duplicates(first, second, (tmp_path, tmp_path), lambda items, description, total: items)
    assert [(pair.first, pair.second) for pair in pairs] == [("a3.png", "b5.png")]


def test_hashes_of_sixteen_bits_are_those_of_eight() -> None:
    gray = scene(1).convert("L")
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert bin(image_hash(gray) ^ image_hash(wide)).count("1") <= 2


def test_the_check_finds_near_duplicates_across_splits(tmp_path: Path) -> None:
    files = {}
    for split, seeds in {"train": (1, 2, 3), "val": (4, 2)}.items():
        entries = []
        for number, seed in enumerate(seeds):
            name = f"{split}{number}.png"
            scene(seed).save(tmp_path / name)
            entries.append({"id": number + 1, "file_name": name, "height": 120, "width": 160})
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
        categories = [{"id": 1, "name": "cat"}]
        files[split] = {"images": entries, "annotations": [box], "categories": categories}
    found = check_data(tmp_path, files["val"], against=files["train"], duplicates=True)
    (finding,) = [finding for finding in found.findings if finding.code == "near-duplicate-split"]
    assert finding.image_ids == (2,)
    assert "val1.png and train1.png (0 of 64 bits)" in finding.message
    found = check_data(tmp_path, files["val"], against=files["train"])
    assert not [finding for finding in found.findings if finding.code == "near-duplicate-split"]


# The command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["subset", "--number", "3"], "3 images"),
        (["subset", "--category", "shape 7", "--drop-empty"], "1 class\n"),
        (["rename", "shape 23=shape 7"], "2 classes"),
    ],
)
def test_commands_write_and_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    folder, path = write_coco(tmp_path / "coco")
    command = ["data", arguments[0], str(path), *arguments[1:], "--output", str(tmp_path / "o.json")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--images", str(folder)])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert expected in out
    assert "check of" in out


def test_commands_split_merge_and_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = write_coco(tmp_path / "coco", images=10)
    parts = [str(tmp_path / "s" / f"instances_{split}.json") for split in ("train", "val")]
    for command in (
        ["split", str(path), "--output", str(tmp_path / "s"), "--val", "0.3"],
        ["merge", *parts, "-o", str(tmp_path / "m.json")],
        ["stats", str(tmp_path / "m.json"), "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "n.json")],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["data", *command])
        assert not stop.value.code
    assert json.loads((tmp_path / "n.json").read_text())["images"] == 10
    with pytest.raises(SystemExit) as stop:
        main(["data", "rename", str(path), "x", "--output", str(tmp_path / "q.json")])
    assert stop.value.code == 2
    assert "expected OLD=NEW" in capsys.readouterr().err
