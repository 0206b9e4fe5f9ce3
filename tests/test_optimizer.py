"""
QGaLore in others' hands: torch's schedulers, accelerate, transformers' Trainer, models of any kind:
    python -m pytest tests/test_optimizer.py

Most compare with a plain torch model and torch's Adam. At full rank, with nothing quantised, the
method is Adam.
"""

import copy
import io
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.checkpoint import checkpoint

from model import LLaMA, QLinear, quantize_linears
from qgalore import QGaLore
from tests.common import tiny, tokens

EPS = 1e-5  # of Adam: where gradients vanish, rounding errors would decide a step of size 1


def adam_like(model, lr=0.01, **options):
    """QGaLore at full rank, with nothing quantised."""
    exact = {"rank": 1000, "scale": 1.0, "proj_bits": 16, "moments": "float32",
             "accumulation": "float32", "eps": EPS}
    return QGaLore(model, lr=lr, **(exact | options))


def with_torch_linears(model):
    """A copy of a model, with torch's Linears in the place of QLinears of 16 bits."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data.copy_(module.weight)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def assert_same_weights(ours, theirs, rtol=1e-4, atol=1e-6):
    theirs = theirs.state_dict()
    ours = ours.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=atol,
                                   msg=lambda m: f"{name}: {m}")


def same_bits(a, b):
    """Whether two states, or models, are equal bit for bit."""
    a, b = [of.state_dict() if isinstance(of, nn.Module) else of for of in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def mixed(bits=16, seed=0):
    """QLinears of three shapes, a Linear with a bias, norms between them: (B, 24) to (B, 8)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        QLinear(24, 40, bits=bits), nn.LayerNorm(40), nn.GELU(),
        QLinear(40, 32, bias=True, bits=bits), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(),
        QLinear(32, 8, bits=bits),
    )


def batch(seed, n=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 24, generator=generator)
    return x, torch.randn(n, 8, generator=generator)


def mean_square(model, x, y):
    return (model(x) - y).square().mean()


# -----------------------------------------------------------------------------
# torch's own: schedulers, states, closures


def test_it_is_one_of_torchs_optimizers():
    model = mixed()
    optimizer = QGaLore(model, lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer) and "QGaLore" in repr(optimizer)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.1
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", [
    partial(LambdaLR, lr_lambda=lambda step: 0.5**step), partial(CosineAnnealingLR, T_max=6),
], ids=["LambdaLR", "CosineAnnealingLR"])
def test_torchs_schedulers_set_the_rate_that_weights_move_at(kind):
    torch.manual_seed(0)
    model = nn.Sequential(QLinear(6, 10, bits=16), QLinear(10, 6, bits=16), nn.Linear(6, 6))
    # without means over steps, each of Adam's is plus or minus the rate
    optimizer = adam_like(model, lr=0.25, betas=(0.0, 0.0), eps=1e-20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = kind(optimizer)
        rates = []
        for _ in range(6):
            before = copy.deepcopy(model.state_dict())
            rates.append(scheduler.get_last_lr()[0])
            mean_square(model, torch.randn(9, 6), torch.randn(9, 6)).backward()
            optimizer.step()
            scheduler.step()
            for name, after in model.state_dict().items():
                moved = (after - before[name]).abs()
                expected = torch.full_like(moved, rates[-1])
                torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    assert rates[0] == 0.25 and all(a > b for a, b in zip(rates, rates[1:]))


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("moments", ["factored", "8bit", "float32"])
def test_a_state_that_is_loaded_continues_bit_for_bit(tmp_path, steps, moments):
    def fresh():
        torch.manual_seed(0)
        model = LLaMA(tiny(n_embd=64, vocab_size=130))
        optimizer = QGaLore(model, rank=40, gap=2, threshold=0.0, k=1, moments=moments)
        return model, optimizer, CosineAnnealingLR(optimizer, 12)

    def train(model, optimizer, scheduler, first, n):
        losses = []
        for i in range(first, first + n):
            loss = model(*tokens(vocab=130, seed=i))
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    whole = fresh()
    train(*whole, 0, steps)
    torch.save([part.state_dict() for part in whole], tmp_path / "state")
    expected = train(*whole, steps, 5)
    again = fresh()
    for part, state in zip(again, torch.load(tmp_path / "state", weights_only=True)):
        part.load_state_dict(state)
    assert train(*again, steps, 5) == expected
    assert same_bits(whole[0], again[0])
    assert again[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


def test_a_loaded_state_shares_no_memory_with_where_it_came_from():
    first = mixed(bits=8)
    optimizer = QGaLore(first, rank=4, gap=2)
    mean_square(first, *batch(0)).backward()
    second = mixed(bits=8)
    other = QGaLore(second, rank=4, gap=2)
    other.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    start = copy.deepcopy(first.state_dict())
    for i in range(3):  # the first alone goes on
        mean_square(first, *batch(1 + i)).backward()
    assert same_bits(second, start) and not same_bits(first, start)
    for i in range(3):
        mean_square(second, *batch(1 + i)).backward()
    assert same_bits(first, second)


@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_a_model_belongs_to_no_optimizer(attached):
    """By copy.deepcopy, or torch.save and torch.load of the whole model."""
    model = mixed(bits=8)
    if attached:
        QGaLore(model, rank=4)
        mean_square(model, *batch(0)).backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    start = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert same_bits(other, model)
        mean_square(other, *batch(1)).backward()
        assert same_bits(other, start) and same_bits(model, start)
        assert all(p.grad is not None for p in other.parameters())
        optimizer = QGaLore(other, rank=4)  # it may have one of its own
        optimizer.zero_grad()
        for i in range(2):
            mean_square(other, *batch(i)).backward()
        assert same_bits(model, start) and not same_bits(other, start)


def test_the_last_optimizer_of_a_model_is_the_one_that_trains_it():
    """As in a notebook, whose cell runs twice."""
    model = LLaMA(tiny())
    before = copy.deepcopy(model)
    first = QGaLore(model, lr=0.1, rank=4)
    second = QGaLore(model, lr=0.0, rank=4)
    for _ in range(2):
        model(*tokens()).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    assert {t.step for t in first.trained.values()} == {-1}
    assert {t.step for t in second.trained.values()} == {1}


def test_step_takes_a_closure():
    ours = mixed()
    theirs = with_torch_linears(ours)
    optimizer = adam_like(ours)
    adam = torch.optim.Adam(theirs.parameters(), 0.01, eps=EPS)
    for i in range(5):

        def closure():
            optimizer.zero_grad()
            loss = mean_square(ours, *batch(i))
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        adam.zero_grad()
        expected = mean_square(theirs, *batch(i))
        expected.backward()
        adam.step()
        torch.testing.assert_close(loss, expected)
    assert_same_weights(ours, theirs)


# -----------------------------------------------------------------------------
# micro-batches


def accumulate(parts, calls_step, grad_clip=0.0, **options):
    """A model after six steps, each on its batch in `parts`; refreshes among them.

    calls_step: all micro-batches say that more come, and step() ends the step. Else the last one
    ends it."""
    torch.manual_seed(0)
    model = LLaMA(tiny(), linear=partial(QLinear, bits=16))
    options = {"rank": 8, "gap": 2, "threshold": 2.0} | options
    optimizer = adam_like(model, grad_clip=grad_clip, **options)
    for step in range(6):
        x, y = tokens(4, seed=step)
        micro_batches = list(zip(x.chunk(parts), y.chunk(parts)))
        for i, (part_x, part_y) in enumerate(micro_batches):
            optimizer.accumulating = calls_step or i < parts - 1
            (model(part_x, part_y) / parts).backward()
        if calls_step or grad_clip:
            optimizer.step()
    assert all(t.step == 5 for t in optimizer.trained.values())
    return model


@pytest.mark.parametrize("rank", [8, 1000])
@pytest.mark.parametrize("calls_step", [True, False])
def test_micro_batches_make_the_step_of_their_batch(rank, calls_step):
    whole = accumulate(1, False, rank=rank)
    parts = accumulate(2, calls_step, rank=rank)
    assert_same_weights(parts, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts,grad_clip", [(1, 0.0), (2, 0.0), (4, 0.0), (2, 0.05), (4, 0.05)])
def test_step_ends_what_no_backward_ended(parts, grad_clip):
    assert same_bits(accumulate(parts, True, grad_clip), accumulate(parts, False, grad_clip))


# not (1, False): a weight that steps in backward knows the last step's norms
@pytest.mark.parametrize("parts,calls_step", [(1, True), (2, True), (2, False)])
def test_clipping_by_the_steps_own_norm_is_torchs(parts, calls_step):
    ours = mixed()
    theirs = with_torch_linears(ours)
    optimizer = adam_like(ours, grad_clip=0.05, betas=(0.5, 0.9))
    adam = torch.optim.Adam(theirs.parameters(), 0.01, (0.5, 0.9), EPS)
    for i in range(8):
        for part in range(parts):
            x, y = batch(parts * i + part)
            optimizer.accumulating = calls_step or part < parts - 1
            loss = (1 + i) * mean_square(ours, x, y) / parts  # so that norms differ by step
            loss.backward()
            ((1 + i) * mean_square(theirs, x, y) / parts).backward()
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        assert norm > 0.1 and optimizer.pop_stats()["grad_norm"] == pytest.approx(norm.item(), 1e-3)
        adam.step()
        adam.zero_grad()
    assert_same_weights(ours, theirs)


def test_step_after_steps_in_backward_changes_nothing():
    model = mixed(bits=8)
    optimizer = QGaLore(model, rank=4)
    mean_square(model, *batch(0)).backward()
    mean_square(model, *batch(1)).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    optimizer.step()
    assert same_bits(model, before)
    assert all(t.step == 1 for t in optimizer.trained.values())


@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_zero_grad_before_step_forgets_the_gradient(grad_clip):
    models = []
    for forgets in (False, True):
        model = mixed()
        optimizer = adam_like(model, grad_clip=grad_clip)
        optimizer.accumulating = True
        for i in range(5):
            if forgets:
                mean_square(model, *batch(100 + i)).backward()
                optimizer.zero_grad()
                assert all(p.grad is None for p in model.parameters())
            mean_square(model, *batch(2 * i)).backward()
            mean_square(model, *batch(2 * i + 1)).backward()
            optimizer.step()
        models.append(model)
    assert same_bits(*models)


def test_a_step_that_is_forgotten_does_not_count():
    """Neither for refreshes nor for the numbers that round: training goes on as without it."""
    models = []
    for forgets in (False, True):
        model = mixed(bits=8)
        optimizer = QGaLore(model, rank=4, gap=3)
        optimizer.accumulating = True
        for i in range(8):
            if forgets:
                mean_square(model, *batch(100 + i)).backward()
                optimizer.zero_grad()
            mean_square(model, *batch(i)).backward()
            optimizer.step()
        assert {t.step for t in optimizer.trained.values()} == {7}
        models.append(model)
    assert same_bits(*models)


def test_zero_grad_forgets_a_step_that_waits_for_the_norm():
    models = []
    for forgets in (False, True):
        model = mixed()
        optimizer = adam_like(model, grad_clip=0.05)
        for i in range(5):
            for seed in ([100 + i] if forgets else []) + [i]:
                optimizer.zero_grad()
                for more in (True, False):
                    optimizer.accumulating = more
                    (mean_square(model, *batch(2 * seed + more)) / 2).backward()
            optimizer.step()
        models.append(model)
    assert same_bits(*models)


def test_after_zero_grad_weights_step_in_backward_again():
    model = mixed()
    optimizer = adam_like(model, grad_clip=0.05)
    optimizer.accumulating = True
    mean_square(model, *batch(0)).backward()
    optimizer.zero_grad()
    optimizer.accumulating = False
    for i in range(3):  # no weight waits for step()
        before = copy.deepcopy(model.state_dict())
        mean_square(model, *batch(i)).backward()
        assert not any(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# -----------------------------------------------------------------------------
# accelerate and transformers


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerate, parts):
    """What train() below makes of a run, by accelerate."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model = mixed(bits=8)
    inner = QGaLore(model, rank=4, gap=3)
    inner.accumulating = parts > 1
    scheduler = CosineAnnealingLR(inner, 12)
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    losses = []
    for i in range(12):
        for part in range(parts):
            with accelerator.accumulate(model):
                loss = mean_square(model, *batch(parts * i + part))
                accelerator.backward(loss)  # divides by parts
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert inner.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert all(t.step == 11 for t in inner.trained.values())
    return accelerator.unwrap_model(model), losses


def by_hand(parts):
    model = mixed(bits=8)
    optimizer = QGaLore(model, rank=4, gap=3)
    optimizer.accumulating = parts > 1
    scheduler = CosineAnnealingLR(optimizer, 12)
    losses = []
    for i in range(12):
        for part in range(parts):
            loss = mean_square(model, *batch(parts * i + part))
            (loss / parts).backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("parts", [1, 2])
def test_accelerate_trains_as_a_loop_by_hand_does(accelerate, parts):
    model, losses = prepared(accelerate, parts)
    expected, expected_losses = by_hand(parts)
    assert losses == expected_losses and same_bits(model, expected)


def test_accelerate_trains_in_bfloat16(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = mixed(bits=8)
    optimizer = QGaLore(model, rank=8)
    model, optimizer = accelerator.prepare(model, optimizer)
    x, y = batch(0)
    losses = []
    for _ in range(60):
        loss = mean_square(model, x, y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def sequences(n=4, length=16):
    """A handful of token sequences, which a model can learn by heart."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (n, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows] * 50


def trainer(folder, model, optimizer, parts, steps=30, **arguments):
    """transformers' Trainer of a model on sequences(), at a rate that falls to 0."""
    from transformers import Trainer, TrainingArguments

    options = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
               "logging_steps": 1, "per_device_train_batch_size": 4,
               "gradient_accumulation_steps": parts, "max_steps": steps}
    args = TrainingArguments(output_dir=str(folder), **(options | arguments))
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
    data = sequences()
    return Trainer(model, args, train_dataset=data, optimizers=(optimizer, scheduler))


def logged(of, what):
    return [entry[what] for entry in of.state.log_history if what in entry]


@pytest.mark.parametrize("bits,parts,arguments", [
    (8, 1, {}), (8, 2, {}), (16, 1, {}), (16, 2, {"max_grad_norm": 0}),
    (8, 2, {"gradient_checkpointing": True}),
], ids=["1", "2", "1 float", "2 float unclipped", "2 checkpointed"])
def test_transformers_trainer_fine_tunes(accelerate, tmp_path, bits, parts, arguments):
    model = tiny_llama()
    names = quantize_linears(model, r"layers\.", bits=bits)
    assert len(names) == 2 * 7
    optimizer = QGaLore(model, lr=0.02, rank=8, gap=10, scale=1.0)
    optimizer.accumulating = parts > 1  # once: Trainer's own step() ends each step
    start = {name: model.get_submodule(name).float_weight().clone() for name in names}
    job = trainer(tmp_path, model, optimizer, parts, **arguments)
    job.train()
    losses = logged(job, "loss")
    assert len(losses) == 30 and losses[0] > 4 and losses[-1] < 0.5 * losses[0], losses
    assert logged(job, "learning_rate")[1:3] == pytest.approx([0.02 * 29 / 30, 0.02 * 28 / 30])
    # as many steps as Trainer made, of every weight
    assert all(t.step == 29 for t in optimizer.trained.values())
    for name, before in start.items():
        assert not torch.equal(model.get_submodule(name).float_weight(), before)


@pytest.mark.parametrize("parts", [1, 2])
def test_trainer_makes_adams_steps_where_nothing_is_quantised(accelerate, tmp_path, parts):
    states = []
    for ours in (True, False):
        model = tiny_llama()
        if ours:
            quantize_linears(model, r"layers\.", bits=16)
            optimizer = adam_like(model)
            optimizer.accumulating = parts > 1
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=EPS)
        trainer(tmp_path, model, optimizer, parts, steps=6, max_grad_norm=0).train()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-4)


def test_trainer_resumes_from_its_own_checkpoint(accelerate, tmp_path):
    models = []
    for resumes in (False, True):
        model = tiny_llama()
        quantize_linears(model, r"layers\.")
        optimizer = QGaLore(model, lr=0.02, rank=8, gap=3)
        save = {"save_strategy": "steps", "save_steps": 4}
        if resumes:
            job = trainer(tmp_path, model, optimizer, 1, steps=8, **save)
            job.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        else:
            trainer(tmp_path, model, optimizer, 1, steps=8, **save).train()
        models.append(model)
    assert same_bits(*models)


# -----------------------------------------------------------------------------
# parameters of any kind


class Shapes(nn.Module):
    """Parameters of 0 to 4 dimensions, each of which can be trained to a target; an empty one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for n in range(5):
            shape = (3, 5, 4, 2)[:n]
            self.register_parameter(f"p{n}", nn.Parameter(torch.randn(shape)))
        self.empty = nn.Parameter(torch.randn(0, 3, 3))

    def loss(self):
        return sum((p - 0.5).square().sum() for p in self.parameters())


def test_parameters_of_any_number_of_dimensions_step_as_adams():
    ours = Shapes()
    theirs = Shapes()
    assert [p.ndim for p in ours.parameters()] == [0, 1, 2, 3, 4, 3]
    QGaLore(ours, lr=0.01, weight_decay=0.1)
    groups = [{"params": [theirs.p0, theirs.p1], "weight_decay": 0.0},
              {"params": [theirs.p2, theirs.p3, theirs.p4, theirs.empty], "weight_decay": 0.1}]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(20):
        ours.loss().backward()
        theirs.loss().backward()
        adamw.step()
        adamw.zero_grad()
    assert_same_weights(ours, theirs)


def convolutions(dtype, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 32, 3), nn.GELU(),
                          nn.Conv2d(32, 4, 1), nn.Flatten(), QLinear(64, 10, bias=True))
    return model.to(dtype).to(memory_format=memory_format)


FLOATS = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("moments", ["factored", "8bit", "float32"])
def test_a_convolution_trains_in_any_layout(dtype, layout, moments):
    model = convolutions(dtype, layout)
    optimizer = QGaLore(model, lr=0.005, rank=8, moments=moments)
    kinds = {name: t.moments.kind for name, t in optimizer.trained.items()}
    assert kinds["2.weight"] == moments and kinds["2.bias"] == "float32"
    x = torch.randn(16, 3, 8, 8).to(dtype).contiguous(memory_format=layout)
    y = torch.randint(10, (16,))
    start = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    for name, p in model.named_parameters():
        assert not torch.equal(p, start[name]) and p.dtype == dtype
        assert p.isfinite().all()
        if p.ndim == 4:
            assert p.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("moments", ["factored", "8bit", "float32"])
def test_a_layout_in_memory_changes_no_step(moments):
    models = []
    for layout in LAYOUTS:
        model = convolutions(torch.float32, layout)
        optimizer = QGaLore(model, lr=0.01, moments=moments)
        for i in range(6):  # gradients that do not depend on how a convolution is computed
            generator = torch.Generator().manual_seed(i)
            optimizer.zero_grad()
            for p in model.parameters():
                gradient = torch.randn(p.shape, generator=generator)
                (p * gradient).sum().backward()
        models.append(model)
    assert_same_weights(*models, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_parameter_that_is_a_transposed_view_trains(dtype):
    torch.manual_seed(0)
    model = nn.Linear(80, 64, bias=False)
    model.weight = nn.Parameter(torch.randn(80, 64).to(dtype).T)
    assert not model.weight.is_contiguous()
    QGaLore(model, lr=0.05)
    distances = []
    for _ in range(20):
        distance = model.weight.float().square().mean()
        distance.backward()
        distances.append(distance.item())
    assert distances[-1] < 0.2 * distances[0]


def test_a_tied_parameter_makes_one_step():
    ours = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11, bias=False))
    ours[1].weight = ours[0].weight
    theirs = copy.deepcopy(ours)
    optimizer = adam_like(ours)
    adam = torch.optim.Adam(theirs.parameters(), 0.01, eps=EPS)
    assert list(optimizer.trained) == ["0.weight"]
    for i in range(5):
        x, y = tokens(2, 9, 11, seed=i)
        for model in (ours, theirs):
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        adam.step()
        adam.zero_grad()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_model_under_autocast_trains(bits):
    model = mixed(bits)
    QGaLore(model, lr=0.01, rank=8, gap=10)
    seen = set()
    for layer in (model[0], model[3], model[7]):
        hook = layer.hook

        def watch(layer, x, dy, hook=hook):
            seen.add((x.dtype, dy.dtype))
            hook(layer, x, dy)

        layer.hook = watch
    x, y = batch(0)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.bfloat16):
            loss = mean_square(model, x, y)
        loss.backward()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], losses
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_autocast_makes_nearly_the_float32_steps():
    models = []
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model = mixed()
        start = copy.deepcopy(model.state_dict())
        adam_like(model)
        for i in range(10):
            with autocast:
                loss = mean_square(model, *batch(i))
            loss.backward()
        models.append(model)
    for name, t in models[0].state_dict().items():
        difference = (models[1].state_dict()[name] - t).norm()
        assert difference < 0.2 * (t - start[name]).norm(), name


# -----------------------------------------------------------------------------
# layers used twice, not at all, or again in backward


class Twice(nn.Module):
    """One QLinear used twice. mode: what else its forwards do."""

    def __init__(self, mode="", bits=16):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(24, 24)
        self.shared = QLinear(24, 24, bias=True, bits=bits)
        self.norm = nn.LayerNorm(24)
        self.outer = QLinear(24, 8, bits=bits)
        self.mode = mode
        self.kept = []

    def forward(self, x):
        x = self.inner(x)
        if self.mode == "a result is dropped":
            self.shared(x)
        if self.mode == "a result is kept":
            self.kept.append(self.shared(x))
        x = torch.tanh(self.shared(x))
        x = self.norm(torch.tanh(self.shared(x)))
        return self.outer(x)


MODES = ["", "a result is dropped", "a whole forward is dropped", "a result is kept",
         "a whole forward is kept"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_layer_used_twice_makes_the_step_of_both_gradients(mode, parts):
    ours = Twice(mode)
    theirs = with_torch_linears(ours)
    theirs.mode = ""
    optimizer = adam_like(ours)
    adam = torch.optim.Adam(theirs.parameters(), 0.01, eps=EPS)
    kept = []
    for i in range(8):
        for part in range(parts):
            x, y = batch(parts * i + part)
            optimizer.accumulating = part < parts - 1
            if mode == "a whole forward is dropped":
                ours(x)
            if mode == "a whole forward is kept":
                kept.append(ours(x))
            mean_square(ours, x, y).backward()
            mean_square(theirs, x, y).backward()
            if "kept" not in mode and not optimizer.accumulating:  # the step was in backward
                assert all(t.ended for t in optimizer.trained.values())
        optimizer.step()  # a forward that is kept might still have its backward: this says no
        adam.step()
        adam.zero_grad()
    assert all(t.step == 7 for t in optimizer.trained.values())
    assert_same_weights(ours, theirs)


def test_without_gradients_a_forward_is_no_use_of_a_layer():
    model = Twice()
    optimizer = adam_like(model)
    x, y = batch(0)
    with torch.no_grad():
        kept = [model(x), model.shared(x)]
    with torch.inference_mode():
        kept.append(model(x))
    mean_square(model, x, y).backward()
    assert all(t.step == 0 and t.ended for t in optimizer.trained.values()) and len(kept) == 3


def test_a_layer_that_gets_no_gradient_stays():
    torch.manual_seed(0)
    model = nn.ModuleList([QLinear(24, 8), QLinear(24, 8), nn.Linear(24, 8), nn.Linear(24, 8)])
    optimizer = QGaLore(model, lr=0.1, rank=4)
    before = copy.deepcopy(model.state_dict())
    for i in range(4):
        x, y = batch(i)
        optimizer.accumulating = i % 2 == 0
        (model[0](x) + model[2](x) - y).square().mean().backward()
        optimizer.step()
    for name, t in model.state_dict().items():
        if name[0] in "13":
            assert torch.equal(t, before[name]), name
    assert not torch.equal(model[0].q, before["0.q"])
    assert not torch.equal(model[2].weight, before["2.weight"])


class Blocks(nn.Module):
    """Two residual blocks with QLinears, which torch.utils.checkpoint makes again in backward.

    reentrant: its use_reentrant; None: no checkpoints. The blocks may use one layer twice, and
    may share one."""

    def __init__(self, reentrant, twice, shared, bits=8):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.twice = twice
        self.inner = nn.Linear(24, 32)
        self.up = nn.ModuleList([QLinear(32, 32, bias=True, bits=bits) for _ in range(2)])
        if shared:
            self.up[1] = self.up[0]
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.down = nn.ModuleList([QLinear(32, 32, bits=bits) for _ in range(2)])
        self.outer = QLinear(32, 8, bits=bits)

    def block(self, x, i):
        h = F.gelu(self.up[i](self.norms[i](x)))
        if self.twice:
            h = F.gelu(self.up[i](h))
        return x + self.down[i](h)

    def forward(self, x):
        x = self.inner(x)
        for i in range(2):
            if self.reentrant is None:
                x = self.block(x, i)
            else:
                x = checkpoint(self.block, x, i, use_reentrant=self.reentrant)
        return self.outer(x)


def train_blocks(reentrant, twice, shared, accumulating, parts=1):
    model = Blocks(reentrant, twice, shared)
    optimizer = QGaLore(model, rank=8, gap=3, lr=0.05)
    for i in range(8):
        for part in range(parts):
            optimizer.accumulating = accumulating or part < parts - 1
            mean_square(model, *batch(parts * i + part)).backward()
        if accumulating:
            optimizer.step()
        assert all(t.ended for t in optimizer.trained.values())
    assert all(t.step == 7 for t in optimizer.trained.values())
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_torchs_checkpoints_change_no_step(reentrant, twice, parts):
    expected = train_blocks(None, twice, shared=False, accumulating=False, parts=parts)
    found = train_blocks(reentrant, twice, shared=False, accumulating=False, parts=parts)
    assert same_bits(expected, found)


@pytest.mark.parametrize("reentrant,accumulating", [(False, False), (False, True), (True, True)])
def test_checkpointed_blocks_may_share_a_layer(reentrant, accumulating):
    """The reentrant kind hides a layer's other use until backward: there step() ends the step."""
    expected = train_blocks(None, twice=False, shared=True, accumulating=accumulating)
    found = train_blocks(reentrant, twice=False, shared=True, accumulating=accumulating)
    assert same_bits(expected, found)


# -----------------------------------------------------------------------------
# frozen parts, devices


def test_frozen_parts_stay_and_layers_below_them_train():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.GELU(),
                          nn.Linear(24, 24), nn.Linear(24, 8))
    for layer in (model[1], model[2], model[5]):
        layer.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    plain = copy.deepcopy(model)
    assert quantize_linears(model, r"[0245]", bits=16) == ["0", "2", "4", "5"]
    assert [model[i].trains for i in (0, 2, 4, 5)] == [True, False, True, False]
    optimizer = adam_like(model)
    assert set(optimizer.trained) == {"0", "0.bias", "4"}
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 0.01, eps=EPS)
    before = copy.deepcopy(model.state_dict())
    for i in range(8):
        mean_square(model, *batch(i)).backward()
        mean_square(plain, *batch(i)).backward()
        adam.step()
        adam.zero_grad()
    assert_same_weights(model, plain)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) == (name not in ("0.weight", "0.bias", "4.weight"))
    assert all(p.grad is None for p in model.parameters())


def test_frozen_int8_layers_keep_their_codes_and_pass_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8))
    model[1].requires_grad_(False)
    quantize_linears(model)
    optimizer = QGaLore(model, rank=4)
    before = copy.deepcopy(model.state_dict())
    for i in range(3):
        mean_square(model, *batch(i)).backward()
        optimizer.step()
    for name, t in model.state_dict().items():
        if name.startswith("1."):
            assert torch.equal(t, before[name]), name
    assert not torch.equal(model[0].q, before["0.q"])
    assert not torch.equal(model[2].q, before["2.q"])


def test_a_model_of_int8_weights_alone_trains():
    model = nn.Sequential(QLinear(24, 32), nn.Tanh(), QLinear(32, 8))
    assert list(model.parameters()) == []
    optimizer = QGaLore(model, lr=0.1, rank=4)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    x, y = batch(0)
    losses = []
    for _ in range(30):
        loss = mean_square(model, x, y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**30)


@pytest.mark.parametrize("kind", [nn.Linear, QLinear])
def test_a_model_on_two_devices_is_refused_with_both(kind):
    model = nn.Sequential(nn.LayerNorm(8), kind(8, 8), kind(8, 8, device="meta"))
    with pytest.raises(ValueError) as e:
        QGaLore(model)
    for words in ("several devices", "0.weight on cpu", "2.", "on meta"):
        assert words in str(e.value)
    assert "\n" not in str(e.value)
    # nothing was attached to the model that was refused
    for layer in model:
        assert getattr(layer, "hook", None) is None


@pytest.mark.parametrize("wrong", [{"moments": "4bit"}, {"proj_bits": 5}, {"side": "up"},
                                   {"accumulation": "half"}])
def test_arguments_that_there_are_not_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*{value}"):
        QGaLore(mixed(), **wrong)
