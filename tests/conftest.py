"""Defaults for every test: no network, one thread, one seed."""

import functools
import gc
import os

# Before anything imports huggingface_hub: no test may reach the network, here or in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator

import pytest
import torch
import typer.testing

from tests import processes

# The tensors of the tests are tiny: threads cost more than they bring, above all beside other workers.
torch.set_num_threads(1)

# For each command that a test invokes, Typer reads the signatures of all again, which takes longer than most commands.
typer.testing._get_command = functools.cache(typer.testing._get_command)


# Files of the longest tests, longest first: begun last, one of them would keep a worker busy after the others are done.
LONG = (
    *("export_model", "train", "resume", "convert_torchvision", "cli", "app", "backbones_table", "reassemble_triton"),
    *("backbones", "distributed", "detectors", "weights", "predict_files", "streams", "changes", "necks", "hub"),
    *("ablation", "house", "predict_tiles", "optimize", "data_check", "pure_predict", "benchmarks", "compiled"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Leaves what stays until the end, all modules and tests, out of each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker of the whole suite needs it sooner or later
        processes.start_server()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate starts like in a new process, on the CPU."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
