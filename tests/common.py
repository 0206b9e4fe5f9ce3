"""
What the tests share: a tiny model, tokens, and train.py and other scripts run as processes.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
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
    shape = dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=88)
    return LLaMAConfig(**(shape | changes))


def tokens(batch=2, length=32, vocab=61, seed=0):
    data = torch.randint(vocab, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return data[:, :-1].clone(), data[:, 1:].clone()


TINY_MODEL = (  # for any method
    "--n_layer=2 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=257 --encoding=bytes"
    " --block_size=32 --batch_size=4 --device=cpu --dtype=float32 --eval_iters=2 --log_interval=1"
    " --warmup_iters=2"
).split()
TINY_RUN = [*TINY_MODEL, "--rank=16", "--proj_gap=3"]  # for methods that project


def write_shards(folder, n=20_000, n_vocab=257):
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
    return subprocess.Popen([sys.executable, *start, *map(str, args)], stdout=subprocess.PIPE, cwd=popen.pop("cwd", HERE),
                            stderr=subprocess.PIPE, text=True, **popen)


def free_port():
    """Below the ports that connections get: one of those could be taken before the job listens there."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):  # nobody listens
                return port


class Job:
    """A fork of this process for each function: nothing is imported again. They have the environment that torchrun
    would give, of `size` ranks (0: none), and their output goes to files."""

    def __init__(self, folder, *functions, size=None, **env):
        os.makedirs(folder, exist_ok=True)
        self.folder, port, self.processes = folder, free_port(), []
        for rank, function in enumerate(functions):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size or len(functions),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | env if size != 0 else {}
            process = torch.multiprocessing.get_context("fork").Process(target=self._run, args=(rank, function, given))
            process.start()
            self.processes.append(process)

    def _run(self, rank, function, env):
        os.setsid()
        for fd, name in ((1, "out"), (2, "err")):
            file = os.open(f"{self.folder}/{rank}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(file, fd)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        os.environ.update({key: str(value) for key, value in env.items() if value is not None})
        torch.set_num_threads(1)
        function()

    def wait(self, timeout=120):
        """[(exit code, stdout, stderr)] by rank."""
        deadline, results = time.monotonic() + timeout, []
        for rank, process in enumerate(self.processes):
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} hangs"
            texts = [open(f"{self.folder}/{rank}.{name}").read() for name in ("out", "err")]
            results.append((process.exitcode, *texts))
        return results


def trains(*args):
    """A rank's function: train.py with these arguments."""

    def main():
        sys.argv = ["train.py", *map(str, args)]
        train.main()

    return main


def run(name, *args, before=lambda: None):
    """(exit code, stdout, stderr) of a script; before(): what its process does first."""
    if name == "train.py":
        with tempfile.TemporaryDirectory() as folder:
            return Job(folder, lambda: (before(), trains(*args)()), size=0).wait()[0]
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


def one_line_error(result, *words):
    code, out, err = result
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(error) == 1 and "Traceback" not in err, err
    assert all(word in error[0] for word in words), error
