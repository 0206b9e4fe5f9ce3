"""
What a GPU would launch, counted without one:
    python -m pytest tests/test_roofline.py
"""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import roofline as bench_roofline
from bench.settings import train_settings
from configurator import configure
from kernels.count import Counter
from kernels.launch import alike, fused, on_gpu, with_kernel
from kernels.subspace import range_finder
from model import QLinear
from qgalore import QGaLore
from quant import add_low_rank_int8_, dequantize_int8
from run import roofline
from run.cards import CARDS, card_named
from run.roofline import launches, phase_seconds, step_on
from tests.common import HERE, settings

# launches of an ordinary step, which may not creep up
MOST = {"7b": 6_000, "60m": 1_500}
H100 = card_named("H100")


def counted(function, compiles=False):
    """{Kernel: launches} of function() on fake tensors."""
    with FakeTensorMode(), Counter(compiles) as counter:
        function()
    return counter.launches


def only(launches):
    """The one kernel that was launched, once."""
    ((kernel, n),) = launches.items()
    assert n == 1
    return kernel


def test_a_product_counts_its_operations_and_bytes():
    def product():
        a = torch.empty(64, 32, dtype=torch.bfloat16)
        a @ torch.empty(128, 32, dtype=torch.bfloat16).T

    kernel = only(counted(product))
    assert kernel.operations == (("bf16", 2 * 64 * 32 * 128),)
    assert kernel.bytes == 2 * (64 * 32 + 128 * 32 + 64 * 128)


def test_float32_products_are_off_the_tensor_cores():
    kernel = only(counted(lambda: torch.empty(8, 4) @ torch.empty(4, 2)))
    assert kernel.operations == (("float32", 2 * 8 * 4 * 2),)


def test_views_and_allocations_are_no_launch():
    def views():
        x = torch.empty(8, 4)
        x.t()[1:].detach()[None].expand(2, -1, -1)
        torch.empty_like(x).split(2)

    assert not counted(views)


def test_a_kernel_counts_as_one():
    def step():
        q, scale, zero = (torch.empty(512, 512, dtype=torch.int8), *torch.empty(2, 512, 2).unbind())
        left, right = torch.empty(2, 512, 64, dtype=torch.bfloat16).unbind()
        add_low_rank_int8_(q, scale, zero, left, right, 1.0, 1)

    product, kernel = counted(step)
    assert product.operations == (("bf16", 2 * 512 * 512 * 64),)
    assert kernel.name == "add_int8_"
    assert not kernel.operations
    codes = 512 * 512 + 2 * 512 * 2 * 4
    assert kernel.bytes == 2 * codes + 512 * 512 * 2


def test_a_kernels_result_is_written():
    def decode():
        q = torch.empty(4, 256, dtype=torch.int8)
        dequantize_int8(q, torch.empty(4, 1), torch.empty(4, 1), torch.bfloat16)

    assert only(counted(decode)).bytes == 4 * 256 + 2 * 4 * 4 + 4 * 256 * 2


def test_chunks_count_as_often_as_there_are():
    def loop():
        x = torch.empty(10, 4)
        for i in alike(range(0, 10, 3)):
            x[i : i + 3].neg()

    assert sum(counted(loop).values()) == 4
    assert sum(k.bytes * n for k, n in counted(loop).items()) == 2 * 10 * 4 * 4


def test_fused_functions_count_as_one_where_compiled():
    @fused
    def gate(a, b):
        return F.silu(a) * b

    def run():
        gate(torch.empty(16), torch.empty(16))

    assert only(counted(run, compiles=True)).bytes == 3 * 16 * 4
    assert sum(counted(run).values()) == 2


def test_a_kernel_of_two_launches_counts_both():
    @with_kernel(None, launches=2, unit="int8")
    def product(a, b):
        return a @ b

    launches = counted(lambda: product(torch.empty(8, 8), torch.empty(8, 8)))
    assert sum(launches.values()) == 2
    assert sum(n * dict(k.operations)["int8"] for k, n in launches.items()) == 2 * 8**3


def test_what_is_counted_goes_the_way_of_a_gpu():
    seen = []
    counted(lambda: seen.append(on_gpu(torch.empty(1))))
    assert seen == [True]
    assert not on_gpu(torch.empty(1))


@pytest.fixture(scope="module")
def steps():
    """{size: Step} of one micro-batch by the recipes."""
    found = {}
    for size in MOST:
        recipe = f"{HERE}/config/llama_{size}.py"
        s = settings(recipe, "--device=cuda", "--gradient_accumulation_steps=1")
        found[size] = step_on(H100, s)
    return found


def test_a_step_launches_no_more_than_it_did(steps):
    counted = {size: launches(step.last) for size, step in steps.items()}
    for size, n in counted.items():
        assert 100 < n <= MOST[size], counted


def launches_of_a_hook(module, hook, rank=1024):
    """How many kernels hook(optimizer) launches: a step of QGaLore on module, on fake tensors."""
    with FakeTensorMode():
        optimizer = QGaLore(module(dtype=torch.bfloat16), rank=rank)
        for weight in optimizer.weights:  # an ordinary step: there is a basis, and it stays
            weight.projection.basis = weight.empty_basis()
            weight.projection.next_refresh = math.inf
        with Counter() as counter:
            hook(optimizer)
    return sum(counter.launches.values())


@pytest.mark.parametrize("cols,rows", [(512, 512), (4096, 4096), (4096, 11008), (11008, 4096)])
def test_a_weights_hook_launches_12_kernels_at_most(cols, rows):
    def hook(optimizer):
        (weight,) = optimizer.weights
        tokens = torch.empty(4096, cols + rows, dtype=torch.bfloat16)
        weight.look(weight.layer, *tokens.split([cols, rows], dim=1))

    assert launches_of_a_hook(partial(QLinear, cols, rows), hook, min(rows, cols) // 4) <= 12


@pytest.mark.parametrize("most,module", [(3, partial(nn.RMSNorm, 4096)),
                                         (6, partial(nn.Embedding, 50304, 4096))])
def test_a_parameters_hook_launches_few_kernels(most, module):
    def hook(optimizer):
        (parameter,) = optimizer.parameters
        parameter.p.grad = torch.empty_like(parameter.p)
        parameter.look(parameter.p)

    assert launches_of_a_hook(module, hook) <= most


def test_a_step_multiplies_what_the_model_has(steps):
    """Forward 2 N, backward with checkpoints 4 N but for down_proj's output, which is not needed
    again; N without the embedding."""
    per_token = 0
    for kernel, n in steps["7b"].last.items():
        if kernel.phase in ("forward", "backward"):
            per_token += n * sum(number for _, number in kernel.operations) / 4096
    down = 32 * 4096 * 11008
    n = 32 * 4 * 4096**2 + 3 * down
    head = 4096 * 50304
    expected = 6 * n - 2 * down + 6 * head
    assert per_token == pytest.approx(expected, rel=0.02)  # attention's own beside


def test_seconds_are_the_slowest_of_three(monkeypatch):
    def product(n, dtype):
        def multiply():
            torch.empty(n, n, dtype=dtype) @ torch.empty(n, n, dtype=dtype)

        return roofline.kernel_seconds(only(counted(multiply)), H100)

    large = 2 * 8192**3
    efficiency = roofline.EFFICIENCY
    assert product(8192, torch.bfloat16) == pytest.approx(large / 989e12 / efficiency["bf16"])
    assert product(8192, torch.float32) == pytest.approx(large / 66.9e12 / efficiency["float32"])
    assert product(2, torch.float32) == roofline.FLOOR


def test_a_phase_takes_at_least_as_long_as_its_host():
    with FakeTensorMode(), Counter() as counter:
        counter.phase = "update"
        for _ in range(100):
            torch.empty(2).neg()
    assert phase_seconds(counter.launches, H100)["update"] == pytest.approx(100 * roofline.HOST)


def test_cards_are_found_by_the_drivers_names():
    assert card_named("NVIDIA GeForce RTX 4060 Ti").bandwidth == 288e9
    assert card_named("NVIDIA GeForce RTX 3060").memory == 12
    assert card_named("NVIDIA H100 80GB HBM3").name == "H100"
    assert card_named("Quadro T400") is None
    assert {card_named(card.name) for card in CARDS} == set(CARDS)


def test_bench_roofline_prints_a_step_and_its_speed(capsys):
    tiny = "--n_layer=1 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=512".split()
    s = configure(train_settings(), argv=tiny)
    bench_roofline.main(s.changed(methods="qgalore,adamw", card="4060 Ti", sizes=False))
    out = capsys.readouterr().out
    assert "qgalore on RTX 4060 Ti, predicted" in out and "adamw on" in out
    assert out.count("projection") == 2
    with pytest.raises(SystemExit, match="card=4060:"):
        bench_roofline.main(s.changed(methods="", card="4060", sizes=False))


def test_a_dry_run_ends_with_time(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "card_here", lambda: None)
    s = settings("--n_layer=1", "--n_embd=64", "--n_head=2", "--ffn_dim=96", "--vocab_size=512")
    roofline.print_time(s, need=13 * 2**30)  # bytes
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("predicted for 10,000 steps on a GPU, RTX 4060 Ti: about ")
    assert "3060" not in line and line.endswith(("days", "hours", "minutes"))


def test_a_refresh_multiplies_on_the_tensor_cores():
    """In float32 only Gram matrices of r x r and what they are solved with; no reflections."""
    dim, other, rank = 4096, 11008, 1024

    def refresh():
        range_finder(torch.empty(dim, other, dtype=torch.bfloat16), rank)

    launches = counted(refresh)
    operations = {}
    for kernel, n in launches.items():
        for unit, each in kernel.operations:
            operations[unit] = operations.get(unit, 0) + n * each
    assert sum(launches.values()) <= 100
    assert operations["bf16"] == 6 * 2 * dim * other * rank
    assert operations["float32"] <= 4 * (3 * dim * rank**2 + rank**3)
    assert not any("qr" in kernel.name for kernel in launches)
