"""
What a refresh takes by the range finder, and what exact SVD would.

    python -m bench config/llama_7b.py --refresh_study=True

On the gradients of a model of the recipe's shape, of two blocks, that has learned from text for a
few steps; and on random gradients whose spectrum is flat or falls, which are harder: real ones have
most of their energy in a few directions.
"""

import math
import time
from pydoc_data.topics import topics

import torch

from bench.contenders import Phases, settled
from methods.registry import find
from qgalore import Projection

HEAD = (
    "gradient            out x in   refresh ms      SVD ms  SVD/refresh  energy, of SVD's"
    "  SVD's, of all  |P^T P - 1|"
)
DECAYS = (0.0, 0.5, 1.0)  # 0 gives the flattest spectrum
TEXT_STEPS = 30  # that the model learns for


def study(s, kind, dtype):
    """A row for each matrix of a block, then for each shape and decay; also printed.

    Time is of a refresh without quantisation, its gradient's product included, and of exact SVD.
    Energy is what each of the two bases P keeps of a gradient G, |G P|^2."""
    print(f"rank {s.rank}, {s.batch_size * s.block_size} tokens")
    print(HEAD)
    rows = []
    for name, x, dy in (*factors_of_text(s, kind, dtype), *random_factors(s, kind, dtype)):
        row = {"gradient": name, "out": dy.shape[1], "in": x.shape[1]}
        row |= against_svd(x, dy, s.rank, kind)
        rows.append(row)
        print(
            f"{name:15s}{row['out']:7d} x {row['in']:<7d}{row['refresh_ms']:8.1f}"
            f"{row['svd_ms']:12.1f}{row['ratio']:13.1f}{row['energy_of_svd']:18.4f}"
            f"{row['svd_energy_of_all']:15.4f}{row['off_orthonormal']:13.1e}",
            flush=True,
        )
    return rows


def factors_of_text(s, kind, dtype):
    """[(name, x, dy)] of the last block's matrices, G = dy^T x: of a model that reads Python's help
    byte by byte. s: settings of the model and the rate."""
    torch.manual_seed(s.seed)
    ours = settled(s, "qgalore", n_layer=min(2, s.n_layer), weight_decay=0.0)
    model, optimizer = find("qgalore").build(ours, kind, dtype)
    text = "\n".join(topics.values()).encode()
    text = torch.tensor(list(text)) % s.vocab_size
    length = s.block_size + 1
    generator = torch.Generator().manual_seed(s.seed)
    found = []
    for step in range(TEXT_STEPS + 1):
        if step == TEXT_STEPS:
            for weight in optimizer.weights[-7:]:
                weight.layer.hook = _keep(found, weight.name.rpartition(".")[2])
        starts = torch.randint(len(text) - length, (s.batch_size,), generator=generator)
        batch = torch.stack([text[i : i + length] for i in starts]).to(kind)  # (B, T + 1)
        model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).backward()
    return found


def _keep(found, name):
    """A layer's hook that keeps the factors of its gradient."""
    return lambda layer, x, dy: found.append((name, x.detach().clone(), dy.detach().clone()))


def random_factors(s, kind, dtype):
    """(name, x, dy) with random numbers, for the shapes of a block's matrices and each decay: token
    t weighs t^-decay."""
    generator = torch.Generator(kind).manual_seed(s.seed)
    tokens = s.batch_size * s.block_size
    for n_out, n_in in ((s.n_embd, s.n_embd), (s.ffn_dim, s.n_embd), (s.n_embd, s.ffn_dim)):
        for decay in DECAYS:
            weight = torch.arange(1, tokens + 1, device=kind)[:, None] ** -decay  # (T, 1)
            x = torch.randn(tokens, n_in, device=kind, generator=generator)
            dy = torch.randn(tokens, n_out, device=kind, generator=generator)
            yield f"random t^-{decay}", x.to(dtype), dy.mul_(weight).to(dtype)


def against_svd(x, dy, rank, kind):
    """Time and energy of both bases of G = dy^T x, from x (T, in) and dy (T, out)."""
    projection = Projection(dy.shape[1], x.shape[1], rank, bits=16)

    def refresh(step):
        left, right = projection.sketch(x, dy, step)
        projection.refresh(left.T @ right, step)

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
    p = projection.matrix()
    one = torch.eye(p.shape[1], device=kind)
    return {
        "refresh_ms": refresh_ms,
        "svd_ms": svd_ms,
        "ratio": svd_ms / refresh_ms,
        "energy_of_svd": (kept / best).item(),
        "svd_energy_of_all": (best / energy.sum()).item(),
        "off_orthonormal": (p.T @ p - one).abs().max().item(),
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
