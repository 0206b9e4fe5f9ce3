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
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import quant
from kernels import adam, launch, lean, matmul, moments, products, quantized, symmetric
from kernels.moments import Record
from methods import muon
from quant import quantize_int4, quantize_int8, random_key, rounding_key, uniform

HERE = os.path.dirname(quant.__file__)  # the repository
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter rounds to bfloat16 towards zero, and multiplies bfloat16's bits
INTERPRETED = DEVICE == "cpu"
HALF = torch.float16 if INTERPRETED else torch.bfloat16

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


def int8_factors(rows, cols, group, dtype=torch.float32, tokens=70):
    """(codes, x, dy): a weight's, and what it is multiplied with from the right and the left."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=generator)
    x = torch.randn(tokens, cols, generator=generator)
    dy = torch.randn(tokens, rows, generator=generator)
    return quantize_int8(w * 0.02 + 0.005, group), x.to(dtype), (dy * 1e-3).to(dtype)


INT8_PRODUCTS = [matmul.matmul_int8.plain, matmul.matmul_transposed_int8.plain]
if launch.triton is not None:
    INT8_PRODUCTS.append(partial(run_kernel, products.matmul_int8))
    INT8_PRODUCTS.append(partial(run_kernel, products.matmul_transposed_int8))


@pytest.mark.parametrize(
    "rows,cols,group", [(192, 528, 256), (300, 192, 256), (130, 100, 64), (7, 3, 2)]
)
def test_int8_products_are_within_a_hundredth_of_float_products(rows, cols, group):
    codes, x, dy = int8_factors(rows, cols, group)
    w = dequantize_int8(*codes)
    matmul, matmul_transposed = INT8_PRODUCTS[:2]
    for got, expected in (
        (matmul(x, *codes), x @ w.T),
        (matmul_transposed(dy, *codes), dy @ w),
    ):
        assert 0 < (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_products_are_exact_where_the_factor_is_on_its_grid(transposed):
    (q, scale, zero), *_ = int8_factors(300, 300, 64)
    scale.fill_(2**-10)  # one for all weights: it does not move dy off its grid
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(70, 1, generator=generator) + 0.5
    a = torch.randint(-127, 128, (70, 300), generator=generator).float()
    a[:, ::32] = 127  # the end of the grid, in every group
    w = dequantize_int8(q, scale, zero, torch.float64)
    expected = (a * unit).double() @ (w if transposed else w.T)
    for product in INT8_PRODUCTS[transposed::2]:
        got = product(a * unit, q, scale, zero).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    "rows,cols,group,tokens",
    [(192, 528, 256, 37), (300, 192, 256, 70), (130, 300, 64, 1)]
    + [(64, 512, 512, 3), (33, 100, 32, 65)],
)
def test_the_kernels_int8_products_are_the_reference_s(rows, cols, group, tokens):
    for dtype, rtol in ((torch.float32, 1e-6), (HALF, 1e-3 if INTERPRETED else 1e-2)):
        codes, *factors = int8_factors(rows, cols, group, dtype, tokens)
        for a, reference, kernel in zip(factors, INT8_PRODUCTS, INT8_PRODUCTS[2:]):
            got = kernel(a, *codes)
            expected = reference(a, *codes)
            assert got.dtype == dtype
            assert got.shape == expected.shape
            assert (got.float() - expected.float()).norm() < rtol * expected.float().norm()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_token_that_is_not_finite_harms_no_other(bad):
    codes, *factors = int8_factors(130, 100, 64, tokens=5)
    for i, product in enumerate(INT8_PRODUCTS):
        a = factors[i % 2].clone()
        expected = product(a, *codes)
        a[1] = 0
        a[3, 70] = bad
        got = product(a, *codes)
        assert not got[1].any()  # a token of zeros gives zeros
        assert not got[3].isfinite().any()
        assert torch.equal(got[::2], expected[::2])


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


@needs_triton
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("group", [16, 1024])
def test_groups_that_int8_kernels_do_not_take_stay_in_torch(group, monkeypatch):
    monkeypatch.setattr(launch, "_works", True)
    codes, *factors = int8_factors(5, 1100, group, tokens=3)
    moved = [x.to(DEVICE) for x in codes]
    for a, name in zip(factors, ("matmul_int8", "matmul_transposed_int8")):
        function = getattr(matmul, name)
        a = a.to(DEVICE)
        assert getattr(products, name)(a, *moved) is NotImplemented
        got = torch.Tensor(function(a.as_subclass(Claimed), *moved)).cpu()
        torch.testing.assert_close(got, function.plain(a.cpu(), *codes))


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
from kernels import adam, products, quantized, symmetric
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
    products.matmul_int8(w.to(dtype), *quant.quantize_int8(torch.zeros(512, 512)))
    products.matmul_transposed_int8(w.to(dtype), *quant.quantize_int8(torch.zeros(512, 512)))
adam.second_moment(w[:, 0], w[0], *sums, 0.9, 3, record)
adam.add_bfloat16_(w.bfloat16(), w.bfloat16(), 0.1, 5)
quantized.dequantize_int8(*quant.quantize_int8(w), torch.bfloat16)
quantized.dequantize_int8(*quant.quantize_int8(w))
quantized.dequantize_int4(*quant.quantize_int4(w), torch.bfloat16)
y = torch.zeros(2, 64, 512, dtype=torch.bfloat16)
symmetric.gram_matrix(y.mT, y)
symmetric.polynomial(y[..., :64], 1.0, 1.0, 1.0, y)

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
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
    others = (75, 120) if "matmul" not in kernel.__name__ else ()  # Turing, Blackwell
    if "symmetric" in kernel.__name__:  # Turing has no bfloat16
        others = (120,)
    for capability in (86, 89, 90, *others):  # Ampere, Ada, Hopper
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
    assert compiled >= {"_add_kernel", "_adam_int8_kernel", "_dequantize_kernel", "_matmul_kernel"}
    assert "_symmetric_kernel" in compiled
    for line in lines:
        kernel, capability, spilled, shared = line
        assert spilled == 0, line
        assert shared <= 99 * 1024, line  # bytes that a block may have on a consumer card


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
    torch.testing.assert_close(got.float(), gram, rtol=2e-3, atol=1e-3)
    below = torch.tril(got, -32)  # what lies past the diagonal's tiles
    assert torch.equal(below.mT, torch.triu(got, 32))

    gram = gram.to(HALF)
    for by in (None, size):
        expected = muon.polynomial.plain(gram.float(), 3.0, -2.0, 0.4, by)
        got = run_kernel(symmetric.polynomial, gram, 3.0, -2.0, 0.4, by)
        torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)


@needs_triton
def test_symmetric_kernels_leave_float32_to_torch():
    assert symmetric.gram_matrix(torch.zeros(1, 4, 4)) is NotImplemented
    assert symmetric.polynomial(torch.zeros(1, 4, 4), 1, 1, 1) is NotImplemented


# -----------------------------------------------------------------------------
# kernels/lean.py against autograd


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
    weight = torch.rand(24, generator=generator) + 0.5
    compare_with_autograd(
        lambda x, w: lean.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (24,), w, 1e-5),
        gate, weight,
    )
    compare_with_autograd(lean.swiglu, lambda a, b: F.silu(a) * b, gate, up)
    compare_with_autograd(lean.geglu, lambda a, b: F.gelu(a, approximate="tanh") * b, gate, up)
    exact = lean.GLU("gelu_erf")
    compare_with_autograd(exact, lambda a, b: F.gelu(a) * b, gate, up)


class Slices:
    """A frozen head that makes 10 of its rows at a time, as model.QEmbedding does."""

    def __init__(self, weight):
        self.weight = weight
        self.out_features = len(weight)

    def slices(self, dtype):
        for start in range(0, self.out_features, 10):
            at = slice(start, start + 10)
            yield at, self.weight[at].to(dtype)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_lean_loss_is_cross_entropy_by_chunks(softcap, monkeypatch):
    monkeypatch.setattr(lean, "LOSS_CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(21, 24, generator=generator)
    weight = torch.randn(37, 24, generator=generator)
    targets = torch.randint(37, (21,), generator=generator)
    targets[::4] = -1

    def loss(h, weight):
        logits = h @ weight.T
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, ignore_index=-1)

    compare_with_autograd(lambda h, w: lean.head_loss(h, w, targets, softcap), loss, h, weight)
    compare_with_autograd(
        lambda h: lean.head_loss(h, Slices(weight), targets, softcap), lambda h: loss(h, weight), h
    )
    torch.testing.assert_close(lean.head_logits(h, Slices(weight)), h @ weight.T)
    with torch.no_grad():
        torch.testing.assert_close(lean.head_loss(h, weight, targets, softcap), loss(h, weight))
    assert lean.head_loss(h, weight, torch.full_like(targets, -1)) == 0
