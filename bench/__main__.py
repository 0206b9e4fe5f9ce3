"""
Measure memory, speed and where a step's time goes, of Q-GaLore and its peers on one model.
    python -m bench config/llama_60m.py
    python -m bench config/llama_7b.py --contenders=qgalore,q_galore --peer_svd=False
    python -m bench config/llama_7b.py --memory_fraction_gib=16  # as on a card of that size
    python -m bench --proj_gap=20 --steps=60                     # refreshes among the timed steps
    python -m bench config/llama_7b.py --refresh_study=True      # range finder against exact SVD

Each contender runs in its own process. Settings are train.py's, which its recipes fit, and those
below. Data, accumulation and the length of a run play no part here.
"""

import difflib
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from bench.settings import CONTENDERS, REPOSITORY, train_settings
from configurator import at_least, configure

# measuring
out_dir = "out-bench"  # bench.json, bench.png
contenders = "all"  # or some: qgalore,qmuon,adam8bit,adamw,galore,q_galore,apollo,torchao
steps: at_least(1) = 10  # timed, the device not waited for
warmup: at_least(1) = 3  # steps before them, not timed: the first takes every layer's first basis
phase_steps: at_least(1) = 3  # steps after them, that wait for the device at the ends of each phase
memory_fraction_gib: at_least(0) = 0.0  # GPU memory that torch may take; 0 = all
timeout: at_least(0) = 0.0  # seconds that a contender may take; 0 = any
peer_svd = True  # False: galore and q_galore take unit vectors, and their SVD's cost is not told
refresh_study = False  # time a refresh against exact SVD on the matrices of one block, and leave
contender = ""  # internal: the one that this process runs

if __name__ == "__main__":
    s = configure(train_settings(), sys.modules[__name__])

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import torch

from bench.contenders import PHASES, measure_or_reason, settled
from bench.refresh import study
from methods.registry import find
from run.device import check_device, choose_threads, pick_device, pick_dtype
from run.files import replacing
from run.plot import new_figure, save as save_picture

PACKAGES = (  # whose versions stand with the figures
    "torch",
    "bitsandbytes",
    "triton",
    "galore-torch",
    "q-galore-torch",
    "apollo-torch",
    "torchao",
)
COLUMNS = [  # (head, key of a row or of its phase_ms, format)
    ("GiB", "peak_gib", ".2f"),
    ("reserved", "reserved_gib", ".2f"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("+refresh", "tokens_per_s_with_refreshes", ".0f"),
    ("MFU", "mfu", ".1%"),
    ("median", "median_ms", ".1f"),
    ("slowest", "slowest_ms", ".1f"),
    *((phase, phase, ".1f") for phase in PHASES),
    ("share", "refresh_share", ".1%"),
]


def main(s):
    s.n_kv_head = s.n_kv_head or s.n_head  # bench.json says how many
    names = chosen(s.contenders)
    kind = pick_device(s.device)
    check_device(kind)
    dtype = pick_dtype(s.dtype, kind)
    choose_threads(s, s.batch_size * s.block_size, s.threads)
    if s.contender:  # the process of one contender: its row is the last line that it prints
        print(json.dumps(measure_or_reason(s, kind, dtype)))
        return

    machine = describe(kind) | {"dtype": str(dtype)}
    path = os.path.join(s.out_dir, "refresh_study.json" if s.refresh_study else "bench.json")
    # what cannot work is said before anything is measured
    try:
        # a model without memory, to check its shape; 0: whatever s has for other methods
        full_rank = settled(s, "adamw", weight_bits=0)
        find("adamw").build_model(full_rank, "meta", dtype)
        os.makedirs(s.out_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=s.out_dir):  # a folder that cannot be written
            pass
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    except OSError as e:
        raise SystemExit(f"error: cannot write {path}: {e.strerror}")

    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if os.path.exists(path):
        print(f"note: {path} is there from before, and is replaced")
    save = partial(write_json, path, s, machine)
    if s.refresh_study:
        save(study(s, kind, dtype))
    else:
        compare(s, kind, names, save)
    print(f"--- {path}")


def chosen(contenders):
    """The names of contenders, from a setting. Exits with one line on one that there is not."""
    if contenders == "all":
        return CONTENDERS
    names = contenders.split(",")
    for name in names:
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1) or CONTENDERS
            raise SystemExit(
                f"error: contenders: there is no {name!r}; there is {', '.join(near)}"
            )
    return names


def describe(kind):
    """What the figures were taken on: the device, and the versions of what is installed."""
    if kind == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{cpu_name()}, {torch.get_num_threads()} threads"
    found = {"device": device, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def cpu_name():
    """The processor's model, as far as the system tells."""
    if os.path.exists("/proc/cpuinfo"):  # Linux, where `platform` has but the architecture
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path, s, machine, rows):
    with replacing(path) as f:
        found = {"settings": s.as_dict(), "machine": machine, "rows": rows}
        f.write(json.dumps(found, indent=1, allow_nan=False).encode())


def compare(s, kind, names, save):
    """Run the contenders one after the other, print a line of the table for each, draw all."""
    print(" " * 9 + "".join(f"{head:>11s}" for head, _, _ in COLUMNS))
    rows = []
    for name in names:
        row = run(name, s)
        rows.append(row)
        save(rows)  # each time: a later contender may be cut off with this process
        if "error" in row:
            print(f"{name:9s}  did not run: {row['error']}", flush=True)
        else:
            print(f"{name:9s}{table_line(row)}", flush=True)
    # what the heads mean
    memory = "allocated." if kind == "cuda" else "resident, over the process before the model."
    print("GiB: peak of training,", memory)
    print(
        f"+refresh: tokens/s with refreshes at a gap of {s.proj_gap}; share: theirs, of time; "
        "refresh: ms for all."
    )
    print(
        "median, slowest: ms a step; forward to update: ms of it, the device waited for after each."
    )
    plot(rows, os.path.join(s.out_dir, "bench.png"))


def run(name, s):
    """Run one contender in a process of its own; its row, or the reason why there is none."""
    command = [sys.executable, "-m", "bench", *sys.argv[1:], f"--contender={name}"]
    # memory that one contender took, or a package that it patched, must not reach the next
    paths = [REPOSITORY, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=s.timeout or None
        )
    except subprocess.TimeoutExpired:
        return {"contender": name, "error": f"not done after timeout = {s.timeout:g} s"}
    if done.returncode:
        # -9: killed, as a rule because the memory was out
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"contender": name, "error": f"exit {done.returncode}: {last}"}
    return {"contender": name} | json.loads(done.stdout.splitlines()[-1])


def table_line(row):
    """A row's cells, each 11 wide; "-" for what it does not know."""
    values = row | row["phase_ms"]  # no phase is called like another key
    cells = []
    for _, key, form in COLUMNS:
        text = "-" if values[key] is None else format(values[key], form)
        cells.append(f"{text:>11s}")
    return "".join(cells)


def plot(rows, path):
    """Draw bench.png: peak memory and speed, a bar a contender."""
    figure = new_figure(9, 1 + 0.45 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    names = [row["contender"] for row in rows]
    keys = ("peak_gib", "tokens_per_s_with_refreshes")
    titles = ("peak memory, GiB", "tokens a second, with refreshes")
    for ax, key, form, title in zip(axes, keys, ("{:.3g}", "{:,.0f}"), titles):
        bars = ax.barh(names, [row.get(key, 0) for row in rows])  # 0: it did not run
        labels = [form.format(row[key]) if key in row else "did not run" for row in rows]
        ax.bar_label(bars, labels, padding=3)
        ax.set(title=title)
        ax.margins(x=0.2)  # room for the labels
    axes[0].invert_yaxis()  # the first contender on top
    save_picture(figure, path)


if __name__ == "__main__":
    try:
        main(s)
    except KeyboardInterrupt:
        raise SystemExit("error: stopped; bench.json holds the contenders before")
    except OSError as e:  # a full disk, most likely
        raise SystemExit(f"error: {e}")
