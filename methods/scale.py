"""
SCALE (arXiv 2506.16659): the gradient, its columns normalised, and no state of its own.
"""

import math

import torch

from kernels.subspace import frobenius
from methods.fira import Fira
from methods.registry import register

LIKE_ADAM = 0.2  # root of the mean square of a step


class NoMoments:
    """What is kept of a gradient by a method that keeps nothing."""


@register(
    "qscale",
    "SCALE on INT8 weights: columns of the gradient, normalised; no state, and no subspace",
    reads=("galore_scale", "accumulation", "stochastic_rounding", "matmul", "residual_blocks"),
    fixes={"rank": 1, "proj_bits": 16, "proj_threshold": 2.0},
)
class Scale(Fira):
    """W moves by G / |column of G|, each column's norm taken along W's outputs.

    Embedding and head, where the paper keeps a momentum of the head alone, move by Adam here, as
    all ordinary parameters do. What is gathered is G alone; residual_blocks: see Fira."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.projection.basis = ()  # none is kept, and none comes from a gradient
        self.projection.next_refresh = math.inf

    def empty_basis(self):
        return ()

    def new_moments(self, shape):
        return NoMoments()

    def factors(self, x, dy):
        a, b = self.projection.sides(x, dy)  # (T, dim), (T, other)
        return (a[:, self.rows()],), b

    def norm(self, gradient):
        """Of G, as far as its rows tell."""
        return frobenius(gradient) * self.blocks**0.5

    def direction(self, gradient):
        outputs = 1 if self.projection.right else 0  # G lies (dim, other)
        norms = torch.linalg.vector_norm(gradient, dim=outputs, keepdim=True, dtype=torch.float32)
        size = self.blocks * LIKE_ADAM * self.layer.out_features**0.5
        step = gradient * (size / norms.clamp(min=1e-30)).to(gradient.dtype)
        return None, self.among_all(step)
