"""Every test starts from the same seeds, offline, and without settings from the user's shell."""

import os
import random

import numpy
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test never waits for a network
for name in ("HF_MODEL", "MESH_DEVICE"):  # the demos honour these, the tests choose their own models and devices
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Seed torch, random and numpy before each test, so that none depends on the tests that ran before it."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
