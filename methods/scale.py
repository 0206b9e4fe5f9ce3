"""
SCALE (arXiv 2506.16659): the gradient, its columns normalised, and no state of its own.
"""

import torch

from methods.registry import register
from methods.whole_gradient import READS, WithoutBasis

LIKE_ADAM = 0.2  # root of the mean square of a step


class NoMoments:
    """What is kept of a gradient by a method that keeps nothing."""


@register(
    "qscale",
    "SCALE on INT8 weights: columns of the gradient, normalised; no state, and no subspace",
    reads=READS,
)
class Scale(WithoutBasis):
    """W moves by G / |column of G|, each column's norm taken along W's outputs.

    Embedding and head, where the paper keeps a momentum of the head alone, move by Adam here, as
    all ordinary parameters do."""

    def new_moments(self, shape):
        return NoMoments()

    def direction(self, gradient):
        outputs = 1 if self.projection.right else 0  # G lies (dim, other)
        norms = torch.linalg.vector_norm(gradient, dim=outputs, keepdim=True, dtype=torch.float32)
        size = LIKE_ADAM * self.layer.out_features**0.5
        return None, gradient * (size / norms.clamp(min=1e-30)).to(gradient.dtype)
