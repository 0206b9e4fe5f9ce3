"""
What a Hugging Face checkpoint's config.json says, as LLaMAConfig's fields, and back.

Of each architecture everything is read that changes what the model computes. What model.py does
not have is refused by its name, never passed over: a model that is almost right is worse than none.
"""

import json
import os

from finetune.adapters import parse_ranks
from model import LLaMAConfig
from run.text import first_line

# what transformers calls a model's class, and its kind
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Qwen2ForCausalLM": "qwen2",
}

# the numbers that each kind of RoPE scaling has, in the order of LLaMAConfig.rope_scaling
ROPE = {
    "default": (),  # plain RoPE
    "linear": ("factor",),  # positions divided by it
    "llama3": (  # LLaMA 3.1's
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}

# transformers' own defaults, where a config.json need not say
DEFAULTS = {
    "MistralForCausalLM": {"sliding_window": 4096, "num_key_value_heads": 8},
    "GemmaForCausalLM": {"head_dim": 256},
    "Gemma2ForCausalLM": {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,  # attention's scale is its root's inverse
        "attn_logit_softcapping": 50,
        "final_logit_softcapping": 30,
    },
    "Qwen2ForCausalLM": {"sliding_window": 4096, "max_window_layers": 28},
}

# the fields that must be whole numbers, at least 1
SIZES = (
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "ffn_dim",
    "head_dim",
)


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


# -----------------------------------------------------------------------------
# in


def settings(path):
    """{field of LLaMAConfig: value} of the checkpoint directory `path`, by its config.json alone.

    Raises ValueError for an architecture, or a part of one, that model.py does not have."""
    c = read_json(path, "config.json")
    name = (c.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {name} is not supported; there are {known}")
    c = DEFAULTS.get(name, {}) | c
    try:  # a field may be missing, or of another type
        _check_supported(c, name)
        found = _fields(c, name)
        for key in SIZES:
            if type(found[key]) is not int or found[key] < 1:
                raise ValueError(f"{found[key]!r} for {key}, which is a whole number")
        parse_ranks(found.get("low_rank", ""))  # raises for what is no rank
        LLaMAConfig(**found)  # raises for heads that do not fit
    except KeyError as e:
        raise ValueError(f"{path}/config.json: has no {e.args[0]}")
    except (TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{path}/config.json: {first_line(e)}")
    return found


def _refuse(what, name):
    raise ValueError(f"{what} is not supported ({name})")


def _check_supported(c, name):
    """Raise ValueError if config.json's object c has something that model.py lacks."""
    # what is read below as an object
    for key in ("rope_parameters", "rope_scaling", "quantization_config"):
        if not isinstance(c.get(key) or {}, dict):
            _refuse(f"{key} {c[key]!r}", name)

    # the MLP: SwiGLU, or Gemma's gelu
    activations = [None, "silu"]
    if name.startswith("Gemma"):  # transformers takes its "gelu" for the tanh approximation, too
        activations = [None, "gelu", "gelu_pytorch_tanh"]
    for key in ("hidden_act", "hidden_activation"):
        if c.get(key) not in activations:
            _refuse(f"{key} {c[key]!r}", name)

    kind, numbers = _rope(c)
    if kind not in list(ROPE):  # a list, as kind may be whatever JSON has
        _refuse(f"RoPE scaling {kind}", name)
    # transformers 5 may give each kind of layer its own
    if any(isinstance(value, dict) for value in numbers.values()):
        what = "by layer" if kind == "default" else kind
        _refuse(f"RoPE scaling {what}", name)

    # what would need more parameters, or another attention
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if c.get(key):
            _refuse(key, name)
    if (numbers.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1:
        _refuse("partial_rotary_factor", name)

    # weights of other number formats than floats and ours
    quantized = c.get("quantization_config")
    if quantized and quantized.get("quant_method") != "qgalore":
        _refuse(f"quantization {quantized.get('quant_method')}", name)


def _rope(c):
    """(kind of RoPE scaling, the object with its numbers): transformers 5's, or version 4's."""
    numbers = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = numbers.get("rope_type") or numbers.get("type") or "default"
    return kind, numbers


def _fields(c, name):
    """LLaMAConfig's fields of config.json's object c."""
    gemma = name.startswith("Gemma")
    n_layer = c["num_hidden_layers"]
    width = c["hidden_size"]
    heads = c["num_attention_heads"]
    window, every = _sliding_window(c, name, n_layer)

    kind, numbers = _rope(c)
    scaling = ""
    if kind != "default":  # like "linear 2.5"
        scaling = " ".join([kind, *(str(numbers[key] + 0) for key in ROPE[kind])])

    found = {
        "architecture": name,
        "block_size": c["max_position_embeddings"],
        "vocab_size": c["vocab_size"],
        "n_layer": n_layer,
        "n_head": heads,
        "n_kv_head": c.get("num_key_value_heads") or heads,  # none: no grouped queries
        "n_embd": width,
        "ffn_dim": c["intermediate_size"],
        "rope_theta": float(numbers.get("rope_theta") or c.get("rope_theta", 1e4)),
        "rope_scaling": scaling,
        "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
        "tie_embedding": bool(c.get("tie_word_embeddings", gemma)),
        "head_dim": c.get("head_dim") or width // heads,
        "activation": "silu",
        "qkv_bias": name == "Qwen2ForCausalLM",
        "embed_scale": 1.0,
        "attn_scale": 0.0,  # LLaMAConfig's: head_dim^-1/2
        "post_norms": False,
        "attn_softcap": 0.0,
        "logit_softcap": 0.0,
        "sliding_window": window,
        "global_every": every,
    }
    if gemma:
        found["activation"] = "gelu"
        found["embed_scale"] = width**0.5  # the embedding's output is multiplied by it
    if name == "Gemma2ForCausalLM":
        found["attn_scale"] = c["query_pre_attn_scalar"] ** -0.5
        found["post_norms"] = True
        found["attn_softcap"] = float(c["attn_logit_softcapping"] or 0)
        found["logit_softcap"] = float(c["final_logit_softcapping"] or 0)
    if c.get("low_rank"):  # of welore.py
        found["low_rank"] = c["low_rank"]
    return found


def _sliding_window(c, name, n_layer):
    """(keys that a token sees in layers that slide, every which layer sees all); 0: none."""
    window = c.get("sliding_window") or 0
    if name in ("LlamaForCausalLM", "GemmaForCausalLM"):  # which have none, whatever is said
        return 0, 0
    if name == "Qwen2ForCausalLM" and not c.get("use_sliding_window"):
        return 0, 0
    if not window or name == "MistralForCausalLM":  # which slides in all layers
        return window, 0

    # which layers slide: as listed, else by the architecture's rule
    slides = [kind == "sliding_attention" for kind in c.get("layer_types") or ()]
    if not slides and name == "Gemma2ForCausalLM":
        slides = [i % 2 == 0 for i in range(n_layer)]
    elif not slides:
        slides = [i >= c["max_window_layers"] for i in range(n_layer)]

    # the only order that model.py has: every n-th layer sees all keys, or none does
    every = slides.index(False) + 1 if False in slides else 0
    if slides != [not every or (i + 1) % every != 0 for i in range(n_layer)]:
        _refuse("this order of sliding and full attention", name)
    if every == 1:  # no layer slides
        return 0, 0
    return window, every


# -----------------------------------------------------------------------------
# out


def config_json(c, dtype, like):
    """config.json's object of a LLaMAConfig, for transformers.

    dtype: of the weights. like: the checkpoint directory that the model came from, or None; its
    special tokens and its longest text are kept."""
    # like "linear 2.5"; "" is plain RoPE
    kind, *numbers = c.rope_scaling.split() or ["default"]
    rope = {"rope_type": kind, "rope_theta": c.rope_theta}
    rope.update(zip(ROPE[kind], map(json.loads, numbers)))
    gemma = c.architecture.startswith("Gemma")
    out = {
        "architectures": [c.architecture],
        "model_type": ARCHITECTURES[c.architecture],
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embedding,
        "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "rope_parameters": rope,  # for transformers 5
        "rope_theta": c.rope_theta,  # and for version 4
        "rope_scaling": None if kind == "default" else rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "sliding_window": c.sliding_window or None,
        "bos_token_id": None,  # not known here; unsaid, transformers takes 1 and 2
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if gemma:
        out["hidden_activation"] = "gelu_pytorch_tanh"
    out |= _attention_json(c)
    if like and os.path.exists(os.path.join(like, "config.json")):
        source = read_json(like, "config.json")
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        out |= {key: source[key] for key in kept if key in source}
    return out


def _attention_json(c):
    """What config.json says of the layers' windows, and of Gemma 2's attention."""
    out = {}
    mistral = c.architecture == "MistralForCausalLM"  # which slides in all layers, without a list
    if c.post_norms or c.sliding_window and not mistral:
        every = 1  # all layers see all keys
        if c.sliding_window:
            every = c.global_every or c.n_layer + 1
        out["layer_types"] = [
            "sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.n_layer)
        ]
        if c.qkv_bias:  # Qwen2, which uses its window where it is told to
            out["use_sliding_window"] = True
            out["max_window_layers"] = 0
    if c.post_norms:  # Gemma 2
        out["attn_logit_softcapping"] = c.attn_softcap or None
        out["final_logit_softcapping"] = c.logit_softcap or None
        scalar = round(c.attn_scale**-2) if c.attn_scale else c.head_dim
        out["query_pre_attn_scalar"] = scalar
    return out
