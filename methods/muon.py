"""
Muon (K. Jordan, 2024), which keeps of its momentum what lies in the subspace.

W moves by the orthogonal factor, block by block, of P M + GRADIENT G, at the size of a step of Adam
(arXiv 2502.16982, section 2.2). M is the momentum of R. G is the gradient of this step alone: it
reaches the directions that P leaves out. Experimental: docs/results.md has what it is worth.
"""

import torch

from kernels.moments import Sum, adam_int8_
from kernels.subspace import frobenius
from methods.fira import READS, Fira
from methods.registry import FLOATS, register
from quant import add_low_rank_int8_, dequantize_int8, quantize_int8

GRADIENT = 0.4  # of a step's own gradient, beside the momentum
LIKE_ADAM = 0.2  # root of the mean square of its step in a square weight
BLOCKS = 4  # of a weight's longer side, each of which becomes orthogonal

# a x + b x^3 + c x^5: nearest to 1 on [0.02, 1], then on what the one before makes of that: within
# 0.124 of 1 (arXiv 2505.16932, section 3); upper ends are 5 % further out, for bfloat16's rounding
NEWTON_SCHULZ = (
    (7.377, -19.2213, 12.8168),
    (3.1379, -2.1495, 0.4044),
    (2.2168, -1.491, 0.3467),
)


class Momentum:
    """The first moment alone, of a low-rank gradient.

    kind: "float32", 4 bytes an element; else INT8, 1 byte, rounded stochastically."""

    def __init__(self, shape, kind, device=None):
        self.kind = kind
        m = torch.zeros(shape, device=device)  # (rank, other)
        if kind == "float32":
            self.m = m
        else:
            self.m, self.m_scale, self.m_zero = quantize_int8(m)

    def step_(self, g, betas, eps, key=0):
        """g <- m <- beta m + (1 - beta) g. Arguments: as for Moments; eps is not used."""
        if self.kind == "float32":
            g.copy_(self.m.lerp_(g.float(), 1 - betas[0]))
        else:
            # Adam's kernel with a second moment of 1: the momentum alone
            row = torch.ones(len(g), device=g.device)
            col = torch.ones(g.shape[1], device=g.device)
            codes = (self.m, self.m_scale, self.m_zero)
            adam_int8_(*codes, g, row, col, betas[0], 1.0, 0.0, key)

    def add_(self, left, right, shrink, key):
        """m <- shrink m + left^T right, left (T, rows), right (T, cols)."""
        if self.kind == "float32":
            self.m.mul_(shrink).addmm_(left.T.float(), right.float())
        else:
            codes = (self.m, self.m_scale, self.m_zero)
            left, right = left.T.contiguous(), right.T.contiguous()
            add_low_rank_int8_(*codes, left, right, shrink, key)

    def take_(self):
        """m, float32; what is left is 0."""
        if self.kind == "float32":
            m = self.m
            self.m = torch.zeros_like(m)
            return m
        m = dequantize_int8(self.m, self.m_scale, self.m_zero)
        self.m_scale.zero_()
        self.m_zero.zero_()
        return m


class SumInMomentum(Sum):
    """A Sum whose first rows, the low-rank gradient, add up in the momentum: no memory.

    Before the step m <- beta m + (1 - beta) r, m + (1 / beta - 1) r is the same. Of several ranks
    the first adds to m, the others to 0. After a gradient that is not finite m starts anew."""

    def __init__(self, momentum, beta, first, rows, cols, device):
        self.momentum = momentum
        self.beta = beta
        self.first = first
        super().__init__(rows - len(momentum.m), cols, "int8", device)

    def add_(self, left, right, key):
        r, rest = left.tensor_split([len(self.momentum.m)], dim=1)
        shrink = 1.0 if self.first or self.added else 0.0
        self.finite &= r.sum().isfinite()  # r is of all rows of the gradient, the rest of some
        self.momentum.add_(r * (1 / self.beta - 1), right, shrink, key ^ 1)
        super().add_(rest, right, key)

    def value(self):
        r = self.momentum.take_().mul_(self.beta / (1 - self.beta))  # that step makes it beta m
        return torch.cat([r, super().value()])


@register("qmuon", "Muon on INT8 weights, its momentum INT8 in the subspace; experimental",
          reads=READS)
@register("muon", "the same with float weights, bases and momentum", weight_bits=(16, 8),
          reads=READS, fixes=FLOATS)
class Muon(Fira):
    """W moves by the orthogonal factors of P M + GRADIENT G. R and G are gathered, as by Fira."""

    def new_moments(self, shape):
        return Momentum(shape, self.optimizer.moments, self.optimizer.device)

    def new_sum(self, what, rows, cols):
        """Of a gradient in its momentum, unless that has another use or a finer sum is wanted."""
        o = self.optimizer
        beta = o.betas[0]
        if what == "gradient" and o.accumulation == "int8" and beta > 1e-6 and not o.grad_clip:
            first = o.ranks.rank == 0
            return SumInMomentum(self.moments, beta, first, rows, cols, o.device)
        return super().new_sum(what, rows, cols)

    def drop(self):
        """Micro-batches that are in the momentum cannot be told from it: it starts anew."""
        if isinstance(self.sums.get("gradient"), SumInMomentum):
            self.moments.take_()
        super().drop()

    def norm(self, gradient):
        """Of G, as far as its rows tell: R may have been summed up in the momentum."""
        return frobenius(gradient[self.projection.rank :]) * self.blocks**0.5

    def direction(self, gradient):
        r, g = gradient.tensor_split([self.projection.rank])  # (rank, other), (rows, other)
        step = self.among_all(g.mul_(GRADIENT * self.blocks))
        step.addmm_(self.projection.matrix(), self.adam_(r))  # adam_: the momentum's step
        orthogonal_(step, self.dtype)
        return None, step.mul_(LIKE_ADAM * max(step.shape) ** 0.5)


def orthogonal_(x, dtype):
    """x <- about U V^T of each of BLOCKS blocks of its longer side, U S V^T.

    Each polynomial of NEWTON_SCHULZ, an iteration in dtype, brings the singular values nearer to 1.
    Blocks take fewer operations than the whole, and are no worse (docs/results.md)."""
    for block in x.tensor_split(BLOCKS, dim=int(x.shape[0] <= x.shape[1])):
        wide = block.shape[0] <= block.shape[1]
        y = (block / (block.norm() + 1e-12)).to(dtype)
        y = y if wide else y.T
        for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
            gram = y @ y.T
            if i == 0:  # its norm bounds the largest singular value's square closer than y's
                size = gram.norm() + 1e-12
                y = y / size.sqrt()
                gram = gram / size
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            y = torch.addmm(y, polynomial, y, beta=a)
        block.copy_(y if wide else y.T)
    return x
