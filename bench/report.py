"""
Measure this machine in a few minutes, for the tables of docs/measured.
    python -m bench.report --minutes=9      # then send docs/measured/CARD.json
    python -m bench.report --minutes=0      # only make docs/measured/README.md again

What tells most comes first: 7B in the memory of smaller cards, ours and the published optimizers
side by side, one setting on and off, a refresh, a profile. Each is a process with a time limit and
a log of its own in out_dir/logs; one that fails stops no other. CARD.json is written after each.
A machine without a GPU runs the same list with a tiny model, which tests it and measures nothing.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

from configurator import at_least, configure

minutes: at_least(0) = 9.0  # for all; what does not fit is left out
out_dir = "docs/measured"
only = ""  # some of the list, by their names, with commas between them

if __name__ == "__main__":
    s = configure(sys.modules[__name__])

import torch

from bench.__main__ import describe
from bench.settings import REPOSITORY
from run.files import replacing

SHORTEST = 15  # seconds: in less, nothing starts
TINY = (  # of a machine without a GPU
    "--n_layer=1 --n_embd=64 --n_head=2 --ffn_dim=128 --vocab_size=512 --batch_size=2"
    " --block_size=32 --rank=16 --compile=False --threads=1 --device=cpu"
).split()
SEVEN = "config/llama_7b.py"
ALL = "--peer_svd=False --steps=4 --warmup=2 --phase_steps=1 --timeout=60"
OURS = "--contenders=qgalore --steps=4 --warmup=2 --phase_steps=1"
TRAIN = "--log_interval=1 --eval_iters=1"
ONE = "--gradient_accumulation_steps=1"


@dataclass(frozen=True)
class Job:
    """One process, whose out_dir is not kept."""

    name: str
    seconds: float  # that it may take
    module: str
    args: str
    rows: Callable  # function(its out_dir, what it printed) that gives the rows of what it found


def rows_of_training(folder, stdout):
    """Speed and loss of the last step that train.py logged, and the memory that it took."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        entries = [json.loads(line) for line in f]
    steps = [entry for entry in entries if "loss" in entry]
    row = {key: steps[-1].get(key) for key in ("iter", "loss", "tokens_per_s")}
    return [row | last_json(stdout)]


def rows_of_bench(folder, stdout):
    """A row a contender, without the steps one by one."""
    with open(os.path.join(folder, "bench.json")) as f:
        rows = json.load(f)["rows"]
    for row in rows:
        for key in ("steps_ms", "losses"):
            row.pop(key, None)
    return rows


def rows_of_refresh(folder, stdout):
    with open(os.path.join(folder, "refresh_study.json")) as f:
        return json.load(f)["rows"]


def rows_of_profile(folder, stdout):
    return [last_json(stdout)]


def last_json(stdout):
    return json.loads(stdout.strip().splitlines()[-1])


def training(name, seconds, gib, args):
    return Job(name, seconds, "bench.capped", f"{SEVEN} {args} {TRAIN} --cap_gib={gib}", rows_of_training)


def benchmark(name, seconds, args):
    return Job(name, seconds, "bench", args, rows_of_bench)


JOBS = [
    training("7b-12gib", 120, 12, f"{ONE} --max_iters=8"),
    Job("7b-profile", 60, "bench.profile", SEVEN, rows_of_profile),
    training("7b-512-14gib", 300, 14, "--max_iters=2"),
    training("7b-512-qmuon", 300, 13.5, "--method=qmuon --by_block=True --max_iters=2"),
    Job("60m-profile", 60, "bench.profile", "config/llama_60m.py", rows_of_profile),
    benchmark("7b-peers", 180, f"{SEVEN} {ALL} --contenders=qgalore,qmuon,adam8bit,galore,q_galore"),
    benchmark("60m-peers", 150, f"config/llama_60m.py {ALL} --contenders=qgalore,qmuon,adamw,galore"),
    benchmark("7b-float", 45, f"{SEVEN} {OURS} --matmul=float"),
    Job("7b-refresh", 60, "bench", f"{SEVEN} --refresh_study=True", rows_of_refresh),
    benchmark("1b-peers", 90, f"config/llama_1b.py {ALL} --contenders=qgalore,adamw,galore"),
    benchmark("350m-peers", 60, f"config/llama_350m.py {ALL} --contenders=qgalore,adamw,galore"),
    benchmark("60m-plain", 60, f"config/llama_60m.py {OURS} --compile=False"),
    benchmark("7b-plain", 45, f"{SEVEN} {OURS} --compile=False"),
]


def main(s):
    if s.minutes:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        jobs = JOBS
        if s.only:
            names = s.only.split(",")
            jobs = [job for job in JOBS if job.name in names]
        measure(jobs, s.minutes, s.out_dir, describe(kind), [] if kind == "cuda" else TINY)
    path = os.path.join(s.out_dir, "README.md")
    with replacing(path) as f:
        f.write(tables(cards_in(s.out_dir)).encode())
    print(f"--- {path}")


def measure(jobs, minutes, out_dir, machine, more=()):
    """Run the jobs that fit in so many minutes. Returns what is in CARD.json after the last.

    machine: {"device": its name, package: version}. more: flags after each job's own."""
    until = time.monotonic() + 60 * minutes
    logs = os.path.abspath(os.path.join(out_dir, "logs"))  # jobs run in the repository
    os.makedirs(logs, exist_ok=True)
    card = {"machine": machine, "commit": commit(), "date": time.strftime("%Y-%m-%d"), "jobs": []}
    name = re.sub(r"\W+", "-", machine["device"]).strip("-")
    for job in jobs:
        left = until - time.monotonic()
        if left < min(job.seconds, SHORTEST):
            found = {"name": job.name, "error": "no time was left"}
        else:
            found = run(job, min(job.seconds, left), logs, more)
        print(f"{job.name:16s}{found.get('error') or 'done':.60s}", flush=True)
        card["jobs"].append(found)
        with replacing(os.path.join(out_dir, f"{name}.json")) as f:
            f.write(json.dumps(card, indent=1).encode())
    return card


def run(job, seconds, logs, more):
    """{"name", "command", "seconds", and "rows" or "error", or both} of one job."""
    args = [*job.args.split(), *more]
    found = {"name": job.name, "command": f"python -m {job.module} {' '.join(args)}"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=logs) as folder:  # a checkpoint of 7B takes 10 GB
        command = [sys.executable, "-m", job.module, *args, f"--out_dir={folder}"]
        log = os.path.join(logs, f"{job.name}.log")
        with open(log, "w") as f:
            code = exit_code(command, f, seconds)
        with open(log, errors="replace") as f:
            text = f.read()
        if code is None:
            found["error"] = f"not done after {seconds:.0f} s"
        elif code:
            last = (text.strip().splitlines() or ["no message"])[-1]
            found["error"] = f"exit {code}: {last}"
        try:  # also of what did not end: bench writes a contender at a time
            found["rows"] = job.rows(folder, text)
        except (OSError, ValueError, IndexError, KeyError) as e:
            found.setdefault("error", f"{type(e).__name__}: {e}")
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def exit_code(command, log, seconds):
    """Run a command, its output to a file; None: it took longer than `seconds`, and was killed."""
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()


def commit():
    """The commit that is checked out, or "unknown"."""
    command = ["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


# --- Tables ---

TABLES = (  # (what a row has, title, {head: (key, format)})
    ("allocated_gib", "Training in capped memory", {
        "allocated, GiB": ("allocated_gib", ".2f"),
        "reserved": ("reserved_gib", ".2f"),
        "used on the card": ("card_gib", ".2f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "loss": ("loss", ".2f"),
    }),
    ("contender", "Ours and the published optimizers", {
        "": ("contender", "s"),
        "GiB": ("peak_gib", ".2f"),
        "reserved": ("reserved_gib", ".2f"),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "ms": ("median_ms", ".1f"),
        "MFU": ("mfu", ".1%"),
    }),
    ("svd_ms", "A refresh against exact SVD", {
        "gradient": ("gradient", "s"),
        "out": ("out", "d"),
        "in": ("in", "d"),
        "refresh, ms": ("refresh_ms", ".1f"),
        "SVD, ms": ("svd_ms", ".1f"),
        "ratio": ("ratio", ".0f"),
        "energy, of SVD's": ("energy_of_svd", ".4f"),
    }),
    ("launches", "Kernels of a step", {
        "launches": ("launches", ",d"),
        "ms": ("ms", ".1f"),
        "ms of the step": ("step_ms", ".1f"),
    }),
)


def cards_in(folder):
    """What is in the CARD.json files of a folder, by name."""
    cards = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            with open(os.path.join(folder, name)) as f:
                cards.append(json.load(f))
    return cards


def tables(cards):
    """docs/measured/README.md: a section a card, a table for each kind of figures."""
    lines = ["# Measured", "", "Made by `python -m bench.report` from the files beside this one.", ""]
    for card in cards:
        machine = dict(card["machine"])
        versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
        lines += [f"## {machine['device']}", "", f"Commit {card['commit']}, {card['date']}, {versions}."]
        lines += [""]
        for key, title, columns in TABLES:
            lines += table(card["jobs"], key, title, columns)
        lines += ["Commands:", ""]
        for job in card["jobs"]:
            lines += [f"- {job['name']}" + (f": `{job['command']}`" if "command" in job else "")]
            for key in ("error", "note"):  # a note is a person's
                if key in job:
                    lines[-1] += f": {job[key]}"
        lines += [""]
    return "\n".join(lines)


def table(jobs, key, title, columns):
    """The lines of one table; none if there are no such rows."""
    lines = []
    for job in jobs:
        for row in job.get("rows", []):
            if key not in row:
                continue
            cells = [job["name"]]
            for name, form in columns.values():
                cells.append("-" if row.get(name) is None else format(row[name], form))
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    heads = f"| run | {' | '.join(columns)} |"
    return [f"**{title}**", "", heads, "|---" * (1 + len(columns)) + "|", *lines, ""]


if __name__ == "__main__":
    main(s)
