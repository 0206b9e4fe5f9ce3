"""
The device that a script computes on, in which floats, and what it can do.
"""

import sys

import torch

GIB = 2**30

# dense bf16 products with float32 sums, operations a second, from NVIDIA's data sheets
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
    "4060 Ti": 44e12,
    "3060 Ti": 32e12,
    "3060": 25e12,
}


def pick_device(name):
    """"cuda" or "cpu" for a setting that may also be "auto"."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def check_device(kind):
    """Exit with one line if there is no such device here."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: device=cuda, but torch finds no CUDA GPU; use --device=cpu, or mend the driver"
        )


def pick_dtype(name, kind):
    """The float type of computation for a setting "auto", "bfloat16" or "float32".

    "auto" is bfloat16 where the GPU has it, else float32."""
    here = kind == "cuda" and torch.cuda.is_available()
    lacks_bf16 = here and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "float32" if kind == "cpu" or lacks_bf16 else "bfloat16"
        if lacks_bf16:
            print("note: this GPU has no bfloat16: all runs in float32, with twice the activations")
    elif name == "bfloat16" and lacks_bf16:
        raise SystemExit(
            "error: this GPU has no bfloat16 (Ampere and later have): use --dtype=float32"
        )
    return getattr(torch, name)


def choose_floats(s):
    """(dtype of float weights, dtype of computation) of a run's settings.

    s.device and s.dtype, which may be "auto", become what is meant."""
    s.device = pick_device(s.device)
    if not s.dry_run:
        check_device(s.device)
    compute_dtype = pick_dtype(s.dtype, s.device)
    s.dtype = str(compute_dtype).removeprefix("torch.")
    weight_dtype = torch.float32 if s.weight_bits == 32 else compute_dtype
    return weight_dtype, compute_dtype


def peak_flops(kind):
    """Operations a second that the GPU's data sheet has for bf16 products, or None."""
    if kind == "cuda":
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return flops
    return None


def memory_free(kind):
    """Bytes free on "cuda" or "cpu"; None where the system does not tell."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def memory_peak(kind):
    """Peak GiB so far: allocated by torch on "cuda", resident on "cpu"; 0.0 if it is not known."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def flops_per_token(c):
    """Of forward and backward of LLaMAConfig c: 6 N + 12 L d T (PaLM, appendix B).

    N is the number of weights without the embedding."""
    attention = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_dim
    block = attention + 3 * c.n_embd * c.ffn_dim
    n = c.n_layer * block + c.n_embd * c.vocab_size
    return 6 * n + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def one_device(model):
    """The device of a model's tensors. Raises ValueError, with two names, if there are several."""
    first = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if first is None:
            first = name, tensor.device
        if tensor.device != first[1]:
            raise ValueError(
                f"the model is on several devices: {first[0]} on {first[1]}, "
                f"{name} on {tensor.device}; QGaLore trains on one"
            )
    return first[1] if first else torch.device("cpu")
