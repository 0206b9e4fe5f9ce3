"""
Subspaces of a gradient: a basis from the gradient itself or from a sketch of it, and how alike two
of them are.
"""

import torch

from quant import CHUNK, chunks, uniform

POWER_ITERATIONS = 3  # of the range finder
RIDGE = 2.0**-8  # of a column's length: what it keeps of its basis' column in an iteration


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


def range_finder(gradient, rank, key=0):
    """The basis (dim, rank) of most energy of a gradient (dim, other), float32 or float64.

    Subspace iteration from the random numbers of `key`: P <- orthonormal(G G^T P) (Halko,
    Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4). A sketch of `rank` columns is taken as it
    is: they are made orthonormal. gradient: scaled in place, so that no square overflows. Products
    with it are in its own dtype: bfloat16 ones have float32 sums, and what they round does no harm,
    as each iteration mends the last. A gradient of less directions than `rank` is completed to a
    basis by random ones; of one that is not finite or zero nothing is to be used."""
    if gradient.dtype == torch.float16:  # it could not hold the products
        gradient = gradient.float()
    exponent = torch.linalg.vector_norm(gradient, torch.inf).log2().ceil()  # of the largest element
    gradient.mul_(exponent.neg().clamp_(-126, 126).exp2())  # a power of two rounds nothing
    p = random_matrix(key, len(gradient), rank, gradient.dtype, gradient.device)
    if gradient.shape[1] == rank:
        p = orthonormal(gradient, p)
    else:
        for _ in range(POWER_ITERATIONS):
            p = p.to(gradient.dtype)
            p = orthonormal(gradient @ (gradient.T @ p), p)
    return orthonormal(p)


def orthonormal(w, filling=None):
    """Q (dim, rank) of w = Q R, by Cholesky of R^T R: float32, or float64 if w is.

    Shifted CholeskyQR (Fukaya et al., arXiv 1809.11085). Products of matrices make nearly all of it,
    where Householder's reflections come one after the other. The shift keeps the Cholesky from
    failing on columns that depend on each other, and leaves Q's smallest directions shorter than 1:
    for an orthonormal basis call it twice. Nothing waits for the device.
    filling: (dim, rank), a small part of which is added to each column, so that w has full rank."""
    w = unit_columns(w)
    eps = torch.finfo(w.dtype).eps
    shift = 10 * eps  # of a second pass, whose Gram matrix is near one
    if filling is not None:
        w.add_(unit_columns(filling), alpha=RIDGE)
        shift = w.shape[1] * eps
    gram = w.T @ w  # (rank, rank)
    gram.diagonal().add_(shift)
    lower = torch.linalg.cholesky_ex(gram)[0]  # _ex: no error that the host would wait for
    return torch.linalg.solve_triangular(lower.T, w, upper=True, left=False)


def unit_columns(w):
    """A copy of w with columns of length 1, float32 or float64; one of zeros stays."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    length = torch.linalg.vector_norm(w, dim=0, dtype=dtype)
    return w / length.clamp_(min=torch.finfo(dtype).tiny)


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
