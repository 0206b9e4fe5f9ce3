"""
Train by several methods, rates and seeds, one after another, for one table of losses.
    python -m bench.contest config/demo.py --methods=qgalore,qmuon --rates=0.001,0.002,0.004
    python -m bench.contest config/llama_60m_methods.py --methods=adamw,muon,qmuon --max_iters=1000

Each run is train.py, with these settings, in a folder of its own in out_dir. A contest that was
stopped goes on where it was, and one that gets more entries runs these alone.
"""

import json
import os
import subprocess
import sys
from itertools import product
from statistics import median

from bench.settings import TRAIN, train_settings
from configurator import configure

# the contest: several, with commas between them
methods = "qgalore,qmuon"
rates = ""  # of learning; "": the recipe's
seeds = ""  # "": the recipe's
out_dir = "out-contest"
OWN = ("methods", "rates", "seeds", "out_dir")  # the rest is for train.py

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

from methods.registry import find
from run.show import say


def main(s, argv):
    flags = [arg for arg in argv if arg[2:].partition("=")[0] not in OWN]
    out_dir = os.path.expanduser(s.out_dir)
    entries = [[value.strip() for value in text.split(",")] for text in (s.methods, s.rates, s.seeds)]
    for method in entries[0]:  # a mistype is said first
        find(method)
    rows = {}
    for method, rate, seed in product(*entries):
        chosen = {"method": method, "learning_rate": rate, "seed": seed}
        chosen = {key: value for key, value in chosen.items() if value}
        folder = os.path.join(out_dir, "-".join(chosen.values()))
        refuse_other_settings(folder, s, {*chosen, *OWN})
        found = outcome(folder, s.max_iters)
        if found is None:
            more = [f"--{key}={value}" for key, value in chosen.items()]
            error = train([*flags, *more, "--init_from=auto"], folder)
            found = outcome(folder, s.max_iters) or {"error": error}
        say(f"{os.path.basename(folder)}: {found.get('error') or found['val_loss']}")
        rows.setdefault((method, rate or "the recipe's"), []).append(found)
    print(table(rows, s.seeds))
    print(f"curves: python -m run.plot --out_dir='{s.out_dir}/*' --image=contest.png")
    if any("error" in run for runs in rows.values() for run in runs):
        raise SystemExit(1)


def refuse_other_settings(folder, s, but):
    """Leave with one line if a run in this folder was made by another value of one of the flags."""
    try:
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
    except FileNotFoundError:
        return
    for name, where in s.given.items():
        value = getattr(s, name)
        by_flag = where.startswith("--") and name not in but  # a file's may go by the method
        if by_flag and config.get(name) != value and value not in ("", "auto", 0):
            raise SystemExit(f"error: {folder} has {name} = {config.get(name)!r}, not "
                             f"{value!r}: take another --out_dir")


def train(flags, folder, program=TRAIN):
    """A run of train.py, or of another program with its flags: [words of its command].

    Returns the last line that it printed; all of them are in FOLDER.txt."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    command = [sys.executable, *program, *flags, f"--out_dir={folder}"]
    return last_line(command, f"{folder}.txt")


def last_line(command, path):
    """Run a command. Returns the last line that it printed; all of them go into the file `path`."""
    with open(path, "w+") as f:
        subprocess.run(command, stdout=f, stderr=subprocess.STDOUT)
        f.seek(0)
        return (f.read().strip().splitlines() or ["it printed nothing"])[-1]


def outcome(folder, steps):
    """{"val_loss", "tokens_per_s", "peak_memory_gb"} of a run of so many steps; None: not done."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as f:
            entries = [json.loads(line) for line in f]
    except FileNotFoundError:
        return None
    ends = [e["val_loss"] for e in entries if "val_loss" in e and e["iter"] == steps]
    logged = [e for e in entries if "tokens_per_s" in e]
    if not ends or not logged:
        return None
    found = {key: median(e[key] for e in logged) for key in ("tokens_per_s", "peak_memory_gb")}
    return found | {"val_loss": round(ends[-1], 4)}


def table(rows, seeds):
    """Markdown of {(method, rate): [outcome of each seed]}."""
    of = f"of seeds {seeds}" if seeds else "of the recipe's seed"
    lines = [f"| method | rate | validation, {of} | tokens/s | GiB |", "|---|---|---|---|---|"]
    for (method, rate), runs in rows.items():
        losses = ", ".join(f"{run['val_loss']:.4f}" if "val_loss" in run else "-" for run in runs)
        done = [run for run in runs if "val_loss" in run]
        speed = f"{median(r['tokens_per_s'] for r in done):,.0f}" if done else ""
        memory = f"{max(r['peak_memory_gb'] for r in done):.2f}" if done else ""
        lines.append(f"| `{method}` | {rate} | {losses} | {speed} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(s, sys.argv[1:])
