import hashlib
import http.server
import io
import itertools
import json
import re
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from typer.testing import CliRunner

from a2fpn.cli.data import app, parse_size
from a2fpn.config import Category
from a2fpn.data import (
    CocoDataset,
    DataError,
    HfDataset,
    ImageError,
    ShardDataset,
    check_shards,
    collate,
    storage,
    write_shards,
)
from a2fpn.training.streams import StreamFeed, ahead
from tests.coco_data import write_coco

datasets = pytest.importorskip("datasets")

IMAGES = 23
PER_SHARD = 4  # the last shard has 3


def add_keypoints(path: Path) -> None:
    """Gives every second object of a COCO file two keypoints."""
    data = json.loads(path.read_text())
    for annotation in data["annotations"][::2]:
        x, y, width, height = annotation["bbox"]
        annotation["keypoints"] = [x, y, 2, x + width / 2, y + height / 3, 1]
        annotation["num_keypoints"] = 2
    for category in data["categories"]:
        category["keypoints"] = ["left_end", "right_end"]
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Folder and file of a set with polygons, both kinds of RLE, a crowd, an empty image and keypoints."""
    folder, path = write_coco(tmp_path_factory.mktemp("coco"), images=IMAGES, size=(41, 57))
    add_keypoints(path)
    return folder, path


@pytest.fixture(scope="module")
def shards(coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards")
    write_shards(*coco, output, samples_per_shard=PER_SHARD)
    return output


@pytest.fixture
def own_shards(coco, tmp_path):
    """Shards that the test may damage."""
    write_shards(*coco, tmp_path / "shards", samples_per_shard=PER_SHARD)
    return tmp_path / "shards"


def rows(coco, *, category="ids") -> list[dict]:
    """The set as the rows of a table."""
    folder, path = coco
    data = json.loads(path.read_text())
    ids = [entry["id"] for entry in data["categories"]]
    return [
        {
            "image_id": entry["id"],
            "image": {"bytes": (folder / entry["file_name"]).read_bytes(), "path": entry["file_name"]},
            "width": entry["width"],
            "height": entry["height"],
            "objects": [
                {
                    "category": ids.index(raw["category_id"]) if category == "labels" else raw["category_id"],
                    "bbox": raw["bbox"],
                    "area": raw["area"],
                    "iscrowd": raw["iscrowd"],
                    "segmentation": json.dumps(raw["segmentation"]),
                    "keypoints": raw.get("keypoints", []),
                }
                for raw in data["annotations"]
                if raw["image_id"] == entry["id"]
            ],
        }
        for entry in data["images"]
    ]


def features(category) -> "datasets.Features":
    number, text = datasets.Value("float64"), datasets.Value("string")
    return datasets.Features(
        image_id=datasets.Value("int64"),
        image=datasets.Image(),
        width=datasets.Value("int32"),
        height=datasets.Value("int32"),
        objects=datasets.List(
            {
                "category": category,
                "bbox": datasets.List(number, length=4),
                "area": number,
                "iscrowd": datasets.Value("int8"),
                "segmentation": text,
                "keypoints": datasets.List(number),
            }
        ),
    )


KEYPOINTS = {"num_keypoints": 2, "keypoint_names": ("left_end", "right_end")}
CATEGORIES = tuple(Category(number, f"shape {number}") for number in (7, 23, 90))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The library waits five seconds at the end of every shuffled pass over parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def table(coco):
    return datasets.Dataset.from_list(rows(coco), features=features(datasets.Value("int64")))


@pytest.fixture(scope="module")
def parquet(table, tmp_path_factory):
    """Five parquet files of the set."""
    folder = tmp_path_factory.mktemp("parquet")
    for number in range(5):
        table.shard(5, number).to_parquet(folder / f"part-{number}.parquet")
    return folder


def hf(parquet, **arguments) -> HfDataset:
    options = {"data_files": str(parquet / "*.parquet"), "split": "train"}
    defaults = {"categories": CATEGORIES, "num_samples": IMAGES, **KEYPOINTS}
    return HfDataset.load("parquet", options=options, **(defaults | arguments))


def equal(one, other) -> bool:
    """Whether two samples, or two values of a target, are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "dense"):
        return equal(one.dense(), other.dense())
    return one == other


def ids(batches) -> list[list[int]]:
    return [[target["image_id"] for target in targets] for _, targets in batches]


def raw_ids(steps) -> list[list[int]]:
    return [[raw.entry["id"] for raw in step] for step in steps]


# --- samples


@pytest.mark.parametrize("keep_crowd", [False, True])
def test_folder_shards_and_datasets_give_the_same_samples(coco, shards, parquet, table, keep_crowd):
    folder = CocoDataset(*coco, keep_crowd=keep_crowd, strict=True)
    expected = {target["image_id"]: (image, target) for image, target in folder}
    assert "keypoints" in folder.target_keys
    assert "masks" in folder.target_keys
    sources = [
        ShardDataset(shards, keep_crowd=keep_crowd, strict=True),
        hf(parquet, keep_crowd=keep_crowd, strict=True),
        HfDataset(table, categories=CATEGORIES, keep_crowd=keep_crowd, strict=True, **KEYPOINTS),
    ]
    for source in sources:
        assert source.target_keys == folder.target_keys
        assert source.categories == folder.categories
        assert source.keypoint_names == folder.coco.keypoint_names == ("left_end", "right_end")
        assert source.num_samples == len(source) == IMAGES
        samples = list(source)
        assert [target["image_id"] for _, target in samples] == folder.image_ids  # the stored order
        for image, target in samples:
            assert equal((image, target), expected[target["image_id"]])


def test_semantic_maps_travel_along(coco, tmp_path):
    folder, path = coco
    maps = tmp_path / "maps"
    maps.mkdir()
    rng = np.random.default_rng(0)
    for file in folder.iterdir():
        size = Image.open(file).size[::-1]
        Image.fromarray(rng.integers(0, 5, size, dtype=np.uint8)).save(maps / file.name)
    write_shards(folder, path, tmp_path / "shards", semantic=maps)
    source, expected = ShardDataset(tmp_path / "shards"), CocoDataset(folder, path, semantic=maps)
    assert source.target_keys == expected.target_keys
    assert all(map(equal, source, expected))


def test_categories_are_matched_by_id(shards, coco):
    categories = (Category(90, "c"), Category(1, "other"), Category(23, "b"), Category(7, "a"))
    source = ShardDataset(shards, categories=categories)
    folder = CocoDataset(*coco, categories=categories)
    assert all(map(equal, source, folder))
    with pytest.raises(DataError, match=r"the category 23 \(shape 23\), 90 \(shape 90\) is not among .* ids 7\."):
        ShardDataset(shards, categories=[Category(7, "a")])


def test_each_loader_process_takes_its_share(shards):
    loader = DataLoader(ShardDataset(shards), batch_size=3, num_workers=2, collate_fn=collate)
    found = Counter(itertools.chain(*ids(loader)))
    assert len(found) == IMAGES
    assert set(found.values()) == {1}


def test_transforms_are_applied_when_iterating(shards):
    source = ShardDataset(shards, transforms=lambda image, target: (255 - image, target))
    assert equal(next(iter(source))[0], 255 - next(iter(ShardDataset(shards)))[0])


def test_bad_annotations_are_left_out_and_counted(coco, tmp_path):
    folder, path = coco
    data = json.loads(path.read_text())
    data["annotations"][5] |= {"bbox": [0, 0, 0, 5], "segmentation": None}
    write_shards(folder, _json(tmp_path, data), tmp_path / "shards")
    source = ShardDataset(tmp_path / "shards")
    expected = CocoDataset(folder, tmp_path / "coco.json")
    assert all(map(equal, source, expected))
    assert len(source.skipped.annotations) == len(expected.skipped.annotations) == 1
    list(source)
    assert len(source.skipped.annotations) == 1
    assert re.search(r"shard-000000.tar: .*png: annotation 5: its box .* no area", source.skipped.annotations[0])
    with pytest.raises(DataError, match="annotation 5: its box"):
        list(ShardDataset(tmp_path / "shards", strict=True))


def _json(folder: Path, data) -> Path:
    (folder / "coco.json").write_text(json.dumps(data))
    return folder / "coco.json"


# --- shards


def test_the_webdataset_library_reads_the_shards(coco, shards):
    wds = pytest.importorskip("webdataset")
    folder, path = coco
    data = json.loads(path.read_text())
    urls = [str(file) for file in sorted(shards.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == IMAGES
    for sample, entry in zip(samples, data["images"], strict=True):
        assert sample["__key__"] == f"{entry['id']:012d}"
        assert sample["json"]["image"] == entry
        assert sample["json"]["annotations"] == [a for a in data["annotations"] if a["image_id"] == entry["id"]]
        assert (sample["png"] == np.asarray(Image.open(folder / entry["file_name"]))).all()
    raw = next(iter(wds.WebDataset(urls, shardshuffle=False)))
    assert raw["png"] == (folder / "0.png").read_bytes()  # the file's own bytes


def test_the_index_describes_the_shards(coco, shards):
    content = json.loads((shards / "index.json").read_text())
    data = json.loads(coco[1].read_text())
    assert content["categories"] == data["categories"]
    assert content["num_samples"] == IMAGES
    assert [shard["samples"] for shard in content["shards"]] == [4, 4, 4, 4, 4, 3]
    for shard in content["shards"]:
        file = (shards / shard["name"]).read_bytes()
        assert hashlib.sha256(file).hexdigest() == shard["sha256"]
        assert len(file) == shard["bytes"]
        with tarfile.open(shards / shard["name"]) as tar:
            members = tar.getmembers()
            assert [m.offset for m in members[::2]] == shard["offsets"][:-1]
            assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}
    assert {file.name for file in shards.iterdir()} == {shard["name"] for shard in content["shards"]} | {"index.json"}


def test_the_same_set_gives_the_same_bytes(coco, tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4), ("d", None)]:
        write_shards(*coco, tmp_path / name, samples_per_shard=5, seed=seed)
    digest = {
        name: [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).iterdir())]
        for name in "abcd"
    }
    assert digest["a"] == digest["b"]
    assert len({tuple(digest[name]) for name in "acd"}) == 3
    keys = [{target["image_id"] for _, target in ShardDataset(tmp_path / name)} for name in "ad"]
    assert keys[0] == keys[1]


@given(size=st.integers(1, 60_000), samples=st.none() | st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_shards_keep_to_both_limits(coco, tmp_path_factory, size, samples):
    output = tmp_path_factory.mktemp("limits")
    index = write_shards(*coco, output, shard_size=size, samples_per_shard=samples)
    assert sum(shard.samples for shard in index.shards) == IMAGES
    for shard in index.shards:
        assert shard.samples == 1 or shard.bytes <= size
        assert shard.samples <= (samples or IMAGES)
        assert (output / shard.name).stat().st_size == shard.bytes
    largest = max(shard.bytes for shard in index.shards)
    if samples is None and len(index.shards) > 1 and size > 20_480:
        assert largest > size / 3  # shards are filled
    assert [problem for _, problem in check_shards(output)] == [None] * len(index.shards)


@pytest.mark.parametrize("limits", [{"shard_size": 0}, {"samples_per_shard": 0}])
def test_a_limit_must_be_positive(coco, tmp_path, limits):
    with pytest.raises(ValueError, match="a shard must hold at least one image"):
        write_shards(*coco, tmp_path, **limits)


def test_shards_are_not_overwritten_unless_forced(coco, own_shards):
    before = {file.name: file.read_bytes() for file in own_shards.iterdir()}
    with pytest.raises(FileExistsError, match="already contains shards"):
        write_shards(*coco, own_shards)
    assert {file.name: file.read_bytes() for file in own_shards.iterdir()} == before
    write_shards(*coco, own_shards, force=True)
    assert {file.name for file in own_shards.iterdir()} == {"shard-000000.tar", "index.json"}  # none is left over
    assert len(list(ShardDataset(own_shards, strict=True))) == IMAGES


def test_an_interrupted_writing_leaves_whole_shards_and_no_index(coco, tmp_path):
    calls = itertools.count()

    def interrupt(total):
        assert total == IMAGES
        if next(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(*coco, tmp_path, samples_per_shard=PER_SHARD, progress=interrupt)
    assert {file.name for file in tmp_path.iterdir()} == {"shard-000000.tar", "shard-000001.tar"}
    for file in tmp_path.iterdir():
        with tarfile.open(file) as tar:
            assert len(tar.getmembers()) == 2 * PER_SHARD
    with pytest.raises(DataError, match=r"index.json: no such file; `a2fpn data shard` writes it"):
        ShardDataset(tmp_path)


def test_missing_images_are_left_out_when_writing(coco, tmp_path):
    folder, path = write_coco(tmp_path / "coco", images=3)
    (folder / "1.png").unlink()
    index = write_shards(folder, path, tmp_path / "shards")
    assert index.num_samples == 2
    with pytest.raises(DataError, match=r"1\.png: can't be read \(No such file"):
        write_shards(folder, path, tmp_path / "strict", strict=True)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="3 images in a row can't be read"):
        write_shards(folder, path, tmp_path / "none")
    with pytest.raises(DataError, match="no such folder"):
        write_shards(tmp_path / "nowhere", path, tmp_path / "none")
    with pytest.raises(DataError, match="lists no image"):
        write_shards(folder, _json(tmp_path, {"images": [], "annotations": [], "categories": []}), tmp_path / "none")


def test_a_foreign_index_is_refused(own_shards):
    for content in ("{}", "[]", "nonsense", '{"format": "a2fpn shards of a COCO set", "version": 2}'):
        (own_shards / "index.json").write_text(content)
        with pytest.raises(DataError, match=r"index\.json: not a shard index that this version can read"):
            ShardDataset(own_shards)


def remove(path):
    path.unlink()


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-7000])


def lose_a_sample(path):
    """Rewrites a shard with its first sample only."""
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar.getmembers()[:2]]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


def flip_headers(path):
    data = bytearray(path.read_bytes())
    data[:100] = bytes(255 - byte for byte in data[:100])
    path.write_bytes(data)


def break_json(path):
    path.write_bytes(path.read_bytes().replace(b'{"image":', b"{*image*:"))


@pytest.mark.parametrize("damage", [remove, cut_off, lose_a_sample])
def test_a_shard_that_is_missing_or_of_another_size_is_found_at_once(own_shards, coco, damage):
    damage(own_shards / "shard-000002.tar")
    reason = "no such file" if damage is remove else "bytes, the index says"
    with pytest.raises(DataError, match=rf"shard-000002\.tar: .*{reason}.* 4 images"):
        ShardDataset(own_shards, strict=True)
    source = ShardDataset(own_shards)
    assert source.steps(5) == IMAGES // 5  # the same on every process, whatever each finds on its disk
    assert len(source.skipped.images) == PER_SHARD
    assert all("shard-000002.tar: image" in name for name in source.skipped.images)
    assert len(list(source)) == IMAGES - PER_SHARD
    (problem,) = [problem for _, problem in check_shards(own_shards) if problem]
    assert "shard-000002.tar" in problem
    if damage is lose_a_sample:
        assert re.search("with 1 complete samples, the index says .* with 4", problem)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, "no such file"),
        (cut_off, r"ends after \d+ bytes, the index says \d+ bytes with 4 samples; the file is cut off"),
        (lose_a_sample, r"the file is cut off|holds \d complete samples where the index says"),
        (flip_headers, r"holds \d complete samples where the index says 4"),
        (break_json, r"\d+\.json can't be read"),
    ],
)
def test_damage_that_is_met_on_the_way_names_the_shard(own_shards, damage, reason):
    strict, lenient = ShardDataset(own_shards, strict=True), ShardDataset(own_shards)
    damage(own_shards / "shard-000002.tar")
    with pytest.raises(DataError, match=rf"shard-000002\.tar: .*({reason})"):
        list(strict)
    assert len(list(lenient)) == IMAGES - len(lenient.skipped.images)
    found = ids(StreamFeed(lenient, batch_size=5, seed=1).batches(0))
    assert len(found) == 4  # as many steps as without damage
    assert all(len(batch) == 5 for batch in found)
    assert lenient.skipped.images
    assert all("shard-000002.tar: image" in name for name in lenient.skipped.images)
    assert found == ids(StreamFeed(lenient, batch_size=5, seed=1).batches(0))
    assert found[2:] == ids(StreamFeed(lenient, batch_size=5, seed=1).batches(0, start=2))
    assert [shard.name for shard, problem in check_shards(own_shards) if problem] == ["shard-000002.tar"]


def test_nothing_readable_is_an_error(own_shards):
    source = ShardDataset(own_shards)
    for file in own_shards.glob("*.tar"):
        file.unlink()
    with pytest.raises(DataError, match=r"none of \d+ images can be read"):
        list(StreamFeed(source, batch_size=4).batches(0))


# --- the order of an epoch


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_processes_share_an_epoch_of_shards(shards, data):
    world_size = data.draw(st.integers(1, 4))
    batch = world_size * data.draw(st.integers(1, 4))
    seed, epoch = data.draw(st.integers(-3, 3)), data.draw(st.integers(0, 3))
    source = ShardDataset(shards, shuffle_buffer=data.draw(st.integers(1, 40)))
    steps = source.steps(batch)
    assert steps == IMAGES // batch
    read = partial(source.read, batch=batch, seed=seed, epoch=epoch)
    parts = [list(read(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(part) for part in parts] == [steps] * world_size
    everything = [raw for part in parts for step in part for raw in step]
    assert len({raw.entry["id"] for raw in everything}) == len(everything) == steps * batch
    assert sorted(raw.position for raw in everything) == list(range(steps * batch))
    # One process reads the same images at the same places as many.
    alone = {raw.position: raw.entry["id"] for step in read() for raw in step}
    assert alone == {raw.position: raw.entry["id"] for raw in everything}
    # From any step on it is the same.
    start, rank = data.draw(st.integers(0, steps)), data.draw(st.integers(0, world_size - 1))
    assert list(read(rank=rank, world_size=world_size, start=start)) == parts[rank][start:]


def test_the_order_changes_with_seed_and_epoch(shards, parquet, table):
    unbuffered = ShardDataset(shards, shuffle_buffer=1)  # whose order is that of the shards
    for source in (ShardDataset(shards), unbuffered, hf(parquet), HfDataset(table, categories=CATEGORIES)):
        orders = {
            (seed, epoch): str(raw_ids(source.read(batch=4, seed=seed, epoch=epoch)))
            for seed in (0, 1)
            for epoch in (0, 1)
        }
        assert len(set(orders.values())) == 4
        assert orders[0, 1] == str(raw_ids(source.read(batch=4, seed=0, epoch=1)))


def test_a_step_mixes_shards_and_neighbors_are_shuffled(shards):
    source = ShardDataset(shards, shuffle_buffer=16)
    steps = raw_ids(source.read(batch=4, seed=0))
    numbers = [[(image_id - 100) // 3 for image_id in step] for step in steps]
    assert all(len({number // PER_SHARD for number in step}) >= 3 for step in numbers)
    plain = raw_ids(ShardDataset(shards, shuffle_buffer=1).read(batch=4, seed=0))
    assert plain != steps
    lanes = list(zip(*plain, strict=True))
    within = [b - a for lane in lanes for a, b in itertools.pairwise(lane)]
    assert within.count(3) > len(within) / 2  # without a buffer the order within shards is the stored one


def test_resuming_reads_no_shard_that_is_done(shards, monkeypatch):
    source = ShardDataset(shards, shuffle_buffer=1)
    read = []
    monkeypatch.setattr(
        "a2fpn.data.shards.read_bytes",
        lambda path, *range: read.append((path, *range)) or storage.read_bytes(path, *range),
    )
    list(source.read(batch=1, seed=0))
    everything, read[:] = list(read), []
    assert sum(end - begin for _, begin, end in everything) == sum(s.offsets[-1] for s in source.index.shards)
    list(source.read(batch=1, seed=0, start=20))
    assert read == everything[20:]
    read.clear()
    list(source.read(batch=2, seed=0, rank=1, world_size=2))
    assert len(read) == IMAGES // 2  # its own half


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_processes_share_an_epoch_of_a_streamed_data_set(parquet, table, data):
    world_size = data.draw(st.integers(1, 3))
    batch = world_size * data.draw(st.integers(1, 3))
    if data.draw(st.booleans()):
        source = hf(parquet, shuffle_buffer=data.draw(st.integers(1, 30)))
    else:
        source = HfDataset(table, categories=CATEGORIES)
    seed, epoch = data.draw(st.integers(-3, 3)), data.draw(st.integers(0, 3))
    steps = source.steps(batch)
    read = partial(source.read, batch=batch, seed=seed, epoch=epoch)
    parts = [list(read(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(part) for part in parts] == [steps] * world_size
    everything = [raw for part in parts for step in part for raw in step]
    assert len({raw.entry["id"] for raw in everything}) == len(everything) == steps * batch
    alone = {raw.position: raw.entry["id"] for step in read() for raw in step}
    assert alone == {raw.position: raw.entry["id"] for raw in everything}
    start, rank = data.draw(st.integers(0, steps)), data.draw(st.integers(0, world_size - 1))
    assert list(read(rank=rank, world_size=world_size, start=start)) == parts[rank][start:]


# --- over the network


class Server(http.server.ThreadingHTTPServer):
    """A web server of a folder, which notes what it sent."""

    def __init__(self, folder: Path, *, ranges: bool, failures: int = 0) -> None:
        self.ranges, self.failures, self.sent = ranges, failures, []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own handler, which knows no ranges, with ranges and failures added."""

    def do_GET(self):
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        file = Path(self.translate_path(self.path))
        if not (wanted and self.server.ranges and file.is_file()):
            super().do_GET()
            return
        start, end = int(wanted[1]), int(wanted[2] or 10**12) + 1
        data = file.read_bytes()[start:end]
        self.server.sent.append((file.name, len(data)))
        self.send_response(206 if data else 416)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_are_read_over_http(shards, ranges):
    local = ShardDataset(shards, shuffle_buffer=4)
    with Server(shards, ranges=ranges) as server:
        remote = ShardDataset(f"{server.url}/", shuffle_buffer=4, strict=True)
        assert all(map(equal, remote, local))
        steps = raw_ids(remote.read(batch=4, seed=5))
        assert steps == raw_ids(local.read(batch=4, seed=5))
        server.sent.clear()
        assert raw_ids(remote.read(batch=4, seed=5, start=4)) == steps[4:]
        if ranges:  # a shard that is done is not asked for
            assert 0 < sum(size for _, size in server.sent) < 0.5 * sum(s.offsets[-1] for s in remote.index.shards)


def test_a_failing_server_is_asked_again(shards, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.01))
    with Server(shards, ranges=True, failures=2) as server:
        source = ShardDataset(server.url)
        server.failures = 2
        assert len(list(source)) == IMAGES
        server.failures = 3
        with pytest.raises(DataError, match=r"index\.json: can't be read \(503"):
            ShardDataset(server.url)
    with pytest.raises(DataError, match=r"index\.json: can't be read .*Connect"):
        ShardDataset(server.url)


def test_a_missing_or_cut_off_file_on_a_server_names_itself(own_shards):
    with Server(own_shards, ranges=True) as server:
        with pytest.raises(DataError, match=r"http://.*/nothing/index\.json: no such file"):
            ShardDataset(f"{server.url}/nothing")
        source = ShardDataset(server.url, strict=True)
        cut_off(own_shards / "shard-000001.tar")
        with pytest.raises(DataError, match=r"http://.*shard-000001\.tar: ends after"):
            list(source)
        remove(own_shards / "shard-000001.tar")
        with pytest.raises(DataError, match=r"http://.*shard-000001\.tar: no such file"):
            list(source)
        (own_shards / "shard-000001.tar").write_bytes(b"")
        with pytest.raises(DataError, match=r"http://.*shard-000001\.tar: can't be read \(416"):
            list(source)


def test_other_urls_are_read_by_fsspec(shards):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/shards", recursive=True)
    remote = ShardDataset("memory://shards", strict=True)
    assert all(map(equal, remote, ShardDataset(shards)))
    memory.rm("/shards/shard-000003.tar")
    with pytest.raises(DataError, match=r"memory://shards/shard-000003\.tar: no such file"):
        list(remote)
    with pytest.raises(DataError, match=r"can't be read \(Protocol not known"):
        ShardDataset("nosuchscheme://x")


# --- the feed


def augment(image, target):
    """Random in everything, with torch's numbers."""
    return v2.functional.adjust_brightness(image, 0.5 + float(torch.rand(()))), target | {"drawn": torch.rand(2)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "hf"])
def test_a_feed_gives_the_same_batches_whoever_makes_them(shards, parquet, kind, workers):
    source = ShardDataset(shards) if kind == "shards" else hf(parquet)
    feed = partial(StreamFeed, source, transforms=augment, seed=7)
    alone = feed(batch_size=4, grad_accumulation=2)
    state = torch.get_rng_state()
    expected = list(alone.batches(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.steps(1) == IMAGES // 8 == 2
    assert [len(images) for images, _ in expected] == [4] * 4
    assert not equal(expected[0][1][0]["drawn"], expected[0][1][1]["drawn"])
    assert ids(expected) != ids(alone.batches(0))

    loaded = feed(batch_size=4, grad_accumulation=2, workers=workers)
    assert equal(list(loaded.batches(1)), expected)
    assert equal(list(loaded.batches(1, start=1)), expected[2:])
    assert list(loaded.batches(1, start=2)) == []
    # An epoch that is left early does no harm to the next.
    next(iter(loaded.batches(0)))
    assert equal(list(loaded.batches(1)), expected)
    # Two processes with half the batch see, step by step, what one sees.
    ranks = [
        list(feed(batch_size=2, grad_accumulation=2, workers=workers, rank=rank, world_size=2).batches(1))
        for rank in (0, 1)
    ]
    samples = [
        {
            target["image_id"]: (image, target)
            for images, targets in batches
            for image, target in zip(images, targets, strict=True)
        }
        for batches in (expected[:2], ranks[0][:2] + ranks[1][:2], expected[2:], ranks[0][2:] + ranks[1][2:])
    ]
    assert len(samples[0]) == len(samples[1]) == 8
    assert equal(samples[0], samples[1])
    assert equal(samples[2], samples[3])


def slow_at_first(image, target):
    if target["image_id"] % 2:
        time.sleep(0.05)
    return image, target


def test_the_order_does_not_depend_on_how_fast_workers_are(shards):
    source = ShardDataset(shards)
    quick = ids(StreamFeed(source, batch_size=1, workers=2).batches(0))
    slow = ids(StreamFeed(source, batch_size=1, workers=2, transforms=slow_at_first).batches(0))
    assert slow == quick == ids(StreamFeed(source, batch_size=1).batches(0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_unreadable_image_is_replaced_and_counted(coco, tmp_path, workers, batch_size):
    folder, path = write_coco(tmp_path / "coco", images=7)
    (folder / "3.png").write_bytes(b"no image")
    write_shards(folder, path, tmp_path / "shards")
    source = ShardDataset(tmp_path / "shards")
    bad = 100 + 3 * 3
    feed = StreamFeed(source, batch_size=batch_size, workers=workers)
    for epoch in range(4):
        found = ids(feed.batches(epoch))
        assert [len(batch) for batch in found] == [batch_size] * (7 // batch_size)
        assert bad not in itertools.chain(*found)
        for start in range(len(found)):
            again = ids(StreamFeed(source, batch_size=batch_size).batches(epoch, start=start))
            assert again == found[start:]
    assert [Path(name).name for name in source.skipped.images] == ["shard-000000.tar: 000000000109.png"]
    assert len(list(source)) == 6  # iterating leaves it out


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_an_error_if_strict(tmp_path, workers):
    folder, path = write_coco(tmp_path / "coco", images=3)
    (folder / "1.png").write_bytes(b"no image")
    write_shards(folder, path, tmp_path / "shards")
    source = ShardDataset(tmp_path / "shards", strict=True)
    with pytest.raises(ImageError, match=r"shard-000000\.tar: 000000000103\.png: not a readable image"):
        list(StreamFeed(source, batch_size=3, workers=workers).batches(0))


def test_no_readable_image_at_all_is_an_error(tmp_path):
    folder, path = write_coco(tmp_path / "coco", images=4)
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    write_shards(folder, path, tmp_path / "shards")
    with pytest.raises(ImageError, match=r"3 images in a row are unreadable: .*not a readable image"):
        list(StreamFeed(ShardDataset(tmp_path / "shards"), batch_size=2).batches(0))


def test_fewer_images_than_a_step_takes_is_an_error(shards):
    with pytest.raises(DataError, match="has 23 images, fewer than the 24 of one step"):
        StreamFeed(ShardDataset(shards), batch_size=4, grad_accumulation=3, world_size=2)
    assert len(list(StreamFeed(ShardDataset(shards), batch_size=IMAGES).batches(0))) == 1


def test_a_read_error_comes_out_of_the_feed(own_shards):
    source = ShardDataset(own_shards, strict=True)
    remove(own_shards / "shard-000004.tar")
    with pytest.raises(DataError, match=r"shard-000004\.tar: no such file"):
        list(StreamFeed(source, batch_size=2, workers=2).batches(0))


def test_ahead_keeps_order_and_errors():
    def failing():
        yield 1
        yield 2
        raise OSError("gone")

    items = ahead(failing(), depth=4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(items)
    before = threading.active_count()
    items = ahead(itertools.count(), depth=3)
    assert list(itertools.islice(items, 5)) == [0, 1, 2, 3, 4]
    items.close()
    assert threading.active_count() == before


# --- the datasets library


def test_the_classes_come_from_the_class_label(coco):
    label = datasets.ClassLabel(names=["shape 7", "shape 23", "shape 90"])
    table = datasets.Dataset.from_list(rows(coco, category="labels"), features=features(label))
    source = HfDataset(table, num_keypoints=2)
    assert source.categories == (Category(0, "shape 7"), Category(1, "shape 23"), Category(2, "shape 90"))
    assert all(map(equal, source, CocoDataset(*coco)))
    with pytest.raises(DataError, match="the classes shape 90 are not among the given ones, shape 7, shape 23"):
        HfDataset(table, categories=source.categories[:2])
    # The numbers of a ClassLabel are no ids: those of a COCO file are found by the names.
    categories = (Category(90, "shape 90"), Category(4, "more"), *CATEGORIES[:2])
    source = HfDataset(table, categories=categories, num_keypoints=2, strict=True)
    assert all(map(equal, source, CocoDataset(*coco, categories=categories)))


@pytest.mark.parametrize(
    ("bbox_format", "box"),
    [("xywh", [10, 20, 30, 6]), ("xyxy", [10, 20, 40, 26]), ("cxcywh", [25, 23, 30, 6])],
)
@pytest.mark.parametrize("layout", ["list of objects", "object of lists"])
def test_layouts_and_box_formats(bbox_format, box, layout):
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "png")
    one = {"bbox": [float(value) for value in box], "category": "dog", "segmentation": [[10, 20, 40, 20, 40, 26.0]]}
    objects = [one, one] if layout == "list of objects" else {key: [value, value] for key, value in one.items()}
    table = datasets.Dataset.from_list([{"image": file.getvalue(), "objects": objects}])
    source = HfDataset(table, categories=[Category(3, "cat"), Category(5, "dog")], bbox_format=bbox_format, strict=True)
    ((image, target),) = source
    assert image.shape == (3, 40, 60)  # width and height are the image's
    assert target["boxes"].tolist() == [[10, 20, 40, 26]] * 2
    assert target["labels"].tolist() == [1, 1]
    assert target["masks"].dense().shape == (2, 40, 60)
    with pytest.raises(DataError, match="bbox_format must be one of xywh, xyxy, cxcywh, got 'yolo'"):
        HfDataset(table, categories=[Category(5, "dog")], bbox_format="yolo")


def test_run_lengths_as_a_column():
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "png")
    rle = {"size": [40, 60], "counts": [0, 40 * 60]}
    one = {"bbox": [0.0, 0.0, 60.0, 40.0], "category": 5, "segmentation": rle}
    table = datasets.Dataset.from_list([{"image": file.getvalue(), "objects": [one]}])
    ((_, target),) = HfDataset(table, categories=[Category(5, "dog")], strict=True)
    assert target["masks"].dense().all()


def test_what_a_data_set_lacks_is_told(table, parquet, coco):
    with pytest.raises(DataError, match="category is not a ClassLabel; pass the classes"):
        HfDataset(table)
    with pytest.raises(DataError, match="parquet/train: the number of rows is unknown; give num_samples"):
        hf(parquet, num_samples=None)
    with pytest.raises(DataError, match="needs the columns image and objects, got image_id, image"):
        HfDataset(table.remove_columns("objects"))
    with pytest.raises(DataError, match="objects need bbox and one of category_id"):
        HfDataset(datasets.Dataset.from_list([{"image": b"", "objects": [{"box": [0.0]}]}]))
    with pytest.raises(DataError, match="has the splits train; give one of them"):
        HfDataset.load("parquet", options={"data_files": str(parquet / "*.parquet")})
    with pytest.raises(DataError, match=r"ran out of rows in step 5 of 6; num_samples is 24"):
        list(hf(parquet, num_samples=24).read(batch=4, seed=0))


def test_bad_rows_are_left_out_and_counted(coco):
    content = rows(coco)[:6]
    content[1]["image"] = {"bytes": b"no image", "path": None}
    content[2]["objects"][0]["segmentation"] = "{"
    content[3]["objects"][1]["category"] = 8
    content[4]["objects"][1] |= {"bbox": [0.0, 0.0, 0.0, 0.0], "segmentation": None}
    table = datasets.Dataset.from_list(content, features=features(datasets.Value("int64")))
    source = HfDataset(table, categories=CATEGORIES)
    targets = [target for _, target in source]
    assert [len(target["labels"]) for target in targets] == [3, 4, 3, 3, 4]  # a broken mask costs no box
    assert [target["has_mask"].tolist() for target in targets if "has_mask" in target] == [[False, True, True, True]]
    assert str(source.skipped) == "skipped 3 annotations and 1 images"
    with pytest.raises(ImageError, match="image 103: not a readable image"):
        list(HfDataset(table, categories=CATEGORIES, strict=True))
    with pytest.raises(DataError, match="its category 8 is not in the file"):
        list(HfDataset(table.select([3]), categories=CATEGORIES, strict=True))


def test_a_set_on_the_disk_is_opened_from_its_folder(table, tmp_path):
    table.save_to_disk(tmp_path / "set")
    source = HfDataset.load(str(tmp_path / "set"), categories=CATEGORIES, num_keypoints=2)
    assert source.num_samples == IMAGES
    assert raw_ids(source.read(batch=3, seed=2)) == raw_ids(
        HfDataset(table, categories=CATEGORIES).read(batch=3, seed=2)
    )


def test_processes_may_read_their_own_files(table, tmp_path):
    even = table.select(range(20))
    for number in range(4):
        even.shard(4, number).to_parquet(tmp_path / f"part-{number}.parquet")
    source = hf(tmp_path, num_samples=20, split_by_file=True)
    parts = [list(source.read(batch=4, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    found = [raw.entry["id"] for part in parts for step in part for raw in step]
    assert len(set(found)) == len(found) == 20
    files = [{(raw.entry["id"] - 100) // 3 // 5 for step in part for raw in step} for part in parts]
    assert [len(numbers) for numbers in files] == [2, 2]
    assert list(source.read(batch=4, seed=1, rank=1, world_size=2, start=3)) == parts[1][3:]
    with pytest.raises(DataError, match="has 4 files, not divisible by 3 processes"):
        next(source.read(batch=3, seed=1, rank=1, world_size=3))


# --- the command


def command(*arguments) -> tuple[int, str]:
    """Exit code and output of ``a2fpn data shard``."""
    result = CliRunner().invoke(app, ["shard", *map(str, arguments)], prog_name="a2fpn")
    assert isinstance(result.exception, (SystemExit, type(None)))
    return result.exit_code, result.output


def test_the_command_writes_and_checks(coco, tmp_path):
    arguments = ["--images", str(coco[0]), "--annotations", str(coco[1]), "--output", str(tmp_path / "out")]
    written = (0, f"{tmp_path / 'out'}: 23 images in 3 shards\n")
    assert command(*arguments, "--samples-per-shard", "10", "--shuffle", "--seed", "4") == written
    write_shards(*coco, tmp_path / "same", samples_per_shard=10, seed=4)
    for file in (tmp_path / "same").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    code, output = command("--check", tmp_path / "out")
    assert (code, "3 shards, 0 of them damaged" in output) == (0, True)
    code, output = command(*arguments)
    assert code == 2
    assert re.fullmatch(r"a2fpn: error: .*out: already contains shards; .*force.*\n", output)
    assert command(*arguments, "--force", "--shard-size", "30kB")[0] == 0
    flip_headers(tmp_path / "out" / "shard-000001.tar")
    code, output = command("--check", tmp_path / "out")
    assert code == 1
    assert "1 of them damaged" in output
    assert re.search(r"a2fpn: error: .*shard-000001\.tar: .*the sha256 differs", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --images, --annotations, --output; see --help."),
        (
            ["--images", "x", "--annotations", "y", "--output", "z", "--shard-size", "12 bananas"],
            "expected a size such as",
        ),
        (["--images", "nowhere", "--annotations", "y", "--output", "z"], "nowhere: no such folder."),
        (["--check", "nowhere"], "nowhere/index.json: no such file"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, error = command(*arguments)
    assert code == 2
    assert error.startswith("a2fpn: error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("2kB", 2000), ("0.5 GB", 500_000_000), ("1MiB", 2**20)])
def test_sizes(text, size):
    assert parse_size(text) == size
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(f"-{text}")
