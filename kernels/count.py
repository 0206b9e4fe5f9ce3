"""
What a GPU would do in a step, counted on fake tensors, without a GPU: each kernel's launches, its
operations by the unit that makes them, and the bytes that it reads and writes.

    with FakeTensorMode(), Counter() as counter:
        model(x, y).backward()
    sum(counter.launches.values())

Every operation of torch that is neither a view nor a bare allocation is one kernel that reads its
arguments and writes its results. A function under kernels/launch.py's @with_kernel is one, whatever
its plain form takes: its tensor arguments, what it mutates again, and its results. So is one
under @fused, with compile on.
"""

from collections import Counter as Multiset
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.launch import counted_by

UNITS = ("bf16", "int8", "float32")  # that multiply matrices; the first two are tensor cores

# no kernel: allocations, views without an alias in their schema, what the host asks for
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
    "_reshape_alias", "lift_fresh", "device", "_local_scalar_dense", "item", "set_", "resize_",
    "_nested_tensor_size", "is_same_size", "_record_function_enter_new", "_record_function_exit",
}
# they write all of their first argument, and do not read it
WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
# they read no more of their first argument than they give back
PICKS = {"embedding", "gather", "index", "index_select"}
# with one result, of more elements than WIDE, they take two launches
REDUCTIONS = {"sum", "mean", "amax", "linalg_vector_norm", "norm", "dot"}
WIDE = 2**16
SDPA = "_scaled_dot_product"  # what names of attention begin with


@dataclass(frozen=True)
class Kernel:
    """One kind of launch."""

    name: str
    phase: str
    bytes: int  # read and written
    operations: tuple = ()  # ((unit, number), ...)
    triton: bool = False  # launched by Triton and our Python around it, not by torch


class Counter(TorchDispatchMode):
    """launches: {Kernel: how many}. phase: of what follows, for the caller to set.

    compiles: whether @fused functions are compiled."""

    def __init__(self, compiles=False):
        super().__init__()
        self.launches = Multiset()
        self.phase = ""
        self.compiles = compiles
        self._repeat = 1  # how many alike what follows stands for
        self._inside = None  # in a kernel: {unit: operations} of its products
        self._unit = None  # in a kernel: of its products

    def __enter__(self):
        self._counted = counted_by(self)
        self._counted.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._counted.__exit__(*error)

    @contextmanager
    def times(self, n):
        """What is counted in this block stands for n."""
        before = self._repeat
        self._repeat = before * n
        try:
            yield
        finally:
            self._repeat = before

    def kernel(self, plain, launches, unit, share, *args, **kwargs):
        """plain(*args, **kwargs), counted as `launches` launches of one kernel.

        unit: of its products; None: by their dtypes. share: of plain's operations."""
        if self._inside is not None:  # a part of another kernel
            return plain(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        versions = [t._version for t in tensors]
        repeat = self._repeat
        self._inside = Multiset()
        self._unit = unit
        try:
            result = plain(*args, **kwargs)
            operations = self._inside
        finally:
            self._inside = self._unit = None
        written = [t for t, version in zip(tensors, versions) if t._version > version]
        mine = {t.untyped_storage()._cdata for t in tensors}
        for t in _tensors(result):  # an argument may be given back
            if t.untyped_storage()._cdata not in mine:
                written.append(t)
        moved = sum(map(_bytes, tensors)) + sum(map(_bytes, written))
        times = repeat * launches
        each = tuple((unit, int(share * n) // times) for unit, n in operations.items())
        self._add(plain.__name__, moved // launches, each, launches, triton=True)
        return result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name.partition("::")[2]
        if name in FREE or _is_view(function):
            return out
        unit, operations = _operations(name, args, out)
        if self._inside is not None:
            if operations:
                self._inside[self._unit or unit] += operations * self._repeat
            return out
        launches, moved = _launches(name, args, kwargs, out)
        if out is None:  # it writes its arguments alone
            moved += sum(map(_bytes, _written(function, args)))
        each = ((unit, operations // launches),) if operations else ()
        self._add(name, moved // launches, each, launches)
        return out

    def _add(self, name, moved, operations, launches, triton=False):
        kernel = Kernel(name, self.phase, moved, operations, triton)
        self.launches[kernel] += launches * self._repeat


def unit_of(dtype):
    """Which of UNITS multiplies matrices of dtype; float16 as bfloat16."""
    if dtype in (torch.int8, torch.uint8):
        return "int8"
    return "bf16" if dtype.itemsize == 2 else "float32"


def _operations(name, args, out):
    """(unit, operations) of a product of matrices; elsewhere (None, 0)."""
    if name.startswith(SDPA):
        return _operations_of_attention(name, args)
    if name in ("mm", "bmm", "_int_mm", "mv"):
        a = args[0]
    elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv"):
        a = args[1]
    elif name == "linalg_qr":  # Householder: R, then Q
        *_, rows, cols = args[0].shape
        return "float32", 4 * rows * cols**2
    elif name.startswith("linalg_cholesky") or name == "cholesky":
        return "float32", len(args[0]) ** 3 // 3
    elif name.startswith("linalg_solve_triangular"):
        return "float32", args[0].shape[-1] * args[1].numel()
    else:
        return None, 0
    return unit_of(a.dtype), 2 * out.numel() * a.shape[-1]


def _operations_of_attention(name, args):
    """Two products forward and five backward, of half a matrix each: what is causal."""
    backward = "backward" in name
    q, k = args[1:3] if backward else args[:2]  # (B, nh, T, hs), (B, nk, S, hs)
    products = 5 if backward else 2
    return unit_of(q.dtype), products * q.numel() * k.shape[2]


def _launches(name, args, kwargs, out):
    """(launches, bytes) of an operation."""
    read = _tensors((args, kwargs))
    moved = sum(map(_bytes, _tensors(out)))
    if name in WRITES:
        read = read[1:]
    elif name in PICKS:
        read = read[1:]
        moved *= 2
    elif name == "scatter_add_":
        return 1, 3 * _bytes(args[3])
    launches = 1
    if name in ("addmm", "baddbmm") and args[0].ndim > 1:  # its sum is copied first
        launches = 2
        moved += 2 * _bytes(args[0])
    elif name in REDUCTIONS and args[0].numel() > WIDE and moved <= 8:
        launches = 2  # blocks of one sum meet in memory, which is set to 0
    elif name.startswith(SDPA) and "backward" in name:
        launches = 3
    elif name.startswith("_fused_adamw"):
        launches = 1 + len(args[0]) // 32
    elif name == "embedding_dense_backward":  # it sorts the tokens first
        launches = 8
    return launches, moved + sum(map(_bytes, read))


def _written(function, args):
    """The tensors that an operation's schema says it mutates."""
    mutated = zip(function._schema.arguments, args)
    return _tensors([t for a, t in mutated if a.alias_info is not None and a.alias_info.is_write])


def _is_view(function):
    """Whether an operation gives a view of an argument, and mutates nothing."""
    schema = function._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def _tensors(tree):
    """The tensors in a tree of containers, each once."""
    found = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
    return list(found.values())


def _bytes(t):
    """The bytes of a tensor's elements: those of an expanded one exist once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        if stride:
            elements *= size
    return elements * t.itemsize if t.numel() else 0
