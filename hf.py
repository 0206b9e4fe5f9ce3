"""
Hugging Face checkpoints in and out: LLaMA, Mistral, Gemma, Gemma 2, Qwen2, and what shares their architecture (SmolLM2).
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

from configurator import configure
from model import LLaMA, LLaMAConfig, QLinear
from tokenizer import first_line

out_dir = "out"  # the run whose newest checkpoint to export
export = ""  # the directory to make
int8 = False  # QLinear weights as they are: codes, scale and zero. False: all in bfloat16, adapters merged

SHARD = 2 * 2**30  # bytes of a safetensors file
INT8_NAMES = ("q", "scale", "zero")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*", "generation_config.json")
NAMES = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm", "blocks": "model.layers",
         "attn": "self_attn", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GEMMA2_NAMES = {"mlp_norm": "pre_feedforward_layernorm", "attn_post_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm"}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "GemmaForCausalLM": "gemma",
                 "Gemma2ForCausalLM": "gemma2", "Qwen2ForCausalLM": "qwen2"}
ROPE = {"default": (), "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
DEFAULTS = {  # transformers' own, where a config.json need not say
    "MistralForCausalLM": {"sliding_window": 4096, "num_key_value_heads": 8},
    "GemmaForCausalLM": {"head_dim": 256},
    "Gemma2ForCausalLM": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096,
                          "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50, "final_logit_softcapping": 30},
    "Qwen2ForCausalLM": {"sliding_window": 4096, "max_window_layers": 28},
}


def local(path):
    """The directory of a checkpoint: `path` itself, or what a hub repository "owner/name" is downloaded to."""
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError(f"{path!r} is neither a directory nor the name of a Hugging Face repository, like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*"],
                                 ignore_patterns=["consolidated*", "original/*"])  # Mistral's and Meta's second copies
    except Exception as e:  # its own, its HTTP client's, the file system's
        raise ValueError(f"{path} is no directory, and as a repository was not fetched: {first_line(e)}")


def _json(path, name):
    try:
        with open(os.path.join(path, name)) as f:
            found = json.load(f)
    except OSError as e:
        raise ValueError(f"{path}/{name}: {e.strerror}; a Hugging Face checkpoint has one")
    except ValueError as e:
        raise ValueError(f"{path}/{name}: not JSON: {e}")
    if not isinstance(found, dict):
        raise ValueError(f"{path}/{name}: not a JSON object")
    return found


def settings(path):
    """LLaMAConfig's fields, as a dict, of the checkpoint directory `path`, by its config.json alone. Raises ValueError
    for an architecture, or a part of one, that model.py does not have."""
    c = _json(path, "config.json")
    name = (c.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {name} is not supported; there are {', '.join(ARCHITECTURES)}")
    c = DEFAULTS.get(name, {}) | c
    gemma, gemma2 = name.startswith("Gemma"), name.startswith("Gemma2")

    def refuse(what):
        raise ValueError(f"{path}/config.json: {what} is not supported ({name})")

    for key in ("hidden_act", "hidden_activation"):
        if c.get(key) not in ((None, "gelu", "gelu_pytorch_tanh") if gemma else (None, "silu")):
            refuse(f"{key} {c[key]}")
    ropes = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = ropes.get("rope_type") or ropes.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or any(isinstance(value, dict) for value in ropes.values()):
        refuse(f"RoPE scaling {kind if kind != 'default' else 'by layer'}")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if c.get(key):
            refuse(key)
    if (ropes.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1:
        refuse("partial_rotary_factor")
    if (quantized := c.get("quantization_config")) and quantized.get("quant_method") != "qgalore":
        refuse(f"quantization {quantized.get('quant_method')}")
    try:
        n_layer, width, heads = c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"]
        window, every = c.get("sliding_window") or 0, 0
        if name in ("LlamaForCausalLM", "GemmaForCausalLM") or name == "Qwen2ForCausalLM" and not c.get(
                "use_sliding_window"):
            window = 0
        if window and name != "MistralForCausalLM":  # which slides in all layers
            start = 0 if gemma else c["max_window_layers"]
            slides = [kind == "sliding_attention" for kind in c.get("layer_types") or ()] or [
                i % 2 == 0 if gemma else i >= start for i in range(n_layer)]
            every = slides.index(False) + 1 if False in slides else 0
            if slides != [not every or (i + 1) % every != 0 for i in range(n_layer)]:
                refuse("this order of sliding and full attention")
            window = 0 if every == 1 else window
        found = {
            "architecture": name, "block_size": c["max_position_embeddings"], "vocab_size": c["vocab_size"],
            "n_layer": n_layer, "n_head": heads, "n_kv_head": c.get("num_key_value_heads") or heads, "n_embd": width,
            "ffn_dim": c["intermediate_size"], "rope_theta": float(ropes.get("rope_theta") or c.get("rope_theta", 1e4)),
            "rope_scaling": " ".join([kind, *(str(ropes[key]) for key in ROPE[kind])]) if ROPE[kind] else "",
            "norm_eps": float(c.get("rms_norm_eps", 1e-6)), "tie_embedding": bool(c.get("tie_word_embeddings", gemma)),
            "head_dim": c.get("head_dim") or width // heads, "activation": "gelu" if gemma else "silu",
            "qkv_bias": name == "Qwen2ForCausalLM", "embed_scale": width**0.5 if gemma else 1.0,
            "attn_scale": c["query_pre_attn_scalar"] ** -0.5 if gemma2 else 0.0, "post_norms": gemma2,
            "attn_softcap": float(gemma2 and c["attn_logit_softcapping"] or 0),
            "logit_softcap": float(gemma2 and c["final_logit_softcapping"] or 0),
            "sliding_window": window, "global_every": every if window else 0,
        }
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "head_dim"):
            if type(found[key]) is not int or found[key] < 1:
                raise ValueError(f"{found[key]!r} for {key}, which is a whole number")
        LLaMAConfig(**found)  # raises for heads that do not fit
    except KeyError as e:
        raise ValueError(f"{path}/config.json: has no {e.args[0]}")
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}/config.json: {first_line(e)}")
    return found


def _hf_names(model):
    """{name in Hugging Face's checkpoint: (module, "weight" or "bias")} of all that a checkpoint holds."""
    names = NAMES | (GEMMA2_NAMES if model.config.post_norms else {})
    found = {}
    for name, module in model.named_modules():
        prefix = ".".join(names.get(part, part) for part in name.split("."))
        if isinstance(module, QLinear) or hasattr(module, "weight") and not (
                name == "head" and model.config.tie_embedding):
            found[f"{prefix}.weight"] = module, "weight"
            if getattr(module, "bias", None) is not None:
                found[f"{prefix}.bias"] = module, "bias"
    return found


def _files(path):
    """{tensor: safetensors file} of a checkpoint directory."""
    from safetensors import safe_open

    index, single = os.path.join(path, "model.safetensors.index.json"), os.path.join(path, "model.safetensors")
    if os.path.exists(index):
        listed = _json(path, "model.safetensors.index.json").get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: has no weight_map")
        files = {name: os.path.join(path, file) for name, file in listed.items()}
    elif os.path.exists(single):
        files = dict.fromkeys(["*"], single)
    else:
        other = " (its .bin files hold pickled code: convert them)" if glob.glob(f"{glob.escape(path)}/*.bin") else ""
        raise ValueError(f"{path}: there is no model.safetensors{other}")
    held = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(file, "pt") as f:
                held |= dict.fromkeys(f.keys(), file)
        except FileNotFoundError:
            raise ValueError(f"{file}: is missing, and {index} names it")
        except Exception as e:  # safetensors' own
            raise ValueError(f"{file}: damaged or truncated: {first_line(e)}")
    for name, file in files.items():
        if name != "*" and held.get(name) != file:
            raise ValueError(f"{index}: says that {name} is in {os.path.basename(file)}, where it is not")
    return held


@torch.no_grad()
def load_weights(model, path, device="cpu", dtype=torch.float32):
    """Fill a LLaMA, built on the meta device, from the checkpoint directory `path`, one tensor after the other.

    dtype: of embedding, head and unquantised matrices; norms and biases of QLinears are float32. Raises ValueError,
    naming file and tensor, for a file or tensor that is missing, damaged, of another shape, unknown, or not finite."""
    held, wanted, tied = _files(path), _hf_names(model), model.config.tie_embedding
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
        matrix = isinstance(module, QLinear) and kind == "weight"
        shape = (module.out_features, module.in_features) if matrix else getattr(module, kind).shape
        if name in codes:
            q = _read(held, codes[name][0], shape, torch.int8).to(device)
            scale, zero = (_read(held, part, (len(q), None), torch.float32).to(device) for part in codes[name][1:])
            if matrix and module.bits == 8 and scale.shape == module.scale.shape:
                for part, t in zip(INT8_NAMES, (q, scale, zero)):
                    module.register_buffer(part, t)
                continue
            t = dequantize_int8(q, scale, zero)
        else:
            t = _read(held, name, shape).to(device)
        if matrix:
            module.set_weight(t.to(dtype) if module.bits == 16 else t)
            continue
        norm = isinstance(module, RMSNorm)
        t = t.to(torch.float32 if norm or isinstance(module, QLinear) else dtype)
        t = t + 1 if norm and gemma else t  # Gemma's norms multiply by 1 + w
        setattr(module, kind, nn.Parameter(t, getattr(module, kind).requires_grad))
    if tied:
        model.head.weight = model.embed.weight


def _read(held, name, shape, dtype=None):
    """Tensor `name` of the files `held`, in memory of its own; checked. shape: None for a length that may be any; dtype:
    None for any float."""
    with _open(held[name]) as f:
        t = f.get_tensor(name)
    if t.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, t.shape)):
        raise ValueError(f"{held[name]}: tensor {name} is {list(t.shape)}, expected {list(shape)}")
    if t.dtype != (dtype or t.dtype) or dtype is None and t.dtype not in FLOATS:
        raise ValueError(f"{held[name]}: tensor {name} is {t.dtype}, expected {dtype or 'floats of 16 or 32 bits'}")
    if t.is_floating_point() and t.numel() and not all(end.isfinite() for end in t.aminmax()):  # NaN is both ends
        raise ValueError(f"{held[name]}: tensor {name} has values that are not finite")
    return t


def load(path, weight_bits=8, dtype=torch.bfloat16, device="cpu", group_size=256):
    """The LLaMA of a checkpoint: a directory, or a hub repository's name. weight_bits: 4 (NF4), 8 or 16 (in `dtype`).
    Raises ValueError in one line for what cannot be read."""
    path = local(path)
    c = settings(path) | {"method": "qgalore", "weight_bits": weight_bits, "weight_group_size": group_size}
    return LLaMA.from_settings(c, device, dtype, lambda model: load_weights(model, path, device, dtype))


def _config_json(c, dtype, like):
    """config.json of a LLaMAConfig, for transformers."""
    kind, *numbers = c.rope_scaling.split() or ["default"]
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ropes = {"rope_type": kind, "rope_theta": c.rope_theta} | dict(zip(keys, map(float, numbers)))
    if kind == "llama3":
        ropes[keys[-1]] = int(ropes[keys[-1]])
    gemma = c.architecture.startswith("Gemma")
    out = {
        "architectures": [c.architecture], "model_type": ARCHITECTURES[c.architecture], "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "intermediate_size": c.ffn_dim, "vocab_size": c.vocab_size, "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embedding,
        "hidden_act": "gelu_pytorch_tanh" if gemma else "silu", "rope_parameters": ropes, "rope_theta": c.rope_theta,
        "rope_scaling": None if kind == "default" else ropes, "torch_dtype": str(dtype).removeprefix("torch."),
        "sliding_window": c.sliding_window or None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }
    if gemma:
        out["hidden_activation"] = "gelu_pytorch_tanh"
    if c.sliding_window:
        every = c.global_every or c.n_layer + 1
        out["layer_types"] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.n_layer)]
        out |= {"use_sliding_window": True, "max_window_layers": 0} if c.architecture.startswith("Qwen2") else {}
    if c.post_norms:
        out |= {"attn_logit_softcapping": c.attn_softcap or None, "final_logit_softcapping": c.logit_softcap or None,
                "query_pre_attn_scalar": round(c.attn_scale**-2) if c.attn_scale else c.head_dim}
    if like:
        source = _json(like, "config.json")
        out |= {key: source.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id",
                                                 "max_position_embeddings") if key in source}
    return out


@torch.no_grad()
def save(model, path, like=None, int8=False, dtype=torch.bfloat16):
    """Write a LLaMA as the directory `path`, which transformers loads: weights in `dtype`, adapters merged.

    int8: the QLinears' codes, scale and zero instead (NAME.q, NAME.scale, NAME.zero), which load() takes back bit for
    bit. like: the checkpoint directory that the model came from, whose tokenizer is copied. The directory takes its name
    when it is complete. Raises ValueError if it exists, or if int8 finds weights that are not INT8."""
    from safetensors.torch import save_file

    path = path.rstrip("/")
    if os.path.exists(path):
        raise ValueError(f"{path}: exists; name a new directory")
    layers = [module for module in model.modules() if isinstance(module, QLinear)]
    if int8 and not (layers and all(layer.bits == 8 and layer.lora_a is None for layer in layers)):
        raise ValueError("the model's weights are not INT8, or have adapters beside them: export them with --int8=False")
    config = _config_json(model.config, dtype, like)
    if int8:
        config["quantization_config"] = {"quant_method": "qgalore", "bits": 8, "group_size": layers[0].group_size}
    gemma = model.config.architecture.startswith("Gemma")

    def tensors():
        for name, (module, kind) in _hf_names(model).items():
            if int8 and kind == "weight" and isinstance(module, QLinear):
                for part in INT8_NAMES:
                    yield name.removesuffix("weight") + part, getattr(module, part)
            elif kind == "weight" and isinstance(module, QLinear):
                yield name, module.float_weight(dtype)
            else:
                t = getattr(module, kind).detach()
                yield name, (t - 1 if gemma and not isinstance(module, (nn.Linear, nn.Embedding)) else t).to(dtype)

    temporary = path + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        files, shard, where = [], {}, {}

        def flush():
            files.append(f"model-{len(files) + 1:05d}.safetensors")
            save_file(shard, os.path.join(temporary, files[-1]), metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, files[-1]))
            shard.clear()

        total = 0
        for name, t in tensors():
            if shard and sum(x.nbytes for x in shard.values()) + t.nbytes > SHARD:
                flush()
            shard[name] = t.cpu().contiguous()
            total += t.nbytes
        flush()
        if len(files) == 1:
            os.rename(os.path.join(temporary, files[0]), os.path.join(temporary, "model.safetensors"))
        else:
            with open(os.path.join(temporary, "model.safetensors.index.json"), "w") as f:
                json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=1)
        with open(os.path.join(temporary, "config.json"), "w") as f:
            json.dump(config, f, indent=1)
        for pattern in TOKENIZER_FILES if like else ():
            for file in glob.glob(os.path.join(glob.escape(like), pattern)):
                shutil.copy(file, temporary)
        os.rename(temporary, path)
    except OSError as e:
        raise ValueError(f"could not write {path}: {e.strerror or e}")
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def main():
    from checkpoint import load_model  # which imports this file

    configure(globals(), skip_unknown_in_files=True)
    if not export:
        raise SystemExit("error: name the directory to make with --export=DIR")
    try:
        model, encoding = load_model(out_dir, "cpu")
        save(model, export, encoding if os.path.isdir(encoding) else None, int8)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    print(f"{export}: {'INT8, for hf.load' if int8 else 'for transformers: AutoModelForCausalLM.from_pretrained'}")


if __name__ == "__main__":
    main()
