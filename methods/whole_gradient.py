"""
The base of rules that look at the whole gradient, and keep no basis.
"""

import math

from kernels.matmul import gradient_int8
from kernels.subspace import frobenius
from qgalore import ProjectedWeight

READS = ("galore_scale", "accumulation", "stochastic_rounding", "matmul")


class WholeGradient(ProjectedWeight):
    """What is gathered is G (dim, other), the smaller side of W first.

    With matmul "int8" both factors of G are rounded to INT8, too (kernels/matmul.py)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.projection.basis = ()  # none is kept, and none comes from a gradient
        self.projection.next_refresh = math.inf
        if self.layer.matmul == "int8":
            self.multiply = gradient_int8

    def empty_basis(self):
        return ()

    def factors(self, x, dy):
        a, b = self.projection.sides(x, dy)  # (T, dim), (T, other)
        return (a,), b

    def norm(self, gradient):
        return frobenius(gradient)
