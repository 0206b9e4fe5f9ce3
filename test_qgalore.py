"""
The core's tests, a second reading of the method. All run on a CPU and make their own data:
    python -m pytest test_qgalore.py
"""

import math
import os
import random
import signal
import time
import warnings
from functools import partial
from shutil import which

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import train
from configurator import configure
from kernels import launch
from kernels.moments import Moments
from kernels.sums import Sum
from kernels.subspace import similarity
from model import LLaMA, QLinear, plain_linear
from qgalore import Projection, QGaLore
from quant import (add_bfloat16_, add_low_rank_int8_, decode, dequantize_int4, dequantize_int8,
                   encode, quantize_int4, quantize_int8, random_key, rounding_key, uniform)
from run.data import Windows
from run.shards import read_shard
from sample import generate
from tests.common import (TINY_RUN, Job, check_run, one_line_error, read_log, run, tiny, tokens,
                          trains)

# -----------------------------------------------------------------------------
# quant.py: number formats


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(3, 512, 256), (4, 300, 256), (5, 300, 64), (1, 7, 256), (1, 7, 2), (2, 1, 1), (3, 9, 4)]


@pytest.mark.parametrize("rows,cols,group", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_errs_by_half_a_grid_unit_at_most(bits, rows, cols, group):
    quantize = quantize_int8 if bits == 8 else quantize_int4
    dequantize = dequantize_int8 if bits == 8 else dequantize_int4
    w = randn(rows, cols)
    q, scale, zero = quantize(w, group)
    assert q.nbytes == math.ceil(w.numel() * bits / 8)
    assert scale.shape == zero.shape == (rows, math.ceil(cols / group))
    back = dequantize(q, scale, zero)
    assert back.shape == w.shape
    half = scale.repeat_interleave(group, dim=1)[:, :cols] / 2
    assert ((back - w).abs() <= half * 1.001 + 1e-6).all()


def test_a_group_of_equal_values_comes_back_exactly():
    w = torch.tensor([[0.02] * 300, [0.0] * 300, [-7.0] * 300])
    assert torch.equal(dequantize_int8(*quantize_int8(w)), w)
    assert torch.equal(dequantize_int4(*quantize_int4(w)), w)


def test_a_group_size_not_a_power_of_two_is_refused():
    for quantize in (quantize_int8, quantize_int4):
        for group_size in (100, -1):
            with pytest.raises(ValueError, match="power of two"):
                quantize(torch.randn(2, 300), group_size)


def test_a_group_size_of_0_is_a_whole_row():
    w = randn(4, 300)
    q, scale, zero = quantize_int8(w, 0)
    assert scale.shape == zero.shape == (4, 1)
    assert (q.amin(dim=1) == -128).all() and (q.amax(dim=1) == 127).all()  # one grid, used up
    assert QLinear(300, 4, group_size=0).scale.shape == (4, 1)
    assert all(torch.equal(a, b) for a, b in zip(quantize_int8(w, 512), (q, scale, zero)))


@pytest.mark.parametrize("bits,error", [(4, 0.11), (8, 0.007), (16, 0)])
def test_a_basis_is_kept_in_4_8_or_16_bits(bits, error):
    p = torch.linalg.qr(randn(300, 40))[0]
    codes = encode(p, bits)
    back = decode(codes)
    assert (back - p).norm() <= error * p.norm()
    assert codes[0].nbytes == p.numel() * (bits if bits < 16 else 32) // 8  # 16: float32 as it is
    assert torch.equal(decode(codes, torch.bfloat16), back.bfloat16()) or bits < 16
    assert decode(codes, torch.bfloat16).dtype == torch.bfloat16


def test_stochastic_rounding_is_unbiased():
    n = 200_000
    for fraction in (0.01, 0.3, 0.5, 0.99):
        for whole in (-3, 0, 100):
            u = uniform(random_key(fraction, whole), 0, n)
            draws = (torch.full((n,), whole + fraction) + u).floor()
            assert set(draws.unique().tolist()) == {whole, whole + 1}
            error = draws.double().mean().item() - whole - fraction
            deviation = math.sqrt(fraction * (1 - fraction) / n)
            assert abs(error) < 4 * deviation + 1e-5  # 1e-5: float32's own at 100.01


def test_counted_random_numbers_are_uniform_from_any_start():
    u = uniform(random_key("a"), 0, 2**20)
    assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 1e-3 and abs(u.var() - 1 / 12) < 1e-3
    # neighbours and other keys are independent
    for other in (u.roll(1), u.roll(2), uniform(random_key("b"), 0, 2**20)):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 4e-3
    for start, n in ((0, 7), (1, 6), (12345, 100), (2**20 - 1, 1)):
        assert torch.equal(uniform(random_key("a"), start, n), u[start : start + n])
    whole = torch.arange(-128.0, 128)[:, None]
    assert ((whole + u[:4096]).floor() == whole).all()  # what rounding must leave alone


def test_equal_steps_round_up_as_often_as_they_should():
    """Numbers of one element are spread over the steps, see rounding_key."""
    numbers = [uniform(rounding_key(step, "w"), 0, 2000) for step in range(1000)]
    u = torch.stack(numbers)  # (steps, elements)
    for fraction in (0.003, 0.1, 0.5, 0.77):
        for n in (10, 100, 1000):
            error = (u[:n] + fraction).floor().sum(dim=0) - n * fraction
            assert error.abs().max() < 5
            assert error.mean().abs() < 4 * error.std() / 2000**0.5
    # at one step they are as random as any
    for step in (1, 999):
        assert abs(u[step].mean() - 0.5) < 4 * 0.29 / 2000**0.5
        neighbours = torch.stack([u[step], u[step].roll(1)])
        assert abs(torch.corrcoef(neighbours)[0, 1]) < 4 / 2000**0.5


def test_spread_numbers_leave_a_third_of_the_variance():
    """Of what rounding adds up to, where momentum makes steps alike."""

    def error(key):
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(64, 512, generator=generator) * 0.02
        step = torch.zeros(64, 512)
        codes = quantize_int8(w)
        w = dequantize_int8(*codes)
        for i in range(300):
            step.lerp_(torch.randn(64, 512, generator=generator) * 1e-4, 0.1)  # as momentum turns
            w += step
            add_low_rank_int8_(*codes, step, None, key=key(i, "w"))
        return (dequantize_int8(*codes) - w).square().mean().item()

    assert error(rounding_key) / error(random_key) == pytest.approx(0.36, abs=0.03)


def test_bfloat16_moves_by_steps_far_below_its_last_bit():
    p = torch.full((100, 1000), 0.02, dtype=torch.bfloat16)
    delta = torch.ones_like(p)
    start = p.double().mean()
    unit = 2.0**-13  # the last bit's worth at 0.02
    for i in range(50):
        add_bfloat16_(p, delta, -0.02 * unit, random_key("test", i))
    moved = (p.double().mean() - start).item()
    assert abs(moved + 50 * 0.02 * unit) < 4 * unit * (50 * 0.02 / p.numel()) ** 0.5
    # where rounding to nearest would stay
    assert torch.equal(start.bfloat16(), (start - 0.02 * unit).bfloat16())


def test_weights_that_do_not_move_keep_their_codes():
    q, scale, zero = quantize_int8(randn(64, 300) * 0.02)
    start = q.clone()
    nothing = torch.zeros(64, 300)
    for i in range(300):
        add_low_rank_int8_(q, scale, zero, nothing, None, key=random_key(i))
    assert (q != start).float().mean() < 1e-3


def test_requantising_neither_shrinks_nor_shifts_weights():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(128, 256, generator=generator) * 0.02 + 0.005  # a rounded zero point would show
    codes = quantize_int8(w)
    w0 = dequantize_int8(*codes)
    total = torch.zeros_like(w)
    for i in range(200):
        step = torch.randn(w.shape, generator=generator) * 2e-5  # about a tenth of a grid unit
        add_low_rank_int8_(*codes, step, None, key=random_key(i))
        total += step
    # what rounding added has mean 0, and no part along w
    error = dequantize_int8(*codes) - w0 - total
    assert error.mean().abs() < 4 * error.std() / w.numel() ** 0.5
    along = (error * w0).sum() / w0.square().sum()
    assert along.abs() < 4 * error.std() / w0.norm()


@pytest.mark.parametrize("stochastic", [True, False])
def test_steps_of_a_hundredth_add_up_if_rounding_is_random(stochastic):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    w = torch.linspace(-1, 1, 256).repeat(16, 1)[:, order]
    inner = w.abs() < 0.9  # the ends of a group set its grid, and stay where they are
    layer = QLinear(256, 16)
    layer.set_weight(w)
    start = layer.float_weight()
    unit = layer.scale.mean().item()
    delta = torch.where(inner, 0.01 * unit, 0.0)
    for i in range(1000):
        layer.add_low_rank_(delta, None, key=random_key("test", i) if stochastic else None)
    moved = ((layer.float_weight() - start)[inner] / unit).double()
    if stochastic:  # each step's error is at most Bernoulli: variance under 0.01 a step, 10 in all
        assert abs(moved.mean().item() - 10) < 4 * math.sqrt(10 / inner.sum().item())
    else:
        assert moved.abs().max() < 1e-3


def test_a_small_step_is_added_in_float32():
    torch.manual_seed(0)
    # in bfloat16 the sum would lose four fifths of the step
    layer = QLinear(512, 512, dtype=torch.bfloat16)
    start = layer.float_weight().double().mean()
    step = torch.full((512, 1), 1e-5)
    layer.add_low_rank_(step, torch.ones(512, 1), key=random_key("test"))
    moved = (layer.float_weight().double().mean() - start).item()
    noise = layer.scale.max().item() * 0.5 / 512
    assert noise < 1e-6 and abs(moved - 1e-5) < 4 * noise


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_group_whose_step_is_not_finite_stays(bad):
    codes = quantize_int8(randn(4, 512) * 0.02)  # two groups a row
    before = dequantize_int8(*codes)
    step = torch.full((4, 512), 0.01)
    step[1, 300] = bad
    add_low_rank_int8_(*codes, step, None, shrink=0.5, key=random_key("test"))
    moved = dequantize_int8(*codes)
    stays = torch.zeros(4, 512, dtype=torch.bool)
    stays[1, 256:] = True
    assert torch.equal(moved[stays], before[stays])
    unit = codes[1].max()
    assert (moved - 0.5 * before - 0.01)[~stays].abs().max() <= unit


# -----------------------------------------------------------------------------
# model.py


def test_qlinear_gives_its_hook_the_gradients_two_factors():
    torch.manual_seed(0)
    layer = QLinear(24, 40)
    seen = []
    layer.hook = lambda *args: seen.append(args)
    x = torch.randn(2, 5, 24, requires_grad=True)
    w = layer.float_weight().requires_grad_()
    dy = torch.randn(2, 5, 40)
    dx, gradient = torch.autograd.grad(F.linear(x, w), (x, w), dy)
    layer(x).backward(dy)
    ((same, a, b),) = seen
    assert same is layer and a.shape == (10, 24) and b.shape == (10, 40)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(b.T @ a, gradient)


def test_int8_products_give_the_hook_unrounded_factors():
    torch.manual_seed(0)
    exact = QLinear(24, 40)
    layer = QLinear(24, 40, matmul="int8")
    exact.load_state_dict(layer.state_dict())
    seen = []
    layer.hook = lambda layer, x, dy: seen.append((x, dy))
    x = torch.randn(2, 5, 24, requires_grad=True)
    dy = torch.randn(2, 5, 40)
    found = []
    for of in (layer, exact):
        y = of(x)
        found.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    for rounded, wanted in zip(*found):  # y, then dx
        assert 0 < (rounded - wanted).norm() < 0.01 * wanted.norm()
    assert torch.equal(seen[0][0], x.flatten(0, 1)) and torch.equal(seen[0][1], dy.flatten(0, 1))


@pytest.mark.parametrize(
    "wrong",
    [{"matmul": "int4"}, {"matmul": "int8", "bits": 16}, {"matmul": "int8", "group_size": 8}],
)
def test_a_product_that_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError, match="matmul"):
        QLinear(24, 40, **wrong)


def test_without_a_hook_backward_leaves_the_weight_alone():
    layer = QLinear(24, 40)
    x = torch.randn(3, 24, requires_grad=True)
    before = layer.q.clone()
    layer(x).sum().backward()
    assert torch.equal(layer.q, before) and x.grad.abs().sum() > 0


def test_the_chunked_loss_is_cross_entropy():
    torch.manual_seed(0)
    # 1200 tokens: three chunks, the last one short
    model = LLaMA(tiny(block_size=600, vocab_size=13), linear=plain_linear)
    x, y = tokens(2, 600, 13)
    y[0, :100] = -1
    names = ["head.weight", "embed.weight", "norm.weight"]
    parameters = [model.get_parameter(name) for name in names]
    loss = model(x, y)
    gradients = torch.autograd.grad(loss, parameters)
    h = model.hidden(x)
    logits = (h @ model.head.weight.T).flatten(0, 1)
    expected_loss = F.cross_entropy(logits, y.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(expected_loss, parameters)
    torch.testing.assert_close(loss, expected_loss)
    for name, a, b in zip(names, gradients, expected):
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
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=kv_heads,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.block_size,
        tie_word_embeddings=tie,
    )
    theirs = transformers.LlamaForCausalLM(config)
    rename = {"embed.": "model.embed_tokens.", "blocks.": "model.layers.", "head.": "lm_head.",
              "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
              ".attn.": ".self_attn."}
    state = {}
    for name, tensor in ours.state_dict().items():
        name = "model." + name if name == "norm.weight" else name
        for old, new in rename.items():
            name = name.replace(old, new)
        state[name] = tensor
    theirs.load_state_dict(state)
    x, y = tokens()
    with torch.no_grad():
        logits = theirs(x).logits
        torch.testing.assert_close(ours(x), logits[:, -1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(x, y), F.cross_entropy(logits.flatten(0, 1), y.flatten()))


def test_a_seed_gives_every_method_the_same_model():
    torch.manual_seed(0)
    quantised = LLaMA(tiny(), linear=QLinear)
    torch.manual_seed(0)
    plain = LLaMA(tiny(), linear=plain_linear)
    assert torch.equal(quantised.head.weight, plain.head.weight)
    layer = quantised.blocks[1].mlp.down_proj
    w = plain.blocks[1].mlp.down_proj.weight
    assert (layer.float_weight() - w).abs().max() <= layer.scale.max() * 0.501


def test_generation_with_the_cache_picks_the_same_tokens():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    for layer in model.modules():
        if isinstance(layer, QLinear):
            layer.set_weight(layer.float_weight() * 10)  # sharp enough that no two logits tie
    idx, _ = tokens(3, 8)
    got = torch.cat(list(generate(model, idx, 20, temperature=0)), dim=1)
    for _ in range(20):
        with torch.no_grad():
            idx = torch.cat([idx, model(idx).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(got, idx[:, 8:])


def test_generation_runs_past_block_size():
    torch.manual_seed(0)
    out = list(generate(LLaMA(tiny(block_size=8)), tokens(1, 12)[0], 20, top_k=5))
    assert len(out) == 20 and all(0 <= t.item() < 61 for t in out)


def test_top_p_and_top_k_keep_the_likeliest_tokens():
    model = LLaMA(tiny())
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])  # of the last four tokens
    logits = torch.cat([torch.full((1, 57), -99.0), probability.log()[None]], dim=1)
    model.forward = lambda *args, **kwargs: logits

    def draw(**choice):
        generator = torch.Generator().manual_seed(0)
        idx = torch.zeros(1, 1, dtype=torch.long)
        found = generate(model, idx, 200, generator=generator, **choice)
        return {token.item() - 57 for token in found}

    assert draw(top_p=0.7) == {0, 1}
    assert draw(top_k=3) == {0, 1, 2}
    assert draw(temperature=0) == {0}


def train_steps(model, n, batch=2, vocab=61):
    """The losses of n steps, each on tokens of its own; weights step in backward."""
    losses = []
    for i in range(n):
        x, y = tokens(batch, vocab=vocab, seed=i)
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
    return losses


def test_checkpointed_activations_change_memory_alone():
    states = []
    for on in (False, True):
        torch.manual_seed(0)
        model = LLaMA(tiny(checkpoint_activations=on))
        QGaLore(model, rank=8, gap=2)
        train_steps(model, 5)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_block_inputs_in_int8_give_the_gradient_to_a_percent():
    losses = []
    gradients = []
    for bits in (16, 8):
        torch.manual_seed(0)
        config = tiny(checkpoint_activations=True, checkpoint_bits=bits)
        model = LLaMA(config, linear=plain_linear)
        loss = model(*tokens())
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == losses[1]
    error = (gradients[0] - gradients[1]).norm()
    assert 0 < error < 0.01 * gradients[0].norm()


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "g++"])
def test_compiled_parts_compute_the_same_or_there_is_a_warning(compiler, monkeypatch):
    if compiler == "g++" and not which(compiler):
        pytest.skip("torch.compile needs a C++ compiler")
    torch.manual_seed(0)
    model = LLaMA(tiny(n_layer=1))
    x, y = tokens()
    expected = model(x, y)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    monkeypatch.setattr(launch, "_compiles", None)
    there_is_one = torch._inductor.config.patch({"cpp.cxx": (None, compiler)})
    with warnings.catch_warnings(record=True) as caught, there_is_one:
        launch.compile_fused("cpu")
        loss = model(x, y)
        loss.backward()
    warned = sum("torch.compile fails" in str(w.message) for w in caught)
    assert warned == (compiler == "/nowhere/g++")
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


# -----------------------------------------------------------------------------
# qgalore.py: the basis and its schedule


def low_rank_gradient(projection, x, dy):
    left, right = projection.project(x, dy)
    return left.T @ right


def refresh(projection, x, dy, step=0):
    left, right = projection.sketch(x, dy, random_key("sketch", step))
    projection.refresh(left.T @ right, step)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_the_factored_gradient_is_the_projected_gradient(shape):
    torch.manual_seed(0)
    out, n_in = shape
    x = torch.randn(50, n_in)
    dy = torch.randn(50, out)
    projection = Projection(out, n_in, rank=8, bits=16)
    refresh(projection, x, dy)
    gradient = dy.T @ x
    p = projection.matrix()
    expected = p.T @ gradient.T if out >= n_in else p.T @ gradient
    torch.testing.assert_close(low_rank_gradient(projection, x, dy), expected)
    torch.testing.assert_close(p.T @ p, torch.eye(8), atol=1e-5, rtol=0)


def test_the_range_finder_keeps_the_exact_subspaces_energy():
    torch.manual_seed(0)
    for out, n_in in ((300, 200), (200, 300)):
        x = torch.randn(400, n_in) * torch.arange(1, n_in + 1) ** -0.5  # a slowly falling spectrum
        dy = torch.randn(400, out) * torch.arange(1, out + 1) ** -0.5
        energy = []
        for svd in (True, False):
            projection = Projection(out, n_in, rank=50, bits=16, svd=svd)
            for step in range(2):  # the first, before there is a basis, makes do with less
                refresh(projection, x, dy, step)
            energy.append(low_rank_gradient(projection, x, dy).square().sum())
        assert energy[1] > 0.97 * energy[0]


def test_similarity_ignores_signs_and_order_and_is_0_by_chance():
    torch.manual_seed(0)
    p = torch.linalg.qr(torch.randn(200, 20))[0]
    assert similarity(p.T @ -p.flip(1), 200) == pytest.approx(1, abs=1e-5)
    chance = [similarity(p.T @ torch.linalg.qr(torch.randn(200, 20))[0], 200) for _ in range(20)]
    assert abs(sum(chance) / 20) < 0.02


@pytest.mark.parametrize("rests", [True, False])
def test_a_layer_whose_subspace_rests_doubles_its_gap(rests):
    torch.manual_seed(0)
    resting = torch.randn(8, 64)
    projection = Projection(64, 64, rank=8, gap=2, threshold=0.4, k=3)
    due = []
    for step in range(40):
        directions = resting if rests else torch.randn(8, 64)
        if projection.due(step):
            refresh(projection, torch.randn(100, 8) @ directions, torch.randn(100, 64), step)
            due.append(step)
    # three similarities are known at the fourth refresh, step 6
    assert due == ([0, 2, 4, 6, 10, 18, 34] if rests else list(range(0, 40, 2)))
    assert projection.refreshes == len(due)


def test_a_gap_doubles_five_times_at_most():
    projection = Projection(64, 64, rank=8, gap=1, threshold=0.0, k=1)
    x = randn(100, 64)
    dy = randn(100, 64, seed=1)
    for step in range(200):
        if projection.due(step):
            refresh(projection, x, dy, step)
    assert projection.gap == 32 and projection.next_refresh - projection.last_refresh == 32


class Waits(TorchDispatchMode):
    """Counts the times that the host asks a tensor for its value, and so waits for the device."""

    count = 0
    asks = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.asks
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_no_number_and_refreshes_one_layer():
    """But for numbers that have long arrived: similarities that a refresh a gap ago sent."""
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8, gap=14, threshold=2.0, grad_clip=0.1)
    projections = [w.projection for w in optimizer.weights]
    refreshes = []
    for i in range(3 * 14):
        x, y = tokens(seed=i)
        arriving = [p.arriving for p in projections]
        with Waits() as waits:
            model(x, y).backward()
        arrived = 0
        for before, p in zip(arriving, projections):
            arrived += before is not None and p.arriving is not before
        if i:  # the first step takes every basis, and waits to know whether each gradient gives one
            assert waits.count == arrived
        refreshes.append(sum(p.last_refresh == i for p in projections))
    assert refreshes[0] == 14 and max(refreshes[1:]) == 1 and sum(refreshes) > 40


@pytest.mark.parametrize("svd", [False, True])
def test_gradients_of_fewer_directions_than_rank_never_fail(svd):
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=16, gap=1, svd=svd)
    x, y = tokens(1, 5)  # five tokens for rank 16
    masked = torch.full_like(y, -1)
    for target in (masked, y, masked, y):  # a zero gradient before there is any basis, and after
        model(x, target).backward()
    (0.0 * model(x, y)).backward()
    floats = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in floats)
    for weight in optimizer.weights:
        p = weight.projection.matrix()
        assert (p.T @ p - torch.eye(16)).abs().max() < 0.2  # INT4's error


# -----------------------------------------------------------------------------
# kernels/moments.py: what is kept of gradients


def test_factored_moments_are_adafactors():
    torch.manual_seed(0)
    moments = Moments((64, 80), "factored")
    m = torch.zeros(64, 80)
    row = torch.zeros(64)
    col = torch.zeros(80)
    for step in range(1, 30):
        g = torch.randn(64, 80) * torch.rand(64, 1) * torch.rand(80) * 1e-3
        m = 0.9 * m + 0.1 * g
        row = 0.99 * row + 0.01 * g.square().mean(1)
        col = 0.99 * col + 0.01 * g.square().mean(0)
        v = row[:, None] * col / row.mean()
        expected = m / (1 - 0.9**step) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        moments.step_(g, (0.9, 0.99), 1e-8, key=step)
    assert (g - expected).norm() < 0.02 * expected.norm()  # INT8's rounding
    held = sum(t.nbytes for t in vars(moments).values() if isinstance(t, torch.Tensor))
    assert held == m.numel() + 4 * (2 * 64 + 64 + 80)


@pytest.mark.parametrize("kind,error,elements", [("8bit", 0.05, 2), ("float32", 1e-5, 8)])
def test_other_moments_are_adams(kind, error, elements):
    torch.manual_seed(0)
    moments = Moments((64, 80), kind)
    p = nn.Parameter(torch.zeros(64, 80))
    adam = torch.optim.Adam([p], lr=1.0)
    for step in range(1, 30):
        g = torch.randn(64, 80) * torch.rand(64, 1) * torch.rand(80) * 1e-3
        p.grad = g.clone()
        p.data.zero_()
        adam.step()
        moments.step_(g, (0.9, 0.999), 1e-8, key=step)
    assert (g + p).norm() < error * p.norm()
    assert moments.m.nbytes + moments.v.nbytes == elements * p.numel()


FORMATS = {"float32": (1e-6, 4), "bfloat16": (0.01, 2), "int8": (0.08, 1)}  # error, bytes


@pytest.mark.parametrize("kind", FORMATS)
def test_micro_batches_add_up_in_every_format_without_bias(kind):
    generator = torch.Generator().manual_seed(0)
    total = Sum(300, 512, kind, "cpu")
    exact = torch.zeros(300, 512)
    for i in range(32):
        left = torch.randn(20, 300, generator=generator)
        right = torch.randn(20, 512, generator=generator)
        total.add_((left[:, :100], left[:, 100:]), right, random_key(i))
        exact += left.T @ right
    error = total.value() - exact
    bound, width = FORMATS[kind]
    assert error.norm() < bound * exact.norm()
    assert abs(error.mean()) < 3 * error.std() / error.numel() ** 0.5 + 1e-6
    scales = 300 * 2 * 8 if kind == "int8" else 0
    held = total.codes if kind == "int8" else (total.total,)
    assert sum(t.nbytes for t in held) == exact.numel() * width + scales


# -----------------------------------------------------------------------------
# qgalore.py: the step


def float_llama(**changes):
    torch.manual_seed(0)
    return LLaMA(tiny(**changes), linear=partial(QLinear, bits=16))


def with_torch_linears(model):
    """The same model with torch's Linears in place of QLinears of 16 bits, of the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            linear = plain_linear(module.in_features, module.out_features)
            linear.weight.data.copy_(module.weight)
            model.set_submodule(name, linear)
    return model


def test_at_full_rank_with_every_quantiser_off_it_is_adamw():
    ours = float_llama()
    theirs = with_torch_linears(float_llama())
    QGaLore(ours, lr=0.01, weight_decay=0.1, rank=1000, scale=1.0, proj_bits=16, moments="float32",
            gap=3)
    groups = []
    for decay, decayed in ((0.1, True), (0.0, False)):
        matrices_or_not = [p for p in theirs.parameters() if (p.ndim > 1) == decayed]
        groups.append({"params": matrices_or_not, "weight_decay": decay})
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
def test_with_svd_in_floats_it_steps_as_galores_own_optimizer(shape, monkeypatch):
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    from galore_torch.galore_projector import GaLoreProjector

    # let theirs take its basis from the last step's gradient, as ours does
    gradients = []
    svd = GaLoreProjector.get_orthogonal_matrix

    def of_last_step(self, gradient, *args, **kwargs):
        return svd(self, gradients[-2], *args, **kwargs)

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", of_last_step)
    torch.manual_seed(0)
    layer = QLinear(shape[1], shape[0], bits=16)
    theirs = nn.Parameter(layer.weight.clone())
    QGaLore(layer, lr=0.01, eps=1e-12, rank=8, gap=10, scale=0.25, threshold=2.0, proj_bits=16,
            moments="float32", svd=True)
    group = {"params": [theirs], "rank": 8, "update_proj_gap": 10, "scale": 0.25,
             "proj_type": "std"}
    galore = galore_torch.GaLoreAdamW([group], lr=0.01, eps=1e-12, no_deprecation_warning=True)
    for step in range(20):
        x = torch.randn(64, shape[1])
        target = torch.randn(64, shape[0])
        (layer(x) - target).square().mean().backward()
        (F.linear(x, theirs) - target).square().mean().backward()
        gradients.append(theirs.grad.clone())
        if step:  # the first only looks
            galore.step()
        galore.zero_grad()
        assert (layer.weight - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("bits", [8, 16])
def test_every_parameter_moves_at_the_rate_that_is_set(bits):
    torch.manual_seed(0)
    model = LLaMA(tiny(), linear=partial(QLinear, bits=bits))
    optimizer = QGaLore(model, rank=8, scale=0.25, moments="float32", proj_bits=16,
                        stochastic_rounding=False)
    projections = {w.name: w.projection for w in optimizer.weights}
    x = torch.arange(61).repeat(2)[:120].view(4, 30)
    y = torch.arange(1, 121).remainder(61).view(4, 30)

    def snapshot():
        weights = {name: model.get_submodule(name).float_weight().clone() for name in projections}
        return weights | {name: p.detach().clone() for name, p in model.named_parameters()}

    for rate in (0.0, 0.5, 0.0):  # the first step only looks
        optimizer.param_groups[0]["lr"] = rate
        before = snapshot()
        model(x, y).backward()
        for name, after in snapshot().items():
            moved = (after - before[name]).norm() / after.numel() ** 0.5
            expected = rate
            if rate and name in projections:  # Adam's first step is +-1 in each of R's entries
                p = projections[name]
                expected = 0.25 * rate * (p.rank / p.dim) ** 0.5
            assert moved.item() == pytest.approx(expected, rel=0.05, abs=1e-6), name
    assert all(p.grad is None for p in model.parameters())


def test_at_a_refresh_moments_are_kept():
    torch.manual_seed(0)
    layer = QLinear(24, 40, bits=16)
    optimizer = QGaLore(layer, lr=0.0, rank=4, gap=3, threshold=2.0, proj_bits=16,
                        moments="float32")
    (weight,) = optimizer.weights
    m = torch.zeros(4, 40)
    bases = []
    for step in range(8):
        x = torch.randn(16, 24)
        dy = torch.randn(16, 40)
        if step:  # the first only looks
            r = low_rank_gradient(weight.projection, x, dy)
            bases.append(weight.projection.basis)
            m = 0.9 * m + 0.1 * r
        layer(x).backward(dy)
        torch.testing.assert_close(weight.moments.m, m)
        assert weight.moments.age == step
    assert len(set(bases)) == 3  # refreshed after steps 0, 3 and 6


def test_int8_products_train_to_the_float_products_loss():
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
        self.floor = floor
        self.refs = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(t, torch.Tensor) or not t.is_floating_point():
                continue
            storage = t.untyped_storage()
            if storage.nbytes() >= self.floor:
                self.refs[storage._cdata] = (StorageWeakRef(storage), tuple(t.shape))
        return out

    def alive(self):
        return [shape for ref, shape in self.refs.values() if not ref.expired()]


@pytest.mark.parametrize("svd", [False, True])
def test_no_float_weight_or_gradient_outlives_its_backward(svd):
    torch.manual_seed(0)
    model = nn.Sequential(*(QLinear(512, 512) for _ in range(4)))
    optimizer = QGaLore(model, rank=16, gap=2, svd=svd)
    live = LargeFloats(4 * 512 * 512)
    largest = []

    def watched(hook):
        def watch(layer, x, dy):
            before = live.alive()  # what the layers behind this one left
            hook(layer, x, dy)
            largest.append(before + live.alive())

        return watch

    for weight in optimizer.weights:
        weight.layer.hook = watched(weight.layer.hook)
    with live:
        for _ in range(3):
            model(torch.randn(8, 512)).square().sum().backward()
    assert len(largest) == 12 and live.refs  # large floats do come up, for a moment
    assert all(shapes == [] for shapes in largest)


@pytest.mark.parametrize("n", [2, 8])
def test_micro_batches_make_the_step_of_one_large_batch(n):
    weights = []
    for parts in (1, n):
        torch.manual_seed(0)
        # the basis of the first lies on its input side, of the second on its output side
        model = nn.Sequential(QLinear(24, 40, bits=16), nn.Tanh(), QLinear(40, 24, bits=16),
                              nn.Tanh(), nn.Linear(24, 24))
        optimizer = QGaLore(model, rank=8, eps=1e-5, gap=2, threshold=2.0, proj_bits=16,
                            moments="float32", accumulation="float32")
        for _ in range(6):  # refreshes among them
            for i, part in enumerate(torch.randn(16, 24).chunk(parts)):
                optimizer.accumulating = i < parts - 1
                (model(part).square().mean() / parts).backward()
        weights.append(list(model.state_dict().values()))
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_one_bad_micro_batch_makes_the_gradient_count_as_zero(kind):
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8, accumulation=kind, betas=(0.0, 0.999))  # no momentum
    train_steps(model, 2)
    before = {w.name: w.layer.float_weight() for w in optimizer.weights}
    optimizer.pop_stats()
    for factor, more in ((1.0, True), (float("inf"), True), (1.0, False)):
        optimizer.accumulating = more
        (factor * model(*tokens())).backward()
    assert optimizer.pop_stats()["skipped"] == len(optimizer.trained)
    for name, weight in before.items():  # quantised again, unmoved
        after = model.get_submodule(name).float_weight()
        torch.testing.assert_close(after, weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_gradient_counts_as_zero_and_is_reported(poison):
    states = []
    for factor in (poison, 0.0):
        torch.manual_seed(0)
        model = LLaMA(tiny())
        optimizer = QGaLore(model, rank=8, gap=1)
        train_steps(model, 2)
        optimizer.pop_stats()
        (factor * model(*tokens())).backward()
        assert optimizer.pop_stats()["skipped"] == (len(optimizer.trained) if factor else 0)
        assert all(math.isfinite(loss) for loss in train_steps(model, 3))
        assert optimizer.pop_stats()["skipped"] == 0
        states.append(model.state_dict())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_a_bad_first_batch_leaves_no_basis_and_the_next_trains():
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, rank=8)
    (float("nan") * model(*tokens())).backward()
    assert optimizer.pop_stats()["refreshes"] == 0
    train_steps(model, 1)
    stats = optimizer.pop_stats()
    assert (stats["skipped"], stats["refreshes"]) == (0, 14)


def clipped(spike=1.0, micro_batches=1):
    """The third step's gradients after they were clipped to 1e-3: their norms, and grad_norm.

    Its batch is `spike` times as steep as those before it."""
    torch.manual_seed(0)
    model = LLaMA(tiny())
    optimizer = QGaLore(model, lr=0.0, betas=(0.0, 0.999), rank=8, grad_clip=1e-3,
                        moments="float32", accumulation="float32")
    for factor in (1.0, 1.0, spike):
        for micro in range(micro_batches):
            optimizer.accumulating = micro < micro_batches - 1
            (factor * model(*tokens(seed=micro)) / micro_batches).backward()
        optimizer.step()
    # with beta1 = 0 the first moment is the gradient
    norms = [t.moments.m.norm() for t in optimizer.trained.values()]
    return torch.stack(norms), optimizer.pop_stats()["grad_norm"]


def test_with_accumulation_clipping_is_by_the_steps_own_norm():
    norms, grad_norm = clipped(spike=100.0, micro_batches=2)
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert grad_norm > 1  # logged as it was before
    direction, _ = clipped(micro_batches=2)
    torch.testing.assert_close(norms, direction, rtol=1e-3, atol=0)  # all are scaled alike


def test_without_accumulation_clipping_takes_norms_known_so_far():
    """Of weights that have stepped this step's, of others the last step's."""
    norms, grad_norm = clipped()
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)  # the last step's are this one's
    norms, after = clipped(spike=100.0)
    assert after == pytest.approx(100 * grad_norm, rel=1e-3)
    # a spike is cut where it comes; all together they exceed the limit, once
    assert norms.max() < 1.001e-3


def test_waiting_weights_that_nobody_stepped_are_an_error():
    model = nn.Sequential(QLinear(24, 24))
    optimizer = QGaLore(model, rank=4, grad_clip=1.0)
    for accumulating in (True, False, True, False):
        optimizer.accumulating = accumulating
        model(torch.randn(8, 24)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"call step\(\)"):
        model(torch.randn(8, 24)).square().mean().backward()


@pytest.mark.parametrize("moments", ["factored", "8bit"])
def test_a_reloaded_optimizer_continues_bit_for_bit(tmp_path, moments):
    def fresh():
        torch.manual_seed(0)
        # an embedding and moments large enough to be in 8 bits
        model = LLaMA(tiny(n_embd=64, vocab_size=130))
        return model, QGaLore(model, rank=40, gap=2, threshold=0.0, k=1, moments=moments)

    model, optimizer = fresh()
    train_steps(model, 5, vocab=130)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    expected = train_steps(model, 6, vocab=130)
    again, optimizer = fresh()
    of_model, of_optimizer = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)
    assert train_steps(again, 6, vocab=130) == expected
    assert {t.moments.kind for t in optimizer.trained.values()} == {moments, "float32"}


def test_it_trains_any_model_of_qlinears_and_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(QLinear(10, 32), nn.LayerNorm(32), nn.ReLU(), QLinear(32, 32),
                          nn.Linear(32, 1))
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
# train.py, as a process


def log_size(folder):
    path = f"{folder}/log.jsonl"
    return os.path.getsize(path) if os.path.exists(path) else 0


def kill_soon(process, folder, seconds):
    """Let a run write a line or a checkpoint or two more, then kill it. True if it came to that."""
    before = log_size(folder)
    while process.is_alive():
        if log_size(folder) >= before + 1500 and os.path.exists(f"{folder}/ckpt.pt"):
            break
        time.sleep(0.01)
    time.sleep(seconds)
    alive = process.is_alive()
    process.kill()
    return alive


def test_a_run_killed_at_random_moments_continues_bit_for_bit(shards, tmp_path):
    args = [f"--data_dir={shards}", *TINY_RUN, "--max_iters=45", "--eval_interval=5",
            "--gradient_accumulation_steps=2"]
    whole = f"{tmp_path}/whole"
    broken = f"{tmp_path}/broken"
    code, out, err = run("train.py", *args, f"--out_dir={whole}")
    assert code == 0, err
    rng = random.Random(0)
    kills = 0
    resume = "scratch"
    code = None
    while code != 0:
        start = trains(*args, f"--out_dir={broken}", f"--init_from={resume}")
        job = Job(broken, start, size=0)
        if kills < 3:
            kills += kill_soon(job.processes[0], broken, rng.random() * 0.3)
        ((code, out, err),) = job.wait()
        assert code in (0, -signal.SIGKILL), err
        resume = "resume"
    assert kills >= 2
    assert read_log(broken) == read_log(whole)
    a = torch.load(f"{whole}/ckpt.pt", weights_only=True)["model"]
    b = torch.load(f"{broken}/ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["qgalore", "adamw"])
def test_a_method_learns_and_leaves_its_files(shards, tmp_path, method):
    check_run(shards, tmp_path, method)


BAD = """
--method=sgd --weight_bits=4 --weight_bits=5 --lora_alpha=0 --lora_alpha=8 --init_from=nowhere
--device=tpu --dtype=int8 --n_head=7 --rank=0 --moments=4bit --checkpoint_bits=4 --matmul=int4
--accumulation=half --keep_checkpoints=0 --beta1=1.5 --beta1=1 --beta2=1 --learning_rate=-1
--max_iters=-1 --embed_bits=8
""".split()


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_are_one_line(shards, tmp_path, bad):
    usual = [f"--data_dir={shards}", f"--out_dir={tmp_path}/x", *TINY_RUN, "--max_iters=1"]
    with pytest.raises(SystemExit, match="error: ") as e:
        train.main(configure(train, argv=[*usual, bad]))
    assert bad[2:].partition("=")[0] in str(e.value) and "\n" not in str(e.value)
    assert not os.path.exists(tmp_path / "x")


def test_a_bad_setting_ends_the_process_with_one_line(shards, tmp_path):
    one_line_error(run("train.py", "--learning_rat=1"), "did you mean 'learning_rate'")


def test_each_window_comes_once_an_epoch_in_a_new_order(shards):
    def windows():
        return Windows(f"{shards}/*_train_*.bin", 32, 257, seed=5)

    def read(data, n):
        return [data.batch(1)[0].numpy().tobytes() for _ in range(n)]

    data = windows()
    first = read(data, data.total)
    second = read(data, data.total)
    inputs = []
    for path in data.paths:
        text = read_shard(path)[0].astype(np.int64)
        inputs += [text[i : i + 32].tobytes() for i in range(0, len(text) - 32, 32)]
    assert sorted(first) == sorted(second) == sorted(inputs)
    assert first != second and inputs not in (first, second)
    x, y, _ = data.batch(4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    # the position is all the state
    again = windows()
    again.position = data.total + 7
    assert read(again, 5) == second[7:12]
