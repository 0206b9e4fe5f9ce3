"""
Tests of checkpoints' tokenizers, of supervised data, and of shards with a loss on some tokens.
    python -m pytest tests/test_sft.py
"""

import base64
import codecs
import gzip
import json
import os
import random
import re
import sys

import numpy as np
import pytest
import tokenizers
import torch

import prepare_c4
import sample
from configurator import configure
from finetune import prepare_sft
from finetune.checkpoints.vocabularies import LLAMA3_SPLIT
from finetune.data.conversations import conversation
from finetune.data.examples import encode, examples
from finetune.data.rows import pack
from prepare_c4 import prepare
from run.data import Windows
from run.encodings import fingerprint, get_encoding
from run.shards import open_shard, read_shard, write_shard
from tests.common import one_line_error, run

TEMPLATE = """{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' -%}
        {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}{{- message['content'] + eos_token }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}"""
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WORDS = (
    "the a review question answer of is film good bad long very positive negative how many what"
).split()
TEXTS = [
    "",
    " ",
    "the  film\n\n is good.\n",
    "  Hé 🙂  \t12345, very\r\nbad ",
    "<|end|> is text</s><s>",
    "ａ\u0301　x",
]


def sentences(n, seed=0):
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        found.append(" ".join(words) + rng.choice(".?!\n"))
    return found


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f)


def write_lines(path, records):
    with open(path, "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


def contents(path):
    with open(path, "rb") as f:
        return f.read()


def byte_bpe(vocab_size=400, seed=0):
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=byte_level.alphabet(),
    )
    bpe.train_from_iterator(sentences(300, seed), trainer)
    return bpe


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The folder of a checkpoint's tokenizer: byte-level BPE as SmolLM2's, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    byte_bpe().save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
        "bos_token": "<|start|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The folder of a checkpoint with a sentencepiece model, as LLaMA-2's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(sentences(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {
        "eos_token": "</s>",
        "bos_token": "<s>",
        "add_bos_token": True,
        "added_tokens_decoder": {"380": {"content": "<|extra|>"}},
        "chat_template": LLAMA2_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of a checkpoint with a tiktoken rank file, as Meta's LLaMA-3."""
    folder = tmp_path_factory.mktemp("ranks")
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b" f", b"\n\n"]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return str(folder)


def transformers_tokenizer(folder):
    from transformers import AutoTokenizer  # slow

    return AutoTokenizer.from_pretrained(folder)


def message(role, content):
    return {"role": role, "content": content}


def refused(function, *args, **settings):
    """The one line that it exits with."""
    with pytest.raises(SystemExit) as e:
        function(*args, **settings)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


# -----------------------------------------------------------------------------
# tokenizers


def test_a_tokenizer_json_is_read_as_transformers_reads_it(chat):
    enc = get_encoding(chat)
    theirs = transformers_tokenizer(chat)
    assert enc.n_vocab == len(theirs)
    assert enc.eot_token == theirs.eos_token_id
    assert enc.bos_token == theirs.bos_token_id and not enc.add_bos_token
    for text in TEXTS + sentences(20, 1):
        special = theirs.encode(text, add_special_tokens=False)
        ordinary = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert enc.encode_with_special(text) == special
        assert enc.encode_ordinary(text) == ordinary
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert 2 not in enc.encode_ordinary("<|end|>")
    assert enc.encode_with_special("<|end|>") == [2]


def test_conversations_are_written_as_transformers_writes_them(chat):
    enc = get_encoding(chat)
    theirs = transformers_tokenizer(chat)
    messages = [
        message("system", "Be <b>good</b>"),
        message("user", "\nhow many"),
        message("assistant", "12\n"),
        message("user", "what  "),
    ]
    for prompt in (False, True):
        text = enc.render(messages, prompt)
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
        tokens = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=True
        )
        assert text == expected
        assert enc.encode_with_special(text) == tokens["input_ids"]
    with pytest.raises(ValueError, match="no such role: tool"):
        enc.render([message("tool", "")])


def test_a_file_of_a_checkpoint_is_its_folders_tokenizer(chat, pieces):
    for folder, file in ((chat, "tokenizer.json"), (pieces, "tokenizer.model")):
        by_folder = get_encoding(folder)
        by_file = get_encoding(f"{folder}/{file}")
        assert by_file.vocabulary == by_folder.vocabulary
        assert by_file.eot_token == by_folder.eot_token
        assert by_file.chat_template == by_folder.chat_template is not None


def test_chat_templates_have_what_transformers_gives_them(chat, tmp_path):
    template = (
        "{% for m in messages %}\n"
        "    {% if m.skip %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}\n"
        "{{ unk_token }}{% endfor %}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    settings = {
        "eos_token": "<|end|>",
        "unk_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": template},
        ],
    }
    (tmp_path / "tokenizer.json").write_bytes(contents(f"{chat}/tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", settings)
    messages = [message("user", "<é>"), message("user", "") | {"skip": True}]
    text = get_encoding(str(tmp_path)).render(messages)
    theirs = transformers_tokenizer(str(tmp_path))
    assert text == theirs.apply_chat_template(messages, tokenize=False)
    assert "<é>" in text and text.endswith("4True")


def test_the_sandbox_keeps_a_chat_template_from_the_machine(chat, tmp_path):
    template = "{{ messages.append.__globals__ }}{{ ''.__class__.__mro__[1]() }}"
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (tmp_path / "tokenizer.json").write_bytes(contents(f"{chat}/tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(ValueError, match="refuses"):
        get_encoding(str(tmp_path)).render([])


def test_a_text_starts_with_bos_if_the_files_say_so(chat, tmp_path):
    bpe = tokenizers.Tokenizer.from_file(f"{chat}/tokenizer.json")
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        "<|start|> $A", special_tokens=[("<|start|>", 1)]
    )
    bpe.enable_truncation(3)
    bpe.enable_padding(length=9)
    bpe.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": [2, 1]})

    # by the post-processor
    enc = get_encoding(str(tmp_path))
    assert enc.add_bos_token
    assert (enc.bos_token, enc.eot_token) == (1, 2)
    long = enc.encode_ordinary("what is the long film")
    assert len(long) > 3 and 1 not in long and 0 not in long  # neither truncated nor padded
    assert enc.with_bos(long) == [1, *long] == enc.with_bos([1, *long])

    # by the settings, against it
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    get_encoding.cache_clear()
    assert get_encoding(str(tmp_path)).with_bos(long) == long


def test_sentencepiece_gives_its_own_tokens_and_special_ones(pieces):
    import sentencepiece

    enc = get_encoding(pieces)
    theirs = sentencepiece.SentencePieceProcessor(f"{pieces}/tokenizer.model")
    assert enc.n_vocab == 381
    assert (enc.bos_token, enc.eot_token, enc.add_bos_token) == (1, 2, True)
    for text in TEXTS + sentences(20, 1):
        ids = theirs.encode(text)
        assert enc.encode_ordinary(text) == ids
        assert enc.decode(ids) == theirs.decode(ids) == text
    the, film = theirs.encode("the"), theirs.encode("film")
    ids = [1, *the, 2, *film, 380]
    assert enc.encode_with_special("<s>the</s>film<|extra|>") == ids
    assert enc.decode([1, *the, 2, 380]) == "<s>the</s><|extra|>"


def test_a_checkpoints_rank_file_has_llama_3s_special_tokens(ranks):
    enc = get_encoding(ranks)
    plain = get_encoding(f"{ranks}/tokenizer.model")
    assert enc.n_vocab == plain.n_vocab == 261 + 256
    assert (enc.bos_token, enc.eot_token, enc.add_bos_token) == (261, 262, True)
    for text in TEXTS + sentences(20, 1):
        assert enc.encode_ordinary(text) == plain.encode_ordinary(text)
        assert enc.decode(enc.encode_ordinary(text)) == text
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
    ids = [261, 267, *b"user", 268, 260, 257, 270]
    assert enc.encode_with_special(text) == ids
    assert enc.decode(ids) == text


def test_damaged_and_incomplete_tokenizers_are_one_line(chat, pieces, tmp_path, monkeypatch):
    def answer(files):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return refused(get_encoding, str(folder))

    whole = contents(f"{chat}/tokenizer.json")
    model = contents(f"{pieces}/tokenizer.model")
    assert "neither tokenizer.json nor tokenizer.model" in answer({})
    for damaged in (whole[:-100], b"", b"{}", b"[]", b'{"model": 3}'):
        assert "not a whole tokenizer.json" in answer({"tokenizer.json": damaged})
    assert "no end-of-text token" in answer({"tokenizer.json": whole})
    files = {"tokenizer.json": whole, "tokenizer_config.json": b"{"}
    assert "tokenizer_config.json: damaged" in answer(files)
    files = {"tokenizer.model": model[: len(model) // 2]}
    assert "not a whole sentencepiece model" in answer(files)
    assert "expected lines" in answer({"tokenizer.model": b"no ranks"})
    assert "No such file" in refused(get_encoding, f"{tmp_path}/tokenizer.json")

    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "tokenizer.json").write_bytes(whole)
    settings = {"eos_token": "<|end|>", "chat_template": "{% for %}"}
    write_json(bad / "tokenizer_config.json", settings)
    assert "its chat template is damaged" in refused(get_encoding(str(bad)).render, [])

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in answer({"tokenizer.model": model})


def test_a_hub_name_is_fetched_and_a_failure_is_one_line(chat, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options))
        return chat

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert get_encoding("someone/some-model").vocabulary == get_encoding(chat).vocabulary
    [(name, options)] = asked
    assert name == "someone/some-model"
    assert "model.safetensors" not in options["allow_patterns"]

    def fail(*args, **options):
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(chat)))
    here = os.path.relpath(chat)  # "a/b", too, but there is such a folder
    assert get_encoding(here).vocabulary == get_encoding(chat).vocabulary
    answer = refused(get_encoding, "someone/other")
    assert "someone/other is no directory" in answer and "not fetched: no network" in answer


def test_the_fingerprint_tells_equal_sizes_apart(chat, ranks, tmp_path):
    byte_bpe(seed=1).save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    names = [chat, str(tmp_path), "bytes", ranks]
    found = [fingerprint(get_encoding(name)) for name in names]
    assert get_encoding(str(tmp_path)).n_vocab == get_encoding(chat).n_vocab
    assert len(set(found)) == 4
    assert all(0 < n < 2**31 for n in found)
    fingerprint.cache_clear()
    get_encoding.cache_clear()
    assert [fingerprint(get_encoding(name)) for name in names] == found


@pytest.mark.parametrize("kind", ["chat", "pieces", "ranks"])
def test_where_a_long_text_is_cut_changes_no_tokens(kind, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(kind)
    text = " ".join(sentences(300)) + "\n\n"
    (tmp_path / "x.txt").write_text(text)
    monkeypatch.setattr(prepare_c4, "BLOCK", 50)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", folder, val_fraction=0)
    shard = open_shard(tmp_path / "out/x_train_00000.bin")
    enc = get_encoding(folder)
    assert shard.tokens.tolist() == [*enc.encode_ordinary(text), enc.eot_token]
    assert (shard.flags, shard.row, shard.fingerprint) == (None, 0, fingerprint(enc))
    assert enc.cuts_at_spaces == (kind != "pieces")


def split_by(pattern):
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(pattern), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_text_is_cut_only_for_splits_of_gpt_2_and_llama_3(tmp_path):
    pre = tokenizers.pre_tokenizers
    gpt2 = pre.ByteLevel(add_prefix_space=False)
    cases = [
        (gpt2, None, True),
        (pre.Sequence([pre.Digits(True), gpt2]), None, True),
        (split_by(LLAMA3_SPLIT), None, True),
        (split_by(r"\n+"), None, False),
        (gpt2, tokenizers.normalizers.Prepend("x"), False),
        (pre.ByteLevel(add_prefix_space=True), None, False),
        (pre.Metaspace(), None, False),
        (pre.Sequence([gpt2, pre.Metaspace()]), None, False),
    ]
    for i, (before, normalizer, cuts) in enumerate(cases):
        bpe = byte_bpe()
        bpe.pre_tokenizer = before
        if normalizer:
            bpe.normalizer = normalizer
        folder = tmp_path / str(i)
        folder.mkdir()
        bpe.save(str(folder / "tokenizer.json"))
        write_json(folder / "config.json", {"eos_token_id": 2})
        assert get_encoding(str(folder)).cuts_at_spaces == cuts, i


def test_text_that_another_tokenizer_made_is_not_kept(chat, tmp_path):
    (tmp_path / "x.txt").write_text("the film " * 100)
    byte_bpe(seed=1).save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    args = f"{tmp_path}/x.txt", f"{tmp_path}/out"
    prepare(*args, chat)
    assert "another tokenizer" in refused(prepare, *args, str(tmp_path))


# -----------------------------------------------------------------------------
# text as it is made


@pytest.fixture
def printed(monkeypatch):
    """What is printed, a list of texts."""
    texts = []

    def show(text="", end="\n", flush=False):
        texts.append(text + end)

    monkeypatch.setattr("builtins.print", show)
    return texts


def stream(monkeypatch, ids, enc, prompt):
    """sample.py's stream of a model that says `ids` after the prompt."""
    monkeypatch.setattr(sample, "generate", lambda *_: (torch.tensor([[i]]) for i in ids))
    sample.stream(None, enc, torch.tensor([prompt]), 99, 1.0, 0, 1.0, 0)


@pytest.mark.parametrize("kind", ["chat", "pieces", "ranks", "bytes"])
def test_text_streams_in_whole_characters(kind, request, monkeypatch, printed):
    name = kind if kind == "bytes" else request.getfixturevalue(kind)
    enc = get_encoding(name)
    ids = enc.encode_ordinary("the film is  é🙂é 很 bad") + [enc.n_vocab + 5]
    for cut in (1, 5, len(ids) - 12):
        printed.clear()
        stream(monkeypatch, ids[cut:], enc, ids[:cut])
        assert "".join(printed) == enc.decode(ids[:-1]) + "\n"
        assert "\ufffd" not in "".join(printed)
        assert len([text for text in printed if text]) > 5


def test_bytes_stream_as_an_incremental_decoder_gives_them(monkeypatch, printed):
    enc = get_encoding("bytes")
    rng = random.Random(0)
    for _ in range(100):
        ids = rng.choices([*"aé🙂".encode(), 0xFF], k=12)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        expected = "a" + "".join(utf8.decode(bytes([i])) for i in ids)
        expected += utf8.decode(b"", final=True) + "\n"
        printed.clear()
        stream(monkeypatch, ids, enc, [97])
        assert "".join(printed) == expected


# -----------------------------------------------------------------------------
# prepare_sft.py


SETTINGS = dict(
    prompt=r"Question: {question}\nAnswer:", completion=" {answer}", block_size=127
)


@pytest.fixture
def questions(tmp_path):
    """60 records whose prompts and completions are all different."""
    records = []
    for i, text in enumerate(sentences(60, 2)):
        records.append({"question": f"{i} {text}", "answer": f"{text[::-1].strip()} {i}"})
    write_lines(tmp_path / "q_a.jsonl", records)
    return records


def example(enc, record):
    """The one Example of a record."""
    [found] = examples(enc, record)
    return found


def make(input, out_dir, encoding="bytes", **settings):
    """prepare_sft.py with these settings, as its command line gives them."""
    settings = dict(input=input, out_dir=out_dir, encoding=encoding) | settings
    argv = [f"--{name}={value}" for name, value in settings.items()]
    prepare_sft.prepare_sft(configure(prepare_sft, argv=argv))


def examples_in(pattern, enc, block_size=127):
    """[(text, text that counts)] of all examples of shards."""
    windows = Windows(pattern, block_size, enc.n_vocab, None, enc.n_vocab, fingerprint(enc))
    last = torch.full((1, 1), -1)
    found = []
    for _ in range(windows.total):
        x, y, documents = windows.batch(1)
        tokens = torch.cat([x, y[:, -1:]], 1)[0]
        counts = torch.cat([last, y], 1)[0] >= 0
        documents = torch.cat([documents, documents[:, -1:]], 1)[0]
        for n in range(1, documents.max() + 1):
            here = documents == n
            text = tokens[here].tolist()
            if n == documents.max():  # padding follows
                first = here.nonzero().min()
                end = (here & counts).nonzero().max() + 1
                text = text[: int(end - first)]
            found.append((enc.decode(text), enc.decode(tokens[here & counts].tolist())))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_each_example_comes_once_with_its_completion_in_the_loss(
    chat, questions, tmp_path, capsys, packing
):
    out = f"{tmp_path}/out"
    make(f"{tmp_path}/q_a.jsonl", out, chat, packing=packing, val_fraction=0.1, **SETTINGS)
    enc = get_encoding(chat)
    train = examples_in(f"{out}/q-a_train_00000.bin", enc)
    val = examples_in(f"{out}/q-a_val_00000.bin", enc)
    expected = {}  # {text: the part that counts}
    for r in questions:
        counts = f" {r['answer']}<|end|>"
        expected[f"Question: {r['question']}\nAnswer:{counts}"] = counts
    assert len(val) == 6 and not {*val} & {*train}
    assert sorted(train + val) == sorted(expected.items())

    shards = [open_shard(f"{out}/q-a_{split}_00000.bin") for split in ("train", "val")]
    count = sum(len(enc.encode_with_special(text)) for text in expected)
    loss = sum(len(enc.encode_with_special(text)) for text in expected.values())
    rows = sum(len(shard.tokens) for shard in shards) // 128
    if packing:
        assert rows < 1.2 * count / 128
    else:
        assert rows == 60
    assert all(shard.row == 128 and len(shard.tokens) % 128 == 0 for shard in shards)
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("--- example ") for line in said) == 3
    numbers = re.findall("examples to .*: ([0-9,]+) tokens, of which ([0-9,]+) ", "\n".join(said))
    numbers = [[int(n.replace(",", "")) for n in pair] for pair in numbers]
    assert [sum(column) for column in zip(*numbers)] == [count, loss]
    said = said[-5:]
    assert said[0].startswith(f"{out}: 54 examples to train on: ")
    assert said[1].startswith(f"{out}: 6 examples to validate on: ")
    assert said[1].endswith(" count in the loss; 0 are cut at block_size")
    assert said[2:] == [
        f"{out}: left out of 60 records: 0 that make no example, "
        "0 whose answer begins beyond block_size",
        f"{out}: {rows} rows of 128 tokens, {count / rows / 128:.1%} full",
        f"{out}: wrote q-a_val_00000.bin and q-a_train_00000.bin",
    ]


def test_shards_are_repeatable_and_packing_keeps_the_split(chat, questions, tmp_path):
    def made(out, **settings):
        make(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/{out}", chat, **SETTINGS | settings)
        return contents(f"{tmp_path}/{out}/q-a_train_00000.bin")

    assert made("a") == made("b") == made("b") != made("c", seed=1)
    made("d", packing=False)
    enc = get_encoding(chat)
    held_out = {}
    for out in "abcd":
        held_out[out] = sorted(examples_in(f"{tmp_path}/{out}/q-a_val_00000.bin", enc))
    assert held_out["a"] == held_out["b"] == held_out["d"] != held_out["c"]


def test_packing_fills_rows_with_whole_pieces_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 129, 2000).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) < 1.06 * sum(lengths) / 128
    assert pack([3, 3, 2, 1, 4], 5) == [[0, 3], [1, 2], [4]]


def test_documents_number_a_rows_examples_and_padding_is_cut(tmp_path):
    flags = [[2, 1, 2, 0, 1, 0, 0, 0, 0], [2, 0, 1, 2, 1, 2, 1, 0, 0]]
    write_shard(f"{tmp_path}/a_train_0.bin", np.arange(18), 20, np.ravel(flags), 9, 77)
    x, y, documents = Windows(f"{tmp_path}/*_train_*", 8, 20).batch(2)
    assert x.tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]
    assert y.tolist() == [[1, -1, -1, 4, -1, -1], [-1, 11, -1, 13, -1, 15]]
    assert documents.tolist() == [[1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 3]]
    assert documents.dtype == torch.int64
    x, y, documents = Windows(f"{tmp_path}/*_train_*", 8, 20).batch(1)
    assert x.shape == y.shape == documents.shape == (1, 4)
    write_shard(f"{tmp_path}/b_val_0.bin", np.arange(18, dtype=np.uint16), 20)
    assert Windows(f"{tmp_path}/*_val_*", 8, 20).batch(1)[2] is None


def test_rows_come_once_an_epoch_and_each_rank_reads_its_own(chat, questions, tmp_path):
    make(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", chat, packing=False, **SETTINGS)

    def reader():
        return Windows(f"{tmp_path}/out/*_train_*", 127, 400, seed=3)

    windows = reader()
    assert windows.total == 57
    epochs = []
    for _ in range(2):
        epochs.append([tuple(windows.batch(1)[0][0].tolist()) for _ in range(57)])
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len({*epochs[0]}) == 57

    readers = [reader(), reader()]
    for i in range(0, 12, 4):
        rows = []
        for rank in (0, 1):
            rows += readers[rank].batch(2, rank, 2)[0].tolist()
        assert [row[:20] for row in rows] == [list(row[:20]) for row in epochs[0][i : i + 4]]


def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path, capsys):
    lengths = ((3, 4), (3, 5), (3, 99), (7, 5), (8, 5), (9, 1))  # of prompt and completion
    records = [{"prompt": "p" * n, "completion": "c" * m} for n, m in lengths]
    write_lines(tmp_path / "x.jsonl", records)
    make(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", block_size=7, val_fraction=0)
    said = capsys.readouterr().out
    assert "4 examples to train on" in said and "3 are cut at block_size" in said
    assert "0 that make no example, 2 whose answer begins beyond block_size" in said
    shard = open_shard(tmp_path / "out/x_train_00000.bin")
    texts = {"".join(map(chr, row)) for row in shard.tokens.reshape(-1, 8).tolist()}
    assert texts == {"pppcccc\u0100", "pppccccc", "pppppppc"}
    assert shard.flags.reshape(-1, 8).sum(1).tolist().count(2 + 1) == 1

    write_lines(tmp_path / "y.jsonl", records[-1:])
    answer = refused(make, f"{tmp_path}/y.jsonl", f"{tmp_path}/none", block_size=7)
    assert "no usable example (1 longer than block_size 7)" in answer
    assert not os.path.exists(tmp_path / "none")


def test_all_that_the_assistant_says_counts_with_its_end_token(chat):
    enc = get_encoding(chat)
    messages = [
        message("system", "be good"),
        message("user", "how many"),
        message("assistant", "very\nmany"),
        message("user", "what <|end|>"),
        message("assistant", " 12 "),
        message("user", "bad"),
    ]
    found = example(enc, {"messages": messages})
    theirs = transformers_tokenizer(chat).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    counts = found.flags & 1
    assert found.tokens.tolist() == theirs["input_ids"]
    assert counts.tolist() == theirs["assistant_masks"]
    assert enc.decode(found.tokens[counts > 0].tolist()) == "very\nmany<|end|> 12 <|end|>"
    assert found.flags[0] == 2 and not (found.flags[1:] & 2).any()


def test_sentencepiece_examples_have_one_bos_and_natural_tokens(pieces):
    enc = get_encoding(pieces)
    messages = [message("user", "how many"), message("assistant", "the film")]
    found = example(enc, {"messages": messages})
    ids = enc.encode_ordinary("[INST] how many [/INST] the film ")
    assert found.tokens.tolist() == [1, *ids, 2]
    counted = enc.decode(found.tokens[found.flags & 1 > 0].tolist())
    assert counted.split() == ["the", "film", "</s>"]

    found = example(enc, {"prompt": "is it", "completion": " good"})
    assert found.tokens.tolist() == [1, *enc.encode_ordinary("is it good"), 2]
    assert found.flags[0] == 2
    assert enc.decode(found.tokens[found.flags & 1 > 0].tolist()) == "good</s>"


def test_prompt_and_completion_that_share_a_token_keep_their_own(chat):
    enc = get_encoding(chat)
    ids, flags = encode(enc.encode_ordinary, [("is ", False), ("the", True)])
    apart = enc.encode_ordinary("is ") + enc.encode_ordinary("the")
    assert ids == apart != enc.encode_ordinary("is the")
    assert sum(flags) == len(enc.encode_ordinary("the"))


def test_without_a_prompt_all_but_the_first_token_is_learned():
    found = example(get_encoding("bytes"), {"prompt": "", "completion": "abc"})
    assert found.tokens.tolist() == [*b"abc", 256]
    assert found.flags.tolist() == [2, 1, 1, 1]


TOOL_TEMPLATE = """{%- if tools %}{{ '<|start|>tools\n' + tools | tojson + '\n' }}{% endif %}
{%- for m in messages if m.role != 'system' %}
    {{- '<|start|>' + m.role + '\n' + m.content }}
    {%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
    {%- if m.role == 'tool' %}{{ ' by ' + m.name }}{% endif %}
    {{- '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{% endif %}"""
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": [1, 2]}}}
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds"}}]
WITH_TOOLS = {
    "id": 7,
    "tools": TOOLS,
    "documents": None,
    "messages": [
        message("system", "be good"),
        message("user", [{"type": "text", "text": "how "}, {"type": "text", "text": "many"}]),
        message("assistant", None) | {"tool_calls": [CALL]},
        message("tool", "3") | {"name": "sum", "tool_call_id": "1"},
        message("assistant", "3 films") | {"reasoning_content": "easy"},
    ],
}


def with_template(chat, folder, template, **settings):
    """The chat fixture's tokenizer with another template."""
    (folder / "tokenizer.json").write_bytes(contents(f"{chat}/tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>"} | settings)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_tools_and_their_calls_reach_the_template(chat, tmp_path):
    enc = get_encoding(with_template(chat, tmp_path, TOOL_TEMPLATE))
    found = example(enc, WITH_TOOLS)
    text = enc.decode(found.tokens.tolist())
    assert text.startswith(f"<|start|>tools\n{json.dumps(TOOLS)}\n<|start|>user\nhow many<|end|>")
    counted = enc.decode(found.tokens[found.flags & 1 > 0].tolist())
    assert counted == f"{json.dumps([CALL])}<|end|>3 films<|end|>"
    # as a text, in data sets whose columns have one type
    as_text = WITH_TOOLS | {"tools": json.dumps(TOOLS)}
    assert example(enc, as_text).tokens.tolist() == found.tokens.tolist()
    for bad in (WITH_TOOLS | {"tools": "sum"}, WITH_TOOLS | {"tools": {"a": 1}}):
        with pytest.raises(ValueError, match="tools are no list"):
            example(enc, bad)
    plain = get_encoding(chat)  # whose template does not write calls
    silent = {"messages": WITH_TOOLS["messages"][1:3]}
    with pytest.raises(ValueError, match="says nothing that the chat template writes"):
        example(plain, silent)


def test_with_tools_the_template_for_tools_is_taken(chat, tmp_path):
    templates = [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": TOOL_TEMPLATE},
    ]
    enc = get_encoding(with_template(chat, tmp_path, "", chat_template=templates))
    theirs = transformers_tokenizer(str(tmp_path))
    messages = [message("user", "a"), message("assistant", "b")]
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        assert enc.render(messages, fields={"tools": tools}) == expected
        assert ("tools" in expected) == (tools is not None)


def test_what_the_template_does_not_use_is_said_once(chat, tmp_path, capsys):
    folder = with_template(chat, tmp_path, TOOL_TEMPLATE)
    write_lines(tmp_path / "x.jsonl", [WITH_TOOLS] * 3)
    make(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", folder, val_fraction=0)
    said = capsys.readouterr().out.splitlines()
    unused = [line.partition("not used: ")[2] for line in said if "not used" in line]
    assert unused == [
        f"{what} (3 of 3 records; the first: line 1)"
        for what in (
            "the field 'id'",
            "the messages' field 'reasoning_content'",
            "the messages' field 'tool_call_id'",
            "the messages of the role 'system'",
        )
    ]
    # where the template has no word for tools
    record = {"tools": TOOLS, "messages": [message("user", "a"), message("assistant", "b")]}
    write_lines(tmp_path / "y.jsonl", [record])
    make(f"{tmp_path}/y.jsonl", f"{tmp_path}/y", chat, val_fraction=0)
    assert "not used: the field 'tools' (1 of 1 records" in capsys.readouterr().out


def test_a_template_that_rewrites_what_was_said_is_refused(chat, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(contents(f"{chat}/{name}"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}" + TEMPLATE)
    said = {"messages": [message("user", "a"), message("assistant", "b")]}
    write_lines(tmp_path / "x.jsonl", [said, said])
    answer = refused(make, f"{tmp_path}/x.jsonl", f"{tmp_path}/out", str(tmp_path))
    assert "x.jsonl, line 1: message 2: the chat template of" in answer
    assert "message by message" in answer


BAD_RECORDS = [
    (b"not JSON", "not JSON"),
    (b"[1]", "not a JSON object"),
    (b"\xff", "not UTF-8"),
    (b'{"prompt": NaN, "completion": "b"}', "NaN is no number in JSON"),
    (b'{"prompt": "a"}', "no field 'completion'"),
    (b'{"prompt": "a", "completion": " "}', "empty"),
    (b'{"prompt": "a", "completion": null}', "no field 'completion'"),
    (b'{"messages": "hi"}', "no list"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    (b'{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "but 'image'"),
    (b'{"messages": [{"role": "assistant", "content": {"a": 1}}]}', "not a text"),
    (b'{"messages": []}', "no message"),
    (b'{"messages": [{"role": "assistant", "content": ""}]}', "says nothing"),
    (
        b'{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]}',
        "no such role: tool",
    ),
]


def test_records_that_make_no_example_are_counted_by_file(chat, tmp_path, capsys):
    good = b'{"prompt": "a", "completion": "b \\ud83d"}'
    for i, (line, why) in enumerate(BAD_RECORDS):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(b"\n".join([good, b"", line, b'{"no": 1}', good]))
        make(path, f"{tmp_path}/{i}", chat, val_fraction=0)
        said = capsys.readouterr().out.splitlines()
        left_out = [line for line in said if "left out:" in line]
        assert all(line.startswith(f"{path}: ") for line in left_out)
        assert sum(int(line.split(": ")[1].split()[0]) for line in left_out) == 2
        assert any(why in line and "(the first: line 3)" in line for line in left_out)
        assert any(" 2 examples to train on" in line for line in said)
        assert any("left out of 4 records: 2 that make no example" in line for line in said)
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_RECORDS))
    answer = refused(make, f"{tmp_path}/x.jsonl", f"{tmp_path}/x", chat)
    assert "no usable example" in answer
    assert not os.path.exists(tmp_path / "x")


BAD_SETTINGS = [
    (dict(input="{}/none*"), "no such file"),
    (dict(input="{}/x.pdf"), r"x.pdf: expected .json"),
    (dict(input="{}/roles.jsonl", encoding="chat"), "roles.jsonl, line 2: a message has no role"),
    (dict(input="{}/roles.jsonl"), "roles.jsonl, line 1: the encoding has no chat template"),
    (dict(input="{}/cut.json.gz"), "cut.json.gz: incomplete or damaged"),
    (dict(input="{}/cut.json"), "cut.json: record 2: incomplete or damaged"),
    (dict(input="{}/quote.csv"), "quote.csv: line 2: unexpected end of data"),
    (dict(val_fraction=0.01), "too few to split"),
    (dict(val_fraction=-1.0), "val_fraction must be between 0 and 1, not -1.0"),
    (dict(block_size=0), "block_size must be at least 1, not 0"),
    (dict(prompt="{prompt"), "prompt='{prompt'"),
    (dict(completion="{}"), "a field needs a name"),
    (dict(encoding="gpt5"), "encoding gpt5"),
    (dict(out_dir="{}/x.pdf"), "x.pdf: File exists"),
]


@pytest.mark.parametrize("settings, message_part", BAD_SETTINGS)
def test_a_wrong_setting_or_file_is_one_line(chat, tmp_path, settings, message_part):
    said = [message("user", "a"), message("assistant", "b")]
    write_lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    write_lines(tmp_path / "roles.jsonl", [{"messages": said}, {"messages": [{"content": "a"}]}])
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-9])
    (tmp_path / "cut.json").write_text('[{"prompt": "a"}, ')
    (tmp_path / "quote.csv").write_text('prompt,completion\n"a,b\nc,d\n')
    settings = dict(input="{}/x.jsonl", encoding="bytes", out_dir="{}/out") | settings
    for name, value in settings.items():
        if isinstance(value, str):
            settings[name] = value.replace("{}/", f"{tmp_path}/")
    if settings["encoding"] == "chat":
        settings["encoding"] = chat
    assert message_part in refused(make, **settings)
    assert not os.path.exists(tmp_path / "out")


def test_a_full_disk_leaves_the_shards_that_were_there(questions, tmp_path, monkeypatch):
    args = f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out"
    make(*args, **SETTINGS)

    def shards():
        folder = tmp_path / "out"
        return {name: contents(folder / name) for name in os.listdir(folder)}

    before = shards()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(make, *args, seed=9, **SETTINGS)
    assert shards() == before


def test_no_old_shard_stays_beside_one_split_alone(questions, tmp_path):
    for fraction, split in ((1.0, "val"), (0.0, "train")):
        args = f"{tmp_path}/q_a.jsonl", f"{tmp_path}/{split}"
        made = f"q-a_{split}_00000.bin"
        make(*args, val_fraction=fraction, **SETTINGS)
        assert sorted(os.listdir(tmp_path / split)) == [made, "shards.json"]
        answer = refused(make, *args, val_fraction=1 - fraction, **SETTINGS)
        assert f"{made}: was made of the same input, with another split" in answer


TSV = '"a "quoted film\t1\nbad  one\t0\nno label\t-1\nshort\n'
CSV = '"What, ""roughly""?",3,4,5,6,B\n"two\nlines",a,b,c,d,A\n'
TABLES = [  # a file, settings, and the examples that they make
    (
        "x.tsv",
        TSV,
        dict(
            columns="sentence,label",
            labels="negative,positive",
            prompt="{sentence}:",
            completion=" {label}",
        ),
        ['"a "quoted film: positive', "bad  one: negative"],
    ),
    (
        "x.tsv",
        "\ufeffsentence\tlabel\n" + TSV,
        dict(prompt="{sentence}:", completion=" {label}"),
        ['"a "quoted film: 1', "bad  one: 0", "no label: -1"],
    ),
    (
        "x.csv",
        CSV,
        dict(
            columns="question,A,B,C,D,answer",
            prompt=r"{question}\nA {A} B {B} C {C} D {D}\n",
            completion="{answer}",
        ),
        ['What, "roughly"?\nA 3 B 4 C 5 D 6\nB', "two\nlines\nA a B b C c D d\nA"],
    ),
    (
        "x.json",
        ' [{"prompt": "a", "completion": 3}, 7]',
        {},
        ["a3"],
    ),
    (
        "x.json",
        '{"q": {"text": "a{b}"}, "c": ["x", "y"]}\n',
        dict(prompt="{q[text]}{{}}", completion="{c[1]}"),
        ["a{b}{}y"],
    ),
    (
        "x.jsonl",
        '{"text": "a", "label": 1, "messages": 3}\n',
        dict(labels="n, y", prompt="{text}", completion="{label}"),
        ["ay"],
    ),
]


@pytest.mark.parametrize("name, content, settings, expected", TABLES)
def test_tables_lists_and_lines_become_examples(tmp_path, name, content, settings, expected):
    settings = dict(block_size=63, val_fraction=0, packing=False) | settings
    for path, opened in ((name, open), (name + ".gz", gzip.open)):
        with opened(tmp_path / path, "wt", encoding="utf-8", newline="") as f:
            f.write(content)
        make(f"{tmp_path}/{path}", f"{tmp_path}/of {path}", **settings)
        rows = open_shard(tmp_path / f"of {path}/x_train_00000.bin").tokens.reshape(-1, 64)
        texts = [bytes(row[row < 256].tolist()).decode() for row in rows]
        assert sorted(texts) == sorted(expected)


def test_several_files_make_one_data_set(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": text, "completion": "x"}])
    make(f"{tmp_path}/?.jsonl", f"{tmp_path}/my_out/", block_size=15, val_fraction=0)
    names = sorted(os.listdir(tmp_path / "my_out"))
    assert names == ["my-out_train_00000.bin", "shards.json"]
    found = examples_in(f"{tmp_path}/my_out/*.bin", get_encoding("bytes"), 15)
    assert sorted(found) == [
        ("onex<|endoftext|>", "x<|endoftext|>"),
        ("twox<|endoftext|>", "x<|endoftext|>"),
    ]


def test_the_command_lines_newlines_and_flags_arrive(questions, tmp_path):
    command = [
        "finetune.prepare_sft",
        f"--input={tmp_path}/q_a.jsonl",
        f"--out_dir={tmp_path}/out",
        "--encoding=bytes",
        r"--prompt=Q: {question}\nA:",
        "--completion= {answer}",
        "--block_size=255",
    ]
    code, out, err = run(*command)
    assert code == 0 and "57 examples to train on" in out, err
    tokens, _ = read_shard(tmp_path / "out/q-a_train_00000.bin")
    text = bytes(t for t in tokens.tolist() if t < 256).decode()
    assert text.count("\nA: ") == 57
    one_line_error(run(*command, "--blok_size=3"), "did you mean 'block_size'")


# -----------------------------------------------------------------------------
# shards that do not fit a run


def test_shards_that_do_not_fit_the_run_are_refused_by_name(chat, questions, tmp_path):
    make(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", chat, **SETTINGS)
    enc = get_encoding(chat)
    pattern = f"{tmp_path}/out/*_train_*.bin"
    known = dict(n_vocab=enc.n_vocab, fingerprint=fingerprint(enc))
    assert Windows(pattern, 127, 512, **known).rows
    assert Windows(pattern, 127, 512).rows

    other = known | {"fingerprint": 5}
    answer = refused(Windows, pattern, 127, 512, **other)
    assert "q-a_train_00000.bin: was made with another tokenizer" in answer
    other = known | {"n_vocab": 401}
    assert "another tokenizer" in refused(Windows, pattern, 127, 512, **other)
    assert "made for block_size 127, not 64" in refused(Windows, pattern, 64, 512)

    plain = f"{tmp_path}/out/z_train_0.bin"
    write_shard(plain, np.arange(200), 0)
    assert "do not mix" in refused(Windows, pattern, 127, 512)
    # of another maker: its vocabulary is not known
    assert not Windows(plain, 127, 512, **known).rows


def test_a_shard_with_flags_that_is_not_whole_is_refused(tmp_path):
    path = str(tmp_path / "x.bin")
    write_shard(path, np.arange(12), 257, np.ones(12), 4, 99)
    shard = open_shard(path)
    assert shard.tokens.tolist() == list(range(12)) and shard.flags.tolist() == [1] * 12
    assert (shard.n_vocab, shard.row, shard.fingerprint) == (257, 4, 99)
    assert read_shard(path)[1] == 257
    whole = contents(path)
    assert np.frombuffer(whole[:1024], "<i4")[:7].tolist() == [20240520, 1, 12, 257, 4, 99, 0]
    assert len(whole) == 1024 + 12 * 3
    cases = [
        (whole[:-1], "1059 bytes, but 1060"),
        (whole[:16] + b"\5" + whole[17:], "no rows of 5"),
        (whole[:16] + bytes(4) + whole[20:], "1060 bytes, but 1048"),
    ]
    for content, part in cases:
        (tmp_path / "x.bin").write_bytes(content)
        assert part in refused(open_shard, path)


def test_a_message_without_a_role_is_told_from_no_message(chat):
    enc = get_encoding(chat)
    with pytest.raises(KeyError):
        conversation(enc, [{"from": "human", "value": "a"}])
    with pytest.raises(ValueError):
        conversation(enc, ["a"])
