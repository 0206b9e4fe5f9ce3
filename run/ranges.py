"""
What numbers a model and its optimizer can do with, for those who build them in Python.

train.py's settings of these names have the same limits.
"""

from configurator import Allowed, at_least, between, from_below, one_of


def whole(low, high):
    """A whole number, as no other may be a size."""
    words = f"a whole number between {low} and {high}"
    return Allowed(words, lambda value: isinstance(value, int) and low <= value <= high)


# fields of LLaMAConfig; far beyond it sizes or float32 overflow
OF_MODEL = {
    "block_size": whole(1, 2**24),
    "vocab_size": whole(1, 2**24),
    "n_layer": whole(1, 10_000),
    "n_head": whole(1, 2**16),
    "n_kv_head": whole(0, 2**16),
    "n_embd": whole(1, 2**17),
    "ffn_dim": whole(1, 2**20),
    "rope_theta": between(1, 1e15),
    "rope_dim": whole(0, 2**16),
    "norm_eps": between(1e-30, 1),
    "head_dim": whole(0, 2**16),
    "activation": one_of("silu", "gelu", "gelu_erf"),
    "sliding_window": whole(0, 2**31),
    "global_every": whole(0, 2**31),
    "rope_local_theta": between(0, 1e15),
    "nope_every": whole(0, 2**31),
    "qk_norm": one_of("", "head", "all"),
    "checkpoint_bits": one_of(8, 16),
}

# arguments of QGaLore
OF_OPTIMIZER = {
    "lr": between(0, 100),
    "beta1": from_below(0, 1),
    "beta2": from_below(0, 1),
    "eps": at_least(1e-20),  # the square of a smaller gradient is 0 in float32
    "weight_decay": between(0, 1e6),
    "rank": whole(1, 2**20),
    "gap": whole(1, 2**31),
    "gap_growth": between(0, 10),
    "scale": between(1e-6, 1e6),
    "k": whole(1, 10**6),
    "proj_bits": one_of(4, 8, 16),
    "side": one_of("auto", "left", "right"),
    "moments": one_of("factored", "8bit", "float32"),
    "accumulation": one_of("int8", "bfloat16", "float32"),
    "grad_clip": at_least(0),
}


def check_values(limits, values):
    """Raise ValueError for the first of `values` that is outside of its limits {name: Allowed}."""
    for name, allowed in limits.items():
        try:
            good = allowed.holds(values[name])
        except TypeError:  # of another kind
            good = False
        if not good:
            raise ValueError(f"{name} must be {allowed}, not {values[name]!r}")
