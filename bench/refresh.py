"""
What a refresh takes by the range finder, and what exact SVD would.

    python -m bench config/llama_7b.py --refresh_study=True

On the shapes of a block's matrices, with random gradients whose spectrum is flat or falls.
"""

import math
import time

import torch

from bench.contenders import Phases
from qgalore import Projection

HEAD = (
    "    out x in     decay  refresh ms      SVD ms  SVD/refresh  energy, of SVD's  SVD's, of all"
)
DECAYS = (0.0, 0.5, 1.0)  # 0 gives the flattest spectrum


def study(s, kind, dtype):
    """A row for each shape of a block's matrices and each decay; also printed.

    Time is of a refresh without quantisation, and of exact SVD. Energy is what each of the two
    bases P keeps of a gradient G, |G P|^2. G = dy^T x, with random x and dy; token t weighs
    t^-decay."""
    generator = torch.Generator(kind).manual_seed(s.seed)
    tokens = s.batch_size * s.block_size
    print(f"rank {s.rank}, {tokens} tokens")
    print(HEAD)
    rows = []
    for n_out, n_in in ((s.n_embd, s.n_embd), (s.ffn_dim, s.n_embd), (s.n_embd, s.ffn_dim)):
        for decay in DECAYS:
            # the factors of a gradient
            weight = torch.arange(1, tokens + 1, device=kind)[:, None] ** -decay  # (T, 1)
            x = torch.randn(tokens, n_in, device=kind, generator=generator)
            dy = torch.randn(tokens, n_out, device=kind, generator=generator)
            x, dy = x.to(dtype), dy.mul_(weight).to(dtype)
            row = {"out": n_out, "in": n_in, "decay": decay} | against_svd(x, dy, s.rank, kind)
            rows.append(row)
            print(
                f"{n_out:7d} x {n_in:<7d}{decay:4.1f}{row['refresh_ms']:12.1f}"
                f"{row['svd_ms']:12.1f}{row['ratio']:13.1f}{row['energy_of_svd']:18.4f}"
                f"{row['svd_energy_of_all']:15.4f}",
                flush=True,
            )
    return rows


def against_svd(x, dy, rank, kind):
    """Time and energy of both bases of G = dy^T x, from x (T, in) and dy (T, out)."""
    projection = Projection(dy.shape[1], x.shape[1], rank, bits=16)

    def refresh(step):
        left, right = projection.sketch(x, dy, step)
        projection.refresh((left.T @ right).float(), step)

    def svd(step):
        return torch.linalg.svd((dy.T @ x).float(), full_matrices=False)

    # time: of exact SVD one call, which takes 1.3 s for a 7B's smallest matrix on an H100
    refresh_ms, _ = fastest(refresh, 3, kind)
    svd_ms, (_, singular_values, _) = fastest(svd, 1, kind)

    # energy
    energy = singular_values.double().square()
    best = energy[:rank].sum()  # no basis of this rank keeps more
    left, right = projection.project(x, dy)  # in the basis that the last refresh took
    kept = (left.T @ right).double().square().sum()
    return {
        "refresh_ms": refresh_ms,
        "svd_ms": svd_ms,
        "ratio": svd_ms / refresh_ms,
        "energy_of_svd": (kept / best).item(),
        "svd_energy_of_all": (best / energy.sum()).item(),
    }


def fastest(function, times, kind):
    """(milliseconds of the fastest of `times` calls, what the last one returned)."""
    sync = Phases(kind).sync
    best = math.inf
    for i in range(times + 1):
        sync()
        start = time.perf_counter()
        result = function(i * 10**6)  # a step past any gap
        sync()
        if i:  # the first call loads and allocates
            best = min(best, 1000 * (time.perf_counter() - start))
    return best, result
