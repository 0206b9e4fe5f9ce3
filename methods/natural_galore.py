"""
Natural GaLore (arXiv 2410.16029): R goes to Adam divided by the empirical Fisher matrix.
"""

import torch

from methods.registry import FLOATS, register
from qgalore import ProjectedWeight
from quant import CHUNK, chunks

HISTORY = 20  # gradients in the Fisher matrix
DAMPING = 1e-3  # lambda, which is added to it
ROUNDING = 1e-10  # of a squared norm: equations of equal gradients have a solution at any size


@register(
    "natural_galore",
    "the projected gradient divided by the Fisher matrix of the last 20",
    weight_bits=(16, 8),
    fixes=FLOATS,
)
class NaturalGaLore(ProjectedWeight):
    """(H^T H + lambda)^-1 g = H^T (H H^T + lambda)^-1 e: H the last gradients, e where g is in H.

    The right-hand side has HISTORY equations and subtracts nothing large. They are in float64:
    lambda beside a squared norm of 1e6 is nothing in float32, and equal gradients would leave no
    solution. H, 2 bytes an element, takes HISTORY times the memory of R."""

    def __init__(self, *args):
        super().__init__(*args)
        n = self.projection.rank * self.projection.other
        device = self.optimizer.device
        self.state["history"] = torch.zeros(HISTORY, n, dtype=torch.bfloat16, device=device)
        self.state["seen"] = 0

    def direction(self, r):
        r = r.float()
        history = self.state["history"]
        newest = self.state["seen"] % HISTORY
        history[newest] = r.view(-1)
        self.state["seen"] += 1
        h = history[: self.state["seen"]]
        columns = CHUNK // HISTORY  # float64 at once
        starts = chunks(h, h.shape[1], columns)

        gram = torch.zeros(len(h), len(h), dtype=torch.float64, device=h.device)
        for start in starts:
            part = h[:, start : start + columns].double()
            gram.addmm_(part, part.T)  # H H^T
        gram.diagonal().mul_(1 + ROUNDING).add_(DAMPING)
        # gradients of any size side by side: a diagonal of ones
        size = gram.diagonal().sqrt()  # (HISTORY,)
        e = torch.zeros_like(size)
        e[newest] = 1 / size[newest]
        z = torch.linalg.solve_ex(gram / torch.outer(size, size), e).result / size

        flat = r.view(-1)
        for start in starts:
            part = h[:, start : start + columns].double()
            flat[start : start + columns] = z @ part
        return super().direction(r)
