"""
Hugging Face checkpoints in and out: LLaMA and what shares its architecture (SmolLM2), Mistral, Gemma, Gemma 2, Qwen2.
    python hf.py --out_dir=out-smollm2 --export=smollm2-tuned              # bfloat16, for transformers and lm_eval
    python hf.py --out_dir=out-smollm2 --export=smollm2-int8 --int8=True   # the INT8 weights as they are, for hf.load

A checkpoint streams in tensor by tensor, straight into INT8: never does more than one matrix exist in float. On its way
out at most 2 GiB are made float at a time.
"""

import contextlib
import glob
import json
import os
import re
import shutil

import torch
import torch.nn as nn

from finetune.adapters import LowRank
from configurator import configure
from finetune.hf_config import config_json, read_json, settings
from quant import dequantize_int8
from kernels.layers import RMSNorm
from model import LLaMA, QLinear, QMatrix
from run.encodings import first_line

out_dir = "out"  # the run whose newest checkpoint to export
export = ""  # the directory to make
int8 = False  # INT8 weights as they are: codes, scale and zero. False: all in bfloat16, adapters merged

_shard = 2 * 2**30  # bytes of a safetensors file
INT8_NAMES = ("q", "scale", "zero")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*", "generation_config.json")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm", "blocks": "model.layers",
         "attn": "self_attn", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GEMMA2_NAMES = {"mlp_norm": "pre_feedforward_layernorm", "attn_post_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm"}


def local(path, weights=True):
    """The directory of a checkpoint: `path` itself, or what a hub repository "owner/name" is downloaded to, with or
    without its weights."""
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path!r} is neither a directory nor the name of a Hugging Face repository, like owner/name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.jinja", "*.txt", "tokenizer*"] + ["*.safetensors"] * weights
        return snapshot_download(path, allow_patterns=wanted,
                                 ignore_patterns=["consolidated*", "original/*"])  # Mistral's and Meta's second copies
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise ValueError(f"{path} is no directory, and as a repository was not fetched: {first_line(e)}")


def hf_names(model):
    """{name in Hugging Face's checkpoint: (module, "weight", "bias", or of a LowRank "u" or "v")} of all it holds."""
    names = NAMES | (GEMMA2_NAMES if model.config.post_norms else {})
    found = {}
    for name, module in model.named_modules():
        prefix = ".".join(names.get(part, part) for part in name.split("."))
        low_rank = isinstance(module, LowRank)
        if low_rank or isinstance(module, QMatrix) or hasattr(module, "weight"):  # a tied head is met once
            for kind in ("u", "v") if low_rank else ("weight",):
                found[f"{prefix}.{kind}"] = module, kind
            if getattr(module, "bias", None) is not None:
                found[f"{prefix}.bias"] = module, "bias"
    return found


def tensor_files(path):
    """{tensor: safetensors file} of a checkpoint directory."""
    index, single = os.path.join(path, "model.safetensors.index.json"), os.path.join(path, "model.safetensors")
    listed = {}
    if not os.path.exists(single):
        if not os.path.exists(index):
            other = " (.bin files hold pickled code: convert them)" if glob.glob(f"{glob.escape(path)}/*.bin") else ""
            raise ValueError(f"{path}: there is no model.safetensors{other}")
        listed = read_json(path, "model.safetensors.index.json").get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: has no weight_map")
    held = {}
    for file in sorted(set(listed.values())) or [single]:
        if not os.path.exists(os.path.join(path, file)):
            raise ValueError(f"{os.path.join(path, file)}: is missing, and {index} names it")
        with _open(os.path.join(path, file)) as f:
            held |= dict.fromkeys(f.keys(), os.path.join(path, file))
    for name, file in listed.items():
        if held.get(name) != os.path.join(path, file):
            raise ValueError(f"{index}: says that {name} is in {file}, where it is not")
    return held


def _open(file):
    """A safetensors file: memory-mapped, and anew for each tensor, so that what was read does not stay resident."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: damaged or truncated: {first_line(e)}")


@torch.no_grad()
def load_weights(model, path, device="cpu", dtype=torch.float32):
    """Fill a LLaMA, built on the meta device, from the checkpoint directory `path`, one tensor after the other.

    dtype: of what is not quantised, but norms and the biases of QLinears, which are float32. Raises ValueError, naming
    file and tensor, for a file or tensor that is missing, damaged, of another shape, unknown, or not finite."""
    held, wanted, tied = tensor_files(path), hf_names(model), model.config.tie_embedding
    held = {name: file for name, file in held.items()
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")}
    codes = {name: [name.removesuffix("weight") + part for part in INT8_NAMES] for name in wanted}
    codes = {name: parts for name, parts in codes.items() if parts[0] in held}  # of matrices that are in INT8
    expected = {part for name in wanted for part in codes.get(name, [name])}
    for name in sorted(expected - set(held)):
        raise ValueError(f"{path}: there is no tensor {name}")
    for name in sorted(set(held) - expected):
        raise ValueError(f"{held[name]}: tensor {name} has no place in {model.config.architecture}")
    gemma = model.config.architecture.startswith("Gemma")
    for name, (module, kind) in wanted.items():
        matrix = isinstance(module, QMatrix) and kind == "weight"
        shape = (module.out_features, module.in_features) if matrix else getattr(module, kind).shape
        if name in codes:
            groups = (shape[0], None)
            q, scale, zero = (read_tensor(held, *args).to(device, copy=True) for args in zip(
                codes[name], (shape, groups, groups), (torch.int8, torch.float32, torch.float32)))
            if matrix and module.bits == 8 and scale.shape == module.scale.shape:
                for part, t in zip(INT8_NAMES, (q, scale, zero)):
                    module.register_buffer(part, t)
                continue
            t = dequantize_int8(q, scale, zero)
        else:
            t = read_tensor(held, name, shape)
        if matrix:
            module.set_weight(t.to(device, dtype, copy=True) if module.bits == 16 else t.to(device))
            del t  # before the next is read
            continue
        norm = isinstance(module, RMSNorm)
        t = t.to(device, torch.float32 if norm or isinstance(module, QMatrix) else dtype, copy=True)
        t = t + 1 if norm and gemma else t  # Gemma's norms multiply by 1 + w
        setattr(module, kind, nn.Parameter(t, getattr(module, kind).requires_grad))


def read_tensor(held, name, shape, dtype=None):
    """Tensor `name` of the files `held`, checked, in the file's own memory: to be copied if it is kept. shape: None for
    a length that may be any; dtype: None for any float."""
    with _open(held[name]) as f:
        t = f.get_tensor(name)
    if t.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, t.shape)):
        raise ValueError(f"{held[name]}: tensor {name} is {list(t.shape)}, expected {list(shape)}")
    if t.dtype != (dtype or t.dtype) or dtype is None and t.dtype not in FLOATS:
        raise ValueError(f"{held[name]}: tensor {name} is {t.dtype}, expected {dtype or 'floats of 16 or 32 bits'}")
    if t.is_floating_point() and t.numel() and not all(end.isfinite() for end in t.aminmax()):  # NaN is both ends
        raise ValueError(f"{held[name]}: tensor {name} has values that are not finite")
    return t


def load(path, weight_bits=8, dtype=torch.bfloat16, device="cpu", group_size=256, embed_bits=16):
    """The LLaMA of a checkpoint: a directory, or a hub repository's name. weight_bits: 4 (NF4), 8 or 16 (in `dtype`);
    embed_bits, of embedding and head: 8 or 16. group_size: of INT8, unless the checkpoint is in INT8 already. Raises
    ValueError, in one line, for what it cannot read."""
    path = local(path)
    groups = (read_json(path, "config.json").get("quantization_config") or {}).get("group_size", group_size)
    c = settings(path) | {"method": "qgalore", "weight_bits": weight_bits, "weight_group_size": groups,
                          "embed_bits": embed_bits}
    return LLaMA.from_settings(c, device, dtype, lambda model: load_weights(model, path, device, dtype))


@torch.no_grad()
def save(model, path, like=None, int8=False, dtype=torch.bfloat16):
    """Write a LLaMA as the directory `path`, which transformers loads: weights in `dtype`, adapters merged.

    int8: the QMatrices' codes, scale and zero instead (NAME.q, NAME.scale, NAME.zero), which load() takes back bit for
    bit. like: the checkpoint directory that the model came from, whose tokenizer is copied. The directory takes its
    name when it is complete. Raises ValueError if it exists, or if int8 finds weights that are not INT8."""
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    if int8 and not (layers and all(layer.bits == 8 and layer.adapter is None for layer in layers)) or (
            int8 and model.config.ranks):
        raise ValueError("the model's weights are not INT8, or not they alone: export it with --int8=False")
    config = config_json(model.config, dtype, like)
    if int8:
        config["quantization_config"] = {"quant_method": "qgalore", "bits": 8, "group_size": layers[0].group_size}
    gemma = model.config.architecture.startswith("Gemma")

    def tensors():
        for name, (module, kind) in hf_names(model).items():
            if int8 and kind == "weight" and isinstance(module, QMatrix):
                for part in INT8_NAMES:
                    yield name.removesuffix("weight") + part, getattr(module, part)
            elif kind == "weight" and isinstance(module, QMatrix):
                yield name, module.float_weight(dtype)
            elif isinstance(module, LowRank) and kind != "bias":
                if kind == "u":
                    yield name.removesuffix("u") + "weight", module.float_weight(dtype)
            else:
                t = getattr(module, kind).detach()
                t = t - 1 if gemma and isinstance(module, RMSNorm) else t
                yield name, t if int8 else t.to(dtype)

    def check(found):
        for key, value in found.items():
            if getattr(model.config, key) != value and not (like and key == "block_size"):
                raise ValueError(f"{config['architectures'][0]} has no {key} = {getattr(model.config, key)!r}: the "
                                 "model cannot be exported")

    write(path, config, tensors(), like, check)


def write(path, config, tensors, like=None, check=lambda found: None):
    """Make the checkpoint directory `path` of config.json's object and (name, tensor)s, with the tokenizer of the
    directory `like`. check is called with the settings that the new config.json gives. `path` takes its name when it is
    complete. Raises ValueError if it exists or cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = path.rstrip("/")
    if os.path.exists(path):
        raise ValueError(f"{path}: exists; name a new directory")
    temporary = path + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        with open(os.path.join(temporary, "config.json"), "w") as f:
            json.dump(config, f, indent=1)
        check(settings(temporary))
        shard, where, total = {}, {}, 0  # where: the number of each tensor's file

        def flush():
            number = len(set(where.values()))
            save_file(shard, os.path.join(temporary, str(number)), metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, number))
            shard.clear()

        for name, t in tensors:
            if shard and sum(x.nbytes for x in shard.values()) + t.nbytes > _shard:
                flush()
            shard[name] = t.cpu().contiguous()
            total += t.nbytes
        flush()
        n = len(set(where.values()))
        files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
        for i, file in enumerate(files):
            os.rename(os.path.join(temporary, str(i)), os.path.join(temporary, file))
        if n > 1:
            with open(os.path.join(temporary, "model.safetensors.index.json"), "w") as f:
                weight_map = {name: files[i] for name, i in where.items()}
                json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=1)
        for pattern in TOKENIZER_FILES if like else ():
            for file in glob.glob(os.path.join(glob.escape(like), pattern)):
                shutil.copy(file, temporary)
        os.rename(temporary, path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"could not write {path}: {first_line(e)}")
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def main():
    from run.checkpoint import load_model  # which imports this file

    configure(globals(), skip_unknown_in_files=True)
    if not export:
        raise SystemExit("error: name the directory to make with --export=DIR")
    try:
        model, encoding = load_model(out_dir, "cpu")
        repository = "/" in encoding and not os.path.exists(encoding)
        like = local(encoding) if repository else encoding if os.path.isdir(encoding) else None
        save(model, export, like, int8)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    print(f"{export}: {'INT8, for hf.load' if int8 else 'for transformers: AutoModelForCausalLM.from_pretrained'}")


if __name__ == "__main__":
    main()
