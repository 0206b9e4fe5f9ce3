"""
What a run takes, counted before anything is allocated, and what the device has.
"""

import sys

import torch

from model import LLaMA, LOSS_CHUNK, QLinear
from qgalore import MIN_8BIT, ROWS, Projection

GIB = 2**30


def memory_plan(config, dtype):
    """{part: bytes} of a run, its model laid out on the meta device, where nothing is allocated. Weights and optimizer
    state are exact; activations and scratch are counted by hand from model.py and qgalore.py."""
    model, c, size = LLaMA.from_settings(config, "meta", dtype), config, dtype.itemsize
    method = c["method"]
    tokens = c["batch_size"] * c["block_size"]
    kv = c["n_embd"] // c["n_head"] * c["n_kv_head"]
    saved = size * (4 * c["n_embd"] + 2 * kv + 4 * c["ffn_dim"]) + 8 * c["n_embd"]  # a token and block
    plan = dict.fromkeys(["weights", "embedding, head, norms", "projections", "moments", "gradients"], 0)
    scratch = [3 * LOSS_CHUNK * c["vocab_size"] * 4]
    low_rank = 0
    for layer in model.modules():
        if isinstance(layer, QLinear):
            plan["weights"] += sum(b.nbytes for b in layer.buffers())
            p = Projection(layer.out_features, layer.in_features, c["rank"], bits=c["proj_bits"])
            other = layer.in_features + layer.out_features - p.dim
            plan["projections"] += p.nbytes()
            plan["moments"] += moment_bytes(other * p.rank, c["moment_bits"])
            low_rank += 4 * other * p.rank
            scratch.append(layer.in_features * layer.out_features * size + 20 * ROWS * layer.in_features
                           + 12 * other * p.rank + 12 * p.dim * p.rank)
    bits = {"adamw": 32, "adam8bit": 8, "qgalore": c["moment_bits"]}[method]
    sizes = [p.nbytes for p in model.parameters()]
    plan["embedding, head, norms" if method == "qgalore" else "weights"] += sum(sizes)
    plan["moments"] += sum(moment_bytes(p.numel(), bits) for p in model.parameters())
    in_backward = method != "adamw" and c["gradient_accumulation_steps"] == 1
    plan["gradients"] = max(sizes) if in_backward else sum(sizes) + low_rank
    kept = saved + c["n_layer"] * c["n_embd"] * size if c["checkpoint_activations"] else c["n_layer"] * saved
    plan["activations"] = tokens * (kept + 3 * c["n_embd"] * size)  # three more around the head
    plan["scratch"] = max(scratch)
    return plan


def moment_bytes(n, bits):
    return 8 * n if bits == 32 or n < MIN_8BIT else 2 * (n + 4 * -(-n // 256))


def memory_free(device):
    """Bytes free on "cuda" or "cpu"; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except OSError:
        return None


def memory_peak(device):
    """Peak GiB so far: allocated by torch on "cuda", resident on "cpu"; 0.0 where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
