"""
What a run takes, counted before anything is allocated.

The plan is not a formula: it is the run's own model and optimizer, stepping on torch's fake
tensors, which have shapes and no data. Every allocation passes by and is counted, temporaries
included: the plan cannot fall behind the code. Of a deep model, two of a few blocks are planned:
blocks are alike, and each more adds the same.

Not counted: the libraries' own workspaces, the CUDA context (0.3 to 0.9 GiB by card) and what lies
in fragments.
"""

import math
import weakref
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from methods.registry import find
from quant import bitsandbytes
from run.device import GIB, memory_free
from run.ranks import IN_FLIGHT

FEW, MORE = 2, 4  # blocks of the two models that are planned for a deep one


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live: `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.bytes = {}  # by storage
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):  # an output may be a view of what is counted
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.bytes:
                self.bytes[key] = storage.nbytes()
                self.now += self.bytes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key)
        return out

    def pop_peak(self):
        """The peak since the last call."""
        peak = self.peak
        self.peak = self.now
        return peak

    def _free(self, key):
        self.now -= self.bytes.pop(key)


def memory_plan(s, weight_dtype, dtype):
    """{part: bytes} of a run, at the peak of its worst step.

    s: settled settings. dtype: of the computation, under autocast if it is not weight_dtype."""
    n = s.n_layer  # blocks
    alike = not s.low_rank and n <= s.proj_gap  # else blocks differ, or all refresh often
    if n <= 2 * MORE or not alike:
        plan, peaks = _plan(s, n, weight_dtype, dtype)
    else:
        few, peaks_few = _plan(s, FEW, weight_dtype, dtype)
        more, peaks_more = _plan(s, MORE, weight_dtype, dtype)
        plan = {part: _extrapolate(few[part], more[part], n) for part in few}
        peaks = [_extrapolate(a, b, n) for a, b in zip(peaks_few, peaks_more)]
    return plan | {"gradients, activations": max(peaks) - sum(plan.values())}


def _extrapolate(few, more, n):
    """What n blocks take, if FEW and MORE take so much."""
    return few + (more - few) * (n - FEW) // (MORE - FEW)


def _plan(s, blocks, weight_dtype, dtype):
    """Of the first `blocks` blocks: ({part: bytes} that stays, [each phase's peak])."""
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
            _plan_in_backward(s, blocks, optimizer, micro_batches, micro_batch, live, plan)
        else:
            for _ in range(2):  # torch makes the moments at the first step
                for _ in range(micro_batches):
                    micro_batch(True)
                optimizer.step()
                optimizer.zero_grad()
            state = [t for of in optimizer.state.values() for t in of.values()]
            plan["moments"] = sum(t.nbytes for t in state)
    return plan, [*peaks, live.peak]


def _plan_in_backward(s, blocks, optimizer, micro_batches, micro_batch, live, plan):
    """The parts of a method whose weights step in backward: its first step, then a later one."""
    plan["moments"] = live.now - plan["weights"]
    if micro_batches > 1 and not s.proj_svd:  # the first step: every layer sums up a sketch
        micro_batch(False)
        optimizer.zero_grad()
    before = live.now - sum(plan.values())
    # from here on all layers have a basis, and some refresh it
    layers = len(optimizer.weights) * s.n_layer // blocks
    due = -(-layers // s.proj_gap)  # that refresh in one step
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


def fits(s, ranks, weight_dtype, dtype):
    """Plan a run before anything is allocated. Exits with one line if the device is too small.

    With s.dry_run the plan is printed instead. ranks: run/ranks.py's."""
    held = s.gradient_accumulation_steps  # micro-batches whose gradients a rank sums up
    if not s.grad_clip:
        held //= ranks.size
    try:
        plan = memory_plan(s.changed(gradient_accumulation_steps=held), weight_dtype, dtype)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    if ranks.size > 1:
        plan["sums in flight"] = 2 * IN_FLIGHT  # as they are sent, and in float32
    here = s.device == "cpu" or torch.cuda.is_available()
    free = memory_free(s.device) if here else None
    if s.dry_run:
        print_plan(plan, free, s.device)
    else:
        refuse_what_does_not_fit(plan, free, s.device)


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
    "moments": "rank",
    "projections": "rank",
    "sums of micro-batches": "gradient_accumulation_steps to 1, or with muon and fira raise "
    "residual_blocks",
}


def refuse_what_does_not_fit(plan, free, device):
    """Leave with one line, if free is known: the bytes needed, and the settings to lower."""
    need = sum(plan.values())  # bytes
    if free is None or need <= free:
        return
    largest = max(plan, key=plan.get)
    if need - plan.get("sums of micro-batches", 0) <= free:
        largest = "sums of micro-batches"
    lower = LOWER.get(largest, "n_layer or n_embd")
    raise SystemExit(
        f"error: this run needs about {need / GIB:.2f} GiB and {device} has {free / GIB:.2f} free; "
        f"of which {largest} {plan[largest] / GIB:.2f}: lower {lower} (--dry_run=True lists all)"
    )
