"""
Fira (arXiv 2410.01623): what low rank throws away moves W, too.
"""

import torch

from methods.registry import FLOATS, register
from methods.whole_gradient import WholeGradient

GROWTH = 1.01  # the largest ratio of a step's norm to the last one's


@register(
    "fira",
    "GaLore, and the residual of the gradient, scaled as Adam scales its neighbour",
    weight_bits=(16, 8),
    fixes=FLOATS,
)
class Fira(WholeGradient):
    """W moves by P N + phi S: S = G - P R, each column scaled by the factor by which Adam changed
    R's column."""

    def direction(self, gradient):
        p, r, rest = self.parts(gradient)
        before = norms(r)
        n = self.adam_(r)  # (rank, other), in r's memory
        phi = norms(n) / (before + 1e-8)  # (other,)
        rest = limit_growth_(self.state, rest.mul_(phi))
        return None, rest.addmm_(p, n)


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
