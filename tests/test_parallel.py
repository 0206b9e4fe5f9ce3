"""
Several ranks, as forks of this process with gloo between them:
    python -m pytest test_parallel.py
"""

import glob
import json
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

import train
from model import LLaMA
from run.ranks import Ranks
from run.shards import write_shard
from tests.common import HERE, TINY_RUN, Job, one_line_error, read_log, tiny, trains


def test_ranks_make_the_steps_of_one_process_and_a_resume_may_change_their_number(tmp_path):
    text = np.fromfile(f"{HERE}/README.md", dtype=np.uint8)  # in eight words' text Adam makes rounding errors grow
    for split, part in (("train", text[:-9000]), ("val", text[-9000:])):
        write_shard(f"{tmp_path}/text_{split}_00000.bin", part, 257)
    args = [f"--data_dir={tmp_path}", *TINY_RUN, "--gradient_accumulation_steps=4", "--accumulation=float32",
            "--grad_clip=0.5", "--eval_interval=12", "--weight_bits=16", "--proj_bits=16", "--moments=float32",
            "--learning_rate=0.001", "--residual_blocks=4"]
    losses, position = [], None
    for size in (1, 2):
        out_dir = f"{tmp_path}/{size}"
        for ranks, more in ((size, ["--max_iters=12"]), (size**2, ["--max_iters=24", "--init_from=resume"])):
            rank = trains(*args, f"--out_dir={out_dir}", "--decay_lr=False", *more)
            (code, out, err), *_ = Job(out_dir, *[rank] * ranks).wait()
            assert code == 0, err
        losses.append(read_log(out_dir))
        position = torch.load(f"{out_dir}/ckpt.pt", weights_only=True)["position"]
        assert position == 24 * 4 * 4
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 24 + 3
    for key, loss in losses[0].items():
        assert losses[1][key] == pytest.approx(loss, rel=2e-5), key
    with open(f"{tmp_path}/2/log.jsonl") as f:
        lines = [json.loads(line) for line in f]
    c = json.load(open(f"{tmp_path}/2/config.json"))
    d, ffn, r = c["n_embd"], c["ffn_dim"], c["rank"]
    dense = 2 * 257 * d + (2 * c["n_layer"] + 1) * d
    rows = r + d // 4  # of the low-rank gradient, and of the one that is looked at for its residual
    low_rank = c["n_layer"] * (4 * d + 3 * ffn) * rows
    sent = [line["sent_mb"] for line in lines if "sent_mb" in line]
    assert min(sent[1:]) == pytest.approx(4 * (low_rank + dense) / 1e6)  # of a step without a refresh, in float32


def test_ranks_whose_momentum_is_their_sum_stay_identical_and_learn_what_one_process_does(shards, tmp_path):
    args = [f"--data_dir={shards}", *TINY_RUN, "--method=qmuon", "--gradient_accumulation_steps=4", "--residual_blocks=2",
            "--max_iters=12", "--eval_interval=4"]  # at an evaluation ranks compare what they have
    losses = []
    for size in (1, 2):
        (code, out, err), *_ = Job(f"{tmp_path}/{size}", *[trains(*args, f"--out_dir={tmp_path}/{size}")] * size).wait()
        assert code == 0, err
        losses.append(read_log(f"{tmp_path}/{size}"))
    for key, loss in losses[0].items():  # INT8 sums of two ranks round otherwise than those of one
        assert losses[1][key] == pytest.approx(loss, rel=0.01), key


def test_each_rank_reads_its_own_windows_and_all_together_what_one_would(shards):
    reader = lambda: train.Windows(f"{shards}/*_train_*.bin", 32, 257, seed=5)
    whole, ranks = reader(), [reader() for _ in range(3)]
    for _ in range(100):  # epochs and shards end in between
        expected = [whole.batch(2)[0] for _ in range(3)]
        for rank, (windows, batch) in enumerate(zip(ranks, expected)):
            assert torch.equal(windows.batch(2, rank, 3)[0], batch)
    assert whole.position > whole.total and {windows.position for windows in ranks} == {whole.position}


def test_when_a_rank_dies_the_other_says_so_and_the_checkpoint_resumes_bit_for_bit(shards, tmp_path):
    kills, reached = int(os.environ.get("KILLS", 2)), 8
    args = [f"--data_dir={shards}", *TINY_RUN, "--gradient_accumulation_steps=2", f"--max_iters={30 + 15 * kills}",
            "--eval_interval=5", "--rank_timeout=30"]
    whole, broken, rng = f"{tmp_path}/whole", f"{tmp_path}/broken", random.Random(0)
    assert Job(whole, *[trains(*args, f"--out_dir={whole}")] * 2).wait()[0][0] == 0
    for i in range(kills + 1):
        function = trains(*args, f"--out_dir={broken}", f"--init_from={'resume' if i else 'scratch'}")
        job = Job(broken, function, function)
        if i < kills:
            last = lambda: max((it for it, _ in read_log(broken)), default=0) if glob.glob(f"{broken}/log.jsonl") else 0
            while last() < reached and job.processes[0].is_alive():
                time.sleep(0.01)
            time.sleep(rng.random() * 0.1)
            reached = last() + 1
            victim = rng.randrange(2)
            os.kill(job.processes[victim].pid, signal.SIGKILL)
            result = job.wait(60)
            assert result[victim][0] == -signal.SIGKILL
            one_line_error(result[1 - victim], "has lost another rank", "checkpoint")
    assert [code for code, _, err in job.wait()] == [0, 0]
    assert read_log(broken) == read_log(whole)
    a, b = (torch.load(f"{d}/ckpt.pt", weights_only=True)["model"] for d in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_job_that_cannot_start_is_one_line_on_every_rank(shards, tmp_path):
    def job(*functions, **env):
        job.count += 1
        return Job(f"{tmp_path}/{job.count}", *functions, **env).wait(60)

    job.count = 0
    args = [f"--data_dir={shards}", f"--out_dir={tmp_path}/out", *TINY_RUN, "--max_iters=2", "--rank_timeout=3"]
    two = [*args, "--gradient_accumulation_steps=2"]
    for result in job(trains(*two), trains(*two, "--learning_rate=0.5")):  # different settings
        one_line_error(result, "rank 1 has learning_rate = 0.5", "rank 0 has 0.01")
    for result in job(trains(*args), trains(*args)):  # one micro-batch for two ranks
        one_line_error(result, "gradient_accumulation_steps = 1", "multiple of 2")
    for result in job(trains(*args), MASTER_ADDR=None):  # no rendezvous
        one_line_error(result, "MASTER_ADDR not set")
    for result in job(trains(*two), size=2):  # a rank that does not come
        one_line_error(result, "rank 0:")
    for result in job(*[partial(Ranks, "cpu", {"device": device}, 3.0) for device in ("cuda", "cpu")]):
        one_line_error(result, "rank 1 has device = 'cpu', rank 0 has 'cuda'")
    assert not os.path.exists(f"{tmp_path}/out/log.jsonl")


def test_ranks_that_come_to_differ_are_found_and_the_layer_is_named(tmp_path):
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
