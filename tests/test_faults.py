"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults.py

tests/torture.py kills, fills and damages at random, for as long as it is told.
"""

from functools import partial

import pytest
import torch

from model import LLaMA, QLinear
from run.finite import first_not_finite
from tests.common import tiny

# -----------------------------------------------------------------------------
# runs that are lost

# -----------------------------------------------------------------------------
# gradients and weights that are not finite


@pytest.mark.parametrize("bits", (4, 8, 16))
def test_a_weight_that_is_not_finite_is_found_by_name(bits):
    model = LLaMA(tiny(n_layer=1), partial(QLinear, bits=bits))
    assert first_not_finite(model) is None
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if not t.is_floating_point():
            continue  # INT8 codes
        last = t.data.view(-1)[-1:]
        good = last.clone()
        for value in (torch.nan, torch.inf, -torch.inf, 3e38):  # the last is a number
            last.fill_(value)
            assert first_not_finite(model) == (None if value == 3e38 else name)
        last.copy_(good)
    model.head.weight.data.fill_(torch.nan)
    model.embed.weight.data[0, 0] = torch.inf
    assert first_not_finite(model) == "embed.weight"  # the first of two


# -----------------------------------------------------------------------------
# data that is wrong

# -----------------------------------------------------------------------------
# records and texts

# -----------------------------------------------------------------------------
# arithmetic

# -----------------------------------------------------------------------------
# files that are not trusted

# -----------------------------------------------------------------------------
# the plan, threads and pictures

# -----------------------------------------------------------------------------
# what people type
