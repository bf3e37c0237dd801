"""Images worth labeling: the rule, and the command."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import a2fpn
from a2fpn.cli import main
from a2fpn.errors import ConfigError
from a2fpn.inference.picking import POOL, embedding, farthest_first, pick_images, uncertainty

NONE = np.empty((0, 2), np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    options = {
        "backbone": "test_efficientnet",
        "num_classes": 1,
        "min_size": 64,
        "max_size": 96,
        "score_threshold": 0.0,
    }
    model = a2fpn.create_model("maskrcnn_fpn", neck_args={"out_channels": 16}, detections_per_image=5, **options)
    a2fpn.save_pretrained(model, folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine pictures, of which 3 to 8 are nearly the same."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    same = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    for number in range(9):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) // (number + 1) if number < 3 else same
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("scores", "expected"), [([], 0), ([1.0], 0), ([0.5], 1), ([0.5, 0.5], 2), ([0.9], 0.04), ([0.1], 0.04)]
)
def test_unsure_objects_count(scores: list[float], expected: float) -> None:
    assert uncertainty(np.array(scores, np.float32)) == pytest.approx(expected, abs=1e-6)


def test_the_farthest_comes_first_and_none_twice() -> None:
    points = np.array([[0, 0], [0, 0], [1, 0], [10, 0]], np.float32)
    assert [row for row, _ in farthest_first(points, NONE, 4)] == [0, 3, 2, 1]
    centers = np.array([[10, 0]], np.float32)
    assert farthest_first(points, centers, 2) == [(0, 10.0), (2, 1.0)]


def test_the_pool_holds_the_least_sure_and_is_thinned_out(checkpoint: Path, images: Path) -> None:
    predictor = a2fpn.Predictor(a2fpn.from_pretrained(checkpoint))
    files = sorted(images.iterdir())
    (one,) = pick_images(predictor, files, 1)
    values = {path: uncertainty(predictor(path).scores) for path in files}
    assert one.uncertainty == max(values.values())
    assert values[one.path] == one.uncertainty
    two = pick_images(predictor, files, 2)
    pool = sorted(values, key=lambda path: -values[path])[: 2 * POOL]
    assert {picked.path for picked in two} <= set(pool)
    nearest = {path: np.linalg.norm(embedding(predictor, path) - embedding(predictor, two[0].path)) for path in pool}
    assert two[1].distance == pytest.approx(max(nearest.values()), abs=1e-5)
    # Of six images that are the same, two would be the least that nine leave for five; four differ.
    assert sum(picked.distance < 1e-5 for picked in pick_images(predictor, files, 4)) == 0


def test_what_is_like_labeled_images_comes_last(checkpoint: Path, images: Path) -> None:
    predictor = a2fpn.Predictor(a2fpn.from_pretrained(checkpoint))
    files = sorted(images.iterdir())
    picked = pick_images(predictor, [*files[:3], *files[4:]], 3, labeled=[files[3]])
    assert {one.path.name for one in picked} == {"0.png", "1.png", "2.png"}


def test_the_command_leaves_links_a_table_and_a_grid(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labeled = {"images": [{"id": 1, "file_name": "3.png", "height": 48, "width": 64}], "annotations": []}
    (tmp_path / "done.json").write_text(json.dumps({**labeled, "categories": [{"id": 1, "name": "object"}]}))
    (images / "broken.png").write_bytes(b"none")
    arguments = ["data", "pick", "--model", str(checkpoint), "--images", str(images), "--number", "3"]
    arguments += ["--labeled", str(tmp_path / "done.json"), "--output", str(tmp_path / "picked")]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    rows = list(csv.DictReader((tmp_path / "picked" / "picked.csv").open()))
    names = [row["image"] for row in rows]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "picked" / "images").iterdir())
    assert len(set(names)) == 3
    assert not {"3.png", "broken.png"} & set(names)
    assert float(rows[0]["uncertainty"]) > 0
    assert Image.open(tmp_path / "picked" / "grid.png").width == 1500
    assert "Picked 3 of 9 images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "is not empty" in capsys.readouterr().err
    more = {"images": [{"id": 1, "file_name": names[0], "height": 48, "width": 64}], "annotations": []}
    (tmp_path / "more.json").write_text(json.dumps({**more, "categories": [{"id": 1, "name": "object"}]}))
    (tmp_path / "picked" / "images" / "mine.txt").symlink_to(tmp_path / "more.json")  # such as those of an import
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--labeled", str(tmp_path / "more.json"), "--overwrite"])
    again = {path.name for path in (tmp_path / "picked" / "images").iterdir()} - {"mine.txt"}
    assert len(again) == 3
    assert not {"3.png", "broken.png", names[0]} & again
    assert "Picked 3 of 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 10])
def test_more_images_than_there_are_is_an_error(checkpoint: Path, images: Path, number: int) -> None:
    predictor = a2fpn.Predictor(a2fpn.from_pretrained(checkpoint))
    with pytest.raises(ConfigError, match=f"number must be between 1 and 9, .*, got {number}"):
        pick_images(predictor, sorted(images.iterdir()), number)
