"""Before any test imports kernels/: without a GPU, Triton's kernels run in its interpreter."""

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of token shards. Forks of this process find what takes long to load loaded."""
    from run.memory import memory_plan
    from tests.common import TINY_RUN, settings, write_shards

    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    s = settings(*TINY_RUN, "--gradient_accumulation_steps=2")
    memory_plan(s, torch.float32, torch.float32)  # torch's fake tensors
    importlib.import_module("matplotlib.pyplot")
    return str(folder)
