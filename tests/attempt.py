"""
An attempt at a trouble: a tiny run, what becomes of it when nothing happens, and what is right.

tests/torture.py has the troubles.
"""

import collections
import contextlib
import ctypes
import functools
import glob
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import stat
import sys
import time

import torch

from run.checkpoint import checkpoint_paths, read_checkpoint
from run.memory import memory_plan
from tests.common import HERE, TINY_MODEL, Job, one_line_error, settings, write_shards

# of each method that is tried, what it reads
METHODS = {"qgalore": ["--rank=8", "--proj_gap=3"], "qmuon": ["--rank=8", "--proj_gap=3"],
           "galore": ["--rank=8", "--proj_gap=3"], "loqt": ["--rank=8", "--proj_gap=3"],
           "lora": ["--rank=8"], "adamw": []}
SMALLER = "--n_layer=1 --n_embd=32 --ffn_dim=48 --block_size=16 --batch_size=2".split()
OF_THE_MOMENT = {"tokens_per_s", "peak_memory_gb", "sent_mb"}  # what no two runs log alike
GO_ON = "--init_from=auto"
NOBODY = 65534  # a user who may do little


# -----------------------------------------------------------------------------
# a run that nothing happens to


class NotPossible(Exception):
    """This machine does not allow the trouble, or it came too late."""


class Recipe:
    """The settings of a tiny run, and what becomes of it when nothing happens."""

    def __init__(self, folder, shards, method, micro_batches, eval_interval, ranks=1):
        self.folder = f"{folder}/{method}-{micro_batches}-{eval_interval}-{ranks}"
        self.ranks = ranks
        self.middle = 2 * eval_interval
        self.steps = 3 * eval_interval + 1
        self.flags = [*TINY_MODEL, *SMALLER, *METHODS[method], f"--method={method}",
                      f"--data_dir={shards}", f"--gradient_accumulation_steps={micro_batches}",
                      f"--eval_interval={eval_interval}", f"--lr_decay_iters={self.steps}",
                      f"--max_iters={self.steps}", "--rank_timeout=20"]

    def train(self, name, *more):
        out_dir = f"{self.folder}/{name}"
        start = script("train.py", *self.flags, f"--out_dir={out_dir}", *more)
        for code, out, err in forks(f"{self.folder}/said", start, self.ranks).wait():
            assert code == 0, err
        return out_dir

    @functools.cached_property
    def half(self):
        """The folder of the run that ended in the middle."""
        return self.train("half", f"--max_iters={self.middle}")

    @functools.cached_property
    def whole(self):
        """The folder of the run that went to its end."""
        began = time.monotonic()
        out_dir = self.train("whole")
        self.seconds = time.monotonic() - began
        return out_dir


def forks(folder, function, ranks=1):
    """A Job of this function, without torchrun's environment if it is of one rank."""
    size = 0 if ranks == 1 else ranks
    return Job(folder, *[function] * ranks, size=size)


def script(path, *args):
    """A function that runs a script of ours as `python path args` does."""

    def main():
        sys.argv = [path, *map(str, args)]
        runpy.run_path(f"{HERE}/{path}", run_name="__main__")

    return main


class Stock:
    """What the attempts of one seed share: shards, texts, and a recipe for each method."""

    def __init__(self, folder, seed, methods=METHODS):
        self.folder = folder
        self.seed = seed
        self.known = {}  # {script: what it makes}
        os.chmod(folder, 0o755)  # nobody may enter
        torch.set_num_threads(1)  # a process with threads does not fork well
        self.shards = f"{folder}/shards"
        write_shards(self.shards, 4000)
        choice = random.Random(seed)
        self.recipes = {}
        for method in methods:
            drawn = choice.choice([1, 2]), choice.randint(2, 4)
            self.recipes[method] = Recipe(folder, self.shards, method, *drawn)
        self.two_ranks = Recipe(folder, self.shards, "qgalore", 2, choice.randint(2, 4), ranks=2)
        # what takes long to load, forks find loaded: of pictures, of plans, of 8-bit moments
        importlib.import_module("matplotlib.pyplot")
        for recipe in self.recipes.values():
            memory_plan(settings(*recipe.flags), torch.float32, torch.float32)

    @functools.cached_property
    def texts(self):
        """A folder of files for prepare_c4.py, and of records for finetune.prepare_sft."""
        words = random.Random(0)
        os.makedirs(f"{self.folder}/texts")
        for i in range(8):
            text = " ".join(words.choices(["weights", "of", "a layer\n", "und größer"], k=20_000))
            with open(f"{self.folder}/texts/{i}.txt", "w", encoding="utf-8") as f:
                f.write(text)
            with open(f"{self.folder}/texts/{i}.jsonl", "w", encoding="utf-8") as f:
                for at in range(0, 20_000, 40):
                    record = {"prompt": text[at : at + 20], "completion": text[at + 20 : at + 40]}
                    f.write(json.dumps(record) + "\n")
        return f"{self.folder}/texts"

    def made(self, path, args):
        """({name: bytes} that a script makes in the folder {} of its args, its seconds)."""
        if path not in self.known:
            folder = f"{self.folder}/{len(self.known)}/made"
            began = time.monotonic()
            start = script(path, *[arg.format(folder) for arg in args])
            code, out, err = forks(f"{self.folder}/{len(self.known)}", start).wait()[0]
            assert code == 0, err
            self.known[path] = contents(folder), time.monotonic() - began
        return self.known[path]


# -----------------------------------------------------------------------------
# one attempt


class Attempt:
    """A trouble, tried once: its random choices, its recipe, and a folder of its own."""

    def __init__(self, stock, name, number):
        self.stock = stock
        self.random = random.Random(f"{stock.seed} {name} {number}")
        self.folder = f"{stock.folder}/{name}-{number}"
        self.out_dir = f"{self.folder}/out"
        os.mkdir(self.folder)
        self.recipe = self.random.choice(list(stock.recipes.values()))
        self.jobs = []

    def close(self):
        """Whatever went wrong: no process stays."""
        for job in self.jobs:
            for process in job.processes:
                process.kill()
                process.join()

    # processes

    def start(self, *args, path="train.py", before=None):
        """A Job that runs a script, train.py with the recipe's settings. before(): comes first."""
        if path == "train.py":
            args = [*self.recipe.flags, f"--out_dir={self.out_dir}", *args]
        run_it = script(path, *args)

        def main():
            if before is not None:
                before()
            run_it()

        ranks = self.recipe.ranks if path == "train.py" else 1
        self.jobs.append(forks(f"{self.folder}/said-{len(self.jobs)}", main, ranks))
        return self.jobs[-1]

    def fork(self, function):
        """(exit code, stdout, stderr) of a function in a process of its own."""
        return forks(f"{self.folder}/said-of-fork", function).wait()[0]

    def run(self, *args, **options):
        """(exit code, stdout, stderr) of a script."""
        return self.start(*args, **options).wait()[0]

    def wait_for_moment(self, job):
        """Wait for a moment in a run's life, drawn at random; or until the run has ended."""
        kind = self.random.choice(["time", "line", "file"])
        end = time.monotonic() + self.random.random() * self.recipe.seconds
        line = lines(self.out_dir) + self.random.randint(1, self.recipe.steps)
        happened = {
            "time": lambda: time.monotonic() > end,
            "line": lambda: lines(self.out_dir) >= line,
            "file": lambda: bool(temporary(self.out_dir)),
        }
        until(job, happened[kind])

    # folders

    def begin(self, name):
        """Begin with the recipe's run: "half", "whole", or "" for none."""
        self.recipe.whole  # what is right, and how long it takes
        if name:
            shutil.copytree(getattr(self.recipe, name), self.out_dir, dirs_exist_ok=True)
            with open(f"{self.out_dir}/notes.txt", "w") as f:  # a user's own file
                f.write("of the user")

    def damage(self, path):
        """Damage a file at random; returns its new bytes."""
        with open(path, "rb") as f:
            data = f.read()
        with open(path, "wb") as f:
            f.write(damaged(self.random, data))
        return read(path)

    @contextlib.contextmanager
    def frozen(self, *settings, checkpoint=False):
        """A run that stands still while something is done, and then ends as if nothing happened.

        checkpoint: it has one by then."""
        job = self.start(*settings)
        line = self.random.randint(1, self.recipe.middle)
        until(job, lambda: lines(self.out_dir) >= line)
        until(job, lambda: not checkpoint or checkpoint_paths(self.out_dir))
        if not job.processes[0].is_alive():
            raise NotPossible("it ended before")
        signal_to(job, signal.SIGSTOP)
        time.sleep(0.02)  # until the signal is there
        yield
        signal_to(job, signal.SIGCONT)
        code, out, err = ended(job)
        assert code == 0, err[-600:]
        self.as_if_nothing_happened()

    # what is right

    def whole_checkpoints(self):
        """[step of each checkpoint], newest first; all of them can be read."""
        return [read_checkpoint(path)["iter"] for path in checkpoint_paths(self.out_dir)]

    def seed_of_checkpoint(self):
        return read_checkpoint(f"{self.out_dir}/ckpt.pt")["config"]["seed"]

    def same_weights(self):
        """The last checkpoint is that of an undisturbed run, and what is not the run's is there."""
        now = read_checkpoint(f"{self.out_dir}/ckpt.pt")
        right = read_checkpoint(f"{self.recipe.whole}/ckpt.pt")
        for part in ("iter", "position", "model", "optimizer"):
            assert same(now[part], right[part]), f"another {part}"
        assert not temporary(self.out_dir), temporary(self.out_dir)
        if os.path.exists(f"{self.out_dir}/notes.txt"):
            assert read(f"{self.out_dir}/notes.txt") == b"of the user"

    def as_if_nothing_happened(self):
        """So is the log."""
        self.same_weights()
        now = story(self.out_dir)
        right = story(self.recipe.whole)
        for entry, expected in itertools.zip_longest(now, right):
            assert entry == expected, f"log: {entry} in place of {expected}"

    def finishes(self, *more, **options):
        """Started again, the run goes to its end as if nothing had happened."""
        for code, out, err in self.start(GO_ON, *more, **options).wait():
            assert code == 0 and "Traceback" not in err, err[-600:]
        self.as_if_nothing_happened()

    def ends_or_refuses(self, result, check=None):
        """A run has ended right, by check(), or has said in one line why not. Returns which."""
        code, out, err = result
        if code:
            one_line_error(result)
            return False
        assert "Traceback" not in err, err[-600:]
        if check is None:
            check = self.as_if_nothing_happened
        check()
        return True


def until(job, happened, seconds=60):
    """Wait until happened(), or until the first process has ended."""
    end = time.monotonic() + seconds
    while job.processes[0].is_alive() and not happened():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.0005)


def ended(job):
    """(exit code, stdout, stderr) of the first process."""
    return job.wait()[0]


def kill_now(job, rank=0):
    """kill -9."""
    job.processes[rank].kill()
    job.processes[rank].join()


def signal_to(job, number, rank=0):
    """Send a signal to a process; one that has ended gets none."""
    process = job.processes[rank]
    if process.is_alive():
        os.kill(process.pid, number)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def contents(folder):
    """{path: bytes} of all files below a folder."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                found[os.path.relpath(path, folder)] = read(path)
    return found


def checkpoints(out_dir):
    return [read(path) for path in checkpoint_paths(out_dir)]


def runs(folder):
    """The bytes of all checkpoints and logs below a folder."""
    names = re.compile(r"(.*/)?(ckpt.*\.pt|log\.jsonl)")
    return [data for path, data in contents(folder).items() if names.fullmatch(path)]


def temporary(folder):
    """Names of what is half written there, or in the folder of a run that starts."""
    paths = glob.glob(f"{folder}/*.tmp") + glob.glob(f"{folder}/starting/*.tmp")
    return [os.path.relpath(path, folder) for path in paths]


def lines(out_dir):
    """How many lines were logged, also by a run that starts."""
    total = 0
    for path in (f"{out_dir}/log.jsonl", f"{out_dir}/starting/log.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            total += read(path).count(b"\n")
    return total


def story(out_dir):
    """What a log says, but for the time and the memory that it took: entries, then refreshes.

    A refresh may be told a line earlier, where a checkpoint waited for it."""
    entries = []
    refreshes = collections.defaultdict(list)  # {weight: all of the log}
    for line in read(f"{out_dir}/log.jsonl").splitlines():
        entry = json.loads(line)
        for name, found in entry.pop("subspaces", {}).items():
            refreshes[name] += found
        entries.append({k: v for k, v in entry.items() if k not in OF_THE_MOMENT})
    return [*entries, *sorted(refreshes.items())]


def same(a, b):
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def finite(path):
    tensors = read_checkpoint(path)["model"].values()
    return all(t.isfinite().all() for t in tensors if t.is_floating_point())


def damaged(random, data):
    """`data` with a flipped bit, cut short, zeroed in part, continued, or emptied."""
    at = random.randrange(len(data))
    some = random.randint(1, 4096)
    zeroed = len(data[at : at + some])
    flipped = bytes([data[at] ^ 1 << random.randrange(8)])
    return random.choice([
        data[:at] + flipped + data[at + 1 :],
        data[:at],
        data[:at] + bytes(zeroed) + data[at + zeroed :],
        data + random.randbytes(some),
        b"",
    ])


def other_value(random, value, allowed):
    """A value of the same kind that a setting may take."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        choices = ["other", *str(allowed or "").removeprefix("one of ").split(", ")]
    else:
        choices = [value * 2, value / 2, 0, 1, 4, 8, 16, 0.5, *range(100)]
    right = []
    for choice in choices:
        if isinstance(value, int) and isinstance(choice, float):
            continue
        if choice not in (value, "auto") and (allowed is None or allowed.holds(choice)):
            right.append(choice)
    return random.choice(right[:4])


# -----------------------------------------------------------------------------
# what a process does before it runs a script


def dies_at(name, count):
    """What makes a process kill itself before its count-th call of os.`name`."""

    def before():
        function = getattr(os, name)
        calls = itertools.count(1)

        def dies(*args, **options):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        setattr(os, name, dies)

    return before


def inf_at(call):
    """What makes the call-th gradient that flows back through a module infinite."""

    def before():
        calls = itertools.count(1)

        def hook(module, grad_input, grad_output):
            if next(calls) == call:
                return tuple(g if g is None else g * math.inf for g in grad_input)

        torch.nn.modules.module.register_module_full_backward_hook(hook)

    return before


def become_nobody():
    if os.getuid() == 0:  # root may read everything
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def own_namespace():
    """Let this process mount what others do not see; False if it may not."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS
        return False
    maps = (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"))
    for name, text in maps:
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    return True
