"""
Symmetric products in Triton: tiles on and below the diagonal are multiplied, and written twice.
methods/muon.py has the same functions in plain torch and says what their arguments are.

A tile of 128 x 128 is summed in float32, 64 products at a time, in the registers of 8 warps. What a
polynomial adds is added there, so that a result is rounded once and nothing is copied.
"""

import torch

from kernels.launch import cdiv, tl, triton

TILE = 128  # rows and columns of a program's part of the result
DEPTH = 64  # products that are summed at a time


def gram_matrix(y, size=None):
    """y y^T, divided by size."""
    return _launch(y, size, 0.0, 0.0, 1.0, polynomial=False)


def polynomial(x, a, b, c, size=None):
    """a + b X + c X^2, divided by the root of size."""
    return _launch(x, size, a, b, c, polynomial=True)


def _launch(y, size, a, b, c, polynomial):
    if y.dtype.itemsize != 2:  # float32 would leave the tensor cores
        return NotImplemented
    n, rows, cols = y.shape
    # rows that begin at a multiple of 32 bytes, for wide loads
    out = torch.empty(n, rows, 16 * cdiv(rows, 16), dtype=y.dtype, device=y.device)
    tiles = cdiv(rows, TILE)
    _symmetric_kernel[tiles, tiles, n](
        y, y if size is None else size, out, rows, cols, *y.stride(), *out.stride()[:2], a, b, c,
        polynomial, size is not None, TILE, DEPTH,
        num_warps=8, num_stages=3,
    )
    return out[..., :rows]


if triton is not None:

    @triton.jit
    def _symmetric_kernel(
        y_ptr, size_ptr, out_ptr, rows, cols, matrix_stride, row_stride, col_stride,
        out_matrix_stride, out_row_stride, a, b, c, POLYNOMIAL: tl.constexpr, SIZED: tl.constexpr,
        TILE: tl.constexpr, DEPTH: tl.constexpr,
    ):
        if tl.program_id(1) > tl.program_id(0):
            return  # above the diagonal: the mirror image of a tile below
        matrix = tl.program_id(2)
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)  # (TILE,)
        col = tl.program_id(1) * TILE + tl.arange(0, TILE)  # (TILE,), other rows of y
        k = tl.arange(0, DEPTH)

        # rows past the last are any rows: their products are not stored
        y_ptr += matrix * matrix_stride
        left_ptr = y_ptr + (row % rows)[:, None] * row_stride + k[None, :] * col_stride
        right_ptr = y_ptr + (col % rows)[None, :] * row_stride + k[:, None] * col_stride
        tile = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, cols, DEPTH):
            inside = k < cols - start
            left = tl.load(left_ptr, inside[None, :], other=0.0)
            right = tl.load(right_ptr, inside[:, None], other=0.0)
            tile = tl.dot(left, right, tile)
            left_ptr += DEPTH * col_stride
            right_ptr += DEPTH * col_stride

        inside = (row < rows)[:, None] & (col < rows)[None, :]
        if POLYNOMIAL:  # y is X
            x_ptr = y_ptr + row[:, None] * row_stride + col[None, :] * col_stride
            x = tl.load(x_ptr, inside, other=0.0).to(tl.float32)
            tile = c * tile + b * x + tl.where(row[:, None] == col[None, :], a, 0.0)
            if SIZED:
                tile *= tl.rsqrt(tl.load(size_ptr + matrix).to(tl.float32))
        elif SIZED:
            tile /= tl.load(size_ptr + matrix).to(tl.float32)

        out_ptr += matrix * out_matrix_stride
        out = tile.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * out_row_stride + col[None, :], out, inside)
        if tl.program_id(1) < tl.program_id(0):
            mirrored = col[:, None] * out_row_stride + row[None, :]
            inside = (col < rows)[:, None] & (row < rows)[None, :]
            tl.store(out_ptr + mirrored, tl.trans(out), inside)
