"""
Fira (arXiv 2410.01623): what low rank throws away moves W, too.
"""

import torch

from kernels.subspace import frobenius
from methods.registry import FLOATS, SUBSPACE, register
from qgalore import ProjectedWeight

GROWTH = 1.01  # the largest ratio of a step's norm to the last one's

READS = SUBSPACE + ("residual_blocks",)


@register("qfira", "Q-GaLore, and Fira's residual", reads=READS)
@register(
    "fira",
    "GaLore, and the residual of the gradient, scaled as Adam scales its neighbour",
    weight_bits=(16, 8),
    reads=READS,
    fixes=FLOATS,
)
class Fira(ProjectedWeight):
    """W moves by P N + phi S: S = G - P R, each column scaled by the factor by which Adam changed
    R's column.

    What is gathered is R (rank, other) and below it G. With residual_blocks > 1 a step looks at
    each residual_blocks-th row of G, in turn, and moves it so many times as far: sums of
    micro-batches and ranks are as much smaller."""

    options = ("residual_blocks",)

    def __init__(self, *args, residual_blocks=1):
        super().__init__(*args)
        self.blocks = residual_blocks

    def rows(self):
        """Those of G and P that this step looks at."""
        return slice(self.step % self.blocks, None, self.blocks)

    def factors(self, x, dy):
        lefts, right = super().factors(x, dy)
        a, _ = self.projection.sides(x, dy)  # (T, dim)
        return (*lefts, a[:, self.rows()]), right  # R's factor, then G's

    def among_all(self, g):
        """The rows that this step looks at, and zeros for all others: (dim, other)."""
        if self.blocks == 1:
            return g
        whole = g.new_zeros(self.projection.dim, self.projection.other)
        whole[self.rows()] = g
        return whole

    def norm(self, gradient):
        return frobenius(gradient[: self.projection.rank])

    def direction(self, gradient):
        gradient = gradient.to(self.dtype)  # in which it came, but for sums in float32
        p = self.projection.matrix(self.dtype)  # (dim, rank)
        r, g = gradient.tensor_split([self.projection.rank])
        rest = g.addmm_(p[self.rows()], r, alpha=-1)  # S
        before = norms(r)
        n = self.adam_(r)  # (rank, other), in r's memory
        phi = self.blocks * norms(n) / (before + 1e-8)  # (other,)
        rest = limit_growth_(self.state, rest.mul_(phi))
        return None, self.among_all(rest).addmm_(p, n)


def norms(x):
    """Of x's columns, float32."""
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)


def limit_growth_(state, step):
    """Shrink a step that is more than GROWTH times as long as the last; state keeps its norm."""
    finer = torch.promote_types(step.dtype, torch.float32)  # bfloat16 does not tell GROWTH from 1
    norm = torch.linalg.vector_norm(step, dtype=finer)  # () on the device
    before = state.get("norm")
    if before is not None:  # a step of nothing, from a gradient not finite, bounds none after it
        excess = ((norm / (before + 1e-8)).clamp_(min=GROWTH) / GROWTH).where(before > 0, 1)
        step /= excess
        norm = (norm / excess).where(norm > 0, before)
    state["norm"] = norm
    return step
