"""
Parts of a transformer that keep less for backward than autograd would, in plain torch.

Autograd keeps float32 copies that are cheap to make again. At 7B with 16 x 256 tokens they are
64 MiB a norm and 86 MiB a gate. Here the norm keeps its input as it came, and the gate its two
factors. On a GPU the norms are Triton kernels (rows.py), the gates are compiled (launch.py).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import rows
from kernels.launch import fused, with_kernel
from quant import dequantize_int8, quantize_int8

INIT_STD = 0.02  # of new weights

# --- RMSNorm ---


@with_kernel(rows.rms_norm)
@fused
def rms_norm(x, h, weight, eps, dtype):
    """x + h in x's dtype, its norm in `dtype`, and 1 / rms; x and h (..., C).

    h may be None, and the first result is then, too. The norm is (x + h) / rms(x + h) * weight,
    computed in float32. weight (C,) and 1 / rms (..., 1) are float32.
    """
    total = None
    if h is not None:
        x = total = x + h
    h = x.float()
    rstd = (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return total, (h * rstd * weight).to(dtype), rstd


@with_kernel(rows.rms_norm_backward, launches=2)
@fused
def rms_norm_backward(dy, dx, x, weight, rstd, need_dw=True):
    """The gradients of x, in its dtype, and of weight, float32, or None without need_dw.

    dy: of the norm's output. dx: what else x has as its gradient, or None; it is added.
    """
    h = x.float() * rstd  # again
    dy = dy.float()
    dw = (dy * h).flatten(0, -2).sum(dim=0) if need_dw else None  # (C,)
    dh = dy * weight
    # the part of dh along h does not move h, whose rms is 1
    out = (dh - h * (dh * h).mean(dim=-1, keepdim=True)) * rstd
    if dx is not None:
        out = out + dx
    return out.to(x.dtype), dw


class _RMSNorm(torch.autograd.Function):
    """(x + h, its norm). Keeps the sum as it is: autograd would keep a float32 copy.

    As the sum passes through, its two gradients meet in backward's one pass."""

    @staticmethod
    def forward(ctx, x, h, weight, eps):
        ctx.set_materialize_grads(False)
        ctx.adds = h is not None
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):  # the products' own, once for all that read it
            dtype = torch.get_autocast_dtype(x.device.type)
        total, y, rstd = rms_norm(x, h, weight, eps, dtype)
        if h is None:
            total = x
        ctx.save_for_backward(total, weight, rstd)
        return total, y

    @staticmethod
    def backward(ctx, dx, dy):
        total, weight, rstd = ctx.saved_tensors
        dw = None
        if dy is not None:
            dx, dw = rms_norm_backward(dy, dx, total, weight, rstd, ctx.needs_input_grad[2])
        return dx, dx if ctx.adds else None, dw, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32; bfloat16 would lose the weight's steps of 1e-3."""

    def __init__(self, dim, eps, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x):
        return self.residual(x)[1]

    def residual(self, x, h=None):
        """(x + h, its norm): what a block adds to, and what its next part reads, in one pass."""
        return _RMSNorm.apply(x, h, self.weight, self.eps)


def qk_norm(c, n_head, device):
    """The norm of n_head heads' queries or keys (B, T, n_head hs), by LLaMAConfig.qk_norm."""
    if not c.qk_norm:
        return nn.Identity()
    if c.qk_norm == "head":
        return HeadNorm(c.head_dim, c.norm_eps, device)
    return RMSNorm(n_head * c.head_dim, c.norm_eps, device)


class HeadNorm(RMSNorm):
    """Of each head by itself."""

    def forward(self, x):
        heads = x.view(*x.shape[:-1], -1, len(self.weight))  # (B, T, n_head, hs)
        return super().forward(heads)


class NoNorm(nn.Module):
    """In a norm's place: what it would have read."""

    def residual(self, x, h=None):
        total = x if h is None else x + h
        return total, total


# --- act(gate) * up ---

ACTIVATIONS = {  # (forward, backward)
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "gelu_erf": (F.gelu, torch.ops.aten.gelu_backward),
}


@fused
def glu(gate, up, activation):
    """act(gate) * up, of one shape."""
    act, _ = ACTIVATIONS[activation]
    return act(gate) * up


@fused
def glu_backward(dy, gate, up, activation):
    """The gradients of gate and up."""
    act, act_backward = ACTIVATIONS[activation]
    return act_backward(dy * up, gate), act(gate).mul_(dy)


class _GLU(torch.autograd.Function):
    """Keeps gate and up alone and makes act(gate) again: 86 MiB less a block at 7B."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu(gate, up, activation)

    @staticmethod
    def backward(ctx, dy):
        return *glu_backward(dy, *ctx.saved_tensors, ctx.activation), None


class GLU(nn.Module):
    """act(gate) * up (arXiv 2002.05202): SwiGLU with "silu"; Gemma's with "gelu", by tanh, and
    with "gelu_erf", exactly."""

    def __init__(self, activation="silu"):
        super().__init__()
        self.activation = activation

    def forward(self, gate, up):
        return _GLU.apply(gate, up, self.activation)


# --- a block of which only the input is kept, new layers ---


class Checkpoint(torch.autograd.Function):
    """A block of which only the input is kept: backward makes the rest again.

    bits 8 keeps the input in INT8: 0.5 in place of 1 GiB at 7B with 16 x 256 tokens. What is made
    again ends before the last product, 22 % of a block's operations, whose result nobody reads."""

    @staticmethod
    def forward(ctx, x, block, bits, *args):
        ctx.block, ctx.args = block, args
        ctx.shape, ctx.dtype, ctx.bits = x.shape, x.dtype, bits
        device = x.device.type  # autograd calls backward without autocast
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device),
                                      torch.is_autocast_enabled(device))
        kept = quantize_int8(x.flatten(0, -2)) if bits == 8 else (x,)
        ctx.save_for_backward(*kept)
        return block(x, *args)

    @staticmethod
    def backward(ctx, dy):
        kept = ctx.saved_tensors
        if ctx.bits == 8:
            x = dequantize_int8(*kept, dtype=ctx.dtype).view(ctx.shape)
        else:
            x = kept[0].detach()
        dx = block_backward(ctx.block, x, dy, ctx.args, ctx.autocast)
        return dx, *[None] * (2 + len(ctx.args))


def block_backward(block, x, dy, args, autocast):
    """The gradient of a block's input x from that of block(x, *args), dy; steps the weights.

    autocast: the context of its forward."""
    x.requires_grad_()
    last = block.mlp.down_proj
    last.graph_only = isinstance(block.mlp_post_norm, nn.Identity)  # no norm reads it
    try:
        with torch.enable_grad(), autocast:
            y = block(x, *args)
    finally:
        last.graph_only = False
    torch.autograd.backward(y, dy)
    return x.grad


def plain_embedding(vocab_size, dim, device=None, dtype=None):
    """torch's Embedding, started like the rest."""
    layer = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
    nn.init.normal_(layer.weight, std=INIT_STD)
    return layer


def plain_linear(n_in, n_out, bias=False, device=None, dtype=None):
    """torch's Linear, by a QLinear's random draws: one seed starts every method alike."""
    layer = nn.Linear(n_in, n_out, bias=bias, device="meta")  # where its own start is not drawn
    w = torch.empty(n_out, n_in, dtype=dtype, device=device)
    layer.weight = nn.Parameter(w.normal_(std=INIT_STD))
    if bias:
        layer.bias = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device))
    return layer
