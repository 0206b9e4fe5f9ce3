"""
What fine-tuning stands on, adapters and NF4, and fine-tuning from a checkpoint to a checkpoint:
    python -m pytest tests/test_finetune.py
"""

import copy
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn

import quant
from finetune.adapters import LoRA
from methods.registry import find
from model import QLinear, quantize_linears
from run.checkpoint import load_model
from run.shards import write_shard
from tests.common import HERE, TINY_MODEL, one_line_error, read_log, run, settings, tokens


def test_a_qlinear_with_a_bias_is_torchs_linear_and_trains_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False))
    plain = copy.deepcopy(model)
    assert quantize_linears(model, "0", bits=16) == ["0"]
    assert isinstance(model[0], QLinear)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), plain(x))
    for m in (model, plain):
        m(x).square().sum().backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    with pytest.raises(ValueError, match="no torch Linear"):
        quantize_linears(model, "attention")


def test_nf4_weights_are_bitsandbytes_own_in_half_a_byte():
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = QLinear(128, 96, bits=4)
    layer.set_weight(w)
    bnb = quant.bitsandbytes()[0]
    packed = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = bnb.dequantize_4bit(*packed)
    assert torch.equal(layer.base_weight(), expected)
    assert (expected - w).abs().mean() < 0.1 * w.abs().mean()
    taken = sum(t.nbytes for t in layer.buffers())
    assert taken == w.numel() // 2 + w.numel() // 64 + 8  # and the maximum of maxima, their mean
    other = QLinear(128, 96, bits=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.base_weight(), expected)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_adapter_starts_at_zero_trains_alone_and_merges(bits):
    torch.manual_seed(0)
    layer = QLinear(64, 96, bits=bits)
    x = torch.randn(7, 64)
    before = layer(x)
    layer.adapter = LoRA(96, 64, 4, alpha=8)
    assert torch.equal(layer(x), before)
    base = layer.base_weight()
    layer.adapter.b.data.normal_()
    whole = base + 2 * layer.adapter.b @ layer.adapter.a  # alpha / rank = 2
    torch.testing.assert_close(layer(x), x @ whole.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), x @ layer.float_weight().T, rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert layer.adapter.a.grad.norm() > 0
    assert layer.adapter.b.grad.norm() > 0
    assert torch.equal(layer.base_weight(), base)


# -----------------------------------------------------------------------------
# what moves

SMALL = "--n_layer=2 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=61".split()


def moved(*flags, pretrained="", steps=3):
    """{name: whether it moved} of a small model's weights in a few steps."""
    torch.manual_seed(0)
    s = settings(*SMALL, *flags)
    s.pretrained = pretrained
    model, optimizer = find(s.method).build(s, "cpu", torch.float32)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(steps):  # an adapter's A has no gradient before B moves; first bases move none
        model(*tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: not torch.equal(t, start[name]) for name, t in model.state_dict().items()}


def test_lora_on_a_checkpoint_trains_the_adapters_alone():
    found = moved("--method=lora", "--rank=4", "--checkpoint_activations=True",
                  pretrained="a checkpoint")
    for name, has_moved in found.items():
        assert has_moved == ("adapter" in name), name


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_from_scratch_adapters_embedding_and_norms_train(method):
    """ReLoRA's embedding was once left random: its method has "lora" in its name."""
    found = moved(f"--method={method}", "--rank=4")
    assert found["embed.weight"] and found["head.weight"]
    for name, has_moved in found.items():
        of_matrix = "_proj." in name and "adapter" not in name
        assert has_moved != of_matrix, name


def test_on_a_checkpoint_relora_trains_the_embedding_too():
    found = moved("--method=relora", "--rank=4", pretrained="a checkpoint")
    assert found["embed.weight"] and found["head.weight"] and found["norm.weight"]


def test_a_frozen_embedding_stays_and_all_else_moves():
    found = moved("--method=qgalore", "--rank=4", "--freeze_embedding=True",
                  "--checkpoint_activations=True", pretrained="a checkpoint")
    for name, has_moved in found.items():
        if name.startswith(("embed", "head")):
            assert not has_moved, name
        elif name.endswith((".q", "norm.weight")):
            assert has_moved, name


@pytest.mark.parametrize("method", ["qgalore", "lora", "qlora", "relora", "adamw"])
def test_an_int8_embedding_is_frozen_or_refused(method):
    flags = (*SMALL, f"--method={method}", "--embed_bits=8")
    with pytest.raises(SystemExit, match="embed_bits=8.*freeze_embedding=True"):
        settings(*flags)
    found = moved(f"--method={method}", "--embed_bits=8", "--freeze_embedding=True")
    assert not found["embed.q"] and not found["head.q"]
    assert found["norm.weight"]


def test_micro_batches_of_examples_weigh_each_target_alike(tmp_path):
    """Rows with 1 and with 20 targets: four micro-batches step as one batch of all does."""
    row = 33
    flags = np.zeros((8, row), np.uint8)
    flags[:, 0] = 2  # an example begins
    flags[0::2, 5] = 1  # targets
    flags[1::2, 10:30] = 1
    numbers = np.random.default_rng(0).integers(0, 61, flags.size)
    for part in ("train", "val"):
        write_shard(f"{tmp_path}/x_{part}_0.bin", numbers, 0, flags.ravel(), row)  # of no tokenizer
    losses = []
    in_parts = ["--batch_size=2", "--gradient_accumulation_steps=4"]
    for out, args in (("one", ["--batch_size=8"]), ("two", in_parts)):
        code, _, err = run("train.py", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/{out}",
                           *TINY_MODEL, "--vocab_size=61", "--method=adamw", "--max_iters=3", *args)
        assert code == 0, err
        with open(f"{tmp_path}/{out}/log.jsonl") as f:
            entries = [json.loads(line) for line in f]
        losses.append([entry["loss"] for entry in entries if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -----------------------------------------------------------------------------
# fine-tuning, from a checkpoint to a checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face directory with a tiny LLaMA and its tokenizer, and examples for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["good bad film"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,  # in NF4 bitsandbytes itself needs 64 or a multiple on some CPUs
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)

    with open(folder / "reviews.tsv", "w") as f:
        for i in range(400):
            f.write(f"a {('bad', 'good')[i % 2]} film, number {i}\t{i % 2}\n")
    code, _, err = run(
        "finetune.prepare_sft", f"--input={folder}/reviews.tsv", f"--out_dir={folder}/data",
        f"--encoding={folder}", "--columns=sentence,label", "--labels=bad,good",
        "--prompt={sentence} is", "--completion= {label}", "--block_size=32",
    )
    assert code == 0, err
    return folder


TUNE = (
    "--block_size=32 --batch_size=8 --rank=16 --device=cpu --dtype=float32 --eval_iters=4"
    " --log_interval=1 --warmup_iters=2 --eval_interval=15 --learning_rate=0.01"
).split()


@pytest.mark.parametrize("method", ["--method=qgalore --proj_gap=5 --galore_scale=1.0",
                                    "--method=qlora --embed_bits=8"])
def test_a_checkpoint_is_tuned_resumed_and_exported(checkpoint, tmp_path, method):
    """And transformers computes its logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = ["train.py", f"--data_dir={checkpoint}/data", *TUNE, *method.split(),
            "--lr_decay_iters=60"]
    begin = f"--init_from={checkpoint}"
    for out, *more in (("parts", begin, "--max_iters=30"),
                       ("parts", "--init_from=resume", "--max_iters=60"),
                       ("whole", begin, "--max_iters=60")):
        code, _, err = run(*args, f"--out_dir={tmp_path}/{out}", *more)
        assert code == 0, err
    log = read_log(f"{tmp_path}/parts")
    assert log[60, "val_loss"] < log[30, "val_loss"] < log[0, "val_loss"] - 0.5
    assert read_log(f"{tmp_path}/whole")[60, "val_loss"] == log[60, "val_loss"]

    code, _, err = run("finetune.hf", f"--out_dir={tmp_path}/parts", f"--export={tmp_path}/hf")
    assert code == 0, err
    ours = load_model(f"{tmp_path}/parts", "cpu")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([tokenizer("a good film, number 7 is").input_ids])
    with torch.no_grad():
        logits = ours.logits(ours.hidden(ids))
        error = (theirs(ids).logits - logits).abs().max()
        assert error < 0.02 * logits.abs().max()  # exported in bfloat16
        longer = theirs.generate(ids, max_new_tokens=3, do_sample=False)
        assert longer.shape == (1, ids.shape[1] + 3)


def test_what_does_not_fit_a_checkpoint_is_refused(checkpoint, shards, tmp_path):
    args = ["train.py", f"--out_dir={tmp_path}/out", "--method=qgalore", *TUNE]
    ours = [f"--init_from={checkpoint}", f"--data_dir={checkpoint}/data"]
    for wrong, *words in (
        ([f"--init_from={checkpoint}", f"--data_dir={shards}"], "tokenizer", "text_train"),
        ([*ours, "--block_size=100"], "block_size 100", "64"),
        ([*ours, "--block_size=16"], "block_size 32"),
        ([*ours, "--embed_bits=8"], "embed_bits=8", "freeze_embedding"),
        (["--init_from=nowhere"], "nowhere", "neither a directory"),
        ([f"--init_from={tmp_path}"], "config.json"),
    ):
        one_line_error(run(*args, *wrong), *words)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run(*args, f"--init_from={broken}", f"--data_dir={checkpoint}/data")
    one_line_error(result, "model.safetensors")
    assert not (tmp_path / "out").exists()


def make_roberta(folder):
    """A tiny random RoBERTa with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (PreTrainedTokenizerFast, RobertaConfig,
                              RobertaForSequenceClassification)

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special)
    words.train_from_iterator(["a film awful dull bad lovely fine good"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=13,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=130,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)


def test_the_documents_roberta_learns_sentiment(tmp_path, monkeypatch):
    """docs/fine_tuning.md's program for any torch model, on a tiny random RoBERTa."""
    with open(f"{HERE}/docs/fine_tuning.md") as f:
        document = f.read()
    program = re.search(r"```python\n(import torch\nfrom transformers.*?)```", document, re.S)[1]
    make_roberta(tmp_path / "roberta-base")
    words = {0: ["awful", "dull", "bad"], 1: ["lovely", "fine", "good"]}
    rows = [f"a {random.Random(i).choice(words[i % 2])} film\t{i % 2}\n" for i in range(800)]
    (tmp_path / "train.tsv").write_text("".join(rows[:700]))
    (tmp_path / "dev.tsv").write_text("".join(rows[700:]))
    monkeypatch.chdir(tmp_path)
    # a random model needs larger steps than a trained one
    assert "lr=2e-5" in program and "scale=4.0" in program
    program = program.replace("lr=2e-5", "lr=1e-3").replace("scale=4.0", "scale=1.0")
    found = {}
    exec(program, found)
    assert found["accuracy"] > 0.9
    assert sum(isinstance(m, QLinear) for m in found["model"].modules()) == 12
