"""
What a run takes, counted before anything is allocated.

The plan is not a formula: it is the run's own model and optimizer, stepping on torch's fake
tensors, which have shapes and no data. Every allocation passes by and is counted, temporaries
included (run/trace.py): the plan cannot fall behind the code. Of a deep model a few blocks are
traced: blocks are alike, and what one does is repeated.

On a GPU the same trace goes through torch's allocator (run/allocator.py). What it reserves beyond
the tensors is "fragments, workspaces". What CUDA and its libraries take is asked of the card, or
bounded where there is none.

On a CPU what lies in fragments is estimated from measurements (docs/memory.md): the C library keeps
freed blocks of up to 32 MiB in its heap. Not counted there: the libraries themselves, data and
loss.png.
"""

import math
import os
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.launch import triton
from methods.registry import find, shape
from quant import bitsandbytes
from run.allocator import Allocator
from run.by_block import Kept, forward_backward, kept_bytes
from run.device import GIB, block_weights, memory_room, taken_outside_torch
from run.machine import free_memory
from run.ranks import IN_FLIGHT
from run.roofline import print_time
from run.trace import Live, Repeated, kept

FEW, TRACED = 2, 4  # blocks of the two models that are looked at for a deep one
MATRICES = 7  # of a block, which may each be projected
LARGEST = 3  # of these, whose refresh takes most
WORKSPACES = 16 * 2**20  # bytes: of the libraries, on a CPU
CONTEXT = 900 * 2**20  # bytes: of CUDA and its libraries, where no card can be asked; an H100's 860
ABSURD = 2**50  # bytes of weights that no machine has: nothing more is planned
SUMS = "sums of micro-batches"
KEPT = "inputs of blocks"  # with by_block: in host memory
OUTSIDE = "context, libraries"  # of torch's allocator
MEASURED_IN_STEPS = ("projections", SUMS)  # parts that a run allocates as it steps


class InHostMemory(Kept):
    """A block's input that is not on the device: a plan does not count it."""

    def leave(self, t):
        return t.shape, t.dtype

    def come_back(self, t):
        shape, dtype = t
        return torch.empty(shape, dtype=dtype)


class Gpu(NamedTuple):
    """What a plan must know of a GPU."""

    expandable: bool = True  # segments, see run/allocator.py
    workspace: int = 32 * 2**20  # bytes: cuBLAS's, for each of the two threads that multiply
    kernels: bool = True  # of Triton, in the place of plain torch


def memory_plan(s, weight_dtype, dtype, fragments=0.0, gpu=None):
    """{part: bytes} of a run, at the peak of its worst step.

    s: settled settings. dtype: of the computation, under autocast if it is not weight_dtype.
    fragments: on a CPU, what the heap loses for each byte of activations in it. gpu: what it
    must know of a GPU, if the run is for one: the sum is what torch reserves there."""
    n = s.n_layer  # blocks
    due = -(-MATRICES * n // s.proj_gap)  # weights that refresh their basis in one step
    if n <= TRACED or s.low_rank:  # few, or not alike
        parts, events = _trace(s, n, due, weight_dtype, dtype, gpu)
    else:
        parts, events = _trace_deep(s, n, due, weight_dtype, dtype, gpu)
    plan = _summed_up(parts, events, fragments, gpu)
    if s.by_block and gpu is None:
        plan[KEPT] = kept_bytes(s, dtype)
    return plan


def _trace_deep(s, n, due, weight_dtype, dtype, gpu):
    """_trace() of n blocks that are alike, from those of FEW and TRACED.

    It is too high for gaps so short that more weights are due than two blocks can show: then as
    many are taken to be due in every block."""
    if due > LARGEST * (TRACED - FEW):
        due = TRACED * -(-due // n)
    few, events_few = _trace(s, FEW, 0, weight_dtype, dtype, gpu, only_build=True)
    parts, events = _trace(s, TRACED, due, weight_dtype, dtype, gpu)
    grown = {part: parts[part] - few[part] for part in parts}
    parts = {p: few[p] + grown[p] * (n - FEW) // (TRACED - FEW) for p in parts}
    # what other blocks keep that was allocated outside of blocks
    more = {}
    so_far = Counter()
    stages = kept(events)
    for stage, before in kept(events_few).items():
        by_block = {size: k // (TRACED - FEW) for size, k in (stages[stage] - before).items()}
        all_of_them = Counter({size: k * (n - TRACED) for size, k in by_block.items()})
        more[stage] = all_of_them - so_far
        so_far = all_of_them
    return parts, Repeated(events, n - TRACED + 1, more).events


def _trace(s, blocks, due, weight_dtype, dtype, gpu, only_build=False):
    """Of the first `blocks` blocks: ({part: bytes} that are there from the start, Live.events).

    due: weights that refresh their basis in one step. only_build: of weights that step in backward
    no step is traced."""
    live = Live(on_gpu=gpu is not None and gpu.kernels, compiles=s.compile)
    parts = {}
    autocast = torch.autocast("cpu", dtype) if dtype != weight_dtype else nullcontext()
    micro_batches = min(2, s.gradient_accumulation_steps)
    if s.moments == "8bit" or s.weight_bits == 4:
        bitsandbytes()  # its tables need numbers, which fake tensors do not have
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        if gpu is not None:  # cuBLAS's, one for each thread that multiplies: backward has its own
            workspaces = [torch.empty(gpu.workspace, dtype=torch.uint8) for _ in range(2)]  # noqa
        model, optimizer = find(s.method).build(s.changed(n_layer=blocks), "cpu", weight_dtype)
        parts["weights"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        built = live.now - (2 * gpu.workspace if gpu else 0)
        live.reach("built")
        live.watch(model.blocks)

        def step(stage=None):
            """stage: is reached before the last micro-batch."""
            idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64)  # (B, T)
            if s.by_block:
                batches = [(idx, idx, None)] * micro_batches
                others = s.gradient_accumulation_steps - micro_batches, *idx.shape, s.n_embd
                waiting = torch.empty(others, dtype=dtype)  # noqa: hidden states
                shares = [1] * micro_batches
                forward_backward(model, batches, shares, optimizer, autocast, keep=InHostMemory)
                live.block = None
            for left in [] if s.by_block else reversed(range(micro_batches)):
                if stage and left == 0 and micro_batches > 1:
                    live.reach(stage)
                optimizer.accumulating = left > 0
                with autocast:
                    loss = model(idx, idx)
                loss.backward()
                live.block = None
            optimizer.step()

        if hasattr(optimizer, "weights"):
            parts["moments"] = built - parts["weights"]
            if not only_build:
                _steps_in_backward(s, due, optimizer, step, live)
        else:
            for first in (True, False):  # torch makes the moments at the first step
                step()
                optimizer.zero_grad()
                if first:
                    live.reach("stepped")
            state = [t for of in optimizer.state.values() for t in of.values()]
            parts["moments"] = sum(t.nbytes for t in state)
    return parts, live.events


def _steps_in_backward(s, due, optimizer, step, live):
    """The first step of weights that step in backward, then a later one in which some refresh."""
    for weight in optimizer.weights:
        p = weight.projection
        p.refresh = partial(_first_refresh, weight, p.refresh)
    step()
    live.reach("projections")
    for weight in optimizer.weights:
        del weight.projection.refresh
    projections = [weight.projection for weight in reversed(optimizer.weights)]
    projections.sort(key=lambda projection: -projection.other)
    for i, projection in enumerate(projections):
        if projection.next_refresh < math.inf:
            projection.next_refresh = 0 if i < due else math.inf
    step(SUMS)


def _first_refresh(weight, refresh, sketch, step):
    """Projection.refresh() of a weight without a basis, where no number says whether it is finite:
    as if there had been one."""
    p = weight.projection
    if p.basis is None:
        p.basis = weight.empty_basis()
    refresh(sketch, step)
    p.arriving = None


def _summed_up(parts, events, fragments, gpu):
    """The whole plan: parts, those that the steps have added, and the rest of the peak."""
    live = Live()
    allocator = Allocator(gpu.expandable if gpu else True)
    before = 0  # bytes at the last stage
    for _, key, size in events:
        if key is None:  # size: a stage's name
            if size in MEASURED_IN_STEPS:
                parts[size] = live.now - before
            before = live.now
        elif size is not None:
            live.count(size, key)
            allocator.allocate(key, size)
        else:
            live.free(key)
            allocator.free(key)
    workspaces = 2 * gpu.workspace if gpu else 0
    activations = live.peak - sum(parts.values()) - workspaces
    plan = parts | {"gradients, activations": activations}
    if gpu:
        plan["fragments, workspaces"] = allocator.reserved - live.peak + workspaces
    elif fragments:
        of_heap = min(activations, live.heap_peak)
        plan["fragments, workspaces"] = int(fragments * of_heap) + WORKSPACES
    return plan


def least(s, weight_dtype, dtype):
    """{part: bytes} that a run takes at least: weights, the blocks' input. By arithmetic alone."""
    c = shape(s)
    matrices = c.n_layer * block_weights(c)
    if s.low_rank:  # two factors each, of one column or more
        matrices = c.n_layer * MATRICES * 2 * c.n_embd
    embeddings = c.vocab_size * c.n_embd * (1 if c.tie_embedding else 2)
    embedding_bits = 8 if s.embed_bits == 8 else 8 * weight_dtype.itemsize
    return {
        "weights": (matrices * s.weight_bits + embeddings * embedding_bits) // 8,
        "gradients, activations": s.batch_size * s.block_size * c.n_embd * dtype.itemsize,
    }


def fits(s, ranks, weight_dtype, dtype):
    """Plan a run before anything is allocated. Exits with one line if the device is too small.

    With s.dry_run the plan is printed instead. ranks: run/ranks.py's."""
    try:
        plan = least(s, weight_dtype, dtype)
        room = room_here(s)
        # planning sizes beyond any machine would take for ever, or overflow
        most = ABSURD if s.dry_run or room is None else room
        if sum(plan.values()) <= most:
            plan = plan_of_rank(s, ranks, weight_dtype, dtype)
            room = room_here(s)  # on a CPU, less what planning has loaded
        host = 0  # of this machine's ranks
        if s.by_block and s.device != "cpu":
            here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
            host = kept_bytes(s, dtype) * here // ranks.size
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if s.dry_run:
        print_plan(plan, room, s.device)
        if sum(plan.values()) <= ABSURD and ranks.size == 1:
            print_time(s, sum(plan.values()) - plan.get(OUTSIDE, 0))
        if host:
            print(f"in host memory, the blocks' inputs: {host / GIB:.1f} GiB")
        if sum(plan.values()) > ABSURD:
            print("note: this is the least that such sizes take; more was not counted")
    else:
        refuse_what_does_not_fit(plan, room, s.device)
        refuse_what_the_host_has_no_room_for(host)


def refuse_what_the_host_has_no_room_for(size):
    """Leave with one line if host memory has no room for so many bytes of blocks' inputs."""
    free = free_memory()
    if size and free is not None and size > free:
        raise SystemExit(
            f"error: by_block leaves {size / GIB:.2f} GiB of blocks' inputs in host memory, which "
            f"has {free / GIB:.2f} free: lower gradient_accumulation_steps, or set "
            "checkpoint_bits=8"
        )


def room_here(s):
    """Bytes on the run's device: all of a GPU, of which a plan has what others take; on a CPU what
    is free. None if there is no such device here, or it does not tell."""
    here = s.device == "cpu" or torch.cuda.is_available()
    return memory_room(s.device) if here else None


def gpu_here():
    """The Gpu that this machine has, or without one as torch would treat it here."""
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    settings += os.environ.get("PYTORCH_ALLOC_CONF", "")
    expandable = "expandable_segments:True" in settings and sys.platform != "win32"
    if not torch.cuda.is_available():
        return Gpu(expandable)
    hopper_or_later = torch.cuda.get_device_capability()[0] >= 9
    workspace = 32 * 2**20 if hopper_or_later else 8320 * 2**10  # as torch chooses
    return Gpu(expandable, workspace, kernels=triton is not None)


def plan_of_rank(s, ranks, weight_dtype, dtype):
    """memory_plan() of one of the ranks, with what it sends, and what CUDA takes beside torch."""
    held = s.gradient_accumulation_steps  # micro-batches whose gradients a rank sums up
    if not s.grad_clip:
        held //= ranks.size
    of_rank = s.changed(gradient_accumulation_steps=held)
    if s.device == "cpu":
        plan = memory_plan(of_rank, weight_dtype, dtype, find(s.method).fragments)
    else:
        plan = memory_plan(of_rank, weight_dtype, dtype, gpu=gpu_here())
    if ranks.size > 1:
        plan["sums in flight"] = 2 * IN_FLIGHT  # as they are sent, and in float32
    if s.device != "cpu":
        here = torch.cuda.is_available()
        plan[OUTSIDE] = taken_outside_torch(dtype) if here else CONTEXT
    return plan


def print_plan(plan, room, device):
    need = sum(plan.values())  # bytes
    rows = dict(plan)
    if OUTSIDE in rows:
        outside = rows.pop(OUTSIDE)
        rows |= {"= reserved by torch": need - outside, OUTSIDE: outside}
    for part, count in (rows | {"total": need}).items():
        print(f"{part:24s} {count / GIB:8.3f} GiB {count:16,d} bytes")
    if room is None:
        print(f"{device}: there is no such device here, or it does not tell what it has")
    else:
        verdict = "enough" if need <= room else "NOT enough"
        free = "" if OUTSIDE in plan else " free"
        print(f"{device} has {room / GIB:.2f} GiB{free}: {verdict}")


LOWER = {  # what a user can do about the largest part
    "gradients, activations": "batch_size or block_size, or set checkpoint_activations=True",
    "fragments, workspaces": "batch_size or block_size, or set checkpoint_activations=True",
    "moments": "rank",
    "projections": "rank",
    SUMS: "gradient_accumulation_steps to 1, or set by_block=True",
    KEPT: "batch_size or gradient_accumulation_steps, or set checkpoint_bits=8",
    OUTSIDE: "n_layer or n_embd, or end what else runs on the card",
}


def refuse_what_does_not_fit(plan, room, device):
    """Leave with one line, if room is known: the bytes needed, and the settings to lower."""
    need = sum(plan.values())  # bytes
    if room is None:
        room = ABSURD
    if need <= room:
        return
    largest = max(plan, key=plan.get)
    if need - plan.get(SUMS, 0) <= room:
        largest = SUMS
    lower = LOWER.get(largest, "n_layer or n_embd")
    has = f"{room / GIB:.2f} free"
    if OUTSIDE in plan:
        has = f"{room / GIB:.2f}, {plan[OUTSIDE] / GIB:.2f} of them taken by CUDA and others"
    raise SystemExit(
        f"error: this run needs {need / GIB:.2f} GiB or more, and {device} has {has}; "
        f"of which {largest} {plan[largest] / GIB:.2f}: "
        f"lower {lower} (--dry_run=True lists all)"
    )
