"""
A step's micro-batches by block: the same numbers, and less memory (run/by_block.py).
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from model import LLaMA, QEmbedding
from methods.registry import find
from run.by_block import forward_backward
from run.memory import memory_plan
from tests.common import read_log, settings, tiny, tokens, trains, Job, write_shards

SHARES = [0.5, 0.25, 0.25]


def batches(step, documents=False):
    """Three micro-batches of examples, or of plain windows."""
    found = []
    for i in range(3):
        x, y = tokens(seed=10 * step + i)
        number = None
        if documents:
            number = torch.arange(32).expand(2, 32) // (10 + i)
            y[:, : 5 * (i + 1)] = -1
        found.append((x, y, number))
    return found


def trained(by_block, method="qgalore", documents=False, autocast=None, shape=None, **changes):
    """(losses, state) of a model after five steps."""
    torch.manual_seed(0)
    s = settings(f"--method={method}")
    s = s.changed(accumulation="float32", rank=8, proj_gap=2, **changes)
    config = tiny(checkpoint_activations=True, **(shape or {}))
    autocast = torch.autocast("cpu", autocast) if autocast else nullcontext()
    embedding = partial(QEmbedding, group_size=32) if s.embed_bits == 8 else None
    linear = partial(find(method).linear, bits=8) if s.weight_bits == 8 else find(method).linear
    model = LLaMA(config, linear, embedding=embedding)
    if s.freeze_embedding:
        model.embed.requires_grad_(False)
        model.head.requires_grad_(False)
    optimizer = find(method).build_optimizer(model, s)
    losses = []
    for step in range(5):
        micro_batches = batches(step, documents)
        if by_block:
            loss = forward_backward(model, micro_batches, SHARES, optimizer, autocast)
        else:
            loss = 0
            for i, (x, y, number) in enumerate(micro_batches):
                optimizer.accumulating = i < 2
                with autocast:
                    micro_loss = model(x, y, documents=number) * SHARES[i]
                micro_loss.backward()
                loss = loss + micro_loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, model.state_dict()


@pytest.mark.parametrize("case", [
    {},
    {"method": "qmuon"},
    {"method": "galore", "grad_clip": 0.5},
    {"method": "adamw", "weight_bits": 16},
    {"documents": True},
    {"shape": {"checkpoint_bits": 8}},
    {"shape": {"post_norms": True, "qkv_bias": True, "sliding_window": 8, "global_every": 2}},
    {"freeze_embedding": True, "embed_bits": 8},
    {"autocast": torch.bfloat16},
], ids=str)
def test_by_block_gives_the_same_weights_bit_for_bit(case):
    (losses, state), (expected_losses, expected) = trained(True, **case), trained(False, **case)
    assert losses == expected_losses and losses[-1] != losses[0]
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_tied_embedding_takes_one_step_by_the_sum_of_its_uses():
    case = {"method": "adamw", "weight_bits": 16, "shape": {"tie_embedding": True}}
    (losses, state), (expected_losses, expected) = trained(True, **case), trained(False, **case)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(state, expected)


def test_a_tied_embedding_in_backward_takes_one_step_by_block():
    torch.manual_seed(0)
    model = LLaMA(tiny(tie_embedding=True))
    optimizer = find("qgalore").build_optimizer(model, settings("--rank=8"))
    for step in range(3):
        forward_backward(model, batches(step), SHARES, optimizer, nullcontext())
        optimizer.step()
    assert {t.moments.age for t in optimizer.parameters} == {3}
