"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults.py

tests/torture.py kills, fills and damages at random, for as long as it is told.
"""

import base64
import collections
import copy
import glob
import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as checkpointed

import prepare_c4
import train
from bench.settings import train_settings
from configurator import configure, declarations
from finetune import chat, hf, hf_files, prepare_sft, welore
from finetune.paths import is_hub_name
from finetune.tokenizer import GPT2_SPLIT, LLAMA3_SPLIT, get_tokenizer
from kernels.moments import Moments
from kernels.subspace import frobenius, range_finder, similarity, singular_vectors
from methods import registry
from methods.fira import limit_growth_
from methods.muon import Momentum, orthogonal_
from methods.natural_galore import NaturalGaLore
from methods.registry import METHODS, find
from model import LLaMA, LLaMAConfig, QLinear
from prepare_c4 import check_made_of, prepare
from qgalore import Projection, QGaLore
from quant import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from run import data, folder as run_folder, manifest, memory, plot, records, show
from run.checkpoint import Damaged, load_checkpoint, load_model, read_checkpoint, starting_model
from run.data import Windows, open_windows
from run.device import choose_threads
from run.encodings import fingerprint, get_encoding
from run.finite import first_not_finite
from run.folder import Folder
from run.machine import free_memory, usable_cores
from run.manifest import Manifest
from run.ranges import OF_MODEL, OF_OPTIMIZER
from run.ranks import Ranks
from run.records import open_source
from run.shards import open_shard, part_of, shard_paths, write_shard
from run.show import Progress, Shown, last_words
from run.stop import SIGNALS, Stop
from tests.common import (HERE, Job, TINY_MODEL, TINY_RUN, one_line_error, read_log, run, script,
                          settings, tiny, tokens)

find("qgalore")  # METHODS has them all now


def refused(function, *args, **kwargs):
    """The one line with which it exits."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


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
def a_copy(trained, tmp_path):
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


def test_every_start_from_scratch_keeps_the_runs_before(a_copy):
    out_dir, args = a_copy
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


def test_a_start_that_fails_changes_nothing(a_copy):
    out_dir, args = a_copy
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


def test_one_process_trains_in_a_folder(a_copy):
    out_dir, args = a_copy
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


def test_an_evaluation_alone_is_of_the_run_that_is_there(a_copy):
    out_dir, args = a_copy
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
def test_a_failure_to_read_is_no_damage(a_copy, monkeypatch, error):
    out_dir, _ = a_copy
    before = contents(out_dir)
    monkeypatch.setattr(zipfile, "ZipFile", FailingFile(error))
    with pytest.raises(SystemExit, match=r"ckpt\.pt cannot be read") as e:
        load_checkpoint(str(out_dir))
    assert not isinstance(e.value, Damaged)
    assert contents(out_dir) == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_pipe_in_a_checkpoints_place(a_copy, make):
    out_dir, args = a_copy
    os.unlink(out_dir / "ckpt.pt")
    make(out_dir / "ckpt.pt")
    one_line_error(run("train.py", *args, "--init_from=resume"), "ckpt.pt cannot be read")
    assert os.path.exists(out_dir / "ckpt-1.pt") and not glob.glob(f"{out_dir}/damaged*")


def test_damaged_checkpoints_all_keep_their_names(a_copy):
    out_dir, args = a_copy
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
def test_a_checkpoint_of_wrong_contents_is_one_line(a_copy, part, value):
    out_dir, args = a_copy
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


def test_a_model_of_nan_is_neither_evaluated_nor_sampled(a_copy):
    out_dir, args = a_copy

    def to_nan(checkpoint):
        checkpoint["model"]["norm.weight"][0] = torch.nan

    change_checkpoint(out_dir / "ckpt.pt", to_nan)
    for name, more in (("train.py", args + ["--eval_only=True"]),
                         ("sample.py", [f"--out_dir={out_dir}", "--device=cpu"])):
        one_line_error(run(name, *more), "is not finite")


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


def test_other_shards_at_a_resume_are_read_from_the_start(a_copy, shards, tmp_path):
    out_dir, args = a_copy
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
# data that is wrong


def make(folder, pattern="*", **changes):
    """prepare() of texts in `folder`, into folder/out, by encoding "bytes"."""
    how = {"encoding": "bytes", "val_fraction": 0.25} | changes
    prepare(f"{folder}/{pattern}", f"{folder}/out", **how)


def write_texts(folder, **texts):
    """Files a/x.txt for a="...", so that all have the same name."""
    for name, text in texts.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "x.txt").write_text(text)


def all_texts(folder):
    """The texts in the shards of folder/out, each train part with its val part, sorted."""
    texts = []
    for path in shard_paths(f"{folder}/out", "train"):
        tokens = [*open_shard(path).tokens]
        val = path.replace("_train_", "_val_")
        if os.path.exists(val):
            tokens += [*open_shard(val).tokens]
        assert tokens.pop() == 256
        texts.append(bytes(tokens).decode())
    return sorted(texts)


def test_a_file_that_comes_later_takes_no_others_place(tmp_path, capsys):
    write_texts(tmp_path, b="text of b", d="text of d")
    make(tmp_path, "*/x.txt")
    before = {path: os.stat(path).st_mtime_ns for path in shard_paths(f"{tmp_path}/out", "train")}
    write_texts(tmp_path, a="text of a", c="text of c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of b", "text of c", "text of d"]
    assert all(os.stat(path).st_mtime_ns == time for path, time in before.items())
    assert capsys.readouterr().out.count("kept") == 4


def test_a_changed_file_is_read_again_and_that_is_said(tmp_path, capsys):
    write_texts(tmp_path, a="first text", b="other text")
    make(tmp_path, "*/x.txt")
    stat = os.stat(tmp_path / "a/x.txt")
    write_texts(tmp_path, a="fresh text")  # of the same length
    os.utime(tmp_path / "a/x.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["fresh text", "other text"]
    assert "made again" in capsys.readouterr().out


def test_a_moved_file_keeps_its_shard(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    os.rename(tmp_path / "a", tmp_path / "c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of b"]
    assert capsys.readouterr().out.count("kept") == 4


def test_a_removed_files_shards_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    os.unlink(tmp_path / "a/x.txt")
    assert "a/x.txt, of which it was made, is gone" in refused(make, tmp_path, "*/x.txt")
    write_texts(tmp_path, a="changed")
    assert "has changed" in refused(make, tmp_path, "b/x.txt")


def test_shards_of_other_files_are_told(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "a/x.txt")
    make(tmp_path, "b/x.txt")
    assert "2 more shards, of files that are not in this command" in capsys.readouterr().out
    assert all_texts(tmp_path) == ["text of a", "text of b"]


def test_other_settings_into_one_folder_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    assert "val_fraction=0.25, not 0.5" in refused(make, tmp_path, "a/x.txt", val_fraction=0.5)
    assert "val_fraction=0.25, not 0" in refused(make, tmp_path, "a/x.txt", val_fraction=0)
    assert all_texts(tmp_path) == ["text of a"]


def test_shards_of_an_unknown_maker_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "a/x.txt")
    os.unlink(tmp_path / "out/shards.json")
    for pattern in ("a/x.txt", "b/x.txt"):
        assert "shards.json does not say" in refused(make, tmp_path, pattern)
    shutil.rmtree(tmp_path / "out")
    os.mkdir(tmp_path / "out")
    write_shard(f"{tmp_path}/out/llmc_train.bin", np.arange(99), 0)
    assert "llmc_train.bin: shards.json does not say" in refused(make, tmp_path, "a/x.txt")


def test_a_stop_between_two_names_is_made_good(tmp_path, monkeypatch):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="fresh text of a")
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    replace = os.replace
    for stop in range(4):  # the manifest, two shards, the manifest
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "before", tmp_path / "out")
        calls = iter(range(9))

        def stops(old, new):
            if next(calls) >= stop:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path, "*/x.txt")
        make(tmp_path, "*/x.txt")
        assert all_texts(tmp_path) == ["fresh text of a", "text of b"]
        made = Manifest.read(f"{tmp_path}/out")
        assert all(map(made.is_finished, made.names())) and len(made.names()) == 4


def test_a_folder_that_is_half_made_again_is_not_trained_on(tmp_path, capsys):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    s = settings(f"--data_dir={tmp_path}/out", "--encoding=bytes", "--block_size=1")
    open_windows(s, "train", 0)
    made = Manifest.read(f"{tmp_path}/out")
    made.begin({"x_train_00000.bin": made.entry("x_train_00000.bin")})
    assert "x_train_00000.bin: is to be made again" in refused(open_windows, s, "train", 0)
    open_windows(s, "val", 0)
    (tmp_path / "out/shards.json").write_text("{")
    open_windows(s, "train", 0)
    assert "note: " in capsys.readouterr().out


def test_a_shard_that_was_replaced_is_made_again(tmp_path, capsys):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    number = fingerprint(get_encoding("bytes"))
    write_shard(f"{tmp_path}/out/x_train_00000.bin", np.arange(50), 257, fingerprint=number)
    make(tmp_path, "a/x.txt")
    assert all_texts(tmp_path) == ["text of a"]
    assert "is another file since" in capsys.readouterr().out


def test_files_that_change_places_keep_their_shards(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="text of b", b="text of a")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="text of c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of c"]


def test_a_manifest_is_no_text(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "text of x"}')
    for _ in range(2):
        prepare(f"{tmp_path}/*.json", str(tmp_path), "bytes", val_fraction=0)
    assert shard_paths(tmp_path, "train") == [f"{tmp_path}/x_train_00000.bin"]


def test_two_commands_in_one_folder_do_not_meet(tmp_path):
    write_texts(tmp_path, a="text of a")
    with manifest.alone_in(f"{tmp_path}/out"):
        assert "another process makes shards there" in refused(make, tmp_path, "a/x.txt")
    make(tmp_path, "a/x.txt")


def damaged_manifests(whole):
    yield b""
    yield b"{"
    yield b"\xff"
    yield b"[" * 100_000
    yield b"[]"
    yield b'{"format": 1, "shards": []}'
    for old, new in (
        (b'"format": 1', b'"format": 2'),
        (b"true", b"1"),
        (b'"path"', b'"pth"'),
        (b'"n_vocab"', b'"vocab"'),
        (b"x_train_00000.bin", b"../x_train_00000.bin"),
        (b'"finished": true', b'"finished": NaN'),
    ):
        assert old in whole
        yield whole.replace(old, new)


def test_a_damaged_manifest_is_one_line(tmp_path):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    path = tmp_path / "out/shards.json"
    for content in damaged_manifests(path.read_bytes()):
        path.write_bytes(content)
        assert "shards.json: " in refused(make, tmp_path, "a/x.txt")
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    assert "folder, where a file" in refused(make, tmp_path, "a/x.txt")


def test_a_file_that_is_no_shard_is_not_overwritten(tmp_path):
    write_texts(tmp_path, a="text of a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x_train_00000.bin").write_text("my own")
    assert "does not say of what" in refused(make, tmp_path, "a/x.txt")
    assert (tmp_path / "out/x_train_00000.bin").read_text() == "my own"


def test_shards_are_checked_against_data_input(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")

    def check(pattern, encoding="bytes"):
        out = f"{tmp_path}/out"
        return check_made_of(f"{tmp_path}/{pattern}", out, encoding, val_fraction=0.25)

    make(tmp_path, "a/x.txt")
    assert check("a/x.txt")
    assert not check("*/x.txt")  # the other is still to be made
    assert "out are not those of --data_input" in refused(check, "b/x.txt")
    write_texts(tmp_path, a="text of ä")
    assert "has changed" in refused(check, "a/x.txt")
    os.unlink(tmp_path / "out/shards.json")
    assert check("a/x.txt")
    assert "is not read" in capsys.readouterr().out


# -- tokenizers


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    number = fingerprint(get_encoding("bytes"))
    cases = [
        (dict(n_vocab=257, fingerprint=number), "bytes", ""),
        (dict(n_vocab=257, fingerprint=number), "gpt2", "another tokenizer"),
        (dict(n_vocab=257, fingerprint=0), "gpt2", "another tokenizer"),
        (dict(n_vocab=257, fingerprint=number + 1), "bytes", "another tokenizer"),
        (dict(n_vocab=50257, fingerprint=data.TIKTOKEN["gpt2"][1]), "gpt2", ""),
        (dict(n_vocab=50257, fingerprint=data.TIKTOKEN["gpt2"][1]), "bytes", "another tokenizer"),
        (dict(n_vocab=0), "bytes", ""),  # llm.c's do not tell
        (dict(n_vocab=0), "gpt2", ""),
    ]
    for shard, encoding, message in cases:
        s = settings(f"--data_dir={tmp_path}", f"--encoding={encoding}", "--block_size=8")
        write_shard(f"{tmp_path}/x_val_0.bin", np.arange(99), **shard)
        if message:
            assert message in refused(open_windows, s, "val", None)
        else:
            open_windows(s, "val", None).batch(1)


def test_a_token_beyond_the_runs_encoding_is_refused(tmp_path):
    write_shard(f"{tmp_path}/x_train_0.bin", np.arange(500), 0)
    s = settings(f"--data_dir={tmp_path}", "--encoding=bytes", "--block_size=8")
    assert "token 499 is beyond the 257" in refused(open_windows(s, "train", 0).batch, 1)


def test_shards_of_two_tokenizers_do_not_mix(tmp_path):
    write_shard(f"{tmp_path}/a_train_0.bin", np.arange(99), 0)
    write_shard(f"{tmp_path}/b_train_0.bin", np.arange(99), 300, fingerprint=5)
    write_shard(f"{tmp_path}/c_train_0.bin", np.arange(99), 300, fingerprint=6)
    assert "c_train_0.bin: was made with" in refused(Windows, f"{tmp_path}/*.bin", 8, 300)


def test_offline_what_is_known_of_a_tokenizer_is_checked(tmp_path, monkeypatch, capsys):
    write_shard(f"{tmp_path}/a_train_0.bin", np.arange(99), 0)
    write_shard(f"{tmp_path}/b_train_0.bin", np.arange(99), 100277, fingerprint=5)

    def offline(name):
        raise SystemExit("error: encoding cl100k_base: vocabulary not fetched (no route)")

    monkeypatch.setattr(data, "get_encoding", offline)
    s = settings(f"--data_dir={tmp_path}", "--encoding=cl100k_base", "--block_size=8")
    s.vocab_size = 100352
    assert open_windows(s, "train", 0).total == 24
    assert "not known for sure" in capsys.readouterr().out
    for shard in (dict(n_vocab=257), dict(n_vocab=100277, fingerprint=6)):
        write_shard(f"{tmp_path}/c_val_0.bin", np.arange(99), **shard)
        assert "c_val_0.bin: was made with" in refused(open_windows, s, "val", 0)
    s.encoding = "gtp2"
    assert "not fetched" in refused(open_windows, s, "train", 0)


def test_gpt2_is_known_without_its_vocabulary():
    try:
        encoding = get_encoding("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not here")
    assert data.TIKTOKEN["gpt2"] == (encoding.n_vocab, fingerprint(encoding))


# -- names and shards


@pytest.mark.parametrize(
    "name, part",
    [
        ("x_train_00000.bin", "train"),
        ("tiny_shakespeare_train.bin", "train"),
        ("tiny_shakespeare_val.bin", "val"),
        ("fineweb_val_000000.bin", "val"),
        ("x_val_train_00000.bin", "train"),
        ("x_train_val.bin", "val"),
        ("x_train_00000.bin.qgalore-7-0.tmp", None),
        ("._x_train_00000.bin", None),
        ("trainer_0.bin", None),
        ("x_trains_0.bin", None),
        ("shards.json", None),
    ],
)
def test_a_shards_name_tells_its_one_part(tmp_path, name, part):
    assert part_of(name) == part
    (tmp_path / name).write_bytes(b"")
    found = [len(shard_paths(tmp_path, kind)) for kind in ("train", "val")]
    assert found == [part == "train", part == "val"]


def test_a_folder_of_any_name_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in ("[v1] sh", "a*b?", "é $x #'\"", "sub/"):
        os.makedirs(folder, exist_ok=True)
        write_shard(os.path.join(folder, "x_train.bin"), np.arange(99), 257)
        for written in (folder, f"{tmp_path}/{folder}", f"~/{folder}"):
            s = settings(f"--data_dir={written}", "--encoding=bytes", "--block_size=8")
            assert open_windows(s, "train", 0).total == 12
        assert "_val_" in refused(open_windows, s, "val", 0)


def test_odd_data_dirs_and_shards_are_one_line(tmp_path):
    s = settings(f"--data_dir={tmp_path}/x_train_0.bin", "--encoding=bytes")
    assert "no shards" in refused(open_windows, s, "train", 0)
    (tmp_path / "x_train_0.bin").write_bytes(b"")
    assert "Not a directory" in refused(open_windows, s, "train", 0)
    s.data_dir = str(tmp_path)
    for i, odd in enumerate((os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere", path))):
        folder = f"{tmp_path}/{i}"
        os.mkdir(folder)
        odd(f"{folder}/x_train_0.bin")
        s.data_dir = folder
        assert "x_train_0.bin: " in refused(open_windows, s, "train", 0)


def test_a_shard_that_is_replaced_during_a_run_is_refused(tmp_path):
    for i in range(2):
        write_shard(f"{tmp_path}/x_train_{i}.bin", np.arange(33), 257)
    windows = Windows(f"{tmp_path}/*.bin", 8, 257)
    windows.batch(4)
    write_shard(f"{tmp_path}/x_train_1.bin", np.arange(17), 257)
    assert "x_train_1.bin: another file took its place" in refused(windows.batch, 4)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(
    "flags, message",
    [
        ([2, 0, 0, 0] * 3, "has no target"),
        ([3, 0, 0, 0] * 3, "has no target"),  # before its row's first token is nothing
        ([2, 1, 4, 0] * 3, "damaged: 4 is no flag"),
        ([2, 1, 1, 255] * 3, "damaged: 255"),
        ([2, 0, 0, 0] * 2 + [2, 0, 0, 1], ""),
    ],
)
def test_rows_without_a_target_are_refused(tmp_path, part, flags, message):
    write_shard(f"{tmp_path}/x_{part}_0.bin", np.arange(12), 257, flags, 4)
    s = settings(f"--data_dir={tmp_path}", "--encoding=bytes", "--block_size=3")
    if message:
        assert message in refused(open_windows, s, part, None)
    else:
        assert open_windows(s, part, None).total == 3


# -- memory, and where a text is cut


@pytest.fixture
def small_pieces(monkeypatch):
    """Sizes at which a short text is a long one."""
    monkeypatch.setattr(prepare_c4, "BLOCK", 64)
    monkeypatch.setattr(prepare_c4, "PIECE", 100)


WORDS = "the 's 'LL . ... -- 12345 ½ é नमस्ते क् 中文 。 字 мир العَرَبِيَّة ١٢ 👨‍👩‍👧 _ / "
WORDS += "a\u0301 \u200b"
SPACES = [" ", " ", "  ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", " \n"]
SPACES += ["\xa0", "\u3000", "\x85", ""]
O200K_SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'ll)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'ll)?",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
])


@pytest.fixture
def pairs():
    """The ids of a few tokens of several characters, beside those of the bytes."""
    tokens = ["\n\n", "\r\n", " \n", "\n ", "  ", "th", "the", " t", ".\n", "/\n", "\n/", "。"]
    ranks = {bytes([b]): b for b in range(256)}
    return ranks | {token.encode(): 256 + i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("split", [GPT2_SPLIT, LLAMA3_SPLIT, O200K_SPLIT])
def test_no_token_spans_a_cut_in_any_script(small_pieces, monkeypatch, tmp_path, split, pairs):
    enc = tiktoken.Encoding(
        "x", pat_str=split, mergeable_ranks=pairs, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: enc)
    rng = random.Random(0)
    text = "".join(rng.choice(WORDS.split(" ")) + rng.choice(SPACES) for _ in range(3000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": text}))
    make(tmp_path, "[xy].*", val_fraction=0)
    expected = [*enc.encode_ordinary(text), 300]
    shards = shard_paths(tmp_path / "out", "train")
    assert len(shards) == 2
    for path in shards:
        assert open_shard(path).tokens.tolist() == expected


@pytest.mark.parametrize("piece", ["a", "中", " ", "\n", ".", "привет мир\r\n\r\n", "слово "])
def test_a_text_of_any_kind_goes_in_small_blocks(small_pieces, piece, tmp_path):
    text = piece * (5000 // len(piece))
    (tmp_path / "x.txt").write_text(text, newline="")
    enc = get_encoding("bytes")
    made = collections.Counter()
    with open_source(f"{tmp_path}/x.txt") as stream:
        blocks = list(prepare_c4.text_blocks(stream, "x.txt", enc, made))
    assert b"".join(blocks).decode() == text
    assert max(len(block.decode()) for block in blocks) <= 64 + 100
    assert (made["cuts"] > 0) == (len(piece) == 1)


def test_a_tokenizer_that_marks_starts_gets_whole_texts(
    small_pieces, tmp_path, monkeypatch, capsys
):
    class Marks:
        name, n_vocab, eot_token, vocabulary, cuts_at_spaces = "marks", 999, 2, {}, False

        def encode_ordinary(self, text):
            return [1, *text.encode()]

    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: Marks())
    for name, size, starts in (("x", 90, 1), ("y", 290, 3)):
        (tmp_path / f"{name}.txt").write_text("word " * (size // 5))
        make(tmp_path, f"{name}.txt", val_fraction=0)
        tokens = open_shard(f"{tmp_path}/out/{name}_train_00000.bin").tokens.tolist()
        assert tokens.count(1) == starts
        assert f"cut at {starts - 1} places" in capsys.readouterr().out or starts == 1


def test_over_a_million_spaces_are_a_text(tmp_path, monkeypatch, pairs, capsys):
    enc = tiktoken.Encoding(
        "x", pat_str=GPT2_SPLIT, mergeable_ranks=pairs, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: enc)
    text = "a" + " " * 1_200_000 + "b"  # tiktoken gives up on a million
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
    make(tmp_path, "x.jsonl", val_fraction=0)
    tokens = open_shard(f"{tmp_path}/out/x_train_00000.bin").tokens
    assert enc.decode(tokens[:-1].tolist()) == text
    assert "cut at 2 places" in capsys.readouterr().out


def test_a_line_without_end_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "LONGEST", 1000)
    long = '{"text": "' + "a" * 5000 + '"}'
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as f:
        f.write("\n".join(['{"text": "one"}', long, '{"text": "two"}']))
    make(tmp_path, "x.jsonl.gz", val_fraction=0)
    assert open_shard(f"{tmp_path}/out/x_train_00000.bin").tokens.tolist() == [
        *b"one", 256, *b"two", 256
    ]
    assert "1 records left out: longer than" in capsys.readouterr().out


def test_a_header_counts_the_last_token_too(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "MOST_TOKENS", 10)
    (tmp_path / "x.txt").write_text("123456789")
    make(tmp_path, "x.txt", val_fraction=0)
    (tmp_path / "y.txt").write_text("1234567890")
    assert "more than 10 tokens" in refused(make, tmp_path, "y.txt", val_fraction=0)


@pytest.mark.parametrize(
    "content, message",
    [
        ("café".encode("latin-1"), "at byte 3: not UTF-8"),
        (b"a" * 99 + b"\xc3", "at byte 99: not UTF-8"),
        ("text".encode("utf-16-le"), "at byte 1: has NUL bytes"),
        (b"\xff\xfea", "not as its byte order mark says"),
        (b"", "no text"),
    ],
)
def test_a_text_that_is_not_utf8_is_refused(small_pieces, tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    assert message in refused(make, tmp_path)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_text_with_a_byte_order_mark_is_decoded(small_pieces, tmp_path, encoding):
    text = "слово и слово, 🙂 " * 50
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    (tmp_path / "y.jsonl").write_bytes(json.dumps({"text": text}).encode(encoding))
    make(tmp_path, val_fraction=0)
    assert all_texts(tmp_path) == [text, text]


def test_lists_and_tables_are_documents_too(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(40)]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"{i},text {i}\n" for i in range(40)))
    make(tmp_path, val_fraction=0)
    for name in "abc":
        tokens = open_shard(f"{tmp_path}/out/{name}_train_00000.bin").tokens
        assert (tokens == 256).sum() == 40


# -- what people type to prepare_c4.py


def test_odd_inputs_of_prepare_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.txt")
    os.mkfifo("pipe.txt")
    write_texts(tmp_path, a="text of a")
    for pattern, message in (
        ("folder.txt", "is a folder"),
        ("pipe.txt", "is no ordinary file"),
        ("none.txt", "no such file"),
        ("a/x.txt/y.txt", "no such file"),
    ):
        assert message in refused(prepare, pattern, "out", "bytes")
    assert "File exists" in refused(prepare, "a/x.txt", "a/x.txt", "bytes")
    assert "out_dir is empty" in refused(prepare, "a/x.txt", "", "bytes")
    assert shard_paths("out", "train") == []


def test_any_name_of_a_text_makes_shards_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ["a [1].txt", "it's $x #.txt", ".hidden.txt", "é_val_.TXT", "x" * 250 + ".txt"]
    for name in names:
        (tmp_path / name).write_text(f"text of {name[:20]}")
        prepare(f"~/{name}", "~/out", "bytes", val_fraction=0)
    assert all_texts(tmp_path) == sorted(f"text of {name[:20]}" for name in names)


def test_a_full_disk_leaves_no_shard_and_one_line(tmp_path):
    write_texts(tmp_path, a="text " * 5000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert "File too large" in refused(make, tmp_path, "a/x.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == []


def die(*args):
    os._exit(9)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "worth_processes", lambda jobs: True)
    monkeypatch.setattr(prepare_c4, "tokenize_text", die)
    write_texts(tmp_path, a="text of a")
    assert "was killed" in refused(make, tmp_path, "a/x.txt", workers=2)
    assert os.listdir(tmp_path / "out") == []


# -----------------------------------------------------------------------------
# records and texts

RECORDS = [{"text": f"{i} é — \U0001f642", "n": i} for i in range(40)]


def json_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


LAYOUTS = {  # how people write records
    "lines": json_lines(RECORDS),
    "list": json.dumps(RECORDS),
    "a record a line of a list": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "over several lines": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "one after the other": "\n".join(json.dumps(r, indent=1) for r in RECORDS),
    "with empty lines": "\r\n\n" + json_lines(RECORDS).replace("\n", "\r\n\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".JSONL", ".json.gz"])
def test_every_layout_of_records_gives_all_of_them(tmp_path, monkeypatch, layout, ending):
    monkeypatch.setattr(records, "BLOCK", 100)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        content = LAYOUTS[layout].encode(encoding)
        path = tmp_path / f"{encoding}{ending}"
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
        assert [record for _, record in records.records(str(path))] == RECORDS


def read(folder, name, content, columns=""):
    """[(where, record, or why it is none)] of a file, or the line that refuses it."""
    path = folder / name
    path.write_bytes(content)
    try:
        found = list(records.records(str(path), columns))
    except SystemExit as e:
        assert str(e).startswith(f"error: {path}: ") and "\n" not in str(e)
        return str(e)
    return [(where, str(r) if isinstance(r, ValueError) else r) for where, r in found]


CP1252 = "naïve, 5 €\n".encode("windows-1252")
NOT_TEXT = [  # content, and what is said
    (CP1252, "not UTF-8: convert it"),
    ("naïve, 5\n".encode("utf-16-le"), "NUL bytes: if it is UTF-16"),
    ("naïve, 5\n".encode("utf-16-be"), "NUL bytes: if it is UTF-16"),
    (b"text\0text", "NUL bytes"),
    ("é".encode()[:1], "not UTF-8"),
]


@pytest.mark.parametrize("content, why", NOT_TEXT)
def test_what_is_no_text_is_said_with_its_place(tmp_path, content, why):
    for kind in ("csv", "tsv"):
        answer = read(tmp_path, f"x.{kind}", b"a,b\n1,2\n" + content)
        assert "line 3: " in answer and why in answer
    line = json.dumps({"text": "good"}).encode() + b"\n"
    found = read(tmp_path, "x.jsonl", line + b'{"text": "' + content.strip() + b'"}\n' + line)
    assert found[0] == ("line 1", {"text": "good"}) and found[-1][1] == {"text": "good"}
    assert found[1][0] == "line 2" and why in found[1][1]
    answer = read(tmp_path, "x.json", b'[{"text": "' + content + b'"}]')
    assert "record 1" in answer and why in answer


NO_RECORDS = [
    (b"not JSON", "not JSON"),
    (b'{"a": 1', "not JSON"),
    (b'{"a": NaN}', "NaN is no number in JSON"),
    (b'{"a": [-Infinity]}', "-Infinity is no number in JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    (b"7", "not a JSON object"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
]


@pytest.mark.parametrize("line, why", NO_RECORDS)
def test_a_line_that_is_no_record_leaves_the_others(tmp_path, line, why):
    [first, bad, last] = read(tmp_path, "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}')
    assert (first[1], last) == ({"a": 1}, ("line 3", {"a": 2}))
    assert bad[0] == "line 2" and why in bad[1]


DAMAGED = [
    ("x.json", b'[{"a": 1}, {"a": ', "record 2: incomplete or damaged"),
    ("x.json", b'[{"a": 1}', "the list has no end"),
    ("x.json", b'[{"a": 1} x]', "record 2: incomplete or damaged"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "incomplete or damaged"),
    ("x.jsonl.gz", b'{"a": 1}\n', "incomplete or damaged (Not a gzipped file"),
    ("x.jsonl", b"\xff\xfe{", "not as its byte order mark says"),
    ("x.csv", b'a,"b\n1,2\n3,4\n', "line 1: unexpected end of data"),
    ("x.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3: unexpected end of data"),
    ("x.csv", b'a,b\n"1"2,3\n', "line 2: ',' expected after"),
    ("x.csv", b"a,b,a\n1,2,3\n", "line 1: two columns are called 'a'"),
    ("x.txt", b"text", "is text, where records were expected"),
    ("x.parquet", b"PAR1", "expected .json, .jsonl, .csv"),
]


@pytest.mark.parametrize("name, content, why", DAMAGED)
def test_a_file_that_is_not_whole_is_one_line(tmp_path, name, content, why):
    assert why in read(tmp_path, name, content)


def test_rows_of_tables_are_told_from_what_is_none(tmp_path):
    table = b'text,"la,bel"\r\n"two\nlines",1\r\n\r\n  ,\r\nragged\r\n"say ""x""",2\r\n'
    assert read(tmp_path, "x.csv", table) == [
        ("line 2", {"text": "two\nlines", "la,bel": "1"}),
        ("line 6", "1 fields instead of 2, text,la,bel"),
        ("line 7", {"text": 'say "x"', "la,bel": "2"}),
    ]
    assert read(tmp_path, "x.tsv", b'a\tb\n"open\t1\n')[0][1] == {"a": '"open', "b": "1"}
    old_mac = read(tmp_path, "x.csv", b"a,b\r1,2\r3,4\r")
    assert [record for _, record in old_mac] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    # a header that the user names, too, is no record
    assert read(tmp_path, "x.tsv", b"a\tb\n1\t2\n", "a,b") == [("line 2", {"a": "1", "b": "2"})]
    # larger than csv's own limit of a field
    [(_, long)] = read(tmp_path, "x.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert len(long["a"]) == 200_000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "json"])
def test_a_line_without_end_takes_little_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(records, "LONGEST", 1 << 16)
    monkeypatch.setattr(records, "BLOCK", 1 << 12)
    long = b'"' + b"x" * (1 << 23) + b'"'
    if kind == "json":
        content = b"[" + long + b"]"
    else:
        content = b'{"a": 1}\n' + long + b'\n{"a": 2}\n'
    path = tmp_path / f"x.{kind}.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content, long
    tracemalloc.start()
    try:
        found = [str(record) for _, record in records.records(str(path))]
    except SystemExit as e:
        found = str(e)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    if kind == "jsonl":
        assert found == ["{'a': 1}", "longer than 0 MiB", "{'a': 2}"]
    else:
        assert "longer than 0 MiB" in found


def test_zst_is_read_or_the_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    assert "pip install zstandard" in read(tmp_path, "x.jsonl.zst", b"")
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    frame = zstandard.compress(json_lines(RECORDS).encode())
    for content in (frame, frame + zstandard.compress(b"\n" * 9)):
        assert [r for _, r in read(tmp_path, "x.jsonl.zst", content)] == RECORDS
    for content in (frame[:-3], frame[:20] + b"????" + frame[24:], b"no frame"):
        assert "incomplete or damaged" in read(tmp_path, "x.jsonl.zst", content)


def test_a_path_is_meant_as_it_stands(tmp_path, monkeypatch):
    folder = tmp_path / "[v1] $x #'é"
    folder.mkdir()
    for name in ("b.jsonl", "a [1].jsonl"):
        (folder / name).write_text('{"a": 1}\n')
    (folder / "c.jsonl").mkdir()
    both = [f"{folder}/a [1].jsonl", f"{folder}/b.jsonl"]
    assert records.matching(both[0]) == both[:1]
    assert records.matching(f"{folder}/*.jsonl") == both
    monkeypatch.setenv("HOME", str(folder))
    assert records.matching("~/b.jsonl") == both[1:]
    monkeypatch.chdir(folder)
    assert records.matching("a [1].jsonl") == ["a [1].jsonl"]
    os.mkfifo(folder / "pipe.jsonl")
    assert "is no ordinary file" in refused(records.matching, "pipe.jsonl")
    assert "is a folder" in refused(records.matching, ".")
    assert "no such file" in refused(records.matching, "none*")
    assert "--input is missing" in refused(records.matching, "")


def test_what_is_left_out_is_said_by_its_reason(capsys):
    left_out = records.Skipped()
    for i in range(5):
        left_out.add("not JSON", f"line {i + 1}")
    later = records.Skipped()
    later.add("not UTF-8", "line 7", 20)
    later.add("not JSON", "line 8")
    left_out.merge(later)
    left_out.say("x.jsonl", 40)
    assert left_out.total == 26
    assert capsys.readouterr().out.splitlines() == [
        "x.jsonl: 20 of 40 records left out: not UTF-8 (the first: line 7)",
        "x.jsonl: 6 of 40 records left out: not JSON (the first: line 1)",
    ]


def sft(folder, pattern, out="out", **settings):
    """prepare_sft of files in `folder`, into folder/out; the names that are there afterwards."""
    settings = {"encoding": "bytes", "block_size": 63, "packing": False} | settings
    settings |= {"input": f"{folder}/{pattern}", "out_dir": f"{folder}/{out}"}
    argv = [f"--{name}={value}" for name, value in settings.items()]
    prepare_sft.prepare_sft(configure(prepare_sft, argv=argv))
    return sorted(name for name in os.listdir(folder / out) if name.endswith(".bin"))


def write_examples(path, texts):
    path.write_text(json_lines({"prompt": text, "completion": f" {text}!"} for text in texts))


def rows_of(path):
    shard = open_shard(path)
    return {tuple(row) for row in shard.tokens.reshape(-1, shard.row).tolist()}


def test_a_folder_holds_the_shards_of_one_input(tmp_path, capsys):
    write_examples(tmp_path / "a.jsonl", [f"a{i}" for i in range(100)])
    write_examples(tmp_path / "b.jsonl", [f"b{i}" for i in range(90)])
    made = ["a_train_00000.bin", "a_val_00000.bin"]
    assert sft(tmp_path, "a.jsonl") == made
    before = rows_of(tmp_path / "out/a_train_00000.bin")
    for pattern in ("?.jsonl", "b.jsonl"):
        answer = refused(sft, tmp_path, pattern)
        assert "a_train_00000.bin: was made of" in answer and "a.jsonl, not of this" in answer
    assert rows_of(tmp_path / "out/a_train_00000.bin") == before

    # by the same input it is replaced, and what changes is said
    capsys.readouterr()
    assert sft(tmp_path, "a.jsonl", seed=2) == made
    assert "a_train_00000.bin is replaced: it had seed=1337, not 2" in capsys.readouterr().out
    assert rows_of(tmp_path / "out/a_train_00000.bin") != before
    write_examples(tmp_path / "a.jsonl", ["new", "and newer"])
    assert "too few to split" in refused(sft, tmp_path, "a.jsonl")
    assert "with another split" in refused(sft, tmp_path, "a.jsonl", val_fraction=0)


def test_train_and_val_of_two_files_share_a_folder(tmp_path):
    write_examples(tmp_path / "fit.jsonl", ["a", "b"])
    write_examples(tmp_path / "dev.jsonl", ["c", "d"])
    write_examples(tmp_path / "fit2.jsonl", ["a", "b"])
    write_examples(tmp_path / "more.jsonl", ["e"])
    sft(tmp_path, "fit.jsonl", val_fraction=0)
    for settings, why in (
        ({"pattern": "fit2.jsonl"}, "with another split"),
        ({"pattern": "[fm]*t.jsonl"}, "with another split"),
        ({"pattern": "dev.jsonl", "block_size": 31}, "block_size=63, not 31"),
        ({"pattern": "more.jsonl", "val_fraction": 0}, "not of this input"),
    ):
        answer = refused(sft, tmp_path, **{"val_fraction": 1} | settings)
        assert "fit_train_00000.bin: was made" in answer and why in answer
    made = sft(tmp_path, "dev.jsonl", val_fraction=1)
    assert made == ["dev_val_00000.bin", "fit_train_00000.bin"]


def test_shards_that_no_manifest_tells_are_not_mixed_in(tmp_path):
    write_examples(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "out").mkdir()
    for name in ("a_train_00000.bin", "c4_val_00000.bin"):
        write_shard(f"{tmp_path}/out/{name}", np.arange(99), 257)
        answer = refused(sft, tmp_path, "a.jsonl", val_fraction=0)
        assert f"{name}: was made of something that shards.json does not tell" in answer
        os.unlink(tmp_path / "out" / name)
    (tmp_path / "out/shards.json").write_text("{")
    assert "shards.json: damaged" in refused(sft, tmp_path, "a.jsonl", val_fraction=0)


def test_twins_are_on_one_side_of_the_split(tmp_path, capsys):
    texts = [f"text {i % 40}" for i in range(120)]
    write_examples(tmp_path / "a.jsonl", texts)
    sft(tmp_path, "a.jsonl", val_fraction=0.2)
    assert "80 examples repeat another" in capsys.readouterr().out
    train = rows_of(tmp_path / "out/a_train_00000.bin")
    val = rows_of(tmp_path / "out/a_val_00000.bin")
    assert not train & val
    assert (len(train), len(val)) == (32, 8)
    write_examples(tmp_path / "b.jsonl", ["same"] * 40)
    answer = refused(sft, tmp_path, "b.jsonl", out="other")
    assert "40 examples, of them 1 different, are too few" in answer


def test_columns_and_fields_without_a_use_are_said_once(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("id,q,a,note\n1,x,y,\n2,x2,y,z\n3,x3,y,\n")
    sft(tmp_path, "x.csv", prompt="{q}", completion=" {a}", val_fraction=0)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"{tmp_path}/x.csv: not used: the field 'id' (3 of 3 records; the first: line 2)",
        f"{tmp_path}/x.csv: not used: the field 'note' (1 of 3 records; the first: line 3)",
    ]
    (tmp_path / "y.jsonl").write_text(json_lines([{"q": "x", "a": ["y"]}]))
    answer = refused(sft, tmp_path, "y.jsonl", "o2", prompt="{q}", completion="{a}")
    assert "no usable example" in answer
    assert "is a list or an object: name its part" in capsys.readouterr().out
    sft(tmp_path, "y.jsonl", "o2", prompt="{q}", completion="{a[0]}", val_fraction=0)


def test_an_example_of_a_million_spaces_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "ranks"
    path.write_text("".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))
    spaces = " " * 1_000_000
    (tmp_path / "x.jsonl").write_text(json_lines([{"prompt": "a", "completion": f"b{spaces}c"}]))
    sft(tmp_path, "x.jsonl", encoding=path, val_fraction=0)
    [row] = rows_of(tmp_path / "out/x_train_00000.bin")
    assert bytes(row) == b"ab" + b" " * 62

@pytest.mark.parametrize("content, kept", [
    ('{"data": [\n{"text": "a"},\n{"text": "b"}\n]}', 0),  # one record, which has no text
    ('{"text": "a", "of": [\n{"b": 1},\n{"b": 2}]}\n{"text": "c"}\n', 2),
    ('{"text": "a",\n"n": ' + "9" * 5000 + '}', None),  # refused: no number of that size
    ('{"text": "cut of\n{"text": "b"}\n{"text": "c"}\n', 2),  # the first line is damaged
    ('{"text": "cut",\n{"text": "b"}\n{"text": "c"}\n', 2),
])
def test_lines_are_records_where_each_is_one(tmp_path, content, kept):
    path = tmp_path / "x.json"
    path.write_text(content)
    if kept is None:
        assert "record 1" in refused(list, records.records(str(path)))
        return
    found = [record for _, record in records.records(str(path)) if isinstance(record, dict)]
    assert sum("text" in record for record in found) == kept


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", gzip.compress(b'{"text": "a"}')),
    ("x.txt.gz", gzip.compress(gzip.compress(b"twice"))),
    ("x.csv", b"\x28\xb5\x2f\xfd" + b"of zstd"),
])
def test_compressed_data_of_another_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = refused(open_source, str(tmp_path / name))
    assert name in line and "unpack it, or name it" in line


@pytest.mark.parametrize("text, why", [
    ("{prompt.upper}", "named in brackets"),
    ("{prompt[a].b}", "named in brackets"),
    ("{}", "needs a name"),
])
def test_a_template_names_no_python(text, why):
    assert why in refused(prepare_sft.template, "prompt", text)


def test_a_template_writes_no_huge_text():
    assert prepare_sft.fill("{a:>4}{b[x.y]}", {"a": "p", "b": {"x.y": 5}}) == "   p5"
    for template in ("{a:>1000000000000}", "{a:{b}}"):
        with pytest.raises(ValueError, match="more than 9,999"):
            prepare_sft.fill(template, {"a": "p", "b": 10**12})


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n")
    assert "'text'" in refused(list, records.records(str(tmp_path / "x.tsv"), "text,text"))


def test_a_table_without_a_column_of_text(tmp_path):
    (tmp_path / "x.csv").write_text("Text;label\nabc;1\n")
    line = refused(prepare, input=str(tmp_path / "x.csv"), out_dir=str(tmp_path / "o"),
                   encoding="bytes", workers=1)
    assert 'a "text", which is to be a name in the first' in line


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
    "matmul": "int8", "residual_blocks": 2, "lora_alpha": 8.0,
}
# and all other settings, in a few runs that together take every choice
OTHER_RUNS = [
    "--method=qgalore --weight_bits=8 --proj_bits=4 --proj_side=auto --moments=8bit --matmul=int8"
    " --accumulation=int8 --device=auto --checkpoint_activations=True --checkpoint_bits=8"
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
    "--method=adam8bit --weight_bits=16 --init_from=resume --out_dir={out}/adam8bit",
    "--method=adamw --init_from=resume --eval_only=True --out_dir={out}/adamw",
]
# cuda: a CPU has none. W&B asks for an account
NOT_TRIED = {("device", "cuda"), "wandb_log", "tensorboard_log"}


def test_every_setting_and_every_choice_runs(shards, tmp_path):
    runs = []
    for name, method in METHODS.items():
        if name == "welore":  # it takes a compressed checkpoint: tests/test_sisters.py
            continue
        values = {key: NOT_DEFAULT[key] for key in method.reads}
        if values.get("matmul") == "int8" and 8 in method.weight_bits:
            values["weight_bits"] = 8
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
    "rank_timeout=1e300", "residual_blocks=0", "residual_blocks=1000000000000", "moments=reset",
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


def test_a_sketch_has_no_more_columns_than_the_gradient():
    for out, side, columns in ((16, "auto", 16), (128, "auto", 32), (4, "right", 8)):
        projection = Projection(out, 16, rank=8, side=side)
        x, dy = torch.randn(5, 16), torch.randn(5, out)
        for _ in range(2):
            left, right = projection.sketch(x, dy, key=1)
            projection.refresh(left.T @ right, 0)
        assert projection.sketch(x, dy, key=1)[1].shape[1] == columns
        assert projection.matrix().shape == (16, 8)


@pytest.mark.parametrize("moments", ["factored", "float32"])
def test_muons_momentum_forgets_micro_batches_that_are_dropped(moments):
    """They lie in it: it starts anew, as if there had been no step before."""
    _, s, model, optimizer = small_run("qmuon", moments=moments)
    (weight,) = [w for w in optimizer.weights if w.name.endswith("q_proj")]
    for i in range(2):
        model(*tokens(vocab=257, seed=i)).backward()
    assert weight.moments.m.any()
    optimizer.accumulating = True
    (1e6 * model(*tokens(vocab=257, seed=2))).backward()
    optimizer.zero_grad()
    if moments == "float32":
        assert not weight.moments.m.any()
    else:
        codes = (weight.moments.m, weight.moments.m_scale, weight.moments.m_zero)
        assert not dequantize_int8(*codes).any()
    optimizer.accumulating = False
    model(*tokens(vocab=257, seed=3)).backward()
    assert first_not_finite(model) is None and weight.ended

# -----------------------------------------------------------------------------
# files that are not trusted


def tiny_checkpoint(path, **changes):
    """A Hugging Face directory of a tiny LLaMA on bytes."""
    shape = {"vocab_size": 257, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    config = LLaMAConfig(**(shape | {"ffn_dim": 48, "block_size": 64} | changes))
    model = LLaMA(config, partial(QLinear, bits=16))
    hf.save(model, str(path), dtype=torch.float32, encoding=get_encoding("bytes"))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_checkpoint(path)
    return str(path)


def load_all(path):
    """All that a checkpoint is read for."""
    hf.load(str(path), 16, torch.float32)
    encoding = get_tokenizer(str(path))
    encoding.decode(encoding.encode_ordinary("a b"))


def refusal(function, *args):
    """The line that a function ends with, or None if it does not."""
    try:
        function(*args)
    except (ValueError, SystemExit) as e:
        line = str(e)
        assert line and "\n" not in line and len(line) < 500, line
        return line
    return None


WRONG = [None, True, [], [None], {}, {"a\nb": [1]}, "x", "a\nb\ud800"]
WRONG += [-1, 0, 1.5, 10**12, 10**400]


def places(value, at=()):
    """The paths of what lies in a JSON value; of long objects and lists those at the top alone."""
    found = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in found:
        yield (*at, key)
        if isinstance(inner, (dict, list)) and len(inner) < 60:
            yield from places(inner, (*at, key))


def changed(value, place, new):
    """A JSON value with another one at a place in it."""
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


MORE_CONFIG = {
    "attention_bias": False, "low_rank": "", "layer_types": ["full_attention"] * 2,
    "quantization_config": {"quant_method": "qgalore", "bits": 8, "group_size": 32},
    "partial_rotary_factor": 1, "original_max_position_embeddings": 8, "is_causal": True,
    "use_sliding_window": True, "max_window_layers": 1, "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "hidden_activation": "gelu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2"])
def test_a_wrong_value_in_config_json_is_one_line(kind, value, checkpoint, tmp_path):
    name = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2", "qwen2": "Qwen2"}[kind]
    config = read_json(f"{checkpoint}/config.json") | MORE_CONFIG
    config |= {"model_type": kind, "architectures": [f"{name}ForCausalLM"]}
    for place in places(config):
        write_json(tmp_path / "config.json", changed(config, place, value))
        line = refusal(hf.settings, str(tmp_path))
        assert line is None or f"{tmp_path}/config.json" in line


TOKENIZER_CONFIG = {
    "bos_token": {"content": "a"}, "eos_token": "<|endoftext|>", "unk_token": "b",
    "add_bos_token": True, "added_tokens_decoder": {"256": {"content": "<|endoftext|>"}},
    "chat_template": [{"name": "default", "template": "x"}], "model_max_length": 10**30,
}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: ascii(value)[:20])
def test_a_wrong_value_in_a_tokenizer_is_one_line(value, checkpoint, tmp_path):
    files = {
        "tokenizer.json": read_json(f"{checkpoint}/tokenizer.json"),
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "config.json": {"bos_token_id": 1, "eos_token_id": [256, 3]},
        "added_tokens.json": {"<|endoftext|>": 256},
    }
    for name, whole in files.items():
        for other, content in files.items():
            write_json(tmp_path / other, content)
        for place in places(whole):
            write_json(tmp_path / name, changed(whole, place, value))
            line = refusal(get_tokenizer, str(tmp_path))
            assert line is None or line.startswith(f"error: encoding {tmp_path}: ")


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff\xfe\xff", b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
])
def test_json_that_is_none_is_one_line(content, checkpoint, tmp_path):
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        path = tmp_path / name.removesuffix(".json")
        shutil.copytree(checkpoint, path)
        (path / name).write_bytes(content)
        assert f"{path}/{name}" in refusal(load_all, path)
    path = tmp_path / "index"
    shutil.copytree(checkpoint, path)
    os.unlink(path / "model.safetensors")
    (path / hf_files.INDEX).write_bytes(content)
    assert f"{path}/{hf_files.INDEX}" in refusal(load_all, path)


def test_damaged_tensor_files_are_one_line(checkpoint, tmp_path):
    """Cut short, a bit of the header flipped, a field of a tensor replaced."""
    path = tmp_path / "tiny"
    shutil.copytree(checkpoint, path)
    whole = (path / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]  # of the header
    header = json.loads(whole[8:end])
    rng = random.Random(0)
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(30)]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(end)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    odd = ["F64", "I64", [0, 4], [4, 0], [1, 1], [2**63, 2**64 - 1], [257, -32]]
    for value in [*WRONG, *odd]:
        for field in ("dtype", "shape", "data_offsets"):
            name = rng.choice([name for name in header if name != "__metadata__"])
            text = json.dumps(changed(header, (name, field), value)).encode()
            damaged.append(struct.pack("<Q", len(text)) + text + whole[end:])
    for content in damaged:
        (path / "model.safetensors").write_bytes(content)
        assert str(path) in refusal(hf.load, str(path), 16)


def sharded(checkpoint, path):
    """A copy in which an index names the one file; returns the index."""
    shutil.copytree(checkpoint, path)
    os.rename(path / "model.safetensors", path / "model-1.safetensors")
    names = hf_files.tensor_files(checkpoint)
    return {"weight_map": dict.fromkeys(names, "model-1.safetensors")}


@pytest.mark.parametrize("name", [
    "../tiny/model.safetensors", "{folder}/model.safetensors", "..", ".", "", "a\nb",
    "./model-1.safetensors", "sub/model.safetensors", "..\\model.safetensors", "C:model",
])
def test_an_index_leads_out_of_no_checkpoint(name, checkpoint, tmp_path):
    path = tmp_path / "copy"
    index = sharded(checkpoint, path)
    write_json(path / hf_files.INDEX, index)
    load_all(path)  # as it should be
    folder = os.path.dirname(checkpoint)
    key = "model.norm.weight"
    index["weight_map"][key] = name.format(folder=f"{folder}/tiny")
    write_json(path / hf_files.INDEX, index)
    line = refusal(load_all, path)
    assert hf_files.INDEX in line and key in line and "in the directory" in line


NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
         hf_files.INDEX, "chat_template.jinja"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_or_folder_in_a_files_place_is_said(name, make, checkpoint, tmp_path):
    path = tmp_path / "copy"
    index = sharded(checkpoint, path)
    if name != hf_files.INDEX:
        write_json(path / hf_files.INDEX, index)
    (path / name).unlink(missing_ok=True)
    make(path / name)
    words = {os.mkfifo: "no ordinary file", os.mkdir: "is a folder"}[make]
    line = refusal(load_all, path)
    assert str(path / name) in line and words in line
    # nor is it exported, and that is known before the work
    model = hf.load(checkpoint, 16)
    if name.startswith(("tokenizer", "chat")):
        line = refusal(hf.save, model, str(tmp_path / "out"), str(path))
        assert str(path / name) in line and words in line
        assert os.listdir(tmp_path) == ["copy"]


def test_links_out_of_a_checkpoint_are_not_exported(checkpoint, tmp_path):
    """But those that the hub's cache is made of are."""
    model = hf.load(checkpoint, 16)
    (tmp_path / "private").write_text("secret")
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "12ab"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(os.listdir(checkpoint)):
        shutil.copy(f"{checkpoint}/{name}", blobs / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / name)
    load_all(snapshot)
    hf.save(model, str(tmp_path / "out"), str(snapshot))
    assert get_tokenizer(str(tmp_path / "out")).eot_token == 256
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())

    for at, target in ((snapshot, "../../../private"), (checkpoint, str(tmp_path / "private"))):
        path = tmp_path / "copy"
        shutil.copytree(at, path, symlinks=True)
        if at == snapshot:
            path = snapshot
        os.symlink(target, path / "generation_config.json")
        line = refusal(hf.save, model, str(tmp_path / "no"), str(path))
        assert str(path / "generation_config.json") in line and "is a link to" in line
        shutil.rmtree(tmp_path / "copy")
    assert not os.path.exists(tmp_path / "no")


@pytest.mark.parametrize("key,value", [
    ("num_hidden_layers", 10**12), ("hidden_size", 10**9), ("intermediate_size", 10**9),
    ("vocab_size", 10**9), ("num_attention_heads", 10**9), ("head_dim", 10**9),
    ("num_hidden_layers", 900), ("hidden_size", 64), ("vocab_size", 300),
])
def test_a_model_that_the_files_do_not_hold_is_not_built(key, value, checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    config = read_json(path / "config.json")
    write_json(path / "config.json", config | {key: value})
    line = refusal(starting_model, settings(f"--init_from={path}", "--block_size=16"))
    assert key in line and str(value) in line and str(path) in line
    code, out, err = run("train.py", f"--init_from={path}", "--dry_run=True", "--block_size=16")
    assert code == 1 and err.strip() == line


TOO_MUCH = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ '%9999999999s' | format('a') }}",
    "{{ 'x' * 2**25 }}",
    "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "{{ (" + "(" * 5000 + "1" + ")" * 5000 + ") }}",
]


@pytest.mark.skipif(chat.resource is None, reason="the system has no limits of memory")
@pytest.mark.parametrize("template", TOO_MUCH)
def test_a_chat_template_has_limits(template, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    (path / "chat_template.jinja").write_text(template)
    encoding = get_tokenizer(str(path))
    monkeypatch.setattr(chat, "SECONDS", 0.3 if "99999" in template else 60.0)
    line = refusal(encoding.render, [{"role": "user", "content": "a"}])
    assert line.startswith(f"error: encoding {path}: its chat template is damaged: ")
    # the next one is rendered all the same
    monkeypatch.setattr(chat, "SECONDS", 60.0)
    assert chat.render("{{ x }}", {"x": "fine"}) == "fine"


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no\nno') }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ 'a' + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__ }}", "{% for i in range(10**9) %}{% endfor %}",
])
def test_a_chat_template_that_raises_is_one_line(template):
    assert refusal(chat.render, template, {})


def test_a_fork_has_a_renderer_of_its_own():
    assert chat.render("{{ 1 + 1 }}", {}) == "2"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, chat.render("{{ 1 + 2 }}", {}).encode())
        os._exit(0)
    assert os.read(read, 9) == b"3"
    os.waitpid(pid, 0)
    assert chat.render("{{ 2 + 2 }}", {}) == "4"


def test_a_vocabulary_spells_letters(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    found = read_json(tmp_path / "c" / "tokenizer.json")
    vocabulary = found["model"]["vocab"]
    vocabulary["missing"] = vocabulary.pop("t")
    write_json(tmp_path / "c" / "tokenizer.json", found)
    assert "no token spells t: texts would lose" in refusal(get_tokenizer, str(tmp_path / "c"))


def test_a_checkpoint_that_does_not_fit_is_told_why(tmp_path):
    config = settings(*TINY_RUN).as_dict()
    model = LLaMA(LLaMAConfig(block_size=32, vocab_size=61, n_layer=1, n_head=2, n_embd=16))
    weights = model.state_dict()
    parts = {"format": 3, "optimizer": {}, "iter": 0, "position": 0}
    for encoding, word in ((5, "encoding is 5"), ("bytes", "Missing key(s)")):
        changed = config | {"encoding": encoding}
        torch.save(parts | {"config": changed, "model": weights}, tmp_path / "ckpt.pt")
        assert word in refused(load_model, str(tmp_path), "cpu")


# -----------------------------------------------------------------------------
# exports


def test_an_export_deletes_nothing_of_the_users(checkpoint, tmp_path):
    model = hf.load(checkpoint, 16)
    for name in ("out.tmp", f"out.qgalore-{os.getpid()}-0.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("years of work")
    before = sorted(os.listdir(tmp_path))
    hf.save(model, str(tmp_path / "out") + "/")
    welore.compress(checkpoint, str(tmp_path / "low"))
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "low", "out"])
    assert all((tmp_path / name / "thesis").read_text() == "years of work" for name in before)


def fail(*args, **kwargs):
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("module,key", [(hf, "export"), (welore, "out")])
def test_a_place_that_cannot_be_written_is_said_first(module, key, checkpoint, tmp_path,
                                                      monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.symlink("nowhere", tmp_path / "link")
    monkeypatch.setattr(hf, "load_model", fail)
    monkeypatch.setattr(welore, "compress", fail)
    other = {"out": f"--model={checkpoint}", "export": f"--out_dir={checkpoint}"}[key]
    for place, word in (("file", "exists"), ("folder", "exists"), ("folder/", "exists"),
                        ("link", "exists"), ("file/x", "cannot be made")):
        s = configure(module, argv=[other, f"--{key}={tmp_path}/{place}"])
        line = refusal(module.main, s)
        assert line.startswith(f"error: {tmp_path}/{place}: {word}")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_welore_drops_no_tensor_and_asks_first(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer_config.json").mkdir()
    monkeypatch.setattr(welore, "settings", fail)
    assert "is a folder" in refusal(welore.compress, str(path), f"{tmp_path}/out")
    assert "exists" in refusal(welore.compress, checkpoint, str(path))
    monkeypatch.undo()
    (path / "tokenizer_config.json").rmdir()
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"model.layers.0.bias": torch.ones(3)}, path / "model.safetensors")
    assert "model.layers.0.bias" in refusal(welore.compress, str(path), f"{tmp_path}/out")


def test_an_export_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    model = hf.load(checkpoint, 16)
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    line = refusal(hf.save, model, str(tmp_path / "out"))
    assert "model.layers.1.mlp.up_proj.weight" in line and "not finite" in line
    model.blocks[1].mlp.up_proj.weight.data[3, 4] = 1e5  # infinite in float16
    assert "not finite" in refusal(partial(hf.save, dtype=torch.float16), model, f"{tmp_path}/out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_files, "save_file", full)
    line = refusal(hf.save, model, str(tmp_path / "out"))
    assert str(tmp_path / "out") in line and "No space left" in line
    assert os.listdir(tmp_path) == []


def words_encoding():
    """A tiktoken.Encoding made by hand, with gaps between its special tokens."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"he", b"the", b" the", b"in", b"ing", b"12", b"\n\n", "é".encode()]
    ranks = {token: i for i, token in enumerate(tokens)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++|\s++$"
    pattern += r"|\s+(?!\S)|\s"
    special = {"<|endoftext|>": 270, "<|pad|>": 275}
    return tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


TEXTS = ["", "the thing in there, 12345 it's\n\n x  ", "<|endoftext|>", "$\n a$\r\n \t",
         "h\u00e9l\u00e0 \u65e5\u672c \U0001f642 \u3000x\u00a0"]


@pytest.mark.parametrize("make", [partial(get_encoding, "bytes"), words_encoding])
def test_an_export_of_a_run_from_scratch_has_its_tokenizer(make, tmp_path):
    from transformers import AutoTokenizer

    encoding = make()
    path = str(tmp_path / "out")
    model = LLaMA(LLaMAConfig(n_layer=1, n_embd=16, n_head=2, ffn_dim=8, vocab_size=320))
    hf.save(model, path, encoding=encoding)
    assert read_json(f"{path}/config.json")["eos_token_id"] == encoding.eot_token
    theirs = AutoTokenizer.from_pretrained(path)
    ours = get_tokenizer(path)
    assert theirs.eos_token_id == ours.eot_token == encoding.eot_token
    rng = random.Random(0)
    letters = "theing 12\n\r'.$\u00e9\u3000"
    more = ["".join(rng.choices(letters, k=20)) for _ in range(200)]
    for text in TEXTS + more:
        ids = encoding.encode_ordinary(text)
        assert theirs.encode(text, split_special_tokens=True) == ids
        assert ours.encode_ordinary(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.encode("the<|endoftext|>") == [*encoding.encode("the"), encoding.eot_token]


def test_an_export_without_its_tokenizer_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    model = hf.load(checkpoint, 16)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    hf.save(model, str(tmp_path / "out"), encoding=get_encoding("bytes"))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no tokenizer" in out and "pip install tokenizers" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


# -----------------------------------------------------------------------------
# names of checkpoints


ODD_NAMES = ["tiny", "./tiny", "sub/tiny", "tiny/", "~/tiny", "{here}/tiny", "{here}/tiny/",
             "my tiny one", "[v1] tiny", "$HOME tiny", "#1", "it's \"tiny\"", "h\u00e9 \u65e5",
             "tiny*", "-tiny", "../up/tiny"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_checkpoint_may_lie_anywhere(name, checkpoint, tmp_path, monkeypatch, capsys):
    here = tmp_path / "up"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    name = name.format(here=here)
    shutil.copytree(checkpoint, os.path.expanduser(name))
    load_all(name)
    s = settings(f"--init_from={name}", "--block_size=16")
    fill = starting_model(s)
    model = LLaMA(LLaMAConfig(**hf.settings(hf.local(name))), partial(QLinear, bits=16), "meta")
    fill(model)
    assert get_encoding(s.encoding).eot_token == 256
    hf.main(configure(hf, argv=[f"--out_dir={name}", f"--export={name.rstrip('/')}-out/"]))
    load_all(f"{name.rstrip('/')}-out")
    argv = [f"--model={name}", f"--out={name.rstrip('/')}-low"]
    welore.main(configure(welore, argv=argv))
    load_all(f"{name.rstrip('/')}-low")


def test_a_run_starts_from_a_checkpoint_anywhere(checkpoint, tmp_path):
    def before():
        os.chdir(tmp_path)
        os.environ["HOME"] = str(tmp_path)

    shutil.copytree(checkpoint, tmp_path / "a b")
    args = ["--init_from=~/a b/", "--dry_run=True", "--block_size=16"]
    code, out, err = run("train.py", *args, before=before)
    assert code == 0, err


@pytest.mark.parametrize("name,is_one", [
    ("meta-llama/Llama-2-7b-hf", True), ("a/b", True), ("a.b/c_d", True), ("gpt2", False),
    ("a/b/c", False), ("a/b/", False), ("./a", False), ("../a", False), ("~/a", False),
    ("/a/b", False), ("a b/c", False), ("a/..", False), ("a/b..c", False), ("-a/b", False),
    ("h\u00e9/b", False), ("a\\b", False), ("", False),
])
def test_the_hub_is_asked_for_names_alone(name, is_one, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **options):
        asked.append(name)
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) == is_one
    for function in (hf.load, get_tokenizer):
        assert refusal(function, name)
    assert asked == [name] * 2 * is_one

    # a file of that name is no checkpoint
    if name == "a/b":
        os.mkdir("a")
        (tmp_path / "a/b").write_text("")
        assert "is no directory" in refusal(hf.load, name)
        assert len(asked) == 2


@pytest.mark.parametrize("module", ["finetune.hf", "finetune.welore"])
def test_a_mistyped_command_is_answered_without_torch(module, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for flags in ([], ["--nonsense=1"], ["nonexistent.py"]):
        process = script(module, *flags, env=env)
        out, err = process.communicate(timeout=60)
        one_line_error((process.returncode, out, err), flags[-1] if flags else "--")
    process = script(module, "--help", env=env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and f"python -m {module}" in out, err


def test_an_adapter_beside_the_weights_is_not_passed_over(checkpoint, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(checkpoint, path)
    write_json(path / "adapter_config.json", {"peft_type": "LORA"})
    assert "merge it" in refusal(hf.load, str(path))


def test_welore_says_that_there_is_no_gpu(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [f"--model={checkpoint}", f"--out={tmp_path}/low", "--device=cuda"]
    assert "finds no CUDA GPU" in refusal(welore.main, configure(welore, argv=argv))


def test_a_token_that_no_row_uses_may_be_beyond_the_model(tmp_path):
    """As the pad token that a fine-tune adds to the tokenizer alone."""
    path = f"{tmp_path}/x_train_0.bin"
    write_shard(path, [1, 2, 3, 4, 5, 6, 7, 8], 10)
    windows = Windows(f"{tmp_path}/*_train_*.bin", block_size=4, vocab_size=9)
    windows.batch(1)
    write_shard(path, [1, 2, 3, 4, 5, 6, 7, 9], 10)
    line = refusal(Windows, f"{tmp_path}/*_train_*.bin", 4, 9)
    assert path in line and "vocab_size is 9" in line

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


ONE_RANK = SimpleNamespace(size=1)


@pytest.mark.parametrize("sizes,word", [
    ({"n_layer": 10**4, "n_embd": 2**17, "n_head": 2**10, "ffn_dim": 2**20}, "weights"),
    ({"batch_size": 10**15}, "batch_size"),
    ({"block_size": 2**24, "batch_size": 10**9}, "block_size"),
])
def test_sizes_beyond_any_machine_are_refused_at_once(sizes, word, monkeypatch, capsys):
    """By arithmetic: a plan of them would never end. A dry run says what it knows."""
    monkeypatch.setattr(memory, "memory_plan", None)
    s = settings("--device=cpu").changed(**sizes)
    assert word in refused(memory.fits, s, ONE_RANK, torch.float32, torch.float32)
    memory.fits(s.changed(dry_run=True), ONE_RANK, torch.float32, torch.float32)
    assert "NOT enough" in capsys.readouterr().out


def test_the_least_a_run_takes_is_less_than_its_plan():
    for flags in ("--method=qgalore", "--method=adamw", "--method=lora", "--tie_embedding=True"):
        s = settings("--device=cpu", "--n_layer=2", "--vocab_size=512", *flags.split())
        least = memory.least(s, torch.float32, torch.float32)
        plan = memory.memory_plan(s, torch.float32, torch.float32)
        assert 0.3 * plan["weights"] < least["weights"] <= plan["weights"]
        assert least["gradients, activations"] < plan["gradients, activations"]


@pytest.mark.parametrize("length,share", [(128, 1.0), (8192, 0.0)])
def test_fragments_are_of_blocks_that_the_heap_keeps(length, share):
    s = settings("--n_layer=1", "--n_embd=1024", "--n_head=16", "--ffn_dim=1024", "--batch_size=1",
                 "--vocab_size=64", "--rank=8", f"--block_size={length}", "--proj_side=right")
    plan = memory.memory_plan(s, torch.float32, torch.float32, fragments=0.75)
    kept = (plan["fragments, workspaces"] - memory.WORKSPACES) / 0.75
    assert kept == pytest.approx(share * plan["gradients, activations"], rel=0.01,
                                 abs=0.1 * plan["gradients, activations"])


def run_folder_with(folder, *lines):
    """A run's folder with these lines, or entries, in its log."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.jsonl", "w") as f:
        for line in lines:
            f.write(line if isinstance(line, str) else json.dumps(line) + "\n")
    return str(folder)


def logged(steps, every=1):
    """Entries of a log that fall from 10 to 2."""
    entries = []
    for step in range(0, steps, every):
        loss = 2 + 8 * math.exp(-50 * step / steps)
        entries.append({"iter": step, "loss": loss, "tokens": 8 * (step + 1), "tokens_per_s": 2.0})
        if step % (10 * every) == 0:
            entries.append({"iter": step, "val_loss": loss, "tokens": 8 * step})
    return entries


@pytest.fixture
def pictures(monkeypatch):
    """{name of the file: figure} of what is drawn, which is not written."""
    drawn = {}
    write = plot.save

    def save(figure, path):
        drawn[os.path.basename(path)] = figure
        write(figure, path)

    monkeypatch.setattr(plot, "save", save)
    return drawn


def test_a_long_log_is_drawn_from_a_bounded_summary():
    curve, subspaces = plot.Curve(), plot.SubspaceMap()
    for step in range(100_000):
        curve.add(step, step % 2)
        found = {"blocks.0.q": [(step, 0.5, 2)]} if step % 2 else {}
        subspaces.add({"iter": step, "subspaces": found})
    assert len(curve.points) < 2 * plot.POINTS
    x, mean, low, high = curve.columns()
    assert list(x) == sorted(x) and x[-1] == 99_999
    assert set(mean) == {0.5} and set(low) == {0} and set(high) == {1}
    names, similarity, gap = subspaces.values()
    assert similarity.shape == gap.shape == (1, -(-100_000 // subspaces.width))
    assert similarity.shape[1] <= plot.COLUMNS and set(similarity[0]) == {0.5}


def test_wide_columns_keep_each_last_refresh_and_its_place():
    whole, wide = plot.SubspaceMap(), plot.SubspaceMap()
    refreshes = [(step, step / 1000, 1 + step) for step in (3, 4, 90, 500, 777)]
    whole.add({"iter": 1000, "subspaces": {"w": refreshes}})
    wide.add({"iter": 1000, "subspaces": {"w": refreshes}})
    wide.add({"iter": 7000, "subspaces": {}})
    assert whole.width == 1 and wide.width == 8
    fine, coarse = whole.values()[1][0], wide.values()[1][0]
    np.testing.assert_array_equal(coarse[:125], fine[7:1000:8])  # as each column ends


def test_pictures_speak_in_words_and_show_what_matters(tmp_path, pictures):
    folder = run_folder_with(tmp_path / "out-$x_{1$", *logged(1000))
    plot.plot_loss(folder)
    figure = pictures["loss.png"]
    axes = figure.axes[0]
    assert axes.get_ylim()[1] < 4 and axes.get_ylim()[0] < 2  # the fall from 10 is cut off
    assert "10.00" in axes.get_title(loc="left")
    words = [text.get_text() for text in axes.get_legend().get_texts()] + [axes.get_xlabel()]
    assert not any("_" in word for word in words)
    assert r"out-\$x_{1\$" in figure.get_suptitle()


def test_the_map_of_subspaces_names_what_there_is(tmp_path, pictures):
    weights = [f"blocks.{i}.mlp.{kind}" for i in range(30) for kind in ("up", "down")]
    found = {name: [[1, 0.9, 5], [6, 0.8, 20]] for name in weights}
    folder = run_folder_with(tmp_path / "o", {"iter": 9, "loss": 2.0, "subspaces": found})
    plot.plot_loss(folder)
    figure = pictures["subspaces.png"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["mlp.down\nblocks 0 to 29, downwards", "mlp.up\nblocks 0 to 29, downwards"]
    bar = figure.axes[-1]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["5", "10", "20"]
    assert "similar" in figure.axes[2].get_ylabel() and figure.get_suptitle()


@pytest.mark.parametrize("lines,losses", [
    (['{"iter": 0, "loss": NaN, "tokens": 1}\n', {"iter": 1, "loss": 3, "tokens": 2}], 1),
    ([{"iter": 0, "loss": 3.0}, '{"iter": 1, "lo'], 1),  # torn
    (["[1]\n", '"x"\n', "7\n", {"iter": "a", "loss": 1}, {"iter": 1, "loss": "x", "tokens": [2]},
      {"iter": 2, "loss": True, "tokens_per_s": 0}, {"iter": 3, "loss": 2, "tokens": 10**400},
      {"iter": 4, "loss": 1, "subspaces": 3}, {"iter": 5, "subspaces": {"w": 3, "v": [[1], 2]}},
      {"iter": 6, "subspaces": {"u": [["a", 1, 2], [-1, 1, 1], [1, 1, 0], [2, 0.5, 4]]}}], 2),
    (["[" * 100_000], 0),
    ([], 0),
    ([{"iter": 0, "val_loss": 2.0, "tokens": 0}], 1),
])
def test_a_log_of_any_kind_is_drawn_or_one_line(tmp_path, lines, losses):
    folder = run_folder_with(tmp_path / "out", *lines)
    if not losses:
        with pytest.raises(ValueError, match="holds no loss"):
            plot.plot_loss(folder)
        return
    assert os.path.getsize(plot.plot_loss(folder)[0]) > 5000
    run = plot.Summary(folder)
    assert len(run.training.columns()[0]) + len(run.validation.columns()[0]) == losses
    assert set(run.subspaces.rows) <= {"u"}


def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    run_folder_with("good", *logged(10))
    os.makedirs("empty")
    os.makedirs("pipe")
    os.mkfifo("pipe/log.jsonl")
    os.makedirs("folder/log.jsonl")
    for out_dir, word in (("none", "does not exist"), (file, "is a file"), ("no*", "no folder"),
                          ("empty", "no log.jsonl"), ("pipe", "no ordinary file"),
                          ("folder", "is a folder"), ("good,none", "none")):
        assert word in refused(plot.main, configure(plot, argv=[f"--out_dir={out_dir}"]))
    for image, word in (("none/x.png", "none"), ("x.xyz", ".png")):
        s = configure(plot, argv=["--out_dir=good", f"--image={image}"])
        assert word in refused(plot.main, s)


def test_runs_of_any_folder_are_told_apart(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    for name in ("a/out [1] $", "b/out [1] $", "b/ä,漢", "o1"):
        run_folder_with(name, *logged(40))
    (tmp_path / "o2").write_text("no run")
    s = configure(plot, argv=["--out_dir=a/out [1] $,b/out*,o*,o1/", "--image=x.png"])
    plot.main(s)
    labels = [text.get_text() for text in pictures["x.png"].legends[0].get_texts()]
    assert labels == [r"a/out [1] \$", r"b/out [1] \$", "o1"]
    # one folder and a picture's name: that picture, and nothing in the folder
    for out_dir in ("o*", "b/ä,漢"):
        os.remove("x.png")
        plot.main(configure(plot, argv=[f"--out_dir={out_dir}", "--image=x.png"]))
        assert os.path.exists("x.png")
    assert os.listdir("o1") == ["log.jsonl"]


def test_hours_and_memory_of_a_run_are_of_its_log(tmp_path):
    entries = logged(100)
    entries[7] |= {"peak_memory_gb": 3.5}
    run = plot.Summary(run_folder_with(tmp_path / "out", *entries))
    assert run.hours == pytest.approx(800 / 2 / 3600) and run.peak == 3.5


@pytest.mark.parametrize("name", ["bench", "bench.memory", "run.plot"])
def test_a_mistyped_command_is_answered_without_torch(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('loaded')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for word in ("nonexistent", "--image", "--no_such_setting=1"):
        process = script(name, word, env=environment)
        out, err = process.communicate()
        one_line_error((process.returncode, out, err), word.removeprefix("--").partition("=")[0])


def test_bench_has_the_settings_of_train_py():
    alone, whole = declarations(train_settings()), declarations(train)
    assert list(alone) == list(whole)
    assert all(alone[name].default == found.default for name, found in whole.items())
    assert str(alone["batch_size"].allowed) == str(whole["batch_size"].allowed)

# -----------------------------------------------------------------------------
# what people type


@pytest.mark.parametrize("text,words", [
    ("import sys\nsys.exit()", "it exits (None)"), ("raise SystemExit('late')", "it exits (late)"),
    ("include('config.py')", "it includes itself"), ("raise ValueError('a\\nb')", "ValueError: a"),
    ("import os\nbatch_size = os", "must be a whole number"),
    ("def batch_size(): pass", "must be a whole number"), ("batch_size = 2j", "found 2j"),
    ("learning_rate = 10**400", "more than 40 digits"), ("seed = 10**5000", "more than 40 digits"),
    ("\ufeffbatch_size = 0", ", not 0"), ("batch_size = 0\r\n", ", not 0"),
])
def test_a_config_file_that_sets_nothing_is_one_line(tmp_path, text, words):
    path = tmp_path / "config.py"
    path.write_bytes(text.encode())
    line = refused(configure, train, argv=[str(path)])
    assert words in line and "config.py" in line


def test_a_config_file_that_is_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.py")
    assert "no ordinary file" in refused(configure, train, argv=[f"{tmp_path}/config.py"])


def test_a_flag_before_another_flag_is_not_its_value():
    assert "no setting 'version'" in refused(configure, train, argv=["--version", "--seed=1"])
    line = refused(configure, train, argv=["--seed", "--max_iters=1"])
    assert line.endswith("write it as --seed=value")


def test_ctrl_c_and_a_missing_package_are_one_line(capsys):
    for error, words in (
        (KeyboardInterrupt(), "interrupted\n"),
        (ModuleNotFoundError(name="torch"), "error: there is no package torch: pip install"),
    ):
        last_words(type(error), error, None)
        shown = capsys.readouterr().err
        assert shown.startswith(words) and shown.count("\n") == 1
    # a file of this repository that is missing is no package
    for error in (ModuleNotFoundError(name="run.nothing"), KeyError("x")):
        last_words(type(error), error, None)
        assert type(error).__name__ in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_c4.py", "finetune.evaluate",
                                  "finetune.prepare_sft"])
def test_without_any_package_every_script_says_so(name):
    code = ("import runpy, sys; sys.path[0:0] = ['.']; start = sys.argv.pop(1); "
            "runpy.run_path(start, run_name='__main__')")
    path = name if name.endswith(".py") else name.replace(".", "/") + ".py"
    # -S: no packages but Python's own
    command = [sys.executable, "-S", "-c", code, path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: there is no package ")


def test_progress_into_a_pipe_draws_no_bar(capsys, monkeypatch):
    assert list(Progress("a", 3, "items").over("xyz")) == ["x", "y", "z"]
    assert capsys.readouterr().err == ""  # shorter than what deserves a line
    monkeypatch.setattr(show, "EVERY", 0)
    list(Progress("a", 3, "items").over("xyz"))
    assert capsys.readouterr().err == "".join(f"a: {n} of 3 items\n" for n in (1, 2, 3))


def test_a_home_folder_is_where_the_shell_has_it(trained, tmp_path):
    out_dir, args = trained
    home = {"before": lambda: os.environ.update(HOME=str(tmp_path))}
    code, out, err = run("train.py", "--out_dir=~/run", *args, "--max_iters=1", **home)
    assert code == 0, err
    assert os.path.exists(tmp_path / "run" / "ckpt.pt") and not os.path.exists("~")


def test_an_out_dir_of_no_name_is_one_line(trained):
    one_line_error(run("train.py", "--out_dir=", *trained[1]), "out_dir is empty")


def test_a_pipe_gets_each_line_at_once(tmp_path):
    code = ("import os; from run.show import protect_output; protect_output(); "
            "print('a line'); os._exit(0)")  # as a kill would: nothing is flushed
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "a line\n"
