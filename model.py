"""
LLaMA, whose linear layers may be QLinear: INT8 weights with no float copy.

    RMSNorm -> attention (RoPE, grouped queries) -> RMSNorm -> SwiGLU     (arXiv 2302.13971)

Fields of LLaMAConfig make its relatives, from Mistral's window over the keys to Gemma 3's two kinds
of RoPE: finetune/checkpoints/architectures.py has what each one is.

Where the bytes go at 7B: the seven matrices of each block hold 6.48 of its 6.74 billion weights. In
bf16, weights and gradients take 12 GiB each before there is any optimizer. A QLinear keeps one byte
a weight, 6.2 GiB with scales, and makes a float copy for one product at a time. In backward it
hands its gradient's two factors, x and dy, to a hook that the optimizer sets (see qgalore.py).
"""

import re
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import all_documents, attend, attention_masks, last, ropes, rotate
from kernels.lean import (GLU, INIT_STD, Checkpoint, NoNorm, RMSNorm, plain_embedding,  # noqa
                          plain_linear, qk_norm)
from kernels.loss import head_logits, head_loss
from kernels.matmul import matmul_int8, matmul_transposed_int8
from quant import (GROUP_SIZE, add_low_rank_int8_, chunks, dequantize_int8, dequantize_nf4,
                   quantize_int8, quantize_nf4)
from run.ranges import OF_MODEL, check_values

# -----------------------------------------------------------------------------
# matrices in few bits


class QMatrix(nn.Module):
    """A matrix W (out_features, in_features) in few bits.

    bits 8: INT8 in groups of group_size columns; 0: a row is one group. bits 4: NF4. bits 16:
    plainly in `dtype`. W lies in buffers, since an INT8 tensor cannot require grad: q, scale, zero
    (see quant.py), or NF4's four, or weight."""

    BUFFERS = {
        4: ("packed", "absmax", "absmax_scale", "absmax_mean"),
        8: ("q", "scale", "zero"),
        16: ("weight",),
    }

    def __init__(self, out_features, in_features, bits=8, group_size=GROUP_SIZE, dtype=None,
                 device=None):
        super().__init__()
        if bits not in self.BUFFERS:
            raise ValueError(f"weights have 4, 8 or 16 bits, not {bits}")
        self.out_features = out_features
        self.in_features = in_features
        self.bits = bits
        self.group_size = group_size
        w = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.set_weight(w.normal_(std=INIT_STD))  # one float matrix at a time

    def set_weight(self, w):
        """Take w (out_features, in_features), any float dtype; with bits=16 it is not copied."""
        if self.bits == 8:
            codes = quantize_int8(w, self.group_size)
        elif self.bits == 16:
            codes = [w]
        elif w.is_meta:  # bitsandbytes needs numbers
            codes = [w] * 4
        else:
            codes = quantize_nf4(w)
        for name, tensor in zip(self.BUFFERS[self.bits], codes):
            self.register_buffer(name, tensor)  # in the place of the one before

    def base_weight(self, dtype=torch.float32):
        """W in `dtype`, without an adapter."""
        if self.bits == 8:
            return dequantize_int8(self.q, self.scale, self.zero, dtype)
        if self.bits == 16:
            return self.weight.to(dtype)
        codes = (self.packed, self.absmax, self.absmax_scale, self.absmax_mean)
        return dequantize_nf4(*codes, (self.out_features, self.in_features), dtype)

    float_weight = base_weight


class QEmbedding(QMatrix):
    """A frozen embedding or head in INT8: 1.0 GiB less of LLaMA-3-8B.

    Makes float what it is asked for: the rows of tokens, or SLICE rows of all at a time."""

    SLICE = 8192  # 64 MiB in bfloat16 at a width of 4096

    def __init__(self, vocab_size, dim, group_size=GROUP_SIZE, dtype=None, device=None):
        super().__init__(vocab_size, dim, 8, group_size, dtype, device)
        self.dtype = dtype

    def forward(self, idx):
        rows = idx.flatten()  # (B T,)
        w = dequantize_int8(self.q[rows], self.scale[rows], self.zero[rows], self.dtype)
        return w.view(*idx.shape, -1)  # (B, T, C)

    def slices(self, dtype):
        """(slice of rows, these rows in `dtype`), one after the other."""
        for start in chunks(self.q, self.out_features, self.SLICE):
            at = slice(start, start + self.SLICE)
            yield at, dequantize_int8(self.q[at], self.scale[at], self.zero[at], dtype)


class QLinear(QMatrix):
    """y = x W^T + b, W a QMatrix. bias: a parameter b, float32, or none.

    Backward gives the input's gradient. Then it calls hook(layer, x, dy), if one is set, with
    x (T, in_features) and dy (T, out_features): the weight's gradient is dy^T x. Without a hook the
    weight stays as it is; no optimizer sets one where `trains` is False.

    uses: forward calls whose backward is pending. A layer that a model uses twice has its whole
    gradient only when this is empty.

    matmul "int8" rounds x and dy to 8 bits in products with W, whose rows are one group each (see
    kernels/matmul.py); the hook gets them unrounded. adapter: a module beside W that adds
    adapter(x), such as LoRA."""

    def __init__(self, in_features, out_features, bias=False, bits=8, group_size=GROUP_SIZE,
                 dtype=None, device=None, matmul="float"):
        super().__init__(out_features, in_features, bits, group_size, dtype, device)
        by_row = bits == 8 and self.scale.shape[1] == 1
        if matmul not in ("float", "int8") or matmul == "int8" and not by_row:
            raise ValueError(f"matmul {matmul!r} with {bits}-bit weights: there are float, and for "
                             "8 bits with a group a row (weight_group_size=0) int8")
        self.matmul = matmul
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.adapter = None
        self.trains = True
        self.graph_only = False  # whether forward's result is not read, see lean.Checkpoint
        self.hook = None
        self.task = None  # the number of the backward that calls the hook; -1: see backward
        self.anchor = torch.empty(0, requires_grad=True)  # a leaf: only a whole backward goes there
        self.uses = weakref.WeakSet()  # a forward whose result is thrown away leaves by itself

    def __getstate__(self):
        """For a copy or a file, which belong to no optimizer."""
        return self.__dict__ | {"hook": None, "uses": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.uses = weakref.WeakSet()

    def float_weight(self, dtype=torch.float32):
        """What the layer multiplies by, in `dtype`: W, with its adapter merged into it."""
        if self.adapter is None:
            return self.base_weight(dtype)
        return (self.base_weight() + self.adapter.delta()).to(dtype)  # the sum in float32

    def add_low_rank_(self, left, right, shrink=1.0, key=None):
        """W <- shrink * W + left @ right^T, or + left where right is None.

        left (out, r) and right (in, r), or left (out, in): of one float dtype. key: of the numbers
        that round INT8 weights, see quant.add_low_rank_int8_; None rounds to nearest."""
        if self.bits == 8:
            add_low_rank_int8_(self.q, self.scale, self.zero, left, right, shrink, key)
        elif right is None:
            self.weight.mul_(shrink).add_(left)
        else:
            left, right = left.to(self.weight.dtype), right.to(self.weight.dtype)
            self.weight.addmm_(left, right.T, beta=shrink)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # by its anchor a model's first layer has a backward, too
        y = _QLinearFunction.apply(x, self.anchor if torch.is_grad_enabled() else None, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class _QLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, layer):
        ctx.layer = layer
        if layer.hook is not None and anchor is not None:
            ctx.save_for_backward(x)
            layer.uses.add(ctx)
            ctx.within = torch._C._current_graph_task_id()  # a checkpoint's backward, or -1: none
        if layer.graph_only:
            return x.new_empty(*x.shape[:-1], layer.out_features)
        if layer.matmul == "int8":
            y = matmul_int8(x.reshape(-1, x.shape[-1]), layer.q, layer.scale, layer.zero)
            return y.reshape(*x.shape[:-1], layer.out_features)
        return F.linear(x, layer.base_weight(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        layer = ctx.layer
        saved = ctx.saved_tensors
        dx = None
        if not ctx.needs_input_grad[0]:
            pass  # the model's input
        elif layer.matmul == "int8":
            rows = dy.reshape(-1, dy.shape[-1])
            dx = matmul_transposed_int8(rows, layer.q, layer.scale, layer.zero)
            dx = dx.reshape(*dy.shape[:-1], layer.in_features)
        else:
            dx = dy @ layer.base_weight(dy.dtype)
        if saved:  # after dx, because the hook steps the weight
            layer.task = -1  # torch.autograd.grad() asks for gradients of other things alone
            if torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
                layer.uses.discard(ctx)
                task = torch._C._current_graph_task_id()
                layer.task = task if ctx.within == -1 else ctx.within
            x = saved[0].reshape(-1, layer.in_features)
            layer.hook(layer, x, dy.reshape(-1, layer.out_features))
        return dx, None, None


def quantize_linears(model, pattern="", bits=8, group_size=GROUP_SIZE):
    """Put a QLinear in the place of torch's Linears of `model`, one after the other.

    pattern: a regular expression that their names match (re.search; "" matches all). A Linear that
    does not require grad becomes a QLinear that does not train. Returns the names; raises
    ValueError if there is none, or if the weight of one has a second place in the model."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = [name for name in linears if re.search(pattern, name)]
    if not names:
        raise ValueError(f"no torch Linear in the model has a name that matches {pattern!r}")
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in names:
        old = model.get_submodule(name)
        if places[id(old.weight)] > 1:  # as of a tied head
            raise ValueError(f"{name}'s weight has another place in the model, from which a QLinear"
                             " would part it: choose a pattern without it")
        shape = old.in_features, old.out_features
        layer = QLinear(*shape, bits=bits, group_size=group_size, device="meta")
        layer.set_weight(old.weight.detach())
        layer.bias = old.bias
        layer.trains = old.weight.requires_grad  # frozen stays frozen
        model.set_submodule(name, layer)
    return names


# -----------------------------------------------------------------------------
# the model


@dataclass
class LLaMAConfig:
    block_size: int = 256
    vocab_size: int = 50304
    n_layer: int = 8
    n_head: int = 8
    n_kv_head: int = 0  # key/value heads; 0: n_head
    n_embd: int = 512
    ffn_dim: int = 1376
    rope_theta: float = 10000.0
    rope_scaling: str = ""  # see rope()
    rope_dim: int = 0  # so many numbers of each head are turned by RoPE; 0: all
    rope_local_theta: float = 0.0  # of layers with a window, plain RoPE; 0: the same as of others
    nope_every: int = 0  # every n-th layer has no RoPE; 0: all have
    norm_eps: float = 1e-6
    tie_embedding: bool = False
    head_dim: int = 0  # 0: n_embd / n_head
    activation: str = "silu"  # or "gelu", by tanh, or "gelu_erf"
    qkv_bias: bool = False
    embed_scale: float = 1.0  # of the embedding's output
    attn_scale: float = 0.0  # of q k^T; 0: head_dim^-1/2
    attn_softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0: they stay
    logit_softcap: float = 0.0
    qk_norm: str = ""  # of queries and keys: of each "head", or of "all" at once; "": none
    pre_norms: bool = True  # norms before attention and MLP
    post_norms: bool = False  # and after them
    sliding_window: int = 0  # keys that a token sees, itself among them; 0: all before it
    global_every: int = 0  # with a window: every n-th layer sees all keys; 0: none does
    low_rank: str = ""  # matrices replaced by two factors after the build, see finetune/adapters.py
    architecture: str = "LlamaForCausalLM"  # as Hugging Face names it
    checkpoint_activations: bool = False  # keep only blocks' inputs, make the rest in backward
    checkpoint_bits: int = 16  # 8: those inputs in INT8; 16: as they are

    def __post_init__(self):
        check_values(OF_MODEL, vars(self))
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim and self.n_embd % self.n_head == 0:
            self.head_dim = self.n_embd // self.n_head
        if not self.head_dim or self.head_dim % 2 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_embd {self.n_embd} must be n_head {self.n_head} times an even head size, "
                f"and n_head a multiple of n_kv_head {self.n_kv_head}"
            )


class Attention(nn.Module):
    def __init__(self, c, linear, device=None):
        super().__init__()
        self.n_head = c.n_head
        self.n_kv_head = c.n_kv_head
        self.head_dim = c.head_dim
        self.block_size = c.block_size
        self.softcap = c.attn_softcap
        self.scale = c.attn_scale or c.head_dim**-0.5
        self.q_proj = linear(c.n_embd, c.n_head * c.head_dim, c.qkv_bias)
        self.k_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, c.qkv_bias)
        self.v_proj = linear(c.n_embd, c.n_kv_head * c.head_dim, c.qkv_bias)
        self.o_proj = linear(c.n_head * c.head_dim, c.n_embd)
        self.q_norm, self.k_norm = (qk_norm(c, n, device) for n in (c.n_head, c.n_kv_head))

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x)).view(B, T, self.n_head, self.head_dim)
        k = self.k_norm(self.k_proj(x)).view(B, T, self.n_kv_head, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim)
        q, k = rotate(q, k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs), (B, nk, T, hs)
        if cache is not None:
            if "k" in cache:  # of one row, where all rows begin alike
                k = torch.cat([cache["k"].expand(B, -1, -1, -1), k], dim=2)
                v = torch.cat([cache["v"].expand(B, -1, -1, -1), v], dim=2)
            # the next token adds its own to block_size - 1 keys; RoPE sees only distances
            cache["k"] = last(k, self.block_size - 1, 2)
            cache["v"] = last(v, self.block_size - 1, 2)
        y = attend(q, k, v, self.scale, self.softcap, mask)  # (B, nh, T, hs)
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
        is_global = c.global_every and (number + 1) % c.global_every == 0
        self.slides = bool(c.sliding_window) and not is_global
        self.rotates = not c.nope_every or (number + 1) % c.nope_every != 0
        self.attn_norm = norm() if c.pre_norms else NoNorm()
        self.attn = Attention(c, linear, device)
        self.mlp_norm = norm() if c.pre_norms else NoNorm()
        self.mlp = MLP(c, linear)
        self.attn_post_norm = norm() if c.post_norms else nn.Identity()
        self.mlp_post_norm = norm() if c.post_norms else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        x, h = self.attn_norm.residual(x)
        h = self.attn_post_norm(self.attn(h, cos, sin, mask, cache))
        x, h = self.mlp_norm.residual(x, h)  # x + h and its norm
        return x + self.mlp_post_norm(self.mlp(h))


class LLaMA(nn.Module):
    """Embedding, blocks, norm and head, built one after the other on `device`: with QLinear at most
    one weight exists in float. linear: makes a layer of (in_features, out_features, bias, device=,
    dtype=): QLinear, a partial of it, or plain_linear for full-rank training.

    dtype: of embedding and head, and of float weights. embedding: makes both of (vocab_size,
    n_embd, device=, dtype=): QEmbedding, or plain_embedding, which is trained."""

    def __init__(self, config, linear=QLinear, device=None, dtype=torch.float32, embedding=None):
        super().__init__()
        self.config = c = config
        layer = partial(linear, device=device, dtype=dtype)
        embedding = embedding or plain_embedding
        self.embed = embedding(c.vocab_size, c.n_embd, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(c, layer, i, device) for i in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps, device)
        if c.tie_embedding:
            self.head = self.embed
        else:  # of which only the rows are used
            self.head = embedding(c.vocab_size, c.n_embd, device=device, dtype=dtype)

    def begin(self, idx, caches=None, position=0, documents=None):
        """What blocks read of tokens idx (B, T): x (B, T, C), and for each block (cos, sin, mask).
        Arguments: as for hidden()."""
        T = idx.shape[1]
        c = self.config
        x = self.embed(idx)  # (B, T, C)
        if c.embed_scale != 1:  # rounded to x's dtype first, as in Gemma's own code
            x = x * torch.tensor(c.embed_scale, dtype=x.dtype)
        past = caches[0]["k"].shape[2] if caches and "k" in caches[0] else 0
        if caches:
            documents = all_documents(caches[0], documents, len(idx), past, T, c.block_size)
        most = c.block_size if past else T  # keys that a token may see
        masks = attention_masks(past, T, most, c.sliding_window, documents, x.device)
        angles = ropes(position, T, c, x)
        return x, [(*angles[b.slides if b.rotates else None], masks[b.slides]) for b in self.blocks]

    def hidden(self, idx, caches=None, position=0, documents=None):
        """The last norm's output (B, T, C) for tokens idx (B, T) int64.

        caches: one dict a block, filled as it goes, for the `position` tokens seen before idx; of
        one row, if all rows of idx share them. documents (B, T) int64: a token sees only tokens of
        its own number, so that a row may hold several texts, or padding at its left."""
        c = self.config
        x, beside = self.begin(idx, caches, position, documents)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # frozen embedding: the blocks have a backward all the same
        for i, block in enumerate(self.blocks):
            if c.checkpoint_activations and torch.is_grad_enabled():
                x = Checkpoint.apply(x, block, c.checkpoint_bits, *beside[i])
            else:
                x = block(x, *beside[i], caches[i] if caches else None)
        return self.norm(x)

    def head_rows(self):
        """The head's weight (V, C): a tensor, or a QEmbedding."""
        return self.head if isinstance(self.head, QEmbedding) else self.head.weight

    def logits(self, h):
        """Logits (..., vocab_size), float32, of hidden states h (..., C)."""
        logits = head_logits(h, self.head_rows())
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx, targets=None, caches=None, position=0, documents=None):
        """The mean loss in nats a token, or without targets the last position's logits.

        idx, targets: (B, T) int64; a target of -1 counts for nothing. Logits are (B, vocab_size),
        float32. The rest as in hidden()."""
        h = self.hidden(idx, caches, position, documents)
        return self.logits(h[:, -1]) if targets is None else self.loss(h, targets, documents)

    def loss(self, h, targets, documents=None):
        """The mean loss of the last norm's output h (B, T, C). Arguments: as for forward()."""
        h = h.flatten(0, 1)  # (B T, C)
        targets = targets.flatten()  # (B T,)
        if documents is not None:  # examples, of which few tokens count: no logits of the others
            at = (targets >= 0).nonzero()[:, 0]
            h, targets = h[at], targets[at]
        return head_loss(h, self.head_rows(), targets, self.config.logit_softcap)
