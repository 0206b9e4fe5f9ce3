"""
Hugging Face checkpoints in and out: LLaMA, SmolLM2, Mistral, Gemma, Gemma 2 and Qwen2.
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-tuned
    python -m finetune.hf --out_dir=out-smollm2 --export=smollm2-int8 --int8=True

The first makes a directory in bfloat16, for transformers and lm_eval. The second keeps the INT8
weights as they are, for hf.load().

A checkpoint streams in tensor by tensor, straight into INT8: never does more than one matrix exist
in float. On its way out at most 2 GiB are made float at a time.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import sys
from functools import partial

import huggingface_hub
import torch
import torch.nn as nn
from safetensors import SafetensorError

from configurator import configure
from finetune.adapters import LowRank, put_low_rank
from finetune.hf_config import config_json, read_json, settings
from finetune.hf_files import read_tensor, tensor_files, write_json, write_tensors
from model import LLaMA, LLaMAConfig, QEmbedding, QLinear, QMatrix, RMSNorm
from quant import dequantize_int8
from run.checkpoint import load_model
from run.encodings import first_line

# input and output
out_dir = "out"  # the run whose newest checkpoint to export
export = ""  # the directory to make
int8 = False  # the INT8 weights as they are. False: all in bfloat16, adapters merged

INT8_NAMES = ("q", "scale", "zero")  # what is stored of an INT8 matrix

# what is downloaded of a hub repository, and what is not
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer*"]  # and, if asked for, the weights
SECOND_COPIES = ["consolidated*", "original/*"]  # Mistral's and Meta's, of their weights

# what an exported directory takes over from the one that the model came from
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)

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
GEMMA2_NAMES = {
    "mlp_norm": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def hf_names(model):
    """{name in Hugging Face's checkpoint: (module, attribute)} of all that a LLaMA holds.

    The attribute is "weight" or "bias"; of a LowRank "u", "v" or "bias"."""
    names = NAMES | (GEMMA2_NAMES if model.config.post_norms else {})
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
    return found


def _int8_names(name):
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


def local(path, weights=True):
    """The directory of a checkpoint: `path` itself, or what a hub repository is downloaded to.

    path: a directory, or "owner/name". weights: False downloads all but them. Raises ValueError,
    in one line, if there is no such thing."""
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(
            f"{path!r} is neither a directory nor the name of a Hugging Face repository, "
            "like owner/name"
        )
    wanted = list(SMALL_FILES)
    if weights:
        wanted.append("*.safetensors")
    try:
        return huggingface_hub.snapshot_download(
            path, allow_patterns=wanted, ignore_patterns=SECOND_COPIES
        )
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise ValueError(
            f"{path} is no directory, and as a repository was not fetched: {first_line(e)}"
        )


@torch.no_grad()
def load_weights(model, path, device="cpu", dtype=torch.float32):
    """Fill a LLaMA, built on the meta device, from a checkpoint directory, tensor by tensor.

    dtype: of what is not quantised. Norms and the biases of QLinears are float32. Raises
    ValueError, naming file and tensor, for a file or tensor that is missing, damaged, of another
    shape, unknown, or not finite."""
    # leave out what some files hold although the model makes it itself
    held = {}
    for name, file in tensor_files(path).items():
        tied_head = name == "lm_head.weight" and model.config.tie_embedding
        if not tied_head and not name.endswith("rotary_emb.inv_freq"):  # of old transformers
            held[name] = file

    # the names first: a checkpoint that does not fit is refused before any tensor is read
    wanted = hf_names(model)
    _check_names(model, path, held, wanted)

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
        if norm and _is_gemma(model):
            t = t + 1  # our RMSNorm multiplies by its weight as it is
        setattr(module, kind, nn.Parameter(t, old.requires_grad))


def _check_names(model, path, held, wanted):
    """Raise ValueError if the files lack a tensor that the model has, or hold one that it lacks."""
    expected = set()  # a matrix is there in floats, or as codes
    for name in wanted:
        expected.update(_int8_names(name) if _is_int8(held, name) else [name])
    for name in sorted(expected - set(held)):
        raise ValueError(f"{path}: there is no tensor {name}")
    for name in sorted(set(held) - expected):
        place = model.config.architecture
        raise ValueError(f"{held[name]}: tensor {name} has no place in {place}")


def _is_int8(held, name):
    """Whether the files hold the matrix `name` in INT8."""
    return _int8_names(name)[0] in held


def _read_int8(held, name, shape, device):
    """[q, scale, zero] of the INT8 matrix `name`, on `device`."""
    q_name, scale_name, zero_name = _int8_names(name)
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


def _is_gemma(model):
    """Whether the norms multiply by 1 + w, where w is what the checkpoint holds."""
    return model.config.architecture.startswith("Gemma")


# -----------------------------------------------------------------------------
# out


@torch.no_grad()
def save(model, path, like=None, int8=False, dtype=torch.bfloat16):
    """Write a LLaMA as the directory `path`, which transformers loads.

    Weights are in `dtype`, adapters merged. like: the checkpoint directory that the model came
    from, whose tokenizer is copied. int8: write the QMatrices' codes, scale and zero instead
    (NAME.q, NAME.scale, NAME.zero), which load() takes back bit for bit.

    The directory takes its name when it is complete. Raises ValueError if it exists, if int8 finds
    weights that are not INT8, or if no config.json can describe the model."""
    config = config_json(model.config, dtype, like)
    if int8:
        group_size = _int8_group_size(model)
        quantized = {"quant_method": "qgalore", "bits": 8, "group_size": group_size}
        config["quantization_config"] = quantized
    check = partial(_check_described, model.config, bool(like))
    write(path, config, _tensors(model, int8, dtype), like, check)


def _int8_group_size(model):
    """The group size of a model whose blocks' matrices are all INT8, without anything beside."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    plain = all(layer.bits == 8 and layer.adapter is None for layer in layers)
    if not layers or not plain or model.config.low_rank:
        raise ValueError(
            "the model's weights are not INT8, or not they alone: export it with --int8=False"
        )
    return layers[0].group_size


def _check_described(config, longer_text, found):
    """Raise ValueError if `found`, what settings() reads of the new config.json, is not `config`.

    longer_text: block_size may differ, as config.json keeps that of the checkpoint before."""
    for key, value in found.items():
        ours = getattr(config, key)
        if ours != value and not (longer_text and key == "block_size"):
            raise ValueError(
                f"{config.architecture} has no {key} = {ours!r}: the model cannot be exported"
            )


def _tensors(model, int8, dtype):
    """(name, tensor) of all that save() writes, each made when its turn comes."""
    for name, (module, kind) in hf_names(model).items():
        if isinstance(module, QMatrix) and kind == "weight":
            if int8:  # the codes as they are
                for stored, part in zip(_int8_names(name), INT8_NAMES):
                    yield stored, getattr(module, part)
            else:
                yield name, module.float_weight(dtype)  # with its adapter
        elif kind == "u":  # of a LowRank: the product of both factors
            yield name.removesuffix("u") + "weight", module.float_weight(dtype)
        elif kind != "v":  # an embedding, a norm, a bias
            t = getattr(module, kind).detach()
            if isinstance(module, RMSNorm) and _is_gemma(model):
                t = t - 1
            yield name, t if int8 else t.to(dtype)


def write(path, config, tensors, like=None, check=None):
    """Make the checkpoint directory `path`, which takes its name when it is complete.

    config: config.json's object. tensors: (name, tensor)s. like: a directory whose tokenizer is
    copied. check: is called with the settings that the new config.json gives, before any tensor is
    written. Raises ValueError if `path` exists or cannot be written."""
    path = path.rstrip("/")
    if os.path.exists(path):
        raise ValueError(f"{path}: exists; name a new directory")
    temporary = path + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what an earlier, killed run left
        os.makedirs(temporary)
        # read config.json back: does it say all that the model is?
        write_json(os.path.join(temporary, "config.json"), config)
        found = settings(temporary)
        if check is not None:
            check(found)
        write_tensors(temporary, tensors)
        if like:
            _copy_tokenizer(like, temporary)
        os.rename(temporary, path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"could not write {path}: {first_line(e)}")
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            shutil.rmtree(temporary)


def _copy_tokenizer(source, folder):
    for pattern in TOKENIZER_FILES:
        for file in glob.glob(os.path.join(glob.escape(source), pattern)):
            shutil.copy(file, folder)


def main():
    s = configure(sys.modules[__name__], ignore_unknown=True)
    if not s.export:
        raise SystemExit("error: name the directory to make with --export=DIR")
    try:
        model, encoding = load_model(s.out_dir, "cpu")
        # a run on a checkpoint's own tokens names that checkpoint as its encoding
        like = None
        if os.path.isdir(encoding):
            like = encoding
        elif "/" in encoding and not os.path.exists(encoding):  # on the hub
            like = local(encoding)
        save(model, s.export, like, s.int8)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    kind = "for transformers: AutoModelForCausalLM.from_pretrained"
    if s.int8:
        kind = "INT8, for hf.load"
    print(f"{s.export}: {kind}")


if __name__ == "__main__":
    main()
