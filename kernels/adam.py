"""
Adam's step in Triton. moments.py has the same functions in plain torch, and says what their
arguments are.

A gradient is read twice: for the sums of its squares, then for the step. Between them lies what all
its elements wait for: the norm, whether it is finite, how far it is clipped, and the second
moment's row and column. All of it stays on the device.

    squares, squares_by_side      partial sums, each of one program
    second_moment                 what follows from them
    adam_int8_, adam_float32_     the step

Sums are the same at each run: every program adds up its part in one order, and whoever needs the
total adds up all parts in one order. No program waits for another, and none adds to what another
writes.

As in quantized.py codes are the CPU's, bit for bit where the sums are.
"""

import torch

from kernels.launch import MAX_GROUP, cdiv, group_width, power_of_2, tl, triton

BLOCK = 4096  # elements of a program at a time: 32 a thread of 4 warps, 16 of 8
PARTS = 1024  # partial sums of a gradient at most, where no side's are wanted


def squares(g):
    """(n,) float32, n <= PARTS: a sum for each program."""
    n = g.numel()
    steps = power_of_2(cdiv(n, BLOCK * PARTS))  # of a program
    parts = torch.empty(cdiv(n, BLOCK * steps), device=g.device)
    _squares_kernel[len(parts),](g.contiguous(), parts, n, steps, BLOCK, num_warps=4)
    return parts


def squares_by_side(g):
    """(parts, rows) and (parts, cols) float32: a program sums a tile of g, by row and by column."""
    if not g.is_contiguous():
        return NotImplemented
    rows, cols = g.shape
    block_n = min(256, max(16, power_of_2(cols)))
    block_m = BLOCK // block_n
    # some 512 programs keep a GPU busy; beyond that taller ones leave fewer sums by column
    steps = min(64, power_of_2(cdiv(g.numel(), 512 * BLOCK)))
    grid = (cdiv(rows, block_m * steps), cdiv(cols, block_n))
    by_row = torch.empty(grid[1], rows, device=g.device)
    by_col = torch.empty(grid[0], cols, device=g.device)
    _squares_by_side_kernel[grid](g, by_row, by_col, rows, cols, steps, block_m, block_n,
                                  num_warps=4)
    return by_row, by_col


def second_moment(row, col, by_row, by_col, beta, age, record=None):
    """All in one launch: each program takes the total by itself, and BLOCK_N numbers of a side."""
    rows = len(row)
    cols = len(col)
    new = [torch.empty_like(t) for t in (row, col, row, col)]
    factor = torch.empty((), device=row.device)
    total = min(by_row, by_col, key=torch.numel)  # of which side does not matter
    block_n = 256
    _second_moment_kernel[cdiv(max(rows, cols), block_n),](
        row, col, by_row, by_col, total, *new, factor, *_noted(record, row), rows, cols,
        len(by_row), len(by_col), total.numel(), 1 - beta, 1 - beta**age,
        block_n, BLOCK, num_warps=8, enable_fp_fusion=False,
    )
    return (*new, None if record is None else factor)


def adam_int8_(m, scale, zero, g, row, col, beta, correction, eps, key, factor=None, rate=1.0):
    """m and g are each read once and written once."""
    group = power_of_2(group_width(m.shape[1], scale.shape[1]))
    if group < 16 or group > MAX_GROUP:  # a program has a whole group in registers
        return NotImplemented
    if not all(t.is_contiguous() for t in (m, scale, zero, g)):
        return NotImplemented
    block_m = BLOCK // group
    grid = (cdiv(m.shape[0], block_m), scale.shape[1])  # blocks of rows, groups
    _adam_int8_kernel[grid](
        m, scale, zero, g, row, col, row if factor is None else factor, *m.shape, 1 - beta,
        correction, eps, rate, key, factor is not None, group, block_m,
        num_warps=8, enable_fp_fusion=False,
    )


def adam_float32_(m, v, g, betas, age, eps, rate=1.0, parts=None, record=None):
    """m, v and g are each read once and written once."""
    if not g.is_contiguous():
        return NotImplemented
    n = g.numel()
    parts = m if parts is None else parts
    block = 1024
    _adam_float32_kernel[cdiv(n, block),](
        m, v, g, parts, *_noted(record, m), n, len(parts), 1 - betas[0], 1 - betas[1],
        1 - betas[0] ** age, 1 - betas[1] ** age, eps, rate,
        PARTS, block, num_warps=4, enable_fp_fusion=False,
    )


def mask_(g, parts, record, norm=None):
    """g is read once and written once."""
    if not g.is_contiguous():
        return NotImplemented
    _mask_kernel[cdiv(g.numel(), BLOCK),](
        g, parts, parts if norm is None else norm, *_noted(record, g), g.numel(), len(parts),
        norm is not None, PARTS, BLOCK, num_warps=4, enable_fp_fusion=False,
    )


def add_bfloat16_(p, delta, alpha, key):
    """p is read once and written once."""
    _add_bfloat16_kernel[cdiv(p.numel(), BLOCK),](
        p, delta, alpha, p.numel(), key, BLOCK, num_warps=4, enable_fp_fusion=False,
    )


def _noted(record, tensor):
    """What the kernels' _note takes of a Record, or of None; then `tensor` fills in."""
    if record is None:
        return tensor, tensor, 0, 0, 0.0, False, False
    norms, skipped, place, clip = record
    return norms, skipped, place, len(norms), float(clip), True, clip > 0


if triton is not None:
    from kernels.quantized import _random, _whole

    @triton.jit
    def _squares_kernel(g_ptr, parts_ptr, n, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        start = tl.program_id(0) * STEPS * BLOCK
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(STEPS):
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(g_ptr + at, at < n, other=0.0).to(tl.float32)
            total += g * g
        tl.store(parts_ptr + tl.program_id(0), tl.sum(total, axis=0))

    @triton.jit
    def _squares_by_side_kernel(
        g_ptr, by_row_ptr, by_col_ptr, rows, cols,
        STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        by_col = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(STEPS):
            row = (tl.program_id(0) * STEPS + i) * BLOCK_M + tl.arange(0, BLOCK_M)
            inside = (row < rows)[:, None] & (col < cols)[None, :]
            at = row[:, None] * cols + col[None, :]
            g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32)
            square = g * g
            by_col += square
            tl.store(by_row_ptr + tl.program_id(1) * rows + row, tl.sum(square, axis=1), row < rows)
        tl.store(by_col_ptr + tl.program_id(0) * cols + col, tl.sum(by_col, axis=0), col < cols)

    @triton.jit
    def _note(
        total, norms_ptr, skipped_ptr, place, n_norms, clip, CLIPS: tl.constexpr,
    ):
        """The factor of a gradient whose squares sum up to `total`: 0 where it is not finite.

        Every program has it, and the first one notes the norm."""
        finite = total * 0 == 0
        norm = tl.where(finite, tl.sqrt_rn(total), 0.0)
        factor = tl.where(finite, 1.0, 0.0)
        if CLIPS:
            others = tl.zeros((1024,), tl.float32)
            for start in range(0, n_norms, 1024):
                at = start + tl.arange(0, 1024)
                # not the one at `place`, which the first program may have written by now
                other = tl.load(norms_ptr + at, (at < n_norms) & (at != place), other=0.0)
                others += other * other
            all_norms = tl.sqrt_rn(tl.sum(others, axis=0) + norm * norm)
            factor = factor * tl.minimum(tl.div_rn(clip, all_norms), 1.0)
        if tl.program_id(0) == 0:
            tl.store(norms_ptr + place, norm)
            tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(finite, 0.0, 1.0))
        return factor

    @triton.jit
    def _sum(x_ptr, n, BLOCK: tl.constexpr):
        """The sum of n numbers, BLOCK at a time."""
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + at, at < n, other=0.0)
        return tl.sum(total, axis=0)

    @triton.jit
    def _sums(x_ptr, at, n, parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """The sums (BLOCK_N,) over x's `parts` rows of n numbers, of those `at`."""
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, parts, BLOCK_M):
            part = start + tl.arange(0, BLOCK_M)
            inside = (part < parts)[:, None] & (at < n)[None, :]
            total += tl.load(x_ptr + part[:, None] * n + at[None, :], inside, other=0.0)
        return tl.sum(total, axis=0)

    # numbers that differ from tensor to tensor make no compilations of their own
    @triton.jit(do_not_specialize=["place", "rows", "cols", "row_parts", "col_parts", "n_total"])
    def _second_moment_kernel(
        row_ptr, col_ptr, by_row_ptr, by_col_ptr, total_ptr, new_row_ptr, new_col_ptr,
        row_root_ptr, col_root_ptr, factor_ptr, norms_ptr, skipped_ptr, place, n_norms, clip,
        RECORDS: tl.constexpr, CLIPS: tl.constexpr, rows, cols, row_parts, col_parts, n_total,
        rate, correction, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    ):
        total = _sum(total_ptr, n_total, BLOCK)
        factor = 1.0
        if RECORDS:
            factor = _note(total, norms_ptr, skipped_ptr, place, n_norms, clip, CLIPS)
            if tl.program_id(0) == 0:
                tl.store(factor_ptr, factor)

        # the mean of the new row: that of the old moves a part `rate` of the way to the squares'
        squared = factor * factor
        mean = tl.div_rn(tl.div_rn(total, rows * 1.0), cols * 1.0) * squared
        mean = tl.where(factor > 0, mean, 0.0)
        before = tl.div_rn(_sum(row_ptr, rows, BLOCK), rows * 1.0)
        mean = before + (mean - before) * rate
        mean = tl.maximum(mean * correction, 1e-37)

        at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        if tl.program_id(0) * BLOCK_N < rows:
            found = _sums(by_row_ptr, at, rows, row_parts, BLOCK // BLOCK_N, BLOCK_N)
            found = tl.where(factor > 0, tl.div_rn(found, cols * 1.0) * squared, 0.0)
            row = tl.load(row_ptr + at, at < rows, other=0.0)
            row += (found - row) * rate
            tl.store(new_row_ptr + at, row, at < rows)
            tl.store(row_root_ptr + at, tl.sqrt_rn(tl.div_rn(row, mean)), at < rows)
        if tl.program_id(0) * BLOCK_N < cols:
            found = _sums(by_col_ptr, at, cols, col_parts, BLOCK // BLOCK_N, BLOCK_N)
            found = tl.where(factor > 0, tl.div_rn(found, rows * 1.0) * squared, 0.0)
            col = tl.load(col_ptr + at, at < cols, other=0.0)
            col += (found - col) * rate
            tl.store(new_col_ptr + at, col, at < cols)
            tl.store(col_root_ptr + at, tl.sqrt_rn(col), at < cols)

    @triton.jit(do_not_specialize=["key"])
    def _adam_int8_kernel(
        m_ptr, scale_ptr, zero_ptr, g_ptr, row_ptr, col_ptr, factor_ptr, rows, cols, beta_rate,
        correction, eps, rate, key: tl.uint64,
        MASKS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    ):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :]
        at = row * cols + col  # (BLOCK_M, GROUP)
        group_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        row_inside = row < rows
        col_inside = col < cols
        inside = row_inside & col_inside

        g = tl.load(g_ptr + at, inside).to(tl.float32)
        if MASKS:
            factor = tl.load(factor_ptr)
            g = tl.where(factor > 0, g * factor, 0.0)

        # the first moment moves a part `beta_rate` of the way to g
        scale = tl.load(scale_ptr + group_at, row_inside)
        zero = tl.load(zero_ptr + group_at, row_inside)
        m = tl.load(m_ptr + at, inside).to(tl.float32) * scale + zero
        m += (g - m) * beta_rate

        # g becomes the direction of Adam's step, times the rate
        v_root = tl.load(row_ptr + row, row_inside) * tl.load(col_ptr + col, col_inside)
        direction = tl.div_rn(m, (v_root + eps) * correction)
        tl.store(g_ptr + at, direction * rate, inside)

        # the grid of each row of the tile, which is one group: all (BLOCK_M, 1)
        low = tl.min(tl.where(col_inside, m, float("inf")), axis=1, keep_dims=True)
        high = tl.max(tl.where(col_inside, m, float("-inf")), axis=1, keep_dims=True)
        # min drops NaN: make low NaN where m has an inf or NaN
        low += tl.sum(tl.where(col_inside, m * 0, 0), axis=1, keep_dims=True)
        finite = row_inside & (low == low)
        scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
        zero = low + 128 * scale
        code = tl.div_rn(m - zero, tl.where(scale > 0, scale, 1))
        tl.store(m_ptr + at, _whole(code, at, key, True), finite & col_inside)
        tl.store(scale_ptr + group_at, scale, finite)
        tl.store(zero_ptr + group_at, zero, finite)

    @triton.jit(do_not_specialize=["place", "n_parts"])
    def _adam_float32_kernel(
        m_ptr, v_ptr, g_ptr, parts_ptr, norms_ptr, skipped_ptr, place, n_norms, clip,
        RECORDS: tl.constexpr, CLIPS: tl.constexpr, n, n_parts, m_rate, v_rate,
        m_correction, v_correction, eps, rate, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32)
        if RECORDS:
            total = _sum(parts_ptr, n_parts, PARTS)
            factor = _note(total, norms_ptr, skipped_ptr, place, n_norms, clip, CLIPS)
            g = tl.where(factor > 0, g * factor, 0.0)
        m = tl.load(m_ptr + at, inside, other=0.0)
        m += (g - m) * m_rate
        tl.store(m_ptr + at, m, inside)
        v = tl.load(v_ptr + at, inside, other=0.0)
        v += (g * g - v) * v_rate
        tl.store(v_ptr + at, v, inside)
        root = tl.sqrt_rn(tl.div_rn(v, v_correction)) + eps
        tl.store(g_ptr + at, tl.div_rn(m, root * m_correction) * rate, inside)

    @triton.jit(do_not_specialize=["place", "n_parts"])
    def _mask_kernel(
        g_ptr, parts_ptr, norm_ptr, norms_ptr, skipped_ptr, place, n_norms, clip,
        RECORDS: tl.constexpr, CLIPS: tl.constexpr, n, n_parts,
        NORM: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        total = _sum(parts_ptr, n_parts, PARTS)
        if NORM:  # another than g's own; what is not finite in either stays so
            norm = tl.load(norm_ptr)
            total = norm * norm + total * 0
        factor = _note(total, norms_ptr, skipped_ptr, place, n_norms, clip, CLIPS)
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, at < n, other=0.0).to(tl.float32)
        tl.store(g_ptr + at, tl.where(factor > 0, g * factor, 0.0), at < n)

    @triton.jit(do_not_specialize=["key"])
    def _add_bfloat16_kernel(p_ptr, delta_ptr, alpha, n, key: tl.uint64, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        delta = tl.load(delta_ptr + at, at < n, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + at, at < n, other=0.0).to(tl.float32) + delta * alpha
        bits = p.to(tl.uint32, bitcast=True) + _random(at, key)
        p = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)  # a bfloat16: its upper half
        tl.store(p_ptr + at, p.to(tl.bfloat16), at < n)
