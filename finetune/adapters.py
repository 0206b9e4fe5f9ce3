"""
What stands beside a frozen matrix and trains in its place: two thin factors, whose product counts as a part of W.

LoRA (arXiv 2106.09685) trains both. LoQT (arXiv 2405.16528) takes one from the gradient, as GaLore does, and trains the
other; from time to time the product is merged into W, which may so have 4 bits and train all the same.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import decode, encode

COMPENSATIONS = 5  # rounds in which LoQT looks for the codes and the factor that make W together (its Algorithm 2)


class LoRA(nn.Module):
    """alpha / rank * B A, with trained A (rank, in_features) and B (out_features, rank), float32. A starts as in peft,
    B at zero."""

    def __init__(self, out_features, in_features, rank, alpha, device=None):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.b = nn.Parameter(torch.empty(out_features, rank, device=device))
        self.scale = alpha / rank
        self.start()

    @torch.no_grad()
    def start(self, generator=None):
        bound = 1 / math.sqrt(self.a.shape[1])
        self.a.uniform_(-bound, bound, generator=generator)
        self.b.zero_()

    def forward(self, x):
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def delta(self):
        """What it adds to W, (out_features, in_features) float32."""
        return self.scale * self.b.detach() @ self.a.detach()


class LowRank(nn.Module):
    """A matrix that is two factors and nothing else, W = u v, u (out_features, rank), v (rank, in_features), both
    trained: see welore.py."""

    def __init__(self, out_features, in_features, rank, bias=None, dtype=None, device=None):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.v = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype, device=device))
        self.bias = bias

    def forward(self, x):
        y = F.linear(F.linear(x, self.v), self.u)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def float_weight(self, dtype=torch.float32):
        return (self.u.detach() @ self.v.detach()).to(dtype)


class LoQT(nn.Module):
    """scale * P F, or its transpose: P (dim, rank) is the basis of a Projection, in `bits`, and F (rank, other), in
    `dtype`, is trained by the gradient's projection, R, without autograd. Both lie in buffers."""

    def __init__(self, out_features, in_features, rank, scale, bits, dtype=None, device=None):
        super().__init__()
        self.right, self.scale = out_features >= in_features, scale
        dim, other = sorted((out_features, in_features))
        self.register_buffer("factor", torch.zeros(min(rank, dim), other, dtype=dtype, device=device))
        self.take(encode(torch.zeros(dim, min(rank, dim), device=device), bits))

    def take(self, basis):
        """Let P be the tensors `basis`, the projection's own: no copy."""
        for i, tensor in enumerate(basis):
            self.register_buffer(f"basis_{i}", tensor)

    def basis(self):
        return tuple(tensor for name, tensor in self.named_buffers() if name.startswith("basis_"))

    def forward(self, x):
        p, f = decode(self.basis(), x.dtype), self.factor.to(x.dtype)
        return (x @ p @ f if self.right else F.linear(F.linear(x, f), p)) * self.scale

    def delta(self):
        """What it adds to W, (out_features, in_features) float32."""
        product = self.scale * (decode(self.basis()) @ self.factor.float())
        return product.T if self.right else product

    def settle(self, layer, w):
        """Make layer's codes and F, in the basis that has just been taken, represent w (out_features, in_features)
        float32. In turns the codes take what F leaves, and F what the codes leave; the best pair stays."""
        p, wanted = decode(self.basis()), w
        inverse, f = torch.linalg.pinv(p), torch.zeros_like(self.factor, dtype=torch.float32)
        best = {"error": torch.full((), math.inf, device=w.device)}
        turned = lambda t: t.T if self.right else t  # between (out, in) and (dim, other)
        for _ in range(1 + COMPENSATIONS):  # at most three float matrices of w's size at a time
            layer.set_weight(wanted)
            wanted = None
            rest = turned(w).sub(turned(layer.base_weight()))
            new = {"error": torch.addmm(rest, p, f, alpha=-self.scale).norm(), "factor": f}
            new |= dict(layer.named_buffers(recurse=False))
            better = new["error"] < best["error"]  # on the device: nothing waits for it
            best = {name: t.where(better, best.get(name, t)) for name, t in new.items()}
            f = inverse @ rest / self.scale
            wanted = turned(torch.addmm(turned(w), p, f, alpha=-self.scale, out=rest))
        self.factor.copy_(best["factor"])
        for name, _ in list(layer.named_buffers(recurse=False)):
            layer.register_buffer(name, best[name])


def adapter(out_features, in_features, settings, dtype=None, device=None):
    """What the method of a run's settings puts beside a matrix."""
    c, shape = settings, (out_features, in_features, settings["rank"])
    if c["method"] == "loqt":
        return LoQT(*shape, c["galore_scale"], c["proj_bits"], dtype, device)
    return LoRA(*shape, c["lora_alpha"], device)


def put_low_rank(model, ranks, dtype=None, device=None):
    """Put a LowRank in the place of each matrix that `ranks`, {name: rank}, names. Raises ValueError where there is
    none."""
    matrices = {name: module for name, module in model.named_modules() if hasattr(module, "out_features")}
    for name, rank in ranks.items():
        if name not in matrices:
            raise ValueError(f"low_rank: the model has no matrix {name!r}")
        old = matrices[name]
        shape = old.out_features, old.in_features
        model.set_submodule(name, LowRank(*shape, rank, getattr(old, "bias", None), dtype, device))
