"""A run that diverges is stopped before it is saved; a step that is not finite changes nothing."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from a2fpn.training import keeper, stepping
from a2fpn.training.cli import _Lines, main
from a2fpn.training.generations import read_generation
from a2fpn.training.health import MOST_GROWTH, DivergedError, check_before_saving, total_norm
from tests.training import metrics, tiny_run

SETTINGS = ["run.pictures=0", "run.trackers=[]", "data.check_images=0", "run.checkpoint_every=1", "run.epochs=3"]
SETTINGS += ["run.evaluate_every=3", "run.log_every=1"]
EXPLODING = ["optim.name=sgd", "optim.lr=3", "optim.clip_norm=null", "optim.warmup_steps=0"]


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    fresh()


def fresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_exploding_weights_are_never_saved_and_a_lower_rate_goes_on(tmp_path, capsys):
    """With a checkpoint after every step; what is left is worth going on from."""
    arguments = [*tiny_run(tmp_path), *SETTINGS]
    assert main([*arguments, "run.max_steps=2"]) == 0
    fresh()
    assert main([*arguments, *EXPLODING[2:], "optim.lr=1e7", "run.resume=auto"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"not saved|not finite", error)
    assert "optim.lr" in error
    good = re.search(r"The last good checkpoint is (\S+) \(step \d\)", error)
    assert good, error
    assert float(total_norm(read_generation(Path(good[1])).trained().values())) < 1e4
    fresh()
    assert main([*arguments, "run.resume=auto"]) == 0
    assert read_generation(tmp_path / "run" / "last").state.step == 6


def test_the_checkpoint_whose_step_exploded_is_not_called_good(tmp_path, capsys, monkeypatch):
    """A run that goes on from it would explode in the same step for ever."""

    def explodes(*arguments, step, **options):
        if step == 4:
            raise DivergedError("The weights after step 4 are not saved.")
        return check_before_saving(*arguments, step=step, **options)

    monkeypatch.setattr(keeper, "check_before_saving", explodes)
    arguments = [*tiny_run(tmp_path), *SETTINGS, "run.checkpoint_every=1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "/run/previous (step 2), from which run.resume=auto continues; the one of step 3 holds the weights" in error
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"previous", "last.failed"}
    fresh()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main([*arguments, "run.resume=auto"]) == 0
    assert "Continuing after step 2" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_that_explodes_at_once_says_that_no_checkpoint_is_good(tmp_path, capsys):
    assert main([*tiny_run(tmp_path), *SETTINGS, *EXPLODING, "optim.lr=3e4"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The last good checkpoint" not in error
    assert re.search("There is no checkpoint before it|The only checkpoint, .*, holds the weights that failed", error)


class Spoil(nn.Module):
    """Makes what a step computes not finite.

    Args:
        what: The losses, or the gradient alone.
        steps: The steps, from 0.
    """

    def __init__(self, what: str, steps: set[int]) -> None:
        super().__init__()
        self.what, self.steps, self.now = what, steps, -1

    def __call__(self, losses):
        if self.now not in self.steps:
            return losses
        if self.what == "losses":
            return {name: loss * float("nan") for name, loss in losses.items()}
        return {name: Finite.apply(loss) for name, loss in losses.items()}


class Finite(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.fixture
def spoil(monkeypatch):
    def install(what: str, *steps: int) -> None:
        spoiled, original, forward = Spoil(what, set(steps)), stepping.Stepper.step, {}

        def step(self, parts, number):
            spoiled.now = number
            model = self._accelerator.unwrap_model(self._model)
            if id(model) not in forward:
                forward[id(model)] = model.forward
                model.forward = lambda *a, **k: spoiled(forward[id(model)](*a, **k))
            return original(self, parts, number)

        monkeypatch.setattr(stepping.Stepper, "step", step)

    return install


@pytest.mark.parametrize("what", ["losses", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_on_request(tmp_path, spoil, what, capsys):
    spoil(what, 2)
    arguments = [*tiny_run(tmp_path), *SETTINGS, "run.nonfinite=skip", "run.ema=0.5", "model.overrides.norm=bn"]
    assert main(arguments) == 0
    before, after = (tmp_path / "run").with_name("2"), tmp_path / "run" / "train.log"
    assert not before.exists()
    kind = "loss" if what == "losses" else "gradient"
    assert re.search(
        rf"WARNING The {kind} is not finite in step 3 .* on the images with ids \d+, \d+\. The step is skipped",
        after.read_text(),
    )
    assert "Skipped 1 steps whose loss or gradient was not finite." in capsys.readouterr().out
    state = read_generation(tmp_path / "run" / "last").state
    assert (state.step, state.skipped_steps) == (6, 1)
    assert all(json.dumps(record).find("NaN") < 0 for record in metrics(tmp_path / "run"))


def test_a_step_that_is_left_out_changes_nothing_at_all(tmp_path, spoil):
    spoil("losses", 2)
    more = ["run.nonfinite=skip", "run.ema=0.5", "model.overrides.norm=bn", "run.max_steps=3"]
    assert main([*tiny_run(tmp_path), *SETTINGS, *more]) == 0
    last, previous = (read_generation(tmp_path / "run" / name) for name in ("last", "previous"))
    assert (last.state.step, previous.state.step) == (3, 2)
    for part in ("trained", "evaluated", "optimizer"):
        ours, theirs = getattr(last, part)(), getattr(previous, part)()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items()), part


@pytest.mark.parametrize("what", ["losses", "gradient"])
def test_it_stops_the_run_otherwise(tmp_path, spoil, what, capsys):
    spoil(what, 2)
    assert main([*tiny_run(tmp_path), *SETTINGS]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite in step 3" in error
    assert re.search(r"images with ids \d+, \d+\. Look at their annotations", error)
    assert f"last good checkpoint is {tmp_path / 'run' / 'previous'} (step 1)" in error
    assert read_generation(tmp_path / "run" / "last.failed").state.step == 2


def test_a_run_of_nothing_but_such_steps_stops(tmp_path, spoil, capsys):
    spoil("losses", *range(1, 40))
    more = ["run.nonfinite=skip", "run.epochs=20", "run.checkpoint_every=0", "run.evaluate_every=20"]
    assert main([*tiny_run(tmp_path), *SETTINGS, *more]) == 1
    assert "is not finite in step 12" in capsys.readouterr().err.splitlines()[-1]


# Small parts


def test_what_is_saved_is_looked_at():
    weights = {"a": torch.ones(4), "count": torch.tensor(3)}
    assert check_before_saving(weights, {}, before=0.0, step=1) == 2.0
    assert check_before_saving(weights, {}, before=2.0 / MOST_GROWTH, step=1) == 2.0
    with pytest.raises(DivergedError, match=r"after step 7 are not saved: their norm grew from 0\.01 to 2 since"):
        check_before_saving(weights, {}, before=0.01, step=7)
    for value in (float("nan"), float("inf")):
        for one, other in (({"w": torch.tensor([value])}, {}), (weights, {"w": torch.tensor([1.0, -value])})):
            with pytest.raises(DivergedError, match="1 tensors hold NaN, infinity or values whose norm overflows: w"):
                check_before_saving(one, other, before=0.0, step=1)


def test_the_norm_is_that_of_all_values_and_changes_none():
    parts = [torch.randn(3, 4), torch.randn(5).bfloat16().float(), torch.tensor([1, 2])]
    expected = torch.cat([part.flatten() for part in parts[:2]]).norm()
    assert float(total_norm(parts)) == pytest.approx(float(expected), rel=1e-6)
    assert float(total_norm([])) == 0
    assert not float(total_norm([torch.tensor([float("nan")]), torch.ones(2)])) < float("inf")


def test_a_warning_carries_the_word():
    lines = [
        _Lines("%(asctime)s %(message)s", "-").format(
            logging.makeLogRecord({"levelno": level, "msg": "boxes %s", "args": ("out",)})
        )
        for level in (logging.INFO, logging.WARNING)
    ]
    assert lines == ["- boxes out", "- warning: boxes out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("dvclive", "dvclive is not installed; install it, or remove it"),
    ],
)
def test_a_tracker_that_is_missing_stops_the_run(tmp_path, name, message, capsys):
    start = time.monotonic()
    assert main([*tiny_run(tmp_path), f"run.trackers=[{name}]"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - start < 20
