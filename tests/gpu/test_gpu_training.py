"""Training on the device: scaled steps, moving averages, resuming to the last bit, several processes on one GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3

from tests.gpu.gpu_cases import batch, error, gradients, lively, on

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


def test_a_step_of_infinite_gradients_is_skipped_and_the_scale_halved(device: torch.device) -> None:
    model = lively("maskrcnn_fpn").train().to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    images, targets = batch(4, 2)

    def step(spoil: bool) -> bool:
        """One step; says whether it changed the weights."""
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        with torch.autocast(device.type, torch.float16):
            loss = torch.stack(list(model(on(device, images), targets).values())).sum()
        scaler.scale(loss).backward()
        if spoil:
            next(grad for grad in gradients(model) if grad is not None).fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [p for p in model.parameters() if p.requires_grad]
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert step(spoil=False)
    assert not step(spoil=True)
    assert scaler.get_scale() == 2.0**7
    assert step(spoil=False)


def test_the_moving_average_follows_on_the_device(device: torch.device) -> None:
    model = lively("fasterrcnn_fpn").train().to(device)
    ema = ModelEmaV3(model, decay=0.5)
    before = {name: x.clone() for name, x in ema.module.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    for name, parameter in ema.module.named_parameters():
        assert parameter.device.type == device.type
        torch.testing.assert_close(parameter, before[name] + 0.5)


def environment(device: torch.device) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return os.environ | own | ({"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {})


def start(arguments: list[str], device: torch.device, log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(device),
            cwd=ROOT,
        )


def kill_after_a_checkpoint(process: subprocess.Popen, output: Path) -> None:
    """Kills a run as soon as it has something to go on from; one that has ended by then is not killed."""
    while process.poll() is None and not (output / "last" / "config.json").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_two_runs_and_one_that_was_killed_end_with_the_same_bits(tmp_path: Path, device: torch.device) -> None:
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    from tests.training import tiny_run

    settings = ["run.epochs=2", "run.evaluate_every=2", "run.checkpoint_every=1", "run.ema=0.9", "run.pictures=0"]
    settings += ["data.check_images=0", "run.deterministic=true", "run.trackers=[]", "run.resume=auto"]
    settings += ["run.mixed_precision=bf16"] if device.type == "cuda" else []
    runs = {name: [*tiny_run(tmp_path, name), *settings] for name in ("one", "two", "killed")}
    killed = start(runs["killed"], device, tmp_path / "killed.log")
    kill_after_a_checkpoint(killed, tmp_path / "killed")
    whole = [start(runs[name], device, tmp_path / f"{name}.log") for name in ("one", "two")]
    again = start(runs["killed"], device, tmp_path / "killed.log")
    for process, name in ((again, "killed"), *zip(whole, ("one", "two"), strict=True)):
        assert process.wait(240) == 0, (tmp_path / f"{name}.log").read_text()
    for name in ("last/training_state/weights.safetensors", "last/model.safetensors"):
        states = [load_file(tmp_path / run / name) for run in runs]
        for key, value in states[0].items():
            assert torch.equal(states[1][key], value), f"two runs differ in {key}"
            assert torch.equal(states[2][key], value), f"the resumed run differs in {key}"


@pytest.mark.parametrize("neck", ["fpn", "a2fpn"])
def test_compiled_maps_have_the_losses_and_gradients_of_plain_ones(neck: str, device: torch.device) -> None:
    images, targets = batch(4, 2)
    found = []
    for compiled in (False, True):
        model = lively(f"maskrcnn_{neck}").train().to(device)
        if compiled:
            model.compile_maps()
        losses = model(on(device, images), targets)
        torch.stack(list(losses.values())).sum().backward()
        found.append((list(losses.values()), [p.grad for p in model.parameters()]))
    assert error(found[1][0], found[0][0]) < 1e-4
    assert error(found[1][1], found[0][1]) < 1e-3


PARALLEL = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tests.gpu.gpu_cases import batch, lively, on

device = torch.device(sys.argv[1])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = lively("maskrcnn_fpn").train()
model.normalize_losses_globally(enabled=True)
model = DistributedDataParallel(model.to(device))
images, targets = batch(4, 2)
losses = model(on(device, images[rank : rank + 1]), targets[rank : rank + 1])
torch.stack(list(losses.values())).sum().backward()
if rank == 0:
    torch.save([None if p.grad is None else p.grad.cpu() for p in model.parameters()], sys.argv[2])
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_on_one_device_have_the_gradient_of_one(tmp_path: Path, device: torch.device) -> None:
    """Over gloo: NCCL refuses two processes on a GPU."""
    program = tmp_path / "parallel.py"
    program.write_text(PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(program), str(device), str(tmp_path / "gradients.pt")],
        capture_output=True,
        text=True,
        env=environment(device),
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = lively("maskrcnn_fpn").train().to(device)
    images, targets = batch(4, 2)
    torch.stack(list(model(on(device, images), targets).values())).sum().backward()
    together = torch.load(tmp_path / "gradients.pt")
    assert error(together, [p.grad for p in model.parameters()]) < 1e-2
