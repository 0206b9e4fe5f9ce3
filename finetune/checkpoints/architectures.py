"""
The architectures of Hugging Face's that model.py computes. A new one is an entry of ARCHITECTURES.
"""

from dataclasses import dataclass, field
from typing import Callable


@dataclass(frozen=True)
class Architecture:
    """What sets the checkpoints of an architecture apart from LLaMA's.

    kind: config.json's model_type. fields: LLaMAConfig's that each of its models has. reads: the
    keys of config.json that not all classes read, or have other defaults for, with transformers'
    own defaults. slides: (Fields of config.json, layer) -> whether the layer sees no more than
    sliding_window keys, where no layer_types are listed; None: no layer does, whatever is said."""

    kind: str
    fields: dict = field(default_factory=dict)
    reads: dict = field(default_factory=dict)
    slides: Callable | None = None
    names: dict = field(default_factory=dict)  # the parts of tensors' names that differ
    fused: dict = field(default_factory=dict)  # part of a name: those whose rows it holds
    norm_offset: int = 0  # norms multiply by their weight and this
    scaled_embedding: bool = False  # by the root of its width
    gelu: str = "gelu_erf"  # what "gelu" means in its files
    rope: dict = field(default_factory=dict)  # RoPE's object, where config.json has none
    local_theta: str = ""  # the key of the theta of layers that slide, where these have their own
    images: tuple = ()  # what tensors' names begin with that are not of its text part


POST_NORMS = {
    "mlp_norm": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
SEEN = ("vision_tower.", "multi_modal_projector.")  # of the parts that see images
QWEN = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = {"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True}
GEMMA2 = GEMMA | {
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,  # attention's scale is its root's inverse
    "attn_logit_softcapping": 50,
    "final_logit_softcapping": 30,
}
GEMMA3 = GEMMA2 | {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,  # of layers that slide
    "final_logit_softcapping": None,
}
del GEMMA3["attn_logit_softcapping"]  # which transformers does not apply

ARCHITECTURES = {  # by what transformers calls a model's class
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture(
        "mistral",
        reads={"sliding_window": 4096, "num_key_value_heads": 8},
        slides=lambda c, layer: True,
        images=SEEN,
    ),
    "Ministral3ForCausalLM": Architecture(
        "ministral3",
        reads={"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        slides=lambda c, layer: True,
        images=SEEN,
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        reads={
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1,
            "original_max_position_embeddings": 4096,
        },
        slides=lambda c, layer: True,
        fused={
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        },
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        fields={"qkv_bias": True},
        reads=QWEN,
        slides=lambda c, layer: layer >= c.whole("max_window_layers", 0, least=0),
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        fields={"qk_norm": "head"},
        reads=QWEN | {"head_dim": 128},
        slides=lambda c, layer: layer >= c.whole("max_window_layers", 0, least=0),
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        reads={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
        },
        slides=lambda c, layer: (layer + 1) % c.whole("no_rope_layer_interval") == 0,
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        fields={"qk_norm": "all", "pre_norms": False, "post_norms": True},
        reads={"rms_norm_eps": 1e-5},
        names=POST_NORMS,
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        fields={"qk_norm": "all", "pre_norms": False, "post_norms": True},
        reads={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
        slides=lambda c, layer: (layer + 1) % 4 != 0,
        local_theta="rope_theta",
        names=POST_NORMS,
    ),
    "GemmaForCausalLM": Architecture(
        "gemma",
        reads=GEMMA | {"hidden_act": "gelu_pytorch_tanh"},
        norm_offset=1,
        scaled_embedding=True,
        gelu="gelu",  # the tanh formula
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        fields={"post_norms": True},
        reads=GEMMA2,
        slides=lambda c, layer: layer % 2 == 0,
        names=POST_NORMS,
        norm_offset=1,
        scaled_embedding=True,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        fields={"post_norms": True, "qk_norm": "head"},
        reads=GEMMA3,
        local_theta="rope_local_base_freq",
        images=SEEN,
        slides=lambda c, layer: (layer + 1) % c.whole("sliding_window_pattern", 6) != 0,
        names=POST_NORMS,
        norm_offset=1,
        scaled_embedding=True,
    ),
}

# a class whose config.json has that of its text part: (its model_type, what that part may be)
WITH_IMAGES = {
    "Gemma3ForConditionalGeneration": ("gemma3", ("Gemma3ForCausalLM",)),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        ("MistralForCausalLM", "Ministral3ForCausalLM"),
    ),
}
