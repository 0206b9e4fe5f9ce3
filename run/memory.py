"""
What a run takes, counted before anything is allocated, and what the device has.

The plan is not a formula: it is the run's own model and optimizer, stepping on torch's fake tensors, which have shapes
and no data. Every allocation passes by and is counted, temporaries included: the plan cannot fall behind the code. Of a
deep model, two of a few blocks are planned: blocks are alike, and each more adds the same.
Not counted: the libraries' own workspaces, the CUDA context (0.3 to 0.5 GiB) and what lies in fragments.
"""

import math
import weakref
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant import bitsandbytes
from run.device import GIB

FEW, MORE = 2, 4  # blocks of the two models that are planned for a deep one


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live: `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.bytes:
                self.bytes[key] = t.untyped_storage().nbytes()
                self.now += self.bytes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self._free, key)
        return out

    def pop_peak(self):
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def _free(self, key):
        self.now -= self.bytes.pop(key)


def memory_plan(settings, build, weight_dtype, dtype):
    """{part: bytes} of a run, at the peak of its worst step.

    settings: train.py's, with what the method makes of them.
    build: train.py's. dtype: of the computation, under autocast if it is not weight_dtype.
    """
    n = settings["n_layer"]
    if n <= 2 * MORE or settings.get("low_rank") or n > settings["proj_gap"]:  # few, not alike, or all refresh often
        plan, peaks = _plan(settings, n, build, weight_dtype, dtype)
    else:
        (few, low), (more, high) = (_plan(settings, blocks, build, weight_dtype, dtype) for blocks in (FEW, MORE))
        line = lambda a, b: a + (b - a) * (n - FEW) // (MORE - FEW)
        plan, peaks = {part: line(few[part], more[part]) for part in few}, map(line, low, high)
    return plan | {"gradients, activations": max(peaks) - sum(plan.values())}


def _plan(settings, blocks, build, weight_dtype, dtype):
    """Of the first `blocks` blocks alone: ({part: bytes} that stays, [the peak of each forward, backward, ...])."""
    live, plan, peaks = Live(), {}, []
    autocast = torch.autocast("cpu", dtype) if dtype != weight_dtype else nullcontext()
    micro_batches = min(2, settings["gradient_accumulation_steps"])
    if settings["moments"] == "8bit" or settings["weight_bits"] == 4:
        bitsandbytes()  # its tables need numbers, which fake tensors do not have
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model, optimizer = build(settings | {"n_layer": blocks}, "cpu", weight_dtype)
        plan["weights"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

        def micro_batch(last):
            idx = torch.zeros(settings["batch_size"], settings["block_size"], dtype=torch.int64)
            optimizer.accumulating = not last
            with autocast:
                loss = model(idx, idx)
            peaks.append(live.pop_peak())
            loss.backward()
            peaks.append(live.pop_peak())

        if isinstance(optimizer, torch.optim.Optimizer):
            for _ in range(2):  # torch makes the moments at the first step
                for _ in range(micro_batches):
                    micro_batch(True)
                optimizer.step()
                optimizer.zero_grad()
            plan["moments"] = sum(t.nbytes for of in optimizer.state.values() for t in of.values())
        else:
            plan["moments"] = live.now - plan["weights"]
            if micro_batches > 1:  # the first step: every layer sums up a sketch
                micro_batch(False)
                optimizer.sums.clear()
            first = live.now - sum(plan.values())
            layers = len(optimizer.projections) * settings["n_layer"] // blocks
            due = -(-layers // settings["proj_gap"])  # layers that refresh in one step, later
            for name, rule in optimizer.rules.items():
                optimizer.projections[name].basis = rule.no_basis()
            for i, projection in enumerate(sorted(reversed(optimizer.projections.values()), key=lambda p: -p.other)):
                if projection.next_refresh < math.inf:
                    projection.next_refresh = 0 if i < due else 1
            plan["projections"] = live.now - first - sum(plan.values())
            if micro_batches > 1:
                micro_batch(False)
                plan["sums of micro-batches"] = live.now - sum(plan.values())
            micro_batch(True)
            optimizer.step()
    return plan, [*peaks, live.peak]


def print_plan(plan, free, device):
    for part, count in (plan | {"total": sum(plan.values())}).items():
        print(f"{part:24s} {count / GIB:8.3f} GiB {count:16,d} bytes")
    if free is None:
        print(f"{device}: there is no such device here to compare with, or it does not tell what it has")
    else:
        print(f"{device} has {free / GIB:.2f} GiB free: {'enough' if sum(plan.values()) <= free else 'NOT enough'}")


def refuse_what_does_not_fit(plan, free, device):
    """Leave with one line, if free is known: the bytes needed, and the settings to lower."""
    need, largest = sum(plan.values()), max(plan, key=plan.get)
    if free is not None and need - plan.get("sums of micro-batches", 0) <= free:
        largest = "sums of micro-batches"
    lower = {"gradients, activations": "batch_size or block_size, or set checkpoint_activations=True",
             "moments": "rank", "projections": "rank",
             "sums of micro-batches": "gradient_accumulation_steps to 1, or with muon and fira raise residual_blocks"}
    lower = lower.get(largest, "n_layer or n_embd")
    if free is not None and need > free:
        raise SystemExit(f"error: this run needs about {need / GIB:.2f} GiB and {device} has {free / GIB:.2f} free; "
                         f"of which {largest} {plan[largest] / GIB:.2f}: lower {lower} "
                         f"(--dry_run=True lists all)")
