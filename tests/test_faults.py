"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults.py

tests/torture.py kills, fills and damages at random, for as long as it is told.
"""

import glob
import json
import math
import os
import resource
import shutil
import signal
import sys
import zipfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from configurator import configure
from kernels.moments import Moments
from kernels.subspace import frobenius, range_finder, similarity, singular_vectors
from methods import registry
from methods.fira import limit_growth_
from methods.muon import Momentum, orthogonal_
from methods.natural_galore import NaturalGaLore
from methods.registry import METHODS, find
from model import LLaMA, QLinear
from qgalore import QGaLore
from quant import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from run import folder as run_folder
from run.checkpoint import Damaged, load_checkpoint, read_checkpoint
from run.device import choose_threads
from run.finite import first_not_finite
from run.folder import Folder
from run.machine import free_memory, usable_cores
from run.ranks import Ranks
from run.show import Shown
from run.stop import SIGNALS, Stop
from tests.common import (Job, TINY_MODEL, TINY_RUN, one_line_error, read_log, run, settings, tiny,
                          tokens)

find("qgalore")  # METHODS has them all now

# -----------------------------------------------------------------------------
# runs that are lost


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run of 4 steps with checkpoints of steps 2 and 4, and the arguments that made it."""
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    args = [f"--data_dir={shards}", *TINY_RUN, "--max_iters=4", "--eval_interval=2"]
    code, out, err = run("train.py", f"--out_dir={out_dir}", *args)
    assert code == 0, err
    return out_dir, args


@pytest.fixture
def copy(trained, tmp_path):
    """The same, for this test to change: (out_dir, arguments)."""
    shutil.copytree(trained[0], tmp_path / "out")
    return tmp_path / "out", [f"--out_dir={tmp_path}/out", *trained[1]]


def contents(folder):
    """{path within: what is in it} of a folder's files."""
    found = {}
    for path in glob.glob("**", root_dir=folder, recursive=True):
        if os.path.isfile(f"{folder}/{path}"):
            with open(f"{folder}/{path}", "rb") as f:
                found[path] = f.read()
    return found


def change_checkpoint(path, change):
    """Write a checkpoint anew after change(checkpoint)."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_every_start_from_scratch_keeps_the_runs_before(copy):
    out_dir, args = copy
    first = contents(out_dir)
    code, out, err = run("train.py", *args, "--seed=2")
    assert code == 0 and f"set aside in {out_dir}/earlier-1" in out, err
    second = contents(out_dir)
    assert {name: second[f"earlier-1/{name}"] for name in first} == first
    assert run("train.py", *args, "--seed=3")[0] == 0
    third = contents(out_dir)
    for name in first:
        assert third[f"earlier-1/{name}"] == first[name]
        assert third[f"earlier-2/{name}"] == second[name]
    assert third["ckpt.pt"] != second["ckpt.pt"] != first["ckpt.pt"]
    assert set(os.listdir(out_dir)) == {*first, "earlier-1", "earlier-2"}
    # and what was set aside is a run that goes on
    code, out, err = run("train.py", f"--out_dir={out_dir}/earlier-1", "--init_from=resume",
                         "--max_iters=5")
    assert code == 0 and "goes on at step 4 of 5" in out, err


def test_a_start_that_fails_changes_nothing(copy):
    out_dir, args = copy
    before = contents(out_dir)

    def no_wandb():
        sys.modules["wandb"] = None  # as where it is not installed

    for more in (["--wandb_log=True"], ["--data_dir=nowhere"], ["--n_head=7"]):
        one_line_error(run("train.py", *args, *more, before=no_wandb))
    resumed = run("train.py", *args, "--wandb_log=True", "--init_from=resume", before=no_wandb)
    one_line_error(resumed, "pip install wandb")
    assert {name: contents(out_dir)[name] for name in before} == before
    assert not glob.glob(f"{out_dir}/earlier*")


def test_a_start_that_ends_early_leaves_both_logs(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    before = contents(tmp_path / "out")
    for start in range(3):  # each ends before its first checkpoint
        with Folder(f"{tmp_path}/out") as folder:
            folder.begin(goes_on=False)
            with open(f"{folder.now}/log.jsonl", "w") as f:
                f.write(f"start {start}")
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert [after[f"{name}/log.jsonl"] for name in ("earlier-1", "earlier-2", "starting")] == [
        b"start 0", b"start 1", b"start 2"]


@pytest.mark.parametrize("moves", range(9))
def test_a_kill_while_a_run_takes_its_place_loses_nothing(trained, tmp_path, monkeypatch, moves):
    out_dir = str(tmp_path / "out")
    shutil.copytree(trained[0], out_dir)
    earlier = contents(out_dir)
    with Folder(out_dir) as folder:
        folder.begin(goes_on=False)
        for name in ("ckpt.pt", "log.jsonl", "config.json"):
            with open(f"{folder.now}/{name}", "w") as f:
                f.write(f"new {name}")

        class Killed(BaseException):
            pass

        def rename(a, b, rename=os.rename):
            nonlocal moves
            moves -= 1
            if moves < 0:
                raise Killed
            rename(a, b)

        monkeypatch.setattr(run_folder.os, "rename", rename)
        with pytest.raises(Killed):
            folder.take_place()
            raise Killed
        monkeypatch.undo()
    with Folder(out_dir) as folder:
        folder.hold()  # the next start ends what was begun
    after = contents(out_dir)
    for name in ("ckpt.pt", "log.jsonl", "config.json"):
        assert after.pop(name) == f"new {name}".encode()
    assert sorted(after.values()) == sorted(earlier.values())
    assert not os.path.exists(f"{out_dir}/starting")


def test_one_process_trains_in_a_folder(copy):
    out_dir, args = copy
    with Folder(str(out_dir)) as folder:
        folder.hold()
        before = contents(out_dir)
        for more in ([], ["--init_from=resume"], ["--init_from=auto"]):
            refused = run("train.py", *args, *more)
            one_line_error(refused, f"process {os.getpid()} on ", "trains there now")
        # others may read, and write nothing
        code, out, err = run("train.py", *args, "--eval_only=True", "--init_from=resume")
        assert code == 0 and "--- resume: val loss " in out, err
        assert contents(out_dir) == before
    assert not os.path.exists(out_dir / "lock")


def test_an_evaluation_alone_is_of_the_run_that_is_there(copy):
    out_dir, args = copy
    before = contents(out_dir)
    code, out, err = run("train.py", *args, "--eval_only=True")
    assert code == 0, err
    assert f"--- resume: val loss {read_log(out_dir)[4, 'val_loss']:.4f}" in out
    assert contents(out_dir) == before


def test_auto_starts_a_run_or_goes_on_with_it(shards, tmp_path):
    args = [f"--out_dir={tmp_path}", f"--data_dir={shards}", *TINY_RUN, "--init_from=auto"]
    for steps in (2, 4):
        code, out, err = run("train.py", *args, f"--max_iters={steps}", "--decay_lr=False")
        assert code == 0 and ("goes on at step 2" in out) == (steps == 4), err
    assert set(os.listdir(tmp_path)) == {"ckpt.pt", "ckpt-1.pt", "log.jsonl", "config.json",
                                         "loss.png", "subspaces.png"}
    missing = run("train.py", *args[1:], f"--out_dir={tmp_path}/new", "--init_from=auto:nowhere/x")
    one_line_error(missing, "nowhere/x")


class FailingFile:
    """zipfile.ZipFile, where the disk or the memory fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, path):
        raise self.error


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   OSError(5, "Input/output error"), MemoryError()])
def test_a_failure_to_read_is_no_damage(copy, monkeypatch, error):
    out_dir, _ = copy
    before = contents(out_dir)
    monkeypatch.setattr(zipfile, "ZipFile", FailingFile(error))
    with pytest.raises(SystemExit, match=r"ckpt\.pt cannot be read") as e:
        load_checkpoint(str(out_dir))
    assert not isinstance(e.value, Damaged)
    assert contents(out_dir) == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_a_checkpoints_place(copy, make):
    out_dir, args = copy
    os.unlink(out_dir / "ckpt.pt")
    make(out_dir / "ckpt.pt")
    one_line_error(run("train.py", *args, "--init_from=resume"), "ckpt.pt cannot be read")
    assert os.path.exists(out_dir / "ckpt-1.pt") and not glob.glob(f"{out_dir}/damaged*")


def test_damaged_checkpoints_all_keep_their_names(copy):
    out_dir, args = copy
    for content in (b"one", b"two"):
        (out_dir / "ckpt.pt").write_bytes(content)
        code, out, err = run("train.py", *args, "--init_from=resume")
        assert code == 0 and "going back" in out, err
    assert (out_dir / "damaged_ckpt.pt").read_bytes() == b"one"
    assert (out_dir / "damaged_ckpt.pt-2").read_bytes() == b"two"


WRONG_PARTS = [("iter", -1), ("iter", True), ("iter", "4"), ("position", None), ("config", []),
               ("model", {1: 2}), ("model", {"embed.weight": 3}), ("optimizer", 7),
               ("optimizer", {}), ("model", {}), ("optimizer", {"trained": {}})]


@pytest.mark.parametrize("part,value", WRONG_PARTS)
def test_a_checkpoint_of_wrong_contents_is_one_line(copy, part, value):
    out_dir, args = copy
    change_checkpoint(out_dir / "ckpt.pt", lambda checkpoint: checkpoint.update({part: value}))
    before = contents(out_dir)
    one_line_error(run("train.py", *args, "--init_from=resume"), "ckpt.pt")
    assert contents(out_dir) == before


@pytest.mark.parametrize("shut", ["reader", "full", "closed"])
def test_a_run_outlives_its_terminal(shards, tmp_path, shut):
    def before():
        reader, writer = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY) if shut == "full" else writer
        for fd in (1, 2):
            os.dup2(full, fd)
        if shut == "closed":
            sys.stdout = sys.stderr = None  # which closes 1 and 2

    args = [f"--out_dir={tmp_path}", f"--data_dir={shards}", *TINY_RUN, "--max_iters=4"]
    code, _, _ = run("train.py", *args, "--eval_interval=2", "--sample_tokens=5", before=before)
    assert code == 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter"] == 4
    with open(tmp_path / "log.jsonl") as f:
        assert all(json.loads(line) for line in f)


def test_output_that_cannot_be_shown_is_dropped():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        shown = Shown(stream)
        for _ in range(3):
            assert shown.write("x" * 100_000) == 100_000
            shown.flush()


def test_schedulers_and_closed_terminals_stop_a_run_well():
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    try:
        for name in SIGNALS:
            stop = Stop(minutes=0, alone=True, began=0)
            os.kill(os.getpid(), getattr(signal, name))
            assert stop.asked() and stop.reason() == name
        # USR1 before TERM: the second does not end what the first asked for
        os.kill(os.getpid(), signal.SIGTERM)
        # nohup asks to go on
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = Stop(minutes=0, alone=True, began=0)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked()
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def poison(step):
    """Make a weight NaN after that step of the run that follows."""
    take_step = train.Run.step

    def poisoned(self, lr):
        loss = take_step(self, lr)
        if self.it == step:
            self.model.norm.weight.data[0] = torch.nan
        return loss

    train.Run.step = poisoned


def test_a_run_that_became_nan_stops_and_keeps_the_last(shards, tmp_path):
    args = [f"--out_dir={tmp_path}", f"--data_dir={shards}", *TINY_MODEL, "--method=adamw",
            "--max_iters=9", "--eval_interval=2"]
    lost = run("train.py", *args, before=lambda: poison(5))
    one_line_error(lost, "step 6", "is not finite", "ckpt.pt has step 4")
    checkpoint = read_checkpoint(str(tmp_path / "ckpt.pt"))
    assert checkpoint["iter"] == 4
    assert all(t.isfinite().all() for t in checkpoint["model"].values())
    with open(tmp_path / "log.jsonl") as f:
        assert "NaN" not in f.read()  # which JSON does not have


def test_a_model_of_nan_is_neither_evaluated_nor_sampled(copy):
    out_dir, args = copy

    def to_nan(checkpoint):
        checkpoint["model"]["norm.weight"][0] = torch.nan

    change_checkpoint(out_dir / "ckpt.pt", to_nan)
    for script, more in (("train.py", args + ["--eval_only=True"]),
                         ("sample.py", [f"--out_dir={out_dir}", "--device=cpu"])):
        one_line_error(run(script, *more), "is not finite")


def settled(out_dir, *args):
    """The settings of a run that resumes."""
    s = configure(train, argv=[f"--out_dir={out_dir}", "--init_from=resume", *args])
    with Folder(str(out_dir)) as folder:
        train.settle(s, folder)
    return s


def test_a_bare_resume_takes_all_from_the_checkpoint(trained, capsys):
    s = settled(trained[0])
    saved = torch.load(trained[0] / "ckpt.pt", weights_only=True)["config"]
    different = {name for name, value in s.as_dict().items() if saved[name] != value}
    assert different <= {"init_from", "out_dir"}
    assert "n_embd = 64" in capsys.readouterr().out


REFUSED = ["block_size=16", "seed=2", "rope_theta=500.0", "encoding=gpt2", "dtype=bfloat16",
           "proj_svd=True", "proj_gap=7", "n_layer=3", "method=adamw", "moments=8bit", "rank=8"]
TAKEN = ["batch_size=2", "gradient_accumulation_steps=2", "beta1=0.8",
         "accumulation=bfloat16", "weight_decay=0.1", "learning_rate=0.02", "proj_threshold=0.5"]


@pytest.mark.parametrize("flag", REFUSED)
def test_a_resume_that_would_be_another_run_is_refused(trained, flag):
    name, value = flag.split("=")
    with pytest.raises(SystemExit, match=f"was trained with {name} = ") as e:
        settled(trained[0], f"--{flag}")
    assert value in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("flag", TAKEN)
def test_a_change_at_a_resume_is_taken_and_said(trained, capsys, flag):
    name, value = flag.split("=")
    s = settled(trained[0], f"--{flag}")
    assert str(getattr(s, name)) == value
    assert f"note: {name} = " in capsys.readouterr().out


def test_adamw_takes_new_betas_at_a_resume(shards, tmp_path):
    args = [f"--out_dir={tmp_path}", f"--data_dir={shards}", *TINY_MODEL, "--method=adamw"]
    assert run("train.py", *args, "--max_iters=1")[0] == 0
    more = ["--init_from=resume", "--beta1=0.5", "--weight_decay=0.1", "--max_iters=2"]
    code, out, err = run("train.py", *args, *more)
    assert code == 0 and "note: beta1 = 0.5; the checkpoint was trained with 0.9" in out, err
    groups = torch.load(tmp_path / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"]
    assert groups[0]["betas"][0] == 0.5
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_other_shards_at_a_resume_are_read_from_the_start(copy, shards, tmp_path):
    out_dir, args = copy
    moved = shutil.copytree(shards, tmp_path / "moved")
    more = ["--init_from=resume", "--max_iters=5"]
    code, out, err = run("train.py", *args, f"--data_dir={moved}", *more)
    assert code == 0 and "reading begins anew" not in out, err
    assert torch.load(out_dir / "ckpt.pt", weights_only=True)["position"] == 5 * 4
    os.unlink(moved / "text_train_00001.bin")
    code, out, err = run("train.py", *args, f"--data_dir={moved}", *more, "--max_iters=6")
    assert code == 0 and "reading begins anew" in out, err
    assert torch.load(out_dir / "ckpt.pt", weights_only=True)["position"] == 4

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
    """(method, settings, model, optimizer) of one block, with the settings that the method reads."""
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
# data that is wrong

# -----------------------------------------------------------------------------
# records and texts

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
        assert off(orthogonal_(g.clone(), g.dtype), orthogonal_(exact.clone(), exact.dtype)) < 3e-6
        grown = limit_growth_(in_float64, exact.clone())
        assert off(limit_growth_(state, g.clone()), grown) < 3e-6
        assert off(frobenius(g), exact.norm()) < 3e-6
        m = 0.9 * m + 0.1 * exact
        momentum.step_(g, (0.9, 0.999), 0, key=1)
        assert off(g, m) < 0.04


@pytest.mark.parametrize("norm", NORMS)
def test_bases_and_codes_are_float64s_at_any_norm(norm):
    generator = torch.Generator().manual_seed(0)
    strength = torch.logspace(0, -3, 48)  # of the directions
    sketch = torch.randn(48, 48, generator=generator).mul_(strength)
    sketch = sketch @ torch.randn(48, 32, generator=generator)
    sketch *= norm / sketch.norm()
    for find_basis in (partial(range_finder, rank=8), partial(singular_vectors, rank=8, right=False)):
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

# -----------------------------------------------------------------------------
# files that are not trusted

# -----------------------------------------------------------------------------
# the plan, threads and pictures

DEMO = SimpleNamespace(n_embd=192, ffn_dim=528)
SMALL = SimpleNamespace(n_embd=512, ffn_dim=1376)


def system(root, **files):
    """A tree of the system's files below `root`: {path: text}."""
    for path, text in files.items():
        path = os.path.join(root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            f.write(text)
    return str(root)


@pytest.fixture
def torch_has(monkeypatch):
    """A function that lets torch begin with so many threads; returns what it is then set to."""

    def begin(threads, **environment):
        now = [threads]
        monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return now

    return begin


@pytest.mark.parametrize("shape,tokens,cores,expected", [
    (DEMO, 8 * 128, 16, 1),  # 0.2e9 operations
    (SMALL, 16 * 256, 2, 2),
    (SMALL, 16 * 256, 16, 5),  # 5.8e9
    (SMALL, 1, 16, 1),
])
def test_threads_are_by_the_models_size(torch_has, shape, tokens, cores, expected):
    now = torch_has(16)
    line = choose_threads(shape, tokens, cores=cores)
    assert now == [expected]
    assert line.startswith(f"threads: {expected} of {cores}")


def test_threads_that_a_user_sets_hold(torch_has):
    now = torch_has(4, OMP_NUM_THREADS="4")
    assert "OMP_NUM_THREADS" in choose_threads(DEMO, 1024, cores=8) and now == [4]
    assert "threads=3" in choose_threads(DEMO, 1024, threads=3, cores=8) and now == [3]
    now = torch_has(1)  # set before, by a caller: never more than that
    choose_threads(SMALL, 10**6, cores=8)
    assert now == [1]


@pytest.mark.parametrize("files,expected", [
    ({}, 8),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
      "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2),
    # a container's own group is at the top, whatever the machine calls it
    ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n2:memory:/\n",
      "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000",
      "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
    ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/x/cpu.max": "torn"}, 8),
])
def test_a_containers_quota_of_cores_is_seen(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores(system(tmp_path, **files)) == expected


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"}


@pytest.mark.parametrize("files,expected", [
    ({}, None),
    (MEMINFO, 800 * 1024),
    # the least up the tree; what files take gives way
    (MEMINFO | {"proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "50000\n",
                "sys/fs/cgroup/a/memory.current": "30000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 7\nactive_file 1000\ninactive_file 2000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.high": "40000\n",
                "sys/fs/cgroup/a/b/memory.current": "10000\n"}, 23000),
    (MEMINFO | {"proc/self/cgroup": "3:memory:/docker/1\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "50000\n",
                "sys/fs/cgroup/memory/memory.stat":
                    "active_file 1\ninactive_file 2\n"
                    "total_active_file 100\ntotal_inactive_file 200\n"}, 10300),
    (MEMINFO | {"proc/self/cgroup": "3:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n"}, 800 * 1024),
    # full to the brim
    (MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "100",
                "sys/fs/cgroup/memory.current": "101"}, 0),
])
def test_a_containers_limit_of_memory_is_seen(tmp_path, files, expected):
    assert free_memory(system(tmp_path, **files)) == expected


def test_a_limit_of_the_process_is_seen(tmp_path, monkeypatch):
    limits = {resource.RLIMIT_AS: 10**9, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], 10**12))
    page = resource.getpagesize()
    root = system(tmp_path, **{"proc/self/statm": "1000 90 9 9 0 500 0\n"})
    assert free_memory(root) == 10**9 - 1000 * page
    limits[resource.RLIMIT_DATA] = 10**7
    assert free_memory(root) == 10**7 - 500 * page

# -----------------------------------------------------------------------------
# what people type
