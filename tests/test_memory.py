"""
The memory plans of run/memory.py against real steps:
    python -m pytest tests/test_memory.py
"""

import os
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from kernels.subspace import singular_vectors
from methods.registry import find
from model import LLaMA
from qgalore import QGaLore
from quant import dequantize_int8, quantize_int8
from run import memory
from run.by_block import forward_backward, kept_bytes
from run.device import GIB
from run.allocator import MIB, Allocator
from run.memory import CONTEXT, SUMS, Gpu, memory_plan, print_plan, refuse_what_does_not_fit
from run.ranks import Ranks
from run.trace import Live
from tests.common import HERE, Job, one_line_error, run, settings, tiny, tokens

PROJECTED = "--method=qgalore --rank=32"


def step(s, model, optimizer, x, y):
    micro_batches = s.gradient_accumulation_steps
    if s.by_block:
        batches = [(x, y, None)] * micro_batches
        forward_backward(model, batches, [1] * micro_batches, optimizer, nullcontext())
    else:
        for i in range(micro_batches):
            optimizer.accumulating = i < micro_batches - 1
            model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()


def count(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("flags", [
    PROJECTED,
    PROJECTED + " --moments=8bit",
    PROJECTED + " --checkpoint_activations=True --checkpoint_bits=8",
    PROJECTED + " --gradient_accumulation_steps=2",
    PROJECTED + " --gradient_accumulation_steps=2 --proj_svd=True",
    PROJECTED + " --gradient_accumulation_steps=4 --by_block=True",
    "--method=qmuon --gradient_accumulation_steps=4 --by_block=True --checkpoint_bits=8",
    PROJECTED + " --freeze_embedding=True --accumulation=bfloat16",
    PROJECTED + " --method=galore",
    PROJECTED + " --method=lora",
    PROJECTED + " --method=qlora",
    "--method=adam8bit",
    "--method=adamw",
    "--method=adamw --gradient_accumulation_steps=2",
])
def test_the_memory_plan_is_what_a_real_step_takes(flags):
    s = settings(*"--n_layer=2 --n_embd=128 --n_head=4 --ffn_dim=352 --vocab_size=512".split(),
                 "--batch_size=4", *flags.split())
    plan = memory_plan(s, torch.float32, torch.float32)
    with Live() as live:
        model, optimizer = find(s.method).build(s, "cpu", torch.float32)
        for _ in range(2):
            step(s, model, optimizer, *tokens(4, 256, 512))
    assert plan["weights"] == count([*model.parameters(), *model.buffers()])
    if isinstance(optimizer, QGaLore):
        moments = []
        for trained in optimizer.trained.values():
            for name, t in vars(trained.moments).items():
                if isinstance(t, torch.Tensor) and not name.endswith("_codes"):  # one for all
                    moments.append(t)
        assert plan["moments"] == pytest.approx(count(moments), abs=100)
        bases = [t for weight in optimizer.weights for t in weight.projection.basis]
        assert plan["projections"] == count(bases)
    # by block, inputs of the last block go as it goes backward; a plan counts all of them
    gone = kept_bytes(s, torch.float32) / s.n_layer if s.by_block else 0
    assert 0.98 * live.peak <= sum(plan.values()) <= 1.02 * live.peak + gone


@pytest.mark.parametrize("flags,blocks,gpu", [
    ("--method=qgalore --rank=16 --checkpoint_activations=True --gradient_accumulation_steps=2", 6,
     Gpu()),
    ("--method=qgalore --rank=16 --proj_svd=True --gradient_accumulation_steps=2", 6, None),
    ("--method=qgalore --rank=16 --proj_gap=1", 6, Gpu(expandable=False, kernels=False)),
    ("--method=loqt --weight_bits=8 --rank=16", 6, None),
    ("--method=qgalore --rank=16 --by_block=True --gradient_accumulation_steps=4", 6, Gpu()),
    ("--method=adamw", 12, Gpu()),  # so deep that its moments, counted twice, are above its gradients
])
def test_a_deep_models_plan_repeats_a_shallow_ones(flags, blocks, gpu, monkeypatch):
    """To the byte, but that the optimizer has as many norms as there are weights, and that a GPU's
    memory is reserved by pages."""
    s = settings(*"--n_embd=64 --n_head=4 --ffn_dim=176 --vocab_size=512 --batch_size=2".split(),
                 f"--n_layer={blocks}", *flags.split())
    plan = memory_plan(s, torch.float32, torch.float32, gpu=gpu)
    monkeypatch.setattr(memory, "TRACED", blocks)
    whole = memory_plan(s, torch.float32, torch.float32, gpu=gpu)
    if gpu:
        fragments = "fragments, workspaces"
        assert abs(plan.pop(fragments) - whole.pop(fragments)) <= 2**21
    assert plan == pytest.approx(whole, abs=1000)


def test_on_a_gpu_a_kernel_is_counted_by_its_results():
    """And attention's backward by its sums in float32, which a CPU does not make."""
    q, scale, zero = quantize_int8(torch.randn(64, 512))
    with Live(on_gpu=True) as live:
        for calls in (1, 2):  # the second is known from the first
            w = dequantize_int8(q, scale, zero, torch.bfloat16)
            assert w.shape == q.shape and w.dtype == torch.bfloat16
            assert live.peak == calls * 2 * q.numel()
            kept = w  # noqa: F841
        before = live.now
        x = torch.randn(1, 2, 16, 8, requires_grad=True)
        y = F.scaled_dot_product_attention(x, x, x)
        live.peak = live.now
        y.sum().backward()
    assert live.peak - before >= 4 * x.numel() + 3 * x.nbytes


def test_a_state_is_loaded_a_weight_at_a_time():
    """A card that a run fills has no room for all moments twice."""
    state = QGaLore(LLaMA(tiny()), rank=8).state_dict()
    sizes = []
    for of_weight in state["trained"].values():
        sizes.append(count([t for t in tree_leaves(of_weight) if isinstance(t, torch.Tensor)]))
    largest = max(sizes)
    assert sum(sizes) > 4 * largest
    with Live() as live:
        optimizer = QGaLore(LLaMA(tiny()), rank=8)
        before = live.now
        live.peak = live.now
        optimizer.load_state_dict(state)
    assert live.peak - before < 1.5 * largest
    assert live.now - before < 0.1 * largest


# -----------------------------------------------------------------------------
# torch's allocator on a GPU


def test_an_expandable_pool_grows_by_pages_at_its_end():
    allocator = Allocator()
    allocator.allocate("a", 15 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate("b", 10 * MIB + 1)  # 5 MiB are free at the end
    assert allocator.reserved == 40 * MIB
    assert allocator.allocated == 25 * MIB + 512  # of the next multiple of 512 bytes
    allocator.free("a")
    allocator.allocate("c", 14 * MIB)  # a's place, though there is room at the end
    allocator.allocate("d", 14 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.free("b")
    allocator.free("c")  # with what b and the rest of a left, one block
    allocator.allocate("e", 25 * MIB)
    assert allocator.reserved == 40 * MIB
    assert allocator.peak == 39 * MIB


def test_small_tensors_have_a_pool_of_their_own():
    allocator = Allocator()
    for i in range(3):
        allocator.allocate(i, MIB)
    allocator.allocate(3, 1)
    assert (allocator.small.reserved, allocator.large.reserved) == (4 * MIB, 0)
    assert allocator.allocated == 3 * MIB + 512


def test_plain_segments_are_not_joined():
    """As on Windows: two freed segments of 20 MiB do not hold 30."""
    allocator = Allocator(expandable=False)
    for key in "ab":
        allocator.allocate(key, 20 * MIB)
    for key in "ab":
        allocator.free(key)
    allocator.allocate("c", 30 * MIB)
    assert allocator.reserved == 70 * MIB
    allocator.allocate("d", 19.5 * MIB)  # the rest, half a MiB, is no block
    assert allocator.allocated == 50 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_step_takes_the_plan_and_waits_for_nothing():
    s = settings(*"--n_layer=4 --n_embd=1024 --n_head=16 --ffn_dim=2736 --vocab_size=8192".split(),
                 *"--method=qgalore --rank=256 --batch_size=8".split(),
                 *"--checkpoint_activations=True --checkpoint_bits=8".split())
    plan = sum(memory_plan(s, torch.bfloat16, torch.bfloat16).values())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = find(s.method).build(s, "cuda", torch.bfloat16)
    x, y = (t.cuda() for t in tokens(8, 256, 8192))
    losses = []
    for i in range(5):
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        losses.append(model(x, y))
        losses[-1].backward()
    torch.cuda.set_sync_debug_mode("default")
    assert losses[-1] < losses[0]
    workspace = 64 * 2**20  # cuBLAS's
    taken = torch.cuda.max_memory_allocated() - before
    assert taken == pytest.approx(plan, rel=0.05, abs=workspace)


# -----------------------------------------------------------------------------
# what is promised of the recipes


SCREEN = 0.5  # GiB


def rows_by_card():
    """(GB of a card, recipe and flags, GiB in all) of the rows of docs/memory.md."""
    with open(f"{HERE}/docs/memory.md", encoding="utf-8") as f:
        rows = re.findall(r"^\| (\d+) \| .* \| `(config/.*)` \| ([\d.]+) \|", f.read(), re.M)
    return [(int(card), flags, float(whole)) for card, flags, whole in rows]


def test_each_card_has_a_row_that_fits_it_beside_a_screen():
    rows = rows_by_card()
    assert {card for card, *_ in rows} == {8, 10, 12, 16, 24}
    for card, _, whole in rows:
        assert whole + SCREEN <= card * 0.9995  # an RTX 4060 Ti of 16 GB has 16,380 MiB


@pytest.mark.parametrize("row", rows_by_card()[::4], ids=lambda row: f"{row[0]} GB")
def test_a_cards_row_is_what_a_dry_run_says(row):
    _, flags, whole = row
    recipe, *flags = flags.split()
    s = settings(f"{HERE}/{recipe}", *flags, "--dtype=bfloat16")
    plan = memory_plan(s, torch.bfloat16, torch.bfloat16, gpu=Gpu())
    assert (sum(plan.values()) + CONTEXT) / GIB == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize("flags,most", [
    ("", 13.5),  # for 16 GB
    ("--gradient_accumulation_steps=1", 10.9),  # for 12 GB without a screen
    ("config/paper.py", 15.3),
    ("--by_block=True", 11.9),
    ("--method=qmuon --by_block=True", 13.0),
])
def test_llama_7b_is_planned_for_the_card_that_it_names(flags, most):
    """What torch reserves there, GiB."""
    s = settings(f"{HERE}/config/llama_7b.py", *flags.split(), "--dtype=bfloat16")
    assert s.batch_size == 16
    one = "accumulation" in flags  # micro-batch a step
    assert s.gradient_accumulation_steps == (1 if one else 32)
    plan = memory_plan(s, torch.bfloat16, torch.bfloat16, gpu=Gpu())
    assert sum(plan.values()) / GIB <= most, plan
    assert (SUMS in plan) == (not one and not s.by_block)  # by block they are among gradients


def test_the_papers_recipe_is_the_paper_to_the_letter():
    s = settings(f"{HERE}/config/llama_7b.py", f"{HERE}/config/paper.py")
    assert s.method == "qgalore" and s.moments == "8bit" and s.proj_svd
    assert s.proj_bits == 4 and s.weight_bits == 8 and s.stochastic_rounding
    assert s.batch_size * s.gradient_accumulation_steps == 512


# -----------------------------------------------------------------------------
# first bases by SVD: no sums of whole gradients


def svd_model(**options):
    torch.manual_seed(0)
    model = LLaMA(tiny())
    return model, QGaLore(model, rank=8, svd=True, proj_bits=16, gap=4, lr=0.02, **options)


def test_by_svd_a_first_basis_is_the_first_micro_batchs(monkeypatch):
    model, optimizer = svd_model()
    gradients = {}
    for weight in optimizer.weights:

        def watched(layer, x, dy, weight=weight):
            gradients[weight.name] = dy.T @ x
            weight.look(layer, x, dy)

        monkeypatch.setattr(weight.layer, "hook", watched)
    optimizer.accumulating = True
    model(*tokens(seed=0)).backward()
    for weight in optimizer.weights:
        p = weight.projection
        gradient = gradients[weight.name]
        expected = singular_vectors(gradient.T if p.right else gradient, p.rank, p.right)
        overlap = p.matrix().T @ expected  # the same but for signs
        torch.testing.assert_close(overlap.abs(), torch.eye(p.rank), rtol=0, atol=1e-3)
        assert p.refreshes == 1
        assert "sketch" not in weight.sums and weight.sketch is None

    # the step's other micro-batches leave it
    before = [weight.projection.matrix() for weight in optimizer.weights]
    model(*tokens(seed=1)).backward()
    optimizer.accumulating = False
    model(*tokens(seed=2)).backward()
    for weight, p in zip(optimizer.weights, before):
        assert torch.equal(weight.projection.matrix(), p)
        assert not weight.sums


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_by_svd_training_goes_on_after_the_first_bases(grad_clip):
    model, optimizer = svd_model(grad_clip=grad_clip)
    summed = 0  # sketches of two micro-batches
    losses = []
    x, y = tokens(4)
    for _ in range(30):
        optimizer.accumulating = True
        (model(x[:2], y[:2]) / 2).backward()
        sketches = ["sketch" in weight.sums for weight in optimizer.weights]
        assert sum(sketches) < len(sketches)  # never those of all layers at once
        summed += sum(sketches)
        optimizer.accumulating = False
        loss = model(x[2:], y[2:])
        (loss / 2).backward()
        optimizer.step()
        losses.append(loss.item())
    assert summed > 0  # later bases are of the whole step
    assert optimizer.pop_stats()["refreshes"] > 2 * len(optimizer.weights)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_by_svd_two_ranks_take_their_first_bases_once(tmp_path, micro_batches):
    """And at steps of their own the next ones: all at once would sum up all whole gradients."""

    def rank():
        ranks = Ranks("cpu", {}, micro_batches=2 * micro_batches)
        model, optimizer = svd_model(ranks=ranks)
        for i in range(micro_batches):
            optimizer.accumulating = i < micro_batches - 1
            model(*tokens(seed=10 * ranks.rank + i)).backward()
        optimizer.step()
        projections = [weight.projection for weight in optimizer.weights]
        assert {p.refreshes for p in projections} == {1}
        assert {p.next_refresh for p in projections} == {1, 2, 3, 4}
        ranks.leave()

    for code, _, err in Job(tmp_path, rank, rank).wait():
        assert code == 0, err


# -----------------------------------------------------------------------------
# what a user is told


def test_a_run_that_does_not_fit_says_so_before_it_allocates(shards, tmp_path):
    """And a dry run says why."""
    args = [f"{HERE}/config/llama_60m.py", "--device=cpu", "--n_layer=2", "--batch_size=65536",
            "--block_size=1024", f"--out_dir={tmp_path}/out", f"--data_dir={shards}",
            "--encoding=bytes"]
    one_line_error(run("train.py", *args), "activations", "batch_size", "GiB")
    assert not os.path.exists(f"{tmp_path}/out")
    code, out, err = run("train.py", *args, "--dry_run=True")
    assert code == 0, err
    assert "NOT enough" in out and "projections" in out


def test_without_room_for_sums_the_advice_is_not_to_accumulate():
    plan = {"weights": 10, SUMS: 5}
    with pytest.raises(SystemExit, match="lower gradient_accumulation_steps to 1"):
        refuse_what_does_not_fit(plan, 12, "cuda")
