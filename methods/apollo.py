"""
APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient itself, scaled as Adam scales a projection.
"""

import math

import torch

from methods.fira import limit_growth_
from methods.registry import FLOATS, register
from methods.whole_gradient import WithoutBasis
from quant import random_key, uniform

READS = ("rank", "proj_gap", "proj_side", "accumulation", "stochastic_rounding", "matmul")


@register(
    "apollo",
    "the gradient, each column scaled as Adam scales a random projection of it",
    weight_bits=(16, 8),
    reads=READS,
    fixes=FLOATS | {"galore_scale": 1.0},
)
class Apollo(WithoutBasis):
    """W moves by G, each column as much as Adam makes of its projection.

    The projection is on random directions, which are drawn again each gap and not kept."""

    dims = 0  # the norms that are compared are of columns

    def matrix(self):
        """P (dim, rank) at this step, of normal numbers of variance 1 / rank."""
        p = self.projection
        o = self.optimizer
        key = random_key(random_key(o.seed, self.name, "rule"), self.step // p.gap)
        u = uniform(key, 0, p.dim * p.rank, o.device)  # in (0, 1)
        return torch.erfinv(2 * u - 1).mul_(math.sqrt(2 / p.rank)).view(p.dim, p.rank)

    def direction(self, g):
        g = g.float()
        r = self.matrix().T @ g  # (rank, other)
        before = r.norm(dim=self.dims)  # (other,), or ()
        after = self.adam_(r).norm(dim=self.dims)
        return None, limit_growth_(self.state, g.mul_(after / (before + 1e-8)))


@register(
    "apollo_mini",
    "APOLLO at rank 1, with one factor for the whole gradient",
    weight_bits=(16, 8),
    reads=READS,
    fixes=FLOATS | {"galore_scale": 128**0.5, "rank": 1},
)
class ApolloMini(Apollo):
    dims = None  # the norm of the whole
