"""
kernels.py against quant.py: on CUDA tensors where there is a GPU, else in Triton's interpreter.
    python -m pytest test_kernels.py
"""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from kernels import quantized as kernels
import quant
from quant import dequantize_int8, quantize_int4, quantize_int8, random_key, rounding_key, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = os.path.dirname(os.path.abspath(__file__))
INTERPRETED = DEVICE == "cpu"  # Triton's interpreter rounds to bfloat16 towards zero, and multiplies bfloat16's bits

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")


def launch(function, *args):
    """function.triton on args moved to the GPU, if there is one. Returns its result, or else the arguments, moved."""
    moved = [x.to(DEVICE, copy=True) if isinstance(x, torch.Tensor) else x for x in args]
    out = function.triton(*moved)
    return [x.cpu() for x in moved if isinstance(x, torch.Tensor)] if out is None else out.cpu()


def low_rank_step(rows, cols, group, rank, dtype, seed=0):
    """(codes, left, right) of a step about as large as a tenth of the weights."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator) * 0.02 + 0.005
    left, right = (torch.randn(n, rank, generator=generator).to(dtype) for n in (rows, cols))
    return quantize_int8(w, group), left * 0.002 / rank**0.5, right


def updated(codes, *step):
    """What quant.py makes of codes, in copies; factors in float32, as the kernel's sums are."""
    codes = [x.clone() for x in codes]
    quant.add_low_rank_int8_(*codes, *(x.float() if isinstance(x, torch.Tensor) else x for x in step))
    return codes


@needs_triton
@pytest.mark.parametrize(
    "rows,cols,group",
    [(3, 512, 256), (70, 300, 256), (5, 300, 64), (1, 7, 256), (1, 7, 2), (2, 1, 1), (3, 9, 4), (2, 520, 512)],
)
def test_the_kernels_dequantise_to_the_same_bits(rows, cols, group):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    eight, four = quantize_int8(w, group), quantize_int4(w, group)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rtol = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0
        for name, codes in (("dequantize_int8", eight), ("dequantize_int4", four)):
            expected = getattr(quant, name)(*codes).to(dtype)
            got = launch(getattr(kernels, name), *codes, dtype)
            torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
    rest = [x.to(DEVICE)[1::2] for x in eight]  # rows with gaps between them
    assert torch.equal(kernels.dequantize_int8.triton(*rest).cpu(), dequantize_int8(*eight)[1::2])


@needs_triton
@pytest.mark.parametrize(
    "rows,cols,group,rank",
    [(70, 512, 256, 16), (67, 300, 256, 37), (5, 300, 64, 1), (33, 100, 16, 8), (9, 600, 512, 40), (2, 50, 256, 5)],
)
def test_the_kernel_steps_weights_to_the_reference_s_codes(rows, cols, group, rank):
    for dtype in (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16):
        codes, left, right = low_rank_step(rows, cols, group, rank, dtype)
        for key in (None, 0, 1, 2**32 - 1, rounding_key(7, "a"), 2**48 - 1):
            q, scale, zero = updated(codes, left, right, 0.99, key)
            got, s, z, *_ = launch(kernels.add_low_rank_int8_, *codes, left, right, 0.99, key)
            torch.testing.assert_close(s, scale, rtol=1e-5, atol=0)  # sums taken in another order
            torch.testing.assert_close(z, zero, rtol=1e-5, atol=1e-7)
            off = (got.int() - q.int()).abs()
            assert off.max() <= 1 and off.float().mean() <= 1e-4


@needs_triton
@pytest.mark.parametrize("rows,cols,group", [(70, 512, 256), (67, 300, 256), (33, 100, 16)])
def test_the_kernel_takes_a_whole_step_in_either_order_to_the_reference_s_bits(rows, cols, group):
    codes, left, right = low_rank_step(rows, cols, group, 8, torch.float32)
    for step in (left @ right.T, (right @ left.T).T):
        for key in (None, 5):
            expected, got = updated(codes, step, None, 0.99, key), launch(kernels.add_low_rank_int8_, *codes, step, None,
                                                                          0.99, key)
            assert (expected[0] != codes[0]).float().mean() > 0.8
            assert all(torch.equal(a, b) for a, b in zip(expected, got))


@needs_triton
def test_without_a_step_the_kernel_leaves_every_code_where_it_was():
    codes, left, right = low_rank_step(70, 300, 64, 8, torch.float32)
    for key in (None, 5):
        q, scale, zero, *_ = launch(kernels.add_low_rank_int8_, *codes, left * 0, right, 1.0, key)
        expected = updated(codes, left * 0, right, 1.0, key)
        assert all(torch.equal(a, b) for a, b in zip((q, scale, zero), expected))
        assert (q != codes[0]).float().mean() < 1e-3


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_kernel_leaves_a_group_with_a_value_that_is_not_finite_as_it_was(bad):
    codes, left, right = low_rank_step(70, 300, 64, 8, torch.float32)
    left[3, 2] = bad  # all of row 3, and column 70, which lies in group 1
    right[70, 5] = bad
    got = launch(kernels.add_low_rank_int8_, *codes, left, right, 1.0, 7)
    expected = updated(codes, left, right, 1.0, 7)
    for new, old, reference, group, atol in zip(got, codes, expected, (slice(64, 128), 1, 1), (1.0, 1e-7, 1e-7)):
        kept = torch.zeros_like(new, dtype=torch.bool)
        kept[3], kept[:, group] = True, True
        assert torch.equal(new[kept], old[kept]) and (new != old)[~kept].float().mean() > 0.8
        torch.testing.assert_close(new.float(), reference.float(), rtol=1e-5, atol=atol)


@needs_triton
@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's at a division by 0, in the interpreter
def test_the_kernel_gives_a_group_of_equal_values_scale_0_and_its_value():
    w = torch.cat([torch.full((3, 64), 0.02), torch.randn(3, 36, generator=torch.Generator().manual_seed(0))], dim=1)
    left, right = torch.tensor([[1.0], [-1.0], [1.0]]), torch.full((100, 1), 9.0)
    q, scale, zero, *_ = launch(kernels.add_low_rank_int8_, *quantize_int8(w, 64), left, right, 1.0, 3)
    assert not q[:, :64].any() and not scale[:, 0].any() and torch.equal(zero[:, :1], w[:, :1] + 9 * left)
    torch.testing.assert_close(scale[:, 1], quantize_int8(w, 64)[1][:, 1])  # 36 values, and nothing from beyond them


@needs_triton
def test_the_kernel_rounds_up_as_often_as_the_fraction_and_by_the_key():
    rows, inner = 64, slice(1, 255)  # the ends of a group set its grid, and stay
    w = torch.arange(-128.0, 128).repeat(rows, 1)
    left, right = torch.ones(rows, 1), torch.zeros(256, 1)
    right[inner] = 0.3
    ups = []
    for key in (random_key("a"), rounding_key(1000, "b")):
        q = launch(kernels.add_low_rank_int8_, *quantize_int8(w), left, right, 1.0, key)[0]
        ups.append((q - w)[:, inner])
        assert torch.equal(ups[-1], (uniform(key, 0, w.numel()).view_as(w) + w + 0.3).floor().sub(w)[:, inner])
        assert abs(ups[-1].mean() - 0.3) < 4 * math.sqrt(0.21 / ups[-1].numel())
    assert abs((ups[0] != ups[1]).float().mean() - 0.42) < 4 * math.sqrt(0.25 / ups[0].numel())


@needs_triton
@pytest.mark.parametrize("rows,cols", [(70, 512), (67, 300), (5, 48), (300, 17)])
def test_the_kernel_steps_moments_to_the_reference_s_codes(rows, cols):
    generator = torch.Generator().manual_seed(0)
    codes = quantize_int8(torch.randn(rows, cols, generator=generator) * 1e-3)
    g = torch.randn(rows, cols, generator=generator) * 1e-3
    row, col = (torch.rand(n, generator=generator) * 0.1 + 0.01 for n in (rows, cols))
    expected = [x.clone() for x in (*codes, g)]
    quant.adam_int8_(*expected, row, col, 0.9, 0.19, 1e-8, 2**31 + 5)
    q, scale, zero, n, *_ = launch(kernels.adam_int8_, *codes, g, row, col, 0.9, 0.19, 1e-8, 2**31 + 5)
    for got, reference in zip((scale, zero, n), expected[1:]):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6 if got is n else 1e-9)
    off = (q.int() - expected[0].int()).abs()
    assert off.max() <= 1 and off.float().mean() <= 1e-3 and (q != codes[0]).float().mean() > 0.5


@needs_triton
@pytest.mark.parametrize("group,gap", [(8, False), (1024, False), (256, True)])
def test_shapes_that_the_kernel_does_not_take_are_stepped_by_the_reference(group, gap, monkeypatch):
    monkeypatch.setattr(kernels, "_add_low_rank_kernel", None)
    codes, left, right = low_rank_step(5, 1100, group, 3, torch.float32)
    expected = updated(codes, left, right, 0.9, 11)
    q, scale, zero = [x.to(DEVICE) for x in codes]
    if gap:
        q = torch.stack([q, q], dim=-1)[..., 0]
    kernels.add_low_rank_int8_.triton(q, scale, zero, left.to(DEVICE), right.to(DEVICE), 0.9, 11)
    torch.testing.assert_close(zero.cpu(), expected[2], rtol=1e-5, atol=1e-7)
    assert (q.cpu() != expected[0]).float().mean() <= 1e-3


def int8_factors(rows, cols, group, dtype=torch.float32, tokens=70):
    """(codes, x, dy): a weight's, and what it is multiplied with from the right and from the left."""
    generator = torch.Generator().manual_seed(0)
    w, x, dy = (torch.randn(shape, generator=generator) for shape in ((rows, cols), (tokens, cols), (tokens, rows)))
    return quantize_int8(w * 0.02 + 0.005, group), x.to(dtype), (dy * 1e-3).to(dtype)


INT8_PRODUCTS = [quant.matmul_int8, quant.matmul_transposed_int8]
if kernels.triton is not None:
    INT8_PRODUCTS += [partial(launch, kernels.matmul_int8), partial(launch, kernels.matmul_transposed_int8)]


@pytest.mark.parametrize("rows,cols,group", [(192, 528, 256), (300, 192, 256), (130, 100, 64), (7, 3, 2)])
def test_int8_products_are_within_a_hundredth_of_the_float_products(rows, cols, group):
    codes, x, dy = int8_factors(rows, cols, group)
    w = dequantize_int8(*codes)
    for got, expected in ((quant.matmul_int8(x, *codes), x @ w.T), (quant.matmul_transposed_int8(dy, *codes), dy @ w)):
        assert 0 < (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_products_are_exact_where_the_factor_lies_on_its_grid(transposed):
    (q, scale, zero), x, dy = int8_factors(300, 300, 64)
    scale.fill_(2**-10)  # one for all weights: it does not move dy off its grid
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(70, 1, generator=generator) + 0.5
    a = torch.randint(-127, 128, (70, 300), generator=generator).float()
    a[:, ::32] = 127  # the end of the grid, in every group
    w = dequantize_int8(q, scale, zero, torch.float64)
    expected = (a * unit).double() @ (w if transposed else w.T)
    for product in INT8_PRODUCTS[transposed::2]:
        torch.testing.assert_close(product(a * unit, q, scale, zero).double(), expected, rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(
    "rows,cols,group,tokens",
    [(192, 528, 256, 37), (300, 192, 256, 70), (130, 300, 64, 1), (64, 512, 512, 3), (33, 100, 32, 65)],
)
def test_the_kernels_int8_products_are_the_reference_s(rows, cols, group, tokens):
    for dtype in (torch.float32, torch.float16 if INTERPRETED else torch.bfloat16):
        codes, *factors = int8_factors(rows, cols, group, dtype, tokens)
        for a, reference, kernel in zip(factors, INT8_PRODUCTS, INT8_PRODUCTS[2:]):
            got, expected = kernel(a, *codes), reference(a, *codes)
            assert got.dtype == dtype and got.shape == expected.shape
            rtol = 1e-6 if dtype == torch.float32 else 1e-3 if dtype == torch.float16 else 1e-2
            assert (got.float() - expected.float()).norm() < rtol * expected.float().norm()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_in_int8_products_a_token_of_zeros_gives_zeros_and_one_that_is_not_finite_harms_no_other(bad):
    codes, *factors = int8_factors(130, 100, 64, tokens=5)
    for i, product in enumerate(INT8_PRODUCTS):
        a = factors[i % 2].clone()
        expected = product(a, *codes)
        a[1], a[3, 70] = 0, bad
        got = product(a, *codes)
        assert not got[1].any() and not got[3].isfinite().any() and torch.equal(got[::2], expected[::2])


@needs_triton
@pytest.mark.parametrize("group", [16, 1024])
def test_groups_that_the_int8_kernels_do_not_take_are_multiplied_by_the_reference(group, monkeypatch):
    for kernel in ("_matmul_kernel", "_matmul_transposed_kernel"):
        monkeypatch.setattr(kernels, kernel, None)
    codes, *factors = int8_factors(5, 1100, group, tokens=3)
    for a, reference, kernel in zip(factors, INT8_PRODUCTS, INT8_PRODUCTS[2:]):
        torch.testing.assert_close(kernel(a, *codes), reference(a, *codes))


CALL_ALL = """
import sys, warnings
import torch
if {missing}: sys.modules["triton"] = None
import kernels, quant

class Claimed(torch.Tensor):
    is_cuda = True  # it lies on the CPU: Triton refuses it, or finds no driver

w = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
left, right = torch.ones(6, 2), torch.full((70, 2), 0.01)
for claimed in (False, True, True):
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for module in (quant, kernels):
            eight, four = quant.quantize_int8(w, 32), quant.quantize_int4(w, 32)
            if claimed and module is kernels:
                eight, four = ([x.as_subclass(Claimed) for x in codes] for codes in (eight, four))
            module.add_low_rank_int8_(*eight, left, right, shrink=0.9, key=5)
            results.append([*eight, module.dequantize_int8(*eight, torch.bfloat16), module.dequantize_int4(*four)])
    assert all(torch.equal(a, torch.Tensor(b)) for a, b in zip(*results)), results
    print(*(str(w.message) for w in caught), sep="\\n")
"""


@pytest.mark.parametrize("missing", [True, False])
def test_without_triton_or_where_it_fails_the_reference_steps_in_with_one_warning(missing):
    if not missing and kernels.triton is None:
        pytest.skip("triton is not installed")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", CALL_ALL.format(missing=missing)], env=env, cwd=HERE,
                         capture_output=True, text=True)
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
import kernels, quant

launches = []
JITFunction.run = lambda kernel, *args, grid, warmup, **options: launches.append((kernel, args, options))
w = torch.zeros(64, 512)
for dtype, key in ((torch.bfloat16, 5), (torch.bfloat16, None), (torch.float32, 5)):
    factors = torch.zeros(64, 256, dtype=dtype), torch.zeros(512, 256, dtype=dtype)
    kernels.add_low_rank_int8_.triton(*quant.quantize_int8(w), *factors, 0.9, key)
for step in (w, torch.zeros(512, 64).T):
    kernels.add_low_rank_int8_.triton(*quant.quantize_int8(w), step, None, 0.9, 5)
for dtype in (torch.bfloat16, torch.float32):
    kernels.adam_int8_.triton(*quant.quantize_int8(w), w.to(dtype), w[:, 0], w[0], 0.9, 0.1, 1e-8, 5)
    kernels.matmul_int8.triton(w.to(dtype), *quant.quantize_int8(torch.zeros(512, 512)))
    kernels.matmul_transposed_int8.triton(w.to(dtype), *quant.quantize_int8(torch.zeros(512, 512)))
kernels.dequantize_int8.triton(*quant.quantize_int8(w), torch.bfloat16)
kernels.dequantize_int8.triton(*quant.quantize_int8(w))
kernels.dequantize_int4.triton(*quant.quantize_int4(w), torch.bfloat16)

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
for kernel, args, options in launches:
    signature, constants, divisible = {}, {}, {}
    for i, (p, arg) in enumerate(zip(kernel.params, args)):
        signature[p.name] = "constexpr" if p.is_constexpr else p.annotation_type or mangle_type(arg)
        if p.is_constexpr:
            constants[p.name] = arg
        elif torch.is_tensor(arg) or p.name in ("rows", "cols"):
            divisible[i,] = [["tt.divisibility", 16]]
    for capability in (86, 89, 90):
        source = ASTSource(kernel, signature, constants, divisible)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with open(sys.argv[1], "wb") as f:
            f.write(binary.asm["cubin"])
        usage = subprocess.check_output([cuobjdump, "-res-usage", sys.argv[1]], text=True)
        registers, stack, local = (int(re.search(name + r":(\\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        print(json.dumps([kernel.__name__, capability, registers, stack + local, binary.metadata.shared]))
"""


@needs_triton
def test_every_kernel_compiles_without_spills_for_ampere_ada_and_hopper(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE_ALL, tmp_path / "kernel.cubin"], cwd=HERE, capture_output=True,
                         env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 42
    for line in lines:
        kernel, capability, registers, spilled, shared = line
        assert spilled == 0 and shared <= 99 * 1024, line
