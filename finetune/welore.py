"""
Compress a checkpoint by WeLore (arXiv 2407.11239): matrices that have a low rank anyway become two factors.
    python welore.py --model=meta-llama/Llama-2-7b-hf --out=llama2-welore --keep=0.5
    python train.py --init_from=llama2-welore --method=welore --learning_rate=5e-5      # trains the factors

One threshold for all: a matrix keeps the k singular values that are at least `threshold` of the way from its smallest
to its largest, which is few where the spectrum has a heavy tail. The threshold is such that all matrices together keep
`keep` of their ranks. What then keeps less than `least` becomes (U_k sqrt(S_k)) (sqrt(S_k) V_k^T), the rest stays as it
is. Nothing but the weights is looked at, one matrix at a time.

Two factors take k (m + n) numbers, the matrix m n: a square one that keeps half its rank has as many as before.
"""

import torch
from tqdm import tqdm

from finetune import hf
from configurator import configure
from finetune.hf_config import read_json, settings
from model import LLaMA, LLaMAConfig, QLinear

model = ""  # a Hugging Face directory or repository
out = ""  # the directory to make
keep = 0.5  # of all ranks
least = 0.5  # matrices that keep this share of their ranks, or more, stay whole
uniform = False  # the same share of each matrix's ranks, to compare with
device = "auto"  # of the decompositions


def ranks_at(threshold, values):
    """{name: k} of the singular values {name: descending}, normalised to 0..1 in each matrix."""
    return {name: int(((s - s[-1]) / (s[0] - s[-1]).clamp(min=1e-30) >= threshold).sum()) for name, s in values.items()}


def choose_ranks(values, keep):
    """The ranks at the threshold where they sum up to `keep` of all, as nearly as bisection in 50 steps comes."""
    low, high, most = 0.0, 1.0, sum(len(s) for s in values.values())
    for _ in range(50):
        middle = (low + high) / 2
        if sum(ranks_at(middle, values).values()) > keep * most:
            low = middle
        else:
            high = middle
    return ranks_at(high, values)


def factors(w, k):
    """u (out, k), v (k, in) of w (out, in), which is the product of the two but for the smallest singular values."""
    u, s, vh = torch.linalg.svd(w.float(), full_matrices=False)
    root = s[:k].sqrt()
    return u[:, :k] * root, root[:, None] * vh[:k]


def compress(path, out, keep=0.5, least=0.5, uniform=False, device="cpu"):
    """Make `out` of the checkpoint directory `path`; returns ({name: k of the matrices that became factors}, share of
    the ranks kept, share of the matrices' numbers kept). Raises ValueError, in one line, for what it cannot read."""
    found = settings(path)
    if found.get("low_rank"):
        raise ValueError(f"{path}: has been compressed before")
    with torch.device("meta"):
        empty = LLaMA(LLaMAConfig(**found), lambda *args, **kwargs: QLinear(*args, bits=16, **kwargs))
    names = {module: name for name, module in empty.named_modules() if isinstance(module, QLinear)}
    held, parts = hf.tensor_files(path), hf.hf_names(empty)
    matrices = {name: names[module] for name, (module, kind) in parts.items() if kind == "weight" and module in names}
    shapes = {name: getattr(module, kind).shape for name, (module, kind) in parts.items()}
    for name in parts:
        if name not in held:
            raise ValueError(f"{path}: there is no tensor {name}, in floats")
    read = lambda name: hf.read_tensor(held, name, shapes[name]).to(device)
    values = {name: torch.linalg.svdvals(read(name).float()).cpu() for name in tqdm(matrices, "spectra")}
    ranks = choose_ranks(values, keep)
    if uniform:
        ranks = {name: max(1, round(keep * len(s))) for name, s in values.items()}
    low = {name: max(1, k) for name, k in ranks.items() if uniform or k < least * len(values[name])}
    config = read_json(path, "config.json") | {"low_rank": " ".join(f"{matrices[name]}={k}" for name, k in low.items())}

    def tensors():
        for name in tqdm(parts, "factors"):
            w = read(name)
            if name in low:
                for part, t in zip("uv", factors(w, low[name])):
                    yield name.removesuffix("weight") + part, t.to(w.dtype)
            else:
                yield name, w

    hf.write(out, config, tensors(), path)
    whole = {name: shapes[name].numel() for name in matrices}
    numbers = sum(low[name] * sum(shapes[name]) if name in low else n for name, n in whole.items())
    kept = sum(low.get(name, len(s)) for name, s in values.items())
    return low, kept / sum(len(s) for s in values.values()), numbers / sum(whole.values())


def main():
    configure(globals(), skip_unknown_in_files=True)
    if not model or not out:
        raise SystemExit("error: name a checkpoint with --model=, and the directory to make with --out=")
    if not 0 < keep <= 1 or not 0 <= least <= 1:
        raise SystemExit(f"error: keep and least are shares, 0 to 1, not {keep} and {least}")
    try:
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        low, ranks, numbers = compress(hf.local(model), out, keep, least, uniform, kind)
    except ValueError as e:
        raise SystemExit(f"error: {e}")
    print(f"{out}: {len(low)} matrices became factors; kept {ranks:.3f} of all ranks, {numbers:.3f} of the matrices' "
          "numbers")


if __name__ == "__main__":
    main()
