"""
LoQT (arXiv 2405.16528): W is frozen in NF4 or INT8, and beside it one factor trains.

y = W x + scale P F x, or its transpose. P is the gradient's basis, as in GaLore; F trains by the
gradient's projection, R. At each refresh the product is merged into W, which may so have 4 bits
and train all the same. LoQT's own code takes the refresh's gradient at the merged W, by a pass that
moves nothing; here it is the step's.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from methods.registry import InBackward, SUBSPACE, register
from model import QLinear
from qgalore import ProjectedWeight
from quant import add_bfloat16_, decode, encode

COMPENSATIONS = 5  # rounds that look for codes and a factor that make W together (Algorithm 2)


class Factor(nn.Module):
    """scale * P F, or its transpose, beside a frozen matrix.

    P (dim, rank) is the basis of a Projection, in `bits`, and F (rank, other), in `dtype`, trains
    without autograd. Both lie in buffers."""

    def __init__(self, out_features, in_features, rank, scale, bits, dtype=None, device=None):
        super().__init__()
        self.right = out_features >= in_features
        self.scale = scale
        dim, other = sorted((out_features, in_features))  # the projected side is the smaller
        rank = min(rank, dim)
        self.register_buffer("factor", torch.zeros(rank, other, dtype=dtype, device=device))
        self.take(encode(torch.zeros(dim, rank, device=device), bits))

    def take(self, basis):
        """Let P be the tensors `basis`, the projection's own: no copy."""
        for i, tensor in enumerate(basis):
            self.register_buffer(f"basis_{i}", tensor)

    def basis(self):
        return tuple(t for name, t in self.named_buffers() if name.startswith("basis_"))

    def forward(self, x):
        p = decode(self.basis(), x.dtype)
        f = self.factor.to(x.dtype)
        y = x @ p @ f if self.right else F.linear(F.linear(x, f), p)  # thin products
        return y * self.scale

    def delta(self):
        """What it adds to W, (out_features, in_features) float32."""
        product = self.scale * (decode(self.basis()) @ self.factor.float())
        return product.T if self.right else product

    def settle(self, layer, w):
        """Make layer's codes and F, in the basis just taken, represent w (out, in) float32.

        In turns the codes take what F leaves, and F what the codes leave; the best pair stays. At
        most three float matrices of w's size exist at a time."""
        p = decode(self.basis())  # (dim, rank)
        inverse = torch.linalg.pinv(p)  # p is orthonormal but for its rounding
        f = torch.zeros_like(self.factor, dtype=torch.float32)
        best = {"error": torch.full((), math.inf, device=w.device)}
        wanted = w
        for _ in range(1 + COMPENSATIONS):
            # the codes take what F leaves
            layer.set_weight(wanted)
            wanted = None
            rest = self.turned(w).sub(self.turned(layer.base_weight()))
            error = torch.addmm(rest, p, f, alpha=-self.scale).norm()
            # the best pair so far stays
            new = {"error": error, "factor": f} | dict(layer.named_buffers(recurse=False))
            better = error < best["error"]  # on the device: nothing waits for it
            best = {name: t.where(better, best.get(name, t)) for name, t in new.items()}
            # F takes what the codes leave
            f = inverse @ rest / self.scale
            torch.addmm(self.turned(w), p, f, alpha=-self.scale, out=rest)
            wanted = self.turned(rest)
        self.factor.copy_(best["factor"])
        for name, _ in list(layer.named_buffers(recurse=False)):
            layer.register_buffer(name, best[name])

    def turned(self, t):
        """Between (out, in) and (dim, other)."""
        return t.T if self.right else t


class Frozen(InBackward):
    """LoQT's model: a Factor beside each matrix."""

    in_weights = ("galore_scale",)

    def adapt(self, model, s, device, dtype):
        for layer in model.modules():
            if isinstance(layer, QLinear):
                shape = layer.out_features, layer.in_features
                layer.adapter = Factor(*shape, s.rank, s.galore_scale, s.proj_bits, dtype, device)


@register(
    "loqt",
    "W frozen in NF4 (or INT8), a factor beside it trained in the gradient's subspace",
    weight_bits=(4, 8),
    reads=SUBSPACE,
    fixes={"proj_threshold": 2.0, "gap_growth": 1.2, "moments": "8bit", "proj_side": "auto"},
    kind=Frozen,
)
class LoQT(ProjectedWeight):
    def __init__(self, *args):
        super().__init__(*args)
        self.share()

    def share(self):
        """Let the layer see the projection's basis."""
        if self.projection.basis is not None:
            self.layer.adapter.take(self.projection.basis)

    @property
    def rate(self):
        return -self.optimizer.lr

    def apply(self, p, n, shrink, key):
        """F moves by N."""
        factor = self.layer.adapter.factor
        if shrink != 1:
            factor.mul_(shrink)  # weight decay, of what trains
        if factor.dtype == torch.bfloat16:
            add_bfloat16_(factor, n.bfloat16(), 1.0, key or 0)
        else:
            factor.add_(n)

    def refresh(self, sketch):
        w = self.layer.float_weight()  # W with the product merged into it
        super().refresh(sketch)
        self.share()
        self.layer.adapter.settle(self.layer, w)

    def empty_basis(self):
        return self.layer.adapter.basis()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.share()
