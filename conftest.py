"""Before any test file imports kernels/: without a GPU, Triton runs in its interpreter, in numpy."""

import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of token shards; forks of this process find torch's fake tensors and matplotlib loaded."""
    import train
    from configurator import configure
    from run.memory import memory_plan
    from tests.common import TINY_RUN, write_shards

    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    config = configure(settings, [*TINY_RUN, "--n_kv_head=2", "--gradient_accumulation_steps=2"])
    memory_plan(config, train.build, torch.float32, torch.float32)
    importlib.import_module("matplotlib.pyplot")
    return str(folder)
