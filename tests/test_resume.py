"""A run that was cut off at any point ends as if nothing had happened."""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from a2fpn.inference import Predictor
from a2fpn.training.feed import SeededSamples
from a2fpn.training.generations import read_generation
from a2fpn.training.trainer import Trainer
from tests.training import Process, metrics, tiny_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

# 4 epochs of 2 steps, a checkpoint after every step; augmentation, moving average and loader processes at work.
SETTINGS = ["run.epochs=4", "run.evaluate_every=2", "run.checkpoint_every=1", "run.ema=0.9", "data.check_images=0"]
GENERATIONS = ("last", "previous", "best")
KINDS = {".json", ".jsonl", ".safetensors", "", ".yaml", ".log", ".png", ".0", ".lock"}
SETTINGS += ["data.transforms.color_jitter=0.5", "data.transforms.crop_size=60", "run.pictures=0", "run.val_loss=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    return [*tiny_run(folder, output), *SETTINGS, "run.resume=auto", *more]


@pytest.fixture(scope="module")
def whole(folder):
    """The output of a run that nothing disturbed."""
    start = time.monotonic()
    process = Process(arguments(folder, "whole"), folder / "whole.log")
    assert process.wait() == 0, process.log.read_text()
    (folder / "seconds").write_text(str(time.monotonic() - start))
    return folder / "whole"


def assert_same_run(output: Path, whole: Path) -> None:
    """Weights, optimizer, metrics: everything a run leaves is the same to the last bit."""
    tensors = ("model", "training_state/weights", "training_state/optimizer")
    for name in (f"{generation}/{file}.safetensors" for generation in GENERATIONS for file in tensors):
        ours, theirs = load_file(output / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f"{name}: {key}"
    times = {"train_seconds", "images_per_second", "eval_seconds"}
    ours, theirs = ([{k: v for k, v in r.items() if k not in times} for r in metrics(run)] for run in (output, whole))
    assert ours == theirs
    assert sorted(path.name for path in output.iterdir() if path.name.startswith(".")) == []
    assert {path.suffix for path in output.rglob("*") if path.is_file()} <= KINDS  # no pickle anywhere
    for name in GENERATIONS:
        read_generation(output / name)


@pytest.mark.parametrize("count", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_random_times(folder, whole, count):
    """SIGKILL whenever it strikes: while building, training, evaluating or writing."""
    chance = random.Random(0)
    length = float((folder / "seconds").read_text())
    kills = 0
    while kills < count:
        start = time.monotonic()
        process = Process(arguments(folder, "random"), folder / "random.log")
        code = process.wait(chance.uniform(0.2, 0.9) * length)
        if code is None:
            process.kill()
            code = process.wait()
        if code == -signal.SIGKILL:
            kills += 1
        else:  # it was faster
            assert code == 0, process.log.read_text()
            length = time.monotonic() - start  # the undisturbed run may have waited for imports
            finish(folder, "random", whole)
    finish(folder, "random", whole)


def finish(folder: Path, name: str, whole: Path) -> None:
    """Lets a run go on to its end, compares it, and puts it aside."""
    process = Process(arguments(folder, name), folder / f"{name}.log")
    assert process.wait() == 0, process.log.read_text()
    assert_same_run(folder / name, whole)
    (folder / name).rename(folder / f"{name}.{time.monotonic_ns()}")


class KillInWriting:
    """Kills its process at the n-th call by which a checkpoint becomes durable.

    Args:
        number: Of the call, from 1; counted from the first save on.
        log: A file that says which call it was.
    """

    calls = ("fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, number: int, log: Path) -> None:
        self.number, self.log = number, log

    def __call__(self) -> None:
        for name in self.calls:
            setattr(os, name, functools.partial(self.call, name, getattr(os, name)))

    def call(self, name, original, *arguments, **options):
        self.number -= 1
        if not self.number:
            with self.log.open("a") as file:
                file.write(f"{name} {arguments[0]}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)


@pytest.mark.parametrize("numbers", [(3, 21, 39), pytest.param(range(3, 3 + 9 * 12, 9), marks=pytest.mark.slow)])
def test_killed_inside_checkpoint_writing(folder, whole, numbers):
    """Between the first file and the last rename of a save; each start gets one step further."""
    killed = 0
    for number in numbers:
        before = KillInWriting(number, folder / "calls.log")
        process = Process(arguments(folder, "writing"), folder / "writing.log", before)
        code = process.wait()
        if code == 0:  # the last steps write less than `number` calls
            finish(folder, "writing", whole)
            continue
        assert code == -signal.SIGKILL, process.log.read_text()
        killed += 1
    assert killed >= 2 * len(numbers) / 3
    assert len(set((folder / "calls.log").read_text().splitlines())) >= len(numbers) / 3
    finish(folder, "writing", whole)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(signal.SIGUSR1, 0), (signal.SIGINT, 2)]),
    ],
)
def test_a_signal_writes_a_checkpoint_within_the_epoch(folder, whole, number, workers):
    """Sent to the whole group, loader processes included, as schedulers and terminals do."""
    name = f"signal{number}"
    more = ["run.checkpoint_every=0", f"data.workers={workers}"]
    process = Process(arguments(folder, name, *more), folder / f"{name}.log", functools.partial(slow_steps, 0.5))
    wait_for(process, "step 2 ")
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        one.send_signal(number)
    assert process.wait() == 128 + number
    last_line = process.log.read_text().splitlines()[-1]
    assert "stopped after step" in last_line
    assert "run.resume=auto continues" in last_line
    step = json.loads((folder / name / "last" / "config.json").read_text())["metadata"]["steps"]
    assert f"stopped after step {step};" in last_line
    assert step >= 2
    finish(folder, name, whole)


def slow_steps(seconds: float) -> None:
    """Gives a test the time to strike within an epoch."""
    original = Trainer._step
    Trainer._step = lambda *arguments: (time.sleep(seconds), original(*arguments))[1]


def wait_for(process: Process, text: str) -> None:
    """Returns when the process has said something."""
    for _ in range(600):
        if process.log.exists() and text in process.log.read_text():
            return
        assert process.wait(0.1) is None, process.log.read_text()
    raise AssertionError(f"{text!r} is not in {process.log.read_text()}")


def slow_evaluation() -> None:
    """Gives a test the time to strike within an evaluation."""
    original = Predictor.predict
    Predictor.predict = lambda *arguments: (time.sleep(0.7), original(*arguments))[1]


@pytest.mark.parametrize("group", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["group", "main"])
def test_a_signal_while_an_epoch_is_evaluated_loses_nothing_of_it(folder, whole, group):
    """Sent to the whole group, loader processes included, or to the main process alone."""
    name = f"evaluating{group}"
    process = Process(arguments(folder, name, "data.workers=1"), folder / f"{name}.log", slow_evaluation)
    wait_for_pending(process, folder / name)
    time.sleep(0.5)
    main = psutil.Process(process.pid)
    for one in [main, *main.children(recursive=True)] if group else [main]:
        one.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert (
        "stopped while evaluating epoch 2, which is saved; run.resume=auto" in process.log.read_text().splitlines()[-1]
    )
    assert read_generation(folder / name / "last").state.step == 4
    finish(folder, name, whole)


def wait_for_pending(process: Process, output: Path) -> None:
    """Returns when an epoch is saved that is not yet evaluated."""
    path = output / "last" / "training_state" / "state.json"
    for _ in range(1200):
        if path.exists() and json.loads(path.read_text())["state"]["pending"]:
            return
        assert process.wait(0.05) is None, process.log.read_text()
    raise AssertionError(process.log.read_text())


def test_the_same_command_twice_at_once(folder, whole):
    """The second is refused, and the first goes on."""
    first = Process(arguments(folder, "twice"), folder / "twice.log", functools.partial(slow_steps, 0.3))
    wait_for(first, "step 1 ")
    second = Process(arguments(folder, "twice"), folder / "second.log")
    assert second.wait() == 2
    assert f"being written to by process {first.pid} on " in second.log.read_text().splitlines()[-1]
    assert first.wait() == 0
    assert_same_run(folder / "twice", whole)


def test_a_second_interrupt_does_not_wait(folder):
    process = Process(arguments(folder, "impatient"), folder / "impatient.log", functools.partial(slow_steps, 60))
    wait_for(process, "images per step")
    time.sleep(1)
    process.kill(signal.SIGINT)
    time.sleep(0.2)
    process.kill(signal.SIGINT)
    assert process.wait(20) == 130
    assert "interrupted" in process.log.read_text().splitlines()[-1]


def test_a_killed_loader_process_is_named_and_nothing_is_lost(folder, whole):
    """As the kernel does when memory runs out."""
    before = functools.partial(slow_steps, 0.2)
    process = Process(arguments(folder, "oom", "data.workers=1"), folder / "oom.log", before)
    wait_for(process, "step 3 ")
    for worker in psutil.Process(process.pid).children(recursive=True):
        worker.kill()
    assert process.wait() == 1
    # Not always the last line: torch's loader may print an ignored exception when Python exits.
    (line,) = (line for line in process.log.read_text().splitlines() if line.startswith("train: error: "))
    assert re.search(r"DataLoader worker .* (is killed by signal: Killed|exited unexpectedly)\.", line)
    assert "lower data.workers or data.batch_size" in line
    finish(folder, "oom", whole)


def small_files(megabytes: float) -> None:
    """Lets no file grow beyond so much, as a full disk does: writing more is an OSError."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_leaves_the_checkpoint_before(folder, whole):
    process = Process(arguments(folder, "full"), folder / "full.log", functools.partial(slow_steps, 0.2))
    wait_for(process, "step 3 ")
    process.kill(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    kept = {path: path.read_bytes() for path in (folder / "full").rglob("*") if path.is_file()}
    process = Process(arguments(folder, "full"), folder / "full.log", functools.partial(small_files, 0.5))
    assert process.wait() == 1
    last_line = process.log.read_text().splitlines()[-1]
    assert "cannot write a checkpoint" in last_line
    assert "MiB free" in last_line
    assert re.search("last, previous(, best)? untouched; run.resume=auto continues from there", last_line)
    for path, content in kept.items():
        if path.parent.name in ("last", "best", "training_state"):
            assert path.read_bytes() == content
    finish(folder, "full", whole)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(folder, whole):
    process = Process(arguments(folder, "nan"), folder / "nan.log", nan_in_step_5)
    assert process.wait() == 1
    last_line = process.log.read_text().splitlines()[-1]
    assert "The loss is not finite in step 5" in last_line
    # The weights of step 4 are the ones that failed.
    assert (
        f"The last good checkpoint is {folder / 'nan' / 'previous'} (step 3), from which run.resume=auto" in last_line
    )
    assert read_generation(folder / "nan" / "previous").state.step == 3
    assert read_generation(folder / "nan" / "last.failed").state.step == 4
    finish_log = Process(arguments(folder, "nan"), folder / "nan_again.log")
    assert finish_log.wait() == 0
    assert "Continuing after step 3" in finish_log.log.read_text()
    assert_same_run(folder / "nan", whole)


def nan_in_step_5() -> None:
    original = Trainer._step

    def step(trainer, *arguments):
        if trainer.state.step == 4:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))
        original(trainer, *arguments)

    Trainer._step = step


FLIPPED = [
    *("last/training_state/optimizer.safetensors", "last/training_state/weights.safetensors", "last/model.safetensors"),
    *("last/training_state/state.json", "last/training_state/metrics.jsonl", "last/SHA256SUMS", "last/config.json"),
    *("previous/training_state/state.json", "best/training_state/optimizer.safetensors", "metrics.jsonl"),
    *("run.lock", "config.yaml"),
]


@pytest.fixture(scope="module")
def stopped(folder, whole):
    """A run that was stopped within its third epoch, after an evaluation made its best."""
    process = Process(arguments(folder, "stopped"), folder / "stopped.log", functools.partial(stop_at, 5))
    assert process.wait() == 128 + signal.SIGTERM
    return folder / "stopped"


def stop_at(step: int) -> None:
    """Sends its own process a signal in a step."""
    original = Trainer._step

    def stop(trainer, *arguments):
        if trainer.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(trainer, *arguments)

    Trainer._step = stop


@pytest.mark.parametrize("name", [FLIPPED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in FLIPPED[1:])])
def test_a_flipped_bit_is_noticed_and_the_run_ends_the_same(folder, whole, stopped, name):
    copy = folder / f"flipped{FLIPPED.index(name)}"
    shutil.copytree(stopped, copy)  # no links, as after a move to another disk
    content = bytearray((copy / name).read_bytes() or b"\0")
    content[len(content) // 2] ^= 0x10
    (copy / name).write_bytes(content)
    process = Process(arguments(folder, copy.name), folder / f"{copy.name}.log")
    assert process.wait() == 0, process.log.read_text()
    log = process.log.read_text()
    if name.count("/"):
        damaged = name.partition("/")[0]
        assert f"{copy / name} is damaged" in log or f"{damaged}/config.json" in log or "can't be read" in log
        assert f"{copy / damaged} is kept as {damaged}.aside" in log
        assert f"Continuing after step {5 if damaged == 'last' else 6}:" in log
    shutil.rmtree(copy / f"{name.partition('/')[0]}.aside", ignore_errors=True)
    if name.startswith("best"):  # nothing holds the best of an epoch that is gone; the run finds one again
        assert "The best checkpoint, of epoch 2, is not in" in log
        read_generation(copy / "best")
    else:
        assert_same_run(copy, whole)


# Small parts


def test_a_sample_depends_on_its_place_in_the_run_alone():
    class Noise(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return torch.rand(3)

    samples = SeededSamples(Noise(), seed=0)
    torch.manual_seed(1)
    first = samples[2, 5, 7]
    state = torch.get_rng_state()
    assert torch.equal(samples[2, 5, 7], first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (samples[1, 5, 7], samples[2, 4, 7], SeededSamples(Noise(), seed=1)[2, 5, 7]):
        assert not torch.equal(other, first)
