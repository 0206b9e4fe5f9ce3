"""
What a step takes on a GPU, predicted without one.

The run's own model and optimizer take a step on fake tensors, and kernels/count.py counts what a
GPU would launch. Blocks are alike: models of FEW and MORE blocks give the rest. A kernel then
takes as long as the slowest of three: its operations, its bytes, a kernel's least.

    seconds = max(operations / rate, bytes / bandwidth, FLOOR)

and a phase as long as its kernels, or as the host that launches them. docs/roofline.md has what the
constants were fitted to, and how far predictions are from it.
"""

import math
from collections import Counter as Multiset
from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.count import Counter
from methods.registry import find
from qgalore import QGaLore
from quant import bitsandbytes
from run.by_block import kept_bytes
from run.cards import card_here, card_named
from run.device import GIB, weights_in

FEW, MORE = 1, 2  # blocks of the two models that are counted for a deep one
PHASES = ("forward", "backward", "projection", "update", "refresh")

SHOWN = ("RTX 3060", "RTX 4060 Ti", "RTX 4090", "H100")  # of the cards, where no GPU is at hand

# Fitted to steps on an H100 and its host (docs/roofline.md)
EFFICIENCY = {"bf16": 0.68, "int8": 0.45, "float32": 0.7}  # of a unit's rate
BANDWIDTH = 0.65  # of the memory's
BUS = 0.8  # of the bus's; not measured
FLOOR = 2.5e-6  # seconds: a kernel's least on the device
HOST = 30e-6  # seconds in which the host launches one by torch
HOST_TRITON = 140e-6  # by Triton


class Step:
    """The kernels of a step of settled settings s, all bases present.

    micro_batch: {Kernel: launches} of one whose gradients are summed up; empty if a step has one.
    last: of the one that moves the weights. Of both the phase "refresh" is of all weights at once.
    copied: bytes that go to host memory in forward, and come back in backward.
    """

    def __init__(self, s, micro_batch, last, copied=0):
        self.copied = copied
        self.accumulation = s.gradient_accumulation_steps
        self.gap = s.proj_gap
        self.steps = s.max_iters
        self.tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size  # of a step
        self.micro_batch = micro_batch
        self.last = last

    def seconds(self, card):
        """{phase: predicted seconds of a step}, with its share of the refreshes."""
        micro_batch = phase_seconds(self.micro_batch, card)
        last = phase_seconds(self.last, card)
        total = {}
        for phase in PHASES:
            total[phase] = (self.accumulation - 1) * micro_batch[phase] + last[phase]
        total["refresh"] /= self.gap
        for phase in ("forward", "backward"):  # copies wait for kernels, and kernels for copies
            total[phase] += self.copied / (card.bus * BUS)
        return total

    def tokens_per_second(self, card):
        return self.tokens / sum(self.seconds(card).values())

    def days(self, card):
        """Of the whole recipe."""
        return self.steps * sum(self.seconds(card).values()) / 86400


def step_on(card, s):
    """The Step of settings s on a Card, in the floats that the card has."""
    dtype = torch.bfloat16 if card.has_bf16 else torch.float16
    if s.dtype in ("float16", "float32") and "dtype" in s.given:
        dtype = getattr(torch, s.dtype)
    weight_dtype = weights_in(s, dtype)
    copied = kept_bytes(s, dtype) if s.by_block else 0
    if s.low_rank or s.n_layer <= FEW:  # blocks that are not alike, or few
        return Step(s, *count(s, s.n_layer, weight_dtype, dtype), copied)
    few = count(s, FEW, weight_dtype, dtype)
    more = count(s, MORE, weight_dtype, dtype, refresh=False)
    return Step(s, *[of_blocks(a, b, s.n_layer) for a, b in zip(few, more)], copied)


def launches(kernels, *phases):
    """How many of {Kernel: launches} are in these phases; without any: in all but refreshes."""
    phases = phases or PHASES[:-1]
    return sum(n for kernel, n in kernels.items() if kernel.phase in phases)


def print_time(s, need):
    """What a dry run says of time: on this machine's card, or on those of SHOWN that have room.

    need: bytes of the run's memory plan."""
    here = card_here()
    cards = [here] if here else [card_named(name) for name in SHOWN]
    cards = [card for card in cards if need + GIB <= card.memory * GIB]
    if not cards:
        return
    step = step_on(cards[0], s)
    words = []
    for card in cards:
        speed = step.tokens_per_second(card)
        words.append(f"{card.name}: about {speed:,.0f} tokens/s, {duration(step.days(card))}")
    print(f"predicted for {s.max_iters:,} steps on a GPU, {'; '.join(words)}")


def duration(days):
    """A time in the unit that suits it."""
    if days >= 2:
        return f"{days:,.0f} days"
    if days >= 2 / 24:
        return f"{24 * days:.0f} hours"
    return f"{24 * 60 * days:.0f} minutes"


def phase_seconds(launches, card):
    """{phase: predicted seconds}: of its kernels, or of the host that launches them."""
    device = dict.fromkeys(PHASES, 0.0)
    host = dict.fromkeys(PHASES, 0.0)
    for kernel, n in launches.items():
        device[kernel.phase] += n * kernel_seconds(kernel, card)
        host[kernel.phase] += n * (HOST_TRITON if kernel.triton else HOST)
    return {phase: max(device[phase], host[phase]) for phase in PHASES}


def kernel_seconds(kernel, card):
    """Predicted seconds of one kernel on the device."""
    multiply = sum(n / (getattr(card, unit) * EFFICIENCY[unit]) for unit, n in kernel.operations)
    return max(multiply, kernel.bytes / (card.bandwidth * BANDWIDTH), FLOOR)


def of_blocks(few, more, n):
    """What n blocks launch, if FEW and MORE launch so much. Only FEW have refreshes."""
    total = Multiset(few)
    for kernel in more | few:
        each = (more[kernel] - few[kernel]) / (MORE - FEW)
        if kernel.phase == "refresh":
            each = few[kernel] / FEW
        total[kernel] += round(each * (n - FEW))
    return total


def count(s, blocks, weight_dtype, dtype, refresh=True):
    """(of a micro-batch that is not the last, of the last): {Kernel: launches} of `blocks` blocks.

    s: settled settings. The first is empty where a step has one micro-batch. refresh: whether all
    weights are due."""
    autocast = torch.autocast("cpu", dtype) if dtype != weight_dtype else nullcontext()
    if s.moments == "8bit" or s.weight_bits == 4:
        bitsandbytes()  # its tables need numbers, which fake tensors do not have
    counted = [Multiset(), Multiset()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer = find(s.method).build(s.changed(n_layer=blocks), "cpu", weight_dtype)
        for last in (False, True):
            if not last and s.gradient_accumulation_steps == 1:
                continue
            counter = Counter(compiles=s.compile)
            start(optimizer, counter, refresh)
            for _ in range(1 if last else 2):  # the first makes the sums, others add to them
                counter.launches = Multiset()
                with counter:
                    step(s, model, optimizer, autocast, counter, last)
            counted[last] = counter.launches
    return counted


def step(s, model, optimizer, autocast, counter, last=True):
    """A micro-batch of a step, its phases marked. optimizer None: backward steps all weights."""
    idx = torch.empty(s.batch_size, s.block_size, dtype=torch.int64)  # (B, T)
    counter.phase = "forward"
    with autocast:
        loss = model(idx, idx)
    counter.phase = "backward"
    if optimizer is not None:
        optimizer.accumulating = not last
    loss.backward()
    counter.phase = "update"
    if last and optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def start(optimizer, counter, refresh):
    """Give every weight a basis, which is due or not, and let `counter` know the phases inside
    backward."""
    if not isinstance(optimizer, QGaLore):
        return
    for weight in optimizer.weights:
        projection = weight.projection
        projection.basis = weight.empty_basis()
        if projection.next_refresh < math.inf:
            projection.next_refresh = 0 if refresh else math.inf
        mark(counter, projection, "project", "projection")
        mark(counter, projection, "sketch", "refresh")
        mark(counter, projection, "refresh", "refresh")
        mark(counter, weight, "gather", {"sketch": "refresh"})
    for trained in optimizer.trained.values():
        mark(counter, trained, "move", "update")


def mark(counter, owner, method, phase):
    """Let owner.method count as a phase of its own, or as that of its first argument."""
    plain = getattr(type(owner), method).__get__(owner)

    def marked(*args):
        before = counter.phase
        counter.phase = phase if isinstance(phase, str) else phase.get(args[0], "projection")
        try:
            return plain(*args)
        finally:
            counter.phase = before

    setattr(owner, method, marked)
