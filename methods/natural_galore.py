"""
Natural GaLore (arXiv 2410.16029): R goes to Adam divided by the empirical Fisher matrix.
"""

import torch

from methods.registry import FLOATS, register
from qgalore import ProjectedWeight

HISTORY = 20  # gradients in the Fisher matrix
DAMPING = 1e-3  # lambda, which is added to it


@register(
    "natural_galore",
    "the projected gradient divided by the Fisher matrix of the last 20",
    weight_bits=(16, 8),
    fixes=FLOATS,
)
class NaturalGaLore(ProjectedWeight):
    """(H H^T + lambda)^-1 g, H the last gradients, by Woodbury's identity: HISTORY equations.

    H, 2 bytes an element, takes HISTORY times the memory of R."""

    def __init__(self, *args):
        super().__init__(*args)
        n = self.projection.rank * self.projection.other
        device = self.optimizer.device
        self.state["history"] = torch.zeros(HISTORY, n, dtype=torch.bfloat16, device=device)
        self.state["seen"] = 0

    def direction(self, r):
        history = self.state["history"]
        newest = self.state["seen"] % HISTORY
        history[newest] = r.view(-1)
        self.state["seen"] += 1
        h = history[: self.state["seen"]].float()
        g = history[newest].float()  # rounded as in H, or the difference below is rounding
        gram = h @ h.T / DAMPING
        gram.diagonal().add_(1)
        z = torch.linalg.solve(gram, h @ g)
        r.copy_((g / DAMPING).sub_(z @ h, alpha=DAMPING**-2).view_as(r))
        return super().direction(r)
