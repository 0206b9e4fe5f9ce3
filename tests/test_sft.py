"""
tokenizer.py, prepare_sft.py, and shards of which only some tokens count in the loss: python -m pytest test_sft.py
"""

import base64
import codecs
import gzip
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch

import prepare_c4
from finetune import tokenizer
from run.data import Windows
from prepare_c4 import open_shard, prepare, read_shard, write_shard
from finetune.prepare_sft import conversation, encode, example, pack, prepare_sft
from sample import stream
from run.encodings import fingerprint, get_encoding

HERE = os.path.dirname(os.path.abspath(__file__))
TEMPLATE = """{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- else %}{{- message['content'] + eos_token }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}"""
WORDS = "the a review question answer of is film good bad long very positive negative how many what".split()
TEXTS = ["", " ", "the  film\n\n is good.\n", "  Hé 🙂  \t12345, very\r\nbad ", "<|end|> is text</s><s>", "ａ\u0301　x"]


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice(".?!\n") for _ in range(n)]


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
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(sentences(300, seed), trainer)
    return bpe


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The folder of a checkpoint's tokenizer: byte-level BPE as in SmolLM2, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    byte_bpe().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"}, "bos_token": "<|start|>",
        "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The folder of a checkpoint with a sentencepiece model, as LLaMA-2's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(sentences(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=380, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, minloglevel=2)
    write_json(folder / "tokenizer_config.json", {
        "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True, "added_tokens_decoder": {
            "380": {"content": "<|extra|>"}},
        "chat_template": "{% for m in messages %}{% if m.role == 'user' %}"
                         "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
                         "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"})
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
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def refused(function, *args, **settings):
    """The one line that it exits with."""
    with pytest.raises(SystemExit) as e:
        function(*args, **settings)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


# -----------------------------------------------------------------------------
# tokenizer.py


def test_a_checkpoints_tokenizer_gives_the_tokens_and_conversations_of_transformers(chat):
    enc, theirs = get_encoding(chat), transformers_tokenizer(chat)
    assert (enc.n_vocab, enc.eot_token, enc.bos_token) == (len(theirs), theirs.eos_token_id, theirs.bos_token_id)
    assert not enc.add_bos_token
    for text in TEXTS + sentences(20, 1):
        assert enc.encode_with_special(text) == theirs.encode(text, add_special_tokens=False)
        assert enc.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert 2 not in enc.encode_ordinary("<|end|>") and enc.encode_with_special("<|end|>") == [2]
    messages = [{"role": "system", "content": "Be <b>good</b>"}, {"role": "user", "content": "\nhow many"},
                {"role": "assistant", "content": "12\n"}, {"role": "user", "content": "what  "}]
    for generation in (False, True):
        text = enc.render(messages, generation)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=generation, return_dict=True)["input_ids"]
        assert enc.encode_with_special(text) == ids
    with pytest.raises(ValueError, match="no such role: tool"):
        enc.render([{"role": "tool", "content": ""}])


def test_a_file_of_a_checkpoint_is_its_folders_tokenizer(chat, pieces):
    for folder, file in ((chat, "tokenizer.json"), (pieces, "tokenizer.model")):
        by_folder, by_file = get_encoding(folder), get_encoding(f"{folder}/{file}")
        assert by_file.vocabulary == by_folder.vocabulary and by_file.eot_token == by_folder.eot_token
        assert by_file.chat_template == by_folder.chat_template is not None


def test_chat_templates_have_what_transformers_gives_them(chat, tmp_path):
    template = ("{% for m in messages %}\n    {% if m.skip %}{% continue %}{% endif %}\n{{ m | tojson }}\n"
                "{{ unk_token }}{% endfor %}{{ strftime_now('%Y') | length }}{{ tools is none }}")
    (tmp_path / "tokenizer.json").write_bytes(contents(f"{chat}/tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {
        "eos_token": "<|end|>", "unk_token": "<|pad|>", "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]})
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "", "skip": True}]
    text = get_encoding(str(tmp_path)).render(messages)
    assert text == transformers_tokenizer(str(tmp_path)).apply_chat_template(messages, tokenize=False)
    assert "<é>" in text and text.endswith("4True")


def test_the_sandbox_keeps_a_chat_template_from_the_machine(chat, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(contents(f"{chat}/tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template":
                                                    "{{ messages.append.__globals__ }}{{ ''.__class__.__mro__[1]() }}"})
    with pytest.raises(ValueError, match="refuses"):
        get_encoding(str(tmp_path)).render([])


def test_a_text_starts_with_bos_if_the_settings_or_the_post_processor_say_so(chat, tmp_path):
    bpe = tokenizers.Tokenizer.from_file(f"{chat}/tokenizer.json")
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", 1)])
    bpe.enable_truncation(3)
    bpe.enable_padding(length=9)
    bpe.save(str(tmp_path / "tokenizer.json"))
    ids = {"bos_token_id": 1, "eos_token_id": [2, 1]}
    write_json(tmp_path / "config.json", ids)
    enc = get_encoding(str(tmp_path))
    assert enc.add_bos_token and (enc.bos_token, enc.eot_token) == (1, 2)
    long = enc.encode_ordinary("what is the long film")
    assert len(long) > 3 and 1 not in long and 0 not in long  # neither truncated nor padded
    assert enc.with_bos(long) == [1, *long] == enc.with_bos([1, *long])
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    get_encoding.cache_clear()
    assert get_encoding(str(tmp_path)).with_bos(long) == long


def test_a_sentencepiece_model_gives_its_own_tokens_and_special_ones_where_they_are_asked_for(pieces):
    import sentencepiece

    enc, theirs = get_encoding(pieces), sentencepiece.SentencePieceProcessor(f"{pieces}/tokenizer.model")
    assert (enc.n_vocab, enc.bos_token, enc.eot_token, enc.add_bos_token) == (381, 1, 2, True)
    for text in TEXTS + sentences(20, 1):
        assert enc.encode_ordinary(text) == theirs.encode(text)
        assert enc.decode(enc.encode_ordinary(text)) == theirs.decode(theirs.encode(text)) == text
    assert enc.encode_with_special("<s>the</s>film<|extra|>") == [1, *theirs.encode("the"), 2, *theirs.encode("film"),
                                                                 380]
    assert enc.decode([1, *theirs.encode("the"), 2, 380]) == "<s>the</s><|extra|>"


def test_a_checkpoints_rank_file_has_llama_3s_special_tokens(ranks):
    enc, plain = get_encoding(ranks), get_encoding(f"{ranks}/tokenizer.model")
    assert enc.n_vocab == plain.n_vocab == 261 + 256 and (enc.bos_token, enc.eot_token, enc.add_bos_token) == (
        261, 262, True)
    for text in TEXTS + sentences(20, 1):
        assert enc.encode_ordinary(text) == plain.encode_ordinary(text)
        assert enc.decode(enc.encode_ordinary(text)) == text
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe<|eot_id|>"
    ids = [261, 267, *b"user", 268, 260, 257, 270]
    assert enc.encode_with_special(text) == ids and enc.decode(ids) == text


def test_damaged_and_incomplete_checkpoints_are_one_line(chat, pieces, tmp_path, monkeypatch):
    def answer(**files):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return refused(get_encoding, str(folder))

    whole, model = contents(f"{chat}/tokenizer.json"), contents(f"{pieces}/tokenizer.model")
    assert "neither tokenizer.json nor tokenizer.model" in answer()
    for damaged in (whole[:-100], b"", b"{}", b"[]", b'{"model": 3}'):
        assert "not a whole tokenizer.json" in answer(tokenizer__json=damaged)
    assert "no end-of-text token" in answer(tokenizer__json=whole)
    assert "tokenizer_config.json: damaged" in answer(tokenizer__json=whole, tokenizer_config__json=b"{")
    assert "not a whole sentencepiece model" in answer(tokenizer__model=model[: len(model) // 2])
    assert "expected lines" in answer(tokenizer__model=b"no ranks")
    assert "No such file" in refused(get_encoding, f"{tmp_path}/tokenizer.json")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "tokenizer.json").write_bytes(whole)
    write_json(bad / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": "{% for %}"})
    assert "its chat template is damaged" in refused(get_encoding(str(bad)).render, [])
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in answer(tokenizer__model=model)


def test_a_name_on_the_hub_is_fetched_and_a_failure_is_one_line(chat, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or chat)
    assert get_encoding("someone/some-model").vocabulary == get_encoding(chat).vocabulary
    (name, kw), = asked
    assert name == "someone/some-model" and "model.safetensors" not in kw["allow_patterns"]

    def fail(*args, **kw):
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(os.path.dirname(os.path.dirname(chat)))
    here = os.path.relpath(chat)  # "a/b", too, but there is such a folder
    assert get_encoding(here).vocabulary == get_encoding(chat).vocabulary
    answer = refused(get_encoding, "someone/other")
    assert "someone/other: no such file, and not fetched from the hub (no network)" in answer


def test_the_fingerprint_tells_vocabularies_of_equal_size_apart(chat, ranks, tmp_path):
    byte_bpe(seed=1).save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    other = get_encoding(str(tmp_path))
    found = [fingerprint(enc) for enc in (get_encoding(chat), other, get_encoding("bytes"), get_encoding(ranks))]
    assert other.n_vocab == get_encoding(chat).n_vocab and len(set(found)) == 4
    assert all(0 < n < 2**31 for n in found)
    fingerprint.cache_clear()
    get_encoding.cache_clear()
    assert fingerprint(get_encoding(chat)) == found[0] and fingerprint(get_encoding("bytes")) == found[2]


@pytest.mark.parametrize("kind", ["chat", "pieces", "ranks"])
def test_where_a_long_text_is_cut_changes_no_checkpoints_tokens(kind, request, tmp_path, monkeypatch):
    folder, text = request.getfixturevalue(kind), " ".join(sentences(300)) + "\n\n"
    (tmp_path / "x.txt").write_text(text)
    monkeypatch.setattr(prepare_c4, "_block", 50)
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", folder, val_fraction=0)
    shard, enc = open_shard(tmp_path / "out/x_train_00000.bin"), get_encoding(folder)
    assert shard.tokens.tolist() == [*enc.encode_ordinary(text), enc.eot_token]
    assert (shard.flags, shard.row, shard.fingerprint) == (None, 0, fingerprint(enc))
    assert enc.cuts_at_spaces == (kind != "pieces")


def test_text_is_cut_only_for_tokenizers_that_split_as_gpt_2_and_llama_3_do(tmp_path):
    pre, norm = tokenizers.pre_tokenizers, tokenizers.normalizers
    split = lambda pattern: pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"),
                                          pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre.ByteLevel(add_prefix_space=False)
    for i, (before, normalizer, cuts) in enumerate([
            (gpt2, None, True), (pre.Sequence([pre.Digits(True), gpt2]), None, True),
            (split(tokenizer.LLAMA3_SPLIT), None, True), (split(r"\n+"), None, False), (gpt2, norm.Prepend("x"), False),
            (pre.ByteLevel(add_prefix_space=True), None, False), (pre.Metaspace(), None, False),
            (pre.Sequence([gpt2, pre.Metaspace()]), None, False)]):
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
    prepare(f"{tmp_path}/x.txt", f"{tmp_path}/out", chat)
    assert "another tokenizer" in refused(prepare, f"{tmp_path}/x.txt", f"{tmp_path}/out", str(tmp_path))


class Fixed:
    def __init__(self, ids):
        self.ids = ids

    def generate(self, *_):
        return (torch.tensor([[i]]) for i in self.ids)


@pytest.mark.parametrize("kind", ["chat", "pieces", "ranks", "bytes"])
def test_text_streams_in_whole_characters_and_adds_up_to_what_the_tokens_decode_to(kind, request, monkeypatch):
    enc = get_encoding(kind if kind == "bytes" else request.getfixturevalue(kind))
    ids, printed = enc.encode_ordinary("the film is  é🙂é 很 bad") + [enc.n_vocab + 5], []
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", flush=False: printed.append(text + end))
    for cut in (1, 5, len(ids) - 12):
        printed.clear()
        stream(Fixed(ids[cut:]), enc, torch.tensor([ids[:cut]]), 99, 1.0, 0, 1.0, 0)
        assert "".join(printed) == enc.decode(ids[:-1]) + "\n" and "\ufffd" not in "".join(printed)
        assert len([text for text in printed if text]) > 5


def test_bytes_stream_as_an_incremental_decoder_gives_them(monkeypatch):
    enc, printed, rng = get_encoding("bytes"), [], random.Random(0)
    monkeypatch.setattr("builtins.print", lambda text="", end="\n", flush=False: printed.append(text + end))
    for _ in range(100):
        ids = rng.choices([*"aé🙂".encode(), 0xFF], k=12)
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        expected = "a" + "".join(utf8.decode(bytes([i])) for i in ids) + utf8.decode(b"", final=True) + "\n"
        printed.clear()
        stream(Fixed(ids), enc, torch.tensor([[97]]), 99, 1.0, 0, 1.0, 0)
        assert "".join(printed) == expected


# -----------------------------------------------------------------------------
# prepare_sft.py


@pytest.fixture
def questions(tmp_path):
    """60 records whose prompts and completions are all different."""
    texts = sentences(60, 2)
    records = [{"question": f"{i} {text}", "answer": f"{text[::-1].strip()} {i}"} for i, text in enumerate(texts)]
    write_lines(tmp_path / "q_a.jsonl", records)
    return records


SETTINGS = dict(prompt=r"Question: {question}\nAnswer:", completion=" {answer}", block_size=127)


def examples_in(pattern, enc, block_size=127):
    """[(text, text that counts)] of all examples of shards."""
    windows, found = Windows(pattern, block_size, enc.n_vocab, None, enc.n_vocab, fingerprint(enc)), []
    for _ in range(windows.total):
        x, y, documents = windows.batch(1)
        last = torch.full((1, 1), -1)
        tokens, counts = torch.cat([x, y[:, -1:]], 1)[0], torch.cat([last, y], 1)[0] >= 0
        documents = torch.cat([documents, documents[:, -1:]], 1)[0]
        for n in range(1, documents.max() + 1):
            of = documents == n
            text = tokens[of].tolist()
            if n == documents.max():  # padding follows
                text = text[: int((of & counts).nonzero().max() - of.nonzero().min()) + 1]
            found.append((enc.decode(text), enc.decode(tokens[of & counts].tolist())))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_once_and_the_loss_is_on_its_completion_alone(chat, questions, tmp_path, capsys, packing):
    prepare_sft(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", chat, packing=packing, val_fraction=0.1, **SETTINGS)
    enc, splits = get_encoding(chat), {}
    for split in ("train", "val"):
        splits[split] = examples_in(f"{tmp_path}/out/q-a_{split}_00000.bin", enc)
    expected = {f"Question: {r['question']}\nAnswer: {r['answer']}<|end|>": f" {r['answer']}<|end|>" for r in questions}
    assert len(splits["val"]) == 6 and not {*splits["val"]} & {*splits["train"]}
    assert sorted(splits["train"] + splits["val"]) == sorted(expected.items())
    shards = [open_shard(f"{tmp_path}/out/q-a_{split}_00000.bin") for split in ("train", "val")]
    count, loss = (sum(len(enc.encode_with_special(text)) for text in texts) for texts in (expected, expected.values()))
    rows = sum(len(shard.tokens) for shard in shards) // 128
    assert rows == 60 if not packing else rows < 1.2 * count / 128
    assert all(shard.row == 128 and len(shard.tokens) % 128 == 0 for shard in shards)
    line = capsys.readouterr().out
    assert line == (f"{tmp_path}/out: 60 examples (6 for validation), {count:,} tokens, {loss:,} in the loss, "
                    f"{rows} rows of 128, {count / rows / 128:.1%} full; 0 truncated, 0 dropped: too long\n")


def test_the_same_command_makes_the_same_bytes_and_the_split_does_not_depend_on_packing(chat, questions, tmp_path):
    def made(out, **settings):
        prepare_sft(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/{out}", chat, **SETTINGS | settings)
        return contents(f"{tmp_path}/{out}/q-a_train_00000.bin")

    assert made("a") == made("b") == made("b") != made("c", seed=1)
    made("d", packing=False)
    enc, held_out = get_encoding(chat), []
    for out in "abcd":
        held_out.append(sorted(examples_in(f"{tmp_path}/{out}/q-a_val_00000.bin", enc)))
    assert held_out[0] == held_out[1] == held_out[3] != held_out[2]


def test_packing_fills_rows_with_whole_pieces_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 129, 2000).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128 and len(rows) < 1.06 * sum(lengths) / 128
    assert pack([3, 3, 2, 1, 4], 5) == [[0, 3], [1, 2], [4]]


def test_documents_number_the_examples_of_a_row_and_columns_without_a_target_are_cut(tmp_path):
    flags = [[2, 1, 2, 0, 1, 0, 0, 0, 0], [2, 0, 1, 2, 1, 2, 1, 0, 0]]
    tokens = np.arange(18).reshape(2, 9)
    write_shard(f"{tmp_path}/a_train_0.bin", tokens.ravel(), 20, np.ravel(flags), 9, 77)
    x, y, documents = Windows(f"{tmp_path}/*_train_*", 8, 20).batch(2)
    assert x.tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]
    assert y.tolist() == [[1, -1, -1, 4, -1, -1], [-1, 11, -1, 13, -1, 15]]
    assert documents.tolist() == [[1, 1, 2, 2, 2, 2], [1, 1, 1, 2, 2, 3]] and documents.dtype == torch.int64
    x, y, documents = Windows(f"{tmp_path}/*_train_*", 8, 20).batch(1)
    assert x.shape == y.shape == documents.shape == (1, 4)
    plain = np.arange(18, dtype=np.uint16)
    write_shard(f"{tmp_path}/b_val_0.bin", plain, 20)
    assert Windows(f"{tmp_path}/*_val_*", 8, 20).batch(1)[2] is None


def test_rows_come_once_an_epoch_and_each_rank_reads_its_own(chat, questions, tmp_path):
    prepare_sft(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", chat, packing=False, **SETTINGS)
    reader = lambda: Windows(f"{tmp_path}/out/*_train_*", 127, 400, seed=3)
    windows, one, two = reader(), reader(), reader()
    epochs = [[tuple(windows.batch(1)[0][0].tolist()) for _ in range(windows.total)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len({*epochs[0]}) == windows.total == 57
    for i in range(0, 12, 4):
        rows = [row for reader, rank in ((one, 0), (two, 1)) for row in reader.batch(2, rank, 2)[0].tolist()]
        assert [row[:20] for row in rows] == [list(row[:20]) for row in epochs[0][i : i + 4]]


def test_long_completions_lose_their_end_and_prompts_without_room_are_dropped_and_both_are_counted(tmp_path, capsys):
    records = [{"prompt": "p" * n, "completion": "c" * m} for n, m in ((3, 4), (3, 5), (3, 99), (7, 5), (8, 5), (9, 1))]
    write_lines(tmp_path / "x.jsonl", records)
    prepare_sft(f"{tmp_path}/x.jsonl", f"{tmp_path}/out", "bytes", 7, val_fraction=0)
    assert "4 examples" in (line := capsys.readouterr().out) and "3 truncated, 2 dropped" in line
    shard = open_shard(tmp_path / "out/x_train_00000.bin")
    texts = {"".join(map(chr, row)) for row in shard.tokens.reshape(-1, 8).tolist()}
    assert texts == {"pppcccc\u0100", "pppccccc", "pppppppc"}
    assert shard.flags.reshape(-1, 8).sum(1).tolist().count(2 + 1) == 1
    write_lines(tmp_path / "y.jsonl", records[-1:])
    assert "no usable example (1 longer than block_size 7)" in refused(
        prepare_sft, f"{tmp_path}/y.jsonl", f"{tmp_path}/none", "bytes", 7)
    assert not os.path.exists(tmp_path / "none")


def test_the_loss_is_on_all_that_the_assistant_says_with_its_end_token(chat):
    enc, theirs = get_encoding(chat), transformers_tokenizer(chat)
    messages = [{"role": role, "content": content} for role, content in (
        ("system", "be good"), ("user", "how many"), ("assistant", "very\nmany"), ("user", "what <|end|>"),
        ("assistant", " 12 "), ("user", "bad"))]
    found = example(enc, {"messages": messages})
    ids = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert found.tokens.tolist() == ids["input_ids"]
    assert (found.flags & 1).tolist() == ids["assistant_masks"]
    assert enc.decode(found.tokens[found.flags & 1 > 0].tolist()) == "very\nmany<|end|> 12 <|end|>"
    assert found.flags[0] == 2 and not (found.flags[1:] & 2).any()


def test_a_sentencepiece_conversation_has_its_templates_one_bos_and_natural_tokens(pieces):
    enc = get_encoding(pieces)
    messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "the film"}]
    found = example(enc, {"messages": messages})
    assert found.tokens.tolist() == [1, *enc.encode_ordinary("[INST] how many [/INST] the film "), 2]
    assert enc.decode(found.tokens[found.flags & 1 > 0].tolist()).split() == ["the", "film", "</s>"]
    found = example(enc, {"prompt": "is it", "completion": " good"})
    assert found.tokens.tolist() == [1, *enc.encode_ordinary("is it good"), 2] and found.flags[0] == 2
    assert enc.decode(found.tokens[found.flags & 1 > 0].tolist()) == "good</s>"


def test_where_prompt_and_completion_share_a_token_each_keeps_its_own(chat):
    enc = get_encoding(chat)
    ids, flags = encode(enc.encode_ordinary, [("is ", False), ("the", True)])
    assert ids == enc.encode_ordinary("is ") + enc.encode_ordinary("the") != enc.encode_ordinary("is the")
    assert sum(flags) == len(enc.encode_ordinary("the"))


def test_an_example_without_a_prompt_learns_all_but_its_first_token():
    found = example(get_encoding("bytes"), {"prompt": "", "completion": "abc"})
    assert found.tokens.tolist() == [*b"abc", 256] and found.flags.tolist() == [2, 1, 1, 1]


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_line(chat, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(contents(f"{chat}/{name}"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}" + TEMPLATE)
    write_lines(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                     {"role": "assistant", "content": "b"}]}] * 2)
    answer = refused(prepare_sft, f"{tmp_path}/x.jsonl", f"{tmp_path}/out", str(tmp_path))
    assert "x.jsonl, line 1: message 2: the chat template of" in answer and "message by message" in answer


BAD_RECORDS = [
    (b"not JSON", "not JSON"), (b"[1]", "not a JSON object"), (b"\xff", "not JSON"),
    (b'{"prompt": "a"}', "no field 'completion'"), (b'{"prompt": "a", "completion": " "}', "empty"),
    (b'{"prompt": "a", "completion": null}', "no field 'completion'"), (b'{"messages": "hi"}', "no list"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    (b'{"messages": [{"role": "assistant", "content": ["a"]}]}', "not a text"), (b'{"messages": []}', "no message"),
    (b'{"messages": [{"role": "assistant", "content": ""}]}', "says nothing"),
    (b'{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]}', "no such role: tool"),
]


def test_records_that_make_no_example_are_counted_in_one_line_of_each_file(chat, tmp_path, capsys):
    good = b'{"prompt": "a", "completion": "b \\ud83d"}'
    for i, (line, why) in enumerate(BAD_RECORDS):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(good + b"\n\n" + line + b"\n" + b'{"no": 1}' + b"\n" + good)
        prepare_sft(str(path), f"{tmp_path}/out", chat, val_fraction=0)
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{path}: 2 of 4 records left out, the first for this: line 3: ") and why in first
        assert " 2 examples " in second
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_RECORDS))
    assert "no usable example" in refused(prepare_sft, f"{tmp_path}/x.jsonl", f"{tmp_path}/x", chat)
    assert not os.path.exists(tmp_path / "x")


@pytest.mark.parametrize("settings, message", [
    (dict(input="{}/none*"), "no such file"), (dict(input="{}/x.pdf"), r"x.pdf: expected .json"),
    (dict(input="{}/roles.jsonl", encoding="chat"), "roles.jsonl, line 2: a message has no role"),
    (dict(input="{}/roles.jsonl"), "roles.jsonl, line 1: the encoding has no chat template"),
    (dict(input="{}/cut.json.gz"), "cut.json.gz: incomplete or damaged"),
    (dict(input="{}/cut.json"), "cut.json: incomplete or damaged"),
    (dict(input="{}/quote.csv"), "quote.csv: incomplete or damaged (line"),
    (dict(val_fraction=0.01), "too few to split"),
    (dict(val_fraction=-1.0), "val_fraction=-1.0: must be"), (dict(block_size=0), "block_size=0"),
    (dict(prompt="{prompt"), "prompt='{prompt'"), (dict(completion="{}"), "a field needs a name"),
    (dict(encoding="gpt5"), "encoding gpt5"), (dict(out_dir="{}/x.pdf"), "x.pdf: File exists"),
])
def test_a_wrong_setting_or_file_is_one_line_and_nothing_is_written(chat, tmp_path, settings, message):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}] * 30)
    write_lines(tmp_path / "roles.jsonl", [{"messages": said}, {"messages": [{"content": "a"}]}])
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-9])
    (tmp_path / "cut.json").write_text('[{"prompt": "a"}, ')
    (tmp_path / "quote.csv").write_text('prompt,completion\n"a,b\nc,d\n')
    settings = dict(input="{}/x.jsonl", encoding="bytes", out_dir="{}/out") | settings
    settings = {key: value.replace("{}/", f"{tmp_path}/") if isinstance(value, str) else value
                for key, value in settings.items()}
    settings["encoding"] = chat if settings["encoding"] == "chat" else settings["encoding"]
    assert message in refused(prepare_sft, **settings)
    assert not os.path.exists(tmp_path / "out")


def test_a_full_disk_leaves_the_shards_that_were_there(questions, tmp_path, monkeypatch):
    prepare_sft(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", "bytes", **SETTINGS)
    before = {name: contents(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = refused(prepare_sft, f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", "bytes", seed=9, **SETTINGS)
    assert "No space left on device" in answer
    assert {name: contents(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out")} == before


def test_all_or_none_of_the_examples_may_be_for_validation_and_no_old_shard_stays_beside_them(questions, tmp_path):
    for fraction, split, other in ((1.0, "val", "train"), (0.0, "train", "val")):
        args = f"{tmp_path}/q_a.jsonl", f"{tmp_path}/{split}", "bytes"
        prepare_sft(*args, val_fraction=fraction, **SETTINGS)
        assert os.listdir(tmp_path / split) == [f"q-a_{split}_00000.bin"]
        answer = refused(prepare_sft, *args, val_fraction=1 - fraction, **SETTINGS)
        assert f"q-a_{split}_00000.bin: is of another split" in answer
        os.rename(tmp_path / split / f"q-a_{split}_00000.bin", tmp_path / split / "x")


TSV = '"a "quoted film\t1\nbad  one\t0\nno label\t-1\nshort\n'
CSV = '"What, ""roughly""?",3,4,5,6,B\n"two\nlines",a,b,c,d,A\n'


@pytest.mark.parametrize("name, content, settings, expected", [
    ("x.tsv", TSV,
     dict(columns="sentence,label", labels="negative,positive", prompt="{sentence}:", completion=" {label}"),
     ['"a "quoted film: positive', "bad  one: negative"]),
    ("x.tsv", "\ufeffsentence\tlabel\n" + TSV, dict(prompt="{sentence}:", completion=" {label}"),
     ['"a "quoted film: 1', "bad  one: 0", "no label: -1"]),
    ("x.csv", CSV,
     dict(columns="question,A,B,C,D,answer", prompt=r"{question}\nA {A} B {B} C {C} D {D}\n", completion="{answer}"),
     ['What, "roughly"?\nA 3 B 4 C 5 D 6\nB', "two\nlines\nA a B b C c D d\nA"]),
    ("x.json", ' [{"prompt": "a", "completion": 3}, 7]', {}, ["a3"]),
    ("x.json", '{"q": {"text": "a{b}"}, "c": ["x", "y"]}\n', dict(prompt="{q[text]}{{}}", completion="{c[1]}"),
     ["a{b}{}y"]),
    ("x.jsonl", '{"text": "a", "label": 1, "messages": 3}\n',
     dict(labels="n, y", prompt="{text}", completion="{label}"), ["ay"]),
])
def test_tables_lists_and_lines_become_examples_by_templates(tmp_path, name, content, settings, expected):
    for path, opened in ((name, open), (name + ".gz", gzip.open)):
        with opened(tmp_path / path, "wt", encoding="utf-8", newline="") as f:
            f.write(content)
        prepare_sft(f"{tmp_path}/{path}", f"{tmp_path}/out", "bytes", 63, val_fraction=0, packing=False, **settings)
        rows = open_shard(tmp_path / "out/x_train_00000.bin").tokens.reshape(-1, 64)
        assert sorted(bytes(row[row < 256].tolist()).decode() for row in rows) == sorted(expected)


def test_several_files_make_one_data_set(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": text, "completion": "x"}])
    prepare_sft(f"{tmp_path}/?.jsonl", f"{tmp_path}/my_out/", "bytes", 15, val_fraction=0)
    assert os.listdir(tmp_path / "my_out") == ["my-out_train_00000.bin"]
    assert sorted(examples_in(f"{tmp_path}/my_out/*.bin", get_encoding("bytes"), 15)) == [
        ("onex<|endoftext|>", "x<|endoftext|>"), ("twox<|endoftext|>", "x<|endoftext|>")]


def test_the_command_lines_newlines_and_flags_arrive(questions, tmp_path):
    command = [sys.executable, f"{HERE}/prepare_sft.py", f"--input={tmp_path}/q_a.jsonl", f"--out_dir={tmp_path}/out",
               "--encoding=bytes", r"--prompt=Q: {question}\nA:", "--completion= {answer}", "--block_size=255"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "60 examples (3 for validation)" in result.stdout, result.stderr
    text = bytes(t for t in read_shard(tmp_path / "out/q-a_train_00000.bin")[0].tolist() if t < 256).decode()
    assert text.count("\nA: ") == 57
    result = subprocess.run([*command, "--blok_size=3"], capture_output=True, text=True)
    assert result.returncode == 1 and "did you mean 'block_size'" in result.stderr and "Traceback" not in result.stderr


# -----------------------------------------------------------------------------
# shards that do not fit a run


def test_shards_of_another_tokenizer_row_length_or_kind_are_refused_by_name(chat, questions, tmp_path):
    prepare_sft(f"{tmp_path}/q_a.jsonl", f"{tmp_path}/out", chat, **SETTINGS)
    enc, pattern = get_encoding(chat), f"{tmp_path}/out/*_train_*.bin"
    known = dict(n_vocab=enc.n_vocab, fingerprint=fingerprint(enc))
    assert Windows(pattern, 127, 512, **known).rows and Windows(pattern, 127, 512).rows
    assert "q-a_train_00000.bin: was made with another tokenizer" in refused(
        Windows, pattern, 127, 512, **known | {"fingerprint": 5})
    assert "another tokenizer" in refused(Windows, pattern, 127, 512, **known | {"n_vocab": 401})
    assert "made for block_size 127, not 64" in refused(Windows, pattern, 64, 512)
    write_shard(f"{tmp_path}/out/z_train_0.bin", np.arange(200), 0)
    assert "do not mix" in refused(Windows, pattern, 127, 512)
    plain = f"{tmp_path}/out/z_train_0.bin"
    assert not Windows(plain, 127, 512, **known).rows  # of another maker: its vocabulary is not known


def test_a_shard_with_flags_that_is_not_whole_is_refused_by_name(tmp_path):
    path = str(tmp_path / "x.bin")
    write_shard(path, np.arange(12), 257, np.ones(12), 4, 99)
    shard, whole = open_shard(path), contents(path)
    assert shard.tokens.tolist() == list(range(12)) and shard.flags.tolist() == [1] * 12
    assert shard[1] == 257 and shard[3:] == (4, 99) and read_shard(path)[1] == 257
    assert np.frombuffer(whole[:1024], "<i4")[:7].tolist() == [20240520, 1, 12, 257, 4, 99, 0]
    assert len(whole) == 1024 + 12 * 3
    for content, message in ((whole[:-1], "1059 bytes, but 1060"), (whole[:16] + b"\5" + whole[17:], "no rows of 5"),
                             (whole[:16] + bytes(4) + whole[20:], "1060 bytes, but 1048")):
        (tmp_path / "x.bin").write_bytes(content)
        assert message in refused(open_shard, path)


def test_conversations_of_unknown_structure_are_told_from_those_without_a_role(chat):
    enc = get_encoding(chat)
    with pytest.raises(KeyError):
        conversation(enc, [{"from": "human", "value": "a"}])
    with pytest.raises(ValueError):
        conversation(enc, ["a"])
