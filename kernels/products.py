"""
Products of INT8 weights with factors that are rounded to INT8 on the way, in Triton. matmul.py has
the same functions in plain torch and says what is computed.

The tensor cores multiply INT8 at twice the rate of bfloat16, but they cannot scale within a sum.
So a factor is rounded a piece at a time, with one scale for each token: a piece is a group of
columns in x @ W^T, and DY_GROUP rows of W in dy @ W. Sums of products are int32 within a piece and
float32 between pieces.
"""

import torch

from kernels.launch import MAX_GROUP, group_width, tl, triton

DY_GROUP = 128  # rows of W: more would round coarser, fewer rescale more often
BLOCK_TOKENS = 64  # tokens of a program


def matmul_int8(x, q, scale, zero):
    """x @ W^T, (T, rows) in x.dtype, for groups of 32 to MAX_GROUP columns.

    Rounding takes some ten instructions an element of x, again in every program. The 128 rows of W
    of a program share them, and by count keep the tensor cores about as long. With more rows the
    two accumulators spill.
    """
    group = triton.next_power_of_2(group_width(q.shape[1], scale.shape[1]))
    if group < 32 or group > MAX_GROUP:  # INT8 tensor cores sum at least 32 products at once
        return NotImplemented
    return _launch(
        _matmul_kernel, x, q, scale, zero, q.shape[0], group,
        block_n=128, block_k=min(64, group), stages=3,
    )


def matmul_transposed_int8(dy, q, scale, zero):
    """dy @ W, (T, cols) in dy.dtype, for the same groups."""
    group = triton.next_power_of_2(group_width(q.shape[1], scale.shape[1]))
    if group < 32 or group > MAX_GROUP:  # as above
        return NotImplemented
    return _launch(
        _matmul_transposed_kernel, dy, q, scale, zero, q.shape[1], group,
        block_n=min(128, group), block_k=DY_GROUP, stages=2,
    )


def _launch(kernel, x, q, scale, zero, n_out, group, block_n, block_k, stages):
    """x (T, n_in) times W: (T, n_out). A program makes BLOCK_TOKENS x block_n of it, summing
    block_k products at a time."""
    x = x.contiguous()  # the kernels take rows without gaps
    q = q.contiguous()
    y = torch.empty(x.shape[0], n_out, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.shape[0], BLOCK_TOKENS), triton.cdiv(n_out, block_n))
    kernel[grid](
        x, q, scale.contiguous(), zero.contiguous(), y, x.shape[0], *q.shape, group,
        BLOCK_TOKENS, block_n, block_k,
        num_warps=8, num_stages=stages, enable_fp_fusion=False,
    )
    return y


if triton is not None:

    # Loops run to a constexpr, the length of the sums: a model has two or three of them, and each
    # kernel that many compilations.
    @triton.jit
    def _matmul_kernel(
        x_ptr, q_ptr, scale_ptr, zero_ptr, y_ptr, tokens, rows, COLS: tl.constexpr,
        GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        row = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        token_inside = token < tokens
        row_inside = row < rows
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, COLS, GROUP):
            # x is read twice, as registers cannot keep a group: first for its unit and its sum
            largest = tl.zeros((BLOCK_M, 1), tl.float32)
            total = tl.zeros((BLOCK_M, 1), tl.float32)
            for at in range(start, start + GROUP, BLOCK_K):
                col = (at + tl.arange(0, BLOCK_K))[None, :]
                x_inside = token_inside & (col < COLS)
                x = tl.load(x_ptr + token * COLS + col, x_inside, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1, keep_dims=True))
                total += tl.sum(x, axis=1, keep_dims=True)
            s = _unit(largest)

            # then for its codes, whose products are summed in int32
            dot = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            for at in range(start, start + GROUP, BLOCK_K):
                col = at + tl.arange(0, BLOCK_K)
                x_inside = token_inside & (col < COLS)[None, :]
                x = tl.load(x_ptr + token * COLS + col[None, :], x_inside, other=0.0)
                q_inside = row_inside & (col < COLS)[:, None]
                q = tl.load(q_ptr + row * COLS + col[:, None], q_inside, other=0)
                dot = tl.dot(_round(x.to(tl.float32), s), q, dot, out_dtype=tl.int32)

            # to float32, with x's unit and the group's scale; zero meets x as it came
            group_at = row * tl.cdiv(COLS, GROUP) + start // GROUP  # (1, BLOCK_N)
            scale = tl.load(scale_ptr + group_at, row_inside)
            zero = tl.load(zero_ptr + group_at, row_inside)
            y += dot.to(tl.float32) * s * scale + total * zero
        tl.store(y_ptr + token * rows + row, y, token_inside & row_inside)

    @triton.jit
    def _matmul_transposed_kernel(
        dy_ptr, q_ptr, scale_ptr, zero_ptr, dx_ptr, tokens, ROWS: tl.constexpr, cols,
        GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]  # all of one group
        token_inside = token < tokens
        col_inside = col < cols
        dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        shift = tl.zeros((BLOCK_M, 1), tl.float32)
        for start in range(0, ROWS, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,), as group_at, scale and zero
            row_inside = row < ROWS
            group_at = row * tl.cdiv(cols, GROUP) + tl.program_id(1) * BLOCK_N // GROUP
            scale = tl.load(scale_ptr + group_at, row_inside, other=0.0)
            zero = tl.load(zero_ptr + group_at, row_inside, other=0.0)
            dy_inside = token_inside & row_inside[None, :]
            dy = tl.load(dy_ptr + token * ROWS + row[None, :], dy_inside, other=0.0)
            q_inside = row_inside[:, None] & col_inside
            q = tl.load(q_ptr + row[:, None] * cols + col, q_inside, other=0)

            # W's scales lie along the sum: they are multiplied into dy before it is rounded
            dy = dy.to(tl.float32)
            scaled = dy * scale[None, :]
            s = _unit(tl.max(tl.abs(scaled), axis=1, keep_dims=True))
            dx += tl.dot(_round(scaled, s), q, out_dtype=tl.int32).to(tl.float32) * s
            shift += tl.sum(dy * zero[None, :], axis=1, keep_dims=True)
        tl.store(dx_ptr + token * cols + col, dx + shift, token_inside & col_inside)

    @triton.jit
    def _unit(largest):
        """What a code of 1 is worth, where the largest value is to be 127."""
        return tl.div_rn(tl.maximum(largest, 1e-30), 127.0)

    @triton.jit
    def _round(x, s):
        """x / s in INT8, to nearest even: at 1.5 * 2^23 a float32's last bit is worth 1, and its
        lowest byte is the code."""
        return (x * tl.div_rn(1.0, s) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
