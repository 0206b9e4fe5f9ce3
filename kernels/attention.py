"""
Attention without its matrices: RoPE's angles, which keys a token sees, softmax(q k^T) v.

Memory is linear in the tokens. Packed texts are attended to one by one, by the kernel that a plain
row has, and so at the cost of their own lengths. Windows and soft caps, which that kernel lacks, go
a chunk of queries at a time.
"""

import json
import math
from typing import NamedTuple

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
    """RoPE of queries and keys, in one pass; arguments as for turned(). None: no RoPE.

    Angles of fewer pairs than a head has turn its first numbers; the others stay."""
    if cos is None:
        return q, k
    n = 2 * cos.shape[-1]
    if n == q.shape[-1]:
        return _Rotate.apply(q, k, cos, sin)
    turned_part = _Rotate.apply(q[..., :n], k[..., :n], cos, sin)
    return tuple(torch.cat([t, x[..., n:]], dim=-1) for t, x in zip(turned_part, (q, k)))


def ropes(start, length, c, x):
    """rope() of layers that see all keys (False), of those that have a window (True), and of those
    without RoPE (None)."""
    whole = rope(start, length, c, x)
    local = rope(start, length, c, x, local=True) if c.rope_local_theta else whole
    return {False: whole, True: local, None: (None, None)}


def rope(start, length, c, x, local=False):
    """cos and sin (length, rope_dim / 2) of RoPE's angles at positions start.., of x's dtype.

    c: LLaMAConfig. local: plain, of rope_local_theta, else by rope_scaling: see frequencies()."""
    turns, growth = frequencies(c, local, x.device)
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)
    angle = torch.outer(position, turns)  # (T, rope_dim / 2)
    return (growth * angle.cos()).to(x.dtype), (growth * angle.sin()).to(x.dtype)


def frequencies(c, local=False, device=None):
    """(by what angle each pair of a head turns a position (rope_dim / 2,) float32, what queries and
    keys are multiplied by).

    Pair i's is theta^(-2i / rope_dim). c.rope_scaling changes them in models for more than the
    LENGTH tokens of their first training:

    "linear FACTOR": all wavelengths are stretched by FACTOR.
    "llama3 FACTOR LOW HIGH LENGTH": those above LENGTH / LOW are, those below LENGTH / HIGH stay,
        those between are interpolated.
    "yarn FACTOR FAST SLOW GROWTH LENGTH BETA" (arXiv 2309.00071): pairs that turn fewer than SLOW
        times in LENGTH tokens are stretched, those that turn more than FAST times stay, and those
        between are interpolated by their number. Queries and keys are multiplied by GROWTH. Unless
        BETA is 0, queries grow above LENGTH tokens, which is not computed here.
    "longrope SHORT LONG LENGTH LONGEST" (arXiv 2402.13753): each pair by a number of its own, of
        the JSON list SHORT. Those of LONG are for texts above LENGTH tokens, and not used here."""
    dim = c.rope_dim or c.head_dim
    theta = c.rope_local_theta if local else c.rope_theta
    at = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    plain = 1.0 / theta ** (at / dim)
    kind, *numbers = [""] if local else c.rope_scaling.split() or [""]
    if kind == "linear":
        return plain / float(numbers[0]), 1.0
    if kind == "llama3":
        factor, low, high, trained = map(float, numbers)
        # 1 where a wavelength is short enough to stay, 0 where it is stretched
        keep = ((trained * plain / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":
        factor, fast, slow, growth, trained, _ = map(float, numbers)
        # the numbers of the pairs that turn `fast` and `slow` times in `trained` tokens
        fast, slow = (
            dim * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (fast, slow)
        )
        first = max(math.floor(fast), 0)
        end = min(math.ceil(slow), dim - 1)
        stretched = ((at / 2 - first) / max(end - first, 0.001)).clamp(0, 1)
        return plain * (1 - stretched + stretched / factor), growth
    if kind == "longrope":
        short, _, trained, longest = map(json.loads, numbers)
        growth = math.sqrt(max(1.0, 1 + math.log(longest / trained) / math.log(trained)))
        return plain / torch.tensor(short, device=device), growth
    return plain, 1.0


# --- which keys a token sees ---


class Spans(NamedTuple):
    """Which keys tokens see where a row holds several texts, or through a window; no matrix.

    lengths: of the texts, one after the other through all rows; None: each row is one. window: of
    keys that a token sees, itself among them."""

    lengths: list | None
    window: int


def attention_masks(past, T, most, window, documents, device):
    """attention_mask() of layers that see all keys, at most `most`, and of those with a window."""
    whole = attention_mask(past, T, most, documents, device)
    if not window:
        return whole, whole
    return whole, attention_mask(past, T, min(most, window), documents, device)


def attention_mask(past, T, window, documents, device):
    """Which keys each of T tokens sees, after `past` cached ones: None if that is plainly all
    before it, Spans, or (B or 1, 1, T, past + T) bool.

    window: how many at most. documents: (B, past + T), a token sees those of its own number; or
    None. Those of a GPU, which the host would wait for, and those after others in a cache make a
    matrix."""
    if documents is None and window >= past + T and not (past and T > 1):
        return None
    if not past and (documents is None or not documents.is_cuda):
        lengths = None if documents is None else lengths_of(documents)
        if documents is None or lengths is not None:
            return Spans(lengths, window)
    query = torch.arange(past, past + T, device=device)[:, None]  # (T, 1)
    key = torch.arange(past + T, device=device)  # (past + T,)
    seen = (key <= query) & (query - key < window)
    if documents is not None:
        seen = seen & (documents[:, None, -T:, None] == documents[:, None, None, :])
    return seen.view(-1, 1, T, past + T)


def lengths_of(documents):
    """How long the texts are, one after the other through the rows of documents (B, T).

    None if one of them is in several pieces."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    if int(starts.sum()) != sum(len(row.unique()) for row in documents):
        return None
    first = starts.flatten().nonzero()[:, 0]
    return first.diff(append=first.new_tensor([documents.numel()])).tolist()


# --- attention ---

QUERIES = 512  # of a chunk
LOGITS = 2**25  # elements that a chunk has at most, where they exist: 128 MiB in float32


def attend(q, k, v, scale, softcap, mask):
    """softmax(q k^T * scale) v, for q (B, nh, T, hs), k and v (B, nk, S, hs).

    softcap: if not 0, logits pass through softcap * tanh(. / softcap). mask: as of
    attention_mask(), or None: all before a token, and itself. Memory is linear in T but for a
    matrix as a mask."""
    if isinstance(mask, torch.Tensor) or q.shape[2] == 1:  # the next token sees all keys
        return masked(q, k, v, scale, softcap, mask)
    B, _, T, hs = q.shape
    lengths, window = mask or (None, T)
    if lengths is None:
        return causal(q, k, v, scale, softcap, window)
    # all rows' texts end to end, each by itself
    texts = []
    for t in (q, k, v):
        t = t.transpose(1, 2).reshape(1, B * T, -1, hs).transpose(1, 2)  # (1, nh, B T, hs)
        texts.append(t.split(lengths, dim=2))
    parts = [causal(*text, scale, softcap, window).transpose(1, 2) for text in zip(*texts)]
    return torch.cat(parts, dim=1).view(B, T, -1, hs).transpose(1, 2)


def causal(q, k, v, scale, softcap, window):
    """attend() of T tokens of one text a row, of which each sees at most `window`."""
    T = q.shape[2]
    if softcap or window < T:
        return _Chunked.apply(q, k, v, scale, softcap, min(window, T))
    gqa = q.shape[1] != k.shape[1]
    if gqa and not flash(q):  # torch's other kernel that saves memory has no groups
        k, v = of_each_head(q, k, v)
        gqa = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def flash(q):
    """Whether torch has FlashAttention for q: on a GPU since Ampere, in 16 bits."""
    if not q.is_cuda:
        return True
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def of_each_head(q, *keys):
    """Keys, or values, (B, nk, S, hs) of a group for each of its heads (B, nh, S, hs)."""
    return [t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in keys]


def masked(q, k, v, scale, softcap, mask):
    """attend() by a matrix `mask`, or None where all keys are seen."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and (softcap or mask is not None or not flash(q)):
        k, v = of_each_head(q, k, v)
        gqa = False
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    logits = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)  # (B, nh, T, S)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.float().softmax(dim=-1).to(q.dtype) @ v  # (B, nh, T, hs)


class _Chunked(torch.autograd.Function):
    """causal(), a chunk of queries at a time: what a chunk needs is made again in backward."""

    @staticmethod
    def forward(ctx, q, k, v, scale, softcap, window):
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.softcap, ctx.window = scale, softcap, window
        y = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
        for queries, keys, mask in chunked(q, softcap, window):
            part = masked(q[:, :, queries], k[:, :, keys], v[:, :, keys], scale, softcap, mask)
            y[:, :, queries] = part
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        # several chunks see a key
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for queries, keys, mask in chunked(q, ctx.softcap, ctx.window):
            inputs = q[:, :, queries], k[:, :, keys], v[:, :, keys]
            inputs = [t.detach().requires_grad_() for t in inputs]
            with torch.enable_grad():
                part = masked(*inputs, ctx.scale, ctx.softcap, mask)
            gradients = torch.autograd.grad(part, inputs, dy[:, :, queries])
            dq[:, :, queries] = gradients[0]
            dk[:, :, keys] += gradients[1]
            dv[:, :, keys] += gradients[2]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def chunked(q, softcap, window):
    """Yield slices of q's tokens, of the keys that they see, and which sees which (queries, keys)
    bool."""
    B, heads, T, _ = q.shape
    size = QUERIES
    if softcap:
        size = max(1, min(size, LOGITS // (B * heads * window)))
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start - window + 1)
        query = torch.arange(start, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        yield slice(start, end), slice(first, end), (key <= query) & (query - key < window)


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
