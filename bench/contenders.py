"""
Measure one contender in this process: a few training steps on random tokens.

First come steps that are not timed, in which layers take their first bases and kernels compile.
Then steps that are timed without waiting for the device: these give tokens a second. Then a few in
which the device is waited for at both ends of each phase: these say where a step's time goes. At
last one step in which all bases are due says what a refresh takes. A refresh is rare (each
`proj_gap` steps), so its time is added by arithmetic to that of the timed steps.
"""

import copy
import math
import os
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch

from bench.peers import RATE, prepare_peer
from bench.settings import PEERS
from kernels.launch import compile_fused
from methods.registry import find
from qgalore import Parameter, ProjectedWeight, Projection
from run.device import GIB, flops_per_token, memory_peak, peak_flops

# of a step; a phase inside of another counts only where it is innermost
PHASES = ["forward", "backward", "projection", "update", "refresh"]


class Phases:
    """Seconds of each phase, less those of phases nested in it.

    Hooks run inside of backward, and projections inside of hooks. While `on` is set, the device is
    waited for at both ends of each phase; else phases cost nothing."""

    def __init__(self, kind):
        self.sync = torch.cuda.synchronize if kind == "cuda" else _nothing
        self.seconds = defaultdict(float)  # {phase: seconds while `on`}
        self.open = []  # the phases that we are in, the innermost last
        self.on = False
        self.refreshes = 0  # bases taken, `on` or not

    @contextmanager
    def __call__(self, name):
        """A block of code as phase `name`."""
        if self.on:
            self._switch()
            self.open.append(name)
        yield
        if self.on:
            self._switch()
            self.open.pop()

    def _switch(self):
        """The time since the last switch goes to the innermost phase."""
        self.sync()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def wrap(self, owner, method, name, takes_basis=False):
        """Time owner.method as phase `name`, or as phase name(*args) if that is a function.

        takes_basis: each call is a refresh, to be counted."""
        plain = getattr(owner, method)

        def timed(*args, **kwargs):
            self.refreshes += takes_basis
            with self(name(*args) if callable(name) else name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)


def _nothing():
    """On the CPU there is no device to wait for."""


class Training:
    """A model that learns random tokens, always the same four batches."""

    def __init__(self, s, kind, model, optimizer, phases, autocast):
        self.kind = kind
        self.model = model
        self.optimizer = optimizer  # None: backward steps all weights
        self.phases = phases
        self.autocast = autocast
        self.losses = []  # () tensors: reading them would wait for the device
        generator = torch.Generator().manual_seed(s.seed)
        shape = (4, s.batch_size, s.block_size + 1)
        self.batches = torch.randint(s.vocab_size, shape, generator=generator).to(kind)

    def step(self):
        """One step of training, its phases marked."""
        batch = self.batches[len(self.losses) % len(self.batches)]  # (B, T + 1)
        with self.phases("forward"), self.autocast:
            loss = self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        with self.phases("backward"):
            loss.backward()
        if self.optimizer is not None:
            with self.phases("update"):  # torch's; ours has moved the weights in backward
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def steps_ms(self, count):
        """Milliseconds of each of `count` steps, the device not waited for in between."""
        marks = [self._mark()]
        for _ in range(count):
            self.step()
            marks.append(self._mark())
        self.phases.sync()
        if self.kind == "cpu":  # seconds
            return [1000 * (end - start) for start, end in zip(marks, marks[1:])]
        return [start.elapsed_time(end) for start, end in zip(marks, marks[1:])]

    def _mark(self):
        """A moment: of the clock, or in the device's queue of work."""
        if self.kind == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def phases_ms(self, count):
        """{phase: its milliseconds a step} of `count` steps. Refreshes: see refresh_ms()."""
        self.phases.on = True  # and stays, for refresh_ms()
        for _ in range(count):
            self.step()
        ms = {name: 1000 * self.phases.seconds[name] / count for name in PHASES}
        return ms | {"refresh": None}

    def refresh_ms(self, bases):
        """Milliseconds of one refresh, from a step in which all bases are due."""
        for basis in bases:
            basis.next_refresh = 0  # ours: by Projection's schedule
            basis.ortho_matrix = None  # the peers': they take a basis where they have none
        # the mean of all refreshes in one step
        self.phases.seconds["refresh"] = 0.0
        before = self.phases.refreshes
        self.step()
        return 1000 * self.phases.seconds["refresh"] / (self.phases.refreshes - before)


def measure_or_reason(s, kind, dtype):
    """The row of s.contender, or why there is none: a peer may fail in any way; the others run."""
    try:
        return measure(s, kind, dtype)
    except Exception as e:
        return {"error": reason(e, s.contender)}


def measure(s, kind, dtype):
    """Train a few steps by s.contender; its row.

    Each trains in its own mode that takes the least memory: all but torch's AdamW step in backward.
    """
    # what this process takes without any model is not the contender's
    is_peer = s.contender in PEERS
    attach = prepare_peer(s.contender, kind, s.peer_svd) if is_peer else None
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports torch's compiler, some 100 MiB
    limit_memory(s, kind)
    phases = Phases(kind)
    baseline = peak_gib(kind)

    # as in train.py: AdamW's weights are float32, under autocast, and so are all under float16
    keeps_float32 = s.contender == "adamw" or dtype == torch.float16
    weight_dtype = torch.float32 if keeps_float32 else dtype
    autocast = torch.autocast(kind, dtype) if weight_dtype != dtype else nullcontext()
    torch.manual_seed(s.seed)
    if is_peer:
        model, optimizer, bases = build_peer(s, kind, weight_dtype, phases, attach)
    else:
        model, optimizer, bases = build_ours(s, kind, weight_dtype, phases)
    if s.compile:
        compile_fused(kind)
    build_peak = peak_gib(kind) - baseline
    reset_peak(kind)

    # steps: first for the caches and first bases, then for speed, then for phases
    training = Training(s, kind, model, optimizer, phases, autocast)
    for _ in range(s.warmup):
        training.step()
    before = phases.refreshes
    steps_ms = training.steps_ms(s.steps)
    seen = phases.refreshes - before
    phase_ms = training.phases_ms(s.phase_steps)

    by_refreshes = refreshes(s, training, bases(), steps_ms, seen, phase_ms)

    losses = torch.stack(training.losses).tolist()
    reserved = torch.cuda.max_memory_reserved() / GIB if kind == "cuda" else None
    of_training = {
        "peak_gib": peak_gib(kind) - baseline,
        "build_peak_gib": build_peak,
        "reserved_gib": reserved,  # what lies in fragments counts, too
        "phase_ms": phase_ms,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],  # JSON has no NaN
    }
    return of_training | speeds(s, kind, model.config, steps_ms) | by_refreshes


def speeds(s, kind, config, steps_ms):
    """What the timed steps say of speed."""
    per_s = 1000 * tokens_of(s) / sum(steps_ms)
    peak = peak_flops(kind)
    median = statistics.median(steps_ms)
    slowest = max(steps_ms)
    return {
        "tokens_per_s": per_s,
        "mfu": per_s * flops_per_token(config) / peak if peak else None,
        "median_ms": median,
        "slowest_ms": slowest,
        "slowest_over_median": slowest / median,
        "steps_ms": steps_ms,
    }


def refreshes(s, training, bases, steps_ms, seen, phase_ms):
    """What refreshes of `bases` take, of which the timed steps saw `seen`; phase_ms gets all of them.

    A layer is refreshed each proj_gap steps: what the timed steps missed, or saw too often, is
    added by arithmetic."""
    share = None
    unseen_ms = 0.0
    # unit vectors in place of the peers' SVD tell nothing of theirs
    by_svd = s.contender in ("galore", "q_galore")
    if bases and (s.peer_svd or not by_svd):
        one = training.refresh_ms(bases)
        due = s.steps * len(bases) / s.proj_gap
        phase_ms["refresh"] = len(bases) * one
        unseen_ms = one * (due - seen)
        share = one * due / (sum(steps_ms) + unseen_ms)
    return {
        "tokens_per_s_with_refreshes": 1000 * tokens_of(s) / (sum(steps_ms) + unseen_ms),
        "refresh_share": share,  # of time, at a gap of proj_gap
        "refreshes_seen": seen,  # in the timed steps
        "bases": len(bases),  # weights that are projected
    }


def tokens_of(s):
    """Those of the timed steps."""
    return s.steps * s.batch_size * s.block_size


def build_peer(s, kind, dtype, phases, attach):
    """(model at full rank, no optimizer: backward steps it, function that lists its bases)."""
    full_rank = settled(s, "adam8bit", weight_bits=0)  # 0: whatever s has for other methods
    model = find("adam8bit").build_model(full_rank, kind, dtype)
    return model, None, attach(s, model, phases)


def build_ours(s, kind, dtype, phases):
    """(model, optimizer, function that lists its bases); torch's optimizers have none."""
    time_phases_of_ours(phases)
    ours = settled(s, s.contender, learning_rate=RATE, weight_decay=0.0)
    model, optimizer = find(s.contender).build(ours, kind, dtype)

    def bases():
        found = [weight.projection for weight in getattr(optimizer, "weights", [])]
        return [p for p in found if math.isfinite(p.next_refresh)]  # Muon's weights have no basis

    return model, optimizer, bases


def settled(s, method, **changes):
    """The settings of `method`: a copy of s with these changes and the method's own.

    s is for many methods: what one of them does not read, or fixes, is no user's mistake here."""
    s = copy.copy(s)  # other contenders, and bench.json, have s as the user gave it
    vars(s).update(changes, method=method, given={})
    return find(method).settle(s)


def limit_memory(s, kind):
    """Let torch take no more of the GPU than s.memory_fraction_gib."""
    if kind == "cuda" and s.memory_fraction_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        share = min(1.0, s.memory_fraction_gib * GIB / total)
        torch.cuda.set_per_process_memory_fraction(share)


def time_phases_of_ours(phases):
    """Time what Q-GaLore's classes do, before any of them is made."""
    phases.wrap(ProjectedWeight, "move", "update")
    phases.wrap(Parameter, "move", "update")
    phases.wrap(Projection, "project", "projection")
    phases.wrap(Projection, "sketch", "refresh")
    phases.wrap(Projection, "refresh", "refresh", takes_basis=True)
    phases.wrap(ProjectedWeight, "gather", _phase_of_gather)


def _phase_of_gather(weight, what, *args):
    """gather() forms a product of two factors: the low-rank gradient, or a refresh's sketch."""
    return "refresh" if what == "sketch" else "projection"


def peak_gib(kind):
    """Peak GiB allocated on "cuda", resident on "cpu"."""
    if kind == "cpu" and os.path.exists("/proc/self/status"):
        # Linux, where getrusage's peak starts at that of the process which started this one
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024 / GIB
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
    first = (str(e).strip().splitlines() or [""])[0]
    first = first.partition(" GPU 0")[0]  # what follows in CUDA's message are numbers of the card
    return f"{type(e).__name__}: {first[:200]}"
