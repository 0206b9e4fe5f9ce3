"""
What the tests share: a tiny model, tokens, and train.py and other scripts run as processes.
"""

import glob
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

import train
from configurator import configure
from methods.registry import find
from model import LLaMAConfig
from run.shards import write_shard

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository


def settings(*args):
    """train.py's settings as these flags and config files make them, settled by their method."""
    s = configure(train, argv=[*map(str, args)])
    s.pretrained = ""
    s.low_rank = ""
    return find(s.method).settle(s)


def tiny(**changes):
    """A LLaMAConfig with tiny sizes, but for `changes`."""
    shape = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
             "n_embd": 32, "ffn_dim": 88}
    return LLaMAConfig(**(shape | changes))


def tokens(batch=2, length=32, vocab=61, seed=0):
    """(inputs, targets), (batch, length) int64 each, at random."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(vocab, (batch, length + 1), generator=generator)
    return data[:, :-1].clone(), data[:, 1:].clone()


TINY_MODEL = (  # for any method
    "--n_layer=2 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=257 --encoding=bytes"
    " --block_size=32 --batch_size=4 --device=cpu --dtype=float32 --eval_iters=2 --log_interval=1"
    " --warmup_iters=2"
).split()
TINY_RUN = [*TINY_MODEL, "--method=qgalore", "--rank=16", "--proj_gap=3"]


def write_shards(folder, n=20_000, n_vocab=257):
    """Two shards to train on and one to validate on, of a text that is soon learned."""
    words = ["the ", "weights ", "of ", "a ", "layer ", "step ", "in ", "backward.\n"]
    text = "".join(random.Random(0).choices(words, k=n))[:n]
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    os.makedirs(folder, exist_ok=True)
    for i, part in enumerate(np.array_split(data[: n * 9 // 10], 2)):
        write_shard(f"{folder}/text_train_{i:05d}.bin", part, n_vocab)
    write_shard(f"{folder}/text_val_00000.bin", data[n * 9 // 10 :], n_vocab)


def script(name, *args, **popen):
    """Start a script, "sample.py", or a module, "finetune.hf"."""
    start = [f"{HERE}/{name}"] if name.endswith(".py") else ["-m", name]
    options = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *start, *map(str, args)], **(options | popen))


def free_port():
    """Below the ports that connections get: one of those could be taken before the job listens."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):  # nobody listens
                return port


class Job:
    """A fork of this process for each function: nothing is imported again.

    They have the environment that torchrun would give, of `size` ranks (0: none), and their output
    goes to files."""

    def __init__(self, folder, *functions, size=None, **env):
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        self.processes = []
        torchrun = {"WORLD_SIZE": size or len(functions), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": free_port()}
        fork = torch.multiprocessing.get_context("fork")
        for rank, function in enumerate(functions):
            given = torchrun | {"RANK": rank, "LOCAL_RANK": rank} | env
            if size == 0:
                given = {}
            process = fork.Process(target=self._run, args=(rank, function, given))
            process.start()
            self.processes.append(process)

    def _run(self, rank, function, env):
        os.setsid()
        for fd, name in ((1, "out"), (2, "err")):
            file = os.open(f"{self.folder}/{rank}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(file, fd)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        os.environ.update({key: str(value) for key, value in env.items() if value is not None})
        torch.set_num_threads(1)
        function()

    def wait(self, timeout=120):
        """[(exit code, stdout, stderr)] by rank."""
        deadline = time.monotonic() + timeout
        results = []
        for rank, process in enumerate(self.processes):
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                for hanging in self.processes:
                    hanging.kill()  # or pytest would wait for it
                raise AssertionError(f"rank {rank} hangs")
            texts = [open(f"{self.folder}/{rank}.{name}").read() for name in ("out", "err")]
            results.append((process.exitcode, *texts))
        return results


def trains(*args):
    """A rank's function: train.py with these arguments."""

    def main():
        sys.argv = ["train.py", *map(str, args)]
        train.main(configure(train))

    return main


def run(name, *args, before=None):
    """(exit code, stdout, stderr) of a script; before(): what its process does first."""
    if name == "train.py":

        def main():
            if before is not None:
                before()
            trains(*args)()

        with tempfile.TemporaryDirectory() as folder:
            return Job(folder, main, size=0).wait()[0]
    process = script(name, *args, preexec_fn=before)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def read_log(out_dir):
    """{(iter, what): value} of log.jsonl; no line may come twice."""
    entries = {}
    with open(f"{out_dir}/log.jsonl") as f:
        for line in map(json.loads, f):
            for what in ("loss", "val_loss"):
                if what in line:
                    assert (line["iter"], what) not in entries
                    entries[line["iter"], what] = line[what]
    return entries


def refused(function, *args, **kwargs):
    """The one line with which a function exits."""
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def contents(folder):
    """{path within: what is in it} of a folder's files."""
    found = {}
    for name in glob.glob("**", root_dir=folder, recursive=True):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                found[name] = f.read()
    return found


def one_line_error(result, *words):
    code, out, err = result
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(error) == 1 and "Traceback" not in err, err
    assert all(word in error[0] for word in words), error


def check_run(shards, out_dir, method):
    """A run by a method, from beginning to end: it learns, and leaves its files."""
    flags = [f"--method={method}", "--max_iters=40", "--eval_interval=20", "--grad_clip=10",
             "--weight_decay=0.01", "--sample_tokens=5"]
    reads = find(method).reads
    for setting in TINY_RUN:
        if setting in TINY_MODEL or setting[2:].partition("=")[0] in reads:
            flags.append(setting)
    code, out, err = run("train.py", f"--data_dir={shards}", f"--out_dir={out_dir}", *flags)
    assert code == 0 and "next: " in out, err
    log = read_log(out_dir)
    less = 0.5 if "lora" in method else 1  # on random frozen weights
    assert log[40, "val_loss"] < log[0, "val_loss"] - less

    with open(f"{out_dir}/log.jsonl") as f:
        lines = [entry for entry in map(json.loads, f) if "loss" in entry]
    assert [entry["iter"] for entry in lines] == list(range(40))
    wanted = {"loss", "lr", "tokens", "tokens_per_s", "peak_memory_gb", "grad_norm"}
    assert wanted <= lines[0].keys()
    assert lines[-1]["tokens"] == 40 * 4 * 32
    rates = [entry["lr"] for entry in lines]
    assert rates[:2] == pytest.approx([0.01 / 3, 0.02 / 3]) and rates[2] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[2:], rates[3:]))
    assert rates[-1] == pytest.approx(0.001, rel=0.05)

    files = {"ckpt-1.pt", "ckpt.pt", "config.json", "log.jsonl", "loss.png"}
    if "proj_gap" in reads:
        files.add("subspaces.png")
    assert set(os.listdir(out_dir)) == files
    args = [f"--out_dir={out_dir}", "--prompt=the wei", "--max_new_tokens=20", "--device=cpu"]
    code, out, err = run("sample.py", *args)
    assert code == 0 and out.startswith("the wei") and len(out) > 15, err
