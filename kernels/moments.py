"""
What is kept of a gradient from one step to the next, in 1 to 8 bytes an element: Adam's moments.

At LLaMA-7B and rank 1024 the low-rank gradients have 1.62 billion elements: each byte is 1.5 GiB.
"""

import math
from typing import NamedTuple

import torch

from kernels import adam
from kernels.launch import chunks, with_kernel
from kernels.subspace import frobenius
from quant import (CHUNK, GROUP_SIZE, _blocks, _requantize_int8_, bitsandbytes,
                   dequantize_int8)

MIN_8BIT = 4096  # smaller tensors keep float32 moments, as in bitsandbytes


class Record(NamedTuple):
    """Where a gradient's norm is noted, on its device. Whoever notes it masks and clips, too: a
    gradient that is not finite counts as zero."""

    norms: torch.Tensor  # (n,) float32: those of all gradients
    skipped: torch.Tensor  # () float32: how many were not finite
    place: int  # of this one in norms
    clip: float  # if positive: the norm that all together are scaled down to


# -----------------------------------------------------------------------------
# a step's passes; on a GPU each is one kernel of adam.py


@with_kernel(adam.squares)
def squares(g):
    """(n,) float32, that sum up to the squares of g, of any shape and float dtype."""
    return frobenius(g).square().view(1)


@with_kernel(adam.squares_by_side)
def squares_by_side(g):
    """(parts, rows) and (parts, cols) float32, that sum up over their parts to the squares of each
    row and each column of g (rows, cols), any float dtype."""
    by_row = torch.empty(1, len(g), device=g.device)
    by_col = torch.zeros(1, g.shape[1], device=g.device)
    rows = max(1, CHUNK // g.shape[1])  # float32 at a time
    for start in chunks(g, len(g), rows):
        square = g[start : start + rows].float().square()
        by_row[0, start : start + rows] = square.sum(dim=1)
        by_col += square.sum(dim=0)
    return by_row, by_col


def note(total, record):
    """Note the norm of a gradient whose squares sum up to `total`, () float32.

    Returns what it is multiplied by, () float32: 0 where it is not finite, else at most 1."""
    norm = total.sqrt()
    finite = norm.isfinite()
    record.skipped.add_(~finite)
    record.norms[record.place] = norm.where(finite, 0)
    factor = finite.float()
    if record.clip:
        factor *= (record.clip / record.norms.norm()).clamp(max=1)
    return factor


def scale_(g, factor):
    """g *= factor, where a factor of 0 takes away NaN, too."""
    return g.mul_(factor).masked_fill_(factor == 0, 0)


@with_kernel(adam.mask_)
def mask_(g, parts, record, norm=None):
    """Note the norm of g, of any shape and float dtype, contiguous; mask and clip it in place.

    parts: its squares(). norm: see take_."""
    total = parts.sum()
    if norm is not None:
        total = norm.square() + total * 0  # not finite where either is not
    scale_(g, note(total, record))


def take_(g, record, norm=None):
    """Note the norm of g, of any shape and float dtype, contiguous; mask and clip it in place.

    norm: () float32 that is noted in place of g's own, or None."""
    mask_(g, squares(g), record, norm)


@with_kernel(adam.second_moment)
def second_moment(row, col, by_row, by_col, beta, age, record=None):
    """What the squares of a gradient (rows, cols) make of a factored second moment.

    row (rows,), col (cols,) float32: the factors before. by_row, by_col: squares_by_side().
    beta, age: of the decay, and the steps so far, this one included. record: notes its norm.
    Returns the new row and col; the factors (rows,), (cols,) of the moment's root, its bias
    corrected; what the gradient is to be multiplied by, () float32, or None without a record."""
    rows = len(row)
    cols = len(col)
    by_row = by_row.sum(dim=0)
    by_col = by_col.sum(dim=0)
    factor = None
    if record is not None:
        factor = note(by_row.sum(), record)
        scale_(by_row, factor.square())
        scale_(by_col, factor.square())
    row = row.lerp(by_row / cols, 1 - beta)
    col = col.lerp(by_col / rows, 1 - beta)
    # the second moment is row_i col_j / mean
    mean = row.mean() * (1 - beta**age)
    row_root = (row / mean.clamp_(min=1e-37)).sqrt_()
    return row, col, row_root, col.sqrt(), factor


@with_kernel(adam.adam_int8_)
def adam_int8_(m, scale, zero, g, row, col, beta, correction, eps, key, factor=None, rate=1.0):
    """A step of Adam with an INT8 first moment, and a second that is a row times a column.

        g <- factor * g
        m <- round(beta * m + (1 - beta) * g)
        g <- rate * m / correction / (row_i * col_j + eps)     m before it is rounded

    m int8 (rows, cols), scale, zero float32 (rows, n_groups), g (rows, cols) any float dtype:
    overwritten. row (rows,), col (cols,) float32: roots of the second moment's factors.
    correction: 1 - beta^step. key: a rounding_key. factor: () float32, where 0 takes away NaN, too,
    or None: 1.
    """
    for at, start in _blocks(m):
        part = g[at].float()  # g itself, where it is float32
        if factor is not None:
            scale_(part, factor)
        new = dequantize_int8.plain(m[at], scale[at], zero[at]).lerp_(part, 1 - beta)
        root = torch.outer(row[at], col).add_(eps)
        g[at] = (new / root.mul_(correction)).mul_(rate)
        _requantize_int8_(m[at], scale[at], zero[at], new, key, start)


@with_kernel(adam.adam_float32_)
def adam_float32_(m, v, g, betas, age, eps, rate=1.0, parts=None, record=None):
    """g <- rate * Adam(g) with both moments, m and v, in float32, which are overwritten.

    m, v, g: contiguous, of one shape; g any float dtype. age: steps so far, this one included.
    record: notes the norm of g from `parts`, its squares(), and g is masked and clipped."""
    if record is not None:
        scale_(g, note(parts.sum(), record))
    m.lerp_(g.float(), 1 - betas[0])
    v.lerp_(g.float().square(), 1 - betas[1])
    root = (v / (1 - betas[1] ** age)).sqrt_().add_(eps)
    g.copy_((m / root.mul_(1 - betas[0] ** age)).mul_(rate))  # both bias corrections


# -----------------------------------------------------------------------------
# what is kept


class Moments:
    """Adam's two moments of one tensor, by kind:

    "factored": the first in INT8, rounded stochastically; the second as a row and a column,
        v_ij = row_i col_j / mean (Adafactor, arXiv 1804.04235, section 3). 1 byte an element
    "8bit": both as block-wise 8-bit codes, kept and stepped by bitsandbytes. 2 bytes
    "float32": 8 bytes; also taken for vectors and small tensors"""

    def __init__(self, shape, kind, device=None):
        n = math.prod(shape)
        self.age = 0  # steps taken
        self.kind = kind if len(shape) > 1 and n >= MIN_8BIT else "float32"
        if self.kind == "factored":
            rows, cols = shape  # of R, or of a matrix
            groups = -(-cols // GROUP_SIZE)
            self.m = torch.zeros(shape, dtype=torch.int8, device=device)
            self.m_scale = torch.zeros(rows, groups, device=device)
            self.m_zero = torch.zeros(rows, groups, device=device)
            self.row = torch.zeros(rows, device=device)
            self.col = torch.zeros(cols, device=device)
        elif self.kind == "8bit":
            self.m = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.v = torch.zeros(shape, dtype=torch.uint8, device=device)
            self.m_max = torch.zeros(-(-n // 256), device=device)
            self.v_max = torch.zeros(-(-n // 256), device=device)
            # its tables of 256 values, 2 KiB
            self.m_codes, self.v_codes = (codes.to(device) for codes in bitsandbytes()[1])
        else:
            self.m = torch.zeros(shape, device=device)
            self.v = torch.zeros(shape, device=device)

    def step_(self, g, betas, eps, key=0, rate=1.0, record=None):
        """g <- rate * Adam(g) in place: what a weight moves by.

        g: contiguous, any float dtype. key: of the numbers that round the first moment. record:
        notes the norm of g, which is masked and clipped; without one g is taken as it is."""
        self.age += 1
        if self.kind == "factored":
            sums = squares_by_side(g)
            moment = second_moment(self.row, self.col, *sums, betas[1], self.age, record)
            self.row, self.col, row, col, factor = moment
            codes = (self.m, self.m_scale, self.m_zero)
            correction = 1 - betas[0] ** self.age
            adam_int8_(*codes, g, row, col, betas[0], correction, eps, key, factor, rate)
        elif self.kind == "8bit":
            if record is not None:
                take_(g, record)
            self._step_8bit_(g, betas, eps)
            if rate != 1:
                g.mul_(rate)
        else:
            parts = None if record is None else squares(g)
            adam_float32_(self.m, self.v, g, betas, self.age, eps, rate, parts, record)

    def _step_8bit_(self, g, betas, eps):
        update = bitsandbytes()[0].optimizer_update_8bit_blockwise
        parts = [t.view(-1).split(CHUNK) for t in (g, self.m, self.v)]
        maxima = [t.split(CHUNK // 256) for t in (self.m_max, self.v_max)]
        for g, m, v, m_max, v_max in zip(*parts, *maxima):
            minus_n = torch.zeros_like(g)  # a weight of 0, moved at a rate of 1
            codes = (self.m_codes, self.v_codes, m_max, v_max)
            update("adam", g, minus_n, m, v, *betas, 0.0, 0.0, eps, self.age, 1.0, *codes)
            torch.neg(minus_n, out=g)
