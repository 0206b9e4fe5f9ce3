"""
Tests of preference tuning: pairs into rows, DPO's loss and its reference, runs of train.py.
    python -m pytest tests/test_dpo.py
"""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import configure
from finetune import dpo, prepare_dpo
from finetune.dpo import PreferenceLoss, log_probabilities
from finetune.prepare_dpo import joined, pair, shorten
from finetune.prepare_sft import Example
from kernels.loss import head_loss, token_losses
from kernels.lean import plain_linear
from model import LLaMA
from run.data import Windows, shares_of
from run.encodings import get_encoding
from run.ranks import Ranks
from run.shards import IN_LOSS, REJECTED, STARTS, open_shard, write_shard
from tests.common import TINY_MODEL, contents, one_line_error, read_log, refused, run, tiny

BETA = 0.5
TEXTS = {"prompt": "", "chosen": "", "rejected": ""}  # no template of the user's
WORDS = {"good": "bad", "warm": "cold", "long": "short", "light": "dark"}  # chosen: rejected


def side(*tokens, targets):
    """An Example of these tokens, of which the last `targets` count."""
    flags = np.zeros(len(tokens), np.uint8)
    flags[-targets:] = IN_LOSS
    flags[0] = STARTS
    return Example(np.array(tokens, np.uint32), flags)


def write_pairs(folder, n=40, packing=True, block_size=32):
    """Shards of n pairs in bytes, an eighth of them for validation: the chosen answer is a word of
    WORDS, the rejected one its opposite. Returns the folder."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/pairs.jsonl", "w") as f:
        for i in range(n):
            chosen, rejected = list(WORDS.items())[i % 4]
            record = {"prompt": f"{i}: ", "chosen": chosen, "rejected": rejected}
            f.write(json.dumps(record) + "\n")
    prepare(f"{folder}/pairs.jsonl", folder, block_size=block_size, packing=packing,
            val_fraction=0.125)
    return folder


def prepare(path, out_dir, encoding="bytes", **settings):
    flags = {"input": path, "out_dir": out_dir, "encoding": encoding} | settings
    s = configure(prepare_dpo, argv=[f"--{name}={value}" for name, value in flags.items()])
    prepare_dpo.prepare_dpo(s)


def windows(folder, part="train", block_size=32, seed=None):
    return Windows(f"{folder}/*_{part}_*.bin", block_size, 257, seed=seed)


def float_model(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "block_size": 32} | changes
    return LLaMA(tiny(**shape), plain_linear)


def by_hand(model, batch, reference):
    """Equation 7 of the paper, an example at a time: (mean loss of the pairs, their margins)."""
    x, y, documents = batch
    sums = {}
    for row in range(len(x)):
        for number in documents[row].unique().tolist():
            at = documents[row] == number
            logits = model.logits(model.hidden(x[row, at][None]))[0]  # (T, V): by itself
            log_p = logits.log_softmax(-1)
            targets = y[row, at]
            counts = (targets >= 0).nonzero()[:, 0]
            sums[number] = log_p[counts, targets[counts]].sum()
    losses = []
    margins = []
    for number in sorted(sums)[::2]:
        of_chosen = sums[number] - reference[number - 1]
        of_rejected = sums[number + 1] - reference[number]
        margins.append(BETA * (of_chosen - of_rejected))
        losses.append(-torch.log(torch.sigmoid(margins[-1])))
    return torch.stack(losses).mean(), torch.stack(margins)


# -----------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_and_its_gradient_are_equation_7_s(tmp_path, packing):
    data = windows(write_pairs(tmp_path, packing=packing))
    model = float_model(logit_softcap=5.0)
    reference = torch.randn(data.examples, generator=torch.Generator().manual_seed(1)) - 20
    batch = data.batch(3)
    expected, margins = by_hand(model, batch, reference)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    model.loss = loss = PreferenceLoss(model, BETA, reference, Ranks())
    x, y, documents = batch
    value = model(x, y, documents=documents)
    value.backward()
    torch.testing.assert_close(value, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)

    figures = loss.figures("")
    assert figures["reward_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert figures["reward_accuracy"] == (margins > 0).double().mean().item()
    assert figures["reward_chosen"] - figures["reward_rejected"] == pytest.approx(
        figures["reward_margin"], rel=1e-6
    )
    assert loss.figures("")["reward_margin"] == 0  # they are told once
    assert loss.figures("val_")["val_reward_margin"] == 0  # nothing was evaluated


def test_losses_of_tokens_take_any_weight_in_backward(monkeypatch):
    monkeypatch.setattr("kernels.loss.TOKENS", 4)  # three chunks
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(12, 8, generator=generator), torch.randn(23, 8, generator=generator)
    targets = torch.randint(-1, 23, (12,), generator=generator)
    weights = torch.randn(12, generator=generator)
    gradients = []
    for losses in (token_losses, plain_losses):
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        found = losses(*leaves, targets)
        (found * weights).sum().backward()
        gradients.append([found.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*gradients)
    mean = token_losses(h, weight, targets).sum() / (targets >= 0).sum()
    torch.testing.assert_close(mean, head_loss(h, weight, targets))


def plain_losses(h, weight, targets):
    return F.cross_entropy(h @ weight.T, targets, ignore_index=-1, reduction="none")


def test_micro_batches_of_pairs_add_up(tmp_path):
    """Each pair counts alike, however many of them a micro-batch has."""
    data = windows(write_pairs(tmp_path, packing=True))
    model = float_model()
    model.loss = PreferenceLoss(model, BETA, torch.zeros(data.examples), Ranks())
    x, y, documents = data.batch(data.total)
    total = model(x, y, documents=documents).item()
    data.position = 0
    batches = [data.batch(n) for n in (2, 1, data.total - 3)]
    pairs = [data.weight(y, documents) for _, y, documents in batches]
    assert sum(pairs) == data.examples // 2 and pairs[0] != pairs[1]
    shares = shares_of(batches, data, None, Ranks())
    parts = [model(x, y, documents=d).item() * share for (x, y, d), share in zip(batches, shares)]
    assert sum(parts) == pytest.approx(total, rel=1e-5)


# -----------------------------------------------------------------------------
# runs


def flags(folder, out_dir, *more):
    return [*TINY_MODEL, f"--data_dir={folder}", f"--out_dir={out_dir}", f"--dpo_beta={BETA}",
            "--max_iters=6", "--eval_interval=3", "--learning_rate=0.01", *more]


def entries(out_dir):
    with open(f"{out_dir}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def runs(folder, out_dir, *more):
    code, out, err = run("train.py", *flags(folder, out_dir, *more))
    assert code == 0, err
    return out


@pytest.mark.parametrize("method", ["qgalore", "qmuon", "lora", "qlora", "adamw"])
def test_every_method_learns_what_is_preferred(tmp_path, method):
    folder = write_pairs(tmp_path / "data", n=64)
    out = runs(folder, tmp_path / "out", f"--method={method}", "--max_iters=20",
               "--eval_interval=20", "--gradient_accumulation_steps=2")
    log = entries(tmp_path / "out")
    first, last = log[0], log[-1]
    # before its first step the model is the reference: no margin, the loss is log 2
    assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first["val_reward_margin"] == pytest.approx(0, abs=1e-4)
    assert last["val_loss"] < 0.65 and last["val_reward_margin"] > 0.1
    assert last["val_reward_accuracy"] == 1
    assert "reward accuracy 1.0000" in out
    trained = [entry for entry in log if "loss" in entry]
    assert trained[-1]["reward_margin"] > trained[1]["reward_margin"]


@pytest.mark.parametrize("by_block", [False, True])
def test_a_run_of_pairs_resumes_bit_for_bit(tmp_path, by_block):
    folder = write_pairs(tmp_path / "data")
    more = ["--method=qgalore", "--rank=16", "--proj_gap=2", f"--by_block={by_block}",
            "--gradient_accumulation_steps=2"]
    runs(folder, tmp_path / "whole", *more)
    runs(folder, tmp_path / "parts", *more, "--max_iters=3", "--lr_decay_iters=6")
    before = contents(folder)
    runs(folder, tmp_path / "parts", *more, "--init_from=resume")
    assert contents(folder) == before
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    states = [torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"]
              for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_reference_is_made_once_for_each_start(tmp_path):
    folder = write_pairs(tmp_path / "data")

    def references():
        return {name for name in os.listdir(folder) if name.endswith(".npy")}

    said = "the reference: "
    assert said in runs(folder, tmp_path / "a", "--method=adamw")
    first = references()
    assert said not in runs(folder, tmp_path / "b", "--method=adamw", "--learning_rate=0.001")
    assert references() == first
    assert said in runs(folder, tmp_path / "c", "--method=adamw", "--seed=1")  # other weights
    assert first < references()


def test_what_is_no_run_of_pairs_is_one_line(tmp_path, shards):
    folder = write_pairs(tmp_path / "data")
    one_line_error(run("train.py", *flags(shards, tmp_path / "x")), "are no pairs", "dpo_beta=0.5")
    one_line_error(run("train.py", *flags(folder, tmp_path / "x", "--dpo_beta=0")),
                   "are pairs", "set dpo_beta")
    one_line_error(run("train.py", *flags(folder, tmp_path / "x", "--dpo_beta=-1")), "between 0")

    runs(folder, tmp_path / "out", "--method=adamw", "--max_iters=3")
    (path,) = (f"{folder}/{name}" for name in os.listdir(folder) if name.endswith(".npy"))
    resumed = flags(folder, tmp_path / "out", "--method=adamw", "--init_from=resume")
    whole = contents(folder)[os.path.basename(path)]
    for damaged in (whole[:-4], whole[:-4] + b"\xff\xff\xff\xff", b"", b"PK\x03\x04" + whole[4:]):
        with open(path, "wb") as f:
            f.write(damaged)
        one_line_error(run("train.py", *resumed), path, "damaged", "delete it")
    os.remove(path)
    one_line_error(run("train.py", *resumed), path, "there is no", "data_dir")

    runs(shards, tmp_path / "text", "--method=adamw", "--dpo_beta=0", "--max_iters=3")
    resumed = flags(folder, tmp_path / "text", "--method=adamw", "--init_from=resume")
    one_line_error(run("train.py", *resumed), "was trained without dpo_beta")
