"""
What a Hugging Face checkpoint's config.json says, as LLaMAConfig's fields, and back.

Of each architecture everything is read that changes what the model computes. What model.py does
not have is refused by its name, never passed over: a model that is almost right is worse than none.
"""

import os

from finetune.adapters import parse_ranks
from finetune.checkpoints.architectures import ARCHITECTURES, WITH_IMAGES
from finetune.checkpoints.fields import Fields, read_json, shown
from finetune.checkpoints.hf_files import EMBEDDING, HEAD, alike, has_weights, shapes, tensor_files
from finetune.checkpoints.hf_rope import rope_fields, rope_json, scaling
from model import LLaMAConfig
from run.text import first_line

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

# the fields that are sizes, and the most that a model may have, which it is built for
SIZES = {
    "block_size": ("max_position_embeddings", 2**31 - 1),
    "vocab_size": ("vocab_size", 2**24),
    "n_layer": ("num_hidden_layers", 1000),
    "n_head": ("num_attention_heads", 2**16),
    "n_embd": ("hidden_size", 2**20),
    "ffn_dim": ("intermediate_size", 2**22),
}

SOFTCAPS = {
    "attn_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}

# what changes the logits, and model.py does not have: supported is the first value, or none
NEUTRAL = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({}, []),
    "truncate": (True,),  # of YaRN
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
    if name in WITH_IMAGES:
        tied = c.truth("tie_word_embeddings", True)  # of the whole: transformers goes by this one
        c = c.object("text_config")
        c = Fields(c.found | {"tie_word_embeddings": tied}, c.where)
        parts = {ARCHITECTURES[part].kind: part for part in WITH_IMAGES[name][1]}
        kind = c.text("model_type", next(iter(parts)))
        if kind not in parts:
            c.refuse("model_type", " or ".join(parts))
        name = parts[kind]
    arch = ARCHITECTURES[name]
    c = Fields(arch.reads | c.found, c.where)
    _check_supported(c, arch)
    found = {"architecture": name, **_fields(c, arch)}
    try:
        parse_ranks(found.get("low_rank", ""))  # raises for what is no rank
        LLaMAConfig(**found)  # raises for heads that do not fit
    except ValueError as e:
        raise ValueError(f"{where}: {first_line(e)}")
    return found


def _architecture(c):
    """The model's class; config.json names it, and its kind."""
    name = next(iter(c.list("architectures", [])), "none")
    kinds = {known: arch.kind for known, arch in ARCHITECTURES.items()}
    kinds |= {known: kind for known, (kind, _) in WITH_IMAGES.items()}
    if name not in list(kinds):  # a list, as the name may be whatever JSON has
        known = ", ".join(kinds)
        raise ValueError(
            f"{c.where}: architecture {shown(name)} is not supported; there are {known}"
        )
    kind = kinds[name]
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
                f"{held[name].file}: tensor {name} is {theirs}, config.json says vocab_size and "
                f"hidden_size {ours}"
            )


def _check_supported(c, arch):
    """Raise ValueError if config.json's object c has something that model.py lacks."""
    # what would need more parameters, or another attention
    _, numbers = scaling(c, arch)
    for key, neutral in NEUTRAL.items():
        for fields in (c, numbers) if key not in arch.reads else ():
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


def _activation(c, arch):
    """LLaMAConfig.activation."""
    key = "hidden_activation" if "hidden_activation" in arch.reads else "hidden_act"
    given = c.text(key, "silu")
    known = ACTIVATIONS | {"gelu": arch.gelu}
    if given not in known:
        c.refuse(key, "one that is supported: " + ", ".join(known))
    return known[given]


def _fields(c, arch):
    """LLaMAConfig's fields of config.json's Fields c."""
    found = {}
    for field, (key, most) in SIZES.items():
        found[field] = c.whole(key, most=most)
    heads = found["n_head"]
    width = found["n_embd"]
    window, every = _sliding_window(c, arch, found["n_layer"])
    found |= {
        "n_kv_head": c.whole("num_key_value_heads", heads, most=heads),  # all: not grouped
        "norm_eps": float(c.number("rms_norm_eps", 1e-6)),
        "tie_embedding": c.truth("tie_word_embeddings", False),
        "head_dim": c.whole("head_dim", max(1, width // heads), most=2**16),
        "activation": _activation(c, arch),
        "embed_scale": width**0.5 if arch.scaled_embedding else 1.0,
        "attn_scale": 0.0,  # LLaMAConfig's: head_dim^-1/2
        "attn_softcap": 0.0,
        "logit_softcap": 0.0,
        "sliding_window": window,
        "global_every": every,
        "qkv_bias": False,
        "qk_norm": "",
        "pre_norms": True,
        "post_norms": False,
    }
    found |= rope_fields(c, arch, found["head_dim"]) | arch.fields
    if "query_pre_attn_scalar" in arch.reads:
        found["attn_scale"] = c.number("query_pre_attn_scalar") ** -0.5
    for field, key in SOFTCAPS.items():
        if key in arch.reads:
            found[field] = float(c.number(key, 0))
    if c.text("low_rank", ""):  # of welore.py
        found["low_rank"] = c.text("low_rank")
    return found


def _sliding_window(c, arch, n_layer):
    """(keys that a token sees in layers that slide, every which layer sees all); 0: none."""
    if arch.slides is None:
        return 0, 0
    window = c.whole("sliding_window", 0)
    if "use_sliding_window" in arch.reads and not c.truth("use_sliding_window"):
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
    else:
        slides = [arch.slides(c, i) for i in range(n_layer)]
    if not window or not any(slides):
        return 0, 0

    # the only order that model.py has: every n-th layer sees all keys, or none does
    every = slides.index(False) + 1 if False in slides else 0
    if slides != [not every or (i + 1) % every != 0 for i in range(n_layer)]:
        raise ValueError(
            f"{c.where}: this order of sliding and full attention is not supported ({arch.kind})"
        )
    return window, every


# -----------------------------------------------------------------------------
# out


def config_json(c, dtype, like):
    """config.json's object of a LLaMAConfig, for transformers.

    dtype: of the weights. like: the checkpoint directory that the model came from, or None; its
    special tokens and its longest text are kept."""
    arch = ARCHITECTURES[c.architecture]
    activation = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}[c.activation]
    out = {
        "architectures": [c.architecture],
        "model_type": arch.kind,
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
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the name in version 4
        "sliding_window": c.sliding_window or None,
        "bos_token_id": None,  # not known here; unsaid, transformers takes 1 and 2
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if "hidden_activation" in arch.reads:
        out["hidden_activation"] = activation
    out |= rope_json(c, arch) | _attention_json(c, arch)
    if like:
        where = os.path.join(like, "config.json")
        source = Fields(read_json(like, "config.json", needed=False), where)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            out[key] = source.take(key, (int, list), "a token's number, or several", None)
        key = "max_position_embeddings"
        if "text_config" in source.found:
            source = source.object("text_config")
        out[key] = source.whole(key, arch.reads.get(key, c.block_size))
    return out


def _attention_json(c, arch):
    """What config.json says of the layers' windows, and of attention's scale and soft caps."""
    out = {}
    # transformers wants a window of Gemma 2 and later, though no layer slides
    if "query_pre_attn_scalar" in arch.reads:
        out["sliding_window"] = c.sliding_window or c.block_size
        out["query_pre_attn_scalar"] = round(c.attn_scale**-2) if c.attn_scale else c.head_dim
    # which layers slide, where the architecture's rule says something else
    every = c.global_every or c.n_layer + 1
    if not c.sliding_window:
        every = 1  # all layers see all keys
    slides = [(i + 1) % every != 0 for i in range(c.n_layer)]
    has_window = arch.slides and (c.sliding_window or out)
    if has_window and slides != [arch.slides(Fields(arch.reads, ""), i) for i in range(c.n_layer)]:
        out["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in slides
        ]
    if "use_sliding_window" in arch.reads and c.sliding_window:
        out["use_sliding_window"] = True
        out["max_window_layers"] = 0
    for field, key in SOFTCAPS.items():
        if key in arch.reads:
            out[key] = getattr(c, field) or None
    return out
