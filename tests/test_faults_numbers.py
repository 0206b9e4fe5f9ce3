"""
Numbers at their ends, and matrices used in odd ways: a part of tests/test_faults.py.
    python -m pytest tests/test_faults_numbers.py
"""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint as checkpointed

import train
from configurator import configure, declarations
from kernels.moments import Moments
from kernels.subspace import frobenius, range_finder, similarity, singular_vectors
from methods import registry
from methods.fira import limit_growth_
from methods.muon import Momentum, orthogonal
from methods.natural_galore import NaturalGaLore
from methods.registry import METHODS, find
from model import LLaMA, QLinear, quantize_linears
from qgalore import ProjectedWeight, Projection, QGaLore
from quant import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from run.finite import first_not_finite
from run.ranges import OF_MODEL, OF_OPTIMIZER
from run.ranks import Ranks
from tests.common import Job, TINY_MODEL, run, settings, tiny, tokens

find("qgalore")  # METHODS has them all now


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


ONE_BLOCK = (
    "--n_layer=1 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=257 --block_size=32"
    " --device=cpu --dtype=float32"
).split()


def small_run(name, **changes):
    """(method, settings, model, optimizer) of one block; `changes` that the method reads."""
    method = find(name)
    values = {"rank": 16, "proj_gap": 2} | changes
    everyone = ("grad_clip", "gradient_accumulation_steps")
    flags = [f"--{key}={v}" for key, v in values.items() if key in (*method.reads, *everyone)]
    s = settings(f"--method={name}", *ONE_BLOCK, *flags)
    if name == "welore":
        s.low_rank = "blocks.0.attn.q_proj=8"
    torch.manual_seed(0)
    model, optimizer = method.build(s, "cpu", torch.float32)
    for p in model.parameters():
        if p.ndim == 2 and p.abs().max() == 0:  # one factor of two
            torch.nn.init.normal_(p, std=0.1)
    return method, s, model, optimizer


def spoil(model, what, value):
    """Put `value` into the next gradient of a matrix, of the embedding or of a norm.

    False if no such thing is trained."""

    def spoiled(gradient):
        if not pending:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[gradient.numel() // 2] = pending.pop()
        return gradient

    pending = [value]
    layers = [m for m in model.modules() if isinstance(m, QLinear) and m.hook is not None]
    if what == "matrix" and layers:
        hook = layers[0].hook
        layers[0].hook = lambda layer, x, dy: hook(layer, x, spoiled(dy))
        return True
    for name, p in model.named_parameters():
        is_embedding = name.startswith(("embed", "head"))
        of = {"matrix": p.ndim == 2 and not is_embedding, "embed": is_embedding,
              "norm": p.ndim == 1}
        if p.requires_grad and of[what]:
            p.register_hook(spoiled)
            return True
    return False


def train_step(method, s, model, optimizer, step):
    """One step; returns pop_stats()."""
    method.before_step(model, optimizer, s, step)
    parts = s.gradient_accumulation_steps
    for part in range(parts):
        optimizer.accumulating = part < parts - 1
        (model(*tokens(vocab=257, seed=2 * step + part)) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.pop_stats()


def trained_weights(model):
    """{name: a copy} of all that may move."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, QLinear) and module.hook is not None:
            weights[name] = module.float_weight().clone()
    return weights


@pytest.mark.parametrize("parts, clip", [(1, 0), (2, 1.0)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_skips_and_counts_a_bad_gradient(name, parts, clip):
    training = small_run(name, gradient_accumulation_steps=parts, grad_clip=clip)
    model = training[2]
    plan = {0: ("matrix", torch.inf), 3: ("matrix", torch.nan), 4: ("embed", -torch.inf),
            5: ("norm", torch.nan)}
    for step in range(7):
        bad = step in plan and spoil(model, *plan[step])
        before = trained_weights(model)
        stats = train_step(*training, step)
        assert stats["skipped"] == bad
        assert first_not_finite(model) is None and math.isfinite(stats["grad_norm"])
        if step > 1:  # all have a basis
            still = [n for n, w in trained_weights(model).items() if torch.equal(w, before[n])]
            assert len(still) <= bad  # the others step


@pytest.mark.parametrize("name", ["adamw", "qgalore"])
def test_skipped_since_the_last_log_survives_a_resume(name):
    _, _, model, optimizer = small_run(name)
    spoil(model, "norm", torch.inf)
    model(*tokens(vocab=257)).backward()
    optimizer.step()
    resumed = small_run(name)[3]
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.pop_stats()["skipped"] == 1  # which sets its own back, not the copy's
    assert resumed.pop_stats()["skipped"] == 1
    resumed.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != "skipped"})
    assert resumed.pop_stats()["skipped"] == 0  # a checkpoint of an older version


@pytest.mark.parametrize("name", ["adamw", "qgalore", "qmuon"])
def test_ranks_skip_a_bad_gradient_of_one_of_them_alike(tmp_path, name):
    def main():
        ranks = Ranks("cpu", {}, 30, micro_batches=2)
        method, s, model, optimizer = small_run(name)
        optimizer.ranks = ranks
        for step in range(4):
            if step == 2 and ranks.rank == 1:
                spoil(model, "matrix", torch.inf)
                spoil(model, "norm", torch.nan)
            stats = train_step(method, s, model, optimizer, step)
            assert stats["skipped"] == (2 if step == 2 else 0)
            ranks.check_identical(dict(model.state_dict()), f"at step {step}")
        assert first_not_finite(model) is None
        ranks.leave()

    for code, out, err in Job(tmp_path, main, main).wait():
        assert code == 0, err


def test_a_run_logs_what_it_skipped(shards, tmp_path, monkeypatch):
    build = registry.Method.build_model

    def with_an_inf(self, *args, **kwargs):
        model = build(self, *args, **kwargs)
        spoil(model, "norm", torch.inf)
        return model

    monkeypatch.setattr(registry.Method, "build_model", with_an_inf)
    args = [*TINY_MODEL, f"--data_dir={shards}", f"--out_dir={tmp_path}/run", "--method=adamw"]
    code, out, err = run("train.py", *args, "--max_iters=3", "--grad_clip=1")
    assert code == 0, err
    with open(f"{tmp_path}/run/log.jsonl") as f:
        lines = [line for line in map(json.loads, f) if "loss" in line]
    assert [line["skipped"] for line in lines] == [1, 0, 0]


# -----------------------------------------------------------------------------
# arithmetic


def adam_in_float64(gradients, kind, betas, eps):
    """Adam's directions for these gradients; with "factored" the second moment is rank one."""
    m = v = row = col = 0
    for age, g in enumerate(gradients, start=1):
        g = g.double()
        m = m * betas[0] + g * (1 - betas[0])
        v = v * betas[1] + g.square() * (1 - betas[1])
        row = row * betas[1] + g.square().mean(dim=1) * (1 - betas[1])
        col = col * betas[1] + g.square().mean(dim=0) * (1 - betas[1])
        second = torch.outer(row, col) / row.mean() if kind == "factored" else v
        yield m / (1 - betas[0] ** age) / ((second / (1 - betas[1] ** age)).sqrt() + eps)


def off(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


NORMS = [1e-6, 1e-3, 1.0, 1e3, 1e6]  # of a gradient


def some_gradients(norm, n=6, shape=(64, 256)):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        rows = torch.rand(shape[0], 1, generator=generator)
        g = torch.randn(shape, generator=generator) * rows
        yield g * (norm / g.norm())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind, most", [("factored", 0.04), ("8bit", 0.04), ("float32", 3e-7)])
def test_adam_is_float64s_at_any_norm(kind, most, norm):
    gradients = list(some_gradients(norm))
    moments = Moments(gradients[0].shape, kind)
    for g, exact in zip(gradients, adam_in_float64(gradients, kind, (0.9, 0.999), 1e-8)):
        moments.step_(g, (0.9, 0.999), 1e-8, key=1)
        assert off(g, exact) < most


@pytest.mark.parametrize("norm", NORMS)
def test_muons_and_firas_rules_are_float64s_at_any_norm(norm):
    state = {}
    in_float64 = {}
    momentum = Momentum((64, 256), "factored")
    m = 0
    for factor, g in zip((1, 3, 0.5, 9, 1, 1), some_gradients(norm)):
        g *= factor
        exact = g.double()
        assert off(orthogonal(g.clone(), True, 0.2), orthogonal(exact.clone(), True, 0.2)) < 3e-6
        grown = limit_growth_(in_float64, exact.clone())
        assert off(limit_growth_(state, g.clone()), grown) < 3e-6
        assert off(frobenius(g), exact.norm()) < 3e-6
        m = 0.9 * m + 0.1 * exact
        momentum.step_(g, 0.9, 0.0)
        assert off(g, m) < 0.2  # what 4 bits keep


@pytest.mark.parametrize("norm", NORMS)
def test_bases_and_codes_are_float64s_at_any_norm(norm):
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -3, 48)  # of the directions
    sketch = torch.randn(48, 48, generator=generator).mul_(strength)
    sketch = sketch @ torch.randn(48, 32, generator=generator)
    sketch *= norm / sketch.norm()
    exactly = partial(singular_vectors, rank=8, right=False)
    for find_basis in (partial(range_finder, rank=8), exactly):
        exact = find_basis(sketch.double())
        overlap = exact.T @ find_basis(sketch).double()
        assert similarity(overlap, 48).item() == pytest.approx(1, abs=1e-5)
    for quantize, dequantize, step in ((quantize_int8, dequantize_int8, 1 / 255),
                                       (quantize_int4, dequantize_int4, 1 / 15)):
        rows = sketch.amax(dim=1, keepdim=True) - sketch.amin(dim=1, keepdim=True)
        error = (dequantize(*quantize(sketch)) - sketch).abs() / rows
        assert error.max() < 0.501 * step


@pytest.mark.parametrize("norm", [1e-20, *NORMS, 1e15])
@pytest.mark.parametrize("alike", [1.0, 0.02, 0.0])
def test_natural_galore_is_float64s_at_any_norm(norm, alike):
    """alike: how far each gradient is from the first, as a part of it; 0: equal gradients."""
    torch.manual_seed(0)
    layer = QLinear(16, 24, bits=16)
    weight = QGaLore(layer, rank=8, weight=NaturalGaLore, proj_bits=16).weights[0]
    weight.projection.basis = weight.empty_basis()
    seen = []
    weight.adam_ = seen.append  # what would go on to Adam
    first = torch.randn(8, 24)
    history = []
    for _ in range(22):
        g = first + alike * torch.randn(8, 24)
        g *= norm / g.norm()
        weight.direction(g.clone())
        history = [*history, g.bfloat16().double().flatten()][-20:]
        h = torch.stack(history)
        if alike:  # H^T (H H^T + lambda)^-1 e, by singular values
            u, s, vh = torch.linalg.svd(h, full_matrices=False)
            exact = vh.T @ (s / (s * s + 1e-3) * u[-1])
        else:
            exact = h[-1] / (len(h) * h[-1].square().sum() + 1e-3)
        assert off(seen[-1].flatten(), exact) < 2e-4


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-6, 1e6, 1e20, 1e30])
@pytest.mark.parametrize("name", ["adamw", "qgalore", "qmuon", "fira", "apollo", "loqt",
                                  "natural_galore"])
def test_a_loss_of_any_size_leaves_finite_weights(name, factor):
    method, s, model, optimizer = small_run(name)
    for step in range(4):
        scale = factor if step % 3 else 1.0
        (scale * model(*tokens(vocab=257, seed=step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(optimizer.pop_stats()["grad_norm"])
        assert first_not_finite(model) is None


# for each method the settings that it reads, at other values than their defaults
NOT_DEFAULT = {
    "rank": 24, "proj_gap": 2, "gap_growth": 1.5, "proj_threshold": -1.0, "proj_k": 1,
    "proj_bits": 8, "proj_side": "left", "proj_svd": True, "galore_scale": 0.5,
    "moments": "float32", "accumulation": "bfloat16", "stochastic_rounding": False,
    "matmul": "int8", "lora_alpha": 8.0,
}
# and all other settings, in a few runs that together take every choice
OTHER_RUNS = [
    "--method=qgalore --weight_bits=8 --proj_bits=4 --proj_side=auto --moments=8bit"
    " --accumulation=int8 --by_block=True --device=auto --checkpoint_activations=True"
    " --checkpoint_bits=8"
    " --freeze_embedding=True --embed_bits=8 --weight_group_size=32 --max_minutes=9 --rank=8"
    " --tie_embedding=True --sample_tokens=3 --keep_checkpoints=3 --seed=5 --log_interval=2",
    "--method=qgalore --weight_bits=16 --proj_bits=8 --proj_side=left --moments=float32 --rank=8"
    " --accumulation=bfloat16 --matmul=float --dtype=bfloat16 --checkpoint_activations=True"
    " --checkpoint_bits=16 --embed_bits=16 --n_kv_head=1 --rope_theta=500 --decay_lr=False"
    " --beta1=0 --beta2=0.5 --adam_eps=1e-6 --grad_clip=1 --rank_timeout=9 --eval_iters=1"
    " --threads=1",
    "--method=qgalore --weight_bits=0 --proj_bits=16 --proj_side=right --moments=factored --rank=8"
    " --accumulation=float32 --dtype=auto --learning_rate=0.02 --min_lr=0.01 --lr_decay_iters=2"
    " --proj_gap=1 --proj_svd=True --project=x --encoding=bytes --weight_decay=0.1",
    "--method=lora --weight_bits=4 --rank=8 --eval_interval=1 --batch_size=1 --block_size=1",
    "--method=adamw --weight_bits=32 --dtype=bfloat16 --compile=False --data_input=docs",
    "--method=qmuon --dtype=float16 --eval_iters=1",
    "--method=adam8bit --weight_bits=16 --init_from=resume --out_dir={out}/adam8bit",
    "--method=adamw --init_from=resume --eval_only=True --out_dir={out}/adamw",
]
# cuda: a CPU has none. W&B asks for an account. DPO has pairs, in tests/test_dpo.py
NOT_TRIED = {("device", "cuda"), "wandb_log", "tensorboard_log", "dpo_beta"}


def test_every_setting_and_every_choice_runs(shards, tmp_path):
    runs = []
    for name, method in METHODS.items():
        if name == "welore":  # it takes a compressed checkpoint: tests/test_sisters.py
            continue
        values = {key: NOT_DEFAULT[key] for key in method.reads}
        if values.get("matmul") == "int8" and 8 in method.weight_bits:
            values |= {"weight_bits": 8, "weight_group_size": 0}
        values["grad_clip"] = 0.5
        runs.append([f"--{key}={value}" for key, value in values.items()])
        runs[-1] += [f"--method={name}", f"--out_dir={tmp_path}/{name}"]
    others = []
    for i, text in enumerate(OTHER_RUNS):
        others.append([f"--out_dir={tmp_path}/{i}", *text.replace("{out}", str(tmp_path)).split()])
    runs += others
    common = [*TINY_MODEL, f"--data_dir={shards}", "--max_iters=3", "--n_layer=1",
              "--gradient_accumulation_steps=2"]

    def main():
        fits = train.fits
        for flags in runs:
            print(*flags)
            s = configure(train, argv=[*common, *flags])
            # a plan takes longer than the run
            train.fits = fits if flags in others or s.method == "qmuon" else lambda *args: None
            train.main(s.changed(dry_run=True, gradient_accumulation_steps=1))
            train.fits = lambda *args: None
            train.main(s)

    ((code, out, err),) = Job(tmp_path / "job", main, size=0).wait()
    assert code == 0, out.splitlines()[-1] + err
    # all were taken
    tried = {"dry_run"}
    for flag in [*common, *sum(runs, [])]:
        name, _, value = flag[2:].partition("=")
        tried |= {name, (name, value)}
    for name, setting in declarations(train).items():
        words = str(setting.allowed)
        choices = words[len("one of "):].split(", ") if words.startswith("one of ") else []
        for wanted in (name, *((name, choice) for choice in choices)):
            assert wanted in tried or wanted in NOT_TRIED, wanted


@pytest.mark.parametrize("flag", [
    "grad_clip=-1", "learning_rate=-1", "learning_rate=1e999", "learning_rate=101", "beta1=1.0",
    "beta2=1", "beta1=-0.1", "adam_eps=0", "adam_eps=1e-30", "rope_theta=0", "rope_theta=nan",
    "rope_theta=-1", "n_layer=1000000000000", "n_layer=0", "n_embd=1000000000", "n_embd=63",
    "n_kv_head=3", "galore_scale=0", "galore_scale=-1", "proj_threshold=nan", "lora_alpha=0",
    "seed=-1", f"seed={2**70}", "max_minutes=-1", "min_lr=1", "weight_decay=1000",
    "weight_decay=-1", "log_interval=0", "eval_iters=0", "block_size=0", "batch_size=0",
    "block_size=1000000000",
    "weight_group_size=3", "proj_gap=0", "proj_k=0", f"proj_k={10**12}", "gap_growth=1e9",
    "rank=0", f"rank={10**12}", "gradient_accumulation_steps=0", "keep_checkpoints=0",
    "rank_timeout=1e300", "moments=reset",
])
def test_a_value_beyond_its_end_is_one_line(flag):
    name = flag.partition("=")[0]
    method = next(m for m in METHODS.values() if name in m.reads or m.name == "qgalore")
    with pytest.raises((SystemExit, ValueError), match=name) as e:  # which train.py makes a line
        s = settings(f"--method={method.name}", f"--{flag}")
        method.build(s, "meta", torch.float32)
    assert "\n" not in str(e.value) and len(str(e.value)) < 250


@pytest.mark.parametrize("flags", [
    "--block_size=1 --batch_size=1", "--weight_group_size=1", "--rank=1048576", "--rank=1",
    "--beta1=0 --beta2=0", "--beta1=0.9999999999999999", "--adam_eps=1e300", "--grad_clip=1e300",
    "--learning_rate=0", "--learning_rate=100", "--weight_decay=100", "--galore_scale=1e6",
    "--proj_threshold=-1e300", "--gap_growth=10", "--min_lr=0.01", "--max_minutes=1e300",
    "--warmup_iters=2 --lr_decay_iters=1", "--warmup_iters=1000", f"--seed={2**63 - 1}",
    "--n_embd=2 --n_head=1 --ffn_dim=1", "--rope_theta=1", "--rope_theta=1e15",
])
def test_a_value_at_its_end_trains(flags):
    s = settings("--method=qgalore", *ONE_BLOCK, "--proj_gap=1", "--batch_size=2", *flags.split())
    torch.manual_seed(s.seed)
    method = find("qgalore")
    model, optimizer = method.build(s, "cpu", torch.float32)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate_at(step, s, method)
        x, y = tokens(s.batch_size, s.block_size, 257, seed=step)
        loss = model(x, y)
        loss.backward()
        assert loss.isfinite() and first_not_finite(model) is None


def test_limits_in_python_are_those_of_the_settings():
    words = {name: str(setting.allowed) for name, setting in declarations(train).items()}
    of_settings = {"lr": "learning_rate", "eps": "adam_eps", "gap": "proj_gap",
                   "scale": "galore_scale", "k": "proj_k", "side": "proj_side"}
    for name, allowed in (OF_MODEL | OF_OPTIMIZER).items():
        setting = of_settings.get(name, name)
        if setting in words:
            assert str(allowed).removeprefix("a whole number ") == words[setting], name


@pytest.mark.parametrize("wrong", [
    {"lr": -1.0}, {"lr": math.inf}, {"lr": math.nan}, {"betas": (1.0, 0.9)}, {"eps": 0.0},
    {"weight_decay": -0.1}, {"weight_decay": 1000.0}, {"rank": 0}, {"rank": 2.5}, {"rank": "8"},
    {"gap": 0}, {"k": 0}, {"scale": 0.0}, {"scale": -1.0}, {"grad_clip": -1.0}, {"grad_clip": None},
    {"gap_growth": -1},
])
def test_the_optimizer_refuses_a_value_by_its_name(wrong):
    ((name, value),) = wrong.items()
    name = "beta1" if name == "betas" else name
    layer = QLinear(8, 8)
    with pytest.raises(ValueError, match=f"^{name} must be "):
        QGaLore(layer, **wrong)
    assert layer.hook is None


@pytest.mark.parametrize("wrong", [
    {"activation": "relu"}, {"activation": "gelu_exact"}, {"n_head": 0}, {"n_layer": 10**12},
    {"n_layer": 2.0}, {"n_embd": 10**9}, {"rope_theta": 0}, {"rope_theta": math.nan},
    {"norm_eps": 0.0}, {"checkpoint_bits": 4}, {"block_size": -1}, {"n_kv_head": -2},
    {"vocab_size": None},
])
def test_a_configuration_refuses_a_value_by_its_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must be "):
        tiny(**wrong)


# -----------------------------------------------------------------------------
# QGaLore in a loop of one's own


def test_a_gradient_of_other_things_trains_nothing():
    torch.manual_seed(0)
    layer = QLinear(24, 24)
    optimizer = QGaLore(layer, rank=24)  # with a basis from the start
    x = torch.randn(4, 24, requires_grad=True)
    before = layer.q.clone()
    loss = layer(layer(x).tanh()).square().sum()
    (of_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(layer.q, before) and optimizer.weights[0].step == -1
    loss.backward()  # the whole gradient of both uses, once
    assert torch.equal(x.grad, of_x) and not torch.equal(layer.q, before)
    assert optimizer.weights[0].step == 0 and optimizer.weights[0].ended


@pytest.mark.parametrize("outer", [False, True])
def test_reentrant_checkpoints_that_share_a_layer_are_refused(outer):
    """outer: one use in a checkpoint, and one outside of it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(QLinear(24, 24))
    layer = model[0]
    optimizer = QGaLore(model, rank=24)
    x = torch.randn(4, 24, requires_grad=True)

    def loss():
        y = checkpointed(layer, x, use_reentrant=True).tanh()
        y = layer(y) if outer else checkpointed(layer, y, use_reentrant=True)
        return y.square().sum()

    with pytest.raises(RuntimeError, match="^0 has moved.*use_reentrant"):
        loss().backward()
    optimizer.zero_grad()
    optimizer.accumulating = True
    loss().backward()
    optimizer.step()
    assert optimizer.weights[0].ended


def test_what_qgalore_does_not_train_is_refused():
    optimizer = QGaLore(LLaMA(tiny()), rank=8)
    with pytest.raises(ValueError, match="make a new one"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("other", [
    lambda: QGaLore(LLaMA(tiny(n_layer=1)), rank=8),
    lambda: QGaLore(LLaMA(tiny(n_layer=3)), rank=8),
    lambda: QGaLore(LLaMA(tiny()), rank=4),
    lambda: torch.optim.AdamW(LLaMA(tiny()).parameters()),
])
def test_a_state_of_another_model_is_refused(other):
    optimizer = QGaLore(LLaMA(tiny()), rank=8)
    with pytest.raises(ValueError, match="of another model or rank: "):
        optimizer.load_state_dict(other().state_dict())


class Descent(ProjectedWeight):
    """Plain descent in the subspace, which keeps nothing."""

    def new_moments(self, shape):
        return SimpleNamespace()

    def direction(self, gradient):
        return self.projection.matrix(self.dtype), gradient


def test_a_method_that_keeps_nothing_resumes():
    def made():
        torch.manual_seed(0)
        model = LLaMA(tiny())
        return model, QGaLore(model, rank=8, weight=Descent)

    def step(model, seed):
        model(*tokens(seed=seed)).backward()

    model, optimizer = made()
    step(model, 0)
    step(model, 1)
    again, resumed = made()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    step(model, 2)
    step(again, 2)
    for name, t in model.state_dict().items():
        assert torch.equal(t, again.state_dict()[name]), name


@pytest.mark.parametrize("parts", [1, 2])
def test_sparse_gradients_of_an_embedding_train_as_dense_ones(parts):
    states = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 24, sparse=sparse)
        linear = QLinear(24, 24, bits=16)
        model = torch.nn.Sequential(embedding, linear, torch.nn.Linear(24, 10))
        optimizer = QGaLore(model, rank=24, proj_bits=16, moments="float32", eps=1e-5)
        for i in range(4 * parts):
            optimizer.accumulating = i % parts < parts - 1
            model(torch.tensor([i % 10, 3, 3])).square().sum().backward()
        states.append(model.state_dict())
    for name, t in states[0].items():  # sums of equal tokens are taken in another order
        torch.testing.assert_close(states[1][name], t, atol=1e-5, rtol=1e-4)


def test_gap_growth_stays_where_a_gap_doubles():
    projection = Projection(24, 16, rank=4, gap=10, threshold=-1.0, k=1, growth=2.0)
    gaps = []
    for _ in range(4):
        step = projection.next_refresh
        assert projection.due(step)  # which takes the last similarity in
        projection.refresh(torch.randn(16, 16), step)
        projection._settle()
        gaps.append(projection.next_refresh - step)
    assert gaps == [10 + 1, 20 + 2, 40 + 4, 80 + 8]


def test_the_first_sketch_is_narrow_later_ones_are_the_gradient():
    for out, side in ((16, "auto"), (128, "auto"), (4, "right")):
        projection = Projection(out, 16, rank=8, side=side)
        x, dy = torch.randn(5, 16), torch.randn(5, out)
        left, right = projection.sketch(x, dy, key=1)
        assert right.shape[1] == 8
        projection.refresh(left.T @ right, 0)
        left, right = projection.sketch(x, dy, key=1)
        torch.testing.assert_close(left.T @ right, x.T @ dy)
        projection.refresh(left.T @ right, 1)
        assert projection.matrix().shape == (16, 8)


def gradients_hard_to_decompose(rows=48, cols=60):
    """{name: gradient}: of few directions, or of sizes that overflow when squared."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(rows, cols, generator=generator)
    thin = torch.randn(rows, 3, generator=generator) @ torch.randn(3, cols, generator=generator)
    falling = full * torch.logspace(0, -12, rows)[:, None]
    one_row = torch.zeros(rows, cols)
    one_row[5] = full[5]
    return {"full": full, "three directions": thin, "falling": falling, "one row": one_row,
            "huge": 1e37 * thin, "tiny": 1e-37 * thin, "one direction": full[:1].expand(rows, -1),
            "narrow": full[:, :4], "columns of zeros": full * (torch.arange(cols) < 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_gradient_gives_an_orthonormal_basis(dtype):
    for name, gradient in gradients_hard_to_decompose().items():
        gradient = gradient.to(dtype)
        exact = gradient.double() / gradient.double().abs().max()
        best = torch.linalg.svdvals(exact)[:16].square().sum()
        for first in (False, True):  # from a sketch of 16 columns
            sketch = exact.to(dtype)
            if first:
                sketch = sketch @ torch.randn(sketch.shape[1], 16).to(dtype)
            p = range_finder(sketch, rank=16).double()
            torch.testing.assert_close(p.T @ p, torch.eye(16).double(), rtol=0, atol=1e-3, msg=name)
            if not first:
                assert (p.T @ exact).square().sum() > 0.95 * best, name


def test_tiny_and_huge_gradients_have_the_basis_of_others():
    gradient = torch.randn(48, 60, generator=torch.Generator().manual_seed(0))
    p = range_finder(gradient.clone(), rank=8)
    for factor in (2.0**-120, 2.0**120):
        assert torch.equal(range_finder(gradient * factor, rank=8), p)


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("svd", [False, True])
def test_a_gradient_that_tells_nothing_leaves_the_basis(bad, svd):
    projection = Projection(60, 48, rank=8, gap=10, svd=svd)
    projection.refresh(torch.full((48, 8), bad), 0)
    assert projection.basis is None and projection.refreshes == 0
    projection.refresh(torch.randn(48, 8 if not svd else 60), 1)
    before = [t.clone() for t in projection.basis]
    gradient = torch.randn(48, 60)
    gradient[3] = bad
    projection.refresh(gradient * 0 if bad == 0 else gradient, 11)
    assert all(torch.equal(old, new) for old, new in zip(before, projection.basis))
    projection._settle()
    assert not projection.history and projection.refreshes == 2


def test_a_weight_of_two_places_is_not_parted():
    tied = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    twice = torch.nn.Linear(8, 8)
    for model in (tied, torch.nn.Sequential(twice, torch.nn.ReLU(), twice)):
        before = list(model.modules())
        with pytest.raises(ValueError, match="0's weight has another place"):
            quantize_linears(model)
        assert list(model.modules()) == before


@pytest.mark.parametrize("matmul", ["float", "int8"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (0, 8)])
def test_an_input_of_any_number_of_dimensions(shape, matmul):
    layer = QLinear(8, 4, group_size=8, matmul=matmul)
    seen = []
    layer.hook = lambda layer, x, dy: seen.append((tuple(x.shape), tuple(dy.shape)))
    x = torch.ones(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    y.sum().backward()
    assert x.grad.shape == shape
    rows = math.prod(shape[:-1])
    assert seen == [((rows, 8), (rows, 4))]
