"""
What a Hugging Face checkpoint's config.json says, as LLaMAConfig's fields, and back.

Of each architecture everything is read that changes what the model computes. What model.py does not have is refused by
its name, never passed over: a model that is almost right is worse than none.
"""

import json
import os

from model import LLaMAConfig
from run.encodings import first_line

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


def read_json(path, name):
    """The object in file `name` of a checkpoint directory."""
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
    c = read_json(path, "config.json")
    name = (c.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {name} is not supported; there are {', '.join(ARCHITECTURES)}")
    c = DEFAULTS.get(name, {}) | c
    gemma, gemma2 = name.startswith("Gemma"), name.startswith("Gemma2")

    def refuse(what):
        raise ValueError(f"{path}/config.json: {what} is not supported ({name})")

    for key in ("rope_parameters", "rope_scaling", "quantization_config"):
        if not isinstance(c.get(key) or {}, dict):
            refuse(f"{key} {c[key]!r}")
    for key in ("hidden_act", "hidden_activation"):
        if c.get(key) not in ((None, "gelu", "gelu_pytorch_tanh") if gemma else (None, "silu")):
            refuse(f"{key} {c[key]!r}")
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
            "rope_scaling": " ".join([kind, *(str(ropes[key] + 0) for key in ROPE[kind])]) if ROPE[kind] else "",
            "norm_eps": float(c.get("rms_norm_eps", 1e-6)), "tie_embedding": bool(c.get("tie_word_embeddings", gemma)),
            "head_dim": c.get("head_dim") or width // heads, "activation": "gelu" if gemma else "silu",
            "qkv_bias": name == "Qwen2ForCausalLM", "embed_scale": width**0.5 if gemma else 1.0,
            "attn_scale": c["query_pre_attn_scalar"] ** -0.5 if gemma2 else 0.0, "post_norms": gemma2,
            "attn_softcap": float(gemma2 and c["attn_logit_softcapping"] or 0),
            "logit_softcap": float(gemma2 and c["final_logit_softcapping"] or 0),
            "sliding_window": window, "global_every": every if window else 0,
        }
        if c.get("low_rank"):
            found["low_rank"] = c["low_rank"]
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "head_dim"):
            if type(found[key]) is not int or found[key] < 1:
                raise ValueError(f"{found[key]!r} for {key}, which is a whole number")
        LLaMAConfig(**found)  # raises for heads that do not fit
    except KeyError as e:
        raise ValueError(f"{path}/config.json: has no {e.args[0]}")
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}/config.json: {first_line(e)}")
    return found


def config_json(c, dtype, like):
    """config.json of a LLaMAConfig, for transformers."""
    kind, *numbers = c.rope_scaling.split() or ["default"]
    ropes = {"rope_type": kind, "rope_theta": c.rope_theta} | dict(zip(ROPE[kind], map(json.loads, numbers)))
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
    if c.sliding_window and c.architecture != "MistralForCausalLM" or c.post_norms:
        every = c.global_every or c.n_layer + 1 if c.sliding_window else 1
        out["layer_types"] = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.n_layer)]
        out |= {"use_sliding_window": True, "max_window_layers": 0} if c.qkv_bias else {}
    if c.post_norms:
        out |= {"attn_logit_softcapping": c.attn_softcap or None, "final_logit_softcapping": c.logit_softcap or None,
                "query_pre_attn_scalar": round(c.attn_scale**-2) if c.attn_scale else c.head_dim}
    if like and os.path.exists(os.path.join(like, "config.json")):
        source = read_json(like, "config.json")
        out |= {key: source.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id",
                                                 "max_position_embeddings") if key in source}
    return out
