"""
The bases of rules that look at the whole gradient: with a subspace, and without.
"""

import math

from kernels.matmul import gradient_int8
from kernels.subspace import frobenius
from qgalore import ProjectedWeight

READS = ("galore_scale", "accumulation", "stochastic_rounding", "matmul")  # without a subspace


class WholeGradient(ProjectedWeight):
    """What is gathered is G (dim, other), the smaller side of W first.

    With matmul "int8" both factors of G are rounded to INT8, too (kernels/matmul.py)."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.layer.matmul == "int8":
            self.multiply = gradient_int8

    def factors(self, x, dy):
        a, b = self.projection.sides(x, dy)  # (T, dim), (T, other)
        return (a,), b

    def norm(self, gradient):
        return frobenius(gradient)

    def parts(self, g):
        """P (dim, rank), R = P^T G (rank, other), S = G - P R in G's memory."""
        g = g.to(self.dtype)  # in which it came, but for sums in float32
        p = self.projection.matrix(self.dtype)
        r = p.T @ g
        return p, r, g.addmm_(p, r, alpha=-1)


class WithoutBasis(WholeGradient):
    """No subspace is kept, and none comes from a gradient."""

    def __init__(self, *args):
        super().__init__(*args)
        self.projection.basis = ()
        self.projection.next_refresh = math.inf

    def empty_basis(self):
        return ()
