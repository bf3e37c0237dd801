"""Figures of several models, how their images are picked, and the commands that make them."""

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import fails, run, save
from test_report import references

import a2fpn
from a2fpn.config import Category
from a2fpn.data import CocoFile, read_coco
from a2fpn.errors import ConfigError
from a2fpn.evaluation import annotations_as_detections
from a2fpn.inference import Result
from a2fpn.report import Run, write_report
from a2fpn.report.compare import Comparison, compare
from a2fpn.report.outlines import object_colors, svg_path
from a2fpn.report.sheet import save_comparison, save_gallery
from tests.coco_data import write_coco
from tests.helpers import tiny_model


class Knows:
    """A stand-in for a predictor: the annotations, less or more wrong by the image."""

    def __init__(self, coco: CocoFile, folder: Path, change: Callable[[int, Result], Result]) -> None:
        self.categories = coco.categories
        self.coco, self.folder, self.change = coco, folder, change

    def __call__(self, images: Sequence[Path]) -> list[Result]:
        results = []
        for path in images:
            entry = next(e for e in self.coco.images.values() if self.folder / e.file_name == path)
            records = [d for d in annotations_as_detections(self.coco) if d["image_id"] == entry.id]
            boxes = np.array([d["bbox"] for d in records], dtype=np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            labels = [[c.id for c in self.categories].index(d["category_id"]) for d in records]
            result = Result(
                boxes=boxes,
                scores=np.full(len(records), 0.9, dtype=np.float32),
                labels=np.array(labels, dtype=np.int64),
                size=(entry.height, entry.width),
                categories=self.categories,
                rles=tuple(d["segmentation"] for d in records),
                path=str(path),
            )
            results.append(self.change(entry.id, result))
        return results


def first(result: Result, count: int) -> Result:
    """The first objects of a result."""
    assert result.rles is not None
    return replace(
        result,
        boxes=result.boxes[:count],
        scores=result.scores[:count],
        labels=result.labels[:count],
        rles=result.rles[:count],
    )


@pytest.fixture
def scene(tmp_path: Path) -> tuple[CocoFile, Path, list[Path]]:
    folder, path = write_coco(tmp_path, images=7, crowd=False)
    coco = read_coco(path)
    return coco, folder, [folder / entry.file_name for entry in coco.images.values()]


def pair(coco: CocoFile, folder: Path) -> dict[str, Any]:
    """A finds less in every third image, B in every other third; in the rest they are equal."""
    one = Knows(coco, folder, lambda i, r: first(r, 1 + i % 2) if (i // 3) % 3 == 0 else r)
    other = Knows(coco, folder, lambda i, r: first(r, 1 + i % 2) if (i // 3) % 3 == 1 else r)
    return {"A": one, "B": other}


def names(comparison: Comparison) -> set[str]:
    return {column.path.name for column in comparison.columns}


def test_disagreement_shows_half_in_favor_of_each_and_says_so(scene: Any) -> None:
    coco, folder, paths = scene
    chosen = compare(pair(coco, folder), paths, coco=coco, folder=folder, count=4)
    ids = {entry.file_name: image_id for image_id, entry in coco.images.items()}
    worse = [(ids[column.path.name] // 3) % 3 for column in chosen.columns]
    assert sorted(worse) == [0, 0, 1, 1]
    assert worse[:2] == [1, 1]  # where B finds less, A is ahead
    assert "the 2 where A has the higher AP by most, then the 2 where B has" in chosen.note
    assert re.search(r"AP over all images: A 0\.\d+, B 0\.\d+", chosen.note)
    assert chosen.rows == ("annotations", "A", "B")


@pytest.mark.parametrize(("count", "how"), [(3, r"3 of 7 images, drawn at random \(seed 0\)"), (7, "All 7 images")])
def test_models_that_nowhere_differ_are_shown_on_random_images(scene: Any, count: int, how: str) -> None:
    coco, folder, paths = scene
    last, best = (Knows(coco, folder, lambda _, result: result) for _ in range(2))
    chosen = compare({"last": last, "best": best}, paths, coco=coco, folder=folder, count=count)
    assert re.match(rf"last and best have the same AP in every image\. {how}\. AP over all images", chosen.note)
    assert len(names(chosen)) == len(chosen.columns) == count


def test_the_worst_images_have_the_lowest_ap(scene: Any) -> None:
    coco, folder, paths = scene
    bad = Knows(coco, folder, lambda i, r: first(r, 0) if i == 103 else r)
    chosen = compare({"bad": bad}, paths, coco=coco, folder=folder, pick="worst", count=1)
    assert names(chosen) == {"1.png"}
    assert "lowest AP" in chosen.note


def test_random_images_depend_on_the_seed_alone_and_only_they_are_predicted(scene: Any) -> None:
    coco, folder, paths = scene
    seen: list[int] = []

    def look(image_id: int, result: Result) -> Result:
        seen.append(image_id)
        return result

    models: Any = {"A": Knows(coco, folder, look)}
    one = compare(models, paths, pick="random", count=3, seed=5)
    assert len(seen) == 3
    assert names(one) == names(compare(models, paths, pick="random", count=3, seed=5))
    assert any(names(one) != names(compare(models, paths, pick="random", count=3, seed=seed)) for seed in range(3))
    assert "3 of 7 images, drawn at random (seed 5)" in one.note


def test_without_annotations_models_disagree_where_they_share_the_fewest_objects(scene: Any) -> None:
    coco, folder, paths = scene
    models: Any = {
        "A": Knows(coco, folder, lambda _, r: r),
        "B": Knows(coco, folder, lambda i, r: first(r, 0) if i == 106 else r),
    }
    chosen = compare(models, paths, count=1)
    assert names(chosen) == {"2.png"}
    assert "Nothing tells which is right" in chosen.note


def test_the_same_object_has_the_same_color_in_every_row(tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path, images=2, category_ids=(7,), crowd=False)
    coco = read_coco(path)

    def turned(_: int, result: Result) -> Result:
        order = np.arange(len(result))[::-1]
        assert result.rles is not None
        return replace(result, boxes=result.boxes[order], rles=tuple(result.rles[i] for i in order))

    models: Any = {"A": Knows(coco, folder, lambda _, r: r), "B": Knows(coco, folder, turned)}
    column = compare(models, [folder / "0.png"], coco=coco, folder=folder, pick="random").columns[0]
    truth, one, other = (cell.colors for cell in column.cells)
    assert len(set(truth)) == len(truth) == 4
    assert one == truth
    assert other == truth[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pick": "worst"}, "'worst' needs annotations"),
        ({"count": 0}, "a count of at least 1, got 1, 7, 0"),
        ({}, "'disagree' needs two models or more"),
    ],
)
def test_what_can_not_be_shown_is_an_error(scene: Any, options: Any, message: str) -> None:
    coco, folder, paths = scene
    models: Any = {"A": Knows(coco, folder, lambda _, r: r)}
    with pytest.raises(ConfigError, match=message):
        compare(models, paths, **options)


def test_models_of_other_classes_are_refused(scene: Any) -> None:
    coco, folder, paths = scene
    stranger: Any = Knows(coco, folder, lambda _, r: r)
    stranger.categories = (Category(7, "tree"),)
    with pytest.raises(ConfigError, match=r"The categories of .* differ: id 7 is 'tree' and 'shape 7'"):
        compare({"A": stranger}, paths, coco=coco, folder=folder, pick="random")


def test_the_files_are_a_figure_twice_and_a_page_alone(scene: Any, tmp_path: Path) -> None:
    coco, folder, paths = scene
    chosen = compare(pair(coco, folder), paths, coco=coco, folder=folder, count=3)
    png, pdf, page = save_comparison(chosen, tmp_path / "out" / "figure", columns=2)
    with Image.open(png) as picture:
        assert picture.width == 1500
        assert np.asarray(picture.convert("L")).std() > 10
    assert pdf.read_bytes().startswith(b"%PDF")
    fetched, text = references(page)
    assert fetched == []
    assert chosen.note.split(".")[0] in text
    # Objects of all three rows, all drawn.
    drawn = sum(len(cell) for column in chosen.columns for cell in column.cells)
    assert page.read_text().count("<path d=") == drawn
    files = save_gallery(replace(chosen, rows=("A",)), tmp_path / "gallery.png")
    assert [file.name for file in files] == ["gallery.png", "gallery.pdf"]


def test_neighbors_have_different_colors_and_straight_borders_few_points() -> None:
    boxes = np.array([[10.0 * i, 0, 9, 9] for i in range(40)])
    colors = object_colors(boxes)
    assert all(one != other for one, other in itertools.pairwise(colors))
    square = np.array([(x, 0) for x in range(50)] + [(49, y) for y in range(50)] + [(0, 49), (0, 0)], dtype=float)
    assert len(svg_path([square]).split("L")) < 15
    assert svg_path([]) == ""


def test_the_commands_compare_gallery_and_report(tmp_path: Path) -> None:
    folder, path = write_coco(tmp_path / "data", images=3)
    one, other = save(tmp_path / "runs" / "fpn"), save(tmp_path / "runs" / "a2fpn", "maskrcnn_a2fpn")
    common = ("--images", folder, "--annotations", path)
    output = run("compare", one, other, *common, "--pick", "random", "--output", tmp_path / "c", "--score-threshold", 0)
    assert f"Open {tmp_path / 'c.html'}" in output
    assert all((tmp_path / f"c.{suffix}").is_file() for suffix in ("png", "pdf", "html"))
    output = run("gallery", one, "--images", folder, "--output", tmp_path / "g", "--among", 2)
    assert "These 2 images were drawn at random from 3." in output
    assert (tmp_path / "g.png").is_file()
    page = tmp_path / "page.html"
    output = run("evaluate", "--model", one, "--model", other, *common, "--report", page, "--json", tmp_path / "n.json")
    assert f"Open {page}" in output
    fetched, text = references(page)
    assert fetched == []
    assert "fpn against a2fpn" in text
    assert text.count("sha256 of the weights") == 1
    assert "sha256 of the annotations" in text
    assert "one --model, or two with --report" in fails("evaluate", "--model", one, "--model", other, *common)
    assert "two models or more" in fails("compare", one, *common)


def test_the_facts_tell_models_with_other_weights_apart() -> None:
    from a2fpn.report import model_facts

    one, other = tiny_model("maskrcnn_fpn"), tiny_model("maskrcnn_fpn")
    digest = "sha256 of the weights"
    assert model_facts(one)[digest] == model_facts(one)[digest] != model_facts(other)[digest]
    assert model_facts(one)["neck"] == "fpn"
    assert a2fpn.__version__ in model_facts(one).values()


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@contextlib.contextmanager
def headless(webdriver: Any) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver is installed")
def test_the_slider_moves_the_border_and_the_menus_choose_the_rows(scene: Any, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    coco, folder, paths = scene
    chosen = compare(pair(coco, folder), paths, coco=coco, folder=folder, count=2)
    page = save_comparison(chosen, tmp_path / "figure")[-1]
    with headless(webdriver) as browser:
        browser.get(page.as_uri())
        shown = "return [...document.querySelector('.stage').querySelectorAll('svg')].map(svg => svg.className.baseVal)"
        assert [each.split() for each in browser.execute_script(shown)] == [[], ["left"], ["right"]]
        browser.execute_script(
            "const s = document.querySelector('input'); s.value = 20; s.dispatchEvent(new Event('input'))"
        )
        clip = "return getComputedStyle(document.querySelector('svg.left')).clipPath"
        assert browser.execute_script(clip) == "inset(0px 80% 0px 0px)"
        browser.execute_script(
            "const m = document.getElementById('left'); m.value = 0; m.dispatchEvent(new Event('change'))"
        )
        assert [each.split() for each in browser.execute_script(shown)] == [["left"], [], ["right"]]
        assert browser.execute_script("return document.querySelector('.of-left').textContent").startswith("annotations")
        assert browser.get_log("browser") == []


def test_the_page_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "a2fpn.app", raising=False)
    assert 'pip install "a2fpn[app]"' in fails("app")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver is installed")
def test_the_report_hides_what_is_unticked(scene: Any, tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    coco, folder, _ = scene
    run_ = Run("half", annotations_as_detections(coco)[::2])
    page = write_report(tmp_path / "page.html", coco, folder, [run_], resamples=20)
    with headless(webdriver) as browser:
        browser.get(page.as_uri())
        display = "return getComputedStyle(document.querySelector('g.missed')).display"
        assert browser.execute_script(display) != "none"
        browser.execute_script("document.getElementById('show-missed').click()")
        assert browser.execute_script(display) == "none"
        broken = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert browser.execute_script(broken) == 0
        assert browser.get_log("browser") == []
