"""
What is done row by row, in Triton: the cross-entropy of logits, RMSNorm, RoPE. loss.py, lean.py and
attention.py have the same functions in plain torch and say what is computed.

    cross-entropy       a row of logits is read twice (the second time from the L2 cache, a row of
                        50,304 takes 98 KiB) and overwritten once by its gradient
    RMSNorm             a row stays in registers: read once, written once
    its backward        programs own blocks of rows. Each writes its part of the weight's gradient,
                        and a sum over the parts follows: the same bits in every run, no atomics
    RoPE                queries and keys in one launch, of which torch.compile makes two or more

Sums of a pass are float32, whatever the tensors have.
"""

import torch

from kernels.launch import cdiv, power_of_2, tl, triton

BLOCK = 4096  # logits of a row at once: 16 a thread
TILE = 4096  # elements of a norm's tile: 16 a thread
MAX_COLS = 8192  # of a norm, LLaMA-70B's: 32 numbers a thread in each of four rows of registers
PARTS = 256  # parts of a norm weight's gradient: 2 programs for each of an H100's multiprocessors


def cross_entropy_(logits, targets, softcap=0.0, gradient=True):
    """Each token's loss (T,); logits become their gradient."""
    if logits.stride(-1) != 1:
        return NotImplemented
    losses = torch.empty(len(logits), device=logits.device)
    block = min(BLOCK, power_of_2(logits.shape[1]))
    if len(logits):
        _cross_entropy_kernel[(len(logits),)](
            logits, targets.contiguous(), losses, logits.stride(0), logits.shape[1], softcap,
            softcap != 0, gradient, block,
            num_warps=8, enable_fp_fusion=False,
        )
    return losses


def rms_norm(x, h, weight, eps, dtype):
    """(x + h, its norm, 1 / rms); h may be None, and x + h is then."""
    cols = x.shape[-1]
    if cols > MAX_COLS:
        return NotImplemented
    x = x.contiguous()
    total = None if h is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    rows = rstd.numel()
    block_n = power_of_2(cols)
    block_m = max(1, TILE // block_n)
    if rows:
        _rms_norm_kernel[(cdiv(rows, block_m),)](
            x, x if h is None else h.contiguous(), weight, x if h is None else total, y, rstd,
            rows, cols, eps, h is not None, block_m, block_n,
            num_warps=8, enable_fp_fusion=False,
        )
    return total, y, rstd


def rms_norm_backward(dy, dx, x, weight, rstd, need_dw=True):
    """(dx + the gradient of x, the weight's); dx may be None, and the latter is without need_dw."""
    cols = x.shape[-1]
    if cols > MAX_COLS:
        return NotImplemented
    dy = dy.contiguous()
    out = torch.empty_like(x)
    rows = rstd.numel()
    block_n = power_of_2(cols)
    block_m = max(1, TILE // block_n)
    tiles = cdiv(rows, block_m)
    each = cdiv(tiles, PARTS)  # tiles of a program
    programs = cdiv(tiles, max(1, each))
    parts = torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    if rows:
        _rms_norm_backward_kernel[(programs,)](
            dy, dy if dx is None else dx.contiguous(), x, weight, rstd, out, parts, rows, cols,
            each, dx is not None, need_dw, block_m, block_n,
            num_warps=8, enable_fp_fusion=False,
        )
    return out, parts.sum(dim=0) if need_dw else None


def turned(q, k, cos, sin, back=False):
    """q and k (B, T, heads, hs), turned by the angles of cos and sin (T, hs / 2)."""
    q = q.contiguous()
    k = k.contiguous()
    out = torch.empty_like(q), torch.empty_like(k)
    B, T, n_q, size = q.shape
    n_k = k.shape[2]
    block_n = power_of_2(size // 2)
    block_m = max(1, TILE // 2 // block_n)  # heads of a program, half a tile of pairs
    grid = (B * T, cdiv(n_q + n_k, block_m))
    if B * T:
        _turn_kernel[grid](
            q, k, cos.contiguous(), sin.contiguous(), *out, T, n_q, n_k, size // 2,
            -1.0 if back else 1.0, block_m, block_n,
            num_warps=4, enable_fp_fusion=False,
        )
    return out


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        x_ptr, target_ptr, loss_ptr, stride, cols, softcap,
        CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0)
        x_ptr += row.to(tl.int64) * stride
        target = tl.load(target_ptr + row)

        # log of the sum of exponents, which would overflow without the largest so far
        at_target = tl.load(x_ptr + tl.maximum(target, 0)).to(tl.float32)
        if CAPPED:
            at_target = softcap * _tanh(at_target / softcap)
        largest = float("-inf")
        total = 0.0
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + col, col < cols, other=0.0).to(tl.float32)
            if CAPPED:
                x = softcap * _tanh(x / softcap)
            x = tl.where(col < cols, x, float("-inf"))
            before = largest
            largest = tl.maximum(largest, tl.max(x, axis=0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
        valid = (target >= 0).to(tl.float32)
        tl.store(loss_ptr + row, (largest + tl.log(total) - at_target) * valid)

        # softmax - one-hot, in the logits' place
        if GRADIENT:
            tl.debug_barrier()  # all threads have read at_target
            for start in range(0, cols, BLOCK):
                col = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + col, col < cols, other=0.0).to(tl.float32)
                slope = valid
                if CAPPED:
                    t = _tanh(x / softcap)
                    x = softcap * t
                    slope = (1 - t * t) * valid
                g = (tl.exp(x - largest) / total - (col == target).to(tl.float32)) * slope
                tl.store(x_ptr + col, g, col < cols)

    @triton.jit
    def _tanh(x):
        return 2 * tl.sigmoid(2 * x) - 1

    @triton.jit
    def _rms_norm_kernel(
        x_ptr, h_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr, rows, cols, eps,
        ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = tl.arange(0, BLOCK_N)[None, :]
        at = row * cols + col  # (BLOCK_M, BLOCK_N)
        inside = (row < rows) & (col < cols)
        x = tl.load(x_ptr + at, inside, other=0.0)
        if ADD:  # rounded as it will be read
            h = tl.load(h_ptr + at, inside, other=0.0)
            x = (x.to(tl.float32) + h.to(tl.float32)).to(x_ptr.dtype.element_ty)
            tl.store(total_ptr + at, x, inside)
        x = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / cols + eps)  # (BLOCK_M, 1)
        weight = tl.load(weight_ptr + col, col < cols, other=0.0)
        tl.store(y_ptr + at, x * rstd * weight, inside)
        tl.store(rstd_ptr + row, rstd, row < rows)

    @triton.jit
    def _rms_norm_backward_kernel(
        dy_ptr, dx_ptr, x_ptr, weight_ptr, rstd_ptr, out_ptr, part_ptr, rows, cols, each,
        ADD: tl.constexpr, NEED_DW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        col = tl.arange(0, BLOCK_N)[None, :]
        weight = tl.load(weight_ptr + col, col < cols, other=0.0)
        dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first = tl.program_id(0) * each
        for tile in range(first, first + each):
            row = (tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
            at = row * cols + col  # (BLOCK_M, BLOCK_N)
            inside = (row < rows) & (col < cols)
            rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)  # (BLOCK_M, 1)
            h = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
            dw += dy * h
            dh = dy * weight
            # the part of dh along h does not move h, whose rms is 1
            dx = (dh - h * (tl.sum(dh * h, axis=1, keep_dims=True) / cols)) * rstd
            if ADD:
                dx += tl.load(dx_ptr + at, inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + at, dx, inside)
        if NEED_DW:
            part = tl.sum(dw, axis=0, keep_dims=True)  # (1, BLOCK_N)
            tl.store(part_ptr + tl.program_id(0) * cols + col, part, col < cols)

    @triton.jit
    def _turn_kernel(
        q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, T, n_q, n_k, half, sign,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        token = tl.program_id(0)
        head = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]  # q's, then k's
        pair = tl.arange(0, BLOCK_N)[None, :]
        angle_at = (token % T) * half + pair
        cos = tl.load(cos_ptr + angle_at, pair < half, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle_at, pair < half, other=0.0).to(tl.float32) * sign

        # a pair's first coordinate, and its second, half a head further: (BLOCK_M, BLOCK_N)
        of_q = (head < n_q) & (pair < half)
        of_k = (head >= n_q) & (head < n_q + n_k) & (pair < half)
        q_at = (token * n_q + head) * 2 * half + pair
        k_at = (token * n_k + head - n_q) * 2 * half + pair
        a = tl.load(q_ptr + q_at, of_q, other=0.0) + tl.load(k_ptr + k_at, of_k, other=0.0)
        q_next = q_at + half
        k_next = k_at + half
        b = tl.load(q_ptr + q_next, of_q, other=0.0) + tl.load(k_ptr + k_next, of_k, other=0.0)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        left = a * cos - b * sin
        right = b * cos + a * sin
        tl.store(q_out_ptr + q_at, left, of_q)
        tl.store(q_out_ptr + q_next, right, of_q)
        tl.store(k_out_ptr + k_at, left, of_k)
        tl.store(k_out_ptr + k_next, right, of_k)
