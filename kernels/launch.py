"""
How a CUDA tensor comes from a function of quant.py to its Triton kernel, and back if that fails.

    @with_kernel(quantized.dequantize_int8)         quantized.dequantize_int8 launches a kernel
    def dequantize_int8(q, scale, zero, dtype):     the function itself is plain torch

Without Triton, or where it fails, the functions of plain torch step in, with one warning.
"""

import functools
import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

# A tile is as wide as a group: wider ones would leave too few rows to share the loads of `right`.
MAX_GROUP = 512

_works = True  # until a launch has failed


def with_kernel(launch):
    """Decorate a function of plain torch: if its first tensor is on a GPU, launch(...) replaces it.

    launch returns NotImplemented for tensors that its kernel does not take. If a launch fails, this
    call and all later ones of every function stay in plain torch. `.plain` is the function itself.
    """

    def decorate(plain):
        @functools.wraps(plain)
        def function(tensor, *args, **kwargs):
            if tensor.is_cuda and _works:
                result = _try(launch, tensor, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return plain(tensor, *args, **kwargs)

        function.plain = plain
        return function

    return decorate


def _try(launch, tensor, *args, **kwargs):
    """launch(tensor, ...), or NotImplemented and a warning if it raises."""
    global _works
    try:
        if triton is None:
            raise ImportError("it is not installed")
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


def group_width(cols, n_groups):
    """The columns of a group, rounded up to a power of two: only a row's one group may be none."""
    return triton.next_power_of_2(triton.cdiv(cols, n_groups))


def tile_width(q, scale, *tensors):
    """The columns of a tile of q, which are a group's; 0 where the kernels do not take q.

    They take groups of 16 to MAX_GROUP columns, as fewer are less than a warp's work, and tensors
    without gaps between their elements.
    """
    group = group_width(q.shape[1], scale.shape[1])
    if group < 16 or group > MAX_GROUP:
        return 0
    if not all(t.is_contiguous() for t in (q, scale, *tensors)):
        return 0
    return group
