"""
Each of Q-GaLore's sisters against its definition in its paper, or its authors' package:
    python -m pytest test_family.py
"""

import math

import pytest
import torch
import torch.nn as nn

from methods import family
from finetune import hf
from run import plot
import train
from finetune import welore
from finetune.adapters import LoQT, LoRA, LowRank
from run.checkpoint import load_model
from configurator import configure
from run.memory import Live, memory_plan
from methods.registry import METHODS, of_method, restart
from model import LLaMA, LLaMAConfig, QLinear
from methods.moments import Momentum, SumInMomentum
from qgalore import QGaLore
from quant import random_key, rounding_key
from tests.common import TINY_RUN, one_line_error, read_log, run, tokens

SHAPES = [(48, 32), (32, 48), (32, 32)]  # out, in


def layer_and_optimizer(shape, method, bits=16, **settings):
    torch.manual_seed(0)
    layer = QLinear(shape[1], shape[0], bits=bits)
    settings = {"rank": 8, "gap": 5, "eps": 1e-12, "scale": 1.0, "proj_bits": 16, "moments": "float32",
                "threshold": 2.0, "stochastic_rounding": False} | settings
    if method == "loqt":
        layer.adapter = LoQT(*shape, settings["rank"], settings["scale"], settings["proj_bits"])
    return layer, QGaLore(layer, lr=0.01, rule=method, **settings)


def gradients(shape, steps):
    """x, dy and the gradient G, turned so that its smaller side comes first."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, dy = (torch.randn(20, n, generator=generator) for n in reversed(shape))
        g = dy.T @ x
        yield x, dy, g.T if shape[0] >= shape[1] else g


def turned(layer):
    w = layer.float_weight().clone()
    return w.T if w.shape[0] >= w.shape[1] else w


class Adam:
    """On one tensor, in plain words."""

    def __init__(self):
        self.m = self.v = self.t = 0

    def __call__(self, g):
        self.m, self.v, self.t = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2, self.t + 1
        return self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_fira_adds_the_residual_scaled_by_column_and_limited_in_growth(shape, blocks):
    layer, optimizer = layer_and_optimizer(shape, "fira", residual_blocks=blocks)
    projection, adam, norm = next(iter(optimizer.projections.values())), Adam(), None
    limited = 0
    for i, (x, dy, g) in enumerate(gradients(shape, 24)):
        if i == 6:
            x, g = 3 * x, 3 * g  # a spike
        before, p = turned(layer), projection.basis and projection.matrix()
        layer.hook(layer, x, dy)
        if p is None:
            assert torch.equal(turned(layer), before)
            continue
        r = p.T @ g
        n = adam(r)
        assert optimizer.norms.item() == pytest.approx(r.norm().item(), rel=1e-4)
        rest = blocks * (g - p @ r) * (n.norm(dim=0) / r.norm(dim=0))
        rest[torch.arange(len(rest)) % blocks != i % blocks] = 0
        if norm is not None and rest.norm() > 1.01 * norm:
            rest, limited = rest * 1.01 * norm / rest.norm(), limited + 1
        norm = rest.norm()
        torch.testing.assert_close(turned(layer) - before, -0.01 * (p @ n + rest), rtol=1e-3, atol=1e-5)
    assert limited and optimizer.projections[""].refreshes == 5


@pytest.mark.parametrize("blocks,rank", [(1, 8), (3, 8), (1, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_moves_by_the_orthogonal_factor_of_low_rank_momentum_and_the_gradient(shape, blocks, rank):
    layer, optimizer = layer_and_optimizer(shape, "muon", residual_blocks=blocks, rank=rank, scale=0.5)
    projection, m = next(iter(optimizer.projections.values())), 0
    for i, (x, dy, g) in enumerate(gradients(shape, 12)):
        before, p = turned(layer), projection.basis and projection.matrix()
        layer.hook(layer, x, dy)
        if p is None:
            assert torch.equal(turned(layer), before)
            continue
        m = 0.9 * m + 0.1 * p.T @ g
        seen = torch.where(torch.arange(len(g))[:, None] % blocks == i % blocks, g, 0)
        parts = [(before - turned(layer)) / (0.01 * 0.5 * 0.2 * max(shape) ** 0.5), p @ m + 0.4 * blocks * seen]
        for moved, part in zip(*(a.chunk(4, dim=int(a.shape[1] >= a.shape[0])) for a in parts)):
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            moved = u.T @ moved @ vh.T
            size = moved.diag()  # what became of s, its singular values: near 1
            assert (size[s > 0.02 * s.norm()] - 1).abs().max() < 0.125
            assert (moved - size.diag()).abs().max() < 1e-3
    assert optimizer.projections[""].refreshes == (0 if rank == 32 else 3)


def test_orthogonal_factors_in_bfloat16_are_bounded_whatever_the_rank_and_size():
    for rank, noise in ((1, 0), (1, 1e-3), (2, 1e-3), (64, 1)):
        for size in (1e-6, 1, 1e6):
            torch.manual_seed(rank)
            x = size * (torch.randn(64, rank) @ torch.randn(rank, 256) + noise * torch.randn(64, 256))
            for block in family.orthogonal_(x, torch.bfloat16).chunk(4, dim=1):
                assert 0.8 < torch.linalg.matrix_norm(block, 2) < 1.15
    assert not family.orthogonal_(torch.zeros(64, 256), torch.bfloat16).any()


@pytest.mark.parametrize("kind", ["factored", "float32"])
def test_momentum_is_the_mean_of_gradients_in_its_bytes_and_follows_the_basis(kind):
    momentum, m = Momentum((40, 300), kind), 0
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        g = torch.randn(40, 300, generator=generator) + 0.5
        m = 0.9 * m + 0.1 * g
        momentum.step_(g, (0.9, 0.999), 1e-8, rounding_key(step, "m"))
        torch.testing.assert_close(g, m, rtol=0, atol=0.03 if kind == "factored" else 1e-5)
    assert sum(t.nbytes for t in vars(momentum).values() if torch.is_tensor(t)) == (
        40 * 300 + 40 * 2 * 8 if kind == "factored" else 4 * 40 * 300)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    momentum.turn_("keep", turn)
    momentum.turn_("rotate", turn)
    momentum.step_(g := torch.zeros(40, 300), (0.9, 0.999), 1e-8)
    torch.testing.assert_close(g, 0.9 * turn.T @ m, rtol=0, atol=0.06 if kind == "factored" else 1e-5)
    momentum.turn_("reset", turn)
    momentum.step_(g, (1.0, 0.999), 1e-8)
    assert not g.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_natural_galore_divides_by_the_fisher_matrix_of_the_last_twenty_gradients(shape):
    layer, optimizer = layer_and_optimizer(shape, "natural_galore", rank=2, scale=1.0)
    rule, seen = optimizer.rules[""], []
    for _, _, g in gradients(shape, 23):
        r = (g[:2] * 0.003).contiguous()
        seen = (seen + [r.flatten().bfloat16().double()])[-family.HISTORY:]
        h = torch.stack(seen, dim=1)
        expected = torch.linalg.solve(h @ h.T + family.DAMPING * torch.eye(len(h)), seen[-1])
        found = []
        rule.projection.basis = (torch.eye(rule.projection.dim, 2),)
        rule.direction(r, lambda r: found.append(r.clone()), 0, torch.float32)
        torch.testing.assert_close(found[0].flatten().double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert h.shape[1] == 20 and h.square().sum() > family.DAMPING  # so that the matrix is not lambda alone


@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_steps_as_its_authors_package(shape, method, monkeypatch):
    """Without the limiter, which the package lets see norms before Adam's bias correction, and ours after it."""
    pytest.importorskip("apollo_torch", reason="apollo-torch is not installed")
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    rank, scale = (8, 1.0) if method == "apollo" else (1, 128.0)
    layer, optimizer = layer_and_optimizer(shape, method, rank=rank, scale=math.sqrt(scale))
    rule, steps = optimizer.rules[""], []
    monkeypatch.setattr(rule, "_limit_growth_", lambda step: step)

    def theirs_as_ours(self, gradient, rank, type, seed):
        p = rule.matrix(len(steps))
        return p.T if type == "right" else p

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", theirs_as_ours)
    w = nn.Parameter(layer.weight.clone())
    group = {"params": [w], "rank": rank, "proj": "random", "scale_type": "channel" if rank > 1 else "tensor",
             "scale": scale, "update_proj_gap": 5, "proj_type": "std"}
    theirs = APOLLOAdamW([group], lr=0.01, eps=1e-12, disable_nl=True)
    for x, dy, g in gradients(shape, 12):
        w.grad = dy.T @ x
        theirs.step()
        layer.hook(layer, x, dy)
        steps.append(1)
        torch.testing.assert_close(layer.weight, w.data, rtol=1e-4, atol=1e-5)


def test_apollos_directions_are_normal_numbers_redrawn_each_gap_and_its_steps_grow_by_a_hundredth_at_most():
    layer, optimizer = layer_and_optimizer((600, 400), "apollo", rank=100)
    rule = optimizer.rules[""]
    p = rule.matrix(0)
    assert abs(p.mean()) < 2e-3 and p.var().item() == pytest.approx(1 / 100, rel=0.02)
    assert (p.abs() < 0.1).float().mean().item() == pytest.approx(0.6827, abs=0.01)
    assert torch.equal(p, rule.matrix(4)) and not torch.equal(p, rule.matrix(5))
    assert not any(isinstance(t, torch.Tensor) and t.numel() > 1 for t in rule.state.values())
    norms = []
    for size in (0.0, 1.0, 1.0, 100.0, 100.0, 0.0, 100.0, 1.0):
        norms.append(rule._limit_growth_(size * torch.ones(4)).norm().item())
    assert norms == pytest.approx([0, 2, 2, 2 * 1.01, 2 * 1.01**2, 0, 2 * 1.01**3, 2], rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_loqt_trains_one_factor_by_its_gradient_and_merges_both_at_a_refresh(shape, bits):
    layer, optimizer = layer_and_optimizer(shape, "loqt", bits, scale=0.5, gap=4, gap_growth=1.2)
    adapter, adam = layer.adapter, Adam()
    start = layer.base_weight()
    for i, (x, dy, g) in enumerate(gradients(shape, 4)):
        codes, f = layer.base_weight(), adapter.factor.clone()
        leaf = f.clone().requires_grad_()
        p = optimizer.projections[""].basis and optimizer.projections[""].matrix()
        y = layer(x.requires_grad_())
        y.backward(dy)
        if i == 0:  # the first basis: nothing moves, up to what the same weights quantised again differ by
            torch.testing.assert_close(layer.float_weight(), start, rtol=0, atol=0.02 * start.abs().max().item())
            continue
        delta = 0.5 * p @ leaf
        w = codes + (delta.T if adapter.right else delta)
        torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x.grad, dy @ w, rtol=1e-4, atol=1e-5)
        (x.detach() @ w.T * dy).sum().backward()
        expected = f - 0.01 * adam(leaf.grad / 0.5)  # Adam does not see the scale
        torch.testing.assert_close(adapter.factor, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.base_weight(), codes)
    refresh = optimizer.projections[""].next_refresh
    assert refresh == 0 + 4 + 1  # gap + 1.2^0
    rule, merged, codes = optimizer.rules[""], [], layer.base_weight()
    turn = rule.turn
    rule.turn = lambda *args: merged.append(layer.float_weight()) or turn(*args)
    for x, dy, _ in gradients(shape, 2):
        layer(x).backward(dy)
    found, (before,) = layer.float_weight(), merged
    assert rule.projection.refreshes == 2 and not torch.equal(codes, layer.base_weight())
    layer.set_weight(before)  # what the codes alone would leave
    assert (found - before).norm() <= 1.001 * (layer.base_weight() - before).norm()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_loqts_compensation_leaves_less_of_the_error_than_the_codes_alone(shape):
    torch.manual_seed(0)
    layer, w = QLinear(shape[1], shape[0], bits=4), torch.randn(shape) * 0.02
    layer.adapter = LoQT(*shape, 16, 0.5, 16)
    side = w if shape[0] >= shape[1] else w.T
    layer.adapter.take((torch.linalg.svd(side, full_matrices=False)[2][:16].T.contiguous(),))
    layer.adapter.settle(layer, w)
    compensated = (layer.float_weight() - w).norm()
    layer.set_weight(w)
    assert compensated < 0.95 * (layer.base_weight() - w).norm()


def test_a_restart_of_relora_merges_the_adapters_and_keeps_a_hundredth_of_their_moments():
    torch.manual_seed(0)
    model, x = nn.Sequential(QLinear(64, 96, bits=16), nn.Tanh(), QLinear(96, 8, bits=16)), torch.randn(20, 64)
    for layer in (model[0], model[2]):
        layer.adapter = LoRA(layer.out_features, layer.in_features, 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(5):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(x)
    restart(model, optimizer, 1337, 100)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert all(not layer.adapter.b.any() and layer.adapter.a.std() > 0.01 for layer in (model[0], model[2]))
    for state in optimizer.state.values():
        kept = state["exp_avg_sq"] > 0
        assert 0 < kept.sum() <= 0.011 * kept.numel() + 1 and torch.equal(kept, state["exp_avg"] != 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_that_is_projected_can_be_chosen(side):
    layer, optimizer = layer_and_optimizer((48, 32), "galore", side=side)
    for x, dy, _ in gradients((48, 32), 2):
        before = layer.weight.clone()
        layer.hook(layer, x, dy)
    moved, p = layer.weight - before, optimizer.projections[""].matrix()
    assert p.shape == (32 if side == "right" else 48, 8)
    inside = moved @ p @ p.T if side == "right" else p @ p.T @ moved
    torch.testing.assert_close(inside, moved, rtol=1e-4, atol=1e-6)


OURS = [m for m in METHODS if m in family.RULES and m != "galore"] + ["galore8bit"]


@pytest.mark.parametrize("method", [*OURS, "relora"])
def test_each_method_learns_and_resumes_bit_for_bit(shards, tmp_path, method):
    args = ["train.py", f"--data_dir={shards}", *TINY_RUN, f"--method={method}", "--eval_interval=20",
            "--lr_decay_iters=40", "--proj_gap=7"]
    for out, more in (("whole", ["--max_iters=40"]), ("parts", ["--max_iters=20"]),
                      ("parts", ["--max_iters=40", "--init_from=resume"])):
        code, _, err = run(*args, f"--out_dir={tmp_path}/{out}", *more)
        assert code == 0, err
    whole, parts = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
    assert whole[40, "val_loss"] < whole[0, "val_loss"] - 1
    assert whole == parts
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True)["model"] for out in ("whole", "parts"))
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    for wrong in ["--proj_side=left"] * (method == "galore8bit") + ["--galore_scale=0.3"] * (method == "loqt"):
        one_line_error(run(*args, f"--out_dir={tmp_path}/whole", "--init_from=resume", wrong), wrong[2:].split("=")[0])
    if method == "loqt":  # its factors and basis come with the model
        args = f"--out_dir={tmp_path}/whole", "--prompt=the", "--max_new_tokens=5", "--device=cpu"
        code, out, err = run("sample.py", *args)
        assert code == 0 and out.startswith("the"), err


@pytest.mark.parametrize("method", [*family.RULES, "qmuon in blocks"])
def test_micro_batches_make_the_step_of_one_batch(method):
    weights = []
    for parts in (1, 4):
        rule, *in_blocks = method.split(" in ")
        layer, optimizer = layer_and_optimizer((40, 24), rule, 8 if rule == "loqt" else 16, accumulation="float32",
                                               gap=3, residual_blocks=5 if in_blocks else 1)
        for x, dy, _ in gradients((40, 24), 6):
            for i, (a, b) in enumerate(zip(x.chunk(parts), dy.chunk(parts))):
                optimizer.accumulating = i < parts - 1
                layer.hook(layer, a, b)
        weights.append(layer.float_weight())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "factored"])
def test_low_rank_gradients_of_micro_batches_and_ranks_add_up_in_the_momentum_they_are_for(kind):
    """Rows 0 to 15 of what is summed are R, the others G's; each of two ranks has two micro-batches, or four."""
    generator, beta = torch.Generator().manual_seed(0), 0.9
    expected, ranks = Momentum((16, 96), "float32"), [Momentum((16, 96), kind) for _ in range(2)]
    for step, parts in enumerate((2, 4, 4, 2)):
        exact, sent = 0, 0
        for rank, momentum in enumerate(ranks):
            total = SumInMomentum(momentum, beta, rank == 0, 40, 96, "cpu")
            for part in range(parts):
                left, right = torch.randn(20, 40, generator=generator), torch.randn(20, 96, generator=generator)
                exact = exact + left.T @ right
                if part < parts - 1:
                    total.add_(left, right, random_key(step, rank, part))
            sent = sent + left.T @ right + total.value()
        expected.step_(r := exact[:16].clone(), (beta,), 0)
        for momentum in ranks:
            momentum.step_(found := sent[:16].clone(), (beta,), 0, key=step)
            assert (found - r).norm() < (1e-5 if kind == "float32" else 0.02) * r.norm()
        assert (sent[16:] - exact[16:]).norm() < 0.02 * exact[16:].norm()


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("blocks", [1, 5])
def test_after_a_micro_batch_that_is_not_finite_muon_makes_no_step_and_starts_its_momentum_anew(blocks, bad):
    layer, optimizer = layer_and_optimizer((40, 24), "qmuon", 8, residual_blocks=blocks, moments="factored")
    before, moved = layer.float_weight(), []
    for step, (x, dy, _) in enumerate(gradients((40, 24), 6)):
        for part, (a, b) in enumerate(zip(x.chunk(2), dy.chunk(2))):
            optimizer.accumulating = part == 0
            if (step, part) == (3, bad):
                a[:, 4] = float("inf")  # a row of the gradient that step 3 of 5 blocks does not look at
            layer.hook(layer, a, b)
        after = layer.float_weight()
        moved.append((after - before).norm().item())
        before = after
    assert moved[3] < 0.1 * min(moved[1:3] + moved[4:]) and optimizer.pop_stats()["skipped"] == 1


@pytest.mark.parametrize("method", ["loqt", "qmuon"])
def test_a_step_that_waits_for_the_global_norm_is_the_one_taken_in_backward(method):
    weights = []
    for clip in (0.0, 1e9):
        layer, optimizer = layer_and_optimizer((40, 24), method, 8, accumulation="float32", gap=3, grad_clip=clip)
        for x, dy, _ in gradients((40, 24), 6):
            for i, (a, b) in enumerate(zip(x.chunk(2), dy.chunk(2))):
                optimizer.accumulating = i < 1
                before = layer.float_weight()
                layer.hook(layer, a, b)
            waits = clip > 0 and torch.equal(layer.float_weight(), before)
            optimizer.step()
        weights.append(layer.float_weight())
    assert waits and torch.equal(*weights)


@pytest.mark.parametrize("method", [*OURS, "relora"])
def test_the_memory_plan_counts_what_each_method_keeps(method):
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    shape = "--n_layer=2 --n_embd=128 --n_head=4 --n_kv_head=4 --ffn_dim=352 --vocab_size=512 --batch_size=4".split()
    bits = ["--weight_bits=8"] * (method == "loqt")  # bitsandbytes makes NF4 on the CPU with temporaries of its own
    config = configure(settings, [*shape, "--rank=32", f"--method={method}", *bits])
    config |= of_method(config)
    plan = memory_plan(config, train.build, torch.float32, torch.float32)
    with Live() as live:
        model, optimizer = train.build(config, "cpu", torch.float32)
        for _ in range(2):
            model(*tokens(4, 256, 512)).backward()
            optimizer.step()
            if method == "relora":
                optimizer.zero_grad()
    assert sum(plan.values()) == pytest.approx(live.peak, rel=0.03)
    if method == "natural_galore":  # 20 gradients of 2 bytes an element
        assert plan["moments"] > 40 * sum(p.rank * p.other for p in optimizer.projections.values())
    if method.startswith("apollo"):
        assert plan["projections"] == 0


def test_loqt_of_13b_fits_a_24_gb_card():
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    config = configure(settings, ["config/llama_13b.py", "--method=loqt", "--rank=1024", "--n_kv_head=40"])
    config |= of_method(config) | {"gradient_accumulation_steps": 1}
    plan = memory_plan(config, train.build, torch.bfloat16, torch.bfloat16)
    assert sum(plan.values()) < 23 * 2**30, plan


def test_combinations_that_make_no_sense_are_refused(tmp_path):
    for wrong, *words in ((["--method=loqt", "--weight_bits=16"], "weight_bits=16", "4 or 8"),
                          (["--method=loqt", "--proj_side=left"], "proj_side", "loqt"),
                          (["--method=relora", "--weight_bits=4"], "weight_bits=4", "16 or 8"),
                          (["--proj_side=top"], "proj_side"), (["--method=lotus"], "lotus", "apollo")):
        one_line_error(run("train.py", f"--out_dir={tmp_path}/out", *wrong), *words)
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# plot.py


def test_the_heat_map_shows_each_refresh_where_it_was_and_an_interrupted_run_loses_none(shards, tmp_path):
    args = ["train.py", f"--data_dir={shards}", *TINY_RUN, "--proj_gap=3", "--log_interval=4", "--lr_decay_iters=40",
            "--eval_interval=17"]
    for out, more in (("whole", ["--max_iters=40"]), ("parts", ["--max_iters=17"]),
                      ("parts", ["--max_iters=40", "--init_from=resume"])):
        code, _, err = run(*args, f"--out_dir={tmp_path}/{out}", *more)
        assert code == 0, err
    logs = [plot.read_log(tmp_path / out / "log.jsonl") for out in ("whole", "parts")]
    names, similarity, gap = plot.subspaces(logs[0])
    assert plot.subspaces(logs[1])[0] == names and len(names) == 14 and names[:2] == [
        "blocks.0.attn.k_proj", "blocks.1.attn.k_proj"]
    assert str((similarity, gap)) == str(plot.subspaces(logs[1])[1:])  # NaN and all
    turns = [turn for entry in logs[0] for turn in entry.get("subspaces", {}).get(names[0], [])]
    assert len(turns) > 4 and [step for step, _, _ in turns] == sorted({step for step, _, _ in turns})
    for (step, value, width), (after, _, _) in zip(turns, turns[1:]):
        assert after == step + width and similarity[0][step:after] == [value] * width and gap[0][after - 1] == width
    seen, hours = zip(*plot.hours_at(logs[0]))
    assert list(hours) == sorted(hours) and seen[-1] == max(entry["tokens"] for entry in logs[0] if "loss" in entry)
    code, out, err = run("plot.py", f"--out_dir={tmp_path}/whole,{tmp_path}/par*", f"--image={tmp_path}/runs.png")
    assert code == 0 and (tmp_path / "runs.png").stat().st_size > 10_000, err
    one_line_error(run("plot.py", f"--out_dir={tmp_path}/none"), "none")


# -----------------------------------------------------------------------------
# welore.py


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A Hugging Face directory of a tiny LLaMA: a matrix of rank 3, one with a flat spectrum, the others random."""
    folder = str(tmp_path_factory.mktemp("welore") / "whole")
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, ffn_dim=96, block_size=64),
                  lambda *args, **kwargs: QLinear(*args, bits=16, **kwargs))
    layers = model.blocks[0].attn
    layers.q_proj.set_weight(torch.randn(64, 3) @ torch.randn(3, 64) * 0.1)
    layers.o_proj.set_weight(torch.linalg.qr(torch.randn(64, 64))[0] * 0.1)
    hf.save(model, folder, dtype=torch.float32)
    return folder


def test_welore_keeps_ranks_by_one_threshold_and_what_it_makes_computes_the_product(pretrained, tmp_path):
    low, ranks, numbers = welore.compress(pretrained, str(tmp_path / "low"), keep=0.5, least=0.5)
    name = "model.layers.0.self_attn.{}_proj.weight".format
    whole, model = hf.load(pretrained, 16, torch.float32), hf.load(str(tmp_path / "low"), 16, torch.float32)
    assert low[name("q")] <= 3 and name("o") not in low  # a flat spectrum stays
    attn = model.blocks[0].attn
    assert isinstance(attn.q_proj, LowRank) and attn.q_proj.v.shape == (low[name("q")], 64)
    assert isinstance(attn.o_proj, QLinear) and torch.equal(attn.o_proj.weight, whole.blocks[0].attn.o_proj.weight)
    values = {n: torch.linalg.svdvals(m.weight) for n, m in whole.named_modules() if isinstance(m, QLinear)}
    chosen, most = welore.choose_ranks(values, 0.5), sum(map(len, values.values()))
    assert abs(sum(chosen.values()) - 0.5 * most) <= len(values)
    for n, s in values.items():
        module = model.get_submodule(n)
        if isinstance(module, LowRank):
            k = module.u.shape[1]
            assert k == max(1, chosen[n]) < 0.5 * len(s)
            error = (module.float_weight() - whole.get_submodule(n).weight).norm()
            assert error.item() == pytest.approx(s[k:].norm().item(), rel=1e-3, abs=1e-5)  # Eckart-Young
    modules = {n: module for n, module in model.named_modules() if n in values}
    count = sum(sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in modules.values())
    assert numbers == pytest.approx(count / sum(m.weight.numel() for m in whole.modules() if isinstance(m, QLinear)))
    assert ranks > 0.5  # as what stays whole keeps all


def test_what_welore_made_trains_its_factors_and_norms_alone_resumes_and_exports(pretrained, shards, tmp_path):
    code, out, err = run("welore.py", f"--model={pretrained}", f"--out={tmp_path}/low", "--keep=0.6", "--least=0.7")
    assert code == 0 and "matrices became factors" in out, err
    args = ["train.py", f"--data_dir={shards}", "--encoding=bytes", "--block_size=32", "--batch_size=4", "--device=cpu",
            "--method=welore", "--learning_rate=0.01", "--warmup_iters=2", "--eval_interval=10", "--eval_iters=4",
            "--lr_decay_iters=20", f"--out_dir={tmp_path}/out"]
    one_line_error(run(*args, "--max_iters=1"), "welore.py", "init_from")
    start = hf.load(f"{tmp_path}/low", 16, torch.float32).state_dict()
    code, _, err = run(*args, f"--init_from={tmp_path}/low", "--max_iters=10")
    assert code == 0, err
    code, _, err = run(*args, "--init_from=resume", "--max_iters=20")
    assert code == 0, err
    log, (model, _) = read_log(tmp_path / "out"), load_model(f"{tmp_path}/out", "cpu")
    assert log[20, "val_loss"] < log[10, "val_loss"] < log[0, "val_loss"]
    for name, t in model.state_dict().items():
        assert torch.equal(t, start[name]) == (not name.endswith((".u", ".v", "norm.weight"))), name
    hf.save(model, f"{tmp_path}/hf", dtype=torch.float32)
    again, x = hf.load(f"{tmp_path}/hf", 16, torch.float32), tokens(2, 16, 257)[0]
    assert not again.config.ranks
    torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)
    one_line_error(run("welore.py", f"--model={tmp_path}/low", f"--out={tmp_path}/lower"), "compressed before")
    one_line_error(run("welore.py", f"--model={pretrained}", f"--out={tmp_path}/low"), "exists")
    one_line_error(run("welore.py", f"--model={pretrained}"), "--out=")
    with open(tmp_path / "low" / "config.json") as f:
        config = f.read()
    for right, wrong, word in (("blocks.0", "blocks.7", "blocks.7"), ("q_proj=", "q_proj=1", "expected"),
                               ("q_proj=", "q_proj=x", "config.json")):
        (tmp_path / "low" / "config.json").write_text(config.replace(right, wrong, 1))
        one_line_error(run(*args, f"--init_from={tmp_path}/low", "--max_iters=1"), word)
