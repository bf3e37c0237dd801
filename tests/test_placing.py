"""Placement of the images of an import: all of them, or none."""

import os
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from a2fpn.data.exporters import convert_data
from a2fpn.data.importers import import_data
from a2fpn.data.importers.placing import ImagePlacer, Placing, place
from a2fpn.errors import DataError
from tests.label_sets import write_set

PLACINGS = ("link", "copy")


def quiet(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    return items


def files(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_text(f"content {number}")
    return [folder / f"{number}.png" for number in range(count)]


def place_all(sources: list[Path], folder: Path) -> None:
    with ImagePlacer(folder, "copy") as placer:
        for path in sources:
            placer.add(path, path.name)
        placer.close(quiet)


@pytest.mark.parametrize("placing", PLACINGS)
@pytest.mark.parametrize("count", [1, 4, 5, 511, 512, 513])
def test_every_image_is_placed(tmp_path: Path, placing: Placing, count: int) -> None:
    seen: list[tuple[str, int, int]] = []

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        found = list(items)
        seen.append((description, len(found), total))
        yield from found

    with ImagePlacer(tmp_path / "out" / "images", placing) as placer:
        for number, path in enumerate(files(tmp_path / "source", count)):
            placer.add(path, f"site {number % 3}/{path.name}")
        assert not (tmp_path / "out" / "images").exists()
        placer.close(track)
    assert seen == [("placing images", count, count)]
    assert os.listdir(tmp_path / "out") == ["images"]
    for number in range(count):
        placed = tmp_path / "out" / "images" / f"site {number % 3}" / f"{number}.png"
        assert placed.read_text() == f"content {number}"
        assert placed.is_symlink() == (placing == "link")
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == count


@pytest.mark.parametrize("placing", PLACINGS)
def test_images_from_before_stay_unless_they_have_the_same_name(tmp_path: Path, placing: Placing) -> None:
    images = tmp_path / "out" / "images"
    files(tmp_path / "other", 1)
    images.mkdir(parents=True)
    (images / "0.png").symlink_to(tmp_path / "other" / "0.png")
    (images / "before.png").write_text("before")
    (tmp_path / "out" / "images.partial").mkdir()  # of an import that was killed
    (tmp_path / "out" / "images.partial" / "1.png").write_text("half")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.png").write_text("new")
    with ImagePlacer(images, placing) as placer:
        placer.add(tmp_path / "source" / "0.png", "0.png")
        placer.add(tmp_path / "source" / "0.png", "a/b/0.png")
        placer.close(quiet)
    assert {str(path.relative_to(images)) for path in images.rglob("*.png")} == {"0.png", "a/b/0.png", "before.png"}
    assert (images / "0.png").read_text() == "new"
    assert (images / "before.png").read_text() == "before"
    assert (tmp_path / "other" / "0.png").read_text() == "content 0"  # a link is replaced, not what it points to
    assert os.listdir(tmp_path / "out") == ["images"]


@pytest.mark.parametrize("placing", PLACINGS)
@pytest.mark.parametrize("to", ["coco", "labels"])
def test_a_folder_that_is_a_link_to_the_source_keeps_its_files(tmp_path: Path, placing: Placing, to: str) -> None:
    source = write_set(tmp_path / "source")
    before = {path: (path.read_bytes(), path.lstat().st_ino) for path in source.rglob("*.png")}
    output = tmp_path / "out"
    for folder in ("images",) if to == "coco" else ("images/train", "images/val"):
        (output / folder).parent.mkdir(parents=True, exist_ok=True)
        (output / folder).symlink_to(source / "images")
    if to == "coco":
        import_data(source, output, images=placing, overwrite=True)
    else:
        convert_data(source, output, to=to, images=placing, overwrite=True)
    assert {path: (path.read_bytes(), path.lstat().st_ino) for path in source.rglob("*.png")} == before


@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_nothing(tmp_path: Path, there: bool) -> None:
    output = tmp_path / "out"
    if there:
        output.mkdir()
    sources = files(tmp_path / "source", 9)
    sources[4].unlink()
    with pytest.raises(FileNotFoundError, match=r"4\.png"):
        place_all(sources, output / "images")
    assert output.exists() == there
    assert not there or os.listdir(output) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strict": True}, "not found"), ({"val": 0.4}, "omit val")],
)
def test_an_import_that_fails_leaves_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    source = write_set(tmp_path / "source")
    sorted(source.rglob("*.png"))[-1].unlink()
    with pytest.raises(DataError, match=message):
        import_data(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_image_that_vanishes_leaves_nothing(tmp_path: Path) -> None:
    source = write_set(tmp_path / "source")
    last = sorted(source.rglob("*.png"))[-1]

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        yield from items
        if description.startswith("reading"):
            last.unlink()

    with pytest.raises(FileNotFoundError, match=last.name):
        import_data(source, tmp_path / "out", images="copy", track=track)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="ln is a program of Unix")
@pytest.mark.parametrize("program", ["", "exit 1", 'shift 2; /bin/ln -s "$1" "$3"; exit 1'])
def test_links_do_without_ln(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    (tmp_path / "bin").mkdir()
    if program:
        (tmp_path / "bin" / "ln").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / "ln").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    sources = files(tmp_path / "source", 2)
    with ImagePlacer(tmp_path / "images", "link") as placer:
        for path in sources:
            placer.add(path, path.name)
        placer.close(quiet)
    assert [(tmp_path / "images" / path.name).readlink() for path in sources] == sources


def test_links_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["-f.png", "a b.png", "a\nb.png", "é.png", "$x.png"]
    for name in names:
        Path(name).write_text(name)
    with ImagePlacer(Path("out/images"), "link") as placer:
        for name in names:
            placer.add(Path(name), name)
            placer.add(Path(name), f"-r/{name}")
            placer.add(Path(name), f"renamed {name}")
        placer.close(quiet)
    for name in names:
        for placed in (name, f"-r/{name}", f"renamed {name}"):
            assert Path("out/images", placed).readlink() == tmp_path / name


def test_a_content_never_goes_through_a_link(tmp_path: Path) -> None:
    (source,) = files(tmp_path / "source", 1)
    (tmp_path / "link.png").symlink_to(source)
    place(b"other", tmp_path / "link.png", "link")
    assert (tmp_path / "link.png").read_bytes() == b"other"
    assert source.read_text() == "content 0"


def test_contents_leave_the_memory_as_they_are_written(tmp_path: Path) -> None:
    content = bytes(2**20)
    with ImagePlacer(tmp_path / "images", "copy") as placer:
        tracemalloc.start()
        for number in range(64):
            placer.add(bytes(bytearray(content)), f"{number}.png")
        placer.close(quiet)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(list((tmp_path / "images").iterdir())) == 64
    assert held < 2**21
