"""
Tests of evaluation: tiny random models with the bytes encoding, data of their own, a CPU.
    python -m pytest tests/test_eval.py
"""

import glob
import gzip
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from configurator import configure
from finetune import evaluate
from finetune.evaluation.items import fit, windows
from finetune.evaluation.questions import GROUP_OF, GROUPS, number, read_mmlu
from finetune.evaluation.results import open_partial
from finetune.evaluation.scores import greedy, loglikelihoods
from model import LLaMA, LLaMAConfig, QLinear
from run.checkpoint import save_checkpoint
from run.encodings import get_encoding
from run.shards import write_shard
from tests.common import HERE, one_line_error, script

BYTES = get_encoding("bytes")
SHAPE = dict(
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    ffn_dim=64,
    vocab_size=257,
    block_size=256,
)
SETTINGS = SHAPE | dict(  # of the run that is said to have made the model
    method="qgalore",
    rank=8,
    weight_bits=8,
    weight_group_size=64,
    matmul="float",
    freeze_embedding=False,
    embed_bits=16,
    low_rank="",
    pretrained="",
    encoding="bytes",
)


def tiny(**shape):
    torch.manual_seed(0)
    linear = partial(QLinear, bits=8, group_size=64)
    model = LLaMA(LLaMAConfig(**SHAPE | shape), linear, device="cpu", dtype=torch.float32)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(10)  # logits that differ by much more than float noise
    return model


def saved(folder, model, **settings):
    """A run's folder with this model, as train.py leaves it."""
    os.makedirs(folder, exist_ok=True)
    checkpoint = {
        "config": SETTINGS | settings,
        "model": model.state_dict(),
        "optimizer": {},
        "iter": 1,
        "position": 0,
    }
    save_checkpoint(str(folder), checkpoint)
    return str(folder)


def run(**settings):
    """What is written with these settings."""
    argv = [f"--{name}={value}" for name, value in settings.items()]
    evaluate.evaluate(configure(evaluate, argv=argv))
    with open(settings["out"]) as f:
        return json.load(f)


def ids_of(text):
    return np.array(BYTES.encode_ordinary(text), np.int64)


def always_b(folder):
    """A run whose model answers 'B' to all.

    Every hidden state is ones, and the head's row of B alone is positive."""
    model = tiny()
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
        for block in model.blocks:
            block.attn.o_proj.set_weight(torch.zeros(32, 32))
            block.mlp.down_proj.set_weight(torch.zeros(32, 64))
        model.head.weight.zero_()
        model.head.weight[ord("B")] = 1.0
    return saved(folder, model)


def sst2(folder, n=12):
    """Settings of choice on a file of n records."""
    path = folder / "dev.tsv"
    lines = [f"film {'so ' * (i * 5 % 7)}number {i}\t{i % 3 % 2}\n" for i in range(n)]
    path.write_text("".join(lines))
    return {
        "task": "choice",
        "data": path,
        "columns": "sentence,label",
        "labels": "bad,very good",
        "prompt": r"Review: {sentence}\nIt is",
    }


def mmlu(folder):
    """MMLU's folder, of three subjects."""
    subjects = {"abstract_algebra": "AABB", "virology": "B", "my_subject": "CB"}
    for name in ("dev", "test"):
        os.makedirs(folder / name)
    for subject, answers in subjects.items():
        dev = [f'"{subject}, {i}?",w{i},"x, {i}",y,z,{"ABCDA"[i]}\n' for i in range(5)]
        (folder / "dev" / f"{subject}_dev.csv").write_text("".join(dev))
        test = []
        for i, answer in enumerate(answers):
            test.append(f"what is {i}{'?' * i},one,two,three,four,{answer}\n")
        (folder / "test" / f"{subject}_test.csv").write_text("".join(test))
    return folder


# -----------------------------------------------------------------------------
# scores and answers


def plainly(model, ids, start):
    """The log-likelihood of ids[start:] by one forward a token, alone and without a cache."""
    total = 0.0
    for t in range(start, len(ids)):
        logits = model(torch.from_numpy(ids[None, :t]))
        total += F.log_softmax(logits, dim=-1)[0, ids[t]].item()
    return total


@torch.no_grad()
def test_log_likelihoods_are_those_of_a_row_alone_without_cache():
    model = tiny()
    cases = [
        ("same start, ", "yes"),
        ("same start, ", "no"),
        ("same start, and a longer row ", "B"),
        ("same start, and a longer row ", "C"),
        ("s", "a"),
        ("other", " words"),
    ]
    rows = [(ids_of(a + b), len(a)) for a, b in cases]
    plain = [plainly(model, *row) for row in rows]
    for first, end in ((0, 2), (0, 4), (2, 4), (0, 6), (4, 5), (3, 6)):
        expected = pytest.approx(plain[first:end], abs=1e-4)
        assert loglikelihoods(model, rows[first:end]) == expected


def test_shared_starts_go_through_once_and_few_logits_are_made(monkeypatch):
    model = tiny()
    tokens = []
    logits = []
    hidden_of = model.hidden
    logits_of = model.logits

    def hidden(idx, *args, **options):
        tokens.append(idx.shape)
        return hidden_of(idx, *args, **options)

    def logits_counted(h):
        logits.append(h.shape)
        return logits_of(h)

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "logits", logits_counted)
    monkeypatch.setattr("finetune.evaluation.scores.LOSS_CHUNK", 4)
    rows = []
    for end in ("1", "2"):
        text = "a long common beginning" + end
        rows += [(ids_of(text + x), len(text)) for x in "ABC"]
    loglikelihoods(model, rows)
    assert tokens == [(1, 23), (2, 1)]  # three choices of one token have one input
    assert logits == [(4, 32), (2, 32)]


def test_batched_greedy_answers_are_those_of_generate_one_by_one():
    model = tiny(block_size=24)  # texts go past the window
    texts = ("a", "some more text", "and yet another", "some more texx")
    prompts = [ids_of(text) for text in texts]
    alone = []
    for ids in prompts:
        steps = sample.generate(model, torch.from_numpy(ids[None]), 20, temperature=0)
        new = [token.item() for token in steps]
        if 256 in new:
            new = new[: new.index(256)]
        alone.append(BYTES.decode(new))
    assert len(set(alone)) > 1
    assert greedy(model, BYTES, prompts, 20) == alone
    assert greedy(model, BYTES, prompts[:1], 20) == alone[:1]


def test_an_answer_ends_before_a_stop_string_or_end_of_text(monkeypatch):
    model = tiny()
    script = []  # the ids that each row says
    for text in ("one\nQuestion: two", "12\x00three"):
        script.append([256 if c == "\x00" else ord(c) for c in text.ljust(20)])
    steps = iter(range(20))

    def logits(h):
        t = next(steps)
        return F.one_hot(torch.tensor([line[t] for line in script]), 257).float()

    monkeypatch.setattr(model, "logits", logits)
    prompts = [ids_of("x"), ids_of("yy")]
    assert greedy(model, BYTES, prompts, 20, stop="\nQuestion:") == ["one", "12"]
    assert next(steps) == 13  # both have ended: no more tokens are made


NUMBERS = [
    ("so 3 + 4 = 7\n#### 7", "7"),
    ("#### 1,234,567", "1234567"),
    ("#### $5.50.", "5.5"),
    ("####-12", "-12"),
    ("#### -$3", "-3"),
    ("#### $-3", "-3"),
    ("it is 12 or 13.", "13"),
    ("10-5", "5"),
    ("#### 72.0 apples", "72"),
    ("####\n8", "8"),
    ("#### none, but 4", "4"),
    ("in 1,2 and 3,45", "45"),
    ("#### 5\n#### 6", "5"),
    ("none", None),
    ("", None),
    (".5", "0.5"),
    (r"#### $9{,}500", "9500"),
    (r"so \boxed{9{,}500}", "9500"),
    (r"it is 9,\!500 or 9\,501", "9501"),
    (r"#### -\$5", "-5"),
    ("12\u202f345 and 12\u00a0346", "12346"),
    ("1,000.50", "1000.5"),
    ("\u22127", "-7"),
    ("3/4", "0.75"),
    ("#### -3/4.", "-0.75"),
    ("on 5/12/2020", "2020"),
    ("1/0", "0"),
    ("1e5", "100000"),
    ("1.5E+2 km", "150"),
    ("2e", "2"),
    ("\uff19\uff15 or \uff19\uff0c\uff15\uff10\uff10", "9500"),
    ("12.", "12"),
    ("9" * 400, None),
    ("1e999", None),
    ("m\u00b2", None),
]


@pytest.mark.parametrize("text, value", NUMBERS)
def test_the_answer_is_the_number_after_the_mark_or_the_last(text, value):
    expected = None if value is None else float(value)
    assert number(text) == expected


# -----------------------------------------------------------------------------
# tasks


def test_perplexity_is_exp_of_the_models_loss(tmp_path):
    model = tiny(block_size=32)
    folder = saved(tmp_path / "run", model, block_size=32)
    text = "Größe, 32 tokens a window. " * 5
    (tmp_path / "text.txt").write_text(text)
    settings = dict(model=folder, data=tmp_path / "text.txt", out=tmp_path / "r.json")
    result = run(**settings, batch_size=3)

    # every token is predicted once
    ids = torch.tensor([256, *text.encode()])
    size = len(text.encode())
    nats = 0.0
    for i in range(0, len(ids) - 1, 32):
        window = ids[i : i + 33]
        nats += model(window[None, :-1], window[None, 1:]).item() * (len(window) - 1)
    assert result["tokens"] == result["bytes"] == size
    assert result["nats_per_token"] == pytest.approx(nats / size, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)

    # the same from a shard, and from some windows
    write_shard(str(tmp_path / "x_val_0.bin"), ids[1:].numpy(), 257)
    shards = run(**settings | {"data": tmp_path / "*_val_*.bin"})
    assert shards["nats_per_token"] == pytest.approx(result["nats_per_token"])
    assert shards["bytes"] == result["bytes"]
    assert run(**settings, limit=2)["tokens"] == 64


def test_windows_meet_end_to_end_and_not_across_files(tmp_path):
    for name, text in (("a", "abcde"), ("b", "fg")):
        (tmp_path / f"{name}.txt").write_text(text)
    items, size = windows(str(tmp_path / "*.txt"), BYTES, 3)
    rows = [item["rows"][0] for item in items]
    assert [bytes(ids[1:].tolist()) for ids, _ in rows] == [b"abc", b"de", b"fg"]
    assert [int(ids[0]) for ids, _ in rows] == [256, ord("c"), 256]
    assert {start for _, start in rows} == {1}
    assert size == 7


def test_the_likeliest_label_is_chosen_whatever_the_batch_size(tmp_path):
    model = tiny()
    settings = sst2(tmp_path) | {"model": saved(tmp_path / "run", model)}
    right = 0
    names = ("bad", "very good")
    given = {name: dict.fromkeys(names, 0) for name in names}
    for line in settings["data"].read_text().splitlines():
        sentence, label = line.split("\t")
        text = f"Review: {sentence}\nIt is"
        scores = [plainly(model, ids_of(f"{text} {name}"), len(text)) for name in names]
        chosen = int(scores[1] > scores[0])
        right += chosen == int(label)
        given[names[int(label)]][names[chosen]] += 1
    share = right / 12
    error = math.sqrt(share * (1 - share) / 11)
    for size in (1, 5, 64):
        result = run(**settings, out=tmp_path / "r.json", batch_size=size)
        assert result["n"] == 12 and result["accuracy"] == share
        assert result["answers_given"] == given
        assert result["standard_error"] == pytest.approx(error)


def test_shots_are_the_first_records_or_another_files(tmp_path, monkeypatch):
    seen = []

    def noted(question, *args):
        seen.append(question)
        return fit(question, *args)

    monkeypatch.setattr("finetune.evaluation.items.fit", noted)
    settings = sst2(tmp_path)
    settings |= {"model": saved(tmp_path / "run", tiny()), "out": tmp_path / "r.json"}
    result = run(**settings, shots=2)
    assert result["n"] == 10  # the two are not asked
    assert result["shots_dropped"] == 0
    assert seen[0]["shots"] == [
        "Review: film number 0\nIt is bad\n\n",
        "Review: film so so so so so number 1\nIt is very good\n\n",
    ]
    (tmp_path / "train.tsv").write_text("fine\t1\n")
    seen.clear()
    result = run(**settings, shots=1, shots_data=tmp_path / "train.tsv", limit=7)
    assert result["n"] == 7
    assert seen[0]["shots"] == ["Review: fine\nIt is very good\n\n"]


def test_mmlus_prompt_is_the_benchmarks(tmp_path):
    first = read_mmlu(str(mmlu(tmp_path)), 2)[0]
    assert first["head"] + "".join(first["shots"]) + first["text"] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "abstract_algebra, 0?\nA. w0\nB. x, 0\nC. y\nD. z\nAnswer: A\n\n"
        "abstract_algebra, 1?\nA. w1\nB. x, 1\nC. y\nD. z\nAnswer: B\n\n"
        "what is 0\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert first["endings"] == [" A", " B", " C", " D"] and first["answer"] == 0
    subjects = [x["subject"] for x in read_mmlu(str(tmp_path), 0, limit=1)]
    assert subjects == ["abstract_algebra", "my_subject", "virology"]


def test_a_model_that_always_says_b_is_right_as_often_as_b_is(tmp_path, capsys):
    result = run(
        model=always_b(tmp_path / "run"),
        task="mmlu",
        data=mmlu(tmp_path / "mmlu"),
        shots=1,
        out=tmp_path / "r.json",
    )
    assert "my_subject is none of MMLU's 57 subjects" in capsys.readouterr().out
    assert (result["n"], result["accuracy"]) == (7, 4 / 7)

    def shares(parts):
        return {name: (part["n"], part["accuracy"]) for name, part in parts.items()}

    assert shares(result["subjects"]) == {
        "abstract_algebra": (4, 0.5),
        "virology": (1, 1.0),
        "my_subject": (2, 0.5),
    }
    # Other is over its 3 questions: the mean of its subjects would be 3/4
    assert shares(result["groups"]) == {"STEM": (4, 0.5), "Other": (3, 2 / 3)}
    says_b = {name: given["B"] for name, given in result["answers_given"].items()}
    assert says_b == {"A": 2, "B": 4, "C": 1, "D": 0}


def test_the_table_of_subjects_is_the_benchmarks_size():
    sizes = {group: len(subjects.split()) for group, subjects in GROUPS.items()}
    assert sizes == {"STEM": 18, "Social Sciences": 12, "Humanities": 13, "Other": 14}
    assert len(GROUP_OF) == 57


def test_a_prompt_too_long_loses_first_shots_then_its_own_start():
    question = {
        "head": "H",
        "shots": ["one ", "two ", "three "],
        "text": "text",
        "endings": [" A", " BC"],
        "answer": 0,
    }
    cases = [  # room, what is left of the prompt, shots dropped, whether it is cut
        (22, "Hone two three text", 0, False),
        (21, "Htwo three text", 1, False),
        (12, "Htext", 3, False),
        (6, "ext", 3, True),
    ]
    for room, context, dropped, cut in cases:
        fitted = fit(question, BYTES, room)
        assert (fitted["dropped"], fitted["cut"]) == (dropped, cut)
        ids, start = fitted["rows"][1]
        assert BYTES.decode(ids[:start].tolist()) == context
        assert BYTES.decode(ids[start:].tolist()) == " BC"
    with pytest.raises(SystemExit, match="more than 3 tokens"):
        fit(question, BYTES, 3)


def test_answers_are_right_if_their_numbers_are(tmp_path, monkeypatch):
    texts = ["3 + 4\n#### 1,000", "so it is $12.00.", "no idea", "#### 8"]

    def said(model, encoding, prompts, *args):
        asked = [BYTES.decode(ids.tolist()).partition("?")[0] for ids in prompts]
        return [texts[int(question[-1])] for question in asked]

    monkeypatch.setattr(evaluate, "greedy", said)
    lines = []
    for i, x in enumerate(("1000", "12", "3", "9")):
        record = {"question": f"n{i}?", "answer": f"thus\n#### {x}"}
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "x.jsonl").write_text("".join(lines))
    result = run(
        model=saved(tmp_path / "run", tiny()),
        task="generate",
        data=tmp_path / "x.jsonl",
        max_new_tokens=9,
        prompt=r"Question: {question}\nAnswer:",
        out=tmp_path / "r.json",
    )
    assert (result["n"], result["accuracy"], result["no_number"]) == (4, 0.5, 1)


# -----------------------------------------------------------------------------
# the run


def interrupt_after(n, monkeypatch):
    """Ctrl-C comes after n batches. Returns the list of their sizes, in rows."""
    sizes = []

    def counted(model, rows):
        if len(sizes) == n:
            raise KeyboardInterrupt
        sizes.append(len(rows))
        return loglikelihoods(model, rows)

    monkeypatch.setattr(evaluate, "loglikelihoods", counted)
    return sizes


def test_an_interrupted_evaluation_goes_on_to_the_same_result(tmp_path, monkeypatch):
    settings = sst2(tmp_path) | {"model": saved(tmp_path / "run", tiny())}
    settings |= {"batch_size": 2, "out": tmp_path / "r.json"}
    whole = run(**settings)

    before = interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    partial = tmp_path / "r.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 6
    with open(partial, "a") as f:
        f.write('{"item": 11, "sco')  # torn

    # nothing is done twice
    after = interrupt_after(None, monkeypatch)
    again = run(**settings)
    assert before + after == [4] * 6 and not partial.exists()
    for result in (whole, again):
        del result["seconds"], result["peak_memory_gib"]
    assert again == whole


@pytest.mark.parametrize("change", ["setting", "data", "model"])
def test_results_of_anything_else_are_not_taken_up(tmp_path, monkeypatch, capsys, change):
    settings = sst2(tmp_path)
    settings |= {"model": saved(tmp_path / "run", tiny()), "out": tmp_path / "r.json"}
    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(**settings, batch_size=8)
    if change == "setting":
        settings["prompt"] = "{sentence}"
    elif change == "data":
        sst2(tmp_path, n=13)
    else:
        saved(tmp_path / "run", tiny(block_size=512), block_size=512)
    monkeypatch.setattr(evaluate, "loglikelihoods", loglikelihoods)
    result = run(**settings)
    assert "starting anew" in capsys.readouterr().out
    assert result["n"] == (13 if change == "data" else 12)


PARTIALS = [  # what a line of partial results may be
    b"not JSON",
    b"[]",
    b"7",
    b'{"item": 3}',
    b'{"item": "3", "seconds": 1, "scores": [0, 0]}',
    b'{"item": 99, "seconds": 1, "scores": [0, 0]}',
    b'{"item": -1, "seconds": 1, "scores": [0, 0]}',
    b'{"item": true, "seconds": 1, "scores": [0, 0]}',
    b'{"item": 3, "seconds": null, "scores": [0, 0]}',
    b'{"item": 3, "seconds": 1, "scores": [0]}',
    b'{"item": 3, "seconds": 1, "scores": [0, "0"]}',
    b'{"item": 3, "seconds": 1, "scores": [0, NaN]}',
    b'{"item": 3, "seconds": 1, "text": "0"}',
    b"\xff\0",
]


def test_partial_results_that_are_none_are_computed_again(tmp_path, monkeypatch):
    settings = sst2(tmp_path) | {"model": saved(tmp_path / "run", tiny())}
    settings |= {"batch_size": 2, "out": tmp_path / "r.json"}
    whole = run(**settings)
    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    with open(tmp_path / "r.json.partial.jsonl", "ab") as f:
        f.write(b"\n".join(PARTIALS))
    again = interrupt_after(None, monkeypatch)
    result = run(**settings)
    assert len(again) == 5  # the first batch is not done again
    assert result["accuracy"] == whole["accuracy"]
    assert result["answers_given"] == whole["answers_given"]


def test_no_result_takes_anothers_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        saved(tmp_path / name / "run", tiny(n_layer=1), n_layer=1)
        (tmp_path / name / "text.txt").write_text(f"text of {name}")

    def evaluated(**settings):
        argv = [f"--{name}={value}" for name, value in settings.items()]
        evaluate.evaluate(configure(evaluate, argv=argv))
        return sorted(glob.glob("eval-*.json"))

    seen = evaluated(model="a/run", data="a/text.txt")
    assert seen == evaluated(model="./a/run/", data=f"{tmp_path}/a/text.txt", batch_size=2)
    for settings in (
        {"data": "b/text.txt"},
        {"model": "b/run"},
        {"limit": 1},
        {"block_size": 16},
    ):
        now = evaluated(**{"model": "a/run", "data": "a/text.txt"} | settings)
        assert len(now) == len(seen) + 1 and set(seen) < set(now)
        seen = now
    (tmp_path / "a/text.txt").write_text("another text")
    assert len(evaluated(model="a/run", data="a/text.txt")) == len(seen) + 1
    assert sorted(os.listdir()) == sorted(["a", "b", *glob.glob("eval-*.json")])
    assert os.listdir("a/run") == ["ckpt.pt"]

    # into a file that the user names: said, and nothing but a result is replaced
    capsys.readouterr()
    evaluated(model="a/run", data="a/text.txt", out="r.json")
    assert "replaced" not in capsys.readouterr().out
    evaluated(model="a/run", data="b/text.txt", out="r.json")
    assert "r.json has the result of other settings, model or data" in capsys.readouterr().out
    for path, why in (("b/text.txt", "is no result"), ("a", "is a folder")):
        with pytest.raises((SystemExit, OSError), match=why):
            evaluated(model="a/run", data="a/text.txt", out=path)
    assert (tmp_path / "b/text.txt").read_text() == "text of b"


def test_two_processes_do_not_share_partial_results(tmp_path):
    path = tmp_path / "r.json.partial.jsonl"
    with open_partial(str(path)):
        with pytest.raises(SystemExit, match="another process evaluates this"):
            with open_partial(str(path)):
                pass
    assert not path.exists()


@pytest.mark.parametrize("task", ["perplexity", "choice", "generate"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])  # of the last the logits are not
def test_a_model_that_is_not_finite_has_no_accuracy(tmp_path, task, value):
    model = tiny()
    with torch.no_grad():
        model.head.weight.fill_(value)
    settings = sst2(tmp_path)
    if task == "perplexity":
        (tmp_path / "x.txt").write_text("text")
        settings = {"data": tmp_path / "x.txt"}
    elif task == "generate":
        (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "1"}\n' * 2)
        settings = {"data": tmp_path / "x.jsonl", "prompt": "{question}", "max_new_tokens": 9}
    settings |= {"task": task, "model": saved(tmp_path / "run", model)}
    match = "error: .*: weight head.weight is not finite: nothing can be evaluated"
    if math.isfinite(value):
        match = "error: model=.*: item [0-9]+: the model answers (nan|-inf)"
    with pytest.raises(SystemExit, match=match):
        run(**settings, out=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_equal_scores_are_counted(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    settings = sst2(tmp_path) | {"labels": "bad,meh", "model": saved(tmp_path / "run", model)}
    assert run(**settings, out=tmp_path / "r.json")["ties"] == 12


def test_texts_of_any_unicode_have_one_perplexity(tmp_path, monkeypatch):
    folder = saved(tmp_path / "run", tiny())
    text = "naïve — 🙂 " * 9
    files = {
        "x.txt": text.encode(),
        "x-bom.txt": text.encode("utf-8-sig"),
        "x-16.raw": text.encode("utf-16"),
        "x.txt.gz": gzip.compress(text.encode()),
        "x.jsonl": json.dumps({"text": text}).encode(),
    }
    found = set()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        result = run(model=folder, data=tmp_path / name, out=tmp_path / "r.json")
        found.add((result["nats_per_token"], result["bytes"]))
    assert len(found) == 1
    (tmp_path / "bad.txt").write_bytes(b"good \x80")
    with pytest.raises(SystemExit, match="bad.txt: at byte 5: not UTF-8"):
        run(model=folder, data=tmp_path / "bad.txt", out=tmp_path / "r.json")
    monkeypatch.setattr("finetune.evaluation.items.LARGEST_TEXT", 9)
    with pytest.raises(SystemExit, match="make shards of it"):
        run(model=folder, data=tmp_path / "x.txt", out=tmp_path / "r.json")


def test_bad_input_is_one_line(tmp_path):
    choice = sst2(tmp_path)
    perplexity = {"data": choice["data"]}
    folder = mmlu(tmp_path / "mmlu")
    files = {
        "label.tsv": "fine\t1\nbad\t2\n",
        "fields.tsv": "fine\t1\nbad\n",
        "empty.tsv": "",
        "empty.txt": "",
        "x.txt": "text",
        "x.jsonl": '{"question": "?", "answer": "none"}\n',
        "mmlu/test/virology_test.csv": "q,a,b,c,d,A\nq,a,b,c,D\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    write_shard(f"{tmp_path}/other_val_0.bin", np.array([5, 300]), 0)
    generate = {"task": "generate", "data": tmp_path / "x.jsonl"}
    cases = [
        ({"task": "sums"}, "task must be one of perplexity, choice, mmlu, generate, not 'sums'"),
        ({"dtype": "half"}, "dtype must be one of auto, bfloat16, float16, float32, not 'half'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"shots": -1}, "shots must be at least 0, not -1"),
        ({"data": "absent.txt"}, "data=absent.txt: no such file"),
        ({"data": tmp_path / "empty.txt"}, "there is nothing in it"),
        (perplexity | {"model": tmp_path / "absent"}, "absent"),
        (perplexity | {"block_size": 512}, "block_size 512: the model's is 256"),
        (choice | {"data": tmp_path / "label.tsv"}, "line 2: label '2' is none of 0 to 1"),
        (choice | {"data": tmp_path / "fields.tsv"}, "fields.tsv, line 2: 1 fields instead of 2"),
        (choice | {"data": tmp_path / "empty.tsv"}, "there is nothing in it"),
        (choice | {"prompt": "{text}"}, "dev.tsv, line 1: no field 'text'"),
        (choice | {"columns": "sentence,class"}, "dev.tsv, line 1: no field 'label'"),
        (
            choice | {"columns": "sentence,class", "completion": " {sentence}"},
            "dev.tsv, line 1: no field 'label'",
        ),
        (choice | {"labels": ""}, "task choice needs --prompt and --labels"),
        (choice | {"labels": "one"}, "expected two or more, all different"),
        (choice | {"labels": "a,b,a"}, "expected two or more, all different"),
        (choice | {"completion": " x"}, "two labels are the same: it needs {label}"),
        (choice | {"data": tmp_path / "x.txt"}, "is text, where records were expected"),
        ({"data": tmp_path}, "is a folder: name its files"),
        ({"data": ""}, "--data is missing"),
        ({"data": tmp_path / "other_val_0.bin"}, "token 300 is beyond the 257 of the model's"),
        (perplexity | {"model": tmp_path}, "has neither ckpt.pt nor config.json"),
        (perplexity | {"model": tmp_path / "x.txt"}, "is a file, where a model's folder"),
        (perplexity | {"device": "tpu"}, "device must be one of auto, cuda, cpu, not 'tpu'"),
        (choice | {"shots": 13}, "12 records for 13 shots"),
        ({"task": "mmlu", "data": folder}, "virology_test.csv, line 2: 5 fields instead of 6"),
        ({"task": "mmlu", "data": tmp_path}, "there is nothing in it"),
        (generate, "task generate needs --prompt"),
        (generate | {"prompt": "{question}"}, "line 1: no number in the answer"),
    ]
    model = saved(tmp_path / "run", tiny())
    for settings, message in cases:
        with pytest.raises(SystemExit) as e:
            run(**{"model": model, "out": tmp_path / "r.json"} | settings)
        line = str(e.value)
        assert line.startswith("error: ") and "\n" not in line, settings
        assert message in line, settings


def test_the_command_line_leaves_the_run_as_it_is(tmp_path):
    folder = saved(tmp_path / "run", tiny())
    (tmp_path / "text.txt").write_text("some text")
    command = ["finetune.evaluate", "--model=run", "--data=text.txt"]
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": HERE}}
    process = script(*command, **here)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    [path] = glob.glob(f"{tmp_path}/eval-*")
    name = os.path.basename(path)
    assert name.startswith("eval-perplexity-run-text.txt-") and name.endswith(".json")
    with open(path) as f:
        result = json.load(f)
    assert result["tokens"] == 9 and result["peak_memory_gib"] > 0
    assert result["settings"]["task"] == "perplexity"
    assert out.startswith(f"{name}: n 1, tokens 9, ")
    assert os.listdir(folder) == ["ckpt.pt"]

    process = script(*command, "--task=sums", **here)
    out, err = process.communicate(timeout=240)
    one_line_error((process.returncode, out, err), "task must be one of")
    assert err.count("\n") == 1
