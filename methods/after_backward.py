"""
torch's AdamW, for methods whose weights step after backward: QGaLore's counterpart.
"""

import torch

from kernels.subspace import frobenius
from run.ranks import Ranks


class AdamW(torch.optim.AdamW):
    """Sums gradients over ranks, drops those that are not finite, clips the rest, then steps.

    model: what of it requires grad is trained; weight decay is for matrices. ranks: see
    run/ranks.py. grad_clip: the norm that all gradients together are scaled down to; 0: off.

    The gradient of a parameter that is not finite counts as zero; pop_stats() counts it."""

    def __init__(self, model, lr, betas, eps, weight_decay=0.0, grad_clip=0.0, ranks=None):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self.trained if p.ndim > 1]
        vectors = [p for p in self.trained if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__(groups, lr, betas, eps, fused=True)
        self.grad_clip = grad_clip
        self.ranks = ranks or Ranks()  # without arguments: this process alone
        device = self.trained[0].device
        # on the device: a step waits for nothing
        self.norms = torch.zeros(len(self.trained), device=device)  # of the last step's gradients
        self.skipped = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with_gradient = [(i, p.grad) for i, p in enumerate(self.trained) if p.grad is not None]
        for _, gradient in with_gradient:
            self.ranks.sum_(gradient, lambda gradient: None)
        self.ranks.land()
        self.norms.zero_()
        for i, gradient in with_gradient:
            norm = frobenius(gradient)
            finite = norm.isfinite()
            self.skipped += ~finite
            self.norms[i] = norm.where(finite, 0)
            gradient.masked_fill_(~finite, 0)  # moments decay, and nothing is lost
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.trained, self.grad_clip)
        super().step()
        return loss

    def pop_stats(self):
        """{grad_norm: of the last step, before clipping; skipped: gradients not finite, since the
        last call}. Waits for the device."""
        skipped = int(self.skipped.item())
        self.skipped.zero_()  # counts from here
        return {"grad_norm": self.norms.norm(dtype=torch.float64).item(), "skipped": skipped}

    def pop_refreshes(self):
        """None: see QGaLore."""
        return {}

    def state_dict(self):
        return super().state_dict() | {"skipped": self.skipped}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.skipped.copy_(state.get("skipped", torch.zeros(())))  # an older run did not save it
