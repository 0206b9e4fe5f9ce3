"""
Which tensors live, event by event: what a step allocates and frees, seen on torch's fake tensors.

Of a deep model a few blocks are traced. Blocks are alike, so that the trace of more of them is this
one with what a block in the middle does repeated.
"""

import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels.launch import counted_by

HEAP = 32 * 2**20  # bytes: the C library gives freed blocks of this size back to the system
MIDDLE = 1  # the block that stands for those that were not traced
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Event(NamedTuple):
    """A tensor is allocated, or with size None freed; or with key None a stage is reached."""

    block: int | None  # in which it happens; None: outside of all
    key: object
    size: int | str | None  # bytes, or the stage's name


class Empty:
    """What is kept of a tensor that a kernel gave."""

    def __init__(self, shape, dtype):
        self.shape = shape
        self.dtype = dtype


def _shape(x):
    """Of a kernel's argument, what its results' shapes may depend on: of a key for random numbers
    nothing."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.dtype
    return min(x, 2**31) if isinstance(x, int) else x


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live: `now`, and at the `peak`.

    in_heap, heap_peak: of those smaller than HEAP alone. events: all of this, as it happened.

    on_gpu: count what a GPU would allocate. Of a function that is one kernel there (@with_kernel,
    and with `compiles` @fused) only the results are counted: its plain form's temporaries are
    registers. Attention's backward sums up dq in float32."""

    def __init__(self, on_gpu=False, compiles=False):
        super().__init__()
        self.keys = {}  # by storage
        self.sizes = {}  # by key
        self.now = self.in_heap = 0
        self.peak = self.heap_peak = 0
        self.events = []
        self.block = None
        self.on_gpu = on_gpu
        self.compiles = compiles
        self.inside = False  # of a kernel
        self.known = {}  # {a kernel and its arguments' shapes: its results}
        self.named = 0  # keys so far

    def __enter__(self):
        self.counted = counted_by(self) if self.on_gpu else nullcontext()
        self.counted.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.counted.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls, and no allocation
        out = function(*args, **(kwargs or {}))
        if self.inside:
            return out
        scratch = None
        if self.on_gpu and function is ATTENTION_BACKWARD:
            scratch = self.count(4 * args[1].numel())  # of q (B, nh, T, hs)
        self.see(out)
        if scratch is not None:
            self.free(scratch)
        return out

    def see(self, tree):
        """Count the tensors in a tree of containers that are new: one may be a view of another."""
        for t in tree_leaves(tree):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata not in self.keys:
                self.keys[storage._cdata] = self.count(storage.nbytes())
                weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, storage):
        self.free(self.keys.pop(storage))

    def count(self, size, key=None):
        """Count a tensor; returns its key, a new one."""
        if key is None:
            self.named += 1
            key = self.named
        self.events.append(Event(self.block, key, size))
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        if size < HEAP:
            self.in_heap += size
            self.heap_peak = max(self.heap_peak, self.in_heap)
        return key

    def free(self, key):
        self.events.append(Event(self.block, key, None))
        size = self.sizes.pop(key)
        self.now -= size
        if size < HEAP:
            self.in_heap -= size

    def reach(self, stage):
        """Note where a stage of the plan ends."""
        self.block = None
        self.events.append(Event(None, None, stage))

    # what kernels/launch.py asks of a counter

    def kernel(self, plain, launches, unit, share, *args, **kwargs):
        """plain(...), of which the results alone are counted. Once they are known it need not run
        again for arguments of the same shapes: in this way a plan takes half as long."""
        if self.inside:  # a part of another kernel
            return plain(*args, **kwargs)
        call = plain, *[_shape(a) for a in args], *[_shape(kwargs[name]) for name in kwargs]
        if call in self.known and not torch.is_grad_enabled():
            return tree_map_only(Empty, lambda e: torch.empty(e.shape, dtype=e.dtype),
                                 self.known[call])
        self.inside = True
        try:
            result = plain(*args, **kwargs)
        finally:
            self.inside = False
        self.see(result)
        leaves = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        own = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if not any(t.untyped_storage()._cdata in own or not t.is_contiguous() for t in leaves):
            self.known[call] = tree_map_only(torch.Tensor, lambda t: Empty(t.shape, t.dtype), result)
        return result

    @contextmanager
    def times(self, n):
        yield

    # which block it is that allocates

    def watch(self, blocks):
        """Set `block` as each of them begins, forward, again for a checkpoint, and backward."""
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._enter(i))
            last = i == len(blocks) - 1
            block.register_forward_hook(lambda b, x, y, i=i, last=last: self._leave(i, last, y))

    def _enter(self, i):
        self.block = i

    def _leave(self, i, last, y):
        if last:
            self.block = None
        if y.requires_grad:
            y.register_hook(lambda gradient: self._enter(i))


def kept(events):
    """{stage: Counter of sizes}: what was allocated outside of blocks, and lives at its end."""
    found = {}
    alive = {}
    for event in events:
        if event.key is None:
            found[event.size] = Counter(alive.values())
        elif event.size is None:
            alive.pop(event.key, None)
        elif event.block is None:
            alive[event.key] = event.size
    return found


class Repeated:
    """The trace with what happens in block MIDDLE `copies` times in its place, in `events`.

    more: {stage: Counter of sizes} that are allocated there, too: what other blocks keep that was
    allocated outside of them."""

    def __init__(self, events, copies, more):
        self.copies = copies
        self.more = more
        allocated = [e for e in events if e.key is not None and e.size is not None]
        self.home = {e.key: e.block for e in allocated}  # the block that allocated a tensor
        self.size = {e.key: e.size for e in allocated}
        self.spare = {}  # {size: keys} of `more` that nothing has freed
        self.events = []
        for outside, of in groupby(events, key=lambda e: e.block is None):
            if outside:
                self._outside(of)
            else:
                self._through_blocks(list(of))

    def _outside(self, events):
        for event in events:
            if event.key is None:
                for i, size in enumerate(self.more.get(event.size, Counter()).elements()):
                    key = event.size, i
                    self.spare.setdefault(size, []).append(key)
                    self.events.append(Event(None, key, size))
            if event.size is None and self.home[event.key] == MIDDLE:
                for c in range(self.copies):
                    self.events.append(Event(None, (event.key, c), None))
            else:
                self.events.append(event)

    def _through_blocks(self, events):
        """One pass through the blocks, up or down."""
        runs = [(block, list(of)) for block, of in groupby(events, key=lambda e: e.block)]
        up = runs[-1][0] > runs[0][0]

        def freed(by, home):
            return [e.key for block, run in runs if block == by for e in run
                    if e.size is None and self.home[e.key] == home]

        # of the blocks below and above MIDDLE: {a tensor that MIDDLE frees: MIDDLE's in its place},
        # which the block on the other side frees
        below = dict(zip(freed(MIDDLE, MIDDLE - 1), freed(MIDDLE + 1, MIDDLE)))
        above = dict(zip(freed(MIDDLE, MIDDLE + 1), freed(MIDDLE - 1, MIDDLE)))
        for block, run in runs:
            if block == MIDDLE:
                order = range(self.copies) if up else reversed(range(self.copies))
                for c in order:
                    self._copy(run, c, below, above)
                continue
            nearest = 0 if block < MIDDLE else self.copies - 1
            for event in run:
                if self.home[event.key] == MIDDLE:
                    event = event._replace(key=(event.key, nearest))
                self.events.append(event)

    def _copy(self, run, c, below, above):
        """What MIDDLE does, for copy number c of it."""
        for event in run:
            key = event.key
            if self.home[key] == MIDDLE:
                key = key, c
            elif key in below and c > 0:
                key = below[key], c - 1
            elif key in above and c < self.copies - 1:
                key = above[key], c + 1
            elif self.home[key] is None and c > 0:  # of what was there: a copy frees its own
                spare = self.spare.get(self.size[key])
                if not spare:
                    continue
                key = spare.pop()
            self.events.append(event._replace(key=key))
