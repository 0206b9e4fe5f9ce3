"""
Kills, fills up, damages and resumes tiny runs at random, and counts how often what is right held:
    python tests/torture.py --minutes=10
    python tests/torture.py --seed=7 --only=kill --number=3   # one attempt again; its folder stays

Each trouble is a function: its docstring says what happens, its assertions what is right. All come
once, in an order drawn from the seed, and then at random until the time is over. What an attempt
draws depends on the seed, the trouble and the attempt's number. Processes and files are real.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny

from configurator import above, at_least, configure, declarations

minutes: above(0) = 2.0  # each trouble comes once, however long that takes
seed = 0
only = ""  # one trouble, by its function's name, once
number: at_least(0) = 0  # of that attempt

if __name__ == "__main__":
    s = configure(sys.modules[__name__])

import collections
import math
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import zipfile

import torch

import train
from run.checkpoint import checkpoint_paths, read_checkpoint
from run.resume import OF_START
from tests.attempt import (GO_ON, NOBODY, Attempt, NotPossible, Stock, become_nobody, checkpoints,
                           contents, dies_at, ended, finite, inf_at, kill_now, lines,
                           other_value, own_namespace, read, runs, signal_to, temporary, until)
from tests.common import one_line_error, read_log, write_shards

TROUBLES = {}  # {name: function of an Attempt}


def trouble(function):
    TROUBLES[function.__name__] = function
    return function


# -----------------------------------------------------------------------------
# a run ends before its end


@trouble
def kill(t):
    """kill -9 at any moment, up to three times"""
    t.begin("")
    for _ in range(t.random.randint(1, 3)):
        job = t.start(GO_ON)
        t.wait_for_moment(job)
        kill_now(job)
        t.whole_checkpoints()
    t.finishes()


@trouble
def kill_in_a_save(t):
    """kill -9 before one of the steps that give files their names"""
    t.begin(t.random.choice(["", "half"]))
    call = t.random.choice(["replace", "rename", "fsync", "link", "unlink"])
    t.run(GO_ON, before=dies_at(call, t.random.randint(1, 12)))
    t.whole_checkpoints()
    t.finishes()


@trouble
def signal_to_stop(t):
    """SIGTERM, SIGINT, SIGHUP or SIGUSR1, to a run or to one of two ranks: it is saved"""
    if t.random.random() < 0.3:
        t.recipe = t.stock.two_ranks
    t.begin("")
    job = t.start(GO_ON)
    line = t.random.randint(1, t.recipe.steps)
    until(job, lambda: lines(t.out_dir) >= line)
    name = t.random.choice(["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
    signal_to(job, getattr(signal, name), t.random.randrange(t.recipe.ranks))
    for code, out, err in job.wait():
        assert code == 0 and "Traceback" not in err, (name, code, err[-600:])
    step = t.whole_checkpoints()[0]
    logged = [it for it, what in read_log(t.out_dir) if what == "loss"]
    assert logged == list(range(step))
    t.finishes()


@trouble
def two_ctrl_c(t):
    """Ctrl-C, and Ctrl-C again"""
    t.begin("")
    job = t.start(GO_ON)
    line = t.random.randint(1, t.recipe.steps)
    until(job, lambda: lines(t.out_dir) >= line)
    for _ in range(2):
        signal_to(job, signal.SIGINT)
        time.sleep(t.random.random() * 0.02)
    code, out, err = ended(job)
    assert code in (0, 1) and "Traceback" not in err, (code, err[-600:])
    t.whole_checkpoints()
    t.finishes()


@trouble
def suspended(t):
    """SIGSTOP, and SIGCONT after a while"""
    t.begin("")
    with t.frozen(GO_ON):
        time.sleep(t.random.random() * 0.3)


@trouble
def rank_killed(t):
    """one of two ranks is killed: the other ends with one line"""
    t.recipe = t.stock.two_ranks
    t.begin("")
    job = t.start(GO_ON)
    t.wait_for_moment(job)
    rank = t.random.randrange(2)
    kill_now(job, rank)
    other = job.wait(timeout=60)[1 - rank]
    if other[0] != 0:
        one_line_error(other)
    t.whole_checkpoints()
    t.finishes()


# -----------------------------------------------------------------------------
# no room, no permission, nobody to read


@trouble
def file_too_large(t):
    """no file may grow beyond a random size (RLIMIT_FSIZE)"""
    t.begin(t.random.choice(["", "half"]))
    had = t.whole_checkpoints()
    # the log and config.json are some thousand bytes, a checkpoint more
    size = os.path.getsize(f"{t.recipe.whole}/ckpt.pt")
    size = t.random.choice([t.random.randint(0, 6000), t.random.randint(6000, size)])
    said, output = os.pipe()  # the limit does not hold for pipes

    def limit():
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    code, _, _ = t.run(GO_ON, before=limit)
    os.close(output)
    with open(said) as f:
        t.ends_or_refuses((code, "", f.read()))
    assert t.whole_checkpoints()[:1] >= had[:1]
    t.finishes()


@trouble
def full_disk(t):
    """a disk that becomes full (a small tmpfs)"""
    t.recipe.half, t.recipe.whole  # not made on the small disk
    factor = t.random.random()

    def on_a_small_disk():
        if not own_namespace():
            os._exit(77)
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", t.out_dir]
        os.mkdir(t.out_dir)
        subprocess.run(mount, check=True)
        t.begin("half")
        used = sum(map(len, contents(t.out_dir).values()))
        most = 3 * os.path.getsize(f"{t.out_dir}/ckpt.pt") + 200_000
        size = f"remount,size={(used + factor * most) // 1024 + 16:.0f}k"
        subprocess.run(["mount", "-o", size, t.out_dir], check=True)
        had = t.whole_checkpoints()
        t.ends_or_refuses(t.run(GO_ON))
        assert t.whole_checkpoints()[:1] >= had[:1]
        subprocess.run(["mount", "-o", "remount,size=64m", t.out_dir], check=True)
        t.finishes()

    code, out, err = t.fork(on_a_small_disk)
    if code == 77:
        raise NotPossible("no namespaces for mounts")
    assert code == 0, err[-600:]


@trouble
def no_permission(t):
    """a file or folder that may not be read: nothing is renamed"""
    t.begin("half")
    data = shutil.copytree(t.stock.shards, f"{t.folder}/data")
    for where, folders, files in os.walk(t.folder):
        for name in (".", *files):
            if os.getuid() == 0:
                os.chown(os.path.join(where, name), NOBODY, NOBODY)
    before = contents(t.out_dir)
    paths = (t.out_dir, f"{t.out_dir}/ckpt.pt", f"{t.out_dir}/log.jsonl", data,
             f"{data}/text_train_00000.bin")
    path = t.random.choice(paths)
    mode = os.stat(path).st_mode
    os.chmod(path, 0)
    result = t.run(GO_ON, f"--data_dir={data}", before=become_nobody)
    os.chmod(path, mode)
    one_line_error(result)
    assert contents(t.out_dir).items() >= before.items()
    t.finishes(f"--data_dir={data}", before=become_nobody)


@trouble
def dead_output(t):
    """stdout or stderr is closed, full, or a pipe that nobody reads any more"""
    t.begin("")
    kind = t.random.choice(["| head -1", ">/dev/full", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-"])
    said, output = os.pipe()

    def before():
        os.close(said)
        if kind == "| head -1":
            os.dup2(output, 1)
        os.close(output)
        for name, fd in (("stdout", 1), ("stderr", 2)):
            sign = "2>" if fd == 2 else ">"
            if f"{sign}/dev/full" == kind:
                os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
            if f"{sign}&-" in kind.split():
                os.close(fd)
                setattr(sys, name, None)  # as Python does when it starts
        if t.random.random() < 0.5 and sys.stdout:
            sys.stdout = open(1, "w", closefd=False)  # no terminal: written when the buffer is full

    job = t.start(GO_ON, before=before)
    os.close(output)
    os.read(said, 1)
    os.close(said)
    code, out, err = ended(job)
    assert 0 <= code and "Traceback" not in err, (kind, code, err[-600:])
    t.as_if_nothing_happened()


# -----------------------------------------------------------------------------
# files that are not what they were


@trouble
def damaged_checkpoint(t):
    """ckpt.pt is damaged: back to the one before, and nothing is overwritten"""
    t.begin("whole")
    held = []
    for _ in range(t.random.randint(1, 3)):
        data = t.damage(f"{t.out_dir}/ckpt.pt")
        t.ends_or_refuses(t.run(GO_ON))
        if read(f"{t.out_dir}/ckpt.pt") != data:  # else what was damaged tells nothing
            held.append(data)
        for data in held:
            assert data in contents(t.out_dir).values(), "a damaged file is gone"


@trouble
def damaged_checkpoints(t):
    """all checkpoints are damaged: one line, and nothing is renamed"""
    t.begin("whole")
    for path in checkpoint_paths(t.out_dir):
        with open(path, "r+b") as f:
            f.seek(t.random.randrange(os.path.getsize(path) // 2))
            f.truncate()
    before = contents(t.out_dir)
    one_line_error(t.run(GO_ON))
    assert contents(t.out_dir).items() >= before.items()


@trouble
def damaged_log(t):
    """log.jsonl is damaged: the weights are right, and no line is lost"""
    t.begin("half")
    path = f"{t.out_dir}/log.jsonl"
    whole = read(path).splitlines()
    damaged = t.damage(path).splitlines()
    t.ends_or_refuses(t.run(GO_ON), t.same_weights)
    left = b"\n".join(contents(t.out_dir).values()).splitlines()
    assert set(whole) & set(damaged) <= set(left), "whole lines of the log are gone"


@trouble
def damaged_config(t):
    """config.json is damaged: the checkpoint has all that is in it"""
    t.begin("half")
    t.damage(f"{t.out_dir}/config.json")
    t.finishes()


@trouble
def damaged_shard(t):
    """a shard's header or length is damaged"""
    t.begin("half")
    data = shutil.copytree(t.stock.shards, f"{t.folder}/data")
    path = f"{data}/{t.random.choice(sorted(os.listdir(data)))}"
    whole = read(path)
    # llm.c's format has no checksum of the tokens
    while True:
        damaged = t.damage(path)
        if len(damaged) != len(whole) or damaged[1024:] == whole[1024:]:
            break
        with open(path, "wb") as f:
            f.write(whole)
    before = contents(t.out_dir)
    if not t.ends_or_refuses(t.run(GO_ON, f"--data_dir={data}")):
        assert contents(t.out_dir).items() >= before.items()


class Malice:
    def __reduce__(self):
        return os.system, ("echo malice > /tmp/malice-of-torture",)


@trouble
def wrong_checkpoint(t):
    """something else is in ckpt.pt: other objects, code, a bomb, another format, wrong parts"""
    t.begin("whole")
    path = f"{t.out_dir}/ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    part = t.random.choice(["config", "model", "optimizer", "iter", "position"])
    wrong = t.random.choice([None, "x", [], -1, {"x": 1}, Malice()])
    kind = t.random.choice(["part", "object", "pickle", "format", "bomb", "text"])
    if kind == "part":
        torch.save(checkpoint | {part: wrong}, path)
    elif kind == "object":
        torch.save(wrong, path)
    elif kind == "format":
        torch.save(checkpoint | {"format": checkpoint["format"] + 1}, path)
    elif kind == "pickle":
        with open(path, "wb") as f:
            pickle.dump(Malice(), f)
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as f:
            f.writestr("archive/data.pkl", bytes(100_000_000))
    else:
        with open(path, "w") as f:
            f.write("a checkpoint")
    bytes_of_it = read(path)
    before = contents(t.out_dir)
    if not t.ends_or_refuses(t.run(GO_ON)):
        assert contents(t.out_dir).items() >= before.items()
    assert bytes_of_it in contents(t.out_dir).values()
    assert not os.path.exists("/tmp/malice-of-torture")


@trouble
def no_file(t):
    """a pipe, a folder or a link that leads nowhere, in a file's place"""
    t.begin("whole")
    path = f"{t.out_dir}/" + t.random.choice(["ckpt.pt", "ckpt-1.pt", "log.jsonl", "config.json"])
    os.unlink(path)
    kind = t.random.choice(["pipe", "folder", "/nothing", path])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        os.symlink(kind, path)
    check = t.same_weights if "log" in path else None
    if not t.ends_or_refuses(t.run(GO_ON), check):
        assert os.path.lexists(path)


# -----------------------------------------------------------------------------
# what is not a number


@trouble
def weight_not_finite(t):
    """a weight of the checkpoint is NaN: training, evaluation and export refuse"""
    t.begin("half")
    path = f"{t.out_dir}/ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    floats = [w for w in checkpoint["model"].values() if w.is_floating_point() and w.numel()]
    weight = t.random.choice(floats)
    weight.view(-1)[t.random.randrange(weight.numel())] = t.random.choice([math.nan, math.inf])
    torch.save(checkpoint, path)
    before = contents(t.out_dir)
    how = t.random.choice(["train", "evaluate", "export"])
    if how == "train":
        result = t.run(GO_ON)
    elif how == "evaluate":
        result = t.run("--init_from=resume", "--eval_only=True")
    else:
        args = [f"--out_dir={t.out_dir}", f"--export={t.folder}/exported"]
        result = t.run(*args, path="finetune/hf.py")
    one_line_error(result)
    for data in checkpoints(t.out_dir):
        assert data in before.values(), "a checkpoint of a run that is not finite"


@trouble
def gradient_not_finite(t):
    """a gradient becomes inf: it is skipped, or the run stops; checkpoints stay finite"""
    t.begin(t.random.choice(["", "half"]))
    code, out, err = t.run(GO_ON, before=inf_at(t.random.randint(1, 300)))
    assert code in (0, 1) and "Traceback" not in err, err[-600:]
    if code:
        one_line_error((code, out, err))
    for path in checkpoint_paths(t.out_dir):
        assert finite(path), path
    told = re.search(rb'"skipped": [1-9]', read(f"{t.out_dir}/log.jsonl"))
    if code == 0 and not told:  # then it was the plan's, or would come after the last step
        last = (t.recipe.steps, "val_loss")
        change = read_log(t.out_dir)[last] - read_log(t.recipe.whole)[last]
        assert abs(change) < 1e-3, "a gradient was skipped in silence"


# -----------------------------------------------------------------------------
# another run, another setting


@trouble
def from_scratch_again(t):
    """starts from scratch over earlier runs, killed at any moment: nothing of those is lost"""
    t.begin("whole")
    for seed in range(t.random.randint(2, 4)):
        earlier = runs(t.out_dir)
        how = t.random.choice(["ends", "killed", "killed in a save"])
        before = None
        if how == "killed in a save":
            call = t.random.choice(["replace", "rename", "unlink", "mkdir", "rmdir"])
            before = dies_at(call, t.random.randint(1, 12))
        job = t.start("--init_from=scratch", f"--seed={seed}", before=before)
        if how == "killed":
            t.wait_for_moment(job)
            kill_now(job)
        job.processes[0].join()
        for data in earlier:
            assert any(data in kept for kept in runs(t.out_dir)), "an earlier run's file is gone"
    code, out, err = t.run(GO_ON)
    assert code == 0 and t.whole_checkpoints()[0] == t.recipe.steps, err[-600:]


@trouble
def second_run(t):
    """a second train.py in the out_dir of a run is refused in one line"""
    t.begin("")
    with t.frozen(GO_ON):
        before = contents(t.out_dir)
        start = t.random.choice(["scratch", "resume", "auto"])
        one_line_error(t.run(f"--init_from={start}"))
        assert contents(t.out_dir).items() >= before.items()


@trouble
def readers(t):
    """evaluation, a sample, a picture, a plan, an export: the live run is not disturbed"""
    t.begin("")
    folder = f"--out_dir={t.out_dir}"
    with t.frozen(GO_ON, checkpoint=True):
        before = contents(t.out_dir)
        path, *args = t.random.choice([
            ("train.py", "--eval_only=True", "--init_from=resume"),
            ("train.py", "--eval_only=True"),
            ("train.py", "--dry_run=True"),
            ("sample.py", folder, "--max_new_tokens=3", "--device=cpu"),
            ("run/plot.py", folder),
            ("finetune/hf.py", folder, f"--export={t.folder}/exported"),
        ])
        code, out, err = t.run(*args, path=path)
        assert code == 0 and "Traceback" not in err, err[-600:]
        assert contents(t.out_dir).items() >= before.items()
        assert {*contents(t.out_dir)} - {*before} <= {"loss.png", "subspaces.png"}


@trouble
def changed_setting(t):
    """a run goes on with another setting: refused, or said, never silent"""
    t.begin("half")
    known = declarations(train)
    was = read_checkpoint(f"{t.out_dir}/ckpt.pt")["config"]
    name = t.random.choice([name for name in known if name not in OF_START])
    value = other_value(t.random, was[name], known[name].allowed)
    if name == "data_dir":
        value = f"{t.folder}/data"
        write_shards(value, 3000)
    code, out, err = t.run(GO_ON, f"--{name}={value}")
    assert "Traceback" not in err, err[-600:]
    told = re.search(rf"\b{name} ?=", out + err)
    assert told, f"{name}={value}, where it was {was[name]}, is silent"
    if code:
        one_line_error((code, out, err))


# -----------------------------------------------------------------------------
# scripts that make files


@trouble
def prepare_killed(t):
    """prepare_c4.py is killed, up to three times, and started again"""
    args = [f"--input={t.stock.texts}/*.txt", "--encoding=bytes", "--out_dir={}"]
    killed_and_repeated(t, "prepare_c4.py", args)


@trouble
def prepare_sft_killed(t):
    """finetune.prepare_sft is killed, up to three times, and started again"""
    args = [f"--input={t.stock.texts}/*.jsonl", "--encoding=bytes", "--block_size=64",
            "--out_dir={}"]
    killed_and_repeated(t, "finetune/prepare_sft.py", args)


@trouble
def export_killed(t):
    """finetune.hf is killed, up to three times: the folder is whole or not there"""
    args = [f"--out_dir={t.stock.recipes['qgalore'].whole}", "--export={}"]
    killed_and_repeated(t, "finetune/hf.py", args)


def killed_and_repeated(t, path, args):
    """What a script makes, {} its folder in `args`, is always the same, and never half made."""
    right, seconds = t.stock.made(path, args)
    made = f"{t.folder}/made"
    args = [arg.format(made) for arg in args]
    for _ in range(t.random.randint(1, 3)):
        job = t.start(*args, path=path)
        time.sleep(t.random.random() * seconds)
        kill_now(job)
        for name, data in contents(made).items():
            assert not name.endswith(".bin") or data == right[name], f"{name} is half made"
    if path != "finetune/hf.py" or not os.path.exists(made):  # a folder that exists is refused
        code, out, err = t.run(*args, path=path)
        assert code == 0, err[-600:]
        for left in temporary(t.folder):
            assert left in out, f"{left} is left, and not said"
    now = contents(made)
    wrong = [name for name in now.keys() | right if now.get(name) != right.get(name)]
    assert not wrong, f"{wrong} are not what an undisturbed command makes"


# -----------------------------------------------------------------------------


def order(seed, minutes):
    """(name, number) of attempts: each trouble once, then at random until the time is over."""
    ends = time.monotonic() + 60 * minutes
    choice = random.Random(seed)
    names = list(TROUBLES)
    choice.shuffle(names)
    tried = collections.Counter()
    while time.monotonic() < ends or len(tried) < len(names):
        name = choice.choice(names)
        if len(tried) < len(names):
            name = names[len(tried)]
        yield name, tried[name]
        tried[name] += 1


def attempt(stock, name, number):
    """Try a trouble once. Raises AssertionError, or what it ran into, if something did not hold."""
    t = Attempt(stock, name, number)
    try:
        TROUBLES[name](t)
    finally:
        t.close()
    shutil.rmtree(t.folder)


def line_of(e):
    """An exception in one line, with the line of this file that it came through."""
    calls = traceback.extract_tb(e.__traceback__)
    at = [call.lineno for call in calls if call.filename == os.path.abspath(__file__)][-1]
    words = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return f"line {at}: {words[-1].strip()[:200]}"


def table(counts, failures):
    """Print how often each trouble was tried and held, and how to repeat the first failures."""
    print(f"{'':22s}tried  held  not possible here")
    for name, count in counts.items():
        tried = f"{sum(count.values()):5d} {count['held']:5d} {count['not possible']:5d}"
        print(f"{name:22s}{tried}   {TROUBLES[name].__doc__}")
    for name, found in failures.items():
        for number, line in found[:3]:
            print(f"\n{name} did not hold, {line}")
            print(f"  python tests/torture.py --seed={s.seed} --only={name} --number={number}")


def main(s):
    if s.only and s.only not in TROUBLES:
        raise SystemExit(f"error: only={s.only}: there are {', '.join(TROUBLES)}")
    folder = tempfile.mkdtemp(prefix="torture-")
    stock = Stock(folder, s.seed)
    counts = collections.defaultdict(collections.Counter)  # {name: how often it did what}
    failures = collections.defaultdict(list)  # {name: [(number, line)]}
    attempts = [(s.only, s.number)] if s.only else order(s.seed, s.minutes)
    for name, number in attempts:
        try:
            attempt(stock, name, number)
            counts[name]["held"] += 1
        except NotPossible:
            counts[name]["not possible"] += 1
        except KeyboardInterrupt:
            break
        except (Exception, SystemExit) as e:  # whatever it ran into did not hold
            counts[name]["failed"] += 1
            failures[name].append((number, line_of(e)))
    table(counts, failures)
    if s.only and failures:
        print(f"  what it left is in {folder}")
    else:
        shutil.rmtree(folder)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main(s)
