"""
Muon (K. Jordan, 2024), which keeps of its momentum what lies in the subspace.

W moves by the orthogonal factor, block by block, of P M + GRADIENT G, at the size of a step of Adam
(arXiv 2502.16982, section 2.2). M is the momentum of R. G is the gradient of this step alone: it
reaches the directions that P leaves out. Experimental: docs/results.md has what it is worth.
"""

import torch
import torch.nn.functional as F

from kernels import symmetric
from kernels.launch import with_kernel
from kernels.moments import adam_int8_
from kernels.subspace import frobenius
from kernels.sums import Sum
from methods.fira import READS, Fira
from methods.registry import FLOATS, register
from quant import add_low_rank_int8_, dequantize_int8, quantize_int8

GRADIENT = 0.4  # of a step's own gradient, beside the momentum
LIKE_ADAM = 0.2  # root of the mean square of its step in a square weight
BLOCKS = 4  # of a weight's longer side, each of which becomes orthogonal
TINY = 1e-35  # a size that is divided by is no less

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
            ones = torch.ones(max(g.shape), device=g.device)
            codes = (self.m, self.m_scale, self.m_zero)
            adam_int8_(*codes, g, ones[: len(g)], ones[: g.shape[1]], betas[0], 1.0, 0.0, key)

    def add_(self, left, right, shrink, key):
        """m <- shrink m + left^T right, left (T, rows), right (T, cols)."""
        if self.kind == "float32":
            self.m.mul_(shrink).add_(left.T @ right)
        else:
            codes = (self.m, self.m_scale, self.m_zero)
            add_low_rank_int8_(*codes, left.T, right.T, shrink, key, poison=True)

    def take_(self, dtype=torch.float32):
        """m, from INT8 in dtype; what is left is 0."""
        if self.kind == "float32":
            m = self.m
            self.m = torch.zeros_like(m)
            return m
        m = dequantize_int8(self.m, self.m_scale, self.m_zero, dtype)
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

    def add_(self, lefts, right, key):
        r, *rest = lefts
        shrink = 1.0 if self.first or self.added else 0.0
        self.momentum.add_(r * (1 / self.beta - 1), right, shrink, key ^ len(lefts))
        super().add_(rest, right, key)

    def value(self, dtype=torch.float32):
        # that step makes it beta m
        r = self.momentum.take_(dtype).mul_(self.beta / (1 - self.beta))
        return torch.cat([r, super().value(dtype)])


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
        below = what == "gradient" and self.blocks > 1  # R lies there, above the rows of G
        if below and o.accumulation == "int8" and beta > 1e-6 and not o.grad_clip:
            first = o.ranks.rank == 0
            return SumInMomentum(self.moments, beta, first, rows, cols, o.device)
        return super().new_sum(what, rows, cols)

    def drop(self):
        """Micro-batches that are in the momentum cannot be told from it: it starts anew."""
        if isinstance(self.sums.get("gradient"), SumInMomentum):
            self.moments.take_()
        super().drop()

    def factors(self, x, dy):
        """Of G alone, where a step looks at all its rows: R comes from their sum."""
        if self.blocks > 1:
            return super().factors(x, dy)
        a, b = self.projection.sides(x, dy)
        return (a,), b

    def norm(self, gradient):
        """Of G, as far as its rows tell: R may have been summed up in the momentum."""
        if self.blocks == 1:
            return frobenius(gradient)
        return frobenius(gradient[self.projection.rank :]) * self.blocks**0.5

    def direction(self, gradient):
        gradient = gradient.to(self.dtype)
        p = self.projection.matrix(self.dtype)  # (dim, rank)
        if self.blocks == 1:  # gradient is G
            # adam_: the momentum's step
            step = gradient.addmm_(p, self.adam_(p.T @ gradient), beta=GRADIENT)
        else:
            r, g = gradient.tensor_split([self.projection.rank])  # (rank, other), (rows, other)
            step = p @ self.adam_(r)
            step[self.rows()].add_(g, alpha=GRADIENT * self.blocks)
        size = LIKE_ADAM * max(step.shape) ** 0.5
        return None, orthogonal(step, self.projection.right, size)


def orthogonal(x, right, factor):
    """factor times about U V^T of each of BLOCKS blocks of columns of x, U S V^T.

    x: (rows, cols), in the dtype of the products; overwritten. Each polynomial of NEWTON_SCHULZ, an
    iteration, brings the singular values nearer to 1. Blocks take fewer operations than the whole,
    and are no worse (docs/results.md). Returns (rows, cols), with `right` a transposed view, so
    that W's step is contiguous: the step and x are all the memory of x's size."""
    rows, cols = x.shape
    if cols % BLOCKS:  # the last block is filled with zeros
        x = F.pad(x, (0, -cols % BLOCKS))
    width = x.shape[1] // BLOCKS
    if right:
        step = x.new_empty(x.shape[1], rows)
        into = step.view(BLOCKS, width, rows).mT
        step = step.T
    else:
        step = torch.empty_like(x)
        into = step.view(rows, BLOCKS, width).transpose(0, 1)
    y = x.view(rows, BLOCKS, width).transpose(0, 1)  # (BLOCKS, rows, width)
    size = None
    for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
        # y keeps the size that it came with: gram is divided by the size's square
        gram = gram_matrix(y if rows <= width else y.mT, size)
        if i == 0:  # its norm bounds the square of the largest singular value
            size = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True).clamp_(min=TINY)
            gram.div_(size)
        if i < len(NEWTON_SCHULZ) - 1:
            z = polynomial(gram, a, b, c)
        else:
            z = polynomial(gram, a * factor, b * factor, c * factor, size)
        del gram  # the largest weight's take 60 MB
        torch.bmm(*((z, y) if rows <= width else (y, z)), out=into)
        del z
        y, into = into, y
    return step[:, :cols]


@with_kernel(symmetric.gram_matrix, share=0.5)  # half of a symmetric product
def gram_matrix(y, size=None):
    """y y^T of each matrix of y (n, rows, cols): (n, rows, rows), divided by size (n, 1, 1)."""
    gram = y @ y.mT
    return gram if size is None else gram.div_(size)


@with_kernel(symmetric.polynomial, share=0.5)
def polynomial(x, a, b, c, size=None):
    """a + b X + c X^2 of each symmetric X of x (n, rows, rows), divided by the root of
    size (n, 1, 1)."""
    result = torch.baddbmm(x, x, x, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result if size is None else result.mul_(size.rsqrt())
