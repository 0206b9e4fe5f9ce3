"""
quant.py's functions of a training step again, in Triton: the same names, arguments and results, for CUDA tensors.

In plain torch every line is a pass over memory: one update of a weight makes 32, which move 186 bytes an element
(counted), nearly half for its random numbers. Here an element is read once and written once, as INT8, 2 bytes:

    program (i, j) owns rows i * BLOCK_M .. of group j, a tile that stays in registers from the first line to the last:
        step         = left[rows] @ right[group]^T       on the tensor cores, accumulated in float32
        w            = shrink * (scale * code + zero) + step
        scale, zero  = from the smallest and largest w of each row of the tile, which is one group
        code         = round((w - zero) / scale), its random number hashed from the element's own index

Codes are the CPU's, bit for bit where the products are. Three things see to it: enable_fp_fusion=False keeps a * b + c
from becoming one FMA with one rounding, div_rn divides as IEEE 754 says, where `/` may miss by 2 ulp, and the random
numbers are integers until their last line. Two differences are left, both on the exact side: a product of bfloat16
factors stays float32, where torch rounds it to bfloat16, and dequantising rounds once, from float32.

Without Triton, or where it fails, quant.py's functions step in, with one warning. Offsets are 32 bits wide: a matrix
has fewer than 2^31 elements.
"""

import functools
import warnings

import torch

import quant

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_GROUP = 512  # a tile is as wide as a group: wider ones would leave too few rows to share the loads of `right`
TILE = 64 * 256  # elements of a program, 32 a thread: its 16 warps may have 128 registers a thread, and do not spill

_works = True  # until a launch has failed


def _kernel_for(reference):
    """Decorate a function that launches a kernel: CUDA tensors go to it, all others to `reference`, quant.py's own.

    If a launch fails, this call and all later ones go to the reference. `.triton` is the launcher itself.
    """

    def decorate(launch):
        @functools.wraps(launch)
        def dispatch(codes, *args, **kwargs):
            global _works
            if codes.is_cuda and _works:
                try:
                    if triton is None:
                        raise ImportError("it is not installed")
                    with torch.cuda.device_of(codes):  # Triton launches on the current device, not on its arguments'
                        return launch(codes, *args, **kwargs)
                except torch.OutOfMemoryError:
                    raise
                except Exception as e:  # from compiling or launching: nothing has been written yet
                    _works = False
                    warnings.warn(f"Triton fails, quant.py's slower functions step in. {type(e).__name__}: {e}")
            return reference(codes, *args, **kwargs)

        dispatch.triton = launch
        return dispatch

    return decorate


@_kernel_for(quant.dequantize_int8)
def dequantize_int8(q, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int8: (rows, cols) in `dtype`, computed in float32. Arguments: see quant.py."""
    return _dequantize(q, scale, zero, *q.shape, 8, dtype)


@_kernel_for(quant.dequantize_int4)
def dequantize_int4(packed, scale, zero, dtype=torch.float32):
    """The inverse of quantize_int4: (rows, cols) in `dtype`, computed in float32. Arguments: see quant.py."""
    rows = scale.shape[0]
    cols = 2 * packed.numel() // rows
    if packed.ndim == 1 and cols % 2 == 0:  # one row of odd width: half of its last byte is filling
        cols -= 1
    return _dequantize(packed, scale, zero, rows, cols, 4, dtype)


def encode(p, bits):
    """The tensors that keep a matrix p, float32, in 4 or 8 bits, or for 16 as it is."""
    return (p.contiguous(),) if bits == 16 else (quant.quantize_int4 if bits == 4 else quant.quantize_int8)(p)


def decode(codes, dtype=torch.float32):
    """The matrix in `dtype` that the tensors `codes` keep: (packed, scale, zero), (q, scale, zero) or (matrix,)."""
    if len(codes) == 1:
        return codes[0].to(dtype)
    return (dequantize_int8 if codes[0].dtype == torch.int8 else dequantize_int4)(*codes, dtype=dtype)


def _dequantize(codes, scale, zero, rows, cols, bits, dtype):
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    group = triton.next_power_of_2(quant._group_size(cols, scale.shape[1]))
    block_n = min(group, 256)
    block_m = 4096 // block_n  # 32 elements a thread: two loads of 16 bytes
    grid = (triton.cdiv(rows, block_m), triton.cdiv(cols, block_n))
    _dequantize_kernel[grid](codes.contiguous(), scale.contiguous(), zero.contiguous(), out, rows, cols, group,
                             bits, block_m, block_n, num_warps=4, enable_fp_fusion=False)
    return out


@_kernel_for(quant.add_low_rank_int8_)
def add_low_rank_int8_(q, scale, zero, left, right, shrink=1.0, key=None):
    """W <- round(shrink * W + left @ right^T) in place, in one pass. Arguments: see quant.py; a step, which is given
    without `right`, may lie in either order.

    Fastest at ranks that 16 divides. quant.py does groups of fewer than 16 columns, less than a warp's work, or more
    than MAX_GROUP, and tensors with gaps between their elements.
    """
    group = _tile_width(q, scale, zero)
    if not group:
        return quant.add_low_rank_int8_(q, scale, zero, left, right, shrink, key)
    block_m = min(64, TILE // group)
    block_k = 64 // left.element_size()  # 64 bytes: in 3 stages at most 68 KiB of shared memory; consumer cards have 99
    grid = (triton.cdiv(q.shape[0], block_m), scale.shape[1])
    rank, right = (0, left) if right is None else (left.shape[1], right.contiguous())
    left = left.contiguous() if rank else left
    _add_low_rank_kernel[grid](q, scale, zero, left, right, *q.shape, *left.stride(), shrink, key or 0,
                               key is not None, rank, group, block_m, block_k,
                               num_warps=block_m * group // 1024, num_stages=3, enable_fp_fusion=False)


@_kernel_for(quant.adam_int8_)
def adam_int8_(m, scale, zero, g, row, col, beta, correction, eps, key):
    """A step of Adam with an INT8 first and a factored second moment, in one pass. Arguments: see quant.py."""
    group = _tile_width(m, scale, zero, g)
    if not group:
        return quant.adam_int8_(m, scale, zero, g, row, col, beta, correction, eps, key)
    block_m = 4096 // group
    grid = (triton.cdiv(m.shape[0], block_m), scale.shape[1])
    _adam_kernel[grid](m, scale, zero, g, row, col, *m.shape, 1 - beta, correction, eps, key, group, block_m,
                       num_warps=4, enable_fp_fusion=False)


@_kernel_for(quant.matmul_int8)
def matmul_int8(x, q, scale, zero):
    """x @ W^T with INT8 products, (T, rows) in x.dtype. Arguments: see quant.py; it does groups under 32 or over 512.

    Rounding takes some ten instructions an element of x, again in every program. BLOCK_N shares them among 128 rows of
    W, which by count keep the tensor cores about as long; with more, the two accumulators spill.
    """
    return _matmul(x, q, scale, zero, q.shape[0], quant.matmul_int8)


@_kernel_for(quant.matmul_transposed_int8)
def matmul_transposed_int8(dy, q, scale, zero):
    """dy @ W with INT8 products, (T, cols) in dy.dtype. Arguments and groups: as above."""
    return _matmul(dy, q, scale, zero, q.shape[1], quant.matmul_transposed_int8)


def _matmul(x, q, scale, zero, n_out, reference):
    x, q, scale, zero = (t.contiguous() for t in (x, q, scale, zero))
    group = _tile_width(q, scale, zero)
    if group < 32:  # the least that INT8 tensor cores sum at once
        return reference(x, q, scale, zero)
    if reference is quant.matmul_int8:
        kernel, block_n, block_k, stages = _matmul_kernel, 128, min(64, group), 3
    else:
        kernel, block_n, block_k, stages = _matmul_transposed_kernel, min(128, group), quant.DY_GROUP, 2
    y = torch.empty(x.shape[0], n_out, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.shape[0], 64), triton.cdiv(n_out, block_n))
    kernel[grid](x, q, scale, zero, y, x.shape[0], *q.shape, group, 64, block_n, block_k, num_warps=8,
                 num_stages=stages, enable_fp_fusion=False)
    return y


def _tile_width(q, *tensors):
    """The columns of a tile of q, a group, as a power of two; 0 where the kernels do not take q."""
    group = triton.next_power_of_2(quant._group_size(q.shape[1], tensors[0].shape[1]))
    return group if 16 <= group <= MAX_GROUP and all(t.is_contiguous() for t in (q, *tensors)) else 0


if triton is not None:

    @triton.jit
    def _dequantize_kernel(codes_ptr, scale_ptr, zero_ptr, out_ptr, rows, cols, group,
                           BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        inside = (row < rows) & (col < cols)
        at = row * cols + col  # (BLOCK_M, BLOCK_N)
        if BITS == 8:
            code = tl.load(codes_ptr + at, inside)
        else:  # element k lies in byte k / 2, whatever its row: in the low half if k is even
            code = ((tl.load(codes_ptr + (at >> 1), inside).to(tl.int32) >> (at & 1) * 4) & 15) - 8
        group_at = row * tl.cdiv(cols, group) + tl.program_id(1) * BLOCK_N // group  # (BLOCK_M, 1), as BLOCK_N <= group
        scale = tl.load(scale_ptr + group_at, row < rows)
        zero = tl.load(zero_ptr + group_at, row < rows)
        tl.store(out_ptr + at, code.to(tl.float32) * scale + zero, inside)

    # `key` is typed and not specialised, so that its values, 1 and multiples of 16 too, share one compilation. The rank
    # is a constexpr: a run has one or two. Numbers of a row stay (BLOCK_M, 1): as vectors, the compiler sends
    # the float32 tile through shared memory four times, 3 more than it must, and spills.
    @triton.jit(do_not_specialize=["key"])
    def _add_low_rank_kernel(q_ptr, scale_ptr, zero_ptr, left_ptr, right_ptr, rows, cols, row_stride, col_stride, shrink,
                             key: tl.uint64, STOCHASTIC: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :]
        inside = (row < rows) & (col < cols)
        if RANK == 0:
            step = tl.load(left_ptr + row * row_stride + col * col_stride, inside, other=0.0).to(tl.float32)
        else:
            step = tl.zeros((BLOCK_M, GROUP), tl.float32)
            for start in range(0, RANK, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                left = tl.load(left_ptr + row * RANK + k[None, :], (row < rows) & (k < RANK)[None, :], other=0.0)
                right = tl.load(right_ptr + col * RANK + k[:, None], (col < cols) & (k < RANK)[:, None], other=0.0)
                step = tl.dot(left, right, step, input_precision="ieee")  # float32 factors: no TF32

        at = row * cols + col  # (BLOCK_M, GROUP)
        group_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        scale = tl.load(scale_ptr + group_at, row < rows)
        zero = tl.load(zero_ptr + group_at, row < rows)
        w = (tl.load(q_ptr + at, inside).to(tl.float32) * scale + zero) * shrink + step
        _requantize(q_ptr, scale_ptr, zero_ptr, w, at, group_at, row < rows, col < cols, key, STOCHASTIC)

    @triton.jit(do_not_specialize=["key"])
    def _adam_kernel(m_ptr, scale_ptr, zero_ptr, g_ptr, row_ptr, col_ptr, rows, cols, rate, correction, eps,
                     key: tl.uint64, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :]
        at = row * cols + col  # (BLOCK_M, GROUP)
        group_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        inside = (row < rows) & (col < cols)
        scale = tl.load(scale_ptr + group_at, row < rows)
        zero = tl.load(zero_ptr + group_at, row < rows)
        m = tl.load(m_ptr + at, inside).to(tl.float32) * scale + zero
        m += (tl.load(g_ptr + at, inside).to(tl.float32) - m) * rate
        v = tl.load(row_ptr + row, row < rows) * tl.load(col_ptr + col, col < cols)  # the second moment's root
        tl.store(g_ptr + at, tl.div_rn(m, (v + eps) * correction), inside)
        _requantize(m_ptr, scale_ptr, zero_ptr, m, at, group_at, row < rows, col < cols, key, True)

    # Loops run to a constexpr, the length of the sums: a model has two or three, each kernel that many compilations.
    @triton.jit
    def _matmul_kernel(x_ptr, q_ptr, scale_ptr, zero_ptr, y_ptr, tokens, rows, COLS: tl.constexpr,
                       GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        row = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, COLS, GROUP):
            largest, total = tl.zeros((BLOCK_M, 1), tl.float32), tl.zeros((BLOCK_M, 1), tl.float32)
            for at in range(start, start + GROUP, BLOCK_K):  # x is read twice: registers cannot keep a group
                col = (at + tl.arange(0, BLOCK_K))[None, :]
                x = tl.load(x_ptr + token * COLS + col, (token < tokens) & (col < COLS), other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1, keep_dims=True))
                total += tl.sum(x, axis=1, keep_dims=True)
            s, dot = _unit(largest), tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            for at in range(start, start + GROUP, BLOCK_K):
                col = at + tl.arange(0, BLOCK_K)
                x = tl.load(x_ptr + token * COLS + col[None, :], (token < tokens) & (col < COLS)[None, :], other=0.0)
                q = tl.load(q_ptr + row * COLS + col[:, None], (row < rows) & (col < COLS)[:, None], other=0)
                dot = tl.dot(_round(x.to(tl.float32), s), q, dot, out_dtype=tl.int32)
            group_at = row * tl.cdiv(COLS, GROUP) + start // GROUP  # (1, BLOCK_N)
            scale = tl.load(scale_ptr + group_at, row < rows)
            zero = tl.load(zero_ptr + group_at, row < rows)
            y += dot.to(tl.float32) * s * scale + total * zero
        tl.store(y_ptr + token * rows + row, y, (token < tokens) & (row < rows))

    @triton.jit
    def _matmul_transposed_kernel(dy_ptr, q_ptr, scale_ptr, zero_ptr, dx_ptr, tokens, ROWS: tl.constexpr, cols,
                                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                  BLOCK_K: tl.constexpr):
        token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # all of one group, as BLOCK_N <= GROUP
        dx, shift = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, 1), tl.float32)
        for start in range(0, ROWS, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            group_at = row * tl.cdiv(cols, GROUP) + tl.program_id(1) * BLOCK_N // GROUP  # (BLOCK_K,)
            scale = tl.load(scale_ptr + group_at, row < ROWS, other=0.0)
            zero = tl.load(zero_ptr + group_at, row < ROWS, other=0.0)
            dy = tl.load(dy_ptr + token * ROWS + row[None, :], (token < tokens) & (row < ROWS)[None, :], other=0.0)
            q = tl.load(q_ptr + row[:, None] * cols + col, (row < ROWS)[:, None] & (col < cols), other=0)
            dy = dy.to(tl.float32)
            scaled = dy * scale[None, :]
            s = _unit(tl.max(tl.abs(scaled), axis=1, keep_dims=True))
            dx += tl.dot(_round(scaled, s), q, out_dtype=tl.int32).to(tl.float32) * s
            shift += tl.sum(dy * zero[None, :], axis=1, keep_dims=True)
        tl.store(dx_ptr + token * cols + col, dx + shift, (token < tokens) & (col < cols))

    @triton.jit
    def _unit(largest):
        return tl.div_rn(tl.maximum(largest, 1e-30), 127.0)

    @triton.jit
    def _round(x, s):
        """x / s in INT8, to nearest even: at 1.5 * 2^23 a float32's last bit is worth 1, its low byte is the code."""
        return (x * tl.div_rn(1.0, s) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)

    @triton.jit
    def _requantize(q_ptr, scale_ptr, zero_ptr, w, at, group_at, row_inside, col_inside, key, STOCHASTIC: tl.constexpr):
        """quant._requantize_int8_ of a tile: w and at (BLOCK_M, GROUP), group_at and row_inside (BLOCK_M, 1)."""
        low = tl.min(tl.where(col_inside, w, float("inf")), axis=1, keep_dims=True)
        high = tl.max(tl.where(col_inside, w, float("-inf")), axis=1, keep_dims=True)
        low += tl.sum(tl.where(col_inside, w * 0, 0), axis=1, keep_dims=True)  # NaN of an inf or NaN, which min drops
        finite = row_inside & (low == low)
        scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
        zero = low + 128 * scale
        code = tl.div_rn(w - zero, tl.where(scale > 0, scale, 1))
        if STOCHASTIC:  # quant.uniform, in unsigned numbers
            x = (at >> 1).to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
            x = (x ^ (x >> 16)) * 0x7FEB352D
            x = (x ^ (x >> 15)) * 0x846CA68B
            x = x ^ (x >> 16)
            x = ((x >> ((at & 1) * 16).to(tl.uint32)) + (key.to(tl.uint64) >> 32).to(tl.uint32) & 0xFFFF) ^ 0x8000
            code = tl.floor(code + (x.to(tl.float32) + 0.5) * 2.0**-16)
        else:  # to nearest even: at 1.5 * 2^23 a float32's last bit is worth 1
            code = (code + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)
        tl.store(q_ptr + at, code, finite & col_inside)
        tl.store(scale_ptr + group_at, scale, finite)
        tl.store(zero_ptr + group_at, zero, finite)
