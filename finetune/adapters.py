"""
Two thin factors that are trained: beside a frozen matrix, or in its place.

LoRA (arXiv 2106.09685) stands beside a matrix W, and its product counts as a part of W.
LowRank is all that WeLore (arXiv 2407.11239, finetune/welore.py) leaves of a matrix.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRA(nn.Module):
    """alpha / rank * B A, beside a frozen matrix.

    A (rank, in_features) and B (out_features, rank) are trained, in float32. A starts as in peft,
    B at zero."""

    def __init__(self, out_features, in_features, rank, alpha, device=None):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.b = nn.Parameter(torch.empty(out_features, rank, device=device))
        self.scale = alpha / rank  # so that a rate suits several ranks (section 4.1)
        self.start()

    @torch.no_grad()
    def start(self, generator=None):
        """Start anew, with a product of zero."""
        bound = 1 / math.sqrt(self.a.shape[1])  # Kaiming's for a = sqrt(5), as in torch's Linear
        self.a.uniform_(-bound, bound, generator=generator)
        self.b.zero_()

    def forward(self, x):
        low = F.linear(x, self.a.to(x.dtype))  # (..., rank)
        return F.linear(low, self.b.to(x.dtype)) * self.scale

    def delta(self):
        """What it adds to W, (out_features, in_features) float32."""
        return self.scale * self.b.detach() @ self.a.detach()


class LowRank(nn.Module):
    """A matrix that is two factors and nothing else: W = u v, of finetune/welore.py.

    u (out_features, rank) and v (rank, in_features) are trained, in `dtype`. bias: a parameter
    (out_features,), or None."""

    def __init__(self, out_features, in_features, rank, bias=None, dtype=None, device=None):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.v = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype, device=device))
        self.bias = bias

    def forward(self, x):
        low = F.linear(x, self.v)  # (..., rank)
        y = F.linear(low, self.u)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y

    def float_weight(self, dtype=torch.float32):
        """W, (out_features, in_features) in `dtype`."""
        return (self.u.detach() @ self.v.detach()).to(dtype)


def parse_ranks(low_rank):
    """{name: rank} of a text "NAME=RANK NAME=RANK ...", as in LLaMAConfig.low_rank.

    Raises ValueError for a rank that is no whole number of at least 1."""
    ranks = {}
    for part in low_rank.split():
        name, _, rank = part.rpartition("=")
        if not re.fullmatch("[1-9][0-9]{0,8}", rank):
            raise ValueError(f"low_rank: {part!a} is not a matrix's name and its rank, NAME=RANK")
        ranks[name] = int(rank)
    return ranks


def put_low_rank(model, low_rank, dtype=None, device=None):
    """Put a LowRank, still zero, in the place of each matrix that the text `low_rank` names.

    low_rank: LLaMAConfig.low_rank, "NAME=RANK NAME=RANK ..."; "" changes nothing. dtype, device:
    of the factors; a bias stays as it is. Raises ValueError where the model has no such matrix, or
    none of such a rank."""
    matrices = {}
    for name, module in model.named_modules():
        if hasattr(module, "out_features"):  # a QLinear, or torch's Linear
            matrices[name] = module
    for name, rank in parse_ranks(low_rank).items():
        if name not in matrices:
            raise ValueError(f"low_rank: the model has no matrix {name!a}")
        old = matrices[name]
        if rank > min(old.out_features, old.in_features):
            raise ValueError(f"low_rank: rank {rank} is more than the sides of {name} are long")
        bias = getattr(old, "bias", None)  # the parameter itself: it stays trained
        factors = LowRank(old.out_features, old.in_features, rank, bias, dtype, device)
        model.set_submodule(name, factors)
