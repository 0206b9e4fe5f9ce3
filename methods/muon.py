"""
Muon (K. Jordan, 2024) on INT8 weights, its momentum in 4 bits.

W moves by the orthogonal factor, block by block, of M + GRADIENT G, at the size of a step of Adam
(arXiv 2502.16982, section 2.2). M is the momentum (kernels/momentum.py), G the gradient of this
step. There is no basis, and no second moment: at 7B 3.2 GiB are kept beside the weights.
"""

import torch
import torch.nn.functional as F

from kernels import symmetric
from kernels.launch import with_kernel
from kernels.momentum import Momentum
from methods.registry import register
from methods.whole_gradient import READS, WithoutBasis

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


@register("qmuon", "Muon on INT8 weights, its momentum in 4 bits", reads=(*READS, "moments"))
@register("muon", "the same with float weights and momentum", weight_bits=(16, 8), reads=READS,
          fixes={"moments": "float32"})
class Muon(WithoutBasis):
    """W moves by the orthogonal factors of M + GRADIENT G."""

    def new_moments(self, shape):
        side = self.projection.dim, self.projection.other
        return Momentum(side, self.optimizer.moments, self.optimizer.device)

    def direction(self, gradient):
        gradient = gradient.to(self.dtype)
        self.moments.step_(gradient, self.optimizer.betas[0], GRADIENT)
        size = LIKE_ADAM * max(gradient.shape) ** 0.5
        return None, orthogonal(gradient, self.projection.right, size)


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
