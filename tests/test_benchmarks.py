"""The benchmarks run and print ratios; no figure is judged here."""

import functools
import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import timm
import torch
import typer
from safetensors.torch import save_file
from torch import nn

from a2fpn.masks.rle import decode_window, encode_window
from benchmarks import _measure as measure
from benchmarks import (
    _nuclei,
    auto_recipe,
    dense,
    evaluation,
    inference,
    label_curve,
    loader,
    necks,
    round_trips,
    tiles,
)
from tests.coco_data import write_coco


def write_splits(root):
    """Write four images, which both splits list."""
    _, annotations = write_coco(root, images=4)
    (root / "annotations").mkdir()
    for part in ("val", "train"):
        (root / "annotations" / f"instances_{part}.json").write_bytes(annotations.read_bytes())


@pytest.mark.slow
def test_inference_compares_equal_outputs_and_prints_ratios(capsys):
    inference.main(quick=True)
    out = capsys.readouterr().out
    assert re.search(r"\d+ objects on either side", out)
    assert re.search(r"maskrcnn_a2fpn_r50 .* ms │ +\d+\.\d\d │", out)


@pytest.mark.slow
def test_necks_measure_every_neck_that_takes_a_backbones_pyramid(capsys):
    necks.main(quick=True, pattern="*fpn*")
    out = capsys.readouterr().out
    assert re.search(r"│ fpn .* ms │ +1\.00 │", out)
    assert re.search(r"simple_fpn is left out: .* one map", out)
    assert re.search(r"│ a2fpn_lite +│ +GMACs │ +\d\.\d\d │ +<= 1\.80", out)


@pytest.mark.slow
def test_necks_say_where_the_time_goes(capsys):
    necks.main(quick=True, pattern="a2fpn_lite", profile=True)
    out = capsys.readouterr().out
    assert re.search(r"│ context\.global_reasoning +│", out)
    assert re.search(r"│ aten::\w+ +│ +[\d.]+ ms │ +\d+% │", out)


def test_gmacs_count_attention_and_weighted_sums():
    channels, size, width = (64, 64, 64, 64), (64, 96), 256
    pixels = [(size[0] // stride) * (size[1] // stride) for stride in (4, 8, 16, 32)]
    nodes, every = 64, 4 * 64

    def reasoning(number):
        return 3 * number * width**2 + 2 * number**2 * width

    context = reasoning(every) + sum(
        2 * nodes * n * 64
        + nodes * 64 * width
        + reasoning(nodes)  # collect
        + n * 64 * width
        + every * width**2
        + 2 * n * every * width  # distribute
        for n in pixels
    )
    got = necks.gmacs("pafpn_mgc", channels, size) - necks.gmacs("pafpn", channels, size)
    assert got == pytest.approx(context / 1e9)
    carafe, fpn = (necks.gmacs(name, channels, size) for name in ("carafe_fpn", "fpn"))
    # Kernels are predicted on the coarse map, four per pixel.
    coarse = sum(n * (width * 64 + 64 * 4 * 25 * 9) for n in pixels[1:])
    kernels = coarse + sum(n * 25 * width for n in pixels[:-1])
    assert carafe - fpn == pytest.approx(kernels / 1e9)


def test_loader_prints_how_much_faster_it_is_and_how_masks_differ(tmp_path, capsys):
    _, annotations = write_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    annotations.rename(tmp_path / "annotations" / "instances.json")
    loader.main(tmp_path, quick=True)
    out = capsys.readouterr().out
    assert re.search(r"torchvision, uint8 .* >= 2\.0 (met|missed)", out)
    assert re.search(r"IoU of our masks with torchvision's: mean 0\.9\d+, .* \d objects", out)


def test_round_trips_compare_what_comes_back(tmp_path, capsys):
    round_trips.main(formats="yolo,cvat", output=tmp_path / "rows.json")
    out = capsys.readouterr().out
    assert re.search(
        r"yolo +│ +a2fpn │ +6 of 6 │ 2 of 2 │ 2 of 2 │ 0 of 2 │ +1\.000 │ image and class │ +yes │ +0 ", out
    )
    rows = {(row["format"], row["library"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["yolo", "supervision"]["parts"] == [0, 2]  # an object of two parts becomes two
    assert rows["cvat", "a2fpn"]["crowds"] == [2, 2]


def test_round_trips_count_objects_that_differ(tmp_path):
    round_trips.make(tmp_path)
    path = tmp_path / "annotations" / "instances_val.json"
    want = round_trips.from_coco(path)
    content = json.loads(path.read_text())
    _, two, plain, crowd, *others = content["annotations"]
    two["category_id"] = 17
    plain["segmentation"][0][0] += 3
    content["annotations"] = [two, plain, crowd, *reversed(others)]
    path.write_text(json.dumps(content))
    row = round_trips.compare(want, round_trips.from_coco(path))
    assert [row[kind] for kind in round_trips.KINDS] == [[3, 6], [1, 2], [1, 2], [2, 2]]
    assert (row["image_ids"], row["class_ids"], row["order"], row["more"]) == (True, True, False, 2)


@pytest.mark.slow
def test_the_label_curve_trains_either_side_on_the_same_images(tmp_path, capsys):
    write_splits(tmp_path)
    records = tmp_path / "records.jsonl"
    for side in ("a2fpn", "torchvision"):
        label_curve.main(tmp_path, images=3, side=side, batch=2, workers=0, device="cpu", records=records, quick=True)
    ours, theirs = (json.loads(line) for line in records.read_text().splitlines())
    assert (ours["images"], theirs["images"], ours["steps"]) == (3, 3, 2)
    assert 0 < min(ours["loss"], theirs["loss"]) < max(ours["loss"], theirs["loss"]) < 100
    label_curve.main(records=records, report=True, picture=tmp_path / "curve.svg")
    assert re.search(r"│ 3 +│ +\d+\.\d \(1\)", capsys.readouterr().out)
    assert (tmp_path / "curve.svg").read_text().count("<use ") >= 2  # a dot for each run


@pytest.mark.slow
def test_the_automatic_recipe_trains_beside_one_by_hand(tmp_path, capsys):
    write_splits(tmp_path)
    weights = tmp_path / "lite0.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), weights)
    with pytest.raises(typer.BadParameter, match="--hand names the recipe to compare with; one is known for nuclei,"):
        auto_recipe.main(tmp_path, weights)
    records = tmp_path / "records.jsonl"
    small = ["model.name=maskrcnn_fpn_lite0", "model.overrides.min_size=64", "model.overrides.max_size=96"]
    auto_recipe.main(tmp_path, weights, hand="finetune_folder", settings=small, records=records, quick=True)
    (record,) = map(json.loads, records.read_text().splitlines())
    assert record["settings"]["hand"][:2] == ["finetune_folder", "model.name=maskrcnn_fpn_lite0"]
    assert (record["auto"]["steps"], record["hand"]["steps"]) == (2, 2)
    assert all(0 <= record[side][name] <= 1 for side in ("auto", "hand") for name in auto_recipe.METRICS)
    assert re.search(r"hand │ finetune_folder │ +2 │", capsys.readouterr().out)


def test_evaluation_compares_the_numbers_of_every_library(capsys, monkeypatch):
    evaluation.main(quick=True)
    out = capsys.readouterr().out
    assert len(re.findall(r"evaluate_coco, hotcoco +│ +\de[+-]\d\d │ .* <= 0\.20 (?:met|missed)", out)) == 2
    assert len(re.findall(r"evaluate_coco, pycocotools +│ +\de[+-]\d\d │ +\d", out)) == 2
    assert re.search(r"masks: 5 images .* AP 0\.[1-9]", out)
    monkeypatch.setattr(evaluation, "theirs", lambda *_: [0.5] * 12)
    with pytest.raises(RuntimeError, match="the numbers of evaluate_coco, hotcoco differ by"):
        evaluation.main(quick=True)


def test_unequal_outputs_stop_the_comparison():
    theirs = {
        "boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 9.0, 9.0]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 1, 10, 10),
    }
    ours = {key: x.flip(0) for key, x in theirs.items()} | {"labels": torch.tensor([1, 0])}
    assert inference.compare(theirs, ours).startswith("2 objects on either side")
    with pytest.raises(RuntimeError, match=r"scores differ by 1\.0e-01"):
        inference.compare(theirs, ours | {"scores": torch.tensor([0.8, 1.0])})
    with pytest.raises(RuntimeError, match="found 2 objects, ours 1"):
        inference.compare(theirs, {key: x[:1] for key, x in ours.items()})


def touch(size):
    return functools.partial(np.ones, size, dtype=np.uint8)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_peak_memory_counts_what_the_call_allocates_alone():
    few, many = (measure.peak_memory(touch, size << 20) for size in (8, 64))
    assert 7 << 20 <= few <= 10 << 20
    assert 63 << 20 <= many <= 66 << 20


def test_a_failure_while_measuring_memory_is_raised():
    with pytest.raises(RuntimeError, match=r"measures touch\('no size',\) failed: TypeError: 'str' object"):
        measure.peak_memory(touch, "no size")
    with pytest.raises(RuntimeError, match=r"measures die\(\) failed: it was killed"):
        measure.peak_memory(die)


class Pause(nn.Module):
    """Lets the time of a clock pass."""

    def __init__(self, clock, seconds, inner=None):
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner

    def forward(self):
        self.clock.append(self.clock[-1] + self.seconds)
        if self.inner:
            self.inner()


def test_parts_exclude_the_parts_inside_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[-1])
    inner = Pause(clock, 3.0)
    outer = Pause(clock, 1.0, inner)
    seconds = measure.time_parts({"side": ({"outer": [outer], "inner": [inner]}, outer)}, rounds=1)["side"]
    assert seconds == {"inner": 3.0, "outer": 1.0}
    assert not outer._forward_hooks
    assert not inner._forward_pre_hooks


def test_calls_take_turns():
    order = []
    timings = measure.time_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "baabba"
    assert len(timings.seconds["a"]) == 2


def test_ratios_are_medians_of_the_rounds_ratios():
    timings = measure.Timings({"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 20.0, 4.0]})
    assert str(timings.ratio("ours", "theirs")) == "0.75 (0.50–1.00)"
    assert str(timings.ratio("ours", "ours")) == "1.00"


def square(left, top, side, size=(60, 80)):
    return encode_window(np.ones((side, side), np.bool_), top, left, size)


def test_seams_count_what_is_missed_and_what_is_found_twice():
    every = [square(0, 0, 10), square(20, 0, 10), square(40, 0, 10)]
    sure = every[:2]
    assert tiles.seams(every, sure, every) == (0, 0)
    # One is missed, one is there twice: as it is, and as a part of itself; what is new is neither.
    found = [every[0], square(0, 0, 6), square(60, 40, 10)]
    assert tiles.seams(found, sure, every) == (pytest.approx(1 / 3), 0.5)
    # A part alone is a miss, but no duplicate.
    assert tiles.seams([square(0, 0, 6), every[1]], sure, every) == (0, 0.5)
    assert tiles.seams([], sure, every) == (0, 1)
    assert tiles.seams(every, [], []) == (0, 0)


def test_mosaics_hold_the_objects_of_their_parts():
    scenes = _nuclei.load_scenes()
    whole = _nuclei.mosaic(scenes[:3], 2, 200)
    parts = [_nuclei.crop(scenes[number % 3], 200) for number in range(4)]
    assert whole.pixels.shape == (3, 400, 400)
    assert len(whole.rles) == sum(len(part.rles) for part in parts) > 20
    np.testing.assert_array_equal(whole.pixels[:, 200:, 200:], parts[3].pixels)
    corner = [decode_window(rle)[1] for rle in whole.rles[-len(parts[3].rles) :]]
    assert min(left for left, *_ in corner) >= 200
    assert min(top for _, top, *_ in corner) >= 200
    assert _nuclei.found_objects(whole.rles, whole.rles) == len(whole.rles)
    assert _nuclei.found_objects(whole.rles[:5], whole.rles) == 5
    assert _nuclei.found_objects([], whole.rles) == 0


def test_an_exponent_is_a_slope_in_logarithms():
    assert _nuclei.exponent([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert _nuclei.exponent([1, 10, 100], [1, 100, 10_000]) == pytest.approx(2)


@pytest.mark.slow
def test_tiles_stand_beside_other_slicers(capsys):
    tiles.main(quick=True)
    out = capsys.readouterr().out
    assert re.search(r"a2fpn .* % .* % .* ms", out)
    assert re.search(r"Goals: duplicates <= 0\.0[01] (met|missed)", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("recall", r"Time grows with the -?\d+\.\d\dth power of objects"),
        ("area", r"of the tiles'"),
        ("torchvision", r"128 x 128 .* ms"),
    ],
)
def test_dense_measures_many_objects(part, expected, capsys):
    dense.main(part=part, quick=True)
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_disturbed_run_loses_nothing(tmp_path, capsys):
    from benchmarks import soak

    soak.main(minutes=1, seed=0, keep=tmp_path / "soak")  # exits with 1 otherwise
    assert "states lost 0, silent differences 0, wrong ends 0" in capsys.readouterr().out
