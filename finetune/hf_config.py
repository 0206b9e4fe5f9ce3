"""
What a Hugging Face checkpoint's config.json says, as LLaMAConfig's fields, and back.

Of each architecture everything is read that changes what the model computes. What model.py does
not have is refused by its name, never passed over: a model that is almost right is worse than none.
"""

import json
import os

from finetune.adapters import parse_ranks
from finetune.fields import Fields, read_json, shown
from finetune.hf_files import EMBEDDING, HEAD, alike, has_weights, shapes, tensor_files
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

# transformers' names of the activations that model.py has
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",  # the exact one
    "gelu_python": "gelu_erf",
    "gelu_pytorch_tanh": "gelu",  # by tanh
    "gelu_python_tanh": "gelu",
    "gelu_new": "gelu",
}

# transformers' own defaults, where a config.json need not say
DEFAULTS = {
    "MistralForCausalLM": {"sliding_window": 4096, "num_key_value_heads": 8},
    "GemmaForCausalLM": {
        "head_dim": 256,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "Gemma2ForCausalLM": {
        "head_dim": 256,
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,  # attention's scale is its root's inverse
        "attn_logit_softcapping": 50,
        "final_logit_softcapping": 30,
    },
    "Qwen2ForCausalLM": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}

# the fields that are sizes, and the most that a model may have, which it is built for
SIZES = {
    "block_size": ("max_position_embeddings", 2**31 - 1),
    "vocab_size": ("vocab_size", 2**24),
    "n_layer": ("num_hidden_layers", 1000),
    "n_head": ("num_attention_heads", 2**16),
    "n_embd": ("hidden_size", 2**20),
    "ffn_dim": ("intermediate_size", 2**22),
}

# what changes the logits, and model.py does not have: supported is the first value, or none
NEUTRAL = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({}, []),
}


# -----------------------------------------------------------------------------
# in


def settings(path):
    """{field of LLaMAConfig: value} of the checkpoint directory `path`.

    By its config.json, and by its files where these are there. Raises ValueError for an
    architecture, or a part of one, that model.py does not have, and for what the files do not
    hold."""
    found = described(path)
    adapter = os.path.join(path, "adapter_config.json")
    if os.path.lexists(adapter):  # transformers would apply it
        raise ValueError(f"{adapter}: an adapter that is not merged is not supported; merge it")
    if has_weights(path):
        held = tensor_files(path)
        _check_sizes(path, found, held)
        # a head of its own, as merges of adapters write, is not the embedding whatever is said
        if found["tie_embedding"] and {EMBEDDING, HEAD} <= held.keys():
            found["tie_embedding"] = alike(held, EMBEDDING, HEAD)
    return found


def described(path):
    """settings() by config.json alone."""
    where = os.path.join(path, "config.json")
    c = Fields(read_json(path, "config.json"), where)
    name = _architecture(c)
    c = Fields(DEFAULTS.get(name, {}) | c.found, where)
    _check_supported(c)
    found = _fields(c, name)
    try:
        parse_ranks(found.get("low_rank", ""))  # raises for what is no rank
        LLaMAConfig(**found)  # raises for heads that do not fit
    except ValueError as e:
        raise ValueError(f"{where}: {first_line(e)}")
    return found


def _architecture(c):
    """The model's class; config.json names it, and its kind."""
    name = next(iter(c.list("architectures", [])), "none")
    if name not in list(ARCHITECTURES):  # a list, as the name may be whatever JSON has
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"{c.where}: architecture {shown(name)} is not supported; there are {known}"
        )
    kind = ARCHITECTURES[name]
    if c.text("model_type", kind) != kind:  # which transformers goes by
        c.refuse("model_type", f"{kind}, as the architecture is {name}")
    return name


def _check_sizes(path, found, held):
    """Raise ValueError if the files hold fewer layers, or an embedding of other sizes."""
    layers = set()
    for name in held:
        kind, _, rest = name.partition("model.layers.")
        if not kind and rest:
            layers.add(rest.partition(".")[0])
    if len(layers) < found["n_layer"]:  # more are refused by their names
        raise ValueError(
            f"{path}: config.json says num_hidden_layers {found['n_layer']}, "
            f"the files hold {len(layers)}"
        )
    ours = [found["vocab_size"], found["n_embd"]]
    for name in {EMBEDDING, HEAD} & held.keys():
        theirs = shapes(held, [name])[name]
        if theirs != ours:
            raise ValueError(
                f"{held[name]}: tensor {name} is {theirs}, config.json says vocab_size and "
                f"hidden_size {ours}"
            )


def _check_supported(c):
    """Raise ValueError if config.json's object c has something that model.py lacks."""
    kind, numbers = _rope(c)
    # transformers 5 may give each kind of layer its own
    if any(isinstance(value, dict) for value in numbers.found.values()):
        numbers.refuse("rope_type", "one kind of RoPE for all layers")
    if kind not in ROPE:
        numbers.refuse("rope_type", "one that is supported: " + ", ".join(ROPE))

    # what would need more parameters, or another attention
    for key, neutral in NEUTRAL.items():
        for fields in (c, numbers):
            value = fields.found.get(key)
            if value is not None and value not in neutral:
                fields.refuse(key, f"{neutral[0]}: another is not supported")

    # weights of other number formats than floats and ours
    quantized = c.object("quantization_config")
    if quantized.found:
        if quantized.text("quant_method", "") != "qgalore":
            quantized.refuse("quant_method", "none: other formats than floats are not supported")
        quantized.whole("bits", 8, 8, 8)
        size = quantized.whole("group_size", least=0)
        if size & (size - 1):
            quantized.refuse("group_size", "0 or a power of two")


def _rope(c):
    """(kind of RoPE scaling, the Fields with its numbers): version 4's, or transformers 5's."""
    numbers = c.object("rope_scaling")  # which goes first in both versions
    if not numbers.found:
        numbers = c.object("rope_parameters")
    kind = numbers.text("rope_type", None) or numbers.text("type", "default")
    return kind, numbers


def _rope_scaling(c):
    """LLaMAConfig.rope_scaling, like "linear 2.5"; "" is plain RoPE."""
    kind, numbers = _rope(c)
    if kind == "default":
        return ""
    length = c.whole("original_max_position_embeddings", None)  # goes before that of the object
    if length is None:
        length = c.whole("max_position_embeddings")
    else:
        numbers.found["original_max_position_embeddings"] = length
    numbers = Fields({"original_max_position_embeddings": length} | numbers.found, numbers.where)
    values = [numbers.number(key) for key in ROPE[kind]]
    if kind == "llama3" and not values[1] < values[2]:
        numbers.refuse("high_freq_factor", "a number above low_freq_factor")
    return " ".join([kind, *map(str, values)])


def _activation(c, name):
    """LLaMAConfig.activation."""
    key = "hidden_activation" if name == "Gemma2ForCausalLM" else "hidden_act"
    given = c.text(key, "gelu_pytorch_tanh" if key == "hidden_activation" else "silu")
    if given == "gelu" and name == "GemmaForCausalLM":
        return "gelu"  # the first Gemma's files mean the tanh formula by it
    if given not in ACTIVATIONS:
        c.refuse(key, "one that is supported: " + ", ".join(ACTIVATIONS))
    return ACTIVATIONS[given]


def _fields(c, name):
    """LLaMAConfig's fields of config.json's Fields c."""
    found = {"architecture": name}
    for field, (key, most) in SIZES.items():
        found[field] = c.whole(key, most=most)
    heads = found["n_head"]
    width = found["n_embd"]
    window, every = _sliding_window(c, name, found["n_layer"])
    _, numbers = _rope(c)
    found |= {
        "n_kv_head": c.whole("num_key_value_heads", heads, most=heads),  # all: not grouped
        "rope_theta": float(numbers.number("rope_theta", c.number("rope_theta", 1e4))),
        "rope_scaling": _rope_scaling(c),
        "norm_eps": float(c.number("rms_norm_eps", 1e-6)),
        "tie_embedding": c.truth("tie_word_embeddings", False),
        "head_dim": c.whole("head_dim", max(1, width // heads), most=2**16),
        "activation": _activation(c, name),
        "qkv_bias": name == "Qwen2ForCausalLM",
        "embed_scale": 1.0,
        "attn_scale": 0.0,  # LLaMAConfig's: head_dim^-1/2
        "post_norms": False,
        "attn_softcap": 0.0,
        "logit_softcap": 0.0,
        "sliding_window": window,
        "global_every": every,
    }
    if name.startswith("Gemma"):
        found["embed_scale"] = width**0.5  # the embedding's output is multiplied by it
    if name == "Gemma2ForCausalLM":
        found["attn_scale"] = c.number("query_pre_attn_scalar") ** -0.5
        found["post_norms"] = True
        found["attn_softcap"] = float(c.number("attn_logit_softcapping", 0))
        found["logit_softcap"] = float(c.number("final_logit_softcapping", 0))
    if c.text("low_rank", ""):  # of welore.py
        found["low_rank"] = c.text("low_rank")
    return found


def _sliding_window(c, name, n_layer):
    """(keys that a token sees in layers that slide, every which layer sees all); 0: none."""
    if name in ("LlamaForCausalLM", "GemmaForCausalLM"):  # which have none, whatever is said
        return 0, 0
    window = c.whole("sliding_window", 0)
    if name == "Qwen2ForCausalLM" and not c.truth("use_sliding_window", False):
        window = 0

    # which layers slide: as listed, else by the architecture's rule
    listed = c.list("layer_types", None)
    if listed is not None:
        slides = [kind == "sliding_attention" for kind in listed]
        known = all(kind in ("sliding_attention", "full_attention") for kind in listed)
        if not known or len(listed) != n_layer:
            c.refuse("layer_types", f"sliding_attention or full_attention, {n_layer} times")
        if any(slides) and not window:
            c.refuse("layer_types", "full_attention alone, as no sliding_window is used")
    elif name == "Gemma2ForCausalLM":
        slides = [i % 2 == 0 for i in range(n_layer)]
    elif name == "Qwen2ForCausalLM":
        slides = [i >= c.whole("max_window_layers", 0, least=0) for i in range(n_layer)]
    else:  # Mistral slides in all layers
        slides = [True] * n_layer
    if not window or not any(slides):
        return 0, 0

    # the only order that model.py has: every n-th layer sees all keys, or none does
    every = slides.index(False) + 1 if False in slides else 0
    if slides != [not every or (i + 1) % every != 0 for i in range(n_layer)]:
        raise ValueError(
            f"{c.where}: this order of sliding and full attention is not supported ({name})"
        )
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
    activation = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}[c.activation]
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
        "hidden_act": activation,
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
        out["hidden_activation"] = activation
    out |= _attention_json(c)
    if like:
        where = os.path.join(like, "config.json")
        source = Fields(read_json(like, "config.json", needed=False), where)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            out[key] = source.take(key, (int, list), "a token's number, or several", None)
        longest = source.whole("max_position_embeddings", c.block_size)
        out["max_position_embeddings"] = longest
    return out


def _attention_json(c):
    """What config.json says of the layers' windows, and of Gemma 2's attention."""
    out = {}
    # Mistral slides in all layers, without a list
    mistral = c.architecture == "MistralForCausalLM" and not c.global_every
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
        # transformers wants a window there, though no layer slides
        out["sliding_window"] = c.sliding_window or c.block_size
        out["attn_logit_softcapping"] = c.attn_softcap or None
        out["final_logit_softcapping"] = c.logit_softcap or None
        scalar = round(c.attn_scale**-2) if c.attn_scale else c.head_dim
        out["query_pre_attn_scalar"] = scalar
    return out
