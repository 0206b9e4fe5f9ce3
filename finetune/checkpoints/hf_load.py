"""
Hugging Face checkpoints on their way in, tensor by tensor, straight into INT8: never does more than
one matrix exist in float. hf.py has the way out, and the command.
"""

from functools import partial

import torch
import torch.nn as nn

from finetune.adapters import LowRank, put_low_rank
from finetune.checkpoints.architectures import ARCHITECTURES
from finetune.checkpoints.fields import read_json, shown
from finetune.checkpoints.hf_config import settings
from finetune.checkpoints.hf_files import EMBEDDING, HEAD, read_tensor, tensor_files
from finetune.checkpoints.paths import local
from model import LLaMA, LLaMAConfig, QEmbedding, QLinear, QMatrix, RMSNorm
from quant import dequantize_int8

INT8_NAMES = ("q", "scale", "zero")  # what is stored of an INT8 matrix

# the parts of our modules' names that Hugging Face calls otherwise
NAMES = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "blocks": "model.layers",
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


def hf_names(model, held=()):
    """{name in Hugging Face's checkpoint: (module, attribute)} of all that a LLaMA holds.

    The attribute is "weight" or "bias"; of a LowRank "u", "v" or "bias". held: the checkpoint's
    names, where there is one: it may hold a tied embedding as the head."""
    names = NAMES | ARCHITECTURES[model.config.architecture].names
    found = {}
    for name, module in model.named_modules():  # a tied head is met once, as the embedding
        if isinstance(module, LowRank):
            kinds = ["u", "v"]
        elif isinstance(module, QMatrix) or hasattr(module, "weight"):
            kinds = ["weight"]
        else:
            continue
        if getattr(module, "bias", None) is not None:
            kinds.append("bias")
        prefix = ".".join(names.get(part, part) for part in name.split("."))
        for kind in kinds:
            found[f"{prefix}.{kind}"] = module, kind
    if model.config.tie_embedding and HEAD in held and EMBEDDING not in held:
        found[HEAD] = found.pop(EMBEDDING)
    return found


def int8_names(name):
    """The names under which the INT8 matrix `name`, "...weight", is stored."""
    return [name.removesuffix("weight") + part for part in INT8_NAMES]


# -----------------------------------------------------------------------------
# in


def load(path, weight_bits=8, dtype=torch.bfloat16, device="cpu", group_size=256, embed_bits=16):
    """The LLaMA of a checkpoint: a directory, or a hub repository's name.

    weight_bits: 4 (NF4), 8 or 16 (in `dtype`). embed_bits: 8 or 16, of embedding and head.
    group_size: of INT8, unless the checkpoint is in INT8 already. Raises ValueError, in one line,
    for what it cannot read."""
    path = local(path)
    config = LLaMAConfig(**settings(path))
    # what is in INT8 already keeps its groups, and so its codes
    quantized = read_json(path, "config.json").get("quantization_config") or {}
    groups = quantized.get("group_size", group_size)
    linear = partial(QLinear, bits=weight_bits, group_size=groups)
    embedding = partial(QEmbedding, group_size=groups) if embed_bits == 8 else None
    # built without memory; each tensor then takes its place as it is read
    model = LLaMA(config, linear=linear, device="meta", dtype=dtype, embedding=embedding)
    put_low_rank(model, config.low_rank, dtype, "meta")
    load_weights(model, path, device, dtype)
    return model


@torch.no_grad()
def load_weights(model, path, device="cpu", dtype=torch.float32):
    """Fill a LLaMA, built on the meta device, from a checkpoint directory, tensor by tensor.

    dtype: of what is not quantised. Norms and the biases of QLinears are float32. Raises
    ValueError, naming file and tensor, for a file or tensor that is missing, damaged, of another
    shape, unknown, or not finite."""
    held, wanted = stored(model, path)
    for name, (module, kind) in wanted.items():
        if isinstance(module, QMatrix) and kind == "weight":
            _fill_matrix(module, held, name, device, dtype)
            continue
        # an embedding, a norm, a bias, a factor
        old = getattr(module, kind)  # on the meta device
        t = _read_floats(held, name, old.shape, device)
        norm = isinstance(module, RMSNorm)
        exact = norm or isinstance(module, QMatrix)  # the latter's bias
        t = t.to(device, torch.float32 if exact else dtype, copy=True)
        if norm:  # ours multiplies by its weight as it is
            t = t + norm_offset(model)
        setattr(module, kind, nn.Parameter(t, old.requires_grad))


def stored(model, path):
    """({tensor: its Place}, hf_names()) of a checkpoint directory that holds a LLaMA's tensors.

    Raises ValueError if the files lack a tensor that the model has, or hold one that it lacks: a
    checkpoint that does not fit is refused before any tensor is read."""
    arch = ARCHITECTURES[model.config.architecture]
    held = tensor_files(path)
    images = [name for name in held if name.removeprefix("model.").startswith(arch.images)]
    if images:
        print(f"note: {path}: the part that sees images is left out")
    # leave out what some files hold although the model makes it itself
    made = [name for name in held if name.endswith("rotary_emb.inv_freq")]  # by old transformers
    for name in (*images, *made):
        held.pop(name)
    held = _unfused(held, arch, model.config)
    if model.config.tie_embedding and EMBEDDING in held:
        held.pop(HEAD, None)  # it is the same, or settings() had said otherwise
    wanted = hf_names(model, held)

    expected = set()  # a matrix is there in floats, or as codes
    for name in wanted:
        expected.update(int8_names(name) if _is_int8(held, name) else [name])
    for name in sorted(expected - set(held)):
        raise ValueError(f"{path}: there is no tensor {name}")
    for name in sorted(set(held) - expected):
        place = model.config.architecture
        raise ValueError(f"{held[name].file}: tensor {shown(name)} has no place in {place}")
    return held, wanted


def _unfused(held, arch, c):
    """held, where a tensor that is several in one is those: each a Place of its rows."""
    rows = {
        "q_proj": c.n_head * c.head_dim,
        "k_proj": c.n_kv_head * c.head_dim,
        "v_proj": c.n_kv_head * c.head_dim,
        "gate_proj": c.ffn_dim,
        "up_proj": c.ffn_dim,
    }
    found = {}
    for name, place in held.items():
        whole = next((part for part in name.split(".") if part in arch.fused), None)
        if whole is None:
            found[name] = place
            continue
        total = sum(rows[part] for part in arch.fused[whole])
        first = 0
        for part in arch.fused[whole]:
            last = first + rows[part]
            found[name.replace(whole, part)] = place._replace(rows=(first, last, total))
            first = last
    return found


def fused(tensors, arch):
    """(name, tensor)s, where those that the architecture has in one are that."""
    whole_of = {part: whole for whole, parts in arch.fused.items() for part in parts}
    waiting = {}  # {name of the whole: its parts so far}
    for name, t in tensors:
        part = next((part for part in name.split(".") if part in whole_of), None)
        if part is None:
            yield name, t
            continue
        whole = whole_of[part]
        parts = waiting.setdefault(name.replace(part, whole), {})
        parts[part] = t
        if len(parts) == len(arch.fused[whole]):
            name = name.replace(part, whole)
            yield name, torch.cat([waiting[name][part] for part in arch.fused[whole]])
            del waiting[name]


def _is_int8(held, name):
    """Whether the files hold the matrix `name` in INT8."""
    return int8_names(name)[0] in held


def _read_int8(held, name, shape, device):
    """[q, scale, zero] of the INT8 matrix `name`, on `device`."""
    q_name, scale_name, zero_name = int8_names(name)
    groups = (shape[0], None)  # of any size
    q = read_tensor(held, q_name, shape, torch.int8)
    scale = read_tensor(held, scale_name, groups, torch.float32)
    zero = read_tensor(held, zero_name, groups, torch.float32)
    return [t.to(device, copy=True) for t in (q, scale, zero)]


def _read_floats(held, name, shape, device):
    """The parameter `name`, which may be an embedding in INT8; a float one in the file's memory."""
    if _is_int8(held, name):
        return dequantize_int8(*_read_int8(held, name, shape, device))
    return read_tensor(held, name, shape)


def _fill_matrix(matrix, held, name, device, dtype):
    """Give a QMatrix the weight `name`. INT8 codes are taken as they are where the groups agree."""
    shape = (matrix.out_features, matrix.in_features)
    if _is_int8(held, name):
        codes = _read_int8(held, name, shape, device)
        if matrix.bits == 8 and codes[1].shape == matrix.scale.shape:
            for part, t in zip(INT8_NAMES, codes):
                matrix.register_buffer(part, t)
            return
        w = dequantize_int8(*codes)  # to be quantised anew, in other groups or bits
    else:
        w = read_tensor(held, name, shape)
    if matrix.bits == 16:  # it keeps the tensor: not the file's memory
        w = w.to(device, dtype, copy=True)
    matrix.set_weight(w.to(device))  # with 4 and 8 bits it is rounded on the device


def norm_offset(model):
    return ARCHITECTURES[model.config.architecture].norm_offset
