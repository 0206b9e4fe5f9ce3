"""
Subspaces of a gradient: a basis from the gradient itself or from a sketch of it, and how alike two
of them are.
"""

import torch

from quant import CHUNK, chunks, uniform

POWER_ITERATIONS = 3  # of the range finder on the sketch


def singular_vectors(gradient, rank, right):
    """The exact basis (dim, rank) of a gradient (dim, other) float32, as the papers take it.

    right: dim is the input side of the weight; the (out, in) matrix is what is decomposed."""
    gradient = gradient.T if right else gradient
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return vh[:rank].T if right else u[:, :rank]


def random_matrix(key, rows, columns, dtype, device):
    """Omega (rows, columns): numbers of stream `key`, uniform in -1/2 .. 1/2."""
    omega = torch.empty(rows, columns, dtype=dtype, device=device)
    step = max(1, CHUNK // columns)  # rows that are float32 at once
    for i in chunks(omega, rows, step):
        part = omega[i : i + step]
        numbers = uniform(key, i * columns, part.numel(), device).sub_(0.5)
        part.copy_(numbers.view(part.shape))
    return omega


def range_finder(sketch, rank):
    """The basis (dim, rank) of most energy of a sketch (dim, columns) float32, columns >= rank.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. Where the sketch has fewer
    directions than rank, Householder QR completes the basis."""
    p = torch.linalg.qr(sketch[:, :rank])[0]  # (dim, rank)
    if sketch.shape[1] > rank:
        for _ in range(POWER_ITERATIONS):
            p = torch.linalg.qr(sketch @ (sketch.T @ p))[0]  # orthonormal again each time
    return p


def similarity(overlap, dim):
    """How much of a subspace of `dim` dimensions lies in another: 0 is chance, 1 the same.

    (o - r/dim) / (1 - r/dim), o = |overlap|_F^2 / r, whatever the bases' signs and order; a ()
    tensor. overlap: old^T new (r, r) of orthonormal bases, r < dim."""
    share = len(overlap) / dim  # what two random subspaces have in common
    return (overlap.square().sum() / len(overlap) - share) / (1 - share)


def frobenius(x):
    """The root of the sum of x's squares, () float32, or float64 of float64."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


class Arriving:
    """A number on its way from the device.

    Who asks a step later waits for that copy, not for the queue of work behind it, as .item()."""

    def __init__(self, tensor):
        self.host = tensor
        self.event = None
        if tensor.is_cuda:
            self.host = torch.empty((), pin_memory=True).copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def value(self):
        if self.event is not None:
            self.event.synchronize()
        return self.host.item()
