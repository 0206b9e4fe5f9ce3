"""
INT8 and INT4 in Triton: dequantise, quantise, the weight step. quant.py has the same functions in
plain torch, and says what their arguments are.

In plain torch every line is a pass over memory: one update of a weight makes 32, which move
186 bytes an element (counted), nearly half for its random numbers. Here a code is read once and
written once. Program (i, j) owns group j of rows i * BLOCK_M .., BLOCK_N columns at a time:

    w            = shrink * (scale * code + zero) + step
    scale, zero  = from the smallest and largest w of each row of the group
    code         = round((w - zero) / scale), its random number hashed from the element's index

A group of up to TILE columns stays in registers from the first line to the last. A wider one is
read again for its codes, from the cache.

Codes are the CPU's, bit for bit. Three things see to it:

- enable_fp_fusion=False keeps a * b + c from becoming one FMA with one rounding;
- div_rn divides as IEEE 754 says, where `/` may miss by 2 ulp;
- the random numbers are integers until their last line.

Dequantising rounds once, from float32, where plain torch computes in the dtype that it gives.

Offsets are 32 bits wide: a matrix has fewer than 2^31 elements.
"""

import torch

from kernels.launch import cdiv, group_width, power_of_2, tl, triton

TILE = 4096  # elements of a program at a time: 16 a thread of 8 warps


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
    block_n = min(power_of_2(group), 256)  # columns of a program, of one group
    block_m = 4096 // block_n  # its rows: 32 elements a thread, two loads of 16 bytes
    grid = (cdiv(rows, block_m), cdiv(cols, block_n))
    _dequantize_kernel[grid](
        codes.contiguous(), scale.contiguous(), zero.contiguous(), out, rows, cols, group,
        bits, block_m, block_n,
        num_warps=4, enable_fp_fusion=False,
    )
    return out


def quantize_int8(w, group_size=256):
    """(q, scale, zero) in one pass; a group that is not finite has NaN for its scale and zero."""
    rows, cols = w.shape
    if group_size < 0 or group_size & (group_size - 1) or not w.numel():
        return NotImplemented
    q = torch.empty(rows, cols, dtype=torch.int8, device=w.device)
    scale = torch.empty(rows, cdiv(cols, group_size or cols), device=w.device)
    zero = torch.empty_like(scale)
    _launch_add(q, scale, zero, w, 1.0, None, 0, poison=True, moves=False)
    return q, scale, zero


def add_int8_(q, scale, zero, step, shrink=1.0, key=None, start=0, poison=False):
    """The weight step in one pass: q is read once and written once. step may lie in any order."""
    if not all(t.is_contiguous() for t in (q, scale, zero)):
        return NotImplemented
    _launch_add(q, scale, zero, step, shrink, key, start, poison, moves=True)


def _launch_add(q, scale, zero, step, shrink, key, start, poison, moves):
    """moves: False: the new values are those of step alone, and q is not read."""
    rows, cols = q.shape
    n_groups = scale.shape[1]
    group = group_width(cols, n_groups)
    block_n = min(power_of_2(group), TILE)
    block_m = TILE // block_n
    grid = (cdiv(rows, block_m), n_groups)
    _add_kernel[grid](
        q, scale, zero, step, rows, cols, *step.stride(), shrink, key or 0, start,
        key is not None, poison, moves, group, block_m, block_n,
        num_warps=8, enable_fp_fusion=False,
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
    # multiples of 16, too. Numbers of a row stay (BLOCK_M, 1): as vectors, the compiler sends the
    # float32 tile through shared memory four times, 3 more than it must.
    @triton.jit(do_not_specialize=["key", "start"])
    def _add_kernel(
        q_ptr, scale_ptr, zero_ptr, step_ptr, rows, cols, row_stride, col_stride, shrink,
        key: tl.uint64, start: tl.int32, STOCHASTIC: tl.constexpr, POISON: tl.constexpr,
        MOVES: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        row_inside = row < rows
        first = tl.program_id(1) * GROUP  # column of the group
        group_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        scale = 0.0
        zero = 0.0
        if MOVES:
            scale = tl.load(scale_ptr + group_at, row_inside)
            zero = tl.load(zero_ptr + group_at, row_inside)

        # the range of the group's new values
        low = tl.full((BLOCK_M, 1), float("inf"), tl.float32)
        high = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
        bad = tl.zeros((BLOCK_M, 1), tl.float32)  # NaN where one is not finite, as min drops NaN
        for at in range(0, GROUP, BLOCK_N):
            col = (first + at + tl.arange(0, BLOCK_N))[None, :]
            col_inside = col < min(cols, first + GROUP)
            w = _new_values(
                q_ptr, step_ptr, row, col, row_inside & col_inside, cols, row_stride, col_stride,
                scale, zero, shrink, MOVES,
            )
            smallest = tl.where(col_inside, w, float("inf"))
            low = tl.minimum(low, tl.min(smallest, axis=1, keep_dims=True))
            largest = tl.where(col_inside, w, float("-inf"))
            high = tl.maximum(high, tl.max(largest, axis=1, keep_dims=True))
            bad += tl.sum(tl.where(col_inside, w * 0, 0), axis=1, keep_dims=True)

        # its grid
        low += bad
        finite = row_inside & (low == low)
        new_scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
        new_zero = low + 128 * new_scale
        divisor = tl.where(new_scale > 0, new_scale, 1)

        # its codes; a store above would keep the compiler from seeing that these loads are the same
        for at in range(0, GROUP, BLOCK_N):
            col = (first + at + tl.arange(0, BLOCK_N))[None, :]
            col_inside = col < min(cols, first + GROUP)
            w = _new_values(
                q_ptr, step_ptr, row, col, row_inside & col_inside, cols, row_stride, col_stride,
                scale, zero, shrink, MOVES,
            )
            code = tl.div_rn(w - new_zero, divisor)
            code = _whole(code, row * cols + col + start, key, STOCHASTIC)
            tl.store(q_ptr + row * cols + col, code, finite & col_inside)
        if POISON:
            new_scale = tl.where(finite, new_scale, float("nan"))
            new_zero = tl.where(finite, new_zero, float("nan"))
            finite = row_inside
        tl.store(scale_ptr + group_at, new_scale, finite)
        tl.store(zero_ptr + group_at, new_zero, finite)

    @triton.jit
    def _new_values(
        q_ptr, step_ptr, row, col, inside, cols, row_stride, col_stride, scale, zero, shrink,
        MOVES: tl.constexpr,
    ):
        """shrink * W + step, (BLOCK_M, BLOCK_N) float32; or the step alone."""
        step = tl.load(step_ptr + row * row_stride + col * col_stride, inside, other=0.0)
        w = step.to(tl.float32)
        if MOVES:
            code = tl.load(q_ptr + row * cols + col, inside, other=0).to(tl.float32)
            w = (code * scale + zero) * shrink + w
        return w

    @triton.jit
    def _whole(code, number, key, STOCHASTIC: tl.constexpr):
        """Codes rounded to int8: by random number `number` of stream `key`, or to nearest even."""
        if STOCHASTIC:  # quant.uniform
            x = _random(number, key) ^ 0x8000
            code = tl.floor(code + (x.to(tl.float32) + 0.5) * 2.0**-16)
        else:  # at 1.5 * 2^23 a float32's last bit is worth 1
            code = (code + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(code, -128), 127).to(tl.int8)

    @triton.jit
    def _random(number, key):
        """quant.random_int16 of stream `key`, as uint32 below 2^16."""
        x = (number >> 1).to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        shift = ((number & 1) * 16).to(tl.uint32)  # the half of the hash that is the element's
        advance = (key.to(tl.uint64) >> 32).to(tl.uint32)  # rounding_key's, with the step
        return (x >> shift) + advance & 0xFFFF
