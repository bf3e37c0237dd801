"""The folder of a run: generations, what is kept, and what is never read."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from a2fpn import create_model, save_pretrained
from a2fpn.errors import CheckpointError, ConfigError, MissingFileError
from a2fpn.pretrained.checkpoint import add_metadata
from a2fpn.training.folder import CheckpointWriteError, Content, RunFolder
from a2fpn.training.generations import SUMS_FILE, OldFormatError, Record, read_generation
from a2fpn.training.state import RunState


@pytest.fixture(scope="module")
def model():
    sizes = {"neck_args": {"out_channels": 16}, "box_channels": 16}
    return create_model("fasterrcnn_fpn", backbone="test_resnet", num_classes=2, **sizes)


@pytest.fixture
def save(model):
    def write(folder: RunFolder, step: int, *, value=None, best=False, average=False, known=None, metrics=None) -> None:
        state = RunState(epoch=step, step=step, value=value)
        if known:
            state.best, state.best_epoch, state.best_step = known.best, known.best_epoch, known.best_step
        if best:
            state.best, state.best_epoch, state.best_step = value, step, step
        tensors = {"w:momentum_buffer": torch.full((2, 2), float(step))}
        folder.save(
            Content(
                record=Record(state=state, settings={"run": {"name": "x"}}, model=model.config),
                metrics=metrics or f'{{"step": {step}}}\n',
                save_model=lambda where: save_pretrained(model, where, metadata={"steps": step}),
                change_model=lambda where: add_metadata(where, steps=step, value=list(value or ())),
                optimizer=tensors,
                trained=tensors if average else None,
            ),
            best=best,
        )

    return write


def opened(output, resume="auto") -> tuple[RunFolder, RunState]:
    folder = RunFolder(output, resume)
    state = folder.source.state if folder.source else RunState()
    folder.settle(state)
    return folder, state


def steps(output) -> dict[str, int]:
    """Steps of the whole generations in a folder."""
    found = {}
    for path in sorted(output.iterdir()):
        with contextlib.suppress(CheckpointError):
            found[path.name] = read_generation(path).state.step
    return found


@pytest.fixture
def run(tmp_path, save):
    """A run with ``best`` of step 1, ``previous`` of step 2 and ``last`` of step 3."""
    output = tmp_path / "run"
    folder, _ = opened(output)
    save(folder, 1, value=(0.5, 0.5), best=True)
    save(folder, 2)
    save(folder, 3)
    folder.close()
    return output


FILES = [
    "SHA256SUMS",
    "model.safetensors",
    "training_state/state.json",
    "training_state/optimizer.safetensors",
    "training_state/metrics.jsonl",
]


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_the_last_the_one_before_and_the_best_are_kept(run):
    assert steps(run) == {"best": 1, "last": 3, "previous": 2}
    assert (run / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_evaluating_writes_no_weights_again_and_keeps_the_one_before(run, save):
    folder, _ = opened(run)
    save(folder, 4)
    weights = run / "last" / "model.safetensors"
    number = weights.stat().st_ino
    save(folder, 4, value=(0.6, 0.1), best=True)
    folder.close()
    assert steps(run) == {"best": 4, "last": 4, "previous": 3}
    assert weights.stat().st_ino == number
    metadata = json.loads((run / "last" / "config.json").read_text())["metadata"]
    assert metadata["value"] == [0.6, 0.1]


def test_where_files_cannot_be_shared_they_are_copied(run, save, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    folder, _ = opened(run)
    save(folder, 4)
    save(folder, 4, value=(0.6, 0.1), best=True)
    folder.close()
    assert steps(run) == {"best": 4, "last": 4, "previous": 3}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["last", "best"])
def test_one_damaged_file_damages_one_generation(tmp_path, save, file, name):
    """Also where there is no more than the first epoch, whose weights are the best ones."""
    output = tmp_path / "run"
    folder, _ = opened(output)
    save(folder, 1)
    save(folder, 1, value=(0.5, 0.5), best=True)
    folder.close()
    flip(output / name / file)
    assert steps(output) == {other: 1 for other in ("last", "best") if other != name}
    folder, state = opened(output)
    folder.close()
    assert state.step == 1


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "empty"])
def test_a_damaged_file_is_named_and_the_newest_whole_generation_goes_on(run, file, how):
    path = run / "last" / file
    {
        "flip": flip,
        "cut": lambda p: p.write_bytes(p.read_bytes()[:-7]),
        "remove": lambda p: p.unlink(),
        "empty": lambda p: p.write_bytes(b""),
    }[how](path)
    folder, state = opened(run)
    assert state.step == 2
    assert any(str(path) in note for note in folder.notes) or file == SUMS_FILE
    assert "Continuing from previous (step 2), the newest intact checkpoint." in folder.notes
    assert f"{run / 'last'} is kept as last.aside; it can be deleted." in folder.notes
    folder.close()
    assert (run / "metrics.jsonl").read_text() == '{"step": 2}\n'
    assert steps(run).keys() >= {"best", "previous"}


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_a_small_file_flips_unnoticed(run, bit):
    """Every byte of the list of hashes, and of the description of the model."""
    for file in (SUMS_FILE, "config.json"):
        path = run / "last" / file
        content = path.read_bytes()
        for place in range(bit, len(content), 41):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert read_generation(run / "last").edited
            except CheckpointError as error:
                assert str(run / "last") in str(error)  # noqa: PT017
        path.write_bytes(content)
    assert not read_generation(run / "last").edited


def test_metadata_that_was_added_is_no_damage(run):
    add_metadata(run / "best", count_threshold=0.4)
    folder, _ = opened(run)
    folder.close()
    assert f"{run / 'best'} has other metadata in its config.json than when it was written." in folder.notes
    assert json.loads((run / "best" / "config.json").read_text())["metadata"]["count_threshold"] == 0.4


def test_with_two_generations_damaged_the_best_goes_on(run):
    flip(run / "last" / FILES[3])
    flip(run / "previous" / FILES[2])
    folder, state = opened(run)
    assert state.step == 1
    folder.close()
    assert steps(run) == {"best": 1, "last": 1}  # a kill before the next checkpoint changes nothing
    assert sorted(path.name for path in run.glob("*.aside")) == ["last.aside", "previous.aside"]


@pytest.fixture
def run_with_new_best(tmp_path, save):
    """A run whose ``best`` is of the step of ``last``, 3, one after ``previous``."""
    output = tmp_path / "run"
    folder, _ = opened(output)
    save(folder, 1, value=(0.4, 0.4), best=True)
    save(folder, 2)
    save(folder, 3, value=(0.5, 0.5), best=True)
    folder.close()
    return output


@pytest.mark.parametrize("file", FILES)
def test_with_the_last_damaged_a_best_made_after_the_one_before_goes_on(run_with_new_best, file):
    run = run_with_new_best
    flip(run / "last" / file)
    folder, state = opened(run)
    assert state.step == 3
    assert "Continuing from best (step 3), the newest intact checkpoint." in folder.notes
    folder.close()
    assert steps(run) == {"best": 3, "last": 3, "previous": 2}
    assert (run / "metrics.jsonl").read_text() == '{"step": 3}\n'
    _, state = opened(run)
    assert state.step == 3


def test_with_the_last_put_aside_the_one_before_goes_on(run_with_new_best):
    """The weights of ``last`` failed in the next step, and ``best`` has the same."""
    run = run_with_new_best
    folder, _ = opened(run)
    assert f"{run / 'previous'} (step 2), from which run.resume=auto continues" in folder.last_good(3)
    folder.close()
    _, state = opened(run)
    assert state.step == 2


@pytest.mark.parametrize("number", range(6))
def test_a_kill_while_the_best_takes_the_place_of_a_damaged_last_loses_nothing(run_with_new_best, number, monkeypatch):
    run = run_with_new_best
    flip(run / "last" / FILES[1])
    left = iter(range(number, -1, -1))
    original = Path.rename

    def rename(self, target):
        if next(left, 0) == 0:
            raise KeyboardInterrupt  # what follows is not done, as after a kill
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            opened(run)
    folder, state = opened(run)
    folder.close()
    assert state.step == 3
    assert steps(run) == {"best": 3, "last": 3, "previous": 2}


def test_going_back_again_and_again_keeps_all_that_was_left(run, save):
    for number, metrics in enumerate(("a", "b", "c")):
        folder, state = opened(run, str(run / "previous"))
        assert state.step == 2
        save(folder, 3, known=state, metrics=metrics)
        folder.close()
        assert (run / "last" / FILES[4]).read_text() == metrics
        assert len(list(run.glob("last.aside*"))) == number + 1
    assert [(run / f"last.aside{n}" / FILES[4]).read_text() for n in ("2", "3")] == ["a", "b"]


def test_going_on_from_what_was_put_aside_keeps_it_and_what_came_after(run, save):
    folder, state = opened(run, str(run / "previous"))
    save(folder, 3, known=state, metrics="other")
    save(folder, 4, known=state, metrics="further")
    folder.close()
    folder, state = opened(run, str(run / "last.aside"))
    folder.close()
    assert state.step == 3
    assert (run / "metrics.jsonl").read_text() == (run / "last.aside" / FILES[4]).read_text() == '{"step": 3}\n'
    assert {name: step for name, step in steps(run).items() if name != "best"} == {
        **{"last": 3, "last.aside": 3, "last.aside2": 4, "previous.aside": 3}
    }
    folder, state = opened(run)  # killed before its next checkpoint
    folder.close()
    assert state.step == 3
    assert (run / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_of_weights_that_failed_the_newest_are_kept_beside_what_was_put_aside(run, save):
    folder, state = opened(run, str(run / "previous"))
    for metrics in ("a", "b"):
        save(folder, 3, known=state, metrics=metrics)
        assert "kept as last.failed" in folder.last_good(3)
    folder.close()
    assert steps(run) == {"best": 1, "last.aside": 3, "last.failed": 3, "previous": 2}
    assert (run / "last.failed" / FILES[4]).read_text() == "b"


def test_another_run_inside_the_folder_is_another_run(run, tmp_path):
    inner = run / "inner"
    shutil.copytree(run, tmp_path / "copy")
    shutil.move(tmp_path / "copy", inner)
    with pytest.raises(ConfigError, match="already holds a run"):
        opened(run, str(inner))


@pytest.mark.parametrize("name", ["nothing", "best/nothing", "last/model.safetensors"])
def test_a_checkpoint_that_is_not_there_is_named(run, name):
    with pytest.raises(
        MissingFileError, match=re.escape(f"run.resume={run / name}: no such folder; expected auto, or")
    ):
        opened(run, str(run / name))


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "is not the record of a run, but a list"), ("{", "is not valid JSON")]
)
def test_a_record_of_somebody_else_is_refused_whatever_its_hash(run, content, message):
    (run / "last" / FILES[2]).write_text(content)
    sums = (run / "last" / FILES[0]).read_text().splitlines()
    digest = hashlib.sha256(content.encode()).hexdigest()
    lines = [f"{digest}  {FILES[2]}" if line.endswith(FILES[2]) else line for line in sums]
    (run / "last" / FILES[0]).write_text("\n".join(lines) + "\n")
    folder, state = opened(run)
    folder.close()
    assert state.step == 2
    assert any(message in note for note in folder.notes)


def test_a_best_of_steps_that_a_run_left_does_not_go_on(run_with_new_best, save):
    """It is further than ``previous``, which knew of it: it was made before."""
    run = run_with_new_best
    folder, state = opened(run, str(run / "previous"))
    assert (state.best, state.best_step) == ((0.5, 0.5), 3)
    save(folder, 2, known=state)
    save(folder, 3, known=state)
    folder.close()
    assert steps(run) == {"best": 3, "last": 3, "last.aside": 3, "previous": 2}
    flip(run / "last" / FILES[3])
    folder, _ = opened(run)
    folder.close()
    assert "Continuing from previous (step 2), the newest intact checkpoint." in folder.notes


def test_with_none_whole_nothing_is_started_anew_in_silence(run):
    for name in ("last", "previous", "best"):
        flip(run / name / FILES[2])
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* is intact: .*state\.json is damaged"):
        RunFolder(run, "auto")
    assert sorted(run.rglob("*")) == before
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        RunFolder(run, str(run / "best"))


def test_a_damaged_best_is_replaced_by_what_there_is_and_said(run, save):
    folder, _ = opened(run)
    save(folder, 4, value=(0.4, 0.4))
    folder.close()
    record = json.loads((run / "last" / FILES[2]).read_text())
    assert record["state"]["best"] is None  # the test's own states know of no best
    flip(run / "best" / FILES[1])
    folder = RunFolder(run, "auto")
    state = folder.source.state
    state.best, state.best_epoch, state.best_step = (0.5, 0.5), 1, 1
    folder.settle(state)
    folder.close()
    assert any("best checkpoint, of epoch 1, is not in" in note for note in folder.notes)
    assert "The one of epoch 4 takes its place." in folder.notes
    assert (state.best, state.best_step, steps(run)["best"]) == ((0.4, 0.4), 4, 4)


def test_a_best_of_steps_that_are_made_again_stays_until_they_are_as_good(run, save):
    """Going back behind it must not let a worse one replace it."""
    folder, _ = opened(run)
    save(folder, 4, value=(0.9, 0.9), best=True)
    folder.close()
    folder = RunFolder(run, str(run / "previous"))
    state = folder.source.state
    state.best, state.best_epoch, state.best_step = (0.5, 0.5), 1, 1
    folder.settle(state)
    folder.close()
    assert (state.step, state.best, state.best_step) == (3, (0.9, 0.9), 4)
    assert steps(run) == {"best": 4, "last.aside": 4, "previous": 3}
    state.step = state.epoch = 4
    assert not state.judge((0.8, 0.9))
    assert state.judge((0.9, 0.9))
    assert state.stale == 0


def test_a_kill_between_two_renames_loses_nothing(run, save):
    (run / "last").rename(run / ".last.old")  # as when an evaluation is added to it
    (run / ".last.partial").mkdir()
    (run / ".metrics.jsonl.0123abcd.partial").touch()
    folder, state = opened(run)
    assert state.step == 3
    folder.close()
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_an_unfinished_run_is_seen_as_one(run, tmp_path):
    (run / "metrics.jsonl").unlink()  # killed inside its first epoch
    with pytest.raises(
        ConfigError, match=r"already holds a run \(last\); choose another run.output, or run.resume=auto"
    ):
        RunFolder(run, resume=False)
    strangers = tmp_path / "own"
    strangers.mkdir()
    (strangers / "config.yaml").write_text("a recipe")
    for resume in (False, "auto"):
        with pytest.raises(ConfigError, match=r"already holds a run \(config\.yaml\)"):
            RunFolder(strangers, resume)
    assert os.listdir(strangers) == ["config.yaml"]
    started = tmp_path / "started"  # killed before its first checkpoint
    RunFolder(started, resume=False).close()
    (started / "config.yaml").touch()
    for resume in (False, "auto"):
        RunFolder(started, resume).close()
    with pytest.raises(MissingFileError, match="no training state"):
        RunFolder(started, resume=True)


class Trap:
    """The call that unpickling it would make."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("resume", ["auto", True, "{run}", "{run}/last", "{run}/last/training_state"])
def test_pickles_of_older_runs_are_refused_with_the_way_out_and_never_loaded(tmp_path, model, resume, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "run" / "last"
    save_pretrained(model, last)
    (last / "training_state").mkdir()
    (last / "training_state" / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(OldFormatError, match=rf"never loaded.*model\.name=local-dir:{last} model\.pretrained=true"):
        RunFolder(tmp_path / "run", str(resume).format(run=tmp_path / "run") if resume is not True else True)
    assert not (tmp_path / "ran").exists()


def test_a_save_that_fails_leaves_all_as_it_was(run, save, monkeypatch):
    folder, _ = opened(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointWriteError, match=r"No space left.*MiB free\); last, previous, best untouched"):
            save(folder, 4)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.lock"} == before
    save(folder, 4)
    folder.close()
    assert steps(run)["last"] == 4


def test_generations_are_plain_files_that_other_programs_can_check(run):
    kinds = {path.suffix for path in (run / "last").rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ""}
    if shutil.which("sha256sum"):
        assert os.system(f"cd {run / 'last'} && sha256sum --check --strict --quiet SHA256SUMS") == 0


def test_a_generation_of_another_version_is_refused(run):
    path = run / "last" / FILES[2]
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "format": 99}))
    sums = (run / "last" / SUMS_FILE).read_text().splitlines()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums = [f"{digest}  {FILES[2]}" if line.endswith(FILES[2]) else line for line in sums]
    (run / "last" / SUMS_FILE).write_text("\n".join(sums) + "\n")
    with pytest.raises(CheckpointError, match="has format 99, this version of a2fpn reads 1"):
        read_generation(run / "last")
