"""
How a CUDA tensor comes from a function of quant.py to its Triton kernel, and back if that fails.

    @with_kernel(quantized.dequantize_int8)         quantized.dequantize_int8 launches a kernel
    def dequantize_int8(q, scale, zero, dtype):     the function itself is plain torch

Without Triton, or where it fails, the functions of plain torch step in, with one warning.

    @fused                                          torch.compile makes one kernel of it
    def silu_mul(gate, up):                         a pure function of tensors, plain torch

What a GPU would launch is counted without one: while a Counter (kernels/count.py) is set, both
kinds run in plain torch, on fake tensors, and count as one launch.
"""

import functools
import warnings
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

# A tile is as wide as a group: wider ones would leave too few rows to share the loads of `right`.
MAX_GROUP = 512

_works = True  # until a launch has failed
_compiles = None  # where @fused functions are compiled: None nowhere, "cuda", or "cpu": there, too
_counter = None  # a Counter, while launches are counted


def with_kernel(launch, launches=1, unit=None, share=1):
    """Decorate a function of plain torch: if its first tensor is on a GPU, launch(...) replaces it.

    launch returns NotImplemented for tensors that its kernel does not take. If a launch fails, this
    call and all later ones of every function stay in plain torch. `.plain` is the function itself.

    For the counter: how many kernels a call launches, and the unit of the GPU that multiplies in
    them ("int8"), where that is not the one of the plain function's dtypes; the share of the plain
    function's operations that the kernel makes.
    """

    def decorate(plain):
        @functools.wraps(plain)
        def function(tensor, *args, **kwargs):
            if _counter is not None:
                return _counter.kernel(plain, launches, unit, share, tensor, *args, **kwargs)
            if tensor.is_cuda and _works:
                result = _try(launch, tensor, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return plain(tensor, *args, **kwargs)

        function.plain = plain
        return function

    return decorate


def fused(plain):
    """Decorate a pure function of tensors that torch.compile makes one kernel of.

    It stays plain until compile_fused() has been called. It is for what autograd does not look
    into: forward and backward of a torch.autograd.Function. `.plain` is the function itself.
    """
    compiled = None

    @functools.wraps(plain)
    def function(tensor, *args, **kwargs):
        nonlocal compiled
        if _counter is not None and _counter.compiles:
            return _counter.kernel(plain, 1, None, 1, tensor, *args, **kwargs)
        if _counter is not None or not (_compiles == "cpu" or _compiles and tensor.is_cuda):
            return plain(tensor, *args, **kwargs)
        if compiled is None:
            # for all sizes at once: batches of other sizes would each compile it again
            compiled = torch.compile(plain, dynamic=True)
        # so would training and evaluation, which differ in what autograd knows of the arguments
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in (tensor, *args)]
        with torch.no_grad():
            return compiled(*args, **kwargs)

    function.plain = plain
    return function


def compile_fused(device):
    """Compile @fused functions from here on, or warn once that this machine cannot."""
    global _compiles
    kind = torch.device(device).type
    try:
        torch.compile(lambda x: x.sin() * x)(torch.ones(8, device=device))
    except Exception as e:  # no C++ compiler, no Triton
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        warnings.warn(f"torch.compile fails, the model runs without it. {reason}")
        return
    _compiles = kind


@contextmanager
def counted_by(counter):
    """While this lasts, `counter` counts what a GPU would launch."""
    global _counter
    before = _counter
    _counter = counter
    try:
        yield counter
    finally:
        _counter = before


def on_gpu(tensor):
    """Whether what is done with a tensor is done as on a GPU: it is there, or it is counted."""
    return tensor.is_cuda or _counter is not None


def chunks(tensor, length, size):
    """Where chunks of `size` start. Of a fake tensor two, which stand for all: run/memory.py counts
    bytes, kernels/count.py launches."""
    starts = range(0, length, size)
    return alike(starts) if isinstance(tensor, FakeTensor) else starts


def alike(starts):
    """Where those chunks start that a fake tensor is looked at in, which stand for all.

    The first two take the memory of all. Where launches are counted, the first counts for all but
    the last, which may be shorter.
    """
    if _counter is None or len(starts) < 2:
        yield from starts[:2]
        return
    with _counter.times(len(starts) - 1):
        yield starts[0]
    yield starts[-1]


def _try(launch, tensor, *args, **kwargs):
    """launch(tensor, ...), or NotImplemented and a warning if it raises."""
    global _works
    try:
        if triton is None:
            raise ImportError("it is not installed")
        if torch.cuda.device_count() == 1:
            return launch(tensor, *args, **kwargs)
        # Triton launches on the current device, not on its arguments'
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # from compiling or launching: nothing has been written yet
        _works = False
        error = f"{type(e).__name__}: {e}"
        warnings.warn(f"Triton fails, quant.py's slower functions step in. {error}")
        return NotImplemented


def cdiv(a, b):
    """a / b, rounded up; triton.cdiv takes microseconds to say so."""
    return -(-a // b)


def power_of_2(n):
    """The first one that is not below n."""
    return 1 << (n - 1).bit_length()


def group_width(cols, n_groups):
    """The columns of each of n_groups, the last of which may be short.

    A power of two, of which one at most cuts cols so; but for a row that is one group.
    """
    if n_groups == 1:
        return cols
    return power_of_2(cdiv(cols, n_groups))
