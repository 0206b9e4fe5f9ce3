"""
LLaMA and its relatives, whose linear layers may be QLinear: INT8 weights with no float copy.

    RMSNorm -> attention (RoPE, grouped queries) -> RMSNorm -> SwiGLU, pre-norm, no biases   (arXiv 2302.13971)

Mistral slides a window over the keys, Qwen2 has biases on queries, keys and values, Gemma a gelu, wider heads, a scaled
embedding, and in version 2 more norms and soft caps: a field of LLaMAConfig each.

Where the bytes go, 7B: the seven matrices of each block hold 6.48 of its 6.74 billion weights. In bf16 they and a
gradient each take 24 GiB before any optimizer. A QLinear keeps 1 byte a weight (6.2 GiB with scales), makes a float
copy for one product at a time, and in backward never forms its gradient: it hands the gradient's two factors, x and dy,
to a hook that the optimizer sets (see qgalore.py).
"""

import re
import warnings
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from finetune.adapters import adapter, put_low_rank
from kernels.quantized import add_low_rank_int8_, dequantize_int8, matmul_int8, matmul_transposed_int8
from kernels.layers import GLU, Checkpoint, HeadLoss, RMSNorm, Rotate, attend, attention_mask, head_logits, last, rope
from quant import GROUP_SIZE, chunks, dequantize_nf4, quantize_int8, quantize_nf4

INIT_STD = 0.02
BUFFERS = {4: ("packed", "absmax", "absmax_scale", "absmax_mean"), 8: ("q", "scale", "zero"), 16: ("weight",)}


class QMatrix(nn.Module):
    """W (out_features, in_features) in 8 bits, group-wise; in 4 (NF4); or with bits=16 plainly in `dtype`. It lies in
    buffers, since an INT8 tensor cannot require grad: q, scale, zero (see quant.py), or weight."""

    def __init__(self, out_features, in_features, bits=8, group_size=GROUP_SIZE, dtype=None, device=None):
        super().__init__()
        if bits not in BUFFERS:
            raise ValueError(f"weights have 4, 8 or 16 bits, not {bits}")
        self.out_features, self.in_features, self.bits, self.group_size = out_features, in_features, bits, group_size
        self.set_weight(torch.empty(out_features, in_features, dtype=dtype, device=device).normal_(std=INIT_STD))

    def set_weight(self, w):
        """Take w (out_features, in_features), any float dtype; with bits=16 it is kept as it is, not copied."""
        if self.bits == 4:
            codes = [w] * 4 if w.is_meta else quantize_nf4(w)  # bitsandbytes needs numbers
        else:
            codes = quantize_int8(w, self.group_size) if self.bits == 8 else [w]
        for name, tensor in zip(BUFFERS[self.bits], codes):
            self.register_buffer(name, tensor)

    def base_weight(self, dtype=torch.float32):
        """W in `dtype`, without an adapter."""
        if self.bits == 4:
            codes = (self.packed, self.absmax, self.absmax_scale, self.absmax_mean)
            return dequantize_nf4(*codes, (self.out_features, self.in_features), dtype)
        return dequantize_int8(self.q, self.scale, self.zero, dtype) if self.bits == 8 else self.weight.to(dtype)

    float_weight = base_weight


class QEmbedding(QMatrix):
    """A frozen embedding, or a frozen head, in INT8: 1.0 GiB less of LLaMA-3-8B. Makes float what it is asked for:
    the rows of tokens, or SLICE rows at a time of all."""

    SLICE = 8192  # 64 MiB in bfloat16 at a width of 4096

    def __init__(self, vocab_size, dim, group_size=GROUP_SIZE, dtype=None, device=None):
        super().__init__(vocab_size, dim, 8, group_size, dtype, device)
        self.dtype = dtype

    def forward(self, idx):
        return dequantize_int8(*(t[idx.flatten()] for t in (self.q, self.scale, self.zero)), self.dtype).view(
            *idx.shape, -1)

    def slices(self, dtype):
        """(slice of rows, these rows in `dtype`), one after the other."""
        for start in chunks(self.q, self.out_features, self.SLICE):
            at = slice(start, start + self.SLICE)
            yield at, dequantize_int8(self.q[at], self.scale[at], self.zero[at], dtype)


class QLinear(QMatrix):
    """y = x W^T + b, W a QMatrix. bias: a parameter b, float32, or none.

    Backward gives the input's gradient, then calls hook(layer, x, dy), if one is set, with x (T, in_features) and
    dy (T, out_features); the weight's gradient is dy^T x. Without a hook the weight stays as it is.

    matmul "int8" rounds x and dy to 8 bits in the products with W (see quant.py); the hook gets them unrounded.
    """

    def __init__(self, in_features, out_features, bias=False, bits=8, group_size=GROUP_SIZE, dtype=None, device=None,
                 matmul="float"):
        super().__init__(out_features, in_features, bits, group_size, dtype, device)
        if matmul not in ("float", "int8") or matmul == "int8" and bits != 8:
            raise ValueError(f"matmul {matmul!r} with {bits}-bit weights: there are float, and int8 for 8 bits")
        self.matmul, self.hook = matmul, None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.adapter = None  # of adapters.py

    def float_weight(self, dtype=torch.float32):
        """What the layer multiplies by, in `dtype`: W, with its adapter merged into it."""
        if self.adapter is None:
            return self.base_weight(dtype)
        return (self.base_weight() + self.adapter.delta()).to(dtype)

    def add_low_rank_(self, left, right, shrink=1.0, key=None):
        """W <- shrink * W + left @ right^T, without right + left; arguments as for quant.add_low_rank_int8_, which
        rounds INT8 weights."""
        if self.bits == 8:
            add_low_rank_int8_(self.q, self.scale, self.zero, left, right, shrink, key)
        elif right is None:
            self.weight.mul_(shrink).add_(left)
        else:
            self.weight.addmm_(left.to(self.weight.dtype), right.T.to(self.weight.dtype), beta=shrink)

    def forward(self, x):
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # else a model's first layer has no backward, and no hook
        y = _QLinearFunction.apply(x, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class _QLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        if layer.hook is not None:
            ctx.save_for_backward(x)
        if layer.matmul == "int8":
            return matmul_int8(x.flatten(0, -2), layer.q, layer.scale, layer.zero).unflatten(0, x.shape[:-1])
        return F.linear(x, layer.base_weight(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        layer = ctx.layer
        if layer.matmul == "int8":
            dx = matmul_transposed_int8(dy.flatten(0, -2), layer.q, layer.scale, layer.zero)
            dx = dx.unflatten(0, dy.shape[:-1])
        else:
            dx = dy @ layer.base_weight(dy.dtype)
        if ctx.saved_tensors:  # after dx, because the hook steps the weight
            layer.hook(layer, ctx.saved_tensors[0].flatten(0, -2), dy.flatten(0, -2))
        return dx, None


def quantize_linears(model, pattern="", bits=8, group_size=GROUP_SIZE):
    """Put a QLinear in the place of every torch Linear of `model` whose name matches the regular expression `pattern`
    (re.search; "" matches all), one after the other. Returns their names; raises ValueError if there is none."""
    names = [n for n, module in model.named_modules() if type(module) is nn.Linear and re.search(pattern, n)]
    for name in names:
        old = model.get_submodule(name)
        layer = QLinear(old.in_features, old.out_features, bits=bits, group_size=group_size, device="meta")
        layer.set_weight(old.weight.detach())
        layer.bias = old.bias
        model.set_submodule(name, layer)
    if not names:
        raise ValueError(f"no torch Linear in the model has a name that matches {pattern!r}")
    return names


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
    rope_scaling: str = ""  # see layers.rope
    norm_eps: float = 1e-6
    tie_embedding: bool = False
    head_dim: int = 0  # 0: n_embd / n_head
    activation: str = "silu"  # or "gelu"
    qkv_bias: bool = False
    embed_scale: float = 1.0  # of the embedding's output
    attn_scale: float = 0.0  # of q k^T; 0: head_dim^-1/2
    attn_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: they stay
    logit_softcap: float = 0.0
    post_norms: bool = False  # norms after attention and MLP, too
    sliding_window: int = 0  # keys that a token sees, itself among them; 0: all before it
    global_every: int = 0  # with a window: every n-th layer sees all keys; 0: none does
    low_rank: str = ""  # "NAME=RANK ...": matrices of blocks that are two factors (welore.py)
    architecture: str = "LlamaForCausalLM"  # as Hugging Face names it, for hf.py
    checkpoint_activations: bool = False  # keep only the blocks' inputs, compute the rest again in backward
    checkpoint_bits: int = 16  # 8: those inputs in INT8; 16: as they are

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if not self.head_dim or self.head_dim % 2 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd {self.n_embd} must be n_head {self.n_head} times an even head size, "
                             f"and n_head a multiple of n_kv_head {self.n_kv_head}")
        self.ranks = {name: int(rank) for name, _, rank in (part.rpartition("=") for part in self.low_rank.split())}


class Attention(nn.Module):
    def __init__(self, c, linear):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.block_size, self.softcap, self.scale = c.block_size, c.attn_softcap, c.attn_scale or c.head_dim**-0.5
        self.q_proj = linear(c.n_embd, c.n_head * c.head_dim, c.qkv_bias)
        self.k_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, c.qkv_bias)
        self.v_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, c.qkv_bias)
        self.o_proj = linear(c.n_head * c.head_dim, c.n_embd)
        self.rotate = Rotate()

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, nk, T, hs)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if cache is not None:
            if "k" in cache:  # (of one row: the beginning that all rows share)
                k = torch.cat([cache["k"].expand(B, -1, -1, -1), k], dim=2)
                v = torch.cat([cache["v"].expand(B, -1, -1, -1), v], dim=2)
            cache["k"], cache["v"] = last(k, self.block_size - 1, 2), last(v, self.block_size - 1, 2)
        y = attend(q, k, v, self.scale, self.softcap, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c, linear):
        super().__init__()
        self.gate_proj = linear(c.n_embd, c.ffn_dim)
        self.up_proj = linear(c.n_embd, c.ffn_dim)
        self.down_proj = linear(c.ffn_dim, c.n_embd)
        self.glu = GLU(c.activation)

    def forward(self, x):
        return self.down_proj(self.glu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c, linear, number, device=None):
        super().__init__()
        norm = partial(RMSNorm, c.n_embd, c.norm_eps, device)
        self.slides = bool(c.sliding_window) and not (c.global_every and (number + 1) % c.global_every == 0)
        self.attn_norm, self.attn = norm(), Attention(c, linear)
        self.mlp_norm, self.mlp = norm(), MLP(c, linear)
        self.attn_post_norm, self.mlp_post_norm = (norm() if c.post_norms else nn.Identity() for _ in range(2))

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin, mask, cache))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class LLaMA(nn.Module):
    """config: LLaMAConfig. linear: makes a layer of (in_features, out_features, bias, device=, dtype=): QLinear, a
    partial of it, or plain_linear for full-rank training. Layers are built one after the other on
    `device`, so with QLinear at most one weight exists in float. dtype: of embedding and head (and float weights).
    embedding: makes both of (vocab_size, n_embd, device=, dtype=): a QEmbedding, or plain_embedding, to be trained."""

    def __init__(self, config, linear=QLinear, device=None, dtype=torch.float32, embedding=None):
        super().__init__()
        self.config = c = config
        layer = partial(linear, device=device, dtype=dtype)
        embedding = partial(embedding or plain_embedding, c.vocab_size, c.n_embd, device=device, dtype=dtype)
        self.embed = embedding()
        self.blocks = nn.ModuleList(Block(c, layer, i, device) for i in range(c.n_layer))
        put_low_rank(self, c.ranks, dtype, device)
        self.norm = RMSNorm(c.n_embd, c.norm_eps, device)
        self.head = self.embed if c.tie_embedding else embedding()  # of which only the rows are used

    @classmethod
    def from_settings(cls, settings, device, dtype, load=None):
        """The model that a run's settings (train.py's, a dict) describe: torch's Linear for full rank, else QLinear,
        with adapters for LoRA and LoQT. A checkpoint that is tuned by LoRA has nothing else to train. load: fills the
        model, which is then built on "meta"."""
        c, method = settings, settings["method"]
        config = LLaMAConfig(**{f.name: c[f.name] for f in fields(LLaMAConfig) if f.name in c})
        linear = plain_linear
        if method not in ("adamw", "adam8bit"):
            linear = partial(QLinear, bits=c["weight_bits"], group_size=c["weight_group_size"],
                             matmul=c.get("matmul", "float"))  # a checkpoint may be older than this key
        embedding = partial(QEmbedding, group_size=c["weight_group_size"]) if c.get("embed_bits") == 8 else None
        model = cls(config, linear, "meta" if load else device, dtype, embedding)
        if load:
            load(model)
        if c.get("freeze_embedding") or method == "welore":
            model.embed.requires_grad_(False), model.head.requires_grad_(False)
        if method in ("lora", "qlora") and c.get("pretrained"):
            model.requires_grad_(False)
        if method in ("lora", "qlora", "relora", "loqt"):
            for layer in [module for module in model.modules() if isinstance(module, QLinear)]:
                layer.adapter = adapter(layer.out_features, layer.in_features, c, dtype, device)
        return model

    def hidden(self, idx, caches=None, position=0, documents=None):
        """The last norm's output (B, T, C) for tokens idx (B, T) int64. caches: one dict a block, filled as it goes,
        for the `position` tokens seen before idx; of one row, if all rows of idx share them. documents: (B, T) int64: a
        token sees only tokens of its own number, so that a row may hold several texts, or padding at its left."""
        T, c = idx.shape[1], self.config
        x = self.embed(idx)  # (B, T, C)
        if c.embed_scale != 1:
            x = x * torch.tensor(c.embed_scale, dtype=x.dtype)  # rounded to x's dtype first, as in Gemma's own code
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # frozen embedding: the blocks have a backward all the same
        past = caches[0]["k"].shape[2] if caches and "k" in caches[0] else 0
        seen = caches[0].get("documents") if past else None
        if seen is not None or past and documents is not None:  # where one of the two is not given, its text goes on
            seen = (documents[:, :1].expand(-1, past) if seen is None else seen).expand(len(idx), -1)
            documents = torch.cat([seen, seen[:, -1:].expand(-1, T) if documents is None else documents], dim=1)
        if caches and documents is not None:
            caches[0]["documents"] = last(documents, c.block_size - 1, 1)
        most = c.block_size if past else T  # keys that a token may see
        masks = [attention_mask(past, T, min(most, window or most), documents, x.device)
                 for window in (0, c.sliding_window)]
        cos, sin = rope(position, T, c, x)
        for i, block in enumerate(self.blocks):
            mask = masks[block.slides]
            if c.checkpoint_activations and torch.is_grad_enabled():
                x = Checkpoint.apply(x, block, c.checkpoint_bits, cos, sin, mask)
            else:
                x = block(x, cos, sin, mask, caches[i] if caches else None)
        return self.norm(x)

    def _head_rows(self):
        return self.head if isinstance(self.head, QEmbedding) else self.head.weight

    def logits(self, h):
        """Logits (..., vocab_size), float32, of hidden states h (..., C)."""
        logits, cap = head_logits(h, self._head_rows()), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx, targets=None, caches=None, position=0, documents=None):
        """idx, targets: (B, T) int64, target -1 counts for nothing. With targets the mean loss in nats a token;
        without, the last position's logits (B, vocab_size), float32. The rest as in hidden()."""
        x = self.hidden(idx, caches, position, documents)
        if targets is None:
            return self.logits(x[:, -1])
        x, targets = x.flatten(0, 1), targets.flatten()
        if documents is not None:  # examples, of which few tokens may count: no logits of the others
            at = (targets >= 0).nonzero()[:, 0]
            x, targets = x[at], targets[at]
        return HeadLoss.apply(x, self._head_rows(), targets, self.config.logit_softcap, torch.is_grad_enabled())

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
            if isinstance(module, (RMSNorm, Rotate, GLU)):
                module.compile()

    def flops_per_token(self):
        """Of forward and backward, by the usual count 6 N + 12 L d T (PaLM, appendix B), N without the embedding."""
        c = self.config
        block = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_dim + 3 * c.n_embd * c.ffn_dim
        return 6 * (c.n_layer * block + c.n_embd * c.vocab_size) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def plain_embedding(vocab_size, dim, device=None, dtype=None):
    """torch's Embedding, started like the rest."""
    layer = nn.Embedding(vocab_size, dim, device=device, dtype=dtype)
    nn.init.normal_(layer.weight, std=INIT_STD)
    return layer


def plain_linear(n_in, n_out, bias=False, device=None, dtype=None):
    """torch's Linear, started from the draws that start a QLinear: a seed gives every method one model."""
    layer = nn.Linear(n_in, n_out, bias=bias, device="meta")  # where its own start is not drawn
    layer.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype, device=device).normal_(std=INIT_STD))
    if bias:
        layer.bias = nn.Parameter(torch.zeros(n_out, dtype=dtype, device=device))
    return layer
