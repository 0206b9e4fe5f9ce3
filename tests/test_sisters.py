"""
Each of Q-GaLore's sisters against its definition in its paper, or its authors' package:
    python -m pytest tests/test_sisters.py
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import methods.apollo
from configurator import configure
from finetune import hf, welore
from finetune.adapters import LoRA, LowRank
from kernels.count import Counter
from kernels.matmul import gradient_int8
from kernels.momentum import Momentum, _decode
from kernels.sums import Sum
from methods.alice import WEIGHT
from methods.fira import limit_growth_
from methods.loqt import Factor
from methods.lora import restart
from methods.muon import NEWTON_SCHULZ, orthogonal
from methods.natural_galore import DAMPING, HISTORY
from methods.registry import METHODS, find
from model import LLaMA, LLaMAConfig, QLinear
from qgalore import QGaLore
from run import history
from run.checkpoint import load_model
from run.memory import memory_plan
from run.trace import Live
from tests.common import TINY_MODEL, TINY_RUN, one_line_error, read_log, run, settings, tokens

SHAPES = [(48, 32), (32, 48), (32, 32)]  # out, in

find("qgalore")  # lets all methods register
PROJECTED = [name for name, method in METHODS.items() if getattr(method, "weight", None)]
SISTERS = [name for name in PROJECTED if name not in ("qgalore", "galore")]
RULES = [name for name in PROJECTED if name not in ("qgalore", "galore8bit")]  # galore's again


def layer_and_optimizer(shape, method, bits=16, **changes):
    """A layer (out, in), and the optimizer that moves it by a method's rule, all in floats."""
    torch.manual_seed(0)
    layer = QLinear(shape[1], shape[0], bits=bits)
    options = {
        "rank": 8,
        "gap": 5,
        "eps": 1e-12,
        "scale": 1.0,
        "proj_bits": 16,
        "moments": "float32",
        "threshold": 2.0,
        "stochastic_rounding": False,
    }
    options |= changes
    if method == "loqt":
        layer.adapter = Factor(*shape, options["rank"], options["scale"], options["proj_bits"])
    return layer, QGaLore(layer, lr=0.01, weight=find(method).weight, **options)


def gradients(shape, steps):
    """x, dy and the gradient G, turned so that its smaller side comes first."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(20, shape[1], generator=generator)
        dy = torch.randn(20, shape[0], generator=generator)
        yield x, dy, turned(dy.T @ x)


def turned(w):
    """w (out, in) with its smaller side first; a square one with its inputs."""
    return w.T if w.shape[0] >= w.shape[1] else w


def current(layer):
    return turned(layer.float_weight().clone())


def basis(weight):
    """P (dim, rank), or None before there is one."""
    projection = weight.projection
    return None if projection.basis is None else projection.matrix()


def step_in_parts(layer, optimizer, x, dy, parts):
    """One step's backward, in so many micro-batches."""
    for i, (a, b) in enumerate(zip(x.chunk(parts), dy.chunk(parts))):
        optimizer.accumulating = i < parts - 1
        layer.hook(layer, a, b)


class Adam:
    """On one tensor, in plain words."""

    def __init__(self):
        self.m = 0
        self.v = 0
        self.t = 0

    def __call__(self, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m = self.m / (1 - 0.9**self.t)
        v = self.v / (1 - 0.999**self.t)
        return m / (v.sqrt() + 1e-12)


# -----------------------------------------------------------------------------
# Fira


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_adds_the_scaled_residual_and_limits_its_growth(shape):
    layer, optimizer = layer_and_optimizer(shape, "fira")
    weight = optimizer.weights[0]
    adam = Adam()
    norm = None  # of the last step's residual
    limited = 0
    for i, (x, dy, g) in enumerate(gradients(shape, 24)):
        if i == 6:  # a spike
            x = 3 * x
            g = 3 * g
        before = current(layer)
        p = basis(weight)
        layer.hook(layer, x, dy)
        if p is None:
            assert torch.equal(current(layer), before)
            continue
        r = p.T @ g
        n = adam(r)
        assert optimizer.norms.item() == pytest.approx(g.norm().item(), rel=1e-4)
        rest = (g - p @ r) * (n.norm(dim=0) / r.norm(dim=0))
        if norm is not None and rest.norm() > 1.01 * norm:
            rest = rest * 1.01 * norm / rest.norm()
            limited += 1
        norm = rest.norm()
        moved = current(layer) - before
        torch.testing.assert_close(moved, -0.01 * (p @ n + rest), rtol=1e-3, atol=1e-5)
    assert limited
    assert weight.projection.refreshes == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_alice_adds_the_residual_by_its_columns_mean_energy(shape):
    layer, optimizer = layer_and_optimizer(shape, "qalice")
    weight = optimizer.weights[0]
    adam = Adam()
    mean = age = 0
    norm = None  # of the last step's residual
    for x, dy, g in gradients(shape, 24):
        before = current(layer)
        p = basis(weight)
        layer.hook(layer, x, dy)
        if p is None:
            assert torch.equal(current(layer), before)
            continue
        n = adam(p.T @ g)
        rest = g - p @ (p.T @ g)
        age += 1
        mean = 0.9 * mean + 0.1 * rest.square().sum(dim=0)
        rest = rest * ((len(p) - p.shape[1]) * (1 - 0.9**age) / mean).sqrt()
        if norm is not None and rest.norm() > 1.01 * norm:
            rest = rest * 1.01 * norm / rest.norm()
        norm = rest.norm()
        moved = current(layer) - before
        torch.testing.assert_close(moved, -0.01 * (p @ n + WEIGHT * rest), rtol=1e-3, atol=1e-5)


# -----------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_moves_by_an_orthogonal_factor(shape):
    """Of the momentum and the gradient, quarter by quarter."""
    layer, optimizer = layer_and_optimizer(shape, "muon", scale=0.5)
    size = 0.01 * 0.5 * 0.2 * max(shape) ** 0.5  # of a step whose singular values are 1
    m = 0
    for x, dy, g in gradients(shape, 12):
        before = current(layer)
        layer.hook(layer, x, dy)
        m = 0.9 * m + 0.1 * g
        step = (before - current(layer)) / size
        expected = m + 0.4 * g
        longer = int(g.shape[1] >= g.shape[0])
        for moved, part in zip(step.chunk(4, dim=longer), expected.chunk(4, dim=longer)):
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            moved = u.T @ moved @ vh.T
            became = moved.diag()  # what became of the singular values s: near 1
            assert (became[s > 0.02 * s.norm()] - 1).abs().max() < 0.125
            assert (moved - became.diag()).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1e-6, 1, 1e6])
@pytest.mark.parametrize("rank,noise", [(1, 0), (1, 1e-3), (2, 1e-3), (64, 1)])
def test_orthogonal_factors_in_bfloat16_are_bounded(rank, noise, size):
    torch.manual_seed(rank)
    x = torch.randn(64, rank) @ torch.randn(rank, 256)
    x = size * (x + noise * torch.randn(64, 256))
    for block in orthogonal(x.bfloat16(), True, 1.0).float().chunk(4, dim=1):
        assert 0.8 < torch.linalg.matrix_norm(block, 2) < 1.15


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("rows,cols", [(32, 96), (8, 96), (40, 40), (24, 90)])
def test_blocks_become_orthogonal_together_as_each_alone(rows, cols, right):
    """The last of blocks that are not alike is filled with zeros."""
    torch.manual_seed(0)
    x = torch.randn(rows, cols)
    step = orthogonal(x.clone(), right, 0.5)
    assert (step.T if right else step[:, : cols // 4 * 4]).is_contiguous() or cols % 4
    width = -(-cols // 4)
    for found, block in zip(step.split(width, dim=1), x.split(width, dim=1)):
        y = block / (block @ block.T).norm().sqrt()
        for a, b, c in NEWTON_SCHULZ:
            gram = y @ y.T
            y = a * y + (b * gram + c * gram @ gram) @ y
        torch.testing.assert_close(found, 0.5 * y, rtol=1e-4, atol=1e-5)


def test_the_orthogonal_factor_of_nothing_is_nothing():
    assert not orthogonal(torch.zeros(64, 256, dtype=torch.bfloat16), False, 1.0).any()


def kept(momentum, cols):
    """What a momentum holds, (rows, cols) float32."""
    if momentum.kind == "float32":
        return momentum.m
    return _decode(momentum.m, momentum.size, cols)


@pytest.mark.parametrize("kind,cols", [("factored", 300), ("factored", 65), ("float32", 300)])
def test_momentum_is_the_mean_of_gradients_in_its_bytes(kind, cols):
    momentum = Momentum((40, cols), kind)
    m = 0
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        g = torch.randn(40, cols, generator=generator)
        m = 0.9 * m + 0.1 * g
        expected = m + 0.4 * g
        momentum.step_(g, 0.9, 0.4)
        error = (g - expected).norm() / m.norm()
        assert error < (0.4 if kind == "factored" else 1e-6)
        error = (kept(momentum, cols) - m).norm() / m.norm()
        assert error < (0.4 if kind == "factored" else 1e-6)
    taken = sum(t.nbytes for t in vars(momentum).values() if torch.is_tensor(t))
    groups = 40 * -(-cols // 128)
    codes = 40 * -(-cols // 2)
    assert taken == (codes + 4 * groups if kind == "factored" else 4 * 40 * cols)


def test_a_momentum_in_4_bits_takes_the_nearest_of_its_levels():
    momentum = Momentum((2, 256), "factored")
    m = torch.linspace(-3, 3, 512).view(2, 256)
    m[1, 128:] = 0
    momentum.step_(m.clone(), 0.0, 0.0)
    levels = torch.tensor([(9 ** (k / 7) - 1) / 8 for k in range(8)])
    levels = torch.cat([-levels, levels[1:]])
    for row, groups in zip(kept(momentum, 256), m):
        for found, group in zip(row.split(128), groups.split(128)):
            size = group.abs().max()
            assert found.abs().max() == size
            companded = torch.log1p(8 * levels.abs()) * levels.sign()
            exact = torch.log1p(8 * (group / size.clamp(min=1)).abs()) * group.sign()
            nearest = (exact[:, None] - companded).abs().argmin(dim=1)
            torch.testing.assert_close(found, levels[nearest] * size)


@pytest.mark.parametrize("method", ["qmuon", "qalice"])
def test_a_step_that_is_not_finite_is_skipped(method):
    layer, optimizer = layer_and_optimizer((40, 24), method, 8, moments="factored")
    before = layer.float_weight()
    for step, (x, dy, _) in enumerate(gradients((40, 24), 6)):
        if step == 3:
            x.chunk(2)[0][:, 4] = float("inf")
        step_in_parts(layer, optimizer, x, dy, 2)
        assert layer.float_weight().isfinite().all()
    assert optimizer.pop_stats()["skipped"] == 1
    assert (layer.float_weight() - before).norm() > 0


def test_a_muon_weight_takes_22_launches_and_no_float32_product():
    """With INT8 products 8 more, to round both factors of the gradient; a sum takes 7."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for matmul, parts, most, units in (
            ("float", 1, 22, {"bf16"}), ("int8", 1, 26, {"int8", "bf16"}), ("int8", 2, 5, {"int8"})
        ):
            torch.manual_seed(0)
            layer = QLinear(32, 64, group_size=0, matmul=matmul)
            optimizer = QGaLore(layer, weight=find("qmuon").weight, accumulation="bfloat16")
            x = torch.empty(20, 32, dtype=torch.bfloat16)
            dy = torch.empty(20, 64, dtype=torch.bfloat16)
            optimizer.accumulating = parts > 1
            if parts > 1:
                layer.hook(layer, x, dy)  # makes its sum
            with Counter() as counter:
                layer.hook(layer, x, dy)
            assert sum(counter.launches.values()) <= most, counter.launches
            assert {unit for k in counter.launches for unit, _ in k.operations} == units


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_a_sum(bad):
    for kind in ("int8", "bfloat16", "float32"):
        total = Sum(3, 300, kind, "cpu")
        left = torch.ones(5, 3)
        left[2, 1] = bad
        total.add_((left,), torch.ones(5, 300), 1)
        total.add_((torch.ones(5, 3),), torch.ones(5, 300), 2)
        value = total.value(torch.bfloat16)
        assert not value[1].isfinite().any()
        assert value[[0, 2]].eq(10).all()
    total = torch.zeros(3, 300)
    for factor in (left, torch.ones(5, 3)):
        gradient_int8(factor, torch.ones(5, 300), total)
    assert not total[1].isfinite().any()
    torch.testing.assert_close(total[[0, 2]], torch.full((2, 300), 10.0))


# -----------------------------------------------------------------------------
# Natural GaLore


@pytest.mark.parametrize("shape", SHAPES)
def test_natural_galore_divides_by_the_fisher_matrix(shape, monkeypatch):
    """That of the last twenty gradients."""
    _, optimizer = layer_and_optimizer(shape, "natural_galore", rank=2)
    weight = optimizer.weights[0]
    weight.projection.basis = (torch.eye(weight.projection.dim, 2),)
    monkeypatch.setattr(weight, "adam_", lambda r: r)
    seen = []
    for _, _, g in gradients(shape, 23):
        r = (g[:2] * 0.003).contiguous()
        seen.append(r.flatten().bfloat16().double())
        h = torch.stack(seen[-HISTORY:], dim=1)
        expected = torch.linalg.solve(h @ h.T + DAMPING * torch.eye(len(h)), seen[-1])
        _, found = weight.direction(r)
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-3, atol=atol)
    assert h.shape[1] == 20
    assert h.square().sum() > DAMPING  # so that the matrix is not lambda alone


# -----------------------------------------------------------------------------
# APOLLO


@pytest.mark.parametrize("method,rank,scale", [("apollo", 8, 1.0), ("apollo_mini", 1, 128.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_steps_as_its_authors_package(shape, method, rank, scale, monkeypatch):
    """But for the limiter: the package lets it see norms before Adam's bias correction."""
    pytest.importorskip("apollo_torch", reason="apollo-torch is not installed")
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    layer, optimizer = layer_and_optimizer(shape, method, rank=rank, scale=math.sqrt(scale))
    weight = optimizer.weights[0]
    monkeypatch.setattr(methods.apollo, "limit_growth_", lambda state, step: step)

    def ours(self, gradient, rank, type, seed):
        """The directions of the step that our optimizer has just made."""
        p = weight.matrix()
        return p.T if type == "right" else p

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", ours)
    w = nn.Parameter(layer.weight.clone())
    group = {
        "params": [w],
        "rank": rank,
        "proj": "random",
        "scale_type": "channel" if rank > 1 else "tensor",
        "scale": scale,
        "update_proj_gap": 5,
        "proj_type": "std",
    }
    theirs = APOLLOAdamW([group], lr=0.01, eps=1e-12, disable_nl=True)
    for x, dy, _ in gradients(shape, 12):
        layer.hook(layer, x, dy)
        w.grad = dy.T @ x
        theirs.step()
        torch.testing.assert_close(layer.weight, w.data, rtol=1e-4, atol=1e-5)


def test_apollos_directions_are_normal_and_redrawn_each_gap():
    _, optimizer = layer_and_optimizer((600, 400), "apollo", rank=100)
    weight = optimizer.weights[0]
    directions = {}
    for step in (0, 4, 5):
        weight.step = step
        directions[step] = weight.matrix()
    p = directions[0]
    assert abs(p.mean()) < 2e-3
    assert p.var().item() == pytest.approx(1 / 100, rel=0.02)
    within = (p.abs() < 0.1).float().mean().item()  # one standard deviation
    assert within == pytest.approx(0.6827, abs=0.01)
    assert torch.equal(p, directions[4])
    assert not torch.equal(p, directions[5])


@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
def test_apollo_keeps_no_projection(method):
    layer, optimizer = layer_and_optimizer((48, 32), method)
    for x, dy, _ in gradients((48, 32), 3):
        layer.hook(layer, x, dy)
    weight = optimizer.weights[0]
    assert weight.projection.basis == ()
    assert all(t.numel() == 1 for t in weight.state.values())


def test_steps_grow_by_a_hundredth_at_most():
    """Those of APOLLO and of Fira's residual; one of nothing bounds none after it."""
    state = {}
    norms = []
    for size in (0.0, 1.0, 1.0, 100.0, 100.0, 0.0, 100.0, 1.0):
        norms.append(limit_growth_(state, size * torch.ones(4)).norm().item())
    expected = [0, 2, 2, 2 * 1.01, 2 * 1.01**2, 0, 2 * 1.01**3, 2]
    assert norms == pytest.approx(expected, rel=1e-5)


# -----------------------------------------------------------------------------
# LoQT and ReLoRA


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_loqt_trains_one_factor_and_merges_both_at_a_refresh(shape, bits, monkeypatch):
    layer, optimizer = layer_and_optimizer(shape, "loqt", bits, scale=0.5, gap=4, gap_growth=1.2)
    weight = optimizer.weights[0]
    adapter = layer.adapter
    adam = Adam()
    start = layer.base_weight()
    for i, (x, dy, _) in enumerate(gradients(shape, 4)):
        codes = layer.base_weight()
        f = adapter.factor.clone()
        p = basis(weight)
        y = layer(x.requires_grad_())
        y.backward(dy)
        if i == 0:  # the first basis moves nothing, but W is quantised once more
            atol = 0.02 * start.abs().max().item()
            torch.testing.assert_close(layer.float_weight(), start, rtol=0, atol=atol)
            continue
        leaf = f.clone().requires_grad_()
        delta = 0.5 * p @ leaf
        w = codes + (delta.T if adapter.right else delta)
        torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.grad, dy @ w, rtol=1e-4, atol=1e-5)
        (x.detach() @ w.T * dy).sum().backward()
        expected = f - 0.01 * adam(leaf.grad / 0.5)  # Adam does not see the scale
        torch.testing.assert_close(adapter.factor, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.base_weight(), codes)
    assert weight.projection.next_refresh == 0 + 4 + 1  # gap + 1.2^0

    codes = layer.base_weight()
    before = []  # what the layer multiplied by when its refresh began
    refresh = weight.refresh

    def watched(sketch):
        before.append(layer.float_weight())
        refresh(sketch)

    monkeypatch.setattr(weight, "refresh", watched)
    for x, dy, _ in gradients(shape, 2):
        layer(x).backward(dy)
    found = layer.float_weight()
    assert len(before) == 1 and weight.projection.refreshes == 2
    assert not torch.equal(codes, layer.base_weight())
    error = (found - before[0]).norm()
    layer.set_weight(before[0])
    of_codes_alone = (layer.base_weight() - before[0]).norm()
    assert error <= 1.001 * of_codes_alone


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_loqts_compensation_leaves_less_error_than_codes_alone(shape):
    torch.manual_seed(0)
    layer = QLinear(shape[1], shape[0], bits=4)
    w = torch.randn(shape) * 0.02
    layer.adapter = Factor(*shape, 16, 0.5, 16)
    side = w if shape[0] >= shape[1] else w.T
    _, _, vh = torch.linalg.svd(side, full_matrices=False)
    layer.adapter.take((vh[:16].T.contiguous(),))
    layer.adapter.settle(layer, w)
    compensated = (layer.float_weight() - w).norm()
    layer.set_weight(w)
    assert compensated < 0.95 * (layer.base_weight() - w).norm()


def test_a_restart_of_relora_merges_adapters_and_prunes_moments():
    torch.manual_seed(0)
    model = nn.Sequential(QLinear(64, 96, bits=16), nn.Tanh(), QLinear(96, 8, bits=16))
    x = torch.randn(20, 64)
    layers = model[0], model[2]
    for layer in layers:
        layer.adapter = LoRA(layer.out_features, layer.in_features, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(5):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(x)
    restart(model, optimizer, 1337, 100)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    for layer in layers:
        assert not layer.adapter.b.any()
        assert layer.adapter.a.std() > 0.01
    for state in optimizer.state.values():  # a hundredth of them stays
        kept = state["exp_avg_sq"] > 0
        assert 0 < kept.sum() <= 0.011 * kept.numel() + 1
        assert torch.equal(kept, state["exp_avg"] != 0)


# -----------------------------------------------------------------------------
# all of them


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_is_projected_can_be_chosen(side):
    layer, optimizer = layer_and_optimizer((48, 32), "galore", side=side)
    for x, dy, _ in gradients((48, 32), 2):
        before = layer.weight.clone()
        layer.hook(layer, x, dy)
    moved = layer.weight - before
    p = basis(optimizer.weights[0])
    assert p.shape == (32 if side == "right" else 48, 8)
    inside = moved @ p @ p.T if side == "right" else p @ p.T @ moved
    torch.testing.assert_close(inside, moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [*SISTERS, "relora"])
def test_each_method_learns_and_resumes_bit_for_bit(shards, tmp_path, method):
    args = ["train.py", f"--data_dir={shards}", *TINY_MODEL, f"--method={method}",
            "--eval_interval=20", "--lr_decay_iters=40"]
    for setting, value in (("rank", 16), ("proj_gap", 7)):
        if setting in find(method).reads:
            args.append(f"--{setting}={value}")
    for out, *more in (("whole", "--max_iters=40"), ("parts", "--max_iters=20"),
                       ("parts", "--max_iters=40", "--init_from=resume")):
        code, _, err = run(*args, f"--out_dir={tmp_path}/{out}", *more)
        assert code == 0, err
    whole = read_log(tmp_path / "whole")
    assert whole[40, "val_loss"] < whole[0, "val_loss"] - 1
    assert whole == read_log(tmp_path / "parts")
    weights = []
    for out in ("whole", "parts"):
        checkpoint = torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
        weights.append(checkpoint["model"])
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())

    # what a resume cannot change
    fixed_by_the_run = {"galore8bit": "--proj_side=left", "loqt": "--galore_scale=0.3"}
    if method in fixed_by_the_run:
        wrong = fixed_by_the_run[method]
        result = run(*args, f"--out_dir={tmp_path}/whole", "--init_from=resume", wrong)
        one_line_error(result, wrong[2:].partition("=")[0], "was trained with")
    if method == "loqt":  # its factors and basis come with the model
        code, out, err = run("sample.py", f"--out_dir={tmp_path}/whole", "--prompt=the",
                             "--max_new_tokens=5", "--device=cpu")
        assert code == 0 and out.startswith("the"), err


@pytest.mark.parametrize("rule", RULES)
def test_micro_batches_make_the_step_of_one_batch(rule):
    weights = []
    for parts in (1, 4):
        layer, optimizer = layer_and_optimizer(
            (40, 24), rule, 8 if rule == "loqt" else 16, accumulation="float32", gap=3,
        )
        for x, dy, _ in gradients((40, 24), 6):
            step_in_parts(layer, optimizer, x, dy, parts)
        weights.append(layer.float_weight())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["loqt", "qmuon"])
def test_a_step_that_waits_for_the_norm_is_that_of_backward(method):
    weights = []
    for clip in (0.0, 1e9):
        layer, optimizer = layer_and_optimizer(
            (40, 24), method, 8, accumulation="float32", gap=3, grad_clip=clip
        )
        for x, dy, _ in gradients((40, 24), 6):
            before = layer.float_weight()
            step_in_parts(layer, optimizer, x, dy, 2)
            waits = torch.equal(layer.float_weight(), before)
            optimizer.step()
        assert waits == (clip > 0)
        weights.append(layer.float_weight())
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", [*SISTERS, "relora"])
def test_the_memory_plan_counts_what_each_method_keeps(method):
    flags = ("--n_layer=2 --n_embd=128 --n_head=4 --ffn_dim=352 --vocab_size=512"
             f" --batch_size=4 --method={method}").split()
    if "rank" in find(method).reads:
        flags.append("--rank=32")
    if method == "loqt":  # bitsandbytes makes NF4 on the CPU with temporaries of its own
        flags.append("--weight_bits=8")
    s = settings(*flags)
    plan = memory_plan(s, torch.float32, torch.float32)
    with Live() as live:
        model, optimizer = find(method).build(s, "cpu", torch.float32)
        for _ in range(2):
            model(*tokens(4, 256, 512)).backward()
            optimizer.step()
            if method == "relora":
                optimizer.zero_grad()
    assert sum(plan.values()) == pytest.approx(live.peak, rel=0.03)
    if method == "natural_galore":  # 20 gradients of 2 bytes an element
        elements = sum(w.projection.rank * w.projection.other for w in optimizer.weights)
        assert plan["moments"] > 40 * elements
    if method.startswith("apollo"):
        assert plan["projections"] < 100  # a few numbers


def test_loqt_of_13b_fits_a_24_gb_card():
    s = settings("config/llama_13b.py", "--method=loqt", "--rank=1024")
    assert s.gradient_accumulation_steps == 1
    plan = memory_plan(s, torch.bfloat16, torch.bfloat16)
    assert sum(plan.values()) < 23 * 2**30, plan


@pytest.mark.parametrize("flags,words", [
    ("--method=loqt --weight_bits=16", ["weight_bits=16", "4 or 8"]),
    ("--method=loqt --proj_side=left", ["--proj_side=left", "loqt"]),
    ("--method=relora --weight_bits=4", ["weight_bits=4", "16 or 8"]),
    ("--method=apollo_mini --rank=4", ["--rank=4", "apollo_mini", "rank = 1"]),
    ("--method=fira --moments=8bit", ["--moments=8bit", "fira", "float32", "qmuon"]),
    ("--method=adamw --galore_scale=2", ["galore_scale", "does not read", "qmuon"]),
    ("--method=lora --embed_bits=8", ["embed_bits=8", "freeze_embedding"]),
    ("--method=relora --embed_bits=8", ["embed_bits=8", "freeze_embedding"]),
    ("--proj_side=top", ["proj_side"]),
    ("--method=lotus", ["lotus", "apollo"]),
])
def test_combinations_that_make_no_sense_are_refused(tmp_path, flags, words):
    one_line_error(run("train.py", f"--out_dir={tmp_path}/out", *flags.split()), *words)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# run/plot.py


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """A folder with one run twice: "whole", and "parts" of it."""
    folder = tmp_path_factory.mktemp("runs")
    args = ["train.py", f"--data_dir={shards}", *TINY_RUN, "--proj_gap=3", "--log_interval=4",
            "--lr_decay_iters=40", "--eval_interval=17"]
    for out, *more in (("whole", "--max_iters=40"), ("parts", "--max_iters=17"),
                       ("parts", "--max_iters=40", "--init_from=resume")):
        code, _, err = run(*args, f"--out_dir={folder}/{out}", *more)
        assert code == 0, err
    return folder


def test_the_subspace_map_shows_each_refresh_where_it_was(runs):
    names, similarity, gap = history.Summary(runs / "whole").subspaces.values()
    in_parts = history.Summary(runs / "parts").subspaces.values()
    assert names == in_parts[0] and len(names) == 14
    np.testing.assert_array_equal(similarity, in_parts[1])  # NaN and all
    np.testing.assert_array_equal(gap, in_parts[2])

    assert names[:2] == ["blocks.0.attn.k_proj", "blocks.1.attn.k_proj"]
    refreshes = []
    for entry in history.read_log(runs / "whole" / "log.jsonl"):
        refreshes += entry["subspaces"].get(names[0], [])
    steps = [step for step, _, _ in refreshes]
    assert len(steps) > 4 and steps == sorted(set(steps))
    for (step, value, width), after in zip(refreshes, steps[1:]):
        assert after == step + width
        assert similarity[0, step:after] == pytest.approx([value] * width)
        assert gap[0, after - 1] == width


def test_hours_are_counted_up_to_the_last_logged_step(runs):
    run = history.Summary(runs / "whole")
    hours = list(run.by_hours.columns()[0])
    assert hours[0] == 0 and hours == sorted(hours)
    assert hours[-1] == run.hours > 0
    log = history.read_log(runs / "whole" / "log.jsonl")
    assert run.tokens == max(entry["tokens"] for entry in log if "loss" in entry)


def test_several_runs_are_drawn_in_one_picture(runs, tmp_path):
    image = tmp_path / "runs.png"
    code, _, err = run("run.plot", f"--out_dir={runs}/whole,{runs}/par*", f"--image={image}")
    assert code == 0, err
    assert image.stat().st_size > 10_000
    one_line_error(run("run.plot", f"--out_dir={runs}/none"), "none")


# -----------------------------------------------------------------------------
# WeLore


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A Hugging Face directory of a tiny LLaMA.

    It has a matrix of rank 3, one with a flat spectrum, and random ones."""
    folder = str(tmp_path_factory.mktemp("welore") / "whole")
    torch.manual_seed(0)
    config = LLaMAConfig(vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, ffn_dim=96,
                         block_size=64)
    model = LLaMA(config, partial(QLinear, bits=16))
    layers = model.blocks[0].attn
    layers.q_proj.set_weight(torch.randn(64, 3) @ torch.randn(3, 64) * 0.1)
    layers.o_proj.set_weight(torch.linalg.qr(torch.randn(64, 64))[0] * 0.1)
    hf.save(model, folder, dtype=torch.float32)
    return folder


def count(module):
    """The numbers that a module holds."""
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def test_welore_keeps_the_ranks_above_one_threshold(pretrained, tmp_path):
    low, ranks, numbers = welore.compress(pretrained, str(tmp_path / "low"), keep=0.5, least=0.5)
    name = "model.layers.0.self_attn.{}_proj.weight"
    q, o = name.format("q"), name.format("o")
    assert low[q] <= 3
    assert o not in low  # a flat spectrum stays

    whole = hf.load(pretrained, 16, torch.float32)
    model = hf.load(str(tmp_path / "low"), 16, torch.float32)
    attn = model.blocks[0].attn
    assert isinstance(attn.q_proj, LowRank) and attn.q_proj.v.shape == (low[q], 64)
    assert isinstance(attn.o_proj, QLinear)
    assert torch.equal(attn.o_proj.weight, whole.blocks[0].attn.o_proj.weight)

    matrices = {n: m for n, m in whole.named_modules() if isinstance(m, QLinear)}
    values = {n: torch.linalg.svdvals(m.weight) for n, m in matrices.items()}
    chosen = welore.choose_ranks(values, 0.5)
    most = sum(map(len, values.values()))
    assert abs(sum(chosen.values()) - 0.5 * most) <= len(values)
    assert ranks > 0.5  # what stays whole keeps all

    kept = 0
    for n, s in values.items():
        module = model.get_submodule(n)
        kept += count(module)
        if isinstance(module, LowRank):
            k = module.u.shape[1]
            assert k == max(1, chosen[n]) < 0.5 * len(s)
            error = (module.float_weight() - matrices[n].weight).norm().item()
            assert error == pytest.approx(s[k:].norm().item(), rel=1e-3, abs=1e-5)  # Eckart-Young
    assert numbers == pytest.approx(kept / sum(map(count, matrices.values())))


def test_what_welore_made_trains_factors_resumes_and_exports(pretrained, shards, tmp_path):
    code, out, err = run("finetune.welore", f"--model={pretrained}", f"--out={tmp_path}/low",
                         "--keep=0.6", "--least=0.7")
    assert code == 0 and "matrices became factors" in out, err
    args = ["train.py", f"--data_dir={shards}", "--encoding=bytes", "--block_size=32",
            "--batch_size=4", "--device=cpu", "--method=welore", "--learning_rate=0.01",
            "--warmup_iters=2", "--eval_interval=10", "--eval_iters=4", "--lr_decay_iters=20",
            f"--out_dir={tmp_path}/out"]
    one_line_error(run(*args, "--max_iters=1"), "finetune.welore", "init_from")
    start = hf.load(f"{tmp_path}/low", 16, torch.float32).state_dict()
    for more in ([f"--init_from={tmp_path}/low", "--max_iters=10"],
                 ["--init_from=resume", "--max_iters=20"]):
        code, _, err = run(*args, *more)
        assert code == 0, err
    log = read_log(tmp_path / "out")
    assert log[20, "val_loss"] < log[10, "val_loss"] < log[0, "val_loss"]

    # factors and norms have moved, and nothing else
    model, _ = load_model(f"{tmp_path}/out", "cpu")
    for name, t in model.state_dict().items():
        trained = name.endswith((".u", ".v", "norm.weight"))
        assert torch.equal(t, start[name]) != trained, name
    hf.save(model, f"{tmp_path}/hf", dtype=torch.float32)
    again = hf.load(f"{tmp_path}/hf", 16, torch.float32)
    assert not again.config.low_rank
    x = tokens(2, 16, 257)[0]
    torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)

    # a config.json that names matrices or ranks that are not there
    path = tmp_path / "low" / "config.json"
    config = path.read_text()
    for right, wrong, word in (("blocks.0", "blocks.7", "blocks.7"),
                               ("q_proj=", "q_proj=1", "expected"),
                               ("q_proj=", "q_proj=x", "config.json")):
        path.write_text(config.replace(right, wrong, 1))
        one_line_error(run(*args, f"--init_from={tmp_path}/low", "--max_iters=1"), word)


def test_welore_refuses_what_it_cannot_compress(pretrained, tmp_path):
    welore.compress(pretrained, str(tmp_path / "low"))
    for flags, word in (([f"--model={tmp_path}/low", f"--out={tmp_path}/lower"], "before"),
                        ([f"--model={pretrained}", f"--out={tmp_path}/low"], "exists"),
                        ([f"--model={pretrained}"], "--out="),
                        ([f"--model={pretrained}", f"--out={tmp_path}/x", "--keep=0"], "keep"),
                        ([f"--model={pretrained}", f"--out={tmp_path}/x", "--keep=1"], "whole"),
                        ([f"--model={pretrained}", f"--out={tmp_path}/x", "--least=0"], "whole"),
                        ([f"--model={tmp_path}/no", f"--out={tmp_path}/x"], "neither"),
                        ([f"--model={pretrained}", f"--out={tmp_path}/x", "--device=foo"], "foo")):
        with pytest.raises(SystemExit, match=f"^error: .*{word}"):
            welore.main(configure(welore, argv=flags))
    assert [path.name for path in tmp_path.iterdir()] == ["low"]
