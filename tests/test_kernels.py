"""
kernels/ against the plain functions of quant.py: on CUDA tensors where there is a GPU, else in
Triton's interpreter.
    python -m pytest tests/test_kernels.py
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter as Multiset
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import quant
from kernels import (adam, launch, lean, loss, matmul, momentum, moments, products, quantized,
                     rows, symmetric)
from kernels.attention import rotate, turned
from kernels.count import Counter
from kernels.loss import chunk_length, cross_entropy_, head_logits, head_loss
from kernels.moments import Record
from methods import muon
from model import LLaMA
from quant import quantize_int4, quantize_int8, random_key, rounding_key, uniform
from tests.common import tiny

HERE = os.path.dirname(quant.__file__)  # the repository
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds to bfloat16 towards zero, and multiplies bfloat16's bits
INTERPRETED = DEVICE == "cpu"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
STEP = torch.finfo(HALF).eps  # between two numbers of it, by the smaller one

dequantize_int8 = quant.dequantize_int8.plain
needs_triton = pytest.mark.skipif(launch.triton is None, reason="triton is not installed")


class Claimed(torch.Tensor):
    """A tensor that says that it lies on a GPU, wherever it is."""

    is_cuda = True


def run_kernel(launcher, *args):
    """launcher on args moved to the GPU, if there is one. Its result, or else the tensors moved."""
    moved = [x.to(DEVICE, copy=True) if isinstance(x, torch.Tensor) else x for x in args]
    out = launcher(*moved)
    assert out is not NotImplemented
    if out is None:
        return [x.cpu() for x in moved if isinstance(x, torch.Tensor)]
    return out.cpu()


def weight_step(rows, cols, group, dtype=torch.float32):
    """(codes, step) of a step about as large as a tenth of the weights."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=generator) * 0.02 + 0.005
    step = torch.randn(rows, cols, generator=generator) * 0.002
    return quantize_int8(w, group), step.to(dtype)


def updated(codes, *step):
    """What quant.py makes of codes, in copies."""
    codes = [x.clone() for x in codes]
    quant.add_int8_.plain(*codes, *step)
    return codes


# -----------------------------------------------------------------------------
# dequantising


@needs_triton
@pytest.mark.parametrize(
    "rows,cols,group",
    [(3, 512, 256), (70, 300, 256), (5, 300, 64), (1, 7, 256)]
    + [(1, 7, 2), (2, 1, 1), (3, 9, 4), (2, 520, 512)],
)
def test_kernels_dequantise_to_the_same_bits(rows, cols, group):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    eight = quantize_int8(w, group)
    four = quantize_int4(w, group)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
        for name, codes in (("dequantize_int8", eight), ("dequantize_int4", four)):
            expected = getattr(quant, name).plain(*codes).to(dtype)
            got = run_kernel(getattr(quantized, name), *codes, dtype)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=0)

    odd_rows = [x.to(DEVICE)[1::2] for x in eight]  # with gaps between them
    assert torch.equal(quantized.dequantize_int8(*odd_rows).cpu(), dequantize_int8(*eight)[1::2])


@needs_triton
@pytest.mark.parametrize("rows,cols,group", [(70, 512, 256), (5, 300, 64), (2, 5461, 0), (1, 7, 2)])
def test_the_kernel_quantises_to_the_same_bits(rows, cols, group, monkeypatch):
    monkeypatch.setattr(quantized, "TILE", 1024)
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    w[:, :64] = 0.02  # a group of equal values, where groups are as narrow
    for of in (w, w.bfloat16(), w.T.contiguous().T):
        expected = quantize_int8(of, group)
        got = quantized.quantize_int8(of.to(DEVICE), group)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got))


# -----------------------------------------------------------------------------
# the weight step


STEPS = [(70, 512, 256), (67, 300, 256), (5, 300, 64), (33, 100, 16), (2, 600, 512), (3, 9, 4)]
STEPS += [(5, 300, 0), (2, 2100, 1024), (2, 5461, 0)]  # wider than a tile, here


@needs_triton
@pytest.mark.parametrize("rows,cols,group", STEPS)
def test_the_kernel_steps_weights_to_the_same_codes(rows, cols, group, monkeypatch):
    monkeypatch.setattr(quantized, "TILE", 1024)
    for dtype, keys in (
        (torch.float32, (None, 0, 1, 2**32 - 1, rounding_key(7, "a"), 2**48 - 1)),
        (torch.bfloat16, (None, 5)),
    ):
        codes, step = weight_step(rows, cols, group, dtype)
        for key in keys:
            expected = updated(codes, step, 0.99, key, 12345)
            got = run_kernel(quantized.add_int8_, *codes, step, 0.99, key, 12345)
            assert all(torch.equal(a, b) for a, b in zip(expected, got))
            assert (got[0] != codes[0]).float().mean() > 0.4


@needs_triton
def test_a_step_in_either_order_gives_the_same_bits():
    codes, step = weight_step(67, 300, 256)
    expected = updated(codes, step, 0.99, 5)
    got = run_kernel(quantized.add_int8_, *codes, step.T.contiguous().T, 0.99, 5)
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_a_low_rank_step_is_made_by_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(quant, "BLOCK", 7 * 300)
    codes, _ = weight_step(70, 300, 0)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(70, 8, generator=generator) * 1e-3
    right = torch.randn(300, 8, generator=generator)
    expected = updated(codes, left @ right.T, 0.99, 5)
    quant.add_low_rank_int8_(*codes, left, right, 0.99, 5)
    torch.testing.assert_close(codes[1:], tuple(expected[1:]), rtol=1e-5, atol=1e-7)
    assert (codes[0] != expected[0]).float().mean() < 1e-3


@needs_triton
def test_a_step_of_zero_leaves_every_code_where_it_was():
    codes, step = weight_step(70, 300, 64)
    for key in (None, 5):
        got = run_kernel(quantized.add_int8_, *codes, step * 0, 1.0, key)
        assert all(torch.equal(a, b) for a, b in zip(got, updated(codes, step * 0, 1.0, key)))
        assert (got[0] != codes[0]).float().mean() < 1e-3


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("group", [64, 0])
def test_groups_that_would_not_be_finite_stay_or_are_nan(bad, poison, group):
    codes, step = weight_step(7, 300, group)
    step[3, 100] = bad
    expected = updated(codes, step, 1.0, 7, 0, poison)
    got = run_kernel(quantized.add_int8_, *codes, step, 1.0, 7, 0, poison)
    for new, old, reference in zip(got, codes, expected):
        torch.testing.assert_close(new, reference, rtol=0, atol=0, equal_nan=True)
        group_of = slice(100, 101) if new is got[0] else slice(1, 2) if group else slice(0, 1)
        if new is got[0] or not poison:
            assert torch.equal(new[3, group_of], old[3, group_of])
        else:
            assert new[3, group_of].isnan().all()
        assert (new != old).any(dim=1).sum() >= 6
    values = dequantize_int8(*expected)
    assert values.isnan().sum() == ((group or 300) if poison else 0)


@needs_triton
@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's at a division by 0, interpreted
def test_the_kernel_gives_a_group_of_equal_values_scale_0():
    noise = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    w = torch.cat([torch.full((3, 64), 0.02), noise], dim=1)
    step = torch.tensor([[9.0], [-9.0], [9.0]])
    codes = quantize_int8(w, 64)
    q, scale, zero, *_ = run_kernel(quantized.add_int8_, *codes, step.expand(3, 100), 1.0, 3)
    assert not q[:, :64].any()
    assert not scale[:, 0].any()
    assert torch.equal(zero[:, :1], w[:, :1] + step)
    # the short group: 36 values, and nothing from beyond them
    torch.testing.assert_close(scale[:, 1], codes[1][:, 1])


@needs_triton
def test_the_kernel_rounds_up_as_often_as_the_fraction():
    rows = 64
    inner = slice(1, 255)  # the ends of a group set its grid, and stay
    w = torch.arange(-128.0, 128).repeat(rows, 1)
    step = torch.zeros(rows, 256)
    step[:, inner] = 0.3
    ups = []
    for key in (random_key("a"), rounding_key(1000, "b")):
        codes = quantize_int8(w)
        q = run_kernel(quantized.add_int8_, *codes, step, 1.0, key)[0]
        up = (q - w)[:, inner]
        u = uniform(key, 0, w.numel()).view_as(w)
        assert torch.equal(up, (u + w + 0.3).floor().sub(w)[:, inner])
        assert abs(up.mean() - 0.3) < 4 * math.sqrt(0.21 / up.numel())
        ups.append(up)
    # by another key other elements: 2 * 0.3 * 0.7 of them differ
    assert abs((ups[0] != ups[1]).float().mean() - 0.42) < 4 * math.sqrt(0.25 / ups[0].numel())


# -----------------------------------------------------------------------------
# the Adam step


# -----------------------------------------------------------------------------
# Adam


def some_gradient(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * 1e-3).to(dtype)


def both(name, *args, **kwargs):
    """[(plain, kernel's)] of a function of moments.py: what it changed, what it gave back."""
    results = []
    for function in (getattr(moments, name).plain, getattr(adam, name)):
        # the kernel's on the GPU, if there is one
        device = "cpu" if not results else DEVICE
        moved = tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), (args, kwargs))
        out = function(*moved[0], **moved[1])
        assert out is not NotImplemented
        tensors = [x.cpu() for x in tree_leaves((moved, out)) if isinstance(x, torch.Tensor)]
        results.append(tensors)
    return list(zip(*results))


def some_record(clip=0.0):
    return Record(torch.tensor([3e-3, 7.0, 4e-3]), torch.tensor(2.0), 1, clip)


@needs_triton
@pytest.mark.parametrize("shape", [(3, 5), (70, 300), (2100, 20), (1, 4096)])
def test_partial_squares_sum_up_to_the_same(shape):
    for dtype in (torch.float32, HALF):
        g = some_gradient(*shape, dtype=dtype).to(DEVICE)
        expected = g.float().square().cpu()
        by_row, by_col = adam.squares_by_side(g)
        torch.testing.assert_close(by_row.sum(0).cpu(), expected.sum(1))
        torch.testing.assert_close(by_col.sum(0).cpu(), expected.sum(0))
        parts = adam.squares(g)
        assert len(parts) <= adam.PARTS
        torch.testing.assert_close(parts.sum().cpu(), expected.sum())
        assert torch.equal(parts, adam.squares(g))


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("rows,cols", [(70, 512), (300, 17), (1, 600)])
def test_the_kernel_makes_the_same_second_moment(rows, cols):
    before = [x.abs() for x in (some_gradient(rows), some_gradient(cols))]
    for bad in (None, math.inf, math.nan):
        g = some_gradient(rows, cols)
        if bad is not None:
            g[0, 3] = bad
        sums = [x.cpu() for x in adam.squares_by_side(g.to(DEVICE))]
        for record in (some_record(), some_record(1e-3), None):
            if bad is None or record is not None:
                results = both("second_moment", *before, *sums, 0.9, 3, record)
                for plain, kernel in results[4:]:  # not the squares, which may be NaN
                    assert plain.isfinite().all()
                    torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("rows,cols", [(70, 512), (67, 300), (5, 48), (300, 17)])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_the_kernel_steps_moments_to_the_same_codes(rows, cols, factor):
    generator = torch.Generator().manual_seed(1)
    codes = quantize_int8(torch.randn(rows, cols, generator=generator) * 1e-3)
    g = some_gradient(rows, cols)
    row = torch.rand(rows, generator=generator) * 0.1 + 0.01
    col = torch.rand(cols, generator=generator) * 0.1 + 0.01
    scales = (None if factor is None else torch.tensor(factor), -0.01)
    q, *floats = both("adam_int8_", *codes, g, row, col, 0.9, 0.19, 1e-8, 2**31 + 5, *scales)
    for plain, kernel in floats:
        torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-8)
    off = (q[1].int() - q[0].int()).abs()
    assert off.max() <= 1
    assert off.float().mean() <= 1e-3
    assert (q[1] != codes[0]).float().mean() > 0.5


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_factor_of_0_takes_away_nan():
    codes = quantize_int8(some_gradient(8, 512))
    sides = torch.ones(8), torch.ones(512)
    nothing = torch.zeros(8, 512)
    for g in (nothing, nothing + math.nan, nothing + math.inf):
        found = both("adam_int8_", *codes, g, *sides, 0.9, 0.19, 1e-8, 5, torch.tensor(0.0))
        for plain, kernel in found:
            assert kernel.float().isfinite().all()
            torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-8)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("shape", [(5,), (4096,), (30, 301)])
def test_kernels_note_mask_and_clip_alike(shape):
    m = some_gradient(*shape) * 0.1
    for bad in (None, math.inf, math.nan):
        for record in (some_record(), some_record(1e-3), None):
            g = some_gradient(*shape)
            if bad is not None and record is not None:
                g.view(-1)[3] = bad
            parts = adam.squares(g.to(DEVICE)).cpu()
            results = both("adam_float32_", m, m.square(), g, (0.9, 0.99), 3, 1e-8, -0.01, parts,
                           record)
            if record is not None:
                results += both("mask_", g, parts, record)
                results += both("mask_", g, parts, record, torch.tensor(0.5))
            for plain, kernel in results:
                torch.testing.assert_close(kernel, plain, rtol=1e-5, atol=1e-12, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("n", [3, 10000])
def test_the_kernel_rounds_bfloat16_to_the_same_bits(n):
    p = (some_gradient(n) * 20).bfloat16()
    delta = some_gradient(n).bfloat16()
    for key in (1, rounding_key(7, "a"), 2**48 - 1):
        expected = p.clone()
        quant.add_bfloat16_.plain(expected, delta, -0.1, key)
        found, _ = run_kernel(adam.add_bfloat16_, p, delta, -0.1, key)
        assert (found != p).float().mean() > 0.3
        assert (found != expected).float().mean() < 1e-3  # where torch fuses p + alpha * delta


# -----------------------------------------------------------------------------
# INT8 products


def int8_factors(rows, cols, dtype=torch.float32, tokens=70):
    """(codes, x, dy): a weight's, and what it is multiplied with from the right and the left."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=generator)
    x = torch.randn(tokens, cols, generator=generator)
    dy = torch.randn(tokens, rows, generator=generator)
    return quantize_int8(w * 0.02 + 0.005, 0), x.to(dtype), (dy * 1e-3).to(dtype)


def kernel_matmul(x, q, scale, zero):
    """matmul.matmul_int8 by its kernels."""
    x, q, scale, zero = (t.to(DEVICE) for t in (x, q, scale, zero))
    code, s, total = products.round_rows(x)
    return products.scaled_product(code, q, s, total, scale, zero, x.dtype).cpu()


def kernel_matmul_transposed(dy, q, scale, zero):
    dy, q, scale, zero = (t.to(DEVICE) for t in (dy, q, scale, zero))
    code, s, total = products.round_rows(dy, scale, zero)
    return products.scaled_product(code, products.transposed(q), s, total, dtype=dy.dtype).cpu()


INT8_PRODUCTS = [matmul.matmul_int8, matmul.matmul_transposed_int8]
if launch.triton is not None:
    INT8_PRODUCTS += [kernel_matmul, kernel_matmul_transposed]
SHAPES = [(192, 150, 37), (300, 100, 70), (130, 260, 1), (33, 5, 65), (7, 3, 140)]


@pytest.mark.parametrize("rows,cols,tokens", SHAPES)
def test_int8_products_are_within_a_hundredth_of_float_products(rows, cols, tokens):
    codes, x, dy = int8_factors(rows, cols, tokens=tokens)
    w = dequantize_int8(*codes)
    for got, expected in (
        (matmul.matmul_int8(x, *codes), x @ w.T),
        (matmul.matmul_transposed_int8(dy, *codes), dy @ w),
    ):
        assert 0 < (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_int8_products_are_exact_where_the_factor_is_on_its_grid(transposed, int8, monkeypatch):
    monkeypatch.setattr(matmul, "_multiplies_int8", lambda code, q: int8)  # else in floats
    monkeypatch.setattr(products, "MANY", (64, 64, 64, 4))
    monkeypatch.setattr(matmul, "BLOCK", 300 * 33)
    monkeypatch.setattr(matmul, "CHUNK", 300 * 20)
    (q, scale, zero), *_ = int8_factors(300, 300)
    scale.fill_(2**-10)  # one for all weights: it does not move dy off its grid
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(70, 1, generator=generator) + 0.5
    a = torch.randint(-127, 128, (70, 300), generator=generator).float()
    a[:, 0] = 127  # the end of the grid
    w = dequantize_int8(q, scale, zero, torch.float64)
    expected = (a * unit).double() @ (w if transposed else w.T)
    for product in INT8_PRODUCTS[transposed::2]:
        got = product(a * unit, q, scale, zero).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_sums_of_the_largest_codes_do_not_overflow():
    code = torch.full((20, 4096), 127, dtype=torch.int8)
    q = torch.full((8, 4096), -128, dtype=torch.int8)
    one = torch.ones(20)
    y = matmul.scaled_product(code, q, one, 0 * one)
    assert (y == -128 * 127 * 4096).all()


@needs_triton
@pytest.mark.parametrize("rows,cols,tokens", SHAPES)
def test_the_kernels_int8_products_are_the_reference_s(rows, cols, tokens, monkeypatch):
    monkeypatch.setattr(products, "WIDTH", 128)  # most rows are wider
    if rows != 192:  # the interpreter takes its time for large tiles
        monkeypatch.setattr(products, "MANY", (64, 32, 32, 4))
    for dtype, rtol in ((torch.float32, 1e-6), (HALF, 1e-3 if INTERPRETED else 1e-2)):
        codes, *factors = int8_factors(rows, cols, dtype, tokens)
        for a, reference, kernel in zip(factors, INT8_PRODUCTS, INT8_PRODUCTS[2:]):
            got = kernel(a, *codes)
            expected = reference(a, *codes)
            assert got.dtype == dtype
            assert got.shape == expected.shape
            assert (got.float() - expected.float()).norm() <= rtol * expected.float().norm()


@needs_triton
@pytest.mark.parametrize("rows,cols", [(192, 528), (5, 300), (130, 7)])
def test_rows_and_bytes_are_rounded_and_turned_as_in_torch(rows, cols):
    """Exactly, and in rows of 16 bytes that zeros fill."""
    (q, scale, zero), x, dy = int8_factors(rows, cols)
    for a, factors in ((x, ()), (dy, (scale, zero))):
        expected = matmul.round_rows(a, *factors)
        factors = [t.to(DEVICE) for t in factors]
        code, s, total = (t.cpu() for t in products.round_rows(a.to(DEVICE), *factors))
        assert code.shape[1] % 16 == 0
        assert torch.equal(code[:, : a.shape[1]], expected[0])
        assert not code[:, a.shape[1] :].any()
        assert torch.equal(s, expected[1])
        torch.testing.assert_close(total, expected[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(products.transposed(q.to(DEVICE))[:, :rows].cpu(), q.T)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_token_that_is_not_finite_harms_no_other(bad):
    codes, *factors = int8_factors(130, 100, tokens=5)
    for i, product in enumerate(INT8_PRODUCTS):
        a = factors[i % 2].clone()
        expected = product(a, *codes)
        a[1] = 0
        a[3, 70] = bad
        got = product(a, *codes)
        assert not got[1].any()  # a token of zeros gives zeros
        assert not got[3].isfinite().any()
        assert torch.equal(got[::2], expected[::2])


@needs_triton
@pytest.mark.parametrize("tokens,m,n", [(130, 70, 33), (32, 64, 40), (5, 7, 3)])
def test_a_gradient_in_int8_is_the_reference_s(tokens, m, n, monkeypatch):
    monkeypatch.setattr(products, "MANY", (64, 32, 32, 4))
    monkeypatch.setattr(products, "ADDS", (32, 64, 32, 4))
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(tokens, m, generator=generator)
    b = torch.randn(n, tokens, generator=generator).T  # as a slice of columns may lie
    a[:, 1] = 0
    expected = matmul.gradient_int8(a, b)
    assert (expected - a.T @ b).norm() < 0.02 * (a.T @ b).norm()
    rounded = []
    for x in (a, b):
        code, s = matmul.round_columns(x)
        rounded += run_columns(x)
        assert torch.equal(rounded[-2][:, :tokens].cpu(), code)
        assert not rounded[-2][:, tokens:].any()
        torch.testing.assert_close(rounded[-1].cpu(), s, rtol=0, atol=0)
    torch.testing.assert_close(products.column_product(*rounded).cpu(), expected)
    for dtype in (torch.float32, HALF):
        total = torch.randn(m, n, generator=generator).to(dtype)
        got = total.to(DEVICE, copy=True)
        products.column_product(*rounded, got)
        matmul.gradient_int8(a, b, total)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.cpu(), total, rtol=tolerance, atol=tolerance)


def run_columns(x):
    return list(products.round_columns(x.to(DEVICE)))


@needs_triton
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_column_that_is_not_finite_is_nowhere_finite(bad, monkeypatch):
    monkeypatch.setattr(products, "MANY", (64, 32, 32, 4))
    a, b = torch.ones(2, 40, 6)
    a[7, 2] = bad
    for g in (matmul.gradient_int8(a, b),
              products.column_product(*run_columns(a), *run_columns(b)).cpu()):
        assert not g[2].isfinite().any()
        torch.testing.assert_close(g[3:], torch.full((3, 6), 40.0))


# -----------------------------------------------------------------------------
# the momentum in 4 bits


@needs_triton
@pytest.mark.parametrize("rows,cols", [(70, 256), (3, 300), (40, 65), (1, 7)])
def test_the_momentum_s_kernel_makes_the_same_bits(rows, cols):
    generator = torch.Generator().manual_seed(0)
    there, here = (momentum.Momentum((rows, cols), "factored") for _ in range(2))
    there.m, there.size = there.m.to(DEVICE), there.size.to(DEVICE)
    for dtype in (torch.float32, HALF, torch.float32):
        g = torch.randn(rows, cols, generator=generator).to(dtype)
        g[0] = 0
        got = g.to(DEVICE, copy=True)
        momentum._launch_step(there.m, there.size, got, 0.9, 0.4)
        here.step_(g, 0.9, 0.4)
        rtol = 0 if dtype == torch.float32 else 2**-10
        torch.testing.assert_close(got.cpu(), g, rtol=rtol, atol=rtol)
        assert torch.equal(there.m.cpu(), here.m) and torch.equal(there.size.cpu(), here.size)


# -----------------------------------------------------------------------------
# from the function to its kernel


@needs_triton
@pytest.mark.filterwarnings("error")
def test_tensors_that_a_kernel_does_not_take_stay_in_torch(monkeypatch):
    monkeypatch.setattr(launch, "_works", True)
    monkeypatch.setattr(quantized, "_add_kernel", None)
    codes, step = weight_step(5, 1100, 256)
    expected = updated(codes, step, 0.9, 11)
    q, scale, zero = [x.to(DEVICE) for x in codes]
    q = torch.stack([q, q], dim=-1)[..., 0]  # with gaps
    rest = (step.to(DEVICE), 0.9, 11)
    assert quantized.add_int8_(q, scale, zero, *rest) is NotImplemented
    quant.add_int8_(q.as_subclass(Claimed), scale, zero, *rest)
    torch.testing.assert_close(zero.cpu(), expected[2], rtol=1e-5, atol=1e-7)
    assert (q.cpu() != expected[0]).float().mean() <= 1e-3
    with pytest.raises(ValueError, match="power of two"):
        quant.quantize_int8(step.as_subclass(Claimed), 100)
    assert launch._works


def test_memory_that_runs_out_is_no_reason_to_leave_the_kernels(monkeypatch):
    def launcher(x):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(launch, "_works", True)
    monkeypatch.setattr(launch, "triton", True)
    function = launch.with_kernel(launcher)(torch.clone)
    assert torch.equal(function(torch.ones(2)), torch.ones(2))  # no launch on the CPU
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(2).as_subclass(Claimed))
    assert launch._works


CALL_ALL = """
import sys, warnings
import torch
if {missing}: sys.modules["triton"] = None
import quant

class Claimed(torch.Tensor):
    is_cuda = True  # it lies on the CPU: Triton refuses it, or finds no driver

def call_all(codes, name=lambda function: function):
    eight, four = name(quant.quantize_int8)(w, 32), quant.quantize_int4(w, 32)
    eight, four = ([codes(x) for x in tensors] for tensors in (eight, four))
    name(quant.add_int8_)(*eight, left @ right.T, shrink=0.9, key=5)
    dequantised = name(quant.dequantize_int8)(*eight, torch.bfloat16)
    return [*eight, dequantised, name(quant.dequantize_int4)(*four)]

w = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
left, right = torch.ones(6, 2), torch.full((70, 2), 0.01)
expected = call_all(torch.clone, lambda function: function.plain)
for codes in (torch.clone, lambda x: x.as_subclass(Claimed), lambda x: x.as_subclass(Claimed)):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = call_all(codes)
    assert all(torch.equal(a, torch.Tensor(b)) for a, b in zip(expected, results)), results
    print(*(str(w.message) for w in caught), sep="\\n")
"""


@pytest.mark.parametrize("missing", [True, False])
def test_where_triton_fails_torch_steps_in_with_one_warning(missing):
    if not missing and launch.triton is None:
        pytest.skip("triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = CALL_ALL.format(missing=missing)
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=HERE, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (warning,) = [line for line in run.stdout.splitlines() if line]
    assert warning.startswith("Triton fails, quant.py's slower functions step in. ")
    assert not missing or warning.endswith("ImportError: it is not installed")


COMPILE_ALL = """
import json, os, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
import quant
from kernels import adam, momentum, products, quantized, rows, symmetric
from kernels.moments import Record

# launches are noted, not made
launches = []
JITFunction.run = lambda kernel, *args, grid, warmup, **options: launches.append(
    (kernel, args, options)
)
w = torch.zeros(64, 512)
wide = torch.zeros(16, 11008)
for of, group in ((w, 256), (wide[:, :4096], 0), (wide, 0)):
    quantized.add_int8_(*quant.quantize_int8(of, group), of.bfloat16(), 0.9, 5)
quantized.add_int8_(*quant.quantize_int8(w, 0), w, 0.9, None, 0, True)
quantized.add_int8_(*quant.quantize_int8(w), torch.zeros(512, 64).T, 0.9, 5)
quantized.quantize_int8(w.bfloat16(), 256)
quantized.quantize_int8(wide, 0)
for dtype in (torch.bfloat16, torch.float32):
    g = w.to(dtype)
    adam.squares(g)
    sums = adam.squares_by_side(g)
    record = Record(w[0], w[0, 0], 3, 1.0)
    adam.mask_(g, w[0], record, w[0, 0])
    adam.adam_float32_(w, w, g, (0.9, 0.99), 3, 1e-8, 0.1, w[0], record)
    adam.adam_int8_(*quant.quantize_int8(w), g, w[:, 0], w[0], 0.9, 0.1, 1e-8, 5, w[0, 0], 0.1)
adam.second_moment(w[:, 0], w[0], *sums, 0.9, 3, record)
adam.add_bfloat16_(w.bfloat16(), w.bfloat16(), 0.1, 5)
for tokens, dtype in ((512, torch.bfloat16), (512, torch.float32), (16, torch.bfloat16)):
    x = torch.zeros(tokens, 512, dtype=dtype)
    q, scale, zero = quant.quantize_int8(torch.zeros(512, 512), 0)
    code, *of_tokens = products.round_rows(x)
    products.scaled_product(code, q, *of_tokens, scale, zero, dtype)
    products.scaled_product(code, products.transposed(q), *of_tokens, dtype=dtype)
products.round_rows(wide.bfloat16(), wide[0, :, None], wide[0, :, None])
for dtype in (torch.bfloat16, torch.float32):
    x = torch.zeros(4096, 512, dtype=dtype)
    codes = products.round_columns(x)
    products.column_product(*codes, *codes, dtype=dtype)
    products.column_product(*codes, *codes, torch.zeros(512, 512, dtype=dtype))
    of_4_bits = momentum.Momentum((64, 512), "4bit")
    momentum._launch_step(of_4_bits.m, of_4_bits.size, w.to(dtype), 0.9, 0.4)
quantized.dequantize_int8(*quant.quantize_int8(w), torch.bfloat16)
quantized.dequantize_int8(*quant.quantize_int8(w))
quantized.dequantize_int4(*quant.quantize_int4(w), torch.bfloat16)
# what a card without bfloat16 runs besides
half = w.half()
quantized.dequantize_int8(*quant.quantize_int8(w), torch.float16)
quantized.dequantize_int4(*quant.quantize_int4(w), torch.float16)
quantized.quantize_int8(half, 256)
products.round_rows(half)
rows.cross_entropy_(half, torch.zeros(64, dtype=torch.int64), 0.0)
rows.rms_norm(w, half, w[0], 1e-5, torch.float16)
rows.rms_norm_backward(half, w, w, w[0], torch.zeros(64, 1))
x = torch.zeros(1, 1, 32, 128, dtype=torch.float16)
rows.turned(x, x, x[0, 0, :1, :64], x[0, 0, :1, :64])
y = torch.zeros(2, 64, 512, dtype=torch.bfloat16)
symmetric.gram_matrix(y.mT, y)
symmetric.polynomial(y[..., :64], 1.0, 1.0, 1.0, y)
for dtype, softcap in ((torch.bfloat16, 0.0), (torch.bfloat16, 30.0), (torch.float32, 0.0)):
    logits = torch.zeros(2, 50304, dtype=dtype)
    rows.cross_entropy_(logits, torch.zeros(2, dtype=torch.int64), softcap)
for dtype, cols in ((torch.bfloat16, 512), (torch.bfloat16, 8192), (torch.float32, 8192)):
    x, weight = torch.zeros(2, cols, dtype=dtype), torch.zeros(cols)
    rows.rms_norm(x, x, weight, 1e-5, dtype)
    rows.rms_norm_backward(x, x, x, weight, torch.zeros(2, 1))
    x = torch.zeros(1, 1, 32, 128, dtype=dtype)
    rows.turned(x, x, x[0, 0, :1, :64], x[0, 0, :1, :64])

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
compiled = []
for kernel, args, options in launches:
    signature, constants, divisible = {}, {}, {}
    for i, (p, arg) in enumerate(zip(kernel.params, args)):
        if p.is_constexpr:
            signature[p.name] = "constexpr"
            constants[p.name] = arg
        else:
            signature[p.name] = p.annotation_type or mangle_type(arg)
            if type(arg) is int and arg == 1 and not p.do_not_specialize:  # as a launch has it
                signature[p.name] = "constexpr"
                constants[p.name] = arg
            strides = "stride" in p.name and arg % 16 == 0
            if torch.is_tensor(arg) or p.name in ("rows", "cols") or strides:
                divisible[i,] = [["tt.divisibility", 16]]
    # where Triton has no INT8 products, and no bfloat16
    turing = () if "matmul" in kernel.__name__ or "symmetric" in kernel.__name__ else (75,)
    if (signature, constants, options) in compiled:
        continue
    compiled.append((signature, constants, options))
    is_half = any(torch.is_tensor(arg) and arg.dtype == torch.float16 for arg in args)
    newer = () if is_half else (86, 89, 90, 120)  # Ampere, Ada, Hopper, Blackwell
    for capability in (*turing, *newer):
        source = ASTSource(kernel, signature, constants, divisible)
        target = GPUTarget("cuda", capability, 32)
        binary = triton.compile(source, target=target, options=options)
        with open(sys.argv[1], "wb") as f:
            f.write(binary.asm["cubin"])
        usage = subprocess.check_output([cuobjdump, "-res-usage", sys.argv[1]], text=True)
        stack, local = (int(re.search(name + r":(\\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
        print(json.dumps([kernel.__name__, capability, stack + local, binary.metadata.shared]))
"""


@needs_triton
def test_every_kernel_compiles_for_its_targets_without_spills(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE_ALL, tmp_path / "kernel.cubin"],
        cwd=HERE, env=env, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    compiled = {line[0] for line in lines}
    assert compiled >= {"_add_kernel", "_adam_int8_kernel", "_second_moment_kernel",
                        "_dequantize_kernel", "_matmul_kernel", "_symmetric_kernel",
                        "_round_kernel", "_transpose_kernel", "_cross_entropy_kernel",
                        "_rms_norm_kernel", "_rms_norm_backward_kernel", "_turn_kernel",
                        "_round_columns_kernel", "_step_kernel"}
    for line in lines:
        kernel, capability, spilled, shared = line
        assert spilled == 0, line
        # bytes that a block may have, on a consumer card
        assert shared <= (227 if capability == 90 else 64 if capability == 75 else 99) * 1024, line


# -----------------------------------------------------------------------------
# symmetric products


@needs_triton
@pytest.mark.parametrize("rows,cols,transposed", [(70, 50, False), (70, 50, True), (32, 64, False)])
def test_symmetric_kernels_make_the_products_of_torch(rows, cols, transposed, monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", 32)
    monkeypatch.setattr(symmetric, "DEPTH", 16)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, cols, rows, generator=generator).mT
    if not transposed:
        y = y.contiguous()
    y = (y / cols**0.5).to(HALF)
    size = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    gram = muon.gram_matrix.plain(y.float(), size)
    got = run_kernel(symmetric.gram_matrix, y, size)
    torch.testing.assert_close(got.float(), gram, rtol=STEP, atol=STEP)
    below = torch.tril(got, -32)  # what lies past the diagonal's tiles
    assert torch.equal(below.mT, torch.triu(got, 32))

    gram = gram.to(HALF)
    for by in (None, size):
        expected = muon.polynomial.plain(gram.float(), 3.0, -2.0, 0.4, by)
        got = run_kernel(symmetric.polynomial, gram, 3.0, -2.0, 0.4, by)
        torch.testing.assert_close(got.float(), expected, rtol=STEP, atol=STEP)


@needs_triton
def test_symmetric_kernels_leave_float32_to_torch():
    assert symmetric.gram_matrix(torch.zeros(1, 4, 4)) is NotImplemented
    assert symmetric.polynomial(torch.zeros(1, 4, 4), 1, 1, 1) is NotImplemented


# -----------------------------------------------------------------------------
# layers and the loss against autograd, their kernels against both


def compare_with_autograd(lean_function, plain_function, *tensors):
    """Outputs and gradients of two functions of `tensors`, in float32."""
    results = []
    for function in (lean_function, plain_function):
        inputs = [x.clone().requires_grad_() for x in tensors]
        y = function(*inputs)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([y, *(x.grad for x in inputs)])
    torch.testing.assert_close(*results)


def test_lean_layers_have_autograd_s_outputs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 3, 5, 24, generator=generator)
    norm = lean.RMSNorm(24, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    weight = norm.weight.detach()
    plain = partial(F.rms_norm, normalized_shape=(24,), eps=1e-5)
    compare_with_autograd(norm, lambda x: plain(x, weight=weight), gate)
    for activation, act in (
        ("silu", F.silu), ("gelu", partial(F.gelu, approximate="tanh")), ("gelu_erf", F.gelu)
    ):
        compare_with_autograd(lean.GLU(activation), lambda a, b: act(a) * b, gate, up)


def test_a_norm_s_input_passes_through_with_what_is_added():
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(2, 3, 5, 24, generator=generator)
    weight = torch.rand(24, generator=generator) + 0.5

    def lean_sum(x, h, weight):
        total, y = lean._RMSNorm.apply(x, h, weight, 1e-5)
        return total.sin() + y

    def plain_sum(x, h, weight):
        total = x + h
        return total.sin() + F.rms_norm(total, (24,), weight, 1e-5)

    compare_with_autograd(lean_sum, plain_sum, x, h, weight)
    compare_with_autograd(
        lambda x, w: lean_sum(x, None, w), lambda x, w: plain_sum(x, 0, w), x, weight
    )
    total = lean._RMSNorm.apply(x.requires_grad_(), h, weight, 1e-5)[0]
    total.sum().backward()  # whose norm nobody reads
    assert torch.equal(x.grad, torch.ones_like(x))


def test_rotating_is_multiplying_by_unit_complex_numbers():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 6, generator=generator)
    k = torch.randn(2, 5, 2, 6, generator=generator)
    angle = torch.randn(5, 3, generator=generator)

    def plain(x):
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(5, 3), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    for i in range(2):
        compare_with_autograd(
            lambda q, k: rotate(q, k, angle.cos(), angle.sin())[i] + 0 * (q.sum() + k.sum()),
            lambda q, k: plain((q, k)[i]) + 0 * (q.sum() + k.sum()), q, k,
        )


@needs_triton
@pytest.mark.parametrize("q_heads,k_heads,size", [(4, 4, 8), (5, 1, 12), (70, 10, 64)])
def test_the_kernel_turns_queries_and_keys(q_heads, k_heads, size):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, q_heads, size, generator=generator)
    k = torch.randn(2, 3, k_heads, size, generator=generator)
    angle = torch.randn(3, size // 2, generator=generator)
    for dtype in (torch.float32, HALF):
        args = [x.to(dtype) for x in (q, k.mT.contiguous().mT, angle.cos(), angle.sin())]
        for back in (False, True):
            expected = turned.plain(*(x.float() for x in args), back)
            got = on_device(rows.turned, *args, back)
            close = 1e-6 if dtype == torch.float32 else STEP
            for a, b in zip(got, expected):
                torch.testing.assert_close(a.float(), b, rtol=close, atol=close)


class Slices:
    """A frozen head that makes 10 of its rows at a time, as model.QEmbedding does."""

    def __init__(self, weight):
        self.weight = weight
        self.out_features = len(weight)

    def slices(self, dtype):
        for start in range(0, self.out_features, 10):
            at = slice(start, start + 10)
            yield at, self.weight[at].to(dtype)


def logits_and_targets(tokens, cols, dtype=torch.float32):
    """Logits (tokens, cols), and targets of which each fourth is -1."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(tokens, cols, generator=generator)
    targets = torch.randint(cols, (tokens,), generator=generator)
    targets[::4] = -1
    return logits.to(dtype), targets


def plain_loss(logits, targets, softcap=0.0):
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_head_s_loss_is_cross_entropy_by_chunks(softcap, monkeypatch):
    monkeypatch.setattr(loss, "TOKENS", 8)  # six tokens at once
    monkeypatch.setattr(loss, "ROWS", 37 * 4)  # four rows at once
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(21, 24, generator=generator)
    weight = torch.randn(37, 24, generator=generator)
    _, targets = logits_and_targets(21, 37)

    def plain(h, weight):
        return plain_loss(h @ weight.T, targets, softcap).sum() / (targets >= 0).sum()

    compare_with_autograd(lambda h, w: head_loss(h, w, targets, softcap), plain, h, weight)
    compare_with_autograd(
        lambda h: head_loss(h, Slices(weight), targets, softcap), lambda h: plain(h, weight), h
    )
    torch.testing.assert_close(head_logits(h, Slices(weight)), h @ weight.T)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(h, weight, targets, softcap), plain(h, weight))


def test_a_loss_without_targets_is_0_and_so_are_its_gradients():
    for targets in (torch.full((3,), -1), torch.zeros(0, dtype=torch.int64)):
        h = torch.ones(len(targets), 4, requires_grad=True)
        weight = torch.ones(7, 4, requires_grad=True)
        value = head_loss(h, weight, targets)
        value.backward()
        assert value == 0
        assert not weight.grad.any() and not h.grad.any()


def test_chunks_of_logits_are_alike_and_within_the_budget():
    bf16 = torch.bfloat16
    assert chunk_length(16 * 256, 50304, bf16) == 2048  # a 7B's micro-batch
    assert chunk_length(64 * 256, 50304, bf16) == 2048
    assert chunk_length(1000, 50304, torch.float32) == 500
    assert chunk_length(1000, 32000, bf16) == 1000
    assert chunk_length(1, 2**40, bf16) == 1
    assert chunk_length(0, 50304, bf16) == 1


def test_gradients_of_half_precision_logits_are_rounded_once():
    logits, targets = logits_and_targets(9, 50, torch.bfloat16)
    x = logits.double().requires_grad_()
    expected = plain_loss(x, targets)
    expected.sum().backward()
    losses = cross_entropy_.plain(logits, targets)
    torch.testing.assert_close(losses, expected.detach().float())
    torch.testing.assert_close(logits.float(), x.grad.float(), rtol=2**-8, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("cols,softcap", [(37, 0.0), (5000, 0.0), (300, 5.0)])
def test_the_kernel_leaves_the_logits_gradient(cols, softcap):
    for dtype in (torch.float32, HALF):
        logits, targets = logits_and_targets(5, cols, dtype)
        x = logits.double().requires_grad_()
        expected = plain_loss(x, targets, softcap)
        expected.sum().backward()
        moved = logits.to(DEVICE, copy=True)
        losses = rows.cross_entropy_(moved, targets.to(DEVICE), softcap)
        torch.testing.assert_close(losses.cpu(), expected.detach().float(), rtol=1e-5, atol=1e-5)
        rtol = 1e-5 if dtype == torch.float32 else STEP
        torch.testing.assert_close(moved.cpu().float(), x.grad.float(), rtol=rtol, atol=1e-6)

        again = logits.to(DEVICE, copy=True)  # without the gradient
        assert torch.equal(rows.cross_entropy_(again, targets.to(DEVICE), softcap, False), losses)
        assert torch.equal(again.cpu(), logits)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_the_kernel_s_loss_tells_of_logits_that_are_not_finite():
    logits = torch.randn(3, 60)
    logits[0, 40] = math.nan
    logits[1, 40] = math.inf
    losses = run_kernel(rows.cross_entropy_, logits, torch.tensor([1, 2, 3]))
    assert losses.isfinite().tolist() == [False, False, True]


@needs_triton
@pytest.mark.parametrize("tokens,cols", [(7, 96), (300, 64), (3, 5000)])
def test_the_norm_s_kernels_compute_what_its_functions_do(tokens, cols):
    generator = torch.Generator().manual_seed(0)
    x, h, dx, dy = torch.randn(4, tokens, cols, generator=generator)
    weight = torch.rand(cols, generator=generator) + 0.5
    for dtype in (torch.float32, HALF):
        close = 1e-5 if dtype == torch.float32 else 2 * STEP
        tolerance = {"rtol": close, "atol": close}
        x, h, dx, dy = (t.to(dtype) for t in (x, h, dx, dy))
        for added, passed in ((None, None), (h, dx)):
            expected = lean.rms_norm.plain(x, added, weight, 1e-5, dtype)
            got = on_device(rows.rms_norm, x, added, weight, 1e-5, dtype)
            torch.testing.assert_close(got, expected, **tolerance)
            total = x if added is None else expected[0]
            rstd = expected[2]
            expected = lean.rms_norm_backward.plain(dy, passed, total, weight, rstd)
            got = on_device(rows.rms_norm_backward, dy, passed, total, weight, rstd)
            torch.testing.assert_close(got, expected, **tolerance)
    assert on_device(rows.rms_norm_backward, dy, None, total, weight, rstd, False)[1] is None


def on_device(launcher, *args):
    """launcher's results on the CPU, of args moved to the GPU, if there is one."""
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
    return tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in launcher(*moved))


def test_a_block_launches_few_kernels_beside_its_products():
    def launches(blocks):
        with FakeTensorMode():
            model = LLaMA(tiny(n_layer=blocks, checkpoint_activations=True))
            idx = torch.zeros(2, 16, dtype=torch.int64)
            with Counter(compiles=True) as counter:
                model(idx, idx).backward()
        names = Multiset()
        for kernel, n in counter.launches.items():
            names[kernel.name.partition("_flash")[0]] += n
        return names

    block = launches(2) - launches(1)
    assert block.pop("mm") == 7 + 6 + 7  # forward, again without the last, backward
    assert block.pop("dequantize_int8") == 20
    assert block.pop("_scaled_dot_product") == 1 + 1 + 3
    assert block == {
        "rms_norm": 2 + 2, "rms_norm_backward": 4, "turned": 3, "glu": 2, "glu_backward": 1,
        "add": 1 + 1 + 3,  # of x, and again; of dx for q, k, v; for gate, up
    }
