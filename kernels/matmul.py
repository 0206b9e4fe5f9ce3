"""
Products with INT8 weights whose other factor is rounded to INT8 on the way, in plain torch. CUDA
tensors go on to the Triton kernels of products.py.
"""

import torch

from kernels import products
from kernels.launch import chunks, group_width, with_kernel
from kernels.products import DY_GROUP

@with_kernel(products.matmul_int8, unit="int8")
def matmul_int8(x, q, scale, zero):
    """x @ W^T with INT8 products: a group of a token is rounded to the nearest of 255 codes.

        y[t, n] = sum over groups g of  s[t, g] * scale[n, g] * (code[t, g] . q[n, g])
                                        + sum(x[t, g]) * zero[n, g]

    s = max |x[t, g]| / 127, code = round(x / s); zero meets x as it came. x (T, cols) float, W as
    above. Returns y (T, rows) in x.dtype, summed in float32. A token with an inf or NaN has no
    finite y; others do not see it. A float32 matmul is exact: in groups of up to 1024 the sums
    of products of codes are below 2^24.
    """
    width = group_width(q.shape[1], scale.shape[1])
    y = x.new_zeros(x.shape[0], q.shape[0], dtype=torch.float32)
    for start in chunks(q, q.shape[1], width):
        at = slice(start, start + width)  # W's columns and x's
        g = start // width
        part = x[:, at].float()
        code, s = _round_rows(part)  # (T, width), (T, 1)
        y += (code @ q[:, at].float().T).mul_(s).mul_(scale[:, g])
        y.addr_(part.sum(dim=1), zero[:, g])  # the outer product of (T,) and (rows,)
    return y.to(x.dtype)


@with_kernel(products.matmul_transposed_int8, unit="int8")
def matmul_transposed_int8(dy, q, scale, zero):
    """dy @ W with INT8 products: dy (T, rows) float -> (T, cols) in dy.dtype; else as matmul_int8.

    W's scales lie along this sum, so dy * scale[:, g] is what is rounded: DY_GROUP rows of W
    at a time, once a group g.
    """
    width = group_width(q.shape[1], scale.shape[1])
    dx = dy.new_zeros(dy.shape[0], q.shape[1], dtype=torch.float32)
    for row in chunks(q, q.shape[0], DY_GROUP):
        rows = slice(row, row + DY_GROUP)  # W's rows, dy's columns
        part = dy[:, rows].float()
        for start in chunks(q, q.shape[1], width):
            at = slice(start, start + width)  # W's columns and dx's
            g = start // width
            code, s = _round_rows(part * scale[rows, g])  # (T, DY_GROUP), (T, 1)
            shift = (part @ zero[rows, g])[:, None]  # (T, 1), for every column of the group
            dx[:, at] += (code @ q[rows, at].float()).mul_(s).add_(shift)
    return dx.to(dy.dtype)


def _round_rows(x):
    """x (T, n) float32 as whole numbers of -127..127, and their unit (T, 1)."""
    # what is all below 3e-33 becomes 0
    s = x.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 127
    return (x * s.reciprocal()).round_(), s
