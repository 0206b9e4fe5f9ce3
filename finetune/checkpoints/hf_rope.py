"""
What a config.json says of RoPE, as LLaMAConfig's fields, and back.

What the kinds of its scaling do is in kernels/attention.py, frequencies().
"""

import json
import math

from finetune.checkpoints.fields import REQUIRED, Fields

TRAINED = "original_max_position_embeddings"  # the length of the first training's texts
LONGEST = "max_position_embeddings"
GROWS = "llama_4_scaling_beta"  # by how much queries grow beyond TRAINED; 0: they do not

# the numbers that each kind of RoPE scaling has, in the order of LLaMAConfig.rope_scaling
ROPE = {
    "default": (),  # plain RoPE
    "linear": ("factor",),  # positions divided by it
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", TRAINED),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", TRAINED, GROWS),
    "longrope": ("short_factor", "long_factor", TRAINED, LONGEST),  # of Phi
}


def scaling(c, arch):
    """(kind of RoPE's scaling, the Fields with its numbers): version 4's, or transformers 5's.

    Raises ValueError for a kind that is not in ROPE."""
    numbers = c.object("rope_scaling")  # which goes first in both versions
    if not numbers.found:
        numbers = c.object("rope_parameters")
        if arch.local_theta:  # one for each kind of layers
            numbers = numbers.object("full_attention")
    if not numbers.found:
        numbers = Fields(dict(arch.rope), c.where)
    kind = numbers.text("rope_type", None) or numbers.text("type", "default")
    if arch.kind == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # which older files of Phi-3 call so
    # transformers 5 may give each kind of layer its own
    if any(isinstance(value, dict) for value in numbers.found.values()):
        numbers.refuse("rope_type", "one kind of RoPE for all layers")
    if kind not in ROPE:
        numbers.refuse("rope_type", "one that is supported: " + ", ".join(ROPE))
    return kind, numbers


def rope_fields(c, arch, head_dim):
    """LLaMAConfig's fields of RoPE; its scaling is like "linear 2.5", "" is plain RoPE."""
    kind, numbers = scaling(c, arch)
    found = {
        "rope_theta": float(numbers.number("rope_theta", c.number("rope_theta", 1e4))),
        "rope_scaling": "",
        "rope_dim": 0,
        "rope_local_theta": 0.0,
        "nope_every": _nope_every(c, arch),
    }
    if arch.local_theta:
        local = c.object("rope_parameters").object("sliding_attention")
        if local.text("rope_type", "default") != "default":
            local.refuse("rope_type", "default: no other is supported")
        theta = local.number("rope_theta", c.number(arch.local_theta))
        found["rope_local_theta"] = float(theta)
    if "partial_rotary_factor" in arch.reads:
        part = numbers.number("partial_rotary_factor", c.number("partial_rotary_factor"))
        turned = int(part * head_dim)
        if not 0 < turned <= head_dim or turned % 2:
            c.refuse("partial_rotary_factor", f"an even part of head_dim, which is {head_dim}")
        found["rope_dim"] = turned if turned < head_dim else 0
    if kind != "default":
        values = _values(kind, c, numbers, found["rope_dim"] or head_dim)
        texts = [json.dumps(value, separators=(",", ":")) for value in values]
        found["rope_scaling"] = " ".join([kind, *texts])
        said = dict(zip(ROPE[kind], values))
        if kind == "longrope" or said.get(GROWS):  # beyond it attention is another
            found["block_size"] = int(min(said[TRAINED], c.whole(LONGEST)))
    return found


def _values(kind, c, numbers, dim):
    """A scaling's numbers, in the order of ROPE. dim: of a head, that RoPE turns."""
    length = c.whole(TRAINED, None)  # goes before that of the object
    if length is not None:
        numbers.found[TRAINED] = length
    known = {TRAINED: c.whole(LONGEST)}
    if kind == "yarn":
        known |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": _yarn_growth(numbers)}
    given = {key: value for key, value in numbers.found.items() if value is not None}
    numbers = Fields(known | given, numbers.where)

    if kind == "longrope":
        lengths = [numbers.whole(TRAINED, least=2), c.whole(LONGEST)]
        values = [_factors(numbers, key, dim // 2) for key in ROPE[kind][:2]] + lengths
        _check_growth(numbers, *lengths)
    else:
        values = [numbers.number(key, 0 if key == GROWS else REQUIRED) for key in ROPE[kind]]
    if kind == "yarn" and numbers.number("rope_theta", c.number("rope_theta", 1e4)) <= 1:
        numbers.refuse("rope_theta", "a number above 1")
    if kind == "llama3" and not values[1] < values[2]:
        numbers.refuse("high_freq_factor", "a number above low_freq_factor")
    return values


def _yarn_growth(numbers):
    """By what YaRN multiplies queries and keys (its section 3.4), where that is not said."""
    log = math.log(max(1, numbers.number("factor")))
    some = numbers.number("mscale", 0)
    all_ = numbers.number("mscale_all_dim", 0)
    if some and all_:
        return (0.1 * some * log + 1) / (0.1 * all_ * log + 1)
    return 0.1 * log + 1


def _factors(numbers, key, n):
    """LongRoPE's list of a number for each of n pairs."""
    found = numbers.list(key)
    if len(found) != n or not all(type(x) in (int, float) and 0 < x < 1e300 for x in found):
        numbers.refuse(key, f"{n} numbers above 0")
    return found


def _check_growth(numbers, trained, longest):
    """Raise ValueError if a LongRoPE's attention is not scaled by its two lengths."""
    if not math.isclose(numbers.number("factor", longest / trained), longest / trained):
        numbers.refuse("factor", "max_position_embeddings / original_max_position_embeddings")
    if numbers.found.get("attention_factor") is not None:
        numbers.refuse("attention_factor", "none: it follows from the lengths")


def _nope_every(c, arch):
    """LLaMAConfig.nope_every: by a list of 1 and 0, else by the interval."""
    if "no_rope_layer_interval" not in arch.reads:
        return 0
    every = c.whole("no_rope_layer_interval")
    n_layer = c.whole("num_hidden_layers")
    listed = c.list("no_rope_layers", None)
    if listed is not None:  # of which the others may be more
        rotates = listed[:n_layer]
        every = rotates.index(0) + 1 if 0 in rotates else n_layer + 1
        if rotates != [int((i + 1) % every != 0) for i in range(n_layer)]:
            c.refuse("no_rope_layers", "a 0 at every n-th of the layers, 1 at the others")
    return every if every <= n_layer else 0


def rope_json(c, arch):
    """What config.json says of RoPE: transformers 5 reads rope_parameters, version 4 the rest."""
    kind, *numbers = c.rope_scaling.split() or ["default"]  # like "linear 2.5"
    rope = {"rope_type": kind, "rope_theta": c.rope_theta}
    rope.update(zip(ROPE[kind], map(json.loads, numbers)))
    if not rope.get(GROWS, True):  # of all but Ministral 3
        rope.pop(GROWS)
    out = {"rope_theta": c.rope_theta, "rope_parameters": rope, "rope_scaling": None}
    if c.rope_dim:
        part = c.rope_dim / c.head_dim
        if int(part * c.head_dim) < c.rope_dim:  # as transformers rounds it
            part = math.nextafter(part, 1)
        rope["partial_rotary_factor"] = out["partial_rotary_factor"] = part
    if kind == "longrope":  # version 4 has the two lengths outside, and checks for no fourth key
        short, long, *lengths = ROPE[kind]
        out["rope_scaling"] = {"type": kind, short: rope[short], long: rope[long]}
        out |= {key: rope.pop(key) for key in lengths}
    elif kind != "default":
        out["rope_scaling"] = rope
    if c.rope_local_theta:
        local = {"rope_type": "default", "rope_theta": c.rope_local_theta}
        out["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        out[arch.local_theta] = c.rope_local_theta
    if c.nope_every or "no_rope_layer_interval" in arch.reads:
        every = c.nope_every or c.n_layer + 1
        out["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(c.n_layer)]
        out["no_rope_layer_interval"] = every
    return out
