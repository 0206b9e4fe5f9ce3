"""
Dequantising and the weight step in Triton. quant.py has the same functions in plain torch, and says
what their arguments are.

In plain torch every line is a pass over memory: one update of a weight makes 32, which move
186 bytes an element (counted), nearly half for its random numbers. Here an element is read once
and written once, as INT8, 2 bytes. Program (i, j) owns rows i * BLOCK_M .. of group j, a tile that
stays in registers from the first line to the last:

    step         = left[rows] @ right[group]^T       on the tensor cores, summed in float32
    w            = shrink * (scale * code + zero) + step
    scale, zero  = from the smallest and largest w of each row of the tile, which is one group
    code         = round((w - zero) / scale), its random number hashed from the element's index

Codes are the CPU's, bit for bit where the products are. Three things see to it:

- enable_fp_fusion=False keeps a * b + c from becoming one FMA with one rounding;
- div_rn divides as IEEE 754 says, where `/` may miss by 2 ulp;
- the random numbers are integers until their last line.

Two differences are left, both on the exact side: a product of bfloat16 factors stays float32, where
torch rounds it to bfloat16, and dequantising rounds once, from float32.

Offsets are 32 bits wide: a matrix has fewer than 2^31 elements.
"""

import torch

from kernels.launch import group_width, tile_width, tl, triton

TILE = 64 * 256  # elements of a program: 32 a thread, whose 128 registers (16 warps) do not spill


def dequantize_int8(q, scale, zero, dtype=torch.float32):
    """(rows, cols) in `dtype`, computed in float32."""
    rows, cols = q.shape
    return _dequantize(q, scale, zero, rows, cols, 8, dtype)


def dequantize_int4(packed, scale, zero, dtype=torch.float32):
    """(rows, cols) in `dtype`, computed in float32."""
    rows, cols = int4_shape(packed, scale)
    return _dequantize(packed, scale, zero, rows, cols, 4, dtype)


def int4_shape(packed, scale):
    """(rows, cols) of the matrix that quant.quantize_int4 made packed and scale of."""
    rows = scale.shape[0]
    cols = 2 * packed.numel() // rows
    if packed.ndim == 1 and cols % 2 == 0:  # one row of odd width: half of its last byte is filling
        cols -= 1
    return rows, cols


def _dequantize(codes, scale, zero, rows, cols, bits, dtype):
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    group = group_width(cols, scale.shape[1])
    block_n = min(group, 256)  # columns of a program, of one group
    block_m = 4096 // block_n  # its rows: 32 elements a thread, two loads of 16 bytes
    grid = (triton.cdiv(rows, block_m), triton.cdiv(cols, block_n))
    _dequantize_kernel[grid](
        codes.contiguous(), scale.contiguous(), zero.contiguous(), out, rows, cols, group,
        bits, block_m, block_n,
        num_warps=4, enable_fp_fusion=False,
    )
    return out


def add_low_rank_int8_(q, scale, zero, left, right, shrink=1.0, key=None):
    """The weight step in one pass: q is read once and written once.

    A step without `right` may lie in either order. Ranks that 16 divides are the fastest.
    """
    group = tile_width(q, scale, zero)
    if not group:
        return NotImplemented
    block_m = min(64, TILE // group)  # rows of a program
    # 64 bytes: in 3 stages at most 68 KiB of shared memory, of which consumer cards have 99
    block_k = 64 // left.element_size()
    if right is None:
        rank = 0  # left is the step
        right = left  # a pointer that the kernel does not read
    else:
        rank = left.shape[1]
        left = left.contiguous()
        right = right.contiguous()
    grid = (triton.cdiv(q.shape[0], block_m), scale.shape[1])  # blocks of rows, groups
    _add_low_rank_kernel[grid](
        q, scale, zero, left, right, *q.shape, *left.stride(), shrink, key or 0,
        key is not None, rank, group, block_m, block_k,
        num_warps=block_m * group // 1024, num_stages=3, enable_fp_fusion=False,
    )


if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        codes_ptr, scale_ptr, zero_ptr, out_ptr, rows, cols, group,
        BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # (BLOCK_M, 1)
        col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # (1, BLOCK_N)
        inside = (row < rows) & (col < cols)
        at = row * cols + col  # (BLOCK_M, BLOCK_N)

        if BITS == 8:
            code = tl.load(codes_ptr + at, inside)
        else:
            # element k lies in byte k / 2, whatever its row: in the low half if k is even
            byte = tl.load(codes_ptr + (at >> 1), inside).to(tl.int32)
            code = ((byte >> (at & 1) * 4) & 15) - 8

        # one group a tile, as BLOCK_N <= group
        group_at = row * tl.cdiv(cols, group) + tl.program_id(1) * BLOCK_N // group  # (BLOCK_M, 1)
        scale = tl.load(scale_ptr + group_at, row < rows)
        zero = tl.load(zero_ptr + group_at, row < rows)
        tl.store(out_ptr + at, code.to(tl.float32) * scale + zero, inside)

    # `key` is typed and not specialised, so that all its values share one compilation: 1 and
    # multiples of 16, too. The rank is a constexpr: a run has one or two. Numbers of a row stay
    # (BLOCK_M, 1): as vectors, the compiler sends the float32 tile through shared memory four
    # times, 3 more than it must, and spills.
    @triton.jit(do_not_specialize=["key"])
    def _add_low_rank_kernel(
        q_ptr, scale_ptr, zero_ptr, left_ptr, right_ptr, rows, cols, row_stride, col_stride, shrink,
        key: tl.uint64, STOCHASTIC: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :]
        row_inside = row < rows
        col_inside = col < cols
        inside = row_inside & col_inside

        # the step: given as it is, or left @ right^T, BLOCK_K of the rank at a time
        if RANK == 0:
            step_ptr = left_ptr + row * row_stride + col * col_stride
            step = tl.load(step_ptr, inside, other=0.0).to(tl.float32)
        else:
            step = tl.zeros((BLOCK_M, GROUP), tl.float32)
            for start in range(0, RANK, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
                left_inside = row_inside & (k < RANK)[None, :]
                left = tl.load(left_ptr + row * RANK + k[None, :], left_inside, other=0.0)
                right_inside = col_inside & (k < RANK)[:, None]
                right = tl.load(right_ptr + col * RANK + k[:, None], right_inside, other=0.0)
                # float32 factors: no TF32
                step = tl.dot(left, right, step, input_precision="ieee")

        # the weights, moved
        at = row * cols + col  # (BLOCK_M, GROUP)
        group_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        scale = tl.load(scale_ptr + group_at, row_inside)
        zero = tl.load(zero_ptr + group_at, row_inside)
        w = (tl.load(q_ptr + at, inside).to(tl.float32) * scale + zero) * shrink + step
        _requantize(
            q_ptr, scale_ptr, zero_ptr, w, at, group_at, row_inside, col_inside, key, STOCHASTIC
        )

    @triton.jit
    def _requantize(
        q_ptr, scale_ptr, zero_ptr, w, at, group_at, row_inside, col_inside, key,
        STOCHASTIC: tl.constexpr,
    ):
        """quant._requantize_int8_ of a tile. w and at are (BLOCK_M, GROUP), group_at and row_inside
        (BLOCK_M, 1), col_inside (1, GROUP)."""
        # the grid of each row of the tile, which is one group: all (BLOCK_M, 1)
        low = tl.min(tl.where(col_inside, w, float("inf")), axis=1, keep_dims=True)
        high = tl.max(tl.where(col_inside, w, float("-inf")), axis=1, keep_dims=True)
        # min drops NaN: make low NaN where w has an inf or NaN
        low += tl.sum(tl.where(col_inside, w * 0, 0), axis=1, keep_dims=True)
        finite = row_inside & (low == low)
        scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
        zero = low + 128 * scale
        code = tl.div_rn(w - zero, tl.where(scale > 0, scale, 1))

        if STOCHASTIC:  # quant.uniform, in unsigned numbers
            x = (at >> 1).to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
            x = (x ^ (x >> 16)) * 0x7FEB352D
            x = (x ^ (x >> 15)) * 0x846CA68B
            x = x ^ (x >> 16)
            shift = ((at & 1) * 16).to(tl.uint32)  # the half of the hash that is the element's
            advance = (key.to(tl.uint64) >> 32).to(tl.uint32)  # rounding_key's, with the step
            x = ((x >> shift) + advance & 0xFFFF) ^ 0x8000
            code = tl.floor(code + (x.to(tl.float32) + 0.5) * 2.0**-16)
        else:  # to nearest even: at 1.5 * 2^23 a float32's last bit is worth 1
            code = (code + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)

        tl.store(q_ptr + at, code, finite & col_inside)
        tl.store(scale_ptr + group_at, scale, finite)
        tl.store(zero_ptr + group_at, zero, finite)
