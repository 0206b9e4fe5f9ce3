"""
A momentum in 4 bits an element, in plain torch and in Triton.

A row is cut into groups of GROUP. Each keeps the size of its largest element, float32; elements are
that times one of 15 levels, which lie closer together near 0 (companded, mu law with mu = 8;
MuonQ, arXiv 2605.11396, does so, too). With evenly spaced levels a run ends a little worse, with
3 bits far worse (docs/results.md).

    level k of 0..7 = (9^(k/7) - 1) / 8

The nearest level is found by comparisons alone: the codes of a CPU and of a GPU are the same.
"""

import torch
import torch.nn.functional as F

from kernels.launch import cdiv, chunks, tl, triton, with_kernel

GROUP = 128  # elements that share a size
LEVELS = tuple((9 ** (k / 7) - 1) / 8 for k in range(8))
BOUNDS = tuple((9 ** ((k + 0.5) / 7) - 1) / 8 for k in range(7))  # where the next level begins
CHUNK = 2**22  # elements made float32 at once, where no kernel keeps them in registers
TILE = 4096  # elements of a program


class Momentum:
    """M (rows, cols) of a gradient. kind: "float32", 4 bytes an element; else 4 bits, 0.53 bytes.

    m: bytes of two codes (rows, ceil(cols / 2)), the earlier one in the low half; size (rows,
    groups). Code 8 is 0, and 8 + k, 8 - k are levels k and -k."""

    def __init__(self, shape, kind, device=None):
        rows, cols = shape
        self.kind = kind
        if kind == "float32":
            self.m = torch.zeros(shape, device=device)
        else:
            self.m = torch.full((rows, -(-cols // 2)), 0x88, dtype=torch.uint8, device=device)
            self.size = torch.zeros(rows, -(-cols // GROUP), device=device)

    def step_(self, g, beta, own):
        """M <- beta M + (1 - beta) g, then g <- M + own g, by M before it is rounded.

        g (rows, cols): any float dtype, contiguous, finite."""
        if self.kind == "float32":
            self.m.lerp_(g.float(), 1 - beta)
            g.mul_(own).add_(self.m)
        else:
            step_int4_(self.m, self.size, g, beta, own)


def _decode(m, size, cols):
    """The momentum (rows, cols) that these codes are of, float32."""
    codes = torch.stack([m & 15, m >> 4], dim=-1).flatten(1)[:, :cols].short() - 8
    levels = torch.tensor(LEVELS, device=m.device)
    value = levels[codes.abs().long()] * codes.sign()
    return value * size.repeat_interleave(GROUP, dim=1)[:, :cols]


def _launch_step(m, size, g, beta, own):
    """step_int4_ in one pass over m and g."""
    rows, cols = g.shape
    block_m = TILE // GROUP
    grid = (cdiv(rows, block_m), size.shape[1])
    _step_kernel[grid](
        m, size, g, rows, cols, m.shape[1], 1 - beta, own, LEVELS, BOUNDS, GROUP, block_m,
        num_warps=4, enable_fp_fusion=False,
    )


@with_kernel(_launch_step)
def step_int4_(m, size, g, beta, own):
    """A step of a momentum in 4 bits; see Momentum.step_."""
    cols = g.shape[1]
    rows = max(1, CHUNK // cols)
    for start in chunks(g, len(g), rows):
        at = slice(start, start + rows)
        part = g[at].float()
        new = _decode(m[at], size[at], cols)
        new += (part - new).mul_(1 - beta)  # lerp_ would round once, where the kernel does twice
        g[at] = new + own * part
        groups = F.pad(new, (0, -cols % GROUP)).view(len(new), -1, GROUP)
        largest = groups.abs().amax(dim=-1, keepdim=True)
        size[at] = largest[:, :, 0]
        level = sum(groups.abs() >= bound * largest for bound in BOUNDS)
        code = (8 + groups.sign() * level).flatten(1)[:, : 2 * m.shape[1]].byte()
        m[at] = code[:, 0::2] | code[:, 1::2] << 4


if triton is not None:

    @triton.jit
    def _step_kernel(
        m_ptr, size_ptr, g_ptr, rows, cols, row_bytes, rate, own, LEVELS: tl.constexpr,
        BOUNDS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    ):
        """Program (i, j): group j of rows i * BLOCK_M and on."""
        row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        col = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :]
        inside = (row < rows) & (col < cols)
        size_at = row * tl.num_programs(1) + tl.program_id(1)  # (BLOCK_M, 1)
        size = tl.load(size_ptr + size_at, row < rows, other=0.0)

        # the momentum
        byte = tl.load(m_ptr + row * row_bytes + col // 2, inside, other=0x88).to(tl.int32)
        code = ((byte >> (col & 1) * 4) & 15) - 8
        level = tl.zeros((BLOCK_M, GROUP), tl.float32)
        for k in tl.static_range(1, 8):
            level = tl.where(tl.abs(code) == k, LEVELS[k], level)
        m = tl.where(code < 0, -level, level) * size
        g = tl.load(g_ptr + row * cols + col, inside, other=0.0).to(tl.float32)
        m += (g - m) * rate
        tl.store(g_ptr + row * cols + col, m + own * g, inside)

        # its new codes
        size = tl.max(tl.abs(m), axis=1, keep_dims=True)
        tl.store(size_ptr + size_at, size, row < rows)
        code = tl.zeros((BLOCK_M, GROUP), tl.int32)
        for k in tl.static_range(7):
            code += (tl.abs(m) >= BOUNDS[k] * size).to(tl.int32)
        code = tl.where(m == 0, 8, tl.where(m < 0, 8 - code, 8 + code))
        low, high = tl.split(tl.reshape(code, (BLOCK_M, GROUP // 2, 2)))
        byte = (tl.program_id(1) * GROUP // 2 + tl.arange(0, GROUP // 2))[None, :]
        inside = (row < rows) & (byte < row_bytes)
        tl.store(m_ptr + row * row_bytes + byte, (low | high << 4).to(tl.uint8), inside)
