"""
A step's micro-batches by block: the same numbers, and less memory (run/by_block.py).
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from methods.registry import find
from model import LLaMA, QEmbedding
from run import memory
from run.by_block import SMALL, Kept, forward_backward, from_host, kept_bytes, pieces, to_host
from run.cards import card_named
from run.roofline import step_on
from tests.common import refused, settings, tiny, tokens

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
    optimizer = find("qgalore").build_optimizer(model, settings("--method=qgalore", "--rank=8"))
    for step in range(3):
        forward_backward(model, batches(step), SHARES, optimizer, nullcontext())
        optimizer.step()
    assert {t.moments.age for t in optimizer.parameters} == {3}


# -----------------------------------------------------------------------------
# what waits in host memory


@pytest.mark.parametrize("bits", [8, 16])
def test_an_input_waits_in_the_bytes_that_are_planned(bits):
    x = torch.randn(2, 32, 512).bfloat16()
    kept = Kept(x, bits)
    s = settings("--batch_size=2", "--block_size=32", "--n_embd=512", "--n_layer=1",
                 f"--checkpoint_bits={bits}")
    assert sum(t.nbytes for t in kept.codes) == kept_bytes(s, torch.bfloat16)
    error = (kept.value() - x).float().norm() / x.float().norm()
    assert error == 0 if bits == 16 else 0 < error < 0.01


@pytest.mark.parametrize("shape", [(3, 40, 96), (2, 256, 320), (1, 1, 1), (0, 4)])
def test_bytes_go_to_the_host_in_powers_of_two_and_come_back(shape):
    """As pinned memory is given: a size between two of them takes the larger."""
    for dtype in (torch.bfloat16, torch.int8, torch.float32):
        t = torch.randn(shape).mul_(50).to(dtype)
        parts = to_host(t)
        taken = sum(1 << (part.nbytes - 1).bit_length() for part in parts)
        assert taken < t.nbytes + SMALL
        back = from_host(torch.empty_like(t, device="meta"), parts, "cpu")
        assert back.dtype == dtype and torch.equal(back, t)
    for size in (5120 * 4096, 768 * 12 * 255, 2**24):
        assert sum(pieces(size)) == size


def test_a_host_without_room_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * 2**30)
    memory.refuse_what_the_host_has_no_room_for(0)
    memory.refuse_what_the_host_has_no_room_for(10 * 2**30)
    line = refused(memory.refuse_what_the_host_has_no_room_for, 11 * 2**30)
    assert "11.00 GiB" in line and "10.00 free" in line and "checkpoint_bits=8" in line


def test_copies_to_the_host_and_back_take_time():
    flags = "--n_layer=2 --batch_size=16 --gradient_accumulation_steps=2 --dtype=bfloat16".split()
    card = card_named("RTX 4060 Ti")
    usual, by_block = (
        step_on(card, settings(*flags, f"--by_block={on}", "--accumulation=bfloat16"))
        for on in (False, True)
    )
    copies = 2 * 16 * 2 * 256 * 512 * 2 / (0.8 * 16e9)  # layers, sequences, tokens, width, bytes
    for phase in ("forward", "backward"):
        more = by_block.seconds(card)[phase] - usual.seconds(card)[phase]
        assert more == pytest.approx(copies)
