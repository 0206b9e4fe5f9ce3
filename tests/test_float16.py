"""
Tests of training in float16, for cards without bfloat16.
    python -m pytest tests/test_float16.py
"""

import pytest
import torch

from methods.after_backward import AdamW
from model import LLaMA, LLaMAConfig, plain_linear
from qgalore import QGaLore
from run.device import loss_scale, weights_in
from tests.common import TINY_RUN, read_log, run, settings, write_shards

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, ffn_dim=48, vocab_size=61, block_size=16)
SMALL = 1e-7  # of a loss, whose gradients are then far below float16's least number


def trained(method, dtype, scale, steps=1, small=SMALL):
    """(norms of the last gradients / small, the optimizer, the model) after some steps."""
    torch.manual_seed(0)
    linear = {} if method == "qgalore" else {"linear": plain_linear}
    model = LLaMA(LLaMAConfig(**SHAPE), **linear)
    if method == "qgalore":
        optimizer = QGaLore(model, lr=0.01, rank=8, eps=1e-20)
    else:
        optimizer = AdamW(model, 0.01, (0.9, 0.99), 1e-20)
    optimizer.ranks.loss_scale = scale
    idx = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:])
        (loss * small * scale).backward()
        optimizer.step()
    return optimizer.norms / small, optimizer, model


@pytest.mark.parametrize("method", ["qgalore", "adamw"])
def test_scaled_gradients_survive_float16(method):
    steps = 2 if method == "qgalore" else 1  # the first only takes bases
    exact, *_ = trained(method, torch.float32, 1.0, steps)
    assert exact.min() > 0
    scaled, *_ = trained(method, torch.float16, 2.0**23, steps)
    torch.testing.assert_close(scaled, exact, rtol=0.05, atol=0.001)
    lost, *_ = trained(method, torch.float16, 1.0, steps)
    assert (lost < exact / 2).sum() > len(exact) / 2


@pytest.mark.parametrize("method", ["qgalore", "adamw"])
def test_a_gradient_that_overflows_counts_as_zero(method):
    _, optimizer, model = trained(method, torch.float16, 2.0**23, steps=2)
    assert optimizer.pop_stats()["skipped"] == 0
    idx = torch.arange(8).view(1, -1)
    with torch.autocast("cpu", torch.float16):
        loss = model(idx, idx)
    (loss * 2.0**100).backward()
    optimizer.step()
    assert optimizer.pop_stats() == {"grad_norm": 0.0, "skipped": len(optimizer.norms)} | (
        {"refreshes": 14} if method == "qgalore" else {}
    )
    assert all(t.isfinite().all() for t in model.state_dict().values())


def test_the_scale_is_near_the_tokens_of_a_step():
    s = settings("--batch_size=3", "--block_size=100", "--gradient_accumulation_steps=2")
    assert loss_scale(s, torch.float16) == 512.0  # of 600
    assert loss_scale(s, torch.bfloat16) == loss_scale(s, torch.float32) == 1.0
    assert weights_in(s, torch.float16) == torch.float32
    assert weights_in(s, torch.bfloat16) == torch.bfloat16


def test_a_run_in_float16_is_near_one_in_float32(tmp_path):
    write_shards(tmp_path / "shards")
    losses = {}
    for dtype in ("float32", "float16"):
        args = [f"--data_dir={tmp_path}/shards", f"--out_dir={tmp_path}/{dtype}"]
        args += [*TINY_RUN, "--max_iters=6", "--eval_iters=1"]  # a CPU is slow in float16
        code, _, err = run("train.py", *args, f"--dtype={dtype}")
        assert code == 0, err
        log = read_log(tmp_path / dtype)
        assert log[0, "loss"] < 10  # as it is, not multiplied
        losses[dtype] = log[6, "val_loss"]
    assert losses["float32"] != losses["float16"]
    assert abs(losses["float32"] - losses["float16"]) < 0.02
