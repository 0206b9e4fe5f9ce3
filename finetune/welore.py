"""
Compress a checkpoint by WeLore (arXiv 2407.11239): matrices of low rank become two factors.
    python -m finetune.welore --model=meta-llama/Llama-2-7b-hf --out=llama2-welore --keep=0.5
    python train.py --init_from=llama2-welore --method=welore --learning_rate=5e-5

The second command trains the factors.

One threshold holds for all matrices. A matrix keeps the k singular values that are at least
`threshold` of the way from its smallest to its largest; where the spectrum has a heavy tail these
are few. The threshold is such that all matrices together keep `keep` of their ranks. What then
keeps less than `least` becomes (U_k sqrt(S_k)) (sqrt(S_k) V_k^T), the rest stays as it is. Nothing
but the weights is looked at, one matrix at a time.

Two factors take k (m + n) numbers, the matrix m n: a square one that keeps half its rank has as
many as before.
"""

import sys

from configurator import between, configure, one_of
from finetune.checkpoints.paths import check_new, local

# input and output
model = ""  # a Hugging Face directory or repository
out = ""  # the directory to make
device: one_of("auto", "cuda", "cpu") = "auto"  # of the decompositions

# how much is kept
keep: between(0, 1) = 0.5  # of all ranks; above 0
least: between(0, 1) = 0.5  # matrices that keep this share of their ranks, or more, stay whole
uniform = False  # the same share of each matrix's ranks, to compare with


def check(s):
    """Exit with one line for what can be said before torch is loaded, which takes seconds."""
    if not s.model or not s.out:
        raise SystemExit(
            "error: name a checkpoint with --model=, and the directory to make with --out="
        )
    if s.keep == 0:
        raise SystemExit("error: keep must be above 0")
    try:
        check_new(s.out)
    except ValueError as e:
        raise SystemExit(f"error: {e}")


if __name__ == "__main__":
    s = configure(sys.modules[__name__], ignore_unknown=True)
    check(s)

from functools import partial

import torch

from finetune import hf
from finetune.checkpoints.fields import read_json
from finetune.checkpoints.hf_config import settings
from finetune.checkpoints.hf_files import read_tensor
from finetune.checkpoints.hf_load import stored
from finetune.checkpoints.hf_tokenizer import tokenizer_files
from model import LLaMA, LLaMAConfig, QLinear
from run.device import check_device, pick_device
from run.show import Progress

BISECTIONS = 50  # of the threshold


def ranks_at(threshold, values):
    """{name: k} of the singular values {name: descending}, normalised to 0..1 in each matrix."""
    ranks = {}
    for name, s in values.items():
        largest, smallest = s[0], s[-1]  # they are in descending order
        normalised = (s - smallest) / (largest - smallest).clamp(min=1e-30)  # all may be alike
        ranks[name] = int((normalised >= threshold).sum())
    return ranks


def choose_ranks(values, keep):
    """{name: k} at the threshold where they sum up to `keep` of all, as near as bisection comes."""
    # the higher the threshold, the fewer ranks stay
    low = 0.0
    high = 1.0
    most = sum(len(s) for s in values.values())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(ranks_at(middle, values).values()) > keep * most:
            low = middle  # too many ranks
        else:
            high = middle
    return ranks_at(high, values)


def ranks_of_factors(values, keep, least, uniform):
    """{name: k} of the matrices, of singular values {name: descending}, that become factors."""
    if uniform:
        return {name: max(1, round(keep * len(s))) for name, s in values.items()}
    ranks = choose_ranks(values, keep)
    # two factors of most ranks would take more than the matrix
    return {name: max(1, k) for name, k in ranks.items() if k < least * len(values[name])}


def factors(w, k):
    """u (out, k), v (k, in): their product is w (out, in) without its smallest singular values."""
    u, s, vh = torch.linalg.svd(w.float(), full_matrices=False)
    root = s[:k].sqrt()  # shared by both factors, so that they are of one size
    return u[:, :k] * root, root[:, None] * vh[:k]


def compress(path, out, keep=0.5, least=0.5, uniform=False, device="cpu"):
    """Make the directory `out` of the checkpoint directory `path`.

    Returns ({name: k} of the matrices that became factors, share of the ranks kept, share of the
    matrices' numbers kept). Raises ValueError, in one line, for what it cannot read."""
    # what can be said before the work
    check_new(out)
    tokenizer_files(path)
    found = settings(path)
    if found.get("low_rank"):
        raise ValueError(f"{path}: has been compressed before")

    # what the checkpoint holds, by Hugging Face's names, and its matrices by ours
    empty = LLaMA(LLaMAConfig(**found), linear=partial(QLinear, bits=16), device="meta")
    our_names = {module: name for name, module in empty.named_modules()}
    files, wanted = stored(empty, path)
    shapes = {}
    matrices = {}
    for name, (module, kind) in wanted.items():
        if name not in files:
            raise ValueError(f"{path}: there is no tensor {name}, in floats")
        shapes[name] = getattr(module, kind).shape
        if kind == "weight" and isinstance(module, QLinear):
            matrices[name] = our_names[module]

    def read(name):
        return read_tensor(files, name, shapes[name]).to(device)

    # first all spectra, which share one threshold
    values = {}  # (min(out, in),) float32 each, descending
    for name in Progress("spectra", len(matrices), "matrices").over(matrices):
        values[name] = torch.linalg.svdvals(read(name).float()).cpu()
    low = ranks_of_factors(values, keep, least, uniform)
    if all(k == len(values[name]) for name, k in low.items()):
        raise ValueError(
            f"{path}: keep={keep} with least={least} leaves every matrix whole: keep less, or take "
            "a larger least"
        )

    # then each matrix once more, to be written whole or as factors
    def tensors():
        for name in Progress("factors", len(shapes), "tensors").over(shapes):
            w = read(name)
            if name not in low:
                yield name, w
                continue
            for part, t in zip("uv", factors(w, low[name])):
                yield name.removesuffix("weight") + part, t.to(w.dtype)

    config = read_json(path, "config.json")
    config["tie_word_embeddings"] = found["tie_embedding"]
    config["low_rank"] = " ".join(f"{matrices[name]}={k}" for name, k in low.items())
    hf.write(out, config, tensors(), path)
    return low, *_shares(low, values, {name: shapes[name] for name in matrices})


def _shares(low, values, shapes):
    """(share of the ranks kept, share of the matrices' numbers kept)."""
    ranks = 0
    numbers = 0
    for name, shape in shapes.items():
        if name in low:
            ranks += low[name]
            numbers += low[name] * sum(shape)  # u and v
        else:
            ranks += len(values[name])
            numbers += shape.numel()
    all_ranks = sum(len(s) for s in values.values())
    all_numbers = sum(shape.numel() for shape in shapes.values())
    return ranks / all_ranks, numbers / all_numbers


def main(s):
    check(s)
    try:
        path = local(s.model)
        device = pick_device(s.device)
        check_device(device)
        low, ranks, numbers = compress(path, s.out, s.keep, s.least, s.uniform, device)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    print(
        f"{s.out}: {len(low)} matrices became factors; "
        f"kept {ranks:.3f} of all ranks, {numbers:.3f} of the matrices' numbers"
    )


if __name__ == "__main__":
    main(s)
