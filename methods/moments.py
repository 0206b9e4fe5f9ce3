"""
What an optimizer keeps of a gradient: Adam's two moments, and the sum of a step's micro-batches, in 1 to 8 bytes an
element. At LLaMA-7B and rank 1024 the low-rank gradients have 1.62 billion elements: each byte is 1.5 GiB.
"""

import math
from functools import partial

import torch

from kernels.quantized import adam_int8_, add_low_rank_int8_, dequantize_int8
from quant import CHUNK, GROUP_SIZE, add_bfloat16_, bitsandbytes, chunks, quantize_int8

MIN_8BIT = 4096  # smaller tensors and vectors keep float32 moments, as in bitsandbytes
MOMENTS = ("factored", "8bit", "float32")
AT_REFRESH = ("keep", "reset", "rotate")
ACCUMULATION = ("int8", "bfloat16", "float32")


class Moments:
    """Adam's two moments of one tensor. kind:

    "factored": the first in INT8, rounded stochastically; the second as a row and a column, v_ij = row_i col_j / mean
        (Adafactor, arXiv 1804.04235, section 3): 1 byte an element
    "8bit": both as block-wise 8-bit codes, kept and stepped by bitsandbytes: 2 bytes
    "float32": 8 bytes; also taken for vectors and small tensors
    """

    def __init__(self, shape, kind, device=None):
        n, zeros = math.prod(shape), partial(torch.zeros, device=device)
        self.age = 0  # steps taken
        self.kind = kind if len(shape) > 1 and n >= MIN_8BIT else "float32"
        if self.kind == "factored":
            rows, cols = shape
            self.m, self.m_scale, self.m_zero = zeros(shape, dtype=torch.int8), *zeros(2, rows, -(-cols // GROUP_SIZE))
            self.row, self.col = zeros(rows), zeros(cols)
        elif self.kind == "8bit":
            self.m, self.v = zeros(2, *shape, dtype=torch.uint8)
            self.m_max, self.v_max = zeros(2, -(-n // 256))
            self.m_codes, self.v_codes = (codes.to(device) for codes in bitsandbytes()[1])
        else:
            self.m, self.v = zeros(2, *shape)

    def step_(self, g, betas, eps, key=0):
        """g <- Adam(g) in place: what a weight moves by at a rate of -1. g: contiguous. key: of the random numbers that
        round the first moment."""
        self.age += 1
        correction = [1 - beta**self.age for beta in betas]
        if self.kind == "factored":
            row, col, size = torch.empty_like(self.row), torch.zeros_like(self.col), max(1, CHUNK // g.shape[1])
            for start in chunks(g, len(g), size):
                square = g[start : start + size].float().square()
                row[start : start + size] = square.mean(dim=1)
                col += square.sum(dim=0)
            self.row.lerp_(row, 1 - betas[1])
            self.col.lerp_(col / len(g), 1 - betas[1])
            row = (self.row / (self.row.mean() * correction[1]).clamp_(min=1e-30)).sqrt_()
            adam_int8_(self.m, self.m_scale, self.m_zero, g, row, self.col.sqrt(), betas[0], correction[0], eps, key)
        elif self.kind == "8bit":
            flat = [t.view(-1).split(CHUNK) for t in (g, self.m, self.v)]
            maxima = [t.split(CHUNK // 256) for t in (self.m_max, self.v_max)]
            for g, m, v, m_max, v_max in zip(*flat, *maxima):
                minus_n = torch.zeros_like(g)
                bitsandbytes()[0].optimizer_update_8bit_blockwise(
                    "adam", g, minus_n, m, v, *betas, 0.0, 0.0, eps, self.age, 1.0, self.m_codes, self.v_codes,
                    m_max, v_max)
                torch.neg(minus_n, out=g)
        else:
            self.m.lerp_(g.float(), 1 - betas[0])
            self.v.lerp_(g.float().square(), 1 - betas[1])
            g.copy_(self.m / (self.v / correction[1]).sqrt_().add_(eps).mul_(correction[0]))

    def turn_(self, how, overlap):
        """Follow the projection to a new basis: "keep" the moments as they are, "reset" them, or "rotate" them into it
        by overlap = old^T new (rank, rank). A second moment rotates by the squares, as if the entries of a column were
        not correlated; what is new in the new basis takes the column's mean. The tensor's rows follow the basis."""
        if how == "reset":
            self.age = 0
            for name in ("m", "v", "m_scale", "m_zero", "m_max", "v_max", "row", "col"):
                if name in vars(self):
                    getattr(self, name).zero_()
        elif how == "rotate":
            squares = overlap.T.square()
            rotated = lambda v: squares @ v + (1 - squares.sum(dim=1, keepdim=True)).clamp_(min=0) * v.mean(dim=0)
            if self.kind == "factored":
                m = overlap.T @ dequantize_int8(self.m, self.m_scale, self.m_zero)
                self.m, self.m_scale, self.m_zero = quantize_int8(m)
                self.row = rotated(self.row[:, None])[:, 0]
            elif self.kind == "8bit":
                bnb = bitsandbytes()[0]
                decode = lambda q, top, codes: bnb.dequantize_blockwise(q, absmax=top, code=codes, blocksize=256)
                m = overlap.T @ decode(self.m, self.m_max, self.m_codes)
                v = rotated(decode(self.v, self.v_max, self.v_codes))
                for name, value in (("m", m), ("v", v)):
                    q, state = bnb.quantize_blockwise(value, code=getattr(self, f"{name}_codes"), blocksize=256)
                    setattr(self, name, q), setattr(self, f"{name}_max", state.absmax)
            else:
                self.m, self.v = overlap.T @ self.m, rotated(self.v)


class Momentum:
    """The first moment alone, of a low-rank gradient: Muon's. kind: "float32", 4 bytes an element; else INT8, 1 byte,
    rounded stochastically."""

    def __init__(self, shape, kind, device=None):
        self.kind = kind
        self._set(torch.zeros(shape, device=device))

    def _set(self, m):
        if self.kind == "float32":
            self.m = m
        else:
            self.m, self.m_scale, self.m_zero = quantize_int8(m)

    def step_(self, g, betas, eps, key=0):
        """g <- m <- beta m + (1 - beta) g. Arguments: as for Moments; eps is not used."""
        if self.kind == "float32":
            g.copy_(self.m.lerp_(g.float(), 1 - betas[0]))
        else:
            row, col = (torch.ones(n, device=g.device) for n in g.shape)
            adam_int8_(self.m, self.m_scale, self.m_zero, g, row, col, betas[0], 1.0, 0.0, key)

    def add_(self, left, right, shrink, key):
        """m <- shrink m + left^T right, left (T, rows), right (T, cols)."""
        if self.kind == "float32":
            self.m.mul_(shrink).addmm_(left.T.float(), right.float())
        else:
            codes = self.m, self.m_scale, self.m_zero
            add_low_rank_int8_(*codes, left.T.contiguous(), right.T.contiguous(), shrink, key)

    def take_(self):
        """m, float32; what is left is 0."""
        if self.kind == "float32":
            m, self.m = self.m, torch.zeros_like(self.m)
            return m
        m = dequantize_int8(self.m, self.m_scale, self.m_zero)
        self.m_scale.zero_(), self.m_zero.zero_()
        return m

    def turn_(self, how, overlap):
        """As for Moments."""
        if how != "keep":
            m = self.m if self.kind == "float32" else dequantize_int8(self.m, self.m_scale, self.m_zero)
            self._set(overlap.T @ m if how == "rotate" else torch.zeros_like(m))


class Sum:
    """A matrix (rows, cols) that a step's micro-batches add up in. kind: "float32", 4 bytes an element; "bfloat16", 2,
    or "int8", 1 and 8 bytes a group: both rounded stochastically at every addition."""

    def __init__(self, rows, cols, kind, device):
        zeros = partial(torch.zeros, device=device)
        if kind == "int8":
            self.finite = torch.ones((), dtype=torch.bool, device=device)  # INT8 has no NaN
            self.codes = zeros(rows, cols, dtype=torch.int8), *zeros(2, rows, -(-cols // GROUP_SIZE))
        else:
            self.total = zeros(rows, cols, dtype=getattr(torch, kind))
        self.kind, self.added = kind, 0

    def add_(self, left, right, key):
        """self += left^T right, left (T, rows), right (T, cols)."""
        self.added += 1
        if self.kind == "int8":
            self.finite &= (left.sum() + right.sum()).isfinite()
            add_low_rank_int8_(*self.codes, left.T.contiguous(), right.T.contiguous(), 1.0, key)
        elif self.kind == "bfloat16":
            add_bfloat16_(self.total, left.T @ right, 1.0, key)
        else:
            self.total += left.T @ right

    def set_(self, value):
        if self.kind == "int8":
            self.codes = quantize_int8(value)
        else:
            self.total.copy_(value)

    def value(self):
        """(rows, cols) float32; all NaN in "int8" if anything that was added was not finite."""
        if self.kind == "int8":
            return dequantize_int8(*self.codes).masked_fill_(~self.finite, torch.nan)
        return self.total.float()


class SumInMomentum(Sum):
    """A Sum whose first rows, the low-rank gradient, take no memory: they add up in the momentum that they are for.
    Before its step m <- beta m + (1 - beta) r, m + (1 / beta - 1) r is the same. Of several ranks the first adds to m, the
    others to 0. After a gradient that is not finite m starts anew."""

    def __init__(self, momentum, beta, first, rows, cols, device):
        self.momentum, self.beta, self.first = momentum, beta, first
        super().__init__(rows - len(momentum.m), cols, "int8", device)

    def add_(self, left, right, key):
        r, rest = left.tensor_split([len(self.momentum.m)], dim=1)
        shrink = 1.0 if self.first or self.added else 0.0
        self.finite &= r.sum().isfinite()  # r is of all rows of the gradient, the rest may be of some
        self.momentum.add_(r * (1 / self.beta - 1), right, shrink, key ^ 1)
        super().add_(rest, right, key)

    def value(self):
        r = self.momentum.take_().mul_(self.beta / (1 - self.beta))  # of which that step makes beta m
        return torch.cat([r, super().value()])
