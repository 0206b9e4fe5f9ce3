"""
Tests of preference tuning: pairs into rows, DPO's loss and its reference, runs of train.py.
    python -m pytest tests/test_dpo.py
"""

import json
import os
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configurator import configure
from finetune import hf, prepare_dpo
from finetune.dpo import PreferenceLoss, log_probabilities
from finetune.data.examples import Example
from finetune.prepare_dpo import joined, pair, shorten
from finetune.data.rows import fill_rows
from kernels.loss import head_loss, token_losses
from model import LLaMA, LLaMAConfig, plain_linear
from run.by_block import forward_backward
from run.data import Windows, shares_of
from run.encodings import get_encoding
from run.ranks import Ranks
from run.shards import IN_LOSS, REJECTED, STARTS, write_shard
from tests.common import (TINY_MODEL, Job, contents, one_line_error, read_log, refused, run, tiny,
                          trains)
from tests.test_sft import TEMPLATE, byte_bpe

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
    for (x, y, documents), share in zip(batches, shares):
        loss = model(x, y, documents=documents) * share
        loss.backward()
        total -= loss.item()
    assert total == pytest.approx(0, abs=1e-5)

    # and block after block, too
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    forward_backward(model, batches, shares, SimpleNamespace(), nullcontext())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# -----------------------------------------------------------------------------
# trl


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(trl, a tokenizer of transformers with a chat template, the folder that it is saved in)."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_bpe(), **names)
    tokenizer.chat_template = TEMPLATE
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(folder)
    return trl, tokenizer, folder


def trainer_of(theirs, records, folder):
    """trl's DPOTrainer of two tiny models, which are saved in folder/0 and, the reference, in 1."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    trl, tokenizer, _ = theirs
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
             "max_position_embeddings": 128}
    models = []
    for number in range(2):
        torch.manual_seed(number)
        models.append(LlamaForCausalLM(LlamaConfig(**shape)))
        models[-1].save_pretrained(f"{folder}/{number}")
    args = trl.DPOConfig(f"{folder}/out", beta=BETA, use_cpu=True, bf16=False, report_to="none",
                         activation_checkpointing=False, disable_tqdm=True)
    return trl.DPOTrainer(models[0], ref_model=models[1], args=args, processing_class=tokenizer,
                          train_dataset=Dataset.from_list(records))


def loaded(path):
    model = LLaMA(LLaMAConfig(**hf.settings(path)), plain_linear, "meta")
    hf.load_weights(model, path)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_loss_is_trl_s_and_so_is_its_gradient(theirs, tmp_path):
    records = [
        {"prompt": "how many words", "chosen": " is good.", "rejected": " bad is very bad"},
        {"prompt": "a question", "chosen": " long a a", "rejected": " bad"},
    ]
    trainer = trainer_of(theirs, records, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    enc = get_encoding(theirs[2])
    pairs = [pair(enc, record, TEXTS)[0] for record in records]
    tokens, flags = fill_rows(pairs, 63, True, enc.eot_token)
    write_shard(tmp_path / "x_train_0.bin", tokens.ravel(), 400, flags.ravel(), 64)
    x, y, documents = Windows(f"{tmp_path}/x_train_0.bin", 63, 400).batch(1)
    model = loaded(f"{tmp_path}/0")
    first = loaded(f"{tmp_path}/1")
    with torch.no_grad():
        h = first.hidden(x, documents=documents)
        _, reference = log_probabilities(first, h, y, documents)
    model.loss = loss = PreferenceLoss(model, BETA, reference, Ranks())
    value = model(x, y, documents=documents)
    value.backward()

    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    of_trl = dict(trainer.model.named_parameters())
    for name, (module, part) in hf.hf_names(model).items():
        gradient = getattr(module, part).grad
        torch.testing.assert_close(gradient, of_trl[name].grad, rtol=1e-3, atol=1e-4, msg=name)
    figures = loss.figures("")
    names = {"accuracy": "accuracies", "margin": "margins", "chosen": "chosen",
             "rejected": "rejected"}
    for ours, name in names.items():
        told = trainer._metrics["train"][f"rewards/{name}"][-1]
        assert figures[f"reward_{ours}"] == pytest.approx(told, rel=1e-4), name


def test_conversations_are_tokenised_as_by_trl(theirs, tmp_path):
    """But for what the template writes after the answer's end, which is no target of ours."""
    _, _, folder = theirs
    prompt = [{"role": "user", "content": "is the film good"}]
    chosen = [{"role": "assistant", "content": "very good"}]
    rejected = [{"role": "assistant", "content": "bad"}]
    enc = get_encoding(folder)
    for record in ({"prompt": prompt, "chosen": chosen, "rejected": rejected},
                   {"chosen": prompt + chosen, "rejected": prompt + rejected}):
        theirs_now = trainer_of(theirs, [record], tmp_path).train_dataset[0]
        sides = parts(pair(enc, record, TEXTS)[0])
        for name, ours in zip(("chosen", "rejected"), sides):
            ids = theirs_now["prompt_ids"] + theirs_now[f"{name}_ids"]
            assert ours.tokens.tolist() == ids
            targets = ours.tokens[ours.flags & IN_LOSS > 0].tolist()
            assert targets + enc.encode_with_special("\n") == theirs_now[f"{name}_ids"]


# -----------------------------------------------------------------------------
# pairs


def parts(example):
    """The two Examples that joined() made one of."""
    at = int((example.flags & REJECTED > 0).argmax())
    rejected = example.flags[at:].copy()
    rejected[0] &= ~np.uint8(REJECTED)
    return (Example(example.tokens[:at], example.flags[:at]),
            Example(example.tokens[at:], rejected))


def shown(enc, example):
    """[(text, its part that counts)] of the two sides."""
    found = []
    for of_side in parts(example):
        targets = of_side.tokens[of_side.flags & IN_LOSS > 0]
        found.append(tuple(enc.decode(ids.tolist()) for ids in (of_side.tokens, targets)))
    return found


END = "<|endoftext|>"


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "2+2=", "chosen": "4", "rejected": "5"},
     [("2+2=4" + END, "4" + END), ("2+2=5" + END, "5" + END)]),
    # no prompt: what both begin with, to the end of a word
    ({"chosen": "Say it: goodness", "rejected": "Say it: good"},
     [("Say it: goodness" + END, " goodness" + END), ("Say it: good" + END, " good" + END)]),
    ({"chosen": "Say it", "rejected": "Say it now"},
     [("Say it" + END, " it" + END), ("Say it now" + END, " it now" + END)]),
    ({"chosen": "Hi\nyes", "rejected": "Hi\nyet"},
     [("Hi\nyes" + END, "yes" + END), ("Hi\nyet" + END, "yet" + END)]),
])
def test_texts_make_a_pair(record, expected):
    enc = get_encoding("bytes")
    made, not_used = pair(enc, record | {"score": 3}, TEXTS)
    assert shown(enc, made) == expected
    assert not_used == ["the field 'score'"]
    starts = made.flags[made.flags & STARTS > 0]
    assert starts.tolist() == [STARTS, STARTS | REJECTED]


def test_templates_name_other_fields():
    enc = get_encoding("bytes")
    record = {"question": "2+2", "answers": ["4", "5"]}
    templates = {"prompt": "{question}=", "chosen": "{answers[0]}", "rejected": "{answers[1]}"}
    made, not_used = pair(enc, record, templates)
    assert [text for text, _ in shown(enc, made)] == ["2+2=4" + END, "2+2=5" + END]
    assert not not_used


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chat"), TEMPLATE)


def with_template(folder, template):
    """The encoding of a checkpoint with that chat template."""
    byte_bpe().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "bos_token": "<|start|>",
                "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return get_encoding(str(folder))


def said(role, *texts):
    return [{"role": role, "content": text} for text in texts]


FORMS = {
    "messages after a prompt": (
        {"prompt": said("user", "how"), "chosen": said("assistant", "good"),
         "rejected": said("assistant", "bad")}, False),
    "whole conversations": (
        {"chosen": said("user", "how") + said("assistant", "good"),
         "rejected": said("user", "how") + said("assistant", "bad")}, False),
    "whole conversations beside a text": (
        {"prompt": "how", "chosen": said("user", "how") + said("assistant", "good"),
         "rejected": said("user", "how") + said("assistant", "bad")}, False),
    "answers to a text": (
        {"prompt": "how", "chosen": said("assistant", "good"),
         "rejected": said("assistant", "bad")}, False),
    "one message a side": (
        {"prompt": said("user", "how"), "chosen": said("assistant", "good")[0],
         "rejected": said("assistant", "bad")[0]}, False),
    "ShareGPT's": (
        {"chosen": [{"from": "human", "value": "how"}, {"from": "gpt", "value": "good"}],
         "rejected": [{"from": "human", "value": "how"}, {"from": "gpt", "value": "bad"}]}, False),
    "texts that are messages": ({"prompt": "how", "chosen": "good", "rejected": "bad"}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_make_a_pair(chat, form):
    record, texts_are_messages = FORMS[form]
    made, not_used = pair(chat, record, TEXTS, texts_are_messages)
    before = "<|start|>user\nhow<|end|>\n<|start|>assistant\n"
    assert shown(chat, made) == [(f"{before}good<|end|>\n", "good<|end|>"),
                                 (f"{before}bad<|end|>\n", "bad<|end|>")]
    assert not not_used


def test_answers_that_both_sides_have_are_context(chat):
    begin = said("user", "a") + said("assistant", "film") + said("user", "how")
    record = {"chosen": begin + said("assistant", "good"),
              "rejected": begin + said("assistant", "bad")}
    made, _ = pair(chat, record, TEXTS)
    assert [counts for _, counts in shown(chat, made)] == ["good<|end|>", "bad<|end|>"]


def test_a_system_text_comes_first(chat):
    record = {"system": "be brief", "prompt": "how", "chosen": "good", "rejected": "bad"}
    made, not_used = pair(chat, record, TEXTS, chat=True)
    begin = "<|start|>system\nbe brief<|end|>"
    assert all(text.startswith(begin) for text, _ in shown(chat, made))
    assert not not_used


def test_a_template_that_rewrites_turns_allows_one_answer(tmp_path):
    """Of a side: Qwen3's leaves out what was thought before."""
    template = ("{% for m in messages %}<|start|>{{ m.role }} {% if m.role == 'user' or loop.last "
                "%}{{ m.content }}{% endif %}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|start|>assistant {% endif %}")
    chat = with_template(tmp_path, template)
    begin = said("user", "a") + said("assistant", "film") + said("user", "how")
    record = {"chosen": begin + said("assistant", "good"),
              "rejected": begin + said("assistant", "bad")}
    made, _ = pair(chat, record, TEXTS)
    before = "<|start|>user a<|end|><|start|>assistant <|end|><|start|>user how<|end|>"
    assert shown(chat, made)[1] == (f"{before}<|start|>assistant bad<|end|>", "bad<|end|>")
    record = {"prompt": "a", "rejected": said("assistant", "bad"),
              "chosen": said("assistant", "x") + said("user", "how") + said("assistant", "good")}
    with pytest.raises(ValueError, match="several answers"):
        pair(chat, record, TEXTS)


@pytest.mark.parametrize("record, why", [
    ({"prompt": "a", "chosen": "b"}, "no rejected answer"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "no chosen answer"),
    ({"prompt": "a", "chosen": " ", "rejected": "c"}, "no chosen answer"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
    ({"prompt": "a", "chosen": said("assistant", "b"), "rejected": 3}, "no list of"),
    ({"chosen": said("user", "b"), "rejected": said("user", "c")}, "no chosen answer"),
    ({"chosen": said("user", "b") + said("assistant", "c"),
      "rejected": said("user", "b") + said("assistant", "c") + said("user", "d")},
     "no chosen answer"),
])
def test_what_is_no_pair_is_left_out_with_its_reason(chat, record, why):
    with pytest.raises(ValueError, match=why):
        pair(chat, record, TEXTS)


def test_messages_need_a_chat_template():
    record = {"chosen": said("assistant", "b"), "rejected": said("assistant", "c")}
    with pytest.raises(SystemExit, match="no chat template"):
        pair(get_encoding("bytes"), record, TEXTS)


def test_a_pair_is_cut_where_it_is_longer_than_a_row():
    def cut(chosen, rejected, size=10):
        """Lengths of the two sides that are left of these many targets."""
        sides = [side(*range(n), 50 + i, targets=n) for i, n in enumerate((chosen, rejected))]
        counts = Counter()
        kept = list(shorten([joined(*sides)], size, counts))
        assert counts["too_long"] == 1 - len(kept)
        if not kept:
            return None
        assert kept[0].cut == (chosen + rejected + 2 > size)
        return [len(part.tokens) for part in parts(kept[0])]

    assert cut(3, 5) == [4, 6]
    assert cut(3, 9) == [4, 6]  # what the other one leaves
    assert cut(9, 2) == [7, 3]
    assert cut(9, 4) == [5, 5]
    assert cut(9, 8) is None  # both lose what tells them apart
    # no target is left on one side
    late = joined(side(*range(9), targets=1), side(1, 2, targets=1))
    assert not list(shorten([late], 10, Counter()))


def test_prepared_pairs_are_read_as_they_were_made(tmp_path, capsys):
    folder = write_pairs(tmp_path, n=40)
    assert "5 pairs to validate on: " in capsys.readouterr().out
    data = windows(folder)
    assert data.pairs and data.examples == 70
    seen = set()
    numbers = []
    for _ in range(data.total):
        x, y, documents = data.batch(1)
        for number in documents[y >= 0].unique().tolist():
            numbers.append(number)
            answer = bytes(y[(y >= 0) & (documents == number)].tolist()[:-1]).decode()
            seen.add((number % 2, answer))
    assert sorted(numbers) == list(range(1, 71))
    assert seen == {(1, word) for word in WORDS} | {(0, word) for word in WORDS.values()}
    # in any order an example keeps its number
    again = windows(folder, seed=3)
    again.batch(5)
    _, _, documents = again.batch(1)
    assert documents[0, 0] % 2 == 1 and documents[0, 0] > 1


@pytest.mark.parametrize("flags", [
    [2, 1, 2, 1],  # in the second row: no pair
    [2, 1, 6, 0],
    [6, 1, 2, 1],
    [0, 1, 6, 1],
    [2, 1, 4, 1],
])
def test_rows_that_are_no_whole_pairs_are_refused(tmp_path, flags):
    write_shard(f"{tmp_path}/x_train_0.bin", np.arange(8), 257, [2, 1, 6, 1, *flags], 4)
    assert "x_train_0.bin: damaged" in refused(Windows, f"{tmp_path}/*.bin", 3, 257)


def test_pairs_do_not_mix_with_examples(tmp_path):
    write_shard(f"{tmp_path}/x_train_0.bin", np.arange(4), 257, [2, 1, 6, 1], 4)
    write_shard(f"{tmp_path}/x_train_1.bin", np.arange(4), 257, [2, 1, 2, 1], 4)
    assert "do not mix" in refused(Windows, f"{tmp_path}/*.bin", 3, 257)


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, shards):  # shards: what takes long to load is loaded
    return write_pairs(tmp_path_factory.mktemp("pairs"), n=64)


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
def test_every_method_learns_what_is_preferred(tmp_path, pairs, method):
    out = runs(pairs, tmp_path / "out", f"--method={method}", "--max_iters=12",
               "--eval_interval=12", "--gradient_accumulation_steps=2")
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


def test_a_run_of_pairs_resumes_bit_for_bit(tmp_path, pairs):
    more = ["--method=qgalore", "--rank=16", "--gradient_accumulation_steps=2"]
    runs(pairs, tmp_path / "whole", *more)
    before = contents(pairs)
    runs(pairs, tmp_path / "parts", *more, "--max_iters=3", "--lr_decay_iters=6")
    runs(pairs, tmp_path / "parts", *more, "--init_from=resume")
    assert contents(pairs) == before  # the reference is that of the first start
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    states = [torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"]
              for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_reference_is_made_once_for_each_start(tmp_path, shards):
    folder = write_pairs(tmp_path / "data")

    def references():
        return {name for name in os.listdir(folder) if name.endswith(".npy")}

    more = ["--method=adamw", "--max_iters=1"]
    said = "the reference: "
    assert said in runs(folder, tmp_path / "a", *more)
    first = references()
    assert said not in runs(folder, tmp_path / "b", *more, "--learning_rate=0.001")
    assert references() == first
    assert said in runs(folder, tmp_path / "c", *more, "--seed=1")  # other weights
    assert first < references()

    # ranks make it together
    before = contents(folder)
    for name in references():
        os.remove(f"{folder}/{name}")
    more += ["--seed=1", "--gradient_accumulation_steps=2"]
    rank = trains(*flags(folder, tmp_path / "d", *more))
    results = Job(tmp_path / "job", rank, rank).wait()
    assert [code for code, _, _ in results] == [0, 0], results
    (name,) = references()
    assert contents(folder)[name] == before[name]


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
