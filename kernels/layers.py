"""
The parts of a transformer that lie between its matrices, each written for what backward keeps.

Autograd keeps float32 copies that are cheap to make again: at 7B with 16 x 256 tokens, 64 MiB a norm and 86 a gate. So
the norm keeps its input as it came, the gate its two factors, a checkpointed block its input, in INT8 if asked; and the
loss takes its gradients while a chunk's logits are at hand, so that logits of a batch never exist.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.quantized import dequantize_int8
from quant import chunks, quantize_int8

LOSS_CHUNK = 512  # tokens whose logits exist at once: 512 x 32000 float32 is 62 MiB, where 16 x 256 at once are 500


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32; its weight stays float32, where a step of 1e-3 on a weight of 1 is not lost."""

    def __init__(self, dim, eps, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x):
        return _RMSNormFunction.apply(x, self.weight, self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """Keeps x as it came for backward, where autograd would keep a float32 copy: 64 MiB a norm at 7B, twice a block."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()
        rstd = (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (h * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        h, dy = x.float() * rstd, dy.float()
        dw = (dy * h).flatten(0, -2).sum(dim=0)
        dh = dy * weight
        dx = (dh - h * (dh * h).mean(dim=-1, keepdim=True)) * rstd
        return dx.to(x.dtype), dw, None


class GLU(nn.Module):
    """act(gate) * up (arXiv 2002.05202): SwiGLU with act "silu", Gemma's GeGLU with "gelu", by its tanh formula."""

    def __init__(self, activation="silu"):
        super().__init__()
        self.activation = activation

    def forward(self, gate, up):
        return (_SwiGLUFunction if self.activation == "silu" else _GeGLUFunction).apply(gate, up)


class _SwiGLUFunction(torch.autograd.Function):
    """Keeps gate and up alone and makes act(gate) again: 86 MiB less a block at 7B."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class _GeGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh") * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh")
        return dgate, F.gelu(gate, approximate="tanh").mul_(dy)


class Rotate(nn.Module):
    """RoPE on x (..., T, head_dim), the two halves of a head as a pair's two coordinates, as in Hugging Face."""

    def forward(self, x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin


def rope(start, length, c, x):
    """cos and sin (length, head_dim) of RoPE's angles at positions start.. , in x's dtype and device. c: LLaMAConfig,
    whose rope_scaling is "", "linear FACTOR", or LLaMA 3's "llama3 FACTOR LOW HIGH LENGTH": wavelengths above LENGTH /
    LOW are stretched by FACTOR, those below LENGTH / HIGH stay, those between are interpolated."""
    at = torch.arange(0, c.head_dim, 2, device=x.device, dtype=torch.float32)
    frequency = 1.0 / c.rope_theta ** (at / c.head_dim)
    kind, *numbers = c.rope_scaling.split() or [""]
    if kind == "linear":
        frequency = frequency / float(numbers[0])
    elif kind == "llama3":
        factor, low, high, trained = map(float, numbers)
        keep = ((trained * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = torch.outer(torch.arange(start, start + length, device=x.device, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def attend(q, k, v, scale, softcap, mask):
    """softmax(q k^T * scale) v, q (B, nh, T, hs), k and v (B, nk, S, hs); logits pass through softcap * tanh(. /
    softcap) if it is not 0. mask: (B or 1, 1, T, S) bool, True where a token may look, or None: at all before it."""
    gqa, causal = q.shape[1] != k.shape[1], mask is None and q.shape[2] > 1
    if gqa and (softcap or mask is not None):  # with a mask and grouped heads torch has no kernel that saves memory
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        gqa = False
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    logits = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    if causal:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.float().softmax(dim=-1).to(q.dtype) @ v


def last(x, n, dim):
    """The last n entries of x along dim, or all: with a new token's own, n = block_size - 1 keys are block_size. RoPE
    sees distances, not positions."""
    n = min(n, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - n, n)


def attention_mask(past, T, window, documents, device):
    """Which keys each of T tokens sees, after `past` cached ones: (B or 1, 1, T, past + T) bool. None if that is
    plainly all before it. window: how many at most; documents: (B, past + T), or None."""
    if documents is None and window >= past + T and not (past and T > 1):
        return None
    query, key = torch.arange(past, past + T, device=device)[:, None], torch.arange(past + T, device=device)
    seen = (key <= query) & (query - key < window)
    if documents is not None:
        seen = seen & (documents[:, None, -T:, None] == documents[:, None, None, :])
    return seen.view(-1, 1, T, past + T)


class Checkpoint(torch.autograd.Function):
    """A block of which only the input is kept: backward makes the rest again. bits 8 keeps the input group-wise in
    INT8, 0.5 in place of 1 GiB at 7B with 16 x 256 tokens."""

    @staticmethod
    def forward(ctx, x, block, bits, *args):
        ctx.block, ctx.shape, ctx.dtype, ctx.bits, ctx.args = block, x.shape, x.dtype, bits, args
        ctx.save_for_backward(*(quantize_int8(x.flatten(0, -2)) if bits == 8 else (x,)))
        return block(x, *args)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors
        x = dequantize_int8(*x, dtype=ctx.dtype).view(ctx.shape) if ctx.bits == 8 else x[0].detach()
        x.requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x, *ctx.args)
        torch.autograd.backward(y, dy)  # steps the block's weights
        return x.grad, *[None] * (2 + len(ctx.args))


def slices(weight, dtype):
    """(slice of rows, these rows) of a head's weight: of a tensor all at once, of a QEmbedding several, in `dtype`."""
    return [(slice(None), weight)] if isinstance(weight, torch.Tensor) else weight.slices(dtype)


def head_logits(h, weight):
    """h W^T (..., V), float32, of h (..., C) and a head's weight (V, C): a tensor, or a QEmbedding."""
    if isinstance(weight, torch.Tensor):
        return F.linear(h, weight).float()
    logits = torch.empty(*h.shape[:-1], weight.out_features, device=h.device)
    for at, rows in slices(weight, h.dtype):
        logits[..., at] = F.linear(h, rows)
    return logits


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the logits h W^T, LOSS_CHUNK tokens at a time, so that (T, V) logits never exist.

    Each chunk's gradients are taken while its logits are at hand, in forward: one pass, no recomputation.
    h (T, C), weight (V, C), a tensor or a QEmbedding, targets (T,) int64 or -1. softcap: see
    LLaMAConfig.logit_softcap. Returns the loss, float32; all targets -1 give 0."""

    @staticmethod
    def forward(ctx, h, weight, targets, softcap, need_grad):
        n = (targets >= 0).sum().clamp(min=1)
        loss = torch.zeros((), device=h.device)
        dh = torch.empty_like(h) if need_grad else None
        dw = torch.zeros_like(weight) if need_grad and ctx.needs_input_grad[1] else None  # a frozen head has none
        for i in chunks(h, len(h), LOSS_CHUNK):
            x, t = h[i : i + LOSS_CHUNK], targets[i : i + LOSS_CHUNK, None]
            logits = head_logits(x, weight)  # (chunk, V), in place from here to its gradient
            if softcap:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square() if need_grad else None
                logits.mul_(softcap)
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            valid, t = (t >= 0).float(), t.clamp(min=0)
            target = logits.gather(1, t)
            z = logits.exp_().sum(dim=-1, keepdim=True)
            loss += ((z.log() - target) * valid).sum()
            if need_grad:
                g = logits.mul_(valid / (n * z)).scatter_add_(1, t, -valid / n)  # (softmax - one-hot) / n
                g = (g.mul_(slope) if softcap else g).to(h.dtype)
                dh[i : i + LOSS_CHUNK] = sum(g[:, at] @ rows for at, rows in slices(weight, g.dtype))
                if dw is not None:
                    dw.addmm_(g.T, x)
        ctx.has_dw = dw is not None
        if need_grad:
            ctx.save_for_backward(*((dh, dw) if ctx.has_dw else (dh,)))
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dh, *dw = ctx.saved_tensors  # scaled in place: at 7B dw alone is 0.4 GiB
        return dh.mul_(grad), dw[0].mul_(grad) if dw else None, None, None, None
