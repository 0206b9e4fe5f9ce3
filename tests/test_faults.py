"""
Every kind of trouble that a run met, and what is right: docs/reliability.md lists them.
    python -m pytest tests/test_faults*.py

Here are runs, pictures and commands. Beside it: test_faults_data.py, test_faults_files.py,
test_faults_numbers.py. tests/torture.py kills, fills disks and damages files at random.
"""

import glob
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch

import numpy as np
import train
from bench.settings import train_settings
from configurator import configure, declarations
from methods.registry import find
from run import files
from run import folder as run_folder, history, memory, plot, show
from run.checkpoint import Damaged, load_checkpoint, read_checkpoint
from run.device import choose_threads
from run.folder import Folder
from run.machine import free_memory, usable_cores
from run.show import Progress, Shown, last_words
from run.stop import SIGNALS, Stop
from tests.common import (HERE, TINY_MODEL, TINY_RUN, contents, one_line_error, read_log, refused,
                          run, script, settings)

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
def a_copy(trained, tmp_path):
    """The same, for this test to change: (out_dir, arguments)."""
    shutil.copytree(trained[0], tmp_path / "out")
    return tmp_path / "out", [f"--out_dir={tmp_path}/out", *trained[1]]


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
            second = run("train.py", *args, *more)
            one_line_error(second, f"process {os.getpid()} on ", "trains there now")
        # others may read, and write nothing
        code, out, err = run("train.py", *args, "--eval_only=True", "--init_from=resume")
        assert code == 0 and "--- resume: val loss " in out, err
        assert contents(out_dir) == before
    assert not os.path.exists(out_dir / "lock")


@pytest.mark.parametrize("where", ["windows", "no locks"])
def test_where_no_lock_can_be_had_a_run_goes_on(a_copy, monkeypatch, where):
    def no_locks(f, how):
        raise OSError(37, "No locks available")

    if where == "windows":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with Folder(str(a_copy[0])) as folder:
        folder.hold()
        assert folder.lock is not None


@pytest.mark.parametrize("has_run,words", [(True, "takes the last"), (False, "nothing was saved")])
def test_a_stop_speaks_of_the_checkpoint_that_there_is(a_copy, tmp_path, has_run, words):
    out_dir = a_copy[0] if has_run else tmp_path / "new"
    out_dir.mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=words), Folder(str(out_dir)) as folder:
        folder.hold()
        raise KeyboardInterrupt


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


def test_a_runs_folder_is_no_model_to_start_from(trained, tmp_path):
    started = run("train.py", f"--out_dir={tmp_path}/x", f"--init_from={trained[0]}")
    one_line_error(started, "is a run's folder", f"--out_dir={trained[0]} --init_from=resume")


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
    s = settings("--method=qgalore", "--rank=8", "--proj_side=right", "--n_layer=1",
                 "--n_embd=1024", "--n_head=16", "--ffn_dim=1024", "--vocab_size=64",
                 "--batch_size=1", f"--block_size={length}")
    plan = memory.memory_plan(s, torch.float32, torch.float32, fragments=0.75)
    kept = (plan["fragments, workspaces"] - memory.WORKSPACES) / 0.75
    assert kept == pytest.approx(share * plan["gradients, activations"], rel=0.01,
                                 abs=0.15 * plan["gradients, activations"])


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
    curve, subspaces = history.Curve(), history.SubspaceMap()
    for step in range(100_000):
        curve.add(step, step % 2)
        found = {"blocks.0.q": [(step, 0.5, 2)]} if step % 2 else {}
        subspaces.add({"iter": step, "subspaces": found})
    assert len(curve.points) < 2 * history.POINTS
    x, mean, low, high = curve.columns()
    assert list(x) == sorted(x) and x[-1] == 99_999
    assert set(mean) == {0.5} and set(low) == {0} and set(high) == {1}
    names, similarity, gap = subspaces.values()
    assert similarity.shape == gap.shape == (1, -(-100_000 // subspaces.width))
    assert similarity.shape[1] <= history.COLUMNS and set(similarity[0]) == {0.5}


def test_wide_columns_keep_each_last_refresh_and_its_place():
    whole, wide = history.SubspaceMap(), history.SubspaceMap()
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
    run = history.Summary(folder)
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
    run = history.Summary(run_folder_with(tmp_path / "out", *entries))
    assert run.hours == pytest.approx(800 / 2 / 3600) and run.peak == 3.5


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


SCRIPTS = ["train.py", "sample.py", "prepare_c4.py", "finetune.hf", "finetune.welore",
           "finetune.prepare_sft", "finetune.evaluate", "bench", "bench.memory", "run.plot"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mistyped_command_is_answered_without_torch(name, tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('loaded')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for word in ("nonexistent", "--device", "--no_such_setting=1"):
        process = script(name, word, env=environment)
        out, err = process.communicate(timeout=60)
        one_line_error((process.returncode, out, err), word.removeprefix("--").partition("=")[0])
    process = script(name, "--help", env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--" in out, err
