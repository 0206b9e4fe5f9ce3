"""
Attention without its matrices: RoPE's angles, which keys a token sees, softmax(q k^T) v.
"""

import torch
import torch.nn.functional as F

from kernels import rows
from kernels.launch import fused, with_kernel


@with_kernel(rows.turned)
@fused
def turned(q, k, cos, sin, back=False):
    """q and k (B, T, heads, hs), each turned by RoPE's angles, or back by them.

    The two halves of a head are a pair's coordinates, as in Hugging Face. cos, sin: (T, hs / 2)."""
    cos = cos[:, None]  # (T, 1, hs / 2)
    sin = sin[:, None]
    sign = -1 if back else 1
    out = []
    for x in (q, k):
        a, b = x.chunk(2, dim=-1)
        left = (a * cos).addcmul_(b, sin, value=-sign)
        right = (b * cos).addcmul_(a, sin, value=sign)
        out.append(torch.cat([left, right], dim=-1).to(x.dtype))
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return *turned(q, k, cos, sin),

    @staticmethod
    def backward(ctx, dq, dk):
        return *turned(dq, dk, *ctx.saved_tensors, back=True), None, None


def rotate(q, k, cos, sin):
    """RoPE of queries and keys, in one pass; arguments as for turned(). None: no RoPE."""
    return (q, k) if cos is None else _Rotate.apply(q, k, cos, sin)


def ropes(start, length, c, x):
    """rope() of layers that see all keys (False), of those that have a window (True), and of those
    without RoPE (None)."""
    whole = rope(start, length, c, x)
    local = rope(start, length, c, x, local=True) if c.rope_local_theta else whole
    return {False: whole, True: local, None: (None, None)}


def rope(start, length, c, x, local=False):
    """cos and sin (length, head_dim / 2) of RoPE's angles at positions start.., of x's dtype.

    c: LLaMAConfig, whose rope_scaling is "", "linear FACTOR", or LLaMA 3's "llama3 FACTOR LOW HIGH
    LENGTH": wavelengths above LENGTH / LOW are stretched by FACTOR, those below LENGTH / HIGH stay,
    those between are interpolated. local: plain, of rope_local_theta."""
    # pair i of a head turns by theta^(-2i / hs) a position
    at = torch.arange(0, c.head_dim, 2, device=x.device, dtype=torch.float32)
    frequency = 1.0 / (c.rope_local_theta if local else c.rope_theta) ** (at / c.head_dim)
    kind, *numbers = [""] if local else c.rope_scaling.split() or [""]
    if kind == "linear":
        frequency = frequency / float(numbers[0])
    elif kind == "llama3":
        factor, low, high, trained = map(float, numbers)
        # 1 where a wavelength is short enough to stay, 0 where it is stretched
        keep = ((trained * frequency / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (T, hs / 2)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def attention_masks(past, T, most, window, documents, device):
    """attention_mask() of layers that see all keys, at most `most`, and of those with a window."""
    whole = attention_mask(past, T, most, documents, device)
    if not window:
        return whole, whole
    return whole, attention_mask(past, T, min(most, window), documents, device)


def attention_mask(past, T, window, documents, device):
    """Which keys each of T tokens sees, after `past` cached ones: (B or 1, 1, T, past + T) bool.

    None if that is plainly all before it. window: how many at most. documents: (B, past + T), a
    token sees those of its own number; or None."""
    if documents is None and window >= past + T and not (past and T > 1):
        return None
    query = torch.arange(past, past + T, device=device)[:, None]  # (T, 1)
    key = torch.arange(past + T, device=device)  # (past + T,)
    seen = (key <= query) & (query - key < window)
    if documents is not None:
        seen = seen & (documents[:, None, -T:, None] == documents[:, None, None, :])
    return seen.view(-1, 1, T, past + T)


def attend(q, k, v, scale, softcap, mask):
    """softmax(q k^T * scale) v, for q (B, nh, T, hs), k and v (B, nk, S, hs).

    softcap: if not 0, logits pass through softcap * tanh(. / softcap). mask: (B or 1, 1, T, S)
    bool, True where a token may look, or None: at all before it."""
    gqa = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    if gqa and (softcap or mask is not None):  # torch has no kernel that saves memory for these
        repeats = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        gqa = False
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa
        )
    logits = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)  # (B, nh, T, S)
    if causal:
        mask = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.float().softmax(dim=-1).to(q.dtype) @ v  # (B, nh, T, hs)


def last(x, n, dim):
    """The last n entries of x along dim, or all."""
    n = min(n, x.shape[dim])
    return x.narrow(dim, x.shape[dim] - n, n)


def all_documents(cache, documents, B, past, T, block_size):
    """documents (B, past + T) of the cached tokens and T new ones; None if none has any.

    Where one of the two is not given, the other's text goes on. The cache keeps them for next time.
    """
    seen = cache.get("documents") if past else None  # (1 or B, past)
    if seen is not None or past and documents is not None:
        if seen is None:
            seen = documents[:, :1].expand(-1, past)
        seen = seen.expand(B, -1)
        if documents is None:
            documents = seen[:, -1:].expand(-1, T)
        documents = torch.cat([seen, documents], dim=1)
    if documents is not None:
        cache["documents"] = last(documents, block_size - 1, 1)
    return documents
