"""
Runs of train.py as processes: how they end, what they leave, and what they do with what they find:
    python -m pytest tests/test_runs.py

Resuming bit for bit, and runs of qgalore and adamw, are tested in test_qgalore.py.
"""

import glob
import os
import pickle
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from run.checkpoint import FORMAT, checkpoint_paths, load_checkpoint, save_checkpoint
from run.data import Windows
from run.shards import write_shard
from run.stop import Stop
from tests.common import (HERE, TINY_RUN, Job, check_run, contents, one_line_error, read_log, run,
                          script)


def arguments(shards, out_dir, *more):
    return [f"--data_dir={shards}", f"--out_dir={out_dir}", *TINY_RUN, *more]


def damage(path):
    """Turn one bit in the middle of a file: in a checkpoint, of the weights."""
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("method", ["galore", "adam8bit", "lora", "qlora"])
def test_each_method_learns_and_leaves_its_files(shards, tmp_path, method):
    check_run(shards, tmp_path, method)


# -----------------------------------------------------------------------------
# how a run ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(shards, tmp_path, number):
    args = arguments(shards, tmp_path, "--eval_interval=1000", "--decay_lr=False")
    process = script("train.py", *args, "--max_iters=100000")
    while process.poll() is None:
        if os.path.exists(f"{tmp_path}/log.jsonl") and len(read_log(tmp_path)) > 5:
            break
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "--init_from=resume" in out and "Traceback" not in err
    step = torch.load(f"{tmp_path}/ckpt.pt", weights_only=True)["iter"]
    assert step == 1 + max(it for it, what in read_log(tmp_path) if what == "loss")
    code, out, err = run("train.py", *args, f"--max_iters={step + 2}", "--init_from=resume")
    assert code == 0 and (step + 1, "loss") in read_log(tmp_path), err


def test_a_second_ctrl_c_ends_a_lone_run_at_once(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for alone in (True, False):
        stop = Stop(minutes=0, alone=alone, began=0)
        assert not stop.asked()
        stop._come(signal.SIGINT, None)
        assert stop.asked() and stop.reason() == "SIGINT"
        if alone:
            with pytest.raises(KeyboardInterrupt):
                stop._come(signal.SIGINT, None)
        else:  # torchrun itself asks twice
            stop._come(signal.SIGTERM, None)


def test_max_minutes_saves_and_leaves(shards, tmp_path):
    args = arguments(shards, tmp_path, "--eval_interval=100000", "--max_iters=100000")
    code, out, err = run("train.py", *args, "--decay_lr=False", "--max_minutes=0.01")
    assert code == 0 and "max_minutes: saved step" in out, err
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["iter"] >= 1


def test_a_finished_run_that_is_resumed_ends_well(shards, tmp_path):
    args = arguments(shards, tmp_path, "--max_iters=2")
    for more in ([], ["--init_from=resume"]):
        code, out, err = run("train.py", *args, *more)
        assert code == 0 and "--- " in out, err


def test_a_rank_larger_than_a_side_is_clamped_and_said(shards, tmp_path):
    code, out, err = run("train.py", *arguments(shards, tmp_path, "--rank=65", "--max_iters=2"))
    assert code == 0, err
    assert "rank 65 is larger than the smaller side of 14 matrices" in out


# -----------------------------------------------------------------------------
# evaluation alone


@pytest.mark.parametrize("start", ["resume", "scratch"])
def test_evaluation_alone_touches_no_file(shards, tmp_path, start):
    out_dir = tmp_path / "out"
    args = arguments(shards, out_dir, "--max_iters=4", "--eval_interval=2")
    assert run("train.py", *args)[0] == 0
    before = contents(out_dir)
    assert {"ckpt.pt", "ckpt-1.pt", "log.jsonl", "config.json"} <= before.keys()
    code, out, err = run("train.py", *args, "--eval_only=True", f"--init_from={start}")
    assert code == 0, err
    step = 4 if start == "resume" else 0
    assert f"--- {start}: val loss {read_log(out_dir)[step, 'val_loss']:.4f}" in out
    assert contents(out_dir) == before
    assert os.listdir(tmp_path) == ["out"]


def test_evaluation_alone_makes_no_folder(shards, tmp_path):
    args = arguments(shards, tmp_path / "out", "--eval_only=True")
    code, out, err = run("train.py", *args, "--init_from=scratch")
    assert code == 0 and "--- scratch: val loss " in out, err
    assert os.listdir(tmp_path) == []
    # random weights are evaluated where they are asked for, alone
    for more in ([], ["--init_from=auto"]):
        one_line_error(run("train.py", *args, *more), "there is no checkpoint in")
    one_line_error(run("train.py", *args, "--init_from=resume"), "ckpt.pt", "does not exist")
    assert os.listdir(tmp_path) == []


def test_evaluation_alone_leaves_a_damaged_checkpoint_there(shards, tmp_path):
    args = arguments(shards, tmp_path, "--max_iters=4", "--eval_interval=2")
    assert run("train.py", *args)[0] == 0
    damage(tmp_path / "ckpt.pt")
    before = contents(tmp_path)
    code, out, err = run("train.py", *args, "--eval_only=True", "--init_from=resume")
    assert code == 0 and "going back" in out, err
    assert f"--- resume: val loss {read_log(tmp_path)[2, 'val_loss']:.4f}" in out
    assert contents(tmp_path) == before


# -----------------------------------------------------------------------------
# checkpoints


class Malice:
    def __reduce__(self):
        return os.system, ("echo malice > malice",)


def refused(message):
    """The checkpoint of the working directory is refused in one line."""
    with pytest.raises(SystemExit) as e:
        load_checkpoint("")
    assert str(e.value).startswith("error: ckpt.pt ") and "\n" not in str(e.value)
    assert message in str(e.value)


def test_damaged_and_foreign_checkpoints_are_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("does not exist")
    save_checkpoint("", {"config": {}, "model": {}, "optimizer": {}, "iter": 0, "position": 0})
    load_checkpoint("")
    with open("ckpt.pt", "rb") as f:
        whole = f.read()
    for content in (whole[: len(whole) // 2], b"", b"hello", pickle.dumps(Malice())):
        with open("ckpt.pt", "wb") as f:
            f.write(content)
        refused("damaged, or not a checkpoint")
    for content in ({"a": 1}, [1], {"model": Malice()}):
        torch.save(content, "ckpt.pt")
        refused("not a checkpoint of train.py")
    assert not os.path.exists("malice")


@pytest.mark.parametrize("made,words", [(None, "another version"), (1, "format 1, not 3"),
                                        (2, "go on with the version that made it"),
                                        (FORMAT + 1, "another version")])
def test_another_versions_checkpoint_is_refused(tmp_path, monkeypatch, made, words):
    monkeypatch.chdir(tmp_path)
    checkpoint = dict.fromkeys(("config", "model", "optimizer", "iter", "position"))
    if made is not None:
        checkpoint["format"] = made
    torch.save(checkpoint, "ckpt.pt")
    # nor is the one before it taken: only damage makes a run go back
    torch.save(checkpoint | {"format": FORMAT}, "ckpt-1.pt")
    refused(words)


def test_what_a_run_finds_in_its_folder_is_not_lost(shards, tmp_path):
    args = arguments(shards, tmp_path, "--max_iters=3")
    one_line_error(run("train.py", *args, "--init_from=resume"), "ckpt.pt", "does not exist")
    assert run("train.py", *args)[0] == 0
    first = contents(tmp_path)
    # a checkpoint of another shape is not resumed
    other = run("train.py", *args, "--init_from=resume", "--n_embd=32")
    one_line_error(other, "n_embd = 64", "32")
    assert contents(tmp_path) == first
    # from scratch, what was there is set aside
    assert run("train.py", *args)[0] == 0
    after = contents(tmp_path)
    for name in first:
        assert after[f"earlier-1/{name}"] == first[name]
    assert after.keys() - first.keys() == {f"earlier-1/{name}" for name in first}
    # and a damaged one is said to be damaged by others that read it
    (tmp_path / "ckpt.pt").write_bytes(first["ckpt.pt"][:1000])
    one_line_error(run("sample.py", f"--out_dir={tmp_path}"), "ckpt.pt", "damaged")


def test_a_damaged_checkpoint_is_passed_over_for_the_last(shards, tmp_path):
    args = arguments(shards, tmp_path, "--eval_interval=2", "--max_iters=8", "--keep_checkpoints=3")
    assert run("train.py", *args)[0] == 0
    names = ["ckpt.pt", "ckpt-1.pt", "ckpt-2.pt"]
    assert sorted(glob.glob("ckpt*", root_dir=tmp_path)) == sorted(names)
    shutil.copy(tmp_path / "ckpt-2.pt", tmp_path / "ckpt_best.pt")  # a user's own: never taken
    assert checkpoint_paths(tmp_path) == [str(tmp_path / name) for name in names]
    states = [torch.load(tmp_path / name, weights_only=True) for name in names]
    assert [state["iter"] for state in states] == [8, 6, 4]
    whole = read_log(tmp_path)
    damage(tmp_path / "ckpt.pt")
    code, out, err = run("train.py", *args, "--init_from=resume")
    assert code == 0 and "ckpt.pt is damaged" in out and "going back" in out, err
    assert os.path.exists(tmp_path / "damaged_ckpt.pt")
    # the steps that were lost come again, the same
    assert read_log(tmp_path) == whole
    again = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert again["iter"] == 8
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, again["model"][name])


def test_saving_makes_no_copy_of_the_model_in_memory(tmp_path):
    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def save():
        weights = {f"layer {i}": torch.ones(5_000_000) for i in range(20)}  # 400 MB
        before = memory()
        save_checkpoint(tmp_path, {"model": weights})
        print(memory() - before)

    ((code, grown, err),) = Job(tmp_path, save, size=0).wait()
    assert code == 0 and float(grown) < 40, (grown, err)
    assert os.path.getsize(tmp_path / "ckpt.pt") > 400e6


def test_a_full_disk_leaves_the_last_good_checkpoint(shards, tmp_path):
    args = arguments(shards, tmp_path, "--eval_interval=2")
    assert run("train.py", *args, "--max_iters=2")[0] == 0
    good = contents(tmp_path)["ckpt.pt"]

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, len(good) // 2))

    more = [*args, "--max_iters=8", "--init_from=resume"]
    one_line_error(run("train.py", *more, before=fill_disk), "ckpt.pt", "is whole")
    after = contents(tmp_path)
    assert after["ckpt.pt"] == good and not any(name.endswith(".tmp") for name in after)
    code, out, err = run("train.py", *more)
    assert code == 0, err


# -----------------------------------------------------------------------------
# what a run needs


def test_an_out_dir_that_cannot_be_written_is_one_line(shards, tmp_path):
    (tmp_path / "file").write_text("")
    one_line_error(run("train.py", *arguments(shards, tmp_path / "file")), "out_dir", "file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_asked_for_and_absent_is_one_line(tmp_path):
    one_line_error(run("train.py", f"--out_dir={tmp_path}", "--device=cuda"), "device=cuda")
    code, out, err = run("train.py", f"{HERE}/config/demo.py", "--device=cuda", "--dry_run=True")
    assert code == 0 and "no such device here" in out


def test_bad_shards_are_refused_by_name(tmp_path):
    path = f"{tmp_path}/a_train_0.bin"

    def refused(message, block_size=32, vocab_size=257):
        with pytest.raises(SystemExit, match="error: ") as e:
            Windows(f"{tmp_path}/*_train_*.bin", block_size, vocab_size, 0).batch(1)
        assert message in str(e.value) and "\n" not in str(e.value)

    refused("no shards")
    write_shard(path, np.arange(100), 0)  # of another maker: the vocabulary is not told
    refused("token 99", vocab_size=99)
    refused("less than one sequence", block_size=100)
    write_shard(path, np.arange(100), 257)
    refused("its vocabulary has 257", vocab_size=99)
    with open(path, "rb") as f:
        whole = f.read()
    for content in (whole[:-2], b"\0" * 4 + whole[4:], b""):
        with open(path, "wb") as f:
            f.write(content)
        refused(path)
    one_line_error(run("train.py", *arguments(tmp_path, tmp_path / "x")), "a_train_0.bin")
