"""
The device that a script computes on, in which floats, and what it can do.
"""

import os
import sys

import torch

from run.cards import card_here
from run.machine import free_memory, usable_cores

GIB = 2**30

# of a block's largest product, for each thread: with fewer a second thread gains a third at best,
# and costs four fifths where another process has its core (threads wait for each other by spinning)
OPERATIONS_A_THREAD = 10**9
LATER = 64 * 2**20  # bytes of a GPU: for kernels that are loaded when they are first used


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
    """The float type of computation for a setting "auto", "bfloat16", "float16" or "float32".

    "auto" is float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    here = kind == "cuda" and torch.cuda.is_available()
    lacks_bf16 = here and not torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "float32" if kind == "cpu" else "float16" if lacks_bf16 else "bfloat16"
        if lacks_bf16:
            print("note: this GPU has no bfloat16: products are in float16")
    elif name == "bfloat16" and lacks_bf16:
        raise SystemExit(
            "error: this GPU has no bfloat16 (Ampere and later have): use --dtype=float16"
        )
    return getattr(torch, name)


def loss_scale(s, dtype):
    """What the loss of settings s is multiplied by before backward: 1, but in float16 a power of
    two near the tokens of a step.

    The mean's gradients at a token are below float16's least, 6e-8, where those of the sum of the
    tokens' losses are near 1. What overflows all the same is not finite, and counts as zero."""
    tokens = s.batch_size * s.block_size * s.gradient_accumulation_steps
    return 2.0 ** (tokens.bit_length() - 1) if dtype == torch.float16 else 1.0


def choose_floats(s):
    """(dtype of float weights, dtype of computation) of a run's settings.

    s.device and s.dtype, which may be "auto", become what is meant."""
    s.device = pick_device(s.device)
    if not s.dry_run:
        check_device(s.device)
    compute_dtype = pick_dtype(s.dtype, s.device)
    s.dtype = str(compute_dtype).removeprefix("torch.")
    return weights_in(s, compute_dtype), compute_dtype


def weights_in(s, dtype):
    """The dtype of float weights where products are in `dtype`. Steps would be lost in weights of
    float16, and a residual stream might overflow it: they are float32, under autocast."""
    return torch.float32 if s.weight_bits == 32 or dtype == torch.float16 else dtype


def choose_threads(shape, tokens, threads=0, cores=None):
    """Set how many threads torch uses on the CPU. Returns a line that says so.

    shape: has n_embd and ffn_dim. tokens: that pass through a matrix at once. threads: the user's
    choice, 0: none. Else OMP_NUM_THREADS holds. Else it is by the size of a product and by the
    cores that there are, not by how busy they are: more threads sum up in another order."""
    if threads:
        torch.set_num_threads(threads)
        return f"threads: {threads}, as threads={threads} says"
    if os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {torch.get_num_threads()}, as OMP_NUM_THREADS says"
    cores = min(cores or usable_cores(), torch.get_num_threads())  # torch's own: a core has one
    operations = 2 * tokens * shape.n_embd * shape.ffn_dim
    threads = min(cores, max(1, operations // OPERATIONS_A_THREAD))
    torch.set_num_threads(threads)
    return (
        f"threads: {threads} of {cores}, one for each 1e9 operations of a block's largest product, "
        f"which has {operations:.2g}; --threads or OMP_NUM_THREADS overrides"
    )


def peak_flops(kind):
    """Operations a second that the GPU's data sheet has for bf16 products, or None."""
    card = card_here() if kind == "cuda" else None
    return card.bf16 if card else None


def memory_room(kind):
    """Bytes that "cuda" has, or that are free on "cpu"; None where the system does not tell."""
    if torch.device(kind).type == "cuda":  # "cuda:0", too
        return torch.cuda.mem_get_info()[1]
    return free_memory()


def taken_outside_torch(dtype):
    """Bytes of this GPU that torch's allocator does not count: CUDA's context, what its libraries
    load, other programs, the display. What a step uses of the libraries is loaded first.

    dtype: of the run's computation."""
    q = torch.ones(1, 8, 128, 64, device="cuda", dtype=dtype, requires_grad=True)  # (B, nh, T, hs)
    y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    (y @ y.transpose(2, 3)).float().square().sum().backward()
    lower = torch.linalg.cholesky_ex(torch.eye(64, device="cuda"))[0]  # as a refresh does
    torch.linalg.solve_triangular(lower, lower, upper=False)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + LATER


def memory_peak(kind):
    """Peak GiB so far: allocated by torch on "cuda", resident on "cpu"; 0.0 if it is not known."""
    if torch.device(kind).type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def block_weights(c):
    """How many weights the matrices of a block of LLaMAConfig c have."""
    attention = 2 * c.n_embd * (c.n_head + c.n_kv_head) * c.head_dim
    return attention + 3 * c.n_embd * c.ffn_dim


def flops_per_token(c):
    """Of forward and backward of LLaMAConfig c: 6 N + 12 L d T (PaLM, appendix B).

    N is the number of weights without the embedding."""
    n = c.n_layer * block_weights(c) + c.n_embd * c.vocab_size
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
