"""
The tests, a second reading of the method. All run on a CPU and make their own data:
    python -m pytest test_qgalore.py
"""

import glob
import importlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import train
from tests.common import HERE, TINY_RUN, Job, one_line_error, read_log, run, script, tiny, tokens, trains
from run.checkpoint import save_checkpoint
from configurator import configure
from run.memory import memory_plan
from model import LLaMA, LLaMAConfig, QLinear, plain_linear
from methods.moments import Moments, Sum
from run.shards import read_shard, write_shard
from qgalore import Projection, QGaLore, similarity
from quant import (add_bfloat16_, add_low_rank_int8_, dequantize_int4, dequantize_int8, quantize_int4, quantize_int8,
                   random_key, rounding_key, stochastic_round, uniform)



# -----------------------------------------------------------------------------
# quant.py: number formats


@pytest.mark.parametrize(
    "rows,cols,group", [(3, 512, 256), (4, 300, 256), (5, 300, 64), (1, 7, 256), (1, 7, 2), (2, 1, 1), (3, 9, 4)]
)
def test_quantising_errs_by_half_a_grid_unit_at_most_and_takes_exactly_the_bytes_it_should(rows, cols, group):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    for bits, quantize, dequantize in ((8, quantize_int8, dequantize_int8), (4, quantize_int4, dequantize_int4)):
        q, scale, zero = quantize(w, group)
        assert q.numel() * q.element_size() == math.ceil(w.numel() * bits / 8)
        assert scale.shape == zero.shape == (rows, math.ceil(cols / group))
        back = dequantize(q, scale, zero)
        half = scale.repeat_interleave(group, dim=1)[:, :cols] / 2
        assert back.shape == w.shape and ((back - w).abs() <= half * 1.001 + 1e-6).all()


def test_a_group_of_equal_values_comes_back_exactly():
    w = torch.tensor([[0.02] * 300, [0.0] * 300, [-7.0] * 300])
    assert torch.equal(dequantize_int8(*quantize_int8(w, stochastic=True)), w)
    assert torch.equal(dequantize_int4(*quantize_int4(w)), w)


def test_a_group_size_that_is_not_a_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        quantize_int8(torch.randn(2, 300), group_size=100)


def test_stochastic_rounding_is_unbiased():
    n, generator = 200_000, torch.Generator().manual_seed(0)
    for fraction in (0.01, 0.3, 0.5, 0.99):
        for whole in (-3, 0, 100):
            draws = stochastic_round(torch.full((n,), whole + fraction), generator)
            assert set(draws.unique().tolist()) == {whole, whole + 1}
            error = draws.double().mean().item() - whole - fraction
            assert abs(error) < 4 * math.sqrt(fraction * (1 - fraction) / n) + 1e-5  # 1e-5: float32's own at 100.01


def test_counted_random_numbers_are_uniform_differ_by_key_and_start_anywhere():
    u = uniform(random_key("a"), 0, 2**20)
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 1e-3 and abs(u.var() - 1 / 12) < 1e-3
    for other in (u.roll(1), u.roll(2), uniform(random_key("b"), 0, 2**20)):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 4e-3
    for start, n in ((0, 7), (1, 6), (12345, 100), (2**20 - 1, 1)):
        assert torch.equal(uniform(random_key("a"), start, n), u[start : start + n])
    whole = torch.arange(-128.0, 128)[:, None]
    assert ((whole + u[:4096]).floor() == whole).all()  # what rounding must leave alone


def test_an_element_s_numbers_are_spread_over_the_steps_so_that_equal_steps_round_up_as_often_as_they_should():
    u = torch.stack([uniform(rounding_key(step, "w"), 0, 2000) for step in range(1000)])  # (steps, elements)
    for fraction in (0.003, 0.1, 0.5, 0.77):
        for n in (10, 100, 1000):
            error = (u[:n] + fraction).floor().sum(dim=0) - n * fraction
            assert error.abs().max() < 5 and error.mean().abs() < 4 * error.std() / 2000**0.5
    for step in (1, 999):  # at one step they are as random as any
        assert abs(u[step].mean() - 0.5) < 4 * 0.29 / 2000**0.5
        assert abs(torch.corrcoef(torch.stack([u[step], u[step].roll(1)]))[0, 1]) < 4 / 2000**0.5


def test_spread_numbers_leave_a_third_of_the_variance_of_what_rounding_adds_up_to():
    def error(key):
        torch.manual_seed(0)
        w, step = torch.randn(64, 512) * 0.02, torch.zeros(64, 512)
        q, scale, zero = quantize_int8(w)
        w = dequantize_int8(q, scale, zero)
        for i in range(300):
            step.lerp_(torch.randn(64, 512) * 1e-4, 0.1)  # as momentum turns
            w += step
            add_low_rank_int8_(q, scale, zero, step, None, key=key(i))
        return (dequantize_int8(q, scale, zero) - w).square().mean().item()

    spread, independent = error(lambda i: rounding_key(i, "w")), error(lambda i: random_key(i, "w"))
    assert spread / independent == pytest.approx(0.36, abs=0.03)


def test_bfloat16_parameters_move_by_steps_far_below_their_last_bit():
    p, delta = torch.full((100, 1000), 0.02, dtype=torch.bfloat16), torch.full((100, 1000), 1.0, dtype=torch.bfloat16)
    start, unit = p.double().mean(), 2.0**-13  # the last bit's worth at 0.02
    for i in range(50):
        add_bfloat16_(p, delta, -0.02 * unit, random_key("test", i))
    moved = (p.double().mean() - start).item()
    assert abs(moved + 50 * 0.02 * unit) < 4 * unit * (50 * 0.02 / p.numel()) ** 0.5
    assert torch.equal(start.bfloat16(), (start - 0.02 * unit).bfloat16())  # where rounding to nearest would stay


def test_weights_that_are_quantised_again_unmoved_keep_their_codes():
    q, scale, zero = quantize_int8(torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * 0.02)
    start, generator = q, torch.Generator().manual_seed(1)
    for _ in range(300):
        q, scale, zero = quantize_int8(dequantize_int8(q, scale, zero), stochastic=True, generator=generator)
    assert (q != start).float().mean() < 1e-3


def test_repeated_requantisation_of_moving_weights_neither_shrinks_nor_shifts_them():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(128, 256, generator=generator) * 0.02 + 0.005  # off centre: a rounded zero point would show
    codes, total = quantize_int8(w), torch.zeros_like(w)
    w0 = dequantize_int8(*codes)
    for _ in range(200):
        step = torch.randn(w.shape, generator=generator) * 2e-5  # about a tenth of a grid unit
        codes = quantize_int8(dequantize_int8(*codes) + step, stochastic=True, generator=generator)
        total += step
    error = dequantize_int8(*codes) - w0 - total  # what rounding added: it has mean 0, and no part along w
    n = w.numel()
    assert error.mean().abs() < 4 * error.std() / n**0.5
    along = (error * w0).sum() / w0.square().sum()
    assert along.abs() < 4 * error.std() / w0.norm()


def test_steps_of_a_hundredth_of_a_grid_unit_add_up_only_with_stochastic_rounding():
    w = torch.linspace(-1, 1, 256).repeat(16, 1)[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    inner = w.abs() < 0.9  # the ends of a group set its grid, and stay where they are
    for stochastic in (True, False):
        layer = QLinear(256, 16)
        layer.set_weight(w)
        unit, start = layer.scale.mean().item(), layer.float_weight()
        delta = torch.where(inner, 0.01 * unit, 0.0)
        for i in range(1000):
            layer.add_low_rank_(delta, torch.eye(256), key=random_key("test", i) if stochastic else None)
        moved = ((layer.float_weight() - start)[inner] / unit).double()
        if stochastic:  # each step's error is at most Bernoulli: variance under 0.01 a step, 10 in all
            assert abs(moved.mean().item() - 10) < 4 * math.sqrt(10 / inner.sum().item())
        else:
            assert moved.abs().max() < 1e-3


def test_a_small_uniform_step_moves_weights_in_full_because_the_sum_is_formed_in_float32():
    torch.manual_seed(0)
    layer = QLinear(512, 512, dtype=torch.bfloat16)  # where the sum in bfloat16 loses four fifths of the step
    start = layer.float_weight().double().mean()
    layer.add_low_rank_(torch.full((512, 1), 1e-5), torch.ones(512, 1), key=random_key("test"))
    moved = (layer.float_weight().double().mean() - start).item()
    noise = layer.scale.max().item() * 0.5 / 512
    assert abs(moved - 1e-5) < 4 * noise and noise < 1e-6


# -----------------------------------------------------------------------------
# model.py


def test_qlinear_hands_its_hook_the_two_factors_of_the_weights_gradient():
    torch.manual_seed(0)
    layer, seen = QLinear(24, 40), []
    layer.hook = lambda *args: seen.append(args)
    x = torch.randn(2, 5, 24, requires_grad=True)
    w = layer.float_weight().requires_grad_()
    dy = torch.randn(2, 5, 40)
    expected = torch.autograd.grad(F.linear(x, w), (x, w), dy)
    layer(x).backward(dy)
    ((same, a, b),) = seen
    assert same is layer and a.shape == (10, 24) and b.shape == (10, 40)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(b.T @ a, expected[1])


def test_with_int8_products_a_qlinear_gives_the_inputs_gradient_and_its_hook_unrounded_factors():
    torch.manual_seed(0)
    exact, layer, seen = QLinear(24, 40), QLinear(24, 40, matmul="int8"), []
    exact.load_state_dict(layer.state_dict())
    layer.hook = lambda *args: seen.append(args[1:])
    x, dy = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    (y, dx), (y_exact, dx_exact) = ([z.detach(), *torch.autograd.grad(z, a, dy)] for a in (x.clone().requires_grad_(),)
                                    for z in (layer(a), exact(a)))
    assert 0 < (y - y_exact).norm() < 0.01 * y_exact.norm() and 0 < (dx - dx_exact).norm() < 0.01 * dx_exact.norm()
    assert torch.equal(seen[0][0], x.flatten(0, 1)) and torch.equal(seen[0][1], dy.flatten(0, 1))
    for wrong in (dict(matmul="int4"), dict(matmul="int8", bits=16)):
        with pytest.raises(ValueError, match="matmul"):
            QLinear(24, 40, **wrong)


def test_without_a_hook_backward_leaves_the_weight_alone_and_gives_the_inputs_gradient():
    layer, x = QLinear(24, 40), torch.randn(3, 24, requires_grad=True)
    before = layer.q.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.q, before) and x.grad.abs().sum() > 0


def test_the_chunked_loss_and_its_gradients_are_cross_entropys():
    torch.manual_seed(0)
    model = LLaMA(tiny(block_size=600, vocab_size=13), linear=plain_linear)  # 1200 tokens: three chunks, the last short
    x, y = tokens(2, 600, 13)
    y[0, :100] = -1
    names = ["head.weight", "embed.weight", "norm.weight"]
    parameters = [model.get_parameter(name) for name in names]
    loss = model(x, y)
    got = torch.autograd.grad(loss, parameters)
    h = []
    model.norm.register_forward_hook(lambda module, args, out: h.append(out))
    model(x)
    expected_loss = F.cross_entropy((h[0] @ model.head.weight.T).flatten(0, 1), y.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(expected_loss, parameters)
    torch.testing.assert_close(loss, expected_loss)
    for name, a, b in zip(names, got, expected):
        torch.testing.assert_close(a, b, msg=lambda m: f"{name}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(model(x, y), expected_loss)
        assert model(x, torch.full_like(y, -1)).item() == 0


@pytest.mark.parametrize("kv_heads,tie", [(4, False), (2, True)])
def test_the_model_is_the_llama_of_transformers(kv_heads, tie):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = tiny(n_kv_head=kv_heads, tie_embedding=tie)
    ours = LLaMA(c, linear=plain_linear)
    for p in ours.parameters():
        nn.init.normal_(p, mean=0.5 if p.ndim == 1 else 0, std=0.2)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        max_position_embeddings=c.block_size, tie_word_embeddings=tie))
    rename = {"embed.": "model.embed_tokens.", "blocks.": "model.layers.", "attn_norm": "input_layernorm",
              "mlp_norm": "post_attention_layernorm", ".attn.": ".self_attn.", "head.": "lm_head."}
    state = {}
    for name, tensor in ours.state_dict().items():
        name = "model." + name if name == "norm.weight" else name
        for old, new in rename.items():
            name = name.replace(old, new)
        state[name] = tensor
    theirs.load_state_dict(state)
    x, y = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits[:, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(x, y), F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()))


def test_a_seed_gives_every_method_the_same_model():
    models = []
    for linear in (QLinear, plain_linear):
        torch.manual_seed(0)
        models.append(LLaMA(tiny(), linear=linear))
    a, b = models
    assert torch.equal(a.head.weight, b.head.weight)
    w, q = b.blocks[1].mlp.down_proj.weight, a.blocks[1].mlp.down_proj
    assert (q.float_weight() - w).abs().max() <= q.scale.max() * 0.501


def test_generation_with_the_cache_picks_the_tokens_that_recomputing_picks():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.set_weight(layer.float_weight() * 10)  # sharp enough that no two logits tie
    idx, _ = tokens(3, 8)
    got = torch.cat(list(model.generate(idx, 20, temperature=0)), dim=1)
    for _ in range(20):
        with torch.no_grad():
            idx = torch.cat([idx, model(idx).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(got, idx[:, 8:])


def test_generation_runs_past_block_size():
    torch.manual_seed(0)
    out = list(LLaMA(tiny(block_size=8)).generate(tokens(1, 12)[0], 20, top_k=5))
    assert len(out) == 20 and all(0 <= t.item() < 61 for t in out)


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_top_k_the_likeliest():
    model = LLaMA(tiny())
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    model.forward = lambda *args, **kwargs: torch.cat([torch.full((1, 57), -99.0), probability.log()[None]], dim=1)

    def draw(**how):
        generator = torch.Generator().manual_seed(0)
        idx = torch.zeros(1, 1, dtype=torch.long)
        return {token.item() - 57 for token in model.generate(idx, 200, generator=generator, **how)}

    assert draw(top_p=0.7) == {0, 1} and draw(top_k=3) == {0, 1, 2} and draw(temperature=0) == {0}


def run_steps(model, optimizer, n, batch=2, vocab=61):
    losses = []
    for i in range(n):
        x, y = tokens(batch, vocab=vocab, seed=i)
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
    return losses


def test_checkpointed_activations_change_memory_and_nothing_else():
    states = []
    for on in (False, True):
        torch.manual_seed(0)
        model = LLaMA(tiny(checkpoint_activations=on))
        run_steps(model, QGaLore(model, rank=8, gap=2), 5)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_block_inputs_kept_in_int8_give_the_gradient_to_a_percent_and_the_loss_exactly():
    losses, gradients = [], []
    for bits in (16, 8):
        torch.manual_seed(0)
        model = LLaMA(tiny(checkpoint_activations=True, checkpoint_bits=bits), linear=plain_linear)
        loss = model(*tokens())
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == losses[1] and 0 < (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()


def test_compiled_pointwise_parts_compute_the_same_and_without_a_compiler_there_is_one_warning():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    x, y = tokens()
    expected = model(x, y)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for there_is_one in (False, True):
        if there_is_one and not shutil.which("g++"):
            pytest.skip("torch.compile needs a C++ compiler")
        torch._dynamo.reset()
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught, torch._inductor.config.patch(
            {} if there_is_one else {"cpp.cxx": (None, "/nowhere/g++")}
        ):
            model.compile_pointwise()
        assert sum("torch.compile fails" in str(w.message) for w in caught) == (not there_is_one)
        loss = model(x, y)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for p, gradient in zip(model.parameters(), gradients):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


# -----------------------------------------------------------------------------
# qgalore.py: the method


def test_a_model_trained_with_int8_products_ends_at_the_float_products_loss():
    ends = []
    for matmul in ("float", "int8"):
        torch.manual_seed(0)
        model = LLaMA(tiny(), linear=partial(QLinear, matmul=matmul))
        QGaLore(model, 0.01, rank=8, gap=10, scale=1.0)
        x, y = tokens(8)
        for _ in range(30):
            loss = model(x, y)
            loss.backward()
        ends.append(loss.item())
    assert ends[0] != ends[1] and abs(ends[0] - ends[1]) < 0.05 and ends[0] < 0.5, ends


class LargeFloats(TorchDispatchMode):
    """Follows every float storage of at least `floor` bytes that an operation makes."""

    def __init__(self, floor):
        super().__init__()
        self.floor, self.refs = floor, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.untyped_storage().nbytes() >= self.floor:
                self.refs[t.untyped_storage()._cdata] = (StorageWeakRef(t.untyped_storage()), tuple(t.shape))
        return out

    def alive(self):
        return [shape for ref, shape in self.refs.values() if not ref.expired()]


@pytest.mark.parametrize("svd", [False, True])
def test_nothing_of_a_weights_float_or_gradient_size_outlives_its_own_backward(svd):
    torch.manual_seed(0)
    model = nn.Sequential(*(QLinear(512, 512) for _ in range(4)))
    optimizer = QGaLore(model, rank=16, gap=2, svd=svd)
    with LargeFloats(4 * 512 * 512) as live:
        largest, look_at_layer = [], optimizer._look_at_layer

        def watch(name, layer, x, dy):
            before = live.alive()  # what the layers behind this one left
            look_at_layer(name, layer, x, dy)
            largest.append(before + live.alive())

        for name, layer in model.named_modules():
            if isinstance(layer, QLinear):
                layer.hook = lambda layer, x, dy, name=name: watch(name, layer, x, dy)
        for _ in range(3):
            model(torch.randn(8, 512)).square().sum().backward()
    assert len(largest) == 12 and live.refs  # large floats do come up, for a moment
    assert all(shapes == [] for shapes in largest)


def low_rank_gradient(projection, x, dy):
    left, right = projection.project(x, dy)
    return left.T @ right


def refresh(projection, x, dy, step=0):
    left, right = projection.look(x, dy, step)
    projection.turn(left.T @ right, step)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_the_factored_gradient_is_the_projected_gradient(shape):
    torch.manual_seed(0)
    out, n_in = shape
    x, dy = torch.randn(50, n_in), torch.randn(50, out)
    projection = Projection(out, n_in, rank=8, bits=16)
    refresh(projection, x, dy)
    gradient, p = dy.T @ x, projection.matrix()
    expected = p.T @ gradient.T if out >= n_in else p.T @ gradient
    torch.testing.assert_close(low_rank_gradient(projection, x, dy), expected)
    torch.testing.assert_close(p.T @ p, torch.eye(8), atol=1e-5, rtol=0)


def with_torch_linears(model):
    """The same model with torch's Linears in place of its QLinears (bits=16), their weights shared by value."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            linear = plain_linear(module.in_features, module.out_features)
            linear.weight.data.copy_(module.weight)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], linear)
    return model


def float_llama(**changes):
    torch.manual_seed(0)
    return LLaMA(tiny(**changes), linear=lambda *args, **kwargs: QLinear(*args, bits=16, **kwargs))


def test_at_full_rank_with_every_quantiser_off_it_is_adamw():
    ours, theirs = float_llama(), with_torch_linears(float_llama())
    QGaLore(ours, lr=0.01, weight_decay=0.1, rank=1000, scale=1.0, proj_bits=16, moments="float32", gap=3)
    groups = [{"params": [p for p in theirs.parameters() if (p.ndim > 1) == decayed], "weight_decay": 0.1 * decayed}
              for decayed in (True, False)]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    for i in range(20):
        x, y = tokens(seed=i)
        ours(x, y).backward()
        theirs(x, y).backward()
        adamw.step()
        adamw.zero_grad()
    theirs = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        difference = (tensor - theirs[name]).norm() / theirs[name].norm()
        assert difference < 1e-4, (name, difference)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_with_exact_svd_and_nothing_quantised_it_steps_as_galores_own_optimizer(shape, monkeypatch):
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    from galore_torch.galore_projector import GaLoreProjector

    gradients, svd = [], GaLoreProjector.get_orthogonal_matrix  # let it see the last step's gradient, as ours does
    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix",
                        lambda self, gradient, *args, **kwargs: svd(self, gradients[-2], *args, **kwargs))
    torch.manual_seed(0)
    layer = QLinear(shape[1], shape[0], bits=16)
    theirs = nn.Parameter(layer.weight.clone())
    QGaLore(layer, lr=0.01, eps=1e-12, weight_decay=0.0, rank=8, gap=10, scale=0.25, threshold=2.0, proj_bits=16,
            moments="float32", svd=True)
    group = {"params": [theirs], "rank": 8, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    galore = galore_torch.GaLoreAdamW([group], lr=0.01, eps=1e-12, no_deprecation_warning=True)
    for step in range(20):
        x, target = torch.randn(64, shape[1]), torch.randn(64, shape[0])
        (layer(x) - target).square().mean().backward()
        (F.linear(x, theirs) - target).square().mean().backward()
        gradients.append(theirs.grad.clone())
        if step:  # the first only looks
            galore.step()
        galore.zero_grad()
        assert (layer.weight - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 8])
def test_micro_batches_make_the_step_of_one_large_batch(n):
    weights = []
    for parts in (1, n):
        torch.manual_seed(0)
        model = nn.Sequential(  # the basis of the first lies on its input side, of the second on its output side
            QLinear(24, 40, bits=16), nn.Tanh(), QLinear(40, 24, bits=16), nn.Tanh(), nn.Linear(24, 24)
        )
        optimizer = QGaLore(model, rank=8, eps=1e-5, gap=2, threshold=2.0, proj_bits=16, moments="float32",
                            accumulation="float32")
        for _ in range(6):  # refreshes among them
            for i, part in enumerate(torch.randn(16, 24).chunk(parts)):
                optimizer.accumulating = i < parts - 1
                (model(part).square().mean() / parts).backward()
        weights.append([t.clone() for t in model.state_dict().values()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 16])
def test_every_parameter_moves_at_the_rate_that_is_set(bits):
    torch.manual_seed(0)
    model = LLaMA(tiny(), linear=lambda *args, **kwargs: QLinear(*args, bits=bits, **kwargs))
    optimizer = QGaLore(model, rank=8, scale=0.25, moments="float32", proj_bits=16, stochastic_rounding=False)

    def snapshot():
        layers = {n: m.float_weight().clone() for n, m in model.named_modules() if isinstance(m, QLinear)}
        return layers | {n: p.detach().clone() for n, p in model.named_parameters()}

    for rate in (0.0, 0.5, 0.0):  # the first step only looks
        optimizer.param_groups[0]["lr"] = rate
        before = snapshot()
        x, y = torch.arange(61).repeat(2)[:120].view(4, 30), torch.arange(1, 121).remainder(61).view(4, 30)
        model(x, y).backward()
        for name, after in snapshot().items():
            moved = (after - before[name]).norm() / after.numel() ** 0.5
            if rate and name in optimizer.projections:  # Adam's first step is +-1 in each of R's entries
                p = optimizer.projections[name]
                expected = 0.25 * rate * (p.rank / p.dim) ** 0.5
            else:
                expected = rate
            assert moved.item() == pytest.approx(expected, rel=0.05, abs=1e-6), name
    assert all(p.grad is None for p in model.parameters())


def test_gradients_with_fewer_directions_than_the_rank_never_fail():
    for svd in (False, True):
        torch.manual_seed(0)
        model = LLaMA(tiny())
        optimizer = QGaLore(model, rank=16, gap=1, svd=svd)
        x, y = tokens(1, 5)  # five tokens for rank 16
        masked = torch.full_like(y, -1)
        for target in (masked, y, masked, y):  # a zero gradient before there is any basis, and after
            model(x, target).backward()
        (0.0 * model(x, y)).backward()
        assert all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())
        for projection in optimizer.projections.values():
            p = projection.matrix()
            assert p.isfinite().all() and (p.T @ p - torch.eye(16)).abs().max() < 0.2  # INT4's error


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_micro_batch_that_is_not_finite_makes_the_step_s_gradient_count_as_zero(kind):
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8, accumulation=kind)
    run_steps(model, optimizer, 2)
    before = {name: m.float_weight() for name, m in model.named_modules() if isinstance(m, QLinear)}
    optimizer.pop_stats(), [m.turn_("reset", None) for m in optimizer.moments.values()]  # no momentum
    for factor, optimizer.accumulating in ((1.0, True), (float("inf"), True), (1.0, False)):
        (factor * model(*tokens())).backward()
    assert optimizer.pop_stats()["skipped"] == len(optimizer.projections) + sum(1 for _ in model.parameters())
    for name, weight in before.items():  # quantised again, unmoved
        torch.testing.assert_close(model.get_submodule(name).float_weight(), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero_is_reported_and_training_goes_on(poison):
    states = []
    for factor in (poison, 0.0):
        torch.manual_seed(0)
        model = LLaMA(tiny())
        optimizer = QGaLore(model, rank=8, gap=1)
        run_steps(model, optimizer, 2)
        optimizer.pop_stats()
        (factor * model(*tokens())).backward()
        n_weights = len(optimizer.projections) + sum(1 for _ in model.parameters())
        assert optimizer.pop_stats()["skipped"] == (n_weights if factor else 0)
        assert all(math.isfinite(loss) for loss in run_steps(model, optimizer, 3))
        assert optimizer.pop_stats()["skipped"] == 0
        states.append(model.state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_a_poisoned_first_batch_leaves_no_basis_and_the_next_one_trains():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8)
    (float("nan") * model(*tokens())).backward()
    assert optimizer.pop_stats()["refreshes"] == 0
    run_steps(model, optimizer, 1)
    assert optimizer.pop_stats() | {"grad_norm": 0} == {"grad_norm": 0, "skipped": 0, "refreshes": 14}


def test_similarity_is_blind_to_signs_and_order_and_zero_for_chance():
    torch.manual_seed(0)
    p = torch.linalg.qr(torch.randn(200, 20))[0]
    assert similarity(p.T @ -p.flip(1), 200) == pytest.approx(1, abs=1e-5)
    chance = [similarity(p.T @ torch.linalg.qr(torch.randn(200, 20))[0], 200) for _ in range(20)]
    assert abs(sum(chance) / 20) < 0.02


def test_a_layer_whose_subspace_rests_doubles_its_gap_and_one_that_turns_does_not():
    torch.manual_seed(0)
    resting = torch.randn(8, 64)
    for rests in (True, False):
        projection = Projection(64, 64, rank=8, gap=2, threshold=0.4, k=3)
        due = []
        for step in range(40):
            x = torch.randn(100, 8) @ (resting if rests else torch.randn(8, 64))
            if projection.due(step):
                refresh(projection, x, torch.randn(100, 64), step)
                due.append(step)
        # three similarities are known at the fourth refresh, step 6
        assert due == ([0, 2, 4, 6, 10, 18, 34] if rests else list(range(0, 40, 2)))
        assert projection.refreshes == len(due)


def test_the_range_finder_keeps_the_energy_of_the_exact_subspace():
    torch.manual_seed(0)
    for out, n_in in ((300, 200), (200, 300)):
        x = torch.randn(400, n_in) * torch.arange(1, n_in + 1) ** -0.5  # a slowly falling spectrum
        dy = torch.randn(400, out) * torch.arange(1, out + 1) ** -0.5
        energy = []
        for svd in (True, False):
            projection = Projection(out, n_in, rank=50, bits=16, svd=svd)
            for step in range(2):  # the first, before there is a basis, makes do with a smaller sketch
                refresh(projection, x, dy, step)
            energy.append(low_rank_gradient(projection, x, dy).square().sum())
        assert energy[1] > 0.97 * energy[0]


class Waits(TorchDispatchMode):
    """Counts the times that the host asks a tensor for its value, and so waits for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_but_numbers_that_have_long_arrived_and_refreshes_one_layer_at_a_time():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8, gap=28, threshold=2.0, grad_clip=0.1)
    projections, refreshes = optimizer.projections.values(), []
    for i in range(3 * 28):
        x, y = tokens(seed=i)
        arriving = [p.arriving for p in projections]
        with Waits() as waits:
            model(x, y).backward()
        arrived = sum(was is not None and p.arriving is not was for was, p in zip(arriving, projections))
        if i:  # the first step takes every basis, and waits to know whether each gradient gives one
            assert waits.count == arrived  # Arriving.value(), a copy to the host that a refresh a gap ago began
        refreshes.append(sum(p.last_refresh == i for p in projections))
    assert refreshes[0] == 14 and max(refreshes[1:]) == 1 and sum(refreshes) > 40


def test_factored_moments_are_adafactors():
    torch.manual_seed(0)
    moments, m, row, col = Moments((64, 80), "factored"), torch.zeros(64, 80), torch.zeros(64), torch.zeros(80)
    for step in range(1, 30):
        g = torch.randn(64, 80) * torch.rand(64, 1) * torch.rand(80) * 1e-3
        m = 0.9 * m + 0.1 * g
        row, col = (0.99 * ema + 0.01 * g.square().mean(dim) for ema, dim in ((row, 1), (col, 0)))
        v = row[:, None] * col / row.mean()
        expected = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        moments.step_(g, (0.9, 0.99), 1e-8, key=step)
    assert (g - expected).norm() < 0.02 * expected.norm()  # INT8's rounding
    held = sum(t.nbytes for t in vars(moments).values() if isinstance(t, torch.Tensor))
    assert held == m.numel() + 4 * (2 * 64 + 64 + 80)


def clipped(spike=1.0, micro_batches=1):
    """The norms of a third step's gradients, its batch `spike` times as steep as those before, after they were clipped
    to 1e-3, by weight; and grad_norm."""
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, lr=0.0, betas=(0.0, 0.999), rank=8, grad_clip=1e-3, moments="float32",
                        moments_at_refresh="keep", accumulation="float32")
    for factor in (1.0, 1.0, spike):
        for micro in range(micro_batches):
            optimizer.accumulating = micro < micro_batches - 1
            (factor * model(*tokens(seed=micro)) / micro_batches).backward()
        optimizer.step()
    norms = torch.stack([m.m.norm() for m in optimizer.moments.values()])  # with beta1 = 0 the first moment is g
    return norms, optimizer.pop_stats()["grad_norm"]


def test_with_accumulation_clipping_is_by_the_steps_own_global_norm():
    norms, grad_norm = clipped(spike=100.0, micro_batches=2)
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3) and grad_norm > 1  # logged as it was before
    direction, _ = clipped(micro_batches=2)
    torch.testing.assert_close(norms, direction, rtol=1e-3, atol=0)  # all are scaled alike


def test_without_accumulation_clipping_knows_the_norms_of_weights_stepped_and_of_the_last_step_for_others():
    norms, grad_norm = clipped()
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)  # the last step's norms are this one's
    norms, after = clipped(spike=100.0)
    assert after == pytest.approx(100 * grad_norm, rel=1e-3)
    assert norms.max() < 1.001e-3  # a spike is cut where it comes; all together they exceed the limit, once


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_micro_batches_add_up_in_every_format_without_bias_and_in_the_bytes_it_says(kind):
    generator = torch.Generator().manual_seed(0)
    total, exact = Sum(300, 512, kind, "cpu"), torch.zeros(300, 512)
    for i in range(32):
        left, right = (torch.randn(20, n, generator=generator) for n in (300, 512))
        total.add_(left, right, random_key(i))
        exact += left.T @ right
    error = total.value() - exact
    bound, width = {"float32": (1e-6, 4), "bfloat16": (0.01, 2), "int8": (0.08, 1)}[kind]
    assert error.norm() < bound * exact.norm() and abs(error.mean()) < 3 * error.std() / error.numel() ** 0.5 + 1e-6
    held = total.codes if kind == "int8" else (total.total,)
    assert sum(t.nbytes for t in held) == exact.numel() * width + (300 * 2 * 8 if kind == "int8" else 0)


@pytest.mark.parametrize("kind", ["factored", "8bit", "float32"])
def test_at_a_refresh_moments_are_kept_reset_or_rotated(kind):
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator)
    old, turn = torch.linalg.qr(randn(128, 64))[0], torch.linalg.qr(randn(64, 64))[0]
    new, gradients = old @ turn, [randn(256, 128) * torch.arange(1, 129) for _ in range(30)]  # one subspace, two bases
    steps = {}
    for how in ("keep", "reset", "rotate", "born in the new basis"):
        moments = Moments((64, 256), kind)
        for i, g in enumerate(gradients):
            if i == 29 and how in ("keep", "reset", "rotate"):
                moments.turn_(how, old.T @ new)
            basis = new if how == "born in the new basis" or i == 29 else old
            step = basis.T @ g.T
            moments.step_(step, (0.9, 0.999), 1e-8, key=i)
        steps[how] = basis @ step
    away = {how: ((step - steps["born in the new basis"]).norm() / step.norm()).item() for how, step in steps.items()}
    assert away["rotate"] < 0.5 < min(away["keep"], away["reset"])
    once = new.T @ gradients[29].T
    Moments((64, 256), kind).step_(once, (0.9, 0.999), 1e-8)
    assert (steps["reset"] - new @ once).norm() < 0.02 * steps["reset"].norm()


def test_deferred_weights_that_nobody_stepped_are_an_error():
    model = nn.Sequential(QLinear(24, 24))
    optimizer = QGaLore(model, rank=4, grad_clip=1.0)
    for accumulating in (True, False, True, False):
        optimizer.accumulating = accumulating
        model(torch.randn(8, 24)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"call step\(\)"):
        model(torch.randn(8, 24)).square().mean().backward()


@pytest.mark.parametrize("moments", ["factored", "8bit"])
def test_the_state_is_complete_a_reloaded_optimizer_continues_bit_for_bit(tmp_path, moments):
    def fresh():
        torch.manual_seed(0)
        model = LLaMA(tiny(n_embd=64, vocab_size=130))  # an embedding and moments large enough to be in 8 bits
        return model, QGaLore(model, rank=40, gap=2, threshold=0.0, k=1, moments=moments)

    model, optimizer = fresh()
    run_steps(model, optimizer, 5, vocab=130)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    expected = run_steps(model, optimizer, 6, vocab=130)
    again, optimizer = fresh()
    saved = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert run_steps(again, optimizer, 6, vocab=130) == expected
    assert {m.kind for m in optimizer.moments.values()} == {moments, "float32"}


def test_it_attaches_to_any_model_that_holds_qlinear_and_ordinary_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(QLinear(10, 32), nn.LayerNorm(32), nn.ReLU(), QLinear(32, 32), nn.Linear(32, 1))
    QGaLore(model, lr=0.01, rank=4, gap=10)
    x = torch.randn(256, 10)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# -----------------------------------------------------------------------------
# train.py and sample.py, as processes

def test_a_run_killed_at_random_moments_continues_bit_for_bit(shards, tmp_path):
    args = [f"--data_dir={shards}", "--max_iters=60", "--eval_interval=5", *TINY_RUN, "--gradient_accumulation_steps=2"]
    whole, broken = f"{tmp_path}/whole", f"{tmp_path}/broken"
    code, out, err = run("train.py", *args, f"--out_dir={whole}")
    assert code == 0, err
    rng, kills, resume = random.Random(0), 0, "scratch"
    while True:
        job = Job(broken, trains(*args, f"--out_dir={broken}", f"--init_from={resume}"), size=0)
        process = job.processes[0]
        if kills < 3:  # let it write a line or a checkpoint or two more, then kill it at any moment within a second
            size = lambda: os.path.getsize(f"{broken}/log.jsonl") if os.path.exists(f"{broken}/log.jsonl") else 0
            lines = size()
            while (size() < lines + 1500 or not os.path.exists(f"{broken}/ckpt.pt")) and process.is_alive():
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
        if kills < 3 and process.is_alive():
            process.kill()
            kills += 1
        (code, out, err), = job.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        resume = "resume"
    assert kills >= 2
    assert read_log(broken) == read_log(whole)
    a, b = (torch.load(f"{d}/ckpt.pt", weights_only=True)["model"] for d in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_save_and_leave_cleanly(shards, tmp_path, number):
    args = [f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--eval_interval=1000"]
    process = script("train.py", *args, "--max_iters=100000", "--decay_lr=False")
    while not (os.path.exists(f"{tmp_path}/log.jsonl") and len(read_log(tmp_path)) > 5) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--init_from=resume" in out and "Traceback" not in err
    step = torch.load(f"{tmp_path}/ckpt.pt", weights_only=True)["iter"]
    assert step == 1 + max(it for it, what in read_log(tmp_path) if what == "loss")
    code, out, err = run("train.py", *args, f"--max_iters={step + 2}", "--decay_lr=False", "--init_from=resume")
    assert code == 0 and (step + 1, "loss") in read_log(tmp_path), err


@pytest.mark.parametrize("method", ["qgalore", "galore", "adamw", "adam8bit", "lora", "qlora"])
def test_each_method_learns_follows_the_schedule_and_leaves_its_files(shards, tmp_path, method):
    code, out, err = run("train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, f"--method={method}",
                         "--max_iters=40", "--eval_interval=20", "--grad_clip=10", "--weight_decay=0.01",
                         "--sample_tokens=5")
    assert code == 0 and "next: " in out, err
    log = read_log(tmp_path)
    assert log[40, "val_loss"] < log[0, "val_loss"] - (0.5 if "lora" in method else 1)  # on random frozen weights
    with open(f"{tmp_path}/log.jsonl") as f:
        lines = [entry for entry in map(json.loads, f) if "loss" in entry]
    assert [entry["iter"] for entry in lines] == list(range(40))
    assert {"loss", "lr", "tokens", "tokens_per_s", "peak_memory_gb", "grad_norm"} <= lines[0].keys()
    peak = [entry["lr"] for entry in lines]
    assert peak[:2] == pytest.approx([0.01 / 3, 0.02 / 3]) and peak[2] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(peak[2:], peak[3:])) and peak[-1] == pytest.approx(0.001, rel=0.05)
    assert lines[-1]["tokens"] == 40 * 4 * 32
    pictures = {"loss.png"} | ({"subspaces.png"} if "galore" in method else set())
    assert set(os.listdir(tmp_path)) == {"ckpt-1.pt", "ckpt.pt", "config.json", "log.jsonl"} | pictures
    code, out, err = run(
        "sample.py", f"--out_dir={tmp_path}", "--prompt=the wei", "--max_new_tokens=20", "--device=cpu"
    )
    assert code == 0 and out.startswith("the wei") and len(out) > 15, err


def test_bad_settings_are_one_line_and_an_exit_code(shards, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("learning_rat = 0.1\n")
    settings = {"learning_rate": 0.01, "max_iters": 10, "out_dir": "out", "compile": False}
    for args, words in [(["--learning_rat=1"], "did you mean 'learning_rate'"),
                        (["--max_iters=many"], "max_iters must be int"), (["--max_iters=1.5"], "max_iters must be int"),
                        (["--compile=1"], "compile must be bool"),
                        (["config/none.py"], "config/none.py"), ([f"{tmp_path}/bad.py"], "bad.py"),
                        (["--out_dir"], "--key=value")]:
        with pytest.raises(SystemExit, match="error: ") as e:
            configure(dict(settings), args)
        assert words in str(e.value) and "\n" not in str(e.value)
    configure(settings, ["--learning_rate=1", "--max_iters=1e3", "--out_dir=7"])
    assert settings == {"learning_rate": 1.0, "max_iters": 1000, "out_dir": "7", "compile": False}
    one_line_error(run("train.py", "--learning_rat=1"), "learning_rate")
    bad = ["--method=sgd", "--weight_bits=4", "--lora_alpha=0", "--init_from=nowhere", "--device=tpu", "--dtype=int8",
           "--n_head=7", "--rank=0", "--moments=4bit", "--checkpoint_bits=4", "--matmul=int4", "--accumulation=half",
           "--moments_at_refresh=forget", "--keep_checkpoints=0"]
    usual = ["train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}/x", *TINY_RUN]
    one_after_the_other = f"""
import runpy, sys
for arg in {bad}:
    sys.argv = [*{usual}, arg]
    try:
        runpy.run_path({HERE + "/train.py"!r}, run_name="__main__")
    except SystemExit as e:
        print(e)
"""
    out = subprocess.run([sys.executable, "-c", one_after_the_other], cwd=HERE, capture_output=True, text=True).stdout
    assert len(out.splitlines()) == len(bad), out
    for line, arg in zip(out.splitlines(), bad):
        assert line.startswith("error: ") and arg[2:].split("=")[0] in line, line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_asked_for_and_absent_is_one_line(tmp_path):
    one_line_error(run("train.py", f"--out_dir={tmp_path}", "--device=cuda"), "device=cuda")
    code, out, err = run("train.py", f"{HERE}/config/demo.py", "--device=cuda", "--dry_run=True")
    assert code == 0 and "no such device here" in out


def test_bad_shards_are_refused_by_name(shards, tmp_path):
    def refused(message, path="*_train_*.bin", block_size=32, vocab_size=257):
        with pytest.raises(SystemExit, match="error: ") as e:
            train.Windows(f"{tmp_path}/{path}", block_size, vocab_size, 0).batch(1)
        assert message in str(e.value) and "\n" not in str(e.value)

    refused("no shards")
    path = f"{tmp_path}/a_train_0.bin"
    write_shard(path, np.arange(100), 0)  # of another maker: the vocabulary is not told
    refused("token 99", vocab_size=99)
    refused("less than one sequence", block_size=100)
    write_shard(path, np.arange(100), 257)
    refused("its vocabulary has 257", vocab_size=256)
    whole = open(path, "rb").read()
    open(path, "wb").write(whole[:-2])
    refused(path)
    open(path, "wb").write(b"\0" * 4 + whole[4:])
    refused(path)
    one_line_error(run("train.py", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/x", *TINY_RUN), "a_train_0.bin")


class Malice:
    def __reduce__(self):
        return os.system, ("echo malice > malice",)


def test_damaged_foreign_and_misshapen_checkpoints_are_refused_and_never_run(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_iters=3"]
    one_line_error(run(*args, "--init_from=resume"), "ckpt.pt", "does not exist")
    assert run(*args)[0] == 0
    whole = open("ckpt.pt", "rb").read()
    one_line_error(run(*args, "--init_from=resume", "--n_embd=32"), "n_embd = 64", "32")
    for content in (whole[: len(whole) // 2], b"", b"hello", pickle.dumps(Malice())):
        open("ckpt.pt", "wb").write(content)
        with pytest.raises(SystemExit, match="error: ckpt.pt is damaged or not a checkpoint"):
            train.load_checkpoint("")
    for content in ({"a": 1}, [1], {"model": Malice()}):
        torch.save(content, "ckpt.pt")
        with pytest.raises(SystemExit, match="error: ckpt.pt is damaged or not a checkpoint"):
            train.load_checkpoint("")
    one_line_error(run("sample.py", f"--out_dir={tmp_path}"), "ckpt.pt")
    torch.save(dict.fromkeys(("config", "model", "optimizer", "iter", "position")), "ckpt.pt")
    with pytest.raises(SystemExit, match="made by another version"):
        train.load_checkpoint("")
    assert not os.path.exists("malice")
    assert run(*args)[0] == 0  # from scratch: what was there is set aside
    assert os.path.exists("previous_ckpt.pt")


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_it(shards, tmp_path):
    args = ["train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--eval_interval=2"]
    assert run(*args, "--max_iters=8", "--keep_checkpoints=3")[0] == 0
    names = ["ckpt.pt", "ckpt-1.pt", "ckpt-2.pt"]
    assert sorted(glob.glob("ckpt*", root_dir=tmp_path)) == sorted(names)
    shutil.copy(tmp_path / "ckpt-2.pt", tmp_path / "ckpt_best.pt")  # a user's own: never taken
    states = [torch.load(tmp_path / name, weights_only=True) for name in names]
    assert [state["iter"] for state in states] == [8, 6, 4]
    whole = read_log(tmp_path)
    with open(tmp_path / "ckpt.pt", "r+b") as f:  # one bit, in the middle of the weights
        f.seek(os.path.getsize(tmp_path / "ckpt.pt") // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    code, out, err = run(*args, "--max_iters=8", "--init_from=resume", "--keep_checkpoints=3")
    assert code == 0 and "ckpt.pt is damaged" in out and "going back" in out, err
    assert os.path.exists(tmp_path / "damaged_ckpt.pt")
    assert read_log(tmp_path) == whole
    again = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert again["iter"] == 8 and all(torch.equal(t, again["model"][name]) for name, t in states[0]["model"].items())


def test_a_finished_run_that_is_resumed_or_only_evaluated_ends_well(shards, tmp_path):
    args = ["train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_iters=2"]
    for more in ([], ["--init_from=resume"], ["--init_from=resume", "--eval_only=True"]):
        code, out, err = run(*args, *more)
        assert code == 0 and "--- " in out, err


def test_saving_makes_no_copy_of_the_model_in_memory(tmp_path):
    def save():
        state = {"model": {f"layer {i}": torch.ones(5_000_000) for i in range(20)}}  # 400 MB
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save_checkpoint(tmp_path, state)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    (code, grown, err), = Job(tmp_path, save, size=0).wait()
    assert code == 0 and float(grown) < 40 and os.path.getsize(tmp_path / "ckpt.pt") > 400e6, (grown, err)


def test_max_minutes_saves_and_leaves(shards, tmp_path):
    args = [f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--eval_interval=100000"]
    code, out, err = run("train.py", *args, "--max_iters=100000", "--decay_lr=False", "--max_minutes=0.01")
    assert code == 0 and "max_minutes: saved step" in out, err
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter"] >= 1


def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(shards, tmp_path):
    args = ["train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--eval_interval=2"]
    assert run(*args, "--max_iters=2")[0] == 0
    good = open(f"{tmp_path}/ckpt.pt", "rb").read()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2,) * 2)
    one_line_error(run(*args, "--max_iters=8", "--init_from=resume", before=limit), "ckpt.pt", "is whole")
    assert open(f"{tmp_path}/ckpt.pt", "rb").read() == good and not os.path.exists(f"{tmp_path}/ckpt.pt.tmp")
    code, out, err = run(*args, "--max_iters=8", "--init_from=resume")
    assert code == 0, err


def test_an_out_dir_that_cannot_be_written_is_one_line(shards, tmp_path):
    (tmp_path / "file").write_text("")
    one_line_error(run("train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}/file", *TINY_RUN), "out_dir", "file")


def test_a_rank_larger_than_the_smaller_side_is_clamped_and_said(shards, tmp_path):
    code, out, err = run(
        "train.py", f"--data_dir={shards}", f"--out_dir={tmp_path}", *TINY_RUN, "--rank=65", "--max_iters=2"
    )
    assert code == 0 and "rank 65 is larger than the smaller side of 14 matrices" in out, err


def test_each_window_comes_once_an_epoch_in_a_new_order_and_the_position_is_all_the_state(shards):
    def windows():
        return train.Windows(f"{shards}/*_train_*.bin", 32, 257, seed=5)

    data = windows()
    epochs = [[data.batch(1)[0].numpy().tobytes() for _ in range(data.total)] for _ in range(2)]
    inputs = []
    for path in data.paths:
        tokens = read_shard(path)[0].astype(np.int64)
        inputs += [tokens[i : i + 32].tobytes() for i in range(0, len(tokens) - 32, 32)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(inputs) and epochs[0] != epochs[1] != inputs
    x, y, _ = data.batch(4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again = windows()
    again.position = data.total + 7
    assert [again.batch(1)[0].numpy().tobytes() for _ in range(5)] == epochs[1][7:12]
