"""
What a run takes, counted before anything is allocated.

The plan is not a formula: it is the run's own model and optimizer, stepping on torch's fake
tensors, which have shapes and no data. Every allocation passes by and is counted, temporaries
included: the plan cannot fall behind the code. Of a deep model, two of a few blocks are planned:
blocks are alike, and each more adds the same.

On a CPU what lies in fragments is estimated from measurements (docs/memory.md): the C library keeps
freed blocks of up to 32 MiB in its heap. Not counted: on a GPU fragments, the libraries' workspaces
and the context (0.3 to 0.9 GiB by card); on a CPU the libraries themselves, data and loss.png.
"""

import math
import weakref
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from methods.registry import find, shape
from quant import bitsandbytes
from run.device import GIB, block_weights, memory_free
from run.ranks import IN_FLIGHT
from run.roofline import print_time

FEW, MORE = 2, 4  # blocks of the two models that are planned for a deep one
MATRICES = 7  # of a block, which may each be projected
HEAP = 32 * 2**20  # bytes: the C library gives freed blocks of this size back to the system
WORKSPACES = 16 * 2**20  # bytes: of the libraries, on a CPU
ABSURD = 2**50  # bytes of weights that no machine has: nothing more is planned


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live: `now`, and at the `peak`.

    in_heap, heap_peak: of those smaller than HEAP alone."""

    def __init__(self):
        super().__init__()
        self.bytes = {}  # by storage
        self.now = self.in_heap = 0
        self.peak = self.heap_peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls, and no allocation
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):  # an output may be a view of what is counted
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.bytes:
                self._count(key, storage.nbytes())
                weakref.finalize(storage, self._free, key)
        return out

    def pop_peak(self):
        """The peak since the last call."""
        peak = self.peak
        self.peak = self.now
        return peak

    def _count(self, key, size):
        self.bytes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        if size < HEAP:
            self.in_heap += size
            self.heap_peak = max(self.heap_peak, self.in_heap)

    def _free(self, key):
        size = self.bytes.pop(key)
        self.now -= size
        if size < HEAP:
            self.in_heap -= size


def memory_plan(s, weight_dtype, dtype, fragments=0.0):
    """{part: bytes} of a run, at the peak of its worst step.

    s: settled settings. dtype: of the computation, under autocast if it is not weight_dtype.
    fragments: on a CPU, what the heap loses for each byte of activations in it; 0: a GPU."""
    n = s.n_layer  # blocks
    due = -(-MATRICES * n // s.proj_gap)  # weights that refresh their basis in one step
    if n <= 2 * MORE or s.low_rank:  # few, or not alike
        plan, peaks = _plan(s, n, due, weight_dtype, dtype)
    else:
        plan, peaks = _plan_deep(s, n, due, weight_dtype, dtype)
    *peaks, heap = peaks
    activations = max(peaks) - sum(plan.values())
    plan["gradients, activations"] = activations
    if fragments:
        plan["fragments, workspaces"] = int(fragments * min(activations, heap)) + WORKSPACES
    return plan


def _plan_deep(s, n, due, weight_dtype, dtype):
    """_plan() of n blocks that are alike, from the plans of FEW and MORE.

    It is exact but for gaps of two steps, where it is too high: more weights are due than have the
    largest sketch, and all are taken for such."""
    all_due = s.proj_gap == 1
    due_few = due_more = min(due, FEW)
    if all_due:
        due_few, due_more = MATRICES * FEW, MATRICES * MORE
    few, peaks_few = _plan(s, FEW, due_few, weight_dtype, dtype)
    more, peaks = _plan(s, MORE, due_more, weight_dtype, dtype)
    plan = {part: _extrapolate(few[part], more[part], n) for part in few}
    peaks_n = [_extrapolate(a, b, n) for a, b in zip(peaks_few, peaks)]
    if due > FEW and not all_due:  # what each weight more that is due adds
        busy, peaks_busy = _plan(s, MORE, MORE, weight_dtype, dtype)
        for part in plan:
            plan[part] += _extrapolate(0, busy[part] - more[part], due)
        peaks_n = [a + _extrapolate(0, c - b, due) for a, b, c in zip(peaks_n, peaks, peaks_busy)]
    return plan, peaks_n


def _extrapolate(few, more, n):
    """What n blocks, or due weights, take, if FEW and MORE take so much."""
    return few + (more - few) * (n - FEW) // (MORE - FEW)


def _plan(s, blocks, due, weight_dtype, dtype):
    """Of the first `blocks` blocks: ({part: bytes} that stays, [each phase's peak, heap_peak]).

    due: weights that refresh their basis in one step."""
    live = Live()
    plan = {}
    peaks = []
    autocast = torch.autocast("cpu", dtype) if dtype != weight_dtype else nullcontext()
    micro_batches = min(2, s.gradient_accumulation_steps)
    if s.moments == "8bit" or s.weight_bits == 4:
        bitsandbytes()  # its tables need numbers, which fake tensors do not have
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model, optimizer = find(s.method).build(s.changed(n_layer=blocks), "cpu", weight_dtype)
        plan["weights"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

        def micro_batch(last):
            idx = torch.zeros(s.batch_size, s.block_size, dtype=torch.int64)  # (B, T)
            optimizer.accumulating = not last
            with autocast:
                loss = model(idx, idx)
            peaks.append(live.pop_peak())
            loss.backward()
            peaks.append(live.pop_peak())

        if hasattr(optimizer, "weights"):
            _plan_in_backward(s, due, optimizer, micro_batches, micro_batch, live, plan)
        else:
            for _ in range(2):  # torch makes the moments at the first step
                for _ in range(micro_batches):
                    micro_batch(True)
                optimizer.step()
                optimizer.zero_grad()
            state = [t for of in optimizer.state.values() for t in of.values()]
            plan["moments"] = sum(t.nbytes for t in state)
    return plan, [*peaks, live.peak, live.heap_peak]


def _plan_in_backward(s, due, optimizer, micro_batches, micro_batch, live, plan):
    """The parts of a method whose weights step in backward: its first step, then a later one."""
    plan["moments"] = live.now - plan["weights"]
    if micro_batches > 1 and not s.proj_svd:  # the first step: every layer sums up a sketch
        micro_batch(False)
        optimizer.zero_grad()
    before = live.now - sum(plan.values())
    # from here on all layers have a basis, and some refresh it
    for weight in optimizer.weights:
        weight.projection.basis = weight.empty_basis()
    projections = [weight.projection for weight in reversed(optimizer.weights)]
    projections.sort(key=lambda projection: -projection.other)
    for i, projection in enumerate(projections):
        if projection.next_refresh < math.inf:
            projection.next_refresh = 0 if i < due else 2
    plan["projections"] = live.now - before - sum(plan.values())
    if micro_batches > 1:
        micro_batch(False)
        plan["sums of micro-batches"] = live.now - sum(plan.values())
    micro_batch(True)
    optimizer.step()


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
        free = free_here(s)
        # planning sizes beyond any machine would take for ever, or overflow
        most = ABSURD if s.dry_run or free is None else free
        if sum(plan.values()) <= most:
            plan = plan_of_rank(s, ranks, weight_dtype, dtype)
            free = free_here(s)  # less what planning has loaded
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if s.dry_run:
        print_plan(plan, free, s.device)
        if sum(plan.values()) <= ABSURD and ranks.size == 1:
            print_time(s, sum(plan.values()))
        if sum(plan.values()) > ABSURD:
            print("note: this is the least that such sizes take; more was not counted")
    else:
        refuse_what_does_not_fit(plan, free, s.device)


def free_here(s):
    """Bytes free on the run's device; None if there is no such device here, or it does not tell."""
    here = s.device == "cpu" or torch.cuda.is_available()
    return memory_free(s.device) if here else None


def plan_of_rank(s, ranks, weight_dtype, dtype):
    """memory_plan() of one of the ranks, with what it sends."""
    held = s.gradient_accumulation_steps  # micro-batches whose gradients a rank sums up
    if not s.grad_clip:
        held //= ranks.size
    fragments = find(s.method).fragments if s.device == "cpu" else 0.0
    of_rank = s.changed(gradient_accumulation_steps=held)
    plan = memory_plan(of_rank, weight_dtype, dtype, fragments)
    if ranks.size > 1:
        plan["sums in flight"] = 2 * IN_FLIGHT  # as they are sent, and in float32
    return plan


def print_plan(plan, free, device):
    need = sum(plan.values())  # bytes
    for part, count in (plan | {"total": need}).items():
        print(f"{part:24s} {count / GIB:8.3f} GiB {count:16,d} bytes")
    if free is None:
        print(f"{device}: there is no such device here, or it does not tell what it has")
    else:
        verdict = "enough" if need <= free else "NOT enough"
        print(f"{device} has {free / GIB:.2f} GiB free: {verdict}")


LOWER = {  # what a user can do about the largest part
    "gradients, activations": "batch_size or block_size, or set checkpoint_activations=True",
    "fragments, workspaces": "batch_size or block_size, or set checkpoint_activations=True",
    "moments": "rank",
    "projections": "rank",
    "sums of micro-batches": "gradient_accumulation_steps to 1, or with muon and fira raise "
    "residual_blocks",
}


def refuse_what_does_not_fit(plan, free, device):
    """Leave with one line, if free is known: the bytes needed, and the settings to lower."""
    need = sum(plan.values())  # bytes
    if free is None:
        free = ABSURD
    if need <= free:
        return
    largest = max(plan, key=plan.get)
    if need - plan.get("sums of micro-batches", 0) <= free:
        largest = "sums of micro-batches"
    lower = LOWER.get(largest, "n_layer or n_embd")
    raise SystemExit(
        f"error: this run needs {need / GIB:.2f} GiB or more, and {device} has "
        f"{free / GIB:.2f} free; of which {largest} {plan[largest] / GIB:.2f}: "
        f"lower {lower} (--dry_run=True lists all)"
    )
