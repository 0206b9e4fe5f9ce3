"""
GaLore's protocol: rows of T5's tokens, what of them counts, and the validation that is read:
    python -m pytest tests/test_protocol.py
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F

import prepare_c4
from configurator import configure
from model import LLaMA
from prepare_c4 import prepare
from run import protocol
from run.data import Windows
from run.encodings import get_encoding
from run.protocol import row_of
from run.shards import open_shard
from tests.common import HERE, refused, settings, tiny

WORDS = "the class will teach you everything about smoke meat and fire in the city".split()
TEXTS = [
    "The class is on Thursday.\nBring your own meat, and an apron.",
    " ".join(WORDS[i % 7 + i % 8] for i in range(400)),  # longer than a row
    "café  ☃ fire <unk> a</s> <pad> meat",  # an unknown sign, and special tokens
    "",
    "smoke",
]


def write_t5(folder):
    """A tokenizer as T5's is: Unigram over words that ▁ marks, <pad> 0, </s> 1, <unk> 2."""
    pieces = [f"▁{word}" for word in sorted(set(WORDS))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTBé.,0123456789<>_/"]
    special = ["<pad>", "</s>", "<unk>"]
    scores = [(token, 0.0) for token in special]
    scores += [(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)]
    scores.append(("<extra_id_0>", 0.0))  # the last one, as T5's sentinels are
    t5 = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    before = tokenizers.pre_tokenizers
    t5.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), before.Metaspace()])
    t5.decoder = tokenizers.decoders.Metaspace()
    t5.add_special_tokens(special)
    t5.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    os.makedirs(folder)
    t5.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump({"eos_token": "</s>"}, f)
    return str(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5") / "like")


def write_records(path, texts=TEXTS):
    """Records as C4 has them."""
    with open(path, "w") as f:
        for text in texts:
            record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.org/"}
            f.write(json.dumps(record) + "\n")
    return str(path)


def rows_by_the_library(folder, texts=TEXTS):
    """What tokenizer(text, max_length=256, truncation=True, padding="max_length") gives."""
    t5 = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    t5.enable_truncation(256)
    t5.enable_padding(length=256, pad_id=0, pad_token="<pad>")
    return np.array([t5.encode(text).ids for text in texts])


def made(folder, t5, **changes):
    """prepare() of TEXTS in `folder`, by the protocol, into folder/out; returns that."""
    given = dict(input=write_records(folder / "x.jsonl"), out_dir=f"{folder}/out", encoding=t5,
                 protocol="galore", val_fraction=0, workers=1)
    prepare(**(given | changes))
    return folder / "out"


def rows_of(path):
    shard = open_shard(path)
    assert shard.row == 256
    return shard.tokens.reshape(-1, 256)


# -----------------------------------------------------------------------------
# rows


def test_rows_are_those_of_truncation_and_padding(tmp_path, t5):
    path = made(tmp_path, t5) / "x_train_00000.bin"
    rows = rows_of(path)
    assert np.array_equal(rows, rows_by_the_library(t5))
    assert rows[1, 255] == 1 and 0 not in rows[1]  # </s> ends a text that is cut, too
    assert rows[3].tolist() == [1] + [0] * 255

    flags = open_shard(path).flags.reshape(-1, 256)
    assert set(flags[:, 0]) == {2}
    assert np.array_equal(flags[:, 1:] == 1, rows[:, 1:] != 0)


def test_a_window_is_shifted_by_one_and_pads_are_no_targets(tmp_path, t5):
    path = str(made(tmp_path, t5) / "x_train_00000.bin")
    x, y, documents = Windows(path, 255, 61).batch(5)
    rows = torch.from_numpy(rows_by_the_library(t5))
    assert torch.equal(x, rows[:, :-1])
    assert torch.equal(y, rows[:, 1:].masked_fill(rows[:, 1:] == 0, -1))
    assert (documents == 1).all()  # a token sees the whole text before it


def test_the_loss_is_that_of_the_published_code(tmp_path, t5):
    """All 256 tokens in, labels of padding -100, the shift after the model."""
    path = str(made(tmp_path, t5) / "x_train_00000.bin")
    torch.manual_seed(0)
    model = LLaMA(tiny(block_size=256, vocab_size=64))
    for p in model.parameters():
        p.data.mul_(5)  # logits that differ
    x, y, documents = Windows(path, 255, 64).batch(5)
    with torch.no_grad():
        loss = model(x, y, documents=documents)
        ids = torch.from_numpy(rows_by_the_library(t5))
        logits = model.logits(model.hidden(ids))  # (5, 256, 64)
    labels = ids.masked_fill(ids == 0, -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    every = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - every.item()) > 0.01


def test_a_sentinel_in_a_text_is_an_unknown_token(t5, monkeypatch):
    enc = get_encoding(t5)
    monkeypatch.setattr(protocol, "VOCABULARY", enc.n_vocab - 1)
    assert enc.n_vocab - 1 in enc.encode_with_special("a<extra_id_0>")
    row = row_of(enc, "a<extra_id_0>")
    assert 2 in row and row.max() < enc.n_vocab - 1


def test_the_last_rows_of_a_file_are_for_validation(tmp_path, t5):
    out = made(tmp_path, t5, val_fraction=0.5)
    rows = rows_by_the_library(t5)
    assert np.array_equal(rows_of(out / "x_train_00000.bin"), rows[:3])
    assert np.array_equal(rows_of(out / "x_val_00000.bin"), rows[3:])
    message = refused(made, tmp_path, t5, val_fraction=0.1, out_dir=f"{tmp_path}/other")
    assert "too few to split" in message


# -----------------------------------------------------------------------------
# C4


@pytest.fixture
def c4(tmp_path, monkeypatch):
    """Files of C4 on this disk: 5 documents each, other ones in each."""
    texts = {}

    def fetch(name):
        start = name.split("/c4-")[1].split("-of-")[0]
        texts[start] = [f"{text} {start[-1]}" for text in TEXTS]
        return write_records(tmp_path / f"{start}.json", texts[start])

    monkeypatch.setattr(prepare_c4, "fetch", fetch)
    return texts


@pytest.mark.parametrize("counted, count", [(300, 4), (8, 2), (400, 6)])
def test_validation_ends_with_the_batch_that_has_enough(
    tmp_path, t5, c4, monkeypatch, counted, count
):
    monkeypatch.setattr(protocol, "BATCH", 2)
    monkeypatch.setattr(protocol, "COUNTED", counted)
    made(tmp_path, t5, input="")
    documents = c4["validation.00000"] + c4["validation.00001"]
    rows = rows_by_the_library(t5, documents)
    ends = [n for n in range(2, 11, 2) if np.count_nonzero(rows[:n]) > counted]
    assert np.array_equal(rows_of(tmp_path / "out/c4_val_00000.bin"), rows[: ends[0]])
    train = rows_of(tmp_path / "out/c4_train_00000.bin")
    assert np.array_equal(train, rows_by_the_library(t5, c4["train.00000"]))


def test_a_validation_of_too_few_tokens_says_so(tmp_path, t5, c4, capsys):
    made(tmp_path, t5, input="")
    assert len(rows_of(tmp_path / "out/c4_val_00000.bin")) == 10
    rows = rows_by_the_library(t5, c4["validation.00000"] + c4["validation.00001"])
    note = f"note: {np.count_nonzero(rows):,} tokens for validation, where the published code takes"
    assert f"{note} 10,000,000" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the same command again, and others


def test_the_same_command_keeps_whole_shards_alone(tmp_path, t5, capsys):
    path = made(tmp_path, t5) / "x_train_00000.bin"
    before = path.read_bytes()
    time = path.stat().st_mtime_ns
    made(tmp_path, t5)
    assert "kept" in capsys.readouterr().out and path.stat().st_mtime_ns == time
    path.write_bytes(before[:-1])  # a flag less
    made(tmp_path, t5)
    assert path.read_bytes() == before


def test_rows_and_packed_text_share_no_folder(tmp_path, t5):
    made(tmp_path, t5)
    assert "as rows of 256 tokens" in refused(made, tmp_path, t5, protocol="packed")
    write_records(tmp_path / "y.jsonl", TEXTS[:2])
    other = dict(input=f"{tmp_path}/y.jsonl", protocol="packed")
    assert "by another protocol" in refused(made, tmp_path, t5, **other)
    packed = dict(out_dir=f"{tmp_path}/packed")
    made(tmp_path, t5, protocol="packed", **packed)
    assert "as packed text" in refused(made, tmp_path, t5, **packed)


# -----------------------------------------------------------------------------
# settings


def test_the_tokenizer_is_t5s_unless_one_is_given(monkeypatch):
    found = []
    monkeypatch.setattr(prepare_c4, "prepare", lambda **given: found.append(given["encoding"]))
    for argv in (["--protocol=galore"], ["--protocol=galore", "--encoding=copy"], []):
        prepare_c4.main(configure(prepare_c4, argv=argv))
    assert found == ["google-t5/t5-base", "copy", "gpt2"]
    assert "one of packed, galore" in refused(configure, prepare_c4, argv=["--protocol=t5"])


@pytest.mark.parametrize("encoding", ["gpt2", "bytes", "{}/other"])
def test_another_tokenizer_is_refused(tmp_path, encoding):
    t5 = write_t5(tmp_path / "other")
    with open(f"{t5}/tokenizer.json") as f:
        text = f.read().replace("<pad>", "<s>")
    with open(f"{t5}/tokenizer.json", "w") as f:
        f.write(text)
    encoding = encoding.format(tmp_path)
    message = refused(made, tmp_path, encoding)
    assert f"encoding={encoding} is not: leave encoding out for google-t5/t5-base" in message
    assert not (tmp_path / "out").exists()


def test_what_keeps_the_tokenizer_away_is_one_line(tmp_path, t5, monkeypatch):
    copy = shutil.copytree(t5, tmp_path / "copy")  # not read before
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused(made, tmp_path, str(copy))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "was not fetched" in refused(made, tmp_path, "google-t5/t5-none")
    monkeypatch.undo()
    (copy / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor" in refused(made, tmp_path, str(copy))


def test_a_text_file_has_no_documents_for_rows(tmp_path, t5):
    (tmp_path / "x.txt").write_text("the city")
    message = refused(made, tmp_path, t5, input=f"{tmp_path}/x.txt")
    assert "is text, where records were expected" in message


@pytest.mark.parametrize("size", ["60m", "130m"])
def test_the_recipes_are_the_papers_on_the_protocols_rows(size):
    ours = settings(f"{HERE}/config/c4_{size}.py").as_dict()
    papers = settings(f"{HERE}/config/llama_{size}.py").as_dict()
    changed = {name for name in ours if ours[name] != papers[name]}
    assert changed == {"out_dir", "data_dir", "encoding", "vocab_size", "block_size",
                       "eval_interval", "eval_iters"}
    assert ours["block_size"] == protocol.ROW - 1
    assert ours["vocab_size"] == protocol.VOCABULARY
    assert ours["encoding"] == protocol.T5
    assert ours["batch_size"] * ours["gradient_accumulation_steps"] == 512
    of_c4s_files = 50_000 * protocol.FILES  # documents, at most
    assert ours["eval_iters"] * ours["batch_size"] > of_c4s_files
