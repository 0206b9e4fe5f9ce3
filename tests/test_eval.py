"""
Tests of eval.py: tiny random models with the bytes encoding, data of their own, a CPU:
    python -m pytest test_eval.py
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_INTERPRET", "1" if not torch.cuda.is_available() else "0")

from finetune import evaluate as evaluation  # a built-in has the name
from run.checkpoint import save_checkpoint
from configurator import configure
from finetune.evaluate import GROUP_OF, GROUPS, fit, greedy, loglikelihoods, number, read_mmlu, windows
from model import LLaMA
from run.shards import write_shard
from run.encodings import get_encoding

BYTES = get_encoding("bytes")
DEFAULTS = configure(vars(evaluation), [])
SETTINGS = {"method": "qgalore", "weight_bits": 8, "weight_group_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
            "n_embd": 32, "ffn_dim": 64, "vocab_size": 257, "block_size": 256, "encoding": "bytes"}


def tiny(**settings):
    torch.manual_seed(0)
    model = LLaMA.from_settings(SETTINGS | settings, "cpu", torch.float32)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(10)  # logits that differ by much more than float noise
    return model


def saved(folder, model, **settings):
    """A run's folder with this model, as train.py leaves it."""
    os.makedirs(folder, exist_ok=True)
    save_checkpoint(str(folder), {"config": SETTINGS | settings, "model": model.state_dict(), "optimizer": {},
                                  "iter": 1, "position": (0, 0)})
    return str(folder)


def run(**settings):
    """What eval.py's main writes with these settings."""
    vars(evaluation).update(DEFAULTS)
    argv, sys.argv = sys.argv, ["eval.py", *(f"--{key}={value}" for key, value in settings.items())]
    try:
        evaluation.main()
    finally:
        sys.argv = argv
    with open(settings["out"]) as f:
        return json.load(f)


def ids_of(text):
    return np.array(BYTES.encode_ordinary(text), np.int64)


def always_b(folder):
    """A run whose model answers 'B' to all: every hidden state is ones, the head's row of B alone is positive."""
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
    path = folder / "dev.tsv"
    path.write_text("".join(f"film {'so ' * (i * 5 % 7)}number {i}\t{i % 3 % 2}\n" for i in range(n)))
    return {"data": path, "columns": "sentence,label", "labels": "bad,very good",
            "prompt": r"Review: {sentence}\nIt is"}


def mmlu(folder, counts=(("abstract_algebra", "AABB"), ("virology", "B"), ("my_subject", "CB"))):
    for name in ("dev", "test"):
        os.makedirs(folder / name)
    for subject, answers in counts:
        dev = "".join(f'"{subject}, {i}?",w{i},"x, {i}",y,z,{"ABCDA"[i]}\n' for i in range(5))
        (folder / "dev" / f"{subject}_dev.csv").write_text(dev)
        test = "".join(f"what is {i}{'?' * i},one,two,three,four,{answer}\n" for i, answer in enumerate(answers))
        (folder / "test" / f"{subject}_test.csv").write_text(test)
    return folder


# -----------------------------------------------------------------------------
# scores and answers


def plainly(model, ids, start):
    """The log-likelihood of ids[start:] by one forward a token, alone and without a cache."""
    total = 0.0
    for t in range(start, len(ids)):
        total += F.log_softmax(model(torch.from_numpy(ids[None, :t])), dim=-1)[0, ids[t]].item()
    return total


@torch.no_grad()
def test_log_likelihoods_are_those_of_one_row_at_a_time_without_a_cache():
    model = tiny()
    cases = [("same start, ", "yes"), ("same start, ", "no"), ("same start, and a longer row ", "B"),
             ("same start, and a longer row ", "C"), ("s", "a"), ("other", " words")]
    rows = [(ids_of(a + b), len(a)) for a, b in cases]
    plain = [plainly(model, *row) for row in rows]
    for some in (slice(0, 2), slice(0, 4), slice(2, 4), slice(0, 6), slice(4, 5), slice(3, 6)):
        assert loglikelihoods(model, rows[some]) == pytest.approx(plain[some], abs=1e-4)


def test_what_rows_share_goes_through_the_model_once_and_logits_are_made_for_wanted_tokens_alone(monkeypatch):
    model, tokens, logits = tiny(), [], []
    hidden, head = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda idx, *a, **k: tokens.append(idx.shape) or hidden(idx, *a, **k))
    monkeypatch.setattr(model, "logits", lambda h: logits.append(h.shape) or head(h))
    monkeypatch.setattr(evaluation.layers, "LOSS_CHUNK", 4)
    text = "a long common beginning"
    loglikelihoods(model, [(ids_of(text + end + x), len(text + end)) for end in ("1", "2") for x in "ABC"])
    assert tokens == [(1, 23), (2, 1)]  # three choices of one token have one input
    assert logits == [(4, 32), (2, 32)]


def test_batched_greedy_answers_are_those_of_generate_one_by_one_also_past_the_window():
    model = tiny(block_size=24)
    prompts = [ids_of(text) for text in ("a", "some more text", "and yet another", "some more texx")]
    alone = []
    for ids in prompts:
        new = [t.item() for t in model.generate(torch.from_numpy(ids[None]), 20, temperature=0)]
        alone.append(BYTES.decode(new[: new.index(256)] if 256 in new else new))
    assert len(set(alone)) > 1
    assert greedy(model, BYTES, prompts, 20) == alone
    assert greedy(model, BYTES, prompts[:1], 20) == alone[:1]


def test_an_answer_ends_before_a_stop_string_or_end_of_text(monkeypatch):
    model, said = tiny(), ["one\nQuestion: two", "12\x00three"]
    script = [[256 if c == "\x00" else ord(c) for c in text.ljust(20)] for text in said]
    steps = iter(range(20))

    def logits(h):
        t = next(steps)
        return F.one_hot(torch.tensor([line[t] for line in script]), 257).float()

    monkeypatch.setattr(model, "logits", logits)
    assert greedy(model, BYTES, [ids_of("x"), ids_of("yy")], 20, stop="\nQuestion:") == ["one", "12"]
    assert next(steps) == 13  # both have ended: no more tokens are made


@pytest.mark.parametrize("text,value", [
    ("so 3 + 4 = 7\n#### 7", "7"), ("#### 1,234,567", "1234567"), ("#### $5.50.", "5.5"), ("####-12", "-12"),
    ("#### -$3", "-3"), ("#### $-3", "-3"), ("it is 12 or 13.", "13"), ("10-5", "5"), ("#### 72.0 apples", "72"),
    ("####\n8", "8"), ("#### none, but 4", "4"), ("in 1,2 and 3,45", "45"), ("#### 5\n#### 6", "5"),
    ("none", None), ("", None), (".5", "0.5")])
def test_the_answer_is_the_number_after_the_mark_or_else_the_last_one(text, value):
    assert number(text) == (None if value is None else float(value))


# -----------------------------------------------------------------------------
# tasks


def test_perplexity_is_exp_of_the_models_loss_with_every_token_predicted_once(tmp_path):
    model, text = tiny(block_size=32), "Größe, 32 tokens a window. " * 5
    folder = saved(tmp_path / "run", model, block_size=32)
    (tmp_path / "text.txt").write_text(text)
    result = run(model=folder, data=tmp_path / "text.txt", out=tmp_path / "r.json", batch_size=3)
    ids = torch.tensor([256, *text.encode()])
    nats = sum(model(w[None, :-1], w[None, 1:]).item() * (len(w) - 1)
               for w in (ids[i : i + 33] for i in range(0, len(ids) - 1, 32)))
    assert result["tokens"] == result["bytes"] == len(text.encode())
    assert result["nats_per_token"] == pytest.approx(nats / len(text.encode()), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(text.encode())), rel=1e-4)
    write_shard(str(tmp_path / "x_val_0.bin"), ids[1:].numpy(), 257)
    shards = run(model=folder, data=tmp_path / "*_val_*.bin", out=tmp_path / "r.json")
    assert shards["nats_per_token"] == pytest.approx(result["nats_per_token"]) and shards["bytes"] == result["bytes"]
    assert run(model=folder, data=tmp_path / "text.txt", out=tmp_path / "r.json", limit=2)["tokens"] == 64


def test_windows_meet_end_to_end_and_not_across_files(tmp_path):
    for name, text in (("a", "abcde"), ("b", "fg")):
        (tmp_path / f"{name}.txt").write_text(text)
    items, size = windows(str(tmp_path / "*.txt"), BYTES, 3)
    rows = [item["rows"][0] for item in items]
    assert [bytes(ids[1:].tolist()) for ids, start in rows] == [b"abc", b"de", b"fg"] and size == 7
    assert [int(ids[0]) for ids, start in rows] == [256, ord("c"), 256] and {start for _, start in rows} == {1}


def test_the_likeliest_label_is_chosen_whatever_the_batch_size(tmp_path):
    model = tiny()
    folder, settings = saved(tmp_path / "run", model), sst2(tmp_path)
    results = [run(model=folder, task="choice", out=tmp_path / "r.json", batch_size=n, **settings) for n in (1, 5, 64)]
    right, given = 0, {"bad": {"bad": 0, "very good": 0}, "very good": {"bad": 0, "very good": 0}}
    for line in settings["data"].read_text().splitlines():
        sentence, label = line.split("\t")
        text = f"Review: {sentence}\nIt is"
        scores = [plainly(model, ids_of(f"{text} {word}"), len(text)) for word in given]
        chosen = int(scores[1] > scores[0])
        right += chosen == int(label)
        given[list(given)[int(label)]][list(given)[chosen]] += 1
    for result in results:
        assert result["n"] == 12 and result["accuracy"] == right / 12 and result["answers_given"] == given
        assert result["standard_error"] == pytest.approx(math.sqrt(right / 12 * (1 - right / 12) / 11))


def test_shots_are_the_first_records_and_are_not_asked_or_another_files(tmp_path, monkeypatch):
    settings, seen = sst2(tmp_path), []
    monkeypatch.setattr(evaluation, "fit", lambda x, *a: seen.append(x) or fit(x, *a))
    model = saved(tmp_path / "run", tiny())
    result = run(model=model, task="choice", out=tmp_path / "r.json", shots=2, **settings)
    assert result["n"] == 10 and result["shots_dropped"] == 0
    assert seen[0]["shots"] == ["Review: film number 0\nIt is bad\n\n",
                                "Review: film so so so so so number 1\nIt is very good\n\n"]
    (tmp_path / "train.tsv").write_text("fine\t1\n")
    seen.clear()
    settings |= {"shots": 1, "shots_data": tmp_path / "train.tsv"}
    assert run(model=model, task="choice", out=tmp_path / "r.json", limit=7, **settings)["n"] == 7
    assert seen[0]["shots"] == ["Review: fine\nIt is very good\n\n"]


def test_mmlus_prompt_is_the_benchmarks(tmp_path):
    first = read_mmlu(str(mmlu(tmp_path)), 2)[0]
    assert first["head"] + "".join(first["shots"]) + first["text"] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "abstract_algebra, 0?\nA. w0\nB. x, 0\nC. y\nD. z\nAnswer: A\n\n"
        "abstract_algebra, 1?\nA. w1\nB. x, 1\nC. y\nD. z\nAnswer: B\n\n"
        "what is 0\nA. one\nB. two\nC. three\nD. four\nAnswer:")
    assert first["endings"] == [" A", " B", " C", " D"] and first["answer"] == 0
    subjects = [x["subject"] for x in read_mmlu(str(tmp_path), 0, limit=1)]
    assert subjects == ["abstract_algebra", "my_subject", "virology"]


def test_a_model_that_always_says_b_is_right_as_often_as_b_is_by_subject_and_group(tmp_path, capsys):
    folder = mmlu(tmp_path / "mmlu")
    result = run(model=always_b(tmp_path / "run"), task="mmlu", data=folder, shots=1, out=tmp_path / "r.json")
    assert "my_subject is none of MMLU's 57 subjects" in capsys.readouterr().out
    assert (result["n"], result["accuracy"]) == (7, 4 / 7)
    assert {name: (x["n"], x["accuracy"]) for name, x in result["subjects"].items()} == {
        "abstract_algebra": (4, 0.5), "virology": (1, 1.0), "my_subject": (2, 0.5)}
    # Other is over its 3 questions: the mean of its subjects would be 3/4
    assert {name: (x["n"], x["accuracy"]) for name, x in result["groups"].items()} == {
        "STEM": (4, 0.5), "Other": (3, 2 / 3)}
    assert {name: given["B"] for name, given in result["answers_given"].items()} == {"A": 2, "B": 4, "C": 1, "D": 0}


def test_the_table_of_subjects_is_the_benchmarks_size():
    assert {group: len(subjects.split()) for group, subjects in GROUPS.items()} == {
        "STEM": 18, "Social Sciences": 12, "Humanities": 13, "Other": 14}
    assert len(GROUP_OF) == 57


def test_a_prompt_too_long_loses_its_first_shots_and_then_its_own_start():
    question = {"head": "H", "shots": ["one ", "two ", "three "], "text": "text", "endings": [" A", " BC"], "answer": 0}
    for room, context, dropped, cut in ((22, "Hone two three text", 0, False), (21, "Htwo three text", 1, False),
                                        (12, "Htext", 3, False), (6, "ext", 3, True)):
        fitted = fit(question, BYTES, room)
        assert (fitted["dropped"], fitted["cut"]) == (dropped, cut)
        ids, start = fitted["rows"][1]
        assert BYTES.decode(ids[:start].tolist()) == context and BYTES.decode(ids[start:].tolist()) == " BC"
    with pytest.raises(SystemExit, match="more than 3 tokens"):
        fit(question, BYTES, 3)


def test_answers_are_right_if_their_numbers_equal_the_references(tmp_path, monkeypatch):
    texts = ["3 + 4\n#### 1,000", "so it is $12.00.", "no idea", "#### 8"]
    monkeypatch.setattr(evaluation, "greedy", lambda net, encoding, prompts, *a: [
        texts[int(BYTES.decode(ids.tolist()).split("?")[0][-1])] for ids in prompts])
    records = [{"question": f"n{i}?", "answer": f"thus\n#### {x}"} for i, x in enumerate(("1000", "12", "3", "9"))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run(model=saved(tmp_path / "run", tiny()), task="generate", data=tmp_path / "x.jsonl", max_new_tokens=9,
                 prompt=r"Question: {question}\nAnswer:", out=tmp_path / "r.json")
    assert (result["n"], result["accuracy"], result["no_number"]) == (4, 0.5, 1)


# -----------------------------------------------------------------------------
# the run


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_without_doing_anything_twice(tmp_path, monkeypatch):
    model, settings, rows = saved(tmp_path / "run", tiny()), sst2(tmp_path), []
    settings |= {"model": model, "task": "choice", "batch_size": 2, "out": tmp_path / "r.json"}
    whole = run(**settings)

    def counted(net, batch, stop_at=None):
        if len(rows) == stop_at:
            raise KeyboardInterrupt
        rows.append(len(batch))
        return loglikelihoods(net, batch)

    monkeypatch.setattr(evaluation, "loglikelihoods", lambda net, batch: counted(net, batch, stop_at=3))
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    partial = tmp_path / "r.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 6
    with open(partial, "a") as f:
        f.write('{"item": 11, "sco')  # torn
    monkeypatch.setattr(evaluation, "loglikelihoods", counted)
    again = run(**settings)
    assert rows == [4] * 6 and not partial.exists()
    timing = ("seconds", "peak_memory_gib")
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}


@pytest.mark.parametrize("change", ["setting", "data", "model"])
def test_results_of_other_settings_data_or_weights_are_not_taken_up(tmp_path, monkeypatch, capsys, change):
    model, settings = saved(tmp_path / "run", tiny()), sst2(tmp_path)
    settings |= {"model": model, "task": "choice", "out": tmp_path / "r.json"}
    batches = iter([0])

    def once(net, rows):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return loglikelihoods(net, rows)

    monkeypatch.setattr(evaluation, "loglikelihoods", once)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=8, **settings)
    if change == "setting":
        settings["prompt"] = "{sentence}"
    elif change == "data":
        sst2(tmp_path, n=13)
    else:
        saved(tmp_path / "run", tiny(block_size=512), block_size=512)
    monkeypatch.setattr(evaluation, "loglikelihoods", loglikelihoods)
    result = run(**settings)
    assert "starting anew" in capsys.readouterr().out and result["n"] == 12 + (change == "data")


def test_bad_input_is_one_line(tmp_path):
    model, good, folder = saved(tmp_path / "run", tiny()), sst2(tmp_path), mmlu(tmp_path / "mmlu")
    (tmp_path / "label.tsv").write_text("fine\t1\nbad\t2\n")
    (tmp_path / "fields.tsv").write_text("fine\t1\nbad\n")
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "x.jsonl").write_text('{"question": "?", "answer": "none"}\n')
    (folder / "test" / "virology_test.csv").write_text("q,a,b,c,d,A\nq,a,b,c,D\n")
    choice = good | {"task": "choice"}
    cases = [
        ({"task": "sums"}, "task 'sums': there are perplexity choice mmlu generate"),
        ({"data": "absent.txt"}, "data=absent.txt: no such file"),
        ({"data": tmp_path / "empty.txt"}, "there is nothing in it"),
        ({"model": tmp_path / "absent", "data": tmp_path / "dev.tsv"}, "absent"),
        ({"data": good["data"], "block_size": 512}, "block_size 512: the model's is 256"),
        (choice | {"data": tmp_path / "label.tsv"}, r"label.tsv, line 2: label '2' is none of 0 to 1"),
        (choice | {"data": tmp_path / "fields.tsv"}, r"fields.tsv, line 2: 1 fields instead of 2"),
        (choice | {"data": tmp_path / "empty.tsv"}, "there is nothing in it"),
        (choice | {"prompt": "{text}"}, "dev.tsv, line 1: no field 'text'"),
        (choice | {"columns": "sentence,class"}, "dev.tsv, line 1: no field 'label'"),
        (choice | {"labels": ""}, "task choice needs --prompt and --labels"),
        (choice | {"shots": 13}, "12 records for 13 shots"),
        ({"task": "mmlu", "data": folder}, r"virology_test.csv, line 2: 5 fields instead of 6"),
        ({"task": "mmlu", "data": tmp_path}, "there is nothing in it"),
        ({"task": "generate", "data": tmp_path / "x.jsonl", "prompt": "{question}"}, "line 1: no number in the answer"),
    ]
    for settings, message in cases:
        with pytest.raises(SystemExit) as e:
            run(**{"model": model, "out": tmp_path / "r.json"} | settings)
        assert message in str(e.value) and str(e.value).startswith("error: ") and "\n" not in str(e.value), settings


def test_the_command_line_writes_its_result_into_the_runs_folder(tmp_path):
    folder = saved(tmp_path / "run", tiny())
    (tmp_path / "text.txt").write_text("some text")
    here = os.path.dirname(os.path.abspath(evaluation.__file__))
    command = [sys.executable, os.path.join(here, "eval.py"), f"--model={folder}", f"--data={tmp_path / 'text.txt'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "eval-perplexity.json") as f:
        result = json.load(f)
    assert result["tokens"] == 9 and result["settings"]["task"] == "perplexity" and result["peak_memory_gib"] > 0
    assert sorted(os.listdir(tmp_path / "run")) == ["ckpt.pt", "eval-perplexity.json"]
    bad = subprocess.run([*command, "--task=sums"], capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1
