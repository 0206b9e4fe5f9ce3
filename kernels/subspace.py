"""
Subspaces of a gradient: a basis from the gradient itself or from a sketch of it, and how alike two
of them are.
"""

import torch

POWER_ITERATIONS = 3  # of the range finder on the sketch


def singular_vectors(gradient, rank, right):
    """The exact basis (dim, rank) of a gradient (dim, other) float32, as the papers take it.

    right: dim is the input side of the weight; the (out, in) matrix is what is decomposed."""
    gradient = gradient.T if right else gradient
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return vh[:rank].T if right else u[:, :rank]


def range_finder(sketch, rank):
    """The basis (dim, rank) of most energy of a sketch (dim, columns) float32, columns >= rank.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4. Where the sketch has fewer
    directions than rank, Householder QR completes the basis."""
    p = torch.linalg.qr(sketch[:, :rank])[0]
    if sketch.shape[1] > rank:
        for _ in range(POWER_ITERATIONS):
            p = torch.linalg.qr(sketch @ (sketch.T @ p))[0]
    return p


def similarity(overlap, dim):
    """How much of a subspace of `dim` dimensions lies in another: 0 is chance, 1 the same.

    (o - r/dim) / (1 - r/dim), o = |overlap|_F^2 / r, whatever the bases' signs and order; a ()
    tensor. overlap: old^T new (r, r) of orthonormal bases, r < dim."""
    share = len(overlap) / dim
    return (overlap.square().sum() / len(overlap) - share) / (1 - share)
