"""
Parts of a transformer that keep less for backward than autograd would, in plain torch.

Autograd keeps float32 copies that are cheap to make again. At 7B with 16 x 256 tokens they are
64 MiB a norm and 86 MiB a gate. Here the norm keeps its input as it came, and the gate its two
factors. The loss takes its gradients while a chunk's logits are at hand, so that the logits
of a batch never exist.
"""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import chunks, dequantize_int8, quantize_int8

# Tokens whose logits exist at once: 62 MiB for 32,000 tokens in float32, where 16 x 256 take 500.
LOSS_CHUNK = 512
INIT_STD = 0.02  # of new weights


def rms_norm(x, weight, eps):
    """x / rms(x) * weight, computed in float32: x (..., C) any float dtype, weight (C,) float32."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate, up):
    """silu(gate) * up, of one shape (arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up)


def geglu(gate, up, approximate="tanh"):
    """gelu(gate) * up, of one shape, gelu by the tanh formula that Gemma has; or "none": exact."""
    return _GeGLU.apply(gate, up, approximate)


def head_logits(h, weight):
    """h W^T (..., V), float32, of h (..., C) and a head's weight W (V, C).

    weight: a tensor; or an object whose rows exist a slice at a time, as model.QEmbedding's: with
    out_features = V, and slices(dtype) that yields (slice of rows, these rows in dtype).
    """
    if isinstance(weight, torch.Tensor):
        return F.linear(h, weight).float()
    logits = torch.empty(*h.shape[:-1], weight.out_features, device=h.device)
    for at, rows in weight.slices(h.dtype):
        logits[..., at] = F.linear(h, rows)
    return logits


def head_loss(h, weight, targets, softcap=0.0):
    """Mean cross-entropy of the logits h W^T, LOSS_CHUNK tokens at a time.

    h (T, C), weight (V, C) as for head_logits, targets (T,) int64, where -1 does not count.
    softcap: if it is not 0, logits are softcap * tanh(logits / softcap), as in Gemma 2.
    Returns the loss, float32: 0 if no target counts. Its gradients are taken in the same pass.
    """
    return _HeadLoss.apply(h, weight, targets, softcap, torch.is_grad_enabled())


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it came. Autograd would keep a float32 copy: 64 MiB a norm at 7B, two a block."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.float()  # (..., C)
        rstd = (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()  # 1 / rms(x), (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return (h * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        h = x.float() * rstd  # again
        dy = dy.float()
        dw = (dy * h).flatten(0, -2).sum(dim=0)  # (C,)
        dh = dy * weight
        # the part of dh along h does not move h, whose rms is 1
        dx = (dh - h * (dh * h).mean(dim=-1, keepdim=True)) * rstd
        return dx.to(x.dtype), dw, None


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up alone and makes silu(gate) again: 86 MiB less a block at 7B."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        dup = F.silu(gate).mul_(dy)
        return dgate, dup


class _GeGLU(torch.autograd.Function):
    """The same for gelu."""

    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return F.gelu(gate, approximate=approximate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.gelu_backward(dy * up, gate, approximate=ctx.approximate)
        dup = F.gelu(gate, approximate=ctx.approximate).mul_(dy)
        return dgate, dup, None


class _HeadLoss(torch.autograd.Function):
    """Takes each chunk's gradients in forward, while its logits are at hand: nothing is computed
    twice, and backward only scales them."""

    @staticmethod
    def forward(ctx, h, weight, targets, softcap, need_grad):
        n = (targets >= 0).sum().clamp(min=1)  # tokens that count
        loss = torch.zeros((), device=h.device)
        dh = torch.empty_like(h) if need_grad else None
        # a frozen head has no gradient
        dw = torch.zeros_like(weight) if need_grad and ctx.needs_input_grad[1] else None

        for start in chunks(h, len(h), LOSS_CHUNK):
            at = slice(start, start + LOSS_CHUNK)
            x = h[at]  # (chunk, C)
            t = targets[at, None]  # (chunk, 1)

            # logits (chunk, V) are overwritten from here until they are their own gradient
            logits = head_logits(x, weight)
            if softcap:
                logits = logits.div_(softcap).tanh_()
                slope = 1 - logits.square() if need_grad else None
                logits.mul_(softcap)

            # log softmax at the target: the sum of exponents would overflow without the largest
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            valid = (t >= 0).float()
            t = t.clamp(min=0)
            target = logits.gather(1, t)  # (chunk, 1)
            z = logits.exp_().sum(dim=-1, keepdim=True)  # (chunk, 1); logits hold exponents
            loss += ((z.log() - target) * valid).sum()
            if not need_grad:
                continue

            # the gradient with respect to the logits: (softmax - one-hot) / n
            g = logits.mul_(valid / (n * z)).scatter_add_(1, t, -valid / n)
            if softcap:
                g = g.mul_(slope)
            g = g.to(h.dtype)
            if isinstance(weight, torch.Tensor):
                slices = [(slice(None), weight)]
            else:
                slices = weight.slices(g.dtype)
            dh[at] = sum(g[:, columns] @ rows for columns, rows in slices)
            if dw is not None:
                dw.addmm_(g.T, x)

        ctx.has_dw = dw is not None
        if need_grad:
            ctx.save_for_backward(*((dh, dw) if ctx.has_dw else (dh,)))
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        # scaled in place: at 7B dw alone is 0.4 GiB
        if ctx.has_dw:
            dh, dw = ctx.saved_tensors
            dw.mul_(grad)
        else:
            (dh,) = ctx.saved_tensors
            dw = None
        return dh.mul_(grad), dw, None, None, None


class Checkpoint(torch.autograd.Function):
    """A block of which only the input is kept: backward makes the rest again.

    bits 8 keeps the input in INT8: 0.5 in place of 1 GiB at 7B with 16 x 256 tokens."""

    @staticmethod
    def forward(ctx, x, block, bits, *args):
        ctx.block, ctx.args = block, args
        ctx.shape, ctx.dtype, ctx.bits = x.shape, x.dtype, bits
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
        x.requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x, *ctx.args)
        torch.autograd.backward(y, dy)  # steps the block's weights
        return x.grad, *[None] * (2 + len(ctx.args))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32; bfloat16 would lose the weight's steps of 1e-3."""

    def __init__(self, dim, eps, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class GLU(nn.Module):
    """act(gate) * up (arXiv 2002.05202): SwiGLU with "silu"; Gemma's with "gelu", by tanh, and
    with "gelu_erf", exactly."""

    def __init__(self, activation="silu"):
        super().__init__()
        self.activation = activation

    def forward(self, gate, up):
        if self.activation == "silu":
            return swiglu(gate, up)
        return geglu(gate, up, "none" if self.activation == "gelu_erf" else "tanh")


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


def compile_modules(model, kinds, example):
    """torch.compile the modules of these kinds, or warn once that this machine cannot.

    example: any tensor on the model's device, to try the compiler with."""
    try:
        torch.compile(lambda x: x.sin() * x)(example)
    except Exception as e:  # no C++ compiler, no Triton
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        warnings.warn(f"torch.compile fails, the model runs without it. {reason}")
        return
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile()
