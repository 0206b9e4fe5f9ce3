"""
Shards, records and texts that are not what they seem: a part of tests/test_faults.py.
    python -m pytest tests/test_faults_data.py
"""

import base64
import collections
import gzip
import json
import os
import random
import resource
import shutil
import sys
import tracemalloc

import pytest
import tiktoken

import numpy as np
import prepare_c4
from configurator import configure
from finetune import prepare_sft
from finetune.data import templates
from finetune.checkpoints.vocabularies import GPT2_SPLIT, LLAMA3_SPLIT
from prepare_c4 import check_made_of, prepare
from run import data, manifest, records
from run.data import Windows, open_windows
from run.encodings import fingerprint, get_encoding
from run.manifest import Manifest
from run.sources import open_source
from run.shards import open_shard, part_of, shard_paths, write_shard
from tests.common import refused, settings

# -----------------------------------------------------------------------------
# data that is wrong


def make(folder, pattern="*", **changes):
    """prepare() of texts in `folder`, into folder/out, by encoding "bytes"."""
    how = {"encoding": "bytes", "val_fraction": 0.25} | changes
    prepare(f"{folder}/{pattern}", f"{folder}/out", **how)


def write_texts(folder, **texts):
    """Files a/x.txt for a="...", so that all have the same name."""
    for name, text in texts.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "x.txt").write_text(text)


def all_texts(folder):
    """The texts in the shards of folder/out, each train part with its val part, sorted."""
    texts = []
    for path in shard_paths(f"{folder}/out", "train"):
        tokens = [*open_shard(path).tokens]
        val = path.replace("_train_", "_val_")
        if os.path.exists(val):
            tokens += [*open_shard(val).tokens]
        assert tokens.pop() == 256
        texts.append(bytes(tokens).decode())
    return sorted(texts)


def test_a_file_that_comes_later_takes_no_others_place(tmp_path, capsys):
    write_texts(tmp_path, b="text of b", d="text of d")
    make(tmp_path, "*/x.txt")
    before = {path: os.stat(path).st_mtime_ns for path in shard_paths(f"{tmp_path}/out", "train")}
    write_texts(tmp_path, a="text of a", c="text of c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of b", "text of c", "text of d"]
    assert all(os.stat(path).st_mtime_ns == time for path, time in before.items())
    assert capsys.readouterr().out.count("kept") == 4


def test_a_changed_file_is_read_again_and_that_is_said(tmp_path, capsys):
    write_texts(tmp_path, a="first text", b="other text")
    make(tmp_path, "*/x.txt")
    stat = os.stat(tmp_path / "a/x.txt")
    write_texts(tmp_path, a="fresh text")  # of the same length
    os.utime(tmp_path / "a/x.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["fresh text", "other text"]
    assert "made again" in capsys.readouterr().out


def test_a_moved_file_keeps_its_shard(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    os.rename(tmp_path / "a", tmp_path / "c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of b"]
    assert capsys.readouterr().out.count("kept") == 4


def test_a_removed_files_shards_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    os.unlink(tmp_path / "a/x.txt")
    assert "a/x.txt, of which it was made, is gone" in refused(make, tmp_path, "*/x.txt")
    write_texts(tmp_path, a="changed")
    assert "has changed" in refused(make, tmp_path, "b/x.txt")


def test_shards_of_other_files_are_told(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "a/x.txt")
    make(tmp_path, "b/x.txt")
    assert "2 more shards, of files that are not in this command" in capsys.readouterr().out
    assert all_texts(tmp_path) == ["text of a", "text of b"]


def test_other_settings_into_one_folder_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    assert "val_fraction=0.25, not 0.5" in refused(make, tmp_path, "a/x.txt", val_fraction=0.5)
    assert "val_fraction=0.25, not 0" in refused(make, tmp_path, "a/x.txt", val_fraction=0)
    assert all_texts(tmp_path) == ["text of a"]


def test_shards_of_an_unknown_maker_are_refused(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "a/x.txt")
    os.unlink(tmp_path / "out/shards.json")
    for pattern in ("a/x.txt", "b/x.txt"):
        assert "shards.json does not say" in refused(make, tmp_path, pattern)
    shutil.rmtree(tmp_path / "out")
    os.mkdir(tmp_path / "out")
    write_shard(f"{tmp_path}/out/llmc_train.bin", np.arange(99), 0)
    assert "llmc_train.bin: shards.json does not say" in refused(make, tmp_path, "a/x.txt")


def test_a_stop_between_two_names_is_made_good(tmp_path, monkeypatch):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="fresh text of a")
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    replace = os.replace
    for stop in range(4):  # the manifest, two shards, the manifest
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "before", tmp_path / "out")
        calls = iter(range(9))

        def stops(old, new):
            if next(calls) >= stop:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stops)
            with pytest.raises(KeyboardInterrupt):
                make(tmp_path, "*/x.txt")
        make(tmp_path, "*/x.txt")
        assert all_texts(tmp_path) == ["fresh text of a", "text of b"]
        made = Manifest.read(f"{tmp_path}/out")
        assert all(map(made.is_finished, made.names())) and len(made.names()) == 4


def test_a_folder_that_is_half_made_again_is_not_trained_on(tmp_path, capsys):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    s = settings(f"--data_dir={tmp_path}/out", "--encoding=bytes", "--block_size=1")
    open_windows(s, "train", 0)
    made = Manifest.read(f"{tmp_path}/out")
    made.begin({"x_train_00000.bin": made.entry("x_train_00000.bin")})
    assert "x_train_00000.bin: is to be made again" in refused(open_windows, s, "train", 0)
    open_windows(s, "val", 0)
    (tmp_path / "out/shards.json").write_text("{")
    open_windows(s, "train", 0)
    assert "note: " in capsys.readouterr().out


def test_a_shard_that_was_replaced_is_made_again(tmp_path, capsys):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    number = fingerprint(get_encoding("bytes"))
    write_shard(f"{tmp_path}/out/x_train_00000.bin", np.arange(50), 257, fingerprint=number)
    make(tmp_path, "a/x.txt")
    assert all_texts(tmp_path) == ["text of a"]
    assert "is another file since" in capsys.readouterr().out


def test_files_that_change_places_keep_their_shards(tmp_path):
    write_texts(tmp_path, a="text of a", b="text of b")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="text of b", b="text of a")
    make(tmp_path, "*/x.txt")
    write_texts(tmp_path, a="text of c")
    make(tmp_path, "*/x.txt")
    assert all_texts(tmp_path) == ["text of a", "text of c"]


def test_a_manifest_is_no_text(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "text of x"}')
    for _ in range(2):
        prepare(f"{tmp_path}/*.json", str(tmp_path), "bytes", val_fraction=0)
    assert shard_paths(tmp_path, "train") == [f"{tmp_path}/x_train_00000.bin"]


def test_two_commands_in_one_folder_do_not_meet(tmp_path):
    write_texts(tmp_path, a="text of a")
    with manifest.alone_in(f"{tmp_path}/out"):
        assert "another process makes shards there" in refused(make, tmp_path, "a/x.txt")
    make(tmp_path, "a/x.txt")


def damaged_manifests(whole):
    yield b""
    yield b"{"
    yield b"\xff"
    yield b"[" * 100_000
    yield b"[]"
    yield b'{"format": 1, "shards": []}'
    for old, new in (
        (b'"format": 1', b'"format": 2'),
        (b"true", b"1"),
        (b'"path"', b'"pth"'),
        (b'"n_vocab"', b'"vocab"'),
        (b"x_train_00000.bin", b"../x_train_00000.bin"),
        (b'"finished": true', b'"finished": NaN'),
    ):
        assert old in whole
        yield whole.replace(old, new)


def test_a_damaged_manifest_is_one_line(tmp_path):
    write_texts(tmp_path, a="text of a")
    make(tmp_path, "a/x.txt")
    path = tmp_path / "out/shards.json"
    for content in damaged_manifests(path.read_bytes()):
        path.write_bytes(content)
        assert "shards.json: " in refused(make, tmp_path, "a/x.txt")
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    assert "folder, where a file" in refused(make, tmp_path, "a/x.txt")


def test_a_file_that_is_no_shard_is_not_overwritten(tmp_path):
    write_texts(tmp_path, a="text of a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x_train_00000.bin").write_text("my own")
    assert "does not say of what" in refused(make, tmp_path, "a/x.txt")
    assert (tmp_path / "out/x_train_00000.bin").read_text() == "my own"


def test_shards_are_checked_against_data_input(tmp_path, capsys):
    write_texts(tmp_path, a="text of a", b="text of b")

    def check(pattern, encoding="bytes"):
        out = f"{tmp_path}/out"
        return check_made_of(f"{tmp_path}/{pattern}", out, encoding, val_fraction=0.25)

    make(tmp_path, "a/x.txt")
    assert check("a/x.txt")
    assert not check("*/x.txt")  # the other is still to be made
    assert "out are not those of --data_input" in refused(check, "b/x.txt")
    write_texts(tmp_path, a="text of ä")
    assert "has changed" in refused(check, "a/x.txt")
    os.unlink(tmp_path / "out/shards.json")
    assert check("a/x.txt")
    assert "is not read" in capsys.readouterr().out


# -- tokenizers


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    number = fingerprint(get_encoding("bytes"))
    cases = [
        (dict(n_vocab=257, fingerprint=number), "bytes", ""),
        (dict(n_vocab=257, fingerprint=number), "gpt2", "another tokenizer"),
        (dict(n_vocab=257, fingerprint=0), "gpt2", "another tokenizer"),
        (dict(n_vocab=257, fingerprint=number + 1), "bytes", "another tokenizer"),
        (dict(n_vocab=50257, fingerprint=data.TIKTOKEN["gpt2"][1]), "gpt2", ""),
        (dict(n_vocab=50257, fingerprint=data.TIKTOKEN["gpt2"][1]), "bytes", "another tokenizer"),
        (dict(n_vocab=0), "bytes", ""),  # llm.c's do not tell
        (dict(n_vocab=0), "gpt2", ""),
    ]
    for shard, encoding, message in cases:
        s = settings(f"--data_dir={tmp_path}", f"--encoding={encoding}", "--block_size=8")
        write_shard(f"{tmp_path}/x_val_0.bin", np.arange(99), **shard)
        if message:
            assert message in refused(open_windows, s, "val", None)
        else:
            open_windows(s, "val", None).batch(1)


def test_a_token_beyond_the_runs_encoding_is_refused(tmp_path):
    write_shard(f"{tmp_path}/x_train_0.bin", np.arange(500), 0)
    s = settings(f"--data_dir={tmp_path}", "--encoding=bytes", "--block_size=8")
    assert "token 499 is beyond the 257" in refused(open_windows, s, "train", 0)


def test_shards_of_two_tokenizers_do_not_mix(tmp_path):
    write_shard(f"{tmp_path}/a_train_0.bin", np.arange(99), 0)
    write_shard(f"{tmp_path}/b_train_0.bin", np.arange(99), 300, fingerprint=5)
    write_shard(f"{tmp_path}/c_train_0.bin", np.arange(99), 300, fingerprint=6)
    assert "c_train_0.bin: was made with" in refused(Windows, f"{tmp_path}/*.bin", 8, 300)


def test_offline_what_is_known_of_a_tokenizer_is_checked(tmp_path, monkeypatch, capsys):
    write_shard(f"{tmp_path}/a_train_0.bin", np.arange(99), 0)
    write_shard(f"{tmp_path}/b_train_0.bin", np.arange(99), 100277, fingerprint=5)

    def offline(name):
        raise SystemExit("error: encoding cl100k_base: vocabulary not fetched (no route)")

    monkeypatch.setattr(data, "get_encoding", offline)
    s = settings(f"--data_dir={tmp_path}", "--encoding=cl100k_base", "--block_size=8")
    s.vocab_size = 100352
    assert open_windows(s, "train", 0).total == 24
    assert "not known for sure" in capsys.readouterr().out
    for shard in (dict(n_vocab=257), dict(n_vocab=100277, fingerprint=6)):
        write_shard(f"{tmp_path}/c_val_0.bin", np.arange(99), **shard)
        assert "c_val_0.bin: was made with" in refused(open_windows, s, "val", 0)
    s.encoding = "gtp2"
    assert "not fetched" in refused(open_windows, s, "train", 0)


def test_gpt2_is_known_without_its_vocabulary():
    try:
        encoding = get_encoding("gpt2")
    except SystemExit:
        pytest.skip("GPT-2's vocabulary is not here")
    assert data.TIKTOKEN["gpt2"] == (encoding.n_vocab, fingerprint(encoding))


# -- names and shards


@pytest.mark.parametrize(
    "name, part",
    [
        ("x_train_00000.bin", "train"),
        ("tiny_shakespeare_train.bin", "train"),
        ("tiny_shakespeare_val.bin", "val"),
        ("fineweb_val_000000.bin", "val"),
        ("x_val_train_00000.bin", "train"),
        ("x_train_val.bin", "val"),
        ("x_train_00000.bin.qgalore-7-0.tmp", None),
        ("._x_train_00000.bin", None),
        ("trainer_0.bin", None),
        ("x_trains_0.bin", None),
        ("shards.json", None),
    ],
)
def test_a_shards_name_tells_its_one_part(tmp_path, name, part):
    assert part_of(name) == part
    (tmp_path / name).write_bytes(b"")
    found = [len(shard_paths(tmp_path, kind)) for kind in ("train", "val")]
    assert found == [part == "train", part == "val"]


def test_a_folder_of_any_name_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in ("[v1] sh", "a*b?", "é $x #'\"", "sub/"):
        os.makedirs(folder, exist_ok=True)
        write_shard(os.path.join(folder, "x_train.bin"), np.arange(99), 257)
        for written in (folder, f"{tmp_path}/{folder}", f"~/{folder}"):
            s = settings(f"--data_dir={written}", "--encoding=bytes", "--block_size=8")
            assert open_windows(s, "train", 0).total == 12
        assert "_val_" in refused(open_windows, s, "val", 0)


def test_odd_data_dirs_and_shards_are_one_line(tmp_path):
    s = settings(f"--data_dir={tmp_path}/x_train_0.bin", "--encoding=bytes")
    assert "no shards" in refused(open_windows, s, "train", 0)
    (tmp_path / "x_train_0.bin").write_bytes(b"")
    assert "Not a directory" in refused(open_windows, s, "train", 0)
    s.data_dir = str(tmp_path)
    for i, odd in enumerate((os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere", path))):
        folder = f"{tmp_path}/{i}"
        os.mkdir(folder)
        odd(f"{folder}/x_train_0.bin")
        s.data_dir = folder
        assert "x_train_0.bin: " in refused(open_windows, s, "train", 0)


def test_a_shard_that_is_replaced_during_a_run_is_refused(tmp_path):
    for i in range(2):
        write_shard(f"{tmp_path}/x_train_{i}.bin", np.arange(33), 257)
    windows = Windows(f"{tmp_path}/*.bin", 8, 257)
    windows.batch(4)
    write_shard(f"{tmp_path}/x_train_1.bin", np.arange(17), 257)
    assert "x_train_1.bin: another file took its place" in refused(windows.batch, 4)


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(
    "flags, message",
    [
        ([2, 0, 0, 0] * 3, "has no target"),
        ([3, 0, 0, 0] * 3, "has no target"),  # before its row's first token is nothing
        ([2, 1, 8, 0] * 3, "damaged: 8 is no flag"),
        ([2, 1, 1, 255] * 3, "damaged: 255"),
        ([2, 0, 0, 0] * 2 + [2, 0, 0, 1], ""),
    ],
)
def test_rows_without_a_target_are_refused(tmp_path, part, flags, message):
    write_shard(f"{tmp_path}/x_{part}_0.bin", np.arange(12), 257, flags, 4)
    s = settings(f"--data_dir={tmp_path}", "--encoding=bytes", "--block_size=3")
    if message:
        assert message in refused(open_windows, s, part, None)
    else:
        assert open_windows(s, part, None).total == 3


# -- memory, and where a text is cut


@pytest.fixture
def small_pieces(monkeypatch):
    """Sizes at which a short text is a long one."""
    monkeypatch.setattr(prepare_c4, "BLOCK", 64)
    monkeypatch.setattr(prepare_c4, "PIECE", 100)


WORDS = "the 's 'LL . ... -- 12345 ½ é नमस्ते क् 中文 。 字 мир العَرَبِيَّة ١٢ 👨‍👩‍👧 _ / "
WORDS += "a\u0301 \u200b"
SPACES = [" ", " ", "  ", "\n", "\n\n", "\r\n", "\r\n\r\n", "\t", " \n"]
SPACES += ["\xa0", "\u3000", "\x85", ""]
O200K_SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'ll)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'ll)?",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
])


@pytest.fixture
def pairs():
    """The ids of a few tokens of several characters, beside those of the bytes."""
    tokens = ["\n\n", "\r\n", " \n", "\n ", "  ", "th", "the", " t", ".\n", "/\n", "\n/", "。"]
    ranks = {bytes([b]): b for b in range(256)}
    return ranks | {token.encode(): 256 + i for i, token in enumerate(tokens)}


@pytest.mark.parametrize("split", [GPT2_SPLIT, LLAMA3_SPLIT, O200K_SPLIT])
def test_no_token_spans_a_cut_in_any_script(small_pieces, monkeypatch, tmp_path, split, pairs):
    enc = tiktoken.Encoding(
        "x", pat_str=split, mergeable_ranks=pairs, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: enc)
    rng = random.Random(0)
    text = "".join(rng.choice(WORDS.split(" ")) + rng.choice(SPACES) for _ in range(3000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": text}))
    make(tmp_path, "[xy].*", val_fraction=0)
    expected = [*enc.encode_ordinary(text), 300]
    shards = shard_paths(tmp_path / "out", "train")
    assert len(shards) == 2
    for path in shards:
        assert open_shard(path).tokens.tolist() == expected


@pytest.mark.parametrize("piece", ["a", "中", " ", "\n", ".", "привет мир\r\n\r\n", "слово "])
def test_a_text_of_any_kind_goes_in_small_blocks(small_pieces, piece, tmp_path):
    text = piece * (5000 // len(piece))
    (tmp_path / "x.txt").write_text(text, newline="")
    enc = get_encoding("bytes")
    made = collections.Counter()
    with open_source(f"{tmp_path}/x.txt") as stream:
        blocks = list(prepare_c4.text_blocks(stream, "x.txt", enc, made))
    assert b"".join(blocks).decode() == text
    assert max(len(block.decode()) for block in blocks) <= 64 + 100
    assert (made["cuts"] > 0) == (len(piece) == 1)


def test_a_tokenizer_that_marks_starts_gets_whole_texts(
    small_pieces, tmp_path, monkeypatch, capsys
):
    class Marks:
        name, n_vocab, eot_token, vocabulary, cuts_at_spaces = "marks", 999, 2, {}, False

        def encode_ordinary(self, text):
            return [1, *text.encode()]

    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: Marks())
    for name, size, starts in (("x", 90, 1), ("y", 290, 3)):
        (tmp_path / f"{name}.txt").write_text("word " * (size // 5))
        make(tmp_path, f"{name}.txt", val_fraction=0)
        tokens = open_shard(f"{tmp_path}/out/{name}_train_00000.bin").tokens.tolist()
        assert tokens.count(1) == starts
        assert f"cut at {starts - 1} places" in capsys.readouterr().out or starts == 1


def test_over_a_million_spaces_are_a_text(tmp_path, monkeypatch, pairs, capsys):
    enc = tiktoken.Encoding(
        "x", pat_str=GPT2_SPLIT, mergeable_ranks=pairs, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setattr(prepare_c4, "get_encoding", lambda name: enc)
    text = "a" + " " * 1_200_000 + "b"  # tiktoken gives up on a million
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
    make(tmp_path, "x.jsonl", val_fraction=0)
    tokens = open_shard(f"{tmp_path}/out/x_train_00000.bin").tokens
    assert enc.decode(tokens[:-1].tolist()) == text
    assert "cut at 2 places" in capsys.readouterr().out


def test_a_line_without_end_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "LONGEST", 1000)
    long = '{"text": "' + "a" * 5000 + '"}'
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as f:
        f.write("\n".join(['{"text": "one"}', long, '{"text": "two"}']))
    make(tmp_path, "x.jsonl.gz", val_fraction=0)
    assert open_shard(f"{tmp_path}/out/x_train_00000.bin").tokens.tolist() == [
        *b"one", 256, *b"two", 256
    ]
    assert "1 records left out: longer than" in capsys.readouterr().out


def test_a_header_counts_the_last_token_too(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "MOST_TOKENS", 10)
    (tmp_path / "x.txt").write_text("123456789")
    make(tmp_path, "x.txt", val_fraction=0)
    (tmp_path / "y.txt").write_text("1234567890")
    assert "more than 10 tokens" in refused(make, tmp_path, "y.txt", val_fraction=0)


@pytest.mark.parametrize(
    "content, message",
    [
        ("café".encode("latin-1"), "at byte 3: not UTF-8"),
        (b"a" * 99 + b"\xc3", "at byte 99: not UTF-8"),
        ("text".encode("utf-16-le"), "at byte 1: has NUL bytes"),
        (b"\xff\xfea", "not as its byte order mark says"),
        (b"", "no text"),
    ],
)
def test_a_text_that_is_not_utf8_is_refused(small_pieces, tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    assert message in refused(make, tmp_path)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_text_with_a_byte_order_mark_is_decoded(small_pieces, tmp_path, encoding):
    text = "слово и слово, 🙂 " * 50
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    (tmp_path / "y.jsonl").write_bytes(json.dumps({"text": text}).encode(encoding))
    make(tmp_path, val_fraction=0)
    assert all_texts(tmp_path) == [text, text]


def test_lists_and_tables_are_documents_too(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(40)]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.csv").write_text("id,text\n" + "".join(f"{i},text {i}\n" for i in range(40)))
    make(tmp_path, val_fraction=0)
    for name in "abc":
        tokens = open_shard(f"{tmp_path}/out/{name}_train_00000.bin").tokens
        assert (tokens == 256).sum() == 40


# -- what people type to prepare_c4.py


def test_odd_inputs_of_prepare_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.txt")
    os.mkfifo("pipe.txt")
    write_texts(tmp_path, a="text of a")
    for pattern, message in (
        ("folder.txt", "is a folder"),
        ("pipe.txt", "is no ordinary file"),
        ("none.txt", "no such file"),
        ("a/x.txt/y.txt", "no such file"),
    ):
        assert message in refused(prepare, pattern, "out", "bytes")
    assert "File exists" in refused(prepare, "a/x.txt", "a/x.txt", "bytes")
    assert "out_dir is empty" in refused(prepare, "a/x.txt", "", "bytes")
    assert shard_paths("out", "train") == []


def test_any_name_of_a_text_makes_shards_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = ["a [1].txt", "it's $x #.txt", ".hidden.txt", "é_val_.TXT", "x" * 250 + ".txt"]
    for name in names:
        (tmp_path / name).write_text(f"text of {name[:20]}")
        prepare(f"~/{name}", "~/out", "bytes", val_fraction=0)
    assert all_texts(tmp_path) == sorted(f"text of {name[:20]}" for name in names)


def test_a_full_disk_leaves_no_shard_and_one_line(tmp_path):
    write_texts(tmp_path, a="text " * 5000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert "File too large" in refused(make, tmp_path, "a/x.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == []


def die(*args):
    os._exit(9)


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_c4, "worth_processes", lambda jobs: True)
    monkeypatch.setattr(prepare_c4, "tokenize_text", die)
    write_texts(tmp_path, a="text of a")
    assert "was killed" in refused(make, tmp_path, "a/x.txt", workers=2)
    assert os.listdir(tmp_path / "out") == []


# -----------------------------------------------------------------------------
# records and texts

RECORDS = [{"text": f"{i} é — \U0001f642", "n": i} for i in range(40)]


def json_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


LAYOUTS = {  # how people write records
    "lines": json_lines(RECORDS),
    "list": json.dumps(RECORDS),
    "a record a line of a list": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "over several lines": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "one after the other": "\n".join(json.dumps(r, indent=1) for r in RECORDS),
    "with empty lines": "\r\n\n" + json_lines(RECORDS).replace("\n", "\r\n\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".JSONL", ".json.gz"])
def test_every_layout_of_records_gives_all_of_them(tmp_path, monkeypatch, layout, ending):
    monkeypatch.setattr(records, "BLOCK", 100)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        content = LAYOUTS[layout].encode(encoding)
        path = tmp_path / f"{encoding}{ending}"
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
        assert [record for _, record in records.records(str(path))] == RECORDS


def read(folder, name, content, columns=""):
    """[(where, record, or why it is none)] of a file, or the line that refuses it."""
    path = folder / name
    path.write_bytes(content)
    try:
        found = list(records.records(str(path), columns))
    except SystemExit as e:
        assert str(e).startswith(f"error: {path}: ") and "\n" not in str(e)
        return str(e)
    return [(where, str(r) if isinstance(r, ValueError) else r) for where, r in found]


CP1252 = "naïve, 5 €\n".encode("windows-1252")
NOT_TEXT = [  # content, and what is said
    (CP1252, "not UTF-8: convert it"),
    ("naïve, 5\n".encode("utf-16-le"), "NUL bytes: if it is UTF-16"),
    ("naïve, 5\n".encode("utf-16-be"), "NUL bytes: if it is UTF-16"),
    (b"text\0text", "NUL bytes"),
    ("é".encode()[:1], "not UTF-8"),
]


@pytest.mark.parametrize("content, why", NOT_TEXT)
def test_what_is_no_text_is_said_with_its_place(tmp_path, content, why):
    for kind in ("csv", "tsv"):
        answer = read(tmp_path, f"x.{kind}", b"a,b\n1,2\n" + content)
        assert "line 3: " in answer and why in answer
    line = json.dumps({"text": "good"}).encode() + b"\n"
    found = read(tmp_path, "x.jsonl", line + b'{"text": "' + content.strip() + b'"}\n' + line)
    assert found[0] == ("line 1", {"text": "good"}) and found[-1][1] == {"text": "good"}
    assert found[1][0] == "line 2" and why in found[1][1]
    answer = read(tmp_path, "x.json", b'[{"text": "' + content + b'"}]')
    assert "record 1" in answer and why in answer


NO_RECORDS = [
    (b"not JSON", "not JSON"),
    (b'{"a": 1', "not JSON"),
    (b'{"a": NaN}', "NaN is no number in JSON"),
    (b'{"a": [-Infinity]}', "-Infinity is no number in JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    (b"7", "not a JSON object"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
]


@pytest.mark.parametrize("line, why", NO_RECORDS)
def test_a_line_that_is_no_record_leaves_the_others(tmp_path, line, why):
    [first, bad, last] = read(tmp_path, "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}')
    assert (first[1], last) == ({"a": 1}, ("line 3", {"a": 2}))
    assert bad[0] == "line 2" and why in bad[1]


DAMAGED = [
    ("x.json", b'[{"a": 1}, {"a": ', "record 2: incomplete or damaged"),
    ("x.json", b'[{"a": 1}', "the list has no end"),
    ("x.json", b'[{"a": 1} x]', "record 2: incomplete or damaged"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "incomplete or damaged"),
    ("x.jsonl.gz", b'{"a": 1}\n', "incomplete or damaged (Not a gzipped file"),
    ("x.jsonl", b"\xff\xfe{", "not as its byte order mark says"),
    ("x.csv", b'a,"b\n1,2\n3,4\n', "line 1: unexpected end of data"),
    ("x.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 3: unexpected end of data"),
    ("x.csv", b'a,b\n"1"2,3\n', "line 2: ',' expected after"),
    ("x.csv", b"a,b,a\n1,2,3\n", "line 1: two columns are called 'a'"),
    ("x.txt", b"text", "is text, where records were expected"),
    ("x.parquet", b"PAR1", "expected .json, .jsonl, .csv"),
]


@pytest.mark.parametrize("name, content, why", DAMAGED)
def test_a_file_that_is_not_whole_is_one_line(tmp_path, name, content, why):
    assert why in read(tmp_path, name, content)


def test_rows_of_tables_are_told_from_what_is_none(tmp_path):
    table = b'text,"la,bel"\r\n"two\nlines",1\r\n\r\n  ,\r\nragged\r\n"say ""x""",2\r\n'
    assert read(tmp_path, "x.csv", table) == [
        ("line 2", {"text": "two\nlines", "la,bel": "1"}),
        ("line 6", "1 fields instead of 2, text,la,bel"),
        ("line 7", {"text": 'say "x"', "la,bel": "2"}),
    ]
    assert read(tmp_path, "x.tsv", b'a\tb\n"open\t1\n')[0][1] == {"a": '"open', "b": "1"}
    old_mac = read(tmp_path, "x.csv", b"a,b\r1,2\r3,4\r")
    assert [record for _, record in old_mac] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    # a header that the user names, too, is no record
    assert read(tmp_path, "x.tsv", b"a\tb\n1\t2\n", "a,b") == [("line 2", {"a": "1", "b": "2"})]
    # larger than csv's own limit of a field
    [(_, long)] = read(tmp_path, "x.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert len(long["a"]) == 200_000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "json"])
def test_a_line_without_end_takes_little_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(records, "LONGEST", 1 << 16)
    monkeypatch.setattr(records, "BLOCK", 1 << 12)
    long = b'"' + b"x" * (1 << 23) + b'"'
    if kind == "json":
        content = b"[" + long + b"]"
    else:
        content = b'{"a": 1}\n' + long + b'\n{"a": 2}\n'
    path = tmp_path / f"x.{kind}.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content, long
    tracemalloc.start()
    try:
        found = [str(record) for _, record in records.records(str(path))]
    except SystemExit as e:
        found = str(e)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    if kind == "jsonl":
        assert found == ["{'a': 1}", "longer than 0 MiB", "{'a': 2}"]
    else:
        assert "longer than 0 MiB" in found


def test_zst_is_read_or_the_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    assert "pip install zstandard" in read(tmp_path, "x.jsonl.zst", b"")
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    frame = zstandard.compress(json_lines(RECORDS).encode())
    for content in (frame, frame + zstandard.compress(b"\n" * 9)):
        assert [r for _, r in read(tmp_path, "x.jsonl.zst", content)] == RECORDS
    for content in (frame[:-3], frame[:20] + b"????" + frame[24:], b"no frame"):
        assert "incomplete or damaged" in read(tmp_path, "x.jsonl.zst", content)


def test_a_path_is_meant_as_it_stands(tmp_path, monkeypatch):
    folder = tmp_path / "[v1] $x #'é"
    folder.mkdir()
    for name in ("b.jsonl", "a [1].jsonl"):
        (folder / name).write_text('{"a": 1}\n')
    (folder / "c.jsonl").mkdir()
    both = [f"{folder}/a [1].jsonl", f"{folder}/b.jsonl"]
    assert records.matching(both[0]) == both[:1]
    assert records.matching(f"{folder}/*.jsonl") == both
    monkeypatch.setenv("HOME", str(folder))
    assert records.matching("~/b.jsonl") == both[1:]
    monkeypatch.chdir(folder)
    assert records.matching("a [1].jsonl") == ["a [1].jsonl"]
    os.mkfifo(folder / "pipe.jsonl")
    assert "is no ordinary file" in refused(records.matching, "pipe.jsonl")
    assert "is a folder" in refused(records.matching, ".")
    assert "no such file" in refused(records.matching, "none*")
    assert "--input is missing" in refused(records.matching, "")


def test_what_is_left_out_is_said_by_its_reason(capsys):
    left_out = records.Skipped()
    for i in range(5):
        left_out.add("not JSON", f"line {i + 1}")
    later = records.Skipped()
    later.add("not UTF-8", "line 7", 20)
    later.add("not JSON", "line 8")
    left_out.merge(later)
    left_out.say("x.jsonl", 40)
    assert left_out.total == 26
    assert capsys.readouterr().out.splitlines() == [
        "x.jsonl: 20 of 40 records left out: not UTF-8 (the first: line 7)",
        "x.jsonl: 6 of 40 records left out: not JSON (the first: line 1)",
    ]


def sft(folder, pattern, out="out", **settings):
    """prepare_sft of files in `folder`, into folder/out; the names that are there afterwards."""
    settings = {"encoding": "bytes", "block_size": 63, "packing": False} | settings
    settings |= {"input": f"{folder}/{pattern}", "out_dir": f"{folder}/{out}"}
    argv = [f"--{name}={value}" for name, value in settings.items()]
    prepare_sft.prepare_sft(configure(prepare_sft, argv=argv))
    return sorted(name for name in os.listdir(folder / out) if name.endswith(".bin"))


def write_examples(path, texts):
    path.write_text(json_lines({"prompt": text, "completion": f" {text}!"} for text in texts))


def rows_of(path):
    shard = open_shard(path)
    return {tuple(row) for row in shard.tokens.reshape(-1, shard.row).tolist()}


def test_a_folder_holds_the_shards_of_one_input(tmp_path, capsys):
    write_examples(tmp_path / "a.jsonl", [f"a{i}" for i in range(100)])
    write_examples(tmp_path / "b.jsonl", [f"b{i}" for i in range(90)])
    made = ["a_train_00000.bin", "a_val_00000.bin"]
    assert sft(tmp_path, "a.jsonl") == made
    before = rows_of(tmp_path / "out/a_train_00000.bin")
    for pattern in ("?.jsonl", "b.jsonl"):
        answer = refused(sft, tmp_path, pattern)
        assert "a_train_00000.bin: was made of" in answer and "a.jsonl, not of this" in answer
    assert rows_of(tmp_path / "out/a_train_00000.bin") == before

    # by the same input it is replaced, and what changes is said
    capsys.readouterr()
    assert sft(tmp_path, "a.jsonl", seed=2) == made
    assert "a_train_00000.bin is replaced: it had seed=1337, not 2" in capsys.readouterr().out
    assert rows_of(tmp_path / "out/a_train_00000.bin") != before
    write_examples(tmp_path / "a.jsonl", ["new", "and newer"])
    assert "too few to split" in refused(sft, tmp_path, "a.jsonl")
    assert "with another split" in refused(sft, tmp_path, "a.jsonl", val_fraction=0)


def test_train_and_val_of_two_files_share_a_folder(tmp_path):
    write_examples(tmp_path / "fit.jsonl", ["a", "b"])
    write_examples(tmp_path / "dev.jsonl", ["c", "d"])
    write_examples(tmp_path / "fit2.jsonl", ["a", "b"])
    write_examples(tmp_path / "more.jsonl", ["e"])
    sft(tmp_path, "fit.jsonl", val_fraction=0)
    for changes, why in (
        ({"pattern": "fit2.jsonl"}, "with another split"),
        ({"pattern": "[fm]*t.jsonl"}, "with another split"),
        ({"pattern": "dev.jsonl", "block_size": 31}, "block_size=63, not 31"),
        ({"pattern": "more.jsonl", "val_fraction": 0}, "not of this input"),
    ):
        answer = refused(sft, tmp_path, **{"val_fraction": 1} | changes)
        assert "fit_train_00000.bin: was made" in answer and why in answer
    made = sft(tmp_path, "dev.jsonl", val_fraction=1)
    assert made == ["dev_val_00000.bin", "fit_train_00000.bin"]


def test_shards_that_no_manifest_tells_are_not_mixed_in(tmp_path):
    write_examples(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "out").mkdir()
    for name in ("a_train_00000.bin", "c4_val_00000.bin"):
        write_shard(f"{tmp_path}/out/{name}", np.arange(99), 257)
        answer = refused(sft, tmp_path, "a.jsonl", val_fraction=0)
        assert f"{name}: was made of something that shards.json does not tell" in answer
        os.unlink(tmp_path / "out" / name)
    (tmp_path / "out/shards.json").write_text("{")
    assert "shards.json: damaged" in refused(sft, tmp_path, "a.jsonl", val_fraction=0)


def test_twins_are_on_one_side_of_the_split(tmp_path, capsys):
    texts = [f"text {i % 40}" for i in range(120)]
    write_examples(tmp_path / "a.jsonl", texts)
    sft(tmp_path, "a.jsonl", val_fraction=0.2)
    assert "80 repeat another" in capsys.readouterr().out
    train = rows_of(tmp_path / "out/a_train_00000.bin")
    val = rows_of(tmp_path / "out/a_val_00000.bin")
    assert not train & val
    assert (len(train), len(val)) == (32, 8)
    write_examples(tmp_path / "b.jsonl", ["same"] * 40)
    answer = refused(sft, tmp_path, "b.jsonl", out="other")
    assert "40 examples, of them 1 different, are too few" in answer


def test_columns_and_fields_without_a_use_are_said_once(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("id,q,a,note\n1,x,y,\n2,x2,y,z\n3,x3,y,\n")
    sft(tmp_path, "x.csv", prompt="{q}", completion=" {a}", val_fraction=0)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "not used" in line] == [
        f"{tmp_path}/x.csv: not used: the field 'id' (3 of 3 records; the first: line 2)",
        f"{tmp_path}/x.csv: not used: the field 'note' (1 of 3 records; the first: line 3)",
    ]
    (tmp_path / "y.jsonl").write_text(json_lines([{"q": "x", "a": ["y"]}]))
    answer = refused(sft, tmp_path, "y.jsonl", "o2", prompt="{q}", completion="{a}")
    assert "no usable example" in answer
    assert "is a list or an object: name its part" in capsys.readouterr().out
    sft(tmp_path, "y.jsonl", "o2", prompt="{q}", completion="{a[0]}", val_fraction=0)


def test_an_example_of_a_million_spaces_is_cut(tmp_path, monkeypatch):
    path = tmp_path / "ranks"
    path.write_text("".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))
    spaces = " " * 1_000_000
    (tmp_path / "x.jsonl").write_text(json_lines([{"prompt": "a", "completion": f"b{spaces}c"}]))
    sft(tmp_path, "x.jsonl", encoding=path, val_fraction=0)
    [row] = rows_of(tmp_path / "out/x_train_00000.bin")
    assert bytes(row) == b"ab" + b" " * 62

@pytest.mark.parametrize("content, kept", [
    ('{"data": [\n{"text": "a"},\n{"text": "b"}\n]}', 0),  # one record, which has no text
    ('{"text": "a", "of": [\n{"b": 1},\n{"b": 2}]}\n{"text": "c"}\n', 2),
    ('{"text": "a",\n"n": ' + "9" * 5000 + '}', None),  # refused: no number of that size
    ('{"text": "cut of\n{"text": "b"}\n{"text": "c"}\n', 2),  # the first line is damaged
    ('{"text": "cut",\n{"text": "b"}\n{"text": "c"}\n', 2),
])
def test_lines_are_records_where_each_is_one(tmp_path, content, kept):
    path = tmp_path / "x.json"
    path.write_text(content)
    if kept is None:
        assert "record 1" in refused(list, records.records(str(path)))
        return
    found = [record for _, record in records.records(str(path)) if isinstance(record, dict)]
    assert sum("text" in record for record in found) == kept


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", gzip.compress(b'{"text": "a"}')),
    ("x.txt.gz", gzip.compress(gzip.compress(b"twice"))),
    ("x.csv", b"\x28\xb5\x2f\xfd" + b"of zstd"),
])
def test_compressed_data_of_another_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = refused(open_source, str(tmp_path / name))
    assert name in line and "unpack it, or name it" in line


@pytest.mark.parametrize("text, why", [
    ("{prompt.upper}", "named in brackets"),
    ("{prompt[a].b}", "named in brackets"),
    ("{}", "needs a name"),
])
def test_a_template_names_no_python(text, why):
    assert why in refused(templates.template, "prompt", text)


def test_a_template_writes_no_huge_text():
    assert templates.fill("{a:>4}{b[x.y]}", {"a": "p", "b": {"x.y": 5}}) == "   p5"
    for template in ("{a:>1000000000000}", "{a:{b}}"):
        with pytest.raises(ValueError, match="more than 9,999"):
            templates.fill(template, {"a": "p", "b": 10**12})


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.tsv").write_text("a\tb\n")
    assert "'text'" in refused(list, records.records(str(tmp_path / "x.tsv"), "text,text"))


def test_a_table_without_a_column_of_text(tmp_path):
    (tmp_path / "x.csv").write_text("Text;label\nabc;1\n")
    line = refused(prepare, input=str(tmp_path / "x.csv"), out_dir=str(tmp_path / "o"),
                   encoding="bytes", workers=1)
    assert 'a "text", which is to be a name in the first' in line
