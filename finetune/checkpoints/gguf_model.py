"""
A LLaMA as one GGUF file, which llama.cpp, Ollama and LM Studio run.
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-tuned.gguf

The file has the model's numbers, its tokenizer (gguf_tokenizer.py) and its tensors. Matrices are in
Q8_0: blocks of 32 values along a row, 32 int8 codes and a float16 scale,

    value = scale * code        code in -127..127

34 bytes a block, 1.06 bytes a value. Our own INT8 has a zero beside its scale, and larger groups:
values are computed in float32, some rows at a time, and rounded again. A matrix whose rows are no
multiple of 32 is in float16, as llama.cpp has it. Norms and biases are float32.

llama.cpp's code fixes for each architecture what config.json may say: an activation, an order of
windows. KINDS says what that is, and another model is refused. It has one line an architecture.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from finetune.checkpoints.architectures import ARCHITECTURES
from finetune.checkpoints.gguf_tokenizer import vocabulary
from finetune.checkpoints.hf_load import hf_names
from finetune.checkpoints.paths import check_new
from kernels.attention import frequencies
from model import QMatrix
from quant import CHUNK, dequantize_int8
from run.files import replacing
from run.text import first_line

try:
    import gguf
except ImportError:  # an extra: hf.py says so
    gguf = None

WEIGHTS = ("q8_0", "f16")  # what matrices may be written in
BLOCK = 32  # values of a Q8_0 block
LARGEST = 65504.0  # of float16
TURNED = ("attn_q", "attn_k")  # whose rows RoPE turns in pairs


@dataclass
class Kind:
    """What llama.cpp computes for an architecture, by itself."""

    name: str  # llama.cpp's
    activation: str = "silu"
    # a head's pairs are neighbours for RoPE, not its two halves: rows of q and k change places
    neighbours: bool = False
    ropes: tuple = ("", "linear", "yarn")  # kinds of its scaling
    nope_every: int = 0
    softcaps: bool = False
    global_every: int = 0  # every which layer sees all keys, where the others have a window
    local_rope: bool = False  # and where those have a RoPE of their own
    wide: int = 0  # layers of the one size whose scale of attention is by n_embd / n_head


LLAMA = Kind("llama", neighbours=True, ropes=(*Kind.ropes, "llama3"))
KINDS = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Ministral3ForCausalLM": Kind("mistral3", neighbours=True),
    "Phi3ForCausalLM": Kind("phi3", ropes=(*Kind.ropes, "longrope")),
    "Qwen2ForCausalLM": Kind("qwen2"),
    "Qwen3ForCausalLM": Kind("qwen3"),
    "SmolLM3ForCausalLM": Kind("smollm3", neighbours=True, nope_every=4),
    "Olmo2ForCausalLM": Kind("olmo2"),
    "Olmo3ForCausalLM": Kind("olmo2", global_every=4, local_rope=True),
    "GemmaForCausalLM": Kind("gemma", "gelu"),
    "Gemma2ForCausalLM": Kind("gemma2", "gelu", softcaps=True, global_every=2, wide=46),
    "Gemma3ForCausalLM": Kind("gemma3", "gelu", global_every=6, local_rope=True, wide=62),
}


@torch.no_grad()
def save(model, path, weights="q8_0", like=None, encoding=None):
    """Write a LLaMA as the GGUF file `path`, tensor by tensor, adapters merged.

    weights: of WEIGHTS. like: the checkpoint directory whose tokenizer the file gets. encoding: a
    tiktoken.Encoding, where there is none. The file takes its name when it is complete. Raises
    ValueError if it exists, if llama.cpp has no such model or no such tokenizer, or if values do
    not fit."""
    path = check_new(path, "file")
    c = model.config
    kind = _kind(c)
    words = vocabulary(like, encoding, c.vocab_size)
    tensors = _tensors(model, kind, weights)
    try:
        with replacing(path) as f:
            writer = gguf.GGUFWriter(f.name, kind.name)
            try:
                writer.add_name(os.path.basename(path).removesuffix(".gguf"))
                _describe(writer, c, kind, weights)
                for key, value in words.items():
                    getattr(writer, f"add_{key}")(value)
                _write(writer, tensors)
            finally:
                writer.close()
    except OSError as e:
        raise ValueError(f"could not write {path}: {first_line(e)}")


def _kind(c):
    """The Kind of a LLaMAConfig. Raises ValueError if llama.cpp would compute something else."""
    if c.architecture not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{c.architecture} has no place in GGUF here; there are {known}")
    kind = KINDS[c.architecture]
    width = c.n_embd // c.n_head if c.n_layer == kind.wide else c.head_dim
    fixed = {
        "activation": (c.activation, kind.activation),
        "nope_every": (_every(c.nope_every, c), _every(kind.nope_every, c)),
        "attn_scale": (c.attn_scale or c.head_dim**-0.5, width**-0.5),
        "attn_softcap": (c.attn_softcap > 0, kind.softcaps),
        "logit_softcap": (c.logit_softcap > 0, kind.softcaps),
    }
    if kind.local_rope:  # no other window makes up for another order
        fixed["global_every"] = (_every(c.global_every, c), _every(kind.global_every, c))
        fixed["sliding_window"] = (c.sliding_window > 0, True)
    for key, (ours, theirs) in fixed.items():
        if ours != theirs:
            raise ValueError(
                f"{key} is {getattr(c, key)!r}, which llama.cpp's {kind.name} does not have: the "
                "model cannot be a GGUF file"
            )
    scaling = c.rope_scaling.partition(" ")[0]
    if scaling not in kind.ropes:
        raise ValueError(f"llama.cpp's {kind.name} has no RoPE of the kind {scaling}")
    return kind


def _every(n, c):
    """The numbers of every n-th of the layers; of none for 0."""
    return [i for i in range(1, c.n_layer + 1) if n and i % n == 0]


def _describe(writer, c, kind, weights):
    """What the file says of the model."""
    types = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "f16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(types[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    # sizes
    writer.add_context_length(_longest(c, kind))
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.ffn_dim)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_kv_head)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)

    # attention
    writer.add_rope_dimension_count(c.rope_dim or c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    _describe_scaling(writer, c)
    if kind.softcaps:
        writer.add_attn_logit_softcapping(c.attn_softcap)
        writer.add_final_logit_softcapping(c.logit_softcap)
    if kind.global_every:  # a window as long as the text is none
        writer.add_sliding_window(c.sliding_window or c.block_size)
    if c.rope_local_theta:
        writer.add_rope_freq_base_swa(c.rope_local_theta)


def _describe_scaling(writer, c):
    """What the file says of RoPE's scaling; see frequencies()."""
    kind, *numbers = c.rope_scaling.split() or [""]
    _, growth = frequencies(c)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(numbers[0]))
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(float(numbers[1]))
        writer.add_rope_scaling_yarn_beta_slow(float(numbers[2]))
        writer.add_rope_scaling_orig_ctx_len(int(numbers[4]))
        growth /= 0.1 * math.log(max(1.0, float(numbers[0]))) + 1  # llama.cpp multiplies by it
        writer.add_rope_scaling_attn_factors(growth)
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(int(numbers[2]))
        writer.add_rope_scaling_attn_factors(growth)


def _longest(c, kind):
    """The tokens of the longest text that llama.cpp computes as the model does."""
    same = _every(c.global_every, c) == _every(kind.global_every, c)
    if kind.global_every and same or not c.sliding_window:
        return c.block_size
    longest = min(c.block_size, c.sliding_window)
    print(f"note: llama.cpp's {kind.name} has no such sliding window: in the file the model's "
          f"context is {longest} tokens, where there is none")
    return longest


# -----------------------------------------------------------------------------
# tensors


def _tensors(model, kind, weights):
    """[(name, shape, GGML type, function that makes the array)] in the order of the file."""
    c = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name)
    names = gguf.get_tensor_name_map(arch, c.n_layer)
    found = []
    for tensor, factors in _rope_factors(c).items():
        name = gguf.TENSOR_NAMES[tensor] + ".weight"
        as_it_is = partial(np.copy, factors)
        found.append((name, factors.shape, gguf.GGMLQuantizationType.F32, as_it_is))
    for theirs, parts in _parts(model).items():
        stem, _, ending = theirs.rpartition(".")
        name = names.get_name(stem)
        if name is None:
            raise ValueError(f"llama.cpp's {kind.name} has no place for the tensor {theirs}")
        shape = _shape(parts)
        type_ = _type(shape, weights)
        order = None
        if kind.neighbours and name.endswith(TURNED):
            order = _neighbours(shape[0], c.head_dim)
        name = f"{name}.{ending}"
        found.append((name, shape, type_, partial(_array, name, parts, shape, type_, order)))
    return found


def _parts(model):
    """{name of a tensor, as Hugging Face has it: [(module, attribute)] whose rows it holds}."""
    whole_of = {}
    for whole, names in ARCHITECTURES[model.config.architecture].fused.items():
        whole_of.update(dict.fromkeys(names, whole))
    found = {}
    for name, (module, part) in hf_names(model).items():
        if part == "v":  # of a LowRank, which is written as the product of both
            continue
        words = [whole_of.get(word, word) for word in name.split(".")]
        if part == "u":
            words[-1] = "weight"
        found.setdefault(".".join(words), []).append((module, part))
    return found


def _shape(parts):
    shapes = []
    for module, part in parts:
        if part == "u" or part == "weight" and isinstance(module, QMatrix):
            shapes.append((module.out_features, module.in_features))
        else:
            shapes.append(tuple(getattr(module, part).shape))
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _type(shape, weights):
    """The GGML type of a tensor."""
    if len(shape) == 1:  # a norm, a bias
        return gguf.GGMLQuantizationType.F32
    if weights == "q8_0" and shape[1] % BLOCK == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _neighbours(rows, head_dim):
    """The order of rows in which a pair's two, which are halves of a head apart, are neighbours."""
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten().numpy()


def _rope_factors(c):
    """{tensor: by what each pair's frequency is divided (rope_dim / 2,) float32}, where the file
    has them as tensors."""
    kind, *numbers = c.rope_scaling.split() or [""]
    if kind == "llama3":
        plain, _ = frequencies(replace(c, rope_scaling=""))
        stretched, _ = frequencies(c)
        return {gguf.MODEL_TENSOR.ROPE_FREQS: (plain / stretched).numpy()}
    if kind == "longrope":
        short, long = (np.array(json.loads(text), np.float32) for text in numbers[:2])
        factors = gguf.MODEL_TENSOR
        return {factors.ROPE_FACTORS_SHORT: short, factors.ROPE_FACTORS_LONG: long}
    return {}


def _array(name, parts, shape, type_, order):
    """A tensor as the file has it: floats, or a Q8_0 matrix's bytes (rows, 34 a block)."""
    out = None
    at = 0
    for module, part in parts:
        for w in _float_rows(module, part):
            rows = _encoded(name, w, type_)
            if out is None:
                out = np.empty((shape[0], *rows.shape[1:]), rows.dtype)
            out[at : at + len(rows)] = rows
            at += len(rows)
    return out if order is None else out[order]


def _float_rows(module, part):
    """A matrix in float32, some rows after the other; or a vector."""
    is_matrix = part == "weight" and isinstance(module, QMatrix)
    if is_matrix and module.bits == 8 and getattr(module, "adapter", None) is None:
        for at in _slices(module.q):
            yield dequantize_int8(module.q[at], module.scale[at], module.zero[at])
        return
    # the whole of it: with its adapter, or a LowRank's product
    if part == "u" or is_matrix:
        w = module.float_weight(torch.float32)
    else:
        w = getattr(module, part)
    for at in _slices(w):
        yield w[at].float()


def _slices(w):
    """Slices of w's rows, of CHUNK elements or a row."""
    rows = max(1, CHUNK // w[0].numel())
    return (slice(i, i + rows) for i in range(0, len(w), rows))


def _encoded(name, w, type_):
    low, high = w.aminmax()
    if not -LARGEST <= low <= high <= LARGEST:  # NaN is neither
        raise ValueError(f"tensor {name} has values that are not finite, or too large for float16")
    return gguf.quantize(w.cpu().numpy(), type_)


def _write(writer, tensors):
    """Write the head, then each tensor when it is made."""
    for name, shape, type_, _ in tensors:
        block, size = gguf.GGML_QUANT_SIZES[type_]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, make in tensors:
        writer.write_tensor_data(make())
