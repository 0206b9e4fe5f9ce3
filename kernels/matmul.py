"""
Products with INT8 weights whose other factor is rounded to INT8 on the way (W8A8), in plain torch.
CUDA tensors go on to the Triton kernels of products.py.

W = scale * q + zero has one group a row. A token t of the other factor has one unit s, its largest
absolute value / 127:

    x W^T [t, n] = s[t] * scale[n] * (code[t] . q[n]) + total[t] * zero[n]      total: sum of x[t]
    dy W  [t, k] = s[t] * (code[t] . q[:, k]) + total[t]                        total: dy[t] . zero

W's scales lie along the sums of dy W, so dy * scale is what is rounded there. Products of codes are
summed exactly, in int32. zero meets x and dy as they came. A token with an inf or NaN has no finite
result, and others do not see it.

The weight's own gradient, dy^T x, is a product of the same kind: each column of both factors, over
all tokens, has one unit.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from kernels import products
from kernels.launch import chunks, with_kernel
from quant import BLOCK, CHUNK


def matmul_int8(x, q, scale, zero):
    """x @ W^T, (T, rows) in x.dtype, of x (T, cols) float and W's q (rows, cols), scale and zero
    (rows, 1)."""
    code, s, total = round_rows(x)
    return scaled_product(code, q, s, total, scale, zero, dtype=x.dtype)


def matmul_transposed_int8(dy, q, scale, zero):
    """dy @ W, (T, cols) in dy.dtype, of dy (T, rows) float."""
    code, s, total = round_rows(dy, scale, zero)
    return scaled_product(code, transposed(q), s, total, dtype=dy.dtype)


def gradient_int8(a, b, total=None, key=0):
    """a^T b (m, n) of a (T, m) and b (T, n), in their dtype; or total (m, n) += that, rounded to
    nearest. Columns are rounded to INT8. key: not used."""
    return column_product(*round_columns(a), *round_columns(b), total, a.dtype)


@with_kernel(products.round_columns, launches=2)
def round_columns(x):
    """(codes, s) of x (T, n) float: x^T = s * codes, int8 (n, T), or wider by zeros; float32 (n,).

    A column with an inf or NaN has an s that is not finite."""
    s = x.abs().amax(dim=0).float().clamp_(min=1e-30).div_(127)
    code = x.float().T.div(s[:, None]).nan_to_num_(0, 0, 0)
    return code.round_().to(torch.int8), s


@with_kernel(products.column_product, unit="int8")
def column_product(code, s, other, s_other, total=None, dtype=torch.float32):
    """s * (code @ other^T) * s_other, (m, n) in dtype; or it is added to total, any float dtype.

    code int8 (m, T), other int8 (n, T); s (m,), s_other (n,) float32."""
    y = _product(code, other).mul_(s[:, None]).mul_(s_other)
    return y.to(dtype) if total is None else total.copy_(y.add_(total))


@with_kernel(products.round_rows)
def round_rows(x, scale=None, zero=None):
    """(codes, s, total) of x (T, n) float: int8 (T, n), or wider by zeros, float32 (T,) and (T,).

    With scale and zero (n, 1) they are those of x * scale, and total is x . zero.
    """
    code = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    s, total = torch.empty(2, len(x), device=x.device)
    step = max(1, BLOCK // x.shape[1])  # tokens
    for start in chunks(x, len(x), step):
        at = slice(start, start + step)
        part = x[at].float()
        total[at] = part.sum(dim=1) if zero is None else part @ zero[:, 0]
        if scale is not None:
            part = part * scale[:, 0]
        largest = part.abs().amax(dim=1).clamp_(min=1e-30)  # what is all below 3e-33 becomes 0
        s[at] = largest / 127
        code[at] = (part * s[at, None].reciprocal()).round_()
    return code, s, total


@with_kernel(products.scaled_product, unit="int8")
def scaled_product(code, q, s, total, scale=None, zero=None, dtype=torch.float32):
    """s * scale * (code @ q^T) + total * zero, (T, rows) in dtype; scale and zero None: 1.

    code int8 (T, n), q int8 (rows, n); s, total float32 (T,); scale, zero float32 (rows, 1).
    """
    y = torch.empty(len(code), len(q), dtype=dtype, device=code.device)
    code = code[:, : q.shape[1]]
    step = max(1, CHUNK // len(q))  # tokens
    for start in chunks(code, len(code), step):
        at = slice(start, start + step)
        part = _product(code[at], q).mul_(s[at, None])
        if scale is None:
            part.add_(total[at, None])
        else:
            part.mul_(scale[:, 0]).addr_(total[at], zero[:, 0])
        y[at] = part
    return y


@with_kernel(products.transposed)
def transposed(q):
    """q^T (cols, rows), or wider, without gaps where the product wants that: not on a CPU."""
    fake = isinstance(q, FakeTensor)  # counted as on a GPU
    return q.T.contiguous() if q.is_cuda or fake else q.T


def _product(code, q):
    """code @ q^T, float32, of int8 matrices.

    Floats are exact, too, while sums are below 2^24: up to 1032 products of codes.
    """
    if isinstance(code, FakeTensor) or _multiplies_int8(code, q):
        return torch._int_mm(code, q.T).float()
    return code.float() @ q.float().T


def _multiplies_int8(code, q):
    """Whether torch._int_mm takes these, and is fast.

    On a CPU it needs AVX512-VNNI: elsewhere it is slow, or its sums of 16 bits may overflow.
    """
    if code.is_cuda:  # cuBLAS
        return len(code) > 16 and code.shape[1] % 8 == 0 and len(q) % 8 == 0
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", None)
    return has_vnni is not None and has_vnni() and torch.backends.mkldnn.is_available()
