"""One job on two hosts: two network namespaces of this machine, joined by a cable, with one disk."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.test_distributed import ENVIRONMENT, ROOT, SETTINGS, finish, launch, wait_for_step
from tests.training import tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"),
        reason="network namespaces need root and iproute2",
    ),
]

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def hosts():
    """Names of two namespaces whose interfaces reach each other and nothing else."""
    mark = uuid.uuid4().hex[:6]
    names = [f"a2fpn-{mark}-{number}" for number in (0, 1)]
    cables = [f"v{mark}{number}" for number in (0, 1)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


def launch_on(number: int, host: tuple[str, str], arguments: list[str]) -> subprocess.Popen:
    """Starts the launcher on a host, as docs/training.md says; no name service knows these hosts."""
    name, cable = host
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400"]
    command += ["--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", ADDRESSES[number]]
    command += ["--rdzv-id", "job", "--max-restarts", "2", str(ROOT / "train"), *arguments]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": cable}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "a host loses its process"])
def test_two_hosts_learn_what_two_processes_of_one_do(hosts, tmp_path, kill):
    finish(launch(2, [*tiny_run(tmp_path, "one"), *SETTINGS]))
    arguments = [*tiny_run(tmp_path, "two"), *SETTINGS]
    nodes = [launch_on(number, host, arguments) for number, host in enumerate(hosts)]
    if kill:
        wait_for_step(tmp_path / "two", nodes[0], 2)
        workers = [
            child
            for child in psutil.Process(nodes[1].pid).children(recursive=True)
            if str(ROOT / "train") in child.cmdline() and "torch.distributed.run" not in child.cmdline()
        ]
        workers[0].kill()
    outputs = [finish(node) for node in nodes]
    if kill:
        assert f"exitcode: {-signal.SIGKILL}" in outputs[1]
        assert "Continuing after step" in outputs[0] + outputs[1]
    for name in ("last/model.safetensors", "best/model.safetensors"):
        ours, theirs = (load_file(Path(tmp_path, run, name)) for run in ("two", "one"))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
