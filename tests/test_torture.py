"""
tests/torture.py itself: each trouble comes, and some that need no luck hold:
    python -m pytest tests/test_torture.py
"""

import pytest
import torch

from tests import torture
from tests.attempt import Attempt, Stock


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return Stock(str(tmp_path_factory.mktemp("torture")), seed=0, methods=["adamw"])


@pytest.mark.parametrize("name", ["kill_in_a_save", "file_too_large", "damaged_checkpoint",
                                  "wrong_checkpoint", "changed_setting"])
def test_a_trouble_holds(stock, name):
    torture.attempt(stock, name, number=0)


def test_a_run_that_ends_with_other_weights_is_found(stock):
    t = Attempt(stock, "other weights", 0)
    t.begin("whole")
    t.as_if_nothing_happened()
    path = f"{t.out_dir}/ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model"]["norm.weight"][0] += 1e-7
    torch.save(checkpoint, path)
    with pytest.raises(AssertionError, match="another model"):
        t.as_if_nothing_happened()


def test_each_trouble_comes_once_however_short_the_time():
    names = [name for name, number in torture.order(seed=0, minutes=0)]
    assert sorted(names) == sorted(torture.TROUBLES) and len(names) > 20
