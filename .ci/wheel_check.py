"""Check of an installed wheel away from its checkout: the demo, each way to train, shards, a conversion, the Hub.

Run by ``make wheel-check`` with the Python of the environment that the wheel was installed into, in an empty folder.
The Hub is the one of the tests, on loopback; everything else comes from the wheel.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torchvision.models import detection

import a2fpn

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
TORCHVISION = "fasterrcnn_mobilenet_v3_large_320_fpn"
TINY = (
    *("model.name=fasterrcnn_fpn", "model.pretrained=false", "model.overrides.backbone=test_resnet"),
    *("model.overrides.min_size=64", "model.overrides.max_size=96"),
)


def run(*command: object, script: str = "a2fpn", **environment: str) -> str:
    line = [str(SCRIPTS / script), *map(str, command)]
    print("$", *line, flush=True)
    done = subprocess.run(line, check=False, env={**os.environ, **environment}, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    if done.returncode:  # again and last, because a log is read from its end
        reason = "\n".join(done.stderr.splitlines()[-40:])
        raise SystemExit(f"{script} {command[0]} ended with exit code {done.returncode}:\n{reason}")
    return done.stdout


def hub_server() -> Any:
    spec = importlib.util.spec_from_file_location("hub_server", CHECKOUT / "tests" / "hub_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub_server"] = module
    spec.loader.exec_module(module)
    return module.HubServer()


def main() -> None:
    installed = Path(a2fpn.__file__).resolve()
    assert CHECKOUT / "a2fpn" not in installed.parents, f"the checkout is imported, not the wheel: {installed}"
    assert not any(Path.cwd().iterdir()), "run this in an empty folder"
    found = run("demo", "--output", "demo")
    assert len(list(Path("demo").iterdir())) == 8
    (total,) = [line for line in found.splitlines() if "all" in line]
    assert abs(float(total.replace("│", " ").split()[3]) - 0.738) < 0.01, f"the demo's AP has changed: {total}"

    demo = installed.parent / "assets" / "nuclei_demo"
    annotations = [f"data.{part}_annotations=annotations.json" for part in ("train", "val")]
    settings = (f"data.root={demo}", *annotations, "data.check_images=1", "data.workers=0", "data.batch_size=1")
    once = ("run.max_steps=1", "run.output=runs", "run.pictures=0", "run.trackers=[]", "run.mixed_precision=none")
    run("train", "--list")
    run("train", "--copy", "finetune_folder", "mine.yaml")
    run("train", "--config", "finetune_folder", *settings, *once, *TINY)
    module = ("-m", "a2fpn.training", "--config", "mine.yaml", *settings, *once, *TINY)
    run("launch", "--cpu", "--num_processes", "1", *module, "run.output=launched", script="accelerate")
    run("--standalone", "--nproc_per_node", "1", *module, "run.output=torchrun", script="torchrun")
    run("data", "shard", "--images", demo / "images", "--annotations", demo / "annotations.json", "--output", "shards")
    run("data", "shard", "--check", "shards")

    torch.save(getattr(detection, TORCHVISION)(weights=None, weights_backbone=None).state_dict(), "weights.pth")
    options = ("--option", "min_size=64", "--option", "max_size=96")
    run("hub", "convert", "weights.pth", "--from", "torchvision", "--model", TORCHVISION, "--output", "ours", *options)
    run("hub", "backbone", "runs/best", "--output", "backbone")
    run("hub", "card", "runs/best", "--repo", "alice/cells")

    server = hub_server()
    server.tokens["hf_alice"] = "alice"
    hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
    run("hub", "push", "runs/best", "--repo", "alice/cells", **hub)
    files = server.repos["alice/cells"].commits[server.repos["alice/cells"].refs["main"]]
    assert {"README.md", "config.json", "model.safetensors"} <= set(files), sorted(files)
    truth = ("--images", demo / "images", "--annotations", demo / "annotations.json")
    run("hub", "verify", "alice/cells", *truth, **hub)


if __name__ == "__main__":
    main()
