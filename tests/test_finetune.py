"""
The methods that train.py compares, and fine-tuning from a checkpoint to a checkpoint:
    python -m pytest test_methods.py
"""

import copy
import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import quant
import train
from finetune.adapters import LoRA
from run.checkpoint import load_model
from configurator import configure
from model import QLinear, quantize_linears
from run.shards import write_shard
from tests.common import HERE, TINY_RUN, one_line_error, read_log, run, tokens


def test_a_qlinear_with_a_bias_is_torchs_linear_and_its_bias_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False))
    plain = copy.deepcopy(model)
    assert quantize_linears(model, "0", bits=16) == ["0"] and isinstance(model[0], QLinear)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), plain(x))
    for m in (model, plain):
        m(x).square().sum().backward()
    torch.testing.assert_close(model[0].bias.grad, plain[0].bias.grad)
    with pytest.raises(ValueError, match="no torch Linear"):
        quantize_linears(model, "attention")


def test_nf4_weights_take_a_little_over_half_a_byte_and_are_bitsandbytes_own():
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    layer = QLinear(128, 96, bits=4)
    layer.set_weight(w)
    bnb = quant.bitsandbytes()[0]
    expected = bnb.dequantize_4bit(*bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4"))
    assert torch.equal(layer.base_weight(), expected)
    assert (expected - w).abs().mean() < 0.1 * w.abs().mean()
    assert sum(t.nbytes for t in layer.buffers()) == w.numel() // 2 + w.numel() // 64 + 8  # maximum of maxima, mean
    other = QLinear(128, 96, bits=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.base_weight(), expected)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_adapter_starts_at_nothing_trains_alone_and_merges_to_what_it_computes(bits):
    torch.manual_seed(0)
    layer, x = QLinear(64, 96, bits=bits), torch.randn(7, 64)
    before = layer(x)
    layer.adapter = LoRA(96, 64, 4, alpha=8)
    assert torch.equal(layer(x), before)
    base = layer.base_weight()
    layer.adapter.b.data.normal_()
    torch.testing.assert_close(layer(x), x @ (base + 2 * layer.adapter.b @ layer.adapter.a).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), x @ layer.float_weight().T, rtol=1e-4, atol=1e-4)
    layer(x).sum().backward()
    assert layer.adapter.a.grad.norm() > 0 and layer.adapter.b.grad.norm() > 0
    assert torch.equal(layer.base_weight(), base)


def test_lora_trains_the_adapters_and_nothing_else_and_a_frozen_embedding_stays():
    settings = {key: value for key, value in vars(train).items() if not key.startswith("_")}
    shape = "--n_layer=2 --n_embd=64 --n_head=2 --ffn_dim=96 --vocab_size=61 --rank=4 --checkpoint_activations=True"
    for args, moves in (("--method=lora", "adapter"), ("--method=qgalore --freeze_embedding=True", "")):
        torch.manual_seed(0)
        config = configure(dict(settings), [*shape.split(), *args.split()])
        config |= {"n_kv_head": 2, "pretrained": "a checkpoint"}
        model, optimizer = train.build(config, "cpu", torch.float32)
        start = {name: t.clone() for name, t in model.state_dict().items()}
        for _ in range(3):  # an adapter's A has no gradient before B has moved; a first basis moves no weight
            model(*tokens()).backward()
            optimizer.step()
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.zero_grad()
        for name, t in model.state_dict().items():
            if moves:
                assert torch.equal(t, start[name]) == (moves not in name), name
            elif name.startswith(("embed", "head")):
                assert torch.equal(t, start[name]), name
            elif name.endswith((".q", "norm.weight")):
                assert not torch.equal(t, start[name]), name


def test_micro_batches_of_examples_weigh_each_target_alike(tmp_path):
    """Rows with 1 and with 20 targets: two micro-batches step as one batch of both does."""
    row, flags = 33, np.zeros((8, 33), np.uint8)
    flags[:, 0] = 2
    flags[0::2, 5], flags[1::2, 10:30] = 1, 1
    numbers = np.random.default_rng(0).integers(0, 61, flags.size)
    for part in ("train", "val"):
        write_shard(f"{tmp_path}/x_{part}_0.bin", numbers, 61, flags.ravel(), row)
    losses = []
    for out, args in (("one", ["--batch_size=8"]),
                      ("two", ["--batch_size=2", "--gradient_accumulation_steps=4", "--accumulation=float32"])):
        code, _, err = run("train.py", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/{out}", *TINY_RUN,
                           "--vocab_size=61", "--method=adamw", "--max_iters=3", *args)
        assert code == 0, err
        with open(f"{tmp_path}/{out}/log.jsonl") as f:
            losses.append([entry["loss"] for entry in map(json.loads, f) if "loss" in entry])
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
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["good bad film"] * 9, trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"],
                                                                       initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(folder)
    with open(folder / "reviews.tsv", "w") as f:
        for i in range(400):
            f.write(f"a {('bad', 'good')[i % 2]} film, number {i}\t{i % 2}\n")
    result = subprocess.run(
        [sys.executable, "prepare_sft.py", f"--input={folder}/reviews.tsv", f"--out_dir={folder}/data",
         f"--encoding={folder}", "--columns=sentence,label", "--labels=bad,good", "--prompt={sentence} is",
         "--completion= {label}", "--block_size=32"], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


TUNE = ("--block_size=32 --batch_size=8 --rank=16 --proj_gap=5 --device=cpu --dtype=float32 --eval_iters=4 "
        "--log_interval=1 --warmup_iters=2 --eval_interval=15 --learning_rate=0.01 --galore_scale=1.0").split()


@pytest.mark.parametrize("method", ["--method=qgalore", "--method=qlora --embed_bits=8"])
def test_a_checkpoint_is_tuned_resumed_and_exported_and_transformers_computes_its_logits(checkpoint, tmp_path, method):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = ["train.py", f"--data_dir={checkpoint}/data", f"--out_dir={tmp_path}/out", *TUNE, *method.split()]
    code, out, err = run(*args, f"--init_from={checkpoint}", "--max_iters=30", "--lr_decay_iters=60")
    assert code == 0, err
    code, out, err = run(*args, "--init_from=resume", "--max_iters=60", "--lr_decay_iters=60")
    assert code == 0, err
    log = read_log(f"{tmp_path}/out")
    assert log[60, "val_loss"] < log[30, "val_loss"] < log[0, "val_loss"] - 0.5
    whole = f"{tmp_path}/whole"  # in one go: the same
    code, _, err = run(*args[:2], f"--out_dir={whole}", *args[3:], f"--init_from={checkpoint}", "--max_iters=60")
    assert code == 0, err
    assert read_log(whole)[60, "val_loss"] == log[60, "val_loss"]
    code, out, err = run("hf.py", f"--out_dir={tmp_path}/out", f"--export={tmp_path}/hf")
    assert code == 0, err
    ours = load_model(f"{tmp_path}/out", "cpu")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "hf")("a good film, number 7 is").input_ids])
    with torch.no_grad():
        logits = ours.logits(ours.hidden(ids))
        assert (theirs(ids).logits - logits).abs().max() < 0.02 * logits.abs().max()  # exported in bfloat16
        assert theirs.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


def test_what_does_not_fit_a_checkpoint_is_refused_in_one_line(checkpoint, shards, tmp_path):
    args = ["train.py", f"--out_dir={tmp_path}/out", *TUNE]
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
    one_line_error(run(*args, f"--init_from={broken}", f"--data_dir={checkpoint}/data"), "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_the_readmes_roberta_learns_sentiment(tmp_path, monkeypatch):
    """The README's program for any torch model, on a tiny random RoBERTa."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    with open(f"{HERE}/README.md") as f:
        program = re.search(r"```python\n(import torch\nfrom transformers.*?)```", f.read(), re.S)[1]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["a film awful dull bad lovely fine good"], trainers.WordLevelTrainer(
        special_tokens=special))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path / "roberta-base")
    torch.manual_seed(0)
    RobertaForSequenceClassification(RobertaConfig(
        vocab_size=13, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=130)).save_pretrained(tmp_path / "roberta-base")
    words = {0: ["awful", "dull", "bad"], 1: ["lovely", "fine", "good"]}
    rows = [f"a {random.Random(i).choice(words[i % 2])} film\t{i % 2}\n" for i in range(800)]
    (tmp_path / "train.tsv").write_text("".join(rows[:700]))
    (tmp_path / "dev.tsv").write_text("".join(rows[700:]))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(program.replace("lr=2e-5", "lr=1e-3").replace("scale=4.0", "scale=1.0"), found)
    assert found["accuracy"] > 0.9 and sum(isinstance(m, QLinear) for m in found["model"].modules()) == 12
