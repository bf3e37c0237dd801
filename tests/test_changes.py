"""A run that goes on with other settings, data or processes than before: said, or refused with the way out."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from a2fpn.training import changes, keeper, trainer
from a2fpn.training.cli import main, parse
from a2fpn.training.generations import read_generation
from a2fpn.training.optim import lr_factor
from a2fpn.training.settings import setting_names
from a2fpn.training.state import Plan, RunState
from a2fpn.training.trainer import Trainer
from tests.training import metrics, tiny_run

ROOT = Path(__file__).resolve().parent.parent
# 6 epochs of 2 steps, of which 3 are done: a step schedule that falls at the half and at five sixths.
SETTINGS = ["run.epochs=6", "run.evaluate_every=6", "run.pictures=0", "run.trackers=[]", "data.check_images=0"]
SETTINGS += ["optim.schedule=step", "optim.milestones=[0.5,0.8333]", "optim.gamma=0.1", "optim.lr_scaling=none"]
SETTINGS += ["run.log_every=1"]


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    fresh()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    fresh()


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A data set, and a run on it that was interrupted after half of its epochs."""
    root = tmp_path_factory.mktemp("half")
    original = Trainer._step

    def interrupt(self, *arguments):
        if self.state.step == 6:
            raise KeyboardInterrupt
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(Trainer, "_step", interrupt)
        fresh()
        assert main([*tiny_run(root), *SETTINGS]) == 130
        fresh()
    return root


@pytest.fixture
def again(half, tmp_path, monkeypatch):
    """Goes on with a copy, with changes; returns exit code, rates of the steps, and the log."""
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    rates: list[float] = []
    original = trainer.set_rate

    def note(*arguments):
        rates.append(original(*arguments))
        return rates[-1]

    monkeypatch.setattr(trainer, "set_rate", note)
    # No test here looks at the plot, which takes a quarter of such a run; test_train.py draws it, also of resumed runs.
    monkeypatch.setattr(keeper, "plot_metrics", lambda *_: None)

    def go_on(*more: str):
        fresh()
        (tmp_path / "run" / "train.log").unlink(missing_ok=True)
        rates.clear()
        code = main([*tiny_run(tmp_path), *SETTINGS, "run.resume=auto", *more])
        log = tmp_path / "run" / "train.log"
        return code, list(rates), log.read_text() if log.exists() else ""

    return go_on


def drop_images(root: Path, part: str = "train") -> None:
    path = root / part / "annotations.json"
    document = json.loads(path.read_text())
    document["images"] = document["images"][:2]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("more", "steps", "images", "line"),
    [
        (["data.batch_size=1"], 4, 1, "data.batch_size: 2 -> 1, from step 7 on"),
        (["data.batch_size=4"], 1, 4, "data.batch_size: 2 -> 4, from step 7 on"),
        (["run.grad_accumulation=2"], 1, 4, "run.grad_accumulation: 1 -> 2, from step 7 on"),
        (["half the images"], 1, 2, "The training annotations changed: 4 -> 2 images"),
        (["data.passes=2"], 4, 2, "data.passes: 1 -> 2, from step 7 on"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_a_step_is_may_change_and_the_share_of_the_run_that_is_done_stays(
    again, tmp_path, more, steps, images, line
):
    """3 more epochs; the schedule falls where it would have, and never rises."""
    if more == ["half the images"]:
        drop_images(tmp_path)
        more = []
    code, rates, log = again(*more)
    assert code == 0
    assert line in log
    assert "Continuing after step 6: 3 of 6 epochs and 50.0 % of the run are done, 12 images were seen." in log
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in metrics(tmp_path / "run")][3:] == [6 + steps * n for n in (1, 2, 3)]
    assert rates == pytest.approx([1e-4] * 2 * steps + [1e-5] * steps)
    assert read_generation(tmp_path / "run" / "last").state.images == 12 + 3 * steps * images
    assert (tmp_path / "run" / "best").exists()


def test_a_longer_run_goes_on_and_one_that_is_long_enough_says_that_nothing_is_left(again, tmp_path, capsys):
    code, rates, log = again("run.epochs=2")
    assert (code, rates) == (0, [])
    assert "50.0% of the run were done; with the current settings this is 100.0%." in log
    assert "No evaluation was made; the last checkpoint is" in capsys.readouterr().out
    code, rates, log = again("run.epochs=4")
    assert code == 0
    assert rates == pytest.approx([1e-4, 1e-5])
    assert "run.epochs: 6 -> 4, from step 7 on" in log


@pytest.mark.parametrize(
    ("setting", "where", "expected"),
    [
        ("optim.lr=7e-4", "lr", 7e-5),
        ("optim.weight_decay=0", "weight_decay", 0.0),
        ("optim.weight_decay=0.3", "weight_decay", 0.3),
    ],
)
def test_the_setting_that_is_asked_for_is_in_force_and_said(half, tmp_path, setting, where, expected):
    """Not that of the checkpoint; groups of parameters may then be others, and their state stays theirs."""
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    before = read_generation(tmp_path / "run" / "last").optimizer()
    run = Trainer(parse([*tiny_run(tmp_path), *SETTINGS, "run.resume=auto", setting]))
    trainer.set_rate(run.optimizer, lr_factor(6, total_steps=12, config=run.config.optim))
    assert max(group[where] for group in run.optimizer.param_groups) == pytest.approx(expected)
    state = run.optimizer.optimizer.state
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(state[parameter]["exp_avg"], before[f"{name}:exp_avg"]), name
    assert any(f"Setting changed: {setting.partition('=')[0]}: " in note for note in run.keeper.notes)
    run.keeper.close()


@pytest.mark.parametrize("number", [0.9, 0.0])
def test_momentum_changes_too(tmp_path, number):
    sgd = [*tiny_run(tmp_path), *SETTINGS, "optim.name=sgd", "run.max_steps=1", f"optim.momentum={number}"]
    assert main(sgd) == 0
    fresh()
    assert main([*sgd, "run.resume=auto", f"optim.momentum={0.9 - number}", "run.max_steps=2"]) == 0
    assert read_generation(tmp_path / "run" / "last").state.step == 2


def test_a_moving_average_begins_and_ends_on_the_way(again, tmp_path):
    last = tmp_path / "run" / "last"
    code, _, log = again("run.ema=0.5", "run.max_steps=8")
    assert code == 0
    assert "run.ema: 0.0 -> 0.5, from step 7 on" in log
    assert read_generation(last).averages
    trained = read_generation(last).trained()
    code, _, log = again("run.max_steps=8")
    assert code == 0  # nothing is left to train, and the weights are those that were trained
    code, _, log = again("run.max_steps=9", "optim.lr=1e-30")
    assert code == 0
    assert not read_generation(last).averages
    ours = read_generation(last).evaluated()
    kept = [name for name in trained if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.allclose(ours[name], trained[name]) for name in kept)


def one_category_more(root: Path) -> None:
    path = root / "train" / "annotations.json"
    document = json.loads(path.read_text())
    document["categories"].append({"id": 99, "name": "more"})
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.overrides.neck=pafpn",
            "model.overrides.neck was None in {last} and can't become 'pafpn' in the same run",
        ),
        ("model.overrides.neck_args.out_channels=32", "neck_args.out_channels was 16 in {last} and can't become 32"),
        ("model.name=fasterrcnn_fpn", "model.name was 'maskrcnn_fpn' in {last} and can't become"),
        ("model.pretrained=true", "model.pretrained was False in {last} and can't become True"),
        ("optim.name=sgd", "another run from these weights: model.name=local-dir:{last} model.pretrained=true"),
        (
            "one category more",
            "classes of the training set were shape 7 (7), shape 23 (23), shape 90 (90) in {last}",
        ),
    ],
)
def test_what_cannot_change_is_refused_in_one_line_and_changes_nothing(again, tmp_path, capsys, change, message):
    if change == "one category more":
        one_category_more(tmp_path)
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    code, rates, _ = again(*([change] if "=" in change else []))
    assert (code, rates) == (2, [])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message.format(last=run.resolve() / "last") in error
    assert "run.output" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_way_out_of_a_refusal_works(again, tmp_path):
    one_category_more(tmp_path)
    weights = [f"model.name=local-dir:{tmp_path / 'run' / 'last'}", "model.pretrained=true", "run.max_steps=1"]
    code, _, _ = again(*weights, "model.overrides={}", f"run.output={tmp_path / 'other'}")
    assert code == 0
    assert len(read_generation(tmp_path / "other" / "last").record.model.categories) == 4


def test_activations_may_be_computed_again_from_a_step_on(again):
    code, rates, log = again("model.overrides.grad_checkpointing=true", "run.max_steps=7")
    assert (code, len(rates)) == (0, 1)
    assert "model.overrides.grad_checkpointing: None -> True, from step 7 on" in log


def test_evaluations_that_do_not_compare_do_not_compete(again, tmp_path):
    """The best on other images, or by other rules, is put aside, not deleted."""
    assert again("run.epochs=4")[0] == 0
    first = read_generation(tmp_path / "run" / "best")
    drop_images(tmp_path, "val")
    code, _, log = again("run.epochs=5")
    assert code == 0
    assert "The validation annotations changed: 3 -> 2 images" in log
    assert "the best checkpoint is reset" in log
    assert read_generation(tmp_path / "run" / "best.aside").state.step == first.state.step == 8
    assert read_generation(tmp_path / "run" / "best").state.best_epoch == 5


@pytest.mark.parametrize(
    ("setting", "anew"),
    [("data.val_images={root}/others", True), ("data.val_images={root}/same", False), ("data.gray_bits=12", True)],
)
def test_evaluations_on_other_pixels_do_not_compete(again, tmp_path, setting, anew):
    """The annotations are the same; the same images in another folder are the same images."""
    assert again("run.epochs=4")[0] == 0
    for name in ("same", "others"):
        shutil.copytree(tmp_path / "val" / "images", tmp_path / name)
    for path in (tmp_path / "others").iterdir():
        with Image.open(path) as image:
            Image.new("RGB", image.size).save(path)
    code, _, log = again("run.epochs=5", setting.format(root=tmp_path))
    assert code == 0
    assert ("the best checkpoint is reset" in log) == anew
    assert (tmp_path / "run" / "best.aside").exists() == anew


def test_a_run_goes_on_in_another_folder_and_leaves_the_first_alone(again, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    before.pop(tmp_path / "run" / "train.log")
    code, rates, _ = again(f"run.output={tmp_path / 'other'}", f"run.resume={tmp_path / 'run'}")
    assert (code, len(rates)) == (0, 6)
    assert [record["epoch"] for record in metrics(tmp_path / "other")] == [1, 2, 3, 4, 5, 6]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    code, _, _ = again(f"run.output={tmp_path / 'other'}", f"run.resume={tmp_path / 'run'}")
    assert code == 2  # it would replace what the first start trained


def test_going_back_keeps_what_is_newer(again, tmp_path):
    run = tmp_path / "run"
    assert again("run.epochs=5")[0] == 0
    code, rates, log = again("run.epochs=5", f"run.resume={run / 'previous'}")
    assert code == 0
    assert read_generation(run / "last.aside").state.step == 10
    assert "Continuing after step 8" in log
    assert len(rates) == 2


# The table


def test_every_setting_is_either_said_or_refused():
    named = {*changes.CONTINUES, *changes.REFUSED}
    assert len(named) == len(changes.CONTINUES) + len(changes.REFUSED)
    assert named - set(setting_names()) == {"model.overrides.grad_checkpointing"}
    assert set(setting_names()) - named == set()


def test_the_guide_lists_every_setting_as_it_is():
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \| (continues|refused)[^|]*\|", text, flags=re.MULTILINE)
    table = {}
    for names, kind in rows:
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in table, name
            table[name] = kind
    expected = dict.fromkeys(changes.CONTINUES, "continues") | dict.fromkeys(changes.REFUSED, "refused")
    assert table == expected


# Small parts


class Epochs:
    """A feed of so many steps in each epoch."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def steps(self, epoch: int) -> int:
        return self._steps[epoch % len(self._steps)]


@pytest.mark.parametrize(("done", "expected"), [(0, 0), (1, 0), (2, 1), (5, 2), (6, 3)])
def test_the_place_in_an_epoch_is_a_share_of_it(done, expected):
    run = parse(["data.root=x", "run.epochs=2"]).run
    state = RunState(epoch=1, step=16, step_in_epoch=done, steps_in_epoch=6)
    plan = Plan(Epochs(3), run)
    plan.enter(state)
    assert (state.step_in_epoch, state.steps_in_epoch) == (expected, 3)
    assert plan.place(state) == 3 + expected
    plan.enter(state)
    assert state.step_in_epoch == expected  # entering again changes nothing


def test_a_run_of_so_many_steps_counts_steps():
    plan = Plan(Epochs(4), parse(["data.root=x", "run.max_steps=10"]).run)
    state = RunState(epoch=2, step=9, step_in_epoch=1, steps_in_epoch=4)
    assert (plan.place(state), plan.total_steps, plan.epochs(state), plan.share(state)) == (9, 10, 3, 0.9)


def test_ties_go_to_the_later_and_to_the_better_by_the_second_number():
    state = RunState()
    kept = []
    for epoch, value in enumerate([(0.0, 0.066), (0.0, 0.159), (0.0, 0.1), (0.0, 0.159), (-1.0, 0.9)], start=1):
        state.epoch, state.step = epoch, 10 * epoch
        kept.append((state.judge(value), state.best_epoch, state.stale))
    assert kept == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (True, 4, 2), (False, 4, 3)]
