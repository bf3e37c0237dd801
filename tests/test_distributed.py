"""Several processes learn and find what one does, and go down and come up together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.processes import run_python
from tests.training import Process, metrics, tiny_run, train

ROOT = Path(__file__).resolve().parent.parent
# Samplers of anchors and boxes that take all there are draw nothing that could depend on the process.
ALL = {"rpn_batch_size": 10**6, "box_batch_size": 10**6, "rpn_positive_fraction": 1.0, "box_positive_fraction": 1.0}
TAKE_ALL = [f"model.overrides.{name}={value}" for name, value in ALL.items()]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",
    # Otherwise processes that were started again may find the addresses of those before them.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def launch(processes: int, arguments: list[str], *, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["--max-restarts", str(restarts), str(ROOT / "train"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )


def start_ranks(call, arguments, folder):
    """Two processes of one training, forked: what starts them elsewhere takes seconds to import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [processes.Process(_in_rank, (r, port, call, arguments), folder / f"rank{r}.log") for r in range(2)]


def _in_rank(rank, port, call, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    call(*arguments)


def finish_ranks(ranks, folder):
    for number, rank in enumerate(ranks):
        assert rank.wait(300) == 0, (folder / f"rank{number}.log").read_text()


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["model.name=maskrcnn_fpn", "optim.name=sgd"], id="maskrcnn"),
        pytest.param(
            ["model.name=htc_fpn", "model.overrides.semantic=things", "optim.name=sgd"],
            id="htc",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_with_two_images_learn_what_one_with_four_does(tmp_path, overrides):
    """On images of one size: padding up to the largest image of a batch shows in the losses, in torchvision's too."""
    tiny_run(tmp_path, size=(64, 64))
    arguments = [*overrides, *TAKE_ALL, "run.epochs=2", "optim.lr=1e-2", "run.pictures=0", "data.check_images=0"]
    arguments += ["data.transforms.color_jitter=0.5", "model.overrides.norm=frozen"]
    two = start_ranks(train, ([*tiny_run(tmp_path, "two"), *arguments, "data.batch_size=2"],), tmp_path)
    one = Process([*tiny_run(tmp_path, "one"), *arguments, "data.batch_size=4"], tmp_path / "one.log")
    finish_ranks(two, tmp_path)
    assert one.wait() == 0, one.log.read_text()
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in (name for name in theirs if name.startswith("train/")):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    ours, theirs = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("two", "one"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)


RANKS = """
import json, os, sys, torch, a2fpn.training.trainer, a2fpn.training.validate
from a2fpn.training.cli import main

folder, compare = sys.argv[1], a2fpn.training.validate.evaluate_coco
rank = os.environ["RANK"]

def record_detections(truth, detections, **options):
    with open(f"{folder}/detections.json", "w") as file:
        json.dump(detections, file)
    return compare(truth, detections, **options)

class RecordWeights(a2fpn.training.trainer.Trainer):
    def run(self):
        super().run()
        torch.save(self.accelerator.unwrap_model(self.model).state_dict(), f"{folder}/rank{rank}.pt")

class RecordKeys(a2fpn.training.stepping.Stepper):
    def step(self, parts, step):
        done, problem = super().step(parts, step)
        with open(f"{folder}/keys{rank}.txt", "a") as file:
            for batch, ((_, targets), _) in zip(done, parts, strict=True):
                print(*sorted(batch.losses), "objects" if any(len(t["labels"]) for t in targets) else "none", file=file)
        return done, problem

a2fpn.training.validate.evaluate_coco, a2fpn.training.trainer.Trainer = record_detections, RecordWeights
a2fpn.training.trainer.Stepper = RecordKeys
sys.exit(main(sys.argv[2:]))
"""


def test_two_processes_hold_the_same_weights_and_find_what_one_finds_bit_for_bit(tmp_path):
    """3 validation images, 2 to a batch; in the first step one process sees no object at all."""
    arguments = [*tiny_run(tmp_path), "run.epochs=1", "run.pictures=0", "data.check_images=0", "data.eval_batch_size=2"]
    document = json.loads((tmp_path / "train" / "annotations.json").read_text())
    ids = [image["id"] for image in document["images"]]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids[:1]]
    (tmp_path / "train" / "annotations.json").write_text(json.dumps(document))
    more = ["data.batch_size=1", "run.val_loss=true"]
    call = (RANKS, [str(tmp_path), *arguments, *more])
    finish_ranks(start_ranks(processes.run_code, call, tmp_path), tmp_path)

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    lines = [(tmp_path / f"keys{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert {line.rsplit(" ", 1)[1] for line in lines[0] + lines[1]} == {"objects", "none"}
    assert len({line.rsplit(" ", 1)[0] for line in lines[0] + lines[1]}) == 1  # the same losses everywhere
    (record,) = metrics(tmp_path / "run")
    assert (record["step"], record["images_evaluated"]) == (2, 3)

    together = json.loads((tmp_path / "detections.json").read_text())
    assert len(together) == 30  # 10 per image
    # One process evaluates the same weights: resumed after its last step, it has nothing to do but that.
    probe = f"""
import os, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.argv = ["{tmp_path}"]
import a2fpn.training.validate, a2fpn.training.trainer
from a2fpn.training.cli import parse
trainer = a2fpn.training.trainer.Trainer(parse({[*arguments, "run.resume=auto", "data.batch_size=2"]!r}))
metrics, _ = trainer.validator.evaluate(trainer.evaluated_model, lambda: None)
losses = trainer.validator.losses(trainer.evaluated_model, lambda: None)
import json
print(json.dumps([metrics, losses]))
"""
    done = run_python(probe)
    assert done.returncode == 0, done.stderr
    alone, losses = json.loads(done.stdout.splitlines()[-1])
    assert {name: record[name] for name in alone} == alone
    assert {name: record[name] for name in losses} == pytest.approx(losses, rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


SETTINGS = ["run.epochs=3", "run.evaluate_every=3", "run.pictures=0", "data.check_images=0", "data.batch_size=1"]
SETTINGS += ["run.checkpoint_every=1", "run.resume=auto", "run.ema=0.9"]


@pytest.fixture(scope="module")
def whole(folder):
    """The output of two processes that nothing disturbed."""
    finish(launch(2, [*tiny_run(folder, "whole"), *SETTINGS]))
    return folder / "whole"


def wait_for_step(output: Path, process: subprocess.Popen, step: int) -> None:
    """Returns when a checkpoint of this step or a later one is there."""
    for _ in range(1200):
        path = output / "last" / "config.json"
        try:
            if json.loads(path.read_text())["metadata"]["steps"] >= step:
                return
        except FileNotFoundError:
            pass
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}")


def assert_same(output: Path, whole: Path) -> None:
    for name in ("last/model.safetensors", "best/model.safetensors", "last/training_state/weights.safetensors"):
        ours, theirs = load_file(output / name), load_file(whole / name)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


@pytest.mark.slow
def test_a_stopped_job_writes_a_checkpoint_and_goes_on_as_if_nothing_had_happened(folder, whole):
    """The signal reaches one process only; both stop after the same step."""
    arguments = [*tiny_run(folder, "stopped"), *SETTINGS]
    process = launch(2, arguments)
    wait_for_step(folder / "stopped", process, 1)
    one = next(child for child in psutil.Process(process.pid).children() if "train" in " ".join(child.cmdline()))
    one.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("stopped after step") == 2
    finish(launch(2, arguments))
    assert_same(folder / "stopped", whole)


@pytest.mark.slow
def test_a_killed_process_brings_the_job_down_which_restarts_and_resumes(folder, whole):
    process = launch(2, [*tiny_run(folder, "killed"), *SETTINGS], restarts=3)
    wait_for_step(folder / "killed", process, 2)
    workers = [child for child in psutil.Process(process.pid).children() if "train" in " ".join(child.cmdline())]
    workers[-1].kill()
    output = finish(process)
    assert f"exitcode: {-signal.SIGKILL}" in output
    assert "Continuing after step" in output
    assert_same(folder / "killed", whole)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Half of its epochs are done; no epoch is lost, and the schedule goes on where it was."""
    arguments = [*tiny_run(tmp_path), *SETTINGS, "run.checkpoint_every=0", "run.epochs=4", "run.evaluate_every=4"]
    process = launch(1, arguments)
    wait_for_step(tmp_path / "run", process, 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    before = [record["epoch"] for record in metrics(tmp_path / "run")]
    output = finish(launch(2, arguments))
    assert "Images per step: 1 -> 2." in output
    records = metrics(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert len(before) < 4
    assert f"{before[-1]} of 4 epochs" in output
    first = records[before[-1] - 1]["step"]
    assert [record["step"] for record in records[before[-1] :]] == [first + 2 * n for n in range(1, 5 - before[-1])]
