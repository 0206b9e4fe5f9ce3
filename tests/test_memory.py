"""
memory.py's plans against real steps:
    python -m pytest test_memory.py
"""

import os

import pytest
import torch

from run import memory
import train
from configurator import configure
from run.memory import Live, memory_plan, refuse_what_does_not_fit
from methods.registry import of_method
from tests.common import HERE, one_line_error, run, tokens

@pytest.mark.parametrize("args", [[], ["--moments=8bit"], ["--checkpoint_activations=True", "--checkpoint_bits=8"],
                                  ["--gradient_accumulation_steps=2"], ["--method=adam8bit"], ["--method=adamw"],
                                  ["--method=galore"], ["--method=lora"], ["--method=qlora"],
                                  ["--freeze_embedding=True", "--accumulation=bfloat16"],
                                  ["--method=adamw", "--gradient_accumulation_steps=2"]])
def test_the_memory_plan_is_what_a_real_step_takes(args):
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    shape = "--n_layer=2 --n_embd=128 --n_head=4 --n_kv_head=4 --ffn_dim=352 --vocab_size=512 --batch_size=4".split()
    config = configure(settings, [*shape, "--rank=32", *args])
    config |= of_method(config)
    plan = memory_plan(config, train.build, torch.float32, torch.float32)
    with Live() as live:
        model, optimizer = train.build(config, "cpu", torch.float32)
        by_torch = isinstance(optimizer, torch.optim.Optimizer)
        for _ in range(2):
            for micro in range(config["gradient_accumulation_steps"]):
                optimizer.accumulating = micro < config["gradient_accumulation_steps"] - 1
                model(*tokens(4, 256, 512)).backward()
            if by_torch:
                optimizer.step()
                optimizer.zero_grad()
    count = lambda tensors: sum(t.nbytes for t in tensors)
    assert plan["weights"] == count([*model.parameters(), *model.buffers()])
    if not by_torch:
        moments = [t for m in optimizer.moments.values() for key, t in vars(m).items()
                   if isinstance(t, torch.Tensor) and not key.endswith("_codes")]  # those are made once for all
        assert plan["moments"] == pytest.approx(count(moments), abs=100)
        assert plan["projections"] == count(t for p in optimizer.projections.values() for t in p.basis)
    assert sum(plan.values()) == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("args", [["--gradient_accumulation_steps=2", "--checkpoint_activations=True"],
                                  ["--method=loqt", "--weight_bits=8"],
                                  ["--gradient_accumulation_steps=2", "--proj_gap=2"]])
def test_a_deep_model_is_planned_to_the_byte_from_the_blocks_of_two_shallow_ones(args, monkeypatch):
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    shape = "--n_layer=7 --n_embd=64 --n_head=4 --n_kv_head=4 --ffn_dim=176 --vocab_size=512 --batch_size=2".split()
    config = configure(settings, [*shape, "--rank=16", *args])
    config |= of_method(config)
    whole = memory_plan(config, train.build, torch.float32, torch.float32)
    monkeypatch.setattr(memory, "MORE", 3)  # until now seven blocks were few
    assert whole == memory_plan(config, train.build, torch.float32, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_step_takes_the_planned_memory_and_waits_for_nothing():
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    shape = "--n_layer=4 --n_embd=1024 --n_head=16 --n_kv_head=16 --ffn_dim=2736 --vocab_size=8192 --rank=256".split()
    config = configure(settings, [*shape, "--batch_size=8", "--checkpoint_activations=True", "--checkpoint_bits=8"])
    plan = sum(memory_plan(config, train.build, torch.bfloat16, torch.bfloat16).values())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, optimizer = train.build(config, "cuda", torch.bfloat16)
    x, y = (t.cuda() for t in tokens(8, 256, 8192))
    losses = []
    for step in range(5):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        losses.append(model(x, y))
        losses[-1].backward()
    torch.cuda.set_sync_debug_mode("default")
    assert losses[-1] < losses[0]
    workspace = 64 * 2**20  # cuBLAS's
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(plan, rel=0.05, abs=workspace)


def test_llama_7b_is_planned_for_a_16_gb_card_and_without_accumulation_for_a_12_gb_card():
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    config = configure(settings, [f"{HERE}/config/llama_7b.py", "--n_kv_head=32"])
    assert config["batch_size"] * config["gradient_accumulation_steps"] == 512
    plan = memory_plan(config, train.build, torch.bfloat16, torch.bfloat16)
    assert sum(plan.values()) / 2**30 <= 14.6
    assert (sum(plan.values()) - plan["sums of micro-batches"]) / 2**30 <= 11.5


def test_a_run_that_does_not_fit_says_so_before_it_allocates_and_a_dry_run_says_why(tmp_path):
    args = [f"{HERE}/config/llama_60m.py", "--device=cpu", "--n_layer=2", "--batch_size=262144",
            f"--out_dir={tmp_path}/out"]
    one_line_error(run("train.py", *args), "activations", "batch_size", "GiB")
    assert not os.path.exists(f"{tmp_path}/out")
    code, out, err = run("train.py", *args, "--dry_run=True")
    assert code == 0 and "NOT enough" in out and "projections" in out


def test_without_room_for_the_sums_of_micro_batches_alone_the_advice_is_not_to_accumulate():
    with pytest.raises(SystemExit, match="lower gradient_accumulation_steps to 1"):
        refuse_what_does_not_fit({"weights": 10, "sums of micro-batches": 5}, 12, "cuda")
