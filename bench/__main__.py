"""
Measure memory, speed and where a step's time goes, of Q-GaLore and its peers on one model, each in its own process:
    python bench.py config/llama_60m.py
    python bench.py config/llama_7b.py --contenders=qgalore,q_galore --memory_fraction_gib=16 --peer_svd=False
    python bench.py --proj_gap=20 --steps=60                   # refreshes among the timed steps
    python bench.py config/llama_7b.py --refresh_study=True    # the range finder against exact SVD
"""

import difflib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch

import train
from configurator import configure
from run.device import GIB, memory_peak
from model import LLaMA
from bench.peers import PEERS, RATE, prepare_peer
from qgalore import Projection, QGaLore

# -----------------------------------------------------------------------------
# train.py's settings, that its recipes fit; data, accumulation and the length of a run play no part here
globals().update({k: v for k, v in vars(train).items() if k[0].islower() and isinstance(v, (int, float, str))})
out_dir = "out-bench"  # bench.json, bench.png
contenders = "all"  # or some, with commas: qgalore,qmuon,adam8bit,adamw,galore,q_galore,apollo,torchao
steps = 10  # timed, the device not waited for
warmup = 3  # before them, not timed: the first takes every layer's first basis
phase_steps = 3  # after them, the device waited for at both ends of each phase; then one in which all bases are due
memory_fraction_gib = 0.0  # GPU memory that torch may take; 0 = all
timeout = 0.0  # seconds that a contender may take; 0 = any
threads = 0  # CPU threads; 0 = torch's choice
peer_svd = True  # False: galore and q_galore take unit vectors, and nothing is told of their SVD's time and memory
refresh_study = False  # time a refresh against exact SVD on the matrices of one block, and leave
contender = ""  # internal: the one that this process runs
# -----------------------------------------------------------------------------

CONTENDERS = ["qgalore", "qmuon", "qfira", "adam8bit", "adamw", *PEERS]
PHASES = ["forward", "backward", "projection", "update", "refresh"]


class Phases:
    """Seconds of each phase less those of phases nested in it: hooks run inside backward, projections inside hooks."""

    def __init__(self, kind):
        self.sync = torch.cuda.synchronize if kind == "cuda" else lambda: None
        self.seconds, self.open, self.on, self.refreshes = defaultdict(float), [], False, 0

    @contextmanager
    def __call__(self, name):
        if self.on:
            self._switch()
            self.open.append(name)
        yield
        if self.on:
            self._switch()
            self.open.pop()

    def _switch(self):
        self.sync()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def wrap(self, owner, method, name):
        """Time owner.method as phase `name`, or name(*args); count the bases taken."""
        plain = getattr(owner, method)

        def timed(*args, **kwargs):
            self.refreshes += method in ("turn", "get_orthogonal_matrix")
            with self(name(*args) if callable(name) else name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)


# -----------------------------------------------------------------------------


def measure(c, kind, dtype):
    """Train a few steps of c.contender; its row. The mode is the one that takes each the least memory."""
    if c.contender in PEERS:
        attach = prepare_peer(c.contender, kind, c.peer_svd)  # before the baseline of memory
    exact = c.contender not in ("galore", "q_galore") or c.peer_svd
    if kind == "cuda" and c.memory_fraction_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, c.memory_fraction_gib * GIB / total))
    phases, baseline = Phases(kind), peak_gib(kind)
    c.method = "adam8bit" if c.contender in PEERS else c.contender
    weight_dtype = torch.float32 if c.method == "adamw" else dtype  # as in train.py: float32 weights under autocast
    autocast = torch.autocast(kind, dtype) if weight_dtype != dtype else nullcontext()
    torch.manual_seed(c.seed)
    if c.contender in PEERS:
        model, optimizer = LLaMA.from_settings(vars(c), kind, weight_dtype), None
        bases = attach(c, model, phases)
    else:
        c.learning_rate, c.weight_decay = RATE, 0.0
        phases.wrap(QGaLore, "_step_layer", "update")
        phases.wrap(QGaLore, "_step_parameter", "update")
        phases.wrap(Projection, "project", "projection")
        phases.wrap(Projection, "look", "refresh")
        phases.wrap(QGaLore, "_gather", lambda _, name, what, *args: "refresh" if what == "sketch" else "projection")
        phases.wrap(Projection, "turn", "refresh")
        model, optimizer = train.build(vars(c), kind, weight_dtype)
        bases = lambda: list(getattr(optimizer, "projections", {}).values())
    if c.compile:
        model.compile_pointwise()
    build_peak = peak_gib(kind) - baseline
    reset_peak(kind)
    generator, losses = torch.Generator().manual_seed(c.seed), []
    batches = torch.randint(c.vocab_size, (4, c.batch_size, c.block_size + 1), generator=generator).to(kind)

    def step():
        batch = batches[len(losses) % len(batches)]
        with phases("forward"), autocast:
            loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        with phases("backward"):
            loss.backward()
        if c.contender == "adamw":
            with phases("update"):
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.detach())

    def mark():
        if kind == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for _ in range(c.warmup):
        step()
    marks, seen = [mark()], phases.refreshes
    for _ in range(c.steps):
        step()
        marks.append(mark())
    phases.sync()
    ms = [1000 * (b - a) if kind == "cpu" else a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    seen = phases.refreshes - seen
    phases.on = True
    for _ in range(c.phase_steps):
        step()
    phase_ms = {name: 1000 * phases.seconds[name] / c.phase_steps for name in PHASES[:-1]} | {"refresh": None}
    n, unseen, share = len(bases()), 0.0, None
    if n and exact:
        for basis in bases():  # all due at once: by Projection's schedule; the peers', because they have none
            basis.next_refresh, basis.ortho_matrix = 0, None
        phases.seconds["refresh"], before = 0.0, phases.refreshes
        step()
        one = 1000 * phases.seconds["refresh"] / (phases.refreshes - before)
        phase_ms["refresh"] = n * one
        unseen = one * (c.steps * n / c.proj_gap - seen)  # of refreshes due to the timed steps that were not in them
        share = n * one * c.steps / c.proj_gap / (sum(ms) + unseen)
    gpu = torch.cuda.get_device_name() if kind == "cuda" else ""
    peak_flops = next((flops for name, flops in train.PEAK_FLOPS.items() if name in gpu), None)
    tokens = 1000 * c.steps * c.batch_size * c.block_size
    return {
        "peak_gib": peak_gib(kind) - baseline, "build_peak_gib": build_peak,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if kind == "cuda" else None,
        "tokens_per_s": tokens / sum(ms), "tokens_per_s_with_refreshes": tokens / (sum(ms) + unseen),
        "mfu": tokens / sum(ms) * model.flops_per_token() / peak_flops if peak_flops else None,
        "median_ms": statistics.median(ms), "slowest_ms": max(ms),
        "slowest_over_median": max(ms) / statistics.median(ms), "steps_ms": ms,
        "phase_ms": phase_ms, "refresh_share": share, "refreshes_seen": seen, "bases": n,
        "losses": torch.stack(losses).tolist(),
    }


def peak_gib(kind):
    """Peak GiB allocated on "cuda", resident on "cpu"."""
    if kind == "cpu" and os.path.exists("/proc/self/status"):  # Linux, where getrusage's peak starts at the parent's
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / GIB
    return memory_peak(kind)


def reset_peak(kind):
    """From here on: what training takes, not what it took to build a model and convert it."""
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # Linux: the peak is what is resident now


def reason(e, name):
    """One line on why a contender did not run."""
    package = PEERS.get(name, "").partition(".")[0]
    if isinstance(e, ModuleNotFoundError) and e.name == package:
        return f"not installed: pip install {package.replace('_', '-')}"
    return f"{type(e).__name__}: " + (str(e).strip().splitlines() or [""])[0].partition(" GPU 0")[0][:200]


def run(name, c):
    """Run one contender in a process of its own; its row, or the reason why there is none."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--contender={name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=c.timeout or None)
    except subprocess.TimeoutExpired:
        return {"contender": name, "error": f"not done after timeout = {c.timeout:g} s"}
    if done.returncode:  # -9: killed, as a rule because the memory was out
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"contender": name, "error": f"exit {done.returncode}: {last}"}
    return {"contender": name} | json.loads(done.stdout.splitlines()[-1])


def study(c, kind, dtype):
    """Time of a refresh without quantisation and of exact SVD, on the shapes of a block's matrices, and the energy that
    each keeps, |G P|^2. G = dy^T x, with random x and dy; token t weighs t^-decay: 0 gives the flattest spectrum."""
    generator, sync = torch.Generator(kind).manual_seed(c.seed), Phases(kind).sync
    tokens, rows = c.batch_size * c.block_size, []

    def fastest(function, times):
        best = math.inf
        for i in range(times + 1):  # the first loads and allocates
            sync()
            start = time.perf_counter()
            result = function(i * 10**6)  # a step past any gap
            sync()
            best = min(best, 1000 * (time.perf_counter() - start)) if i else best
        return best, result

    print(f"rank {c.rank}, {tokens} tokens")
    print("    out x in     decay  refresh ms      SVD ms  SVD/refresh  energy, of SVD's  SVD's, of all")
    for n_out, n_in in ((c.n_embd, c.n_embd), (c.ffn_dim, c.n_embd), (c.n_embd, c.ffn_dim)):
        for decay in (0.0, 0.5, 1.0):
            weight = torch.arange(1, tokens + 1, device=kind)[:, None] ** -decay
            x, dy = (torch.randn(tokens, n, device=kind, generator=generator) for n in (n_in, n_out))
            x, dy = x.to(dtype), dy.mul_(weight).to(dtype)
            projection = Projection(n_out, n_in, c.rank, bits=16)

            def refresh(step):
                left, right = projection.look(x, dy, step)
                projection.turn((left.T @ right).float(), step)

            ms, _ = fastest(refresh, 3)
            svd, (_, s, _) = fastest(lambda step: torch.linalg.svd((dy.T @ x).float(), full_matrices=False), 1)
            energy = s.double().square()
            best = energy[: c.rank].sum()
            left, right = projection.project(x, dy)
            r = {"out": n_out, "in": n_in, "decay": decay, "refresh_ms": ms, "svd_ms": svd, "ratio": svd / ms,
                 "energy_of_svd": ((left.T @ right).double().square().sum() / best).item(),
                 "svd_energy_of_all": (best / energy.sum()).item()}
            rows.append(r)
            print(f"{n_out:7d} x {n_in:<7d}{decay:4.1f}{ms:12.1f}{svd:12.1f}{r['ratio']:13.1f}"
                  f"{r['energy_of_svd']:18.4f}{r['svd_energy_of_all']:15.4f}", flush=True)
    return rows


def compare(c, kind, names, save):
    heads = ["GiB", "reserved", "tokens/s", "+refresh", "MFU", "median", "slowest", *PHASES, "share"]
    print(" " * 9 + "".join(f"{head:>11s}" for head in heads))
    rows = []
    for name in names:
        rows.append(r := run(name, c))
        save(rows)  # each time: a later contender may be cut off with this process
        if "error" in r:
            print(f"{name:9s}  did not run: {r['error']}", flush=True)
            continue
        cells = [(r[key], "11.2f") for key in ("peak_gib", "reserved_gib")]
        cells += [(r[key], "11.0f") for key in ("tokens_per_s", "tokens_per_s_with_refreshes")] + [(r["mfu"], "11.1%")]
        cells += [(ms, "11.1f") for ms in (r["median_ms"], r["slowest_ms"], *r["phase_ms"].values())]
        cells += [(r["refresh_share"], "11.1%")]
        print(f"{name:9s}" + "".join(f"{'-':>11s}" if n is None else format(n, f) for n, f in cells), flush=True)
    print("GiB: peak of training,", "allocated." if kind == "cuda" else "resident, over the process before the model.")
    print(f"+refresh: tokens/s with refreshes at a gap of {c.proj_gap}; share: theirs, of time; refresh: ms for all.")
    print("median, slowest: ms a step; forward to update: ms of it, the device waited for after each.")
    plot(rows, os.path.join(c.out_dir, "bench.png"))


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.45 * len(rows)), sharey=True, layout="constrained")
    for ax, key, title in zip(axes, ("peak_gib", "tokens_per_s_with_refreshes"), ("peak memory, GiB", "tokens/s")):
        bars = ax.barh([r["contender"] for r in rows], [r.get(key, 0) for r in rows])
        ax.bar_label(bars, [f"{r[key]:,.4g}" if key in r else "did not run" for r in rows], padding=3)
        ax.set(title=title)
        ax.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe(kind):
    """What the figures were taken on: the device, and the versions of what is installed."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), cpu)
    device = torch.cuda.get_device_name() if kind == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    found = {"device": device, "python": platform.python_version()}
    for package in ("torch", "bitsandbytes", "triton", "galore-torch", "q-galore-torch", "apollo-torch", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def main():
    config = configure(globals())
    config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    c = SimpleNamespace(**config)
    names = CONTENDERS if c.contenders == "all" else c.contenders.split(",")
    for name in names:
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1) or CONTENDERS
            raise SystemExit(f"error: contenders: there is no {name!r}; there is {', '.join(near)}")
    for key in ("steps", "warmup", "phase_steps", "batch_size", "block_size", "n_layer", "n_head", "n_embd", "ffn_dim",
                "vocab_size", "rank", "proj_gap"):
        if config[key] < 1:
            raise SystemExit(f"error: {key} must be at least 1, not {config[key]}")
    kind = c.device if c.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    for key, known in (("device", ("auto", "cuda", "cpu")), ("dtype", ("auto", "bfloat16", "float32"))):
        if config[key] not in known:
            raise SystemExit(f"error: {key} {config[key]!r}: there are {', '.join(known)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: device=cuda, but torch finds no CUDA GPU; use --device=cpu, or mend the driver")
    bf16 = kind == "cuda" and torch.cuda.is_bf16_supported()
    dtype = getattr(torch, c.dtype if c.dtype != "auto" else "bfloat16" if bf16 else "float32")
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.contender:
        try:
            row = measure(c, kind, dtype)
        except Exception as e:  # a peer may fail in any way; the others run
            row = {"error": reason(e, c.contender)}
        print(json.dumps(row))
        return
    found = describe(kind) | {"dtype": str(dtype)}
    path = os.path.join(c.out_dir, "refresh_study.json" if c.refresh_study else "bench.json")

    def save(rows):
        with open(path, "w") as f:
            json.dump({"settings": config, "machine": found, "rows": rows}, f, indent=1)

    try:
        LLaMA.from_settings(config | {"method": "adamw"}, "meta", dtype)
        os.makedirs(c.out_dir, exist_ok=True)
        save([])
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    except OSError as e:
        raise SystemExit(f"error: cannot write {path}: {e.strerror}")
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    if c.refresh_study:
        save(study(c, kind, dtype))
    else:
        compare(c, kind, names, save)
    print(f"--- {path}")


if __name__ == "__main__":
    main()
