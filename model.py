"""
LLaMA whose linear layers may be QLinear: INT8 weights with no float copy.

    RMSNorm -> attention (RoPE, grouped queries) -> RMSNorm -> SwiGLU, pre-norm, no biases   (arXiv 2302.13971)

Where the bytes go, 7B: the seven matrices of each block hold 6.48 of its 6.74 billion weights. In bf16 they and a
gradient each take 24 GiB before any optimizer. A QLinear keeps 1 byte a weight (6.2 GiB with scales), makes a float
copy for one product at a time, and in backward never forms its gradient: it hands the gradient's two factors, x and dy,
to a hook that the optimizer sets (see qgalore.py).
"""

import warnings
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import add_low_rank_int8_, dequantize_int8, matmul_int8, matmul_transposed_int8
from quant import GROUP_SIZE, chunks, quantize_int8

INIT_STD = 0.02
LOSS_CHUNK = 512  # tokens whose logits exist at once: 512 x 32000 float32 is 62 MiB, where 16 x 256 at once are 500


class QLinear(nn.Module):
    """y = x W^T with W (out_features, in_features) in 8 bits, group-wise, or with bits=16 plainly in `dtype`.

    W lies in buffers, since an INT8 tensor cannot require grad: q, scale, zero (see quant.py), or weight. Backward
    gives the input's gradient, then calls hook(layer, x, dy), if one is set, with x (T, in_features) and
    dy (T, out_features); the weight's gradient is dy^T x. Without a hook the weight stays as it is.

    matmul "int8" rounds x and dy to 8 bits in the products with W (see quant.py); the hook gets them unrounded.
    """

    def __init__(self, in_features, out_features, bits=8, group_size=GROUP_SIZE, dtype=None, device=None,
                 matmul="float"):
        super().__init__()
        if matmul not in ("float", "int8") or matmul == "int8" and bits != 8:
            raise ValueError(f"matmul {matmul!r} with {bits}-bit weights: there are float, and int8 for 8 bits")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.matmul, self.hook = matmul, None
        self.set_weight(torch.empty(out_features, in_features, dtype=dtype, device=device).normal_(std=INIT_STD))

    def set_weight(self, w):
        """Take w (out_features, in_features), any float dtype; with bits=16 it is kept as it is, not copied."""
        if self.bits == 8:
            for name, tensor in zip(("q", "scale", "zero"), quantize_int8(w, self.group_size)):
                self.register_buffer(name, tensor)
        else:
            self.register_buffer("weight", w)

    def float_weight(self, dtype=torch.float32):
        """W in `dtype`."""
        return dequantize_int8(self.q, self.scale, self.zero, dtype) if self.bits == 8 else self.weight.to(dtype)

    def add_low_rank_(self, left, right, shrink=1.0, key=None):
        """W <- shrink * W + left @ right^T; arguments as for quant.add_low_rank_int8_, which rounds INT8 weights."""
        if self.bits == 8:
            add_low_rank_int8_(self.q, self.scale, self.zero, left, right, shrink, key)
        else:
            self.weight.addmm_(left.to(self.weight.dtype), right.T.to(self.weight.dtype), beta=shrink)

    def forward(self, x):
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else a model's first layer has no backward, and no hook
        return _QLinearFunction.apply(x, self)


class _QLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        if layer.matmul == "int8":
            return matmul_int8(x.flatten(0, -2), layer.q, layer.scale, layer.zero).unflatten(0, x.shape[:-1])
        return F.linear(x, layer.float_weight(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        if layer.matmul == "int8":
            dx = matmul_transposed_int8(dy.flatten(0, -2), layer.q, layer.scale, layer.zero).view(x.shape)
        else:
            dx = dy @ layer.float_weight(dy.dtype)
        if layer.hook is not None:  # after dx, because the hook steps the weight
            layer.hook(layer, x.flatten(0, -2), dy.flatten(0, -2))
        return dx, None


@dataclass
class LLaMAConfig:
    block_size: int = 256
    vocab_size: int = 50304
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 8
    n_embd: int = 512
    ffn_dim: int = 1376
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embedding: bool = False
    checkpoint_activations: bool = False  # keep only the blocks' inputs, compute the rest again in backward
    checkpoint_bits: int = 16  # 8: those inputs in INT8; 16: as they are


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


class SwiGLU(nn.Module):
    """silu(gate) * up (arXiv 2002.05202)."""

    def forward(self, gate, up):
        return _SwiGLUFunction.apply(gate, up)


class _SwiGLUFunction(torch.autograd.Function):
    """Keeps gate and up alone and makes silu(gate) again: 86 MiB less a block at 7B."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class Rotate(nn.Module):
    """RoPE on x (..., T, head_dim), the two halves of a head as a pair's two coordinates, as in Hugging Face."""

    def forward(self, x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c, linear):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.block_size = c.block_size
        self.q_proj = linear(c.n_embd, c.n_head * self.head_dim)
        self.k_proj = linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.v_proj = linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.o_proj = linear(c.n_head * self.head_dim, c.n_embd)
        self.rotate = Rotate()

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nk, T, hs)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if cache is not None:  # a window of the last block_size keys: RoPE sees distances, not positions
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v = k[:, :, -self.block_size :], v[:, :, -self.block_size :]
        gqa = self.n_kv_head != self.n_head
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c, linear):
        super().__init__()
        self.gate_proj = linear(c.n_embd, c.ffn_dim)
        self.up_proj = linear(c.n_embd, c.ffn_dim)
        self.down_proj = linear(c.ffn_dim, c.n_embd)
        self.swiglu = SwiGLU()

    def forward(self, x):
        return self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c, linear, device=None):
        super().__init__()
        self.attn_norm = RMSNorm(c.n_embd, c.norm_eps, device)
        self.attn = Attention(c, linear)
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps, device)
        self.mlp = MLP(c, linear)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache)
        return x + self.mlp(self.mlp_norm(x))


class _Checkpoint(torch.autograd.Function):
    """A block of which only the input is kept: backward makes the rest again. bits 8 keeps the input group-wise in
    INT8, 0.5 in place of 1 GiB at 7B with 16 x 256 tokens."""

    @staticmethod
    def forward(ctx, x, block, cos, sin, bits):
        ctx.block, ctx.shape, ctx.dtype, ctx.bits = block, x.shape, x.dtype, bits
        ctx.save_for_backward(cos, sin, *(quantize_int8(x.flatten(0, -2)) if bits == 8 else (x,)))
        return block(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin, *x = ctx.saved_tensors
        x = dequantize_int8(*x, dtype=ctx.dtype).view(ctx.shape) if ctx.bits == 8 else x[0].detach()
        x.requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x, cos, sin)
        torch.autograd.backward(y, dy)  # steps the block's weights
        return x.grad, None, None, None, None


class LLaMA(nn.Module):
    """config: LLaMAConfig. linear: makes a layer of (in_features, out_features, device=, dtype=): QLinear, a partial
    of it, or plain_linear for full-rank training. Layers are built one after the other on
    `device`, so with QLinear at most one weight exists in float. dtype: of embedding and head (and float weights)."""

    def __init__(self, config, linear=QLinear, device=None, dtype=torch.float32):
        super().__init__()
        self.config = c = config
        if c.n_embd % c.n_head or c.n_head % c.n_kv_head or c.n_embd // c.n_head % 2:
            raise ValueError(f"n_embd {c.n_embd} must be n_head {c.n_head} times an even head size, "
                             f"and n_head a multiple of n_kv_head {c.n_kv_head}")

        layer = partial(linear, device=device, dtype=dtype)
        self.embed = nn.Embedding(c.vocab_size, c.n_embd, device=device, dtype=dtype)
        nn.init.normal_(self.embed.weight, std=INIT_STD)
        self.blocks = nn.ModuleList(Block(c, layer, device) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps, device)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False, device=device, dtype=dtype)
        if c.tie_embedding:
            self.head.weight = self.embed.weight
        else:
            nn.init.normal_(self.head.weight, std=INIT_STD)

    @classmethod
    def from_settings(cls, settings, device, dtype):
        """The model that a run's settings (train.py's, a dict) describe: QLinear for qgalore, else torch's Linear."""
        config = LLaMAConfig(**{f.name: settings[f.name] for f in fields(LLaMAConfig) if f.name in settings})
        if settings["method"] == "qgalore":
            linear = partial(QLinear, bits=settings["weight_bits"], group_size=settings["weight_group_size"],
                             matmul=settings.get("matmul", "float"))  # a checkpoint may be older than this key
        else:
            linear = plain_linear
        return cls(config, linear, device, dtype)

    def forward(self, idx, targets=None, caches=None, position=0):
        """idx, targets: (B, T) int64, target -1 counts for nothing. With targets the mean loss in nats a token;
        without, the last position's logits (B, vocab_size), float32. caches: one dict a block, filled as it goes, for
        the `position` tokens seen before idx."""
        x = self.embed(idx)  # (B, T, C)
        cos, sin = rope(position, idx.shape[1], self.config, x)
        for i, block in enumerate(self.blocks):
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = _Checkpoint.apply(x, block, cos, sin, self.config.checkpoint_bits)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        x = self.norm(x)
        if targets is None:
            return F.linear(x[:, -1], self.head.weight).float()
        return _HeadLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), torch.is_grad_enabled())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Yield max_new_tokens times the next token of each row, (B, 1) int64, sampled after the prompt idx (B, T).

        temperature 0 takes the likeliest. top_k 0 and top_p 1 leave all tokens in; else the k likeliest, and of those
        the fewest whose probabilities sum to top_p. Each token costs one position's work: keys and values are kept."""
        caches = [{} for _ in self.blocks]
        idx, position = idx[:, -self.config.block_size :], 0
        for _ in range(max_new_tokens):
            logits = self(idx, caches=caches, position=position)  # (B, V)
            position += idx.shape[1]
            if temperature == 0:
                idx = logits.argmax(dim=-1, keepdim=True)
            else:
                logits, token = (logits / temperature).topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # sorted
                p = logits.softmax(dim=-1)
                p[p.cumsum(dim=-1) - p >= top_p] = 0  # never the first, whose sum of larger ones is 0
                idx = token.gather(1, torch.multinomial(p, 1, generator=generator))
            yield idx

    def compile_pointwise(self):
        """torch.compile what lies between the matrices, each a few passes over memory in one."""
        try:
            torch.compile(lambda x: x.sin() * x)(self.norm.weight.detach())
        except Exception as e:  # no C++ compiler, no Triton
            reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
            warnings.warn(f"torch.compile fails, the model runs without it. {reason}")
            return
        for module in self.modules():
            if isinstance(module, (RMSNorm, Rotate, SwiGLU)):
                module.compile()

    def flops_per_token(self):
        """Of forward and backward, by the usual count 6 N + 12 L d T (PaLM, appendix B), N without the embedding."""
        c = self.config
        head_dim = c.n_embd // c.n_head
        block = 2 * c.n_embd * (c.n_head + c.n_kv_head) * head_dim + 3 * c.n_embd * c.ffn_dim
        return 6 * (c.n_layer * block + c.n_embd * c.vocab_size) + 12 * c.n_layer * c.n_embd * c.block_size


def plain_linear(n_in, n_out, device=None, dtype=None):
    """torch's Linear without bias, started from the draws that start a QLinear: a seed gives every method one model."""
    layer = nn.Linear(n_in, n_out, bias=False, device="meta")  # where its own start is not drawn
    layer.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype, device=device).normal_(std=INIT_STD))
    return layer


def rope(start, length, config, x):
    """cos and sin (length, head_dim) of RoPE's angles at positions start.. , in x's dtype and device."""
    dim = config.n_embd // config.n_head
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = torch.outer(torch.arange(start, start + length, device=x.device, dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the logits h W^T, LOSS_CHUNK tokens at a time, so that (T, V) logits never exist.

    Each chunk's gradients are taken while its logits are at hand, in forward: one pass, no recomputation.
    h (T, C), weight (V, C), targets (T,) int64 or -1. Returns the loss, float32; all targets -1 give 0."""

    @staticmethod
    def forward(ctx, h, weight, targets, need_grad):
        n = (targets >= 0).sum().clamp(min=1)
        loss = torch.zeros((), device=h.device)
        if need_grad:
            dh, dw = torch.empty_like(h), torch.zeros_like(weight)
        for i in chunks(h, len(h), LOSS_CHUNK):
            x, t = h[i : i + LOSS_CHUNK], targets[i : i + LOSS_CHUNK, None]
            logits = F.linear(x, weight).float()  # (chunk, V), in place from here to its gradient
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            valid, t = (t >= 0).float(), t.clamp(min=0)
            target = logits.gather(1, t)
            z = logits.exp_().sum(dim=-1, keepdim=True)
            loss += ((z.log() - target) * valid).sum()
            if need_grad:
                g = logits.mul_(valid / (n * z)).scatter_add_(1, t, -valid / n).to(h.dtype)  # (softmax - one-hot) / n
                dh[i : i + LOSS_CHUNK] = g @ weight
                dw.addmm_(g.T, x)
        if need_grad:
            ctx.save_for_backward(dh, dw)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return dh.mul_(grad), dw.mul_(grad), None, None  # in place: at 7B dw alone is 0.4 GiB
