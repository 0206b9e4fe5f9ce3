"""
Several ranks, as forks of this process with gloo between them:
    python -m pytest tests/test_parallel.py
"""

import glob
import json
import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

from model import LLaMA
from run import ranks as ranks_module
from run.data import Windows
from run.ranks import Ranks
from run.shards import write_shard
from tests.common import HERE, TINY_MODEL, TINY_RUN, Job, one_line_error, read_log, tiny, trains


def test_two_ranks_learn_as_one_does_and_a_resume_may_have_more(tmp_path):
    # in the tiny vocabulary of `shards` Adam makes rounding errors grow
    text = np.fromfile(f"{HERE}/README.md", dtype=np.uint8)
    write_shard(f"{tmp_path}/text_train_00000.bin", text[:-9000], 257)
    write_shard(f"{tmp_path}/text_val_00000.bin", text[-9000:], 257)
    args = [f"--data_dir={tmp_path}", *TINY_RUN]
    args += ["--method=fira", "--proj_gap=30", "--grad_clip=0.5", "--by_block=True"]
    args += ["--gradient_accumulation_steps=4", "--accumulation=float32"]
    args += ["--weight_bits=16"]
    args += ["--learning_rate=0.001", "--decay_lr=False", "--eval_interval=12"]
    losses = []
    for size in (1, 2):
        out_dir = f"{tmp_path}/{size}"
        start = trains(*args, f"--out_dir={out_dir}", "--max_iters=12")
        resume = trains(*args, f"--out_dir={out_dir}", "--max_iters=24", "--init_from=resume")
        for functions in ([start] * size, [resume] * size**2):  # two ranks go on as four
            (code, out, err), *_ = Job(out_dir, *functions).wait()
            assert code == 0, err
        losses.append(read_log(out_dir))
        position = torch.load(f"{out_dir}/ckpt.pt", weights_only=True)["position"]
        assert position == 24 * 4 * 4  # steps, micro-batches, sequences

    assert losses[0].keys() == losses[1].keys()
    assert len(losses[0]) == 24 + 3
    for key, loss in losses[0].items():
        assert losses[1][key] == pytest.approx(loss, rel=2e-5), key

    # what a step without a refresh sends, in float32
    with open(f"{tmp_path}/2/log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    with open(f"{tmp_path}/2/config.json") as f:
        c = json.load(f)
    d, ffn = c["n_embd"], c["ffn_dim"]
    dense = 2 * 257 * d + (2 * c["n_layer"] + 1) * d  # embedding, head, norms
    whole = c["n_layer"] * (4 * d + 3 * ffn) * d
    sent = [line["sent_mb"] for line in lines if "sent_mb" in line]
    assert min(sent[1:]) == pytest.approx(4 * (whole + dense) / 1e6)


def test_ranks_stay_identical_where_sums_are_rounded(shards, tmp_path):
    args = [f"--data_dir={shards}", *TINY_MODEL, "--method=qmuon"]
    args += ["--gradient_accumulation_steps=4", "--max_iters=12"]
    args += ["--eval_interval=4"]  # at an evaluation ranks compare what they have
    losses = []
    for size in (1, 2):
        out_dir = f"{tmp_path}/{size}"
        function = trains(*args, f"--out_dir={out_dir}")
        (code, out, err), *_ = Job(out_dir, *[function] * size).wait()
        assert code == 0, err
        losses.append(read_log(out_dir))
    for key, loss in losses[0].items():  # INT8 sums of two ranks round otherwise than those of one
        assert losses[1][key] == pytest.approx(loss, rel=0.01), key


def test_ranks_together_read_the_windows_that_one_would(shards):
    pattern = f"{shards}/*_train_*.bin"
    whole, *parts = [Windows(pattern, 32, 257, seed=5) for _ in range(4)]
    for _ in range(100):  # epochs and shards end in between
        expected = [whole.batch(2)[0] for _ in range(3)]
        for rank, windows in enumerate(parts):
            assert torch.equal(windows.batch(2, rank, 3)[0], expected[rank])
    assert whole.position > whole.total
    assert {windows.position for windows in parts} == {whole.position}


def last_step(out_dir):
    """The last step that a run has logged so far, 0 before the first."""
    if not glob.glob(f"{out_dir}/log.jsonl"):
        return 0
    return max((step for step, _ in read_log(out_dir)), default=0)


def test_a_rank_dies_the_other_says_so_and_the_run_resumes(shards, tmp_path):
    kills = int(os.environ.get("KILLS", 2))
    rng = random.Random(0)
    whole, broken = f"{tmp_path}/whole", f"{tmp_path}/broken"
    args = [f"--data_dir={shards}", *TINY_RUN, "--gradient_accumulation_steps=2"]
    args += [f"--max_iters={30 + 15 * kills}", "--eval_interval=5", "--rank_timeout=30"]
    assert Job(whole, *[trains(*args, f"--out_dir={whole}")] * 2).wait()[0][0] == 0

    reached = 8  # the step after which the next rank dies
    for i in range(kills + 1):
        init_from = "resume" if i else "scratch"
        function = trains(*args, f"--out_dir={broken}", f"--init_from={init_from}")
        job = Job(broken, function, function)
        if i == kills:
            break
        while last_step(broken) < reached and job.processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        reached = last_step(broken) + 1
        victim = rng.randrange(2)
        os.kill(job.processes[victim].pid, signal.SIGKILL)
        result = job.wait(60)
        assert result[victim][0] == -signal.SIGKILL
        one_line_error(result[1 - victim], "has lost another rank", "checkpoint")
    assert [code for code, _, err in job.wait()] == [0, 0]

    # bit for bit
    assert read_log(broken) == read_log(whole)
    a, b = (torch.load(f"{d}/ckpt.pt", weights_only=True)["model"] for d in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_job_that_cannot_start_is_one_line_on_every_rank(shards, tmp_path):
    jobs = 0

    def job(*functions, **env):
        nonlocal jobs
        jobs += 1
        return Job(f"{tmp_path}/{jobs}", *functions, **env).wait(60)

    args = [f"--data_dir={shards}", f"--out_dir={tmp_path}/out", *TINY_RUN]
    args += ["--max_iters=2", "--rank_timeout=3"]
    two = [*args, "--gradient_accumulation_steps=2"]
    # different settings
    for result in job(trains(*two), trains(*two, "--learning_rate=0.5")):
        one_line_error(result, "rank 1 has learning_rate = 0.5", "rank 0 has 0.01")
    # one micro-batch for two ranks
    for result in job(trains(*args), trains(*args)):
        one_line_error(result, "gradient_accumulation_steps = 1", "multiple of 2")
    # no rendezvous
    for result in job(trains(*args), MASTER_ADDR=None):
        one_line_error(result, "MASTER_ADDR not set")
    # a rank that does not come
    for result in job(trains(*two), size=2):
        one_line_error(result, "rank 0:")
    # different devices
    functions = [partial(Ranks, "cpu", {"device": device}, 3.0) for device in ("cuda", "cpu")]
    for result in job(*functions):
        one_line_error(result, "rank 1 has device = 'cpu', rank 0 has 'cuda'")
    assert not os.path.exists(f"{tmp_path}/out/log.jsonl")


def test_ranks_with_different_code_are_refused_by_file(tmp_path):
    files = ranks_module._code()
    assert {"qgalore.py", "run/ranks.py", "kernels/moments.py", "finetune/hf.py"} < files.keys()
    for path in [*files, "test_qgalore.py"]:
        os.makedirs(os.path.dirname(f"{tmp_path}/copy/{path}"), exist_ok=True)
        shutil.copy(f"{HERE}/{path}", f"{tmp_path}/copy/{path}")

    def start():
        ranks = Ranks("cpu", {}, 30.0)
        print("all alike")
        ranks.leave()

    def start_changed(path):
        with open(f"{tmp_path}/copy/{path}", "a") as f:
            f.write("# a change\n")
        ranks_module.REPOSITORY = f"{tmp_path}/copy"
        start()

    # tests are no code of a run
    job = Job(f"{tmp_path}/1", start, partial(start_changed, "test_qgalore.py"))
    assert [(code, out) for code, out, _ in job.wait(60)] == [(0, "all alike\n")] * 2
    job = Job(f"{tmp_path}/2", start, partial(start_changed, "methods/registry.py"))
    for result in job.wait(60):
        one_line_error(result, "rank 1 has methods/registry.py = ", "start all ranks alike")


def test_ranks_that_differ_are_found_and_the_layer_is_named(tmp_path):
    def work():
        ranks = Ranks("cpu", {}, 30.0)
        torch.manual_seed(0)
        model = LLaMA(tiny())
        ranks.check_identical(model.state_dict(), "at the start")
        if ranks.rank == 1:
            model.blocks[1].mlp.up_proj.q[3, 5] ^= 1
        print("they were alike")
        ranks.check_identical(model.state_dict(), "at step 7")

    for result in Job(tmp_path, work, work).wait(60):
        assert "they were alike" in result[1]
        one_line_error(result, "ranks differ at step 7", "1 of", "first in blocks.1.mlp.up_proj.q")
