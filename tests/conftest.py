"""Defaults for every test: no network, one thread, one seed."""

import os

# Before anything imports huggingface_hub: no test may reach the network, here or in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# The tensors of the tests are tiny: threads cost more than they bring, above all beside other workers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
